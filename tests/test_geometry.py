"""`kernels_cu/cusparge/geometry.cuh`, compiled on the host, against the Python side.

A small program prints every constant and the helpers' answers over a sweep of lengths; the
expected answers come from `cusparge.reference`, which shares nothing with the header.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cusparge import _check, _types, reference
from cusparge._cpu import rounding, stage1, tiles

HEADER = Path(__file__).resolve().parents[1] / "kernels_cu" / "cusparge" / "geometry.cuh"
COMPILER = shutil.which("g++")

#: Around the edges of both block sizes, and a prime.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 191, 192, 256, 257, 509]

PROGRAM = """
#include <cstdio>
#include "geometry.cuh"
using namespace cusparge;

// The helpers can be used where the compiler needs a constant.
static_assert(num_blocks_q(129) == 2 && num_blocks_k(129) == 3);
static_assert(reachable_blocks_k(0, 128, 512, false, 0) == 8);

int main() {
  std::printf("kBlockQ %d\\nkBlockK %d\\nkKeyGroup %d\\n", kBlockQ, kBlockK, kKeyGroup);
  std::printf("kWeightOffsetLog2 %d\\nkE4m3Max %d\\n", kWeightOffsetLog2, kE4m3Max);
  std::printf("kWeightOne %d\\nkMaxHeadDim %d\\n", kWeightOne, kMaxHeadDim);
  std::printf("kMaskRows %d\\n", kMaskRows);
  long long seqlen_q, seqlen_k, valid_k, offset;
  int is_causal;
  while (std::scanf("%lld %lld %lld %d %lld", &seqlen_q, &seqlen_k, &valid_k, &is_causal,
                    &offset) == 5) {
    std::printf("%lld %lld", num_blocks_q(seqlen_q), num_blocks_k(seqlen_k));
    for (long long i = 0; i < num_blocks_q(seqlen_q); ++i)
      std::printf(" %lld", reachable_blocks_k(i, seqlen_q, valid_k, is_causal != 0, offset));
    std::printf("\\n");
  }
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the header with")


def sweep():
    """Yield (seqlen_q, seqlen_k, valid_k, causal_align or None)."""
    for seqlen_q in LENGTHS:
        for seqlen_k in LENGTHS:
            for valid_k in sorted({0, 1, seqlen_k // 2, seqlen_k}):
                for align in (None, "bottom_right", "top_left"):
                    yield seqlen_q, seqlen_k, valid_k, align


def build(folder, header):
    """Compile the program against a header's text; return the binary's path."""
    (folder / "geometry.cuh").write_text(header)
    (folder / "main.cpp").write_text(PROGRAM)
    binary = folder / "main"
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-o", binary, "main.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise AssertionError(f"the header does not compile:\n{done.stderr}")
    return binary


def answers(binary):
    """Run the program over the sweep; return its constants and one list of numbers a case."""
    lines = []
    for seqlen_q, seqlen_k, valid_k, align in sweep():
        offset = seqlen_k - seqlen_q if align == "bottom_right" else 0
        lines.append(f"{seqlen_q} {seqlen_k} {valid_k} {int(align is not None)} {offset}\n")
    done = subprocess.run(
        [binary], input="".join(lines), capture_output=True, text=True, timeout=60, check=True
    )
    constants, cases = {}, []
    for line in done.stdout.splitlines():
        if line[0] == "k":
            name, value = line.split()
            constants[name] = int(value)
        else:
            cases.append([int(word) for word in line.split()])
    return constants, cases


def wrong_cases(cases):
    """Return the cases of the sweep whose answers differ from the oracle's."""
    wrong = []
    for case, got in zip(sweep(), cases, strict=True):
        seqlen_q, seqlen_k, valid_k, align = case
        oracle = reference.reachable_blocks(
            seqlen_q,
            seqlen_k,
            causal=align is not None,
            causal_align=align or "bottom_right",
            valid_k=valid_k,
        )
        # The kernels walk the first n blocks, so what is reachable must be a prefix of the row.
        counts = oracle.sum(axis=1)
        assert (oracle == (np.arange(oracle.shape[1]) < counts[:, None])).all()
        if got != [*oracle.shape, *counts.tolist()]:
            wrong.append(case)
    return wrong


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return answers(build(tmp_path_factory.mktemp("geometry"), HEADER.read_text()))


def test_constants_are_those_of_the_python_side(compiled):
    constants, _ = compiled
    twins = {
        "kBlockQ": (_types.BLOCK_Q, reference.BLOCK_Q),
        "kBlockK": (_types.BLOCK_K, reference.BLOCK_K),
        "kKeyGroup": (rounding.KEY_GROUP, reference.KEY_GROUP),
        "kWeightOffsetLog2": (tiles.P_OFFSET, np.log2(reference.P_SCALE)),
        "kE4m3Max": (rounding.E4M3_MAX, reference.E4M3_MAX),
        "kWeightOne": (stage1._WEIGHT_UNIT, reference.WEIGHT_ONE),
        "kMaxHeadDim": (_check.MAX_HEAD_DIM,),
        "kMaskRows": (reference.MASK_ROWS,),
    }
    assert constants.keys() == twins.keys()
    for name, expected in twins.items():
        assert {float(value) for value in expected} == {float(constants[name])}, name


def test_helpers_agree_with_the_oracle(compiled):
    _, cases = compiled
    assert len(cases) > 1000
    assert wrong_cases(cases) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("seqlen_q) - 1 + offset", "seqlen_q) + offset"),  # one key too far
        ("if (last_key < 0) return 0;", ""),  # rounding towards zero instead of down
        (
            "end < seqlen_q ? end : seqlen_q",
            "end < seqlen_q ? end : end",
        ),  # a short last block taken for a full one
    ],
)
def test_a_planted_mistake_is_seen(tmp_path, right, wrong):
    text = HEADER.read_text()
    assert right in text
    _, cases = answers(build(tmp_path, text.replace(right, wrong)))
    assert wrong_cases(cases)


def test_assumptions_are_asserted(tmp_path):
    text = HEADER.read_text()
    planted = text.replace("kKeyGroup = 16", "kKeyGroup = 48")
    assert planted != text
    with pytest.raises(AssertionError, match="kBlockK % kKeyGroup"):
        build(tmp_path, planted)
