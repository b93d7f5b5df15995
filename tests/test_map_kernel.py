"""The kernels of block_map.cu on the host: every map against an oracle (host-emulated)."""

import math

import map_cases
import map_oracle
import numpy as np
import pytest
from host_cuda import emu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from map_cases import Case

from cusparge import reference
from cusparge._cuda import block_map, params, variants
from cusparge.policy import TopCdf, TopK

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

KERNELS = emu.KERNELS
#: Written by several blocks of threads, and read before: they are not for one launch to fill.
SHARED = ("items", "class_counts", "ticket")


def emulate(plan, arrays, outputs, *, folder=KERNELS, schedule="eager", seed=0):
    """Run a plan's launches; the outputs are written in place."""
    for launch in plan.launches:
        wrapped = {name: emu.In(array) for name, array in arrays.items()}
        for name, array in outputs.items():
            wrapped[name] = emu.InOut(array) if name in SHARED else emu.Out(array)
        names = [(8 * i, name) for i, name in enumerate(launch.pointers) if name != params.NULL]
        emu.launch_params(
            folder / launch.variant.file,
            launch.variant.expression,
            launch.grid,
            launch.block,
            launch.params,
            {at: wrapped[name] for at, name in names if wrapped[name].array.size},
            smem_bytes=launch.shared_bytes,
            schedule=schedule,
            seed=seed,
        )


def expressions(wanted):
    """Return the kernels for these (head_dim, rows), and all others."""
    given = [one.expression for one in variants.all_variants("sm_80") if one.file == "block_map.cu"]
    chosen = {f"cusparge::choose_blocks<cusparge::MapConfig{{{d}, {r}}}>" for d, r in wanted}
    return [text for text in given if text in chosen or "choose_blocks" not in text]


@pytest.fixture(scope="module", autouse=True)
def built():
    """Most kernels in one build: it is quicker than one by one."""
    if emu.MISSING is None:
        wanted = [(64, 8), (64, 4), (64, 2), (64, 1), (128, 8), (128, 2), (256, 4), (256, 1)]
        emu.build(KERNELS / "block_map.cu", *expressions(wanted))


@pytest.mark.parametrize("case", map_cases.CASES, ids=str)
def test_matches_the_oracle(case, rng):
    assert map_oracle.problems(case, rng, emulate) == []


@pytest.mark.parametrize("case", map_cases.GIVEN, ids=str)
def test_a_given_mask_is_taken_as_it_is(case, rng):
    assert map_oracle.given_problems(case, rng, emulate) == []


def test_random_cases_match_the_oracle(rng):
    for _ in range(60):
        case = map_cases.random_case(rng)
        assert map_oracle.problems(case, rng, emulate) == []


