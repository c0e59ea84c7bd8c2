"""Hints and attention transfer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim.distill import attention_transfer, hint
from tests.distill.losses import EPS
from tests.reference import distill as reference


def maps(channels: int) -> st.SearchStrategy[Tensor]:
    return arrays(np.float64, (2, channels, 3, 4), elements=st.floats(-10, 10)).map(torch.from_numpy)


@given(maps(3), maps(3))
def test_a_hint_equals_the_reference(student: Tensor, teacher: Tensor) -> None:
    expected = torch.tensor(reference.hint(student.numpy(), teacher.numpy()), dtype=torch.float64)
    torch.testing.assert_close(hint(student, teacher), expected, rtol=100 * EPS, atol=0)  # a sum of 72 squares


@given(maps(3), maps(5))
def test_attention_equals_the_reference(student: Tensor, teacher: Tensor) -> None:
    # Squares of squares that stay in float64.
    assume(min(float(x.abs().amax((1, 2, 3)).min()) for x in (student, teacher)) > 1e-50)
    expected = torch.tensor(reference.attention_transfer(student.numpy(), teacher.numpy()), dtype=torch.float64)
    torch.testing.assert_close(attention_transfer(student, teacher), expected, rtol=0, atol=100 * EPS)


@given(maps(3), maps(5), st.floats(0.01, 100) | st.floats(-100, -0.01))
def test_a_map_times_a_number_is_the_same_map(student: Tensor, teacher: Tensor, scale: float) -> None:
    assume(student.abs().amax((1, 2, 3)).min() > 1e-50)  # squares of squares that stay in float64
    expected = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer(scale * student, teacher), expected, rtol=0, atol=100 * EPS)


def test_a_dead_map_is_finite() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = attention_transfer(student, torch.rand(2, 3, 4, 4))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(value)
    assert (student.grad == 0).all()


def test_positions_that_differ_are_refused() -> None:
    small, large = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"teacher: batch and positions \(2, 8, 8\), .* \(2, 4, 4\); resize one"):
        attention_transfer(small, large)
    with pytest.raises(ValueError, match=r"student: expected features of shape \(N, C, ...\), got \(2, 3\)"):
        attention_transfer(small[:, :, 0, 0], small)


def test_a_hint_of_another_width_names_the_mend() -> None:
    with pytest.raises(ValueError, match="give the student's through a layer that maps its width to the teacher's"):
        hint(torch.rand(2, 3), torch.rand(2, 4))
