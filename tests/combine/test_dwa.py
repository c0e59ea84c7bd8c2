"""Weights by how fast each loss has fallen of late (DWA)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim.combine.dwa import DWA
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

STEPS = 13
LARGEST_RATE = 100
sequences = st.integers(1, 64).flatmap(
    lambda k: arrays(np.float64, (STEPS, k), elements=st.floats(0.1, 10)).map(torch.from_numpy)
)
windows = st.integers(1, 6)
temperatures = st.floats(0.5, 10)


def run(rule: DWA, losses: Tensor) -> Tensor:
    state = rule.init(losses[0])
    weights = []
    for values in losses:
        w, state = rule(None, values, state)
        weights.append(w)
    return torch.stack(weights)


def rounding(rule: DWA, k: int) -> float:
    """Of an exponent r/T: two means of a window's numbers and two quotients. And the softmax's sum."""
    return ((2 * rule.window + 4) * LARGEST_RATE / rule.temperature + k + 4) * EPS


@given(sequences, windows, temperatures)
def test_equals_the_reference(losses: Tensor, window: int, temperature: float) -> None:
    rule = DWA(temperature=temperature, window=window)
    expected = reference.dwa(losses, window, tau=temperature)
    torch.testing.assert_close(run(rule, losses), expected, rtol=rounding(rule, losses.shape[1]), atol=0)


@given(sequences, windows)
def test_agrees_with_torchjd(losses: Tensor, window: int) -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    scalarizer = scalarization.DWA()
    expected = []
    for t, values in enumerate(losses):
        seen = values.clone().requires_grad_()
        scalarizer(seen).backward()
        assert seen.grad is not None
        expected.append(seen.grad)
        if (t + 1) % window == 0:
            scalarizer.step()
    rule = DWA(window=window)
    torch.testing.assert_close(run(rule, losses), torch.stack(expected), rtol=rounding(rule, losses.shape[1]), atol=0)


@given(sequences, windows)
def test_weights_sum_to_k(losses: Tensor, window: int) -> None:
    k = losses.shape[1]
    weights = run(DWA(window=window), losses)
    assert (weights >= 0).all()
    assert ((weights.sum(-1) / k - 1).abs() <= (2 * k + 4) * EPS).all()  # two sums of K terms


@given(sequences, windows, st.data())
def test_unit_of_a_loss_does_not_matter(losses: Tensor, window: int, data: st.DataObject) -> None:
    k = losses.shape[1]
    c = torch.tensor(data.draw(st.lists(st.floats(-30, 30), min_size=k, max_size=k)), dtype=torch.float64)
    rule = DWA(window=window)
    torch.testing.assert_close(run(rule, losses * 10**c), run(rule, losses), rtol=2 * rounding(rule, k), atol=0)


@given(sequences, windows)
def test_neither_does_its_sign(losses: Tensor, window: int) -> None:
    assert torch.equal(run(DWA(window=window), -losses), run(DWA(window=window), losses))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_weights_change_at_the_end_of_a_window(window: int) -> None:
    losses = torch.tensor([[2.0**-t, 3.0**-t] for t in range(4 * window)], dtype=torch.float64)
    weights = run(DWA(window=window), losses)
    assert (weights[: 2 * window] == 1).all()
    for start in range(2 * window, 4 * window, window):
        assert (weights[start : start + window] == weights[start]).all()
        # The mean of the slower loss fell by 2^−window, that of the faster by 3^−window.
        expected = 2 * (torch.tensor([2.0, 3.0]).double() ** -window / 2).softmax(0)
        torch.testing.assert_close(weights[start], expected, rtol=16 * EPS, atol=0)  # some powers and sums


def test_a_loss_that_was_zero_counts_as_unchanged() -> None:
    losses = torch.tensor([[0.0, 1.0], [5.0, 1.0], [5.0, 1.0]])
    assert run(DWA(window=1), losses)[2].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: expected a positive number"),
        ({"temperature": float("nan")}, "temperature=nan: expected a positive number"),
        ({"window": 0}, "window=0: expected a whole number of steps, at least 1"),
        ({"window": 1.5}, "window=1.5: expected a whole number of steps, at least 1"),
        ({"window": True}, "window=True: expected a whole number of steps, at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DWA(**options)
