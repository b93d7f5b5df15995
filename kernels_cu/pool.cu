// Token means and pooled blocks: what stage 1 needs to know of Q and K (arXiv:2502.18137, 3.2).
//
//   token_mean[c]  =  (1/N) sum_t x[t][c]                               N real tokens of a sequence
//   block_mean[c]  =  (1/n) sum_t y[t][c],    y = x - token_mean (K)  or  y = x (Q)
//   similarity     =  | (1/n) sum_t u[t] |^2, u = y / |y|               n real tokens of the block
//
// The similarity is the mean of u_s . u_t over all pairs of tokens, in [0, 1]. Its edges, which are
// those of cusparge.reference:
//   - A token that is zero (or, less its mean, no more than what rounding left of zero) has no
//     direction: it counts in n and adds nothing. A block of nothing else has similarity 1.
//   - A block without a real token has mean 0 and similarity 1: nothing may reach it, and both
//     values are harmless in whatever is computed for it and thrown away.
//   - An element that is NaN or infinite counts as 0, before and after the mean is taken off. Its
//     block has similarity -1, which no threshold in [-1, 1] lies below: it is always computed.
//
// Layout. x is (batch, head, token, channel) at any address, through any byte strides, of float16,
// bfloat16 or float32, with 1 to 256 contiguous channels. Everything else is float32, contiguous:
// token_mean (batch, head, channel), block_mean (batch, head, block, channel), similarity (batch,
// head, block). Every element of an output is written, whatever the lengths are.
//
// Three kernels, in one dimension of grid that depends on shapes alone, 128 threads each (512 in
// the second):
//   sum_chunks   (batch * head * chunks of 256 tokens)   column sums of each chunk
//   finish_mean  (batch * head * groups of 32 channels)  the chunks' sums, in order, over N
//   pool_blocks  (batch * head * blocks)                 reads x once; a block is 64 or 128 tokens
// Sums have one fixed order, so results repeat bit for bit, and no float is added atomically.
//
// Magnitudes. Any finite x works. Sums run on 2^-9 x: 256 numbers near the largest float32, or 128
// differences of two, stay finite, and a result is off by less than 2^-137 for it. A mean beyond
// float32 becomes the largest number that is not. Squares are trusted while their sum over a token,
// in these units, lies between 2^-80 and 2^120. Elsewhere, and so for every token with a NaN or an
// infinity, the warp takes the careful path, which clears such elements and scales the token by its
// largest magnitude first. Of ordinary data, only tokens that are zero go there.
//
// Shared memory: the sums of all threads, 2 to 8 KiB. No tensor cores and no asynchronous copies:
// for compute capability 8.0 and later; compiled and checked for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0.

#include "cusparge/params.cuh"
#include "cusparge/pooling.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

struct PoolConfig {
  Dtype dtype;
  int head_dim;  // 64, 128 or 256: room for that many channels
};

template <PoolConfig kConfig>
using PoolTile = RowTile<kConfig.dtype, kConfig.head_dim>;

inline constexpr int kChunkTokens = 256;  // cusparge._cuda.pooling.CHUNK_TOKENS
inline constexpr int kMeanThreads = 512;  // cusparge._cuda.pooling.MEAN_THREADS
static_assert(kChunkTokens * kSumUnit < 1, "a chunk's sum is finite");

// ---- mean over the tokens ----------------------------------------------------------------------

// Add the tokens first, first + kSlots, ... to the column sums, in kSumUnit; with kClear, what is
// not finite counts as 0.
template <PoolConfig kConfig, int kAccess, int kTokens, bool kClear>
CS_DEV void add_to_sum(const HeadRows& rows, int first, int end, int lane,
                       float (&sum)[PoolTile<kConfig>::kChannels]) {
  using Tile = PoolTile<kConfig>;
  V4 tokens[kTokens][Tile::kPieces];
  load_tokens<Tile, kAccess>(rows, first, end, lane, tokens);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float x[Tile::kChannels];
    widen<kConfig.dtype>(tokens[i], x);
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) {
      if (!kClear || is_finite(x[c])) sum[c] = ptx::fma(x[c], kSumUnit, sum[c]);
    }
  }
}

