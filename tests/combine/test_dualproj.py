"""The theorems about the projection of the mean gradient onto the cone of directions without conflict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import combine, testing
from distill_optim.combine import dualproj, min_norm, upgrad
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

# Once lost. An inner product with the mean that is zero but for rounding; weights of 1e15 that cancel one another.
ROUNDED_TO_A_CONFLICT = torch.tensor([[3, 0], [-1, 0], [-1, 0], [-1, -2], [0, 1]], dtype=torch.float64)
VANISHING = torch.tensor(
    [[0, 2, 2], [1, -2, -1], [4, 11, 5], [-2, -1, -3], [-2, -3, 0], [0, 0, 1]], dtype=torch.float64
)


def preferences(k: int) -> st.SearchStrategy[Tensor]:
    """Positive and within a factor of 64."""
    return st.lists(st.integers(1, 64), min_size=k, max_size=k).map(lambda u: torch.tensor(u).double() / 8)


def oracle(rows: Tensor, preference: Tensor | None = None) -> Tensor:
    u = None if preference is None else preference.numpy()
    return torch.from_numpy(reference.dualproj(rows.double().numpy(), u).weights)


@given(DISTINCT, st.data())
@example(ROUNDED_TO_A_CONFLICT, None)
@example(VANISHING, None)
def test_karush_kuhn_tucker(rows: Tensor, data: st.DataObject | None) -> None:
    """w ≥ u, Gw ≥ 0, and (Gw)ᵢ = 0 where wᵢ > uᵢ: w minimises wᵀGw over w ≥ u (proposition 1)."""
    k, gram = len(rows), gram_of(rows)
    u = torch.full((k,), 1 / k, dtype=torch.float64) if data is None else data.draw(preferences(k))
    testing.assert_kkt(dualproj(gram, preference=u), gram, lower=u, total=None)


@given(ANY)
def test_karush_kuhn_tucker_where_gradients_are_nearly_opposed(rows: Tensor) -> None:
    """A conflict of 1e-8, a hundredth of what has to be seen, with the part that sets two opposed rows apart.

    To resolve it takes weights of 1e8 and more, with which rounding makes a conflict of the same size.
    """
    gram, k = gram_of(rows), len(rows)
    weights = dualproj(gram)
    slope, r = gram @ weights, reach(weights, gram)
    assert (slope >= -1e-8 * r * gram.diagonal().sqrt()).all()
    assert (weights - 1 / k) @ slope <= 1e-8 * r**2


@given(DISTINCT | ANY | MANY, st.data())
@example(ROUNDED_TO_A_CONFLICT, None)
def test_agrees_with_non_negative_least_squares(rows: Tensor, data: st.DataObject | None) -> None:
    u = None if data is None else data.draw(st.none() | preferences(len(rows)))
    gram = gram_of(rows)
    assert_same_vector(dualproj(gram, preference=u), oracle(rows, u), gram)


@given(testing.stationary_gradients(max_losses=4) | testing.conflicting_gradients(max_losses=4))
def test_vector_is_the_exact_one(rows: Tensor) -> None:
    """‖Σ wᵢgᵢ − g*‖ with g* from rational arithmetic on the gradients themselves."""
    exact, gram = reference.rational(rows.double().numpy()), gram_of(rows)
    point, _ = reference.project_exact(exact, exact.sum(0) / len(rows))
    weights = dualproj(gram)
    offset = reference.rational(weights.numpy()) @ exact - point
    # On the square, as in assert_same_vector.
    assert float(offset @ offset) <= 4 * rounding(len(rows)) * reach(weights, gram) ** 2


@given(DISTINCT)
@example(ROUNDED_TO_A_CONFLICT)
@example(VANISHING)
def test_weights_are_no_larger_than_they_have_to_be(rows: Tensor) -> None:
    """Where a combination of the gradients vanishes, as much of it as one likes may be added: none should be.

    The oracle's weights belong to independent gradients. Solutions are ranked by their size in steps of 1024, so that
    is what may be lost. The interior point of K > 8 has a share of what vanishes.
    """
    gram = gram_of(rows)
    least = reach(oracle(rows), gram)
    assert reach(dualproj(gram), gram) <= (1024 if len(rows) <= combine.qp.MAX_FACES else 1e6) * least


@given(DISTINCT | ANY, st.data())
def test_without_a_conflict_it_is_the_preferred_combination(rows: Tensor, data: st.DataObject) -> None:
    """To the last bit: then no weight is moved."""
    gram = gram_of(rows.abs())
    assert dualproj(gram).tolist() == [1 / len(rows)] * len(rows)
    u = data.draw(preferences(len(rows)))
    assert torch.equal(dualproj(gram, preference=u), u)


# No direction but 0 is without conflict; what rounding leaves of it was once projected again, and grew to 0.16.
ONLY_ZERO = torch.tensor([[1, -1], [0, 0], [0, 0], [0, 0], [2, 3], [3, 1], [-1, 0]], dtype=torch.float64)


@given(DISTINCT)
@example(ONLY_ZERO)
def test_projection_of_a_projection_is_itself(rows: Tensor) -> None:
    """The weights, taken as the preference, are a combination that conflicts with no loss already."""
    gram = gram_of(rows)
    once = dualproj(gram)
    assert_same_vector(dualproj(gram, preference=once), once, gram)


@given(DISTINCT)
def test_no_other_direction_without_conflict_is_nearer_to_the_mean(rows: Tensor) -> None:
    """UPGrad's is one, and so is every positive multiple of min-norm's; hence ‖g* − g₀‖ ≤ ‖d − g₀‖."""
    k, gram = len(rows), gram_of(rows)
    mean = torch.full((k,), 1 / k, dtype=torch.float64)
    shortest = min_norm(gram)
    square = shortest @ gram @ shortest
    multiple = (mean @ gram @ shortest).clamp_min(0) / torch.where(square > 0, square, 1)  # the nearest one
    offset = dualproj(gram) - mean
    for other in (upgrad(gram) - mean, shortest * multiple - mean):
        unit = reach(offset, gram) + reach(other, gram) + reach(mean, gram)
        assert offset @ gram @ offset <= other @ gram @ other + 4 * rounding(k) * unit**2


@given(testing.gradients(max_losses=2))
def test_two_losses_have_a_closed_form(rows: Tensor) -> None:
    """d = g₀ − Σ min(0, ⟨g₀, gᵢ⟩)/‖gᵢ‖² gᵢ; two gradients that conflict do not both conflict with their mean."""
    gram = gram_of(rows)
    norms = gram.diagonal().sqrt()
    assume((norms > 0).all() and gram[0, 1] > -(1 - 1e-6) * norms.prod())  # opposed ones do, but for rounding
    slope = gram.sum(1) / 2
    expected = 0.5 + (-slope).clamp_min(0) / gram.diagonal()
    # A sum of two and a quotient; where the sum cancels the result is 1/2 as nearly.
    torch.testing.assert_close(dualproj(gram), expected, rtol=8 * EPS, atol=0)


@given(testing.slightly_conflicting_gradients())
def test_conflict_of_a_millionth_is_seen(rows: Tensor) -> None:
    """By method and test: where lengths differ the mean itself conflicts, and fails."""
    gram = gram_of(rows)
    testing.assert_non_conflicting(dualproj(gram), gram)
    mean = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    if (gram @ mean < -1e-12 * gram.diagonal().sqrt() * reach(mean, gram)).any():
        with pytest.raises(AssertionError, match="conflicts with loss"):
            testing.assert_non_conflicting(mean, gram)
        assert (dualproj(gram) > mean).any()


@given(DISTINCT | ANY, st.integers(-100, 100))
def test_no_unit_and_no_order(rows: Tensor, exponent: int) -> None:
    """To the last bit, for a power of two: 2^±100 covers 1e±30. A cone has no unit of length either."""
    gram, c, u = gram_of(rows), 2.0**exponent, torch.arange(1, len(rows) + 1).double()
    weights = dualproj(gram, preference=u)
    assert torch.equal(dualproj(gram * c, preference=u), weights)
    assert torch.equal(dualproj(gram, preference=u * c), weights * c)
    testing.assert_permutation_equivariant("dualproj", rows)
