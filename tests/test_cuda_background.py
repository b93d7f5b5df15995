"""When kernels are compiled: CUSPARGE_COMPILE, forks and exits behind the import, warmup."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cuda_tools import (
    ROOT,
    finish,
    isolate,
    need_nvrtc,
    run_script,
    script_environment,
    small,
    start_script,
    use_fake_cupy,
)
from fake_gpu import compile_nvml

from cusparge._cuda import background, build, cache, devices, module, notices, variants
from cusparge.errors import CompileError, DeviceError, InvalidArgumentError

DECLARE = """
gpus((9, 0), (9, 0), (7, 5))
wanted = [cuda_tools.small(n) for n in range(1, 4)]
declare(*wanted)
def begin(mode):
    os.environ["CUSPARGE_COMPILE"] = mode
    background.start()
def settle():
    for thread in threading.enumerate():
        if thread.name == "cusparge-background":
            thread.join()
def ready():
    return [build.peek(variant, "sm_90a") is not None for variant in wanted]
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("CUSPARGE_QUIET", "1")
    monkeypatch.setattr(notices, "_said", set())


# ---- modes ---------------------------------------------------------------------------------------


def test_behind_the_import(tmp_path):
    need_nvrtc()
    script = "background._DELAY = 1; begin('background'); begin('background')\n"
    script += "print(threading.active_count(), ready()); settle(); print(ready())\n"
    out, said = run_script(DECLARE + script + "print(module.loaded())", tmp_path)
    assert out == "2 [False, False, False]\n[True, True, True]\n0\n", "and cupy was not imported"
    assert said == ""


@pytest.mark.parametrize("mode", ["lazy", "off"])
def test_nothing_happens_at_import(tmp_path, mode):
    out, said = run_script(
        DECLARE + f"begin({mode!r}); settle(); print(threading.active_count(), ready())", tmp_path
    )
    assert out == "1 [False, False, False]\n"
    assert said == ""


IMPORT = """
fake = cuda_tools.FakeCupy()
devices.require_cupy = lambda: fake
devices.require_device = lambda index: [(9, 0), (9, 0), (7, 5)][index]
begin('import')
print(ready(), [device for _, _, device in fake.loads])
"""


def test_before_the_import_returns(tmp_path):
    need_nvrtc()
    out, _ = run_script(DECLARE + IMPORT, tmp_path, CUSPARGE_QUIET="1")
    assert out == "[True, True, True] [0, 0, 0, 1, 1, 1]\n"


def test_a_failure_at_import_is_told_and_does_not_stop_it(tmp_path):
    need_nvrtc()
    out, said = run_script(
        DECLARE + "wanted[1] = cuda_tools.small(13)\ndeclare(*wanted)\n" + IMPORT, tmp_path
    )
    assert out == "[True, False, True] []\n"
    assert "kernels were not compiled at import: small.cu does not compile for sm_90a" in said
    assert "Traceback" not in said


def test_a_wrong_mode_is_told_and_stops_nothing(tmp_path):
    out, said = run_script(DECLARE + "begin('fast'); begin('fast'); print('goes on')", tmp_path)
    assert out == "goes on\n"
    assert said.count("\n") == 1
    for word in ("CUSPARGE_COMPILE='fast'", "background", "import", "lazy", "off"):
        assert word in said


@pytest.mark.parametrize("mode", ["background", "import"])
def test_a_process_without_room_for_threads(tmp_path, mode):
    """As where the number of processes is limited: the import succeeds, and kernels compile."""
    need_nvrtc()
    first = "import threading\nreal = threading.Thread.start\n" + "\n".join(
        [
            "def start(thread):",
            "    if not thread.name.startswith(('cusparge-c', 'cusparge-b', 'Thread-')):",
            "        return real(thread)",
            '    raise RuntimeError("can\'t start new thread")',
            "threading.Thread.start = start",
        ]
    )
    script = IMPORT.replace("'import'", repr(mode)) + "print(build.build(wanted[0], 'sm_90a').arch)"
    out, said = run_script(DECLARE + script, tmp_path, first=first + "\n")
    ready = mode == "import"
    loads = [0, 0, 0, 1, 1, 1] if ready else []
    assert out == f"{3 * [ready]} {loads}\nsm_90a\n", said
    assert said == ""


BARE = """
import importlib.util, sys, threading
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "cupy" else found(name, *rest)
import cusparge
from cusparge._cuda import background
background.start()
nvrtc = sys.modules.get("cusparge._cuda.nvrtc")
print(threading.active_count(), len(nvrtc._loaded) if nvrtc else 0)
"""


