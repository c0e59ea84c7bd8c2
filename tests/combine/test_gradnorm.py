"""Weights that bring the gradients' lengths and the losses' rates together (GradNorm)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.combine.gradnorm import GradNorm
from tests.helpers import assert_same_tree
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

STEPS = 10


def sequence(k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Losses and lengths of gradients without ties, where the objective has a kink; each over a factor of some 1e3."""
    generator = torch.Generator().manual_seed(seed)
    losses, norms = (1.2 * torch.randn(2, STEPS, k, generator=generator, dtype=torch.float64)).exp()
    return losses, norms


sequences = st.builds(sequence, st.integers(2, 64), st.integers(0, 9999))
units = st.floats(-30, 30).map(lambda e: 10.0**e)


def run(rule: GradNorm, losses: Tensor, norms: Tensor) -> Tensor:
    """Only the lengths count, so the gradients may as well be orthogonal."""
    state = rule.init(losses[0])
    weights = []
    for values, lengths in zip(losses, norms, strict=True):
        w, state = rule(torch.diag(lengths.square()), values, state)
        weights.append(w)
    return torch.stack(weights)


def rounding(k: int) -> float:
    """Per step two sums of K terms and a dozen operations on weights, none of which falls below a half of 1 here."""
    return STEPS * 2 * (2 * k + 12) * EPS


@given(sequences, st.floats(0, 3), st.floats(1e-3, 0.03))
def test_equals_the_reference(given_: tuple[Tensor, Tensor], alpha: float, lr: float) -> None:
    losses, norms = given_
    expected = reference.gradnorm(losses, norms, alpha=alpha, lr=lr)
    result = run(GradNorm(alpha=alpha, lr=lr), losses, norms)
    torch.testing.assert_close(result, expected, rtol=rounding(losses.shape[1]), atol=0)


@given(sequences, units, units)
def test_common_factors_of_the_gradients_and_of_the_losses_do_not_matter(
    given_: tuple[Tensor, Tensor], unit: float, currency: float
) -> None:
    losses, norms = given_
    torch.testing.assert_close(
        run(GradNorm(), losses * currency, norms * unit),
        run(GradNorm(), losses, norms),
        rtol=rounding(losses.shape[1]),
        atol=0,
    )


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 64])
@pytest.mark.parametrize("unit", [1.0, 0.1, 3e-30, 7e30])
def test_balanced_gradients_stay_balanced(k: int, unit: float) -> None:
    """Exactly: the sign of a rounding error is not a slope."""
    assert (run(GradNorm(), torch.full((STEPS, k), 0.3), torch.full((STEPS, k), unit).double()) == 1).all()


def test_a_tie_is_a_tie_in_every_unit() -> None:
    """The middle one of lengths 1, 2, 3 is on target from the start, whatever the mean's last digit."""
    losses, norms = torch.ones(3, 3), torch.tensor([1.0, 2.0, 3.0]).double().expand(3, 3)
    expected = run(GradNorm(), losses, norms)
    for unit in torch.logspace(-30, 30, 200, dtype=torch.float64):
        torch.testing.assert_close(run(GradNorm(), losses, norms * unit), expected, rtol=rounding(3), atol=0)


@given(sequences)
def test_weights_are_positive_and_sum_to_k(given_: tuple[Tensor, Tensor]) -> None:
    """Also with steps that are larger than a weight."""
    losses, norms = given_
    k = losses.shape[1]
    weights = run(GradNorm(lr=1), losses, norms)
    assert (weights > 0).all()
    assert ((weights.sum(-1) / k - 1).abs() <= 2 * k * EPS).all()  # two sums of K terms


def test_first_step_goes_by_the_sign_of_the_excess() -> None:
    """Adam's first step is lr towards the target, then the sum is K again."""
    norms = torch.tensor([[4.0, 1.0, 1.0]] * 2).double()
    expected = torch.tensor([1 - 0.025, 1 + 0.025, 1 + 0.025], dtype=torch.float64)
    result = run(GradNorm(), torch.ones(2, 3), norms)[1]
    # lr · g/(|g| + 1e-8) with |g| = ½ at least.
    torch.testing.assert_close(result, expected * 3 / expected.sum(), rtol=0.025 * 2e-8, atol=0)


