// What the host passes to each kernel: one trivially copyable struct by value.
//
// Every struct begins with its pointers, eight bytes each, and numbers follow. A host thus packs
// the numbers once for a shape and puts only pointers in front of them in every call. The Python
// twin of each struct is named beside it; the offsets asserted here are what it packs, and
// tests/test_pool_plan.py holds the two sides together.

#pragma once

#include "cusparge/types.cuh"

namespace cusparge {

// A tensor (batch, head, token, channel) that is read where it lies, through any strides. Channels
// are contiguous. Strides are in bytes and signed: zero repeats, negative walks backwards.
struct TokenRows {
  s64 stride_batch;
  s64 stride_head;
  s64 stride_token;
  s64 num_tokens;  // of the array, padding included
  u32 num_heads;
  u32 head_dim;
};

// cusparge._cuda.pooling, "sum_chunks"
struct SumParams {
  const void* x;
  const s32* lengths;  // (batch,) real tokens of each sequence; null: all
  float* partial;      // (batch, head, chunk, channel)
  TokenRows rows;
  u32 num_chunks;
  u32 unused;
};

// cusparge._cuda.pooling, "finish_mean"
struct MeanParams {
  const float* partial;  // as in SumParams
  const s32* lengths;
  float* token_mean;  // (batch, head, channel)
  s64 num_tokens;
  u32 num_chunks;
  u32 num_heads;
  u32 head_dim;
  u32 unused;
};

// cusparge._cuda.pooling, "pool_blocks"
struct PoolParams {
  const void* x;
  const s32* lengths;
  const float* token_mean;  // (batch, head, channel), taken off every token; null: nothing is
  float* block_mean;        // (batch, head, block, channel)
  float* similarity;        // (batch, head, block)
  TokenRows rows;
  u32 num_blocks;
  u32 block_tokens;
};

// cusparge._cuda.prologue, "kv_statistics"
struct StatisticsParams {
  const void* k;
  const void* v;
  const s32* lengths;     // (batch,) real keys of each sequence; null: all
  const s32* cu_seqlens;  // (sequences + 1,) where packed sequences begin and end; null: a batch
  float* partial;         // [k, v] (row, chunk, channel); a row is a head of a batch item
  TokenRows k_rows;
  TokenRows v_rows;
  u32 num_sequences;
  u32 num_rows;
  u32 num_chunks;  // of a row
  u32 unused;
};

// cusparge._cuda.prologue, "prologue". Blocks are 128 queries and 64 keys; "row" as above.
struct PrologueParams {
  const void* q;
  const void* k;
  const void* v;
  const s32* lengths;       // of keys, as in StatisticsParams
  const s32* cu_seqlens_q;  // both null, or neither
  const s32* cu_seqlens_k;
  const float* partial;
  s8* q_tile;           // (row, block, half, tile)
  float* q_scale;       // (row, block, 128)
  float* q_mean;        // (row, block, channel)
  float* q_similarity;  // (row, block)
  float* q_shift;       // (row, block, 128); null: not wanted
  s8* k_tile;           // (row, block, tile)
  float* k_scale;       // (row, block, 4)
  float* k_mean;        // (row, block, channel)
  float* k_similarity;  // (row, block)
  u8* k_bad;            // (row, block)
  float* token_mean;    // (sequence, head, channel)
  u8* v_tile;           // (row, block, tile)
  float* v_scale;       // (sequence, head, channel)
  TokenRows q_rows;
  TokenRows k_rows;
  TokenRows v_rows;
  u32 num_sequences;
  u32 num_rows_q;
  u32 num_rows_k;
  u32 num_blocks_q;  // of a row
  u32 num_blocks_k;
  u32 num_chunks;
  float q_factor;  // scale of a query's codes over its largest magnitude, with the sign of sm_scale
  float sm_scale;
};

// NVRTC before 13.5 has no __builtin_offsetof, and no header to take offsetof from; this is what
// its front end makes of one.
#if defined(__CUDACC_RTC__)
#define CUSPARGE_OFFSET(type, field) __INTADDR__(&((static_cast<type*>(nullptr))->field))
#else
#define CUSPARGE_OFFSET(type, field) __builtin_offsetof(type, field)
#endif
#define CUSPARGE_AT(type, field, offset) \
  static_assert(CUSPARGE_OFFSET(type, field) == (offset), "the host packs " #field " there")

CUSPARGE_AT(TokenRows, stride_batch, 0);
CUSPARGE_AT(TokenRows, stride_head, 8);
CUSPARGE_AT(TokenRows, stride_token, 16);
CUSPARGE_AT(TokenRows, num_tokens, 24);
CUSPARGE_AT(TokenRows, num_heads, 32);
CUSPARGE_AT(TokenRows, head_dim, 36);
static_assert(sizeof(TokenRows) == 40);

CUSPARGE_AT(SumParams, x, 0);
CUSPARGE_AT(SumParams, lengths, 8);
CUSPARGE_AT(SumParams, partial, 16);
CUSPARGE_AT(SumParams, rows, 24);
CUSPARGE_AT(SumParams, num_chunks, 64);
static_assert(sizeof(SumParams) == 72);

CUSPARGE_AT(MeanParams, partial, 0);
CUSPARGE_AT(MeanParams, lengths, 8);
CUSPARGE_AT(MeanParams, token_mean, 16);
CUSPARGE_AT(MeanParams, num_tokens, 24);
CUSPARGE_AT(MeanParams, num_chunks, 32);
CUSPARGE_AT(MeanParams, num_heads, 36);
CUSPARGE_AT(MeanParams, head_dim, 40);
static_assert(sizeof(MeanParams) == 48);

CUSPARGE_AT(PoolParams, x, 0);
CUSPARGE_AT(PoolParams, lengths, 8);
CUSPARGE_AT(PoolParams, token_mean, 16);
CUSPARGE_AT(PoolParams, block_mean, 24);
CUSPARGE_AT(PoolParams, similarity, 32);
CUSPARGE_AT(PoolParams, rows, 40);
CUSPARGE_AT(PoolParams, num_blocks, 80);
CUSPARGE_AT(PoolParams, block_tokens, 84);
static_assert(sizeof(PoolParams) == 88);

CUSPARGE_AT(StatisticsParams, k, 0);
CUSPARGE_AT(StatisticsParams, v, 8);
CUSPARGE_AT(StatisticsParams, lengths, 16);
CUSPARGE_AT(StatisticsParams, cu_seqlens, 24);
CUSPARGE_AT(StatisticsParams, partial, 32);
CUSPARGE_AT(StatisticsParams, k_rows, 40);
CUSPARGE_AT(StatisticsParams, v_rows, 80);
CUSPARGE_AT(StatisticsParams, num_sequences, 120);
CUSPARGE_AT(StatisticsParams, num_rows, 124);
CUSPARGE_AT(StatisticsParams, num_chunks, 128);
static_assert(sizeof(StatisticsParams) == 136);

CUSPARGE_AT(PrologueParams, q, 0);
CUSPARGE_AT(PrologueParams, k, 8);
CUSPARGE_AT(PrologueParams, v, 16);
CUSPARGE_AT(PrologueParams, lengths, 24);
CUSPARGE_AT(PrologueParams, cu_seqlens_q, 32);
CUSPARGE_AT(PrologueParams, cu_seqlens_k, 40);
CUSPARGE_AT(PrologueParams, partial, 48);
CUSPARGE_AT(PrologueParams, q_tile, 56);
CUSPARGE_AT(PrologueParams, q_scale, 64);
CUSPARGE_AT(PrologueParams, q_mean, 72);
CUSPARGE_AT(PrologueParams, q_similarity, 80);
CUSPARGE_AT(PrologueParams, q_shift, 88);
CUSPARGE_AT(PrologueParams, k_tile, 96);
CUSPARGE_AT(PrologueParams, k_scale, 104);
CUSPARGE_AT(PrologueParams, k_mean, 112);
CUSPARGE_AT(PrologueParams, k_similarity, 120);
CUSPARGE_AT(PrologueParams, k_bad, 128);
CUSPARGE_AT(PrologueParams, token_mean, 136);
CUSPARGE_AT(PrologueParams, v_tile, 144);
CUSPARGE_AT(PrologueParams, v_scale, 152);
CUSPARGE_AT(PrologueParams, q_rows, 160);
CUSPARGE_AT(PrologueParams, k_rows, 200);
CUSPARGE_AT(PrologueParams, v_rows, 240);
CUSPARGE_AT(PrologueParams, num_sequences, 280);
CUSPARGE_AT(PrologueParams, num_rows_q, 284);
CUSPARGE_AT(PrologueParams, num_rows_k, 288);
CUSPARGE_AT(PrologueParams, num_blocks_q, 292);
CUSPARGE_AT(PrologueParams, num_blocks_k, 296);
CUSPARGE_AT(PrologueParams, num_chunks, 300);
CUSPARGE_AT(PrologueParams, q_factor, 304);
CUSPARGE_AT(PrologueParams, sm_scale, 308);
static_assert(sizeof(PrologueParams) == 312);

#undef CUSPARGE_AT
#undef CUSPARGE_OFFSET

}  // namespace cusparge
