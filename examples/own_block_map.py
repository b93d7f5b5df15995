"""Blocks of your own choice: a sliding window with a sink, as a mask of blocks.

The caller's mask is law: exactly the pairs of tokens that it keeps are computed. Here it is 64
rows by 64 keys fine: each block sees itself, the three blocks before it, and the first block.
"""

import numpy as np

import cusparge

tokens, block, window = 2048, 64, 4
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 1, 2, tokens, 64), dtype=np.float32)

count = tokens // block
row, column = np.indices((count, count))
keep = (column <= row) & ((column > row - window) | (column == 0))

# A batch or head size of 1 in the mask serves every sequence or head.
block_map = cusparge.BlockMap.from_mask(
    keep[None, None], seqlen_q=tokens, seqlen_k=tokens, block_q=block, block_k=block
)
out, stats = cusparge.attention(q, k, v, block_map=block_map, causal=True, return_stats=True)

# The same, the plain way: every score, a mask of tokens, one softmax.
seen = np.kron(keep, np.ones((block, block), bool)) & np.tri(tokens, dtype=bool)
scores = np.where(seen, q @ k.swapaxes(-1, -2) / np.sqrt(64), -np.inf)
weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
expected = weights / weights.sum(axis=-1, keepdims=True) @ v

error = np.abs(out - expected).max()
print(f"a row sees at most {window + 1} of {count} key blocks")
print(f"left out {stats.sparsity:.1%} of the blocks that causality allows")
print(f"largest difference from the masked softmax: {error:.1e}")

assert error < 1e-5
assert stats.sparsity > 0.6
