"""The theorems about the bargaining solution: every loss contributes the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine import nash_mtl
from distill_optim.testing import gram_of, reach, rounding
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps

# What is added to the unit rows' diagonal so that weights stay bounded where a combination vanishes.
PROXIMAL = 1e-13

ANY = (
    testing.gradients(max_losses=16)
    | testing.conflicting_gradients(max_losses=16)
    | testing.nearly_stationary_gradients(max_losses=16)
    | testing.badly_scaled_gradients(max_losses=16)
)
# 0 is not in their hull, so that there is a solution.
SOLVABLE = testing.independent_gradients() | testing.slightly_conflicting_gradients(max_losses=12)
OPPOSED = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3]], dtype=torch.float64)
# What TorchJD 0.18 solves to three steps of twenty, see test_torchjd.py.
LONG_BESIDE_SHORT = torch.tensor([[1000.0, 0, 0], [-0.5, 1, 0], [0, 0.3, 0.7]], dtype=torch.float64)


def contributions(weights: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """wᵢ ⟨gᵢ, d⟩ on G/‖G‖_F, which the solution makes 1; and wᵢ ‖gᵢ‖ Σⱼ wⱼ ‖gⱼ‖, of which rounding is a share."""
    g = gram / gram.diagonal().max()
    g = g / torch.linalg.matrix_norm(g)
    return weights * (g @ weights), weights * g.diagonal().sqrt() * reach(weights, g)


@given(ANY)
@example(OPPOSED)
@example(LONG_BESIDE_SHORT)
def test_every_loss_contributes_one(rows: Tensor) -> None:
    """G w = 1/w on G/‖G‖_F, up to the proximal term, beside which rounding is small.

    It makes the residual 1e-13 wᵢ²‖gᵢ‖², which is at most 1e-13 of wᵢ‖gᵢ‖ Σⱼ wⱼ‖gⱼ‖. Where 0 is in the hull that
    product is of the order of 1e13.
    """
    gram = gram_of(rows)
    assume(gram.diagonal().min() > 0)
    product, unit = contributions(nash_mtl(gram), gram)
    assert ((product - 1).abs() <= (PROXIMAL + rounding(len(rows))) * (1 + unit)).all()


@given(testing.independent_gradients(max_losses=5) | testing.slightly_conflicting_gradients(max_losses=5))
@example(OPPOSED)
@example(LONG_BESIDE_SHORT)
def test_weights_are_those_of_decimal_arithmetic(rows: Tensor) -> None:
    """Every weight relative to itself, up to 1e-13 and rounding times the condition of the unit gradients' products.

    That is 1e4 for independent ones at most, see there, and 1e6 for the opposed ones.
    """
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.nash_mtl(gram.numpy()))
    torch.testing.assert_close(nash_mtl(gram), expected, rtol=1e6 * (PROXIMAL + rounding(len(rows))), atol=0)


@given(ANY | testing.stationary_gradients(max_losses=16) | testing.gradients(33, 64))
def test_weights_are_positive(rows: Tensor) -> None:
    testing.assert_positive(nash_mtl(gram_of(rows)))


@given(ANY)
def test_unit_of_a_loss_does_not_matter(rows: Tensor) -> None:
    """wᵢ is inversely proportional to the length of gᵢ, but for the common factor."""
    testing.assert_invariant_to_row_scaling("nash_mtl", rows)


@given(SOLVABLE, st.data())
def test_weights_go_as_inverse_lengths(rows: Tensor, data: st.DataObject) -> None:
    k, gram = len(rows), gram_of(rows)
    c = torch.tensor(data.draw(st.lists(st.integers(-20, 20), min_size=k, max_size=k))).double().exp2()
    scaled = gram * torch.outer(c, c)
    # ‖G‖_F stands in the unit of the weights.
    unit = (torch.linalg.matrix_norm(scaled / scaled.max()) * scaled.max()).sqrt()
    before = (torch.linalg.matrix_norm(gram / gram.max()) * gram.max()).sqrt()
    torch.testing.assert_close(nash_mtl(scaled) * c / unit, nash_mtl(gram) / before, rtol=1e-10, atol=0)


@given(SOLVABLE)
def test_maximises_the_product_of_the_improvements(rows: Tensor) -> None:
    """Of all steps of its length: Σ log ⟨gᵢ, d⟩ falls in every direction along the sphere (claim 3.1).

    The gradient of Σ log ⟨gᵢ, d⟩ is Σ gᵢ/⟨gᵢ, d⟩ = Σ wᵢgᵢ = d, so that it has no part along the sphere.
    """
    gram = gram_of(rows)
    weights = nash_mtl(gram)
    improvements = gram @ weights
    assert (improvements > 0).all()
    step, rise = weights @ rows, (1 / improvements) @ rows
    cosine = step @ rise / (step.norm() * rise.norm())
    assert 1 - cosine <= 1e-12


@given(testing.stationary_gradients(2, 12))
def test_step_stops_where_zero_is_a_positive_combination(rows: Tensor) -> None:
    """There is no solution; weights of 1e6 at most in unit rows, and a step that is nothing beside them.

    In unit rows z solves Cz + 1e-13 z = 1/z. Multiplied by z that is zᵀCz + 1e-13 ‖z‖² = K, hence ‖z‖ ≤ √K · 3.2e6 and
    ‖Σ zᵢuᵢ‖ ≤ √K. Multiplied by v ≥ 0 with Cv = 0 it is 1e-13 vᵀz = vᵀ(1/z), so that some z is 3.2e6 at least.
    """
    gram, k = gram_of(rows), len(rows)
    assume(gram.diagonal().min() > 0)
    weights = nash_mtl(gram)
    unit = gram.diagonal().max()
    z = weights * gram.diagonal().sqrt() / (torch.linalg.matrix_norm(gram / unit) * unit).sqrt()
    # Rounding makes 1e-13 of C as much as a tenth more or less.
    assert z.norm() <= 1.1 * (k / PROXIMAL) ** 0.5
    assert z.max() >= PROXIMAL**-0.5 / 1.1
    assert weights @ gram @ weights <= 1.1 * k * PROXIMAL * reach(weights, gram) ** 2


def test_opposed_gradients() -> None:
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    weights = nash_mtl(gram)
    assert torch.equal(weights, weights[:1].expand(2))
    assert 1e6 < weights[0] < 1e7


@given(testing.independent_gradients(max_losses=2))
def test_two_losses_have_a_closed_form(rows: Tensor) -> None:
    """Unit gradients weigh the same, whatever their angle: w² (1 + cos) = 1; and a gradient inversely to its length."""
    gram = gram_of(rows)
    norms = gram.diagonal().sqrt()
    unit = gram.diagonal().max()
    frobenius = (torch.linalg.matrix_norm(gram / unit) * unit).sqrt()
    expected = frobenius / norms * (1 + gram[0, 1] / norms.prod()).rsqrt()
    torch.testing.assert_close(nash_mtl(gram), expected, rtol=1e-12, atol=0)


@given(SOLVABLE, st.integers(0, 12))
def test_zero_gradient_weighs_as_one_of_unit_length(rows: Tensor, place: int) -> None:
    """At right angles to all others, whose weights it leaves alone; a unit is the length of the longest."""
    place = min(place, len(rows))
    gram = gram_of(rows)
    weights = nash_mtl(gram_of(torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])))
    others = torch.cat([weights[:place], weights[place + 1 :]])
    torch.testing.assert_close(others, nash_mtl(gram), rtol=rounding(len(rows)) * 1e4, atol=0)
    expected = torch.linalg.matrix_norm(gram / gram.diagonal().max()).sqrt()
    torch.testing.assert_close(weights[place], expected, rtol=PROXIMAL + rounding(len(rows)), atol=0)


@given(ANY, st.integers(-100, 100))
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30."""
    gram = gram_of(rows)
    assert torch.equal(nash_mtl(gram * 4.0 ** (exponent // 2)), nash_mtl(gram))


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_dtypes_batches_and_what_is_not_finite(k: int) -> None:
    rows = torch.randn(k, 5)
    testing.assert_takes_any_dtype("nash_mtl", rows)
    testing.assert_batch_is_a_loop("nash_mtl", rows)
    testing.assert_not_finite_in_not_finite_out("nash_mtl", rows)


@given(SOLVABLE)
def test_order_of_the_losses_does_not_matter(rows: Tensor) -> None:
    testing.assert_permutation_equivariant("nash_mtl", rows)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32, 64])
def test_equal_gradients_weigh_the_same(k: int) -> None:
    """w K w = K, as ‖G‖_F = K ‖g‖²: 1 each."""
    weights = nash_mtl(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)))
    torch.testing.assert_close(weights, torch.ones(k).double(), rtol=PROXIMAL + rounding(k), atol=0)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_nothing_is_read_on_the_host(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read("nash_mtl", k, batch)
