"""Gram matrices of gradients that live in lists of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distill_optim.sharding import Shards, add_up, local

# Elements that are cast to float64 at a time: on a CPU small enough to stay in the cache between the cast and
# the dot products, on an accelerator large enough that the number of launches stays small.
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
    reached: defaultdict[tuple[tuple[int, ...], torch.device, Shards], list[list[Tensor]]] = defaultdict(list)
    for column in zip(*gradients, strict=True):
        losses = tuple(i for i, gradient in enumerate(column) if gradient is not None)
        parts = [local(gradient) for gradient in column if gradient is not None]
        if losses:
            reached[losses, parts[0][0].device, parts[0][1]].append([part for part, _ in parts])
    if not reached:
        return torch.zeros((k, k), dtype=torch.float64)
    home = next(iter(reached))[1]
    zero = torch.zeros((), dtype=torch.float64, device=home)
    products: defaultdict[Shards, dict[tuple[int, int], Tensor]] = defaultdict(dict)
    for (losses, device, shards), columns in reached.items():
        sums = products[shards]
        bucket = _BUCKET.get(device.type, _BUCKET_ACCELERATOR)
        for vectors in zip(*(_flat_buckets(tensors, bucket) for tensors in zip(*columns, strict=True)), strict=True):
            for a, i in enumerate(losses):
                for b, j in enumerate(losses[: a + 1]):
                    product = torch.dot(vectors[a], vectors[b])
                    if device != home:
                        product = product.to(home, non_blocking=home.type != "cpu")
                    sums[i, j] = sums[i, j] + product if (i, j) in sums else product
    total = torch.zeros((k, k), dtype=torch.float64, device=home)
    for shards, sums in products.items():
        # One product per pair: the matrix is symmetric to the last bit.
        matrix = torch.stack([sums.get((max(i, j), min(i, j)), zero) for i in range(k) for j in range(k)]).view(k, k)
        add_up(matrix, shards)
        total = total + matrix
    return total


def _flat_buckets(tensors: Sequence[Tensor], bucket: int) -> Iterator[Tensor]:
    """The tensors' elements in order, as float64 vectors of at most ``bucket`` elements."""
    pieces: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = real.reshape(-1)
        for piece in flat.split(bucket) if flat.numel() > bucket else (flat,):
            if filled + piece.numel() > bucket:
                yield _join(pieces)
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece.numel()
    if pieces:
        yield _join(pieces)


def _join(pieces: list[Tensor]) -> Tensor:
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).double()
