"""Task adaptors: one student, several teachers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distill_optim import DOTSGD, MoKDSGD
from distill_optim.distill import TaskAdaptors, features
from distill_optim.distill.adaptors import normalized_distance
from distill_optim.distill.inputs import channels_last
from tests.distill.losses import EPS
from tests.reference import distill as reference


def conv(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten(), nn.Dropout()
    )


def taught(adaptor: Any = None) -> tuple[nn.Sequential, dict[str, nn.Module], TaskAdaptors, Tensor]:
    torch.manual_seed(0)
    student, x = conv(3), torch.randn(4, 1, 6, 7)
    teachers: dict[str, nn.Module] = {"left": conv(5), "right": conv(3)}
    options = {} if adaptor is None else {"adaptor": adaptor}
    return student, teachers, TaskAdaptors(student, teachers, ["0", "3"], x, **options), x


@given(st.integers(0, 2**31))
def test_the_distance_equals_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 4, 2, 5, generator=generator, dtype=torch.float64)
    value = normalized_distance(channels_last(student), channels_last(teacher))
    expected = torch.tensor(reference.normalized_distance(student.numpy(), teacher.numpy()), dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=0, atol=100 * EPS)  # sums of 40 numbers of size 1
    assert 0 <= value <= 4
    assert normalized_distance(teacher, teacher) == 0


def test_the_distances_are_sums_over_the_layers_after_convolutions_of_size_one() -> None:
    student, teachers, adaptors, x = taught()
    with features(student, ["0", "3"]) as seen:
        student(x)
    values = adaptors(seen, x)
    assert list(values) == ["left", "right"]
    for task, teacher in teachers.items():
        expected = torch.zeros(())
        for i, layer in enumerate(["0", "3"]):
            weight = adaptors.adaptors[task].get_submodule(str(i)).weight
            assert isinstance(weight, Tensor)
            adapted = nn.functional.conv2d(seen[layer], weight[:, :, None, None])
            with features(teacher, [layer]) as known, torch.no_grad():
                teacher(x)
            f_s, f_t = (f / (f.square().sum(1, keepdim=True) + 1e-6).sqrt() for f in (adapted, known[layer]))
            expected = expected + (f_s - f_t).square().sum(1).mean()
        torch.testing.assert_close(values[task], expected)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)], ids=["vectors", "tokens"])
def test_vectors_and_tokens(shape: tuple[int, ...]) -> None:
    student, teacher, x = nn.Sequential(nn.Linear(6, 3)), nn.Sequential(nn.Linear(6, 5)), torch.randn(shape)
    adaptors = TaskAdaptors(student, {"task": teacher}, ["0"], x)
    with features(student, ["0"]) as seen:
        student(x)
    (linear,) = adaptors.adaptors["task"].children()
    expected = normalized_distance(linear(seen["0"]), teacher(x))
    assert torch.equal(adaptors(seen, x)["task"], expected)
    assert linear.bias is None
    assert tuple(linear.weight.shape) == (5, 3)


def test_gradients_are_those_of_differences() -> None:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(normalized_distance, [student.requires_grad_(), teacher])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_distance_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 3, 4).to(dtype)
    value = normalized_distance(student, teacher)
    assert torch.equal(value, normalized_distance(student.float(), teacher.float()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_autocast(device: str) -> None:
    student, _, adaptors, x = taught()
    student, adaptors, x = student.to(device), adaptors.to(device), x.to(device)
    seen = features(student, ["0", "3"])
    student(x)
    expected = adaptors(seen, x)
    with torch.autocast(device, torch.bfloat16):
        student(x)
        values = adaptors(seen, x)
    for task, value in values.items():
        assert value.dtype == torch.float32
        # Layers in bfloat16, three digits; distances between 0 and 4.
        torch.testing.assert_close(value, expected[task], rtol=0, atol=0.05)


def test_teachers_stay_as_they_are() -> None:
    """The authors' code has them in training mode, and the statistics of their batch norms drift."""
    student, teachers, adaptors, x = taught()
    before = copy.deepcopy({task: teacher.state_dict() for task, teacher in teachers.items()})
    adaptors.train()
    for teacher in teachers.values():
        teacher.train()
    with features(student, ["0", "3"]) as seen:
        student(x)
    first, second = adaptors(seen, x), adaptors(seen, x)
    torch.stack(list(first.values())).sum().backward()
    assert all(torch.equal(first[task], second[task]) for task in teachers)  # no dropout
    for task, teacher in teachers.items():
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert all(torch.equal(v, before[task][name]) for name, v in teacher.state_dict().items())
        assert not any(module.training or module._forward_hooks for module in teacher.modules())


