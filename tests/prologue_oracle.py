"""A float64 oracle of the prologue kernels, and how close results must be.

It is written from the definitions and shares no code with the package: it takes tiles apart by
reshaping and by a table of chunks, and rounds to e4m3 by looking for the nearest of all codes.
"""

import math

import numpy as np
import pool_cases
from pool_cases import DEPTH, EPS, SIMILARITY, TINY, decode
from prologue_cases import inputs, lists, parts, plan_of

LARGEST = pool_cases.LARGEST

#: Half a step of rounding, and what float32 adds to a value of at most 127 (4 roundings, one of
#: them a reciprocal within 2^-23).
CODE = 0.5 + 127 * 6 * EPS
#: q and k are quantized in units of 2^-9, which cost half of 2^-149: numbers below lose bits.
LOST = 2.0**-140
#: Relative, of a scale.
SCALE = 1e-6

#: Position p of a row of V's e4m3 tile holds this token of every 16.
STORED = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def up(number, step):
    return -(-number // step) * step


# ---- number formats and tiles ------------------------------------------------------------------


def e4m3_values():
    """Return what the codes 0 to 126 stand for: rising, from 0 to 448."""
    codes = np.arange(127)
    power, step = codes // 8, codes % 8
    return np.where(power == 0, step * 2.0**-9, (8 + step) * 2.0 ** (power - 10.0))


def to_e4m3(x):
    """Return the nearest e4m3 numbers; of two that are as near, the one of even code."""
    table = e4m3_values()
    size = np.abs(x)
    above = np.clip(np.searchsorted(table, size), 1, 126)
    low, high = table[above - 1], table[above]
    takes_high = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    return np.copysign(np.where(takes_high, high, low), x)


def from_e4m3(codes):
    table = np.concatenate([e4m3_values(), [np.nan]])
    return np.where(codes & 0x80, -1.0, 1.0) * table[codes & 0x7F]


def rows_of_tile(flat, rows, swizzled):
    """Return the (..., rows, bytes) that a tile's bytes (..., n) stand for."""
    width = flat.shape[-1] // rows
    lead = flat.shape[:-1]
    if not swizzled:
        split = flat.reshape(*lead, rows // 8, width // 16, 8, 16)
        return np.moveaxis(split, -3, -2).reshape(*lead, rows, width)
    chunks = flat.reshape(*lead, rows, width // 16, 16)
    change = {64: lambda row: row // 2 % 4, 128: lambda row: row % 8}[width]
    where = [[chunk ^ change(row) for chunk in range(width // 16)] for row in range(rows)]
    return chunks[..., np.arange(rows)[:, None], where, :].reshape(*lead, rows, width)


def unpacked(prologue, name, raw, head_dim):
    """Return (codes (..., tokens, head_dim), everything else in the tile) of a section."""
    swizzled = prologue.formats.tiles == "kSwizzled"
    lead = raw.shape[:-1]
    if name != "v_tile":
        rows = rows_of_tile(raw.view(np.int8), 64, swizzled).astype(np.float64)
        rest = rows[..., head_dim:]
    elif prologue.formats.values == "kF16":
        halves = raw.view(np.uint8).reshape(*lead, -1)
        rows = np.ascontiguousarray(rows_of_tile(halves, 64, False)).view(np.float16)
        rows, rest = rows.astype(np.float64), rows[..., head_dim:]
    else:
        stored = from_e4m3(rows_of_tile(raw, raw.shape[-1] // 64, swizzled))
        rows = np.zeros(stored.shape)
        rows[..., [16 * (p // 16) + STORED[p % 16] for p in range(64)]] = stored
        rows = np.moveaxis(rows, -1, -2)
        # Behind the channels: padding, then a column of ones and seven of zeros.
        padded = up(head_dim, 8)
        ones = rows[..., padded:] - (np.arange(8) == 0)
        rest = np.concatenate([rows[..., head_dim:padded], ones], axis=-1)
    return rows[..., :head_dim], rest


def value_scale(largest, limit):
    """Return the least power of two that brings each magnitude within the limit."""
    found = np.ones(largest.shape)
    for at, size in np.ndenumerate(largest):
        if size > 0:
            power = -127
            while size > limit * 2.0**power:
                power += 1
            found[at] = 2.0**power
    return found


# ---- judging -----------------------------------------------------------------------------------


class Judge:
    """Collects what is wrong."""

    def __init__(self, case):
        self.case, self.found = case, []

    def compare(self, name, actual, expected, bound=0.0):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        with np.errstate(invalid="ignore"):
            right = np.abs(actual - expected) <= bound
        right |= np.isnan(actual) & np.isnan(expected)
        right |= (actual == expected) & np.isinf(actual)
        if not right.all():
            at = tuple(map(int, np.argwhere(~right)[0]))
            limit = np.broadcast_to(bound, expected.shape)[at]
            self.found.append(
                f"{self.case}: {name}{list(at)} is {actual[at]!r}, not {expected[at]!r} within "
                f"{limit:.3g} ({(~right).sum()} of {right.size})"
            )


def blocked(x, count, step):
    """Pad (heads, tokens, d) to whole blocks: (heads, count, step, d)."""
    padded = np.zeros((x.shape[0], count * step, x.shape[2]))
    padded[:, : x.shape[1]] = x
    return padded.reshape(x.shape[0], count, step, x.shape[2])


def judge_codes(judge, name, codes, y, largest, sign=1.0):
    """Codes of y against those of exact arithmetic; `largest` of each group broadcasts."""
    safe = np.where(largest > 0, largest, 1.0)
    exact = sign * y * (127.0 / safe)
    judge.compare(name, codes, exact, CODE + 127.0 * LOST / safe)


def judge_blocks(judge, name, got, x, mean, step, dtype):
    """Pooled blocks of one sequence: got is {mean, similarity} of (heads, blocks, ...)."""
    heads, tokens, head_dim = x.shape
    blocks = got["similarity"].shape[1]
    like = pool_cases.Case(dtype, (1, heads, blocks * step, head_dim), step, lengths=(tokens,))
    padded = np.zeros(like.shape)
    padded[0, :, :tokens] = x
    means, sizes, similarity = pool_cases.oracle_blocks(like, padded, mean[None])
    means = np.clip(means, -LARGEST, LARGEST)
    judge.compare(f"{name}_mean", got["mean"], means[0], DEPTH * EPS * sizes[0] + TINY)
    bound = np.where(similarity[0] < 0, 0.0, SIMILARITY)
    judge.compare(f"{name}_similarity", got["similarity"], similarity[0], bound)


def judge_queries(judge, case, got, x, mean):
    """One sequence; got has (heads, blocks, ...), x is (heads, tokens, d)."""
    blocks = got["q_scale"].shape[1]
    judge_blocks(
        judge,
        "q",
        {"mean": got["q_mean"], "similarity": got["q_similarity"]},
        x,
        np.zeros((x.shape[0], x.shape[2])),
        128,
        case.dtype,
    )
    finite = np.where(np.isfinite(x), x, 0.0)
    is_bad = blocked((~np.isfinite(x)).any(axis=-1, keepdims=True), blocks, 128)[..., 0] > 0
    y = blocked(finite, blocks, 128)
    largest = np.abs(y).max(axis=-1)
    codes = got["q_codes"].reshape(y.shape)
    judge_codes(judge, "q_tile", codes, y, largest[..., None], math.copysign(1.0, case.sm_scale))
    factor = abs(case.sm_scale) / math.log(2)
    expected = np.minimum(largest / 127 * factor, LARGEST)
    bound = SCALE * expected + LOST * factor + 2.0**-149
    judge.compare("q_scale", got["q_scale"], np.where(is_bad, np.nan, expected), bound)
    if case.shift:
        shift = case.sm_scale * np.einsum("hbtd,hd->hbt", y, mean)
        size = abs(case.sm_scale) * np.einsum("hbtd,hd->hbt", np.abs(y), np.abs(mean))
        with np.errstate(over="ignore"):
            shift = np.where(size < LARGEST, shift, np.nan)  # beyond float32: not judged
        # Products below float32's normal numbers, in a unit of 2^-9: 256 of them.
        lost = LOST * np.abs(mean).sum(axis=-1)[:, None, None] + 256 * 2.0**-141
        lost *= abs(case.sm_scale)
        bound = DEPTH * EPS * size + TINY + lost
        shift = np.where(is_bad, np.nan, shift)
        actual = np.where(size < LARGEST / 4, got["q_shift"], np.nan)
        shift = np.where(size < LARGEST / 4, shift, np.nan)
        judge.compare("q_shift", actual, shift, bound)


def judge_keys(judge, case, got, x, mean):
    """One sequence; `mean` is what the kernel took off."""
    blocks = got["k_scale"].shape[1]
    judge_blocks(
        judge,
        "k",
        {"mean": got["k_mean"], "similarity": got["k_similarity"]},
        x,
        mean,
        64,
        case.dtype,
    )
    y = np.where(np.isfinite(x), x - mean[:, None], 0.0)
    groups = blocked(y, 4 * blocks, 16)
    largest = np.abs(groups).max(axis=(-1, -2))
    codes = got["k_codes"].reshape(groups.shape)
    judge_codes(judge, "k_tile", codes, groups, largest[..., None, None])
    expected = largest / 127
    actual = got["k_scale"].reshape(expected.shape)
    judge.compare("k_scale", actual, expected, SCALE * expected + LOST)


def judge_values(judge, got, x, formats):
    finite = np.where(np.isfinite(x), x, 0.0)
    largest = np.abs(finite).max(axis=1, initial=0.0)
    scale = value_scale(largest, 448.0 if formats.values == "kE4m3" else 65504.0)
    judge.compare("v_scale", got["v_scale"], scale)
    exact = finite / scale[:, None]
    codes = to_e4m3(exact) if formats.values == "kE4m3" else exact.astype(np.float16)
    judge.compare("v_tile", got["v_codes"], blocked(codes, got["v_codes"].shape[1], 64))


def judge_bad_keys(judge, got, k, v):
    blocks = got["k_bad"].shape[1]
    is_bad = ~(np.isfinite(k).all(axis=-1) & np.isfinite(v).all(axis=-1))
    flags = blocked(is_bad[..., None], blocks, 64)[..., 0]
    expected = np.where(flags.any(axis=-1), flags.argmax(axis=-1), 255)
    judge.compare("k_bad", got["k_bad"], expected)


def judge_nothing(judge, got, blocks):
    """Blocks that belong to no sequence."""
    for name, array in got.items():
        if array.ndim < 3 or name in ("token_mean", "v_scale"):
            continue
        empty = array[:, :, blocks[name[0]] :]
        expected = {"similarity": 1.0, "bad": 255.0}.get(name.partition("_")[2], 0.0)
        judge.compare(f"{name} of no sequence", empty, np.full(empty.shape, expected))


def problems(case, rng, run):
    """Run a case and return what is wrong with its outputs: an empty list if all is well.

    `run(prologue, arrays, ints)` returns {section: array}; arrays are q, k and v as views of their
    memory, ints the int32 arrays by name. Every output starts as something that is never right.
    """
    placed = inputs(case, rng)
    prologue = plan_of(case, placed)
    raw = run(prologue, {n: one.view for n, one in zip("qkv", placed, strict=True)}, lists(case))
    return judged(case, prologue, placed, raw)


def judged(case, prologue, placed, raw):
    judge = Judge(case)
    assert raw.keys() >= prologue.sections.keys() - {"partial"}
    for name, section in prologue.sections.items():
        if name != "partial":
            assert raw[name].shape == section.shape, name
            assert raw[name].dtype == section.dtype, name
    got = {name: raw[name] for name in prologue.sections if name != "partial"}
    for name in ("q", "k", "v"):
        got[f"{name}_codes"], rest = unpacked(
            prologue, f"{name}_tile", got.pop(f"{name}_tile"), case.head_dim
        )
        judge.compare(f"{name}_tile behind the channels", rest, np.zeros(rest.shape))

    q, k, v = (decode(np.ascontiguousarray(one.view), case.dtype) for one in placed)
    group = case.heads[0] // case.heads[1]
    for b, (of_q, of_k) in enumerate(zip(parts(case, 0), parts(case, 1), strict=True)):
        at = 0 if case.packed else b

        def blocks(name, of, at=at):
            return got[name][at][:, of.blocks]

        keys, values = k[at][:, of_k.tokens], v[at][:, of_k.tokens]
        finite = np.where(np.isfinite(keys), keys, 0.0)
        count = max(keys.shape[1], 1)
        size = np.abs(finite).sum(axis=1) / count
        mean = got["token_mean"][b].astype(np.float64)
        judge.compare("token_mean", mean, finite.sum(axis=1) / count, DEPTH * EPS * size + TINY)
        if not np.isfinite(mean).all():
            continue  # nothing else can be judged

        names = [name for name in got if name[0] == "q"]
        mine = {name: blocks(name, of_q) for name in names}
        judge_queries(judge, case, mine, q[at][:, of_q.tokens], np.repeat(mean, group, axis=0))
        names = ("k_scale", "k_mean", "k_similarity", "k_bad", "k_codes", "v_codes")
        mine = {name: blocks(name, of_k) for name in names}
        mine["v_scale"] = got["v_scale"][b]
        judge_keys(judge, case, mine, keys, mean)
        judge_values(judge, mine, values, prologue.formats)
        judge_bad_keys(judge, mine, keys, values)
    used = {name: parts(case, name != "q")[-1].blocks.stop for name in "qkv"}
    judge_nothing(judge, got, used)
    return judge.found
