// What must be known of all keys and values of a sequence before one of them can be quantized.
//
//   mean[c]     =  (1/N) sum_t k[t][c]          taken off every key (arXiv:2410.02367, 3.2)
//   largest[c]  =  max_t |v[t][c]|              fixes the scale of a channel of V
//
// over the N real tokens of a sequence and head; an element that is NaN or infinite counts as 0.
// One kernel forms parts of both, and prologue.cu, which follows, puts them together itself.
//
//   kv_statistics  (row * {k, v} * chunks), 128 threads; a row is a head of a batch item
//
// A sequence of T tiles of 64 tokens is cut into C = min(16, ceil(T / 4)) chunks. Chunk i has the
// tiles i, i + C, i + 2C, ...: all blocks of threads, which run at the same time, walk a sequence
// from its front to its end together. So its last tiles are the ones that the L2 cache still holds
// when prologue.cu, which begins with these, reads everything again. The chunks of packed sequences
// follow each other.
//
// partial[0] is 1 / (2N) of a chunk's sum: no sum of finite numbers overflows, whatever N is, and
// one that is not finite tells of a NaN or an infinity. The thread then reads its tokens again and
// leaves such elements out. The factor costs numbers below 2^-126 / N their last bits; it is off by
// less than 2^-149 for each token a thread reads. partial[1] is the largest magnitude. Chunks that
// a sequence does not have are not written. Sums have one fixed order.
//
// Shared memory: the sums of all threads, 2 to 4 KiB. For compute capability 8.0 and later.

#include "cusparge/params.cuh"
#include "cusparge/pooling.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/sequences.cuh"
#include "cusparge/tiles.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

struct StatisticsConfig {
  Dtype dtype;
  int head_dim;  // 64, 128 or 256: room for that many channels
};

template <StatisticsConfig kConfig>
using StatisticsTile = RowTile<kConfig.dtype, kConfig.head_dim>;

// Tokens of a tile that a thread loads before it uses the first: up to eight loads in flight, since
// there are few blocks of threads.
template <class Tile>
inline constexpr int kInFlight =
    Tile::kSlots * 8 / Tile::kPieces < kTileTokens ? 8 / Tile::kPieces : kTileTokens / Tile::kSlots;

// Add the tokens first, first + kSlots, ... of a tile: to the largest magnitudes with kLargestOf,
// otherwise `weight` times each to the sums. With kClear, what is not finite counts as 0.
template <StatisticsConfig kConfig, bool kLargestOf, bool kClear, int kAccess, int kTokens>
CS_DEV void add_tokens(const HeadRows& rows, int first, int end, int lane, float weight,
                       float (&result)[StatisticsTile<kConfig>::kChannels]) {
  using Tile = StatisticsTile<kConfig>;
  V4 tokens[kTokens][Tile::kPieces];
  load_tokens<Tile, kAccess>(rows, first, end, lane, tokens);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float x[Tile::kChannels];
    widen<kConfig.dtype>(tokens[i], x);
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) {
      if (kClear && !is_finite(x[c])) x[c] = 0.0f;
      if constexpr (kLargestOf) {
        result[c] = ptx::max(result[c], magnitude(x[c]));  // a NaN is passed over
      } else {
        result[c] = ptx::fma(x[c], weight, result[c]);
      }
    }
  }
}

// One thread's share of a chunk: every `step`-th tile of `tokens` tokens, from `begin` on.
template <StatisticsConfig kConfig, bool kLargestOf, bool kClear>
CS_DEV void walk_chunk(const void* x, const TokenRows& shape, u32 batch_idx, u32 head_idx,
                       s64 begin, s64 tokens, u32 chunk, u32 step,
                       float (&result)[StatisticsTile<kConfig>::kChannels]) {
  using Tile = StatisticsTile<kConfig>;
  const Place<Tile> place;
  const float weight = 0.5f / static_cast<float>(tokens);
  const s64 tiles = (tokens + kTileTokens - 1) / kTileTokens;
#pragma unroll 1
  for (s64 tile = chunk; tile < tiles; tile += step) {
    const s64 rest = tokens - tile * kTileTokens;
    const int count = rest < kTileTokens ? static_cast<int>(rest) : kTileTokens;
    const HeadRows rows =
        head_rows(x, shape, batch_idx, head_idx, begin + tile * kTileTokens, Tile::kElementBytes);
    constexpr int kBatch = kInFlight<Tile>;
#pragma unroll 1
    for (int first = place.slot; first < count; first += kBatch * Tile::kSlots) {
      // Of these tokens alone: a shorter chain of roundings, the same for every way to read them.
      float part[Tile::kChannels] = {};
      if (!kClear && rows.access_bytes == 16) {
        add_tokens<kConfig, kLargestOf, kClear, 16, kBatch>(rows, first, count, place.lane, weight,
                                                            part);
      } else {
#pragma unroll 1
        for (int i = 0; i < kBatch; ++i) {
          add_tokens<kConfig, kLargestOf, kClear, Tile::kElementBytes, 1>(
              rows, first + i * Tile::kSlots, count, place.lane, weight, part);
        }
      }
#pragma unroll
      for (int c = 0; c < Tile::kChannels; ++c) {
        result[c] = kLargestOf ? ptx::max(result[c], part[c]) : result[c] + part[c];
      }
    }
  }
}

