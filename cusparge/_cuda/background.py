"""When kernels are compiled: behind the import, before it returns, at first use, or never.

`start` runs at the end of ``import cusparge``. Where cupy is not installed it does nothing else
than find that out. Otherwise a daemon thread asks the driver's management library for GPUs, which
creates no CUDA context, and compiles for them what the cache does not hold. Nobody waits for the
thread: a call takes what is ready, and compiles or awaits just what it needs.

A fork waits while the thread imports modules, opens libraries or compiles; the child has no such
thread. At the end of the process the compilation that runs is cancelled, and no other begins.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from cusparge._cuda import lifecycle, modes
from cusparge.errors import DeviceError, InvalidArgumentError, shown

__all__ = ["start", "warmup"]

#: Seconds before the thread sets to work: a short-lived program is left alone.
_DELAY = 0.05

_thread: threading.Thread | None = None


def start() -> None:
    """Do what ``CUSPARGE_COMPILE`` says about the time of the import; never raise."""
    try:
        mode = modes.mode()
    except InvalidArgumentError as error:
        _warn(str(error))
        return
    if mode not in ("background", "import") or not _has_cupy() or _is_command_line():
        return
    if mode == "import":
        try:
            _compile_and_load()
        except Exception as error:  # the import succeeds; the first call raises it again
            first = (str(error).splitlines() or [type(error).__name__])[0]
            _warn(f"kernels were not compiled at import: {first}")
        return
    _start_thread()


def _has_cupy() -> bool:
    try:
        return importlib.util.find_spec("cupy") is not None
    except (ImportError, ValueError):  # a module of that name without a spec
        return "cupy" in sys.modules


def _is_command_line() -> bool:
    """Return whether this is the program ``cusparge``: its commands compile what they need."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # the module's own name is not in argv yet
        words = sys.orig_argv
        return ("-m", "cusparge") in itertools.pairwise(words)
    name = program.replace("\\", "/").rpartition("/")[2]
    return name.partition(".")[0] in ("cusparge", "cusparge-script")


def _warn(text: str) -> None:
    from cusparge._cuda.notices import say_once

    say_once(text)


def _start_thread() -> None:
    global _thread
    if _thread is not None:
        return
    _thread = threading.Thread(target=_run, name="cusparge-background", daemon=True)
    try:
        _thread.start()
    except RuntimeError as error:  # a limit of processes or memory: kernels compile at first use
        _thread = None
        from cusparge._cuda.notices import LOG

        LOG.info("nothing is compiled in the background: %s", error)


def _run() -> None:
    time.sleep(_DELAY)
    try:
        with lifecycle.compiling():  # a child would find half-imported modules locked for ever
            from cusparge._cuda import build, nvrtc, variants
            from cusparge._cuda.notices import LOG

            wanted = [(arch, variants.default_variants(arch)) for arch in _archs()]
            if wanted:
                nvrtc.load()
    except Exception:  # nothing was asked for: who needs a kernel gets the error
        return
    for arch, kernels in wanted:
        for variant in kernels:
            if lifecycle.is_ending():
                return
            try:
                build.build(variant, arch)
            except Exception as error:
                LOG.info("not compiled in the background: %s", error)


def _archs() -> list[str]:
    """Return the architectures of the GPUs that cusparge can use, each once."""
    from cusparge._cuda import devices

    found: dict[str, None] = {}
    for gpu in devices.list_gpus():
        try:
            found[devices.arch_of(gpu.capability)] = None
        except DeviceError:  # too old: a call there says so
            continue
    return list(found)


def _compile_and_load(
    dtypes: tuple[str, ...] | None = None,
    head_dims: tuple[int, ...] | None = None,
) -> int:
    """Compile and load for every visible GPU; return how many kernels that were."""
    from cusparge._cuda import build, devices, module, variants

    count = 0
    for gpu in devices.list_gpus():
        try:
            arch = devices.arch_of(gpu.capability)
        except DeviceError:
            continue
        if dtypes is None and head_dims is None:
            wanted = variants.default_variants(arch)
        else:
            wanted = variants.select(arch, dtypes, head_dims)
        if modes.mode() != "off":
            build.build_all(wanted, arch)
        for variant in wanted:
            module.kernel(variant, gpu.index)
        count += len(wanted)
    return count


