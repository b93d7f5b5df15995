"""Planted mistakes in the kernels of block_map.cu, each of which its case must show."""

import map_oracle
import pytest
from host_cuda import emu
from map_cases import Case, Given
from planted import Mistake, Planted
from test_map_kernel import emulate

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

# Tiles of 8 rows, one warp each, or of 2 rows: the kernels below are all there are.
PLAIN = Case((2, 4, 2, 700, 1291, 8), share=0.5)
CAUSAL = Case((1, 2, 1, 700, 650, 8), share=0.2, align="bottom_right")
EARLY = Case((1, 2, 1, 700, 550, 8), share=0.2, align="bottom_right")
LOCAL = Case((1, 1, 1, 700, 1291, 8), share=0.2, local=3)
LENGTHS = Case((4, 1, 1, 700, 700, 8), lengths=(700, 0, -9, 2**31 - 1), share=0.5)
PACKED = Case(
    (1, 4, 2, 1200, 900, 8), share=0.3, align="bottom_right", cu_q=(0, 400, 700, 1200),
    cu_k=(0, 100, 600, 900),
)  # fmt: skip
HINT = Case((1, 1, 1, 900, 900, 8), cu_q=(0, 300, 900), cu_k=(0, 120, 900), max_seqlen_k=300)
TIES = Case((1, 1, 1, 640, 9000, 8), "within", 0.3, fill="ties", rows=2)
TEAM = Case((1, 1, 1, 640, 9000, 8), share=0.5, rows=2)
SINGLE = Case((1, 1, 1, 700, 1291, 8), share=0.5)
TOP_K = Case((1, 2, 1, 640, 1291, 8), "topk", 0.4, sink=2, local=2, align="bottom_right")
TOP_K_TIES = Case((1, 2, 1, 640, 1291, 8), "topk", 0.4, fill="ties")
FEW = Case((1, 2, 1, 640, 1291, 8), "topk", 0.05, sink=3)
BAD = Case((1, 2, 1, 900, 3000, 24), share=0.3, fill="bad")
EDGE = Case((1, 8, 1, 1, 640, 1), share=0.5, scale=1.0, fill="edge")
HUGE = Case((1, 8, 1, 1, 320000, 1), share=0.99, fill="zeros", rows=8)
HALVES = Given((2, 2, 1, 300, 1000, 8), 64, 128, dtype="int32", align="bottom_right")

KERNELS = [
    "cusparge::choose_blocks<cusparge::MapConfig{64, 8}>",
    "cusparge::choose_blocks<cusparge::MapConfig{64, 2}>",
    "cusparge::take_blocks<64>",
    "cusparge::clear_queue<32>",
]

SYNC = "ptx::sync_block();"
COUNTS = f"{SYNC}  // all counts are stored before the first warp sorts the rows\n"
PUSH = "  if (warp == 0) {\n    push_rows"
TIE_OR_FORCED = "(is_tie && own < cut.ties) || task.is_forced(column)"
WITHIN = "task.rule != Rule::kWithin || (above == 0 && ties == 0)"


def reach(right, wrong, case, near=None):
    return Mistake("reach.cuh", right, wrong, case, near)


def select(right, wrong, case, near=None):
    return Mistake("select.cuh", right, wrong, case, near)


def kernel(right, wrong, case, near=None):
    return Mistake("block_map.cu", right, wrong, case, near)


