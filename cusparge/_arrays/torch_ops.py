"""The public calls as registered torch operators, for torch.compile and torch.export.

A compiler traces with tensors that have no memory, so it must see one operator instead of our
Python. Each operator takes tensors, numbers and strings only: a policy is taken apart into its
fields while tracing and put together again when the operator runs. (Handing the policy over as
one constant is not safe: Dynamo forgets the arguments of a dataclass made inside the graph.)

The operators know no backend. `cusparge.attention` registers the functions that run them with
`implement`, at import; torch itself is touched when the first graph is traced.

What is marked "traced" below runs inside Dynamo: no error may print a tensor there, which has no
values, and no framework's own exception can be caught.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from cusparge._arrays.torch import TorchAdapter
from cusparge.errors import InvalidArgumentError, UnsupportedError, shown
from cusparge.policy import Dense, TopCdf, TopK

__all__ = ["call", "implement", "in_graph", "not_traced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Name of an operator -> (schema, what runs it, what it returns of fake tensors).
_operators: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {}
#: Name of an operator -> the names of its tensors, which come first.
_tensors: dict[str, tuple[str, ...]] = {}
_libraries: list[Any] = []
_defined: set[str] = set()
_lock = threading.Lock()
_adapter = TorchAdapter()

#: The fields of a policy and the options that every call has, as the schemas write them.
POLICY = (
    "str rule, float[] share, float[] sim_threshold, float[] pv_threshold, int per_head, "
    "int sink_blocks, int local_blocks, bool? quantize"
)


def _torch_is_loaded() -> bool:
    return "torch" in sys.modules


# Dynamo runs a function so marked while it traces, instead of tracing it. Traced code must not read
# sys.modules: Dynamo would walk all of it, and fail where another thread imports something.
_torch_is_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dynamo_is_loaded() -> bool:
    return "torch._dynamo" in sys.modules


_dynamo_is_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_graph() -> bool:
    """Tell whether Dynamo is tracing this very call. Traced itself.

    Not ``is_compiling``: that is true in every thread while one of them compiles anything.
    """
    if not _torch_is_loaded():
        return False
    import torch

    return bool(torch.compiler.is_dynamo_compiling())


def implement(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Say what the operator ``cusparge::name`` is; torch learns of it when one is first called."""
    _operators[name] = (schema, run, fake)
    _tensors[name] = tuple(re.findall(r"Tensor\?? (\w+)", schema))


def _define() -> bool:
    """Register the operators with torch, each once."""
    with _lock:
        missing = [name for name in _operators if name not in _defined]
        if missing:
            torch = sys.modules["torch"]
            library = torch.library.Library("cusparge", "FRAGMENT")
            for name in missing:
                schema, run, fake = _operators[name]
                _defined.add(name)
                library.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
                library.impl(name, run, "CompositeExplicitAutograd")
                library.impl(name, functools.partial(_below_autograd, name), "Autograd")
                library.impl(name, _refuse_batches, "FuncTorchBatched")
                torch.library.register_fake(f"cusparge::{name}", fake, lib=library)
            _libraries.append(library)
    return True


_define._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _below_autograd(name: str, *arguments: Any) -> Any:
    """Refuse gradients while tracing, also those that a compiled torch.func.grad or jvp wants."""
    torch = sys.modules["torch"]
    for argument, value in zip(_tensors[name], arguments, strict=False):
        if value is not None:
            _adapter.check(value, argument)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.cusparge, name).default(*arguments)


def _refuse_batches(*arguments: Any) -> Any:
    raise UnsupportedError(
        "cusparge cannot be called inside torch.func.vmap: fold the batch dimension into the first "
        "one of q, k and v, and call it once."
    )


def call(name: str, *arguments: Any) -> Any:
    """Call an operator. Traced."""
    import torch

    _define()
    return getattr(torch.ops.cusparge, name).default(*arguments)


def not_traced(reason: str) -> Callable[[_Function], _Function]:
    """Make Dynamo break its graph at a function and everything it calls.

    ``torch.compiler.disable`` does that, but needs torch; here it is called once Dynamo is loaded.
    Dynamo itself looks for the attributes, and tells the reason where it may not break the graph.
    """

    def decorate(function: _Function) -> _Function:
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not _dynamo_is_loaded():
                return function(*args, **kwargs)
            if not disabled:
                import torch

                disabled.append(torch.compiler.disable(function))
            return disabled[0](*args, **kwargs)

        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def printable(value: Any) -> Any:
    """Return what an error may print of an argument: tensors have no values. Traced."""
    import torch

    is_array = isinstance(value, (torch.Tensor, np.ndarray))
    return "a tensor" if is_array else value


