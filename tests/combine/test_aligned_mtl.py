"""Principal components of equal size."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine.aligned_mtl import SCALES, aligned_mtl
from distill_optim.testing import gradients, gram_of, independent_gradients
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps


def alike(rows: Tensor) -> Tensor:
    """The same rows with lengths within a factor of 2, by powers of two."""
    scaled: Tensor = rows / rows.norm(dim=1, keepdim=True).log2().round().exp2()
    return scaled


# A method that is not invariant to the lengths is compared where the Gram matrix is well-conditioned.
independent = independent_gradients(max_losses=8).map(alike)


@st.composite
def dependent_gradients(draw: st.DrawFn) -> Tensor:
    """Of exact rank, and with eigenvalues that are 0 or far from it: at most 4 dimensions of small integers."""
    k, rank = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    entries = draw(st.lists(st.integers(-2, 2), min_size=k * rank, max_size=k * rank))
    return torch.tensor(entries).double().view(k, rank)


def magnification(gram: Tensor) -> float:
    """By how much Λ^(−1/2) and √λ_min magnify a rounding error of G: λ_max over the least eigenvalue that counts."""
    values = torch.linalg.eigvalsh(gram)
    held = values > 1e-6 * values.max()
    return float(values.max() / values[held].min()) if held.any() else 1.0


@given(independent | dependent_gradients())
def test_agrees_with_the_singular_value_decomposition(rows: Tensor) -> None:
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.aligned_mtl(rows.numpy(), rtol=1e-7).weights)
    tolerance = testing.ROUNDING * magnification(gram) * len(rows)
    if gram.any():
        torch.testing.assert_close(aligned_mtl(gram), expected, rtol=0, atol=tolerance)
    else:
        assert (aligned_mtl(gram) == 1).all()


@given(independent)
def test_step_is_a_sum_of_orthogonal_vectors_of_one_length(rows: Tensor) -> None:
    """‖g‖² = K λ_min, the condition number being 1; the closest such vectors, so that all gⱼ gain, tr G^½ in sum."""
    gram = gram_of(rows)
    weights = aligned_mtl(gram)
    values = torch.linalg.eigvalsh(gram)
    tolerance = testing.ROUNDING * magnification(gram)
    assert float(weights @ gram @ weights) == pytest.approx(float(len(rows) * values[0]), rel=tolerance)
    # λ_min⁻¹ wᵀGw = 1ᵀ1 for every importance; G^½ 1 √λ_min = G w says that the rotation is the one without a turn.
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.sqrt()) @ vectors.mT
    torch.testing.assert_close(
        gram @ weights, values[0].sqrt() * root.sum(1), rtol=0, atol=float(tolerance * gram.abs().max()) * len(rows)
    )


@given(gradients(1, 12))
def test_no_component_is_lengthened(rows: Tensor) -> None:
    """B has no eigenvalue above 1, so that ‖w‖² ≤ ‖1‖² = K; K roundings."""
    assert aligned_mtl(gram_of(rows)).square().sum() <= len(rows) * (1 + testing.ROUNDING)


@given(st.lists(st.integers(-10, 10), min_size=1, max_size=8))
def test_orthogonal_gradients_become_as_long_as_the_shortest(exponents: list[int]) -> None:
    lengths = torch.tensor(exponents).double().exp2()
    weights = aligned_mtl(lengths.square().diag())
    torch.testing.assert_close(weights, lengths.min() / lengths, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_equal_gradients_are_summed(k: int) -> None:
    weights = aligned_mtl(gram_of(torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)))
    torch.testing.assert_close(weights, torch.ones(k).double(), rtol=testing.ROUNDING, atol=0)


@pytest.mark.parametrize(
    ("scale", "expected"), [("min", 1.0), ("median", 4.0), ("rmse", ((1 + 16 + 64 + 256) / 4) ** 0.5)]
)
def test_scales(scale: str, expected: float) -> None:
    """Of lengths 16, 1, 8, 4 and a zero, which has no part; the lower of the two in the middle is 4."""
    lengths = torch.tensor([16.0, 1.0, 0.0, 8.0, 4.0], dtype=torch.float64)
    weights = aligned_mtl(lengths.square().diag(), scale=scale)
    torch.testing.assert_close(weights, torch.where(lengths > 0, expected / lengths, 0), rtol=testing.ROUNDING, atol=0)


def test_scale_is_one_of_three() -> None:
    with pytest.raises(ValueError, match=r"scale='max'.*'min', 'median', 'rmse'"):
        aligned_mtl(torch.eye(2), scale="max")


@given(independent_gradients(max_losses=6).map(alike), st.integers(0, 6))
def test_zero_gradient_takes_no_part(rows: Tensor, place: int) -> None:
    place = min(place, len(rows))
    weights = aligned_mtl(gram_of(torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])))
    assert abs(weights[place]) <= testing.ROUNDING
    rest = torch.cat([weights[:place], weights[place + 1 :]])
    gram = gram_of(rows)
    torch.testing.assert_close(rest, aligned_mtl(gram), rtol=0, atol=testing.ROUNDING * magnification(gram))


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1])
def test_opposed_gradients_are_one_component(factor: float) -> None:
    """(1, −f)(1, −f)ᵀ: w = (1 − f)/(1 + f²) (1, −f), and the step is as long as the one singular value at most."""
    row = torch.randn(5, dtype=torch.float64)
    weights = aligned_mtl(gram_of(torch.stack([row, -factor * row])))
    expected = torch.tensor([1.0, -factor], dtype=torch.float64) * (1 - factor) / (1 + factor**2)
    torch.testing.assert_close(weights, expected, rtol=0, atol=testing.ROUNDING)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", SCALES)
def test_zero_gradients_weigh_one(k: int, scale: str) -> None:
    assert (aligned_mtl(torch.zeros(k, k), scale=scale) == 1).all()


@pytest.mark.parametrize(("length", "expected"), [(1e-6, [1e-6, 1.0]), (1e-8, [1.0, 0.0])])
def test_gradient_below_the_rounding_of_the_longest_is_lost(length: float, expected: list[float]) -> None:
    weights = aligned_mtl(torch.tensor([1.0, length**2], dtype=torch.float64).diag())
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@given(rows=independent | dependent_gradients())
def test_agrees_with_torchjd(scale: str, rows: Tensor) -> None:
    """Its importances are 1/K."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    gram = gram_of(rows)
    expected = aggregation.AlignedMTLWeighting(scale_mode=scale)(gram) * len(rows)
    # The root of the largest eigenvalue over the least, for the scales that lengthen.
    tolerance = testing.ROUNDING * magnification(gram) ** (1 if scale == "min" else 1.5) * len(rows)
    torch.testing.assert_close(aligned_mtl(gram, scale=scale), expected, rtol=0, atol=tolerance)


