"""What each process does in the tests of what goes wrong in one of them."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from distill_optim import MoKDSGD
from tests.distributed.models import batches, losses_of, part, student
from tests.processes import join


def raises_in_one(rank: int, store: str, told: Any, when: str) -> None:
    join(rank, 2, store)
    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.1)
    replica = DistributedDataParallel(model)
    try:
        for step, x in enumerate(batches(6)):
            optimizer.zero_grad()
            losses = losses_of(replica, part(x, rank, 2))
            if step == 3 and rank == 0:
                if when == "forward":
                    raise ArithmeticError("this process's own")
                losses[1].register_hook(_raise)  # in the last of the backward passes
            optimizer.step(losses)
    except Exception as error:
        told.send(type(error).__name__)
        raise SystemExit(1) from None


def _raise(gradient: Any) -> None:
    raise ArithmeticError("this process's own")
