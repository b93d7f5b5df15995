"""Arrays in, arrays out: any framework, strides and layout, and the same bits from all of them."""

import gc
import tracemalloc

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, bits, plain_attention, visible

from cusparge import Dense, TopCdf, TopK, attention, attention_varlen, predict_block_map

POLICIES = {
    "dense": Dense(),
    "cdf": TopCdf(0.8),
    "topk": TopK(0.3),
    "stage 2": TopCdf(0.9, pv_threshold=2.0),
    "quantized": Dense(quantize=True),
    "quantized, sparse": TopK(0.5, pv_threshold=2.0, quantize=True),
}
each_policy = pytest.mark.parametrize("policy", POLICIES)


def clustered(rng, heads, tokens, dim, batch=2):
    """Tokens in runs of 64 around a few centres: blocks that a filter can tell apart."""
    centers = rng.standard_normal((8, dim))
    runs = centers[rng.integers(0, 8, (batch, heads, -(-tokens // 64)))]
    x = np.repeat(runs, 64, axis=2)[:, :, :tokens] * 2
    return (x + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)


def make(rng, dim=64, seqlen_q=200, seqlen_k=330):
    return (
        clustered(rng, 4, seqlen_q, dim),
        clustered(rng, 2, seqlen_k, dim),
        rng.standard_normal((2, 2, seqlen_k, dim), np.float32),
    )


def padded(x, **widths):
    """A larger array whose part `x` is: what surrounds it is NaN, and must not be read."""
    pads = [widths.get(axis, (0, 0)) for axis in "bhsd"]
    around = np.full([n + sum(p) for n, p in zip(x.shape, pads, strict=True)], np.nan, x.dtype)
    part = around[tuple(slice(p[0], p[0] + n) for n, p in zip(x.shape, pads, strict=True))]
    part[...] = x
    return part


def unaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)[1:]
    out = memory.view(x.dtype).reshape(x.shape)
    out[...] = x
    assert x.size == 0 or not out.flags.aligned
    return out


def odd_steps(x):
    """Rows that lie a number of bytes apart which is no multiple of the element's size."""
    row = np.dtype([("values", x.dtype, x.shape[-1:]), ("tag", "u1")])
    table = np.zeros(x.shape[:-1], row)
    table["values"] = x
    assert table["values"].strides[2] % x.itemsize
    return table["values"]


def every_second(x):
    out = np.full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), np.nan, x.dtype)[:, :, ::2]
    out[...] = x
    return out


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


STRIDES = {
    "tokens backwards": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "heads backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "batch backwards": lambda x: x[::-1].copy()[::-1],
    "slice of fused q, k, v": lambda x: padded(x, d=(x.shape[3], x.shape[3])),
    "slice of tokens": lambda x: padded(x, s=(3, 5)),
    "NHD memory": lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
    "tokens outermost": lambda x: x.transpose(2, 0, 1, 3).copy().transpose(1, 2, 0, 3),
    "every second token": every_second,
    "unaligned": unaligned,
    "odd steps": odd_steps,
    "read-only": frozen,
}


def everything(q, k, v, **options):
    out, lse, stats = attention(q, k, v, return_lse=True, return_stats=True, **options)
    return out, lse, (stats.qk_sparsity, stats.pv_sparsity)


def assert_same_results(got, want):
    assert_same_bits(got[0], want[0], "out")
    assert_same_bits(got[1], want[1], "lse")
    assert got[2] == want[2]


@each_policy
@pytest.mark.parametrize("dim", [64, 3])
def test_strides_change_no_bit(rng, policy, dim):
    policy = POLICIES[policy]
    q, k, v = make(rng, dim)
    want = everything(q, k, v, policy=policy, causal=True)
    for name, variant in STRIDES.items():
        arrays = [variant(x) for x in (q, k, v)]
        for x, y in zip(arrays, (q, k, v), strict=True):
            assert_same_bits(x, y, name)
        got = everything(*arrays, policy=policy, causal=True)
        assert_same_results(got, want)
        for x, y in zip(arrays, (q, k, v), strict=True):
            assert_same_bits(x, y, f"{name}: an input was modified")


@each_policy
def test_a_head_dim_of_one_may_have_any_last_stride(rng, policy):
    policy = POLICIES[policy]
    arrays = make(rng, 1)
    want = everything(*arrays, policy=policy)
    for last in (3, -1, 17):
        got = []
        for x in arrays:
            wide = np.full((*x.shape[:3], abs(last)), np.nan, np.float32)
            odd = np.lib.stride_tricks.as_strided(wide, x.shape, (*wide.strides[:3], 4 * last))
            odd[...] = x
            got.append(odd)
        assert_same_results(everything(*got, policy=policy), want)


@each_policy
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_zero_strides(rng, policy, axis):
    policy = POLICIES[policy]
    arrays = [np.broadcast_to(x.take([0], axis), x.shape) for x in make(rng)]
    assert all(x.strides[axis] == 0 for x in arrays)
    want = everything(*(x.copy() for x in arrays), policy=policy)
    assert_same_results(everything(*arrays, policy=policy), want)


@each_policy
def test_layouts_agree(rng, policy):
    policy = POLICIES[policy]
    arrays = make(rng)
    options = {"policy": policy, "causal": True, "seqlens_k": [250, 330]}
    want = everything(*arrays, **options)
    for arrange in (np.copy, np.asarray):
        nhd = [arrange(x.swapaxes(1, 2)) for x in arrays]
        got = everything(*nhd, layout="NHD", **options)
        assert got[0].shape == nhd[0].shape
        assert_same_results((got[0].swapaxes(1, 2), *got[1:]), want)
    mask = predict_block_map(*nhd[:2], layout="NHD", **options).mask
    assert_same_bits(mask, predict_block_map(*arrays[:2], **options).mask)


def frameworks(x, dtype):
    """The same values, rounded to `dtype`, in every framework that has it."""
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numpy = x.astype(getattr(ml_dtypes, "bfloat16") if dtype == "bfloat16" else dtype)  # noqa: B009
    found = {"numpy": numpy, "torch": torch.from_numpy(x).to(getattr(torch, dtype))}
    if dtype != "float64":  # JAX has it only when told so for the whole process
        found["jax"] = jax.numpy.asarray(numpy)
    for other in found.values():
        assert_same_bits(other, numpy, "the test's own input")
    return found


@each_policy
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_frameworks_agree_bit_by_bit(rng, policy, dtype):
    policy = POLICIES[policy]
    arrays = [frameworks(x, dtype) for x in make(rng)]
    want = everything(*(x["numpy"] for x in arrays), policy=policy, causal=True)
    want_mask = predict_block_map(*(x["numpy"] for x in arrays[:2]), policy=policy).mask
    for name in arrays[0]:
        q, k, v = (x[name] for x in arrays)
        got = everything(q, k, v, policy=policy, causal=True)
        assert_same_results(got, want)
        mask = predict_block_map(q, k, policy=policy).mask
        assert_same_bits(mask, want_mask, "mask")
        assert type(got[0]) is type(got[1]) is type(mask) is type(q)
        assert got[0].dtype == q.dtype
        assert tuple(got[0].shape) == tuple(q.shape)
        for x, y in zip((q, k, v), arrays, strict=True):
            assert_same_bits(x, y["numpy"], f"{name}: an input was modified")


@pytest.mark.parametrize("dim", [1, 3, 64, 72, 256])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 130), (129, 1), (77, 65)])
def test_odd_sizes_are_right_in_every_framework(rng, dim, sizes):
    q, k, v = (x[:1] for x in make(rng, dim, *sizes))
    want, want_lse = plain_attention(q, k, v, seen=visible(*sizes, causal=True))
    # float32: scores of up to 2·2·dim/sqrt(dim) + 4 in exponents, with some 2^-22 of error each.
    bound = 4 * (dim**0.5 + 1) * 2.0**-21
    for arrays in zip(*(frameworks(x, "float32").values() for x in (q, k, v)), strict=True):
        out, lse = attention(*arrays, policy=Dense(), causal=True, return_lse=True)
        assert_close(out, want, atol=bound * max(1, abs(v).max()))
        assert_close(lse, want_lse, atol=bound, rtol=2.0**-21)


