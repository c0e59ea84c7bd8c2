"""DOT carried over to AdamW: one first moment per loss, one second moment of their sum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill_optim.update import triton_dot_adamw


def dot_adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    summed: Sequence[Tensor],
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
    foreach: bool,
    fused: bool | None,
    on_device: bool,
    differentiable: bool = False,
) -> None:
    r"""One step of AdamW with a first moment per loss, in place.

    .. math::
        m_i &\leftarrow \beta_{1i} m_i + (1 - \beta_{1i})\, g_i, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) \Bigl(\sum_i g_i\Bigr)^2 \\
        \theta &\leftarrow (1 - \gamma\lambda)\,\theta
            - \gamma \sum_i \frac{m_i}{1 - \beta_{1i}^t} \Big/ \Bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\Bigr)

    With equal :math:`\beta_{1i}` this is AdamW on the summed loss. A loss that does not reach a parameter in this
    step counts there as a zero gradient, as it would in the sum; a parameter that one loss alone reaches uses β₁
    for that loss.

    With ``fused`` on a GPU one kernel of our own takes all losses at once, where it can
    (:func:`~distill_optim.update.multi_tensor.launches`).

    Args:
        params: P parameters, updated.
        gradients: K sequences of P gradients, None where loss i does not reach parameter p.
        summed: P gradients of the summed loss.
        exp_avgs: K sequences of P first moments, updated.
        exp_avg_sqs: P second moments, updated.
        max_exp_avg_sqs: P running maxima of them, updated (amsgrad), or empty.
        steps: P step counts (0-d tensors), updated.
        lr, beta2, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        beta1: β₁ where one loss alone reaches the parameter.
        beta1s: β₁ of each loss, length K.
        foreach: whether all parameters of a dtype and device go through each operation at once.
        fused: whether to have a kernel try it first.
        on_device: whether step counts and options must not be read on the host (fused, or capturable, as which
            torch traces every compiled step).
        differentiable: whether the step is to be recorded by autograd.
    """
    if fused and triton_dot_adamw.dot_adamw(
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr=lr,
        beta1=beta1,
        beta1s=beta1s,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    ):
        return
    on_device |= differentiable
    # A tensor of one element may have any number of dimensions.
    lr, beta1, beta2, *beta1s = (x.squeeze() if isinstance(x, Tensor) else x for x in (lr, beta1, beta2, *beta1s))
    if not on_device:
        beta1, beta2, *beta1s = map(float, (beta1, beta2, *beta1s))
    # Parameters that the same losses reach share one β₁ per loss, and so go through the same operations together.
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for p, param in enumerate(params):
        reached = tuple(grads[p] is not None for grads in gradients)
        alike[(param.device, param.dtype, reached) if foreach else p].append(p)
    for batch in alike.values():
        reached = tuple(grads[batch[0]] is not None for grads in gradients)
        _update(
            [_real(params[p]) for p in batch],
            [[_real(g) for g in (grads[p] for p in batch) if g is not None] for grads in gradients],
            [_real(summed[p]) for p in batch],
            [[_real(moments[p]) for p in batch] for moments in exp_avgs],
            [_real(exp_avg_sqs[p]) for p in batch],
            [_real(max_exp_avg_sqs[p]) for p in batch] if max_exp_avg_sqs else [],
            [steps[p] for p in batch],
            [beta1 if here and sum(reached) == 1 else own for here, own in zip(reached, beta1s, strict=True)],
            lr=lr,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            on_device=on_device,
            differentiable=differentiable,
        )


def _update(
    params: list[Tensor],
    gradients: list[list[Tensor]],
    summed: list[Tensor],
    exp_avgs: list[list[Tensor]],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    beta1s: list[float | Tensor],
    *,
    lr: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool,
    on_device: bool,
    differentiable: bool,
) -> None:
    torch._foreach_add_(steps, 1)
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)

    torch._foreach_mul_(exp_avg_sqs, beta2)
    if isinstance(beta2, Tensor):
        torch._foreach_addcmul_(exp_avg_sqs, torch._foreach_mul(summed, 1 - beta2), summed)
    else:
        torch._foreach_addcmul_(exp_avg_sqs, summed, summed, 1 - beta2)
    if max_exp_avg_sqs:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
    denominators = list(torch._foreach_sqrt(max_exp_avg_sqs or exp_avg_sqs))
    corrections = [c**0.5 for c in bias_corrections(beta2, steps, on_device)]
    if differentiable:
        denominators = list(torch._foreach_div(denominators, corrections))  # the backward of a root needs the root
    else:
        torch._foreach_div_(denominators, corrections)
    torch._foreach_add_(denominators, eps)

    for grads, moments, beta in zip(gradients, exp_avgs, beta1s, strict=True):
        if grads and maximize:
            grads = list(torch._foreach_neg(grads))
        if grads and not isinstance(beta, Tensor):
            torch._foreach_lerp_(moments, grads, 1 - beta)
        else:
            # A missing gradient is a zero; and a tensor cannot be the weight of a lerp without being read.
            torch._foreach_mul_(moments, beta)
            if grads:
                torch._foreach_add_(moments, torch._foreach_mul(grads, 1 - beta))
        step_sizes = [-lr / c for c in bias_corrections(beta, steps, on_device)]
        if on_device:
            # A step size on the device cannot be a scalar argument, so it goes through a copy of the moment. What is
            # recorded needs a copy that the next step does not write into.
            kept = [moment.clone() for moment in moments] if differentiable else moments
            torch._foreach_addcdiv_(params, torch._foreach_mul(kept, step_sizes), denominators)
        else:
            torch._foreach_addcdiv_(params, moments, denominators, [float(s) for s in step_sizes])


def bias_corrections(beta: float | Tensor, steps: list[Tensor], on_device: bool) -> list[Any]:
    """1 − β^t of each parameter: numbers, or 0-d tensors where the step counts may not be read on the host."""
    if on_device:
        # In float64: the counts are float32, in which 1 − 0.999^t has no more than four digits at first.
        return list((1 - beta ** torch.stack(steps).double()).unbind())
    return [1 - beta ** step.item() for step in steps]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