def warmup(
    *,
    dtypes: Any = None,
    head_dims: int | Iterable[int] | None = None,
) -> None:
    """Compile and load the GPU kernels now, so that the first call need not.

    The kernels are compiled for every GPU that is visible, unless the cache on disk holds them,
    and loaded, which starts CUDA in this process: fork before it, not after. Without
    arguments that is what a first call most likely needs: float16 and bfloat16, head_dim 64
    and 128.

    Parameters
    ----------
    dtypes : str, dtype or sequence of them, optional
        "float16", "bfloat16", "float32", or a framework's dtype object for one of them. None: all
        three if `head_dims` is given.
    head_dims : int or sequence of int, optional
        From 1 to 256, as the last dimension of q, k and v. None: all if `dtypes` is given.

    Raises
    ------
    InvalidArgumentError
        If an argument is none of the above.
    DeviceError
        If cupy is missing, or there is no GPU that cusparge can use.
    CompileError
        If a kernel cannot be compiled, or ``CUSPARGE_COMPILE=off`` and it is not in the cache.

    Examples
    --------
    >>> import cusparge
    >>> cusparge.warmup(dtypes="bfloat16", head_dims=128)  # doctest: +SKIP
    """
    wanted_dtypes = None if dtypes is None else _dtype_names(dtypes)
    wanted_dims = None if head_dims is None else _head_dims(head_dims)
    from cusparge._cuda import devices

    devices.require_cupy()
    gpus = devices.list_gpus()
    if not gpus:
        devices.require_device(0)  # says what is missing: driver, GPU or permission
        raise DeviceError(
            "warmup found no GPU: the driver's management library (NVML) lists none. Check "
            "`nvidia-smi` and CUDA_VISIBLE_DEVICES; `cusparge doctor` tells more."
        )
    usable = [gpu for gpu in gpus if gpu.capability >= (8, 0)]
    if not usable:
        devices.arch_of(gpus[0].capability)  # raises, and says which GPUs are supported
    modes.mode()
    _compile_and_load(wanted_dtypes, wanted_dims)


def _dtype_names(dtypes: Any) -> tuple[str, ...]:
    from cusparge._cuda.variants import DTYPES

    single = isinstance(dtypes, (str, type)) or not isinstance(dtypes, Iterable)
    names = []
    for dtype in [dtypes] if single else list(dtypes):
        name = _dtype_name(dtype)
        if name not in DTYPES:
            raise InvalidArgumentError(
                f"dtypes of warmup: got {shown(dtype)}; allowed are {', '.join(DTYPES)}, or None "
                "for the default. Other dtypes have no GPU kernel."
            )
        names.append(name)
    return _some("dtypes", tuple(names))


def _dtype_name(dtype: Any) -> str:
    """Return "float16" for "float16", np.float16, torch.float16, jnp.float16, ..."""
    import numpy as np

    if isinstance(dtype, str):
        return dtype
    try:
        return str(np.dtype(dtype).name)
    except TypeError:  # torch's, which prints as torch.float16
        return shown(dtype).rpartition(".")[2]


def _head_dims(head_dims: Any) -> tuple[int, ...]:
    import operator

    from cusparge._cuda.variants import HEAD_DIMS

    numbers = []
    for value in list(head_dims) if isinstance(head_dims, Iterable) else [head_dims]:
        try:
            number = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = -1
        if not 1 <= number <= HEAD_DIMS[-1]:
            raise InvalidArgumentError(
                f"head_dims of warmup: got {shown(value)}; allowed are whole numbers from 1 to "
                f"{HEAD_DIMS[-1]}, or None for the default."
            )
        numbers.append(number)
    return _some("head_dims", tuple(numbers))


def _some(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise InvalidArgumentError(
            f"{name} of warmup is empty: name at least one, or leave it out for the default."
        )
    return values


def _in_child() -> None:
    """Forget the thread, which a forked child does not have."""
    global _thread
    _thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
