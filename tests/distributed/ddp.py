"""What each process does in the tests of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, joint_loss
from distill_optim.gradients import Replicas
from tests.distributed.models import (
    FEW,
    STEPS,
    assert_close,
    assert_same_everywhere,
    batches,
    losses_of,
    outputs,
    part,
    student,
    tensors_of,
    train,
    train_scaled,
)

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "DOTSGD": partial(DOTSGD, lr=0.05, weight_decay=1e-3),
    "DOTAdamW": partial(DOTAdamW, lr=1e-3),
    "MoKDSGD": partial(MoKDSGD, lr=0.05, momentum=0.9),
    "MoKDAdamW": partial(MoKDAdamW, lr=1e-3),
}
FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def follows_one_process(
    rank: int, make: Any, way: str, flags: dict[str, Any], heads: bool = False, micro: int = 1, steps: int = STEPS
) -> None:
    alone = student(heads)
    expected = make(alone.parameters(), process_group=None)
    train(alone, expected, way, lambda x: list(x.chunk(micro)), steps)

    model = student(heads)
    optimizer = make(model.parameters())
    replica = DistributedDataParallel(model, **flags)
    # The rows of every micro-batch, over the processes.
    train(replica, optimizer, way, lambda x: [part(piece, rank, 2) for piece in x.chunk(micro)], steps)
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))


def three_losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    a, b = outputs(model, x)
    return [a.square().mean(), (a - 1).abs().mean(), (b + 1).square().mean()]


def draws_the_same(rank: int, make: Any, heads: bool) -> None:
    """Each process has a state of its random generator of its own."""
    torch.manual_seed(rank)
    model = student(heads)
    optimizer = make(model.parameters())
    replica = DistributedDataParallel(model)
    torch.manual_seed(rank)
    for x in batches(FEW):
        optimizer.zero_grad()
        optimizer.step(three_losses(replica, part(x, rank, 2)))
    assert_same_everywhere([*tensors_of(model, optimizer), optimizer.stats.weights])


def walks_back_once(rank: int, make: Any, through: bool, flags: dict[str, Any], heads: bool) -> None:
    def train(model: nn.Module, optimizer: Any, rank: int, world: int) -> None:
        for x in batches(FEW):
            optimizer.zero_grad()
            a, b = outputs(model, part(x, rank, world))
            losses = [a.square().mean(), (b - 1).abs().mean()]
            optimizer.step(losses, through=([a] if a is b else [a, b]) if through else None)

    alone = student(heads)
    expected = make(alone.parameters(), process_group=None)
    train(alone, expected, 0, 1)
    model = student(heads)
    optimizer = make(model.parameters())
    train(DistributedDataParallel(model, **flags), optimizer, rank, 2)
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))
    assert_close([optimizer.stats.weights, optimizer.stats.losses], [expected.stats.weights, expected.stats.losses])


def losses_come_and_go(rank: int, make: Any, flags: dict[str, Any]) -> None:
    """A loss that a process lacks is zero there. (Without a parameter of its own, which the wrapper would wait for.)"""

    def of(model: nn.Module, x: Tensor, step: int, rank: int) -> dict[str, Tensor]:
        a, b = outputs(model, x)
        losses = {"task": a.square().mean(), "distill": (b - 1).abs().mean()}
        # Both; the second on the second process alone; the first on the first alone; each on one of them.
        first, second = ((), ("distill",), (), ("task",)), ((), (), ("task",), ("distill",))
        missing = (second if rank else first)[step % 4]
        return {name: loss for name, loss in losses.items() if name not in missing}

    alone = student()
    expected = make(alone.parameters(), process_group=None)
    model = student()
    optimizer = make(model.parameters())
    replica = DistributedDataParallel(model, **flags)
    for step, x in enumerate(batches(FEW)):
        expected.zero_grad()
        halves = [of(alone, part(x, r, 2), step, r) for r in range(2)]
        names = [name for name in ("task", "distill") if any(name in half for half in halves)]
        expected.step({name: sum(half[name] for half in halves if name in half) / 2 for name in names})
        optimizer.zero_grad()
        optimizer.step(of(replica, part(x, rank, 2), step, rank))
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))


def clips_and_scales(rank: int, make: Any, way: str) -> None:
    """A gradient scaler and clipping between the phases; the second batch overflows in one loss, in one process."""

    alone = student()
    expected = make(alone.parameters(), process_group=None)
    assert train_scaled(alone, expected, way, 0, 1) == 1
    model = student()
    optimizer = make(model.parameters())
    assert train_scaled(DistributedDataParallel(model), optimizer, way, rank, 2) == 1
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))


def foreign_gradients_are_averaged(rank: int, make: Any, when: str) -> None:
    """A regulariser of this process's batch, walked back beside the losses, without any reduction of its own."""

    def step(model: Any, optimizer: Any, x: Tensor, rank: int, world: int) -> None:
        own = part(x, rank, world)
        silent = model.no_sync() if world > 1 else nullcontext()
        with silent:
            losses, extra = losses_of(model, own), model(own).pow(4).mean()
        with model.no_sync() if world > 1 else nullcontext():
            if when == "before":
                extra.backward()
                optimizer.backward(losses)
            elif when == "with":
                (joint_loss(losses, optimizer) + extra).backward()
        optimizer.step()

    alone = student()
    expected = make(alone.parameters(), process_group=None)
    model = student()
    optimizer = make(model.parameters())
    replica = DistributedDataParallel(model)
    for x in batches(FEW):
        expected.zero_grad()
        step(alone, expected, x, 0, 1)
        optimizer.zero_grad()
        step(replica, optimizer, x, rank, 2)
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))


