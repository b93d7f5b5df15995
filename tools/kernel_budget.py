#!/usr/bin/env python3
"""Measure what the compiler makes of every kernel, and hold it to the committed budget.

::

    python tools/kernel_budget.py               # compare all kernels, for all architectures
    python tools/kernel_budget.py --write       # measure again, after a change that is wanted
    python tools/kernel_budget.py --arch sm_90a

For each kernel and architecture ``kernels_cu/budget.json`` holds the registers of a thread and the
instructions of the machine code (16 bytes each; the padding at the end of a function left out), as
the NVRTC named in it makes them. A kernel may grow by 5 % unnoticed. Another version of NVRTC may
make 15 % more instructions and take 30 % more registers (12.8 and 13.0 take 80 for 64 once). Stack,
spills and local memory are 0 everywhere. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "kernels_cu" / "budget.json"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

#: Growth that needs no new budget: with the NVRTC of the budget, and with any other.
TOLERANCE = 0.05
TOLERANCE_ELSEWHERE = 0.15
REGISTERS_ELSEWHERE = 0.30

#: The lowest 12 bits of an instruction: no operation, and the branch to itself behind the last one.
_PADDING = {0x918, 0x947}
#: Loads and stores of local memory.
_LOCAL = {0x983, 0x387, 0x987}


def measure(variant, arch):
    """Compile one kernel; return its registers, instructions and problems."""
    from cusparge._cuda import nvrtc, sources

    text = sources.load()
    options = [f"--gpu-architecture={arch}", "-std=c++20", "--ptxas-options=-v"]
    result = nvrtc.load().compile(
        text.files[variant.file], variant.file, text.headers, variant.expression, options
    )
    if result.error is not None:
        return {"problems": [f"does not compile: {result.log[:500]}"]}
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", result.log)]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.log
    )
    problems = []
    if len(registers) != 1:
        problems.append(f"the machine code holds {len(registers)} functions: make each a template")
    if any(set(numbers) != {"0"} for numbers in frames):
        problems.append(f"stack and spilled bytes: {frames}")
    if warnings := re.findall(r"\bC75\d\d\b.*", result.log):
        problems.append(f"the compiler warns: {warnings[0]}")
    opcodes = instructions(result.cubin)
    if _LOCAL & set(opcodes):
        problems.append("local memory is used")
    return {
        "registers": max(registers, default=0),
        "instructions": len(opcodes),
        "problems": problems,
    }


def instructions(cubin):
    """Return the opcodes of a cubin's functions, without the padding behind them."""
    table = struct.unpack_from("<Q", cubin, 40)[0]
    count, names = struct.unpack_from("<2H", cubin, 60)
    sections = [struct.unpack_from("<2I4Q", cubin, table + 64 * i) for i in range(count)]
    found = []
    for name, _, _, _, offset, size in sections:
        start = sections[names][4] + name
        if cubin[start : start + 6] == b".text.":
            code = [low & 0xFFF for low, _ in struct.iter_unpack("<2Q", cubin[offset:][:size])]
            while code and code[-1] in _PADDING:
                code.pop()
            found += code
    return found


def name_of(variant):
    """Return a kernel's key in the budget."""
    return f"{variant.file}: {variant.expression.replace('cusparge::', '')}"


def compare(variant, arch, budget):
    """Return what is wrong with one kernel."""
    from cusparge._cuda import nvrtc

    version = ".".join(map(str, nvrtc.load().version))
    found = measure(variant, arch)
    problems = list(found["problems"])
    wanted = budget["kernels"].get(name_of(variant), {}).get(arch)
    if wanted is None:
        problems.append("is not in the budget: run tools/kernel_budget.py --write")
    elif "instructions" in found:
        bounds = (TOLERANCE, TOLERANCE)
        if version != budget["nvrtc"]:
            bounds = (REGISTERS_ELSEWHERE, TOLERANCE_ELSEWHERE)
        for what, limit, tolerance in zip(
            ("registers", "instructions"), wanted, bounds, strict=True
        ):
            if found[what] > limit * (1 + tolerance):
                problems.append(
                    f"{found[what]} {what}; the budget is {limit} (NVRTC {budget['nvrtc']}, here "
                    f"{version}; {tolerance:.0%} more is allowed)"
                )
    return [f"{name_of(variant)} for {arch}: {problem}" for problem in problems]


def main():
    """Compare, or write the budget anew."""
    sys.path.insert(0, str(ROOT))
    from cusparge._cuda import nvrtc, variants

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--write", action="store_true", help="take what is measured as the budget")
    options = parser.parse_args()
    if options.write and set(options.arch) != set(ARCHS):
        parser.error("--write measures all architectures: leave --arch out")
    jobs = [(variant, arch) for arch in options.arch for variant in variants.all_variants(arch)]
    problems = []
    with ThreadPoolExecutor() as pool:
        if options.write:
            kernels = {}
            for (variant, arch), found in zip(
                jobs, pool.map(lambda job: measure(*job), jobs), strict=True
            ):
                problems += [f"{name_of(variant)} for {arch}: {text}" for text in found["problems"]]
                if not found["problems"]:
                    row = kernels.setdefault(name_of(variant), {})
                    row[arch] = [found["registers"], found["instructions"]]
            if not problems:
                version = ".".join(map(str, nvrtc.load().version))
                BUDGET.write_text(dump({"nvrtc": version, "kernels": kernels}))
        else:
            budget = json.loads(BUDGET.read_text())
            for found in pool.map(lambda job: compare(*job, budget), jobs):
                problems += found
    print(*problems, f"{len(jobs)} kernels, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


def dump(budget):
    """Write a kernel a line, so that a change shows as one."""
    rows = [
        f"  {json.dumps(name)}: {json.dumps(budget['kernels'][name])}"
        for name in sorted(budget["kernels"])
    ]
    body = ",\n".join(rows)
    return f'{{"nvrtc": {json.dumps(budget["nvrtc"])}, "kernels": {{\n{body}\n}}}}\n'


if __name__ == "__main__":
    sys.exit(main())
