"""The benchmarks for a GPU and the tests on one, as far as they run without it."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_tools
import numpy as np
import pytest
from cuda_tools import need_nvrtc
from host_cuda import emu

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# ---- the tests on a GPU, run dry -----------------------------------------------------------------

#: One dtype of those that differ in nothing else, and of the scripts the quicker ones.
CHOSEN = (
    "((test_gpu_runtime or test_gpu_streams) and not float16) or test_gpu_exact_memory or "
    "(test_gpu_processes and (debugging or (cuda_has_started and y)))"
)


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING))
def test_the_text_of_the_tests_on_a_gpu_runs(load, tmp_path, capfd):
    for name in ("torch", "jax", "cupy", "ml_dtypes"):
        pytest.importorskip(name, reason=f"needs {name}")
    command = [sys.executable, BENCHMARKS / "gpu_tests.py", "-o", tmp_path / "tests.json"]
    words = ["--seconds", "400", "--", *load("gpu_tests").test_files(), "-k", CHOSEN]
    environment = os.environ | {
        gpu_tools.VARIABLE: "stand-in",
        "CUSPARGE_CACHE_DIR": str(tmp_path / "cache"),
        "CUSPARGE_COMPILE": "lazy",
    }
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    report = json.loads((tmp_path / "tests.json").read_text())
    assert done.returncode == 0, (report["summary"], done.stdout[-4000:], done.stderr[-2000:])
    assert report["counts"]["passed"] >= 60
    assert set(report["skip_reasons"]) <= {"inductor needs triton"}


# ---- the pooling kernels -------------------------------------------------------------------------


class DryDevice:
    """As `bench_pool.Gpu`, with the emulation's memory and a clock of the host."""

    l2_bytes = 0

    def __init__(self, dry):
        self.dry, self.flushed = dry, 0
        self.allocate, self.upload, self.download = dry.allocate, dry.write, dry.read

    def copy(self, to, source, num_bytes):
        self.dry.write(to, self.dry.read(source, num_bytes))

    def flush(self):
        self.flushed += 1

    def handle(self):
        return self.dry.stream()

    def mark(self):
        return time.perf_counter()

    def milliseconds(self, begin, end):
        return 1e3 * (end - begin)

    def wait(self):
        pass


@pytest.fixture
def dry(monkeypatch, tmp_path):
    if emu.MISSING is not None:
        pytest.skip(emu.MISSING)
    for name in ("torch", "cupy"):
        pytest.importorskip(name, reason=f"needs {name}")
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_tools, "DRY", True)
    return gpu_tools.begin(monkeypatch)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_row_of_the_pooling_benchmark(load, dry, rng, monkeypatch, dtype, smooth):
    bench = load("bench_pool")
    monkeypatch.setattr(bench, "TILE", 5000)  # is repeated over the array, and ends within it
    device = DryDevice(dry)
    shape = (1, 2, 130, 64)
    row = bench.measure(
        device, rng, dtype=dtype, shape=shape, block=64, smooth=smooth, repeats=2
    )  # fmt: skip
    assert device.flushed == 7, "before every call"
    item = 4 if dtype == "float32" else 2
    outputs = 4 * (2 * 3 * 64 + 2 * 3 + smooth * 2 * 64)
    assert row["floor_bytes"] == item * 2 * 130 * 64 + outputs
    assert row["gb_s"] == pytest.approx(1e-6 * row["floor_bytes"] / row["ms_median"])
    assert row["launches"] == (3 if smooth else 1)
    assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
    assert len(row["errors"]) == 2 + smooth
    assert all(error < 1e-5 for error in row["errors"].values())


