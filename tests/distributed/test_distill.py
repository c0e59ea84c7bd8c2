"""Projector and adaptors in the student's optimizer, in several processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from distill_optim import DOTSGD, MoKDSGD
from tests.distributed import distill
from tests.processes import Pool

OPTIMIZERS: dict[str, Any] = {"DOTSGD": partial(DOTSGD, lr=0.05), "MoKDSGD": partial(MoKDSGD, lr=0.05, momentum=0.9)}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_trains_beside_the_student_follows_one_process(pool: Pool, name: str, wrapped: bool) -> None:
    """In DistributedDataParallel the student alone."""
    pool.run(distill.beside_the_student_follows_one_process, OPTIMIZERS[name], wrapped)
