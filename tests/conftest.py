"""What every test shares: no network, one seed; and what is left out without a compiler."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU then; read when Triton is imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Leave out the tests marked `compiler` where there is none: the package works without, and so does its suite."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        for item in items:
            if item.get_closest_marker("compiler"):
                item.add_marker(pytest.mark.skip(reason="there is no C++ compiler"))


def pytest_addoption(parser):
    """Add what names an environment of its own."""
    parser.addoption("--vllm-python", help="a Python with vLLM, for tests/test_vllm.py")