def without_a_wrapper(rank: int, make: Any) -> None:
    """Plain modules in several processes: the optimizer alone keeps them together."""
    alone, model = student(), student()
    expected, optimizer = make(alone.parameters(), process_group=None), make(model.parameters())
    for x in batches(FEW):
        expected.step(losses_of(alone, x))
        optimizer.step(losses_of(model, part(x, rank, 2)))
        expected.zero_grad()
        optimizer.zero_grad()
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))


def batches_run_out(rank: int, make: Any, flags: dict[str, Any]) -> None:
    """The second process has fewer batches; within Join it follows, with gradients of zero."""
    steps = 12 if rank == 0 else 8
    alone = student()
    expected = make(alone.parameters(), process_group=None)
    for step, x in enumerate(batches(12)):
        expected.zero_grad()
        first = losses_of(alone, part(x, 0, 2))
        second = losses_of(alone, part(x, 1, 2)) if step < 8 else [torch.zeros((), dtype=torch.float64)] * 2
        expected.step([(a + b) / 2 for a, b in zip(first, second, strict=True)])

    model = student()
    optimizer = make(model.parameters())
    replica = DistributedDataParallel(model, **flags)
    with Join([replica, optimizer]):
        for x in batches(12)[:steps]:
            optimizer.zero_grad()
            optimizer.step(losses_of(replica, part(x, rank, 2)))
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), tensors_of(alone, expected))


def joining_in_two_phases_is_refused(rank: int) -> None:
    model = student()
    optimizer: Any = DOTSGD(model.parameters(), lr=0.1)
    replica = DistributedDataParallel(model)
    with Join([replica, optimizer]):
        losses = losses_of(replica, batches(1)[0])
        with refusal("Join: processes that have run out"):
            optimizer.backward(losses)
        optimizer.step(losses)


def one_refuses_for_all(rank: int) -> None:
    """Losses that one process refuses are an error in all, at once, and leave no trace."""
    model = student()
    optimizer = DOTSGD(model.parameters(), lr=0.1)
    replica = DistributedDataParallel(model)
    x = batches(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    losses = losses_of(replica, x)
    if rank == 0:
        with refusal("losses: got 1"):
            optimizer.step(losses[:1])
    else:
        with refusal("another process refused"):
            optimizer.step(losses)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    optimizer.step(losses)  # and all can go on
    assert_same_everywhere(tensors_of(model, optimizer))


def different_parameters_are_refused(rank: int) -> None:
    w = nn.Parameter(torch.ones(2 + rank))
    optimizer = MoKDSGD([w], lr=0.1)
    with refusal("different parameters or losses"):
        optimizer.step([w.sum(), w.square().sum()])


def different_losses_in_one_pass_are_refused(rank: int) -> None:
    model = student(True)
    optimizer = MoKDSGD(model.parameters(), lr=0.1, combine="famo")
    a, b = outputs(model, batches(1)[0])
    losses = {"task": a.square().mean(), "distill": b.abs().mean()}
    if rank:
        del losses["task"]
    with refusal("a process lacks some of"):
        optimizer.step(losses)


def independent_processes_stay_apart(rank: int) -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), lr=0.1, process_group=None)
    optimizer.step(losses_of(model, batches(2)[rank]))
    first = tensors_of(model, optimizer)[0].clone()
    distributed.broadcast(first, 0)
    assert torch.equal(first, tensors_of(model, optimizer)[0]) is (rank == 0)


def a_plain_step_is_the_base(rank: int, make: Any, base: Any) -> None:
    models = [student(), student()]
    optimizers = [make(models[0].parameters()), base(models[1].parameters())]
    for model, optimizer in zip(models, optimizers, strict=True):
        replica = DistributedDataParallel(model)
        for x in batches(10):
            optimizer.zero_grad()
            losses = losses_of(replica, part(x, rank, 2))
            (losses[0] + losses[1]).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def in_large_buckets(rank: int) -> None:
    """Averages of many tensors of several dtypes and layouts, in several pieces, are those of each by itself."""
    generator = torch.Generator().manual_seed(rank)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((1200, 1300), torch.float32),
        ((7,), torch.bfloat16),
        ((2_000_000,), torch.float32),
        ((3, 5), torch.complex64),
        ((), torch.float64),
        ((3,), torch.float32),
        ((2, 3, 4, 5), torch.float32),
        ((6,), torch.float32),
    ]
    params: list[Tensor] = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    complex_, none, channels_last, low = params[3], params[5], params[6], params[7]
    params[6] = channels_last = nn.Parameter(channels_last.detach().to(memory_format=torch.channels_last))
    assert not channels_last.is_contiguous()
    gradients = {p: torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params}
    if hasattr(low, "grad_dtype"):  # since torch 2.10
        low.grad_dtype = torch.bfloat16
        gradients[low] = gradients[low].bfloat16()
    if rank == 1:
        for p in params[1], params[4], low:
            del gradients[p]
    del gradients[none]
    replicas = Replicas(distributed.group.WORLD, None)
    for p, average in zip(params, replicas.average([gradients.get(p) for p in params], params)(), strict=True):
        assert (average is None) == (p is none)
        if average is None:
            continue
        dtype = average.dtype
        assert dtype == getattr(p, "grad_dtype", p.dtype)
        expected = gradients.get(p, torch.zeros_like(p, dtype=dtype)).detach().clone() / 2
        distributed.all_reduce(torch.view_as_real(expected) if p is complex_ else expected)
        assert torch.equal(average, expected)
        assert average.stride() == p.stride()


class refusal:
    """Expects a ValueError or a RuntimeError with that text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert isinstance(error, ValueError | RuntimeError), f"nothing was raised; expected {self.text!r}"
        assert self.text in str(error), str(error)
        return True
