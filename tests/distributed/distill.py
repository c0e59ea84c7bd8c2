"""What each process does in the tests of what trains beside a student."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill_optim.distill import SubspaceProjector, TaskAdaptors, features
from tests.distributed.models import (
    FEW,
    Student,
    assert_close,
    assert_same_everywhere,
    batches,
    part,
    student,
    tensors_of,
)


def parts() -> tuple[Student, nn.Module, SubspaceProjector, TaskAdaptors]:
    model = student()
    teacher = nn.Sequential(nn.Linear(6, 10), nn.Tanh()).double()
    adaptors = TaskAdaptors(model, {"adapted": teacher}, {"trunk": "1"}, batches(1)[0])
    return model, teacher, SubspaceProjector(8, 10).double(), adaptors


def train(
    model: nn.Module, teacher: nn.Module, seen: Any, projector: Any, adaptors: Any, optimizer: Any, of: Any
) -> None:
    for x in batches(FEW):
        optimizer.zero_grad()
        own: Tensor = of(x)
        task = model(own).square().mean()
        losses = {"task": task, "projected": projector(seen["trunk"], teacher(own)), **adaptors(seen, own)}
        optimizer.step(losses)


def beside_the_student_follows_one_process(rank: int, make: Any, wrapped: bool) -> None:
    losses = ("task", "projected", "adapted")

    def run(replicated: bool) -> list[Tensor]:
        model, teacher, projector, adaptors = parts()
        whole = nn.ModuleList([model, projector, adaptors])
        options = {} if replicated else {"process_group": None}
        optimizer = make(whole.parameters(), losses=losses, **options)
        seen = features(model, ["trunk"])
        net = DistributedDataParallel(model) if replicated and wrapped else model
        of = (lambda x: part(x, rank, 2)) if replicated else (lambda x: x)
        train(net, teacher, seen, projector, adaptors, optimizer, of)
        return tensors_of(whole, optimizer)

    expected, actual = run(False), run(True)
    assert_same_everywhere(actual)
    assert_close(actual, expected)
