// What the host passes to the kernels of block_map.cu: one trivially copyable struct by value.
//
// As in params.cuh, pointers stand in front and numbers follow. The Python side is
// cusparge._cuda.block_map; tests/test_map_plan.py holds it against the offsets asserted here.
//
// A *row* of the map is one query block of one query head of one batch item; rows are numbered in
// that order, the query block fastest. In a packed call there is one batch item, and the query
// blocks of its sequences follow each other: sequence b has ceil(length / 128) of them, behind
// those of the sequences before it, and its key blocks lie likewise among those of the head.

#pragma once

#include "cusparge/types.cuh"

namespace cusparge {

// Lengths that live on the device and are not trusted: whatever they hold is cut to the arrays.
struct MapSequences {
  const s32* lengths_k;     // (batch,) keys before the padding; null: all
  const s32* cu_seqlens_q;  // (sequences + 1,) first token of each; null: not packed
  const s32* cu_seqlens_k;
};

// What the map is made of; the last three are null where they are not wanted.
struct MapOutputs {
  u32* bits;          // (row, word): bit j % 32 of word j / 32 is key block j of the sequence
  u32* count;         // (row,) how many bits are set
  u32* first;         // (row,) the block that goes first; 0 in a row without blocks
  u32* reachable;     // (row,) how many blocks the row may see
  u8* mask;           // (row, key block) the same as bits, a byte each; not in packed calls
  u32* class_counts;  // (class,) of the work queue, see queue.cuh; all zero before the launch
  u32* items;         // (class, row)
};

// The rows of a call, and what decides about their reach.
struct MapRows {
  s64 seqlen_q;  // of the arrays; the total in a packed call
  s64 seqlen_k;
  s64 causal_offset;  // row i sees keys j <= i + offset; where causality is kFixed
  u32 num_sequences;
  u32 num_heads_q;
  u32 blocks_per_head;  // query blocks of a batch item's head: rows of the map
  u32 num_blocks_k;     // key blocks of a batch item's head, in all arrays that have them
  u32 words;            // of a row's bits
  u32 num_rows;
  u32 causality;  // an enumerator of Causality
  u32 unused;
};

enum class Causality : u32 {
  kNone,
  kFixed,        // the offset of MapRows
  kPerSequence,  // packed, bottom-right: each sequence's keys less its queries
};

// A policy's numbers for one query head.
struct HeadRule {
  double share;         // cdf_threshold or keep
  float sim_threshold;  // rounded down: a float is above this one if it is above the policy's
  u32 unused;
};

// Rules that travel by value (cusparge._cuda.block_map.MAX_RULES): an upload would need memory that
// outlives the call, and is not for a graph to capture. More than this come from an array.
inline constexpr int kMaxRules = 64;

// cusparge._cuda.block_map, "choose_blocks"
struct MapParams {
  const float* q_mean;        // (row, channel)
  const float* q_similarity;  // (row,)
  const float* k_mean;        // (batch, kv head, key block, channel)
  const float* k_similarity;  // (batch, kv head, key block)
  const HeadRule* rules;      // (query head,); null: the table below
  MapSequences sequences;
  MapOutputs out;
  MapRows rows;
  u32 rows_per_group;   // consecutive rows that read the same keys
  u32 tiles_per_group;  // blocks of threads that share them
  u32 groups_per_head;  // of keys
  u32 head_dim;
  u32 panel_blocks;  // key blocks that a row has room for
  u32 panel_stride;  // words from one row's scores to the next's
  u32 rule;          // an enumerator of Rule
  float scale_log2;  // sm_scale * log2(e)
  u32 sink_blocks;
  u32 local_blocks;
  u32 num_rules;  // in the table: 1 for all heads, or one for each
  u32 unused;
  HeadRule table[kMaxRules];
};

// cusparge._cuda.block_map, "take_blocks"
struct TakeParams {
  const u8* given;  // the caller's mask; null: every block that can be reached
  u32* halves;      // (row, half, word): bits of rows 0-63 and 64-127 of the block; null
  MapSequences sequences;
  MapOutputs out;
  MapRows rows;
  s64 stride_batch;  // bytes of the caller's mask, 0 along a dimension of 1
  s64 stride_head;
  s64 stride_row;
  s64 stride_column;
  u32 item_bytes;    // of an element; any byte that is not 0 keeps the block
  u32 column_shift;  // log2 of the key blocks of 64 that an element stands for: 0 or 1
};

// cusparge._cuda.block_map, "clear_queue"
struct ClearParams {
  u32* class_counts;
  u32* ticket;
};

// As in params.cuh.
#if defined(__CUDACC_RTC__)
#define CUSPARGE_OFFSET(type, field) __INTADDR__(&((static_cast<type*>(nullptr))->field))
#else
#define CUSPARGE_OFFSET(type, field) __builtin_offsetof(type, field)
#endif
#define CUSPARGE_AT(type, field, offset) \
  static_assert(CUSPARGE_OFFSET(type, field) == (offset), "the host packs " #field " there")

CUSPARGE_AT(MapRows, seqlen_q, 0);
CUSPARGE_AT(MapRows, causal_offset, 16);
CUSPARGE_AT(MapRows, num_sequences, 24);
CUSPARGE_AT(MapRows, causality, 48);
static_assert(sizeof(MapRows) == 56);
static_assert(sizeof(MapSequences) == 24 && sizeof(MapOutputs) == 56);

CUSPARGE_AT(HeadRule, share, 0);
CUSPARGE_AT(HeadRule, sim_threshold, 8);
static_assert(sizeof(HeadRule) == 16);

CUSPARGE_AT(MapParams, sequences, 40);
CUSPARGE_AT(MapParams, out, 64);
CUSPARGE_AT(MapParams, rows, 120);
CUSPARGE_AT(MapParams, rows_per_group, 176);
CUSPARGE_AT(MapParams, scale_log2, 204);
CUSPARGE_AT(MapParams, num_rules, 216);
CUSPARGE_AT(MapParams, table, 224);
static_assert(sizeof(MapParams) == 224 + 16 * kMaxRules);
static_assert(sizeof(MapParams) <= 4096, "what every launch can pass by value");

CUSPARGE_AT(TakeParams, sequences, 16);
CUSPARGE_AT(TakeParams, out, 40);
CUSPARGE_AT(TakeParams, rows, 96);
CUSPARGE_AT(TakeParams, stride_batch, 152);
CUSPARGE_AT(TakeParams, item_bytes, 184);
static_assert(sizeof(TakeParams) == 192);
static_assert(sizeof(ClearParams) == 16);

#undef CUSPARGE_AT
#undef CUSPARGE_OFFSET

}  // namespace cusparge
