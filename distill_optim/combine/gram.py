"""Gram matrices of gradients that live in lists of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements that are cast to float64 at a time: on a CPU small enough to stay in the cache between the cast and
# the dot products, on an accelerator large enough that the number of launches stays small.
_BUCKET = {"cpu": 1 << 18}
_BUCKET_ACCELERATOR = 1 << 22


def gram(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products of K gradients, each given as a list of tensors, accumulated in float64.

    The lists are never concatenated as a whole: they are walked in buckets that are cast to float64, so two
    gradients that nearly agree keep the digits of their difference (in float32 a relative gap of 1e-3 is already
    lost), whatever the tensors' type. No value is read on the host.

    Args:
        gradients: K sequences of equal length; entry ``[i][p]`` is the gradient of loss i with respect to
            parameter p, of any shape, dtype and device, or None where loss i does not reach parameter p (a zero).

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
    reached: defaultdict[tuple[tuple[int, ...], torch.device], list[int]] = defaultdict(list)
    for position, column in enumerate(zip(*gradients, strict=True)):
        losses = tuple(i for i, gradient in enumerate(column) if gradient is not None)
        if losses:
            first = column[losses[0]]
            assert first is not None
            reached[losses, first.device].append(position)
    if not reached:
        return torch.zeros((k, k), dtype=torch.float64)
    home = next(iter(reached))[1]
    zero = torch.zeros((), dtype=torch.float64, device=home)
    products: dict[tuple[int, int], Tensor] = {}
    for (losses, device), positions in reached.items():
        bucket = _BUCKET.get(device.type, _BUCKET_ACCELERATOR)
        columns = [_flat_buckets([gradients[i][p] for p in positions], bucket) for i in losses]
        for vectors in zip(*columns, strict=True):
            for a, i in enumerate(losses):
                for b, j in enumerate(losses[: a + 1]):
                    product = torch.dot(vectors[a], vectors[b])
                    if device != home:
                        product = product.to(home, non_blocking=home.type != "cpu")
                    products[i, j] = products[i, j] + product if (i, j) in products else product
    # One product per pair: the matrix is symmetric to the last bit.
    rows = [products.get((max(i, j), min(i, j)), zero) for i in range(k) for j in range(k)]
    return torch.stack(rows).view(k, k)


def _flat_buckets(tensors: Sequence[Tensor | None], bucket: int) -> Iterator[Tensor]:
    """The tensors' elements in order, as float64 vectors of at most ``bucket`` elements."""
    pieces: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        assert tensor is not None
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
