"""Gram matrices of gradients that live in lists of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from distill_optim.buckets import buckets
from distill_optim.sharding import Shards, add_up, local

# Numbers held in float64 at a time, of all gradients together: on a CPU few enough to stay in the cache between
# the cast and the products, on an accelerator enough that the number of launches stays small.
_BUCKET = {"cpu": 1 << 20}
_BUCKET_ACCELERATOR = 1 << 23

# The losses that have these gradients, and where they are.
_Kind = tuple[tuple[int, ...], torch.device, Shards]


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
    alike = _alike(gradients)
    home = next(iter(alike))[1] if alike else torch.device("cpu")
    sums: dict[Shards, Tensor] = {}
    for (losses, device, shards), rows in alike.items():
        products = _products(rows, _BUCKET.get(device.type, _BUCKET_ACCELERATOR))
        if device != home:
            products = products.to(home, non_blocking=home.type != "cpu")
        matrix = _matrix(products, losses, k)
        sums[shards] = sums[shards] + matrix if shards in sums else matrix
    total = torch.zeros((k, k), dtype=torch.float64, device=home)
    for shards, matrix in sums.items():
        add_up(matrix, shards)
        total += matrix
    return total


def _alike(gradients: Sequence[Sequence[Tensor | None]]) -> dict[_Kind, list[list[Tensor]]]:
    """Gradients that the same losses have, on one device and in one kind of shards, in a row per loss."""
    # Mostly all are, and plain tensors, and to see that takes a fraction of sorting them.
    every = [list(row) for row in gradients]
    kinds = {kind for row in every for kind in map(type, row)}
    if kinds == {Tensor} and len({len(row) for row in every}) == 1:
        rows = cast(list[list[Tensor]], every)
        devices = {t.device for t in rows[0]}
        if len(devices) == 1 and not any(dtype.is_complex for dtype in {t.dtype for row in rows for t in row}):
            return {(tuple(range(len(rows))), devices.pop(), None): rows}
    columns: defaultdict[_Kind, list[list[Tensor]]] = defaultdict(list)
    for column in zip(*every, strict=True):
        losses = tuple(i for i, gradient in enumerate(column) if gradient is not None)
        parts = [local(gradient) for gradient in column if gradient is not None]
        if parts:
            columns[losses, parts[0][0].device, parts[0][1]].append([_real(part) for part, _ in parts])
    return {kind: list(map(list, zip(*those, strict=True))) for kind, those in columns.items()}


def _products(rows: Sequence[list[Tensor]], bucket: int) -> Tensor:
    """Inner products of K rows of tensors, as a vector: (0, 0), (1, 0), (1, 1), (2, 0), …

    One by one, although a matrix product would be faster for many losses: it takes its sums in another order from
    entry to entry, so that equal gradients would not have equal products.
    """
    k, device = len(rows), rows[0][0].device
    bucket = max(bucket // k, 1)
    size = min(bucket, sum(map(Tensor.numel, rows[0])))
    # Every row begins at a multiple of 64 bytes: where a sum begins is where its order begins too.
    wide = torch.empty((k, -(-size // 8) * 8), dtype=torch.float64, device=device)
    total = torch.zeros(k * (k + 1) // 2, dtype=torch.float64, device=device)
    for _, pieces in buckets(rows, bucket, copying=True):
        used = wide[:, : sum(map(Tensor.numel, pieces[0]))].unbind()
        for row, own in zip(used, pieces, strict=True):
            row.copy_(own[0].reshape(-1) if len(own) == 1 else torch._C._nn.flatten_dense_tensors(own))
        total += torch.stack([torch.dot(used[i], used[j]) for i in range(k) for j in range(i + 1)])
    return total


def _matrix(products: Tensor, losses: Sequence[int], k: int) -> Tensor:
    """The symmetric matrix of all K losses, in which those without a gradient have zeros."""
    known = iter(products.unbind())
    pairs = {(i, j): next(known) for n, i in enumerate(losses) for j in losses[: n + 1]}
    zero = torch.zeros_like(products[0])
    return torch.stack([pairs.get((max(i, j), min(i, j)), zero) for i in range(k) for j in range(k)]).view(k, k)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
