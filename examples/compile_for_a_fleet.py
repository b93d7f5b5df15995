"""Compile the kernels on one machine, without a GPU, for others that have no compiler.

The builder compiles for every architecture of the fleet and exports an archive; each machine
imports it, and never compiles. Needs NVRTC (pip install "cusparge[cuda13]"), and no GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def cusparge(cache, *words):
    """Run a command with a cache of its own, as another machine would; return its report."""
    done = subprocess.run(
        [sys.executable, "-m", "cusparge", *words, "--json"],
        env=os.environ | {"CUSPARGE_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"cusparge {' '.join(words)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


with tempfile.TemporaryDirectory() as folder:
    builder, machine = Path(folder, "builder"), Path(folder, "machine")
    archive = Path(folder, "kernels.tar")

    cusparge(builder, "compile", "--arch", "sm_80", "sm_90a")
    cusparge(builder, "cache", "export", str(archive))
    size = archive.stat().st_size

    cusparge(machine, "cache", "import", str(archive))
    built, arrived = (cusparge(cache, "cache", "list") for cache in (builder, machine))

    kernels = sorted(path.name for path in builder.rglob("*.cubin"))
    print(f"{len(kernels)} kernels for 2 architectures, {size:,} bytes")
    print(f"on the other machine: {len(arrived['kernels'])} kernels")

    assert kernels == sorted(path.name for path in machine.rglob("*.cubin"))
    assert len(arrived["kernels"]) == len(built["kernels"]) == len(kernels) > 0
