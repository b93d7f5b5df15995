"""Attention on JAX arrays, heads after tokens, as `jax.nn.dot_product_attention` has them."""

import jax
import jax.numpy as jnp

import cusparge

jax.config.update("jax_default_device", jax.devices("cpu")[0])  # attention runs there so far
keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (1, 400, 4, 64), jnp.float32) for key in keys)

# Padded sequence: 400 tokens of memory, 350 of them real.
out, stats = cusparge.attention(
    q, k, v, layout="NHD", policy=cusparge.Dense(), seqlens_k=[350], return_stats=True
)
expected = jax.nn.dot_product_attention(q, k[:, :350], v[:, :350])

error = float(jnp.abs(out - expected).max())
print(f"{out.shape} {out.dtype} on {out.device}")
print(f"largest difference from jax.nn.dot_product_attention: {error:.1e}")
print(f"sparsity {stats.sparsity:.2f}: a dense policy leaves nothing out")

assert isinstance(out, jax.Array)
assert out.shape == q.shape
assert error < 1e-5
assert stats.sparsity == 0
