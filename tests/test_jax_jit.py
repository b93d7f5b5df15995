"""The calls inside jax.jit, vmap and scan: the eager bits, one program for equal calls."""

import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from compare import assert_refused, assert_same_bits

from cusparge import (
    BlockMap,
    TopCdf,
    TopK,
    UnsupportedError,
    attention,
    attention_varlen,
    predict_block_map,
)
from cusparge._arrays import jax_calls
from cusparge._graph import jax as graph
from cusparge._types import AttentionStats, Counts

jax = pytest.importorskip("jax", reason="needs JAX")
jnp = jax.numpy

RNG = np.random.default_rng(3)  # the policies below depend on it a little


def randn(*shape, dtype="float32"):
    return jnp.asarray(RNG.standard_normal(shape, np.float32)).astype(dtype)


Q, K, V = randn(2, 4, 300, 64), randn(2, 2, 260, 64), randn(2, 2, 260, 64)
PACKED = [x[0].swapaxes(0, 1) for x in (Q, K, V)]
LENGTHS = [100, 3]
EDGES = [0, 130, 300], [0, 90, 260]
MAP = predict_block_map(Q, K, policy=TopK(0.3))
MASK = RNG.random((2, 4, 5, 5)) < 0.5
SIZES = {"seqlen_q": 300, "seqlen_k": 260, "block_q": 64}
FINE = BlockMap.from_mask(jnp.asarray(MASK), **SIZES)
FINE_NUMPY = BlockMap.from_mask(MASK, **SIZES)
POLICY = TopCdf(
    *(0.7, [0.1, 0.2, -1, 0.4], 3.0),
    **{"rule": "within", "sink_blocks": 1, "local_blocks": 2, "quantize": True},
)


def leaves(result):
    """The arrays of a result, stats and maps included."""
    if isinstance(result, (tuple, list)):
        return [leaf for part in result for leaf in leaves(part)]
    if isinstance(result, AttentionStats):
        return [result.counts.stacked(), result.sparsity_per_head]
    if isinstance(result, BlockMap):
        numbers = (result.seqlen_q, result.seqlen_k, result.sparsity)
        fine = [] if result.row_mask is None else [result.row_mask]
        return [result.mask, *fine, *(np.array(number) for number in numbers)]
    return [result]


def assert_equal(got, want):
    for one, other in zip(leaves(got), leaves(want), strict=True):
        assert_same_bits(np.asarray(one), np.asarray(other))
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)


def of(**options):
    return lambda q, k, v: attention(q, k, v, return_lse=True, return_stats=True, **options)


def swapped(*arrays):
    return [x.swapaxes(1, 2) for x in arrays]


#: Each differs from the plain call, or it would show nothing.
CASES = {
    "policy": of(policy=POLICY),
    "policy inside": lambda q, k, v: attention(q, k, v, policy=TopK([0.1, 0.3, 0.5, 1])),
    "scale": of(sm_scale=0.3),
    "scale of NumPy": of(sm_scale=np.array(0.3)),
    "scale of JAX": of(sm_scale=jnp.float32(0.25)),
    "causal": of(causal=True),
    "causal, top left": of(causal=np.True_, causal_align="top_left"),
    "NHD": lambda q, k, v: attention(*swapped(q, k, v), layout="NHD", return_lse=True),
    "lengths in a list": of(seqlens_k=LENGTHS),
    "lengths in NumPy": of(seqlens_k=np.array(LENGTHS, np.uint8)),
    "lengths in JAX": of(seqlens_k=jnp.array(LENGTHS)),
    "lengths computed": lambda q, k, v: attention(
        q, k, v, seqlens_k=jnp.arange(2, dtype=jnp.int16) + 7, return_stats=True
    ),
    "map outside": of(block_map=MAP),
    "map of 64 rows": of(block_map=FINE),
    "map of NumPy": of(block_map=FINE_NUMPY),
    "map inside": lambda q, k, v: attention(
        q, k, v, block_map=predict_block_map(q, k, policy=TopK(0.3)), return_lse=True
    ),
    "another head count": lambda q, k, v: attention(q[:, 1:], k[:, :1], v[:, :1]),
    "oracle": of(backend="reference", policy=TopK(0.3)),
    "nested": lambda q, k, v: jax.jit(lambda q: attention(q * 2, k, v))(q) * 0.5,
}


