"""Which framework an array comes from, without importing any."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cusparge._arrays.cupy import CupyAdapter
from cusparge._arrays.foreign import DlpackAdapter
from cusparge._arrays.jax import TRACED, JaxAdapter
from cusparge._arrays.numpy import NumpyAdapter
from cusparge._arrays.protocol import Adapter, type_name
from cusparge._arrays.torch import TorchAdapter
from cusparge._arrays.view import Device
from cusparge.errors import InvalidArgumentError

__all__ = ["adapter_for", "adapter_of"]

_NUMPY, _TORCH, _JAX, _CUPY = NumpyAdapter(), TorchAdapter(), JaxAdapter(), CupyAdapter()


def adapter_of(array: Any, name: str) -> Adapter:
    """Return the adapter of one array, or say that it is none."""
    if isinstance(array, np.ndarray):
        return _NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _TORCH
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return _JAX
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return _CUPY
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return DlpackAdapter(type(array).__module__.partition(".")[0])
    raise InvalidArgumentError(
        f"{name} is not an array: got {type_name(array)}. Pass an array that speaks DLPack: "
        "NumPy, CuPy, torch or JAX (for a list, `numpy.asarray(x)` with the dtype meant)."
    )


def adapter_for(**arrays: Any) -> tuple[Adapter, Device]:
    """Return the one adapter and device of all `arrays`, given by argument name.

    Raises
    ------
    InvalidArgumentError
        They are no arrays, or come from different frameworks or devices.
    UnsupportedError
        One of them requires gradients, or is traced.
    """
    adapters = {name: adapter_of(array, name) for name, array in arrays.items()}
    frameworks = {name: adapter.framework for name, adapter in adapters.items()}
    if len(set(frameworks.values())) > 1:
        raise InvalidArgumentError(
            f"{', '.join(arrays)} come from different frameworks: got {_listing(frameworks)}. "
            "Pass all of them from one framework; the result is of that framework."
        )
    for name, adapter in adapters.items():
        adapter.check(arrays[name], name)
    devices = {name: adapter.device(arrays[name]) for name, adapter in adapters.items()}
    first = next(iter(arrays))
    if TRACED in devices.values():  # they meet in the compiled program, which says where
        return adapters[first], TRACED
    if len(set(devices.values())) > 1:
        raise InvalidArgumentError(
            f"{', '.join(arrays)} live on different devices: got {_listing(devices)}. "
            "Move them to one device first."
        )
    return adapters[first], devices[first]


def _listing(found: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in found.items())
