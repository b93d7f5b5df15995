// Q, K and V as attention wants them: quantized into tiles, and pooled for stage 1.
//
//   k' = k - token_mean                 smoothed keys; q and v are taken as they are
//   q  ~ code * largest of row / 127    int8, a scale for each query
//   k' ~ code * largest of group / 127  int8, a scale for 16 consecutive keys
//   v  ~ code * v_scale                 e4m3 or float16, a power of two for each channel
//   mean and similarity                 of 128 q and of 64 k', as pool.cu has them, edges included
//
// as in SageAttention (arXiv:2410.02367, 3.2 and 3.3) with finer groups, and in SpargeAttn
// (arXiv:2502.18137, 3.2). Outputs are contiguous, and every byte is written whatever the lengths
// are. A row is a head of a batch item, or a head where sequences are packed:
//
//   q_tile  (row, block, 2, tile)     k_tile, v_tile  (row, block, tile)   bytes: see tiles.cuh
//   q_scale (row, block, 128)         largest/127 |sm_scale| log2 e; codes have sm_scale's sign
//   q_shift (row, block, 128)         sm_scale (q . token_mean), natural units; if it is wanted
//   k_scale (row, block, 4)           largest/127
//   q_mean, k_mean (row, block, channel)        q_similarity, k_similarity (row, block)
//   k_bad   (row, block)              lowest key with a NaN or an infinity in K or V, or 255
//   token_mean, v_scale (sequence, head, channel)
//
// Edges. A token beyond its sequence has codes 0 and scale 0; the ones of a V tile stay. A group of
// zeros has scale 0. A NaN or an infinity counts as 0 everywhere, before and after the mean is
// taken off; a query that holds one has scale and shift NaN, so that its row alone becomes NaN, and
// a block of keys similarity -1 (k_bad tells attention which rows to spoil). Keys are quantized in
// the unit of pooling.cuh, 2^-9: numbers below 2^-133 lose their last bits. Scales of V end at
// 2^-127. A scale beyond float32 becomes the largest number, a shift an infinity.
//
// Two launches: statistics.cu, then this. One dimension of grid that depends on shapes alone, 128
// threads; every block of threads reads 128 tokens in all:
//
//   prologue  [64 keys and their values, a row each, last blocks first | 128 queries, a row each]
//
// Keys and values come first and from their end: that is what the L2 cache still holds. Each block
// of threads puts the chunks' statistics together itself. A warp takes 16 tokens, the group that
// shares a scale; keys are read a second time, from the L1 cache, when their scale is known.
//
// Shared memory: the sums of all threads (4 or 8 KiB) or V's codes (64 bytes a channel) in the same
// place; 8 KiB for narrow loads; the mean and V's scales (8 bytes a channel); three words a warp.
// No tensor cores and no asynchronous copies: for compute capability 8.0 and later (e4m3: 8.9);
// compiled and checked for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0.

#include "cusparge/geometry.cuh"
#include "cusparge/groups.cuh"
#include "cusparge/params.cuh"
#include "cusparge/pooling.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/quantize.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/sequences.cuh"
#include "cusparge/tiles.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

// ---- queries -----------------------------------------------------------------------------------

// Where a query's results go, and what they are multiplied with.
struct QueryRows {
  s8* tile;
  float* scale;
  float* shift;         // null: not wanted
  const float* s_mean;  // of the keys, for the shift
  int row_bytes;
  float factor;
  float sm_scale;
};

