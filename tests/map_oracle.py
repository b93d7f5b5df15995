"""An oracle of the kernels of block_map.cu, and what is wrong with their results.

Written from the definitions: it sorts where the kernels bisect, looks at single pairs of tokens,
and shares no code with the package. Cases and their inputs are those of map_cases.py.
"""

import itertools
import math
from dataclasses import dataclass

import map_cases
import numpy as np

from cusparge._cuda import block_map

POISON = 0xA5A5A5A5


# ---- the oracle --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One sequence: its blocks among those of the arrays, and its tokens."""

    first_q: int
    first_k: int
    seqlen_q: int
    seqlen_k: int


def packed_spans(cu_q, cu_k, total_q, total_k):
    """Return the sequences of a packed call, whatever the lists hold."""

    def starts(listed, total):
        reached, found = 0, []
        for one in listed:
            reached = max(reached, min(max(one, 0), total))
            found.append(reached)
        return found

    of_q, of_k = starts(cu_q, total_q), starts(cu_k, total_k)
    spans, at_q, at_k = [], 0, 0
    for b in range(len(cu_q) - 1):
        tokens_q, tokens_k = of_q[b + 1] - of_q[b], of_k[b + 1] - of_k[b]
        spans.append(Span(at_q, at_k, tokens_q, tokens_k))
        at_q, at_k = at_q + math.ceil(tokens_q / 128), at_k + math.ceil(tokens_k / 64)
    return spans


def spans_of(case, b):
    """Return the sequences of a batch item."""
    _, _, _, seqlen_q, seqlen_k, _ = case.shape
    if case.cu_q is not None:
        return packed_spans(case.cu_q, case.cu_k, seqlen_q, seqlen_k)
    valid = seqlen_k if case.lengths is None else min(max(case.lengths[b], 0), seqlen_k)
    return [Span(0, 0, seqlen_q, valid)]


def offset_of(case, span):
    """Return the causal offset of a sequence, None without causality."""
    if case.align is None:
        return None
    if case.align == "top_left":
        return 0
    # Of the arrays, but of each packed sequence.
    seqlen_q, seqlen_k = case.shape[3:5]
    return span.seqlen_k - span.seqlen_q if case.cu_q is not None else seqlen_k - seqlen_q


def seen_blocks(rows, span, offset):
    """Return which key blocks of a sequence hold a pair that these rows may see."""
    blocks = math.ceil(span.seqlen_k / 64)
    keys = np.arange(blocks * 64)
    seen = np.broadcast_to(keys < span.seqlen_k, (len(rows), len(keys)))
    if offset is not None:
        seen = seen & (keys <= rows[:, None] + offset)
    return seen.any(axis=0).reshape(blocks, 64).any(axis=1)


def forced_blocks(rows, blocks, offset, sink, local):
    """Return which blocks are computed whatever their score, where they can be seen."""
    column = np.arange(blocks)
    forced = column < sink
    diagonal = (rows + (offset or 0)) // 64  # rounds down
    low, high = diagonal.min(), diagonal.max()
    if offset is not None:
        forced = forced | ((low <= column) & (column <= high))
    if local:
        more = 0 if offset is not None else local - 1
        forced = forced | ((low - local + 1 <= column) & (column <= high + more))
    return forced


def weights_of(scores):
    """Return floor(2^20 * 2^(score - largest)), the power rounded to float32 but less than 1."""
    below = (scores - scores.max()).astype(np.float64)
    powers = np.exp2(below).astype(np.float32).astype(np.float64)
    weights = np.floor(powers * 2**20).astype(np.int64)
    return np.where(below < 0, np.minimum(weights, 2**20 - 1), weights)


def pick(weights, forced, num_forced, reachable, rule, share):
    """Return the candidates, heaviest first and lower index at a tie, and how many are taken.

    `forced` says which of them are, `num_forced` how many blocks: a fix block may be forced too.
    """
    if rule == "topk":
        wanted = max(1, min(reachable, math.ceil(share * reachable - 1e-6 * reachable)))
        order = [j for j in np.lexsort((np.arange(len(weights)), -weights)) if not forced[j]]
        return order, max(0, wanted - num_forced)
    order = list(np.lexsort((np.arange(len(weights)), -weights)))
    if share >= 1:
        return order, len(order)
    total, running, count = int(weights.sum()), 0, 0
    for j in order:
        if rule == "reach" and running >= share * float(total):
            break
        running += int(weights[j])
        if rule == "within" and running > share * float(total):
            break
        count += 1
    return order, max(count, 1)


