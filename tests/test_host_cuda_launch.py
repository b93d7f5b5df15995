"""The Python side of the emulation: arrays in any layout, schedules, builds and refusals."""

import numpy as np
import pytest
from host_cuda import emu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

UNITS = emu.HERE / "kernels" / "units.cu"


@pytest.fixture(scope="module", autouse=True)
def built():
    names = ("copy", "add_one", "draw", "late", "unset")
    emu.build(UNITS, *(f"units::{name}" for name in names))


def copy(source, target, num_bytes):
    """Run the copy kernel on wrapped arrays, or on (wrapped array, byte offset)."""
    params = bytes(16) + np.int64(num_bytes).tobytes()
    emu.launch_params(UNITS, "units::copy", 1, 1, params, {0: source, 8: target})


def add_one(x, y, wrap_out=emu.Out):
    """y = x + 1 through the strides of both arrays, which have rows of float32."""
    rows, columns = x.shape
    strides = [a.strides[0] // 4 for a in (x, y)]
    params = bytes(16) + np.array([*strides, columns], np.int64).tobytes()
    pointers = {0: emu.In(x), 8: wrap_out(y)}
    emu.launch_params(UNITS, "units::add_one", 1, rows, params, pointers)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 15, 16, 17, 31, 32, 47, 48, 301])
def test_copies_of_every_size(size, rng):
    x, y = rng.integers(0, 256, size, dtype=np.uint8), np.zeros(size, np.uint8)
    copy(emu.In(x), emu.Out(y), size)
    np.testing.assert_array_equal(x, y)


def test_a_pointer_is_as_aligned_as_the_view_in_its_owner(rng):
    x, y = rng.integers(0, 256, 100, dtype=np.uint8), np.zeros(64, np.uint8)
    copy(emu.In(x[16:80]), emu.Out(y), 64)
    np.testing.assert_array_equal(x[16:80], y)
    copy((emu.In(x), 32), emu.Out(y), 64)
    np.testing.assert_array_equal(x[32:96], y)
    for source in (emu.In(x[15:79]), (emu.In(x), 15)):
        with pytest.raises(emu.EmuError, match=r"^misaligned access.*accesses 16 bytes.*units\.cu"):
            copy(source, emu.Out(y), 64)


def test_views_keep_their_strides(rng):
    base = rng.standard_normal((9, 20)).astype(np.float32)
    cases = {
        "a part of rows": base[:, 3:11],
        "every second row": base[::2, 1:9],
        "rows backwards": base[::-1, 2:7],
        "one row many times": np.broadcast_to(base[4, :6], (5, 6)),
    }
    for name, x in cases.items():
        out = np.full((9, 30), -1, np.float32)
        y = out[::-1, 5:20][: x.shape[0], : x.shape[1]]
        add_one(x, y)
        np.testing.assert_array_equal(y, x + 1, err_msg=name)
        assert (out == -1).sum() == out.size - y.size, name


def test_what_lies_between_the_rows_is_out_of_bounds(rng):
    base = rng.standard_normal((4, 10)).astype(np.float32)
    params = bytes(16) + np.array([10, 8, 8], np.int64).tobytes()
    y = np.zeros((4, 8), np.float32)
    with pytest.raises(emu.EmuError, match=r"^out of bounds.*argument 0.*between the array's"):
        emu.launch_params(
            UNITS, "units::add_one", 1, 4, params, {0: emu.In(base[:, :7]), 8: emu.Out(y)}
        )


def test_offsets_beyond_32_bits_cost_nothing(rng):
    stride = 2**30 + 2**20 + 3  # elements: the third row starts behind 8 GiB
    base = np.zeros(2 * stride + 8, np.float32)
    x = np.lib.stride_tricks.as_strided(base, (3, 5), (4 * stride, 4))
    x[...] = rng.standard_normal((3, 5))
    y = np.zeros((3, 5), np.float32)
    add_one(x, y)
    np.testing.assert_array_equal(y, x + 1)
    out = np.zeros(2 * stride + 8, np.float32)
    far = np.lib.stride_tricks.as_strided(out, (3, 5), (4 * stride, 4))
    add_one(y, far)
    np.testing.assert_array_equal(far, y + 1)


