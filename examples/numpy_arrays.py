"""Attention on NumPy arrays: one call, its error and what it left out.

The arrays are those that ship with the package: three heads of a speech model's self-attention
over 1,500 tokens (see the data's README).
"""

from importlib.resources import files

import numpy as np
from safetensors.numpy import load_file

import cusparge

arrays = load_file(str(files("cusparge") / "data" / "whisper_tiny_en.safetensors"))
q, k, v = (arrays[name].astype(np.float32) for name in "qkv")  # (batch, heads, tokens, head_dim)

out, lse, stats = cusparge.attention(q, k, v, return_lse=True, return_stats=True)
dense = cusparge.attention(q, k, v, policy=cusparge.Dense())

error = np.abs(out - dense).sum() / np.abs(dense).sum()
print(f"out {out.shape} {out.dtype}, lse {lse.shape} {lse.dtype}")
print(f"left out {stats.sparsity:.1%} of the block products, relative L1 error {error:.4f}")
for head, share in enumerate(stats.sparsity_per_head[0]):
    print(f"  head {head}: {share:.1%}")

assert error < 0.02
assert stats.sparsity > 0.4
