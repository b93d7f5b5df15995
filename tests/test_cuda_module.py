"""From machine code to a function in memory: the loop that loads, threads, captures, forks."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from cuda_tools import DriverError, isolate, need_nvrtc, run_script, small, use_fake_cupy

from cusparge._cuda import build, cache, devices, module, notices, private, storage
from cusparge.errors import CompileError, DeviceError, InvalidArgumentError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    need_nvrtc()
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("CUSPARGE_QUIET", "1")
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(storage, "_private", None)
    monkeypatch.setattr(storage, "_rejected", set())


@pytest.fixture
def cupy(monkeypatch):
    return use_fake_cupy(monkeypatch)


def test_a_function_is_loaded_once_a_device(cupy):
    first = module.kernel(small(), 0)
    assert first.name == build.peek(small(), "sm_90a").lowered
    assert module.kernel(small(), 0) is first
    other = module.kernel(small(), 1)
    assert other is not first
    assert [device for _, _, device in cupy.loads] == [0, 1]
    assert module.kernel(small(4), 0).name != first.name
    assert module.loaded() == 3


def test_the_architecture_is_the_devices(cupy, monkeypatch):
    capabilities = {0: (8, 0), 1: (12, 0)}
    monkeypatch.setattr(devices, "require_device", capabilities.__getitem__)
    for device, arch in enumerate(("sm_80", "sm_120a")):
        module.kernel(small(), device)
        assert f"-{arch}-" in cupy.loads[-1][0]


def test_shared_memory_is_set_when_the_function_is_loaded(cupy):
    function = module.kernel(small(), 0, max_dynamic_shared_bytes=100_000)
    assert function.max_dynamic_shared_size_bytes == 100_000
    assert module.kernel(small(4), 0).max_dynamic_shared_size_bytes == 0


@pytest.mark.usefixtures("cupy")
def test_a_real_rawmodule_takes_the_path(monkeypatch):
    real = pytest.importorskip("cupy")
    binary = build.build(small(), "sm_90a")
    held = real.RawModule(path=str(binary.path))
    assert held.file_path == str(binary.path)


# ---- when the file is to blame -------------------------------------------------------------------


def spoil(action, times):
    """Return a hook that breaks the file before the driver opens it, so many times."""
    done = []

    def before_load(path):
        if len(done) < times:
            done.append(path)
            if action == "delete":
                os.unlink(path)
            else:
                with open(path, "r+b") as file:
                    file.truncate(10)

    return before_load


@pytest.mark.parametrize("action", ["delete", "truncate"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_breaks_after_its_check_is_made_again(cupy, action, times):
    cupy.before_load = spoil(action, times)
    assert module.kernel(small(), 0).name
    assert len(cupy.loads) == 1
    assert build.peek(small(), "sm_90a") is not None


def test_three_attempts_and_then_an_error_that_names_the_file(cupy):
    attempts = []

    def before_load(path):
        attempts.append(path)
        os.unlink(path)

    cupy.before_load = before_load
    with pytest.raises(CompileError, match="even after 3 attempts") as caught:
        module.kernel(small(), 0)
    assert len(attempts) == 3
    for part in (attempts[0], "CUDA_ERROR_FILE_NOT_FOUND", "CUSPARGE_CACHE_DIR"):
        assert part in str(caught.value)
    cupy.before_load = lambda path: None
    assert module.kernel(small(), 0).name, "a failure is not kept"


def test_a_driver_older_than_the_code(cupy, monkeypatch):
    cupy.error = DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
    major = need_nvrtc().version[0]
    monkeypatch.setattr(devices, "driver_cuda_version", lambda: (major - 1, 8))
    with pytest.raises(CompileError, match=rf"the driver knows CUDA {major - 1}\.8") as caught:
        module.kernel(small(), 0)
    assert "install a newer driver" in str(caught.value)


def test_a_seed_that_does_not_load_is_passed_over(cupy, monkeypatch, tmp_path):
    made = build.build(small(), "sm_90a")
    os.rename(tmp_path / "cache", tmp_path / "seed")
    monkeypatch.setenv("CUSPARGE_CACHE_SEED", str(tmp_path / "seed"))

    def before_load(path):
        if f"{os.sep}seed{os.sep}" in path:
            raise DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    cupy.before_load = before_load
    module.kernel(small(), 0)
    assert str(cache.folder()) in cupy.loads[0][0]
    assert (tmp_path / "seed" / "v1" / made.path.name).exists()


def test_a_vandal_and_threads(cupy, rng):
    wanted = [small(n) for n in range(1, 5)]
    choices = iter(rng.integers(0, 6, 10_000).tolist())

    def before_load(path):
        choice = next(choices)
        try:
            if choice == 0:
                os.unlink(path)
            elif choice == 1:
                with open(path, "r+b") as file:
                    file.truncate(100)
        except OSError:
            pass

    def use(got, failed):
        for variant in wanted:
            try:
                got.append((variant, module.kernel(variant, 0)))
            except CompileError as error:  # three times in a row: one in 27
                failed.append(str(error))

    cupy.before_load = before_load
    for _ in range(3):
        module._functions.clear()
        got, failed = [], []
        threads = [threading.Thread(target=use, args=(got, failed)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) + len(failed) == 16
        assert all("even after 3 attempts" in why for why in failed)
        assert len({(variant, id(function)) for variant, function in got}) == len(dict(got))


@pytest.mark.parametrize(
    "word",
    [
        "CUDA_ERROR_INVALID_IMAGE",
        "CUDA_ERROR_INVALID_SOURCE",
        "CUDA_ERROR_NO_BINARY_FOR_GPU",
        "CUDA_ERROR_FILE_NOT_FOUND",
        "CUDA_ERROR_NOT_FOUND",
        "CUDA_ERROR_INVALID_PTX",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "CUDA_ERROR_UNKNOWN",
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_OPERATING_SYSTEM",
    ],
)
def test_what_may_be_the_files_fault_is_mended_by_a_new_file(cupy, word):
    made = build.build(small(), "sm_90a")
    old = made.path.stat().st_ino, made.path.stat().st_mtime_ns

    def before_load(path):
        if (os.stat(path).st_ino, os.stat(path).st_mtime_ns) == old:
            raise DriverError(f"{word}: some words")

    cupy.before_load = before_load
    assert module.kernel(small(), 0).name == made.lowered


def forget_private(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(private.lifecycle, "end", lambda: None)
        private.remove(os.getpid(), storage._own().root)


def test_a_refused_file_in_a_cache_that_is_only_read(cupy, monkeypatch, tmp_path):
    made = build.build(small(), "sm_90a")

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    def before_load(path):
        if path == str(made.path):
            raise DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")

    cupy.before_load = before_load
    real = cache.Cache._write
    monkeypatch.setattr(
        cache.Cache,
        "_write",
        lambda self, *rest: read_only() if self.root == tmp_path / "cache" else real(self, *rest),
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", read_only)
        patch.setattr(Path, "unlink", read_only)
        assert module.kernel(small(), 0).name == made.lowered
        assert cupy.loads[-1][0] != str(made.path)
    forget_private(monkeypatch)


def test_a_folder_in_the_place_of_the_file(cupy, monkeypatch):
    def before_load(path):
        if path.startswith(str(cache.folder())):
            os.unlink(path)
            os.mkdir(path)
            raise DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")

    cupy.before_load = before_load
    assert module.kernel(small(), 0).name
    forget_private(monkeypatch)


@pytest.mark.parametrize(("field", "value"), [("lowered", "\ud800"), ("nvrtc", "abc")])
def test_metadata_that_means_nothing_is_recovered_from(cupy, field, value):
    made = build.build(small(), "sm_90a")
    raw = json.loads(made.path.with_suffix(".json").read_text())
    made.path.with_suffix(".json").write_text(json.dumps(raw | {field: value}))
    assert module.kernel(small(), 0).name == made.lowered
    assert build.peek(small(), "sm_90a").info.nvrtc == made.info.nvrtc


# ---- when the device is to blame -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
    ],
)
def test_what_compiling_again_would_not_mend(cupy, text):
    made = build.build(small(), "sm_90a")
    cupy.error = DriverError(text)
    with pytest.raises(DeviceError, match=text) as caught:
        module.kernel(small(), 0)
    assert "GPU 0" in str(caught.value)
    assert made.path.exists()


def test_nothing_is_loaded_in_a_capture(cupy):
    asked = []

    def capturing():
        asked.append(1)
        return True

    with pytest.raises(DeviceError, match="run one warm-up call first"):
        module.kernel(small(), 0, capturing=capturing)
    assert cupy.loads == []
    assert build.peek(small(), "sm_90a") is None
    function = module.kernel(small(), 0, capturing=lambda: False)
    assert module.kernel(small(), 0, capturing=capturing) is function
    assert len(asked) == 1, "asked only where something is missing"


def test_off_compiles_nothing_and_takes_what_there_is(cupy, monkeypatch):
    monkeypatch.setenv("CUSPARGE_COMPILE", "off")
    with pytest.raises(CompileError, match="CUSPARGE_COMPILE=off forbids") as caught:
        module.kernel(small(), 0)
    assert "cusparge compile --arch sm_90a" in str(caught.value)
    assert cache.default().entries() == []
    made = build.build(small(), "sm_90a")  # as `cusparge compile` does
    assert module.kernel(small(), 0).name == made.lowered


@pytest.mark.parametrize("word", ["CUDA_ERROR_UNKNOWN", "CUDA_ERROR_INVALID_IMAGE"])
def test_off_keeps_what_the_driver_refuses_and_says_why(cupy, monkeypatch, word):
    made = build.build(small(), "sm_90a")
    monkeypatch.setenv("CUSPARGE_COMPILE", "off")
    cupy.error = DriverError(f"{word}: the words of the driver")
    for _ in range(2):
        with pytest.raises(CompileError, match=f"{word}: the words of the driver") as caught:
            module.kernel(small(), 0)
        assert str(made.path) in str(caught.value)
        assert "attempts" not in str(caught.value)
        assert "cusparge compile --arch sm_90a" in str(caught.value)
    assert made.path.exists()
    assert made.path.with_suffix(".json").exists()
    cupy.error = None
    assert module.kernel(small(), 0).name == made.lowered, "it was for a moment only"


def test_off_tries_a_seed_after_the_cache(cupy, monkeypatch, tmp_path):
    made = build.build(small(), "sm_90a")
    shutil.copytree(tmp_path / "cache", tmp_path / "seed")
    monkeypatch.setenv("CUSPARGE_CACHE_SEED", str(tmp_path / "seed"))
    monkeypatch.setenv("CUSPARGE_COMPILE", "off")

    def before_load(path):
        if path == str(made.path):
            raise DriverError("CUDA_ERROR_INVALID_IMAGE")

    cupy.before_load = before_load
    assert module.kernel(small(), 0).name == made.lowered
    assert str(tmp_path / "seed") in cupy.loads[-1][0]
    assert made.path.exists()


def test_a_wrong_mode_is_an_error_at_first_use(cupy, monkeypatch):
    monkeypatch.setenv("CUSPARGE_COMPILE", "sometimes")
    with pytest.raises(InvalidArgumentError, match="CUSPARGE_COMPILE='sometimes'") as caught:
        module.kernel(small(), 0)
    for mode in ("background", "import", "lazy", "off"):
        assert f"{mode} (" in str(caught.value)
    assert cupy.loads == []


def test_a_device_that_cannot_be_used(cupy, monkeypatch):
    def missing(index):
        raise DeviceError("no NVIDIA driver found")

    monkeypatch.setattr(devices, "require_device", missing)
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        module.kernel(small(), 0)
    monkeypatch.setattr(devices, "require_device", lambda index: (7, 5))
    with pytest.raises(DeviceError, match=r"7\.5"):
        module.kernel(small(), 0)
    assert cupy.loads == []


# ---- threads and forks ---------------------------------------------------------------------------


def test_threads_share_one_function(cupy):
    start = threading.Barrier(8)
    got = []

    def one():
        start.wait()
        got.append(module.kernel(small(), 0))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
    assert len(cupy.loads) == 1


FORK = """
import types, warnings
warnings.simplefilter("ignore")
fake = cuda_tools.FakeCupy()
devices.require_cupy = lambda: fake
devices.require_device = lambda index: (9, 0)
if STARTED == "by us":
    module.kernel(cuda_tools.small(), 0)
elif STARTED == "by torch":
    cuda = types.SimpleNamespace(is_initialized=lambda: True)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
if (child := os.fork()) == 0:
    if STARTED == "by others":
        fake.error = cuda_tools.DriverError("CUDA_ERROR_NOT_INITIALIZED: initialization error")
    try:
        print(module.kernel(cuda_tools.small(), 0).name)
    except cusparge.DeviceError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
module.kernel(cuda_tools.small(), 0)  # the parent goes on
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("started", ["by nobody", "by us", "by torch", "by others"])
def test_cuda_does_not_survive_a_fork(tmp_path, started):
    out, _ = run_script(f"STARTED = {started!r}\n" + FORK, tmp_path)
    if started == "by nobody":
        assert out.startswith("_ZN8cusparge5small")
    else:
        assert "started CUDA before fork; use spawn" in out
