"""The theorems about the largest worst improvement in a ball around the mean gradient."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine import cagrad, dualproj, min_norm
from distill_optim.testing import assert_same_vector, gram_of, reach, rounding
from tests.reference import gram_methods as reference

RADII = st.sampled_from([0.1, 0.4, 0.5, 1.0, 3.0])

# Up to K = 8 every face is tried.
FEW = (
    testing.gradients(max_losses=8)
    | testing.slightly_conflicting_gradients(max_losses=8)
    | testing.conflicting_gradients(max_losses=8)
    | testing.stationary_gradients(max_losses=8)
    | testing.nearly_stationary_gradients(max_losses=8)
    | testing.badly_scaled_gradients(max_losses=8)
)


# Beyond, an interior point points at faces. Where gradients depend on each other one draw in 500 leads it astray, by
# a few hundredths: there no more than that is claimed.
REGULAR = testing.independent_gradients(9, 12) | testing.slightly_conflicting_gradients(9, 16)
MANY = (
    testing.gradients(9, 16)
    | testing.conflicting_gradients(9, 16)
    | testing.stationary_gradients(9, 16)
    | testing.nearly_stationary_gradients(9, 16)
    | testing.badly_scaled_gradients(9, 16)
)


def within_four_orders(rows: Tensor) -> Tensor:
    """The same directions with the cube roots of their lengths, up to √2: 12 orders of magnitude become 4."""
    lengths = rows.double().norm(dim=1)
    return rows.double() * torch.where(lengths > 0, (-2 / 3 * lengths.log2()).round().exp2(), 1)[:, None]


# Opposed but for a millionth of a millionth: an optimum of 2.33e-6 beside lengths of 1 and 2.
NEARLY_OPPOSED = torch.tensor(
    [
        [-0.70806943, -0.64386605, 0.01941135, 0.32744895, 0.02441684],
        [1.31445326, 1.19526978, -0.03603855, -0.60787748, -0.04532672],
    ],
    dtype=torch.float64,
)
# Once lost. The first three vanish with the weights 2, 1, 1: weights of 1e7, whose sum has lost its length, and with it
# the ball; and a ball that reaches the cone of a face that vanishes.
VANISHING = torch.tensor(
    [[0, -0.5, -1, -0.5], [0, 0, 1, 1], [0, 1, 0, -1], [1, 0, 0, 0]],
    dtype=torch.float64,
)
REACHED = torch.tensor(
    [
        [-3, -3, 2, 3, 0, -5],
        [0, 0, 0, 0, 0, -3],
        [0, 0, 0, 0, 3, -1],
        [0, 0, 0, 0, 1, 2],
        [-1, 0, 3, 1, 1, 1],
        [-2, -2, 1, 2, -1, -3],
        [3, 3, -2, -3, -3, -1],
    ],
    dtype=torch.float64,
)
# The optimum is a difference of two weights of 750000.
CANCELLING = torch.tensor(
    [[0, 0, 1], [1e-6, 0, 1], [0, 0, -1], [0, 0, 1], [-2, 2, -2], [-1, 1, 0], [-3, -3, 3], [2, 2, 0]],
    dtype=torch.float64,
)
# The mean is zero but for rounding.
NO_MEAN = torch.tensor([[5.0], [-3.0], [0.0], [-2.0]], dtype=torch.float64)


def vectors(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The step d, and the mean g₀."""
    return weights @ rows, rows.mean(0)


def assert_best(rows: Tensor, c: float, share: float) -> None:
    """No step in the ball has a larger worst improvement, but for that share of the largest product of lengths.

    And for the rounding of improvements. The optimum is ⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖ for some shares w; lengths are known
    to √(64 ε) = 1e-7 of what is summed up, as everywhere, and where g_w all but vanishes the step along it may be
    worth less than its error, so that the best one without it is taken.
    """
    rows = rows.double()
    gram, k = gram_of(rows), len(rows)
    weights, best = cagrad(gram, c=c), reference.cagrad(rows.numpy(), c)
    step, mean, longest = weights @ rows, rows.mean(0), float(rows.norm(dim=1).max())
    beyond = best.weights.sum() - 1
    g_w = float(np.linalg.norm(best.vector - mean.numpy()) / beyond) if beyond > 0 else 0.0
    r = float(reach(weights, gram))
    # The best step's own length, c ‖g₀‖, is known to what its terms leave of their digits.
    radius = c * float(mean.norm())
    unknown = rounding(k) * float(reach(torch.from_numpy(best.weights), gram)) ** 2
    loss = longest * (min(unknown / radius, radius) if radius > 0 else 0.0)
    slack = share * (1 + c) * longest * (float(mean.norm()) + g_w) + rounding(k) * r * longest + loss
    assert (rows @ step).min() >= float((rows.numpy() @ best.vector).min()) - slack
    # On the squares, which is what a Gram matrix knows.
    assert (step - mean).square().sum() <= c**2 * mean.square().sum() + 4 * rounding(k) * r**2


