"""Equal projections on all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine.imtl_g import imtl_g
from distill_optim.combine.linalg import unit_rows
from distill_optim.testing import gradients, gram_of, independent_gradients, reach, slightly_conflicting_gradients
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps

# A short gradient between two long ones. Its coefficient among the unit gradients is negative, and its weight large.
BETWEEN = torch.tensor([[10.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.6, 0.6, 0.5]], dtype=torch.float64)


def condition(gram: Tensor) -> float:
    """By how much C⁻¹ magnifies rounding, with C the cosines."""
    return float(torch.linalg.cond(unit_rows(gram)[0]))


def magnification(weights: Tensor, gram: Tensor) -> float:
    """By how much a rounding error of C is magnified in the weights, relative to the largest αᵢ‖gᵢ‖.

    The coefficients x = α‖g‖ (up to a factor) carry an error that is relative to the largest of them. The sum Σ xᵢ/‖gᵢ‖
    that they are divided by may be that of a small one over a short length.
    """
    norms = gram.diagonal().sqrt()
    return condition(gram) * float((weights.abs() * norms).max() * (1 / norms).sum())


def projections(weights: Tensor, gram: Tensor) -> Tensor:
    return (gram @ weights) / gram.diagonal().sqrt()


@given(independent_gradients() | slightly_conflicting_gradients(max_losses=12))
@example(BETWEEN)
def test_projections_are_equal_and_positive(rows: Tensor) -> None:
    gram = gram_of(rows)
    weights = imtl_g(gram)
    projected = projections(weights, gram)
    assert projected.max() - projected.min() <= testing.ROUNDING * condition(gram) * reach(weights, gram)
    assert projected.min() > 0


@given(independent_gradients() | slightly_conflicting_gradients(max_losses=12))
def test_weights_sum_to_one(rows: Tensor) -> None:
    """Or to −1, where a step of 1 would climb. K + 1 roundings, of what may cancel."""
    weights = imtl_g(gram_of(rows))
    assert abs(weights.sum().abs() - 1) <= (len(rows) + 1) * EPS * weights.abs().sum()


@given(independent_gradients(max_losses=6))
@example(BETWEEN)
def test_agrees_with_rational_arithmetic(rows: Tensor) -> None:
    """But for the sign, which is that of the projections."""
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.imtl_g(rows.numpy()).weights)
    expected = expected * (gram @ expected)[0].sign()
    norms = gram.diagonal().sqrt()
    tolerance = testing.ROUNDING * magnification(expected, gram)
    assert ((imtl_g(gram) - expected) * norms).abs().max() <= tolerance * (expected.abs() * norms).max()


@given(gradients(max_losses=2))
def test_two_weights_are_inverse_lengths(rows: Tensor) -> None:
    """Whatever the angle: α₁ = ‖g₂‖/(‖g₁‖ + ‖g₂‖), with a rounding for each of some quotients and roots."""
    gram = gram_of(rows)
    norms = gram.diagonal().sqrt()
    # Opposed ones have no direction, and of nearly opposed ones rounding decides.
    assume((norms > 0).all() and gram[0, 1] / norms.prod() > -1 + 1e-12)
    torch.testing.assert_close(imtl_g(gram), norms.flip(0) / norms.sum(), rtol=8 * EPS, atol=0)


def test_step_does_not_climb() -> None:
    """The paper's does, along every gradient: its weights sum to 1, ours to −1."""
    gram = gram_of(BETWEEN)
    theirs = torch.from_numpy(reference.imtl_g(BETWEEN.numpy()).weights)
    assert (gram @ theirs < 0).all()
    torch.testing.assert_close(imtl_g(gram), -theirs, rtol=testing.ROUNDING * condition(gram), atol=0)


def test_weights_that_cannot_sum_to_one() -> None:
    """Σ xᵢ/‖gᵢ‖ = 0: finite, and in the direction of what is next to it."""
    cosines, _ = unit_rows(gram_of(BETWEEN))
    x = torch.linalg.solve(cosines, torch.ones(3).double())
    units = BETWEEN / BETWEEN.norm(dim=1, keepdim=True)
    middle = -x[2] / (x[0] + x[1])  # its length beside two of 1
    for factor, least in ((1.0, 1e10), (1 + 1e-6, 1e5), (1 - 1e-6, 1e5)):
        gram = gram_of(torch.cat([units[:2], units[2:] * middle * factor]))
        weights = imtl_g(gram)
        assert least < weights.abs().max() <= 1 / testing.ROUNDING
        assert abs(weights.sum()) <= 1 + testing.ROUNDING * weights.abs().sum()
        projected = projections(weights, gram)
        assert projected.min() > 0
        torch.testing.assert_close(projected / projected.mean(), torch.ones(3).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [2, 3, 8, 9, 32])
