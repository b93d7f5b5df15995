"""torch's compilers see one operator for a call, and what they compile gives the eager bits."""

import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from torch_tools import (  # noqa: F401 the fixture is used by its name
    FINE,
    GENERATOR,
    KEEP,
    LENGTHS,
    MAP,
    PACKED,
    POLICY,
    K,
    Q,
    V,
    assert_equal,
    compiled,
    fresh,
    leaves,
    randn,
)

from cusparge import (
    BlockMap,
    Dense,
    TopCdf,
    TopK,
    attention,
    attention_varlen,
    predict_block_map,
)
from cusparge._arrays import torch_ops

torch = pytest.importorskip("torch", reason="needs torch")

# torch warns while it loads its compilers and traces; our own warnings stay errors.
pytestmark = pytest.mark.filterwarnings("default", "error:::cusparge")


class Counting:
    """A backend that computes nothing by itself, and keeps the graphs it was given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, examples):
        self.graphs.append(graph.graph)
        return graph


def operators(graph):
    return [str(node.target) for node in graph.nodes if "cusparge" in str(node.target)]


# ---- the same bits ------------------------------------------------------------------------------


def layer(q, k, v):
    """What a model does around the calls: all three of them, with all that they return."""
    out, lse, stats = attention(
        *(q * 2, k, v), causal=True, policy=TopK(KEEP), return_lse=True, return_stats=True
    )
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    more = attention_varlen(*rows, [0, 130, 300], [0, 90, 260], return_lse=True)
    made = predict_block_map(q, k, policy=TopK(KEEP))
    return out + 1, lse, stats, more[0] * 2, more[1], made, attention(q, k, v, block_map=made)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_layer(backend):
    graph = Counting()
    torch.compile(layer, fullgraph=True, backend=graph)(Q, K, V)
    names = ["attention", "attention_varlen", "predict_block_map", "attention"]
    assert operators(graph.graphs[0]) == [f"cusparge.{name}.default" for name in names]
    torch._dynamo.reset()
    run = compiled(layer, backend)
    for q in (Q, Q.flip(2)):
        assert_equal(run(q, K, V), layer(q, K, V))


def of(**options):
    return lambda q, k, v: attention(q, k, v, return_lse=True, return_stats=True, **options)


#: Each differs from the plain call, or it would show nothing.
CASES = {
    "policy outside": of(policy=POLICY),
    "policy inside": lambda q, k, v: attention(
        *(q, k, v),
        policy=TopCdf(
            *(0.7, [0.1, 0.2, -1, 0.4], 3.0),
            **{"rule": "within", "sink_blocks": 1, "local_blocks": 2, "quantize": True},
        ),
        return_lse=True,
    ),
    "keep inside": lambda q, k, v: attention(q, k, v, policy=TopK(0.3, sink_blocks=1)),
    "keep per head": lambda q, k, v: attention(q, k, v, policy=TopK([0.1, 0.3, 0.5, 1])),
    "one head's list": lambda q, k, v: attention(q[:, :1], k[:, :1], v[:, :1], policy=TopK([0.3])),
    "stage 2 inside": lambda q, k, v: attention(
        q * 3, k, v, policy=Dense([0.1, 0.5, 1, math.inf]), return_stats=True
    ),
    "quantize": of(policy=Dense(quantize=True)),
    "scale": of(sm_scale=0.3),
    "scale of NumPy": lambda q, k, v: attention(q, k, v, sm_scale=2 / np.sqrt(q.shape[-1])),
    "whole scale": of(sm_scale=2),
    "causal": of(causal=True),
    "causal, top left": of(causal=True, causal_align="top_left"),
    "lengths in a list": of(seqlens_k=LENGTHS),
    "lengths in a range": of(seqlens_k=range(40, 42)),
    "lengths in a tensor": of(seqlens_k=torch.tensor(LENGTHS)),
    "lengths in NumPy": of(seqlens_k=np.array(LENGTHS, np.uint8)),
    "lengths as tensors": lambda q, k, v: attention(
        q, k, v, seqlens_k=[(q[0, 0, 0, 0] * 0).long() + 100, torch.tensor(3)]
    ),
    "map outside": of(block_map=MAP),
    "map of 64 rows": of(block_map=FINE),
    "map inside": lambda q, k, v: attention(
        q, k, v, block_map=predict_block_map(q, k, policy=TopK(0.3)), return_lse=True
    ),
    "another head count": lambda q, k, v: attention(q[:, 1:], k[:, :1], v[:, :1]),
    "oracle": of(backend="reference", policy=TopK(0.3)),
}


@pytest.mark.parametrize("case", CASES)
def test_options(case):
    function = CASES[case]
    want = function(Q, K, V)
    plain = attention(Q, K, V)
    assert leaves(want)[0].shape != plain.shape or not torch.equal(leaves(want)[0], plain)
    assert_equal(compiled(function)(Q, K, V), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
    arrays = [x.to(getattr(torch, dtype)) for x in (Q, K, V)]

    def function(q, k, v):
        return attention(q, k, v, return_lse=True), predict_block_map(q, k)

    assert_equal(compiled(function)(*arrays), function(*arrays))


def test_views_of_one_projection():
    x, weight = randn(2, 200, 48), randn(48, 3 * 4 * 16)

    def function(x, weight):
        q, k, v = (x @ weight).view(2, 200, 3, 4, 16).unbind(2)
        heads_first = (y.transpose(1, 2) for y in (q, k, v))
        return attention(q, k, v, layout="NHD", return_lse=True), attention(*heads_first)

    want = function(x, weight)
    assert not want[1].is_contiguous()  # the order of q's elements is kept
    assert_equal(compiled(function, "inductor")(x, weight), want)


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys"])
def test_empty(empty):
    q, k, v = {
        "batch": (Q[:0], K[:0], V[:0]),
        "heads": (Q[:, :0], K[:, :0], V[:, :0]),
        "queries": (Q[:, :, :0], K, V),
        "keys": (Q, K[:, :, :0], V[:, :, :0]),
    }[empty]

    def function(q, k, v):
        mask = predict_block_map(q, k).mask
        # The last one has the shape that the tracer was told.
        made = attention(q, k, v, return_lse=True, return_stats=True)
        return made, mask, mask.new_ones(mask.shape)

    assert_equal(compiled(function)(q, k, v), function(q, k, v))


def test_packed_edges_of_any_kind():
    def function(q, k, v, edges_q, edges_k):
        return attention_varlen(
            *(q, k, v, edges_q, edges_k),
            **{"causal": True, "max_seqlen_q": 300, "policy": TopK(0.4)},
            **{"return_lse": True, "return_stats": True},
        )

    run = compiled(function)
    for first in (100, 130):
        edges_q, edges_k = [0, first, first, 300], [0, 90, 91, 260]
        want = function(*PACKED, edges_q, edges_k)
        assert_equal(run(*PACKED, edges_q, edges_k), want)
        kinds = torch.tensor(edges_q, dtype=torch.int32), np.array(edges_k)
        assert_equal(run(*PACKED, *kinds), want)


# ---- what may change between two calls ----------------------------------------------------------


def test_lengths_and_batches_may_be_dynamic():
    graphs = Counting()

    def function(q, k, v):
        out, lse, stats = attention(
            *(q, k, v), causal=True, policy=TopK(0.4), return_lse=True, return_stats=True
        )
        return out + 1, lse, stats, predict_block_map(q, k), attention(q, k, v, seqlens_k=None)

    for backend, most in ((graphs, 5), ("aot_eager", 2)):
        run = compiled(function, backend)
        for batch, length in ((2, 130), (3, 300), (2, 128), (4, 577), (5, 65))[:most]:
            q, k = randn(batch, 2, length, 16), randn(batch, 1, length + 7, 16)
            for x in (q, k):
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 2)
            made = run(q, k, k)
            assert_equal(made, function(q, k, k))
            assert type(made[3].seqlen_q) is int
    assert len(graphs.graphs) == 1, "it was compiled again for other sizes"


def test_packed_tokens_may_be_dynamic():
    graphs = Counting()

    def function(q, edges):
        return attention_varlen(q, q, q, edges, edges, return_lse=True, return_stats=True)

    run = compiled(function, graphs)
    for sizes in ((100, 30), (1, 129, 70), (64, 64, 3, 2)):
        q = randn(sum(sizes), 2, 16)
        edges = torch.tensor([0, *np.cumsum(sizes)])
        torch._dynamo.mark_dynamic(q, 0)
        torch._dynamo.mark_dynamic(edges, 0)
        assert_equal(run(q, edges), function(q, edges))
    assert len(graphs.graphs) == 1


def test_thresholds_may_change():
    def function(q, threshold, pv, scale):
        policy = TopCdf(threshold, [-1, threshold, -1, 1], pv)
        return attention(q, K, V, policy=policy, sm_scale=scale, return_stats=True)

    run, last = compiled(function), Q
    for numbers in ((0.5, None, 0.1), (0.6, None, 0.2), (0.7, 0.3, 0.3), (0.9, 0.5, None)):
        want = function(Q, *numbers)
        assert_equal(run(Q, *numbers), want)
        assert not torch.equal(want[0], last)
        last = want[0]


def test_policies_and_maps_may_be_arguments():
    def function(q, policy, block_map):
        return attention(q, K, V, policy=policy, block_map=block_map)

    run = compiled(function)
    for policy in (TopK(0.3), TopK(0.6), TopK([0.3, 0.6, 0.3, 1]), Dense(0.2), TopCdf(0.5, -1)):
        assert_equal(run(Q, policy, None), function(Q, policy, None))
    for block_map in (MAP, FINE):
        assert_equal(run(Q, Dense(), block_map), function(Q, Dense(), block_map))


def test_two_threads():
    inputs = [randn(1, 2, length, 16) for length in (100, 260)]

    def function(x):
        return attention(x, x, x, causal=True, policy=TopK(0.5), return_stats=True)

    run, results = compiled(function), {}

    def work(index):
        with torch.no_grad():  # each thread has its own mode
            results[index] = [run(inputs[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        for made in results[index]:
            assert_equal(made, function(x))


# ---- values inside a graph ----------------------------------------------------------------------


def test_reading_values_breaks_the_graph():
    mask = torch.rand((1, 1, 3, 5), generator=GENERATOR) < 0.5

    def function(q):
        out, stats = attention(q, K, V, policy=TopK(KEEP), return_stats=True)
        share = stats.sparsity + predict_block_map(q, K, policy=TopK(KEEP)).sparsity
        block_map = BlockMap.from_mask(mask, seqlen_q=300, seqlen_k=260)
        heads = torch.as_tensor(stats.sparsity_per_head)
        return out * share, heads, attention(q, K, V, block_map=block_map), repr(stats)

    *got, text = torch.compile(function, backend="aot_eager")(Q)
    *want, expected = function(Q)
    assert_equal(got, want)
    assert text == expected
    for read, words in (
        (lambda: attention(Q, K, V, return_stats=True)[1].sparsity, "read them outside"),
        (lambda: predict_block_map(Q, K).sparsity, "read them outside"),
        (
            lambda: BlockMap.from_mask(mask, seqlen_q=300, seqlen_k=260),
            "make the map outside of the compiled function",
        ),
    ):
        with pytest.raises(Exception, match=words):
            compiled(read)()


def test_the_operators_are_registered_once(monkeypatch):
    made = []

    class Slow:
        def __init__(self, *args):
            time.sleep(0.02)
            made.append(args)

        def define(self, *args, **options):
            made.append(args)

        impl = define

    monkeypatch.setattr(torch_ops, "_libraries", [])
    monkeypatch.setattr(torch_ops, "_defined", set())
    monkeypatch.setattr(torch.library, "Library", Slow)
    monkeypatch.setattr(torch.library, "register_fake", Slow.define)
    threads = [threading.Thread(target=torch_ops._define) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.count(("cusparge", "FRAGMENT")) == 1
    assert torch_ops._defined == set(torch_ops._operators)
    assert len(torch_ops._libraries) == 1


# ---- fresh processes ----------------------------------------------------------------------------


def run_python(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_the_first_call_of_a_process_may_be_compiled():
    printed = run_python("""
