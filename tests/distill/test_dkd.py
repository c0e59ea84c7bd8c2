"""Decoupled knowledge distillation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.distill import DKD, dkd, kd
from tests.distill.losses import EPS, matrices, temperatures
from tests.reference import distill as reference

classes = st.lists(st.integers(0, 4), min_size=4, max_size=4).map(torch.tensor)


def rounding(temperature: float) -> float:
    """T² times sums of a few dozen logarithms of size 20/T."""
    return 100 * EPS * 20 * temperature


@given(matrices(largest=5), matrices(largest=5), classes, temperatures)
def test_equals_the_reference(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> None:
    expected = reference.dkd(student.numpy(), teacher.numpy(), labels.numpy(), temperature)
    # The reference takes 1 − p: a relative error of ε/(1 − p), where 1 − p is at least e^(−10/T)/5 or so.
    atol = temperature**2 * EPS * 5 * torch.tensor(10 / temperature).exp().item() + rounding(temperature)
    torch.testing.assert_close(
        torch.stack(dkd(student, teacher, labels, temperature)),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-6,
        atol=atol,
    )


@given(matrices(rows=1), matrices(rows=1), st.integers(0, 4), temperatures)
def test_of_one_example_kd_is_the_target_part_and_a_share_of_the_other(
    student: Tensor, teacher: Tensor, label: int, temperature: float
) -> None:
    """KD = TCKD + (1 − p_t) NCKD, eq. 7."""
    target, non_target = dkd(student, teacher, torch.tensor([label]), temperature)
    p = (teacher / temperature).softmax(-1)
    others = p.sum() - p[0, label]
    expected = kd(student, teacher, temperature)
    torch.testing.assert_close(target + others * non_target, expected, rtol=1e-12, atol=rounding(temperature))


@given(matrices(), matrices(), classes, matrices(4, 1), temperatures)
def test_the_target_logit_is_nothing_to_the_other_part(
    student: Tensor, teacher: Tensor, labels: Tensor, up: Tensor, temperature: float
) -> None:
    moved = student.scatter_add(1, labels[:, None], up)
    before, after = (dkd(s, teacher, labels, temperature).non_target for s in (student, moved))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=4 * rounding(temperature))


@given(matrices(), matrices(), classes, temperatures)
def test_neither_part_is_negative(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> None:
    parts = dkd(student, teacher, labels, temperature)
    assert isinstance(parts, DKD)
    assert all(part >= -rounding(temperature) for part in parts)


def test_a_teacher_that_is_all_but_certain_has_finite_parts() -> None:
    """1 − p_t is 0 in float32 for a margin of 100; its logarithm is not."""
    student = torch.zeros(1, 3, requires_grad=True)
    parts = dkd(student, torch.tensor([[100.0, 0.0, 1.0]]), torch.tensor([0]), temperature=1.0)
    torch.stack(parts).sum().backward()
    assert student.grad is not None
    assert torch.isfinite(torch.stack([*parts, *student.grad.flatten()])).all()
    assert parts.non_target > 0.1


def test_two_classes_have_no_other_part() -> None:
    parts = dkd(torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    assert parts.non_target == 0


def test_labels_that_do_not_fit_are_refused() -> None:
    z = torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"labels: expected class indices, got torch.float32; .*argmax"):
        dkd(z, z, z.softmax(-1))
    with pytest.raises(
        ValueError, match=r"labels: shape \(4, 1\) for logits of shape \(4, 5\); expected one class per"
    ):
        dkd(z, z, torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="of at least two"):
        dkd(z[:, :1], z[:, :1], torch.zeros(4, dtype=torch.long))
