"""A few pooling cases in memory that ends where the arrays end (marker gpu).

What compute-sanitizer is run on, which makes kernels a hundred times slower: allocations come
straight from the driver, to the byte, so that it sees an access beside an array; outputs and the
workspace are left unwritten, so that it sees who reads them too early. `test_pool_gpu.py` has all
cases, between guard bands.
"""

import ctypes

import gpu_tools
import numpy as np
import pool_cases
import pytest
from pool_cases import Case

from cusparge._cuda import launch

pytestmark = gpu_tools.marks()

CASES = [
    *(
        Case(dtype, (2, 2, tokens, head_dim), layout=layout, lengths=lengths)
        for dtype, tokens, head_dim, layout, lengths in (
            ("float16", 63, 40, "HND", None),
            ("float16", 129, 64, "NHD", (129, 65)),
            ("float16", 70, 39, "odd", None),
            ("bfloat16", 129, 128, "HND", (0, 128)),
            ("bfloat16", 65, 80, "even", None),
            ("float32", 130, 256, "HND", (1, 130)),
            ("float32", 65, 7, "padded", None),
            ("float32", 64, 64, "reversed", None),
        )
    ),
    Case("bfloat16", (1, 1, 600, 24), 128, fill=pool_cases.non_finite),
    Case("float16", (2, 1, 130, 64), 128, smooth=False),
    Case("float32", (1, 2, 1, 1)),
]


@pytest.fixture
def gpu(monkeypatch):
    return gpu_tools.begin(monkeypatch)


def run_on(gpu, plan, x, lengths):
    """Run a plan as `pool_cases.problems` wants it."""
    steps = [step * (size - 1) for step, size in zip(x.strides, x.shape, strict=True)]
    start = x.__array_interface__["data"][0]
    low = start + sum(step for step in steps if step < 0)
    num_bytes = sum(map(abs, steps)) + x.itemsize
    shift = low % 16  # as far from a wide load's alignment as on the host
    owner, base = gpu.allocate(shift + num_bytes)
    raw = (ctypes.c_uint8 * num_bytes).from_address(low)
    gpu.write(base + shift, np.frombuffer(raw, np.uint8))
    kept = {one.name: gpu.allocate(one.num_bytes) for one in plan.outputs}
    kept["workspace"] = gpu.allocate(plan.workspace_bytes)
    addresses = {name: address for name, (_, address) in kept.items()}
    addresses |= {"x": base + shift + start - low, "lengths": 0}
    if lengths is not None:
        kept["lengths"] = gpu.allocate(lengths.nbytes)
        addresses["lengths"] = kept["lengths"][1]
        gpu.write(addresses["lengths"], lengths)
    launch.run(plan, addresses, device=0, stream=gpu.stream())
    results = {
        one.name: gpu.read(addresses[one.name], one.num_bytes).view(np.float32).reshape(one.shape)
        for one in plan.outputs
    }
    del owner
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(gpu, case, rng):
    assert pool_cases.problems(case, rng, lambda *given: run_on(gpu, *given)) == []
