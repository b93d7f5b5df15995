"""What torch's compilers are told of a call: errors, gradients, fake tensors, exported programs."""

import math
import warnings

import numpy as np
import pytest
from compare import assert_refused, assert_same_bits
from torch_tools import (  # noqa: F401 the fixture is used by its name
    FINE,
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
    randn,
)

from cusparge import (
    BlockMap,
    Dense,
    InvalidArgumentError,
    TopCdf,
    TopK,
    UnsupportedError,
    attention,
    attention_varlen,
    predict_block_map,
)

torch = pytest.importorskip("torch", reason="needs torch")

# torch warns while it loads its compilers and traces; our own warnings stay errors.
pytestmark = pytest.mark.filterwarnings("default", "error:::cusparge")


def operators(graph):
    return [str(node.target) for node in graph.nodes if "cusparge" in str(node.target)]


# ---- what is refused ----------------------------------------------------------------------------


def refused(function, *words):
    """A compiled function is refused in our words; the class is torch's where it traces."""
    with pytest.raises(Exception, match=r".") as raised:
        compiled(function, "eager")()
    # What follows quotes the source of this file, the words included.
    text = str(raised.value).partition("from user code")[0].replace("\\", "")
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} missing in: {text}"


REFUSED = {
    "rank": (lambda: attention(Q[0], K, V), "q has 3 dimensions"),
    "dtypes": (lambda: attention(Q, K.half(), V), "different dtypes", "k: float16"),
    "batch": (lambda: attention(Q[:1], K, V), "different batch sizes", "q (1, 4, 300, 64)"),
    "strides": (lambda: attention(Q.mT.contiguous().mT, K, V), "q's last dimension is not"),
    "list": (lambda: attention(Q, [1], V), "k is not a tensor", "list"),
    "NumPy": (lambda: attention(Q, K, V.numpy()), "v is a NumPy array", "torch.from_numpy(v)"),
    "layout": (lambda: attention(Q, K, V, layout="BHSD"), "layout is unknown", "BHSD"),
    "align": (lambda: attention(Q, K, V, causal_align="left"), "causal_align is unknown"),
    "backend": (lambda: attention(Q, K, V, backend="gpu"), "backend is unknown", "gpu"),
    "cuda": (lambda: attention(Q, K, V, backend="cuda"), "cuda", "host"),
    "causal": (lambda: attention(Q, K, V, causal=1), "causal must be True or False", "got 1"),
    "no flag": (lambda: attention(Q, K, V, causal=None), "causal must be True or False"),
    "tensor flag": (lambda: attention(Q, K, V, causal=Q[0, 0, 0, 0] > 0), "causal must be True"),
    "NaN": (
        lambda: attention(Q, K * math.nan, V, check_numerics=True),
        "k holds a NaN or an infinity",
    ),
    "scale": (lambda: attention(Q, K, V, sm_scale=math.nan), "sm_scale must be one finite", "nan"),
    "scale text": (lambda: attention(Q, K, V, sm_scale="1"), "sm_scale must be one finite", "'1'"),
    "policy": (lambda: attention(Q, K, V, policy="dense"), "policy must be a TopCdf"),
    "keep": (lambda: attention(Q, K, V, policy=TopK(1.5)), "keep is out of range", "got 1.5"),
    "policy heads": (lambda: attention(Q, K, V, policy=TopK([0.5] * 3)), "keep has 3 values"),
    "mask": (lambda: attention(Q, K, V, attn_mask=Q), "attn_mask is not supported", "block_map"),
    "dropout": (lambda: attention(Q, K, V, dropout_p=0.1), "dropout_p is not supported"),
    "keyword": (lambda: attention(Q, K, V, is_causal=True), "is_causal", "called causal"),
    "map": (lambda: attention(Q, K, V, block_map=Q), "block_map must be a BlockMap", "Tensor"),
    "map lengths": (
        lambda: attention(Q[:, :, :100], K, V, block_map=MAP),
        "another seqlen_q",
        "got 300",
    ),
    "length": (lambda: attention(Q, K, V, seqlens_k=[1, 261]), "seqlens_k[1]", "got 261"),
    "lengths": (lambda: attention(Q, K, V, seqlens_k=[1]), "seqlens_k has 1 lengths"),
    "float lengths": (lambda: attention(Q, K, V, seqlens_k=[1, 2.5]), "seqlens_k[1]", "2.5"),
    "bool lengths": (lambda: attention(Q, K, V, seqlens_k=[True, 2]), "seqlens_k[0]", "True"),
    "int lengths": (lambda: attention(Q, K, V, seqlens_k=5), "seqlens_k must be a sequence"),
    "predict": (lambda: predict_block_map(Q, K, seqlens_k=[0, -1]), "seqlens_k[1]", "got -1"),
    "edges": (lambda: attention_varlen(*PACKED, [0, 299], [0, 260]), "cu_seqlens_q", "300"),
    "no edges": (lambda: attention_varlen(*PACKED, [0, 300], None), "cu_seqlens_k", "None"),
    "empty edges": (lambda: attention_varlen(*PACKED, [], []), "cu_seqlens_q", "no values"),
    "longest": (
        lambda: attention_varlen(*PACKED, [0, 300], [0, 260], max_seqlen_k=259),
        "max_seqlen_k must be at least the longest sequence, 260",
    ),
    "float longest": (
        lambda: attention_varlen(*PACKED, [0, 300], [0, 260], max_seqlen_q=300.5),
        "max_seqlen_q must be",
        "300.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_named(case):
    refused(*REFUSED[case])


def test_without_a_whole_graph_the_error_is_ours():
    def lazily(function):
        return lambda: torch.compile(function, backend="eager")()

    wrong = lazily(lambda: attention(Q, K, V, causal=1))
    assert_refused(InvalidArgumentError, wrong, "causal must be True or False")
    x = np.ones((1, 1, 70, 8), np.float32)
    assert_same_bits(lazily(lambda: attention(x, x, x))(), x)  # NumPy in, NumPy out
    with torch.enable_grad():
        q = Q.clone().requires_grad_()
        wrong = lazily(lambda: attention(q, K, V))
        assert_refused(UnsupportedError, wrong, "q requires a gradient", "q.detach()")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_in_front(name):
    arrays = {"q": Q.clone(), "k": K.clone(), "v": V.clone()}
    arrays[name].requires_grad_()
    rows = {key: x[0].transpose(0, 1) for key, x in arrays.items()}
    words = [f"{name} requires a gradient", "torch.no_grad()", f"{name}.detach()"]
    calls = {"attention": lambda: attention(*(x * 2 for x in arrays.values()))}
    if name == "v":
        calls["varlen"] = lambda: attention_varlen(*rows.values(), [0, 300], [0, 260])
    if name == "q":
        calls["predict"] = lambda: predict_block_map(arrays["q"], arrays["k"]).mask
    for call in calls.values():
        with torch.enable_grad():
            refused(call, *words)
    compiled(calls["attention"])()  # no_grad is on here
    with torch.inference_mode():
        compiled(calls["attention"])()

    def inside(x, *rest):
        with torch.no_grad():
            out = attention(x, *rest)
        return out + attention(x.detach(), *(y.detach() for y in rest))

    with torch.enable_grad():
        made = compiled(inside)(*arrays.values())
    assert_equal(made, inside(Q, K, V))
    assert not made.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_transformations_never_pass_in_silence():
    def of_q(q):
        return attention(q, K, V)

    func = torch.func
    words = ["vmap", "cusparge cannot be called"]
    for function, expected in (
        (lambda: func.grad(lambda q: of_q(q).sum())(Q), "requires a gradient"),
        (lambda: func.jvp(of_q, (Q,), (Q,)), "q "),
        (lambda: func.vmap(of_q)(Q[None]), "cusparge cannot be called inside torch.func.vmap"),
    ):
        with torch.enable_grad():
            refused(function, expected)
            with pytest.raises(UnsupportedError):
                function()
    assert_refused(UnsupportedError, lambda: func.vmap(of_q)(Q[None]), *words)
    options = ("dense", [], [], [], 0, 0, 0, None, False, "bottom_right", None)
    operator = torch.ops.cusparge.attention

    def raw(q):
        return operator(q, K, V, None, None, None, *options, "HND", None, None, False, "auto")[0]

    assert_equal(raw(Q), attention(Q, K, V, policy=Dense()))
    assert_refused(UnsupportedError, lambda: func.vmap(raw)(Q[None]), *words)
    with torch.enable_grad():
        wrong = Q.clone().requires_grad_()
        assert_refused(UnsupportedError, lambda: raw(wrong), "q requires a gradient")


# ---- other tracers ------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        policy = TopCdf(0.7, [0.1, 0.2, -1, 0.4], 3.0)
        return attention(q, k, v, causal=True, policy=policy, return_lse=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(
        Model(), (Q, K, V), strict=strict, dynamic_shapes=({2: length}, None, None)
    )
    assert operators(exported.graph) == ["cusparge.attention.default"]
    assert operators(exported.run_decompositions().graph) == ["cusparge.attention.default"]
    for q in (Q, randn(2, 4, 77, 64)):
        assert_equal(exported.module()(q, K, V), Model()(q, K, V))
    with torch.enable_grad():
        q = Q.clone().requires_grad_()
        with pytest.raises(Exception, match="q requires a gradient"):
            torch.export.export(Model(), (q, K, V), strict=strict)


def test_recorded_graphs_hold_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(q, k, v):
        return attention(q, k, v, policy=TopK(KEEP)) + 1

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(Q, K, V)
        assert operators(graph.graph) == ["cusparge.attention.default"]
        assert_equal(graph(Q * 2, K, V), function(Q * 2, K, V))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(function, (Q, K, V))
    assert_equal(traced(Q * 2, K, V), function(Q * 2, K, V))


def check_operators(function):
    """Hand every call of our operators in `function` to torch's own checks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "cusparge":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Record():
        function()
    for call in calls:
        outcome = torch.library.opcheck(*call)
        assert set(outcome.values()) == {"SUCCESS"}
    return [str(call[0]) for call in calls]


def test_the_operators_pass_torchs_own_checks():
    def function():
        attention(Q, K, V, policy=POLICY, seqlens_k=torch.tensor(LENGTHS), sm_scale=0.1)
        attention(*(x.transpose(1, 2) for x in (Q, K, V)), layout="NHD", seqlens_k=LENGTHS)
        attention(Q, K, V, block_map=FINE)
        attention_varlen(*PACKED, [0, 100, 300], [0, 90, 260], causal=True)
        attention_varlen(*PACKED, torch.tensor([0, 300]), torch.tensor([0, 260]))
        predict_block_map(Q, K, policy=TopK([0.1, 0.2, 0.3, 0.4]))

    made = check_operators(function)
    names = ["attention"] * 3 + ["attention_varlen"] * 2 + ["predict_block_map"]
    assert made == [f"cusparge.{name}.default" for name in names]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fake_tensors(device, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def describe(x):
        return tuple(x.shape), x.stride(), str(x.dtype)

    def everything(q, k, v, edges):
        out, lse, stats = attention(q, k, v, return_lse=True, return_stats=True)
        made = predict_block_map(q, k)
        nhd = attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="NHD")
        rows = [x.select(0, 0).transpose(0, 1) for x in (q, k, v)]
        packed = attention_varlen(*rows, edges, edges, return_lse=True, return_stats=True)
        lists = attention_varlen(*rows, [0, 130, 300], [0, 130, 300])
        kept = attention(q, k, v, block_map=made)
        stacked = [
            x.source if isinstance(x.source, torch.Tensor) else torch.as_tensor(x.counts.stacked())
            for x in (stats, packed[2])
        ]
        return [out, lse, stacked[0], made.mask, nhd, *packed[:2], stacked[1], lists, kept]

    shapes = [(2, 4, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64)]
    dtype = getattr(torch, dtype)
    real = everything(
        *(randn(*shape, dtype=dtype) for shape in shapes), torch.tensor([0, 130, 300])
    )
    with FakeTensorMode():
        arrays = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        edges = torch.empty(3, dtype=torch.int32, device=device)
        fake = everything(*arrays, edges)
        stats = attention(*arrays, return_stats=True)[1]
        made = predict_block_map(*arrays[:2])
        flat = arrays[0].select(0, 0)
        assert_refused(InvalidArgumentError, lambda: attention(flat, *arrays[1:]), "q has 3")
        mask = torch.ones((1, 1, 3, 5), dtype=torch.bool)
    assert [describe(x) for x in fake] == [describe(x) for x in real]
    assert {x.device.type for x in fake} == {device}
    for read in (lambda: stats.sparsity, lambda: made.sparsity, lambda: repr(made)):
        assert_refused(UnsupportedError, read, "no values", "read them outside")
    wrong = lambda: BlockMap.from_mask(mask, seqlen_q=300, seqlen_k=300)  # noqa: E731
    assert_refused(UnsupportedError, wrong, "mask stands for values that come later")