// Write one query: codes, scale and shift; y is the query in kSumUnit if it is read with care, and
// as it is otherwise. All lanes that share it have the same is_bad.
template <PrologueConfig kConfig, bool kIsCareful>
CS_DEV void write_query(const QueryRows& out, int token, int lane, bool is_bad,
                        float (&y)[GroupTile<kConfig>::kChannels]) {
  using Tile = GroupTile<kConfig>;
  constexpr float kScale = kIsCareful ? 1.0f / kSumUnit : 1.0f;
  const float largest = lanes_max<Tile::kLanes>(largest_of(y));
  float shift = 0.0f;
  if (out.shift != nullptr) {
    float mean[Tile::kChannels];
    load_shared_row<Tile>(out.s_mean, lane, mean);
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) shift = ptx::fma(y[c], mean[c], shift);
    shift = lanes_sum<Tile::kLanes>(shift) * out.sm_scale * kScale;
  }
  Int8Factor int8 = int8_factor(largest);
  if constexpr (kIsCareful) {  // no other is tiny
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) y[c] *= int8.up;
  }
  const float signed_factor = out.factor < 0.0f ? -int8.factor : int8.factor;
  store_codes<kConfig>(out.tile + token / kTileTokens * kTileTokens * out.row_bytes, out.row_bytes,
                       token % kTileTokens, lane, y, signed_factor);
  if (lane == 0) {
    const float nan = float_from_bits(0x7FC00000u);
    out.scale[token] = is_bad ? nan : saturated(largest * kScale * magnitude(out.factor));
    if (out.shift != nullptr) out.shift[token] = is_bad ? nan : shift;
  }
}

template <PrologueConfig kConfig>
CS_DEV void query_block(const PrologueParams& params, u32 item, unsigned char* smem) {
  using Tile = GroupTile<kConfig>;
  using Shared = PrologueShared<kConfig>;
  V4* s_own = reinterpret_cast<V4*>(smem + Shared::kOwn);
  float* s_mean = reinterpret_cast<float*>(smem + Shared::kMean);
  const u32 row = item % params.num_rows_q;
  const u32 block = item / params.num_rows_q;
  const u32 head_idx = row % params.q_rows.num_heads;
  u32 batch_idx = row / params.q_rows.num_heads;
  const bool is_packed = params.cu_seqlens_q != nullptr;
  s64 begin = static_cast<s64>(block) * kBlockQ;
  s64 rest = params.q_rows.num_tokens - begin;
  u32 sequence = batch_idx;
  if (is_packed) {
    const Sequence found = sequence_of_tile<kBlockQ>(params.cu_seqlens_q, params.num_sequences,
                                                     params.q_rows.num_tokens, block);
    const s64 offset = static_cast<s64>(block - found.first_tile) * kBlockQ;
    batch_idx = 0;
    sequence = found.index;
    begin = found.begin + offset;
    rest = found.is_found ? found.tokens - offset : 0;
  }
  const int count = rest < kBlockQ ? static_cast<int>(rest) : kBlockQ;

  const s64 at = static_cast<s64>(row) * params.num_blocks_q + block;
  const int row_bytes = padded_keys(static_cast<int>(params.q_rows.head_dim));
  QueryRows out{params.q_tile + at * kBlockQ * row_bytes,
                params.q_scale + at * kBlockQ,
                nullptr,
                s_mean,
                row_bytes,
                params.q_factor,
                params.sm_scale};
  if (params.q_shift != nullptr) {
    out.shift = params.q_shift + at * kBlockQ;
    const u32 head_k = head_idx / (params.q_rows.num_heads / params.k_rows.num_heads);
    u32 row_k = batch_idx * params.k_rows.num_heads + head_k;
    u32 first_chunk = 0;
    s64 keys = 0;
    if (is_packed) {
      const Sequence of_k = sequence_by_index<kTileTokens>(
          params.cu_seqlens_k, params.num_sequences, params.k_rows.num_tokens, sequence);
      row_k = head_k;
      first_chunk = of_k.first_chunk;
      keys = of_k.tokens;
    } else {
      keys = real_tokens(params.lengths, params.k_rows.num_tokens, batch_idx);
    }
    finish_statistics<kConfig, false>(params, row_k, first_chunk, keys, s_mean, nullptr);
    ptx::sync_block();  // the mean is whole before any thread reads it
  }

  const Place<Tile> place;
  const HeadRows rows =
      head_rows(params.q, params.q_rows, batch_idx, head_idx, begin, Tile::kElementBytes);
  BlockSums<Tile::kChannels> sums;
  u32 left = 0;  // a bit for each turn of either half
#pragma unroll 1
  for (int load = 0; load < 2 * Tile::kLoads; ++load) {
    const int first = load / Tile::kLoads * kTileTokens +
                      Tile::token_of_turn(place, load % Tile::kLoads * Tile::kHeld);
    V4 tokens[Tile::kHeld][Tile::kPieces];
    load_held<Tile>(rows, first, count, place.lane, s_own, tokens);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) {
      const int token = first + i * Tile::kWarpSlots;
      float y[Tile::kChannels];
      widen<Tile::kDtype>(tokens[i], y);
      float squares = 0.0f;
#pragma unroll
      for (int c = 0; c < Tile::kChannels; ++c) {
        squares = ptx::fma(y[c], y[c], squares);
      }
      squares = lanes_sum<Tile::kLanes>(squares);
      const bool is_ordinary =
          squares > kSmallSquare / (kSumUnit * kSumUnit) && squares <= kLargeSquare;
      if (ptx::ballot(token < count && !is_ordinary) != 0) {
        left |= 1u << (load * Tile::kHeld + i);
      } else {
        if (token < count) add_ordinary(y, squares, sums, kSumUnit);
        write_query<kConfig, false>(out, token, place.lane, false, y);  // zeros beyond the end
      }
    }
  }
