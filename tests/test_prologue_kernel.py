"""The prologue kernels on the host: every result against a float64 oracle (host-emulated)."""

import dataclasses
import math

import numpy as np
import pool_cases
import prologue_cases
import prologue_oracle
import pytest
from host_cuda import emu
from prologue_cases import Case, Placed
from prologue_emulation import build, emulate

from cusparge import reference

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]


def variants_of(cases):
    """Return the kernels that cases need."""
    found = set()
    for case in cases:
        none = ((0, 0, 0),) * 3
        placed = [Placed(None, 0, strides, None) for strides in none]
        found |= {one.variant for one in prologue_cases.plan_of(case, placed).plan.launches}
    return found


BUILT = variants_of(prologue_cases.CASES)


@pytest.fixture(scope="module", autouse=True)
def built():
    """All kernels in one build: it is quicker than one by one."""
    if emu.MISSING is None:
        build(emu.KERNELS, BUILT)


@pytest.mark.parametrize("case", prologue_cases.CASES, ids=str)
def test_matches_the_oracle(case, rng):
    assert prologue_oracle.problems(case, rng, emulate) == []


def test_random_cases_match_the_oracle(rng):
    done = 0
    while done < 12:
        case = prologue_cases.random_case(rng)
        if variants_of([case]) <= BUILT:
            assert prologue_oracle.problems(case, rng, emulate) == []
            done += 1


@pytest.mark.slow
def test_random_cases_of_every_kernel_match_the_oracle(rng):
    cases = [prologue_cases.random_case(rng) for _ in range(300)]
    build(emu.KERNELS, variants_of(cases))
    for case in cases:
        assert prologue_oracle.problems(case, rng, emulate) == []


# ---- what must not change a bit ------------------------------------------------------------------

#: What a kernel reads more than once or in parts, with all that can go wrong in it.
RICH = {
    "tokens": (150, 300),
    "batch": 2,
    "heads": (2, 2),
    "fills": (pool_cases.non_finite, pool_cases.non_finite, pool_cases.mixed),
}


def outputs(case, values, **options):
    """Run a case on given values of q, k and v, and return its sections, "partial" aside."""
    shapes = (case.shape_q, case.shape_k, case.shape_k)
    placed = [prologue_cases.place(case, shape, x) for shape, x in zip(shapes, values, strict=True)]
    prologue = prologue_cases.plan_of(case, placed)
    arrays = {name: one.view for name, one in zip("qkv", placed, strict=True)}
    found = emulate(prologue, arrays, prologue_cases.lists(case), **options)
    del found["partial"]
    return found


def values_of(case, rng):
    shapes = (case.shape_q, case.shape_k, case.shape_k)
    return [fill(rng, shape, case.dtype) for shape, fill in zip(shapes, case.fills, strict=True)]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(
            found[name].view(np.uint8), array.view(np.uint8), err_msg=name
        )


def test_results_do_not_depend_on_the_order_of_threads(rng, seed):
    case = Case("float16", "sm_90a", head_dim=128, **RICH)
    values = values_of(case, rng)
    expected = outputs(case, values)
    for number in range(2):
        assert_same_bits(outputs(case, values, schedule="random", seed=seed[0] + number), expected)


@pytest.mark.parametrize(
    ("dtype", "arch", "head_dim"),
    [("float16", "sm_80", 40), ("bfloat16", "sm_90a", 39), ("float32", "sm_89", 129)],
)
def test_results_do_not_depend_on_the_layout(dtype, arch, head_dim, rng):
    case = Case(dtype, arch, head_dim=head_dim, **RICH)
    values = values_of(case, rng)
    expected = outputs(case, values)
    for layout in ("NHD", "odd", "even", "padded", "reversed"):
        assert_same_bits(outputs(dataclasses.replace(case, layout=layout), values), expected)


def test_padding_is_not_looked_at(rng):
    case = Case("bfloat16", "sm_90a", lengths=(70, 129), **RICH)
    values = values_of(case, rng)
    expected = outputs(case, values)
    for which in (1, 2):
        for b, length in enumerate(case.lengths):
            values[which][b, :, length:] = rng.choice(
                [np.nan, np.inf, 1e30, -0.5], values[which][b, :, length:].shape
            )
    assert_same_bits(outputs(case, values), expected)


def test_a_bad_value_stays_in_its_head_and_its_block(rng):
    case = Case("float16", "sm_90a", (4, 2), (300, 300), 128, batch=2, sm_scale=-0.5)
    values = values_of(case, rng)
    expected = outputs(case, values)
    values[0][1, 2, 150, 3] = np.nan  # query 22 of block 1
    values[1][0, 1, 100, 127] = np.inf  # key 36 of block 1
    values[2][1, 0, 299, 0] = -np.inf  # key 43 of block 4
    found = outputs(case, values)
    assert math.isnan(found["q_scale"][1, 2, 1, 22])
    assert math.isnan(found["q_shift"][1, 2, 1, 22])
    assert found["q_similarity"][1, 2, 1] == found["k_similarity"][0, 1, 1] == -1
    assert found["k_bad"][0, 1, 1] == 36
    assert found["k_bad"][1, 0, 4] == 43
    # The bad key counts as 0 in the mean of its head, and so changes what is made of it: k_*, and
    # the shift of the two heads of q that read it; V's scale of one channel may change too.
    allowed = {
        "q": [(1, 2, 1)],
        "q_shift": [(1, 2, 1), (0, 2), (0, 3)],
        "k": [(0, 1)],
        "k_bad": [(0, 1, 1), (1, 0, 4)],
        "token_mean": [(0, 1)],
        "v": [(1, 0)],
    }
    for name, array in expected.items():
        same = found[name].view(np.uint8).reshape(*array.shape[:2], -1) == array.view(
            np.uint8
        ).reshape(*array.shape[:2], -1)
        blocks = 1 if name in ("token_mean", "v_scale") else array.shape[2]
        same = same.reshape(*array.shape[:2], blocks, -1).all(axis=-1)
        for at in allowed.get(name, allowed[name[0]] if name != "token_mean" else []):
            same[at] = True
        assert same.all(), (name, np.argwhere(~same))


