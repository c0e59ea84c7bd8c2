"""DOT's AdamW with all losses in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill_optim.update import multi_tensor


def dot_adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    exp_avgs: Sequence[Sequence[Tensor]],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta1s: Sequence[float | Tensor],
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    """The step of :func:`~distill_optim.update.dot_adamw`, in one launch per device and dtype, where it can be.

    Each loss's gradient is read once, and their sum is not stored; moments and the parameter are read and written once:
    3K + 4 words per parameter, 3K + 6 with ``max_exp_avg_sqs``.

    Args:
        params, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lr, beta1, beta1s, beta2, eps, weight_decay,
            maximize: as in :func:`~distill_optim.update.dot_adamw`. Gradients are only read.
        steps: P step counts, each one float32 on the parameter's device; updated, unless the step is skipped.
        grad_scale: one number on a device, which the gradients are divided by.
        found_inf: one number on a device; unless it is 0 the step is skipped.

    Returns:
        Whether the step was taken; if not, nothing was touched (see :func:`~.multi_tensor.launches`). It cannot be for
        a parameter that no loss reaches.
    """
    if not multi_tensor.has_kernels(params) or not all(
        any(g is not None for g in column) for column in zip(*gradients, strict=True)
    ):
        return False
    buffers: list[multi_tensor.Column] = [*exp_avgs, exp_avg_sqs, max_exp_avg_sqs or [None] * len(params)]
    return multi_tensor.run_counted(
        "dot_adamw",
        params,
        gradients,
        buffers,
        steps,
        lr=lr,
        numbers=(-1 if maximize else 1, weight_decay, beta1, beta2, eps, *beta1s),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
