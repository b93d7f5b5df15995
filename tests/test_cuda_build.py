"""From a variant to machine code: keys, hits, failures, many at once, declarations."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from cuda_tools import (
    ARCHS,
    KERNEL,
    isolate,
    leftovers,
    need_nvrtc,
    run_script,
    small,
    write_kernels,
)

from cusparge._cuda import (
    build,
    cache,
    failures,
    notices,
    nvrtc,
    sources,
    storage,
    variants,
)
from cusparge._cuda.variants import Variant
from cusparge.errors import CompileError, InvalidArgumentError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    need_nvrtc()
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(storage, "_private", None)
    monkeypatch.setattr(storage, "_rejected", set())


@pytest.fixture
def compiled(monkeypatch):
    """The names that were compiled since."""
    names, real = [], nvrtc.Nvrtc.compile

    def compile_(self, source, name, headers, expression, options):
        names.append(expression)
        return real(self, source, name, headers, expression, options)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", compile_)
    return names


def use_kernels(monkeypatch, folder, **options):
    monkeypatch.setenv("CUSPARGE_KERNELS", str(write_kernels(folder, **options)))


# ---- one variant ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_it_is_compiled_once_and_then_found(arch, compiled):
    assert build.peek(small(), arch) is None
    made = build.build(small(), arch)
    assert made.path.read_bytes().startswith(b"\x7fELF")
    assert made.lowered.encode() in made.path.read_bytes()
    assert (made.arch, made.variant) == (arch, small())
    info = made.info
    assert 0 < info.registers <= 255
    assert (info.spill_bytes, info.stack_bytes) == (0, 0)
    assert info.compile_ms > 0
    assert f"--gpu-architecture={arch}" in info.options
    assert build.build(small(), arch) == build.peek(small(), arch) == made
    assert len(compiled) == 1
    build.forget(made)
    assert build.peek(small(), arch) is None
    assert build.build(small(), arch).info.sha256 == info.sha256


def test_the_name_tells_the_kernel_and_the_architecture(tmp_path):
    path = build.build(small(), "sm_90a").path
    assert path.parent == tmp_path / "cache" / "v1"
    assert re.fullmatch(r"small-sm_90a-[0-9a-f]{20}\.cubin", path.name)


CHANGES = {
    "nothing": lambda m, t: use_kernels(m, t / "again"),
    "file": lambda m, t: use_kernels(m, t / "again", kernel=KERNEL + "\n"),
    "header": lambda m, t: use_kernels(m, t / "again", header="#pragma once\n"),
    "options": lambda m, t: m.setenv("CUSPARGE_LINEINFO", "1"),
    "format": lambda m, t: m.setattr(build, "FORMAT", 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_covers_what_the_code_depends_on(tmp_path, monkeypatch, change):
    before = build.key_of(small(), "sm_90a", (13, 0))
    CHANGES[change](monkeypatch, tmp_path)
    after = build.key_of(small(), "sm_90a", (13, 0))
    assert (before == after) is (change == "nothing")
    assert (before.source_digest == after.source_digest) is (change == "nothing")


def test_the_key_covers_name_architecture_and_compiler():
    one = build.key_of(small(), "sm_90a", (13, 0))
    for variant, arch, version in [
        (small(4), "sm_90a", (13, 0)),
        (small(), "sm_89", (13, 0)),
        (Variant("slow.cu", small().expression), "sm_90a", (13, 0)),
        (small(), "sm_90a", (13, 1)),
        (small(), "sm_90a", None),
    ]:
        other = build.key_of(variant, arch, version)
        assert one.digest != other.digest
        same = (variant, arch) == (small(), "sm_90a")
        assert (one.source_digest == other.source_digest) is same


def test_line_numbers_on_request(monkeypatch):
    plain = build.build(small(), "sm_90a")
    monkeypatch.setenv("CUSPARGE_LINEINFO", "1")
    lined = build.build(small(), "sm_90a")
    assert "-lineinfo" in lined.info.options
    assert b".debug_line" in lined.path.read_bytes()
    assert b".debug_line" not in plain.path.read_bytes()


def test_a_damaged_entry_is_compiled_again(compiled):
    made = build.build(small(), "sm_90a")
    good = made.path.read_bytes()
    made.path.write_bytes(good[:100])
    assert build.build(small(), "sm_90a").path.read_bytes() == good
    assert len(compiled) == 2


def test_ptxas_tells_registers_and_spills():
    log = """ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     8 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 99 registers, used 0 barriers
ptxas info    : Compiling entry function 'mine' for 'sm_90a'
ptxas info    : Function properties for mine
ptxas         .     48 bytes stack frame, 40 bytes spill stores, 30 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
    expected = {"registers": 255, "spill_bytes": 70, "stack_bytes": 48}
    assert build.resources(log, "mine") == expected
    assert set(build.resources(log, "absent").values()) == {-1}


