"""The theorems about α-fair shares of the improvement."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine import fairgrad, nash_mtl
from distill_optim.testing import gram_of, reach, rounding
from tests.reference import gram_methods as reference

# What is added to the unit rows' diagonal so that weights stay bounded where a combination vanishes.
PROXIMAL = 1e-13

# 0 is not in their hull, so that there is a solution. Lengths over 12 orders of magnitude.
SOLVABLE = testing.independent_gradients() | testing.slightly_conflicting_gradients(max_losses=12)
FEW_SOLVABLE = testing.independent_gradients(max_losses=4) | testing.slightly_conflicting_gradients(max_losses=4)
ANY = (
    testing.gradients(max_losses=16)
    | testing.conflicting_gradients(max_losses=16)
    | testing.stationary_gradients(max_losses=16)
    | testing.nearly_stationary_gradients(max_losses=16)
    | testing.badly_scaled_gradients(max_losses=16)
)
OPPOSED = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3]], dtype=torch.float64)

ALPHAS = st.sampled_from([0.5, 1.0, 2.0])


def with_lengths_to_the_power(rows: Tensor, power: float) -> Tensor:
    """The same directions; a third of the power makes 12 orders of magnitude 4. Exact but for the power itself."""
    lengths = rows.double().norm(dim=1)
    return rows.double() * torch.where(lengths > 0, ((power - 1) * lengths.log2()).round().exp2(), 1)[:, None]


def of_one_length(rows: Tensor) -> Tensor:
    """Up to √2."""
    return with_lengths_to_the_power(rows, 0.0)


def within_four_orders(rows: Tensor) -> Tensor:
    return with_lengths_to_the_power(rows, 1 / 3)


def normalised(gram: Tensor) -> Tensor:
    unit = gram / gram.diagonal().max()
    result: Tensor = unit / torch.linalg.matrix_norm(unit)
    return result


def residual(gram: Tensor, alpha: float) -> float:
    """Of G w = w^(−1/α) on G/‖G‖_F: the largest, as a share of w^(−1/α) + ‖gᵢ‖ Σⱼ wⱼ ‖gⱼ‖."""
    weights, g = fairgrad(gram, alpha=alpha), normalised(gram)
    wanted = weights ** (-1 / alpha)
    return float(((g @ weights - wanted).abs() / (wanted + g.diagonal().sqrt() * reach(weights, g))).max())


@given(SOLVABLE, ALPHAS)
@example(OPPOSED, 0.5)
@example(OPPOSED, 2.0)
def test_improvements_are_powers_of_the_weights(rows: Tensor, alpha: float) -> None:
    """Up to the proximal term, which is at most that share of ‖gᵢ‖ Σⱼ wⱼ ‖gⱼ‖, and rounding."""
    assert residual(gram_of(rows), alpha) <= PROXIMAL + rounding(len(rows))


@given(SOLVABLE.map(within_four_orders), st.sampled_from([0.2, 0.5, 1.0, 2.0, 5.0]))
@example(OPPOSED, 5.0)
def test_improvements_are_powers_of_the_weights_for_more_of_alpha(rows: Tensor, alpha: float) -> None:
    """Further from α = 1 the weights are of very different sizes, and as many steps away."""
    assert residual(gram_of(rows), alpha) <= PROXIMAL + rounding(len(rows))


@given(SOLVABLE.map(of_one_length), st.sampled_from([0.1, 10.0]))
def test_improvements_are_powers_of_the_weights_for_the_furthest_alpha(rows: Tensor, alpha: float) -> None:
    assert residual(gram_of(rows), alpha) <= PROXIMAL + rounding(len(rows))


@given(ANY.map(within_four_orders), ALPHAS)
def test_improvements_of_any_gradients(rows: Tensor, alpha: float) -> None:
    """Where 0 is in the hull, too, with or without a millionth: the weights end where the proximal term holds them.

    Forty steps may leave them a little short of 1e10.
    """
    gram = gram_of(rows)
    assume(gram.diagonal().min() > 0)
    assert residual(gram, alpha) <= 1e-6


@given(FEW_SOLVABLE.map(within_four_orders), ALPHAS)
@example(OPPOSED, 0.5)
@example(OPPOSED, 2.0)
def test_weights_are_those_of_decimal_arithmetic(rows: Tensor, alpha: float) -> None:
    """Every weight relative to itself, up to 1e-13 and rounding times the condition of the equation.

    That of the unit gradients' products, 1e4 for independent ones at most and 1e6 for the opposed ones, and the ratio
    of 1e4 of the lengths.
    """
    gram = gram_of(rows)
    # The oracle's weights are those of G itself.
    unit = gram / normalised(gram)
    expected = torch.from_numpy(reference.fairgrad(gram.numpy(), alpha)) * unit[0, 0] ** (alpha / (1 + alpha))
    torch.testing.assert_close(
        fairgrad(gram, alpha=alpha), expected, rtol=1e6 * (PROXIMAL + rounding(len(rows))), atol=0
    )


@given(ANY)
def test_alpha_of_one_is_the_bargaining_solution(rows: Tensor) -> None:
    gram = gram_of(rows)
    assert torch.equal(fairgrad(gram, alpha=1.0), nash_mtl(gram))


@given(SOLVABLE.map(within_four_orders), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_maximises_the_utility(rows: Tensor, alpha: float) -> None:
    """Of all steps of its length: Σ ⟨gᵢ, d⟩^(1−α)/(1−α) falls in every direction along the sphere.

    Its gradient is Σ gᵢ ⟨gᵢ, d⟩^−α = Σ wᵢgᵢ = d.
    """
    gram = gram_of(rows)
    weights = fairgrad(gram, alpha=alpha)
    improvements = gram @ weights
    assert (improvements > 0).all()
    step, rise = weights @ rows, improvements**-alpha @ rows
    assert 1 - step @ rise / (step.norm() * rise.norm()) <= 1e-10  # α times the digits of the improvements


@given(ANY | testing.gradients(33, 64), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_weights_are_positive(rows: Tensor, alpha: float) -> None:
    testing.assert_positive(fairgrad(gram_of(rows), alpha=alpha))


@given(testing.stationary_gradients(2, 12).map(of_one_length), ALPHAS)
def test_step_stops_where_zero_is_a_positive_combination(rows: Tensor, alpha: float) -> None:
    """There is no solution; the weights are held by the proximal term, and the step is nothing beside their reach.

    In unit rows z solves Cz + 1e-13 z = a z^(−1/α), a being about 1. Along v ≥ 0 with Cv = 0 that makes some z as large
    as 1e-13^(−α/(1 + α)): 2e4, 3e6 and 5e8; while zᵀCz ≤ Σ a z^(1−1/α).
    """
    gram = gram_of(rows)
    assume(gram.diagonal().min() > 0)
    weights = fairgrad(gram, alpha=alpha)
    z = weights * normalised(gram).diagonal().sqrt()
    size = PROXIMAL ** (-alpha / (1 + alpha))
    assert size / 10 <= z.max() <= 10 * len(rows) * size
    assert weights @ gram @ weights <= (1e-3 * reach(weights, gram)) ** 2


@given(testing.gradients(max_losses=2).map(of_one_length), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_two_gradients_of_one_length_weigh_the_same(rows: Tensor, alpha: float) -> None:
    rows = rows / rows.norm(dim=1, keepdim=True).nan_to_num(1).clamp_min(1e-300)
    gram = gram_of(rows)
    assume(gram.diagonal().min() > 0.5)
    weights = fairgrad(gram, alpha=alpha)
    # Rounding of ‖g‖² beside 1 + cos, which with the proximal term is 1e-13 at least.
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-2, atol=0)


@given(testing.slightly_conflicting_gradients(max_losses=2).map(within_four_orders))
def test_larger_alpha_is_fairer_to_the_worse_of_two(rows: Tensor) -> None:
    """On a concave Pareto front −dx₂/dx₁ = (x₂/x₁)^α: with x₁ < x₂ a larger α moves along it towards x₁.

    So the ratio of the smaller improvement to the larger one grows with α. For three losses that is no theorem.
    """
    gram = gram_of(rows)
    steps = [fairgrad(gram, alpha=alpha) @ gram for alpha in (0.5, 0.75, 1.0, 1.5, 2.0)]
    fairness = torch.stack([step.min() / step.max() for step in steps])
    # An improvement is known to the residual of its equation, as above, relative to itself.
    assert (fairness.diff() >= -4 * (PROXIMAL + rounding(2)) * fairness[1:]).all()


@given(SOLVABLE.map(within_four_orders), st.integers(0, 12), ALPHAS)
def test_zero_gradient_weighs_as_one_of_unit_length(rows: Tensor, place: int, alpha: float) -> None:
    """At right angles to all others, whose weights it leaves alone; a unit is the length of the longest."""
    place = min(place, len(rows))
    gram = gram_of(rows)
    weights = fairgrad(gram_of(torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])), alpha=alpha)
    others = torch.cat([weights[:place], weights[place + 1 :]])
    torch.testing.assert_close(others, fairgrad(gram, alpha=alpha), rtol=1e-9, atol=0)
    frobenius = torch.linalg.matrix_norm(gram / gram.diagonal().max())
    torch.testing.assert_close(weights[place], frobenius ** (alpha / (1 + alpha)), rtol=1e-12, atol=0)


@given(ANY, st.integers(-100, 100), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int, alpha: float) -> None:
    """2^±100 covers 1e±30."""
    gram = gram_of(rows)
    assert torch.equal(fairgrad(gram * 2.0**exponent, alpha=alpha), fairgrad(gram, alpha=alpha))


@given(SOLVABLE.map(within_four_orders), ALPHAS)
def test_order_of_the_losses_does_not_matter(rows: Tensor, alpha: float) -> None:
    testing.assert_permutation_equivariant(partial(fairgrad, alpha=alpha), rows)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_dtypes_batches_and_what_is_not_finite(k: int, alpha: float) -> None:
    method, rows = partial(fairgrad, alpha=alpha), torch.randn(k, 5)
    testing.assert_takes_any_dtype(method, rows)
    testing.assert_batch_is_a_loop(method, rows)
    testing.assert_not_finite_in_not_finite_out(method, rows)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32, 64])
def test_equal_gradients_weigh_the_same(k: int, alpha: float) -> None:
    """K w/K = w^(−1/α), as ‖G‖_F = K ‖g‖²: 1 each."""
    weights = fairgrad(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)), alpha=alpha)
    torch.testing.assert_close(weights, torch.ones(k).double(), rtol=PROXIMAL + rounding(k), atol=0)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_nothing_is_read_on_the_host(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read("fairgrad", k, batch)
    testing.assert_no_host_read(partial(fairgrad, alpha=0.5), k, batch)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_that_is_not_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"^alpha={alpha}: expected more than 0$"):
        fairgrad(torch.eye(2), alpha=alpha)