def check_tensors(**arrays: Any) -> None:
    """Refuse what is no tensor: Dynamo would turn NumPy arrays into tensors. Traced."""
    import torch

    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            raise UnsupportedError(
                f"{name} is a NumPy array in a function that torch compiles: pass tensors there "
                f"(`torch.from_numpy({name})`), or call cusparge outside of it."
            )
        if not isinstance(array, torch.Tensor):
            raise InvalidArgumentError(
                f"{name} is not a tensor: got a {type(array).__name__}. Pass a torch tensor, as "
                "for every array of a function that torch compiles."
            )


def tensor(values: Any) -> Any:
    """Return a tensor over a mask or lengths that may come from NumPy. Traced."""
    import torch

    return values if values is None else torch.as_tensor(values)


def lengths(values: Any, name: str = "seqlens") -> tuple[Any, Any]:
    """Return sequence lengths as (tensor or None, list or None). Traced."""
    import torch

    if values is None:
        return None, None
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return tensor(values), None
    if not isinstance(values, (list, tuple, range)):
        raise InvalidArgumentError(
            f"{name} must be a sequence or an array of whole numbers: got {shown(values)} of type "
            f"{type(values).__name__}. Pass a list, or a tensor of int32."
        )
    numbers = list(values)
    for i, number in enumerate(numbers):
        if isinstance(number, (bool, float, str)) or number is None:
            raise InvalidArgumentError(
                f"{name}[{i}] is no whole number: got {shown(number)}; allowed are integers, 0 or "
                "more. Convert it with int()."
            )
    if any(isinstance(number, torch.Tensor) for number in numbers):
        return torch.stack([torch.as_tensor(number) for number in numbers]), None
    return None, numbers


def number(value: Any, name: str) -> Any:
    """Return a number or None; whether it is finite is checked when the operator runs. Traced."""
    if isinstance(value, np.ndarray):  # as Dynamo sees NumPy's numbers
        return float(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise InvalidArgumentError(
            f"{name} must be one finite number: got {shown(printable(value))}. Pass a Python "
            "float, or None for 1 / sqrt(head_dim)."
        )
    return value


def whole(value: Any, name: str) -> Any:
    """Return a whole number or None; its range is checked when the operator runs. Traced."""
    if isinstance(value, (bool, float, str)):
        raise InvalidArgumentError(
            f"{name} must be a whole number, at least the longest sequence: got {shown(value)}. "
            "None takes it from the lengths."
        )
    return value


def fields(policy: Any) -> tuple[Any, ...]:
    """Take a policy apart, in the order of `POLICY`. Traced."""
    if policy is None:
        policy = TopCdf()
    rule, share, sim = "dense", None, None
    if isinstance(policy, TopCdf):
        rule, share, sim = policy.rule, policy.cdf_threshold, policy.sim_threshold
    elif isinstance(policy, TopK):
        rule, share, sim = "topk", policy.keep, policy.sim_threshold
    elif not isinstance(policy, Dense):
        raise InvalidArgumentError(
            "policy must be a TopCdf, TopK or Dense, or None for TopCdf(): got a "
            f"{type(policy).__name__}."
        )
    per_head = 0
    lists = []
    for bit, value in enumerate((share, sim, policy.pv_threshold)):
        if isinstance(value, tuple):
            per_head |= 1 << bit
            lists.append(list(value))
        else:
            lists.append([] if value is None else [value])
    return (rule, *lists, per_head, policy.sink_blocks, policy.local_blocks, policy.quantize)


@lru_cache(maxsize=256)
def _policy(rule: str, values: tuple[Any, ...], sink: int, local: int, quantize: Any) -> Any:
    options = {"sink_blocks": sink, "local_blocks": local, "quantize": quantize}
    share, sim, pv = values
    if rule == "dense":
        return Dense(pv, **options)
    if rule == "topk":
        return TopK(share, sim, pv, **options)
    return TopCdf(share, sim, pv, rule=rule, **options)  # type: ignore[arg-type]


def policy_of(given: Sequence[Any]) -> Any:
    """Put a policy together again from what `fields` returned."""
    rule, share, sim, pv, per_head, sink, local, quantize = given
    values = []
    for bit, numbers in enumerate((share, sim, pv)):
        whole = tuple(numbers) if per_head >> bit & 1 else (numbers[0] if len(numbers) else None)
        values.append(whole)
    return _policy(rule, tuple(values), sink, local, quantize)


def dtypes(*names: str) -> tuple[Any, ...]:
    """Return torch's dtypes of these names."""
    return tuple(getattr(sys.modules["torch"], name) for name in names)


def empty_like(array: Any) -> Any:
    """Return an output with the memory order of `array`, as the eager call does."""
    return sys.modules["torch"].empty_like(array)


def from_numpy(values: Any, like: Any) -> Any:
    """Return a tensor that holds `values`, on the device of `like`."""
    return sys.modules["torch"].from_numpy(np.asarray(values, order="C")).to(like.device)