def oracle_row(case, arrays, b, h, i, span):
    """Return (chosen blocks, first block, reachable blocks) of one row of the map."""
    heads_q, heads_k = case.shape[1:3]
    kv = h * heads_k // heads_q
    rows = np.arange(128 * (i - span.first_q), min(128 * (i - span.first_q + 1), span.seqlen_q))
    offset = offset_of(case, span)
    seen = seen_blocks(rows, span, offset)
    count = int(seen.sum())
    assert not seen[count:].any()
    everything = (seen, 0, count)
    if case.rule == "dense" or count == 0:
        return everything

    def of_head(value):
        return value[h] if isinstance(value, tuple) else value

    forced = forced_blocks(rows, len(seen), offset, case.sink, case.local) & seen
    keys = slice(span.first_k, span.first_k + len(seen))
    alike = arrays["k_similarity"][b, kv, keys] > np.float64(of_head(case.sim))
    q, k = arrays["q_mean"][b, h, i], arrays["k_mean"][b, kv, keys]
    with np.errstate(invalid="ignore"):
        products = k.astype(np.float64) @ q.astype(np.float64)
        tokens = np.minimum(64, span.seqlen_k - 64 * np.arange(len(seen)))
        scores = (products * case.scale).astype(np.float32)
        scores += np.log2(tokens / 64).astype(np.float32)
    candidates = seen & alike & np.isfinite(scores)
    if not arrays["q_similarity"][b, h, i] > np.float64(of_head(case.sim)) or not candidates.any():
        return everything
    if case.max_seqlen_k is not None and count > math.ceil(case.max_seqlen_k / 64):
        return everything

    index = np.flatnonzero(candidates)
    weights = weights_of(scores[index])
    share = of_head(case.share)
    order, take = pick(weights, forced[index], int(forced.sum()), count, case.rule, share)
    chosen = seen & (forced | ~candidates)
    chosen[index[order[:take]]] = True
    scored = np.where(chosen & candidates, scores, -np.inf)
    first = int(np.argmax(scored)) if (chosen & candidates).any() else int(np.argmax(chosen))
    return chosen, first, count


def oracle(case, arrays):
    """Return the map (rows, key blocks), the first blocks and the reachable counts (rows,)."""
    batch, heads_q = case.shape[:2]
    blocks_q, _ = map_cases.blocks_of(case)
    width = math.ceil(case.shape[4] / 64)
    chosen = np.zeros((batch, heads_q, blocks_q, width), np.bool_)
    first, reachable = np.zeros((2, batch, heads_q, blocks_q), np.int64)
    for b, h in itertools.product(range(batch), range(heads_q)):
        for span in spans_of(case, b):
            for i in range(span.first_q, span.first_q + math.ceil(span.seqlen_q / 128)):
                found = oracle_row(case, arrays, b, h, i, span)
                chosen[b, h, i, : len(found[0])] = found[0]
                first[b, h, i], reachable[b, h, i] = found[1:]
    return chosen.reshape(first.size, width), first.ravel(), reachable.ravel()


# ---- running and judging -----------------------------------------------------------------------


def poisoned(plan):
    """Return the plan's outputs, which hold anything."""
    found = {}
    for one in plan.outputs:
        found[one.name] = np.full(one.shape, POISON if one.dtype == "uint32" else 0xA5, one.dtype)
    return found


