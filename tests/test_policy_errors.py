"""Thresholds and block masks that are refused where they are typed, and in which words."""

import math

import numpy as np
import pytest
from compare import assert_refused

from cusparge import BlockMap, Dense, DeviceError, InvalidArgumentError, TopCdf, TopK

nan, inf = math.nan, math.inf

WRONG_POLICIES = {
    "cdf above": (lambda: TopCdf(1.01), ["cdf_threshold", "1.01", "[0, 1]"]),
    "cdf below": (lambda: TopCdf(-0.01), ["cdf_threshold", "-0.01", "[0, 1]"]),
    "cdf NaN": (lambda: TopCdf(nan), ["cdf_threshold", "nan", "[0, 1]"]),
    "cdf one NaN": (lambda: TopCdf([0.5, nan]), ["cdf_threshold[1]", "nan"]),
    "cdf text": (lambda: TopCdf("0.5"), ["cdf_threshold", "number", "'0.5'"]),
    "cdf None": (lambda: TopCdf(None), ["cdf_threshold", "number", "None"]),
    "cdf bool": (lambda: TopCdf(True), ["cdf_threshold", "number", "True"]),
    "cdf bools": (lambda: TopCdf(np.array([True])), ["cdf_threshold[0]", "True"]),
    "cdf complex": (lambda: TopCdf(0.5j), ["cdf_threshold", "0.5j"]),
    "cdf empty": (lambda: TopCdf([]), ["cdf_threshold", "empty", "one for each query head"]),
    "cdf 2-D": (lambda: TopCdf(np.ones((2, 2))), ["cdf_threshold[0]", "number"]),
    "cdf set": (lambda: TopCdf({0.1, 0.2}), ["cdf_threshold", "number"]),
    "cdf mapping": (lambda: TopCdf({0.1: "a"}), ["cdf_threshold", "number"]),
    "sim above": (lambda: TopCdf(0.5, 1.5), ["sim_threshold", "1.5", "[-1, 1]"]),
    "sim below": (lambda: TopK(0.5, -1.5), ["sim_threshold", "-1.5", "[-1, 1]"]),
    "sim NaN": (lambda: TopK(0.5, np.float32(nan)), ["sim_threshold", "nan"]),
    "keep 0": (lambda: TopK(0), ["keep", "got 0.0", "(0, 1]"]),
    "keep above": (lambda: TopK([0.5, 2]), ["keep[1]", "2", "(0, 1]"]),
    "keep NaN": (lambda: TopK(nan), ["keep", "nan", "(0, 1]"]),
    "keep inf": (lambda: TopK(inf), ["keep", "inf", "(0, 1]"]),
    "pv negative": (lambda: Dense(-0.5), ["pv_threshold", "-0.5", "0 or more"]),
    "pv NaN": (lambda: TopCdf(pv_threshold=nan), ["pv_threshold", "nan", "0 or more", "inf"]),
    "pv -inf": (lambda: TopK(pv_threshold=[1, -inf]), ["pv_threshold[1]", "-inf"]),
    "rule": (lambda: TopCdf(rule="exclusive"), ["rule is unknown", "'exclusive'", '"within"']),
    "rule None": (lambda: TopCdf(rule=None), ["rule is unknown", "None", '"reach"']),
    "rule array": (lambda: TopCdf(rule=np.array(["reach", "within"])), ["rule is unknown"]),
    "sink negative": (lambda: TopCdf(sink_blocks=-1), ["sink_blocks", "-1", "0 or more"]),
    "sink float": (lambda: TopK(sink_blocks=1.0), ["sink_blocks", "whole number", "1.0"]),
    "sink bool": (lambda: Dense(sink_blocks=True), ["sink_blocks", "whole number", "True"]),
    "sink array": (lambda: TopCdf(sink_blocks=np.ones(2, int)), ["sink_blocks", "whole number"]),
    "local negative": (lambda: TopK(local_blocks=-2), ["local_blocks", "-2", "0 or more"]),
    "local None": (lambda: TopCdf(local_blocks=None), ["local_blocks", "None"]),
    "quantize": (lambda: TopCdf(quantize=1), ["quantize", "True, False or None", "got 1"]),
    "quantize text": (lambda: Dense(quantize="int8"), ["quantize", "'int8'"]),
}


@pytest.mark.parametrize("case", WRONG_POLICIES)
def test_wrong_policies(case):
    make, words = WRONG_POLICIES[case]
    assert_refused(InvalidArgumentError, make, *words)


def from_mask(mask, seqlen_q=300, seqlen_k=200, **options):
    return lambda: BlockMap.from_mask(mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **options)


GOOD = np.ones((1, 1, 3, 4), bool)
WRONG_MASKS = {
    "rows": (from_mask(GOOD[:, :, :2]), ["(1, 1, 2, 4)", "expected (B or 1, Hq or 1, 3, 4)"]),
    "columns": (from_mask(GOOD[..., :3]), ["(1, 1, 3, 3)", "Hq or 1, 3, 4)", "128 x 64"]),
    "fine": (from_mask(GOOD, block_q=64), ["Hq or 1, 5, 4)", "64 x 64", "seqlen_q=300"]),
    "wide": (from_mask(GOOD, block_k=128), ["Hq or 1, 3, 2)", "128 x 128", "seqlen_k=200"]),
    "2-D": (from_mask(GOOD[0, 0]), ["(3, 4)", "expected (B or 1, Hq or 1, 3, 4)"]),
    "floats": (from_mask(GOOD.astype("f4")), ["bool or integers", "float32", "additive"]),
    "complex": (from_mask(GOOD.astype("c8")), ["bool or integers", "complex64"]),
    "objects": (from_mask(GOOD.astype(object)), ["bool or integers", "object"]),
    "list": (from_mask(GOOD.tolist()), ["mask is not an array", "list"]),
    "None": (from_mask(None), ["mask is not an array", "NoneType"]),
    "masked": (from_mask(np.ma.masked_array(GOOD)), ["mask is a masked array"]),
    "block_q": (from_mask(GOOD, block_q=32), ["block_q", "got 32", "64 and 128"]),
    "block_k": (from_mask(GOOD, block_k=256), ["block_k", "got 256", "64 and 128"]),
    "block_q float": (from_mask(GOOD, block_q=128.0), ["block_q", "128.0"]),
    "block_k array": (from_mask(GOOD, block_k=np.array([64, 64])), ["block_k"]),
    "seqlen negative": (from_mask(GOOD, seqlen_q=-1), ["seqlen_q", "-1", "0 or more"]),
    "seqlen float": (from_mask(GOOD, seqlen_k=200.5), ["seqlen_k", "200.5"]),
    "seqlen bool": (from_mask(GOOD, seqlen_k=True), ["seqlen_k", "True"]),
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_wrong_masks(case):
    make, words = WRONG_MASKS[case]
    assert_refused(InvalidArgumentError, make, *words)


def test_torch_masks_that_cannot_be_read(torch):
    meta = torch.ones(1, 1, 3, 4, device="meta") > 0
    assert_refused(DeviceError, from_mask(meta), "mask is on meta", ".cpu()")
    floats = torch.ones(1, 1, 3, 4, dtype=torch.bfloat16)
    assert_refused(InvalidArgumentError, from_mask(floats), "bool or integers", "bfloat16")