#pragma unroll 1
  for (int turn = 0; left != 0; ++turn, left >>= 1) {
    if ((left & 1u) == 0) continue;
    const int token =
        turn / Tile::kTurns * kTileTokens + Tile::token_of_turn(place, turn % Tile::kTurns);
    V4 again[1][Tile::kPieces];
    load_tokens<Tile, Tile::kElementBytes>(rows, token, count, place.lane, again);
    float x[Tile::kChannels];
    widen<Tile::kDtype>(again[0], x);
    float no_mean[Tile::kChannels] = {};
    float y[Tile::kChannels];
    const bool is_bad = add_careful<Tile>(x, no_mean, token < count, y, sums);
    const bool row_is_bad = lanes_max<Tile::kLanes>(is_bad ? 1.0f : 0.0f) > 0.0f;
    write_query<kConfig, true>(out, token, place.lane, row_is_bad, y);
  }
  const int head_dim = static_cast<int>(params.q_rows.head_dim);
  finish_block<Tile>(reinterpret_cast<float*>(smem), reinterpret_cast<u32*>(smem + Shared::kWords),
                     place, sums, count, head_dim, params.q_mean + at * head_dim,
                     params.q_similarity + at);
}

// ---- keys and values ---------------------------------------------------------------------------

inline constexpr u32 kNoBadKey = 255;

// Quantize and pool a block of keys. Returns the lowest key in which this lane saw a NaN or an
// infinity. The statistics of the sequence are in shared memory.
template <PrologueConfig kConfig>
CS_DEV u32 key_block(const PrologueParams& params, const HeadRows& rows, int count, s64 at,
                     unsigned char* smem) {
  using Tile = GroupTile<kConfig>;
  using Shared = PrologueShared<kConfig>;
  V4* s_own = reinterpret_cast<V4*>(smem + Shared::kOwn);
  const float* s_mean = reinterpret_cast<const float*>(smem + Shared::kMean);
  const Place<Tile> place;
  const int head_dim = static_cast<int>(params.k_rows.head_dim);
  float offset[Tile::kChannels];
  load_shared_row<Tile>(s_mean, place.lane, offset);
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) offset[c] = -(offset[c] * kSumUnit);
  const float floor = ordinary_floor<Tile>(offset);

  BlockSums<Tile::kChannels> sums;
  float largest = 0.0f;
  u32 bad = kNoBadKey;
  u32 left = 0;  // a bit for each turn
#pragma unroll 1
  for (int load = 0; load < Tile::kLoads; ++load) {
    const int first = Tile::token_of_turn(place, load * Tile::kHeld);
    V4 tokens[Tile::kHeld][Tile::kPieces];
    load_held<Tile>(rows, first, count, place.lane, s_own, tokens);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) {
      const bool is_real = first + i * Tile::kWarpSlots < count;
      float y[Tile::kChannels];
      widen<Tile::kDtype>(tokens[i], y);
      float squares = 0.0f;
#pragma unroll
      for (int c = 0; c < Tile::kChannels; ++c) {
        y[c] = ptx::fma(y[c], kSumUnit, offset[c]);
        squares = ptx::fma(y[c], y[c], squares);
      }
      squares = lanes_sum<Tile::kLanes>(squares);
      const bool is_ordinary = squares > floor && squares <= kLargeSquare;  // false for NaN
      if (ptx::ballot(is_real && !is_ordinary) != 0) {
        left |= 1u << (load * Tile::kHeld + i);
      } else if (is_real) {
        add_ordinary(y, squares, sums);
        largest = ptx::max(largest, largest_of(y));
      }
    }
  }
  const bool has_left = left != 0;
