"""The comparisons themselves: each has to fail for what it is there to find."""

import numpy as np
import pytest
from compare import assert_close, assert_refused, assert_same_bits, plain_attention, relative_l1

BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_what_is_not_finite_passes_no_bound(rng, bad, dtype):
    want = rng.standard_normal((3, 4, 5)).astype(dtype)
    got = want.copy()
    got[1, 2, 3] = bad
    for wrong, right in ((got, want), (want, got)):
        with pytest.raises(AssertionError, match=r"\(1, 2, 3\)"):
            assert_close(wrong, right, atol=1e30, rtol=1e30)
        with pytest.raises(AssertionError, match=r"\(1, 2, 3\)"):
            assert_same_bits(wrong, right)
        assert not relative_l1(wrong, right) <= 1e30
    assert_close(got, got)
    assert_same_bits(got, got)


def test_differences_are_seen_and_bounds_are_kept(rng):
    want = rng.standard_normal((6, 7))
    got = want.copy()
    got[4, 5] += 1e-3
    with pytest.raises(AssertionError, match=r"first at \(4, 5\).*\bgot\b.*\bwant\b"):
        assert_close(got, want, atol=0.9e-3)
    assert_close(got, want, atol=1.1e-3)
    with pytest.raises(AssertionError, match="inf"):
        assert_close([np.inf], [-np.inf], atol=np.inf)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(want, want[:1], atol=9)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(want, want.astype("f4"))
    with pytest.raises(AssertionError, match="bits"):
        assert_same_bits(np.array([0.0]), np.array([-0.0]))


def test_refusals_have_the_class_and_the_words():
    def refuse():
        raise KeyError("not this one")

    assert_refused(KeyError, refuse, "not", "one")
    for error, words in ((KeyError, ["that"]), (LookupError, ["not"])):
        with pytest.raises(AssertionError):
            assert_refused(error, refuse, *words)
    with pytest.raises(AssertionError, match="nothing was raised"):
        assert_refused(KeyError, lambda: None)


def test_the_plain_statement_by_hand():
    q = np.array([[[[1.0], [0.0]]]])
    k = np.array([[[[0.0], [np.log(3.0)]]]])
    v = np.array([[[[4.0], [8.0]]]])
    out, lse = plain_attention(q, k, v, scale=1.0)
    assert_close(out[0, 0, :, 0], [7.0, 6.0], rtol=1e-15)
    assert_close(lse[0, 0], np.log([4.0, 2.0]), rtol=1e-15)
    out, lse = plain_attention(q, k, v, seen=np.array([[True, False], [False, False]]))
    assert_close(out[0, 0, :, 0], [4.0, 0.0])
    assert_close(lse[0, 0], [0.0, -np.inf])
