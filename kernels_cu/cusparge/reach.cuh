// Which sequence a row of the map belongs to, and which key blocks it may, and must, see.
//
// The blocks that a row may see are always the first ones of its sequence: causality and padding
// cut off the end alone. Arithmetic on tokens is in 64 bits; block numbers fit 32.

#pragma once

#include "cusparge/geometry.cuh"
#include "cusparge/map_params.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/sequences.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

// Rounded down, for negative numbers too; C++ rounds towards zero.
CS_HOST_DEV constexpr s64 floor_div(s64 a, s64 b) { return a / b - (a % b < 0); }

CS_HOST_DEV constexpr s64 clamped(s64 x, s64 low, s64 high) {
  return x < low ? low : x < high ? x : high;
}

// How many key blocks rows up to `last_row` may see; see reachable_blocks_k of geometry.cuh.
CS_HOST_DEV constexpr s64 reach_of_row(s64 last_row, s64 valid_k, bool is_causal, s64 offset) {
  const s64 valid = ceil_div(valid_k, kBlockK);
  if (!is_causal) return valid;
  return clamped(floor_div(last_row + offset, kBlockK) + 1, 0, valid);
}

// Key blocks first to last; none if last < first.
struct Band {
  s64 first;
  s64 last;
};

// The blocks around the diagonal that are computed whatever their score (reference.forced_blocks).
CS_HOST_DEV constexpr Band forced_band(s64 block, s64 seqlen_q, bool is_causal, s64 offset,
                                       s64 local_blocks) {
  if (!is_causal && local_blocks == 0) return Band{0, -1};
  const s64 first = floor_div(block * kBlockQ + offset, kBlockK);
  const s64 last = floor_div(block_q_end(block, seqlen_q) - 1 + offset, kBlockK);
  const s64 more = local_blocks > 0 ? local_blocks - 1 : 0;
  return Band{first - more, is_causal ? last : last + more};
}

// A row's place in its sequence.
struct RowPlace {
  s64 block;     // query block of the sequence
  s64 seqlen_q;  // of the sequence; 0 where the row belongs to none
  s64 valid_k;
  s64 offset;  // 0 without causality
  bool is_causal;
  s32 key_base;  // the sequence's first key block, among those of the head

  // Key blocks that the rows [first, first + count) of the block may see.
  CS_DEV s32 reach(s64 first, s64 count) const {
    const s64 begin = block * kBlockQ + first;
    if (begin >= seqlen_q) return 0;
    const s64 end = begin + count < seqlen_q ? begin + count : seqlen_q;
    return static_cast<s32>(reach_of_row(end - 1, valid_k, is_causal, offset));
  }
};

// The place of a packed row. Whole warps call, each for one row.
CS_DEV RowPlace packed_place(const MapSequences& sequences, const MapRows& rows, u32 block) {
  RowPlace place{0, 0, 0, 0, rows.causality != static_cast<u32>(Causality::kNone), 0};
  const Sequence q =
      sequence_of_tile<kBlockQ>(sequences.cu_seqlens_q, rows.num_sequences, rows.seqlen_q, block);
  if (!q.is_found) return place;  // arrays have room for more blocks than the sequences need
  const Sequence k = sequence_by_index<kBlockK>(sequences.cu_seqlens_k, rows.num_sequences,
                                                rows.seqlen_k, q.index);
  place.block = block - q.first_tile;
  place.seqlen_q = q.tokens;
  place.valid_k = k.tokens;
  place.key_base = static_cast<s32>(k.first_tile);
  if (rows.causality == static_cast<u32>(Causality::kPerSequence)) {
    place.offset = place.valid_k - place.seqlen_q;
  }
  return place;
}

// The place of any row. Whole warps call, each for one row.
CS_DEV RowPlace place_of_row(const MapSequences& sequences, const MapRows& rows, u32 row) {
  const u32 block = row % rows.blocks_per_head;
  if (sequences.cu_seqlens_q != nullptr) return packed_place(sequences, rows, block);
  RowPlace place{block, rows.seqlen_q, rows.seqlen_k, 0, false, 0};
  if (sequences.lengths_k != nullptr) {
    const u32 batch_idx = row / rows.blocks_per_head / rows.num_heads_q;
    place.valid_k = clamped(sequences.lengths_k[batch_idx], 0, rows.seqlen_k);
  }
  if (rows.causality == static_cast<u32>(Causality::kFixed)) {
    place.is_causal = true;
    place.offset = rows.causal_offset;
  }
  return place;
}

}  // namespace cusparge
