"""The theorems about the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.combine import min_norm
from tests.properties.gradients import (
    ROUNDING,
    assert_same_vector,
    gradients,
    gram_of,
    independent_gradients,
    reach,
)
from tests.reference import min_norm as reference

EPS = torch.finfo(torch.float64).eps


@given(gradients())
def test_weights_lie_on_the_simplex(rows: Tensor) -> None:
    weights = min_norm(gram_of(rows))
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= 4 * EPS  # one rounding per quotient, and those of the sum itself


@given(gradients())
def test_karush_kuhn_tucker(rows: Tensor) -> None:
    """πᵀGπ = min (Gπ)ᵢ: no vertex improves on the optimum."""
    gram = gram_of(rows)
    weights = min_norm(gram)
    slope = gram @ weights
    assert weights @ slope - slope.min() <= 1e-10 * gram.diagonal().max()  # the bar that the issue sets


# Once lost: a short gradient judged by the rounding of a long one, and zeros among lengths far apart.
BESIDE_A_LONG_ONE = torch.tensor([[-9, 5, -8], [-8.7, 5, -8], [2e8, 0, 0], [-400, -900, -700]], dtype=torch.float64)
ZEROS_APART = torch.tensor([[0], [0], [0], [0], [30], [0], [0.2], [20], [0]], dtype=torch.float64)


@given(gradients())
@example(BESIDE_A_LONG_ONE)
@example(ZEROS_APART)
def test_step_conflicts_with_no_loss(rows: Tensor) -> None:
    """⟨g*, gᵢ⟩ ≥ ‖g*‖² for every i, up to the rounding of the two inner products."""
    gram = gram_of(rows)
    weights = min_norm(gram)
    slope, unit = gram @ weights, reach(weights, gram)
    assert (weights @ slope - slope <= ROUNDING * unit * (gram.diagonal().sqrt() + unit)).all()


@given(gradients())
def test_step_is_no_longer_than_any_gradient(rows: Tensor) -> None:
    """‖g*‖ ≤ min ‖gᵢ‖, up to the rounding of ‖g*‖²."""
    gram = gram_of(rows)
    weights = min_norm(gram)
    assert weights @ gram @ weights <= gram.diagonal().min() + ROUNDING * reach(weights, gram) ** 2


def test_step_may_be_much_shorter_than_every_gradient() -> None:
    """Corollary 3.4 of the paper, ‖g*‖ ≥ min ‖gᵢ‖/√2, is false under conflict."""
    gram = torch.tensor([[1.0, -0.99], [-0.99, 1.0]])
    weights = min_norm(gram)
    assert weights @ gram.double() @ weights < 0.01 * gram.diagonal().min() / 2


@given(gradients(), st.randoms(use_true_random=False))
def test_order_of_the_losses_does_not_matter(rows: Tensor, random: Random) -> None:
    gram, order = gram_of(rows), torch.tensor(random.sample(range(len(rows)), len(rows)))
    permuted = torch.empty(len(rows), dtype=torch.float64)
    permuted[order] = min_norm(gram[order][:, order])
    assert_same_vector(permuted, min_norm(gram), gram)


@given(independent_gradients(), st.randoms(use_true_random=False))
def test_unique_weights_move_with_their_losses(rows: Tensor, random: Random) -> None:
    gram, order = gram_of(rows), torch.tensor(random.sample(range(len(rows)), len(rows)))
    # Weights lose the digits of the condition number of the unit rows' Gram matrix, 1e4 at most: 1e4 · 64 eps.
    torch.testing.assert_close(min_norm(gram[order][:, order]), min_norm(gram)[order], rtol=0, atol=1e4 * ROUNDING)


@given(gradients(), st.floats(1e-30, 1e30))
def test_common_scale_does_not_matter(rows: Tensor, c: float) -> None:
    gram = gram_of(rows)
    assert_same_vector(min_norm(c * gram), min_norm(gram), gram)


@given(gradients(), st.integers(-100, 100))
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram = gram_of(rows)
    assert torch.equal(min_norm(gram * 2.0**exponent), min_norm(gram))


@given(gradients(max_losses=2))
def test_two_losses_have_the_clamped_closed_form(rows: Tensor) -> None:
    """π₁ = clamp((g₂₂ − g₁₂)/(g₁₁ + g₂₂ − 2 g₁₂), 0, 1), in exact arithmetic on the same Gram matrix."""
    gram = gram_of(rows)
    (g11, g12), (_, g22) = ([Fraction(x) for x in row] for row in gram.tolist())
    total = g11 + g22 - 2 * g12
    assume(total > 0 or g11 == g12 == g22)  # rounded, a Gram matrix need not be one
    expected = min(max((g22 - g12) / total, Fraction(0)), Fraction(1)) if total else Fraction(1, 2)
    # Two differences, their sum and a quotient, all of one sign: a rounding each.
    assert min_norm(gram)[0].item() == pytest.approx(float(expected), rel=4 * EPS, abs=0)


@given(independent_gradients(max_losses=2))
def test_two_losses_inside_the_simplex_gain_equally(rows: Tensor) -> None:
    """⟨g*, g₁⟩ = ⟨g*, g₂⟩ = (g₁₁ g₂₂ − g₁₂²)/‖g₁ − g₂‖² where no weight is clamped."""
    gram = gram_of(rows)
    if gram[0, 1] >= gram.diagonal().min():
        gram = gram_of(rows * torch.tensor([[1], [-1]]))
    (g11, g12), (_, g22) = ([Fraction(x) for x in row] for row in gram.tolist())
    weights = min_norm(gram)
    expected = float((g11 * g22 - g12**2) / (g11 + g22 - 2 * g12))
    unit = reach(weights, gram)
    assert ((gram @ weights - expected).abs() <= 8 * EPS * unit * gram.diagonal().sqrt()).all()  # 4 for π, 2 for Gπ


@pytest.mark.parametrize("k", range(2, 33))
def test_equal_gradients_weigh_the_same(k: int) -> None:
    row = torch.tensor([0.3, -1.7, 2.9])
    weights = min_norm(gram_of(row.expand(k, 3)))
    assert torch.equal(weights, weights[:1].expand(k))  # to the last bit
    assert abs(weights[0] * k - 1) <= 2 * EPS  # the rounding of 1/K and of the product


@given(independent_gradients(max_losses=6), st.data())
def test_duplicates_share(rows: Tensor, data: st.DataObject) -> None:
    """m copies of a gradient get one share of what the gradient alone gets, each."""
    k = len(rows)
    copies = data.draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=12 - k), label="copies")
    source = torch.tensor([*range(k), *copies])
    weights = min_norm(gram_of(rows[source]))
    together = torch.zeros(k, dtype=torch.float64).index_add(0, source, weights)
    # As above: the digits of the condition number.
    torch.testing.assert_close(weights, (together / source.bincount())[source], rtol=0, atol=1e4 * ROUNDING)
    # The duality gap, by which the solver judges itself, is flat to second order where a loss is only just outside
    # the face: √ROUNDING, times a condition number of 100 at most, and its root.
    torch.testing.assert_close(together, min_norm(gram_of(rows)), rtol=0, atol=10 * ROUNDING**0.5)


@given(gradients())
def test_agrees_with_non_negative_least_squares(rows: Tensor) -> None:
    expected = torch.from_numpy(reference.by_nnls(rows.double().numpy()))
    gram = gram_of(rows)
    assert_same_vector(min_norm(gram), expected, gram)


@pytest.mark.parametrize("k", [2, 3, 9])
@given(st.data())
def test_batch_is_a_loop(k: int, data: st.DataObject) -> None:
    grams = [gram_of(data.draw(gradients(k, k))) for _ in range(4)]
    batched = min_norm(torch.stack(grams).view(2, 2, k, k)).view(4, k)
    for weights, gram in zip(batched, grams, strict=True):
        assert_same_vector(weights, min_norm(gram), gram)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [2, 3, 9])
def test_not_finite_in_not_finite_out(k: int, bad: float) -> None:
    """Without an exception, and without harm to the rest of the batch."""
    rows = torch.randn(k, 5)
    fine = gram_of(rows)
    rows[1, 2] = bad
    grams = torch.stack([fine, gram_of(rows)])
    weights = min_norm(grams)
    assert not weights[1].isfinite().any()
    assert_same_vector(weights[0], min_norm(fine), fine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 3, 9])
def test_result_is_float64(k: int, dtype: torch.dtype) -> None:
    gram = gram_of(torch.randn(k, 5)).to(dtype)
    assert torch.equal(min_norm(gram), min_norm(gram.double()))


def test_one_loss_has_all_the_weight() -> None:
    assert min_norm(torch.tensor([[3.0]])).tolist() == [1]