@pytest.mark.parametrize("case", CASES)
def test_options(case):
    function = CASES[case]
    want = function(Q, K, V)
    first, plain = np.asarray(leaves(want)[0]), np.asarray(attention(Q, K, V))
    assert first.shape != plain.shape or (first != plain).any()
    assert_equal(jax.jit(function)(Q, K, V), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype):
    arrays = [x.astype(dtype) for x in (Q, K, V)]

    def function(q, k, v):
        return attention(q, k, v, return_lse=True), predict_block_map(q, k, policy=TopK(0.3))

    made = jax.jit(function)(*arrays)
    assert_equal(made, function(*arrays))
    assert made[0][0].dtype == dtype


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys"])
def test_empty(empty):
    arrays = {
        "batch": (Q[:0], K[:0], V[:0]),
        "heads": (Q[:, :0], K[:, :0], V[:, :0]),
        "queries": (Q[:, :, :0], K, V),
        "keys": (Q, K[:, :, :0], V[:, :, :0]),
    }[empty]

    def function(q, k, v):
        return attention(q, k, v, return_lse=True, return_stats=True), predict_block_map(q, k)

    assert_equal(jax.jit(function)(*arrays), function(*arrays))


def test_packed_edges_of_any_kind():
    def function(q, k, v, edges_q, edges_k):
        return attention_varlen(
            *(q, k, v, edges_q, edges_k),
            **{"causal": True, "max_seqlen_q": np.int64(300), "policy": TopK(0.4)},
            **{"return_lse": True, "return_stats": True},
        )

    want = function(*PACKED, *EDGES)
    run = jax.jit(function)
    assert_equal(run(*PACKED, *(jnp.array(edges) for edges in EDGES)), want)
    other = jnp.array([0, 129, 300])
    assert_equal(run(*PACKED, other, jnp.array(EDGES[1])), function(*PACKED, other, EDGES[1]))
    for kind in (list, np.array):
        edges = [kind(one) for one in EDGES]
        assert_equal(jax.jit(lambda q, k, v, e=edges: function(q, k, v, *e))(*PACKED), want)
        mixed = jax.jit(lambda q, k, v, e, m=edges: function(q, k, v, e, m[1]))
        assert_equal(mixed(*PACKED, jnp.array(EDGES[0])), want)


def test_only_the_lengths_may_be_traced():
    def function(lengths):
        return attention(Q, K, V, seqlens_k=lengths)

    run = jax.jit(function)
    for lengths in ([1, 260], [0, 7]):
        assert_equal(run(jnp.array(lengths)), function(lengths))


def test_maps_and_stats_pass_in_and_out():
    def function(q, block_map, stats):
        out = attention(q, K, V, block_map=block_map)
        return out, block_map, stats, predict_block_map(q, K, policy=TopK(0.5))

    eager = attention(Q, K, V, policy=TopK(0.3), return_stats=True)[1]
    assert 0 < eager.sparsity < 1
    run = jax.jit(function)
    for block_map in (MAP, FINE, FINE_NUMPY):
        out, same_map, stats, made = run(Q, block_map, eager)
        assert_equal(out, attention(Q, K, V, block_map=block_map))
        assert_equal(attention(Q, K, V, block_map=same_map), out)  # eagerly, with what came out
        assert same_map.sparsity == block_map.sparsity
        assert_equal(stats, eager)
        assert_equal(made, predict_block_map(Q, K, policy=TopK(0.5)))
        copy = pickle.loads(pickle.dumps(same_map))
        assert_same_bits(np.asarray(copy.mask), np.asarray(block_map.mask))
        assert copy.sparsity == block_map.sparsity


def test_counts_beyond_32_bits_stay_exact():
    numbers = np.array([[[2**31, 2**32 + 1, 7, 2**52 - 1]], [[1, 2**31 - 1, 5, 2**40]]] * 2)
    counts = Counts(*numbers)
    halves = graph._halves(counts.stacked())
    assert halves.dtype == np.uint32
    assert halves.shape == (4, 1, 8)
    stats = jax.jit(lambda stats: stats)(AttentionStats(jnp.asarray(halves)))
    assert_same_bits(stats.counts.stacked(), counts.stacked())
    stats = jax.jit(lambda stats: stats)(AttentionStats(counts))
    assert_same_bits(stats.counts.stacked(), counts.stacked())
    mask = jnp.ones((1, 1, 1, 2), bool)
    huge = BlockMap(mask, seqlen_q=1, seqlen_k=128, reachable=2**40)
    made = jax.jit(lambda block_map: block_map)(huge)
    assert made.sparsity == 1 - 2 / 2**40
    assert pickle.loads(pickle.dumps(made)).reachable == 2**40


