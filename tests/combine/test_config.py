"""The direction with equal positive cosines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine.config import config
from distill_optim.combine.imtl_g import imtl_g
from distill_optim.combine.linalg import unit_rows
from distill_optim.testing import gradients, gram_of, independent_gradients, reach, slightly_conflicting_gradients
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps


def condition(gram: Tensor) -> float:
    """By how much C⁻¹ magnifies rounding, with C the cosines."""
    return float(torch.linalg.cond(unit_rows(gram)[0]))


@st.composite
def dependent_gradients(draw: st.DrawFn) -> Tensor:
    """Of exact rank, and with eigenvalues that are 0 or far from it: at most 4 dimensions of small integers."""
    k, rank = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    entries = draw(st.lists(st.integers(-2, 2), min_size=k * rank, max_size=k * rank))
    exponents = draw(st.lists(st.integers(-20, 20), min_size=k, max_size=k))
    return torch.tensor(entries).double().view(k, rank) * torch.tensor(exponents).double().exp2()[:, None]


@given(independent_gradients() | slightly_conflicting_gradients(max_losses=12))
def test_cosines_are_equal_and_positive(rows: Tensor) -> None:
    gram = gram_of(rows)
    weights = config(gram)
    projected = (gram @ weights) / gram.diagonal().sqrt()
    assert projected.max() - projected.min() <= testing.ROUNDING * condition(gram) * reach(weights, gram)
    assert projected.min() > 0


@given(gradients(1, 12) | dependent_gradients())
def test_step_is_a_projection_of_the_summed_gradient(rows: Tensor) -> None:
    """⟨g_c, g_c⟩ = ⟨g_c, Σ gᵢ⟩, for dependent gradients as well; so it never climbs their sum."""
    gram = gram_of(rows)
    weights = config(gram)
    slope = gram @ weights
    unit = reach(weights, gram) * (reach(weights, gram) + reach(torch.ones(len(rows)), gram))
    # Of the direction at most the root of the last digits is uncertain: what the cut-off lets pass.
    assert abs(weights @ slope - slope.sum()) <= testing.ROUNDING**0.5 * unit
    assert slope.sum() >= -testing.ROUNDING * unit


@given(independent_gradients(max_losses=8))
def test_agrees_with_the_pseudo_inverse_of_independent_rows(rows: Tensor) -> None:
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.config(rows.numpy()).weights)
    norms = gram.diagonal().sqrt()
    tolerance = testing.ROUNDING * condition(gram) * (expected.abs() * norms).max()
    assert ((config(gram) - expected) * norms).abs().max() <= tolerance


@given(dependent_gradients())
@example(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
def test_agrees_with_the_pseudo_inverse_of_dependent_rows(rows: Tensor) -> None:
    """By the vectors, in units of the summed lengths; the least eigenvalue magnifies rounding."""
    gram = gram_of(rows)
    values = torch.linalg.eigvalsh(unit_rows(gram)[0])
    magnified = float((values.max() / torch.where(values > 1e-6, values, torch.inf)).max())
    expected = torch.from_numpy(reference.config(rows.numpy(), rtol=1e-7).vector)
    size = gram.diagonal().sqrt().sum()
    assert (config(gram) @ rows - expected).norm() <= 16 * testing.ROUNDING * magnified * size


@given(gradients(max_losses=2))
def test_two_losses_have_a_closed_form(rows: Tensor) -> None:
    """Whatever the angle: w₁ = (‖g₁‖ + ‖g₂‖)/2‖g₁‖, with a rounding for each of some quotients and roots."""
    gram = gram_of(rows)
    norms = gram.diagonal().sqrt()
    # Opposed ones have no direction, and of nearly opposed ones rounding decides.
    assume((norms > 0).all() and gram[0, 1] / norms.prod() > -1 + 1e-12)
    torch.testing.assert_close(config(gram), norms.sum() / (2 * norms), rtol=8 * EPS, atol=0)


@given(independent_gradients())
def test_direction_is_that_of_equal_projections(rows: Tensor) -> None:
    gram = gram_of(rows)
    ours, other = config(gram), imtl_g(gram)
    testing.assert_same_vector(ours / reach(ours, gram), other / reach(other, gram), gram)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_equal_gradients_are_summed(k: int) -> None:
    weights = config(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)))
    torch.testing.assert_close(weights, torch.ones(k).double(), rtol=testing.ROUNDING, atol=0)


@pytest.mark.parametrize("k", [2, 5])
def test_orthogonal_gradients_of_one_length_are_summed(k: int) -> None:
    torch.testing.assert_close(config(9 * torch.eye(k)), torch.ones(k).double(), rtol=testing.ROUNDING, atol=0)


@given(independent_gradients(max_losses=6), st.integers(0, 6))
def test_zero_gradient_takes_no_part(rows: Tensor, place: int) -> None:
    place = min(place, len(rows))
    weights = config(gram_of(torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])))
    assert weights[place] == 0
    rest = torch.cat([weights[:place], weights[place + 1 :]])
    testing.assert_same_vector(rest, config(gram_of(rows)), gram_of(rows))


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1])
def test_opposed_gradients_leave_no_direction(factor: float) -> None:
    row = torch.randn(5, dtype=torch.float64)
    assert not config(gram_of(torch.stack([row, -factor * row]))).any()


@pytest.mark.parametrize("k", [1, 3])
def test_zero_gradients_weigh_nothing(k: int) -> None:
    assert not config(torch.zeros(k, k)).any()


def test_one_loss_has_weight_one() -> None:
    assert config(torch.tensor([[3.0]])).tolist() == [1]


@given(independent_gradients(max_losses=8) | dependent_gradients())
def test_agrees_with_torchjd(rows: Tensor) -> None:
    """By the vector: TorchJD's takes the gradients themselves."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    gram = gram_of(rows)
    weights = config(gram)
    assume(weights.any())  # where there is no direction it gives one to the noise
    values = torch.linalg.eigvalsh(unit_rows(gram)[0])
    magnified = float((values.max() / torch.where(values > 1e-6, values, torch.inf)).max())
    size = gram.diagonal().sqrt().sum()
    assert (weights @ rows - aggregation.ConFIG()(rows)).norm() <= 16 * testing.ROUNDING * magnified * size


# What holds for every method.


@given(gradients(1, 12))
@example(torch.zeros(3, 2))
@example(torch.randn(64, 3))
@example(torch.randn(64, 100))
def test_defined(rows: Tensor) -> None:
    testing.assert_defined(config, rows)


@given(independent_gradients())
def test_order_of_the_losses_does_not_matter(rows: Tensor) -> None:
    testing.assert_permutation_equivariant(config, rows)


@given(gradients(1, 12), st.integers(-100, 100))
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram = gram_of(rows)
    assert torch.equal(config(gram * 2.0**exponent), config(gram))


@given(gradients(1, 4))
def test_not_finite_in_not_finite_out(rows: Tensor) -> None:
    testing.assert_not_finite_in_not_finite_out(config, rows)


@given(independent_gradients(max_losses=8))
def test_batch_is_a_loop(rows: Tensor) -> None:
    """On well-conditioned matrices: LAPACK's last digits depend on where in memory the matrix lies."""
    testing.assert_batch_is_a_loop(config, rows)


@given(gradients(1, 8))
def test_takes_any_dtype(rows: Tensor) -> None:
    testing.assert_takes_any_dtype(config, rows)


@pytest.mark.parametrize(("k", "batch"), [(1, ()), (2, ()), (2, (2,)), (3, (2,)), (9, ()), (32, ())])
def test_no_host_read(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read(config, k, batch)