@pytest.mark.emulated
def test_a_wrong_result_shows_as_an_error(load, dry, rng, monkeypatch):
    bench = load("bench_pool")
    bits = bench.random_values
    monkeypatch.setattr(bench, "random_values", lambda *a: (bits(*a)[0], bits(*a)[1] + 0.1))
    options = {"dtype": "float16", "block": 64, "smooth": False, "repeats": 1}
    row = bench.measure(DryDevice(dry), rng, shape=(1, 1, 64, 64), **options)
    assert max(row["errors"].values()) > 1e-2


def test_bits_of_bfloat16_are_what_they_are_worth(load, rng):
    bits, values = load("bench_pool").random_values(rng, "bfloat16", 1000)
    assert (bits.astype(np.uint32) << 16).view(np.float32).tolist() == values.tolist()


@pytest.mark.emulated
def test_a_rate_and_the_table(load, dry):
    bench = load("bench_pool")
    copied = bench.copy_rate(DryDevice(dry), num_bytes=1000, repeats=3)
    assert copied["gb_s"] == pytest.approx(2e-6 * 1000 / copied["ms_median"])
    row = {
        "dtype": "float16", "shape": [1, 2, 3, 4], "block": 64, "smooth": True,
        "ms_median": 0.5, "gb_s": 300.0, "errors": {"block_mean": 1e-7, "similarity": 2e-6},
    }  # fmt: skip
    report = {
        "copy": {"gb_s": 1000.0}, "rows": [row], "host_us": {"cupy": 12.34}, "not_measured": ["x"],
    }  # fmt: skip
    first, second, third, fourth = bench.summarise(report)
    assert "1000 GB/s" in first
    assert "300 GB/s  30 % of copy, error 2.0e-06" in second
    assert third.endswith("cupy 12.3")
    assert fourth == "not measured: x"


def test_host_times_are_medians_of_one_call(load):
    calls = []
    found = load("bench_pool").host_times({"sleep": lambda: calls.append(1)}, lambda: None, count=5)
    assert len(calls) == 60
    assert 0 < found["sleep"] < 1e5


