"""The monitor beside replicas and shards."""

from __future__ import annotations

import pytest

from tests.distributed import monitored
from tests.distributed.ddp import FLAGS, OPTIMIZERS
from tests.processes import Pool

every_flag = pytest.mark.parametrize("flags", FLAGS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_flag
def test_observing_leaves_replicas_alone(pool: Pool, flags: str) -> None:
    pool.run(monitored.observes, FLAGS[flags])


@every_flag
@every_optimizer
def test_replicas_record_the_joined_batch(pool: Pool, name: str, flags: str) -> None:
    pool.run(monitored.records, OPTIMIZERS[name], FLAGS[flags])


@every_optimizer
def test_shards_record_the_joined_batch(pool: Pool, name: str) -> None:
    pool.run(monitored.records, OPTIMIZERS[name], None)


def test_observing_shards_is_refused(pool: Pool) -> None:
    pool.run(monitored.refuses_shards)