# ---- transformations ----------------------------------------------------------------------------


def test_vmap():
    q, k = jnp.stack([Q, Q * 2, Q + 1]), jnp.stack([K, K * 2, K])
    lengths = jnp.array([[1, 2], [3, 260], [9, 0]])

    def function(q, k, lengths):
        return attention(q, k, V, seqlens_k=lengths, policy=TopK(0.4), return_lse=True)

    want = [function(*one) for one in zip(q, k, lengths, strict=True)]
    want = [jnp.stack(part) for part in zip(*want, strict=True)]
    assert_equal(jax.vmap(function)(q, k, lengths), want)
    moved = jax.jit(jax.vmap(lambda q: attention(q, K, V), in_axes=2, out_axes=1))
    turned = jnp.moveaxis(q, 0, 2)
    assert_equal(moved(turned)[:, 1], attention(q[1], K, V))

    def inside(q):
        return attention(q, K, V, policy=TopK(0.4), return_stats=True)[1], predict_block_map(q, K)

    stats, made = jax.vmap(inside)(q)
    each = [inside(one) for one in q]
    assert_same_bits(stats.sparsity_per_head, np.stack([one.sparsity_per_head for one, _ in each]))
    assert made.sparsity == pytest.approx(np.mean([one.sparsity for _, one in each]))
    one = jax.tree.map(lambda x: x[2], made)
    assert_equal(attention(q[2], K, V, block_map=one), attention(q[2], K, V, block_map=each[2][1]))


def test_scan():
    def step(carry, x):
        out, stats = attention(carry * x, K, V, causal=True, return_stats=True)
        return out, (out[0, 0, 0], stats)

    xs = jnp.array([1.0, 0.5, 2.0])
    carry, (rows, stats) = jax.jit(lambda q: jax.lax.scan(step, q, xs))(Q)
    want = Q
    for i, x in enumerate(xs):
        want, (row, one) = jax.jit(step)(want, x)
        assert_equal(rows[i], row)
        assert_same_bits(np.asarray(stats.counts.selected)[i], one.counts.selected)
    assert_equal(carry, want)


# ---- one program --------------------------------------------------------------------------------


def test_equal_calls_share_one_program(monkeypatch):
    traced = []
    plain = jax.pure_callback

    def counting(*args, **kwargs):
        traced.append(args)
        return plain(*args, **kwargs)

    monkeypatch.setattr(jax, "pure_callback", counting)
    x = randn(1, 3, 77, 24)  # no other test has this shape

    def function(x, **options):
        return attention(x, x, x, **{"policy": TopK(0.5), "sm_scale": 1} | options)

    def programs(*calls):
        traced.clear()
        jax.clear_caches()
        jax_calls._bound.cache_clear()
        for call in calls:
            call()
        return len(traced)

    run = jax.jit(function)
    assert programs(lambda: run(x), lambda: run(x + 1), lambda: run(x * 2)) == 1
    # New functions around an equal call: JAX traces them, and finds the program of the first.
    same = [
        {},
        {"sm_scale": 1.0},
        {"policy": TopK(np.float64(0.5))},
        {"causal": np.False_},
        {"sm_scale": np.array(1.0)},
    ]
    assert programs(*(lambda o=o: jax.jit(lambda x: function(x, **o))(x) for o in same)) == 1
    lists = [{"seqlens_k": [length]} for length in (5, 6, 7)]
    assert programs(*(lambda o=o: jax.jit(lambda x: function(x, **o))(x) for o in lists)) == 1
    other = [{}, {"causal": True}, {"policy": TopK(0.5, quantize=True)}, {"layout": "NHD"}]
    assert programs(*(lambda o=o: jax.jit(lambda x: function(x, **o))(x) for o in other)) == 4


