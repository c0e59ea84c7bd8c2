"""The monitor beside replicas and shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from distill_optim.monitor import History, Monitor
from tests.distributed.ddp import FLAGS, OPTIMIZERS, refusal
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
from tests.processes import Pool

every_flag = pytest.mark.parametrize("flags", FLAGS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def numbers(history: History) -> list[torch.Tensor]:
    return [history.losses, history.weights, history.norms, history.cosines, history.updates]


def observes(rank: int, flags: dict[str, Any]) -> None:
    found = []
    for watched in False, True:
        model = student()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        replica = DistributedDataParallel(model, **flags)
        monitor = Monitor(optimizer, every=2, modules=model)
        for x in batches(FEW):
            optimizer.zero_grad()
            losses = losses_of(replica, part(x, rank, 2))
            if watched:
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


@every_flag
def test_observing_leaves_replicas_alone(pool: Pool, flags: str) -> None:
    pool.run(observes, FLAGS[flags])


@every_flag
@every_optimizer
def test_replicas_record_the_joined_batch(pool: Pool, name: str, flags: str) -> None:
    pool.run(records, OPTIMIZERS[name], FLAGS[flags])


@every_optimizer
def test_shards_record_the_joined_batch(pool: Pool, name: str) -> None:
    pool.run(records, OPTIMIZERS[name], None)


def test_observing_shards_is_refused(pool: Pool) -> None:
    pool.run(refuses_shards)