# ---- failures ------------------------------------------------------------------------------------


def test_a_failure_says_what_where_and_how_to_reproduce_it(tmp_path):
    with pytest.raises(CompileError) as caught:
        build.build(small(13), "sm_90a")
    text = str(caught.value)
    assert text.splitlines()[0].startswith("small.cu does not compile for sm_90a: small.cu(5): err")
    for part in ("thirteen is refused", small(13).expression, "NVRTC", "CUSPARGE_KERNELS="):
        assert part in text
    error = caught.value
    assert "thirteen is refused" in error.log
    assert error.source == KERNEL
    assert "--gpu-architecture=sm_90a" in error.options
    assert f"    {error.command}\n" in text
    folder = next((tmp_path / "cache" / "failed").iterdir())
    assert (folder / "log.txt").read_text() == error.log
    assert (folder / "cusparge/small.cuh").is_file()
    assert leftovers(tmp_path / "cache") == []


def test_the_command_reproduces_the_failure_and_only_it():
    if shutil.which("nvcc") is None or sys.platform == "win32":
        pytest.skip("nvcc is not installed")
    with pytest.raises(CompileError) as caught:
        build.build(small(13), "sm_90a")
    command = caught.value.command
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "thirteen is refused" in done.stdout + done.stderr
    # The same command on a variant that compiles: it is the instance that is at fault.
    main = Path(re.search(r"\S+reproduce\.cu\b", command)[0])
    main.write_text(main.read_text().replace("{13,", "{3,"))
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=100)
    assert b"small" in main.with_suffix(".cubin").read_bytes()


def test_the_sources_of_the_package_are_to_be_reported(monkeypatch):
    text = sources.load()
    monkeypatch.delenv("CUSPARGE_KERNELS")
    monkeypatch.setattr(sources, "load", lambda: text)
    with pytest.raises(CompileError, match="please report it") as caught:
        build.build(small(13), "sm_90a")
    assert "cusparge doctor --json" in str(caught.value)


def test_a_long_log_is_cut_in_the_text_and_whole_in_the_file(tmp_path, monkeypatch):
    lines = "".join(f"int a{i} = {'x' * 900}{i};\n" for i in range(90))
    use_kernels(monkeypatch, tmp_path / "long", kernel=KERNEL + lines)
    with pytest.raises(CompileError) as caught:
        build.build(small(), "sm_90a")
    assert len(str(caught.value)) < 40_000
    more = re.search(r"more lines in (\S+log\.txt)", str(caught.value))
    assert Path(more[1]).read_text() == caught.value.log
    assert len(caught.value.log) > 90_000


def test_slow_code_is_a_failure(monkeypatch):
    warning = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
    assert failures.unwanted_warning(f"one\n{warning}\ntwo") == warning
    assert failures.unwanted_warning("ptxas info : (C7600) other (C75)") is None
    real = nvrtc.Nvrtc.compile

    def slow(self, *arguments):
        done = real(self, *arguments)
        return nvrtc.Compiled(None, f"{done.log}\n{warning}", done.cubin, done.lowered)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", slow)
    with pytest.raises(CompileError, match="C7510"):
        build.build(small(), "sm_90a")
    assert build.peek(small(), "sm_90a") is None


def test_what_the_folder_or_the_compiler_lacks(monkeypatch):
    with pytest.raises(CompileError, match=r"holds no absent\.cu"):
        build.build(Variant("absent.cu", "x"), "sm_90a")
    monkeypatch.setattr(nvrtc.Nvrtc, "supported_archs", lambda self: (80, 90))
    monkeypatch.setattr(need_nvrtc(), "version", (12, 8))
    with pytest.raises(CompileError, match=r"sm_103a needs NVRTC >= 12\.9, found 12\.8"):
        build.build(small(), "sm_103a")


def test_a_wrong_limit_is_told(monkeypatch):
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "lots")
    with pytest.raises(InvalidArgumentError, match="CUSPARGE_CACHE_LIMIT"):
        build.build(small(), "sm_90a")


def test_a_machine_without_a_compiler_runs_from_a_seed(tmp_path, monkeypatch):
    made = build.build(small(), "sm_90a")
    os.rename(tmp_path / "cache", tmp_path / "seed")
    monkeypatch.setenv("CUSPARGE_CACHE_SEED", str(tmp_path / "seed"))

    def missing():
        raise CompileError("NVRTC was not found")

    monkeypatch.setattr(nvrtc, "load", missing)
    found = build.build(small(), "sm_90a")
    assert found.info == made.info
    assert tmp_path / "seed" in found.path.parents
    with pytest.raises(CompileError, match="was not found"):
        build.build(small(4), "sm_90a")
    # And from its own cache, filled by `cusparge cache import`.
    monkeypatch.delenv("CUSPARGE_CACHE_SEED")
    cache.default().put(found.path.read_bytes(), found.info)
    assert build.build(small(), "sm_90a").path.parent == cache.folder()