template <PoolConfig kConfig>
CS_KERNEL void __launch_bounds__(kThreads, 6) sum_chunks(const SumParams params) {
  using Tile = PoolTile<kConfig>;
  CS_SMEM(smem);
  float* s_sums = reinterpret_cast<float*>(smem);
  const u32 item = ptx::block_x();
  const u32 chunk_idx = item % params.num_chunks;
  const u32 head = item / params.num_chunks;  // of all batch items
  const u32 head_idx = head % params.rows.num_heads;
  const u32 batch_idx = head / params.rows.num_heads;

  const s64 tokens = real_tokens(params.lengths, params.rows.num_tokens, batch_idx);
  const s64 begin = static_cast<s64>(chunk_idx) * kChunkTokens;
  if (begin >= tokens) return;  // finish_mean reads the chunks in front of it only
  const s64 rest = tokens - begin;
  const int count = rest < kChunkTokens ? static_cast<int>(rest) : kChunkTokens;

  const HeadRows rows =
      head_rows(params.x, params.rows, batch_idx, head_idx, begin, Tile::kElementBytes);
  const Place<Tile> place;
  float sum[Tile::kChannels] = {};
  int first = place.slot;
  if (rows.access_bytes == 16) {
    for (; first < count; first += Tile::kBatch * Tile::kSlots) {
      add_to_sum<kConfig, 16, Tile::kBatch, false>(rows, first, count, place.lane, sum);
    }
  } else if (rows.access_bytes == 4) {
    for (; first < count; first += Tile::kSlots) {
      add_to_sum<kConfig, 4, 1, false>(rows, first, count, place.lane, sum);
    }
  } else if constexpr (Tile::kElementBytes == 2) {
    for (; first < count; first += Tile::kSlots) {
      add_to_sum<kConfig, 2, 1, false>(rows, first, count, place.lane, sum);
    }
  }
  // Finite numbers cannot reach infinity in these units: a NaN or an infinity was read. Start again
  // and leave it out.
  bool is_clean = true;
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) is_clean = is_clean && is_finite(sum[c]);
  if (!is_clean) {
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) sum[c] = 0.0f;
    for (first = place.slot; first < count; first += Tile::kSlots) {
      add_to_sum<kConfig, Tile::kElementBytes, 1, true>(rows, first, count, place.lane, sum);
    }
  }

  store_sums<Tile>(s_sums, place, sum);
  ptx::sync_block();  // all slots are stored before any is read
  const int head_dim = static_cast<int>(params.rows.head_dim);
#pragma unroll 1
  for (int channel = static_cast<int>(ptx::thread_x()); channel < head_dim; channel += kThreads) {
    params.partial[static_cast<s64>(item) * head_dim + channel] = sum_slots<Tile>(s_sums, channel);
  }
}

// A lane a channel; the warps share the chunks. A block of threads is kChannels channels of a head.
template <int kChannels>
CS_KERNEL void __launch_bounds__(kMeanThreads) finish_mean(const MeanParams params) {
  static_assert(kChannels == 32, "a lane each");
  constexpr int kMeanWarps = kMeanThreads / 32;
  CS_SMEM(smem);
  float* s_sums = reinterpret_cast<float*>(smem);  // [warp][channel]
  const int lane = static_cast<int>(ptx::thread_x()) % 32;
  const int warp = static_cast<int>(ptx::thread_x()) / 32;
  const u32 groups = (params.head_dim + kChannels - 1) / kChannels;
  const u32 head = ptx::block_x() / groups;  // of all batch items
  const u32 channel = ptx::block_x() % groups * kChannels + lane;

  const s64 tokens = real_tokens(params.lengths, params.num_tokens, head / params.num_heads);
  const s64 chunks = (tokens + kChunkTokens - 1) / kChunkTokens;
  float sum = 0.0f;
  if (channel < params.head_dim) {
    // The weight goes on before adding: each term is at most the largest |x|, and so is the sum,
    // but for rounding.
    const float weight = tokens > 0 ? 1.0f / (kSumUnit * static_cast<float>(tokens)) : 0.0f;
    const float* partial =
        params.partial + static_cast<s64>(head) * params.num_chunks * params.head_dim + channel;
#pragma unroll 4
    for (s64 chunk = warp; chunk < chunks; chunk += kMeanWarps) {
      sum = ptx::fma(partial[chunk * params.head_dim], weight, sum);
    }
  }
  s_sums[warp * 32 + lane] = sum;
  ptx::sync_block();  // all warps' sums are stored before the first warp reads them
  if (warp == 0 && channel < params.head_dim) {
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMeanWarps; ++i) sum += s_sums[i * 32 + lane];
    params.token_mean[static_cast<s64>(head) * params.head_dim + channel] = saturated(sum);
  }
}

// ---- blocks ------------------------------------------------------------------------------------

// The mean in this lane's channels; zero without one.
template <class Tile>
CS_DEV void load_mean(const float* mean_row, int head_dim, int lane,
                      float (&mean)[Tile::kChannels]) {
  if (mean_row != nullptr) {
    load_row_float<Tile>(mean_row, head_dim, lane, mean);
  } else {
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) mean[c] = 0.0f;
  }
}

// Add the tokens first, first + kSlots, ... whose sums of squares can be trusted. Returns a bit for
// each of the others, the same in the whole warp: if one slot's token is left, all slots' are.
// `offset` is minus the mean in kSumUnit. Whole warps call.
template <PoolConfig kConfig, int kAccess, int kTokens>
CS_DEV u32 add_tokens(const HeadRows& rows, int first, int end, int lane, float floor,
                      const float (&offset)[PoolTile<kConfig>::kChannels],
                      BlockSums<PoolTile<kConfig>::kChannels>& sums) {
  using Tile = PoolTile<kConfig>;
  V4 tokens[kTokens][Tile::kPieces];
  load_tokens<Tile, kAccess>(rows, first, end, lane, tokens);
  u32 left = 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const bool is_real = first + i * Tile::kSlots < end;
    float y[Tile::kChannels];
    widen<kConfig.dtype>(tokens[i], y);
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) {
      y[c] = ptx::fma(y[c], kSumUnit, offset[c]);
      squares = ptx::fma(y[c], y[c], squares);
    }
    squares = lanes_sum<Tile::kLanes>(squares);
    const bool is_ordinary = squares > floor && squares <= kLargeSquare;  // false for NaN
    if (ptx::ballot(is_real && !is_ordinary) != 0) {
      left |= 1u << i;
    } else if (is_real) {
      add_ordinary(y, squares, sums);
    }
  }
  return left;
}

