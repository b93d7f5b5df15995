"""One adapter per framework: where an array lives, its memory, and new arrays like it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cusparge._arrays import dlpack
from cusparge._arrays.view import HostArray
from cusparge.errors import InvalidArgumentError, UnsupportedError

__all__ = ["Adapter", "Device", "adapter_for", "adapter_of"]

#: Finishes an output: hands back the caller's kind of array once the host memory is written.
Finish = Callable[[], Any]


@dataclass(frozen=True)
class Device:
    """Where an array lives: "cpu", "cuda" or another kind, and which one."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        """Write it as frameworks do."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


class Adapter(Protocol):
    """What cusparge needs to know of a framework."""

    framework: str

    def device(self, array: Any) -> Device:
        """Return where `array` lives."""

    def check(self, array: Any, name: str) -> None:
        """Raise for an array of this framework that cannot be an argument at all."""

    def view(self, array: Any, name: str) -> HostArray:
        """View the memory of a host array."""

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make an output with the shape, dtype, device and memory order of `array`."""

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make a row-major output beside `array`."""


class NumpyAdapter:
    """NumPy arrays, those of ml_dtypes' bfloat16 included."""

    framework = "numpy"

    def device(self, array: Any) -> Device:
        """Return the host."""
        return Device("cpu")

    def check(self, array: Any, name: str) -> None:
        """Refuse what would lose a part silently: masks and foreign byte orders."""
        if isinstance(array, np.ma.MaskedArray):
            raise InvalidArgumentError(
                f"{name} is a masked array, and its mask would be lost: pass `{name}.filled(0)` "
                "and say which keys are valid with seqlens_k, or which blocks with block_map."
            )
        if not array.dtype.isnative:
            raise InvalidArgumentError(
                f"{name} has a foreign byte order ({array.dtype.str}): convert it with "
                f"`{name}.astype({name}.dtype.newbyteorder('='))`."
            )

    def view(self, array: Any, name: str) -> HostArray:
        """View the array itself."""
        array = np.asarray(array)
        dtype = str(array.dtype.name)
        return HostArray(array.view(np.uint16) if dtype == "bfloat16" else array, dtype)

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make an array with the strides' order of `array`."""
        out = np.empty_like(array, subok=False)
        return self.view(out, "out"), lambda: out

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make a C-ordered array."""
        out = np.empty(shape, array.dtype if dtype == "bfloat16" else dtype)
        return self.view(out, "out"), lambda: out


class TorchAdapter:
    """torch tensors, through DLPack for memory and torch for allocation."""

    framework = "torch"

    def device(self, array: Any) -> Device:
        """Return torch's own words for the device."""
        return Device(str(array.device.type), int(array.device.index or 0))

    def check(self, array: Any, name: str) -> None:
        """Refuse layouts without strides, and inputs that require gradients."""
        torch = sys.modules["torch"]
        if array.is_nested:
            raise InvalidArgumentError(
                f"{name} is a nested tensor: pass its values and offsets to "
                "cusparge.attention_varlen."
            )
        if array.layout != torch.strided:
            raise InvalidArgumentError(
                f"{name} is not a strided tensor (layout {array.layout}): pass `{name}.to_dense()`."
            )
        if array.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"{name} requires a gradient, and cusparge computes the forward pass only: call "
                f"it under `torch.no_grad()`, or pass `{name}.detach()`."
            )
        if torch.autograd.forward_ad.unpack_dual(array).tangent is not None:
            raise UnsupportedError(
                f"{name} carries a forward-mode gradient, and cusparge would drop it: pass "
                f"`torch.autograd.forward_ad.unpack_dual({name}).primal`."
            )
        if _is_stand_in(array):
            raise UnsupportedError(
                f"{name} is a stand-in without memory ({type(array).__name__}): cusparge cannot be "
                "called inside torch.compile, torch.export, torch.func.vmap or jvp. Call it on "
                "ordinary tensors, outside the transformed function."
            )

    def view(self, array: Any, name: str) -> HostArray:
        """View the tensor's memory."""
        if array.is_neg():  # a lazily negated view: its memory holds the other sign
            array = array.resolve_neg()
        return dlpack.read_host(array.detach(), name)

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make a tensor with torch's own allocator, which keeps dense strides."""
        out = sys.modules["torch"].empty_like(array.detach())
        return dlpack.read_host(out, "out"), lambda: out

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make a contiguous tensor on the same device."""
        torch = sys.modules["torch"]
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=array.device)
        return dlpack.read_host(out, "out"), lambda: out


class JaxAdapter:
    """JAX arrays: read through DLPack, written by handing NumPy memory over."""

    framework = "jax"

    def device(self, array: Any) -> Device:
        """Return the platform of the array's (first) device."""
        if _is_tracer(array):
            return Device("cpu")  # check() refuses it with better words
        first = min(array.devices(), key=lambda device: device.id)
        kind = "cuda" if first.platform in ("gpu", "cuda") else str(first.platform)
        return Device(kind, int(first.id))

    def check(self, array: Any, name: str) -> None:
        """Refuse tracers: inside a transformation there is no memory to read."""
        if _is_tracer(array):
            raise UnsupportedError(
                f"{name} is a JAX tracer ({type(array).__name__}): cusparge cannot be called "
                "inside jax.jit, jax.grad or jax.vmap. Call it on concrete arrays, outside the "
                "transformed function."
            )
        if array.is_deleted():
            raise InvalidArgumentError(
                f"{name} is a JAX array that has been deleted, perhaps donated to another "
                "computation: pass an array that still has its values."
            )

    def view(self, array: Any, name: str) -> HostArray:
        """View the buffer of the array once it is computed."""
        array.block_until_ready()
        if len(array.devices()) > 1:  # sharded: DLPack has no word for it, so it is gathered
            return NumpyAdapter().view(np.asarray(array), name)
        return dlpack.read_host(array, name)

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make an output of the same shape, dtype and sharding."""
        return self.new(array.shape, str(array.dtype), array)

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make NumPy memory, and put it on the array's device when it is written."""
        jax = sys.modules["jax"]
        out: Any = np.empty(shape, array.dtype if dtype == "bfloat16" else dtype)
        view = NumpyAdapter().view(out, "out")
        place = (
            array.sharding
            if out.shape == array.shape
            else min(array.devices(), key=lambda device: device.id)
        )
        return view, lambda: jax.device_put(out, place)