def lowered(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_a_gpu_gets_a_buffer_callback():
    def function(q, k, v):
        made = predict_block_map(q, k)
        packed = attention_varlen(*(x[0].swapaxes(0, 1) for x in (q, k, v)), *EDGES)
        return attention(q, k, v, block_map=made, return_stats=True), packed

    text = lowered(function, Q, K, V)
    assert text.count("@xla_buffer_python_gpu_callback") == 3
    assert "python_cpu_callback" not in text
    on_host = jax.jit(function).lower(Q, K, V).as_text()
    assert "python_cpu_callback" in on_host
    assert "gpu_callback" not in on_host


def test_a_jax_without_buffer_callbacks_still_computes_on_the_host(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.buffer_callback", None)
    x = randn(1, 1, 71, 24)  # no other test has this shape
    assert_equal(jax.jit(lambda x: attention(x, x, x))(x), attention(x, x, x))
    words = ["has no buffer callback", "pip install --upgrade jax"]
    assert_refused(UnsupportedError, jax_calls._no_callback, *words)


# ---- threads and processes ----------------------------------------------------------------------


def test_two_threads():
    inputs = [randn(1, 2, length, 16) for length in (100, 260)]
    run = jax.jit(lambda x: attention(x, x, x, causal=True, policy=TopK(0.5), return_stats=True))
    results = {}

    def work(index):
        results[index] = [run(inputs[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        want = attention(x, x, x, causal=True, policy=TopK(0.5), return_stats=True)
        for made in results[index]:
            assert_equal(made, want)


def test_our_types_are_registered_once(monkeypatch):
    made = []

    def slowly(kind, *functions):
        if len(made) == 1:  # nobody may go on before this one is known, too
            late = threading.Thread(target=announce)
            threads.append(late)
            late.start()
        time.sleep(0.1)
        assert kind not in made, "JAX refuses a second registration"
        made.append(kind)

    monkeypatch.setattr(jax_calls, "_kinds", [(int, None, None), (str, None, None)])
    monkeypatch.setattr(jax.tree_util, "register_pytree_node", slowly)
    errors = []

    def announce():
        try:
            jax_calls.announce()
            errors.append(len(made) != 2)  # it returns when both are known
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=announce) for _ in range(4)]
    for thread in tuple(threads):
        thread.start()
    while threads:
        threads.pop(0).join()
    assert errors == [False] * 5
    assert sorted(map(str, made)) == [str(int), str(str)]


def run_python(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script],
        **{"capture_output": True, "text": True, "timeout": 240, "check": False},
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_maps_pass_into_the_first_traced_call_of_a_process():
    printed = run_python("""
import cusparge, jax, numpy as np
x = jax.numpy.ones((1, 2, 200, 16))
made = cusparge.BlockMap.from_mask(np.eye(2, 4, dtype=bool)[None, None], seqlen_q=200, seqlen_k=200)
want = cusparge.attention(x, x, x, block_map=made)
got = jax.jit(lambda x, m: cusparge.attention(x, x, x, block_map=m))(x, made)
print(np.array_equal(got, want), made.sparsity, *(jax.tree.leaves(made)[1]))
""")
    assert printed == ["True", "0.75", "8", "0"]


def test_arrays_on_two_devices():
    printed = run_python(
        """
import cusparge, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
assert len(jax.devices()) == 2
x = np.random.default_rng(0).standard_normal((2, 4, 150, 16)).astype(np.float32)
mesh = Mesh(jax.devices(), ("heads",))
sharding = NamedSharding(mesh, PartitionSpec(None, "heads"))
parts = jax.device_put(x, sharding)
policy = cusparge.TopK(0.5)
call = lambda q: cusparge.attention(q, q, q, policy=policy, return_stats=True)
want, stats = call(x)
made, made_stats = jax.jit(call)(parts)
print(np.array_equal(made, want), made_stats.sparsity == stats.sparsity)
made = call(parts)[0]
print(np.array_equal(made, want), made.sharding == sharding)
shard_map = getattr(jax, "shard_map", None)
if shard_map is not None:
    spec = PartitionSpec(None, "heads")
    made = jax.jit(shard_map(lambda q: call(q)[0], mesh=mesh, in_specs=spec, out_specs=spec,
                             check_vma=False))(parts)
    print(np.array_equal(made, want), made.sharding.is_equivalent_to(sharding, 4))
else:
    print(True, True)
second = jax.device_put(x, jax.devices()[1])
made = jax.jit(lambda q: call(q)[0])(second)
print(np.array_equal(made, want), made.devices() == {jax.devices()[1]})
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
    )
    assert printed == ["True"] * 8
