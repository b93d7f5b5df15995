"""Kernels on the caller's stream, and in CUDA graphs (marker gpu)."""

import gpu_tools
import numpy as np
import pytest
from compare import assert_refused
from gpu_tools import LONG, OPTIONS, SHORT, assert_pooled, inputs, no_waiting

import cusparge
from cusparge import DeviceError
from cusparge._cuda import module
from cusparge.stage1 import pool_blocks

pytestmark = gpu_tools.marks()


@pytest.fixture
def gpu(monkeypatch):
    return gpu_tools.begin(monkeypatch)


@pytest.fixture
def torch(gpu):
    return gpu_tools.torch_with_cuda()


@pytest.fixture
def cupy(gpu):
    return gpu.cupy


# ---- streams -------------------------------------------------------------------------------------


def test_torchs_current_stream_orders_the_work(gpu, torch, rng):
    """A slow producer on a stream of its own: the kernels must wait for it, on that stream."""
    old, new = inputs(rng), inputs(rng)
    x, source = gpu.tensor(old), gpu.tensor(new)
    pool_blocks(x, smooth=True)  # the kernels are loaded
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SHORT)
        x.copy_(source)
        with no_waiting(torch):
            got = pool_blocks(x, smooth=True)
        copy = got.mean * 1  # a consumer behind it
    side.synchronize()
    assert_pooled(gpu, got, new, smooth=True)
    assert torch.equal(copy, got.mean)


def test_nothing_of_torchs_waits_for_the_default_stream(gpu, torch, rng):
    x = inputs(rng)
    given, lengths = gpu.tensor(x), gpu.tensor(np.array([150, 65]), "int32")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded, and memory is at hand
        for _ in range(2):
            pool_blocks(given, smooth=True, seqlens=lengths)
    torch.cuda.synchronize()
    over, done = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(LONG)
    over.record()
    with no_waiting(torch), torch.cuda.stream(side):
        got = pool_blocks(given, smooth=True, seqlens=lengths)
        done.record()
    done.synchronize()
    assert not over.query(), "the call waited for the default stream, or ran on it"
    torch.cuda.synchronize()
    assert_pooled(gpu, got, x, smooth=True, seqlens=[150, 65])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_host_does_not_wait(gpu, torch, rng, options):
    """Neither in the first call on a shape nor in later ones; lists of lengths included."""
    x = inputs(rng, layout=options.get("layout"))
    given = gpu.tensor(x)
    with no_waiting(torch):
        for _ in range(2):
            got = pool_blocks(given, **options)
    assert_pooled(gpu, got, x, **options)


def test_cupys_current_stream_orders_the_work(gpu, cupy, rng):
    old, new = inputs(rng), inputs(rng)
    x, source = gpu.array(old), gpu.array(new)
    with cupy.cuda.Stream(non_blocking=True) as side:
        gpu.spin(1)  # the first use loads it
        pool_blocks(x, smooth=True)
        side.synchronize()
        gpu.spin(SHORT)
        gpu.copy(x, source)
        got = pool_blocks(x, smooth=True)
        side.synchronize()
        assert_pooled(gpu, got, new, smooth=True)


def test_nothing_of_cupys_waits_for_the_default_stream(gpu, cupy, rng):
    x = inputs(rng)
    given = gpu.array(x)
    gpu.spin(1)
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        kept = [pool_blocks(given, smooth=True) for _ in range(2)]
        side.synchronize()
        del kept
    over, done = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
    gpu.wait()
    gpu.spin(LONG)
    over.record()
    with side:
        got = pool_blocks(given, smooth=True)
        done.record()
    done.synchronize()
    assert not over.done, "the call waited for the default stream, or ran on it"
    gpu.wait()
    assert_pooled(gpu, got, x, smooth=True)


# ---- CUDA graphs ---------------------------------------------------------------------------------


def test_a_graph_of_torch_is_replayed_on_new_values(gpu, torch, rng):
    x = gpu.tensor(inputs(rng))
    lengths = gpu.tensor(np.array([150, 65]), "int32")
    pool_blocks(x, smooth=True, seqlens=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        got = pool_blocks(x, smooth=True, seqlens=lengths)
    for sizes in ([150, 150], [1, 64], [0, 129]):
        values = inputs(rng)
        x.copy_(torch.from_numpy(values))
        lengths.copy_(torch.tensor(sizes))
        graph.replay()
        torch.cuda.synchronize()
        assert_pooled(gpu, got, values, smooth=True, seqlens=sizes)


def test_the_first_call_may_not_be_captured(gpu, torch, rng, monkeypatch):
    x = gpu.tensor(inputs(rng))
    want = pool_blocks(x)
    monkeypatch.setattr(module, "_functions", {})

    def capture(**options):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            pool_blocks(x, **options)

    assert_refused(DeviceError, capture, "pool.cu", "CUDA graph", "warm-up call")
    assert_refused(DeviceError, lambda: capture(seqlens=[150, 65]), "CUDA graph", "int32 array")
    assert torch.equal(pool_blocks(x).mean, want.mean), "the stream is usable afterwards"
    capture()


def test_after_a_warmup_the_first_call_may_be_captured(gpu, torch, rng, monkeypatch):
    values = inputs(rng, "float16")
    x = gpu.tensor(values, "float16")
    monkeypatch.setattr(module, "_functions", {})
    cusparge.warmup(dtypes="float16", head_dims=64)
    assert module.loaded() == 3 * gpu.count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        got = pool_blocks(x, smooth=True)
    graph.replay()
    torch.cuda.synchronize()
    assert_pooled(gpu, got, values, smooth=True)


def test_a_graph_of_cupy_is_replayed_on_new_values(gpu, cupy, rng):
    x = gpu.array(inputs(rng))
    with cupy.cuda.Stream(non_blocking=True) as side:
        pool_blocks(x, smooth=True)
        side.synchronize()
        side.begin_capture()
        got = pool_blocks(x, smooth=True)
        graph = side.end_capture()
        others = [
            gpu.array(np.full(size, 3.0)) for size in (384, 8 * 384)
        ]  # of the workspace's size
        for _ in range(3):
            values = inputs(rng)
            gpu.assign(x, values)
            graph.launch(side)
            side.synchronize()
            assert_pooled(gpu, got, values, smooth=True)
        for other in others:
            assert (gpu.host(other) == 3).all(), "a replay wrote to memory that it does not own"