class DlpackAdapter:
    """Any other framework that speaks DLPack and has a ``from_dlpack`` in its top module."""

    def __init__(self, framework: str) -> None:
        self.framework = framework

    def device(self, array: Any) -> Device:
        """Translate DLPack's device."""
        kind, index = dlpack.device_of(array)
        if dlpack.is_host(kind):
            return Device("cpu")
        return Device("cuda" if kind in (dlpack.CUDA, 13) else f"DLPack device {kind}", index)

    def check(self, array: Any, name: str) -> None:
        """Refuse arrays that could be read but not given back."""
        if not hasattr(sys.modules.get(self.framework), "from_dlpack"):
            raise InvalidArgumentError(
                f"{name} is a {_type_name(array)}, and {self.framework} has no from_dlpack to "
                "make results with: pass a NumPy, torch, JAX or CuPy array."
            )

    def view(self, array: Any, name: str) -> HostArray:
        """View the memory behind the capsule."""
        return dlpack.read_host(array, name)

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make an output of the same shape and dtype."""
        view = dlpack.read_host(array, "q")
        return self.new(view.shape, view.dtype, array)

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make NumPy memory, and hand it over when it is written."""
        if dtype == "bfloat16":
            raise UnsupportedError(
                f"bfloat16 results cannot be handed to {self.framework}: NumPy cannot export "
                "them. Pass float32, or use torch or JAX."
            )
        out = np.empty(shape, dtype)
        module = sys.modules[self.framework]
        return HostArray(out, dtype), lambda: module.from_dlpack(out)


_NUMPY, _TORCH, _JAX = NumpyAdapter(), TorchAdapter(), JaxAdapter()


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _is_stand_in(array: Any) -> bool:
    """Tell whether a torch tensor belongs to a transformation and has no memory of its own."""
    torch = sys.modules["torch"]
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
    functional = getattr(torch, "_is_functional_tensor", None)
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return (
        isinstance(array, fake)
        or (functional is not None and functional(array))
        or (wrapped is not None and wrapped(array))
    )


def _is_tracer(array: Any) -> bool:
    core = getattr(sys.modules.get("jax"), "core", None)
    return core is not None and isinstance(array, core.Tracer)


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
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return DlpackAdapter(type(array).__module__.partition(".")[0])
    raise InvalidArgumentError(
        f"{name} is not an array: got {_type_name(array)}. Pass an array that speaks DLPack: "
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
    if len(set(devices.values())) > 1:
        raise InvalidArgumentError(
            f"{', '.join(arrays)} live on different devices: got {_listing(devices)}. "
            "Move them to one device first."
        )
    first = next(iter(arrays))
    return adapters[first], devices[first]


def _listing(found: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in found.items())
