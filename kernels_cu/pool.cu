// Token means and pooled blocks: what stage 1 needs to know of Q and K (arXiv:2502.18137, 3.3).
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
inline constexpr int kMaxBlockTokens = 128;

// Sums run on multiples of this.
inline constexpr float kSumUnit = 1.0f / 512;
static_assert(kChunkTokens * kSumUnit < 1, "a chunk's sum is finite");
static_assert(kMaxBlockTokens * 2 * kSumUnit < 1, "a sum of differences is finite");

// Sums of squares of y in kSumUnit that have lost nothing. Below, squares of single channels may
// have vanished; above, they may have overflowed.
inline constexpr float kSmallSquare = 0x1p-80f;
inline constexpr float kLargeSquare = 0x1p120f;

// Rounding leaves up to this share of the mean's length of a token that equals it: neighbouring
// float32 numbers differ by 2^-23, and the mean is rounded more than once.
inline constexpr float kNoise = 0x1p-22f;

inline constexpr float kLargest = 0x1.fffffep127f;

CS_DEV float saturated(float x) { return ptx::min(ptx::max(x, -kLargest), kLargest); }

// Which token and channels a thread of a RowTile holds.
template <class Tile>
struct Place {
  int lane;  // among those that share a token
  int slot;  // which of the tokens that are read at a time
  CS_DEV Place()
      : lane(static_cast<int>(ptx::thread_x()) % Tile::kLanes),
        slot(static_cast<int>(ptx::thread_x()) / Tile::kLanes) {}
};

// What one 16-byte store moves.
struct alignas(16) FourFloats {
  float x, y, z, w;
};

// A column of sums per slot: [slot][channel of the tile], as many as all threads hold.
template <class Tile>
CS_DEV void store_sums(float* s_sums, const Place<Tile>& place,
                       const float (&sum)[Tile::kChannels]) {
  constexpr int kRow = Tile::kRowPieces * Tile::kPieceChannels;
#pragma unroll
  for (int c = 0; c < Tile::kChannels; c += 4) {
    const int piece = c / Tile::kPieceChannels;
    const int channel = Tile::piece_channel(place.lane, piece) + c % Tile::kPieceChannels;
    *reinterpret_cast<FourFloats*>(s_sums + place.slot * kRow + channel) =
        FourFloats{sum[c], sum[c + 1], sum[c + 2], sum[c + 3]};
  }
}

// Slot after slot, so that the order of the sum is fixed.
template <class Tile>
CS_DEV float sum_slots(const float* s_sums, int channel) {
  constexpr int kRow = Tile::kRowPieces * Tile::kPieceChannels;
  float sum = 0.0f;
#pragma unroll 8
  for (int slot = 0; slot < Tile::kSlots; ++slot) sum += s_sums[slot * kRow + channel];
  return sum;
}

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

// What a thread gathers from its tokens, for its channels.
template <int kChannels>
struct BlockSums {
  float sum[kChannels] = {};   // of y, in kSumUnit
  float unit[kChannels] = {};  // of y / |y|
  bool has_direction = false;  // a token that is not zero was seen
  bool is_bad = false;         // a NaN or an infinity was
};

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
      const float inverse = ptx::rsqrt_approx(squares);
#pragma unroll
      for (int c = 0; c < Tile::kChannels; ++c) {
        sums.sum[c] += y[c];
        sums.unit[c] = ptx::fma(y[c], inverse, sums.unit[c]);
      }
      sums.has_direction = true;
    }
  }
  return left;
}

