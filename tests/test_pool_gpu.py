"""The pooling kernels on a GPU: the checks of the emulated tests, between guard bands."""

import numpy as np
import pool_cases
import pytest

from cusparge._cuda import devices, launch
from cusparge.errors import CuspargeError


def missing():
    """Return why no kernel can run here, or None."""
    try:
        if not devices.list_gpus():
            return "no NVIDIA GPU"
        devices.require_cupy()
        devices.require_device(0)
    except CuspargeError as error:
        return str(error).splitlines()[0]
    return None


MISSING = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

GUARD = 1024
POISON = 0xA5


class Guarded:
    """Device memory between two bands that nobody may touch."""

    def __init__(self, cupy, num_bytes, shift=0):
        """`shift` moves the start away from a multiple of 256."""
        self.memory = cupy.empty(num_bytes + 2 * GUARD + shift, cupy.uint8)
        self.start, self.stop = GUARD + shift, GUARD + shift + num_bytes
        self.memory[: self.start] = POISON
        self.memory[self.stop :] = POISON

    @property
    def address(self):
        return self.memory.data.ptr + self.start

    def array(self, cupy, shape, dtype, strides=None, offset=0):
        return cupy.ndarray(shape, dtype, self.memory.data + self.start + offset, strides)

    def is_intact(self):
        bands = self.memory[: self.start], self.memory[self.stop :]
        return all(bool((band == POISON).all()) for band in bands)


def bounds(array):
    """Return the offsets of the first byte and of the one after the last, from element 0."""
    steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return sum(min(0, s) for s in steps), sum(max(0, s) for s in steps) + array.itemsize


def on_gpu(plan, x, lengths):
    """Run a plan's launches; see `pool_cases.problems`."""
    cupy = devices.require_cupy()
    low, high = bounds(x)
    # The same distance from a multiple of 16 as on the host, where allocations begin with one.
    source = Guarded(cupy, high - low, shift=(x.ctypes.data + low) % 16)
    source.array(cupy, x.shape, x.dtype, x.strides, -low)[...] = cupy.asarray(x.copy())
    held = {output.name: Guarded(cupy, output.num_bytes) for output in plan.outputs}
    for output in plan.outputs:
        held[output.name].array(cupy, output.shape, np.float32)[...] = np.nan
    held["workspace"] = Guarded(cupy, plan.workspace_bytes)
    held["workspace"].array(cupy, plan.workspace_bytes // 4, np.float32)[...] = np.nan
    addresses = {name: one.address for name, one in held.items()}
    addresses["x"] = source.address - low
    if lengths is not None:
        held["lengths"] = Guarded(cupy, lengths.nbytes)
        held["lengths"].array(cupy, lengths.shape, lengths.dtype)[...] = cupy.asarray(lengths)
        addresses["lengths"] = held["lengths"].address
    launch.run(plan, addresses, device=0, stream=0)
    cupy.cuda.runtime.deviceSynchronize()
    for name, one in {**held, "x": source}.items():
        assert one.is_intact(), f"something was written beside {name}"
    return {
        output.name: held[output.name].array(cupy, output.shape, np.float32).get()
        for output in plan.outputs
    }


@pytest.mark.parametrize("case", pool_cases.CASES, ids=str)
def test_matches_the_oracle(case, rng):
    if case.layout == "far":
        free, _ = devices.require_cupy().cuda.runtime.memGetInfo()
        if free < 2**36:
            pytest.skip("an array that spans 17 to 40 GB of device memory does not fit")
    assert pool_cases.problems(case, rng, on_gpu) == []


def test_random_cases_match_the_oracle(rng):
    for _ in range(100):
        assert pool_cases.problems(pool_cases.random_case(rng), rng, on_gpu) == []


def test_results_repeat_bit_for_bit(rng):
    case = pool_cases.Case("bfloat16", (2, 8, 5000, 128))
    values = case.fill(rng, case.shape, case.dtype)
    results = []

    def run(plan, x, lengths):
        results.extend(on_gpu(plan, x, lengths) for _ in range(3))
        return results[0]

    same = pool_cases.Case(case.dtype, case.shape, fill=lambda *_: values)
    assert pool_cases.problems(same, rng, run) == []
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)
