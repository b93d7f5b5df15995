"""Values that cannot be printed, read or held are refused in words, by the library's own class."""

import os
import tracemalloc

import numpy as np
import pytest

import cusparge
from cusparge import BlockMap, TopCdf, TopK, attention, attention_varlen, predict_block_map

HUGE = 10**5000  # Python refuses to print it


def arrays(dtype=np.float32):
    return (np.ones((2, 1, 130, 4), dtype),) * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention(*arrays(), sm_scale=HUGE),
        lambda: attention(*arrays(), policy=HUGE),
        lambda: attention(*arrays(), causal=HUGE),
        lambda: attention(*arrays(), seqlens_k=[HUGE, 1]),
        lambda: attention(*arrays(), seqlens_k=range(10**12)),
        lambda: attention_varlen(*(x[0].swapaxes(0, 1) for x in arrays()), [0, HUGE], [0, 130]),
        lambda: attention_varlen(
            *(x[0].swapaxes(0, 1) for x in arrays()), [0, 130], [0, 130], max_seqlen_q=-HUGE
        ),
        lambda: TopCdf(HUGE),
        lambda: TopCdf([-HUGE]),
        lambda: TopCdf(range(10**12)),
        lambda: TopCdf(pv_threshold=-HUGE),
        lambda: TopK(sink_blocks=-HUGE),
        lambda: BlockMap.from_mask(np.ones((1, 1, 1, 1), bool), seqlen_q=-HUGE, seqlen_k=64),
        lambda: BlockMap.from_mask(np.ones((1, 1, 1, 1), bool), seqlen_q=HUGE, seqlen_k=64),
    ],
)
def test_huge_numbers_are_refused_in_words(call):
    with pytest.raises(cusparge.InvalidArgumentError) as caught:
        call()
    assert len(str(caught.value)) < 1000


def test_meta_tensors_as_numbers_are_refused_in_words(torch):
    nothing = torch.tensor(1, device="meta")
    with pytest.raises(cusparge.InvalidArgumentError, match="sink_blocks"):
        TopCdf(sink_blocks=nothing)
    with pytest.raises(cusparge.InvalidArgumentError, match=r"seqlens_k\[0\]"):
        attention(*arrays(), seqlens_k=[nothing, 1])


def test_finite_float64_beyond_float32_passes_the_check():
    x = arrays(np.float64)[0].copy()
    x[0, 0, 0, 0] = 1e39
    for backend in ("cpu", "reference"):
        assert np.isfinite(attention(x, x, x, check_numerics=True, backend=backend)).all()
    x[0, 0, 1, 0] = np.inf
    with pytest.raises(cusparge.InvalidArgumentError, match="first at token 1"):
        attention(x, x, x, check_numerics=True)


def test_a_signalling_nan_is_a_nan():
    x = arrays(np.float64)[0].copy()
    x.view(np.uint64)[0, 0, 129, 1] = 0x7FF0000000000001
    assert np.isnan(attention(x, x, x)[0, 0]).all()
    assert np.isfinite(attention(x, x, x)[1]).all()


def test_choosing_blocks_stays_small_for_very_many_keys(rng):
    """A panel's scores are panel x key blocks: with 65,536 key blocks the panel is smaller."""
    q = rng.standard_normal((1, 1, 4096, 1), np.float32)
    k = rng.standard_normal((1, 1, 2**21, 1), np.float32)
    tracemalloc.start()
    try:
        mask = predict_block_map(q, k, policy=TopK(0.01)).mask
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    threads = os.cpu_count() or 1
    assert peak <= 2 * mask.nbytes + threads * 64 * 2**20


@pytest.mark.parametrize(
    "options", [{"layout": "x"}, {"causal": "no"}, {"sm_scale": np.nan}, {"sm_scale": np.inf}]
)
def test_the_reference_refuses_what_it_does_not_know(options):
    with pytest.raises(cusparge.InvalidArgumentError):
        cusparge.reference.attention(*arrays(), **options)