@pytest.mark.parametrize("mode", ["background", "import", "nonsense"])
def test_without_cupy_nothing_begins(tmp_path, mode):
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        env=script_environment(tmp_path, CUSPARGE_COMPILE=mode, CUSPARGE_QUIET="1"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("1 0\n", "")


@pytest.mark.parametrize(
    ("argv", "orig", "expected"),
    [
        (["/usr/bin/cusparge", "--help"], [], True),
        (["C:/x/cusparge.exe"], [], True),
        (["-m", "doctor"], ["python", "-m", "cusparge", "doctor"], True),
        (["-m"], ["python", "-m", "pytest", "cusparge"], False),
        (["train.py"], ["python", "train.py"], False),
        ([""], [], False),
        ([], [], False),
    ],
)
def test_the_command_line_is_left_alone(monkeypatch, argv, orig, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig, raising=False)
    assert background._is_command_line() is expected


# ---- exits and forks -----------------------------------------------------------------------------


def test_a_process_may_end_at_any_time(tmp_path, rng):
    need_nvrtc()
    script = DECLARE + (
        "wanted[:0] = [Variant('slow.cu', 'slow')]; declare(*wanted)\n"
        "begin('background'); time.sleep(float(os.environ['SPAN']))"
    )
    spans = [0, *rng.uniform(0, 0.5, 3).tolist()]
    running = [start_script(script, tmp_path, SPAN=str(span)) for span in spans]
    assert set(finish(running)) == {("", "")}
    for entry in cache.Cache(tmp_path / "cache").entries():
        assert cache.Cache(tmp_path / "cache")._read(entry.metadata) is not None
    assert not list(tmp_path.glob("cache/v1/.*"))


FORK = """
import warnings
warnings.simplefilter("ignore")
begin("background")
children = []
for _ in range(6):
    time.sleep(0.03)
    if (child := os.fork()) == 0:
        # Everything that the thread may have been in the middle of.
        import cuda.pathfinder
        names = [thread.name for thread in threading.enumerate()]
        made = build.build(wanted[-1], "sm_90a")
        os._exit(names != ["MainThread"])
    children.append(child)
deadline = time.monotonic() + 60
while children and time.monotonic() < deadline:
    for child in list(children):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            children.remove(child)
            print(status, flush=True)
    time.sleep(0.01)
for child in children:
    os.kill(child, 9)
    print("hangs")
settle()
print(ready())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_the_thread_works(tmp_path):
    need_nvrtc()
    pytest.importorskip("cuda.pathfinder")
    out, said = run_script(DECLARE + FORK, tmp_path)
    assert out.split("\n") == [*["0"] * 6, "[True, True, True]", ""], said


GUARD = """
entered, wait = threading.Event(), threading.Event()
real = devices.list_gpus
def slow():
    entered.set()
    time.sleep(0.3)
    wait.set()
    return real()
devices.list_gpus = slow
begin("background")
entered.wait()
child = os.fork()
if child == 0:
    os._exit(7 if wait.is_set() else 8)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_waits_while_libraries_are_opened(tmp_path):
    out, _ = run_script(
        "import warnings; warnings.simplefilter('ignore')\n" + DECLARE + GUARD, tmp_path
    )
    assert out == "7\n"


# ---- warmup --------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    need_nvrtc()
    fake = use_fake_cupy(monkeypatch)
    gpus = [devices.Gpu(i, "stand-in", (9, 0), 1 << 34, f"GPU-{i}") for i in range(2)]
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    asked = []

    def expressions(arch, dtypes, head_dims):
        asked.append((arch, dtypes, head_dims))
        return [small(1 + index).expression for index, _ in enumerate(dtypes)]

    monkeypatch.setattr(variants, "_OWNERS", ())
    monkeypatch.setattr(variants, "_declared", {"one": ("small.cu", expressions, True)})
    fake.asked = asked
    return fake


def test_warmup_compiles_and_loads_on_every_gpu(two_gpus):
    assert background.warmup() is None
    assert [device for _, _, device in two_gpus.loads] == [0, 0, 1, 1]
    assert two_gpus.asked[0] == ("sm_90a", ("float16", "bfloat16"), (64, 128))
    assert module.loaded() == 4
    background.warmup()
    assert len(two_gpus.loads) == 4


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("float32", ("float32",)),
        (["bfloat16", "float16"], ("float16", "bfloat16")),
        (np.float16, ("float16",)),
        (np.dtype("float32"), ("float32",)),
        ((name for name in ["float16"]), ("float16",)),
    ],
)
def test_warmup_takes_dtypes(two_gpus, dtypes, expected):
    background.warmup(dtypes=dtypes, head_dims=96)
    assert two_gpus.asked[0] == ("sm_90a", expected, (128,))


