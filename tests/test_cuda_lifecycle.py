"""What a fork and the end of the process do to compilations that are under way."""

import os

import pytest
from cuda_tools import finish, need_nvrtc, run_script, start_script

from cusparge._cuda import cache


@pytest.fixture(autouse=True)
def compiler():
    need_nvrtc()


#: Exit handlers run in reverse order: this one after all of the package's.
LAST = """
import atexit
atexit.register(lambda: print("left:", len(lifecycle._threads)))
"""

ENDING = """
wanted = Variant("slow.cu", "slow")
nvrtc.load()  # so that what is surrounded below is the compilation
def work():
    try:
        build.build(wanted, "sm_90a")
    except cusparge.CompileError as error:
        print(error)
threading.Thread(target=work, daemon=True).start()
while not lifecycle._threads:
    time.sleep(0.005)
time.sleep(float(os.environ["SPAN"]))
print("ends")
"""


def test_a_process_ends_in_the_middle_of_a_compilation(tmp_path, rng):
    spans = [*rng.uniform(0, 0.6, 3).tolist(), 0.0]
    running = [start_script(ENDING, tmp_path, first=LAST, SPAN=str(span)) for span in spans]
    for out, said in finish(running):
        told = "nothing is compiled any more: the process is ending."  # if the thread gets to it
        # Two threads print: the lines may be mixed up.
        assert "".join(out.replace(told, "").split()) == "endsleft:0"
        assert "Traceback" not in said
    assert cache.Cache(tmp_path / "cache").entries() == []
    assert not list(tmp_path.glob("cache/v1/*"))
    assert not (tmp_path / "cache/failed").exists(), "a cancelled compilation is no failure"


def test_nothing_is_compiled_after_the_end(tmp_path):
    out, _ = run_script(
        "lifecycle.end()\ntry:\n    build.build(cuda_tools.small(), 'sm_90a')\n"
        "except cusparge.CompileError as error:\n    print(error)\n",
        tmp_path,
    )
    assert "the process is ending" in out


#: What is done before a fork is done in reverse order: this after all that the package does.
BEFORE = """
import os, warnings
warnings.simplefilter("ignore")
os.register_at_fork(before=lambda: print("in flight:", len(lifecycle._threads), flush=True))
from cusparge._cuda import progress
"""

FORK = """
held = build._lock_of(cuda_tools.small(), "sm_90a")
locks = [held, build._guard, nvrtc._lock, cache._lock, storage._lock, progress._lock,
         module._lock]
def hold():
    for lock in locks:
        lock.acquire()
    ready.set()
    time.sleep(3600)
if os.environ["WHEN"] == "compiling":
    wanted = Variant("slow.cu", "slow")
    nvrtc.load()
    real, results = nvrtc.Nvrtc.compile, []
    def compile(*arguments):
        results.append(real(*arguments))
        return results[-1]
    nvrtc.Nvrtc.compile = compile
    lifecycle._FORK_PATIENCE = 0.02
    threading.Thread(target=build.build, args=(wanted, "sm_90a"), daemon=True).start()
    while not lifecycle._threads:
        time.sleep(0.005)
else:
    from cusparge._cuda import progress
    ready = threading.Event()
    threading.Thread(target=hold, daemon=True).start()
    ready.wait()
child = os.fork()
if child == 0:
    build.build(cuda_tools.small(), "sm_90a")
    cache.default()
    from cusparge._cuda import private
    private.remove(os.getpid(), storage._make_private(OSError("a test")).root)
    print("child", flush=True)
    os._exit(0)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
    print("the child hangs")
print("status", status, flush=True)
if os.environ["WHEN"] == "compiling":
    for thread in threading.enumerate()[1:]:
        thread.join()
    print(*[result.error for result in results], build.peek(wanted, "sm_90a") is not None)
    sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["locks held", "compiling"])
def test_a_child_of_a_fork_compiles(tmp_path, when):
    out, said = run_script(FORK, tmp_path, first=BEFORE, WHEN=when)
    # What the fork cancelled is compiled to its end afterwards.
    more = ["NVRTC_ERROR_CANCELLED None True"] if when == "compiling" else []
    assert out.splitlines() == ["in flight: 0", "child", "status 0", *more], said
