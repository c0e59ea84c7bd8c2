"""Gradients of several losses, a few at a time: what is taken from them in between stays in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def buckets(rows: Sequence[list[Tensor]], most: int, *, copying: bool) -> Iterator[tuple[range, list[list[Tensor]]]]:
    """Rows of tensors in parts of at most so many elements per row.

    Args:
        rows: of equal length, with as many elements at each position; at least one row.
        most: number of elements.
        copying: whether a piece of a tensor that is not contiguous may be a copy of it. If not, such a tensor is a part
            by itself if it is larger.

    Yields:
        The positions, and each row's tensors there; for a larger tensor its position and flat pieces, one by one.

    Example:
        >>> import torch
        >>> row = [torch.zeros(2, 2), torch.zeros(()), torch.zeros(7)]
        >>> [(list(at), [t.numel() for t in part]) for at, (part,) in buckets([row], 5, copying=True)]
        [([0, 1], [4, 1]), ([2], [5]), ([2], [2])]
    """
    start = filled = 0
    for n, size in enumerate(map(Tensor.numel, rows[0])):
        if filled + size > most and n > start:
            yield range(start, n), [row[start:n] for row in rows]
            start, filled = n, 0
        if size > most and (copying or all(row[n].is_contiguous() for row in rows)):
            for pieces in zip(*(row[n].reshape(-1).split(most) for row in rows), strict=True):
                yield range(n, n + 1), [[piece] for piece in pieces]
            start = n + 1
        else:
            filled += size
    if start < len(rows[0]):
        yield range(start, len(rows[0])), [row[start:] for row in rows]
