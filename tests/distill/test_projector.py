"""The orthonormal projector between two widths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from distill_optim.distill import SubspaceProjector
from distill_optim.distill.projector import orthonormal
from tests.distill.losses import EPS
from tests.reference import distill as reference

widths = pytest.mark.parametrize(("student", "teacher"), [(3, 7), (7, 3), (4, 4), (1, 1)])


def defect(p: torch.Tensor) -> float:
    """How far the shorter side is from orthonormal."""
    q = p.detach() if p.shape[0] >= p.shape[1] else p.detach().mT
    return float((q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max())


@given(st.integers(1, 6), st.integers(0, 6), st.floats(0, 10), st.integers(0, 2**31))
def test_columns_of_the_cayley_transform(k: int, more: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(k + more, k, generator=generator, dtype=torch.float64)
    q = orthonormal(x)
    # S has a condition of at most 1 + ‖B‖/2 + ‖C‖²/4, so some 10⁴.
    atol = 100 * EPS * 1e4
    assert defect(q) < atol
    torch.testing.assert_close(q, torch.from_numpy(reference.orthonormal(x.numpy())), rtol=0, atol=atol)


def test_gradients_of_the_transform_are_those_of_differences() -> None:
    assert torch.autograd.gradcheck(orthonormal, [torch.randn(5, 3, dtype=torch.float64, requires_grad=True)])


@widths
def test_equals_the_reference(student: int, teacher: int) -> None:
    projector = SubspaceProjector(student, teacher).double()
    assert projector.weight.shape == (teacher, student)
    assert defect(projector.weight) < 100 * EPS
    z_s, z_t = torch.randn(6, student, dtype=torch.float64), torch.randn(6, teacher, dtype=torch.float64)
    expected = reference.projected(z_s.numpy(), z_t.numpy(), projector.weight.detach().numpy())
    torch.testing.assert_close(projector(z_s, z_t), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=100 * EPS)


def test_a_narrower_student_keeps_its_distances() -> None:
    projector = SubspaceProjector(3, 7).double()
    z = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.pdist(z @ projector.weight.mT), torch.pdist(z))


def test_tokens_and_maps_are_vectors() -> None:
    projector = SubspaceProjector(3, 7)
    tokens, target = torch.randn(2, 20, 3), torch.randn(2, 20, 7)
    expected = projector(tokens.flatten(0, 1), target.flatten(0, 1))
    torch.testing.assert_close(projector(tokens, target), expected)
    maps = [x.mT.reshape(2, -1, 4, 5) for x in (tokens, target)]
    torch.testing.assert_close(projector(*maps), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@widths
def test_parameters_in_half_precision_give_an_orthonormal_projection(
    student: int, teacher: int, dtype: torch.dtype
) -> None:
    """In float32 to its rounding, and the same with features in half precision and under autocast."""
    projector = SubspaceProjector(student, teacher).to(dtype)
    z_s, z_t = torch.randn(6, student, dtype=dtype), torch.randn(6, teacher, dtype=dtype)
    loss, weight = projector(z_s, z_t), projector.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projector(z_s, z_t), loss)
        assert torch.equal(projector.weight, weight)
    assert weight.dtype == loss.dtype == torch.float32
    assert defect(weight) < 1e-5
    loss.backward()
    assert projector.free.grad is not None
    assert projector.free.grad.dtype == dtype
    assert torch.isfinite(projector.free.grad).all()


@widths
def test_a_start_is_random_and_repeatable(student: int, teacher: int) -> None:
    projectors = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        projectors.append(SubspaceProjector(student, teacher))
    first, second, third = (projector.weight for projector in projectors)
    assert torch.equal(first, second)
    assert max(student, teacher) == 1 or not torch.equal(first, third)


@pytest.mark.parametrize(("n", "k"), [(512, 128), (512, 512), (256, 255)])
def test_a_start_is_far_from_what_cannot_be_reached(n: int, k: int) -> None:
    """There S would have no bound; its norm stays beneath some units."""
    x = SubspaceProjector(k, n).free.detach()
    b, c = x[:k] - x[:k].mT, x[k:]
    assert torch.linalg.matrix_norm(torch.eye(k) - b / 2 + c.mT @ c / 4, 2) < 4


def test_the_state_dict_comes_back() -> None:
    projector, other = SubspaceProjector(3, 7), SubspaceProjector(3, 7)
    other.load_state_dict(copy.deepcopy(projector.state_dict()))
    assert list(projector.state_dict()) == ["free"]
    assert torch.equal(other.weight, projector.weight)
    assert torch.equal(copy.deepcopy(projector).weight, projector.weight)


@pytest.mark.parametrize("make", [DOTSGD, DOTAdamW, MoKDSGD, MoKDAdamW])
@pytest.mark.parametrize(("student", "teacher"), [(6, 10), (10, 6)])
def test_training_stays_orthonormal_and_brings_the_features_together(make: Any, student: int, teacher: int) -> None:
    torch.manual_seed(0)
    net, known = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, student)), nn.Linear(5, teacher)
    projector, x = SubspaceProjector(student, teacher), torch.randn(32, 5)
    groups = [{"params": net.parameters()}, {"params": projector.parameters(), "weight_decay": 0.0}]
    optimizer = make(groups, lr=0.01 if "Adam" in make.__name__ else 0.3, weight_decay=1e-3)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        z = net(x)
        _, distill = optimizer.step([(z[:, 0] - x[:, 0]).square().mean(), projector(z, known(x))])
        history.append(distill.item())
    assert history[-1] < 0.8 * history[0]
    assert defect(projector.weight) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    projector = SubspaceProjector(3, 7)
    with pytest.raises(ValueError, match="student: 4 channels, but student_width=3; construct it for that width"):
        projector(torch.randn(2, 4), torch.randn(2, 7))
    with pytest.raises(ValueError, match="teacher: 5 channels, but teacher_width=7"):
        projector(torch.randn(2, 3), torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"teacher: batch and positions \(2, 4\), but the student's is \(2, 5\); pool"):
        projector(torch.randn(2, 5, 3), torch.randn(2, 4, 7))
    with pytest.raises(ValueError, match="student_width=0, teacher_width=7: expected at least 1"):
        SubspaceProjector(0, 7)
