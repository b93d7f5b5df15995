"""Options that several commands share, and the policies they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import cusparge
from cusparge.cli.ui import UsageError
from cusparge.errors import InvalidArgumentError

__all__ = [
    "add_call_options",
    "call_options",
    "describe_policy",
    "number",
    "numbers",
    "policy_record",
    "usage_of",
    "whole",
]


def number(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"not a finite number: {text!r}")
    return value


def numbers(text: str) -> float | tuple[float, ...]:
    """Parse a number, or one for each head, separated by commas."""
    values = tuple(number(part) for part in text.split(","))
    return values[0] if len(values) == 1 else values


def whole(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"not a whole number of {low} or more: {text!r}")
        return value

    return parse


def add_call_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what attention means, as in `cusparge.attention`."""
    group = parser.add_argument_group("what attention means")
    group.add_argument(
        "--layout",
        choices=("HND", "NHD"),
        default="HND",
        help="order of the dimensions: HND is (batch, heads, tokens, head_dim), as torch has it; "
        "NHD is (batch, tokens, heads, head_dim), as flash-attn has it (default: HND)",
    )
    group.add_argument("--causal", action="store_true", help="let queries see no later keys")
    group.add_argument(
        "--causal-align",
        choices=("bottom_right", "top_left"),
        default="bottom_right",
        help="where the diagonal lies when there are more keys than queries, or fewer "
        "(default: bottom_right)",
    )
    group.add_argument(
        "--sm-scale",
        type=number,
        metavar="X",
        help="factor on the scores before softmax (default: 1 / sqrt(head_dim))",
    )


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_call_options` collected, as arguments of `cusparge.attention`."""
    return {
        "layout": args.layout,
        "causal": args.causal,
        "causal_align": args.causal_align,
        "sm_scale": args.sm_scale,
    }


def usage_of(make: Callable[[], Any]) -> Any:
    """Return what `make` returns; a threshold out of range is then wrong usage."""
    try:
        return make()
    except InvalidArgumentError as error:
        raise UsageError(str(error)) from error


def policy_record(policy: cusparge.Policy) -> dict[str, Any]:
    """Return a policy as a JSON object."""
    fields = ("cdf_threshold", "keep", "sim_threshold", "quantize")
    record = {name: getattr(policy, name) for name in fields if hasattr(policy, name)}
    return {"policy": type(policy).__name__, **record}


def describe_policy(policy: cusparge.Policy) -> str:
    """Return a policy as it would be typed in Python."""

    def short(value: Any) -> str:
        if isinstance(value, tuple):
            return "(" + ", ".join(f"{item:g}" for item in value) + ")"
        return f"{value:g}"

    if isinstance(policy, cusparge.TopCdf):
        words = [short(policy.cdf_threshold), short(policy.sim_threshold)]
    elif isinstance(policy, cusparge.TopK):
        words = [short(policy.keep), short(policy.sim_threshold)]
    else:
        words = []
    if policy.quantize is not None:
        words.append(f"quantize={policy.quantize}")
    return f"{type(policy).__name__}({', '.join(words)})"
