"""The options of the public calls that have nothing to do with arrays, checked one by one."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from cusparge.errors import InvalidArgumentError, UnsupportedError, shown
from cusparge.policy import Dense, Policy, TopCdf, TopK

__all__ = [
    "check_backend",
    "check_choice",
    "check_flag",
    "check_policy",
    "check_scale",
    "refuse_unknown",
]

_THRESHOLDS = ("cdf_threshold", "sim_threshold", "keep", "pv_threshold")


def check_flag(name: str, value: Any) -> bool:
    """Return a bool, or say that it is none."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidArgumentError(
        f"{name} must be True or False: got {shown(value)}. Pass a bool, for instance "
        f"`bool({name})`."
    )


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return one of the allowed words, or list them."""
    if isinstance(value, str) and value in allowed:
        return value
    words = " and ".join(f'"{word}"' for word in allowed)
    raise InvalidArgumentError(
        f"{name} is unknown: got {shown(value)}; allowed {words}. Pass one of these."
    )


def check_policy(policy: Any, num_heads_q: int) -> Policy:
    """Return a policy whose thresholds fit the number of heads."""
    if policy is None:
        return TopCdf()
    if not isinstance(policy, (TopCdf, TopK, Dense)):
        raise InvalidArgumentError(
            f"policy must be a TopCdf, TopK or Dense, or None for TopCdf(): got {shown(policy)}."
        )
    for name in _THRESHOLDS:
        value = getattr(policy, name, None)
        if isinstance(value, tuple) and len(value) != num_heads_q:
            raise InvalidArgumentError(
                f"{name} has {len(value)} values for {num_heads_q} query heads: pass one number, "
                "or one for each query head."
            )
    return policy


def check_scale(sm_scale: Any, head_dim: int) -> float:
    """Return the factor on the scores."""
    if sm_scale is None:
        return 1.0 / math.sqrt(head_dim)
    try:
        # NumPy's complex numbers would become real with no more than a warning.
        if isinstance(sm_scale, (bool, np.bool_, str, bytes, np.complexfloating)):
            raise TypeError
        scale = float(sm_scale)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        scale = math.nan
    if not math.isfinite(scale):
        raise InvalidArgumentError(
            f"sm_scale must be one finite number: got {shown(sm_scale)}. None means 1 / "
            "sqrt(head_dim)."
        )
    return scale


def check_backend(backend: Any) -> str:
    """Return a backend's name, or list those that exist."""
    return check_choice("backend", backend, ("auto", "cuda", "cpu", "reference"))


def refuse_unknown(function: str, options: dict[str, Any]) -> None:
    """Refuse arguments that other attention functions take and this one does not."""
    advice = {
        "attn_mask": "use seqlens_k for padding, causal=True, or block_map for blocks of tokens",
        "dropout_p": "cusparge is for inference: leave it out",
        "is_causal": "the argument is called causal (and aligned bottom right by default)",
        "scale": "the argument is called sm_scale",
        "softmax_scale": "the argument is called sm_scale",
    }
    for name, value in options.items():
        if name in ("attn_mask", "dropout_p"):
            none = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0
            if value is None or (none and name == "dropout_p"):
                continue  # no mask and no dropout is what everybody gets
            raise UnsupportedError(f"{name} is not supported: got {shown(value)}; {advice[name]}.")
        hint = f": {advice[name]}" if name in advice else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
