"""A smooth version of the worst loss (STCH)."""

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

from distill_optim.combine.stch import STCH
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

STEPS = 7
sequences = st.integers(1, 64).flatmap(
    lambda k: arrays(np.float64, (STEPS, k), elements=st.floats(1e-3, 1e3)).map(torch.from_numpy)
)
warmups = st.integers(1, 8)
smoothness = st.floats(0.01, 10)


def run(rule: STCH, losses: Tensor) -> Tensor:
    state = rule.init(losses[0])
    weights = []
    for values in losses:
        w, state = rule(None, values, state)
        weights.append(w)
    return torch.stack(weights)


def assert_close(actual: Tensor, expected: Tensor | None, rule: STCH, size: float = 14, more: float = 0) -> None:
    """Up to the rounding of an exponent log(L/n)/μ, with logarithms up to ``size``: a mean and a handful of steps."""
    rounding = ((rule.warmup + 8) * size / rule.mu + 68 + more) * EPS
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=1e-300)  # a softmax may underflow


@given(sequences, warmups, smoothness)
def test_equals_the_reference(losses: Tensor, warmup: int, mu: float) -> None:
    rule = STCH(mu=mu, warmup=warmup)
    assert_close(run(rule, losses), reference.stch(losses, warmup, mu=mu), rule)


@given(sequences, warmups, smoothness)
def test_agrees_with_torchjd(losses: Tensor, warmup: int, mu: float) -> None:
    """TorchJD's scalarizer of any values, given the logarithms and the nadir's as the point of reference."""
    scalarization = pytest.importorskip("torchjd.scalarization")
    k = losses.shape[1]
    rule, nadir = STCH(mu=mu, warmup=warmup), losses[:warmup].mean(0)
    scalarizer = scalarization.STCH(mu, weights=torch.ones(k, dtype=torch.float64), reference=nadir.log())
    for weights, values in zip(run(rule, losses)[warmup:], losses[warmup:], strict=True):
        logs = values.log().requires_grad_()
        (k * scalarizer(logs)).backward()
        # It takes the largest value away and adds it again, which adds K (1 − Σ softmax) to that one's gradient.
        assert_close(weights, logs.grad, rule, more=k * (k + 4))


@given(sequences, warmups, smoothness)
def test_weights_sum_to_k(losses: Tensor, warmup: int, mu: float) -> None:
    k = losses.shape[1]
    weights = run(STCH(mu=mu, warmup=warmup), losses)
    assert (weights[:warmup] == 1).all()
    assert (weights >= 0).all()
    assert ((weights.sum(-1) / k - 1).abs() <= (2 * k + 4) * EPS).all()  # two sums of K terms


@given(sequences, warmups, smoothness, st.data())
def test_unit_of_a_loss_does_not_matter(losses: Tensor, warmup: int, mu: float, data: st.DataObject) -> None:
    """Above the floor of the logarithm, 1e-8 of the largest loss."""
    k = losses.shape[1]
    c = torch.tensor(data.draw(st.lists(st.floats(0.1, 1), min_size=k, max_size=k)), dtype=torch.float64)
    unit = 10.0 ** data.draw(st.integers(-30, 30))
    rule = STCH(mu=mu, warmup=warmup)
    assert_close(run(rule, losses * c * unit), run(rule, losses), rule, 2 * 14)


def test_little_smoothness_leaves_the_worst_loss() -> None:
    weights = run(STCH(mu=1e-3, warmup=1), torch.tensor([[1.0, 5.0, 2.0], [0.5, 4.0, 1.5]]))
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 3.0, 0.0]).double(), rtol=EPS, atol=1e-15)


@given(sequences)
def test_smoothness_of_one_is_the_descent_on_the_sum_of_ratios(losses: Tensor) -> None:
    """∇log Σ Lᵢ/nᵢ: on the raw gradients wᵢ/Lᵢ are in the fixed ratio 1/nᵢ."""
    rule = STCH(mu=1, warmup=1)
    ratio = losses / losses[0]
    expected = losses.shape[1] * ratio / ratio.sum(-1, keepdim=True)
    assert_close(run(rule, losses), expected, rule)


def test_nadir_stays_where_the_warmup_left_it() -> None:
    rule = STCH(warmup=2)
    state = rule.init(torch.zeros(2))
    for values in ([1.0, 2.0], [3.0, 6.0], [100.0, 100.0]):
        _, state = rule(None, torch.tensor(values), state)
        assert (state["step"] <= 2).all()
    assert state["nadir"].tolist() == [2, 4]


@pytest.mark.parametrize("losses", [[[0.0, 0.0], [1.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_of_losses_that_are_all_zero_none_is_the_worst(losses: list[list[float]]) -> None:
    assert run(STCH(warmup=1), torch.tensor(losses)).tolist() == [[1, 1], [1, 1]]


def test_floor_is_that_of_the_logarithm() -> None:
    losses, floored = torch.tensor([[4.0, 1.0], [2.0, 0.0]]), torch.tensor([[4.0, 1.0], [2.0, 2e-8]]).double()
    rule = STCH(mu=10, warmup=1)
    assert_close(run(rule, losses), run(rule, floored), rule, 2 * 14)


def test_negative_losses_count_by_their_magnitude() -> None:
    losses = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]])
    signs = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, -1.0]])
    rule = STCH(warmup=2)
    assert torch.equal(run(rule, losses * signs), run(rule, losses))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0.0}, "mu=0.0: expected a positive number"),
        ({"mu": float("nan")}, "mu=nan: expected a positive number"),
        ({"warmup": 0}, "warmup=0: expected a whole number of steps, at least 1"),
        ({"warmup": 2.0}, "warmup=2.0: expected a whole number of steps, at least 1"),
        ({"warmup": True}, "warmup=True: expected a whole number of steps, at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        STCH(**options)
