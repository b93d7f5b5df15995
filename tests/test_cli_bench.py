"""`cusparge bench`, and what it measures with."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from cli_tools import hide, run_json
from compare import relative_l1

import cusparge
from cusparge.cli import main, measure
from cusparge.errors import InvalidArgumentError

SMALL = ("bench", "--tokens", "512", "--heads", "2", "--repeats", "2")


def test_bench_without_torch(capsys, monkeypatch):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", "2")
    hide(monkeypatch, "torch")
    record = run_json(capsys, *SMALL, "--sparsity", "0.5", "0.75", "--threads", "1")
    assert record["torch_timed"] is False
    assert [row["sparsity"] for row in record["results"]] == [0.5, 0.75]
    assert record["machine"]["threads"] == 1
    assert os.environ["CUSPARGE_NUM_THREADS"] == "2"
    for row in record["results"]:
        assert 0 < row["error"] < 1e-3
        assert set(row["seconds"]) == {"dense", "sparse"}
    assert main([*SMALL, "--sparsity", "0.5"]) == 0
    captured = capsys.readouterr()
    assert "torch is not installed" in captured.err
    assert "0.500" in captured.out


def test_bench_with_torch(capsys, torch):
    before = torch.get_num_threads()
    try:
        record = run_json(capsys, *SMALL, "--sparsity", "0.5", "--threads", "1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert record["torch_timed"] is True
    assert set(record["results"][0]["speedup"]) == {"dense", "torch"}


def test_torch_computes_the_same(rng, torch):
    arrays = rng.standard_normal((3, 1, 2, 100, 32), dtype=np.float32)
    before = torch.get_num_threads()
    try:
        out = measure.torch_attention(*arrays)()
    finally:
        torch.set_num_threads(before)
    dense = cusparge.attention(*arrays, policy=cusparge.Dense())
    assert relative_l1(np.asarray(out), dense) < 1e-5


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.75])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_clustered_inputs_have_the_sparsity_asked_for(rng, sparsity, head_dim):
    shape = {"batch": 2, "heads": 2, "tokens": 1024, "head_dim": head_dim}
    arrays = measure.clustered_inputs(rng, **shape, sparsity=sparsity)
    assert all(array.dtype == np.float32 for array in arrays)
    policy = cusparge.TopCdf(0.9995, 0.5)
    out, stats = cusparge.attention(*arrays, policy=policy, return_stats=True)
    np.testing.assert_array_equal(stats.sparsity_per_head, np.full((2, 2), sparsity))
    assert relative_l1(out, cusparge.attention(*arrays, policy=cusparge.Dense())) < 1e-3


def test_clustered_inputs_refuse(rng):
    good = {"batch": 1, "heads": 1, "tokens": 128, "head_dim": 64, "sparsity": 0.5}
    assert measure.clustered_inputs(rng, **good)[0].shape == (1, 1, 128, 64)
    for bad in ({"tokens": 0}, {"sparsity": 1}, {"sparsity": float("nan")}, {"sparsity": 0.9}):
        with pytest.raises(InvalidArgumentError):
            measure.clustered_inputs(rng, **good | bad)


def test_paired_times_interleave():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = measure.paired_times(functions, repeats=4, warmup=2)
    assert "".join(calls) == "ab" * 6
    assert [len(times[name]) for name in "ab"] == [4, 4]
    assert min(times["a"] + times["b"]) >= 0
    assert len(measure.paired_times(functions, repeats=9, seconds=0)["a"]) == 3
    with pytest.raises(InvalidArgumentError, match="repeats"):
        measure.paired_times(functions, repeats=0)


def test_relative_l1_edges():
    nan, zero, one = np.full(3, np.nan), np.zeros(3), np.ones(3)
    assert measure.relative_l1(zero, zero) == 0
    assert measure.relative_l1(one, zero) == np.inf
    assert np.isnan(measure.relative_l1(nan, one))
    assert measure.relative_l1(1.5 * one, one) == 0.5


def test_machine_tells_no_path_or_host():
    import socket

    record = measure.machine()
    text = json.dumps(record)
    assert record["numpy"] == np.__version__
    assert record["threads"] >= 1
    assert "/" not in text
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in text
