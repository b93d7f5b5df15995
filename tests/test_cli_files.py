"""`cusparge run`, and what it makes of files that are not what they should be."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from cli_tools import example, load, refused, run_json, save

import cusparge
from cusparge.cli import files, main, npz, tensors
from cusparge.errors import InvalidArgumentError

# --- run: the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_run_writes_what_attention_returns(tmp_path, capsys, rng, suffix, dtype):
    arrays = {name: array.astype(dtype) for name, array in example(rng).items()}
    source = save(tmp_path / f"layer{suffix}", arrays)
    record = run_json(capsys, "run", source, "--lse", "--causal", "--cdf", "0.7", "--sim", "-1")
    out, lse, stats = cusparge.attention(
        *arrays.values(),
        policy=cusparge.TopCdf(0.7, -1),
        causal=True,
        return_lse=True,
        return_stats=True,
    )
    written = load(tmp_path / f"layer.out{suffix}")
    assert set(written) == {"out", "lse"}
    assert written["out"].dtype == dtype
    np.testing.assert_array_equal(written["out"], out, strict=True)
    np.testing.assert_array_equal(written["lse"], lse, strict=True)
    assert record["sparsity"] == pytest.approx(stats.sparsity, rel=1e-12)  # a mean over heads
    np.testing.assert_array_equal(record["sparsity_per_head"], stats.sparsity_per_head)
    assert 0 < stats.sparsity < 1  # the thresholds arrived


@pytest.mark.parametrize(
    ("words", "policy", "options"),
    [
        ([], cusparge.TopCdf(), {}),
        (["--keep", "0.3"], cusparge.TopK(0.3), {}),
        (["--keep", "0.3", "--sim", "0.5"], cusparge.TopK(0.3, 0.5), {}),
        (["--dense"], cusparge.Dense(), {}),
        (["--dense", "--quantize"], cusparge.Dense(quantize=True), {}),
        (["--cdf", "0.5,0.6,0.7,0.8"], cusparge.TopCdf((0.5, 0.6, 0.7, 0.8)), {}),
        (["--cdf", "0.6", "--no-quantize"], cusparge.TopCdf(0.6, quantize=False), {}),
        (
            ["--causal", "--causal-align", "top_left", "--sm-scale", "0.5"],
            cusparge.TopCdf(),
            {"causal": True, "causal_align": "top_left", "sm_scale": 0.5},
        ),
        (["--backend", "reference"], cusparge.TopCdf(), {"backend": "reference"}),
    ],
)
def test_run_options_reach_the_call(tmp_path, capsys, rng, words, policy, options):
    arrays = example(rng)
    source = save(tmp_path / "a.npz", arrays)
    run_json(capsys, "run", source, *words)
    expected = cusparge.attention(*arrays.values(), policy=policy, **options)
    np.testing.assert_array_equal(load(tmp_path / "a.out.npz")["out"], expected, strict=True)


def test_run_layout(tmp_path, capsys, rng):
    arrays = {name: array.swapaxes(1, 2).copy() for name, array in example(rng).items()}
    source = save(tmp_path / "a.npz", arrays)
    run_json(capsys, "run", source, "--layout", "NHD")
    expected = cusparge.attention(*arrays.values(), layout="NHD")
    np.testing.assert_array_equal(load(tmp_path / "a.out.npz")["out"], expected, strict=True)


def test_run_changes_the_format_on_request(tmp_path, capsys, rng):
    arrays = example(rng)
    source = save(tmp_path / "a.npz", arrays)
    target = tmp_path / "other.safetensors"
    assert main(["run", str(source), "-o", str(target)]) == 0
    assert "2x4x200x40 float32" in capsys.readouterr().out
    expected = cusparge.attention(*arrays.values())
    np.testing.assert_array_equal(load(target)["out"], expected, strict=True)
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name] == []


def test_fortran_order_and_foreign_byte_order(tmp_path, capsys, rng):
    arrays = example(rng)
    given = {
        "q": np.asfortranarray(arrays["q"]),
        "k": arrays["k"].astype(">f4"),
        "v": arrays["v"],
    }
    run_json(capsys, "run", save(tmp_path / "a.npz", given))
    expected = cusparge.attention(*arrays.values())
    np.testing.assert_array_equal(load(tmp_path / "a.out.npz")["out"], expected, strict=True)


def test_nan_in_a_file_is_null_in_json_and_told(tmp_path, capsys, rng):
    arrays = example(rng)
    arrays["v"][0, 0, 0, 0] = np.nan
    source = save(tmp_path / "a.npz", arrays)
    record = run_json(capsys, "run", source, "--dense")
    assert record["rows_not_finite"] == 2 * 200  # both heads that read this key head
    record = run_json(capsys, "inspect", source, "--cdf", "0.9", "--sim", "-1")
    assert record["results"][0]["error_per_head"][0][0] is None
    assert record["results"][0]["worst_error"] is None
    assert record["best"][0]["setting"] is None


def test_empty_arrays(tmp_path, capsys):
    empty = np.zeros((1, 2, 0, 16), np.float32)
    source = save(tmp_path / "a.safetensors", {"q": empty, "k": empty, "v": empty})
    assert run_json(capsys, "run", source)["sparsity"] == 0
    assert load(tmp_path / "a.out.safetensors")["out"].shape == empty.shape


# --- bfloat16 ------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_as_ml_dtypes_rounds(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (rng.integers(0, 2**16, 5_000, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([values, ties.view(np.float32), np.float32([0, np.inf, -np.inf])])
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    mine = tensors.round_to_bfloat16(values)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(mine[numbers], expected.view(np.uint16)[numbers])
    wide = tensors.widen_bfloat16(mine)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(values))
    np.testing.assert_array_equal(wide[numbers], expected[numbers].astype(np.float32))


def test_bfloat16_files_work_without_ml_dtypes(tmp_path, capsys, rng, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    arrays = example(rng)
    source = tmp_path / "a.safetensors"
    source.write_bytes(tensors.write(arrays, bfloat16={"q", "k", "v"}))
    wide = {
        name: tensors.widen_bfloat16(tensors.round_to_bfloat16(array))
        for name, array in arrays.items()
    }
    record = run_json(capsys, "run", source, "--lse")
    assert record["inputs"]["q"]["dtype"] == record["out"]["dtype"] == "bfloat16"
    out, lse = cusparge.attention(*wide.values(), return_lse=True)
    from safetensors import deserialize

    entries = dict(deserialize((tmp_path / "a.out.safetensors").read_bytes()))
    assert entries["out"]["dtype"] == "BF16"
    bits = np.frombuffer(entries["out"]["data"], "<u2").reshape(out.shape)
    np.testing.assert_array_equal(bits, tensors.round_to_bfloat16(out))
    assert entries["lse"]["dtype"] == "F32"
    np.testing.assert_array_equal(np.frombuffer(entries["lse"]["data"], "<f4"), lse.ravel())
    # .npz has no such type
    assert main(["run", str(source), "-o", str(tmp_path / "b.npz")]) == 0
    assert "float32" in capsys.readouterr().err
    np.testing.assert_array_equal(load(tmp_path / "b.npz")["out"], out, strict=True)


def test_torch_reads_what_is_written(tmp_path, rng, torch):
    from safetensors.torch import load_file

    values = rng.standard_normal((3, 5), dtype=np.float32)
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors.write({"a": values, "b": values}, bfloat16={"b"}))
    found = load_file(path)
    assert torch.equal(found["a"], torch.from_numpy(values))
    assert torch.equal(found["b"], torch.from_numpy(values).to(torch.bfloat16))


def test_bfloat16_in_npz_is_explained(tmp_path, capsys, rng):
    raw = {name: array.astype("V2") for name, array in example(rng).items()}
    assert ".safetensors" in refused(capsys, "run", save(tmp_path / "a.npz", raw))


# --- Where the result goes -----------------------------------------------------------------------


def test_the_input_is_never_overwritten(tmp_path, capsys, rng):
    source = save(tmp_path / "a.npz", example(rng))
    before = source.read_bytes()
    (tmp_path / "link.npz").symlink_to(source)
    os.link(source, tmp_path / "hard.npz")
    for name in ("a.npz", "link.npz", "hard.npz"):
        assert "input itself" in refused(capsys, "run", source, "-o", tmp_path / name)
    assert source.read_bytes() == before


def test_outputs_that_cannot_be_written(tmp_path, capsys, rng):
    source = save(tmp_path / "a.npz", example(rng))
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("folder.npz", "pipe.npz"):
        assert "ordinary file" in refused(capsys, "run", source, "-o", tmp_path / name)
    assert "does not exist" in refused(capsys, "run", source, "-o", tmp_path / "no" / "b.npz")
    assert "must end in" in refused(capsys, "run", source, "-o", tmp_path / "b.txt", code=2)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.npz"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# --- Hostile files -------------------------------------------------------------------------------


class _Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_pickle_is_ever_loaded(tmp_path, capsys):
    proof = tmp_path / "proof"
    evil = np.array([_Evil(proof)], dtype=object)
    path = tmp_path / "a.npz"
    np.savez(path, q=evil, k=evil, v=evil)
    message = refused(capsys, "run", path)
    assert "pickle" in message
    refused(capsys, "inspect", path)
    assert not proof.exists()
    for name in ("b.npz", "b.safetensors"):  # a bare pickle under an innocent name
        (tmp_path / name).write_bytes(pickle.dumps(_Evil(proof)))
        refused(capsys, "run", tmp_path / name)
    assert not proof.exists()
    with np.load(path, allow_pickle=True) as file:  # the trap itself works
        file["q"][0].close()
    assert proof.exists()


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, capsys, rng, monkeypatch):
    path = save(tmp_path / "a.npz", example(rng))
    monkeypatch.setattr(files, "free_memory", lambda: 10_000)
    monkeypatch.setattr(npz, "_read_array", lambda *_: pytest.fail("read before the check"))
    assert "of memory" in refused(capsys, "run", path)
    monkeypatch.setattr(tensors, "read", lambda *_, **__: pytest.fail("read before the check"))
    assert "of memory" in refused(capsys, "run", save(tmp_path / "a.safetensors", example(rng)))


def test_a_directory_that_lies_about_sizes(tmp_path, capsys, rng):
    path = save(tmp_path / "a.npz", example(rng))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # the directory's first entry; its size is at 24
    content[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFF_FFF0)
    path.write_bytes(content)
    message = refused(capsys, "run", path)
    assert "damaged" in message or "of memory" in message


def _npy(header, data=b""):
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (
            _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"),
            "the file holds 0",
        ),
        (_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}", b"0" * 16), "shape"),
        (
            _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"0" * 99),
            "the file holds 99",
        ),
        (_npy("{'descr': '<i4', 'fortran_order': False, 'shape': (2,)}", b"0" * 8), "int32"),
        (_npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", b"0" * 16), "<U4"),
        (_npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}"), "allowed"),
        (_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "pickle"),
        (_npy("__import__('os').abort()"), "header"),
        (_npy("(" * 3000), "header"),
        (_npy("{'descr': '<f4'}"), "header"),
        (_npy("{" + "'a': 1, " * 2000 + "}"), "header"),
        (b"\x93NUMPY\x07\x00", "header"),
        (b"no array at all", "header"),
        (b"", "header"),
    ],
)
def test_hostile_npy_members(tmp_path, capsys, member, message):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", member)
    assert message in refused(capsys, "run", path)


def test_files_of_the_wrong_kind(tmp_path, capsys, rng):
    good = {suffix: save(tmp_path / f"a{suffix}", example(rng)) for suffix in files.SUFFIXES}
    for suffix in files.SUFFIXES:
        (tmp_path / f"empty{suffix}").touch()
        assert "is empty" in refused(capsys, "run", tmp_path / f"empty{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        assert "folder" in refused(capsys, "run", tmp_path / f"folder{suffix}")
        assert "No such file" in refused(capsys, "run", tmp_path / f"missing{suffix}")
        (tmp_path / f"text{suffix}").write_text("hello, world\n" * 9)
        assert "not a readable" in refused(capsys, "run", tmp_path / f"text{suffix}")
        content = good[suffix].read_bytes()
        for share in (0.01, 0.5, 0.99):
            (tmp_path / f"cut{suffix}").write_bytes(content[: int(share * len(content))])
            assert "not a readable" in refused(capsys, "run", tmp_path / f"cut{suffix}")
    os.mkfifo(tmp_path / "pipe.npz")
    assert "pipe" in refused(capsys, "run", tmp_path / "pipe.npz")
    assert "must end in" in refused(capsys, "run", tmp_path / "weights.pt")
    good[".npz"].rename(tmp_path / "b.safetensors")  # right content, wrong name
    assert "not a readable" in refused(capsys, "run", tmp_path / "b.safetensors")


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_unreadable_file(tmp_path, capsys, rng, suffix, monkeypatch):
    path = save(tmp_path / f"a{suffix}", example(rng))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(npz, "read", denied)
        monkeypatch.setattr(type(path), "read_bytes", denied)
    assert "Permission denied" in refused(capsys, "run", path)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_arrays_that_do_not_fit(tmp_path, capsys, rng, suffix):
    arrays = example(rng)
    path = tmp_path / f"a{suffix}"
    save(path, {"q": arrays["q"], "key": arrays["k"]})
    assert "no array called k or v" in refused(capsys, "run", path)
    save(path, {**arrays, "mask": arrays["q"]})
    assert "'mask'" in refused(capsys, "run", path)
    save(path, {**arrays, "out": arrays["q"]})  # what run itself writes
    assert main(["run", str(path)]) == 0
    capsys.readouterr()
    save(path, {**arrays, "q": arrays["q"].astype(np.float16)})
    assert "one dtype" in refused(capsys, "run", path)
    if suffix == ".safetensors":  # the library would see float32 in all three
        path.write_bytes(tensors.write(arrays, bfloat16={"k"}))
        assert "k bfloat16" in refused(capsys, "run", path)
    save(path, {name: array[0] for name, array in arrays.items()})
    assert "4 dimensions" in refused(capsys, "inspect", path)
    assert "shape" in refused(capsys, "run", path)
    save(path, {**arrays, "k": arrays["k"][..., :-1]})
    refused(capsys, "run", path)


def test_names_cannot_steer_the_terminal(tmp_path, capsys, rng):
    arrays = {**example(rng), "\x1b[2J\x07": np.zeros(1, np.float32)}
    message = refused(capsys, "run", save(tmp_path / "a.safetensors", arrays))
    assert "\x1b" not in message
    assert "\x07" not in message
    assert "\x1b" not in refused(capsys, "run", tmp_path / "\x1b[31m.npz")


@pytest.mark.parametrize("compressed", [False, True, None], ids=["npz", "npz-compressed", "st"])
def test_damaged_files_are_refused_or_read_never_worse(tmp_path, rng, compressed):
    arrays = example(rng, batch=1, heads_q=1, heads_kv=1, tokens_q=3, tokens_k=3, head_dim=4)
    buffer = io.BytesIO()
    if compressed is None:
        buffer.write(tensors.write(arrays))
    else:
        (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    path = tmp_path / ("a.safetensors" if compressed is None else "a.npz")
    outcomes = set()
    for _ in range(250):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.integers(1, 5)):
            content[rng.integers(len(content))] = rng.integers(256)
        if rng.random() < 0.3:
            position = rng.integers(len(content))
            del content[position : position + rng.integers(1, 40)]
        path.write_bytes(content)
        try:
            inputs = files.read_inputs(path)
        except InvalidArgumentError:
            outcomes.add("refused")
        else:
            assert all(getattr(inputs, name).dtype.kind == "f" for name in "qkv")
            outcomes.add("read")
    assert "refused" in outcomes