@given(FEW, RADII)
@example(NEARLY_OPPOSED, 3.0)
@example(VANISHING, 0.4)
@example(REACHED, 1.0)
@example(NO_MEAN, 0.4)
@example(CANCELLING, 1.0)
def test_no_step_in_the_ball_has_a_larger_worst_improvement(rows: Tensor, c: float) -> None:
    """Up to K = 8, with lengths over 12 orders of magnitude, conflicts of a millionth, and 0 in the hull.

    The worst improvements are compared: where 0 is in the hull and the ball reaches the cone of directions without
    conflict every step in both has the largest, 0.
    """
    assert_best(rows, c, 2e-6)


@given(REGULAR, RADII)
def test_no_step_in_the_ball_has_a_larger_worst_improvement_among_many(rows: Tensor, c: float) -> None:
    assert_best(rows, c, 1e-12)


@given(MANY.map(within_four_orders), RADII)
def test_few_steps_in_the_ball_have_a_larger_worst_improvement_among_many(rows: Tensor, c: float) -> None:
    assert_best(rows, c, 0.2)


@given(testing.independent_gradients() | testing.slightly_conflicting_gradients(max_losses=16), RADII)
def test_duality_gap(rows: Tensor, c: float) -> None:
    """minᵢ ⟨gᵢ, d⟩ ≥ ⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖ with the shares w of the step itself: its weights beyond 1/K.

    Of lengths within 4 orders of magnitude, or the shares of long gradients are lost beside 1/K.
    """
    rows = within_four_orders(rows)
    weights = cagrad(gram_of(rows), c=c)
    step = reference.Step((weights @ rows).numpy(), weights.numpy())
    longest = float(rows.norm(dim=1).max())
    # A share loses the digits of 1/K.
    assert reference.cagrad_gap(rows.numpy(), c, step) <= 1e-10 * (1 + c) * longest * float(rows.mean(0).norm())


@given(testing.independent_gradients(), RADII)
def test_unique_step_is_that_of_the_oracle(rows: Tensor, c: float) -> None:
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.cagrad(rows.numpy(), c).weights)
    assert_same_vector(cagrad(gram, c=c), expected, gram)


def test_worst_improvement_of_nearly_opposed_gradients() -> None:
    """Beside the lengths 1 and 2 their digits end at 1e-16, and a length that is a millionth at 1e-10 of itself."""
    step = cagrad(gram_of(NEARLY_OPPOSED), c=3.0) @ NEARLY_OPPOSED
    best = reference.cagrad(NEARLY_OPPOSED.numpy(), 3.0).vector
    expected = float((NEARLY_OPPOSED.numpy() @ best).min())
    assert expected == pytest.approx(2.33e-6, rel=2e-3)
    assert (NEARLY_OPPOSED @ step).min().item() == pytest.approx(expected, abs=1e-6)


@given(testing.conflicting_gradients(2, 2), RADII)
def test_two_losses_by_bisection_of_the_dual(rows: Tensor, c: float) -> None:
    """w g₁ + (1 − w) g₂ has a convex dual in w: no point of a fine grid is below the step's worst improvement."""
    rows = within_four_orders(rows)
    weights = cagrad(gram_of(rows), c=c)
    step, mean = weights @ rows, rows.mean(0)
    w = torch.linspace(0, 1, 10001, dtype=torch.float64)[:, None]
    g_w = w * rows[0] + (1 - w) * rows[1]
    dual = g_w @ mean + c * mean.norm() * g_w.norm(dim=1)
    # The grid misses the optimum by half a step: that of the dual is Lipschitz with ‖g₁ − g₂‖ (1 + c) ‖g₀‖.
    grid = float((rows[0] - rows[1]).norm() * (1 + c) * mean.norm()) / 2e4
    slack = 1e-6 * float(rows.norm(dim=1).max() * mean.norm()) * (1 + c)  # where the two are nearly opposed
    assert dual.min() - grid - slack <= (rows @ step).min() <= dual.min() + slack


