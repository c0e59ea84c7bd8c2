"""Shared by the tests of Accelerate, and of the Trainer that stands on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps its state per process, the count of micro-batches included."""
    state = pytest.importorskip("accelerate.state")

    def forget() -> None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    forget()
    yield
    forget()
