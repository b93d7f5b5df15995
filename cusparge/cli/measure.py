"""Inputs of known sparsity, fair timing, and what it all was measured on."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

import cusparge
from cusparge.errors import InvalidArgumentError

__all__ = [
    "blas",
    "check_clusters",
    "clustered_inputs",
    "cores",
    "describe_machine",
    "machine",
    "one_blas_thread",
    "paired_times",
    "relative_l1",
    "threads_in_use",
    "torch_attention",
    "version_of",
]

#: cusparge's blocks, in tokens.
_BLOCK_Q = 128
_BLOCK_K = 64

Inputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def clustered_inputs(
    rng: np.random.Generator,
    *,
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    sparsity: float,
) -> Inputs:
    """Make q, k and v whose attention needs a known share of the blocks.

    Every block of 128 queries and every block of 64 keys sits near one of C = 1 / (1 - sparsity)
    orthonormal centres, and each query attends to the key blocks of its own centre alone: scores
    are 14 there and about 0 elsewhere, so that the others carry under a millionth of the softmax
    each. Labels have equal counts and are shuffled, so that the blocks needed lie scattered.
    ``TopCdf(0.9995, 0.5)`` finds exactly these blocks.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of everything random.
    batch, heads, tokens, head_dim : int
        The shape of q, k and v, each 1 or more.
    sparsity : float
        The share of blocks to leave out, in [0, 1). What comes out is 1 - 1/C for a whole number
        C of centres, and exactly that where C divides the number of key blocks: measure it.

    Returns
    -------
    q, k, v : numpy.ndarray, (batch, heads, tokens, head_dim) float32

    Raises
    ------
    InvalidArgumentError
        A size or the sparsity is out of range, or needs more centres than `head_dim` or the
        number of key blocks offers.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> inputs = clustered_inputs(
    ...     rng, batch=1, heads=2, tokens=512, head_dim=64, sparsity=0.75
    ... )
    >>> policy = cusparge.TopCdf(0.9995, 0.5)
    >>> out, stats = cusparge.attention(*inputs, policy=policy, return_stats=True)
    >>> stats.sparsity
    0.75
    """
    sizes = {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise InvalidArgumentError(f"{name} is too small: got {size}; allowed 1 or more.")
    centres = check_clusters(tokens, head_dim, sparsity)
    num_blocks_q, num_blocks_k = -(-tokens // _BLOCK_Q), -(-tokens // _BLOCK_K)
    amplitude = np.float32((14 * head_dim**0.5) ** 0.5)
    noise = np.float32(0.5 / head_dim**0.5)
    shape = (batch, heads, tokens, head_dim)
    q, k = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    v = rng.standard_normal(shape, dtype=np.float32)
    for sequence in range(batch):
        for head in range(heads):
            basis = np.linalg.qr(rng.standard_normal((head_dim, centres)))[0].T.astype(np.float32)
            for array, blocks, block in ((q, num_blocks_q, _BLOCK_Q), (k, num_blocks_k, _BLOCK_K)):
                labels = rng.permutation(np.arange(blocks) % centres)
                rows = array[sequence, head]
                rows *= noise
                rows += basis[np.repeat(labels, block)[:tokens]]
                rows *= amplitude
    return q, k, v


def check_clusters(tokens: int, head_dim: int, sparsity: float) -> int:
    """Return how many centres `clustered_inputs` uses, or say why the sizes do not allow them."""
    if not 0 <= sparsity < 1:
        raise InvalidArgumentError(
            f"sparsity is out of range: got {sparsity!r}; allowed 0 up to, but not including, 1."
        )
    num_blocks_k = -(-tokens // _BLOCK_K)
    centres = round(1 / (1 - sparsity))
    most = min(head_dim, num_blocks_k)
    if centres > most:
        raise InvalidArgumentError(
            f"sparsity is too high for this size: got {sparsity!r}, which needs {centres} groups "
            f"of key blocks; {tokens} tokens of head_dim {head_dim} have room for {most}, that is "
            f"for a sparsity of {1 - 1 / most:.3f}. Use more tokens or a lower sparsity."
        )
    return centres


def paired_times(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    seconds: float | None = None,
    after_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time functions against each other: each round runs every one of them once, in order.

    Whatever disturbs the machine for a while then disturbs all of them, and the ratio of their
    times within a round stays fair.

    Parameters
    ----------
    functions : mapping of str to callable
        What to time, each called without arguments.
    repeats : int
        How many rounds count.
    warmup : int
        How many rounds go before them.
    seconds : float, optional
        Stop when the rounds took that long together, though not before the third.
    after_round : callable, optional
        Called after each counted round, for progress.

    Returns
    -------
    dict of str to list of float
        Seconds of each counted call; lists of equal length.

    Raises
    ------
    InvalidArgumentError
        `repeats` is below 1.
    """
    if repeats < 1:
        raise InvalidArgumentError(f"repeats is too small: got {repeats}; allowed 1 or more.")
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(repeats):
        if seconds is not None and done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        if after_round is not None:
            after_round()
    return times