def test_an_output_that_is_not_written_in_full_is_named():
    x, y = np.zeros((2, 6), np.float32), np.zeros((4, 8), np.float32)
    with pytest.raises(
        emu.EmuError,
        match=r"unwritten output: argument 1, shape \(4, 8\): 20 elem"
        r".*\(0, 6\)",
    ):
        add_one(x, y)
    add_one(x, y, emu.InOut)  # what stays may stay
    assert y.sum() == 12


def test_a_failed_launch_leaves_the_arrays_alone():
    x, y = np.zeros((2, 6), np.float32), np.full((4, 8), 7, np.float32)
    with pytest.raises(emu.EmuError):
        add_one(x, y)
    assert (y == 7).all()


def test_the_same_array_at_two_places_is_one_buffer(rng):
    x = rng.standard_normal((1, 6)).astype(np.float32)
    y, both = x.copy(), emu.InOut(x)
    params = bytes(16) + np.array([6, 6, 6], np.int64).tobytes()
    emu.launch_params(UNITS, "units::add_one", 1, 1, params, {0: both, 8: both})
    np.testing.assert_array_equal(x, y + 1)


def test_a_kernel_is_built_again_when_its_text_changes(tmp_path):
    source, header = tmp_path / "a.cu", tmp_path / "number.cuh"
    source.write_text('#include "number.cuh"\nCS_KERNEL void k(int* y) { *y = kNumber; }\n')
    y = np.zeros(1, np.int32)
    for number in (3, 4):
        header.write_text(f"constexpr int kNumber = {number};\n")
        emu.launch(source, "k", 1, 1, [emu.Out(y)])
        assert y == number


def test_a_seed_replays_the_random_schedule(rng):
    file = emu.HERE / "kernels" / "faults_async.cu"
    x, out = np.ones((5, 128), np.uint32), np.zeros(128, np.uint32)
    reports = set()
    for seed in [11, 11, *range(12)]:
        with pytest.raises(emu.EmuError) as caught:  # fault 9: a consumer that never waits
            emu.launch(
                file,
                "faults::ring<9>",
                1,
                160,
                [emu.In(x), emu.Out(out)],
                smem_bytes=1056,
                schedule="random",
                seed=seed,
            )
        reports.add(str(caught.value))
    assert 4 <= len(reports) <= 12  # different schedules, and each of them only once


def order_of_threads(schedule, seed):
    counter, order = np.zeros(1, np.uint32), np.zeros((8, 64), np.uint32)
    args = [emu.InOut(counter), emu.Out(order)]
    emu.launch(UNITS, "units::draw", 8, 64, args, schedule=schedule, seed=seed)
    return order


def test_the_random_schedule_shuffles_threads_and_blocks(rng):
    seeds = rng.integers(2**63, size=10).tolist()
    for schedule in ("eager", "lazy"):
        assert (order_of_threads(schedule, seeds[0]).ravel() == np.arange(512)).all()
    orders = [order_of_threads("random", seed) for seed in seeds]
    assert any((np.diff(order[:, 0].astype(int)) < 0).any() for order in orders)  # blocks
    # Pairs of a block's threads that ran the other way round. Pauses alone reach a quarter.
    later = np.triu(np.ones((64, 64), bool), 1)
    reversed_pairs = [(block[:, None] > block)[later].mean() for order in orders for block in order]
    assert 0.4 < np.mean(reversed_pairs) < 0.6


def test_schedules_differ_in_when_copies_move_their_data(rng):
    seen = {}
    for schedule, seeds in {"eager": [0], "lazy": [0], "random": range(40)}.items():
        seen[schedule] = set()
        for seed in seeds:
            source, out = np.full(8, 7, np.uint32), np.zeros(2, np.uint32)
            args = [emu.InOut(source), emu.Out(out)]
            emu.launch(
                UNITS, "units::late", 1, 1, args, smem_bytes=48, schedule=schedule, seed=seed
            )
            seen[schedule].add(tuple(out.tolist()))
    assert seen["eager"] == {(7, 7)}
    assert seen["lazy"] == {(8, 8)}
    assert len(seen["random"]) > 1


