"""Relational knowledge distillation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.distill import RKD, rkd
from tests.distill.losses import EPS, matrices, normal
from tests.reference import distill as reference


@given(normal(5, 3), normal(5, 4))
def test_equals_the_reference(student: Tensor, teacher: Tensor) -> None:
    expected = torch.tensor(reference.rkd(student.numpy(), teacher.numpy()), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(rkd(student, teacher)), expected, rtol=0, atol=100 * EPS)


@given(normal(5, 3), normal(5, 3), st.floats(0.01, 100), st.floats(-10, 10), st.integers(0, 2**31))
def test_moved_turned_and_scaled_it_is_the_same(
    student: Tensor, teacher: Tensor, scale: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    moved = torch.stack(rkd(scale * student @ turn + shift, teacher))
    # Coordinates of 10 over distances of about 0.01 · 0.1.
    torch.testing.assert_close(moved, torch.stack(rkd(student, teacher)), rtol=0, atol=100 * EPS * 1e5)


@given(matrices(5, 3), matrices(5, 3))
def test_neither_part_is_negative(student: Tensor, teacher: Tensor) -> None:
    parts = rkd(student, teacher)
    assert isinstance(parts, RKD)
    assert all(part >= 0 for part in parts)


def test_points_that_coincide_are_finite() -> None:
    student = torch.ones(4, 3, dtype=torch.float64)
    student[3] = 0
    for points in (student, torch.ones(4, 3, dtype=torch.float64)):
        points.requires_grad_()
        value = torch.stack(rkd(points, torch.randn(4, 3, dtype=torch.float64))).sum()
        (gradient,) = torch.autograd.grad(value, points)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_embeddings_that_do_not_fit_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(
        ValueError, match=r"teacher: batch \(5,\), but the student's is \(4,\); both need the same examples"
    ):
        rkd(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"teacher: expected embeddings of shape \(N, D\), .*got \(4, 3, 2\); pool or"):
        rkd(x, torch.randn(4, 3, 2))
    with pytest.raises(ValueError, match=r"student: expected embeddings of shape \(N, D\), N at least 2, got \(1, 3\)"):
        rkd(x[:1], x[:1])