def test_alpha_of_zero_makes_the_lengths_equal() -> None:
    norms = torch.tensor([1.0, 3.0, 10.0]).double()
    rule = GradNorm(alpha=0, lr=1e-3)
    losses = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    lengths = run(rule, losses, norms.expand(3000, 3))[-1] * norms
    # The sign flips at the target, so a weight of some 0.2 swings by a few lr.
    torch.testing.assert_close(lengths / lengths.mean(), torch.ones(3).double(), rtol=0.05, atol=0)


def test_the_loss_that_fell_less_gets_the_longer_gradient() -> None:
    losses = torch.tensor([[4.0, 4.0]] + [[1.0, 2.0]] * 2000)
    lengths = run(GradNorm(alpha=1, lr=1e-3), losses, torch.ones(2001, 2))[-1]
    # rᵢ = (¼, ½)/⅜, so the lengths come to be as 1 : 2; the weights swing by a few lr.
    torch.testing.assert_close(lengths, torch.tensor([2 / 3, 4 / 3]).double(), rtol=0.02, atol=0)


def test_only_the_lengths_count() -> None:
    losses, norms = sequence(4, 0)
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    rows *= (norms[0] / rows.norm(dim=1))[:, None]
    rule = GradNorm()
    _, state = rule(rows @ rows.mT, losses[0], rule.init(losses[0]))
    _, expected = rule(torch.diag(norms[0] ** 2), losses[0], rule.init(losses[0]))
    for name, entry in expected.items():
        torch.testing.assert_close(state[name], entry, rtol=64 * EPS, atol=0)  # the rows' inner products and roots


@pytest.mark.parametrize("far", [1e3, 1e12])
def test_weight_of_a_far_longer_gradient_halves_until_it_is_on_target(far: float) -> None:
    norms = torch.tensor([far, 1.0], dtype=torch.float64).expand(120, 2)
    weights = run(GradNorm(alpha=0), torch.ones(120, 2), norms)
    assert (weights > 0).all()
    assert weights[:, 0].min() < 1 / far
    assert weights[:, 1].max() == pytest.approx(2, abs=1e-2)


def test_small_weight_comes_back() -> None:
    lengths = torch.tensor([1e3, 1.0])
    norms = torch.cat([lengths.expand(120, 2), lengths.flip(0).expand(600, 2)])
    weights = run(GradNorm(alpha=0), torch.ones(720, 2), norms)
    assert weights[:120, 0].min() < 1e-3
    assert weights[120:, 1].min() < 1e-3


@pytest.mark.parametrize("where", [(0, 0), (1, 0), (2, 2)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gram_matrix_that_is_not_finite_leaves_no_trace(bad: float, where: tuple[int, int]) -> None:
    gram, losses = torch.eye(3), torch.ones(3)
    gram[where] = bad
    rule = GradNorm()
    for state in (rule.init(losses), rule(torch.diag(torch.arange(1.0, 4.0)), losses, rule.init(losses))[1]):
        weights, after = rule(gram, losses, state)
        assert weights.isnan().all()
        assert_same_tree(after, state)


def test_first_values_are_those_of_the_first_finite_step() -> None:
    rule, gram = GradNorm(), torch.eye(2)
    state = rule.init(torch.zeros(2))
    for values in ([torch.nan, 9.0], [2.0, 3.0], [1.0, 1.0]):
        _, state = rule(gram, torch.tensor(values), state)
    assert state["initial"].tolist() == [2, 3]


def test_no_gradient_at_all() -> None:
    assert (run(GradNorm(), torch.rand(5, 3), torch.zeros(5, 3)) == 1).all()


def test_negative_losses_count_by_their_magnitude() -> None:
    losses, norms = sequence(3, 0)
    signs = torch.randint(0, 2, losses.shape) * 2 - 1
    assert torch.equal(run(GradNorm(), losses * signs, norms), run(GradNorm(), losses, norms))


def test_a_loss_that_is_zero_at_first_begins_later() -> None:
    losses = torch.tensor([[0.0, 2.0], [5.0, 2.0], [7.0, 2.0], [0.0, 2.0], [1.0, 2.0]])
    norms = torch.tensor([[1.0, 2.0]] * 5).double()
    later = torch.cat([losses[1:2], losses[1:]])
    assert torch.equal(run(GradNorm(), losses, norms), run(GradNorm(), later, norms))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0: expected a positive number"),
        ({"lr": float("nan")}, "lr=nan: expected a positive number"),
        ({"alpha": -0.5}, "alpha=-0.5: expected a number of at least 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GradNorm(**options)
