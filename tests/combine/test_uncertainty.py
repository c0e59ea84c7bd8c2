"""Weights by the uncertainty of each loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim.combine.uncertainty import Uncertainty
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

STEPS = 8
sequences = st.integers(1, 64).flatmap(
    lambda k: arrays(np.float64, (STEPS, k), elements=st.floats(-10, 1e3)).map(torch.from_numpy)
)


def run(rule: Uncertainty, losses: Tensor) -> Tensor:
    state = rule.init(losses[0])
    weights = []
    for values in losses:
        w, state = rule(None, values, state)
        weights.append(w)
    return torch.stack(weights)


def rounding(lr: float) -> float:
    """Adam divides by √v + 1e-8: this is what a gradient ½ − Lw of mere rounding, 4 eps of ½, is worth."""
    return STEPS * lr * 2 * EPS / 1e-8


@given(sequences, st.floats(1e-3, 0.1), st.sampled_from([1.0, 2.0]))
def test_equals_the_reference(losses: Tensor, lr: float, c: float) -> None:
    torch.testing.assert_close(
        run(Uncertainty(lr=lr, c=c), losses), reference.uncertainty(losses, lr, c=c), rtol=rounding(lr), atol=0
    )


@given(sequences)
def test_agrees_with_torchjd(losses: Tensor) -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    scalarizer = scalarization.UW(losses.shape[1]).double()
    adam = torch.optim.Adam(scalarizer.parameters(), lr=0.025)
    expected = []
    for values in losses:
        adam.zero_grad()
        seen = values.clone().requires_grad_()
        scalarizer(seen).backward()
        assert seen.grad is not None
        expected.append(seen.grad)
        adam.step()
    torch.testing.assert_close(run(Uncertainty(), losses), torch.stack(expected), rtol=rounding(0.025), atol=0)


@given(sequences)
def test_losses_do_not_see_one_another(losses: Tensor) -> None:
    """Exactly: every loss has its own variance."""
    together = run(Uncertainty(), losses)
    assert torch.equal(together[:, :1], run(Uncertainty(), losses[:, :1]))


def test_first_weights_are_one_over_c() -> None:
    assert run(Uncertainty(), torch.tensor([[1.0, 1e9, -3.0]])).tolist() == [[0.5] * 3]
    assert run(Uncertainty(c=1), torch.tensor([[1.0, 1e9, -3.0]])).tolist() == [[1] * 3]


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_every_weighted_loss_comes_to_rest_at_a_half(c: float) -> None:
    """Whatever the losses' units."""
    losses = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    weights = run(Uncertainty(lr=0.02, c=c), losses.expand(1500, 3))
    torch.testing.assert_close(weights[-1] * losses, torch.full((3,), 0.5).double(), rtol=1e-3, atol=0)


def test_on_the_way_there_the_unit_matters() -> None:
    """Twice the loss does not give half the weight, as it does for a method that is blind to units."""
    weights = run(Uncertainty(), torch.tensor([[2.0, 4.0]]).repeat(5, 1))
    assert abs(weights[-1, 0] / weights[-1, 1] - 2) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0: expected a positive number"),
        ({"lr": float("nan")}, "lr=nan: expected a positive number"),
        ({"c": -1}, "c=-1: expected a positive number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Uncertainty(**options)
