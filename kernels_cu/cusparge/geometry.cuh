// Block geometry: how attention is cut into blocks, and which blocks a query block can reach.
//
// Every backend shares these numbers, because they decide which blocks exist and therefore what
// the results are; how a kernel cuts its own tiles inside a block is its own business. The Python
// twin of each constant is named beside it, and tests/test_geometry.py compiles this file on the
// host and holds both sides against each other.
//
// No header is included: the compiler may be NVRTC, which has none, or a host C++20 compiler.

#pragma once

#if defined(__CUDACC__)
#define CUSPARGE_HOST_DEVICE __host__ __device__
#else
#define CUSPARGE_HOST_DEVICE
#endif

namespace cusparge {

// Tokens are counted in 64 bits: a batch of packed sequences may hold more than 2^31 elements, and
// the products of these counts are addresses sooner or later.
using Tokens = long long;

// Queries and keys of one block (cusparge._types.BLOCK_Q and BLOCK_K).
inline constexpr int kBlockQ = 128;
inline constexpr int kBlockK = 64;

// Consecutive keys that share one int8 scale (cusparge._cpu.rounding.KEY_GROUP): two n-tiles of a
// tensor-core product, whose n is 8. Queries have one scale each.
inline constexpr int kKeyGroup = 16;

// Quantized weights are e4m3 values of 2^8 * p (cusparge._cpu.tiles.P_OFFSET): p lies in [0, 1],
// and this moves the largest one near the top of e4m3 while staying exact in the log-sum-exp.
inline constexpr int kWeightOffsetLog2 = 8;

// The largest finite e4m3 number (cusparge._cpu.rounding.E4M3_MAX).
inline constexpr int kE4m3Max = 448;

// Integer weight of the heaviest block of a row in stage 1 (cusparge.reference.WEIGHT_ONE). Sums of
// integers do not depend on their order, so every backend keeps the same blocks.
inline constexpr int kWeightOne = 1 << 20;

// The largest head_dim that is accepted (cusparge._check.MAX_HEAD_DIM).
inline constexpr int kMaxHeadDim = 256;

// A caller's mask may be 64 rows fine (cusparge.reference.MASK_ROWS); a query block then splits
// into whole halves.
inline constexpr int kMaskRows = 64;
static_assert(kBlockQ % kMaskRows == 0);

// A query block's diagonal covers whole key blocks when both grids start at the same token.
static_assert(kBlockQ % kBlockK == 0);

// No scale group straddles two key blocks: a block's codes do not depend on its neighbours.
static_assert(kBlockK % kKeyGroup == 0);

// The largest weight is still an e4m3 number, and twice as much would not be.
static_assert((1 << kWeightOffsetLog2) <= kE4m3Max);
static_assert((2 << kWeightOffsetLog2) > kE4m3Max);

// The int8 products of one score sum up exactly in 32 bits, and in float32's 24 bits of mantissa.
static_assert(127 * 127 * kMaxHeadDim < (1 << 24));

// The weights of one row sum up exactly in 64 bits for any number of key blocks below 2^43.
static_assert(sizeof(Tokens) == 8);

// Quotient rounded up; `tokens` must not be negative, `block` must be positive.
CUSPARGE_HOST_DEVICE constexpr Tokens ceil_div(Tokens tokens, Tokens block) {
  return tokens / block + (tokens % block != 0);
}

CUSPARGE_HOST_DEVICE constexpr Tokens num_blocks_q(Tokens seqlen_q) {
  return ceil_div(seqlen_q, kBlockQ);
}

CUSPARGE_HOST_DEVICE constexpr Tokens num_blocks_k(Tokens seqlen_k) {
  return ceil_div(seqlen_k, kBlockK);
}

// Row after the last real row of a query block: the last block may be short.
CUSPARGE_HOST_DEVICE constexpr Tokens block_q_end(Tokens block_idx, Tokens seqlen_q) {
  const Tokens end = (block_idx + 1) * kBlockQ;
  return end < seqlen_q ? end : seqlen_q;
}

// How many key blocks, from the first one on, hold a pair that query block `block_idx` may see.
//
// `valid_k` counts the keys in front of the padding. Without causality that is all of them. With
// it, row i sees key j when j <= i + offset; the block's last row sees most, so the blocks up to
// the one with its last key are reachable. The offset is seqlen_k - seqlen_q for bottom-right
// alignment (array lengths, padding included) and 0 for top-left; it may be negative, and then the
// first query blocks may reach nothing.
CUSPARGE_HOST_DEVICE constexpr Tokens reachable_blocks_k(Tokens block_idx, Tokens seqlen_q,
                                                         Tokens valid_k, bool is_causal,
                                                         Tokens offset) {
  const Tokens valid_blocks = num_blocks_k(valid_k);
  if (!is_causal) return valid_blocks;
  const Tokens last_key = block_q_end(block_idx, seqlen_q) - 1 + offset;
  if (last_key < 0) return 0;  // before dividing: C++ rounds towards zero, not down
  const Tokens seen = last_key / kBlockK + 1;
  return seen < valid_blocks ? seen : valid_blocks;
}

}  // namespace cusparge
