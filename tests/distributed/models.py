"""A student with two heads, its data, and the ways of a training loop, for every process alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from distill_optim import MultiLossClosure, joint_loss

ROWS, STEPS, FEW = 8, 50, 12

# Sums of a few dozen float64 in another order, through 50 steps of networks that neither forget nor amplify them much.
# The weights of MoKD divide by the square of the angle between gradients, which may be as small as 1e-3.
RTOL, ATOL = 1e-7, 1e-9


class Student(nn.Module):
    """Both losses reach the trunk; where ``heads`` is true each has a head of its own."""

    def __init__(self, heads: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.a = nn.Linear(8, 4)
        self.b = nn.Linear(8, 4) if heads else None

    def forward(self, x: Tensor) -> Any:
        z = self.trunk(x)
        return self.a(z) if self.b is None else (self.a(z), self.b(z))


def student(heads: bool = False) -> Student:
    torch.manual_seed(1)
    return Student(heads).double()


def batches(steps: int = STEPS, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(steps)]


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What each loss is of."""
    out = model(x)
    return out if isinstance(out, tuple) else (out, out)


def losses_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Means over the rows, so that the mean over processes is that over the joined batch."""
    a, b = outputs(model, x)
    return [a.square().mean(), (b - 1).abs().mean()]


def part(x: Tensor, rank: int, world: int) -> Tensor:
    """This process's rows of a batch."""
    return x.chunk(world)[rank]


Way = Callable[[Any, nn.Module, Sequence[Tensor]], None]


def by_list(optimizer: Any, model: nn.Module, parts: Sequence[Tensor]) -> None:
    (x,) = parts
    optimizer.step(losses_of(model, x))


def by_closure(optimizer: Any, model: nn.Module, parts: Sequence[Tensor]) -> None:
    (x,) = parts
    optimizer.step(lambda: losses_of(model, x))


def by_multi_loss_closure(optimizer: Any, model: nn.Module, parts: Sequence[Tensor]) -> None:
    (x,) = parts
    optimizer.step(MultiLossClosure(lambda: losses_of(model, x), optimizer))


def by_joint_loss(optimizer: Any, model: nn.Module, parts: Sequence[Tensor]) -> None:
    for x in parts:
        (joint_loss(losses_of(model, x), optimizer) / len(parts)).backward()
    optimizer.step()


def by_backward(optimizer: Any, model: nn.Module, parts: Sequence[Tensor]) -> None:
    for i, x in enumerate(parts):
        # As torch's documentation has it: only the last micro-batch is reduced by DistributedDataParallel. (With a
        # static graph torch itself fails in that, with a summed loss and an optimizer of its own.)
        silent = isinstance(model, DistributedDataParallel) and not model.static_graph and i < len(parts) - 1
        with cast(Any, model).no_sync() if silent else nullcontext():
            optimizer.backward([loss / len(parts) for loss in losses_of(model, x)])
    optimizer.step()


WAYS: dict[str, Way] = {
    "list": by_list,
    "closure": by_closure,
    "MultiLossClosure": by_multi_loss_closure,
    "joint_loss": by_joint_loss,
    "backward": by_backward,
}


def train(model: nn.Module, optimizer: Any, way: str, pieces: Callable[[Any], list[Any]], steps: int) -> None:
    for x in batches(steps):
        optimizer.zero_grad()
        WAYS[way](optimizer, model, pieces(x))


def train_scaled(model: nn.Module, optimizer: Any, way: str, rank: int, world: int) -> int:
    """A gradient scaler and clipping between the phases; the second batch overflows in one loss, in the last process.

    Returns:
        How many steps were skipped.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)
    skipped = 0
    for step, x in enumerate(batches(FEW)):
        optimizer.zero_grad()
        losses = losses_of(model, part(x, rank, world))
        if step == 1 and rank == world - 1:
            losses[1] = losses[1] * torch.inf
        if way == "joint_loss":
            scaler.scale(joint_loss(losses, optimizer)).backward()
        else:
            optimizer.backward(losses, scaler=scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
    return skipped


def tensors_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Parameters and state, in order."""
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    buffers = [state[key] for state in states for key in sorted(state) if isinstance(state[key], Tensor)]
    memory = optimizer.param_groups[0].get("combine_state", {})
    found = [*model.parameters(), *buffers, *(memory[key] for key in sorted(memory))]
    return [tensor.detach() for tensor in found]


def assert_same_everywhere(tensors: Sequence[Tensor]) -> None:
    """To the last bit."""
    for tensor in tensors:
        first = tensor.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, tensor), f"off by {(first - tensor).abs().max():.3g}"


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], atol: float = ATOL) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=RTOL, atol=atol)
