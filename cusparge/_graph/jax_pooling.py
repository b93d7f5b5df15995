"""Pooling as a callback in a program of JAX: its kernels on a GPU, the eager function elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cusparge import _check
from cusparge._arrays import DeviceArray, Outline, jax_calls
from cusparge._arrays.view import row_major
from cusparge.errors import InvalidArgumentError

__all__ = ["install", "pool_blocks"]

_eager: list[Callable[..., Any]] = []


def install(eager: Callable[..., Any], result: Any) -> None:
    """Take the eager function that the host callback runs, and let JAX know what it returns."""
    _eager[:] = [eager]
    jax_calls.register(
        result,
        lambda made: ((made.mean, made.similarity, made.token_mean), None),
        lambda _, parts: result(*parts),
    )


@dataclass(frozen=True)
class _Pool:
    """One call on one array."""

    shape: tuple[int, ...]
    dtype: str
    block: int
    smooth: bool
    layout: str
    has_lengths: bool  # an int32 array of them comes after x

    def _heads_first(self, pointer: int, device: int) -> DeviceArray:
        """Describe x, row-major as XLA hands it over, as (B, H, S, D)."""
        view = DeviceArray(pointer, self.shape, row_major(self.shape), self.dtype, device)
        return view if self.layout == "HND" else view.swapaxes(1, 2)

    def plan(self) -> Any:
        """Return what is launched on a GPU."""
        from cusparge._cuda.pooling import pool_plan  # `import cusparge` does without

        view = self._heads_first(0, 0)
        strides = view.strides[:3]
        return pool_plan(
            *(view.dtype, view.shape, strides, self.block, self.smooth, self.has_lengths)
        )

    def outputs(self) -> tuple[Outline, ...]:
        """Return the pooled arrays, and the workspace of a GPU."""
        return tuple(Outline(shape, "float32") for shape in self.plan().shapes)

    def host(self, *arrays: Any) -> Sequence[Any]:
        """Compute on the host."""
        x, *lengths = arrays
        seqlens = lengths[0] if lengths else None
        made = _eager[0](x, self.block, self.smooth, self.layout, seqlens)
        pooled = [made.mean, made.similarity]
        if made.token_mean is not None:
            pooled.append(made.token_mean)
        unused = self.plan().shapes[len(pooled) :]  # the workspace, which the host needs not
        return [*pooled, *(np.empty(shape, np.float32) for shape in unused)]

    def device(
        self, stream: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> None:
        """Queue the kernels on XLA's stream."""
        from cusparge._cuda.launch import run

        plan = self.plan()
        addresses = {name: out.pointer for name, out in zip(plan.names, outputs, strict=True)}
        addresses["x"] = inputs[0].pointer
        addresses["lengths"] = inputs[1].pointer if self.has_lengths else 0
        run(plan, addresses, device=inputs[0].device, stream=stream)


def pool_blocks(
    x: Any, block: Any, smooth: Any, layout: Any, seqlens: Any, device: int | None = None
) -> tuple[Any, ...]:
    """Bind pooling into the program that JAX traces; the token mean is None if not asked for.

    `device` is where a concrete array lies: its kernels are loaded now, since errors inside the
    program would arrive wrapped in JAX's own.
    """
    jax_calls.announce()
    outline = Outline(tuple(x.shape), str(x.dtype))
    view = _check.check_one_array(outline, "x", layout)
    if view.dtype == "float64":
        raise InvalidArgumentError(
            "x has dtype float64: allowed in a compiled program are float16, bfloat16 and float32. "
            "Convert it first."
        )
    arrays = [x]
    if seqlens is not None:
        batch, tokens = view.shape[0], view.shape[2]
        if not _check.is_host_list(seqlens):
            if np.dtype(seqlens.dtype).kind not in "iu" or seqlens.shape != (batch,):
                raise InvalidArgumentError(
                    f"seqlens does not fit: got {seqlens.dtype} of shape {seqlens.shape}; allowed "
                    f"are integers of shape ({batch},), one length for each sequence. Convert it."
                )
        else:
            lengths = _check.check_lengths(seqlens, "seqlens", batch, tokens, "cpu")
            seqlens = np.array(lengths, np.int32)
        arrays.append(jax_calls.as_int32(seqlens, tokens))
    work = _Pool(outline.shape, outline.dtype, block, smooth, layout, len(arrays) == 2)
    if device is not None:
        from cusparge._cuda.launch import functions

        functions(work.plan(), device)
    made = jax_calls.call(work, arrays)
    return (*made[:2], made[2] if smooth else None)
