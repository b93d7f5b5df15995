"""What the tests of `cusparge doctor` share."""

from __future__ import annotations

import json
import os

from fake_gpu import use_nvml

from cusparge._cuda import devices, nvml
from cusparge.cli import checks, doctor, main

__all__ = ["Report", "be_gpu_machine", "be_plain_machine", "problems"]


def be_plain_machine(monkeypatch, tmp_path):
    """A machine without a driver, without settings of its own, with an empty cache."""
    for name in list(os.environ):
        if name.endswith("_NUM_THREADS") or name.startswith("CUSPARGE_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvml, "_library_names", lambda: [])
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "no driver")
    monkeypatch.setattr(checks, "_PROC_GPUS", tmp_path / "no driver")
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    monkeypatch.setattr(devices, "cupy_packages", lambda: {"cupy-cuda13x": "14.2.0"})


def be_gpu_machine(monkeypatch, library):
    """After that: a machine with an A100, an H200 and a T4; all is well otherwise."""
    use_nvml(monkeypatch, library)
    works = {"version": "14.2.0", "cuda": "13.0", "error": None}
    monkeypatch.setattr(doctor, "has_cupy", lambda: True)
    monkeypatch.setattr(doctor, "import_cupy", lambda: works)


class Report:
    """Runs the command both ways: `report(code)` is the record, `report.text` what people see."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def __call__(self, code=0):
        self.capsys.readouterr()
        assert main(["doctor"]) == code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        self.text = captured.out
        assert main(["doctor", "--json"]) == code
        record = json.loads(self.capsys.readouterr().out)
        assert record["ok"] is (code == 0)
        for warning in record["warnings"]:
            assert warning["problem"] in self.text
            assert warning["mend"] in self.text
        return record


def problems(record):
    """Return all that is wrong, in one text."""
    return " | ".join(warning["problem"] for warning in record["warnings"])