import sys, threading
import cusparge
assert "torch" not in sys.modules
import torch

x = torch.randn(1, 2, 200, 16)
results, errors = [], []

def work(function, *arguments):
    try:
        results.append(function(*arguments))
    except BaseException as error:
        errors.append(error)

def fake():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        y = torch.empty(1, 2, 200, 16)
        return cusparge.attention(y, y, y, policy=cusparge.TopK(0.5))

# Four threads meet at the registration of the operators.
compiled = torch.compile(
    lambda x: cusparge.attention(x, x, x, policy=cusparge.TopK(0.5)), fullgraph=True,
    backend="aot_eager",
)
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=work, args=(fake,)) for _ in range(3)]
threads.append(threading.Thread(target=work, args=(compiled, x)))
for thread in threads: thread.start()
for thread in threads: thread.join()
if errors: raise errors[0]
want = cusparge.attention(x, x, x, policy=cusparge.TopK(0.5))
print(torch.equal(results[[type(r) is torch.Tensor for r in results].index(True)], want))
""")
    assert printed == ["True"]


def test_numpy_alone_loads_no_framework():
    printed = run_python(
        "import sys, numpy as np, cusparge\n"
        "x = np.ones((1, 2, 70, 8), np.float32)\n"
        "cusparge.attention(x, x, x, block_map=cusparge.predict_block_map(x, x),"
        " return_stats=True)[1].sparsity\n"
        "print(*({'torch', 'jax', 'cupy', 'ml_dtypes'} & set(sys.modules)), 'done')"
    )
    assert printed == ["done"]
