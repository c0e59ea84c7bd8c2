"""What holds for every loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_optim import DOTSGD, MoKDSGD, distill
from tests.distill.losses import LOSSES, Loss
from tests.helpers import no_waiting

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
same_shapes = pytest.mark.parametrize(
    "loss", [pytest.param(one, id=name) for name, one in LOSSES.items() if one.student == one.teacher]
)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@every_loss
def test_gradients_are_those_of_differences(loss: Loss) -> None:
    student, teacher = loss.draw()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), [student])


@every_loss
def test_a_teacher_is_a_constant(loss: Loss) -> None:
    student, teacher = loss.draw()
    value = torch.stack(loss(student, teacher.requires_grad_())).sum()
    value.backward()
    assert student.grad is not None
    assert teacher.grad is None


@same_shapes
def test_it_is_zero_for_a_student_like_its_teacher(loss: Loss) -> None:
    _, teacher = loss.draw()
    student = teacher.clone().requires_grad_()
    values = torch.stack(loss(student, teacher))
    values.sum().backward()
    assert student.grad is not None
    # Sums of some dozen numbers of size 1, times T² = 16.
    assert (values.abs() < 1e-13).all()
    assert (student.grad.abs() < 1e-13).all()


@every_loss
def test_it_is_positive_for_another(loss: Loss) -> None:
    assert all(value > 0.01 for value in loss(*loss.draw()))


@devices
@halves
@every_loss
def test_half_precision_is_computed_in_float32(loss: Loss, dtype: torch.dtype, device: str) -> None:
    """To the last bit what the same numbers give in float32, and the gradient but for its own rounding."""
    student, teacher = loss.draw(dtype, device)
    wide = student.detach().float().requires_grad_()
    values, expected = loss(student, teacher), loss(wide, teacher.float())
    assert all(value.dtype == torch.float32 for value in values)
    assert all(map(torch.equal, values, expected))
    torch.stack(values).sum().backward()
    torch.stack(expected).sum().backward()
    assert student.grad is not None
    assert wide.grad is not None
    assert torch.equal(student.grad, wide.grad.to(dtype))


@devices
@every_loss
def test_autocast_changes_nothing(loss: Loss, device: str) -> None:
    student, teacher = loss.draw(torch.float32, device)
    expected = loss(student, teacher)
    with torch.autocast(device, torch.bfloat16):
        values = loss(student, teacher)
    assert all(map(torch.equal, values, expected))


@pytest.mark.cuda
@every_loss
def test_no_loss_waits_for_a_gpu(loss: Loss) -> None:
    student, teacher = loss.draw(torch.float32, "cuda")
    torch.stack(loss(student, teacher)).sum().backward()
    with no_waiting():
        torch.stack(loss(student, teacher)).sum().backward()


@every_loss
def test_a_student_and_a_teacher_of_two_dtypes(loss: Loss) -> None:
    student, teacher = loss.draw()
    teacher = teacher.bfloat16()
    assert all(map(torch.equal, loss(student.float(), teacher), loss(student.float(), teacher.float())))


@same_shapes
def test_another_shape_is_refused(loss: Loss) -> None:
    student, teacher = loss.draw()
    with pytest.raises(ValueError, match=r"teacher: .*\(.*but the student's is \(.*; "):
        loss(student, teacher[..., :-1])


@every_loss
def test_what_is_no_tensor_of_numbers_is_refused(loss: Loss) -> None:
    student, teacher = loss.draw()
    with pytest.raises(
        TypeError, match=r"(teacher|logits): expected floating-point numbers, got torch.int64; not labels"
    ):
        loss(student, teacher.long())
    with pytest.raises(TypeError, match=r"(student|logits): expected a tensor, got tuple; take its logits or features"):
        loss((student,), teacher)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("make", [DOTSGD, MoKDSGD])
@every_loss
def test_what_comes_out_goes_into_step(loss: Loss, make: type[DOTSGD] | type[MoKDSGD]) -> None:
    _, teacher = loss.draw(torch.float32)
    net = nn.Linear(loss.student[-1], loss.student[-1])
    x = torch.randn(loss.student)
    values = loss(net(x), teacher)
    optimizer = make(net.parameters(), lr=0.01, losses=1 + len(values))
    before = net.weight.detach().clone()
    optimizer.step([net(x).square().mean(), *values])
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    z, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    message = f"temperature={temperature}: expected a positive number"
    for call in (
        lambda: distill.kd(z, z, temperature),
        lambda: distill.KDLoss(temperature),
        lambda: distill.dkd(z, z, labels, temperature),
        lambda: distill.dist(z, z, temperature),
        lambda: distill.generalized_jsd(z, z, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=message):
            call()
