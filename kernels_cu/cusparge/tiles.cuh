// Tiles of quantized operands: which byte of a tile holds which element.
//
// A tile is 64 tokens of one head, contiguous in memory and complete: padded with zeros in both
// directions, so that attention copies whole tiles and asks for no length and no stride.
//
//   int8 Q, K     rows = 64 tokens            row = channels, padded to 32        1 byte each
//   e4m3 V        rows = channels + 8         row = 64 tokens, in stored order    1 byte each
//   float16 V     rows = 64 tokens            row = channels, padded to 16        2 bytes each
//
// V's e4m3 tile is transposed, as its product runs over tokens. Its channels are padded to 8, and
// eight rows follow: the first is all ones, so that a product with it is the sum of the weights,
// the other seven are zero. Within every 16 tokens, position p of a row holds token
//
//   p      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
//   token  0  1  8  9  2  3 10 11  4  5 12 13  6  7 14 15
//
// With it the four scores that a thread of the tensor core holds in two neighbouring 16x8 products,
// keys 2t, 2t + 1, 2t + 8 and 2t + 9, are four neighbouring bytes of the next product's operand.
//
// Two orders of bytes, both free of bank conflicts where tensor cores read them:
//
//   core matrices (any row size)              swizzled (rows of 64 or 128 bytes)
//   8 rows x 16 bytes are contiguous:         rows follow each other, and the 16-byte chunks of a
//                                             row change places with its number:
//      column 0..15   16..31  ..  row end
//     +-------------+--------+--+------+         128 B: chunk ^ (row % 8)
//   0 |   0.. 127   |128..255|  |      |          64 B: chunk ^ (row / 2 % 4)
//   . |  a row: 16  |        |  |      |
//   7 |             |        |  |      |         row 0   | 0 1 2 3 4 5 6 7 |
//     +-------------+--------+--+------+         row 1   | 1 0 3 2 5 4 7 6 |
//   8 | 8 row_bytes |        |  |      |         row 2   | 2 3 0 1 6 7 4 5 |
//     +-------------+--------+--+------+         ...      (chunks, at 128 B)
//
// The swizzled one is what the descriptors of wgmma call 128-byte and 64-byte swizzle, for tiles
// that begin at a multiple of eight rows. mma.sync takes the core matrices by ldmatrix.
//
// All functions are constexpr and callable on the host; tests/test_prologue_plan.py states them a
// second time.

#pragma once

#include "cusparge/types.cuh"

namespace cusparge {

// Spelled in the variants of cusparge._cuda.prologue.
enum class TileFormat : u8 { kCoreMatrix, kSwizzled };
enum class ValueFormat : u8 { kE4m3, kF16 };

inline constexpr int kTileTokens = 64;  // cusparge._cuda.prologue.TILE_TOKENS
inline constexpr int kOnesRows = 8;     // cusparge._cuda.prologue.ONES_ROWS

// Byte of a tile that holds byte `column` of row `row`. Rows are multiples of 16 bytes.
CS_HOST_DEV constexpr int tile_offset(TileFormat format, int row_bytes, int row, int column) {
  if (format == TileFormat::kCoreMatrix) {
    return row / 8 * (8 * row_bytes) + column / 16 * 128 + row % 8 * 16 + column % 16;
  }
  const int linear = row * row_bytes + column;
  return linear ^ ((linear >> 7 & (row_bytes / 16 - 1)) << 4);
}

// Token in position `position` of a row of V's e4m3 tile.
CS_HOST_DEV constexpr int stored_token(int position) {
  const int p = position % 16;
  return position - p + p / 4 * 2 + p % 2 + p / 2 % 2 * 8;
}

// Channels of a tile: int8 products take 32 at a time, e4m3 ones give 8, float16 ones 16.
CS_HOST_DEV constexpr int padded_keys(int head_dim) { return (head_dim + 31) / 32 * 32; }
CS_HOST_DEV constexpr int padded_values(ValueFormat format, int head_dim) {
  const int step = format == ValueFormat::kE4m3 ? 8 : 16;
  return (head_dim + step - 1) / step * step;
}

CS_HOST_DEV constexpr int key_tile_bytes(int head_dim) {
  return kTileTokens * padded_keys(head_dim);
}
CS_HOST_DEV constexpr int value_tile_bytes(ValueFormat format, int head_dim) {
  const int channels = padded_values(format, head_dim);
  return format == ValueFormat::kE4m3 ? (channels + kOnesRows) * kTileTokens
                                      : 2 * kTileTokens * channels;
}

static_assert(tile_offset(TileFormat::kSwizzled, 128, 1, 0) == 128 + 16);
static_assert(tile_offset(TileFormat::kSwizzled, 64, 2, 0) == 128 + 16);
static_assert(tile_offset(TileFormat::kCoreMatrix, 96, 9, 33) == 8 * 96 + 2 * 128 + 16 + 1);
static_assert(stored_token(2) == 8 && stored_token(29) == 16 + 7 && stored_token(6) == 10);

}  // namespace cusparge