// Add a token whose sum of squares cannot be trusted; it is read again, so that the registers are
// free for it. Whole warps call.
template <PoolConfig kConfig>
CS_DEV void add_carefully(const HeadRows& rows, int token, int end, int lane, const float* mean_row,
                          int head_dim, BlockSums<PoolTile<kConfig>::kChannels>& sums) {
  using Tile = PoolTile<kConfig>;
  V4 pieces[1][Tile::kPieces];
  load_tokens<Tile, Tile::kElementBytes>(rows, token, end, lane, pieces);
  float x[Tile::kChannels];
  widen<kConfig.dtype>(pieces[0], x);
  float mean[Tile::kChannels];
  load_mean<Tile>(mean_row, head_dim, lane, mean);
  float y[Tile::kChannels];
  add_careful<Tile>(x, mean, token < end, y, sums);
}

// The block's `count` real tokens, those of this thread's slot.
template <PoolConfig kConfig>
CS_DEV void gather_block(const HeadRows& rows, int count, const float* mean_row, int head_dim,
                         const Place<PoolTile<kConfig>>& place,
                         BlockSums<PoolTile<kConfig>::kChannels>& sums) {
  using Tile = PoolTile<kConfig>;
  constexpr int kBatch = Tile::kBatch;
  float offset[Tile::kChannels];
  load_mean<Tile>(mean_row, head_dim, place.lane, offset);
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) offset[c] = -(offset[c] * kSumUnit);
  const float floor = ordinary_floor<Tile>(offset);

  // Every thread takes the same turns, so that whole warps meet in the shuffles.
  for (int turn = 0; turn < count; turn += kBatch * Tile::kSlots) {
    const int first = turn + place.slot;
    u32 left = 0;
    if (rows.access_bytes == 16) {
      left = add_tokens<kConfig, 16, kBatch>(rows, first, count, place.lane, floor, offset, sums);
    } else {
#pragma unroll 1
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + i * Tile::kSlots;
        if (Tile::kElementBytes == 4 || rows.access_bytes == 4) {
          left |= add_tokens<kConfig, 4, 1>(rows, token, count, place.lane, floor, offset, sums)
                  << i;
        } else if constexpr (Tile::kElementBytes == 2) {
          left |= add_tokens<kConfig, 2, 1>(rows, token, count, place.lane, floor, offset, sums)
                  << i;
        }
      }
    }
#pragma unroll 1
    for (int i = 0; left != 0; ++i, left >>= 1) {
      if ((left & 1u) == 0) continue;
      const int token = first + i * Tile::kSlots;
      add_carefully<kConfig>(rows, token, count, place.lane, mean_row, head_dim, sums);
    }
  }
}

template <PoolConfig kConfig>
CS_KERNEL void __launch_bounds__(kThreads, 6) pool_blocks(const PoolParams params) {
  using Tile = PoolTile<kConfig>;
  CS_SMEM(smem);  // what finish_block takes
  float* s_sums = reinterpret_cast<float*>(smem);
  const u32 item = ptx::block_x();
  const u32 block_idx = item % params.num_blocks;
  const u32 head = item / params.num_blocks;  // of all batch items
  const u32 head_idx = head % params.rows.num_heads;
  const u32 batch_idx = head / params.rows.num_heads;
  const int head_dim = static_cast<int>(params.rows.head_dim);

  const s64 tokens = real_tokens(params.lengths, params.rows.num_tokens, batch_idx);
  const s64 begin = static_cast<s64>(block_idx) * params.block_tokens;
  const s64 rest = tokens - begin;
  const int block_tokens = static_cast<int>(params.block_tokens);
  const int count = rest < 0 ? 0 : rest < block_tokens ? static_cast<int>(rest) : block_tokens;

  const Place<Tile> place;
  const float* mean_row = nullptr;
  if (params.token_mean != nullptr) {
    mean_row = params.token_mean + static_cast<s64>(head) * head_dim;
  }
  const HeadRows rows =
      head_rows(params.x, params.rows, batch_idx, head_idx, begin, Tile::kElementBytes);
  BlockSums<Tile::kChannels> sums;
  gather_block<kConfig>(rows, count, mean_row, head_dim, place, sums);

  finish_block<Tile>(s_sums, reinterpret_cast<u32*>(s_sums + 2 * kThreads * Tile::kChannels), place,
                     sums, count, head_dim, params.block_mean + static_cast<s64>(item) * head_dim,
                     params.similarity + item);
}

}  // namespace cusparge
