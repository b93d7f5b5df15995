"""`cusparge doctor`."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from cli_tools import run_json

import cusparge
from cusparge.cli import doctor, main


@pytest.fixture
def plain_machine(monkeypatch):
    """A machine without a GPU and without settings of its own."""
    for name in list(os.environ):
        if name.endswith("_NUM_THREADS"):
            monkeypatch.delenv(name)
    gpu = {"driver": None, "nvidia_smi": False, "devices": []}
    monkeypatch.setattr(doctor, "find_gpu", lambda: gpu)
    return gpu


def test_doctor(capsys, plain_machine):
    record = run_json(capsys, "doctor")
    assert record["ok"] is True
    assert record["would_run"] == "cpu"
    assert record["warnings"] == []
    assert record["packages"]["numpy"] == np.__version__
    assert set(record["self_check"]["errors"]) == {"dense", "sparse"}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "self-check passed" in text
    assert "no GPU backend yet" in text


def test_doctor_fails_when_the_numbers_are_wrong(capsys, plain_machine, monkeypatch):
    real = cusparge.attention
    for factor in (1.01, np.nan):

        def wrong(*arrays, factor=factor, **options):
            out = real(*arrays, **options)
            return out if options.get("backend") == "reference" else out * np.float32(factor)

        monkeypatch.setattr(cusparge, "attention", wrong)
        assert main(["doctor", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["self_check"]["ok"] is False
    assert main(["doctor"]) == 1
    assert "self-check FAILED" in capsys.readouterr().out


def test_doctor_warns(capsys, plain_machine, monkeypatch):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", "many")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    versions = {"cupy-cuda12x": "13.6", "cupy-cuda13x": "14.0"}
    monkeypatch.setattr(doctor, "version_of", versions.get)
    assert main(["doctor", "--json"]) == 1  # every call fails with such a number of threads
    record = json.loads(capsys.readouterr().out)
    problems = " ".join(warning["problem"] for warning in record["warnings"])
    for word in ("cupy", "threadpoolctl", "OPENBLAS_NUM_THREADS=1", "CUSPARGE_NUM_THREADS=many"):
        assert word in problems
    assert all(warning["mend"] for warning in record["warnings"])
    assert "CUSPARGE_NUM_THREADS" in record["self_check"]["message"]


def test_doctor_finds_a_gpu_that_it_cannot_use(capsys, tmp_path, monkeypatch):
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC\n"
    )
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text(
        "Model: \t\t NVIDIA H200\nIRQ: 7\n"
    )
    found = doctor.find_gpu(tmp_path)
    assert found["driver"] == "580.65.06"
    assert [device["name"] for device in found["devices"]] == ["NVIDIA H200"]
    assert doctor.find_gpu(tmp_path / "nothing")["devices"] == []
    monkeypatch.setattr(doctor, "find_gpu", lambda: found)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NVIDIA H200" in text
    assert "no GPU backend yet" in text


def test_paths_are_told_without_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor.short_path(tmp_path / "a" / "b") == os.path.join("~", "a", "b")
    assert doctor.short_path(tmp_path) == "~"
    assert doctor.short_path(str(tmp_path) + "2") == str(tmp_path) + "2"
