"""Randomness that is fresh in every run and can be replayed."""

import os
import sys
import types
import zlib

import numpy as np
import pytest

SEED_VARIABLE = "CUSPARGE_TEST_SEED"
_given = os.environ.get(SEED_VARIABLE)
SEED = int(_given) if _given else int.from_bytes(os.urandom(4), "little")

try:
    from hypothesis import settings
except ImportError:  # tests that need it skip themselves
    pass
else:
    # Wall-clock limits per example say more about a busy machine than about the code.
    settings.register_profile("cusparge", deadline=None, print_blob=True)
    settings.load_profile("cusparge")


def pytest_report_header(config):
    return f"{SEED_VARIABLE}={SEED}"


@pytest.fixture
def seed(request):
    """A number of this run and this test: the run's printed seed gives it again for one test."""
    print(f"{SEED_VARIABLE}={SEED}  # replays {request.node.nodeid}")
    return [SEED, zlib.crc32(request.node.nodeid.encode())]


@pytest.fixture
def rng(seed):
    """A fresh NumPy generator; it does not depend on which other tests run."""
    return np.random.default_rng(seed)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


@pytest.fixture
def foreign(monkeypatch):
    """Make arrays of a framework that nobody knows, which speaks DLPack and no more.

    `foreign(array, device=(kind, index))` claims a device. `foreign.module` is the framework's
    module, whose `from_dlpack` makes such arrays.
    """
    module = types.ModuleType("somebodys_arrays")

    class Foreign:
        __module__ = "somebodys_arrays.core"

        def __init__(self, array, device=(1, 0)):
            self.array, self.place = array, device

        def __dlpack_device__(self):
            return self.place

        def __dlpack__(self, *, max_version=None, **options):
            if self.place != (1, 0):
                raise AssertionError("memory of another device was asked for")
            return self.array.__dlpack__(max_version=max_version, **options)

    module.from_dlpack = lambda array: Foreign(np.from_dlpack(array))
    monkeypatch.setitem(sys.modules, "somebodys_arrays", module)

    def make(array, device=(1, 0)):
        return Foreign(array, device)

    make.module = module
    return make