def test_equal_gradients_weigh_the_same(k: int) -> None:
    weights = imtl_g(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)))
    torch.testing.assert_close(weights, torch.full((k,), 1 / k, dtype=torch.float64), rtol=testing.ROUNDING, atol=0)


@given(independent_gradients(max_losses=6), st.data())
def test_duplicates_share(rows: Tensor, data: st.DataObject) -> None:
    """m copies of a gradient get its weight together. The condition number grows with their number."""
    k = len(rows)
    source = torch.tensor([*range(k), *data.draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=6))])
    gram = gram_of(rows)
    weights, expected = imtl_g(gram_of(rows[source])), imtl_g(gram)
    norms = gram.diagonal().sqrt()
    tolerance = testing.ROUNDING * magnification(expected, gram) * len(source)
    error = (weights - (expected / source.bincount(minlength=k))[source]) * norms[source]
    assert error.abs().max() <= tolerance * (expected.abs() * norms).max()


@given(independent_gradients(max_losses=6), st.integers(0, 6))
def test_zero_gradient_takes_no_part(rows: Tensor, place: int) -> None:
    place = min(place, len(rows))
    weights = imtl_g(gram_of(torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])))
    assert weights[place] == 0
    rest = torch.cat([weights[:place], weights[place + 1 :]])
    testing.assert_same_vector(rest, imtl_g(gram_of(rows)), gram_of(rows))


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1])
def test_opposed_gradients_leave_no_direction(factor: float) -> None:
    row = torch.randn(5, dtype=torch.float64)
    assert not imtl_g(gram_of(torch.stack([row, -factor * row]))).any()
    # Beside a third one there is a direction: across.
    across = imtl_g(gram_of(torch.stack([row, -factor * row, torch.randn(5).double()])))
    assert across.isfinite().all()


@pytest.mark.parametrize("k", [1, 3])
def test_zero_gradients_weigh_nothing(k: int) -> None:
    assert not imtl_g(torch.zeros(k, k)).any()


def test_one_loss_has_all_the_weight() -> None:
    assert imtl_g(torch.tensor([[3.0]])).tolist() == [1]


@given(independent_gradients(max_losses=8))
def test_agrees_with_torchjd(rows: Tensor) -> None:
    """On lengths within a factor of 2, for its pseudo-inverse takes short gradients for none."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    gram = gram_of(rows / rows.norm(dim=1, keepdim=True).log2().round().exp2())
    expected = aggregation.IMTLGWeighting()(gram)
    assume((gram @ expected).min() > 0)
    torch.testing.assert_close(imtl_g(gram), expected, rtol=0, atol=testing.ROUNDING * condition(gram))


def test_no_lengths_are_too_great() -> None:
    """TorchJD's weights are 0 here, because their sum before normalising is below 1e-12."""
    torch.testing.assert_close(imtl_g(1e26 * torch.eye(2).double()), torch.full((2,), 0.5, dtype=torch.float64))


# What holds for every method.


@given(gradients(1, 12))
@example(torch.zeros(3, 2))
@example(torch.randn(64, 3))
@example(torch.randn(64, 100))
def test_defined(rows: Tensor) -> None:
    testing.assert_defined(imtl_g, rows)


@given(independent_gradients())
def test_order_of_the_losses_does_not_matter(rows: Tensor) -> None:
    testing.assert_permutation_equivariant(imtl_g, rows)


@given(independent_gradients())
def test_unit_of_a_loss_does_not_matter(rows: Tensor) -> None:
    testing.assert_invariant_to_row_scaling(imtl_g, rows)


@given(gradients(1, 12), st.integers(-100, 100))
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram = gram_of(rows)
    assert torch.equal(imtl_g(gram * 2.0**exponent), imtl_g(gram))


@given(gradients(1, 4))
def test_not_finite_in_not_finite_out(rows: Tensor) -> None:
    testing.assert_not_finite_in_not_finite_out(imtl_g, rows)


@given(independent_gradients(max_losses=8))
def test_batch_is_a_loop(rows: Tensor) -> None:
    """On well-conditioned matrices: LAPACK's last digits depend on where in memory the matrix lies."""
    testing.assert_batch_is_a_loop(imtl_g, rows)


@given(gradients(1, 8))
def test_takes_any_dtype(rows: Tensor) -> None:
    testing.assert_takes_any_dtype(imtl_g, rows)


@pytest.mark.parametrize(("k", "batch"), [(1, ()), (2, ()), (2, (2,)), (3, (2,)), (9, ()), (32, ())])
def test_no_host_read(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read(imtl_g, k, batch)