# What holds for every method.


@given(st.sampled_from(SCALES), gradients(1, 8))
@example("min", torch.zeros(3, 2))
@example("median", torch.randn(64, 3))
@example("rmse", torch.randn(64, 100))
def test_defined(scale: str, rows: Tensor) -> None:
    testing.assert_defined(partial(aligned_mtl, scale=scale), rows)


@given(independent)
def test_order_of_the_losses_does_not_matter(rows: Tensor) -> None:
    testing.assert_permutation_equivariant(aligned_mtl, rows)


@given(st.sampled_from(SCALES), gradients(1, 8), st.integers(-100, 100))
def test_power_of_two_changes_not_a_bit(scale: str, rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram = gram_of(rows)
    assert torch.equal(aligned_mtl(gram * 2.0**exponent, scale=scale), aligned_mtl(gram, scale=scale))


@given(st.sampled_from(SCALES), gradients(1, 4))
def test_not_finite_in_not_finite_out(scale: str, rows: Tensor) -> None:
    testing.assert_not_finite_in_not_finite_out(partial(aligned_mtl, scale=scale), rows)


@given(independent)
def test_batch_is_a_loop(rows: Tensor) -> None:
    """On well-conditioned matrices: LAPACK's last digits depend on where in memory the matrix lies."""
    testing.assert_batch_is_a_loop(aligned_mtl, rows)


@given(gradients(1, 8))
def test_takes_any_dtype(rows: Tensor) -> None:
    testing.assert_takes_any_dtype(aligned_mtl, rows)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("k", "batch"), [(1, ()), (2, (2,)), (3, ()), (9, ())])
def test_no_host_read(k: int, batch: tuple[int, ...], scale: str) -> None:
    testing.assert_no_host_read(partial(aligned_mtl, scale=scale), k, batch)


def test_no_host_read_of_many_losses() -> None:
    testing.assert_no_host_read(aligned_mtl, 32)
