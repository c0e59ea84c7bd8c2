"""Shared by all tests: Hypothesis profiles, the GPU marker, and the names that the examples in docstrings use."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Without a GPU Triton's kernels are interpreted; it decides when it is imported, which torch does not do by itself.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors of a few dozen numbers, and a worker per core: more threads would only wait for each other.
torch.set_num_threads(1)

# The same examples in every run, so that a change is judged by itself; the nightly profile explores.
hypothesis.settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none here"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