@pytest.mark.parametrize("packed", [*prologue_cases.PACKED, *prologue_cases.HOSTILE])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_packed_sequences_are_as_each_alone(packed, head_dim, rng):
    dtype, arch = {40: ("float16", "sm_80"), 128: ("float16", "sm_90a")}[head_dim]
    kinds = (pool_cases.non_finite, pool_cases.mixed, pool_cases.non_finite)
    case = Case(
        dtype,
        arch,
        (4, 2),
        (200, 230),
        head_dim,
        fills=kinds,
        layout="NHD",
        packed=packed,
    )
    values = values_of(case, rng)
    found = outputs(case, values)
    parts = zip(prologue_cases.parts(case, 0), prologue_cases.parts(case, 1), strict=True)
    for b, (of_q, of_k) in enumerate(parts):
        alone = [x[:, :, part.tokens] for x, part in zip(values, (of_q, of_k, of_k), strict=True)]
        tokens = (alone[0].shape[2], alone[1].shape[2])
        expected = outputs(dataclasses.replace(case, packed=None, tokens=tokens), alone)
        mine = {}
        for name, array in found.items():
            if name in ("token_mean", "v_scale"):
                mine[name] = array[b : b + 1]
            elif name[0] == "q":
                mine[name] = array[:, :, of_q.blocks]
            else:
                mine[name] = array[:, :, of_k.blocks]
                expected[name] = expected[name][:, :, : -(-tokens[1] // 64)]
        contiguous = {name: np.ascontiguousarray(array) for name, array in mine.items()}
        expected = {name: np.ascontiguousarray(array) for name, array in expected.items()}
        assert_same_bits(contiguous, expected)


def test_many_packed_sequences(rng):
    """More than a warp looks at in one go, some of them without tokens."""
    ends = [np.sort(rng.integers(0, 200, 102)) for _ in range(2)]
    packed = tuple((0, *map(int, some), 200) for some in ends)
    case = Case("float16", "sm_80", (1, 1), (200, 200), 40, layout="NHD", packed=packed, shift=True)
    assert prologue_oracle.problems(case, rng, emulate) == []


# ---- the package's own statement of the rules ----------------------------------------------------


@pytest.mark.parametrize(("arch", "pv_format"), [("sm_90a", "e4m3"), ("sm_80", "f16")])
def test_agrees_with_the_package_oracle(arch, pv_format, rng):
    """The values that the codes stand for are those of `cusparge.reference`."""
    dtype = {"sm_90a": "bfloat16", "sm_80": "float16"}[arch]
    case = Case(dtype, arch, (2, 2), (300, 200), 64, sm_scale=0.5, shift=False)
    placed = prologue_cases.inputs(case, rng)
    prologue = prologue_cases.plan_of(case, placed)
    found = emulate(prologue, {n: one.view for n, one in zip("qkv", placed, strict=True)}, {})
    q, k, v = (pool_cases.decode(np.ascontiguousarray(one.view), dtype) for one in placed)
    codes = {
        name: prologue_oracle.unpacked(prologue, f"{name}_tile", found[f"{name}_tile"], 64)[0]
        for name in "qkv"
    }
    for h in range(2):
        got = codes["q"][0, h].reshape(-1, 64) * found["q_scale"][0, h].reshape(-1, 1)
        expected = reference.quantize_queries(q[0, h])
        step = np.abs(q[0, h]).max(axis=-1, keepdims=True) / 127
        assert_codes_agree(got[:300] / (0.5 / math.log(2)), expected, step)

        _, mean = reference.smooth_keys(k[0, h])
        shift = np.abs(found["token_mean"][0, h] - mean)
        assert (shift <= pool_cases.DEPTH * pool_cases.EPS * np.abs(k[0, h]).mean(axis=0)).all()
        taken_off = k[0, h] - found["token_mean"][0, h].astype(np.float64)
        expected = reference.quantize_keys(taken_off)
        got = codes["k"][0, h].reshape(-1, 16, 64) * found["k_scale"][0, h].reshape(-1, 1, 1)
        largest = np.abs(np.pad(taken_off, ((0, 56), (0, 0)))).reshape(-1, 16 * 64).max(axis=-1)
        step = np.repeat(largest / 127, 16)[:200, None]
        assert_codes_agree(got.reshape(-1, 64)[:200], expected, step)

        expected, scale = reference.quantize_values(v[0, h], pv_format)
        np.testing.assert_array_equal(found["v_scale"][0, h], scale)
        np.testing.assert_array_equal(codes["v"][0, h].reshape(-1, 64)[:200], expected)


def assert_codes_agree(got, expected, step):
    """The same codes, but for ties and what lies within rounding of one: one step apart there."""
    off = np.abs(got - expected) / np.where(step > 0, step, 1)
    assert (off <= 1 + 1e-4).all()
    assert (off > 1e-4).mean() < 0.01