def test_registers_that_nobody_set_are_not_zero():
    out = np.zeros((32, 4), np.float32)
    emu.launch(UNITS, "units::unset", 1, 32, [emu.Out(out)])
    assert (out != 0).all()


def test_a_deadlock_report_says_who_waits_where():
    file = emu.HERE / "kernels" / "faults_async.cu"
    x, out = np.ones((5, 128), np.uint32), np.zeros(128, np.uint32)
    with pytest.raises(emu.EmuError) as caught:  # fault 7: nobody says that a stage is empty
        emu.launch(file, "faults::ring<7>", 1, 160, [emu.In(x), emu.Out(out)], smem_bytes=1056)
    lines = file.read_text().splitlines()
    report = str(caught.value).splitlines()
    assert report[0] == "deadlock in block (0,0,0):"
    states = {}
    for line in report[1:]:
        _, threads, state = line.split(maxsplit=2)
        states[threads] = state
    assert states.keys() == {"0-127", "128", "129-159"}
    assert states["129-159"].startswith("finished")
    for threads, text, wait in (
        ("128", "ptx::mbar_wait(empty", "4 arrivals and 0 bytes outstanding"),
        ("0-127", "ptx::mbar_wait(full", "1 arrivals and 0 bytes outstanding"),
    ):
        number = int(states[threads].split("faults_async.cu:")[1].split()[0])
        assert text in lines[number - 1]
        assert wait in states[threads]


def test_compile_errors_are_shown(tmp_path):
    source = tmp_path / "a.cu"
    source.write_text("CS_KERNEL void k(int* y) { *y = nonsense; }\n")
    with pytest.raises(emu.BuildError, match="nonsense"):
        emu.launch(source, "k", 1, 1, [emu.Out(np.zeros(1, np.int32))])
    source.write_text("CS_KERNEL void k(int* y) { __shared__ int s[2]; *y = s[0]; }\n")
    with pytest.raises(emu.BuildError, match="use CS_SMEM"):
        emu.launch(source, "k", 1, 1, [emu.Out(np.zeros(1, np.int32))])


WRONG = {
    "schedule": (ValueError, "eager, lazy, random", {"schedule": "late"}),
    "shared memory": (ValueError, "smem_bytes", {"smem_bytes": 232449}),
    "grid": (ValueError, "grid takes", {"grid": 0}),
    "block": (ValueError, "at most 1024 threads", {"block": (1025,)}),
    "argument": (TypeError, "NumPy scalar", {"args": [3]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused(name):
    error, text, options = WRONG[name]
    call = {"grid": 1, "block": 1, "args": []} | options
    with pytest.raises(error, match=text):
        emu.launch(UNITS, "units::copy", **call)


def test_only_numpy_arrays_are_wrapped():
    with pytest.raises(TypeError, match="a NumPy array is needed; got list"):
        emu.In([1, 2])


def test_the_reason_for_skipping_is_plain(monkeypatch):
    monkeypatch.setattr(emu, "COMPILER", None)
    assert "no g++" in emu._missing()


def test_the_portable_switch_of_fibers_does_the_same(monkeypatch, rng):
    """What is used where there is no assembly for the processor."""
    monkeypatch.setattr(emu, "RUNTIME_FLAGS", [*emu.RUNTIME_FLAGS, "-DEMU_UCONTEXT"])
    monkeypatch.setattr(emu._Module, "built", {})
    file = emu.HERE / "kernels" / "faults_async.cu"
    x, out = rng.integers(0, 99, (5, 128)).astype(np.uint32), np.zeros(128, np.uint32)
    args = [emu.In(x), emu.Out(out)]
    emu.build(file, "faults::ring<0>", "faults::ring<7>")
    emu.launch(file, "faults::ring<0>", 1, 160, args, smem_bytes=1056, schedule="random", seed=3)
    np.testing.assert_array_equal(out, x.sum(0))
    with pytest.raises(emu.EmuError, match=r"^deadlock"):
        emu.launch(file, "faults::ring<7>", 1, 160, args, smem_bytes=1056)
