"""What is refused, by which class, and in which words, argument by argument.

Every message is held to its four parts by key words: what was wrong, what was received, what is
allowed and how to mend it. No refusal may come after work has begun, so the CPU backend is wired
to an alarm in all of these tests.
"""

import math

import numpy as np
import pytest
from compare import assert_close, assert_refused, bits

import cusparge
from cusparge import (
    BlockMap,
    CompileError,
    CuspargeError,
    Dense,
    DeviceError,
    InvalidArgumentError,
    TopCdf,
    TopK,
    UnsupportedError,
    attention,
    attention_varlen,
    predict_block_map,
)

nan, inf = math.nan, math.inf

Q = np.linspace(-1, 1, 2 * 4 * 70 * 8, dtype=np.float32).reshape(2, 4, 70, 8)
K = np.linspace(1, -1, 2 * 2 * 90 * 8, dtype=np.float32).reshape(2, 2, 90, 8)
V = K + 1
KEPT = [array.copy() for array in (Q, K, V)]
PACKED = {"q": Q[0].swapaxes(0, 1), "k": K[0].swapaxes(0, 1), "v": V[0].swapaxes(0, 1)}
MASK = np.ones((1, 1, 1, 2), bool)
MAP = BlockMap.from_mask(MASK, seqlen_q=70, seqlen_k=90)


class Computed(Exception):
    """The backend was reached."""


@pytest.fixture(autouse=True)
def alarm(request, monkeypatch):
    if "computes" in request.fixturenames:
        return

    def alarm(*args, **kwargs):
        raise Computed

    monkeypatch.setattr("cusparge._cpu.CpuBackend.attention", alarm)
    monkeypatch.setattr("cusparge._cpu.CpuBackend.predict", alarm)


@pytest.fixture
def computes():
    """For tests whose calls are allowed to work."""


def refused(error, call, *words):
    """`call` is refused in these words, and the inputs are unchanged."""
    assert_refused(error, call, *words)
    for array, kept in zip((Q, K, V), KEPT, strict=True):
        assert (bits(array) == bits(kept)).all(), "an input was modified"


def call(q=Q, k=K, v=V, **options):
    return lambda: attention(q, k, v, **options)


def varlen(edges_q=(0, 30, 70), edges_k=(0, 40, 90), **options):
    return lambda: attention_varlen(**PACKED | options, cu_seqlens_q=edges_q, cu_seqlens_k=edges_k)


def test_the_alarm_rings():
    for works in (call(), varlen(), lambda: predict_block_map(Q, K)):
        with pytest.raises(Computed):
            works()


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidArgumentError, ValueError),
        (UnsupportedError, NotImplementedError),
        (DeviceError, RuntimeError),
        (CompileError, RuntimeError),
    ],
)
def test_classes(error, builtin):
    assert issubclass(error, CuspargeError)
    assert issubclass(error, builtin)
    assert issubclass(CuspargeError, Exception)


