"""Sparse, quantized attention for any model: one call on the arrays of any framework.

>>> import numpy as np, cusparge
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 256, 64), dtype=np.float32)
>>> out, stats = cusparge.attention(q, k, v, return_stats=True)
>>> out.shape
(1, 2, 256, 64)

`attention` computes it, `attention_varlen` does so for packed sequences, and `predict_block_map`
tells which blocks it would compute. `TopCdf`, `TopK` and `Dense` say what may be skipped. `warmup`
compiles and loads the GPU kernels ahead of the first call.
`cusparge.reference` is the float64 oracle of the same rules, written to be read beside the paper
(SpargeAttn, arXiv:2502.18137).
"""

import importlib
from typing import Any

from cusparge import reference
from cusparge._cuda import background as _background
from cusparge._types import AttentionStats, BlockMap
from cusparge._version import __version__
from cusparge.attention import attention, attention_varlen, predict_block_map
from cusparge.errors import (
    CompileError,
    CuspargeError,
    DeviceError,
    InvalidArgumentError,
    UnsupportedError,
)
from cusparge.policy import Dense, Policy, TopCdf, TopK

warmup = _background.warmup

__all__ = [
    "AttentionStats",
    "BlockMap",
    "CompileError",
    "CuspargeError",
    "Dense",
    "DeviceError",
    "InvalidArgumentError",
    "Policy",
    "TopCdf",
    "TopK",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "predict_block_map",
    "reference",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import `cusparge.stage1` when it is first named: `import cusparge` does without."""
    if name == "stage1":
        return importlib.import_module("cusparge.stage1")
    raise AttributeError(f"module 'cusparge' has no attribute {name!r}")


_background.start()
