"""Attention on torch tensors: bfloat16, causal, grouped queries; tensors in, a tensor out."""

import torch
from torch.nn.functional import scaled_dot_product_attention

import cusparge

torch.manual_seed(0)
q = torch.randn(2, 8, 600, 64, dtype=torch.bfloat16)
k, v = torch.randn(2, 2, 2, 600, 64, dtype=torch.bfloat16)  # 2 key heads serve 8 query heads

# cusparge computes the forward pass only: inputs that require gradients need torch.no_grad().
with torch.no_grad():
    out = cusparge.attention(q, k, v, causal=True, policy=cusparge.Dense())
    sparse, stats = cusparge.attention(
        q, k, v, causal=True, policy=cusparge.TopK(0.5), return_stats=True
    )
    expected = scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )

error = ((out.float() - expected).abs().sum() / expected.abs().sum()).item()
print(f"{type(out).__name__} {tuple(out.shape)} {out.dtype} on {out.device}")
print(f"dense: relative L1 error {error:.4f} against float32 (all of it bfloat16's rounding)")
print(f"half of the blocks: sparsity {stats.sparsity:.2f}")

assert out.dtype == q.dtype
assert out.shape == q.shape
assert error < 2**-9  # what rounding to the nearest of 8 significant bits may cost
assert torch.isfinite(sparse).all()
assert 0.2 < stats.sparsity < 0.5  # the diagonal's blocks are always computed