# ---- several at once -----------------------------------------------------------------------------


def test_threads_compile_a_kernel_once(compiled):
    start = threading.Barrier(8)
    made = []

    def one():
        start.wait()
        made.append(build.build(small(), "sm_90a"))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len({binary.path for binary in made}) == 1
    assert len(compiled) == 1


def test_many_are_built_in_order(compiled):
    wanted = [small(n) for n in range(1, 8)]
    build.build(wanted[2], "sm_90a")
    seen = []
    results = build.try_all(wanted, "sm_90a", on_done=lambda *counts: seen.append(counts))
    assert [result.variant for result in results] == wanted
    assert Counter(compiled) == Counter(variant.expression for variant in wanted)
    assert seen[0] == (1, 7)
    assert seen[-1] == (7, 7)
    assert seen == sorted(seen)
    assert build.build_all(wanted, "sm_90a", jobs=1) == results
    assert build.build_all([], "sm_90a") == []


def test_one_failure_does_not_keep_the_others_from_being_built():
    wanted = [small(13), small(1), small(13, True), small(2)]
    results = build.try_all(wanted, "sm_90a", jobs=2)
    assert [isinstance(result, CompileError) for result in results] == [True, False, True, False]
    with pytest.raises(CompileError, match="thirteen"):
        build.build_all(wanted, "sm_90a")
    assert build.peek(small(2), "sm_90a") is not None


def test_what_is_wrong_for_all_is_raised(monkeypatch):
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "lots")
    with pytest.raises(InvalidArgumentError, match="CUSPARGE_CACHE_LIMIT"):
        build.try_all([small(1), small(2)], "sm_90a")


PROCESSES = """
import warnings
warnings.simplefilter("ignore")
begin = time.time() + 1
children = []
for number in range(16):
    if (child := os.fork()) == 0:
        time.sleep(max(0, begin - time.time()))
        made = build.build(cuda_tools.small(), "sm_90a")
        with open(os.environ["CUSPARGE_CACHE_DIR"] + "/" + str(number), "w") as file:
            file.write(sha256(made.path.read_bytes()).hexdigest() + " " + made.info.sha256)
        os._exit(0)
    children.append(child)
print(*{os.waitpid(child, 0)[1] for child in children})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sixteen_processes_on_one_folder(tmp_path):
    first = "from hashlib import sha256\n"
    out, said = run_script(PROCESSES, tmp_path, first=first, CUSPARGE_QUIET="1")
    assert (out, said) == ("0\n", "")
    hashes = [(tmp_path / "cache" / str(number)).read_text().split() for number in range(16)]
    assert len({name for pair in hashes for name in pair}) == 1
    assert len(cache.Cache(tmp_path / "cache").entries()) == 1
    assert leftovers(tmp_path / "cache") == []


# ---- declarations --------------------------------------------------------------------------------


@pytest.fixture
def declared(monkeypatch):
    monkeypatch.setattr(variants, "_OWNERS", ())
    monkeypatch.setattr(variants, "_declared", {})

    def expressions(arch, dtypes, head_dims):
        return [f"{arch} {dtype} {dim}" for dtype in dtypes for dim in head_dims] + ["shared"]

    variants.declare("one", file="a.cu", expressions=expressions)
    variants.declare("two", file="a.cu", expressions=lambda *_: ["shared"])


@pytest.mark.usefixtures("declared")
def test_variants_are_selected():
    def named(*given):
        return [variant.expression for variant in variants.select("sm_80", *given)]

    assert named(["float32"], [64]) == ["sm_80 float32 64", "shared"]
    assert named(["float16"], [1, 65, 128, 129, 256]) == [
        *(f"sm_80 float16 {dim}" for dim in (64, 128, 256)),
        "shared",
    ]
    assert len(variants.all_variants("sm_80")) == 10
    default = variants.default_variants("sm_80")
    assert set(default) < set(variants.all_variants("sm_80"))
    assert Variant("a.cu", "sm_80 float32 64") not in default
    variants.declare("one", file="b.cu", expressions=lambda *_: ["new"])
    assert [variant.file for variant in variants.all_variants("sm_80")] == ["b.cu", "a.cu"]


def test_every_declared_kernel_has_its_file(monkeypatch):
    monkeypatch.delenv("CUSPARGE_KERNELS")
    files = sources.load().files
    for arch in ARCHS:
        default = variants.default_variants(arch)
        assert default
        assert set(default) <= set(variants.all_variants(arch))
        assert {variant.file for variant in variants.all_variants(arch)} <= files.keys()
