"""DOT's update where the gradients are never stored: autograd adds them to the momentum buffers."""

from __future__ import annotations

import torch
from torch import Tensor


def decay(params: list[Tensor], buffers: list[Tensor], *, momentum: float, weight_decay: float) -> None:
    r"""What stands before a backward pass that adds the gradient: :math:`v \leftarrow \mu v + \lambda\theta`.

    Args:
        params: P parameters.
        buffers: their momentum buffers, updated.
        momentum: μ.
        weight_decay: λ.
    """
    torch._foreach_mul_(buffers, momentum)
    if weight_decay:
        torch._foreach_add_(buffers, params, alpha=weight_decay)


def descend(params: list[Tensor], buffers: list[Tensor], *, lr: float | Tensor) -> None:
    r"""What stands after it: :math:`\theta \leftarrow \theta - \gamma v`.

    Args:
        params: P parameters, updated.
        buffers: their momentum buffers.
        lr: γ.
    """
    if isinstance(lr, Tensor):
        # Not read, and not multiplied into copies of the buffers.
        for p, buffer in zip(params, buffers, strict=True):
            p.addcmul_(buffer, lr.to(p.device, p.dtype), value=-1)
    else:
        torch._foreach_add_(params, buffers, alpha=-lr)
