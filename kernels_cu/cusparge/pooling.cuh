// Pooling of one block of tokens by a block of threads: the mean of y, and how alike the y are.
//
// y is a token less the mean over tokens, or the token itself; pool.cu states the equations and the
// edges. Every thread adds the tokens it reads to a BlockSums, by add_ordinary or add_careful, and
// all threads then call finish_block. Sums have one fixed order.

#pragma once

#include "cusparge/ptx.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

inline constexpr int kMaxBlockTokens = 128;

// Sums run on multiples of this.
inline constexpr float kSumUnit = 1.0f / 512;
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

// What a thread gathers from its tokens, for its channels.
template <int kChannels>
struct BlockSums {
  float sum[kChannels] = {};   // of y, in kSumUnit
  float unit[kChannels] = {};  // of y / |y|
  bool has_direction = false;  // a token that is not zero was seen
  bool is_bad = false;         // a NaN or an infinity was
};

// Add a token whose sum of squares, over all its lanes, can be trusted. y is in kSumUnit, or
// becomes so when multiplied by `unit`.
template <int kChannels>
CS_DEV void add_ordinary(const float (&y)[kChannels], float squares, BlockSums<kChannels>& sums,
                         float unit = 1.0f) {
  const float inverse = ptx::rsqrt_approx(squares);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    sums.sum[c] = ptx::fma(y[c], unit, sums.sum[c]);
    sums.unit[c] = ptx::fma(y[c], inverse, sums.unit[c]);
  }
  sums.has_direction = true;
}

// Add any token; a NaN or an infinity counts as 0. x and mean are used up; y, in kSumUnit, is what
// was added. Returns whether this lane saw a NaN or an infinity. Whole warps call.
//
// Both x and the mean are scaled by the power of two that brings the larger of them near 1, exactly
// but for channels some 2^-100 of it. Then y is either noise, or at least 2^-22 of the mean's
// length, or as long as x: its square is far from the ends of float32.
template <class Tile>
CS_DEV bool add_careful(float (&x)[Tile::kChannels], float (&mean)[Tile::kChannels], bool is_real,
                        float (&y)[Tile::kChannels], BlockSums<Tile::kChannels>& sums) {
  constexpr int kChannels = Tile::kChannels;
  float largest = 0.0f;
  bool is_bad = false;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (!is_finite(x[c])) {
      is_bad = true;
      x[c] = 0.0f;
      mean[c] = 0.0f;  // y is then 0 too
    }
    if (!is_real) mean[c] = 0.0f;
    y[c] = ptx::fma(x[c], kSumUnit, -(mean[c] * kSumUnit));
    sums.sum[c] += y[c];
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
  if (is_bad) sums.is_bad = true;
  return is_bad;
}

// Least sum of squares of y in kSumUnit that add_ordinary may take, of tokens less the mean whose
// channels in this lane are -offset.
template <class Tile>
CS_DEV float ordinary_floor(const float (&offset)[Tile::kChannels]) {
  float mean_squares = 0.0f;
#pragma unroll
  for (int c = 0; c < Tile::kChannels; ++c) {
    mean_squares = ptx::fma(offset[c], offset[c], mean_squares);
  }
  // An infinite floor sends every token to add_careful: right, if slow.
  return ptx::max(kSmallSquare, lanes_sum<Tile::kLanes>(mean_squares) * (kNoise * kNoise));
}

// Write the mean (head_dim channels) and the similarity of a block with `count` real tokens. All
// threads call. s_sums holds 2 * kThreads * kChannels floats: [slot][channel] of y, then the same
// of y / |y|; s_words two words a warp. Nobody reads s_sums after the last barrier in here.
template <class Tile>
CS_DEV void finish_block(float* s_sums, u32* s_words, const Place<Tile>& place,
                         const BlockSums<Tile::kChannels>& sums, int count, int head_dim,
                         float* block_mean, float* similarity) {
  float* s_unit = s_sums + kThreads * Tile::kChannels;
  u32* s_flags = s_words;
  float* s_squares = reinterpret_cast<float*>(s_words + kWarps);
  const int thread = static_cast<int>(ptx::thread_x());

  store_sums<Tile>(s_sums, place, sums.sum);
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
    const float mean = sum_slots<Tile>(s_sums, channel) * (inverse_count / kSumUnit);
    block_mean[channel] = saturated(mean);
    const float mean_unit = sum_slots<Tile>(s_unit, channel) * inverse_count;
    squares = ptx::fma(mean_unit, mean_unit, squares);
  }
  squares = lanes_sum<32>(squares);
  if (thread % 32 == 0) s_squares[thread / 32] = squares;
  ptx::sync_block();  // the warps' sums are stored before the first thread adds them

  if (thread == 0) {
    float sum = 0.0f;
    u32 flags = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += s_squares[warp];
      flags |= s_flags[warp];
    }
    if ((flags & 1u) == 0) sum = 1.0f;  // no token points anywhere: all are alike
    if ((flags & 2u) != 0) sum = -1.0f;
    *similarity = ptx::min(sum, 1.0f);  // rounding must not pass 1
  }
}

}  // namespace cusparge
