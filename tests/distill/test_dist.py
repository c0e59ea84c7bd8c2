"""DIST: correlations within rows and columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.distill import DIST, dist
from distill_optim.distill.dist import pearson_distance
from tests.distill.losses import EPS, matrices, normal
from tests.reference import distill as reference


@given(normal(), normal(), st.floats(1, 4))
def test_equals_the_reference(student: Tensor, teacher: Tensor, temperature: float) -> None:
    expected = torch.tensor(reference.dist(student.numpy(), teacher.numpy(), temperature), dtype=torch.float64)
    values = torch.stack(dist(student, teacher, temperature))
    # Rounding of the means, relative to spreads of about 10⁻³.
    torch.testing.assert_close(values, expected, rtol=0, atol=100 * EPS * 1e3 * temperature**2)


@given(normal(), normal(), st.floats(0.01, 100), st.floats(-10, 10), st.sampled_from([0, 1]))
def test_no_scale_and_no_shift_shows(a: Tensor, b: Tensor, scale: float, shift: float, dim: int) -> None:
    expected = pearson_distance(a, b, dim)
    # A shift of 10 over a spread of about 0.01 · 0.1.
    torch.testing.assert_close(pearson_distance(scale * a + shift, b, dim), expected, rtol=0, atol=100 * EPS * 1e4)
    torch.testing.assert_close(pearson_distance(a, scale * b + shift, dim), expected, rtol=0, atol=100 * EPS * 1e4)


@given(matrices(), matrices())
def test_it_lies_between_0_and_2(student: Tensor, teacher: Tensor) -> None:
    parts = dist(student, teacher)
    assert isinstance(parts, DIST)
    assert all(-100 * EPS <= part <= 2 + 100 * EPS for part in parts)


def test_what_is_constant_has_distance_1_and_no_gradient() -> None:
    student = torch.zeros(3, 7, requires_grad=True)  # a head that starts at 0
    inter, intra = dist(student, torch.randn(3, 7))
    (inter + intra).backward()
    assert inter == intra == 1
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_columns_of_small_probabilities_count() -> None:
    """The authors' 10⁻⁸ in the denominator would make of the perfect correlation of such a column a distance of 1."""
    logits = torch.randn(8, 3, dtype=torch.float64) + torch.tensor([0.0, 0.0, -25.0], dtype=torch.float64)
    assert dist(logits, logits).intra < 1e-12


def test_logits_that_are_no_matrix_are_refused() -> None:
    z = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"student: expected logits of shape \(N, C\), got \(2, 3, 5\); flatten"):
        dist(z, z)