template <StatisticsConfig kConfig, bool kLargestOf>
CS_DEV void write_chunk(const void* x, const TokenRows& shape, u32 batch_idx, u32 head_idx,
                        s64 begin, s64 tokens, u32 chunk, u32 step, float* s_parts,
                        float* partial) {
  using Tile = StatisticsTile<kConfig>;
  float result[Tile::kChannels] = {};
  walk_chunk<kConfig, kLargestOf, false>(x, shape, batch_idx, head_idx, begin, tokens, chunk, step,
                                         result);
  bool is_clean = true;
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) is_clean = is_clean && is_finite(result[c]);
  if (!is_clean) {
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) result[c] = 0.0f;
    walk_chunk<kConfig, kLargestOf, true>(x, shape, batch_idx, head_idx, begin, tokens, chunk, step,
                                          result);
  }
  store_sums<Tile>(s_parts, Place<Tile>(), result);
  ptx::sync_block();  // all slots are stored before any is read
  const int head_dim = static_cast<int>(shape.head_dim);
#pragma unroll 1
  for (int channel = static_cast<int>(ptx::thread_x()); channel < head_dim; channel += kThreads) {
    if constexpr (kLargestOf) {
      float largest = 0.0f;
#pragma unroll 8
      for (int slot = 0; slot < Tile::kSlots; ++slot) {
        largest = ptx::max(largest, s_parts[slot * kConfig.head_dim + channel]);
      }
      partial[channel] = largest;
    } else {
      partial[channel] = sum_slots<Tile>(s_parts, channel);
    }
  }
}

template <StatisticsConfig kConfig>
CS_KERNEL void __launch_bounds__(kThreads, 6) kv_statistics(const StatisticsParams params) {
  CS_SMEM(smem);
  float* s_parts = reinterpret_cast<float*>(smem);
  const u32 slot = ptx::block_x() % params.num_chunks;  // of the row's partial results
  const u32 item = ptx::block_x() / params.num_chunks;
  const u32 row = item / 2;
  const u32 head_idx = row % params.k_rows.num_heads;
  u32 batch_idx = row / params.k_rows.num_heads;
  s64 begin = 0;
  s64 tokens = 0;
  u32 chunk = slot;
  if (params.cu_seqlens == nullptr) {
    tokens = real_tokens(params.lengths, params.k_rows.num_tokens, batch_idx);
  } else {
    const Sequence found = sequence_of_chunk<kTileTokens>(params.cu_seqlens, params.num_sequences,
                                                          params.k_rows.num_tokens, slot);
    batch_idx = 0;
    begin = found.begin;
    tokens = found.tokens;
    chunk = slot - found.first_chunk;
    if (!found.is_found) return;
  }
  const u32 step = chunks_of((tokens + kTileTokens - 1) / kTileTokens);
  if (chunk >= step) return;  // prologue reads the chunks that the sequence has
  const s64 at = (static_cast<s64>(row) * params.num_chunks + slot) * params.k_rows.head_dim;
  if (item % 2 == 0) {
    write_chunk<kConfig, false>(params.k, params.k_rows, batch_idx, head_idx, begin, tokens, chunk,
                                step, s_parts, params.partial + at);
  } else {
    const s64 of_v = static_cast<s64>(params.num_rows) * params.num_chunks * params.k_rows.head_dim;
    write_chunk<kConfig, true>(params.v, params.v_rows, batch_idx, head_idx, begin, tokens, chunk,
                               step, s_parts, params.partial + of_v + at);
  }
}

}  // namespace cusparge
