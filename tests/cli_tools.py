"""What the tests of the command line share."""

from __future__ import annotations

import builtins
import json
import sys

import numpy as np
import pytest

from cusparge.cli import main, tensors

__all__ = ["example", "hide", "load", "refused", "run_json", "save"]


def example(rng, *, batch=2, heads_q=4, heads_kv=2, tokens_q=200, tokens_k=330, head_dim=40):
    q = rng.standard_normal((batch, heads_q, tokens_q, head_dim), dtype=np.float32)
    k, v = rng.standard_normal((2, batch, heads_kv, tokens_k, head_dim), dtype=np.float32)
    return {"q": 3 * q, "k": k, "v": v}


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        path.write_bytes(tensors.write(arrays))
    return path


def load(path):
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    from safetensors.numpy import load_file

    return load_file(path)


def run_json(capsys, *words):
    """Run a command that should succeed; return the object, having checked it is alone."""
    capsys.readouterr()  # fixtures print the seed, which the report's header tells as well
    code = main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out.count("\n") == 1
    return json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"bare {name}"))


def refused(capsys, *words, code=1):
    """Run a command that should fail; return its message."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "cusparge: error:" in captured.err
    return captured.err


def hide(monkeypatch, *names):
    """Make packages look as if they were not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    for module in list(sys.modules):  # what another test has loaded
        if module.partition(".")[0] in names:
            monkeypatch.delitem(sys.modules, module)
