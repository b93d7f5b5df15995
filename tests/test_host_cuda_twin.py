"""The device's ptx.cuh and its twin on the host: the same functions, and each of them assembles.

The first half compares what both files declare, after the preprocessor. The second compiles a
kernel that calls every function, for every architecture that has the instruction.
"""

import re
import shutil
import subprocess
from functools import cache

import pytest
from host_cuda import emu

from cusparge._cuda import nvrtc
from cusparge.errors import CompileError

DEVICE = emu.KERNELS / "cusparge" / "ptx.cuh"
TWIN = emu.HERE / "ptx.cuh"
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to preprocess with")


@cache
def declared(path, extra=""):
    """Return {(name, parameters): (template, return type)} of a header's CS_DEV functions."""
    command = [
        "g++",
        "-E",
        "-P",
        "-x",
        "c++",
        "-std=c++20",
        "-DCS_DEV=CS_DEV",
        "-DCS_HOST_DEV=inline",
        f"-I{emu.KERNELS}",
        f"-I{emu.HERE}",
        "-",
    ]
    text = f'#include "{path}"\n{extra}'
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    text = re.sub(r"\s+", " ", done.stdout)
    found = {}
    for start in re.finditer(r"(template <([^>]*)> )?CS_DEV (\w+) (\w+)\(", text):
        depth, end = 1, start.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        parameters = re.sub(r" ?([&*,()\[\]]) ?", r"\1", text[start.end() : end - 1])
        found[start[4], parameters] = (start[2], start[3])
    return found


@needs_compiler
def test_both_files_declare_the_same_functions():
    device, twin = declared(DEVICE), declared(TWIN)
    assert len(device) > 90
    assert {name for name, _ in device} >= {"thread_x", "shfl_xor", "wgmma_e4m3", "cp_async_16"}
    assert device == twin


@needs_compiler
@pytest.mark.parametrize("extra", [
    "CS_DEV float fma(float a, float b);", "CS_DEV u32 only_here(u32 a) { return a; }",
    "template <int M> CS_DEV void wgmma_wait() {}",
])  # fmt: skip
def test_a_difference_between_the_files_is_seen(extra):
    assert declared(TWIN, extra) != declared(DEVICE)


#: First architecture that has an instruction, where that is not sm_80; "a": only that very one.
SINCE = {
    "89": r"e4m3x2|mma_m16n8k32_e4m3",
    "90": r"mbar_\w*(tx|wait)|cp_async_bulk|fence_mbarrier_init|fence_proxy_async|grid_dependency",
    "90a": r"wgmma_",
    "90a 100a 120a": r"setmaxnreg",
}


def has(arch, name):
    number = int(re.search(r"\d+", arch)[0])
    for since, pattern in SINCE.items():
        if re.search(pattern, name):
            if since.endswith("a"):
                return arch.removeprefix("sm_") in since.split()
            return number >= int(since)
    return True


def call(name, parameters, template, result):
    """Return a block that calls a function with data it cannot know, and stores what it gives."""
    lines, arguments, written = [], [], []
    for text in re.split(r",(?![^(]*\))", parameters) if parameters else []:
        argument = f"a{len(arguments)}"
        kind, length = re.match(r"(?:const )?(\w+ ?\*?)", text)[1], re.search(r"\[(\d+)\]", text)
        if length:
            lines.append(f"{kind} {argument}[{length[1]}]; for (auto& v : {argument}) v = in[n++];")
            if not text.startswith("const"):
                written.append(argument)
        elif "*" in text:
            lines.append(f"auto* {argument} = reinterpret_cast<{kind}>(out + in[n++] * 4);")
        elif kind == "V4":
            lines.append(f"V4 {argument}{{in[n++], in[n++], in[n++], in[n++]}};")
        else:
            lines.append(f"auto {argument} = static_cast<{kind}>(in[n++]);")
        arguments.append(argument)
    number = {None: "", "int ID, int N": "<1, 64>", "int N": "<24>" if "max" in name else "<1>"}
    expression = f"ptx::{name}{number[template]}({', '.join(arguments)})"
    if result == "void":
        lines.append(f"{expression};")
    else:
        member = ".y" if result in ("V4", "V2") else ""
        lines.append(f"out[n++] = static_cast<u32>({expression}{member});")
    lines += [f"for (auto v : {array}) out[n++] = static_cast<u32>(v);" for array in written]
    return f"{{ {' '.join(lines)} }}"


