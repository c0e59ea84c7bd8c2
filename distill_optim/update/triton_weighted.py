"""MoKD's combination and update in one kernel: the combined gradient is never written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill_optim.update import multi_tensor


def weighted_sgd(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    r"""A step of ``torch.optim.SGD`` along :math:`\sum_i w_i g_i`, in one launch per device and dtype, where it can be.

    A parameter that one loss alone reaches takes that loss's gradient as it is; one that none reaches is left alone.
    Each gradient is read once, the parameter and the buffer are read and written once: K + 4 words per parameter, K + 2
    without momentum. In float32 and float64 the sum is rounded as :func:`~distill_optim.update.weighted_sum` rounds it;
    half precision is computed in float32, and rounded once, at the end.

    Args:
        params: P parameters, updated.
        gradients: K sequences of P gradients, None where loss i does not reach parameter p; only read.
        weights: shape (K,), on a device, where they stay.
        buffers: P momentum buffers, None before the first step; updated, and filled where None.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        grad_scale: one number on a device, which the gradients are divided by.
        found_inf: one number on a device; unless it is 0 the step is skipped. Buffers that it would have made are zeros
            then, and no longer count as new.

    Returns:
        Whether the step was taken; if not, nothing was touched (see :func:`~.multi_tensor.launches`), and
        :func:`~distill_optim.update.weighted_sum` and torch can take it.

    Example:
        >>> p, g = torch.ones(2), torch.ones(2)
        >>> weighted_sgd(
        ...     [p], [[g], [g]], torch.tensor([0.5, 1.5]), [None],
        ...     lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False,
        ... )
        False
        >>> p  # not on a GPU, so nothing was done
        tensor([1., 1.])
    """
    sign = -1 if maximize else 1
    found = multi_tensor.launches(
        "weighted_sgd",
        params,
        gradients,
        [buffers],
        lr=lr,
        weights=weights,
        numbers=(sign, weight_decay, 1 - dampening, nesterov, momentum),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    for launch in found or ():
        new = launch.make_missing(buffers, launch.rows[-1], lambda p: momentum != 0)
        launch.run([new], [buffers])
    return found is not None


def weighted_adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    r"""A step of ``torch.optim.AdamW`` along :math:`\sum_i w_i g_i`; otherwise as :func:`weighted_sgd`.

    K + 6 words per parameter, K + 8 with ``max_exp_avg_sqs``.

    Args:
        params, gradients, weights, grad_scale, found_inf: as in :func:`weighted_sgd`.
        exp_avgs, exp_avg_sqs: P first and P second moments, updated.
        max_exp_avg_sqs: P running maxima of the second moments, updated (amsgrad), or empty.
        steps: P step counts, each one float32 on the parameter's device; updated, unless the step is skipped.
        lr, beta1, beta2, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.

    Returns:
        As in :func:`weighted_sgd`.
    """
    return multi_tensor.run_counted(
        "weighted_adamw",
        params,
        gradients,
        [exp_avgs, exp_avg_sqs, max_exp_avg_sqs or [None] * len(params)],
        steps,
        lr=lr,
        weights=weights,
        numbers=(-1 if maximize else 1, weight_decay, beta1, beta2, eps),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
