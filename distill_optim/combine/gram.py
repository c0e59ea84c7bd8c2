"""Gram matrices of gradients that live in lists of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import is_not

import torch
from torch import Tensor

from distill_optim.sharding import Shards, add_up, local

# Elements that are cast to float64 at a time: on a CPU small enough to stay in the cache between the cast and
# the products, on an accelerator large enough that the number of launches stays small.
_BUCKET = {"cpu": 1 << 18}
_BUCKET_ACCELERATOR = 1 << 22


def gram(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products of K gradients, each given as a list of tensors, accumulated in float64.

    The lists are never concatenated as a whole: they are walked in buckets that are cast to float64. No value is read
    on the host.

    Gradients that nearly agree differ by less than float32 sums of them are off by (a relative gap of 1e-3 already
    turns a weight of 276 into 54), so that there one would sum differences. In float64 the products of two float32,
    bfloat16 or float16 numbers are exact and their sum is off by some 1e-16, so the differences of the sums are those
    of the gradients, and the plain form is the accurate one.

    Args:
        gradients: K sequences of equal length; entry ``[i][p]`` is the gradient of loss i with respect to
            parameter p, of any shape, dtype and device, or None where loss i does not reach parameter p (a zero).
            A sharded tensor (DTensor) counts as a whole: every process sums over its own part, then one all-reduce of
            K² numbers per mesh adds those up, so that all processes have to make the call.

    Returns:
        Tensor of shape (K, K), float64, on the device of the first tensor. For complex gradients the real part
        of the inner product, which is what a step along one of them changes in the other's loss.

    Example:
        >>> g1, g2 = [torch.tensor([3.0, 0.0]), None], [torch.tensor([1.0, 2.0]), torch.tensor(2.0)]
        >>> gram([g1, g2])
        tensor([[9., 3.],
                [3., 9.]], dtype=torch.float64)
    """
    k = len(gradients)
    # Columns that the same losses reach, on one device, in one kind of shards.
    alike: defaultdict[tuple[tuple[bool, ...], torch.device, Shards], list[list[Tensor]]] = defaultdict(list)
    for column in zip(*gradients, strict=True):
        parts = [local(gradient) for gradient in column if gradient is not None]
        if parts:
            reached = tuple(map(is_not, column, repeat(None)))
            alike[reached, parts[0][0].device, parts[0][1]].append([_real(part) for part, _ in parts])
    home = next(iter(alike))[1] if alike else torch.device("cpu")
    sums: dict[Shards, Tensor] = {}
    for (reached, device, shards), columns in alike.items():
        lower = _lower(columns, _BUCKET.get(device.type, _BUCKET_ACCELERATOR))
        if device != home:
            lower = lower.to(home, non_blocking=home.type != "cpu")
        if len(lower) < k:
            lower = _among(lower, reached)
        sums[shards] = sums[shards] + lower if shards in sums else lower
    total = torch.zeros((k, k), dtype=torch.float64, device=home)
    for shards, part in sums.items():
        add_up(part, shards)
        total += part
    # One product per pair: the matrix is symmetric to the last bit.
    return total + total.tril(-1).mT


def _lower(columns: Sequence[Sequence[Tensor]], bucket: int) -> Tensor:
    """Inner products of the columns' K rows, on and below the diagonal."""
    k, first = len(columns[0]), columns[0][0]
    size = min(bucket, sum(column[0].numel() for column in columns))
    rows = torch.empty((k, size), dtype=torch.float64, device=first.device)
    products = torch.zeros((k, k), dtype=torch.float64, device=first.device)
    for pieces in _buckets(columns, bucket):
        filled = sum(column[0].numel() for column in pieces)
        for row, own in zip(rows, zip(*pieces, strict=True), strict=True):
            row[:filled] = own[0].reshape(-1) if len(own) == 1 else torch._C._nn.flatten_dense_tensors(list(own))
        for i in range(k):
            products[i, : i + 1].addmv_(rows[: i + 1, :filled], rows[i, :filled])
    return products


def _among(matrix: Tensor, reached: Sequence[bool]) -> Tensor:
    """The matrix of some losses as that of all, with zeros for the others."""
    for dim in (0, 1):
        rows, zero = iter(matrix.unbind(dim)), torch.zeros_like(matrix.select(dim, 0))
        matrix = torch.stack([next(rows) if here else zero for here in reached], dim)
    return matrix


def _buckets(columns: Iterable[Sequence[Tensor]], bucket: int) -> Iterator[list[Sequence[Tensor]]]:
    """The columns, or flat pieces of large ones, of at most so many elements together."""
    pieces: list[Sequence[Tensor]] = []
    filled = 0
    for column in columns:
        whole = column[0].numel() <= bucket
        for piece in (column,) if whole else zip(*(t.reshape(-1).split(bucket) for t in column), strict=True):
            if filled + piece[0].numel() > bucket:
                yield pieces
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece[0].numel()
    if pieces:
        yield pieces


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