// Add a token whose sum of squares cannot be trusted; it is read again, so that the registers are
// free for it. Whole warps call.
//
// Both x and the mean are scaled by the power of two that brings the larger of them near 1, exactly
// but for channels some 2^-100 of it. Then y is either noise, or at least 2^-22 of the mean's
// length, or as long as x: its square is far from the ends of float32.
template <PoolConfig kConfig>
CS_DEV void add_carefully(const HeadRows& rows, int token, int end, int lane, const float* mean_row,
                          int head_dim, BlockSums<PoolTile<kConfig>::kChannels>& sums) {
  using Tile = PoolTile<kConfig>;
  constexpr int kChannels = Tile::kChannels;
  const bool is_real = token < end;
  V4 pieces[1][Tile::kPieces];
  load_tokens<Tile, Tile::kElementBytes>(rows, token, end, lane, pieces);
  float x[kChannels];
  widen<kConfig.dtype>(pieces[0], x);
  float mean[kChannels];
  load_mean<Tile>(mean_row, head_dim, lane, mean);

  float largest = 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (!is_finite(x[c])) {
      sums.is_bad = true;
      x[c] = 0.0f;
      mean[c] = 0.0f;  // y is then 0 too
    }
    if (!is_real) mean[c] = 0.0f;
    sums.sum[c] += ptx::fma(x[c], kSumUnit, -(mean[c] * kSumUnit));
    largest = ptx::max(largest, ptx::max(magnitude(x[c]), magnitude(mean[c])));
  }
  largest = lanes_max<Tile::kLanes>(largest);
  // 2^(126 - e) for largest = 1.m * 2^e: the exponent's field is 253 less that of the largest, and
  // at least 1. A subnormal number, whose field is 0, comes to 2^-23 or more.
  const int field = 253 - static_cast<int>(bits_of_float(largest) >> 23);
  const float scale = float_from_bits(static_cast<u32>(field < 1 ? 1 : field) << 23);

  float squares = 0.0f;
  float mean_squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float scaled_mean = mean[c] * scale;
    x[c] = ptx::fma(x[c], scale, -scaled_mean);
    squares = ptx::fma(x[c], x[c], squares);
    mean_squares = ptx::fma(scaled_mean, scaled_mean, mean_squares);
  }
  squares = lanes_sum<Tile::kLanes>(squares);
  mean_squares = lanes_sum<Tile::kLanes>(mean_squares);
  if (squares > mean_squares * (kNoise * kNoise)) {
    const float inverse = ptx::rsqrt_approx(squares);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums.unit[c] = ptx::fma(x[c], inverse, sums.unit[c]);
    sums.has_direction = true;
  }
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
  float mean_squares = 0.0f;
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) {
    offset[c] = -(offset[c] * kSumUnit);
    mean_squares = ptx::fma(offset[c], offset[c], mean_squares);
  }
  // An infinite floor sends every token to the careful path: right, if slow.
  const float floor =
      ptx::max(kSmallSquare, lanes_sum<Tile::kLanes>(mean_squares) * (kNoise * kNoise));

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
  constexpr int kSums = kThreads * Tile::kChannels;
  CS_SMEM(smem);  // float [slot][channel] of y, the same of y / |y|, then a word and a sum per warp
  float* s_sum = reinterpret_cast<float*>(smem);
  float* s_unit = s_sum + kSums;
  u32* s_flags = reinterpret_cast<u32*>(s_unit + kSums);
  float* s_squares = reinterpret_cast<float*>(s_flags + kWarps);

  const int thread = static_cast<int>(ptx::thread_x());
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

  store_sums<Tile>(s_sum, place, sums.sum);
  store_sums<Tile>(s_unit, place, sums.unit);
  const bool has_direction = ptx::ballot(sums.has_direction) != 0;
  const bool is_bad = ptx::ballot(sums.is_bad) != 0;
  const u32 flags_of_warp = (has_direction ? 1u : 0u) | (is_bad ? 2u : 0u);
  if (thread % 32 == 0) s_flags[thread / 32] = flags_of_warp;
  ptx::sync_block();  // all slots and flags are stored before any is read

  const float inverse_count = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
  float squares = 0.0f;
#pragma unroll 1
  for (int channel = thread; channel < head_dim; channel += kThreads) {
    // Two numbers near the largest may differ by more than float32 holds: the mean saturates.
    const float block_mean = sum_slots<Tile>(s_sum, channel) * (inverse_count / kSumUnit);
    params.block_mean[static_cast<s64>(item) * head_dim + channel] = saturated(block_mean);
    const float mean_unit = sum_slots<Tile>(s_unit, channel) * inverse_count;
    squares = ptx::fma(mean_unit, mean_unit, squares);
  }
  squares = lanes_sum<32>(squares);
  if (thread % 32 == 0) s_squares[thread / 32] = squares;
  ptx::sync_block();  // the warps' sums are stored before the first thread adds them

  if (thread == 0) {
    float similarity = 0.0f;
    u32 flags = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      similarity += s_squares[warp];
      flags |= s_flags[warp];
    }
    if ((flags & 1u) == 0) similarity = 1.0f;  // no token points anywhere: all are alike
    if ((flags & 2u) != 0) similarity = -1.0f;
    params.similarity[item] = ptx::min(similarity, 1.0f);  // rounding must not pass 1
  }
}

}  // namespace cusparge
