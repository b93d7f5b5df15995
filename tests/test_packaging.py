"""What an installation holds: the wheel and the source archive are built here and looked into."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cusparge

ROOT = Path(__file__).resolve().parents[1]

# The build backend changes nothing outside `folder`, but looks for the project in its working
# directory, hence the process of its own.
BUILD = "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind, folder):
    pytest.importorskip("hatchling.build", reason="hatchling, which builds the package, is missing")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_every_module_and_file_of_the_package(names):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cusparge").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "cusparge/py.typed" in wanted
    assert "cusparge/data/whisper_tiny_en.safetensors" in wanted
    assert "cusparge/data/LICENSE.whisper" in wanted
    assert wanted <= set(names)


def test_wheel_holds_the_cuda_sources_inside_the_package(names):
    sources = {
        f"cusparge/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "kernels_cu").rglob("*")
        if path.is_file()
    }
    assert "cusparge/kernels_cu/cusparge/geometry.cuh" in sources
    assert sources <= set(names)


def test_wheel_installs_one_package_and_no_binary(wheel, names):
    info = f"cusparge-{cusparge.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"cusparge", info}
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc", ".cubin"))]


def test_wheel_stays_small(wheel):
    assert wheel.stat().st_size < 2_300_000


def test_wheel_carries_both_licences(names):
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE.whisper"}


def test_metadata(metadata):
    assert metadata["Name"] == "cusparge"
    assert metadata["Version"] == cusparge.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"cuda12", "cuda13", "plot", "test"}
    required = [item for item in metadata.get_all("Requires-Dist") if "extra ==" not in item]
    assert {re.split(r"[^\w-]", item)[0] for item in required} == {
        "numpy",
        "rich",
        "safetensors",
        "threadpoolctl",
    }
    assert "# cusparge" in metadata.get_payload()


def test_wheel_has_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "cusparge = cusparge.cli:main" in archive.read(name).decode()


def test_the_unpacked_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import numpy as np, pathlib, cusparge\n"
        "home = pathlib.Path(cusparge.__file__).parent\n"
        "x = np.ones((1, 1, 70, 8), np.float32)\n"
        "assert cusparge.attention(x, x, x).shape == x.shape\n"
        "assert (home / 'kernels_cu' / 'cusparge' / 'geometry.cuh').is_file()\n"
        "print(home)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "site" / "cusparge"


def test_source_archive_can_build_and_test_itself(tmp_path):
    archive = tarfile.open(build("build_sdist", tmp_path))
    with archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        ".clang-format",
        ".ci/run",
        "cusparge/data/whisper_tiny_en.safetensors",
        "kernels_cu/cusparge/geometry.cuh",
        "tests/test_packaging.py",
        "tools/check.py",
        "tools/make_demo_data.py",
        "examples/numpy_arrays.py",
        "docs/decisions/0001-three-small-dependencies.md",
    ):
        assert wanted in names, f"{wanted} is not in the source archive"


@pytest.mark.skipif(
    os.environ.get("CUSPARGE_EXPECT_INSTALLED") != "1",
    reason="asks for it with CUSPARGE_EXPECT_INSTALLED=1, as .ci/run does",
)
def test_the_tests_import_the_installed_package():
    # The command `pytest` puts tests/ on the path and not the checkout; `python -m pytest` puts
    # the working directory there too and then tests the checkout.
    assert ROOT not in Path(cusparge.__file__).resolve().parents
