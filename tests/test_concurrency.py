"""Threads, processes and what a call leaves behind: the same bits whoever else is at work."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, bits, plain_attention

from cusparge import (
    Dense,
    InvalidArgumentError,
    TopCdf,
    TopK,
    attention,
    attention_varlen,
    predict_block_map,
)

POLICIES = {
    "dense": Dense(),
    "cdf": TopCdf(0.8),
    "topk": TopK(0.4),
    "stage 2": TopCdf(0.9, pv_threshold=2.0),
    "quantized": Dense(quantize=True, pv_threshold=3.0),
}


def make(rng, heads=4, seqlen_q=700, seqlen_k=900, dim=32):
    centers = rng.standard_normal((8, dim))
    runs = np.repeat(centers[rng.integers(0, 8, -(-seqlen_k // 64))], 64, axis=0)[:seqlen_k]
    k = 2 * runs + 0.3 * rng.standard_normal((1, heads, seqlen_k, dim))
    q = 2 * centers[0] + rng.standard_normal((1, heads, seqlen_q, dim))
    v = rng.standard_normal((1, heads, seqlen_k, dim))
    return [x.astype(np.float32) for x in (q, k, v)]


def everything(arrays, policy, **options):
    out, lse, stats = attention(
        *arrays, policy=policy, return_lse=True, return_stats=True, **options
    )
    mask = predict_block_map(*arrays[:2], policy=policy, **options).mask
    return [out, lse, stats.qk_sparsity_per_head, stats.pv_sparsity_per_head, mask]


def assert_same(got, want, label=""):
    for ours, theirs in zip(got, want, strict=True):
        assert_same_bits(ours, theirs, label)


@pytest.mark.parametrize("policy", POLICIES)
def test_any_number_of_threads_gives_the_same_bits(rng, monkeypatch, policy):
    arrays, options = make(rng), {"policy": POLICIES[policy], "causal": True}
    # One query so loud that it needs float64: who shares its fate must not depend on threads.
    arrays[0][0, 1, 300] *= 1e20
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", "1")
    want = everything(arrays, **options)
    for threads in (1, 2, 3, 2, 7):
        monkeypatch.setenv("CUSPARGE_NUM_THREADS", str(threads))
        assert_same(everything(arrays, **options), want, f"{threads} threads")
    monkeypatch.delenv("CUSPARGE_NUM_THREADS")
    assert_same(everything(arrays, **options), want, "threads by default")


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "", "1.5", "100000"])
def test_a_number_of_threads_that_is_none(monkeypatch, wanted):
    x = np.ones((1, 1, 300, 8), np.float32)
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", wanted)
    with pytest.raises(InvalidArgumentError, match=r"CUSPARGE_NUM_THREADS.*allowed 1 to 4096"):
        attention(x, x, x)


def in_threads(*calls):
    """Run all calls at once; return what each returned or raised."""
    results, start = [None] * len(calls), threading.Barrier(len(calls))

    def work(i):
        start.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive(), "a call never came back"
    return results


@pytest.mark.parametrize("threads", ["1", "3"])
def test_four_callers_at_once_get_what_each_gets_alone(rng, monkeypatch, threads):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", threads)
    problems = [
        (make(rng, heads=2, dim=64), {"policy": Dense()}),
        (make(rng, heads=3, seqlen_q=400), {"policy": TopCdf(0.8), "causal": True}),
        (make(rng, heads=1, dim=17), {"policy": Dense(quantize=True, pv_threshold=2.0)}),
        ([x.astype(np.float16) for x in make(rng)], {"policy": TopK(0.3, pv_threshold=2.0)}),
    ]
    want = [everything(arrays, **options) for arrays, options in problems]

    def repeat(arrays, options):
        return lambda: [everything(arrays, **options) for _ in range(2)]

    for got, alone in zip(
        in_threads(*(repeat(*problem) for problem in problems)), want, strict=True
    ):
        assert not isinstance(got, BaseException), repr(got)
        for results in got:
            assert_same(results, alone)


def test_callers_may_change_the_number_of_threads_under_each_other(rng, monkeypatch):
    arrays = make(rng, heads=2)
    want = attention(*arrays)

    def repeat():
        for _ in range(10):
            os.environ["CUSPARGE_NUM_THREADS"] = str(1 + int.from_bytes(os.urandom(1), "big") % 3)
            assert_same_bits(attention(*arrays), want)

    monkeypatch.setenv("CUSPARGE_NUM_THREADS", "2")
    assert in_threads(repeat, repeat, repeat) == [None] * 3


# ---- BLAS ----


def blas_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    pools = threadpoolctl.threadpool_info()
    return {pool["filepath"]: pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}


@pytest.fixture
def two_blas_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        if 2 not in before.values():
            pytest.skip("this machine's BLAS has one thread at most")
        yield before


class Boom(Exception):
    pass


@pytest.fixture
def broken(monkeypatch):
    """Make the matrix products of a call raise; it notes BLAS's threads while it is at it."""
    seen = []

    def matmul(*args, **kwargs):
        seen.append(blas_threads())
        raise Boom

    monkeypatch.setattr(np, "matmul", matmul)
    yield seen
    assert seen, "the calls no longer use numpy.matmul: break them elsewhere"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_blas_is_held_during_a_call_and_let_go_after(rng, monkeypatch, two_blas_threads, threads):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", threads)
    arrays, inside, matmul = make(rng, 2, 300, 300), [], np.matmul

    def spy(*args, **kwargs):
        inside.append(blas_threads())
        return matmul(*args, **kwargs)

    monkeypatch.setattr(np, "matmul", spy)
    attention(*arrays)
    assert set(inside[0].values()) == set(inside[-1].values()) == {1}
    assert blas_threads() == two_blas_threads
    assert not any(in_threads(*(lambda: attention(*arrays) is None for _ in range(3))))
    assert blas_threads() == two_blas_threads, "after overlapping calls"


