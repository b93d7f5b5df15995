"""Block maps made by hand: every geometry and framework, exactly what the mask says."""

import copy
import pickle

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, bits, plain_attention

from cusparge import BlockMap, TopK, attention, predict_block_map


def make(rng, dim=64, seqlen_q=200, seqlen_k=330):
    return (
        rng.standard_normal((2, 4, seqlen_q, dim), np.float32),
        rng.standard_normal((2, 2, seqlen_k, dim), np.float32),
        rng.standard_normal((2, 2, seqlen_k, dim), np.float32),
    )


def in_tokens(mask, block_q, block_k, seqlen_q, seqlen_k):
    wide = np.repeat(np.repeat(mask != 0, block_q, axis=2), block_k, axis=3)
    return wide[:, :, :seqlen_q, :seqlen_k]


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("kind", ["bool", "int32", "uint8"])
@pytest.mark.parametrize("shared", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
def test_masks_are_law(rng, request, framework, kind, shared, block_q, block_k):
    seqlen_q, seqlen_k = 321, 385
    q, k, v = make(rng, 8, seqlen_q, seqlen_k)
    shape = [1 if s else n for s, n in zip(shared, (2, 4), strict=True)]
    shape += [-(-seqlen_q // block_q), -(-seqlen_k // block_k)]
    mask = rng.integers(0, 3, shape).astype(kind)  # twos, too: anything but 0 keeps a block
    mask[:, :, -1] = 0
    given = mask
    if framework == "torch":
        given = request.getfixturevalue("torch").from_numpy(mask)
    elif framework == "jax":
        given = request.getfixturevalue("jax").numpy.asarray(mask)
    block_map = BlockMap.from_mask(
        given, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_q=block_q, block_k=block_k
    )
    seen = in_tokens(mask, block_q, block_k, seqlen_q, seqlen_k)
    want, want_lse = plain_attention(q, k, v, seen=seen)
    out, lse = attention(q, k, v, block_map=block_map, return_lse=True)
    assert_close(out, want, atol=1e-5 * abs(v).max())  # scores up to 30, in float32
    assert_close(lse, want_lse, atol=1e-5, rtol=1e-6)
    assert type(block_map.mask) is type(given)
    assert tuple(block_map.mask.shape) == (*shape[:2], 3, 7)
    blocks = np.zeros((*shape[:2], 3, 7), bool)
    for i, j in np.ndindex(3, 7):
        blocks[:, :, i, j] = seen[:, :, 128 * i : 128 * i + 128, 64 * j : 64 * j + 64].any((2, 3))
    assert (bits(block_map.mask) == blocks).all()
    assert block_map.sparsity == pytest.approx(1 - blocks.mean(), abs=1e-12)


def test_a_map_keeps_no_hold_on_the_mask_it_was_made_from(rng):
    q, k, v = make(rng)
    for block_q in (64, 128):
        mask = np.ones((1, 1, -(-200 // block_q), 6), bool)
        block_map = BlockMap.from_mask(mask, seqlen_q=200, seqlen_k=330, block_q=block_q)
        want = attention(q, k, v, block_map=block_map)
        mask[...] = False
        assert_same_bits(attention(q, k, v, block_map=block_map), want)
        assert bits(block_map.mask).all()


def test_maps_are_read_only_and_can_be_kept(rng):
    q, k, v = make(rng)
    block_map = predict_block_map(q, k, policy=TopK(0.4))
    want = attention(q, k, v, block_map=block_map)
    for name in ("mask", "seqlen_q", "sparsity", "anything"):
        with pytest.raises(AttributeError):
            setattr(block_map, name, 1)
    with pytest.raises(AttributeError):
        del block_map.seqlen_k
    with pytest.raises(ValueError, match="read-only"):
        block_map.mask[...] = False
    for kept in (copy.deepcopy(block_map), pickle.loads(pickle.dumps(block_map))):
        assert kept.sparsity == block_map.sparsity
        assert_same_bits(attention(q, k, v, block_map=kept), want)
