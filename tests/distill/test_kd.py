"""Knowledge distillation of logits, and logits that are standardised before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.distill import KDLoss, kd, standardize
from tests.distill.losses import EPS, matrices, normal, temperatures
from tests.reference import distill as reference


def close(value: Tensor, expected: float | Tensor, size: float = 1.0) -> None:
    """Up to rounding of sums of a few dozen numbers of a size."""
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=100 * EPS * size)


@given(matrices(), matrices(), temperatures)
def test_equals_the_reference(student: Tensor, teacher: Tensor, temperature: float) -> None:
    size = 20 * temperature  # T² times logits of up to 20/T
    close(kd(student, teacher, temperature), reference.kd(student.numpy(), teacher.numpy(), temperature), size)


@given(matrices(), matrices(), temperatures)
def test_is_torchs_batchmean_times_the_square(student: Tensor, teacher: Tensor, temperature: float) -> None:
    log_q, log_p = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    expected = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    close(kd(student, teacher, temperature), expected, 20 * temperature)
    assert torch.equal(KDLoss(temperature)(student, teacher), kd(student, teacher, temperature))


@given(matrices(), matrices(), temperatures)
def test_is_not_negative(student: Tensor, teacher: Tensor, temperature: float) -> None:
    assert kd(student, teacher, temperature) >= -100 * EPS * 20 * temperature


@given(matrices(), matrices(), matrices(4, 1), matrices(4, 1), temperatures)
def test_shifted_logits_are_the_same_logits(
    student: Tensor, teacher: Tensor, up: Tensor, down: Tensor, temperature: float
) -> None:
    close(kd(student + up, teacher + down, temperature), kd(student, teacher, temperature), 80 * temperature)


@given(matrices(6, 5), matrices(6, 5))
def test_dimensions_before_the_last_count_examples(student: Tensor, teacher: Tensor) -> None:
    close(kd(student.view(2, 3, 5), teacher.view(2, 3, 5)), kd(student, teacher), 80)


def test_at_high_temperature_it_matches_centred_logits() -> None:
    """Hinton et al., eq. 4: T² KL → ‖centred difference‖² / 2C."""
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    difference = student - teacher
    expected = (difference - difference.mean(-1, keepdim=True)).square().sum(-1).mean() / (2 * 5)
    # The next term of the expansion is smaller by about |z|/T.
    torch.testing.assert_close(kd(student, teacher, 1e4), expected, rtol=1e-3, atol=0)


@given(matrices(), matrices())
def test_classes_ruled_out_on_both_sides_are_not_there(student: Tensor, teacher: Tensor) -> None:
    ruled_out = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    padded = torch.cat([student, ruled_out], 1).requires_grad_()
    value = kd(padded, torch.cat([teacher, ruled_out], 1))
    close(value.detach(), kd(student, teacher), 80)
    value.backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all()
    assert (padded.grad[:, 5:] == 0).all()


def test_a_teacher_of_which_the_best_logits_were_kept() -> None:
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64).index_fill(1, torch.tensor([1, 3]), -torch.inf)
    value = kd(student, teacher, 1.0)
    close(value.detach(), reference.kd(student.detach().numpy(), teacher.numpy(), 1.0))
    (gradient,) = torch.autograd.grad(value, student)
    close(gradient, (student.softmax(-1) - teacher.softmax(-1)).detach() / 4)


@given(normal())
def test_standardised_logits_equal_the_reference(logits: Tensor) -> None:
    close(standardize(logits), torch.from_numpy(reference.standardize(logits.numpy())))


@given(normal(), st.floats(0.01, 100), st.floats(-100, 100))
def test_standardised_logits_have_no_scale_and_no_shift(logits: Tensor, scale: float, shift: float) -> None:
    # A shift of 100 over a spread of about 0.01 · 0.1.
    torch.testing.assert_close(standardize(scale * logits + shift), standardize(logits), rtol=0, atol=100 * EPS * 1e5)


def test_constant_logits_give_zero_and_no_gradient() -> None:
    logits = torch.full((2, 3), 0.1, dtype=torch.float32, requires_grad=True)
    value = standardize(logits)
    (value * torch.randn(2, 3)).sum().backward()
    assert (value == 0).all()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_standardisation_reaches_the_loss() -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    value = kd(standardize(student), standardize(teacher), 2.0)
    z_s, z_t = (reference.standardize(z.numpy()) for z in (student, teacher))
    close(value, reference.kd(z_s, z_t, 2.0))
    close(kd(standardize(3 * student + 1), standardize(teacher / 7), 2.0), value)