#pragma unroll 1
  for (int turn = 0; left != 0; ++turn, left >>= 1) {
    if ((left & 1u) == 0) continue;
    const int token = Tile::token_of_turn(place, turn);
    V4 again[1][Tile::kPieces];
    load_tokens<Tile, Tile::kElementBytes>(rows, token, count, place.lane, again);
    float x[Tile::kChannels];
    widen<Tile::kDtype>(again[0], x);
    float mean[Tile::kChannels];
    load_shared_row<Tile>(s_mean, place.lane, mean);
    float y[Tile::kChannels];
    const bool is_bad = add_careful<Tile>(x, mean, token < count, y, sums);
    largest = ptx::max(largest, largest_of(y));
    if (is_bad && static_cast<u32>(token) < bad) bad = static_cast<u32>(token);
  }

  largest = lanes_max<32>(largest);
  if (place.lane == 0 && place.slot % Tile::kWarpSlots == 0) {
    params.k_scale[at * kWarps + place.slot / Tile::kWarpSlots] =
        largest * (1.0f / (kInt8Max * kSumUnit));
  }
  const Int8Factor int8 = int8_factor(largest);
  const float unit = kSumUnit * int8.up;
  load_shared_row<Tile>(s_mean, place.lane, offset);
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) offset[c] = -(offset[c] * unit);
  const int row_bytes = padded_keys(head_dim);
  s8* tile = params.k_tile + at * kTileTokens * row_bytes;
#pragma unroll 1
  for (int load = 0; load < Tile::kLoads; ++load) {
    const int first = Tile::token_of_turn(place, load * Tile::kHeld);
    V4 tokens[Tile::kHeld][Tile::kPieces];
    load_held<Tile>(rows, first, count, place.lane, s_own, tokens);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) {
      const int token = first + i * Tile::kWarpSlots;
      float y[Tile::kChannels];
      widen<Tile::kDtype>(tokens[i], y);
#pragma unroll
      for (int c = 0; c < Tile::kChannels; ++c) y[c] = ptx::fma(y[c], unit, offset[c]);
      if (has_left) {
#pragma unroll
        for (int c = 0; c < Tile::kChannels; ++c) y[c] = is_finite(y[c]) ? y[c] : 0.0f;
      }
      store_codes<kConfig>(tile, row_bytes, token, place.lane, y,
                           token < count ? int8.factor : 0.0f);
    }
  }
  finish_block<Tile>(reinterpret_cast<float*>(smem), reinterpret_cast<u32*>(smem + Shared::kWords),
                     place, sums, count, head_dim, params.k_mean + at * head_dim,
                     params.k_similarity + at);
  return bad;
}

// Clear what is not finite; whether there was any.
template <Dtype kDtype, int kPieces>
CS_DEV bool clear_non_finite(V4 (&pieces)[kPieces]) {
  bool is_bad = false;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (!has_non_finite<kDtype>(pieces[piece])) continue;
    is_bad = true;
    u32 word[4] = {pieces[piece].x, pieces[piece].y, pieces[piece].z, pieces[piece].w};
    constexpr u32 kExponent = kDtype == Dtype::kFloat32    ? 0x7F800000u
                              : kDtype == Dtype::kBFloat16 ? 0x7F80u
                                                           : 0x7C00u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kDtype == Dtype::kFloat32) {
        if ((word[i] & kExponent) == kExponent) word[i] = 0;
      } else {
        if ((word[i] & kExponent) == kExponent) word[i] &= 0xFFFF0000u;
        if ((word[i] >> 16 & kExponent) == kExponent) word[i] &= 0x0000FFFFu;
      }
    }
    pieces[piece] = V4{word[0], word[1], word[2], word[3]};
  }
  return is_bad;
}