def test_packed_arrays_of_every_framework(rng):
    q, k, v = (x[0].swapaxes(0, 1) for x in make(rng))
    edges = [0, 60, 60, 200], [0, 130, 200, 330]
    want = attention_varlen(q, k, v, *edges, causal=True, return_lse=True)
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for array, edge in (
        (np.asarray, np.array),
        (np.copy, tuple),
        (torch.from_numpy, lambda x: torch.tensor(x, dtype=torch.int32)),
        (torch.from_numpy, np.array),
        (jax.numpy.asarray, jax.numpy.asarray),
    ):
        arrays = [array(x) for x in (q, k, v)]
        got = attention_varlen(*arrays, *(edge(x) for x in edges), causal=True, return_lse=True)
        for ours, theirs in zip(got, want, strict=True):
            assert_same_bits(ours, theirs)
            assert type(ours) is type(arrays[0])


def test_torch_results_keep_the_memory_order_of_q(rng, torch):
    arrays = [torch.from_numpy(x) for x in make(rng)]
    want = attention(*arrays)
    assert want.is_contiguous()
    nhd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    out, lse = attention(*nhd, return_lse=True)
    assert_same_bits(out, want)
    assert out.stride() == torch.empty_like(nhd[0]).stride() == nhd[0].stride()
    assert lse.is_contiguous()
    out = attention(*(x.transpose(1, 2) for x in arrays), layout="NHD")
    assert out.transpose(1, 2).is_contiguous()
    fused = torch.cat([arrays[0]] * 3, dim=-1)[..., 64:128]
    out = attention(fused, *arrays[1:])
    assert out.stride() == torch.empty_like(fused).stride()
    assert_same_bits(out, want)