WRONG_ARRAYS = {
    "rank 3": (call(q=Q[0]), ["q has 3 dimensions", "(4, 70, 8)", "allowed 4", "B, H, S, D"]),
    "rank NHD": (call(k=K[0], layout="NHD"), ["k has 3", "B, S, H, D", "NHD"]),
    "rank 0": (call(q=np.float32(1)), ["q is not an array", "numpy"]),
    "rank 0 array": (call(v=np.array(1, np.float32)), ["v has 0 dimensions"]),
    "list": (call(q=Q.tolist()), ["q is not an array", "list", "asarray"]),
    "None": (call(k=None), ["k is not an array", "NoneType", "DLPack"]),
    "masked": (call(q=np.ma.masked_array(Q)), ["masked", "filled(0)", "seqlens_k"]),
    "byte order": (call(v=V.astype(">f4")), ["v has a foreign byte order", ">f4", "newbyteorder"]),
    "int": (call(Q.astype(int), K, V), ["q has dtype int64", "float16, bfloat16, float32"]),
    "complex": (call(k=K.astype(complex)), ["k has dtype complex128", "allowed"]),
    "bool": (call(q=Q > 0), ["q has dtype bool", "Convert"]),
    "object": (call(q=Q.astype(object)), ["q has dtype object"]),
    "long double": (call(q=Q.astype(np.longdouble)), ["q has dtype", "allowed"]),
    "record": (call(q=np.zeros(Q.shape, [("a", "f4")])), ["q has dtype void"]),
    "mixed dtypes": (call(k=K.astype("f2")), ["different dtypes", "k: float16", "v: float32"]),
    "head_dim 0": (call(Q[..., :0], K[..., :0], V[..., :0]), ["too small", "got 0", "1 to 256"]),
    "head_dim 257": (call(*[np.zeros((1, 1, 2, 257), "f4")] * 3), ["too large", "257", "1 to 256"]),
    "other head_dim": (call(k=K[..., :4], v=V[..., :4]), ["head_dim", "got 4 and 8", "equal"]),
    "v head_dim": (call(v=V[..., :4].copy()), ["v has another head_dim", "got 4 and 8"]),
    "v tokens": (call(v=V[:, :, :-1]), ["v has another shape than k", "(2, 2, 89, 8)", "agree"]),
    "v heads": (call(v=V[:, :1]), ["v has another shape than k", "(2, 1, 90, 8)"]),
    "batch": (call(q=Q[:1]), ["different batch sizes", "q (1, 4, 70, 8)", "k (2, 2, 90, 8)"]),
    "heads": (call(q=Q[:, :3]), ["no multiple", "got 3 and 2", "layout"]),
    "no kv heads": (call(k=K[:, :0], v=V[:, :0]), ["no multiple", "got 4 and 0"]),
    "heads as layout": (call(layout="NHD", k=K[:, :, :4], v=V[:, :, :4]), ["70 and 4", "NHD"]),
    "last stride": (
        call(*(a.swapaxes(2, 3).copy().swapaxes(2, 3) for a in (Q, K, V))),
        ["q's last dimension is not contiguous", "the last one must be 1", "ascontiguousarray"],
    ),
    "last stride -1": (call(v=V[..., ::-1]), ["v's last dimension is not contiguous", "-1)"]),
    "last stride 0": (
        call(k=np.broadcast_to(K[..., :1], K.shape)),
        ["k's last dimension is not contiguous", "0)"],
    ),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_arrays(case):
    wrong, words = WRONG_ARRAYS[case]
    refused(InvalidArgumentError, wrong, *words)


WRONG_OPTIONS = {
    "layout": ({"layout": "BHSD"}, ["layout is unknown", "'BHSD'", '"HND" and "NHD"']),
    "layout None": ({"layout": None}, ["layout is unknown", "None"]),
    "align": ({"causal_align": "right"}, ["causal_align", "'right'", '"bottom_right"']),
    "backend": ({"backend": "gpu"}, ["backend is unknown", "'gpu'", '"auto"', '"cpu"', '"cuda"']),
    "causal": ({"causal": 1}, ["causal must be True or False", "got 1"]),
    "causal None": ({"causal": None}, ["causal must be True or False", "None"]),
    "causal text": ({"causal": "bottom_right"}, ["causal must be True or False"]),
    "return_lse": ({"return_lse": 1}, ["return_lse must be True or False"]),
    "return_stats": ({"return_stats": "yes"}, ["return_stats must be True or False"]),
    "check_numerics": ({"check_numerics": 0}, ["check_numerics must be True or False"]),
    "scale NaN": ({"sm_scale": nan}, ["sm_scale", "finite", "nan", "1 / sqrt(head_dim)"]),
    "scale inf": ({"sm_scale": -inf}, ["sm_scale", "finite", "-inf"]),
    "scale text": ({"sm_scale": "0.1"}, ["sm_scale", "'0.1'"]),
    "scale bool": ({"sm_scale": True}, ["sm_scale", "True"]),
    "scale complex": ({"sm_scale": np.complex64(1 + 2j)}, ["sm_scale", "1+2j"]),
    "scale array": ({"sm_scale": np.ones(2)}, ["sm_scale", "one finite number"]),
    "scale huge": ({"sm_scale": 10**400}, ["sm_scale"]),
    "policy class": ({"policy": TopCdf}, ["policy must be", "TopCdf, TopK or Dense"]),
    "policy text": ({"policy": "dense"}, ["policy must be", "'dense'"]),
    "policy heads": ({"policy": TopK([0.5] * 3)}, ["keep has 3 values for 4 query heads"]),
    "pv heads": ({"policy": Dense([1.0] * 5)}, ["pv_threshold has 5 values for 4 query heads"]),
    "sim heads": ({"policy": TopCdf(0.9, [0.5])}, ["sim_threshold has 1 values for 4"]),
    "lengths few": ({"seqlens_k": [90]}, ["seqlens_k has 1 lengths", "batch of 2"]),
    "lengths many": ({"seqlens_k": (1, 2, 3)}, ["seqlens_k has 3 lengths", "batch of 2"]),
    "length large": ({"seqlens_k": [90, 91]}, ["seqlens_k[1]", "got 91", "0 to 90"]),
    "length negative": ({"seqlens_k": np.array([-1, 5])}, ["seqlens_k[0]", "got -1", "0 to 90"]),
    "length huge": ({"seqlens_k": [10**30, 5]}, ["seqlens_k[0]", "out of range"]),
    "lengths float": ({"seqlens_k": [1.0, 2.0]}, ["seqlens_k[0]", "no whole number", "1.0"]),
    "lengths float array": ({"seqlens_k": np.ones(2)}, ["seqlens_k", "whole numbers", "float64"]),
    "lengths bool": ({"seqlens_k": [True, 2]}, ["seqlens_k[0]", "no whole number", "True"]),
    "lengths bool array": ({"seqlens_k": np.ones(2, bool)}, ["seqlens_k", "whole", "bool"]),
    "lengths 2-D": ({"seqlens_k": np.ones((2, 1), int)}, ["one dimension", "(2, 1)"]),
    "lengths nested": ({"seqlens_k": [[1], [2]]}, ["seqlens_k[0]", "[1]"]),
    "lengths int": ({"seqlens_k": 90}, ["seqlens_k", "sequence or an array", "90"]),
    "lengths text": ({"seqlens_k": "12"}, ["seqlens_k", "sequence or an array", "'12'"]),
    "map raw": ({"block_map": MASK}, ["block_map must be a BlockMap", "ndarray", "from_mask"]),
    "map q": (
        {"block_map": BlockMap.from_mask(MASK, seqlen_q=71, seqlen_k=90)},
        ["another seqlen_q", "got 71", "arrays have 70"],
    ),
    "map k": (
        {"block_map": BlockMap.from_mask(MASK, seqlen_q=70, seqlen_k=91)},
        ["another seqlen_k", "got 91", "arrays have 90"],
    ),
    "map heads": (
        {"block_map": BlockMap.from_mask(np.ones((1, 3, 1, 2), bool), seqlen_q=70, seqlen_k=90)},
        ["block_map is for", "3 heads", "1 or 4"],
    ),
    "map batch": (
        {"block_map": BlockMap.from_mask(np.ones((3, 1, 1, 2), bool), seqlen_q=70, seqlen_k=90)},
        ["block_map is for batch 3", "1 or 2"],
    ),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(case):
    options, words = WRONG_OPTIONS[case]
    refused(InvalidArgumentError, call(**options), *words)


WRONG_PACKED = {
    "start": (varlen(edges_q=[1, 70], edges_k=[0, 90]), ["cu_seqlens_q", "from 0", "70", "1 to"]),
    "total": (varlen(edges_k=[0, 40, 91]), ["cu_seqlens_k", "90", "0 to 91"]),
    "short": (varlen(edges_k=[0, 40, 80]), ["cu_seqlens_k", "90", "0 to 80"]),
    "falls": (
        varlen(edges_q=[0, 50, 30, 70], edges_k=[0, 1, 2, 90]),
        ["cu_seqlens_q falls", "50", "30"],
    ),
    "beyond": (varlen(edges_k=[0, 1000, 90]), ["cu_seqlens_k falls from 1000 to 90"]),
    "lengths": (varlen(edges_q=[0, 70]), ["cu_seqlens_q and cu_seqlens_k", "got 2 and 3"]),
    "empty": (varlen(edges_q=[], edges_k=[]), ["cu_seqlens_q", "no values"]),
    "None": (varlen(edges_q=None), ["cu_seqlens_q", "None"]),
    "float": (varlen(edges_q=np.array([0.0, 30, 70])), ["cu_seqlens_q", "whole numbers"]),
    "2-D": (varlen(edges_q=np.array([[0, 30, 70]])), ["cu_seqlens_q", "one dimension"]),
    "max q": (varlen(max_seqlen_q=39), ["max_seqlen_q", "40", "got 39"]),
    "max k": (varlen(max_seqlen_k=49), ["max_seqlen_k", "50", "got 49"]),
    "max float": (varlen(max_seqlen_q=70.0), ["max_seqlen_q", "70.0"]),
    "max array": (varlen(max_seqlen_k=np.array([90, 91])), ["max_seqlen_k"]),
    "max bool": (varlen(max_seqlen_k=True), ["max_seqlen_k", "True"]),
    "rank": (varlen(q=Q), ["q has 4 dimensions", "allowed 3", "(tokens, H, D)"]),
    "k and v": (varlen(v=PACKED["v"][:-1]), ["v has another shape than k"]),
}


@pytest.mark.parametrize("case", WRONG_PACKED)
def test_wrong_packed_calls(case):
    wrong, words = WRONG_PACKED[case]
    refused(InvalidArgumentError, wrong, *words)


@pytest.mark.parametrize("name", ["seqlens_k", "layout", "block_map"])
def test_packed_calls_have_no_such_argument(name):
    with pytest.raises(TypeError, match=name):
        varlen(**{name: None})()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"attn_mask": np.zeros((70, 90))}, ["attn_mask is not supported", "block_map"]),
        ({"attn_mask": True}, ["attn_mask is not supported", "True", "seqlens_k"]),
        ({"dropout_p": 0.1}, ["dropout_p is not supported", "0.1", "inference"]),
        ({"dropout_p": nan}, ["dropout_p is not supported", "nan"]),
    ],
)
def test_what_the_library_does_not_do(option, words):
    refused(UnsupportedError, call(**option), *words)
    refused(UnsupportedError, varlen(**option), *words)


