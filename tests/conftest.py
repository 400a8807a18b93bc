"""Shared test settings: uninitialised memory is poisoned, seeds are fixed, real data is found by one variable.

PYFINETUNE_TEST_DEVICE=cuda makes the tensors of the tests on a GPU; `make gpu-check` runs the op tests so.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic mode refuses products on a GPU

import pytest
import torch

DEVICE = os.environ.get("PYFINETUNE_TEST_DEVICE", "cpu")


def pytest_configure(config):
    if DEVICE != "cpu":
        # What the reference is made of need not be deterministic there; it is held against float64 either way.
        config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation")
        import pyfinetune  # noqa: F401  its own constants are made on the CPU, as they are for everybody

        torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Deterministic mode fills torch.empty with NaN (or the largest integer), which shows unwritten outputs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data sets; tests that need it skip where PYFINETUNE_TEST_DATA is not set."""
    folder = os.environ.get("PYFINETUNE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PYFINETUNE_TEST_DATA names no folder of test data")
    return Path(folder)