@pytest.mark.parametrize("threads", ["1", "3"])
def test_an_exception_reaches_the_caller_and_leaves_nothing_behind(
    rng, monkeypatch, two_blas_threads, broken, threads
):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", threads)
    arrays = make(rng)
    for call in (lambda: attention(*arrays), lambda: predict_block_map(*arrays[:2])):
        with pytest.raises(Boom):
            call()
        assert set(broken[-1].values()) == {1}
        assert blas_threads() == two_blas_threads
    monkeypatch.undo()
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", threads)
    want, _ = plain_attention(*arrays)
    assert_close(attention(*arrays, policy=Dense()), want, atol=1e-4)
    assert blas_threads() == two_blas_threads


# ---- processes ----

needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork is for Linux")


def in_child(check):
    """Fork, run `check` in the child, and tell whether it returned True within a minute."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


# Newer Pythons warn of any fork beside threads; ours, which are idle then, have to survive it.
# (A fork while another thread multiplies matrices hangs in OpenBLAS, with or without cusparge.)
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_forked_child_computes(rng, monkeypatch, threads):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", threads)
    arrays = make(rng)
    want = attention(*arrays)

    def check():
        return all((bits(attention(*arrays)) == bits(want)).all() for _ in range(2))

    in_child(check)
    assert check()


HEAVY = ["torch", "jax", "jaxlib", "cupy", "ml_dtypes", "rich", "matplotlib", "safetensors"]


def python(script, *options):
    script = "from __future__ import annotations\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_and_calling_loads_no_framework():
    loaded = python(
        """
        import sys, numpy as np, cusparge
        x = np.ones((1, 1, 200, 8), np.float32)
        cusparge.attention(x, x, x)
        cusparge.attention_varlen(x[0, 0][:, None], x[0, 0][:, None], x[0, 0][:, None], [0, 200],
                                  np.array([0, 200]))
        cusparge.predict_block_map(x, x)
        print(*(name for name in sys.modules if "." not in name))
    """,
        "-W",
        "error",
    ).split()
    assert "cusparge" in loaded
    assert not set(HEAVY) & set(loaded)


def test_numpy_alone_is_enough():
    """Every other package is blocked: one warning for threadpoolctl, and right results."""
    python(
        """
        import sys, sysconfig, threading, warnings

        class Block:
            def find_spec(self, name, path=None, target=None):
                top = name.partition(".")[0]
                if top not in {"numpy", "cusparge"} and top not in sys.stdlib_module_names:
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Block())
        for name in [name for name in sys.modules if name.partition(".")[0] in BLOCKED]:
            del sys.modules[name]
        import numpy as np
        import cusparge

        x = np.random.default_rng(0).standard_normal((1, 2, 300, 16), np.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = [cusparge.attention(x, x, x, policy=cusparge.Dense()) for _ in range(2)]
        found = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert len(caught) == 1 and len(found) == 1, caught
        assert "threadpoolctl" in found[0] and "pip install threadpoolctl" in found[0]
        scores = x.astype(float) @ x.astype(float).swapaxes(2, 3) / 4
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        want = weights @ x / weights.sum(axis=3, keepdims=True)
        for got in out:
            assert np.abs(got - want).max() < 1e-5
    """.replace("BLOCKED", repr({*HEAVY, "threadpoolctl"}))
    )


def test_packed_calls_from_several_threads(rng):
    q, k, v = (x[0].swapaxes(0, 1) for x in make(rng, seqlen_q=500, seqlen_k=500))
    edges = [0, 100, 101, 350, 500]
    want = attention_varlen(q, k, v, edges, edges)
    got = in_threads(*(lambda: attention_varlen(q, k, v, edges, edges) for _ in range(3)))
    for out in got:
        assert_same_bits(out, want)
