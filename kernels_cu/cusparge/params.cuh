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

#undef CUSPARGE_AT
#undef CUSPARGE_OFFSET

}  // namespace cusparge
