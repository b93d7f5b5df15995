"""What callers inside jax.jit are told, while it traces wherever that is possible."""

import numpy as np
import pytest
from compare import assert_refused, assert_same_bits

from cusparge import (
    BlockMap,
    Dense,
    InvalidArgumentError,
    TopK,
    UnsupportedError,
    attention,
    attention_varlen,
    predict_block_map,
)

jax = pytest.importorskip("jax", reason="needs JAX")
jnp = jax.numpy

RNG = np.random.default_rng(3)  # what is computed does not matter here
Q, K, V = (
    jnp.asarray(RNG.standard_normal(shape, np.float32))
    for shape in ((2, 4, 300, 64), (2, 2, 260, 64), (2, 2, 260, 64))
)
PACKED = [x[0].swapaxes(0, 1) for x in (Q, K, V)]
EDGES = [0, 130, 300], [0, 90, 260]
MAP = predict_block_map(Q, K)


@pytest.mark.parametrize("transform", ["grad", "jit of grad", "jvp", "vjp", "linearize"])
def test_gradients_are_refused(transform):
    def loss(q):
        return attention(q, K, V).sum()

    rows = [x[0].swapaxes(0, 1) for x in (K, V)]
    others = {
        "varlen": lambda q: attention_varlen(q[0].swapaxes(0, 1), *rows, *EDGES).sum(),
        "predict": lambda q: predict_block_map(q, K).mask.sum() * 1.0,
    }
    run = {
        "grad": lambda f: jax.grad(f)(Q),
        "jit of grad": lambda f: jax.jit(jax.grad(f))(Q),
        "jvp": lambda f: jax.jvp(f, (Q,), (Q,)),
        "vjp": lambda f: jax.vjp(f, Q),
        "linearize": lambda f: jax.linearize(f, Q),
    }[transform]
    words = ["requires a gradient", "forward pass only", "jax.lax.stop_gradient"]
    for function in (loss, *(others.values() if transform == "grad" else ())):
        assert_refused(UnsupportedError, lambda f=function: run(f), *words)


def test_what_needs_no_gradient_may_pass_under_grad():
    def loss(q):
        return (attention(jax.lax.stop_gradient(q), K, V) * q).sum()

    assert_same_bits(jax.grad(loss)(Q), attention(Q, K, V))
    assert_same_bits(jax.jit(jax.grad(loss))(Q), attention(Q, K, V))
    assert_same_bits(
        jax.grad(lambda x: attention(Q, K, V)[0, 0, 0, 0] * x)(1.0), attention(Q, K, V)[0, 0, 0, 0]
    )


# ---- what is refused ----------------------------------------------------------------------------


def traced(function):
    return lambda: jax.jit(lambda q: function(q))(Q)


def packed(q, edges_q=EDGES[0], edges_k=EDGES[1], **options):
    return attention_varlen(q[0].swapaxes(0, 1), *PACKED[1:], edges_q, edges_k, **options)


