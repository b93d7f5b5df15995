"""The two number formats of quantized attention, on float arrays: int8 codes and e4m3 values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KEY_GROUP", "int8_round_trip", "power_of_two_scale", "round_e4m3"]

#: Consecutive keys that share one int8 scale. Queries have one scale each.
KEY_GROUP = 16

E4M3_MAX = 448.0
# float32 bit patterns: the exponent field, that of 2^-6 (the smallest e4m3 normal), and what turns
# 2^E into 1.5 * 2^(E + 20), whose neighbours lie 2^(E - 3) apart.
_EXPONENT = np.uint32(0x7F800000)
_SMALLEST = np.uint32((127 - 6) << 23)
_MAGIC = np.uint32((20 << 23) | 0x400000)


def round_e4m3(values: npt.NDArray[np.float32]) -> None:
    """Round float32 values within ±448 to e4m3 (3 mantissa bits, ties to even), in place.

    Adding and subtracting a large number whose last bit is worth one e4m3 step leaves the
    rounding to the hardware; below 2^-6 the step stays 2^-9, as e4m3's subnormals have it.
    """
    steps = values.view(np.uint32) & _EXPONENT
    np.maximum(steps, _SMALLEST, out=steps)
    steps += _MAGIC
    magic = steps.view(np.float32)
    values += magic
    values -= magic


def int8_round_trip(values: npt.NDArray[Any], axes: tuple[int, ...]) -> None:
    """Replace each value by its int8 code times its scale, in place.

    The scale is max|x| / 127 over `axes`; codes round to nearest, halves away from zero. A
    product of such values summed in float32 is exact in the codes, as |q·k| < 2^24.
    """
    scale = np.max(np.abs(values), axis=axes, keepdims=True) / values.dtype.type(127)
    scale[scale == 0] = 1
    values /= scale
    values += np.copysign(values.dtype.type(0.5), values)
    np.trunc(values, out=values)
    values *= scale


def power_of_two_scale(largest: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return max|v| / 448 rounded up to a power of two, 1 where the maximum is 0.

    A power of two makes a change of scale leave the codes alone, so that loud values late in a
    sequence do not show in earlier rows.
    """
    mantissa, exponent = np.frexp(largest / E4M3_MAX)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = np.maximum(exponent, -1022)  # the scale must not be 0
    scale: npt.NDArray[Any] = np.ldexp(np.ones_like(largest), exponent)
    return np.where(largest > 0, scale, np.ones_like(largest))
