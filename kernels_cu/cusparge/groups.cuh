// What prologue.cu shares among Q, K and V: how a warp reads the 16 tokens of a scale group, how
// the shared memory is cut up, and how codes are stored.

#pragma once

#include "cusparge/geometry.cuh"
#include "cusparge/params.cuh"
#include "cusparge/pooling.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/quantize.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/sequences.cuh"
#include "cusparge/tiles.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

struct PrologueConfig {
  Dtype dtype;
  int head_dim;  // 64, 128 or 256: room for that many channels
  TileFormat tiles;
  ValueFormat values;
};

static_assert(kWarps * kKeyGroup == kTileTokens, "a warp a group of a tile");
static_assert(kBlockK == kTileTokens && kBlockQ == 2 * kTileTokens && kMaxBlockTokens == kBlockQ);

// Pieces that a thread holds at a time, in 16 registers.
inline constexpr int kHeldPieces = 4;

// A RowTile whose warps read consecutive tokens: warp w the tokens 16 w to 16 w + 15 of a tile.
template <PrologueConfig kConfig>
struct GroupTile : RowTile<kConfig.dtype, kConfig.head_dim> {
  using Rows = RowTile<kConfig.dtype, kConfig.head_dim>;
  static constexpr Dtype kDtype = kConfig.dtype;
  static constexpr int kWidth = kConfig.head_dim;
  static constexpr int kWarpSlots = 32 / Rows::kLanes;   // tokens that a warp reads at a time
  static constexpr int kTurns = kKeyGroup / kWarpSlots;  // until it has read 16
  static constexpr int kMost = kHeldPieces / Rows::kPieces;
  static constexpr int kHeld = kTurns < kMost ? kTurns : kMost;
  static constexpr int kLoads = kTurns / kHeld;
  static_assert(kLoads * kHeld == kTurns);
  static_assert(kConfig.tiles == TileFormat::kCoreMatrix || kWidth <= 128,
                "a swizzled row is 64 or 128 bytes");
  static_assert(kConfig.tiles == TileFormat::kCoreMatrix || kConfig.values == ValueFormat::kE4m3,
                "float16 tiles are core matrices");

  // The token of the tile that this thread reads in one of its turns.
  CS_DEV static int token_of_turn(const Place<GroupTile>& place, int turn) {
    const int warp = place.slot / kWarpSlots;
    return warp * kKeyGroup + place.slot % kWarpSlots + turn * kWarpSlots;
  }
};

// How the dynamic shared memory is cut up.
template <PrologueConfig kConfig>
struct PrologueShared {
  static constexpr int kSumsBytes = 2 * kThreads * GroupTile<kConfig>::kChannels * 4;
  static constexpr int kCodesBytes =
      kConfig.values == ValueFormat::kE4m3 ? kTileTokens * kConfig.head_dim : 0;
  static constexpr int kOwn = kSumsBytes > kCodesBytes ? kSumsBytes : kCodesBytes;
  static constexpr int kMean = kOwn + 16 * kThreads * kHeldPieces;
  static constexpr int kInverse = kMean + 4 * kConfig.head_dim;
  static constexpr int kWords = kInverse + 4 * kConfig.head_dim;  // two a warp for finish_block
  static constexpr int kBad = kWords + 8 * kWarps;
  static constexpr int kBytes = kBad + 4 * kWarps;
  static_assert(kBytes <= 48 * 1024, "what a launch may have without asking");
};

