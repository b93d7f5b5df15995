"""Pooled blocks by themselves: on the host, and inside compiled functions."""

import numpy as np
import pytest
from compare import assert_close, assert_refused, assert_same_bits

from cusparge import DeviceError, InvalidArgumentError, UnsupportedError, reference
from cusparge.stage1 import PooledBlocks, pool_blocks


def expected(x, block, smooth):
    """Return mean, similarity and token mean of (B, H, S, D) by the float64 oracle."""
    batch, heads, tokens, head_dim = x.shape
    blocks = -(-tokens // block)
    mean = np.zeros((batch, heads, blocks, head_dim))
    similarity = np.ones((batch, heads, blocks))
    token_mean = np.zeros((batch, heads, head_dim))
    for b in range(batch):
        for h in range(heads):
            rows = x[b, h].astype(np.float64)
            if smooth:
                rows, token_mean[b, h] = reference.smooth_keys(rows)
            mean[b, h] = reference.pool_blocks(rows, block)
            similarity[b, h] = reference.self_similarity(rows, block)
    return mean, similarity, token_mean


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, 300])
@pytest.mark.parametrize("head_dim", [1, 40, 128])
def test_the_cpu_pools_what_the_oracle_says(rng, tokens, head_dim, smooth):
    x = (rng.standard_normal((2, 3, tokens, head_dim)) + 1).astype(np.float32)
    for block in (64, 128):
        got = pool_blocks(x, block=block, smooth=smooth)
        mean, similarity, token_mean = expected(x, block, smooth)
        # float32 sums of up to 300 numbers near 1.
        assert_close(got.mean, mean, atol=1e-5)
        if not smooth or tokens > 1:  # one token less its mean is rounding, and has no direction
            assert_close(got.similarity, similarity, atol=1e-4)
        if smooth:
            assert_close(got.token_mean, token_mean, atol=1e-5)
        else:
            assert got.token_mean is None


def test_edges_of_the_definition(rng):
    x = rng.standard_normal((1, 1, 256, 16)).astype(np.float32)
    x[0, 0, :64] = 0  # no direction at all
    x[0, 0, 64:128] = x[0, 0, 64]  # one direction
    x[0, 0, 130, 3] = np.nan
    got = pool_blocks(x, seqlens=[150])
    assert got.similarity[0, 0, 0] == 1
    assert_close(got.similarity[0, 0, 1], 1.0, atol=1e-5)
    assert got.similarity[0, 0, 2] == -1, "a NaN: always computed"
    assert np.isfinite(got.mean).all()
    assert got.similarity[0, 0, 3] == 1, "no real token"
    assert not got.mean[0, 0, 3].any()


@pytest.mark.parametrize(
    ("dtype", "small", "large"), [("float32", 0.1, 1e6), ("float16", 0.005, 6e4)]
)
def test_outliers_elsewhere_do_not_blur_a_block(rng, dtype, small, large):
    """What counts as rounding of the mean is measured by the mean, not by the largest token."""
    x = (small * rng.standard_normal((1, 1, 256, 64))).astype(dtype)
    x[0, 0, 0, 0], x[0, 0, 70, 0] = large, -large  # they cancel in the mean
    got = pool_blocks(x, smooth=True)
    _, similarity, _ = expected(x, 64, True)
    assert_close(got.similarity[0, 0, 2:], similarity[0, 0, 2:], atol=1e-3)
    assert similarity[0, 0, 2:].max() < 0.1


def test_identical_tokens_are_alike_once_the_mean_is_off(rng):
    x = np.broadcast_to(rng.standard_normal((1, 1, 1, 64)).astype(np.float32), (1, 1, 300, 64))
    assert (pool_blocks(x, smooth=True).similarity == 1).all()


@pytest.mark.filterwarnings("error")
def test_means_beyond_float32_become_its_largest_number():
    x = np.full((1, 1, 128, 8), 3.4e38, np.float32)
    x[:, :, 64:] *= -1
    got = pool_blocks(x, smooth=True)
    assert np.isfinite(got.mean).all()
    assert np.isfinite(got.similarity).all()
    wide = pool_blocks(np.full((1, 1, 64, 8), 1e300), smooth=True)
    assert (wide.token_mean == np.finfo(np.float32).max).all()


def test_the_module_is_an_attribute_of_the_package():
    import cusparge

    assert cusparge.stage1.pool_blocks is pool_blocks


def test_padding_and_layout_do_not_show(rng):
    x = rng.standard_normal((2, 3, 200, 32)).astype(np.float32)
    got = pool_blocks(x, smooth=True, seqlens=[70, 200])
    alone = pool_blocks(x[:1, :, :70], smooth=True)
    assert_same_bits(got.mean[:1, :, :2], alone.mean)
    assert_same_bits(got.token_mean[:1], alone.token_mean)
    other = pool_blocks(x.swapaxes(1, 2).copy(), smooth=True, seqlens=[70, 200], layout="NHD")
    assert_same_bits(other.mean, got.mean)


