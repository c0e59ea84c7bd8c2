"""The combined gradient of MoKD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype


def weighted_sum(gradients: Sequence[Sequence[Tensor | None]], weights: Tensor) -> list[Tensor]:
    r"""Per-parameter sums :math:`\sum_i w_i g_i` over the losses that reach the parameter.

    The gradients are overwritten: the sum grows in the first loss's memory, so the combination takes none of its own.

    Args:
        gradients: K sequences of P gradients, None where loss i does not reach parameter p; every parameter is
            reached by at least one loss.
        weights: shape (K,), on any device; they are not read on the host.

    Returns:
        P tensors.

    Example:
        >>> weighted_sum([[torch.ones(2)], [torch.tensor([1.0, 3.0])]], torch.tensor([0.5, 2.0]))
        [tensor([2.5000, 6.5000])]
    """
    total: list[Tensor | None] = [None] * len(gradients[0])
    for grads, weight in zip(gradients, weights.unbind(), strict=True):
        reached = [(p, g) for p, g in enumerate(grads) if g is not None]
        if not reached:
            continue
        grouped = _group_tensors_by_device_and_dtype([[g for _, g in reached]], with_indices=True)
        for (group,), indices in grouped.values():
            members = [g for g in group if g is not None]
            device, dtype = members[0].device, members[0].dtype
            torch._foreach_mul_(members, weight.to(device, dtype, non_blocking=device.type != "cpu"))
            into = [total[reached[i][0]] for i in indices]
            again = [(t, g) for t, g in zip(into, members, strict=True) if t is not None]
            if again:
                torch._foreach_add_([t for t, _ in again], [g for _, g in again])
        for p, g in reached:
            if total[p] is None:
                total[p] = g
    return [t for t in total if t is not None]