WRONG = {
    "rank": (lambda q: attention(q[0], K, V), "q has 3 dimensions"),
    "dtypes": (lambda q: attention(q.astype("float16"), K, V), "different dtypes", "q: float16"),
    "integers": (lambda q: attention(*[q.astype(int)] * 3), "q has dtype int32"),
    "fp8": (lambda q: attention(*[q.astype("float8_e4m3fn")] * 3), "q has dtype float8_e4m3fn"),
    "heads": (lambda q: attention(q[:, :3], K, V), "no multiple", "got 3 and 2"),
    "NumPy": (lambda q: attention(q, np.asarray(K), V), "different frameworks", "k: numpy"),
    "layout": (lambda q: attention(q, K, V, layout="BHSD"), "layout is unknown"),
    "align": (lambda q: attention(q, K, V, causal_align="left"), "causal_align is unknown"),
    "causal": (lambda q: attention(q, K, V, causal=1), "causal must be True or False"),
    "return_lse": (lambda q: attention(q, K, V, return_lse=1), "return_lse must be True"),
    "backend": (lambda q: attention(q, K, V, backend="gpu"), "backend is unknown"),
    "scale": (lambda q: attention(q, K, V, sm_scale=np.inf), "sm_scale must be one finite"),
    "traced scale": (lambda q: attention(q, K, V, sm_scale=q[0, 0, 0, 0]), "sm_scale must be"),
    "traced keep": (lambda q: attention(q, K, V, policy=TopK(q[0, 0, 0, 0])), "keep cannot be"),
    "policy": (lambda q: attention(q, K, V, policy="dense"), "policy must be"),
    "policy heads": (lambda q: attention(q, K, V, policy=Dense([1.0] * 3)), "has 3 values"),
    "map": (lambda q: attention(q, K, V, block_map=q), "block_map must be a BlockMap"),
    "map lengths": (
        lambda q: attention(q[:, :, 1:], K, V, block_map=MAP),
        "another seqlen_q",
        "got 300",
    ),
    "length": (lambda q: attention(q, K, V, seqlens_k=[1, 261]), "seqlens_k[1]", "got 261"),
    "lengths": (lambda q: attention(q, K, V, seqlens_k=[1]), "seqlens_k has 1 lengths"),
    "float lengths": (lambda q: attention(q, K, V, seqlens_k=[1.5, 2]), "seqlens_k[0]", "1.5"),
    "float array": (lambda q: attention(q, K, V, seqlens_k=np.ones(2)), "seqlens_k", "float64"),
    "int lengths": (lambda q: attention(q, K, V, seqlens_k=5), "seqlens_k must be a sequence"),
    "text lengths": (lambda q: attention(q, K, V, seqlens_k="ab"), "seqlens_k must be a sequence"),
    "traced floats": (
        lambda q: attention(q, K, V, seqlens_k=q[:, 0, 0, 0]),
        "seqlens_k must hold whole numbers",
        "float32",
    ),
    "traced rank": (
        lambda q: attention(q, K, V, seqlens_k=jnp.ones((2, 1), int)),
        "seqlens_k must have one dimension",
    ),
    "traced count": (
        lambda q: attention(q, K, V, seqlens_k=jnp.ones(3, int)),
        "seqlens_k has 3 lengths for a batch of 2",
    ),
    "predict": (lambda q: predict_block_map(q, K, seqlens_k=[1, -1]), "seqlens_k[1]", "got -1"),
    "edges": (lambda q: packed(q, [0, 299], [0, 260]), "cu_seqlens_q must rise", "300"),
    "edges fall": (lambda q: packed(q, [0, 200, 100, 300]), "cu_seqlens_q falls"),
    "no edges": (lambda q: packed(q, None), "cu_seqlens_q must be a sequence", "None"),
    "empty edges": (lambda q: packed(q, [], []), "cu_seqlens_q", "no values"),
    "empty traced edges": (lambda q: packed(q, jnp.ones(0, int)), "cu_seqlens_q", "no values"),
    "edges differ": (
        lambda q: packed(q, jnp.array([0, 300])),
        "cu_seqlens_q and cu_seqlens_k speak of different batches",
    ),
    "traced edges": (lambda q: packed(q, q[0, 0, 0]), "cu_seqlens_q must hold whole numbers"),
    "packed policy": (lambda q: packed(q, policy=[1]), "policy must be"),
    "packed causal": (lambda q: packed(q, causal=1), "causal must be True or False"),
    "packed rank": (lambda q: attention_varlen(q, *PACKED[1:], *EDGES), "q has 4 dimensions"),
    "longest": (lambda q: packed(q, max_seqlen_k=169), "max_seqlen_k", "170", "got 169"),
    "traced longest": (
        lambda q: packed(q, jnp.array(EDGES[0]), max_seqlen_q=[300]),
        "max_seqlen_q must be",
        "[300]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_while_tracing(case):
    function, *words = WRONG[case]
    assert_refused(InvalidArgumentError, traced(function), *words)


def test_values_and_masks_that_come_later():
    words = ["no values", "read them outside"]
    stats_of = lambda q: attention(q, K, V, return_stats=True)[1]  # noqa: E731
    assert_refused(UnsupportedError, traced(lambda q: stats_of(q).sparsity), *words)
    assert_refused(UnsupportedError, traced(lambda q: repr(stats_of(q))), *words)
    assert_refused(UnsupportedError, traced(lambda q: predict_block_map(q, K).sparsity), *words)
    from_mask = traced(lambda q: BlockMap.from_mask(q > 0, seqlen_q=38400, seqlen_k=4096))
    assert_refused(UnsupportedError, from_mask, "mask stands for values that come later")
    mask = traced(lambda q: attention(q, K, V, attn_mask=q))
    assert_refused(UnsupportedError, mask, "attn_mask is not supported")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda q, n: attention(q, K, V, seqlens_k=n), "seqlens_k[1] is out of range: got 999"),
        (lambda q, n: packed(q, n), "cu_seqlens_q must rise from 0 to the number of tokens, 300"),
        (lambda q, n: attention(q * np.nan, K, V, check_numerics=True), "q holds a NaN"),
        (lambda q, n: attention(q, K, V, backend="cuda"), 'backend="cuda" was asked for host'),
    ],
)
def test_errors_of_values_carry_our_words(function, words, caplog):
    lengths = jnp.array([0, 999] if "seqlens_k" in words and "cu_" not in words else [0, 5, 999])
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.block_until_ready(jax.jit(function)(Q, lengths))
    assert words in str(raised.value)