def test_no_mask_and_no_dropout_are_what_everybody_gets(computes):
    want = call()()
    for dropout_p in (None, 0, 0.0, np.float32(0)):
        got = call(attn_mask=None, dropout_p=dropout_p)()
        assert (bits(got) == bits(want)).all()


@pytest.mark.parametrize("name", ["is_causal", "softmax_scale", "window_size"])
def test_unknown_keywords(name):
    for function in (call, varlen):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            function(**{name: None})()
    with pytest.raises(TypeError, match=name):
        predict_block_map(Q, K, **{name: None})


def test_host_arrays_have_no_cuda_backend():
    for wrong in (
        call(backend="cuda"),
        varlen(backend="cuda"),
        lambda: predict_block_map(Q, K, backend="cuda"),
    ):
        refused(DeviceError, wrong, "cuda", "host", '"cpu"')


def test_predict_block_map_checks_the_same():
    refused(InvalidArgumentError, lambda: predict_block_map(Q[0], K), "q has 3 dimensions")
    refused(InvalidArgumentError, lambda: predict_block_map(Q, K[:1]), "batch sizes")
    refused(InvalidArgumentError, lambda: predict_block_map(Q, K, seqlens_k=[1, 91]), "0 to 90")
    refused(InvalidArgumentError, lambda: predict_block_map(Q, K, policy="x"), "policy must be")


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_check_numerics_names_the_tensor(name, bad):
    arrays = {"q": Q.copy(), "k": K.copy(), "v": V.copy()}
    arrays[name][1, 1, 60, 3] = bad
    wrong = call(**arrays, check_numerics=True)
    refused(InvalidArgumentError, wrong, f"{name} holds", "NaN or an infinity", "60")
    packed = {key: array[1].swapaxes(0, 1) for key, array in arrays.items()}
    wrong = varlen(**packed, check_numerics=True)
    refused(InvalidArgumentError, wrong, f"{name} holds", "NaN or an infinity", "60")


