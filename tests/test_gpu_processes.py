"""What needs a process of its own: caches, imports, forks, broken contexts (marker gpu)."""

import os

import gpu_tools
import pytest
from gpu_tools import run_script

pytestmark = gpu_tools.marks()

#: An array, and the CPU backend's answer.
CALL = """
from cusparge.stage1 import pool_blocks
x = np.random.default_rng().standard_normal((1, 2, 150, 64), dtype=np.float32)
def check(gpu, given=None):
    got = pool_blocks(gpu.array(x) if given is None else given, smooth=True)
    want = pool_blocks(x, smooth=True)
    np.testing.assert_allclose(gpu.host(got.mean), want.mean, atol=1e-5)
    np.testing.assert_allclose(gpu.host(got.similarity), want.similarity, atol=1e-5)
def outcome(call):
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
"""
BEGIN = "gpu = gpu_tools.begin()\nimport cusparge\n" + CALL

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# ---- compiling -----------------------------------------------------------------------------------

IMPORT = """
cusparge = gpu_tools.import_cusparge(os.environ["MODE"])
from cusparge._cuda import background, build, devices, module, variants
for thread in threading.enumerate():
    if thread.name == "cusparge-background":
        thread.join()
arch = devices.arch_of(devices.list_gpus()[0].capability)
wanted = variants.default_variants(arch)
print(len(wanted), sum(build.peek(one, arch) is not None for one in wanted), module.loaded())
print("cupy" in sys.modules)
"""


@pytest.mark.parametrize("mode", ["background", "import", "lazy"])
def test_what_an_import_compiles(tmp_path, mode):
    out, said = run_script(IMPORT, tmp_path, MODE=mode)
    (wanted, ready, loaded), (imported,) = map(str.split, out.splitlines())
    assert int(wanted) >= 9
    assert int(ready) == (0 if mode == "lazy" else int(wanted)), said
    assert (int(loaded) > 0) == (mode == "import"), said
    assert gpu_tools.DRY or (imported == "True") == (mode == "import"), "CuPy was loaded"


def test_a_call_after_the_import_takes_what_the_background_has_made(tmp_path):
    script = IMPORT + CALL + "gpu = gpu_tools.begin()\nfor _ in range(3): check(gpu)\nprint('fine')"
    out, _ = run_script(script, tmp_path, MODE="background")
    assert out.split()[-1] == "fine"


def test_a_call_does_not_wait_for_the_background_to_end(tmp_path):
    script = (
        'cusparge = gpu_tools.import_cusparge("background")\n' + CALL
        + "gpu = gpu_tools.begin()\ncheck(gpu)\nprint('fine')"
    )  # fmt: skip
    assert run_script(script, tmp_path)[0].strip() == "fine"


def test_warmup_loads_what_a_first_call_needs(tmp_path):
    script = """
cusparge.warmup()
from cusparge._cuda import module, variants
count = module.loaded()
print(count == gpu.count * len(variants.default_variants("sm_90a")))
cusparge.warmup(dtypes=["float32"], head_dims=[64, 80])
print(module.loaded() - count == gpu.count * 4)
count = module.loaded()
check(gpu)
print(module.loaded() == count)
"""
    assert run_script(BEGIN + script, tmp_path)[0].split() == ["True"] * 3


def test_off_takes_the_cache_and_nothing_else(tmp_path):
    script = "print(outcome(lambda: check(gpu)))"
    out, _ = run_script(BEGIN + script, tmp_path, CUSPARGE_COMPILE="off")
    assert out.startswith("CompileError: pool.cu")
    assert "cusparge compile --arch" in out
    assert run_script(BEGIN + script, tmp_path)[0].strip() == "no error"
    out, _ = run_script(BEGIN + script, tmp_path, CUSPARGE_COMPILE="off")
    assert out.strip() == "no error"


