"""Comparisons that a NaN cannot pass, for arrays of any framework.

Each raises `AssertionError` naming the first coordinate that differs. Where values have to be
close, NaN and both infinities must stand in the same places first, and the bounds are written so
that a NaN fails them.
"""

import sys

import numpy as np

__all__ = [
    "as_float64",
    "assert_close",
    "assert_refused",
    "assert_same_bits",
    "bits",
    "plain_attention",
    "relative_l1",
    "visible",
]


def bits(array):
    """The bits of an array of any framework, as NumPy integers; bfloat16 included."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach()
        if array.dtype == torch.bfloat16:
            array = array.view(torch.int16)
        array = array.numpy()
    array = np.asarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def as_float64(array):
    """The values of an array of any framework, as float64."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return array.detach().to(torch.float64).numpy()
    return np.asarray(array).astype(np.float64)


def _dtype_name(array):
    return str(array.dtype).removeprefix("torch.")


def _differ(where, got, want, what, label):
    """Raise for the first True of `where`."""
    index = tuple(int(i) for i in np.argwhere(where)[0])
    raise AssertionError(
        f"{label or 'arrays'} differ ({what}) at {int(where.sum())} of {where.size} places, "
        f"first at {index}: got {got[index]!r}, want {want[index]!r}"
    )


def _check_shape(got, want, label):
    if tuple(got.shape) != tuple(want.shape):
        raise AssertionError(
            f"{label or 'arrays'} differ in shape: got {tuple(got.shape)}, want {tuple(want.shape)}"
        )


def assert_same_bits(got, want, label=""):
    """Same dtype, shape and bits; signs of zero and payloads of NaN included."""
    if _dtype_name(got) != _dtype_name(want):
        raise AssertionError(
            f"{label or 'arrays'} differ in dtype: got {_dtype_name(got)}, want {_dtype_name(want)}"
        )
    _check_shape(got, want, label)
    where = bits(got) != bits(want)
    if where.any():
        _differ(where, as_float64(got), as_float64(want), "bits", label)


def assert_close(got, want, *, atol=0.0, rtol=0.0, label=""):
    """NaN, +inf and -inf in the same places, and |got - want| <= atol + rtol·|want| elsewhere."""
    got, want = as_float64(got), as_float64(want)
    _check_shape(got, want, label)
    for what, kind in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        where = kind(got) != kind(want)
        if where.any():
            _differ(where, got, want, f"{what} in other places", label)
    finite = np.isfinite(want)
    error = np.zeros(want.shape)
    error[finite] = np.abs(got[finite] - want[finite])
    limit = np.zeros(want.shape)
    limit[finite] = atol + rtol * np.abs(want[finite])
    where = ~(error <= limit)
    if where.any():
        worst = float(error.max())
        _differ(where, got, want, f"beyond atol={atol:g}, rtol={rtol:g}, worst {worst:g}", label)


def relative_l1(got, want):
    """Σ|got - want| / Σ|want|, and inf where any element of either is not finite."""
    got, want = as_float64(got), as_float64(want)
    _check_shape(got, want, "")
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    total, error = np.abs(want).sum(), np.abs(got - want).sum()
    if total == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / total)


def assert_refused(error, call, *words):
    """`call` raises exactly `error`, whose text holds all `words` and no bare address."""
    try:
        call()
    except error as raised:
        text, kind = str(raised), type(raised)
    else:
        raise AssertionError(f"nothing was raised; expected {error.__name__} with {words}")
    if kind is not error:
        raise AssertionError(f"expected {error.__name__}, got {kind.__name__}: {text}")
    missing = [word for word in words if word not in text]
    if missing:
        raise AssertionError(f"{missing} not said by: {text}")
    if " at 0x" in text:
        raise AssertionError(f"an address instead of a value: {text}")


def visible(seqlen_q, seqlen_k, *, causal=False, align="bottom_right", length=None):
    """(seqlen_q, seqlen_k) bool: the pairs that causality and the valid length allow."""
    rows, keys = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    seen = np.broadcast_to(keys < (seqlen_k if length is None else length), (seqlen_q, seqlen_k))
    if causal:
        seen = seen & (keys <= rows + (seqlen_k - seqlen_q if align == "bottom_right" else 0))
    return seen


def plain_attention(q, k, v, *, seen=None, scale=None):
    """Dense softmax attention in float64, (B, H, S, D), and its LSE: one plain statement.

    `seen` broadcasts to (B, Hq, Sq, Sk). A row without keys gives 0 and -inf.
    """
    q, k, v = as_float64(q), as_float64(k), as_float64(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = scale * np.einsum("bhid,bhjd->bhij", q, k)
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    out = np.einsum("bhij,bhjd->bhid", weights, v) / np.where(total == 0, 1.0, total)
    return out, lse
