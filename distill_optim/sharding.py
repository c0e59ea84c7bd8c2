"""Tensors of which every process holds a part (DTensor): the part, and what adds numbers up over the parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A device mesh and those of its dimensions over which a tensor is sharded; None for a tensor that is whole.
Shards = tuple[Any, tuple[int, ...]] | None


def local(tensor: Tensor) -> tuple[Tensor, Shards]:
    """This process's part of a tensor, in the same memory, and over what the parts have to be added up.

    Example:
        >>> local(torch.ones(2))
        (tensor([1., 1.]), None)
    """
    if type(tensor) is Tensor or not hasattr(tensor, "to_local"):
        return tensor, None
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        # A sum that has not been taken yet: its square is not the sum of the parts' squares.
        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    dims = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tensor.to_local(), (tensor.device_mesh, dims)


def add_up(numbers: Tensor, shards: Shards) -> None:
    """Replaces a few numbers by their sums over the parts; all processes have to call it."""
    if shards is not None:
        mesh, dims = shards
        for dim in dims:
            torch.distributed.all_reduce(numbers, group=mesh.get_group(dim))