def unpacked(bits, width):
    """Return the bits of words, lowest first, as bools; those beyond `width` must be 0."""
    rows = bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1])
    found = (rows[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(len(rows), -1)
    assert not found[:, width:].any(), "a bit beyond the last key block"
    return found[:, :width].astype(np.bool_)


def queue_problems(outputs, counts):
    """Return what is wrong with the order of the rows."""
    per_class, items = outputs["class_counts"], outputs["items"]
    found = []
    if outputs["ticket"][0] != 0:
        found.append(f"the ticket counter is {outputs['ticket'][0]}")
    if per_class.sum() != len(counts):
        return [*found, f"{per_class.sum()} rows are in the queue, not {len(counts)}"]
    rows = [items[c, : per_class[c]] for c in range(len(per_class))]
    everything = np.concatenate(rows)
    if sorted(everything.tolist()) != list(range(len(counts))):
        return [*found, "the queue is no permutation of the rows"]
    for c in range(len(rows)):
        if (items[c, per_class[c] :] != POISON).any():
            found.append(f"class {c} was written beyond its count")
    filled = [counts[one] for one in rows if len(one)]
    for more, fewer in itertools.pairwise(filled):
        if more.min() <= fewer.max():
            found.append("a row goes before one with more blocks")
    for one in filled:  # two classes to the octave
        if one.max() > 0 and not one.max() < 1.5 * one.min():
            found.append(f"one class holds {one.min()} and {one.max()} blocks")
    return found


def problems(case, rng, run):
    """Run a case and return what is wrong with its outputs: an empty list if all is well.

    `run(plan, arrays, outputs)` fills the outputs, which hold poison.
    """
    arrays = map_cases.inputs(case, rng)
    return problems_with(case, arrays, run)


def problems_with(case, arrays, run):
    """Do the same with inputs at hand."""
    plan = case.plan()
    if any("rules" in launch.pointers for launch in plan.launches):
        table = block_map.rule_table(case.policy, case.shape[1])
        arrays = arrays | {"rules": np.frombuffer(table, np.uint8)}
    outputs = poisoned(plan)
    run(plan, arrays, outputs)
    expected, first, reachable = oracle(case, arrays)
    width = math.ceil(case.shape[4] / 64)
    got = unpacked(outputs["bits"], width)
    found = [
        *differences(case, "bits", got, expected),
        *differences(case, "first", outputs["first"].ravel(), first),
        *differences(case, "count", outputs["count"].ravel(), expected.sum(axis=1)),
        *differences(case, "reachable", outputs["reachable"].ravel(), reachable),
    ]
    if case.mask:
        found += differences(case, "mask", outputs["mask"].reshape(got.shape), expected)
    if case.queue:
        found += queue_problems(outputs, expected.sum(axis=1))
    return found


def differences(case, name, actual, expected):
    """Return a sentence on the first element that differs, if one does."""
    wrong = actual != expected
    if not wrong.any():
        return []
    at = tuple(map(int, np.argwhere(wrong)[0]))
    return [
        f"{case}: {name}{list(at)} is {actual[at]}, not {expected[at]} "
        f"({wrong.sum()} of {wrong.size})"
    ]


# ---- a caller's mask ---------------------------------------------------------------------------


def given_problems(case, rng, run):
    """Run a case of a caller's mask and return what is wrong with its outputs."""
    batch, heads, _, seqlen_q, seqlen_k, _ = case.shape
    shape = [batch, heads, math.ceil(seqlen_q / case.block_q), math.ceil(seqlen_k / case.block_k)]
    for dimension in case.ones:
        shape[dimension] = 1
    kept = rng.random(shape) < rng.random((*shape[:3], 1))
    numbers = rng.integers(1, np.iinfo(case.dtype).max, shape) if case.dtype != "bool" else True
    # The lowest byte of a number may be 0.
    mask = np.where(kept, numbers << (8 if numbers is not True else 0), 0).astype(case.dtype)
    mask[kept & (mask == 0)] = 1
    if case.layout == "reversed":
        mask = np.ascontiguousarray(mask[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]
    elif case.layout == "turned":
        mask = np.ascontiguousarray(mask.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)
    elif case.layout == "wide":
        memory = np.ones((*shape[:3], 2 * shape[3] + 3), case.dtype)
        memory[..., 1 : 1 + 2 * shape[3] : 2] = mask
        mask = memory[..., 1 : 1 + 2 * shape[3] : 2]
    given = block_map.GivenMask(mask.shape, mask.strides, mask.itemsize, case.block_q, case.block_k)
    plan = block_map.given_plan(
        block_map.MapShape(*case.shape),
        given,
        causal=case.align is not None,
        causal_align=case.align or "bottom_right",
        has_lengths=case.lengths is not None,
    )
    arrays = {"given": mask}
    if case.lengths is not None:
        arrays["lengths"] = np.array(case.lengths, np.int64).astype(np.int32)
    outputs = poisoned(plan)
    run(plan, arrays, outputs)

    blocks_q, width = math.ceil(seqlen_q / 128), math.ceil(seqlen_k / 64)
    expected = np.zeros((batch, heads, blocks_q, 2, width), np.bool_)
    reachable = np.zeros((batch, heads, blocks_q), np.int64)
    as_case = map_cases.Case(case.shape, align=case.align, lengths=case.lengths)
    for b, h, i in itertools.product(range(batch), range(heads), range(blocks_q)):
        span = spans_of(as_case, b)[0]
        of_head = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0] != 0
        for half in range(2):
            rows = np.arange(128 * i + 64 * half, min(128 * i + 64 * half + 64, seqlen_q))
            if len(rows):
                seen = seen_blocks(rows, span, offset_of(as_case, span))
                column = np.arange(len(seen))
                kept = of_head[rows[0] // case.block_q, 64 * column // case.block_k]
                expected[b, h, i, half, : len(seen)] = seen & kept
                reachable[b, h, i] = max(reachable[b, h, i], seen.sum())
    union = expected.any(axis=3).reshape(-1, width)
    first = np.where(union.any(axis=1), union.argmax(axis=1), 0)
    found = [
        *differences(case, "bits", unpacked(outputs["bits"], width), union),
        *differences(case, "first", outputs["first"].ravel(), first),
        *differences(case, "count", outputs["count"].ravel(), union.sum(axis=1)),
        *differences(case, "reachable", outputs["reachable"].ravel(), reachable.ravel()),
        *queue_problems(outputs, union.sum(axis=1)),
    ]
    if case.block_q == 64:
        halves = unpacked(outputs["halves"], width)
        found += differences(case, "halves", halves, expected.reshape(-1, width))
    return found
