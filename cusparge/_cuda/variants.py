"""Which kernels exist: every one is a file of ``kernels_cu`` and a C++ name expression.

Modules that own kernels declare them when they are imported, as strings only; nothing is compiled
here. A declaration is a function, because which variants there are depends on the architecture, on
the dtypes and on the head sizes that are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "Expressions",
    "Variant",
    "all_variants",
    "declare",
    "default_variants",
    "select",
]

#: Element types that kernels take.
DTYPES = ("float16", "bfloat16", "float32")
#: Head sizes that kernels are compiled for; the others are padded to the next one.
HEAD_DIMS = (64, 128, 256)

#: What a first call most likely needs.
_DEFAULT_DTYPES = ("float16", "bfloat16")
_DEFAULT_HEAD_DIMS = (64, 128)

#: Modules that own kernels: importing them fills the table of declarations.
_OWNERS = ("cusparge._cuda.pooling", "cusparge._cuda.prologue", "cusparge._cuda.block_map")

Expressions = Callable[[str, tuple[str, ...], tuple[int, ...]], Iterable[str]]


class Variant(NamedTuple):
    """One kernel: a file of ``kernels_cu`` and the expression that names the function in it.

    A named tuple, because it is the key of the table that every launch looks into.
    """

    file: str
    expression: str


_declared: dict[str, tuple[str, Expressions, bool]] = {}


def declare(name: str, *, file: str, expressions: Expressions, in_use: bool = True) -> None:
    """Declare a family of kernels under a name of its own; a second declaration replaces it.

    Parameters
    ----------
    name : str
        What the family is called, such as "pool_blocks".
    file : str
        File of ``kernels_cu``, such as "pool.cu".
    expressions : callable
        ``expressions(arch, dtypes, head_dims)`` returns the name expressions for that architecture;
        `dtypes` is a subset of `DTYPES` and `head_dims` one of `HEAD_DIMS`, both in that order.
    in_use : bool
        Whether a public call launches them. Kernels that wait for their callers are compiled by
        nobody but those who ask for all there are.
    """
    _declared[name] = (file, expressions, in_use)


def select(
    arch: str, dtypes: Iterable[str] | None = None, head_dims: Iterable[int] | None = None
) -> tuple[Variant, ...]:
    """Return the kernels that calls need for these dtypes and head sizes, each once.

    None stands for all of them. A head size from 1 to 256 stands for the kernel that computes it.
    """
    return _matching(arch, dtypes, head_dims, every=False)


def _matching(
    arch: str, dtypes: Iterable[str] | None, head_dims: Iterable[int] | None, *, every: bool
) -> tuple[Variant, ...]:
    for owner in _OWNERS:
        importlib.import_module(owner)
    wanted_dtypes = set(DTYPES if dtypes is None else dtypes)
    wanted_dims = {
        next(size for size in HEAD_DIMS if dim <= size)
        for dim in (HEAD_DIMS if head_dims is None else head_dims)
    }
    found: dict[Variant, None] = {}
    for file, expressions, in_use in list(_declared.values()):
        if not (in_use or every):
            continue
        for expression in expressions(
            arch,
            tuple(dtype for dtype in DTYPES if dtype in wanted_dtypes),
            tuple(size for size in HEAD_DIMS if size in wanted_dims),
        ):
            found[Variant(file, expression)] = None
    return tuple(found)


def default_variants(arch: str) -> tuple[Variant, ...]:
    """Return the kernels that a first call needs."""
    return select(arch, _DEFAULT_DTYPES, _DEFAULT_HEAD_DIMS)


def all_variants(arch: str) -> tuple[Variant, ...]:
    """Return every kernel that is declared for an architecture."""
    return _matching(arch, None, None, every=True)
