"""Blocks of keys on a GPU with CuPy alone: how alike the tokens of each block are.

Stage 1 represents a block of tokens by their mean, and that stands for the block only where its
tokens are alike. This needs an NVIDIA GPU; without one it says so and ends.
"""

import sys

import numpy as np

import cusparge
from cusparge.stage1 import pool_blocks

try:
    import cupy

    cusparge.warmup(dtypes="float16", head_dims=64)  # compiled once on this machine, then cached
except (ImportError, cusparge.DeviceError) as error:
    sys.exit(f"nothing done, this needs an NVIDIA GPU with CuPy: {error}" if error else 1)

rng = np.random.default_rng(0)
topics = rng.standard_normal((1, 8, 16, 1, 64))  # 16 topics of 256 tokens each
k = topics + 0.5 * rng.standard_normal((1, 8, 16, 256, 64))
k[:, 1::2] = rng.standard_normal((1, 4, 16, 256, 64))  # every other head has no topics
k = k.reshape(1, 8, 4096, 64).astype(np.float16)

with cupy.cuda.Stream(non_blocking=True):  # kernels go where CuPy's work goes
    pooled = pool_blocks(cupy.asarray(k), block=64, smooth=True)
    alike = cupy.asnumpy(pooled.similarity).mean(axis=(0, 2))
expected = pool_blocks(k, block=64, smooth=True)  # the same call on the CPU

error = float(np.abs(cupy.asnumpy(pooled.mean) - expected.mean).max())
print(f"{type(pooled.mean).__module__} {pooled.mean.shape} on device {pooled.mean.device.id}")
print("similarity by head:", " ".join(f"{value:.2f}" for value in alike))
print(f"largest difference from the CPU: {error:.1e}")

assert error < 1e-4
assert (alike[0::2] > 2 * alike[1::2]).all()
