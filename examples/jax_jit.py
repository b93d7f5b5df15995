"""Attention inside a function that jax.jit compiles, with lengths that are traced.

Attention runs on the host in this version; blocks are pooled wherever JAX's first device is.
"""

import jax
import jax.numpy as jnp

import cusparge

jax.config.update("jax_default_device", jax.devices("cpu")[0])


@jax.jit
def layer(x, lengths):
    """Attend over padded sequences, heads after tokens, and tell what was left out."""
    out, stats = cusparge.attention(
        *(x, x, x), layout="NHD", causal=True, seqlens_k=lengths, return_stats=True
    )
    return x + out, stats


x = jax.random.normal(jax.random.key(0), (2, 400, 4, 64), jnp.bfloat16)
first, stats = layer(x, jnp.array([400, 150]))
second, _ = layer(x, jnp.array([400, 40]))  # other lengths, the same program

eager = cusparge.attention(x, x, x, layout="NHD", causal=True, seqlens_k=[400, 150])
print(f"{first.shape} {first.dtype} on {first.device}, sparsity {stats.sparsity:.2f}")
print(f"programs compiled: {layer._cache_size()}")
print(f"same bits as outside of jit: {bool(jnp.array_equal(first, x + eager))}")

pool = jax.jit(lambda k: cusparge.stage1.pool_blocks(k, smooth=True, layout="NHD"))
pooled = pool(jax.device_put(x, jax.devices()[0]))  # on a GPU: kernels on XLA's own stream
print(f"{pooled.mean.shape} pooled on {pooled.mean.device}")

assert layer._cache_size() == 1
assert pooled.similarity.shape == (2, 4, 7)
assert jnp.array_equal(first, x + eager)
assert jnp.array_equal(first[0], second[0])
assert not jnp.array_equal(first[1], second[1])
