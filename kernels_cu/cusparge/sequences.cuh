// Packed sequences: which of them a block of threads works for.
//
// Sequence b holds the tokens cu_seqlens[b] to cu_seqlens[b + 1] of an array. The list lies on the
// device, and nobody has checked it: ends are clamped to the array and made to rise, so that
// whatever it holds, no sequence reaches outside the array and none overlaps another.
//
// A head's tiles are numbered through: those of sequence b begin where those of b - 1 end, and it
// has ceil(tokens / tile) of them. There are at most total / tile + sequences, and grids and arrays
// have that many; those left over belong to no sequence. Chunks, of which statistics are formed,
// are numbered in the same way.

#pragma once

#include "cusparge/ptx.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

// Chunks of a sequence with so many tiles of keys. It depends on nothing else: a sequence has the
// same statistics, bit for bit, whatever stands beside it. Every block of keys reads all chunks
// again, so there are few.
inline constexpr int kMostChunks = 16;      // cusparge._cuda.prologue.MOST_CHUNKS
inline constexpr int kLeastChunkTiles = 4;  // cusparge._cuda.prologue.LEAST_CHUNK_TILES

CS_HOST_DEV constexpr u32 chunks_of(s64 tiles) {
  const s64 chunks = (tiles + (kLeastChunkTiles - 1)) / kLeastChunkTiles;
  return chunks < kMostChunks ? static_cast<u32>(chunks) : kMostChunks;
}

struct Sequence {
  u32 index;
  u32 first_tile;   // of all tiles of its head
  u32 first_chunk;  // of all its chunks
  s64 begin;        // its first token in the array
  s64 tokens;
  bool is_found;
};

// Sum of the lanes up to this one.
CS_DEV u32 sum_through(u32 value) {
  const u32 lane = ptx::thread_x() % 32;
#pragma unroll
  for (u32 step = 1; step < 32; step *= 2) {
    const u32 other = ptx::shfl_up(value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Find the sequence for which is_wanted(candidate, tiles, empty) is true; `empty` counts the
// sequences in front of it that have no token. Not found: first_tile is the number of all tiles.
// Every warp looks for itself, 32 sequences at a time; whole warps call.
template <int kTokens, class IsWanted>
CS_DEV Sequence find_sequence(const s32* cu_seqlens, u32 num_sequences, s64 total,
                              IsWanted is_wanted) {
  const u32 lane = ptx::thread_x() % 32;
  const s32 limit = total < 0x7FFFFFFF ? static_cast<s32>(total) : 0x7FFFFFFF;
  s32 reached = 0;  // end of the sequences in front
  u32 tiles_before = 0;
  u32 chunks_before = 0;
  u32 empty_before = 0;
#pragma unroll 1
  for (u32 base = 0; base < num_sequences; base += 32) {
    const u32 index = base + lane;
    const bool is_real = index < num_sequences;
    s32 begin = is_real ? cu_seqlens[index] : 0;
    s32 end = is_real ? cu_seqlens[index + 1] : 0;
    if (begin > limit) begin = limit;
    if (end > limit) end = limit;
    if (begin < reached) begin = reached;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
      const s32 other = ptx::shfl_up(begin, step);
      if (other > begin) begin = other;  // a lane without a source has its own
    }
    if (end < begin) end = begin;

    const u32 tokens = static_cast<u32>(end - begin);
    const u32 tiles = (tokens + (kTokens - 1)) / kTokens;
    const u32 chunks = chunks_of(tiles);
    const u32 tiles_through = tiles_before + sum_through(tiles);
    const u32 chunks_through = chunks_before + sum_through(chunks);
    const u32 empties = ptx::ballot(is_real && tokens == 0);
    const u32 empty = empty_before + static_cast<u32>(__popc(empties & ((1u << lane) - 1)));

    const Sequence candidate{index, tiles_through - tiles, chunks_through - chunks, begin, tokens,
                             true};
    const u32 found = ptx::ballot(is_real && is_wanted(candidate, tiles, empty));
    if (found != 0) {
      const u32 source = static_cast<u32>(__ffs(static_cast<int>(found)) - 1);
      return {base + source,
              ptx::shfl_idx(candidate.first_tile, source),
              ptx::shfl_idx(candidate.first_chunk, source),
              ptx::shfl_idx(begin, source),
              ptx::shfl_idx(static_cast<s32>(tokens), source),
              true};
    }
    reached = ptx::shfl_idx(end, 31);
    tiles_before = ptx::shfl_idx(tiles_through, 31);
    chunks_before = ptx::shfl_idx(chunks_through, 31);
    empty_before += static_cast<u32>(__popc(empties));
  }
  return {0, tiles_before, 0, 0, 0, false};
}

// The sequence to which tile `tile` of all belongs.
template <int kTokens>
CS_DEV Sequence sequence_of_tile(const s32* cu_seqlens, u32 num_sequences, s64 total, u32 tile) {
  return find_sequence<kTokens>(cu_seqlens, num_sequences, total,
                                [=](const Sequence& it, u32 tiles, u32) {
                                  return tile >= it.first_tile && tile - it.first_tile < tiles;
                                });
}

// The sequence to which chunk `chunk` of all belongs.
template <int kTokens>
CS_DEV Sequence sequence_of_chunk(const s32* cu_seqlens, u32 num_sequences, s64 total, u32 chunk) {
  return find_sequence<kTokens>(
      cu_seqlens, num_sequences, total, [=](const Sequence& it, u32 tiles, u32) {
        return chunk >= it.first_chunk && chunk - it.first_chunk < chunks_of(tiles);
      });
}

// Sequence number `wanted`.
template <int kTokens>
CS_DEV Sequence sequence_by_index(const s32* cu_seqlens, u32 num_sequences, s64 total, u32 wanted) {
  return find_sequence<kTokens>(cu_seqlens, num_sequences, total,
                                [=](const Sequence& it, u32, u32) { return it.index == wanted; });
}

// Number `wanted` of the sequences without a token.
template <int kTokens>
CS_DEV Sequence empty_sequence(const s32* cu_seqlens, u32 num_sequences, s64 total, u32 wanted) {
  return find_sequence<kTokens>(
      cu_seqlens, num_sequences, total,
      [=](const Sequence&, u32 tiles, u32 empty) { return tiles == 0 && empty == wanted; });
}

}  // namespace cusparge
