"""The public calls while torch or JAX traces: one operator, or one callback, for each of them.

A trace holds no values, so nothing here computes. The eager functions of `cusparge._call` come in
through `install`, and run later, when the compiled graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cusparge._arrays import Adapter
from cusparge._arrays.torch import is_recording
from cusparge._graph import jax, jax_pooling, torch, torch_pooling

__all__ = [
    "install",
    "install_pooling",
    "is_needed",
    "jax",
    "of",
    "pooling_of",
    "torch",
    "torch_pooling",
]


def install(**eager: Callable[..., Any]) -> None:
    """Take the eager functions by the names of the public calls."""
    torch.install(eager)
    jax.install(eager)


def is_needed(adapter: Adapter, *arrays: Any) -> bool:
    """Tell whether any array has no memory to read, so that the call belongs into a graph."""
    recorded = adapter.framework == "torch" and is_recording()
    return recorded or any(adapter.is_traced(array) for array in arrays)


def of(framework: str) -> Any:
    """Return the module that puts calls into graphs of a framework."""
    return {"torch": torch, "jax": jax}[framework]


def install_pooling(eager: Callable[..., Any], result: Callable[..., Any]) -> None:
    """Take the eager function for pooling, and the class of what it returns."""
    torch_pooling.install(eager)
    jax_pooling.install(eager, result)


def pooling_of(framework: str) -> Any:
    """Return the module that puts pooling into graphs of a framework."""
    return {"torch": torch_pooling, "jax": jax_pooling}[framework]
