"""Several processes that train one model: what is averaged over them, so that their replicas stay the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed

# Bytes that go over in one piece. As in DistributedDataParallel: large enough to make use of a fast link, small enough
# that the first piece is under way while the next is packed.
_BUCKET = 25 << 20


class Replicas:
    """Processes with a whole copy of the parameters each.

    Every process has to make the same calls in the same order.

    Args:
        group: a process group.
        signature: what has to be the same in all processes, such as the parameters' shapes.

    Raises:
        ValueError: where the signatures differ.
    """

    def __init__(self, group: Any, signature: object) -> None:
        self.group = group
        self.size = distributed.get_world_size(group)
        signatures: list[object] = [None] * self.size
        distributed.all_gather_object(signatures, signature, group=self._hosts)
        if any(other != signatures[0] for other in signatures):
            raise ValueError(
                "process_group: the processes of the group have optimizers of different parameters or losses; give "
                "them the same, in the same order, or pass process_group=None if they train independent models"
            )

    @cached_property
    def _hosts(self) -> Any:
        """A group that takes tensors in the host's memory, so that nothing waits for a device."""
        if "cpu:" in distributed.get_backend_config(self.group):
            return self.group
        return distributed.new_group(
            distributed.get_process_group_ranks(self.group), backend="gloo", use_local_synchronization=True
        )

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags any process has set."""
        told = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._hosts)
        return [bool(flag) for flag in told.tolist()]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, of a few numbers."""
        share = tensor / self.size
        distributed.all_reduce(share, group=self.group)
        return share

    def same(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The first process's, in all: a few numbers that might be drawn, or rounded, otherwise on each."""
        return _broadcast(tensors, [self.group])

    def average(
        self,
        gradients: Sequence[Tensor | None],
        params: Sequence[Tensor],
        without: Collection[Tensor] = (),
    ) -> Callable[[], list[Tensor | None]]:
        """Starts to average gradients; a parameter that no process has a gradient of stays without.

        Args:
            gradients: this process's; they are not written into, and may be written into afterwards.
            params: their parameters, the same in every process.
            without: parameters whose gradient, although there, says nothing.

        Returns:
            A function that waits for the end and gives the averages, in memory of their own.
        """
        reached = self.any([g is not None and p not in without for p, g in zip(params, gradients, strict=True)])
        sent: list[tuple[Any, Tensor, list[int]]] = []
        for members in _buckets(params, [n for n, any_has in enumerate(reached) if any_has]):
            dtype = _grad_dtype(params[members[0]])
            parts = [
                torch.zeros_like(p, dtype=dtype) if g is None else g.to(dtype)
                for p, g in ((params[n], gradients[n]) for n in members)
            ]
            flat = torch.cat([_real(part).reshape(-1) for part in parts])
            # Before the sum, which in half precision may not have the range.
            work = distributed.all_reduce(flat.div_(self.size), group=self.group, async_op=True)
            sent.append((work, flat, members))

        def finish() -> list[Tensor | None]:
            averages: list[Tensor | None] = [None] * len(params)
            for work, flat, members in sent:
                work.wait()
                pieces = flat.split([_real(params[n]).numel() for n in members])
                for n, piece in zip(members, pieces, strict=True):
                    averages[n] = _shaped(piece, params[n])
            return averages

        return finish


class Sharded:
    """Processes that hold a part of every parameter each (DTensor), and whose gradients are averaged already.

    Args:
        mesh: the device mesh of the parameters.
    """

    def __init__(self, mesh: Any) -> None:
        self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.size = mesh.size()

    def mean(self, tensor: Tensor) -> Tensor:
        """As :meth:`Replicas.mean`."""
        share: Tensor = tensor / self.size
        for group in self._groups:
            distributed.all_reduce(share, group=group)
        return share

    def same(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As :meth:`Replicas.same`."""
        return _broadcast(tensors, self._groups)


def _broadcast(tensors: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    for group in groups:
        distributed.broadcast(flat, group=group, group_src=0)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).to(tensor.dtype) for tensor, piece in zip(tensors, pieces, strict=True)]


def _buckets(params: Sequence[Tensor], positions: Sequence[int]) -> Iterator[list[int]]:
    """Positions of parameters of one device and dtype of gradients, up to so many bytes."""
    members: list[int] = []
    filled = 0
    for n in sorted(positions, key=lambda n: _kind(params[n])):
        size = params[n].numel() * params[n].element_size()
        if members and (_kind(params[n]) != _kind(params[members[0]]) or filled + size > _BUCKET):
            yield members
            members, filled = [], 0
        members.append(n)
        filled += size
    if members:
        yield members


def _kind(p: Tensor) -> tuple[str, str]:
    return str(p.device), str(_grad_dtype(p))


def _grad_dtype(p: Tensor) -> torch.dtype:
    """As autograd will have it, known also where there is no gradient; torch 2.9 has it that of the parameter."""
    dtype: torch.dtype = getattr(p, "grad_dtype", None) or p.dtype
    return dtype


def _shaped(piece: Tensor, p: Tensor) -> Tensor:
    """A gradient of the parameter's shape and layout."""
    gradient = torch.view_as_complex(piece.view(*p.shape, 2)) if p.is_complex() else piece.view(p.shape)
    if p.is_contiguous():
        return gradient
    shaped: Tensor = torch.empty_like(p, memory_format=torch.preserve_format).copy_(gradient)
    return shaped


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
