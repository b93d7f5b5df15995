"""Kernels on GPUs through every framework: values, memory, devices, threads (marker gpu).

Results are held against the CPU backend, whose own tests hold it against the oracle. The kernels
against the oracle: `test_pool_gpu.py`. Streams and graphs: `test_gpu_streams.py`. What needs a
process of its own: `test_gpu_processes.py`.
"""

import gc
import sys
import threading
import types

import gpu_tools
import numpy as np
import pytest
from compare import assert_close, assert_refused, assert_same_bits
from gpu_tools import FIELDS, OPTIONS, assert_pooled, inputs

import cusparge
from cusparge import DeviceError, InvalidArgumentError
from cusparge._arrays import foreign as foreign_arrays
from cusparge.stage1 import pool_blocks

pytestmark = gpu_tools.marks()

DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture
def gpu(monkeypatch):
    return gpu_tools.begin(monkeypatch)


@pytest.fixture
def torch(gpu):
    return gpu_tools.torch_with_cuda()


@pytest.fixture
def cupy(gpu):
    return gpu.cupy


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="needs jax")


# ---- every framework -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch(gpu, torch, rng, dtype, options):
    x = inputs(rng, dtype, layout=options.get("layout"))
    got = pool_blocks(gpu.tensor(x, dtype), **options)
    assert isinstance(got.mean, torch.Tensor)
    assert got.mean.dtype == torch.float32
    assert got.mean.is_contiguous()
    assert_pooled(gpu, got, x, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_cupy(gpu, cupy, rng, dtype, options):
    x = inputs(rng, dtype, layout=options.get("layout"))
    got = pool_blocks(gpu.array(x, dtype), **options)
    assert isinstance(got.mean, cupy.ndarray)
    assert_pooled(gpu, got, x, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jax_eagerly(gpu, jax, rng, dtype, options):
    x = inputs(rng, dtype, layout=options.get("layout"))
    given = gpu.jax_array(x, dtype)
    got = pool_blocks(given, **options)
    assert got.mean.devices() == given.devices()
    assert_pooled(gpu, got, x, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jax_compiled(gpu, jax, rng, options):
    """Among other operations of the program, on arrays that it makes itself, run after run."""
    settings = dict(options)
    lengths = settings.pop("seqlens", None)

    def program(x, lengths):
        got = pool_blocks(x * 2, seqlens=lengths, **settings)
        return got.mean + 1, got.similarity, got.token_mean

    compiled = jax.jit(program)
    for _ in range(3):
        x = inputs(rng, layout=options.get("layout"))
        given = None if lengths is None else jax.numpy.array(lengths, dtype="int32")
        mean, similarity, token_mean = compiled(gpu.jax_array(x), given)
        got = types.SimpleNamespace(mean=mean - 1, similarity=similarity, token_mean=token_mean)
        assert_pooled(gpu, got, 2 * x, **options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(gpu, torch, rng, backend):
    from torch.utils._triton import has_triton

    if backend == "inductor" and (gpu.dry or not has_triton()):
        pytest.skip("inductor needs triton")
    torch._dynamo.reset()

    def program(x, lengths):
        got = pool_blocks(x * 2, smooth=True, seqlens=lengths)
        return got.mean + 1, got.similarity, got.token_mean

    compiled = torch.compile(program, backend=backend, fullgraph=True)
    lengths = gpu.tensor(np.array([150, 65]), "int32")
    for _ in range(2):
        x = inputs(rng)
        mean, similarity, token_mean = compiled(gpu.tensor(x), lengths)
        got = types.SimpleNamespace(mean=mean - 1, similarity=similarity, token_mean=token_mean)
        assert_pooled(gpu, got, 2 * x, smooth=True, seqlens=[150, 65])


class TestForeignArrays:
    """A framework that nobody has heard of, whose arrays speak DLPack."""

    @pytest.fixture
    def library(self, gpu, cupy, monkeypatch):
        class Array:
            def __init__(self, array):
                self.array, self.streams = array, []

            def __dlpack_device__(self):
                return (2, 0)

            def __dlpack__(self, *, stream=None, max_version=None):
                self.streams.append(stream)
                return gpu.capsule(self.array, stream)

        Array.__module__ = "otherlib.arrays"
        library = types.SimpleNamespace(Array=Array, from_dlpack=Array)
        monkeypatch.setitem(sys.modules, "otherlib", library)
        foreign_arrays._in_use.clear()
        return library

    @pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
    def test_in_and_out(self, gpu, library, rng, options):
        x = inputs(rng, layout=options.get("layout"))
        given = library.Array(gpu.array(x))
        got = pool_blocks(given, **options)
        assert type(got.mean) is library.Array
        assert given.streams
        assert all(stream not in (None, 0) for stream in given.streams), "told where it is used"
        unwrapped = {name: getattr(getattr(got, name), "array", None) for name in FIELDS}
        assert_pooled(gpu, types.SimpleNamespace(**unwrapped), x, **options)

    def test_memory_is_held_no_longer_than_it_is_used(self, gpu, library, rng):
        x = gpu.array(inputs(rng))
        for _ in range(20):
            pool_blocks(library.Array(x))
        gpu.wait()
        pool_blocks(library.Array(x))
        assert len(foreign_arrays._in_use) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_followed_without_a_copy(gpu, torch, rng, dtype):
    fused = inputs(rng, dtype, (2, 150, 3, 2, 64))
    key = gpu.tensor(fused, dtype)[:, :, 1]
    assert_pooled(gpu, pool_blocks(key, layout="NHD"), fused[:, :, 1], layout="NHD")
    heads_first, expected = key.transpose(1, 2), fused[:, :, 1].swapaxes(1, 2)
    assert_pooled(gpu, pool_blocks(heads_first, smooth=True), expected, smooth=True)
    shared = gpu.tensor(fused[:, :, 0, :1].swapaxes(1, 2).copy(), dtype).expand(2, 5, 150, 64)
    expected = np.broadcast_to(fused[:, :, 0, :1].swapaxes(1, 2), (2, 5, 150, 64))
    assert_pooled(gpu, pool_blocks(shared), expected)
    odd = gpu.tensor(inputs(rng, dtype, (1, 2, 150, 67)), dtype)[..., 1:66]
    assert_pooled(gpu, pool_blocks(odd, smooth=True), gpu.host(odd), smooth=True)


def test_negative_strides_of_cupy(gpu, cupy, rng):
    memory = inputs(rng, shape=(1, 2, 150, 64))
    view = gpu.array(memory)[:, ::-1, ::-2]
    assert_pooled(gpu, pool_blocks(view), memory[:, ::-1, ::-2])


def test_lengths_on_the_device_are_clamped(gpu, torch, rng):
    x = inputs(rng, shape=(4, 2, 150, 64))
    lengths = gpu.tensor(np.array([-5, 0, 65, 2**31 - 1]), "int32")
    got = pool_blocks(gpu.tensor(x), smooth=True, seqlens=lengths)
    assert_pooled(gpu, got, x, smooth=True, seqlens=[0, 0, 65, 150])
    wrong = lengths.long()
    assert_refused(
        InvalidArgumentError, lambda: pool_blocks(gpu.tensor(x), seqlens=wrong), "int64", "int32"
    )


def test_cupys_lengths(gpu, cupy, rng):
    x = inputs(rng)
    for lengths in ([150, 65], gpu.array(np.array([150, 65]), "int32")):
        got = pool_blocks(gpu.array(x), smooth=True, seqlens=lengths)
        assert_pooled(gpu, got, x, smooth=True, seqlens=[150, 65])


def test_empty_arrays(gpu, torch):
    for shape in ((0, 2, 150, 64), (2, 0, 150, 64), (2, 2, 0, 64)):
        got = pool_blocks(gpu.tensor(np.zeros(shape, np.float32)), smooth=True)
        assert got.mean.shape == (*shape[:2], -(-shape[2] // 64), 64)
        assert not got.token_mean.any()


def test_there_is_no_attention_yet(gpu, torch, cupy, jax, rng):
    x = inputs(rng, "float16", (1, 2, 128, 64))
    edges = [0, 128]
    for array in (gpu.tensor(x, "float16"), gpu.array(x, "float16")):
        packed = array[0].swapaxes(0, 1)
        for call in (
            lambda a=array: cusparge.attention(a, a, a),
            lambda a=array: cusparge.predict_block_map(a, a),
            lambda a=packed: cusparge.attention_varlen(a, a, a, edges, edges),
            lambda a=array: cusparge.attention(a, a, a, backend="cuda"),
        ):
            assert_refused(DeviceError, call, "q", "cuda:0", "host memory")
    if not gpu.dry:  # its JAX arrays are on the host, where there is attention
        array = gpu.jax_array(x, "float16")
        assert_refused(DeviceError, lambda: cusparge.attention(array, array, array), "cuda:0")


# ---- memory, devices, threads --------------------------------------------------------------------


def test_calls_with_torch_leave_cupys_pool_alone(gpu, torch, cupy, rng):
    pool = cupy.get_default_memory_pool()
    before = (pool.used_bytes(), pool.total_bytes())
    for options in OPTIONS:
        x = inputs(rng, layout=options.get("layout"))
        pool_blocks(gpu.tensor(x), **options)
    assert (pool.used_bytes(), pool.total_bytes()) == before


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_thousand_calls_leave_nothing_behind(gpu, torch, cupy, rng, kind):
    calls = 20 if gpu.dry else 1000
    x = getattr(gpu, kind)(inputs(rng, shape=(1, 1, 64, 64)))
    pool = cupy.get_default_memory_pool()

    def state():
        gpu.wait()
        gc.collect()
        return torch.cuda.memory_allocated(), pool.used_bytes(), sys.getallocatedblocks()

    for _ in range(calls // 10):
        pool_blocks(x, smooth=True)
    before = state()
    for _ in range(calls):
        pool_blocks(x, smooth=True)
    after = state()
    assert after[:2] == before[:2]
    assert gpu.dry or after[2] - before[2] < calls // 2, "objects are left on the host"


def test_another_device_than_the_current_one(gpu, torch, cupy, rng):
    if gpu.count < 2:
        pytest.skip("needs two GPUs")
    x = inputs(rng)
    current = torch.cuda.current_device(), cupy.cuda.runtime.getDevice()
    for given in (gpu.tensor(x, device=1), gpu.array(x, device=1)):
        got = pool_blocks(given, smooth=True)
        assert gpu.dry or got.mean.device == given.device
        assert (torch.cuda.current_device(), cupy.cuda.runtime.getDevice()) == current
        assert_pooled(gpu, got, x, smooth=True)
    lengths = gpu.tensor(np.array([150, 65]), "int32", device=1)
    refused = lambda: pool_blocks(gpu.tensor(x), seqlens=lengths)  # noqa: E731
    assert_refused(InvalidArgumentError, refused, "cuda:1", "cuda:0")


def test_two_threads_on_two_streams_get_the_bits_of_one(gpu, torch, rng):
    rounds = 3 if gpu.dry else 50
    given = [gpu.tensor(inputs(rng, shape=(1, 2, 700, 64))) for _ in range(2)]
    want = [pool_blocks(x, smooth=True) for x in given]
    torch.cuda.synchronize()
    problems, barrier = [], threading.Barrier(2)

    def work(number):
        try:
            stream = torch.cuda.Stream()
            barrier.wait(60)
            with torch.cuda.stream(stream):
                got = [pool_blocks(given[number], smooth=True) for _ in range(rounds)]
            stream.synchronize()
            for one in got:
                for name in FIELDS:
                    mine, other = getattr(one, name), getattr(want[number], name)
                    assert_same_bits(gpu.host(mine), gpu.host(other), name)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not problems, problems
    assert not any(thread.is_alive() for thread in threads)


# ---- offsets that 32 bits do not hold ------------------------------------------------------------


@pytest.fixture
def emptied(torch):
    """Give the memory back that torch's allocator keeps."""
    yield
    torch.cuda.empty_cache()


def need_memory(gpu, num_bytes):
    if gpu.free_bytes() < 1.5 * num_bytes:
        pytest.skip(f"needs {1.5 * num_bytes / 2**30:.0f} GiB of free memory on the GPU")


@pytest.mark.usefixtures("emptied")
def test_more_elements_than_32_bits_count(gpu, torch):
    tokens = gpu.large // 128
    need_memory(gpu, 2 * 2 * gpu.large)
    x = gpu.tensor(np.zeros((1, 2, 1, 128), np.float32), "float16").repeat(1, 1, tokens, 1)
    x.normal_()
    got = pool_blocks(x)
    edge = min(tokens, 1024)
    for head in range(2):
        for part, blocks in (
            (slice(0, edge), slice(0, edge // 64)),
            (slice(-edge, None), slice(-(edge // 64), None)),
        ):
            want = pool_blocks(np.ascontiguousarray(gpu.host(x[:, head, None, part])))
            assert_close(gpu.host(got.mean[:, head, None, blocks]), want.mean, atol=1e-5)
            assert_close(
                gpu.host(got.similarity[:, head, None, blocks]), want.similarity, atol=1e-5
            )


@pytest.mark.usefixtures("emptied")
def test_strides_that_32_bits_do_not_hold(gpu, torch, rng):
    far = gpu.large + 8
    need_memory(gpu, 2 * 3 * far)
    values = inputs(rng, "float16", (1, 2, 3, 64))
    memory = gpu.tensor(np.zeros(1, np.float32), "float16").repeat(3 * far + 256)
    x = memory.as_strided((1, 2, 3, 64), (0, far + 64, far, 1))
    x.copy_(torch.from_numpy(values))
    assert_pooled(gpu, pool_blocks(x, smooth=True), values, smooth=True)
