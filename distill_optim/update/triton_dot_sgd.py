"""DOT's update with all losses in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from distill_optim.update import multi_tensor


def dot_sgd(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    buffers: Sequence[list[Tensor | None]],
    *,
    lr: float | Tensor,
    momentum: float,
    momenta: Sequence[float],
    gains: Sequence[float],
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    """The step of :func:`~distill_optim.update.dot_sgd`, in one launch per device and dtype, where it can be.

    The parameter and each loss's gradient are read once, each buffer is read and written once: 3K + 2 words per
    parameter. Gradients are only read.

    Args:
        params, gradients, buffers, lr, momentum, momenta, gains, dampening, weight_decay, nesterov, maximize: as in
            :func:`~distill_optim.update.dot_sgd`.
        grad_scale: one number on a device, which the gradients are divided by.
        found_inf: one number on a device; unless it is 0 the step is skipped. Buffers that it would have made are zeros
            then, and no longer count as new.

    Returns:
        Whether the step was taken; if not, nothing was touched (see :func:`~.multi_tensor.launches`).
    """
    sign = -1 if maximize else 1
    found = multi_tensor.launches(
        "dot_sgd",
        params,
        gradients,
        buffers,
        lr=lr,
        numbers=(sign, weight_decay, 1 - dampening, nesterov, momentum, *momenta, *gains),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )

    def remembers(loss: int, p: int) -> bool:
        shared = sum(column[p] is not None for column in gradients) > 1
        return gradients[loss][p] is not None and (momenta[loss] if shared else momentum) != 0

    for launch in found or ():
        rows = launch.rows[2 + len(gradients) :]
        new = [launch.make_missing(buffers[i], row, partial(remembers, i)) for i, row in enumerate(rows)]
        launch.run(new, buffers)
    return found is not None