// Copy the codes of a tile from [token][channel] in shared memory to their transposed places. A
// thread takes 16 tokens of 4 channels at a time.
template <PrologueConfig kConfig>
CS_DEV void store_transposed(const u8* s_codes, int channels, u8* tile) {
  const int thread = static_cast<int>(ptx::thread_x());
  const int quads = channels / 4;
#pragma unroll 1
  for (int item = thread; item < kTileTokens / 16 * quads; item += kThreads) {
    const int first = item / quads * 16;
    const int channel = item % quads * 4;
    u32 out[4][4];  // [position / 4][channel]
#pragma unroll
    for (int p = 0; p < 16; p += 4) {
      u32 word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + stored_token(p + i);
        word[i] = *reinterpret_cast<const u32*>(s_codes + token * kConfig.head_dim + channel);
      }
      transpose_bytes(word, out[p / 4]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::st_global_16(tile + tile_offset(kConfig.tiles, kTileTokens, channel + i, first),
                        V4{out[0][i], out[1][i], out[2][i], out[3][i]});
    }
  }
  if (thread < kOnesRows * (kTileTokens / 16)) {
    const int row = thread % kOnesRows;
    const u32 ones = row == 0 ? 0x38383838u : 0u;
    ptx::st_global_16(
        tile + tile_offset(kConfig.tiles, kTileTokens, channels + row, thread / kOnesRows * 16),
        V4{ones, ones, ones, ones});
  }
}

// Quantize a block of values; `bad` is the lowest bad key that this lane knows of.
template <PrologueConfig kConfig>
CS_DEV void value_block(const PrologueParams& params, const HeadRows& rows, int count, s64 at,
                        u32 bad, unsigned char* smem) {
  using Tile = GroupTile<kConfig>;
  using Shared = PrologueShared<kConfig>;
  constexpr bool kIsE4m3 = kConfig.values == ValueFormat::kE4m3;
  V4* s_own = reinterpret_cast<V4*>(smem + Shared::kOwn);
  u8* s_codes = smem;
  u32* s_bad = reinterpret_cast<u32*>(smem + Shared::kBad);
  const Place<Tile> place;
  const int head_dim = static_cast<int>(params.v_rows.head_dim);
  const int channels = padded_values(kConfig.values, head_dim);
  u8* tile = params.v_tile + at * value_tile_bytes(kConfig.values, head_dim);
  float inverse[Tile::kChannels];
  load_shared_row<Tile>(reinterpret_cast<const float*>(smem + Shared::kInverse), place.lane,
                        inverse);
#pragma unroll 1
  for (int load = 0; load < Tile::kLoads; ++load) {
    const int first = Tile::token_of_turn(place, load * Tile::kHeld);
    V4 tokens[Tile::kHeld][Tile::kPieces];
    load_held<Tile>(rows, first, count, place.lane, s_own, tokens);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) {
      const int token = first + i * Tile::kWarpSlots;
      if (clear_non_finite<Tile::kDtype>(tokens[i]) && static_cast<u32>(token) < bad) {
        bad = static_cast<u32>(token);
      }
      float x[Tile::kChannels];
      widen<Tile::kDtype>(tokens[i], x);
#pragma unroll
      for (int c = 0; c < Tile::kChannels; ++c) x[c] *= inverse[c];
#pragma unroll
      for (int piece = 0; piece < Tile::kPieces; ++piece) {
        const int channel = Tile::piece_channel(place.lane, piece);
        constexpr int kPairs = Tile::kPieceChannels / 2;
        u32 pair[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int c = piece * Tile::kPieceChannels + 2 * i;
          if constexpr (kIsE4m3) {
            pair[i] = ptx::e4m3x2_from_float(x[c + 1], x[c]);
          } else {
            pair[i] = ptx::f16x2_from_float(x[c + 1], x[c]);
          }
        }
        if constexpr (kIsE4m3) {
          u32 word[kPairs / 2];
#pragma unroll
          for (int i = 0; i < kPairs / 2; ++i) word[i] = pair[2 * i] | pair[2 * i + 1] << 16;
          store_words(s_codes + token * Tile::kWidth + channel, word);
        } else if (channel < channels) {
          store_words(tile + tile_offset(kConfig.tiles, 2 * channels, token, 2 * channel), pair);
        }
      }
    }
  }
  bad = ptx::redux_min(bad);
  const int thread = static_cast<int>(ptx::thread_x());
  if (thread % 32 == 0) s_bad[thread / 32] = bad;
  ptx::sync_block();  // all codes and bad keys are stored before any is read
  if constexpr (kIsE4m3) store_transposed<kConfig>(s_codes, channels, tile);
  if (thread == 0) {
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) bad = s_bad[warp] < bad ? s_bad[warp] : bad;
    params.k_bad[at] = static_cast<u8>(bad);
  }
}