# ---- torch, JAX, DLPack -------------------------------------------------------------------------


def test_mixed_frameworks(torch, jax):
    t, j = torch.from_numpy(K.copy()), jax.numpy.asarray(K)
    words = ["different frameworks", "q: numpy", "one framework"]
    refused(InvalidArgumentError, call(k=t), *words, "k: torch")
    refused(InvalidArgumentError, call(k=j, v=t), *words, "k: jax", "v: torch")


def test_torch_arguments_that_cannot_be_read(torch):
    q, k, v = (torch.from_numpy(array.copy()) for array in (Q, K, V))
    q8 = q.to(torch.float8_e4m3fn)
    no_memory = q.clone()
    no_memory.untyped_storage().resize_(0)
    meta = [x.to("meta") for x in (q, k, v)]
    refused(InvalidArgumentError, call(q8, k, v), "q has dtype float8_e4m3fn", "allowed float16")
    refused(InvalidArgumentError, call(q > 0, k, v), "q has dtype bool")
    refused(InvalidArgumentError, call(q, k.to(torch.complex64), v), "k has dtype complex64")
    refused(InvalidArgumentError, call(q, k, v.long()), "v has dtype int64")
    refused(InvalidArgumentError, call(q, k, v.bfloat16()), "different dtypes", "v: bfloat16")
    refused(InvalidArgumentError, call(q.to_sparse(), k, v), "q is not a strided", "to_dense")
    refused(InvalidArgumentError, call(no_memory, k, v), "q has shape", "no memory")
    refused(
        InvalidArgumentError,
        call(q.mT.contiguous().mT, k, v),
        "q's last dimension is not contiguous",
        "q.contiguous()",
    )
    refused(DeviceError, call(*meta), "meta", ".cpu()")
    refused(InvalidArgumentError, call(meta[0], k, v), "different devices", "q: meta", "k: cpu")
    refused(InvalidArgumentError, lambda: TopCdf(torch.ones(2, device="meta")), "cdf_threshold")
    lengths = torch.tensor([1.0, 2.0])
    refused(InvalidArgumentError, call(q, k, v, seqlens_k=lengths), "seqlens_k", "float32")
    lengths = torch.ones(2, dtype=torch.int32, device="meta")
    refused(InvalidArgumentError, call(q, k, v, seqlens_k=lengths), "seqlens_k is on meta")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients(torch, name):
    arrays = {"q": Q.copy(), "k": K.copy(), "v": V.copy()}
    arrays = {key: torch.from_numpy(array) for key, array in arrays.items()}
    arrays[name].requires_grad_()
    words = [f"{name} requires a gradient", "forward", "torch.no_grad()", f"{name}.detach()"]
    refused(UnsupportedError, call(**arrays), *words)
    with torch.no_grad(), pytest.raises(Computed):
        call(**arrays)()
    with pytest.raises(Computed):
        call(**{key: x.detach() for key, x in arrays.items()})()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_transformations_never_pass_in_silence(torch):
    q, k, v = (torch.from_numpy(array.copy()) for array in (Q, K, V))

    def of_q(q):
        return attention(q, k, v)

    forward = torch.autograd.forward_ad
    with forward.dual_level():
        refused(UnsupportedError, lambda: of_q(forward.make_dual(q, q)), "q carries", "primal")
    refused(UnsupportedError, lambda: torch.func.jvp(of_q, (q,), (q,)), "q ")
    refused(UnsupportedError, lambda: torch.func.grad(lambda q: of_q(q).sum())(q), "gradient")
    refused(UnsupportedError, lambda: torch.func.vmap(of_q)(q[None]), "q is a stand-in", "vmap")
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        made, stats = attention(fake, fake, fake, return_stats=True)  # traced, and not computed
        assert (made.shape, made.stride(), made.dtype) == (q.shape, q.stride(), q.dtype)
        assert isinstance(made, type(fake))
        refused(InvalidArgumentError, call(fake[0], fake, fake), "q has 3 dimensions")
        refused(UnsupportedError, lambda: stats.sparsity, "no values", "read them outside")


