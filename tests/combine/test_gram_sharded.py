"""The Gram matrix of gradients that are spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from distill_optim import combine
from tests import processes

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this build of torch has no torch.distributed")


# 64 roundings of sums of some 30.
ATOL = 64 * torch.finfo(torch.float64).eps * 30


def whole(seed: int) -> list[Tensor]:
    """Tensors that divide evenly over two processes, not evenly over four, and not at all."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((6, 4), (5,), (1,), (3,))]


def in_every_process(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    line(rank, init_device_mesh("cpu", (4,)))
    grid(init_device_mesh("cpu", (2, 2)))


def line(rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    rows: list[list[Tensor | None]] = []
    for seed in range(3):
        a, b, c, d = whole(seed)
        # A sum that is still to be taken, of unequal parts; powers of two, so that none is rounded.
        share = DTensor.from_local(d * (0.25, 0.25, -0.5, 1.0)[rank], mesh, [Partial()])
        shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in (a, b, c)]
        # Every process has all of these two; they count once.
        rows.append([*shards, share, distribute_tensor(d, mesh, [Replicate()]), d if seed else None])
    expected = combine.gram([[*whole(seed), whole(seed)[3], whole(seed)[3] if seed else None] for seed in range(3)])
    actual = combine.gram(rows)
    assert type(actual) is Tensor
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def grid(mesh: Any) -> None:
    """Sharded over one dimension of the mesh and copied along the other, as hybrid sharding does it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rows = []
    for seed in range(2):
        first, *rest = whole(seed)
        copied = [distribute_tensor(t, mesh, [Replicate(), Shard(0)]) for t in rest]
        rows.append([distribute_tensor(first, mesh, [Shard(0), Shard(1)]), *copied])
    expected = combine.gram([whole(seed) for seed in range(2)])
    torch.testing.assert_close(combine.gram(rows), expected, rtol=0, atol=ATOL)


def test_shards_are_added_up(tmp_path: Path) -> None:
    processes.run(in_every_process, tmp_path, world=4)