template <PrologueConfig kConfig>
CS_DEV void key_value_block(const PrologueParams& params, u32 item, unsigned char* smem) {
  using Tile = GroupTile<kConfig>;
  using Shared = PrologueShared<kConfig>;
  float* s_mean = reinterpret_cast<float*>(smem + Shared::kMean);
  float* s_inverse = reinterpret_cast<float*>(smem + Shared::kInverse);
  const u32 row = item % params.num_rows_k;
  const u32 block = params.num_blocks_k - 1 - item / params.num_rows_k;
  const u32 head_idx = row % params.k_rows.num_heads;
  u32 batch_idx = row / params.k_rows.num_heads;
  Sequence in{batch_idx, 0, 0, 0, 0, true};
  bool writes_statistics = block == 0;
  if (params.cu_seqlens_k == nullptr) {
    in.tokens = real_tokens(params.lengths, params.k_rows.num_tokens, batch_idx);
  } else {
    batch_idx = 0;
    in = sequence_of_tile<kTileTokens>(params.cu_seqlens_k, params.num_sequences,
                                       params.k_rows.num_tokens, block);
    writes_statistics = block == in.first_tile;
    if (!in.is_found) {
      // One of the blocks that no sequence has: the first of them stand in for the sequences that
      // have no block, of which there are no more.
      const Sequence empty =
          empty_sequence<kTileTokens>(params.cu_seqlens_k, params.num_sequences,
                                      params.k_rows.num_tokens, block - in.first_tile);
      in = Sequence{empty.index, block, 0, 0, 0, true};
      writes_statistics = empty.is_found;
    }
  }
  const s64 offset = static_cast<s64>(block - in.first_tile) * kTileTokens;
  const s64 rest = in.tokens - offset;
  const int count = rest < 0 ? 0 : rest < kTileTokens ? static_cast<int>(rest) : kTileTokens;

  finish_statistics<kConfig, true>(params, row, in.first_chunk, in.tokens, s_mean, s_inverse);
  ptx::sync_block();  // mean and scales are whole before any thread reads them
  const int head_dim = static_cast<int>(params.k_rows.head_dim);
  if (writes_statistics) {
    const s64 first = (static_cast<s64>(in.index) * params.k_rows.num_heads + head_idx) * head_dim;
#pragma unroll 1
    for (int channel = static_cast<int>(ptx::thread_x()); channel < head_dim; channel += kThreads) {
      params.token_mean[first + channel] = s_mean[channel];
      params.v_scale[first + channel] = inverse_power(s_inverse[channel]);
    }
  }
  const s64 at = static_cast<s64>(row) * params.num_blocks_k + block;
  const HeadRows keys = head_rows(params.k, params.k_rows, batch_idx, head_idx, in.begin + offset,
                                  Tile::kElementBytes);
  const u32 bad = key_block<kConfig>(params, keys, count, at, smem);
  const HeadRows values = head_rows(params.v, params.v_rows, batch_idx, head_idx, in.begin + offset,
                                    Tile::kElementBytes);
  value_block<kConfig>(params, values, count, at, bad, smem);
}

template <PrologueConfig kConfig>
CS_KERNEL void __launch_bounds__(kThreads, 4) prologue(const PrologueParams params) {
  CS_SMEM(smem);
  const u32 item = ptx::block_x();
  const u32 key_items = params.num_blocks_k * params.num_rows_k;
  if (item < key_items) {
    key_value_block<kConfig>(params, item, smem);
  } else {
    query_block<kConfig>(params, item - key_items, smem);
  }
}

}  // namespace cusparge
