"""Running the prologue's launches on the host, each section an array of its own."""

import numpy as np
from host_cuda import emu

from cusparge._cuda import params

KERNELS = emu.KERNELS


def build(folder, variants):
    """Build kernels, those of one file together."""
    for file in sorted({one.file for one in variants}):
        emu.build(folder / file, *sorted(one.expression for one in variants if one.file == file))


def emulate(prologue, arrays, ints, *, folder=KERNELS, schedule="eager", seed=0):
    """Run a plan's launches; see `prologue_oracle.problems`."""
    results = {
        name: np.zeros(section.shape, section.dtype) for name, section in prologue.sections.items()
    }
    results["partial"][...] = np.nan  # not all of it is written, and that is never read
    given = {name: emu.In(array) for name, array in {**arrays, **ints}.items()}
    for launch in prologue.plan.launches:
        wrapped = dict(given)
        for name, array in results.items():
            wrapped[name] = emu.Out(array)
        first = launch.variant.file == "statistics.cu"
        wrapped["partial"] = (emu.InOut if first else emu.In)(results["partial"])
        names = [(8 * i, name) for i, name in enumerate(launch.pointers) if name != params.NULL]
        emu.launch_params(
            folder / launch.variant.file,
            launch.variant.expression,
            launch.grid,
            launch.block,
            launch.params,
            {at: wrapped[name] for at, name in names if wrapped[name].array.size},
            smem_bytes=launch.shared_bytes,
            schedule=schedule,
            seed=seed,
        )
    return results