def test_wrong_arguments_are_named(rng):
    x = rng.standard_normal((2, 3, 200, 32)).astype(np.float32)
    assert_refused(InvalidArgumentError, lambda: pool_blocks(x, block=96), "block", "64 and 128")
    assert_refused(InvalidArgumentError, lambda: pool_blocks(x, smooth=None), "smooth", "bool")
    assert_refused(InvalidArgumentError, lambda: pool_blocks(x, layout="BSHD"), "layout", "NHD")
    assert_refused(InvalidArgumentError, lambda: pool_blocks(x[0]), "x has 3 dimensions")
    assert_refused(InvalidArgumentError, lambda: pool_blocks([1.0]), "x is not an array")
    assert_refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=[1, -1]), "seqlens[1]")
    assert_refused(InvalidArgumentError, lambda: pool_blocks(x.astype(int)), "x has dtype int64")


@pytest.mark.filterwarnings("default")  # torch's own, while it loads and traces
class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="needs torch")

    def test_compiled(self, torch, rng):
        x = torch.from_numpy(rng.standard_normal((2, 3, 200, 32)).astype(np.float32))
        lengths = torch.tensor([70, 200], dtype=torch.int32)

        def pooled(x, lengths):
            made = pool_blocks(2 * x, smooth=True, seqlens=lengths, block=128)
            plain = pool_blocks(x, seqlens=[70, 200])
            return made.mean, made.similarity, made.token_mean, plain.mean, plain.token_mean

        got = torch.compile(pooled, fullgraph=True, backend="aot_eager")(x, lengths)
        for a, b in zip(got, pooled(x, lengths), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

    def test_compiled_with_wrong_arguments(self, torch):
        x = torch.zeros(1, 1, 8, 8)

        def bad(x, **options):
            return pool_blocks(x, **options).mean

        for options, word in (({"smooth": 1}, "smooth"), ({"layout": "x"}, "layout")):
            with pytest.raises(Exception, match=word):
                torch.compile(bad, fullgraph=True, backend="eager")(x, **options)
        gradient = torch.zeros(1, 1, 8, 8, requires_grad=True)
        assert_refused(UnsupportedError, lambda: bad(gradient), "x requires a gradient")

    def test_recorded(self, torch, rng):
        x = torch.from_numpy(rng.standard_normal((1, 2, 200, 32)).astype(np.float32))
        traced = torch.jit.trace(lambda x: pool_blocks(x, smooth=True).mean, (torch.zeros_like(x),))
        assert torch.equal(traced(x), pool_blocks(x, smooth=True).mean)


class TestJax:
    @pytest.fixture
    def jax(self):
        return pytest.importorskip("jax", reason="needs jax")

    def test_jitted(self, jax, rng):
        x = jax.numpy.asarray(rng.standard_normal((2, 3, 200, 32)).astype(np.float32))

        @jax.jit
        def pooled(x, lengths):
            return pool_blocks(x, smooth=True, seqlens=lengths, layout="HND")

        got = pooled(x, jax.numpy.array([70, 200]))
        want = pool_blocks(np.asarray(x), smooth=True, seqlens=[70, 200])
        assert isinstance(got, PooledBlocks)
        assert isinstance(got.mean, jax.Array)
        for name in ("mean", "similarity", "token_mean"):
            assert_same_bits(np.asarray(getattr(got, name)), getattr(want, name))

    def test_lowered_for_a_gpu_it_is_one_callback_there(self, jax):
        x = jax.numpy.zeros((1, 2, 200, 64), jax.numpy.bfloat16)
        traced = jax.jit(lambda x: pool_blocks(x, smooth=True).mean).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("gpu_callback") == 1
        assert "cpu_callback" not in text

    def test_what_shapes_tell_is_refused_while_tracing(self, jax):
        x = jax.numpy.zeros((2, 1, 8, 8))
        for options, word in (
            ({"seqlens": jax.numpy.zeros(2)}, "seqlens"),
            ({"seqlens": jax.numpy.zeros(3, int)}, "(2,)"),
            ({"seqlens": [9, 1]}, "seqlens[0]"),
            ({"seqlens": np.array([1, 9])}, "seqlens[1]"),
            ({"layout": "?"}, "layout"),
        ):
            refused = jax.jit(lambda x, o=options: pool_blocks(x, **o).mean)
            assert_refused(InvalidArgumentError, lambda f=refused: f(x), word)

    @pytest.mark.parametrize("lengths", [[10**6, 1], [-1, 1]])
    def test_lengths_that_come_later_are_refused_on_the_host(self, jax, lengths):
        x = jax.numpy.zeros((2, 1, 8, 8))
        jitted = jax.jit(lambda x, n: pool_blocks(x, seqlens=n).mean)
        with pytest.raises(Exception, match=r"seqlens\[0\] is out of range"):
            jitted(x, jax.numpy.array(lengths)).block_until_ready()

    @pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int32"])
    def test_lengths_of_any_integer_dtype(self, jax, dtype):
        x = jax.numpy.ones((2, 1, 8, 8))
        got = jax.jit(lambda x, n: pool_blocks(x, seqlens=n).mean)(
            x, jax.numpy.array([3, 8], dtype)
        )
        assert_same_bits(np.asarray(got), pool_blocks(np.asarray(x), seqlens=[3, 8]).mean)


def test_other_devices_are_refused():
    torch = pytest.importorskip("torch", reason="needs torch")
    assert_refused(
        DeviceError, lambda: pool_blocks(torch.zeros(1, 1, 8, 8, device="meta")), "x", "meta"
    )
