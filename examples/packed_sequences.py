"""Sequences of different lengths, packed one after another: no padding, and no influence."""

import itertools

import numpy as np

import cusparge

lengths = [700, 1, 350, 0, 1200]
edges = np.cumsum([0, *lengths])  # where each sequence starts, and the total
rng = np.random.default_rng(0)
q = rng.standard_normal((edges[-1], 4, 64), dtype=np.float32)  # (tokens, heads, head_dim)
k, v = rng.standard_normal((2, edges[-1], 2, 64), dtype=np.float32)

options = {"causal": True, "policy": cusparge.TopK(0.5)}
out, lse, stats = cusparge.attention_varlen(
    q, k, v, edges, edges, return_lse=True, return_stats=True, **options
)
print(f"{len(lengths)} sequences, {edges[-1]} tokens: out {out.shape}, lse {lse.shape}")

for index, (start, stop) in enumerate(itertools.pairwise(edges)):
    one = slice(start, stop)
    alone = cusparge.attention(q[None, one], k[None, one], v[None, one], layout="NHD", **options)
    same = np.array_equal(out[one], alone[0])
    share = stats.sparsity_per_head[index].mean()
    print(f"  {lengths[index]:5} tokens: sparsity {share:.2f}, same bytes as alone: {same}")
    assert same
