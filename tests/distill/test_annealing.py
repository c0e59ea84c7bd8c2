"""Teacher annealing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from distill_optim.distill import anneal, kd


@given(st.integers(0, 100), st.integers(1, 100))
def test_it_goes_from_the_teacher_to_the_labels(step: int, total: int) -> None:
    share = anneal(step, total)
    assert share == (1 if step >= total else step / total)
    assert anneal(0, total) == 0


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (0, 0), (1, -4)])
def test_steps_that_are_none_are_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}, total={total}: expected a step of at least 0, and a total of"):
        anneal(step, total)


@pytest.mark.parametrize("step", range(5))
def test_mixed_losses_are_the_cross_entropy_with_mixed_targets(step: int) -> None:
    """The gradient of BAM's own form, soft targets λ y + (1 − λ) p_t."""
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    student.requires_grad_()
    labels, share = torch.tensor([0, 3, 1, 1]), anneal(step, 4)
    soft = share * F.one_hot(labels, 5) + (1 - share) * teacher.softmax(-1)
    (expected,) = torch.autograd.grad(F.cross_entropy(student, soft), student)
    loss = share * F.cross_entropy(student, labels) + (1 - share) * kd(student, teacher, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, expected)