def test_without_a_gpu_the_pooling_benchmark_says_why(load, tmp_path):
    if not gpu_tools.DRY and gpu_tools.why_not() is None:
        pytest.skip("there is a GPU")
    command = [sys.executable, BENCHMARKS / "bench_pool.py", "-o", tmp_path / "pool.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=with_package())
    assert done.returncode == 1
    assert "no GPU that CuPy can use" in done.stderr
    assert "Traceback" not in done.stderr
    assert "no GPU" in json.loads((tmp_path / "pool.json").read_text())["skipped"]


# ---- the runtime ---------------------------------------------------------------------------------


def with_package():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_host_time_of_a_call_with_a_stand_in_for_the_gpu(load):
    torch = pytest.importorskip("torch", reason="needs torch")
    rows = load("bench_runtime").queuing(repeats=2, calls=20)
    assert [row["launches"] for row in rows] == [1, 3]
    for row in rows:
        parts = row["run_us_median"], row["allocations_us_median"]
        assert 0 < max(parts) < row["call_us_median"]
        assert any("does nothing" in text for text in row["stands_in"])
    assert torch.ones(1).is_cuda is False, "the stand-ins are gone"
    assert "is_cuda" not in vars(torch.Tensor)


def test_the_host_time_is_that_of_the_short_way(load, monkeypatch):
    """Of the calls that are counted none is checked again."""
    pytest.importorskip("torch", reason="needs torch")
    from cusparge import _check

    looked = []
    check = _check.check_one_array
    monkeypatch.setattr(_check, "check_one_array", lambda *given: looked.append(1) or check(*given))
    load("bench_runtime").queuing(repeats=2, calls=5)
    assert len(looked) == 2


@pytest.mark.slow
def test_compiling_and_loading_are_measured_in_fresh_processes(load, tmp_path):
    need_nvrtc()
    pytest.importorskip("cupy", reason="needs cupy")
    command = [sys.executable, BENCHMARKS / "bench_runtime.py", "-o", tmp_path / "runtime.json"]
    words = ["--repeats", "1", "--arch", "9.0", "--threads", "2"]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, env=with_package(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runtime.json").read_text())
    (cold,), (warm,) = report["compiling"], report["loading"]
    assert cold["arch"] == warm["arch"] == "sm_90a"
    assert cold["kernels"] == warm["kernels"] >= 9
    assert cold["threads"] == 2
    assert cold["longest_kernel_seconds"] <= cold["seconds_median"]
    assert 0 < warm["find_and_check_ms_median"]
    assert gpu_tools.why_not() is None or warm["driver_ms_median"] is None
    assert gpu_tools.why_not() is None or "needs a GPU" in warm["left_out"]
    assert set(report["importing"]) == {"cusparge_lazy", "cusparge_background", "nothing", "cupy"}
    assert report["commit"]
    assert done.stdout.count("target 5 s") == 1
    assert not report["not_measured"]


def test_a_failing_script_is_an_error(load, tmp_path):
    with pytest.raises(RuntimeError, match="ValueError: why"):
        load("bench_runtime").fresh("raise ValueError('why')", tmp_path)
    with pytest.raises(ImportError, match="No module named 'nobody_has_it'"):
        load("bench_runtime").fresh("import nobody_has_it", tmp_path)


@pytest.mark.parametrize("handler", ["", "1"])
def test_a_script_that_dies_without_a_word_is_an_error(load, tmp_path, monkeypatch, handler):
    monkeypatch.setenv("PYTHONFAULTHANDLER", handler)
    script = "import os, signal; os.kill(os.getpid(), signal.{})"
    fresh = load("bench_runtime").fresh
    if sys.platform != "win32":
        with pytest.raises(RuntimeError, match="a fresh process: crashed: SIGKILL"):
            fresh(script.format("SIGKILL"), tmp_path)
        with pytest.raises(RuntimeError, match="a fresh process: crashed: SIGSEGV"):
            fresh(script.format("SIGSEGV"), tmp_path)
    with pytest.raises(RuntimeError, match="a fresh process: failed: exit status 3"):
        fresh("import os; os._exit(3)", tmp_path)


@pytest.mark.parametrize("error", [ImportError("no torch"), ValueError("why"), RuntimeError("x")])
def test_a_step_that_fails_keeps_no_other_from_being_measured(
    load, tmp_path, monkeypatch, capsys, error
):
    bench = load("bench_runtime")

    def fail(*given):
        raise error

    numbers = {name: {"ms_median": 2.0} for name in bench.IMPORTS}
    monkeypatch.setattr(bench, "queuing", fail)
    monkeypatch.setattr(bench, "importing", lambda repeats: numbers)
    monkeypatch.setattr(bench, "loading", lambda *given: [])
    monkeypatch.setattr(bench, "compiling", lambda *given: [])
    monkeypatch.setenv("CUSPARGE_COMPILE", "lazy")
    file = tmp_path / "runtime.json"
    monkeypatch.setattr(sys, "argv", ["bench_runtime.py", "--arch", "sm_80", "-o", str(file)])
    missing = isinstance(error, ImportError)
    assert bench.main() == (0 if missing else 1)
    report = json.loads(file.read_text())
    assert report["importing"] == numbers
    label = "queuing" if missing else f"FAILED queuing: {type(error).__name__}"
    assert f"{label}: {error}" in report["not_measured"]
    assert f"not measured: {label}: {error}" in capsys.readouterr().out


def test_loading_measures_no_compilation(load, tmp_path):
    """Where the cache lacks a kernel, it is said, and nothing is compiled."""
    need_nvrtc()
    pytest.importorskip("cupy", reason="needs cupy")
    bench = load("bench_runtime")
    with pytest.raises(RuntimeError, match="a kernel is not in the cache"):
        bench.fresh(bench.WARM.format(arch="sm_90a"), tmp_path)
    assert not list(tmp_path.rglob("*.cubin"))


# ---- facts ---------------------------------------------------------------------------------------


def test_facts_without_a_gpu(load, tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_facts.py"]
    for what in ("environment", "compile"):
        file = tmp_path / f"{what}.json"
        done = subprocess.run(
            [*command, what, "-o", file], capture_output=True, text=True, env=with_package()
        )
        assert "Traceback" not in done.stderr, done.stderr
        found = json.loads(file.read_text())
        if what == "environment":
            assert found["versions"]["numpy"] == np.__version__
            assert found["commit"]
            assert len(found["summary"]) >= 2
        elif gpu_tools.why_not() is not None:
            assert "no GPU" in found["skipped"]


@pytest.mark.parametrize("printed", ["", "\n", None])
def test_a_driver_that_lists_nothing(load, monkeypatch, printed):
    facts = load("gpu_facts")

    def run(command, **options):
        if printed is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, printed, "")

    monkeypatch.setattr(facts.subprocess, "run", run)
    reason = "nvidia-smi lists no GPU" if printed is not None else "nvidia-smi gives no answer"
    assert facts.clocks().startswith(reason)
    monkeypatch.setattr(facts, "source_state", dict)
    assert facts.environment()["summary"][0].startswith(reason)


def test_what_is_told_of_compiling(load, monkeypatch, tmp_path):
    from types import SimpleNamespace

    class Failure(Exception):
        pass

    info = {"compile_ms": 3.0, "registers": 40, "stack_bytes": 0, "size": 9, "nvrtc": "13.0"}
    made = [
        SimpleNamespace(info=SimpleNamespace(**info, spill_bytes=0)),
        SimpleNamespace(info=SimpleNamespace(**info, spill_bytes=16)),
        Failure("x.cu does not compile\nlog"),
        SimpleNamespace(info=SimpleNamespace(**info, spill_bytes=0)),
    ]
    budget = {
        f"x.cu: kernel<{i}>": {"sm_90a": [registers, 9]} for i, registers in enumerate((35, 34))
    }
    (tmp_path / "kernels_cu").mkdir()
    file = tmp_path / "kernels_cu" / "budget.json"
    file.write_text(json.dumps({"nvrtc": "13.5", "kernels": budget}))
    names = [f"cusparge::kernel<{i}>" for i in range(4)]
    wanted = [SimpleNamespace(file="x.cu", expression=name) for name in names]
    build = SimpleNamespace(try_all=lambda *given: made)
    variants = SimpleNamespace(all_variants=lambda arch: wanted)
    facts = load("gpu_facts")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    found = facts.compile_for("sm_90a", build, variants, Failure, 2)
    assert (found["failed"], found["spilling"]) == (1, 1)
    assert found["kernels"][0]["registers"] == 40
    assert found["summary"][1:] == [
        "FAILED cusparge::kernel<2>: x.cu does not compile",
        "40 registers, where NVRTC 13.5 takes 34: cusparge::kernel<1>",
        "SPILLS 16 bytes: cusparge::kernel<1>",
    ]
    assert [row.get("budget_registers") for row in found["kernels"]] == [35, 34, None, None]
    other = facts.compile_for("sm_80", build, variants, Failure, 2)
    assert not any("registers" in line for line in other["summary"]), "not in the budget"


@pytest.mark.slow
def test_a_runtime_benchmark_without_time_says_what_is_missing(load, tmp_path):
    need_nvrtc()
    for name in ("torch", "cupy"):
        pytest.importorskip(name, reason=f"needs {name}")
    file = tmp_path / "runtime.json"
    words = ["--repeats", "1", "--seconds", "0", "--arch", "sm_80", "-o", file]
    command = [sys.executable, BENCHMARKS / "bench_runtime.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=with_package(), timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["compiling"] == report["loading"] == []
    assert report["not_measured"] == [
        "loading for sm_80: out of time",
        "compiling for sm_80: out of time",
    ]