def test_jax_arguments_that_cannot_be_read(jax):
    q, k, v = (jax.numpy.asarray(array) for array in (Q, K, V))

    def of_q(q):
        return attention(q, k, v)

    words = ["an input requires a gradient", "forward pass only", "jax.lax.stop_gradient"]
    refused(UnsupportedError, lambda: jax.grad(lambda q: of_q(q).sum())(q), *words)
    refused(UnsupportedError, lambda: jax.jvp(of_q, (q,), (q,)), *words)
    refused(InvalidArgumentError, lambda: jax.jit(of_q)(q[0]), "q has 3 dimensions")
    refused(InvalidArgumentError, lambda: jax.vmap(of_q)(q), "q has 3 dimensions")
    gone = q + 0
    gone.delete()
    refused(InvalidArgumentError, call(gone, k, v), "q is a JAX array that has been deleted")
    refused(InvalidArgumentError, call(q, jax.random.key(0), v), "k cannot be exported")
    f8 = jax.numpy.float8_e4m3fn
    refused(InvalidArgumentError, call(q, k, v.astype(f8)), "v has dtype float8_e4m3fn", "float16")


def test_numbers_that_are_only_just_allowed(computes):
    lengths = range(40, 42)
    wanted = attention(Q, K, V, seqlens_k=[40, 41])
    for given in (lengths, np.array(lengths, np.uint8), tuple(lengths)):
        assert_close(attention(Q, K, V, seqlens_k=given), wanted)
    many = TopCdf(sink_blocks=10**30, local_blocks=2**63 - 1, sim_threshold=-1)
    assert_close(attention(Q, K, V, policy=many), attention(Q, K, V, policy=Dense()), atol=1e-6)
    assert cusparge.TopK(np.float64(1), sim_threshold=np.array(-1)).keep == 1.0