// Tokens first, first + kWarpSlots, ... Rows that do not allow wide loads are read token by token,
// through this thread's places in s_own, so that the many narrow loads need few registers.
template <class Tile>
CS_DEV void load_held(const HeadRows& rows, int first, int end, int lane, V4* s_own,
                      V4 (&tokens)[Tile::kHeld][Tile::kPieces]) {
  if (rows.access_bytes == 16) {
    load_tokens<Tile, 16, Tile::kHeld, Tile::kWarpSlots>(rows, first, end, lane, tokens);
    return;
  }
  s_own += ptx::thread_x();
#pragma unroll 1
  for (int i = 0; i < Tile::kHeld; ++i) {
    V4 one[1][Tile::kPieces];
    load_tokens<Tile, Tile::kElementBytes>(rows, first + i * Tile::kWarpSlots, end, lane, one);
#pragma unroll
    for (int piece = 0; piece < Tile::kPieces; ++piece) {
      s_own[(i * Tile::kPieces + piece) * kThreads] = one[0][piece];
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kHeld; ++i) {
#pragma unroll
    for (int piece = 0; piece < Tile::kPieces; ++piece) {
      tokens[i][piece] = s_own[(i * Tile::kPieces + piece) * kThreads];
    }
  }
}

// A lane's channels of a float row in shared memory.
template <class Tile>
CS_DEV void load_shared_row(const float* s_row, int lane, float (&out)[Tile::kChannels]) {
#pragma unroll
  for (int c = 0; c < Tile::kChannels; c += 4) {
    const int channel =
        Tile::piece_channel(lane, c / Tile::kPieceChannels) + c % Tile::kPieceChannels;
    const FourFloats four = *reinterpret_cast<const FourFloats*>(s_row + channel);
    out[c] = four.x;
    out[c + 1] = four.y;
    out[c + 2] = four.z;
    out[c + 3] = four.w;
  }
}

// Put the chunks of one sequence and head together, in their order: the mean of K, and with kValues
// the inverse of V's scales. Zero and one without chunks. The caller waits for the other threads.
template <PrologueConfig kConfig, bool kValues>
CS_DEV void finish_statistics(const PrologueParams& params, u32 row, u32 first_chunk, s64 tokens,
                              float* s_mean, float* s_inverse) {
  const u32 head_dim = params.k_rows.head_dim;
  const u32 chunks = chunks_of((tokens + kTileTokens - 1) / kTileTokens);
  const float* sums =
      params.partial + (static_cast<s64>(row) * params.num_chunks + first_chunk) * head_dim;
  const float* largest = sums + static_cast<s64>(params.num_rows_k) * params.num_chunks * head_dim;
#pragma unroll 1
  for (u32 channel = ptx::thread_x(); channel < kConfig.head_dim; channel += kThreads) {
    float sum = 0.0f;
    float most = 0.0f;
    if (channel < head_dim) {
#pragma unroll 8
      for (u32 chunk = 0; chunk < chunks; ++chunk) {
        sum += sums[chunk * head_dim + channel];
        if constexpr (kValues) most = ptx::max(most, largest[chunk * head_dim + channel]);
      }
    }
    s_mean[channel] = saturated(2.0f * sum);
    if constexpr (kValues) s_inverse[channel] = inverse_value_scale<kConfig.values>(most);
  }
}

// One store of kWords words; the address is a multiple of its size.
template <int kWords>
CS_DEV void store_words(void* at, const u32 (&word)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 1) {
    *static_cast<u32*>(at) = word[0];
  } else if constexpr (kWords == 2) {
    *static_cast<V2*>(at) = V2{word[0], word[1]};
  } else {
    *static_cast<V4*>(at) = V4{word[0], word[1], word[2], word[3]};
  }
}

// Store a lane's codes of one token: x * factor of its channels, those of the padding included.
template <PrologueConfig kConfig>
CS_DEV void store_codes(s8* tile, int row_bytes, int token, int lane,
                        const float (&x)[GroupTile<kConfig>::kChannels], float factor) {
  using Tile = GroupTile<kConfig>;
  if constexpr (kConfig.tiles == TileFormat::kSwizzled) row_bytes = kConfig.head_dim;
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) {
    const int channel = Tile::piece_channel(lane, piece);
    if (channel >= row_bytes) continue;
    u32 codes[Tile::kPieceChannels / 4];
#pragma unroll
    for (int i = 0; i < Tile::kPieceChannels / 4; ++i) {
      const int c = piece * Tile::kPieceChannels + 4 * i;
      codes[i] = int8_codes({x[c], x[c + 1], x[c + 2], x[c + 3]}, factor);
    }
    store_words(tile + tile_offset(kConfig.tiles, row_bytes, token, channel), codes);
  }
}

template <int kChannels>
CS_DEV float largest_of(const float (&y)[kChannels]) {
  float largest = 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) largest = ptx::max(largest, magnitude(y[c]));
  return largest;
}

}  // namespace cusparge
