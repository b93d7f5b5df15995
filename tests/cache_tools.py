"""Entries for caches of compiled kernels, made without a compiler."""

from __future__ import annotations

import hashlib

from cusparge._cuda.cache import Cache, Info

__all__ = ["entry", "filled"]


def entry(rng, kernel="pool", arch="sm_90a", *, size=3000, nvrtc="13.5", **changes):
    """Return (cubin, info) of a kernel that nobody can run."""
    cubin = b"\x7fELF" + rng.bytes(size - 4)
    values = {
        "kernel": f"{kernel}.cu",
        "expression": f"cusparge::{kernel}<cusparge::Config{{64, true}}>",
        "lowered": f"_Z{len(kernel)}{kernel}v",
        "arch": arch,
        "options": (f"--gpu-architecture={arch}", "-std=c++20"),
        "nvrtc": nvrtc,
        "cusparge": "0.1.0",
        "key": rng.bytes(32).hex(),
        "source_key": rng.bytes(32).hex(),
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "size": len(cubin),
        "registers": 96,
        "spill_bytes": 0,
        "stack_bytes": 0,
        "compile_ms": 412.5,
    }
    return cubin, Info(**(values | changes))


def filled(root, rng, count=3):
    """Return a cache of so many entries, for several architectures."""
    cache = Cache(root)
    for number in range(count):
        cache.put(*entry(rng, arch=("sm_80", "sm_90a", "sm_120a")[number % 3]))
    return cache
