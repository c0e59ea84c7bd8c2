"""Frameworks over several processes: replicas to the last bit, and those of one process on the joined batch."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from tests.distributed.ddp import OPTIMIZERS
from tests.integrations import replicas
from tests.integrations.scripts import ADVICE

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this build of torch has no torch.distributed")


@pytest.mark.parametrize("name", ["DOTSGD", "MoKDAdamW"])
def test_accelerate_accumulates_and_clips_over_two_processes(name: str) -> None:
    pytest.importorskip("accelerate", reason=ADVICE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(replicas.with_accelerate, (port, OPTIMIZERS[name]), nprocs=2)


@pytest.mark.parametrize("name", ["DOTAdamW", "MoKDSGD"])
def test_lightning_clips_over_two_processes(name: str) -> None:
    pytest.importorskip("lightning", reason=ADVICE)
    # In a process of its own, whose state is not that of the other tests.
    process: Any = torch.multiprocessing.get_context("spawn").Process(
        target=replicas.with_lightning, args=(OPTIMIZERS[name],)
    )
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    assert code == 0
