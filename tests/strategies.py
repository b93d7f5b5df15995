"""Random attention problems, and plain statements of what every backend must do with them."""

import math
from dataclasses import dataclass, field

import numpy as np
from compare import visible
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import cusparge
from cusparge import reference

LENGTHS = (1, 2, 63, 64, 65, 127, 129, 191, 256, 300, 449, 515)
LONG = (128, 300, 515, 640, 1000, 1100)  # enough blocks for a choice
DIMS = (1, 8, 40, 64, 72, 128, 256)
ALIGNS = ("bottom_right", "top_left")

seeds = st.integers(0, 2**32 - 1)


def examples(count):
    """Hypothesis settings: no time limit per example, since two cores may be shared."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow, print_blob=True)


# ---- data ----------------------------------------------------------------------------------------


def clustered(rng, shape, noise=0.4, centers=None):
    """Return float32 tokens that come in runs around a few centres, and the centres.

    Blocks of such tokens are alike, so that the filter has something to choose; gaussian tokens
    would make every block a fix block.
    """
    batch, heads, tokens, dim = shape
    if centers is None:
        centers = rng.standard_normal((6, dim))
    run = int(rng.choice((50, 64, 128)))
    runs = np.repeat(rng.integers(0, len(centers), tokens // run + 1), run)[:tokens]
    x = 1.5 * centers[runs] + noise * rng.standard_normal((batch, heads, tokens, dim))
    return x.astype(np.float32), centers


def tokens(seed, batch, heads, heads_kv, seqlen_q, seqlen_k, dim, kind="clustered"):
    """Return q, k, v in float32; `kind` "grid" makes them multiples of 1/8 that bfloat16 holds."""
    rng = np.random.default_rng(seed)
    if kind == "gauss":
        q = rng.standard_normal((batch, heads, seqlen_q, dim), np.float32)
        k, v = rng.standard_normal((2, batch, heads_kv, seqlen_k, dim), np.float32)
        return q, k, v
    q, centers = clustered(rng, (batch, heads, seqlen_q, dim))
    k, _ = clustered(rng, (batch, heads_kv, seqlen_k, dim), centers=centers)
    v = rng.standard_normal((batch, heads_kv, seqlen_k, dim), np.float32)
    if kind == "grid":
        return tuple(np.clip(np.rint(x * 8) / 8, -7, 7) for x in (q, k, v))
    return q, k, v


@dataclass(frozen=True)
class Case:
    """One call: data and options."""

    seed: int
    batch: int = 1
    heads_kv: int = 1
    ratio: int = 1
    seqlen_q: int = 300
    seqlen_k: int = 300
    dim: int = 16
    kind: str = "clustered"
    options: dict = field(default_factory=dict)

    @property
    def heads(self):
        return self.heads_kv * self.ratio

    @property
    def arrays(self):
        shape = (self.batch, self.heads, self.heads_kv, self.seqlen_q, self.seqlen_k, self.dim)
        return tokens(self.seed, *shape, kind=self.kind)

    @property
    def allowed(self):
        return allowed_pairs(self.batch, self.seqlen_q, self.seqlen_k, **self.options)


@st.composite
def cases(draw, dims=(1, 8, 16, 40), kinds=("clustered", "gauss"), lengths=LENGTHS):
    """Draw a small problem with any mixture of causality, padding and grouped queries."""
    seqlen_k = draw(st.sampled_from(lengths if lengths is not LENGTHS else LENGTHS + LONG + LONG))
    batch = draw(st.integers(1, 2))
    options = {"causal": draw(st.booleans()), "causal_align": draw(st.sampled_from(ALIGNS))}
    if draw(st.booleans()):
        options["seqlens_k"] = [draw(st.integers(0, seqlen_k)) for _ in range(batch)]
    return Case(
        seed=draw(seeds),
        batch=batch,
        heads_kv=draw(st.integers(1, 2)),
        ratio=draw(st.sampled_from((1, 2, 3))),
        seqlen_q=draw(st.sampled_from(lengths)),
        seqlen_k=seqlen_k,
        dim=draw(st.sampled_from(dims)),
        kind=draw(st.sampled_from(kinds)),
        options=options,
    )


thetas = st.sampled_from((-1.0, -1.0, -1.0, 0.0, 0.2, 0.3, 0.4, 0.8, 1.0))


@st.composite
def policies(draw, heads, stage2=False, quantize=None):
    """Draw a policy of any kind, with one threshold or one per head (None: one only)."""

    def threshold(values):
        if heads is None:
            return draw(values)
        return draw(st.one_of(values, st.lists(values, min_size=heads, max_size=heads)))

    common = {"sink_blocks": draw(st.integers(0, 2)), "local_blocks": draw(st.integers(0, 2))}
    common["quantize"] = quantize
    if stage2:
        common["pv_threshold"] = threshold(st.sampled_from((0.0, 0.7, 3.1, 9.7, math.inf)))
    cdf, topk, dense = cusparge.TopCdf, cusparge.TopK, cusparge.Dense
    which = draw(st.sampled_from((cdf, cdf, topk, topk, dense)))
    if which is dense:
        return cusparge.Dense(**common)
    common["sim_threshold"] = threshold(thetas)
    shares = st.one_of(st.floats(0.01, 1), st.sampled_from((0.1, 0.3, 0.5, 0.7, 0.9)))
    if which is topk:
        return topk(threshold(shares), **common)
    rule = draw(st.sampled_from(("reach", "within")))
    return cdf(threshold(st.one_of(shares, st.just(0.0))), rule=rule, **common)


# ---- plain statements ----------------------------------------------------------------------------


def allowed_pairs(
    batch, seqlen_q, seqlen_k, causal=False, causal_align="bottom_right", seqlens_k=None
):
    """Return (batch, 1, seqlen_q, seqlen_k): which query may see which key."""
    lengths = [seqlen_k] * batch if seqlens_k is None else seqlens_k
    pairs = [
        visible(seqlen_q, seqlen_k, causal=causal, align=causal_align, length=n) for n in lengths
    ]
    return np.stack(pairs)[:, None]


def in_blocks(pairs, block_q=128, block_k=64):
    """Return which blocks hold at least one of the pairs."""
    *lead, rows, keys = pairs.shape
    padded = np.zeros((*lead, -(-rows // block_q) * block_q, -(-keys // block_k) * block_k), bool)
    padded[..., :rows, :keys] = pairs
    shape = (*lead, padded.shape[-2] // block_q, block_q, padded.shape[-1] // block_k, block_k)
    return padded.reshape(shape).any(axis=(-3, -1))


def in_tokens(mask, seqlen_q, seqlen_k, block_q=128, block_k=64):
    """Return the pairs of tokens that a block mask keeps."""
    rows = np.repeat(mask, block_q, axis=-2)[..., :seqlen_q, :]
    return np.repeat(rows, block_k, axis=-1)[..., :seqlen_k]


def is_near_tie(scores, policy, b, h, i, got, want):
    """Tell whether float32 means may decide this row otherwise: a tie within rounding."""
    if not hasattr(policy, "sim_threshold"):
        return False
    theta = np.broadcast_to(policy.sim_threshold, scores.sim_q.shape[1])[h]
    similar = np.append(scores.sim_k[b, h], scores.sim_q[b, h, i])
    if (np.abs(similar - theta) < 1e-5).any():
        return True
    candidates = scores.candidates[b, h, i]
    weights = scores.weights[b, h, i]
    swapped = weights[(got ^ want) & candidates]
    if not ((got ^ want) & ~candidates).any() and np.ptp(swapped) <= 2:
        return True
    if hasattr(policy, "keep"):
        return False
    tau = np.broadcast_to(policy.cdf_threshold, scores.sim_q.shape[1])[h]
    running = np.cumsum(np.sort(weights[candidates])[::-1]) / weights[candidates].sum()
    return bool((np.abs(running - tau) < 1e-5).any())


def without_ties(q, k, policy, options):
    """Return the options with the CPU's map in them where the oracle's differs.

    That happens where two scores tie within rounding, which test_filter.py looks into; the rest
    of the call can still be compared.
    """
    kept = cusparge.predict_block_map(q, k, policy=policy, **options)
    same = (kept.mask == reference.block_map(q, k, policy=policy, **options)).all()
    return options if same else options | {"block_map": kept}
