"""Compilers of torch in one thread, calls of cusparge in another."""

import subprocess
import sys
import threading
import types

import numpy as np
import pytest

import cusparge

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = pytest.mark.filterwarnings("default")  # torch's own, while it loads and traces


def calls_while(work):
    """Call attention on NumPy arrays in threads while `work` runs here; return their errors."""
    x = np.random.default_rng(0).standard_normal((1, 1, 64, 8), np.float32)
    stop, errors, done = threading.Event(), [], []

    def call():
        while not stop.is_set():
            try:
                cusparge.attention(x, x, x)
                done.append(1)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert done
    return errors


def test_numpy_calls_do_not_notice_a_compilation_elsewhere():
    def work():
        for step in range(3):
            torch._dynamo.reset()
            torch.compile(lambda a, step=step: a * 2 + step, backend="aot_eager")(torch.ones(3))
            torch.export.export(torch.nn.Linear(3, 3), (torch.ones(1, 3),))

    assert calls_while(work) == []


def test_a_compilation_does_not_notice_imports_elsewhere():
    """Traced code that reads sys.modules makes Dynamo walk it, and that fails if it changes."""
    x = torch.zeros(1, 1, 64, 8)
    stop = threading.Event()

    def load():
        count = 0
        while not stop.is_set():
            name = f"cusparge_test_module_{count % 500}"
            sys.modules.pop(name, None)
            sys.modules[name] = types.ModuleType(name)
            count += 1

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for step in range(5):
            torch._dynamo.reset()

            def layer(x, step=step):
                out, stats = cusparge.attention(x, x, x + step, return_stats=True)
                kept = cusparge.predict_block_map(x, x)
                return out, stats, kept

            torch.compile(layer, fullgraph=True, backend="eager")(x)
    finally:
        stop.set()
        thread.join()
        for name in [name for name in sys.modules if name.startswith("cusparge_test_module_")]:
            del sys.modules[name]


def test_operators_of_a_module_that_is_imported_later():
    script = """
import torch, cusparge
x = torch.zeros(1, 1, 64, 8)
torch.compile(lambda x: cusparge.attention(x, x, x), fullgraph=True, backend="eager")(x)
from cusparge.stage1 import pool_blocks
got = torch.compile(lambda x: pool_blocks(x).mean, fullgraph=True, backend="eager")(x)
print(tuple(got.shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 1, 1, 8)"
