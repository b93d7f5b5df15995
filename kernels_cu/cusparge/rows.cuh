// Tokens of a strided tensor, read in 16-byte pieces and widened to float32.
//
// A block of 128 threads reads several tokens at a time. The lanes that share a token are
// neighbours, at most one warp; each holds the same channels of every token it reads, in pieces of
// 16 bytes:
//
//        piece 0 of the row     piece 1 (only float32 with more than 128 channels)
//      | lane 0 | lane 1 | ..| lane 0 | lane 1 | ..      16 bytes each
//
// Neighbouring lanes read neighbouring bytes, so a row costs its own bytes and no more, whichever
// of the access widths its address allows.

#pragma once

#include "cusparge/params.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

// Spelled in the variants of cusparge._cuda.pooling.
enum class Dtype : u8 { kFloat16, kBFloat16, kFloat32 };

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kPieceBytes = 16;

// How the threads of a block share tokens of up to kHeadDim channels.
template <Dtype kDtype, int kHeadDim>
struct RowTile {
  static constexpr int kElementBytes = kDtype == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kPieceChannels = kPieceBytes / kElementBytes;
  static constexpr int kRowPieces = kHeadDim / kPieceChannels;
  static constexpr int kLanes = kRowPieces < 32 ? kRowPieces : 32;  // that share a token
  static constexpr int kPieces = kRowPieces / kLanes;               // of each lane, per token
  static constexpr int kChannels = kPieces * kPieceChannels;        // of each lane
  static constexpr int kSlots = kThreads / kLanes;                  // tokens at a time

  // Tokens that a lane loads before it uses the first: four loads in flight hide the latency of
  // DRAM at the occupancy that these kernels reach. No more than a block of 64 tokens has use for.
  static constexpr int kInFlight = 4 / kPieces;
  static constexpr int kBatch = kInFlight * kSlots <= 64 ? kInFlight : 64 / kSlots;

  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "a tile of the host's plan");
  static_assert(kLanes * kPieces == kRowPieces, "pieces divide among the lanes");
  static_assert(kBatch >= 1);

  // First channel of one of a lane's pieces.
  CS_DEV static int piece_channel(int lane, int piece) {
    return (piece * kLanes + lane) * kPieceChannels;
  }
};

// Consecutive tokens of one batch item and head; they are counted from the first one on.
struct HeadRows {
  const u8* data;
  s64 stride_token;
  int row_bytes;
  int access_bytes;  // 16, 4 or 2: the widest access that every row allows
};

CS_DEV HeadRows head_rows(const void* x, const TokenRows& rows, u32 batch_idx, u32 head_idx,
                          s64 first_token, int element_bytes) {
  HeadRows result;
  result.data = static_cast<const u8*>(x) + batch_idx * rows.stride_batch +
                head_idx * rows.stride_head + first_token * rows.stride_token;
  result.stride_token = rows.stride_token;
  result.row_bytes = static_cast<int>(rows.head_dim) * element_bytes;
  // An address that is a multiple of the width, a step and a length that are too.
  const u64 bits = reinterpret_cast<u64>(result.data) | static_cast<u64>(rows.stride_token) |
                   static_cast<u64>(result.row_bytes);
  result.access_bytes = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  return result;
}

// Real tokens of a sequence; a length out of range is cut to what the array has.
CS_DEV s64 real_tokens(const s32* lengths, s64 num_tokens, u32 batch_idx) {
  if (lengths == nullptr) return num_tokens;
  const s64 length = lengths[batch_idx];
  return length < 0 ? 0 : length < num_tokens ? length : num_tokens;
}

// Read the first `bytes` (none if negative) of 16; the rest is zero. Multiples of kAccess.
template <int kAccess>
CS_DEV V4 load_piece(const u8* source, int bytes) {
  V4 piece{0, 0, 0, 0};
  if constexpr (kAccess == 16) {
    if (bytes > 0) piece = ptx::ld_global_16(source);
  } else if constexpr (kAccess == 4) {
    u32 word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < bytes) word[i] = ptx::ld_global_4(source + 4 * i);
    }
    piece = V4{word[0], word[1], word[2], word[3]};
  } else {
    u32 half[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (2 * i < bytes) half[i] = ptx::ld_global_2(source + 2 * i);
    }
    piece = V4{half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16,
               half[6] | half[7] << 16};
  }
  return piece;
}

// A lane's pieces of kTokens tokens: first, first + kStep, ... A token at `end` or after is zero.
template <class Tile, int kAccess, int kTokens, int kStep = Tile::kSlots>
CS_DEV void load_tokens(const HeadRows& rows, int first, int end, int lane,
                        V4 (&tokens)[kTokens][Tile::kPieces]) {
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int token = first + i * kStep;
    const u8* row = rows.data + token * rows.stride_token;
#pragma unroll
    for (int piece = 0; piece < Tile::kPieces; ++piece) {
      const int offset = Tile::piece_channel(lane, piece) * Tile::kElementBytes;
      tokens[i][piece] =
          load_piece<kAccess>(row + offset, token < end ? rows.row_bytes - offset : 0);
    }
  }
}

// The channels of a lane's pieces, in the order of the row.
template <Dtype kDtype, int kPieces, int kChannels>
CS_DEV void widen(const V4 (&pieces)[kPieces], float (&x)[kChannels]) {
  constexpr int kPerPiece = kChannels / kPieces;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const u32 word[4] = {pieces[piece].x, pieces[piece].y, pieces[piece].z, pieces[piece].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = piece * kPerPiece + i * (kPerPiece / 4);
      if constexpr (kDtype == Dtype::kFloat32) {
        x[c] = float_from_bits(word[i]);
      } else if constexpr (kDtype == Dtype::kBFloat16) {
        x[c] = float_from_bf16x2_low(word[i]);
        x[c + 1] = float_from_bf16x2_high(word[i]);
      } else {
        x[c] = ptx::float_from_f16(static_cast<u16>(word[i] & 0xFFFFu));
        x[c + 1] = ptx::float_from_f16(static_cast<u16>(word[i] >> 16));
      }
    }
  }
}

// A lane's channels of a contiguous float32 row; channels beyond the row are zero.
template <class Tile>
CS_DEV void load_row_float(const float* row, int head_dim, int lane,
                           float (&out)[Tile::kChannels]) {
  const bool is_wide = (reinterpret_cast<u64>(row) | static_cast<u64>(4 * head_dim)) % 16 == 0;
#pragma unroll
  for (int c = 0; c < Tile::kChannels; c += 4) {
    const int piece = c / Tile::kPieceChannels;
    const int channel = Tile::piece_channel(lane, piece) + c % Tile::kPieceChannels;
    const u8* source = reinterpret_cast<const u8*>(row + channel);
    const int bytes = 4 * (head_dim - channel);
    const V4 four = is_wide ? load_piece<16>(source, bytes) : load_piece<4>(source, bytes);
    out[c] = float_from_bits(four.x);
    out[c + 1] = float_from_bits(four.y);
    out[c + 2] = float_from_bits(four.z);
    out[c + 3] = float_from_bits(four.w);
  }
}

CS_DEV float magnitude(float x) { return float_from_bits(bits_of_float(x) & 0x7FFFFFFFu); }

// Sum, or largest, over the kLanes neighbouring lanes that share a token; all of them get it.
template <int kLanes>
CS_DEV float lanes_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += ptx::shfl_xor(x, static_cast<u32>(step));
  return x;
}

template <int kLanes>
CS_DEV float lanes_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = ptx::max(x, ptx::shfl_xor(x, static_cast<u32>(step)));
  return x;
}

}  // namespace cusparge