def source(functions):
    body = "\n".join(call(*declaration, *kind) for declaration, kind in functions)
    return (
        '#include "cusparge/ptx.cuh"\nnamespace cusparge {\n'
        "CS_KERNEL void __launch_bounds__(128, 1) all(const u32* in, u32* out) {\n  u32 n = 0;\n"
        f"{body}\n}}\n}}\n"
    )


@cache
def compiler():
    try:
        return nvrtc.load()
    except CompileError as error:
        pytest.skip(f"no NVRTC: {str(error).splitlines()[0]}")


def compile_for(arch, expression, text):
    if int(re.search(r"\d+", arch)[0]) not in compiler().supported_archs():
        pytest.skip(f"this NVRTC does not know {arch}")
    headers = {
        name: (emu.KERNELS / "cusparge" / file).read_bytes()
        for file in ("ptx.cuh", "types.cuh")
        for name in (file, f"cusparge/{file}")
    }
    options = [f"--gpu-architecture={arch}", "-std=c++20", "--ptxas-options=-v"]
    return compiler().compile(text.encode(), "kernel.cu", headers, expression, options)


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_function_assembles_where_its_instruction_exists(arch):
    functions = [item for item in declared(DEVICE).items() if has(arch, item[0][0])]
    assert len(functions) > 65
    done = compile_for(arch, "cusparge::all", source(functions))
    assert done.error is None, done.log
    assert len(done.cubin) > 1000


@needs_compiler
@pytest.mark.parametrize(("arch", "name"), [
    ("sm_80", "e4m3x2_from_float"), ("sm_86", "mma_m16n8k32_e4m3"), ("sm_89", "mbar_try_wait"),
    ("sm_89", "cp_async_bulk"), ("sm_80", "fence_proxy_async"), ("sm_80", "grid_dependency_wait"),
    ("sm_100a", "wgmma_s8"), ("sm_120a", "wgmma_fence"), ("sm_89", "setmaxnreg_inc"),
])  # fmt: skip
def test_and_is_refused_elsewhere(arch, name):
    """So that the table of architectures above, and the comments in the header, stay true."""
    functions = [item for item in declared(DEVICE).items() if item[0][0] == name]
    assert functions
    assert not has(arch, name)
    assert compile_for(arch, "cusparge::all", source(functions)).error is not None


UNITS = [
    ("sm_90a", "load_matrices<4, true>"),
    ("sm_90a", "multiply<units::kBf16, float>"),
    ("sm_90a", "multiply<units::kE4m3, float>"),
    ("sm_90a", "convert"),
    ("sm_90a", "warpgroup<int, 64, 4, false>"),
    ("sm_90a", "warpgroup<float, 68, 2, true>"),
    ("sm_90a", "reduce"),
    ("sm_120a", "arithmetic"),
    ("sm_120a", "exchange"),
]


@pytest.mark.parametrize(("arch", "name"), UNITS)
def test_what_the_emulation_is_tested_with_is_cuda(arch, name):
    """A GPU can then run the very same kernels, and be compared with the host bit for bit."""
    done = compile_for(arch, f"units::{name}", (emu.HERE / "kernels" / "units.cu").read_text())
    assert done.error is None, done.log
    assert "C75" not in done.log  # ptxas serialises wgmma, or ignores setmaxnreg


RULES = {
    "inline assembly outside ptx.cuh": r"\basm\b",
    "a builtin that the emulation does not see": r"\b(__builtin_)?mem(cpy|set|move)\b",
    "static shared memory": r"__shared__",
    "a header that NVRTC does not have": r"#include\s*<",
    "a name without its namespace": r"\b__(shfl|ballot|any|all)_sync\b",
}


def broken_rules(name, text):
    code = re.sub(r"//.*", "", text)
    rules = {
        what: pattern
        for what, pattern in RULES.items()
        if not (name == "ptx.cuh" and "assembly" in what)
        and not (name == "types.cuh" and "shared" in what)
    }
    return [what for what, pattern in rules.items() if re.search(pattern, code)]


def test_kernels_keep_to_what_can_be_emulated():
    files = [path for path in emu.KERNELS.rglob("*") if path.suffix in (".cu", ".cuh")]
    assert len(files) >= 4
    assert {
        path.name: broken for path in files if (broken := broken_rules(path.name, path.read_text()))
    } == {}


@pytest.mark.parametrize("text", [
    'asm("mov.u32 %0, 1;");', "memcpy(a, b, 4);", "__shared__ int s[4];", "#include <cstdint>",
    "__shfl_sync(0u, 1, 2);",
])  # fmt: skip
def test_a_broken_rule_is_seen(text):
    assert len(broken_rules("kernel.cu", f"// a comment\n{text}\n")) == 1