@given(FEW | MANY, RADII)
def test_never_worse_than_the_mean(rows: Tensor, c: float) -> None:
    """minᵢ ⟨gᵢ, d⟩ ≥ minᵢ ⟨gᵢ, g₀⟩: the mean is in the ball."""
    gram, k = gram_of(rows), len(rows)
    weights = cagrad(gram, c=c)
    rounded = 2 * rounding(k) * reach(weights, gram) * gram.diagonal().max().sqrt()
    assert (gram @ weights).min() >= gram.mean(1).min() - rounded


@given(FEW | MANY, RADII)
def test_step_stays_in_the_ball(rows: Tensor, c: float) -> None:
    """‖d − g₀‖ ≤ c ‖g₀‖, up to the rounding of the squares; and so ‖d‖ ≤ (1 + c) ‖g₀‖."""
    gram, k = gram_of(rows), len(rows)
    weights = cagrad(gram, c=c)
    offset = weights - 1 / k
    assert offset @ gram @ offset <= c**2 * gram.mean() + 4 * rounding(k) * reach(weights, gram) ** 2
    assert (weights >= 1 / k).all()


@given(FEW | MANY)
def test_without_a_radius_it_is_the_mean(rows: Tensor) -> None:
    assert cagrad(gram_of(rows), c=0.0).tolist() == [1 / len(rows)] * len(rows)


@given(testing.independent_gradients(), st.sampled_from([1e3, 1e6, 1e9]))
def test_direction_tends_to_that_of_min_norm(rows: Tensor, c: float) -> None:
    """⟨g_w, g₀⟩/c + ‖g₀‖ ‖g_w‖ is least where ‖g_w‖ nearly is.

    From ⟨g_w − g*, g*⟩ ≥ 0 follows ‖g_w − g*‖² ≤ ‖g_w‖² − ‖g*‖² = (‖g_w‖ − ‖g*‖)(‖g_w‖ + ‖g*‖), and from optimality
    ‖g_w‖ − ‖g*‖ ≤ ⟨g* − g_w, g₀⟩/(c ‖g₀‖) ≤ ‖g_w − g*‖/c; together ‖g_w − g*‖ ≤ (‖g_w‖ + ‖g*‖)/c. The mean that is
    added to the c-fold direction turns it by 1/c more.
    """
    gram = gram_of(rows)
    weights, shortest = cagrad(gram, c=c), min_norm(gram)
    step, target = (w / (w @ gram @ w).sqrt() for w in (weights, shortest))
    offset = step - target
    unit = reach(step, gram) + reach(target, gram)
    assert offset @ gram @ offset <= (8 / c) ** 2 + 4 * rounding(len(rows)) * unit**2


@given(testing.stationary_gradients(max_losses=8))
@example(REACHED)
def test_projection_where_the_ball_reaches_the_cone(rows: Tensor) -> None:
    """With 0 in the hull and c ≥ 1 it always does: 0 is in both; so no loss worsens, up to rounding."""
    gram = gram_of(rows)
    weights = cagrad(gram, c=1.0)
    assert_same_vector(weights, dualproj(gram), gram)


@given(testing.gradients(max_losses=8), st.integers(-100, 100), RADII)
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int, c: float) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram = gram_of(rows)
    assert torch.equal(cagrad(gram * 4.0**exponent, c=c), cagrad(gram, c=c))


@pytest.mark.parametrize("c", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_dtypes_batches_and_what_is_not_finite(k: int, c: float) -> None:
    method, rows = partial(cagrad, c=c), torch.randn(k, 5)
    testing.assert_takes_any_dtype(method, rows)
    testing.assert_batch_is_a_loop(method, rows)
    testing.assert_not_finite_in_not_finite_out(method, rows)


@given(testing.independent_gradients() | testing.slightly_conflicting_gradients(max_losses=12), RADII)
def test_order_of_the_losses_does_not_matter(rows: Tensor, c: float) -> None:
    """Of a unique step."""
    testing.assert_permutation_equivariant(partial(cagrad, c=c), rows)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32, 64])
def test_equal_gradients_weigh_the_same(k: int) -> None:
    """And are as much longer than the mean as the ball allows: d = (1 + c) g."""
    weights = cagrad(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)), c=0.5)
    assert torch.equal(weights, weights[:1].expand(k))
    assert weights.sum().item() == pytest.approx(1.5, rel=rounding(k))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_nothing_is_read_on_the_host(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read("cagrad", k, batch)
    testing.assert_no_host_read(partial(cagrad, c=0.0), k, batch)


@pytest.mark.parametrize("c", [-0.1, float("nan")])
def test_negative_radius(c: float) -> None:
    with pytest.raises(ValueError, match=rf"^c={c}: expected at least 0$"):
        cagrad(torch.eye(2), c=c)