MISTAKES = {
    "rounded towards zero": reach("a / b - (a % b < 0)", "a / b", EARLY),
    "a causal block too few": reach(
        "clamped(floor_div(last_row + offset, kBlockK) + 1, 0, valid)",
        "clamped(floor_div(last_row + offset, kBlockK), 0, valid)",
        CAUSAL,
    ),
    "a narrow band": reach("first - more", "first", LOCAL),
    "a band to the left": reach("is_causal ? last : last + more", "last", LOCAL),
    "the arrays' offset": reach("place.valid_k - place.seqlen_q", "0", PACKED),
    "lengths beyond the array": reach(
        "clamped(sequences.lengths_k[batch_idx], 0, rows.seqlen_k)",
        "sequences.lengths_k[batch_idx]",
        LENGTHS,
    ),
    "the length of another item": reach(
        "row / rows.blocks_per_head / rows.num_heads_q", "0u", LENGTHS
    ),
    "keys of the first sequence": reach("static_cast<s32>(k.first_tile)", "0", PACKED),
    "columns of the first sequence": kernel(
        "s_rows.key_base[row]", "0", PACKED, "s_rows.key_base[row] - lane"
    ),
    "the wrong kv head": kernel("group / params.groups_per_head", "group", PACKED),
    "rows without room": kernel("reach > static_cast<s32>(params.panel_blocks)", "false", HINT),
    "the rule of another head": kernel(
        "params.num_rules > 1 ? head_idx : 0",
        "0u",
        Case((1, 4, 2, 300, 1291, 8), share=(0.0, 0.3, 0.5, 1.0)),
    ),
    "a row of the next tile": kernel(
        "rest < kRows ? static_cast<int>(rest) : kRows", "kRows", SINGLE
    ),
    "no barrier behind the rows": kernel(SYNC, "", PLAIN, f"{SYNC}  // all rows"),
    "no barrier behind the products": kernel(SYNC, "", PLAIN, f"{SYNC}  // all products"),
    "no barrier behind the counts": kernel(SYNC, "", PLAIN, f"{COUNTS}{PUSH}<kRows>"),
    "no barrier behind a mask's counts": kernel(SYNC, "", HALVES, f"{COUNTS}{PUSH}<kTakeRows>"),
    "no barrier in the team": select(SYNC, "", TEAM),
    "slots without turns": select("s_slots + turn * kWarps", "s_slots", TEAM),
    "a column range is lost": kernel(
        "(words + kRowWarps - 1) / kRowWarps", "words / kRowWarps", TEAM
    ),
    "ties are counted twice": select(
        "warp < member ? all[warp] : 0", "warp <= member ? all[warp] : 0", TIES
    ),
    "halves are swapped": kernel(
        "is_upper ? values[i + kKept] : values[i]",
        "is_upper ? values[i] : values[i + kKept]",
        PLAIN,
    ),
    "pieces that are not aligned": kernel(
        "(address | static_cast<u64>(4 * head_dim)) % 16 == 0",
        "address % 16 == 0",
        Case((1, 2, 1, 300, 700, 7)),
    ),
    "a short block is a whole one": select(
        "column == task.tail ? task.tail_bias : 0.0f",
        "0.0f",
        Case((1, 1, 1, 700, 129, 8), share=0.6),
    ),
    "infinite scores compete": select("!is_alike || !is_finite(score)", "!is_alike", BAD),
    "a NaN of a key block is alike": select(
        "task.similarity[column] > task.sim_threshold",
        "!(task.similarity[column] <= task.sim_threshold)",
        BAD,
    ),
    "a NaN of a row is alike": kernel(
        "!(params.q_similarity[row] > rule.sim_threshold)",
        "params.q_similarity[row] <= rule.sim_threshold",
        BAD,
    ),
    "-0 below 0": select(
        "score == 0.0f ? 0.0f : score",
        "score",
        Case((1, 2, 1, 600, 1291, 8), scale=2.0**-40, fill="tiny"),
    ),
    "rounding makes two best": select(
        "below < 0.0f && weight >= kWeightOne",
        "false",
        Case((1, 2, 1, 600, 1291, 8), scale=2.0**-26, share=0.3),
    ),
    "forced blocks on top": select("count > forced ? count - forced : 0", "count", TOP_K),
    "forced blocks compete": select(
        "task.rule != Rule::kTopK || !task.is_forced(column)", "true", TOP_K
    ),
    "forced blocks are not forced": kernel(TIE_OR_FORCED, "is_tie && own < cut.ties", LOCAL),
    "all ties are taken": kernel(TIE_OR_FORCED, "is_tie || task.is_forced(column)", TOP_K_TIES),
    "a tie too many": select("(goal - above - 1) / unit", "(goal - above) / unit", TOP_K_TIES),
    "the first is one that is left": kernel(
        "goal > 0 || task.is_forced(block_of(best))", "true", FEW
    ),
    "a goal that is not whole": select(
        "floor + (static_cast<double>(floor) < bar ? 1 : 0)", "floor", EDGE
    ),
    "the crossing block is out": select(
        WITHIN, "task.rule == Rule::kTopK || (above == 0 && ties == 0)", PLAIN
    ),
    "within takes none": select(
        WITHIN, "task.rule != Rule::kWithin", Case((1, 1, 1, 700, 1291, 8), "within", 0.0)
    ),
    "a threshold of 1 leaves zeros": select(
        "task.share >= 1.0", "false", Case((1, 1, 1, 700, 1291, 8), share=1.0, fill="steep")
    ),
    "sums of 32 bits": select(
        "(static_cast<u64>(ptx::redux_add(x >> 16)) << 16) + ptx::redux_add(x & 0xffffu)",
        "ptx::redux_add(x)",
        HUGE,
    ),
    "a bisection too few": select("step > 0", "step > 1", PLAIN, "step > 0; step /= 2"),
    "the end of a row is not written": kernel(
        "begin / 32 + lane",
        "begin / 32 + lane + 1",
        LENGTHS,
        "begin / 32 + lane; word < rows.words; word += lanes",
    ),
    "a byte behind the mask": kernel(
        "column < num_columns", "true", Case((1, 2, 1, 300, 2500, 8), mask=True)
    ),
    "two rows in one place": Mistake(
        "queue.cuh",
        "ptx::shfl_idx(place, leader) + rank",
        "ptx::shfl_idx(place, leader)",
        PLAIN,
    ),
    "rows are counted once": Mistake("queue.cuh", "++total;", "total = 1;", PLAIN),
    "empty rows first": Mistake("queue.cuh", "kClasses - 1", "0u", LENGTHS),
    "a half sees what the block sees": kernel(
        "place.reach(half * kMaskRows, kMaskRows)", "place.reach(0, kBlockQ)", HALVES
    ),
    "one byte of an element": kernel("byte < params.item_bytes", "byte < 1", HALVES),
    "narrow columns": kernel("column >> params.column_shift", "column", HALVES),
    "the mask of another head": kernel(
        "head % params.rows.num_heads_q * params.stride_head", "0", HALVES
    ),
    "the same half twice": kernel(
        "static_cast<s64>(block) * kHalves + half", "static_cast<s64>(block) * kHalves", HALVES
    ),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "kernels"
    made = Planted(folder, MISTAKES)
    emu.build(folder / "block_map.cu", *KERNELS)
    return made


def found_by(planted, case, rng):
    """Return what a case says of the kernels as they are now."""

    def run(plan, arrays, outputs):
        assert {one.variant.expression for one in plan.launches} <= {*KERNELS}
        emulate(plan, arrays, outputs, folder=planted.folder)

    judge = map_oracle.given_problems if isinstance(case, Given) else map_oracle.problems
    try:
        return judge(case, rng, run)
    except emu.EmuError as error:
        return [str(error)]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(name, planted, rng):
    planted.choose(name)
    found = []
    for _ in range(5):  # inputs are random: a few of them do not show it
        found = found or found_by(planted, MISTAKES[name].case, rng)
    print(*found, sep="\n")
    assert found, "the mistake went unseen"


def test_without_a_mistake_all_is_well(planted, rng):
    planted.choose(None)
    for case in {str(one.case): one.case for one in MISTAKES.values()}.values():
        assert found_by(planted, case, rng) == [], str(case)