def test_construction_leaves_the_student_as_it_was() -> None:
    student = conv(3)
    student[1].eval()
    before, modes = copy.deepcopy(student.state_dict()), [module.training for module in student.modules()]
    TaskAdaptors(student, {"task": conv(2)}, ["0"], torch.randn(4, 1, 6, 6))
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(v, before[name]) for name, v in student.state_dict().items())
    assert not any(module._forward_hooks for module in student.modules())


def test_the_state_dict_has_the_adaptors_alone_and_comes_back() -> None:
    student, teachers, adaptors, x = taught()
    state = copy.deepcopy(adaptors.state_dict())
    assert list(state) == [f"adaptors.{task}.{i}.weight" for task in ("left", "right") for i in (0, 1)]
    assert len(list(adaptors.parameters())) == 4
    other = TaskAdaptors(student, teachers, ["0", "3"], x)
    other.load_state_dict(state)
    with features(student, ["0", "3"]) as seen:
        student(x)
    assert all(map(torch.equal, adaptors(seen, x).values(), other(seen, x).values()))


def test_teachers_move_along_and_are_copied() -> None:
    _, teachers, adaptors, _ = taught()
    adaptors.double()
    assert all(p.dtype == torch.float64 for teacher in teachers.values() for p in teacher.parameters())
    twin = copy.deepcopy(adaptors)
    twin.float()
    assert all(p.dtype == torch.float64 for teacher in teachers.values() for p in teacher.parameters())


def test_layers_by_two_names_and_another_adaptor() -> None:
    student, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    teacher = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))

    def nonlinear(s: int, t: int) -> nn.Module:
        return nn.Sequential(nn.Linear(s, t), nn.ReLU(), nn.Linear(t, t))

    adaptors = TaskAdaptors(student, {"task": teacher}, {"0": "2"}, x, adaptor=nonlinear)
    with features(student, adaptors.layers) as seen:
        student(x)
    assert adaptors(seen, x)["task"] > 0
    assert len(list(adaptors.parameters())) == 4


@pytest.mark.parametrize("make", [DOTSGD, MoKDSGD])
def test_training_brings_the_features_together(make: Any) -> None:
    student, _, adaptors, x = taught()
    optimizer = make(student.parameters(), lr=0.02, momentum=0.5, losses=("task", "left", "right"))
    adam = torch.optim.Adam(adaptors.parameters(), lr=0.02)
    history = []
    with features(student, adaptors.layers) as seen:
        for _ in range(20):
            optimizer.zero_grad()
            adam.zero_grad()
            task = student(x).square().mean()
            distances = adaptors(seen, x)
            optimizer.step({"task": task, **distances})
            adam.step()
            history.append(sum(value.item() for value in distances.values()))
    assert history[-1] < 0.5 * history[0]


def test_what_does_not_fit_is_refused() -> None:
    student, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    teacher = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"teachers: 'a.b' has a dot, .*; rename the task"):
        TaskAdaptors(student, {"a.b": teacher}, ["0"], x)
    with pytest.raises(ValueError, match="teachers: 0 of them, layers: 1; give at least one of each"):
        TaskAdaptors(student, {}, ["0"], x)
    with pytest.raises(ValueError, match="names: the model has no layer '1'"):
        TaskAdaptors(student, {"task": teacher}, ["1"], x)
    with pytest.raises(TypeError, match=r"layers='0': expected several names; for one layer give \['0'\]"):
        TaskAdaptors(student, {"task": teacher}, "0", x)
    assert teacher.training
    assert teacher[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"teacher: shape \(4, 5\), but the student's is \(2, 5\); after the adaptor"):
        TaskAdaptors(student, {"task": teacher}, ["0"], x)({"0": torch.randn(2, 3)}, x)
