"""The theorems about the shortest vector in the hull of the gradients that have been moved towards their mean."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine import min_norm, sdmgrad
from distill_optim.testing import assert_same_vector, gram_of, reach, rounding
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps

PULLS = st.sampled_from([0.0, 1e-3, 0.3, 1.0, 4.0, 1e3])
ANY = (
    testing.gradients(max_losses=16)
    | testing.slightly_conflicting_gradients(max_losses=16)
    | testing.conflicting_gradients(max_losses=16)
    | testing.stationary_gradients(max_losses=16)
    | testing.nearly_stationary_gradients(max_losses=16)
    | testing.badly_scaled_gradients(max_losses=16)
)
MANY = testing.gradients(33, 64)
# Conflicts of a millionth.
SLIGHT = torch.tensor([[1.0, 0.0], [-1e-6, 1.0]], dtype=torch.float64)


@given(ANY)
@example(SLIGHT)
def test_without_pull_it_is_min_norm(rows: Tensor) -> None:
    """To the last bit."""
    gram = gram_of(rows)
    assert torch.equal(sdmgrad(gram, pull=0.0), min_norm(gram))


@given(ANY, PULLS)
def test_weights_lie_on_the_simplex(rows: Tensor, pull: float) -> None:
    """(Σ πᵢ + λ)/(1 + λ) = 1, by K more additions and a division than π."""
    weights = sdmgrad(gram_of(rows), pull=pull)
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= (2 * len(rows) + 4) * EPS


@given(ANY | MANY, PULLS)
@example(SLIGHT, 0.3)
def test_agrees_with_non_negative_least_squares(rows: Tensor, pull: float) -> None:
    """Σ (πᵢ − π*ᵢ)(gᵢ + λg₀) is (1 + λ) times the difference of the two steps, and so is the unit of its rounding."""
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.sdmgrad(rows.double().numpy(), pull).weights)
    assert_same_vector(sdmgrad(gram, pull=pull), expected, gram)


@given(ANY, PULLS)
@example(SLIGHT, 0.3)
def test_conflicts_with_no_gradient_that_is_moved_towards_the_mean(rows: Tensor, pull: float) -> None:
    """⟨g*, gᵢ + λg₀⟩ ≥ (1 + λ) ‖g*‖²: (1 + λ) g* is the shortest vector in their hull."""
    gram, k = gram_of(rows), len(rows)
    weights = sdmgrad(gram, pull=pull)
    norms, slope, r = gram.diagonal().sqrt(), gram @ weights, reach(weights, gram)
    moved, square = slope + pull * slope.mean(), weights @ slope
    # The shifted rows' inner products are sums of four terms, of which the longest may cancel.
    unit = r * (norms + pull * norms.mean() + (1 + pull) * r)
    assert (moved >= (1 + pull) * square - 2 * rounding(k) * unit).all()


@given(ANY, st.sampled_from([1e2, 1e4, 1e8]))
def test_large_pull_tends_to_the_mean(rows: Tensor, pull: float) -> None:
    """π and 1/K are both shares: by 1/(1 + λ) of their difference, and by a rounding."""
    weights = sdmgrad(gram_of(rows), pull=pull)
    assert ((weights - 1 / len(rows)).abs() <= 1 / (1 + pull) + EPS).all()


@given(ANY, st.sampled_from([0.1, 0.3, 1.0, 4.0]))
def test_step_is_no_longer_than_the_mean_and_no_shorter_than_min_norm(rows: Tensor, pull: float) -> None:
    """‖g_π + λg₀‖ ≤ ‖g₀ + λg₀‖, hence ‖g*‖ ≤ ‖g₀‖; and g* is in the hull of the gradients itself."""
    gram, k = gram_of(rows), len(rows)
    weights, shortest = sdmgrad(gram, pull=pull), min_norm(gram)
    square = weights @ gram @ weights
    unit = rounding(k) * max(reach(weights, gram), gram.diagonal().sqrt().mean()) ** 2
    assert shortest @ gram @ shortest - unit <= square <= gram.mean() + 4 * unit


@given(testing.independent_gradients(max_losses=2), PULLS)
def test_two_losses_have_a_closed_form(rows: Tensor, pull: float) -> None:
    """min-norm's, of the two moved gradients, whose difference is that of the gradients themselves."""
    g1, g2 = moved = rows + pull * rows.mean(0)
    share = ((g2 @ (g2 - g1)) / (g1 - g2).square().sum()).clamp(0, 1)
    expected = (torch.stack([share, 1 - share]) + pull / 2) / (1 + pull)
    gram = gram_of(rows)
    # The share loses the digits by which the moved gradients are longer than their difference.
    cancelled = float(moved.norm(dim=1).max() / (g1 - g2).norm()) ** 2
    torch.testing.assert_close(sdmgrad(gram, pull=pull), expected, rtol=0, atol=32 * EPS * max(cancelled, 1))


@given(ANY, PULLS)
def test_order_of_the_losses_does_not_matter(rows: Tensor, pull: float) -> None:
    testing.assert_permutation_equivariant(partial(sdmgrad, pull=pull), rows)


@given(ANY, st.integers(-100, 100), PULLS)
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int, pull: float) -> None:
    """2^±100 covers 1e±30."""
    gram = gram_of(rows)
    assert torch.equal(sdmgrad(gram * 2.0**exponent, pull=pull), sdmgrad(gram, pull=pull))


@pytest.mark.parametrize("pull", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_dtypes_batches_and_what_is_not_finite(k: int, pull: float) -> None:
    method, rows = partial(sdmgrad, pull=pull), torch.randn(k, 5)
    testing.assert_takes_any_dtype(method, rows)
    testing.assert_batch_is_a_loop(method, rows)
    testing.assert_not_finite_in_not_finite_out(method, rows)


@pytest.mark.parametrize("pull", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32, 64])
def test_equal_gradients_weigh_the_same(k: int, pull: float) -> None:
    weights = sdmgrad(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)), pull=pull)
    assert torch.equal(weights, weights[:1].expand(k))
    assert weights[0].item() == pytest.approx(1 / k, rel=4 * EPS)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_nothing_is_read_on_the_host(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read("sdmgrad", k, batch)
    testing.assert_no_host_read(partial(sdmgrad, pull=0.0), k, batch)


@pytest.mark.parametrize("pull", [-0.1, float("nan")])
def test_negative_pull(pull: float) -> None:
    with pytest.raises(ValueError, match=rf"^pull={pull}: expected at least 0$"):
        sdmgrad(torch.eye(2), pull=pull)
