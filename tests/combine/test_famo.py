"""Weights that learn from how far each loss fell in the step before (FAMO)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim.combine import min_norm
from distill_optim.combine.famo import FAMO
from tests.helpers import assert_same_tree
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

STEPS = 8
LARGEST = 1e3
# The losses before and after every step.
sequences = st.integers(1, 64).flatmap(
    lambda k: arrays(np.float64, (2, STEPS, k), elements=st.floats(1 / LARGEST, LARGEST)).map(torch.from_numpy)
)


def run(rule: FAMO, before: Tensor, after: Tensor | None = None) -> Tensor:
    state = rule.init(before[0])
    weights = []
    for t, values in enumerate(before):
        w, state = rule(None, values, state)
        weights.append(w)
        if after is not None:
            state = rule.observe(after[t], state)
    return torch.stack(weights)


def rounding(lr: float, k: int, size: float = LARGEST) -> float:
    """Adam divides by √v + 1e-8: this is what a gradient of mere rounding, K + 4 times a logarithm's, is worth."""
    return float(STEPS * lr * (k + 4) * 2 * np.log(size) * EPS / 1e-8)


@given(sequences, st.floats(1e-3, 0.1), st.sampled_from([0.0, 1e-3, 1e-1]))
def test_equals_the_reference(losses: Tensor, lr: float, weight_decay: float) -> None:
    before, after = losses
    expected = reference.famo(before, after, lr=lr, weight_decay=weight_decay)
    result = run(FAMO(lr=lr, weight_decay=weight_decay), before, after)
    torch.testing.assert_close(result, expected, rtol=rounding(lr, before.shape[1]), atol=0)


@given(sequences)
def test_agrees_with_torchjd(losses: Tensor) -> None:
    """TorchJD's weights on the raw gradients are ours over the loss, normalised. It adds 1e-8 to every loss."""
    scalarization = pytest.importorskip("torchjd.scalarization")
    before, after = losses
    scalarizer = scalarization.FAMO(before.shape[1]).double()
    expected = []
    for old, new in zip(before, after, strict=True):
        seen = old.clone().requires_grad_()
        scalarizer(seen).backward()
        assert seen.grad is not None
        expected.append(seen.grad)
        scalarizer.update(new)
    raw = run(FAMO(), before, after) / before
    # Its 1e-8 beside a loss of 1e-3 moves a logarithm by 1e-5, and Adam is scale-free: a fall that is nothing but that
    # moves a logit by lr. Where the fall is real the difference is of the order of 1e-5 · lr / fall.
    distinct = (before.log() - after.log()).abs()
    tolerance = 1e-4 if (distinct > 0.1).all() else STEPS * 2 * 0.025
    torch.testing.assert_close(raw / raw.sum(-1, keepdim=True), torch.stack(expected), rtol=tolerance, atol=0)


@given(sequences)
def test_next_batch_stands_in_where_nobody_looks_back(losses: Tensor) -> None:
    before = losses[0]
    unseen = run(FAMO(), before)
    expected = reference.famo(before[:-1], before[1:])
    torch.testing.assert_close(unseen[:-1], expected, rtol=rounding(0.025, before.shape[1]), atol=0)


def test_what_was_looked_at_is_not_taken_twice() -> None:
    rule, losses = FAMO(), torch.tensor([1.0, 2.0])
    _, state = rule(None, losses, rule.init(losses))
    assert torch.isfinite(state["previous"]).all()
    observed = rule.observe(torch.tensor([0.5, 1.9]), state)
    assert observed["previous"].isnan().all()
    assert_same_tree(rule.observe(torch.tensor([7.0, 7.0]), observed), observed)
    weights, state = rule(None, torch.tensor([7.0, 9.0]), observed)
    assert torch.equal(weights, observed["logits"].softmax(-1))
    assert_same_tree({**state, "previous": observed["previous"]}, observed)


def test_the_loss_that_fell_less_weighs_more() -> None:
    weights = run(FAMO(), torch.tensor([[1.0, 1.0]] * 5), torch.tensor([[0.5, 0.9]] * 5))
    assert (weights[:, 1].diff() > 0).all()
    assert weights[0].tolist() == [0.5, 0.5]


@given(sequences)
def test_weights_lie_on_the_simplex(losses: Tensor) -> None:
    weights = run(FAMO(), *losses)
    assert (weights > 0).all()
    assert ((weights.sum(-1) - 1).abs() <= 2 * losses.shape[-1] * EPS).all()  # two sums of K terms


@given(sequences, st.data())
def test_unit_of_a_loss_does_not_matter(losses: Tensor, data: st.DataObject) -> None:
    """Above the floor of the logarithm, 1e-8 of the largest loss."""
    k = losses.shape[-1]
    c = torch.tensor(data.draw(st.lists(st.floats(0.1, 1), min_size=k, max_size=k)), dtype=torch.float64)
    unit = 10.0 ** data.draw(st.integers(-30, 30))
    torch.testing.assert_close(
        run(FAMO(), *(losses * c * unit)), run(FAMO(), *losses), rtol=2 * rounding(0.025, k, 1e33), atol=0
    )


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_min_norm_weights(seed: int) -> None:
    """On losses whose logarithms fall as their gradients say, δ = η G z, it descends on ½ zᵀGz."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 4, generator=generator, dtype=torch.float64) + 1
    gram = rows @ rows.mT
    rule = FAMO(lr=0.01, weight_decay=0)
    losses = torch.ones(3, dtype=torch.float64)
    state = rule.init(losses)
    for _ in range(3000):
        z, state = rule(None, losses, state)
        state = rule.observe((-0.01 * gram @ z).exp(), state)
    best = min_norm(gram)
    # The weight of a loss that should have none falls by e^−lr a step at most, and Adam swings by some lr.
    assert z @ gram @ z <= best @ gram @ best * (1 + 1e-2)


@pytest.mark.parametrize("small", [0.0, 1e-30, -1e-30])
def test_a_loss_of_nothing_counts_as_the_floor(small: float) -> None:
    for unit in (1.0, 1e-30, 1e30):
        before, after = torch.tensor([[4.0, 1.0]]) * unit, torch.tensor([[2.0, small]]) * unit
        floored = torch.tensor([[2.0, 2e-8]]).double() * unit
        before = before.double().repeat(2, 1)
        torch.testing.assert_close(
            run(FAMO(), before, after.double().repeat(2, 1)),
            run(FAMO(), before, floored.repeat(2, 1)),
            rtol=rounding(0.025, 2, 1e33),
            atol=0,
        )


def test_negative_losses_count_by_their_magnitude() -> None:
    before, after = torch.tensor([[2.0, 4.0]] * 3), torch.tensor([[1.0, 3.5]] * 3)
    sign = torch.tensor([1.0, -1.0])
    assert torch.equal(run(FAMO(), before * sign, after * sign), run(FAMO(), before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1.0, 2.0], [0.5, torch.nan]),
        ([1.0, 2.0], [torch.inf, 1.0]),
        ([1.0, torch.nan], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_falls_that_are_not_finite_teach_nothing(before: list[float], after: list[float]) -> None:
    rule, losses = FAMO(), torch.tensor(before)
    first = rule.init(losses)
    _, state = rule(None, losses, first)
    assert_same_tree(rule.observe(torch.tensor(after), state), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0: expected a positive number"),
        ({"lr": float("nan")}, "lr=nan: expected a positive number"),
        ({"weight_decay": -1}, "weight_decay=-1: expected a number of at least 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        FAMO(**options)
