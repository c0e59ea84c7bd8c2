"""What each process does in the tests of the monitor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from distill_optim.monitor import History, Monitor
from tests.distributed.ddp import refusal
from tests.distributed.fsdp import sharded
from tests.distributed.models import (
    FEW,
    assert_close,
    assert_same_everywhere,
    batches,
    losses_of,
    part,
    student,
    tensors_of,
)


def numbers(history: History) -> list[torch.Tensor]:
    return [history.losses, history.weights, history.norms, history.cosines, history.updates]


def observes(rank: int, flags: dict[str, Any]) -> None:
    found = []
    for watched in False, True:
        model = student()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        replica = DistributedDataParallel(model, **flags)
        monitor = Monitor(optimizer, every=2, modules=model)
        for n, x in enumerate(batches(FEW)):
            optimizer.zero_grad()
            losses = losses_of(replica, part(x, rank, 2))
            if watched and n == 0 and "static_graph" in flags:
                with refusal("look from the second step on"):
                    monitor.observe(losses)
            elif watched:
                monitor.observe(losses)
            torch.stack(losses).sum().backward()
            optimizer.step()
        assert_same_everywhere(tensors_of(model, optimizer))
        found.append(tensors_of(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(monitor.history()) == FEW // 2
    assert monitor.history().norms.isfinite().all()


def records(rank: int, make: Any, flags: dict[str, Any] | None) -> None:
    """Under DistributedDataParallel with these flags; None: sharded by FSDP2."""

    def history_of(model: nn.Module, net: nn.Module, optimizer: Any, rank: int, world: int) -> History:
        with Monitor(optimizer, every=2, modules=model) as monitor:
            for x in batches(FEW):
                optimizer.zero_grad()
                optimizer.step(losses_of(net, part(x, rank, world)))
        return monitor.history()

    alone = student()
    expected = history_of(alone, alone, make(alone.parameters(), process_group=None), 0, 1)
    model: Any = student() if flags is not None else sharded(False, init_device_mesh("cpu", (2,)))
    net = model if flags is None else DistributedDataParallel(model, **flags)
    history = history_of(model, net, make(model.parameters()), rank, 2)
    assert history.units == ("all", "trunk", "a")
    assert_same_everywhere(numbers(history))
    assert_close(numbers(history), numbers(expected))


def refuses_shards(rank: int) -> None:
    model = sharded(False, init_device_mesh("cpu", (2,)))
    monitor = Monitor(torch.optim.SGD(model.parameters(), lr=0.1))
    with refusal("the parameters are sharded"):
        monitor.observe(losses_of(model, batches(1)[0]))
