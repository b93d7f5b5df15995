"""The CPU benchmark runs, and README's table is the committed result and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_cpu", ROOT / "benchmarks/bench_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_committed_result(bench):
    result = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    text = bench.README.read_text(encoding="utf-8")
    shown = text.split(bench.BEGIN)[1].split(bench.END)[0].strip()
    assert shown == bench.table(result).strip()
    assert result["commit"]
    assert "+changes" not in result["commit"]


def test_one_size_is_measured_in_pairs(bench):
    pytest.importorskip("torch", reason="the baseline is torch's dense attention")
    size = bench.measure(tokens=768, head_dim=32, heads=1, repeats=2)
    rows = size["results"]
    assert {"torch_sdpa", "dense", "sparse_50", "sparse_75", "sparse_90"} <= set(rows)
    for row in rows.values():
        assert len(row["seconds_all"]) == 2
        low, high = row["time_over_torch_sdpa_min"], row["time_over_torch_sdpa_max"]
        assert 0 < low <= row["time_over_torch_sdpa_median"] <= high
    assert rows["torch_sdpa"]["time_over_torch_sdpa_median"] == 1
    # 12 key blocks, 2, 4 and 10 groups of them: 10 groups leave 2 blocks to two of the groups.
    assert rows["sparse_50"]["sparsity"] == pytest.approx(0.5)
    assert rows["sparse_75"]["sparsity"] == pytest.approx(0.75)
    assert rows["sparse_90"]["sparsity"] > 0.8
    # What is left out carries under a millionth of each row; float32 rounds at 1e-7.
    assert all(rows[name]["l1"] <= 1e-4 for name in ("dense", "sparse_50", "sparse_75"))


def test_the_table_says_what_the_rows_say(bench):
    row = {
        "time_over_torch_sdpa_median": 0.25,
        "l1": 1e-6,
        "seconds_median": 2.0,
        "sparsity": 0.9,
    }
    names = ["torch_sdpa", "dense", "dense_quantized", "sparse_50", "sparse_75", "sparse_90"]
    size = {
        "tokens": 8192,
        "head_dim": 64,
        "heads": 8,
        "batch": 1,
        "results": {name: dict(row) for name in [*names, "predict_75"]},
    }
    machine = dict.fromkeys(("cpu", "cores", "threads", "python", "numpy", "blas", "torch"), "x")
    text = bench.table({"machine": machine, "commit": "abc", "repeats": 3, "sizes": [size]})
    assert "| 8,192 | 64 | 4.00× | 4.00× | 4.00× | 4.00× | 25.0 % |" in text
    assert "`abc`" in text
    assert "1e-06" in text