SPOIL = """
from hashlib import sha256
import json
from pathlib import Path
for path in Path(os.environ["CUSPARGE_CACHE_DIR"], "v1").glob("*.cubin"):
    path.write_bytes(spoilt(path.read_bytes()))
    if FIT:  # the hash fits, so that only the driver can see it
        description = json.loads(path.with_suffix(".json").read_text())
        data = path.read_bytes()
        description |= {"sha256": sha256(data).hexdigest(), "size": len(data)}
        path.with_suffix(".json").write_text(json.dumps(description))
"""


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("spoilt", ["data[:100]", "data[:64] + bytes(len(data) - 64)"])
def test_a_spoilt_cache_is_mended(tmp_path, fit, spoilt):
    if gpu_tools.DRY and "bytes" in spoilt and fit:
        pytest.skip("the stand-in for the driver looks at the size only")
    script = "check(gpu)\nprint('fine')\n"
    run_script(BEGIN + script, tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("v1/*.cubin")}
    assert len(sizes) == 3
    spoil = f"FIT = {fit}\ndef spoilt(data): return {spoilt}\n" + SPOIL
    assert run_script(spoil + BEGIN + script, tmp_path)[0].split() == ["fine"]
    assert {path.name: path.stat().st_size for path in tmp_path.glob("v1/*.cubin")} == sizes
    assert run_script(BEGIN + script, tmp_path, CUSPARGE_COMPILE="off")[0].split() == ["fine"]


# ---- forks ---------------------------------------------------------------------------------------

FORK = """
def in_child(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            print("child:", outcome(work), flush=True)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
"""


@needs_fork
@pytest.mark.parametrize("mode", ["background", "lazy"])
def test_a_fork_after_the_import_may_use_the_gpu(tmp_path, mode):
    script = (
        f"cusparge = gpu_tools.import_cusparge({mode!r})\nimport cupy\n" + CALL + FORK
        + "in_child(lambda: check(gpu_tools.begin()))\ncheck(gpu_tools.begin())\nprint('parent')"
    )  # fmt: skip
    out, said = run_script(script, tmp_path)
    assert out.splitlines() == ["child: no error", "parent"], said


@needs_fork
@pytest.mark.parametrize("work", ["pool_blocks(x)", "cusparge.warmup()", "pool_blocks(y)"])
def test_a_fork_after_cuda_has_started_is_refused(tmp_path, work):
    """Before anything is allocated, which would raise the framework's own error."""
    if "y" in work.partition("(")[2]:
        pytest.importorskip("torch", reason="needs torch")
        given = "y = gpu.tensor(x, 'float16')\npool_blocks(y, smooth=True)\npool_blocks(y)\n"
    else:
        given = "x = gpu.array(x)\npool_blocks(x)\n"
    script = BEGIN + FORK + given + f"in_child(lambda: {work})\npool_blocks(x)\nprint('parent')"
    out, _ = run_script(script, tmp_path)
    first, last = out.splitlines()
    assert first.startswith("child: DeviceError: this process was forked after")
    assert "spawn" in first
    assert last == "parent"


# ---- a broken context ----------------------------------------------------------------------------


def test_an_earlier_fault_is_a_device_error(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    script = """
y = gpu.tensor(x)
for _ in range(2): pool_blocks(y, smooth=True)
gpu.fault()
print(outcome(lambda: pool_blocks(y, smooth=True)), flush=True)
os._exit(0)  # nobody can take such a context down in an orderly way
"""
    out, _ = run_script(BEGIN + script, tmp_path)
    assert out.startswith("DeviceError: a launch failed on GPU 0")
    for word in ("illegal memory access", "pool.cu", "started again", "CUSPARGE_DEBUG=1"):
        assert word in out


def test_debugging_names_the_kernel_that_fails(tmp_path):
    """With CUSPARGE_DEBUG=1 the call that caused a fault raises it, not the next one."""
    script = """
from cusparge._cuda import launch
from cusparge._cuda.pooling import pool_plan
plan = pool_plan("float32", (1, 1, 64, 64), (4096, 4096, 64), 64)
nowhere = dict(x=16, block_mean=16, similarity=16, lengths=0, workspace=0)
call = lambda: launch.run(plan, nowhere, device=0, stream=gpu.stream())
print(outcome(call), flush=True)
os._exit(0)
"""
    out, _ = run_script(BEGIN + script, tmp_path, CUSPARGE_DEBUG="1")
    assert out.startswith("DeviceError: a launch failed on GPU 0: cusparge::pool_blocks")
    assert "illegal memory access" in out