def one_blas_thread() -> AbstractContextManager[object]:
    """Return a context in which NumPy multiplies on one thread, where threadpoolctl is installed.

    For the reference and other plain NumPy: its products are small, and on a machine that is busy
    with something else BLAS's threads make them many times slower.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(1, user_api="blas")
    return limits


def cores() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def threads_in_use() -> int:
    """Return how many threads cusparge uses on the CPU, as ``CUSPARGE_NUM_THREADS`` has it."""
    wanted = os.environ.get("CUSPARGE_NUM_THREADS", "").strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else cores()


def machine() -> dict[str, Any]:
    """Return what a measurement was made on: no path, user or host name is in it.

    Returns
    -------
    dict
        ``cpu``, ``cores`` (that this process may use), ``threads`` (that cusparge uses),
        ``system``, ``python``, ``cusparge``, ``numpy``, ``blas``, and ``torch``, the version
        installed or None; no framework is imported to find out.
    """
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": threads_in_use(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cusparge": cusparge.__version__,
        "numpy": np.__version__,
        "blas": blas(),
        "torch": version_of("torch"),
    }


def version_of(package: str) -> str | None:
    """Return the version of a distribution that is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def blas() -> str:
    """Return name and version of the BLAS that NumPy multiplies with."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        built: Any = np.show_config(mode="dicts")
        found = built.get("Build Dependencies", {}).get("blas", {})
        return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()
    libraries = [entry for entry in threadpool_info() if entry.get("user_api") == "blas"]
    # SciPy brings a BLAS of its own; NumPy's lies in a folder named after NumPy.
    libraries.sort(key=lambda entry: "numpy" not in str(entry.get("filepath", "")))
    if not libraries:
        return "unknown"
    first = libraries[0]
    parts = (first.get("internal_api"), first.get("version"), first.get("architecture"))
    return " ".join(str(part) for part in parts if part)


def _cpu_model() -> str:
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                for line in file:
                    if line.startswith("model name"):
                        return " ".join(line.split(":", 1)[1].split())
        except OSError:
            pass
    return platform.processor() or platform.machine() or "unknown"


def torch_attention(*arrays: npt.NDArray[Any]) -> Callable[[], Any] | None:
    """Return a call of torch's own attention over the same arrays, or None without torch.

    It uses as many threads as cusparge does. Importing torch takes seconds, so that this is asked
    for only where torch is to be timed.
    """
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads_in_use())
    tensors = [torch.from_numpy(array) for array in arrays]
    compute = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with torch.no_grad():
            return compute(*tensors)

    return call


def relative_l1(
    out: npt.NDArray[Any], expected: npt.NDArray[Any], axis: tuple[int, ...] | None = None
) -> Any:
    """Return sum |out - expected| / sum |expected|, in float64; 0 where both are all zeros."""
    with np.errstate(all="ignore"):
        # One order in memory: the last bits of a sum depend on it.
        wanted = expected.astype(np.float64, order="C")
        missed = np.abs(out.astype(np.float64, order="C") - wanted).sum(axis=axis)
        size = np.abs(wanted).sum(axis=axis)
        return np.where(missed == 0, 0.0, missed / size)


def describe_machine(record: dict[str, Any]) -> str:
    """Return one line on what was measured on."""
    torch = f", torch {record['torch']}" if record.get("torch") else ""
    return (
        f"{record['cpu']}, {record['threads']} threads on {record['cores']} cores, "
        f"{record['system']}; cusparge {record['cusparge']}, Python {record['python']}, "
        f"NumPy {record['numpy']}, {record['blas']}{torch}"
    )
