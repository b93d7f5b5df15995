"""What may be skipped: the policies `TopCdf`, `TopK` and `Dense`.

A policy is a frozen dataclass of thresholds. It is validated when it is made, so that a wrong
threshold is reported where it was typed; only the number of heads is checked at the call.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from cusparge.errors import InvalidArgumentError, shown

__all__ = ["Dense", "PerHead", "Policy", "TopCdf", "TopK"]

#: One number for all heads, or one for each query head.
PerHead: TypeAlias = "float | Sequence[float]"


#: More blocks than any sequence has; sums with it stay within 64 bits.
_MANY_BLOCKS = 2**31 - 1

#: More heads than any model has.
_MANY_HEADS = 65536


def _number(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise InvalidArgumentError(
            f"{name} must be a number, or one number per query head: got {shown(value)}; "
            f"allowed {allowed}."
        )
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            f"{name} must be a number, or one number per query head: got {shown(value)} of type "
            f"{type(value).__name__}; allowed {allowed}."
        ) from error


def _threshold(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> Any:
    """Return a float or a tuple of floats in [low, high], or say what is wrong."""
    bracket = "(" if open_low else "["
    end = ")" if math.isinf(high) else "]"
    allowed = f"{bracket}{low:g}, {high:g}{end}"
    if math.isinf(high):
        allowed = "0 or more, or math.inf to switch it off for a head"

    def checked(item: Any, where: str) -> float:
        number = _number(where, item, allowed)
        inside = low < number <= high if open_low else low <= number <= high
        if not inside:  # NaN lands here as well
            raise InvalidArgumentError(
                f"{where} is out of range: got {shown(number)}; allowed {allowed}. "
                f"Pass one number in that range, or one for each query head."
            )
        return number

    if not isinstance(value, (int, float)) and hasattr(value, "tolist"):  # arrays and scalars
        try:
            value = value.tolist()
        except (TypeError, ValueError, RuntimeError) as error:  # no data: torch's meta, tracers
            raise InvalidArgumentError(
                f"{name} cannot be read: got a {type(value).__name__} that says {str(error)!r}; "
                f"pass a number or a list, allowed {allowed}."
            ) from error
    # The order of a set is not that of the heads, and a mapping would give its keys.
    unordered = isinstance(value, (str, bytes, Mapping, Set))
    if isinstance(value, Iterable) and not unordered:
        items = list(itertools.islice(value, _MANY_HEADS + 1))
        if len(items) > _MANY_HEADS:
            raise InvalidArgumentError(
                f"{name} has more than {_MANY_HEADS} values: got {shown(value)}; allowed is one "
                "number, or one for each query head."
            )
        if not items:
            raise InvalidArgumentError(
                f"{name} is empty: got a sequence of length 0; "
                "pass one number, or one for each query head."
            )
        return tuple(checked(item, f"{name}[{i}]") for i, item in enumerate(items))
    return checked(value, name)


def _count(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError) as error:  # arrays and float tensors have it, and refuse
        raise InvalidArgumentError(
            f"{name} must be a whole number of blocks: got {shown(value)}; allowed 0 or more."
        ) from error
    if number < 0:
        raise InvalidArgumentError(
            f"{name} is negative: got {shown(number)}; allowed 0 or more blocks."
        )
    return min(number, _MANY_BLOCKS)


class _Common:
    """The checks of the fields that all policies share."""

    pv_threshold: PerHead | None
    sink_blocks: int
    local_blocks: int
    quantize: bool | None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_common(self) -> None:
        pv = self.pv_threshold
        if pv is not None:
            self._set("pv_threshold", _threshold("pv_threshold", pv, 0.0, math.inf))
        for name in ("sink_blocks", "local_blocks"):
            self._set(name, _count(name, getattr(self, name)))
        quantize = self.quantize
        if isinstance(quantize, np.bool_):
            self._set("quantize", bool(quantize))
        elif quantize is not None and not isinstance(quantize, bool):
            raise InvalidArgumentError(
                f"quantize must be True, False or None: got {shown(quantize)}. None picks what the "
                "device is fast at."
            )


@dataclass(frozen=True)
class TopCdf(_Common):
    """The paper's rule: the smallest set of key blocks that reaches a share of the pooled softmax.

    Per block of 128 queries, the softmax over mean-pooled blocks of 64 keys predicts where the
    attention goes (arXiv:2502.18137, section 3.2); the blocks with the largest share are kept
    until they reach `cdf_threshold` together. Blocks that a mean represents badly, because their
    tokens differ among themselves, are always computed.

    Parameters
    ----------
    cdf_threshold : float or sequence of float, default 0.98
        The paper's tau, in [0, 1]: the share to reach. 1 keeps every block.
    sim_threshold : float or sequence of float, default 0.3
        The paper's theta, in [-1, 1]: a block whose self-similarity is not above it is always
        computed. A negative value never does so; 1 always does, so that the head is dense.
    pv_threshold : float or sequence of float, optional
        Stage 2 (the paper's -lambda, natural-log units, at least 0): skip the P·V product of a
        tile where every row's maximum lies more than this below its running maximum. None:
        never; ``math.inf``: never for that head.
    rule : {"reach", "within"}
        "reach": the smallest set whose share is at least `cdf_threshold`. "within": the largest
        whose share is at most that, at least one block (the rule of the original code).
    sink_blocks : int, default 0
        The first n key blocks are always computed.
    local_blocks : int, default 0
        So are n key blocks around the diagonal: with D_lo to D_hi the blocks that hold the
        diagonal keys of the query block's first and last row, blocks D_lo-n+1 to D_hi, and up to
        D_hi+n-1 without causality.
    quantize : bool, optional
        True: int8 Q·K and fp8 P·V. False: the inputs' precision. None: what the device is fast
        at (float32 arithmetic on the CPU).

    Raises
    ------
    InvalidArgumentError
        A threshold is outside its range or not a number.

    Examples
    --------
    >>> TopCdf(0.95, sim_threshold=-1).cdf_threshold
    0.95
    """

    cdf_threshold: PerHead = 0.98
    sim_threshold: PerHead = 0.3
    pv_threshold: PerHead | None = None
    rule: Literal["reach", "within"] = field(default="reach", kw_only=True)
    sink_blocks: int = field(default=0, kw_only=True)
    local_blocks: int = field(default=0, kw_only=True)
    quantize: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Validate every field."""
        self._set("cdf_threshold", _threshold("cdf_threshold", self.cdf_threshold, 0.0, 1.0))
        self._set("sim_threshold", _threshold("sim_threshold", self.sim_threshold, -1.0, 1.0))
        if not isinstance(self.rule, str) or self.rule not in ("reach", "within"):
            raise InvalidArgumentError(
                f'rule is unknown: got {shown(self.rule)}; allowed "reach" and "within".'
            )
        self._check_common()


@dataclass(frozen=True)
class TopK(_Common):
    """Keep a fixed share of the key blocks that each query block may see, highest scores first.

    Parameters
    ----------
    keep : float or sequence of float, default 0.5
        The share, in (0, 1], of the blocks that causality and the lengths leave reachable for
        the query block: ceil(keep * reachable) are computed, so causal attention keeps the same
        share as full attention.
    sim_threshold : float or sequence of float, default -1.0
        As in `TopCdf`; such blocks come on top of the share. Negative: never.
    pv_threshold, sink_blocks, local_blocks, quantize
        As in `TopCdf`. Sink and local blocks are counted within the share.

    Raises
    ------
    InvalidArgumentError
        A threshold is outside its range or not a number.
    """

    keep: PerHead = 0.5
    sim_threshold: PerHead = -1.0
    pv_threshold: PerHead | None = None
    sink_blocks: int = field(default=0, kw_only=True)
    local_blocks: int = field(default=0, kw_only=True)
    quantize: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Validate every field."""
        self._set("keep", _threshold("keep", self.keep, 0.0, 1.0, open_low=True))
        self._set("sim_threshold", _threshold("sim_threshold", self.sim_threshold, -1.0, 1.0))
        self._check_common()


@dataclass(frozen=True)
class Dense(_Common):
    """Compute every block: dense attention, quantized where `quantize` says so.

    Parameters
    ----------
    pv_threshold, sink_blocks, local_blocks, quantize
        As in `TopCdf`. The two block counts change nothing here, as every block is computed.

    Raises
    ------
    InvalidArgumentError
        A threshold is outside its range or not a number.
    """

    pv_threshold: PerHead | None = None
    sink_blocks: int = field(default=0, kw_only=True)
    local_blocks: int = field(default=0, kw_only=True)
    quantize: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Validate every field."""
        self._check_common()


#: Any of the three.
Policy: TypeAlias = "TopCdf | TopK | Dense"