@pytest.mark.slow
def test_the_other_kernels_match_the_oracle(rng):
    kernels = [(128, 4), (128, 1), (256, 2)]
    emu.build(KERNELS / "block_map.cu", *expressions(kernels))
    for (head_dim, rows), fill in zip(kernels * 6, map_cases.FILLS * 3, strict=True):
        size = int(rng.integers(head_dim // 2 + 1, head_dim + 1))
        case = Case((1, 4, 2, 600, 5000, size), rows=rows, fill=fill, sim=0.2, align="bottom_right")
        assert map_oracle.problems(case, rng, emulate) == []


@pytest.mark.parametrize("rows", [8, 2])
def test_results_do_not_depend_on_the_order_of_threads(rows, rng, seed):
    case = Case((1, 3, 1, 700, 3000, 24), "within", 0.6, fill="bad", rows=rows, mask=True)
    arrays = map_cases.inputs(case, rng)
    results = []
    for schedule, number in (("eager", 0), ("random", 0), ("random", 1), ("random", 2)):

        def run(plan, arrays, outputs, schedule=schedule, number=number):
            emulate(plan, arrays, outputs, schedule=schedule, seed=seed[0] + number)
            results.append({name: array for name, array in outputs.items() if name != "items"})

        assert map_oracle.problems_with(case, arrays, run) == []
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_a_queue_that_another_kernel_has_cleared_takes_one_launch(rng):
    case = Case((1, 2, 1, 700, 3000, 24), align="bottom_right")
    arrays = map_cases.inputs(case, rng)
    two, one = case.plan(), case.plan(queue_is_clear=True)
    assert [len(plan.launches) for plan in (two, one)] == [2, 1]
    outputs = map_oracle.poisoned(one)
    outputs["class_counts"][...] = 0
    outputs["ticket"][...] = 0
    emulate(one, arrays, outputs)
    counts = map_oracle.oracle(case, arrays)[0].sum(axis=1)
    assert map_oracle.queue_problems(outputs, counts) == []


# ---- the choice alone, on given scores ----------------------------------------------------------

#: Whole 64ths, many of them equal: scores in log2 units, exact in float32.
SIXTY_FOURTHS = st.lists(
    st.one_of(st.sampled_from([0, -1, 64, -640]), st.integers(-2000, 300)), min_size=1, max_size=150
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=SIXTY_FOURTHS,
    rule=st.sampled_from(map_cases.RULES),
    share=st.one_of(st.sampled_from([1e-9, 0.5, 0.75, 1.0]), st.floats(0.01, 1.0)),
    rows=st.sampled_from([8, 1]),
)
def test_the_choice_keeps_what_its_rule_says(scores, rule, share, rows):
    sharpness = np.exp2(-np.arange(8)).astype(np.float32)  # of the eight rows
    z = np.array(scores, np.float32) / 64
    case = Case((1, 1, 1, 8 * 128, 64 * len(z), 1), rule, share, scale=1.0, rows=rows, queue=False)
    arrays = {
        "q_mean": sharpness,
        "q_similarity": np.ones(8, np.float32),
        "k_mean": z,
        "k_similarity": np.ones(len(z), np.float32),
    }
    plan = case.plan()
    outputs = map_oracle.poisoned(plan)
    emulate(plan, arrays, outputs)
    for row, keep in enumerate(map_oracle.unpacked(outputs["bits"], len(z))):
        weights = map_oracle.weights_of(z * sharpness[row])
        kept, dropped = weights[keep], weights[~keep]
        assert kept.size >= 1, "every query block keeps at least one key block"
        assert z[outputs["first"].ravel()[row]] == z.max()
        if dropped.size:
            assert kept.min() >= dropped.max(), "dropped a heavier block than one it kept"
            tied = np.flatnonzero(weights == kept.min())
            assert keep[tied].tolist() == sorted(keep[tied], reverse=True), "a tie goes to the left"
        bar = share * float(weights.sum())
        if rule == "topk":
            assert kept.size == reference.top_k_count(len(z), share)
        elif share == 1:
            assert not dropped.size
        elif rule == "reach":
            assert kept.sum() >= bar, "one block too few"
            assert kept.size == 1 or kept.sum() - kept.min() < bar, "one block too many"
        else:
            assert kept.size == 1 or kept.sum() <= bar, "one block too many"
            assert kept.sum() + dropped.max(initial=2**62) > bar, "one block too few"


COUNTS = """
#include "cusparge/select.cuh"
namespace cusparge {
struct CountParams { u32* counts; double keep; };
template <int kThreads> CS_KERNEL void count_kept(const CountParams params) {
  const u32 i = ptx::block_x() * kThreads + ptx::thread_x();
  params.counts[i] = static_cast<u32>(top_k_count(params.keep, static_cast<s32>(i) + 1));
}
}
"""


def test_top_k_counts_are_the_oracles(rng, tmp_path):
    (tmp_path / "counts.cu").write_text(COUNTS)
    whole = [k / n for n in rng.integers(2, 60, 4) for k in [int(rng.integers(1, n))]]
    for keep in (0.1, 0.3, 0.7, 1.0, 1e-6, 5e-324, *whole, *rng.random(3)):
        counts = np.zeros(16384, np.uint32)
        numbers = bytes(8) + np.float64(keep).tobytes()
        kernel = "cusparge::count_kept<256>"
        emu.launch_params(tmp_path / "counts.cu", kernel, 64, 256, numbers, {0: emu.Out(counts)})
        expected = [reference.top_k_count(n, keep) for n in range(1, 16385)]
        np.testing.assert_array_equal(counts, expected)


# ---- the reader of the queue -------------------------------------------------------------------

READER = """
#include "cusparge/queue.cuh"
namespace cusparge {
struct ReaderParams { const u32* class_counts; const u32* items; u32* rows; u32 num_rows; };
template <int kThreads> CS_KERNEL void read_queue(const ReaderParams params) {
  const WorkQueue queue(params.class_counts, params.items, params.num_rows);
  for (u32 ticket = 0; ticket < params.num_rows; ++ticket) {
    const u32 row = queue.row(ticket);
    if (ptx::lane_id() == ticket % kThreads) params.rows[ticket] = row;
  }
}
struct ClassParams { const u32* counts; u32* classes; };
template <int kThreads> CS_KERNEL void classify(const ClassParams params) {
  const u32 i = ptx::block_x() * kThreads + ptx::thread_x();
  params.classes[i] = class_of(params.counts[i]);
}
}
"""


def test_tickets_go_through_the_classes(rng, tmp_path):
    (tmp_path / "reader.cu").write_text(READER)
    for _ in range(5):
        filled = rng.random(32) < rng.choice([0.05, 0.4, 1.0])
        filled[rng.integers(32)] = True
        per_class = (rng.integers(1, 9, 32) * filled).astype(np.uint32)
        total = int(per_class.sum())
        items = np.full((32, total), map_oracle.POISON, np.uint32)
        order = rng.permutation(total).astype(np.uint32)
        ends = np.cumsum(per_class)
        for c in range(32):
            items[c, : per_class[c]] = order[ends[c] - per_class[c] : ends[c]]
        rows = np.zeros(total, np.uint32)
        pointers = {0: emu.In(per_class), 8: emu.In(items), 16: emu.Out(rows)}
        numbers = bytes(24) + np.uint64(total).tobytes()
        kernel = "cusparge::read_queue<32>"
        emu.launch_params(tmp_path / "reader.cu", kernel, 1, 32, numbers, pointers)
        np.testing.assert_array_equal(rows, order)


def test_classes_are_half_octaves(tmp_path):
    (tmp_path / "reader.cu").write_text(READER)
    least = [1, 2, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]  # of a class and of all below it
    counts = np.concatenate([np.arange(128), 2 ** np.arange(7, 32), [2**32 - 1]]).astype(np.uint32)
    counts = np.concatenate([counts, np.zeros(-len(counts) % 32, np.uint32)])
    classes = np.zeros_like(counts)
    pointers = {0: emu.In(counts), 8: emu.Out(classes)}
    kernel = "cusparge::classify<32>"
    grid = len(counts) // 32
    emu.launch_params(tmp_path / "reader.cu", kernel, grid, 32, bytes(16), pointers)
    expected = 31 - np.searchsorted(least, counts[:128], side="right")
    np.testing.assert_array_equal(classes[:128], expected)
    assert (np.diff(classes[: 128 + 26].astype(int)) <= 0).all()
    assert classes[128 + 25] == 0


# ---- the rules of the package's oracle ---------------------------------------------------------

#: Scores are sums of float32 products over up to 64 channels, of magnitudes up to about 100.
SCORE_ERROR = 1e-4


def judge(policy, scores, chosen, at):
    """Return what is wrong with a row, apart from what a score's rounding may change."""
    seen, forced = scores.reachable[at], scores.forced[at]
    candidates = scores.candidates[at]
    if (chosen & ~seen).any() or (~chosen & seen & (forced | ~candidates)).any():
        return ["a block that is out of sight, or not one that has to be taken"]
    if scores.takes_all[at]:
        return []
    weights = scores.weights[at].astype(np.float64)
    off = np.where(candidates, 2 * SCORE_ERROR * weights + 1, 0)
    free = candidates & ~forced
    taken, left = free & chosen, free & ~chosen
    found = []
    if taken.any() and left.any():
        if ((weights + off)[taken].min() < (weights - off)[left]).any():
            found.append("a lighter block goes before a heavier one")
    total = weights.sum()
    if isinstance(policy, TopK):
        wanted = reference.top_k_count(int(seen.sum()), policy.keep) - int(forced.sum())
        if taken.sum() != min(max(wanted, 0), free.sum()):
            found.append(f"{taken.sum()} blocks where {wanted} are wanted")
        return found
    bar, slack = policy.cdf_threshold * total, 2 * SCORE_ERROR * total + len(weights)
    heaviest_left = (weights * (candidates & ~chosen)).max()
    if ((weights - off)[left] > weights[candidates & chosen].max(initial=-1.0)).any():
        found.append("the heaviest block is missing")
    lightest = weights[taken].min(initial=np.inf)
    before_left = weights[candidates & chosen & (weights + off >= heaviest_left)].sum()
    before_taken = weights[candidates & (weights - off > lightest)].sum()
    if policy.rule == "reach":
        too_few = left.any() and not before_left >= bar - slack
        too_many = taken.any() and not before_taken <= bar + slack
    else:
        too_few = left.any() and not before_left + heaviest_left >= bar - slack
        too_many = taken.sum() > 1 and not before_taken + lightest <= bar + slack
    return found + ["too few blocks"] * int(too_few) + ["too many"] * int(too_many)


POLICIES = [
    TopCdf(0.9, -1.0),
    TopCdf(0.6, 0.3, sink_blocks=1),
    TopCdf(0.8, 0.3, rule="within", local_blocks=2),
    TopK(0.3),
    TopK(0.5, 0.3, sink_blocks=1, local_blocks=1),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("align", map_cases.ALIGNS)
def test_agrees_with_the_package_oracle(policy, align, rng):
    """From tokens: the oracle pools them in float64, the kernels get its float32."""
    batch, heads_q, heads_k, head_dim = 2, 4, 2, 40
    seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 1300, 2))
    lengths = [seqlen_k, int(rng.integers(0, seqlen_k + 1))]
    drift = np.cumsum(rng.normal(size=(batch, heads_k, seqlen_k, head_dim)), axis=2) / 8
    k = drift + rng.normal(size=drift.shape)
    q = np.cumsum(rng.normal(size=(batch, heads_q, seqlen_q, head_dim)), axis=2) / 8
    if seqlen_k > 70:
        k[0, 0, 65] = np.nan
    options = {"causal": align is not None, "causal_align": align or "bottom_right"}
    options["seqlens_k"] = lengths
    scores = reference.block_scores(q, k, policy=policy, **options)

    blocks_k = math.ceil(seqlen_k / 64)
    pooled = np.zeros((batch, heads_k, blocks_k, head_dim), np.float32)
    alike = np.ones((batch, heads_k, blocks_k), np.float32)
    for b, h in np.ndindex(batch, heads_k):
        smoothed, _ = reference.smooth_keys(k[b, h, : lengths[b]])
        real = math.ceil(lengths[b] / 64)
        pooled[b, h, :real] = reference.pool_blocks(smoothed, 64)
        alike[b, h, :real] = reference.self_similarity(smoothed, 64)
        bad = np.isnan(k[b, h, : lengths[b]]).any(axis=1)
        alike[b, h, np.flatnonzero(bad) // 64] = -1
    arrays = {
        "q_mean": np.array([[reference.pool_blocks(x, 128) for x in one] for one in q], np.float32),
        "q_similarity": scores.sim_q.astype(np.float32),
        "k_mean": pooled,
        "k_similarity": alike,
        "lengths": np.array(lengths, np.int32),
    }
    shape = block_map.MapShape(batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim)
    del options["seqlens_k"]
    scale = head_dim**-0.5
    plan = block_map.map_plan(shape, policy, sm_scale=scale, has_lengths=True, **options)
    outputs = map_oracle.poisoned(plan)
    emulate(plan, arrays, outputs)
    exact = reference.block_map(q, k, policy=policy, seqlens_k=lengths, **options)
    chosen = map_oracle.unpacked(outputs["bits"], blocks_k).reshape(exact.shape)
    similarities = np.concatenate([scores.sim_q.ravel(), scores.sim_k.ravel()])
    if np.abs(similarities - policy.sim_threshold).min() < 1e-6:
        pytest.skip("a similarity lies at the threshold, but for its rounding")
    for at in np.ndindex(exact.shape[:3]):
        assert judge(policy, scores, chosen[at], at) == [], at
        # The judge accepts the oracle's own choice, and no other.
        assert judge(policy, scores, exact[at], at) == [], at
        free = scores.candidates[at] & ~scores.forced[at] & exact[at]
        if free.any():
            less = exact[at].copy()
            less[np.argmax(np.where(free, scores.weights[at], -1))] = False
            assert judge(policy, scores, less, at) != [], at
    assert (chosen != exact).mean() <= 0.01
    picks = outputs["first"].reshape(exact.shape[:3])
    for at in np.ndindex(exact.shape[:3]):
        order = reference.tile_order(chosen[at], scores.scores[at])
        if len(order) and np.isfinite(scores.scores[at][order[0]]):
            gap = scores.scores[at][order[0]] - scores.scores[at][picks[at]]
            assert 0 <= gap <= SCORE_ERROR, at
        elif len(order):
            assert picks[at] == order[0], at
