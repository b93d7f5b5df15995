"""Registers and instructions of the kernels stay within the committed budget (no GPU needed)."""

import dataclasses
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_tools import ARCHS, need_nvrtc

from cusparge._cuda import sources, variants

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kernel_budget", ROOT / "tools/kernel_budget.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def budget(tool):
    return json.loads(tool.BUDGET.read_text())


def test_the_budget_names_every_kernel_and_nothing_else(tool, budget):
    assert tuple(tool.ARCHS) == tuple(ARCHS)
    wanted = {tool.name_of(one): set() for arch in ARCHS for one in variants.all_variants(arch)}
    for arch in ARCHS:
        for one in variants.all_variants(arch):
            wanted[tool.name_of(one)].add(arch)
    assert {name: set(row) for name, row in budget["kernels"].items()} == wanted
    assert tool.BUDGET.read_text() == tool.dump(budget)


def test_kernels_keep_to_the_budget(tool, budget, rng):
    """Two kernels for every architecture, others in every run; the tool compares all."""
    need_nvrtc()
    jobs = []
    for arch in ARCHS:
        kernels = variants.all_variants(arch)
        jobs += [(kernels[i], arch) for i in rng.choice(len(kernels), 2, replace=False)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: tool.compare(*job, budget), jobs))
    assert [problem for problems in found for problem in problems] == []


def smallest(budget):
    """Return the kernel that compiles fastest."""
    (one,) = [v for v in variants.all_variants("sm_90a") if "finish_mean" in v.expression]
    return one


def test_growth_is_seen(tool, budget, monkeypatch):
    need_nvrtc()
    one = smallest(budget)
    name = tool.name_of(one)
    registers, instructions = budget["kernels"][name]["sm_90a"]
    for tight, word in (
        ([registers, int(instructions / 1.5)], "instructions"),
        ([int(registers / 1.5), instructions], "registers"),
    ):
        changed = {**budget, "kernels": {name: {"sm_90a": tight}}}
        (problem,) = tool.compare(one, "sm_90a", changed)
        assert word in problem
        assert name in problem
    assert "not in the budget" in tool.compare(one, "sm_90a", {**budget, "kernels": {}})[0]


def test_spills_and_local_memory_are_seen(tool, budget, monkeypatch):
    need_nvrtc()
    one = smallest(budget)
    text = sources.load()
    source = text.files[one.file].decode()
    head = next(line for line in source.splitlines() if "finish_mean(const MeanParams" in line)
    planted = (
        head
        + " int x[400]; for (int i = 0; i < 400; ++i) x[i] = params.num_chunks * i;"
        + (" params.token_mean[0] = x[params.num_heads];")
    )
    files = {**text.files, one.file: source.replace(head, planted).encode()}
    monkeypatch.setattr(sources, "load", lambda: dataclasses.replace(text, files=files))
    problems = " ".join(tool.compare(one, "sm_90a", budget))
    assert "stack" in problems
    assert "local memory" in problems
