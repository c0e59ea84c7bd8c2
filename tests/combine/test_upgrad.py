"""The theorems about the mean of the gradients' projections onto the cone of directions without conflict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import combine, testing
from distill_optim.combine import orthant_qp, upgrad
from distill_optim.testing import assert_same_vector, gram_of, reach, rounding
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps

# Rows that are equal or opposed exactly, or are not nearly: their Gram matrix says which.
DISTINCT = (
    testing.independent_gradients()
    | testing.slightly_conflicting_gradients(max_losses=12)
    | testing.conflicting_gradients(max_losses=12)
    | testing.stationary_gradients(max_losses=12)
    | testing.badly_scaled_gradients(max_losses=12)
)
# Rows that may be opposed but for 1e-8, which in a Gram matrix is the last digit.
ANY = testing.gradients(max_losses=12) | testing.related_gradients("opposed", max_losses=12)
MANY = testing.gradients(13, 64) | testing.conflicting_gradients(13, 64)

# Once lost: weights of 1e15 that cancel one another.
VANISHING = torch.tensor(
    [[0, 2, 2], [1, -2, -1], [4, 11, 5], [-2, -1, -3], [-2, -3, 0], [0, 0, 1]], dtype=torch.float64
)


def preferences(k: int) -> st.SearchStrategy[Tensor]:
    """Positive and within a factor of 64."""
    return st.lists(st.integers(1, 64), min_size=k, max_size=k).map(lambda u: torch.tensor(u).double() / 8)


def oracle(rows: Tensor, preference: Tensor | None = None) -> Tensor:
    u = None if preference is None else preference.numpy()
    return torch.from_numpy(reference.upgrad(rows.double().numpy(), u).weights)


@given(DISTINCT)
@example(VANISHING)
def test_every_projection_is_optimal(rows: Tensor) -> None:
    """vᵢ minimises ‖gᵢ + Σⱼ vᵢⱼgⱼ‖² over v ≥ 0, and the weights are Σᵢ (eᵢ + vᵢ)/K."""
    k, gram = len(rows), gram_of(rows)
    beyond = orthant_qp(gram, gram)
    for i, v in enumerate(beyond):
        lower = torch.eye(k).double()[i]
        testing.assert_kkt(v + lower, gram, lower=lower, total=None)
    assert_same_vector(upgrad(gram), 1 / k + beyond.mean(0), gram)


@given(DISTINCT)
def test_step_conflicts_with_no_loss(rows: Tensor) -> None:
    gram = gram_of(rows)
    testing.assert_non_conflicting(upgrad(gram), gram)


@given(ANY)
def test_step_conflicts_with_no_loss_where_gradients_are_nearly_opposed(rows: Tensor) -> None:
    """A conflict of 1e-8, a hundredth of what has to be seen, with the part that sets two opposed rows apart.

    To resolve it takes weights of 1e8 and more, with which rounding makes a conflict of the same size.
    """
    gram = gram_of(rows)
    weights = upgrad(gram)
    assert (gram @ weights >= -1e-8 * reach(weights, gram) * gram.diagonal().sqrt()).all()


@given(DISTINCT | ANY | MANY, st.data())
def test_agrees_with_non_negative_least_squares(rows: Tensor, data: st.DataObject) -> None:
    u = data.draw(st.none() | preferences(len(rows)))
    gram = gram_of(rows)
    weights = upgrad(gram, preference=u)
    assert_same_vector(weights, oracle(rows, u), gram)
    assert (weights >= (1 / len(rows) if u is None else u)).all()


@given(testing.stationary_gradients(max_losses=4) | testing.conflicting_gradients(max_losses=4))
def test_vector_is_the_exact_one(rows: Tensor) -> None:
    """‖Σ wᵢgᵢ − g*‖ with g* from rational arithmetic on the gradients themselves."""
    exact, gram = reference.rational(rows.double().numpy()), gram_of(rows)
    point = sum(reference.project_exact(exact, row)[0] for row in exact) / len(rows)
    weights = upgrad(gram)
    offset = reference.rational(weights.numpy()) @ exact - point
    # On the square, as in assert_same_vector.
    assert float(offset @ offset) <= 4 * rounding(len(rows)) * reach(weights, gram) ** 2


@given(DISTINCT)
@example(VANISHING)
def test_weights_are_no_larger_than_they_have_to_be(rows: Tensor) -> None:
    """Where a combination of the gradients vanishes, as much of it as one likes may be added: none should be.

    The oracle's weights belong to independent gradients. Solutions are ranked by their size in steps of 1024, so that
    is what may be lost. The interior point of K > 8 has a share of what vanishes.
    """
    gram = gram_of(rows)
    least = reach(oracle(rows), gram)
    assert reach(upgrad(gram), gram) <= (1024 if len(rows) <= combine.qp.MAX_FACES else 1e6) * least


@given(DISTINCT | ANY, st.data())
def test_without_a_conflict_it_is_the_preferred_combination(rows: Tensor, data: st.DataObject) -> None:
    """To the last bit: then every gradient is its own projection."""
    gram = gram_of(rows.abs())
    assert upgrad(gram).tolist() == [1 / len(rows)] * len(rows)
    u = data.draw(preferences(len(rows)))
    assert torch.equal(upgrad(gram, preference=u), u)


@given(DISTINCT, st.data())
def test_linear_under_scaling(rows: Tensor, data: st.DataObject) -> None:
    """A(diag(a + b) J) = A(diag(a) J) + A(diag(b) J) for a, b > 0 (Quinton & Rey, proposition 1).

    The cone does not know the lengths of the gradients, and a projection onto a cone is positively homogeneous.
    """
    k, gram = len(rows), gram_of(rows)
    a, b = data.draw(preferences(k)), data.draw(preferences(k))
    of_a, of_b, of_both = (upgrad(gram * torch.outer(c, c)) * c for c in (a, b, a + b))
    assert_same_vector(of_a + of_b, of_both, gram)


@given(DISTINCT, st.data())
def test_preference_is_a_scaling(rows: Tensor, data: st.DataObject) -> None:
    """Σ uᵢ π(gᵢ) = Σ π(uᵢgᵢ)."""
    k, gram = len(rows), gram_of(rows)
    u = data.draw(preferences(k))
    assert_same_vector(upgrad(gram, preference=u), k * u * upgrad(gram * torch.outer(u, u)), gram)


@given(DISTINCT)
def test_mean_agrees_with_the_step_and_is_no_longer_along_it(rows: Tensor) -> None:
    """0 ≤ ⟨g*, g₀⟩ ≤ ‖g*‖²: a gradient is its projection and a part that no direction of the cone agrees with."""
    k, gram = len(rows), gram_of(rows)
    weights = upgrad(gram)
    mean = torch.full((k,), 1 / k, dtype=torch.float64)
    slope, unit = weights @ gram @ mean, reach(weights, gram)
    assert -rounding(k) * unit**2 <= slope <= weights @ gram @ weights + 2 * rounding(k) * unit**2


@given(testing.gradients(max_losses=2))
def test_two_losses_have_a_closed_form(rows: Tensor) -> None:
    """PCGrad's: each gradient without the part that opposes the other; here the mean of the two."""
    gram = gram_of(rows)
    norms = gram.diagonal().sqrt()
    assume((norms > 0).all() and gram[0, 1] > -(1 - 1e-6) * norms.prod())  # opposed ones cancel, by any such weights
    expected = (1 + (-gram[0, 1]).clamp_min(0) / gram.diagonal()) / 2
    torch.testing.assert_close(upgrad(gram), expected, rtol=8 * EPS, atol=0)  # a quotient and a sum, of unit rows


@given(testing.slightly_conflicting_gradients())
def test_conflict_of_a_millionth_is_seen(rows: Tensor) -> None:
    """By method and test: every gradient is moved, and where lengths differ the mean itself conflicts, and fails."""
    k, gram = len(rows), gram_of(rows)
    weights = upgrad(gram)
    testing.assert_non_conflicting(weights, gram)
    mean = torch.full((k,), 1 / k, dtype=torch.float64)
    if (gram @ mean < -1e-12 * gram.diagonal().sqrt() * reach(mean, gram)).any():
        with pytest.raises(AssertionError, match="conflicts with loss"):
            testing.assert_non_conflicting(mean, gram)
        assert (weights > mean).any()


@given(ANY | MANY, st.integers(-100, 100))
@example(torch.tensor([[0.0]] * 4 + [[-1.0], [-3.0], [-3.0], [-3.0], [-2.0], [2.0], [1.0], [3.0]]), -50)
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30. The example has zero gradients, whose projections once had weights with a unit."""
    gram = gram_of(rows)
    assert torch.equal(upgrad(gram * 4.0**exponent), upgrad(gram))