def test_torch_views_that_are_negated_lazily(rng, torch):
    q, k, v = (torch.from_numpy(x) for x in make(rng))
    pairs = torch.complex(torch.zeros_like(q), q).conj()
    negated = pairs.mH.imag if pairs.imag.stride(-1) == 1 else torch._neg_view(q)
    assert negated.is_neg()
    assert_same_bits(attention(negated, k, v), attention(-q, k, v))


def test_numpy_subclasses_become_plain_arrays(rng, tmp_path):
    q, k, v = make(rng)
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=q.shape)
    mapped[...] = q
    out = attention(mapped, k, v)
    assert type(out) is np.ndarray
    assert_same_bits(out, attention(q, k, v))


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_results_own_their_memory(rng, framework):
    q, k, v = (frameworks(x, "float32")[framework] for x in make(rng))
    out, lse = attention(q, k, v, return_lse=True)
    mask = predict_block_map(q, k).mask
    kept = [bits(x).copy() for x in (out, lse, mask)]
    if framework != "jax":
        assert not any(np.shares_memory(bits(out), bits(x)) for x in (q, k, v))
        for array in (q, k, v):
            array[...] = np.nan
        del array
    del q, k, v
    gc.collect()
    churn = [np.full((2, 4, 200, 64), 7, np.float32) for _ in range(20)]
    again = attention(churn[0], churn[1][:, :2], churn[2][:, :2])
    assert np.isfinite(again).all()
    for array, before in zip((out, lse, mask), kept, strict=True):
        assert (bits(array) == before).all()
    if framework != "jax":
        out[...] = 0  # and may be written to


def peak_of(call):
    """What a call adds to the memory in use at its worst moment, its result aside."""
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak - result.nbytes


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("dtype", "heads", "per_thread"), [("float32", 2, 16), ("float16", 3, 64)])
def test_nothing_of_the_size_of_the_inputs_is_made(monkeypatch, layout, dtype, heads, per_thread):
    """64 MB each of keys and values in float32, or 96 MB after conversion from float16."""
    threads, tokens = 2, 131072
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", str(threads))
    k = np.zeros((1, heads, tokens, 64), dtype)
    k[:, :, ::64] = np.arange(tokens // 64)[:, None] % 7
    arrays = [k[:, :, :128], k, k.copy()]
    if layout == "NHD":
        arrays = [x.swapaxes(1, 2) for x in arrays]
    for name in ("dense", "cdf", "stage 2"):
        peak = peak_of(lambda: attention(*arrays, policy=POLICIES[name], layout=layout))  # noqa: B023
        assert peak <= threads * per_thread * 2**20, f"{name}: {peak / 2**20:.0f} MB"


def test_nothing_grows_with_the_square_of_the_length(monkeypatch):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", "2")
    x = np.zeros((1, 2, 16384, 64), np.float32)
    x[:, :, ::64] = np.arange(256)[:, None] % 7
    # A byte for each pair of tokens would be 512 MB.
    peak = peak_of(lambda: attention(x, x, x, policy=TopK(0.05), causal=True))
    assert peak <= 32 * 2**20, f"{peak / 2**20:.0f} MB"
    peak = peak_of(lambda: predict_block_map(x, x, causal=True).mask)
    assert peak <= 32 * 2**20, f"{peak / 2**20:.0f} MB"
