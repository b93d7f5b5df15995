"""The host side of block_map.cu: which launches, with which numbers, for which policy."""

import itertools
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cusparge._cuda import block_map, variants
from cusparge._cuda.block_map import GivenMask, MapShape, given_plan, map_plan, rule_table
from cusparge.errors import UnsupportedError
from cusparge.policy import Dense, TopCdf, TopK

KERNELS = Path(__file__).resolve().parents[1] / "kernels_cu"

SEQUENCES = ["sequences.lengths_k", "sequences.cu_seqlens_q", "sequences.cu_seqlens_k"]
OUTPUTS = ["bits", "count", "first", "reachable", "mask", "class_counts", "items"]
ROWS = [
    "seqlen_q",
    "seqlen_k",
    "causal_offset",
    "num_sequences",
    "num_heads_q",
    "blocks_per_head",
    "num_blocks_k",
    "words",
    "num_rows",
    "causality",
    "unused",
]
COMMON = [*SEQUENCES, *(f"out.{name}" for name in OUTPUTS), *(f"rows.{name}" for name in ROWS)]
FIELDS = {
    "choose_blocks": (
        "MapParams",
        [
            *("q_mean", "q_similarity", "k_mean", "k_similarity", "rules"),
            *COMMON,
            *("rows_per_group", "tiles_per_group", "groups_per_head", "head_dim", "panel_blocks"),
            *("panel_stride", "rule", "scale_log2", "sink_blocks", "local_blocks", "num_rules"),
            *(f"table[{i}].{name}" for i in (0, 1, 63) for name in ("share", "sim_threshold")),
        ],
    ),
    "take_blocks": (
        "TakeParams",
        [
            *("given", "halves", *COMMON, "stride_batch", "stride_head", "stride_row"),
            *("stride_column", "item_bytes", "column_shift"),
        ],
    ),
    "clear_queue": ("ClearParams", ["class_counts", "ticket"]),
}
NAMES = (
    *("q_mean", "q_similarity", "k_mean", "k_similarity", "rules", "given", "halves", "lengths"),
    *("cu_seqlens_q", "cu_seqlens_k", "ticket", *OUTPUTS),
)
ADDRESSES = {name: 0x1111_0000_0000 + 16 * i for i, name in enumerate(NAMES)}

SHAPE = MapShape(2, 6, 2, 700, 1291, 80)
PACKED = MapShape(1, 6, 2, 700, 1291, 80, 5)
SCALE = 0.125


def kernel_of(launch):
    return launch.variant.expression.removeprefix("cusparge::").partition("<")[0]


def decoded(folder, launch, filled):
    """Return {field: value} as the compiler of the kernels sees a filled struct."""
    name, fields = FIELDS[kernel_of(launch)]
    prints = "".join(f'  std::printf("{f} %.17g\\n", value(p.{f}));\n' for f in fields)
    (folder / "main.cpp").write_text(
        '#include <cstdio>\n#include <cstdint>\n#include "cusparge/map_params.cuh"\n'
        "template <class T> double value(T x) { return static_cast<double>(x); }\n"
        "template <class T> double value(T* x) { return double(reinterpret_cast<uintptr_t>(x)); }\n"
        f"int main() {{\n  cusparge::{name} p;\n"
        "  if (std::fread(&p, sizeof p, 1, stdin) != 1 || std::getchar() != EOF) return 1;\n"
        f"{prints}}}\n"
    )
    command = ["g++", "-std=c++20", "-I", str(KERNELS), "-o", "main", "main.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    options = {"input": filled, "capture_output": True, "check": True, "timeout": 60}
    text = subprocess.run([folder / "main"], **options).stdout.decode()
    return {name: float(number) for name, number in map(str.split, text.splitlines())}


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to compile the header with"
)


