"""torch tensors, on the host and on CUDA devices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from cusparge._arrays import dlpack
from cusparge._arrays.protocol import NO_UPLOAD, Finish
from cusparge._arrays.view import Device, DeviceArray
from cusparge.errors import DeviceError, InvalidArgumentError, UnsupportedError

__all__ = ["TorchAdapter", "is_recording"]


class TorchAdapter:
    """torch tensors: host memory through DLPack, device memory by its address."""

    framework = "torch"

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}

    def device(self, array: Any) -> Device:
        """Return torch's own words for the device."""
        device = array.device
        return Device(str(device.type), int(device.index or 0))

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
            raise UnsupportedError(needs_gradient(name))
        if torch.autograd.forward_ad.unpack_dual(array).tangent is not None:
            raise UnsupportedError(
                f"{name} carries a forward-mode gradient, and cusparge would drop it: pass "
                f"`torch.autograd.forward_ad.unpack_dual({name}).primal`."
            )
        if _is_functorch(array):
            raise UnsupportedError(
                f"{name} is a stand-in without memory ({type(array).__name__}): cusparge cannot be "
                "called inside torch.func.vmap, jvp or grad. Call it on ordinary tensors, outside "
                "the transformed function; a batch dimension can be folded into the first one."
            )

    def is_traced(self, array: Any) -> bool:
        """Tell whether the tensor is a fake or functional one, which compilers trace with."""
        torch = sys.modules["torch"]
        if not isinstance(array, torch.Tensor):
            return False
        fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
        functional = getattr(torch, "_is_functional_tensor", None)
        return isinstance(array, fake) or (functional is not None and bool(functional(array)))

    def view(self, array: Any, name: str) -> Any:
        """View the tensor's memory."""
        if array.is_neg():  # a lazily negated view: its memory holds the other sign
            array = array.resolve_neg()
        if array.is_cuda:
            return self._on_device(array)
        return dlpack.read_host(array.detach(), name)

    def _on_device(self, array: Any) -> DeviceArray:
        """Describe a CUDA tensor, without DLPack's exchange of streams."""
        return DeviceArray(
            array.data_ptr(),
            tuple(array.shape),
            array.stride(),
            self._dtype_name(array.dtype),
            array.device.index,
            array,
        )

    def _dtype_name(self, dtype: Any) -> str:
        name = self._names.get(dtype)
        if name is None:  # "torch.float16"
            name = self._names[dtype] = str(dtype).rpartition(".")[2]
        return name

    def like(self, array: Any) -> tuple[Any, Finish]:
        """Make a tensor with torch's own allocator, which keeps dense strides."""
        out = sys.modules["torch"].empty_like(array.detach())
        return self.view(out, "out"), lambda: out

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[Any, Finish]:
        """Make a contiguous tensor on the same device."""
        torch = sys.modules["torch"]
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=array.device)
        return self.view(out, "out"), lambda: out

    def signature(self, array: Any) -> Any:
        """Return shape, strides, dtype and device of an ordinary CUDA tensor."""
        torch = sys.modules["torch"]
        if type(array) is not torch.Tensor and type(array) is not torch.nn.Parameter:
            return None
        if not array.is_cuda or array.is_neg() or array.layout is not torch.strided:
            return None
        if array.requires_grad and torch.is_grad_enabled():
            return None
        if torch.autograd.forward_ad._current_level >= 0 or _is_functorch(array):
            return None
        if is_recording():
            return None
        aligned = array.data_ptr() & 3
        return array.shape, array.stride(), array.dtype, array.device, aligned

    def address(self, array: Any) -> int:
        """Return where the first element of a CUDA array lies."""
        return int(array.data_ptr())

    def empty(self, shapes: Sequence[tuple[int, ...]], array: Any) -> tuple[list[Any], list[int]]:
        """Allocate with torch, whose allocator knows the current stream."""
        torch = sys.modules["torch"]
        make, dtype, device = torch.empty, torch.float32, array.device
        made = [make(shape, dtype=dtype, device=device) for shape in shapes]
        return made, [one.data_ptr() for one in made]

    def finish(self, made: Any) -> Any:
        """Return it: it is the caller's kind of array already."""
        return made

    def upload(self, values: Any, array: Any) -> DeviceArray:
        """Copy from pinned memory, which the host does not wait for."""
        if self.is_capturing(array.device.index):
            raise DeviceError(NO_UPLOAD)
        pinned = sys.modules["torch"].from_numpy(values).pin_memory()
        return self._on_device(pinned.to(array.device, non_blocking=True))

    def stream(self, device: int) -> int:
        """Return the handle of torch's current stream on that device."""
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # without a stream object
        if raw is not None:
            return int(raw(device))
        return int(torch.cuda.current_stream(device).cuda_stream)

    def is_capturing(self, device: int) -> bool:
        """Tell whether torch captures a CUDA graph on its current stream of that device."""
        cuda = sys.modules["torch"].cuda
        with cuda.device(device):
            return bool(cuda.is_current_stream_capturing())

    def queued(self, views: tuple[Any, ...], device: int) -> None:
        """Nothing is to be kept: torch's allocator orders reuse by the stream."""


def is_recording() -> bool:
    """Tell whether torch records operators (make_fx, torch.jit.trace): it must see ours as one."""
    recorder = sys.modules["torch"]._C
    return recorder._len_torch_dispatch_stack() > 0 or recorder._get_tracing_state() is not None


def needs_gradient(name: str) -> str:
    """Return what to say of an input that requires gradients."""
    return (
        f"{name} requires a gradient, and cusparge computes the forward pass only: call "
        f"it under `torch.no_grad()`, or pass `{name}.detach()`."
    )


def _is_functorch(array: Any) -> bool:
    """Tell whether a tensor belongs to torch.func: it has no memory of its own."""
    functorch = getattr(sys.modules["torch"]._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and bool(wrapped(array))