def test_warmup_takes_dtypes_of_frameworks(two_gpus, torch, jax):
    background.warmup(dtypes=[torch.bfloat16, jax.numpy.float16], head_dims=[64, np.int64(200)])
    assert two_gpus.asked[0] == ("sm_90a", ("float16", "bfloat16"), (64, 256))


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtypes": "float64"},
        {"dtypes": "half"},
        {"dtypes": np.int32},
        {"dtypes": 3},
        {"dtypes": [None]},
        {"dtypes": []},
        {"head_dims": 0},
        {"head_dims": 257},
        {"head_dims": [64, 64.0]},
        {"head_dims": "64"},
        {"head_dims": True},
        {"head_dims": ()},
    ],
)
def test_warmup_refuses_what_has_no_kernel(two_gpus, arguments):
    (name,) = arguments
    with pytest.raises(InvalidArgumentError, match=f"^{name} of warmup") as caught:
        background.warmup(**arguments)
    assert "default" in str(caught.value)
    assert two_gpus.asked == []


def test_warmup_without_a_gpu_says_what_is_missing(monkeypatch):
    use_fake_cupy(monkeypatch)
    monkeypatch.setattr(devices, "list_gpus", list)
    with pytest.raises(DeviceError, match="warmup found no GPU"):
        background.warmup()
    gpus = [devices.Gpu(0, "stand-in", (7, 5), 1 << 34, "GPU-0")]
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    with pytest.raises(DeviceError, match=r"7\.5"):
        background.warmup()

    def missing():
        raise DeviceError("CuPy is not installed")

    monkeypatch.setattr(devices, "require_cupy", missing)
    with pytest.raises(DeviceError, match="CuPy is not installed"):
        background.warmup()


def test_warmup_off_takes_what_there_is(two_gpus, monkeypatch):
    for variant in (small(1), small(2)):
        build.build(variant, "sm_90a")
    before = cache.default().size()
    monkeypatch.setenv("CUSPARGE_COMPILE", "off")
    background.warmup()
    assert len(two_gpus.loads) == 4
    with pytest.raises(CompileError, match="CUSPARGE_COMPILE=off"):
        background.warmup(dtypes=["float16", "bfloat16", "float32"])
    assert cache.default().size() == before


# ---- the import itself ---------------------------------------------------------------------------

#: A package named cupy that loads nothing, and says what it was asked for.
CUPY = """
import sys
sys.path.insert(0, {tests!r})
from cuda_tools import FakeCupy
from fake_gpu import Runtime
fake = FakeCupy()
RawModule, cuda = fake.RawModule, fake.cuda
cuda.runtime = Runtime({capabilities})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_LIBRARY_PATH")
@pytest.mark.slow
def test_the_import_compiles_the_kernels_of_the_package(tmp_path):
    need_nvrtc()
    compile_nvml(tmp_path)
    environment = script_environment(
        tmp_path, CUSPARGE_COMPILE="lazy", LD_LIBRARY_PATH=str(tmp_path), FAKE_NVML_GPUS="1"
    )
    del environment["CUSPARGE_KERNELS"]
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    capability = run_bare("import cusparge\n" + GPU, environment)
    text = CUPY.format(tests=str(ROOT / "tests"), capabilities=capability)
    (tmp_path / "stub" / "cupy.py").write_text(text)
    script = "import sys, cusparge\n" + LOADED
    done = run_bare(script, environment | {"CUSPARGE_COMPILE": "import"})
    assert done == "True True True"
    # One is missing: the thread compiles it, loads nothing and imports no cupy.
    store = cache.Cache(tmp_path / "cache")
    store.drop(store.entries()[0])
    done = run_bare(script, environment | {"CUSPARGE_COMPILE": "background"})
    assert done == "False 0 True"


GPU = """
from cusparge._cuda import devices
print(devices.list_gpus()[0].capability)
"""

LOADED = """
import threading
before = "cupy" in sys.modules
for thread in threading.enumerate():
    if thread.name == "cusparge-background":
        thread.join()
from cusparge._cuda import build, devices, module, variants
arch = devices.arch_of(devices.list_gpus()[0].capability)
wanted = variants.default_variants(arch)
count = module.loaded()
print(before, count and count == len(wanted), all(build.peek(one, arch) for one in wanted))
"""


def run_bare(script, environment):
    """Run a script that imports cusparge itself; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