@needs_compiler
def test_the_compiler_reads_what_the_host_packs_of_a_policy(tmp_path):
    policy = TopK((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 0.3, sink_blocks=3, local_blocks=4)
    plan = map_plan(
        SHAPE, policy, sm_scale=SCALE, causal=True, has_lengths=True, mask=True, queue_is_clear=True
    )
    (launch,), (filled,) = plan.launches, plan.fill(**ADDRESSES)
    found = decoded(tmp_path, launch, filled)
    given = {f"out.{name}": ADDRESSES[name] for name in OUTPUTS}
    given |= {name: ADDRESSES[name] for name in NAMES[:4]}
    assert found == given | {
        "rules": 0,
        "sequences.lengths_k": ADDRESSES["lengths"],
        "sequences.cu_seqlens_q": 0,
        "sequences.cu_seqlens_k": 0,
        "rows.seqlen_q": 700,
        "rows.seqlen_k": 1291,
        "rows.causal_offset": 591,
        "rows.num_sequences": 2,
        "rows.num_heads_q": 6,
        "rows.blocks_per_head": 6,
        "rows.num_blocks_k": 21,
        "rows.words": 1,
        "rows.num_rows": 72,
        "rows.causality": 1,
        "rows.unused": 0,
        "rows_per_group": 18,
        "tiles_per_group": 3,
        "groups_per_head": 1,
        "head_dim": 80,
        "panel_blocks": 21,
        "panel_stride": 36,
        "rule": 2,
        "scale_log2": float(np.float32(SCALE / math.log(2))),
        "sink_blocks": 3,
        "local_blocks": 4,
        "num_rules": 6,
        "table[0].share": 0.1,
        "table[1].share": 0.2,
        "table[63].share": 0,
        "table[0].sim_threshold": found["table[0].sim_threshold"],
        "table[1].sim_threshold": found["table[0].sim_threshold"],
        "table[63].sim_threshold": 0,
    }
    assert launch.grid == (4 * 3, 1, 1)
    assert launch.shared_bytes == 256 + 8 * 36 * 4
    assert launch.variant.expression.endswith("MapConfig{128, 8}>")


@needs_compiler
def test_the_compiler_reads_what_the_host_packs_of_a_mask(tmp_path):
    given = GivenMask((1, 6, 11, 11), (7, -8, 9, 2), 2, 64, 128)
    plan = given_plan(SHAPE, given, causal=True, causal_align="top_left")
    clear, take = plan.launches
    structs = plan.fill(**ADDRESSES)
    queue = {name: ADDRESSES[name] for name in ("class_counts", "ticket")}
    assert decoded(tmp_path, clear, structs[0]) == queue
    found = decoded(tmp_path, take, structs[1])
    expected = {f"out.{name}": ADDRESSES[name] for name in OUTPUTS} | {
        "out.mask": 0,
        "given": ADDRESSES["given"],
        "halves": ADDRESSES["halves"],
        "rows.causal_offset": 0,
        "rows.causality": 1,
        "sequences.lengths_k": 0,
        "stride_batch": 0,
        "stride_head": -8,
        "stride_row": 9,
        "stride_column": 2,
        "item_bytes": 2,
        "column_shift": 1,
    }
    assert expected.items() <= found.items()
    assert take.grid == (9, 1, 1)
    assert take.variant.expression == "cusparge::take_blocks<64>"
    shapes = {one.name: one.shape for one in plan.outputs}
    assert shapes["halves"] == (2, 6, 6, 2, 1)


def numbers_of(plan):
    """Return the fields of MapRows of the plan's last launch."""
    return dict(zip(ROWS, struct.unpack_from("<3q8I", plan.launches[-1].numbers), strict=True))


@pytest.mark.parametrize(
    ("shape", "align", "offset", "causality"),
    [
        (SHAPE, None, 0, 0),
        (SHAPE, "bottom_right", 591, 1),
        (SHAPE, "top_left", 0, 1),
        (PACKED, None, 0, 0),
        (PACKED, "bottom_right", 0, 2),
        (PACKED, "top_left", 0, 1),
    ],
)
def test_causality(shape, align, offset, causality):
    for policy in (TopCdf(), Dense()):
        plan = map_plan(
            shape,
            policy,
            sm_scale=SCALE,
            causal=align is not None,
            causal_align=align or "bottom_right",
        )
        numbers = numbers_of(plan)
        assert (numbers["causal_offset"], numbers["causality"]) == (offset, causality)


def test_a_packed_call_has_room_for_any_sequences():
    plan = map_plan(PACKED, TopCdf(), sm_scale=SCALE)
    numbers = numbers_of(plan)
    assert (numbers["blocks_per_head"], numbers["num_blocks_k"]) == (700 // 128 + 5, 1291 // 64 + 5)
    assert (numbers["num_sequences"], numbers["words"]) == (5, 1)
    choose = plan.launches[-1]
    assert choose.pointers[5:8] == ("null", "cu_seqlens_q", "cu_seqlens_k")
    # Six heads of two tiles of 8 rows, and three heads read the same keys.
    fields = struct.unpack_from("<5I", choose.numbers, 56)
    assert fields == (10, 2, 3, 80, 21)
    assert choose.grid == (12, 1, 1)
    hinted = map_plan(PACKED, TopCdf(), sm_scale=SCALE, max_seqlen_k=300)
    assert struct.unpack_from("<5I", hinted.launches[-1].numbers, 56)[4] == 5
    assert numbers_of(hinted)["words"] == 1


def test_outputs():
    plan = map_plan(SHAPE, TopCdf(), sm_scale=SCALE, mask=True)
    assert {one.name: (one.shape, one.dtype, one.num_bytes) for one in plan.outputs} == {
        "bits": ((2, 6, 6, 1), "uint32", 288),
        "count": ((2, 6, 6), "uint32", 288),
        "first": ((2, 6, 6), "uint32", 288),
        "reachable": ((2, 6, 6), "uint32", 288),
        "mask": ((2, 6, 6, 21), "uint8", 1512),
        "class_counts": ((32,), "uint32", 128),
        "ticket": ((1,), "uint32", 4),
        "items": ((32, 72), "uint32", 9216),
    }
    assert plan.workspace_bytes == 0
    lean = map_plan(SHAPE, TopCdf(), sm_scale=SCALE, queue=False)
    assert [one.name for one in lean.outputs] == ["bits", "count", "first", "reachable"]
    assert [kernel_of(one) for one in lean.launches] == ["choose_blocks"]
    assert lean.launches[0].pointers[-3:] == ("null", "null", "null")


def test_launches():
    names = {}
    for policy, is_clear in itertools.product((TopCdf(), TopK(), Dense()), (False, True)):
        plan = map_plan(SHAPE, policy, sm_scale=SCALE, queue_is_clear=is_clear)
        names[type(policy).__name__, is_clear] = [kernel_of(one) for one in plan.launches]
    assert names == {
        ("TopCdf", False): ["clear_queue", "choose_blocks"],
        ("TopCdf", True): ["choose_blocks"],
        ("TopK", False): ["clear_queue", "choose_blocks"],
        ("TopK", True): ["choose_blocks"],
        ("Dense", False): ["clear_queue", "take_blocks"],
        ("Dense", True): ["take_blocks"],
    }


@pytest.mark.parametrize("shape", [(0, 2, 1, 9, 9, 8), (2, 0, 0, 9, 9, 8), (2, 2, 1, 0, 9, 8)])
def test_without_rows_there_is_nothing_to_do_but_to_clear(shape):
    for policy in (TopCdf(), Dense()):
        plan = map_plan(MapShape(*shape), policy, sm_scale=SCALE)
        assert [kernel_of(one) for one in plan.launches] == ["clear_queue"]
        assert all(0 in one.shape for one in plan.outputs if one.name in ("bits", "items"))
        assert map_plan(MapShape(*shape), policy, sm_scale=SCALE, queue=False).launches == ()


def test_rows_share_keys_while_two_blocks_of_threads_fit():
    found = {}
    for tokens, limit in itertools.product((8192, 2**17, 2**18, 2**19, 2**20), (99, 163, 227)):
        shape = MapShape(1, 4, 1, tokens, tokens, 128)
        plan = map_plan(shape, TopCdf(), sm_scale=SCALE, shared_limit=limit * 1024)
        launch = plan.launches[-1]
        rows = int(re.search(r", (\d)}", launch.variant.expression)[1])
        found[tokens, limit] = rows
        assert launch.shared_bytes <= limit * 1024
        assert rows <= 2 or launch.shared_bytes <= (limit - 1) * 512
    # At most 1 M tokens, 16,384 blocks of 4 bytes, fit wherever a block of threads has 65 KiB.
    assert [found[tokens, 227] for tokens in (8192, 2**17, 2**18, 2**19, 2**20)] == [8, 8, 4, 2, 2]
    assert [found[tokens, 99] for tokens in (8192, 2**17, 2**18, 2**19, 2**20)] == [8, 4, 2, 2, 1]


@pytest.mark.parametrize(
    ("rows", "head_dim", "tile"),
    [(1, 64, 1), (2, 64, 2), (3, 64, 4), (5, 64, 8), (9, 128, 8), (9, 129, 4), (3, 256, 4)],
)
def test_a_tile_is_no_larger_than_its_rows_need(rows, head_dim, tile):
    plan = map_plan(MapShape(1, rows, 1, 1, 640, head_dim), TopCdf(), sm_scale=SCALE)
    assert plan.launches[-1].variant.expression.endswith(f", {tile}}}>")


def test_what_cannot_be_done_is_refused():
    with pytest.raises(UnsupportedError, match=r"4294967296 query blocks in all heads; allowed"):
        map_plan(MapShape(2**16, 2**16, 1, 128, 64, 8), Dense(), sm_scale=SCALE)
    with pytest.raises(UnsupportedError, match="key blocks in a head; allowed are 1073741824"):
        map_plan(MapShape(1, 1, 1, 1, 2**37, 8), Dense(), sm_scale=SCALE)
    with pytest.raises(UnsupportedError, match=r"2684354560 groups of 1 query blocks"):
        map_plan(MapShape(2**16, 40960, 40960, 1, 64, 8), TopCdf(), sm_scale=SCALE)
    for num_sequences, said in ((None, "Split them and merge"), (3, "Pass max_seqlen_k, split")):
        shape = MapShape(1, 1, 1, 1, 2**22, 8, num_sequences)
        with pytest.raises(UnsupportedError, match=rf"got 4194304; allowed .* are (\d+). {said}"):
            map_plan(shape, TopCdf(), sm_scale=SCALE)
        assert map_plan(shape, Dense(), sm_scale=SCALE).launches


def test_the_longest_that_is_said_to_be_allowed_is():
    with pytest.raises(UnsupportedError) as raised:
        map_plan(MapShape(1, 1, 1, 1, 2**22, 8), TopCdf(), sm_scale=SCALE)
    most = int(re.search(r"allowed on this device are (\d+)", str(raised.value))[1])
    assert map_plan(MapShape(1, 1, 1, 1, most, 8), TopCdf(), sm_scale=SCALE).launches
    assert most > 2**20


def test_rules():
    table = rule_table(TopCdf(0.98, 0.3), 5)
    share, threshold, _ = struct.unpack("<dfI", table)
    assert share == 0.98
    # The largest float32 that is not above 0.3: a similarity is above either or above none.
    assert threshold <= 0.3 < float(np.nextafter(np.float32(threshold), np.float32(1)))
    assert struct.unpack("<dfI", rule_table(TopK(0.25, -1.0), 1))[:2] == (0.25, -1.0)
    shares = tuple(i / 100 for i in range(1, 65))
    assert len(rule_table(TopK(shares), 64)) == 64 * 16
    assert len(rule_table(TopK((0.5,) * 70), 70)) == 16


def test_many_rules_are_read_from_an_array():
    shares = tuple(i / 100 for i in range(1, 66))
    few = map_plan(MapShape(1, 64, 8, 9, 9, 8), TopK(shares[:64]), sm_scale=SCALE).launches[-1]
    many = map_plan(MapShape(1, 65, 5, 9, 9, 8), TopK(shares), sm_scale=SCALE).launches[-1]
    assert (few.pointers[4], many.pointers[4]) == ("null", "rules")
    assert len(few.params) == len(many.params) == 224 + 16 * 64
    assert few.numbers[-16 * 64 :] == rule_table(TopK(shares[:64]), 64)
    assert many.numbers[-16 * 64 :] == bytes(16 * 64)


@pytest.mark.parametrize(("scale", "packed"), [(1e300, 1), (-1e300, -1), (0.0, 0), (1e-60, 0)])
def test_a_scale_that_float32_does_not_hold(scale, packed):
    launch = map_plan(SHAPE, TopCdf(), sm_scale=scale).launches[-1]
    found = struct.unpack_from("<f", launch.numbers, 56 + 28)[0]
    assert found == packed * float(np.finfo(np.float32).max)


def test_plans_are_kept():
    assert map_plan(SHAPE, TopCdf(), sm_scale=0.5) is map_plan(SHAPE, TopCdf(), sm_scale=0.5)
    assert map_plan(SHAPE, TopCdf(), sm_scale=0.5) is not map_plan(SHAPE, TopK(), sm_scale=0.5)


def test_every_planned_kernel_is_declared():
    declared = set(variants.all_variants("sm_90a"))
    assert len({one for one in declared if one.file == "block_map.cu"}) == 2 * 4 + 3 + 3
    for dim, tokens, policy in itertools.product(
        (1, 63, 64, 65, 128, 129, 256), (64, 2**17, 2**18, 2**20), (TopCdf(), TopK(), Dense())
    ):
        plan = map_plan(MapShape(1, 4, 2, 5000, tokens, dim), policy, sm_scale=SCALE)
        assert {one.variant for one in plan.launches} <= declared
    for block_q, block_k in itertools.product((64, 128), (64, 128)):
        shape = (2, 6, -(-700 // block_q), -(-1291 // block_k))
        given = GivenMask(shape, (0, 0, 0, 1), 1, block_q, block_k)
        assert {one.variant for one in given_plan(SHAPE, given).launches} <= declared


def test_constants_are_those_of_the_kernels():
    names = ("block_map.cu", "cusparge/queue.cuh", "cusparge/select.cuh", "cusparge/map_params.cuh")
    text = "".join((KERNELS / name).read_text() for name in names)
    for line in (
        f"int kMapThreads = {block_map.THREADS};",
        f"u32 kClasses = {block_map.CLASSES};",
        f"int kMaxRules = {block_map.MAX_RULES};",
        f"int kRowBytes = {block_map.ROW_BYTES};",
    ):
        assert f"inline constexpr {line}" in text
    enumerators = re.search(r"enum class Rule : u32 \{ (.*?) \}", text)[1].lower().split(", ")
    assert enumerators == [f"k{name}" for name in block_map.RULES]
    assert list(block_map.RULES.values()) == [0, 1, 2]
