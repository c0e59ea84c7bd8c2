"""Decoupled knowledge distillation: the target class and the others, as two losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill_optim.distill.inputs import expect_positive, expect_same, pair
from distill_optim.distill.kd import kl, log_probabilities


class DKD(NamedTuple):
    """The two parts of :func:`dkd`, scalars: TCKD and NCKD."""

    target: Tensor
    non_target: Tensor


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> DKD:
    r"""Knowledge distillation taken apart: how sure of the target class, and how alike among the others.

    With the probability of the target class :math:`p_t`, :math:`b = (p_t, 1 - p_t)`, and :math:`\hat p` the softmax
    over the other classes alone,

    .. math:: \mathrm{TCKD} = T^2\,\mathrm{KL}(b^t \,\Vert\, b^s), \qquad
        \mathrm{NCKD} = T^2\,\mathrm{KL}(\hat p^t \,\Vert\, \hat p^s)

    each the mean over the examples. Zhao et al., *Decoupled knowledge distillation* (CVPR 2022). Of one example
    :func:`~distill_optim.distill.kd` is :math:`\mathrm{TCKD} + (1 - p^t_t)\,\mathrm{NCKD}`, so a teacher that is sure
    of itself hides what it knows about the other classes; apart, the two get weights of their own. The paper adds them
    up with α = 1 and β from 1 to 10. Here they come as two losses, for an optimizer that keeps losses apart.

    Args:
        student: logits, shape (..., C), C at least 2.
        teacher: logits of the same shape; taken as a constant.
        labels: the target classes, integers from 0 to C − 1, shape (...). There is no index that is ignored: leave such
            examples out.
        temperature: T, by which the logits are divided.

    Returns:
        A named tuple of two scalars, in float32 or wider, for ``optimizer.step([ce, *dkd(...)])``.

    Raises:
        TypeError, ValueError: for shapes that do not fit, dtypes that are none of these, or a temperature that is not
            positive.

    Example:
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0]])
        >>> target, non_target = dkd(torch.tensor([[0.0, 1.0, 0.0]]), teacher, torch.tensor([0]))
        >>> target > non_target
        tensor(True)
    """
    expect_positive(temperature)
    student, teacher = pair(student, teacher)
    expect_same(student.shape, teacher.shape, "both need the same examples and the same classes")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected class indices, got {labels.dtype}; for probabilities take .argmax(-1)")
    classes = student.shape[-1]
    if labels.shape != student.shape[:-1] or classes < 2:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} for logits of shape {tuple(student.shape)}; "
            "expected one class per example, of at least two"
        )
    labels = labels.long()[..., None]
    others = torch.arange(classes - 1, device=labels.device)
    others = others + (others >= labels)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_probabilities(logits, temperature)
        rest = log_p.gather(-1, others)
        return torch.cat([log_p.gather(-1, labels), rest.logsumexp(-1, keepdim=True)], -1), rest.log_softmax(-1)

    (log_b, log_rest), (target_b, target_rest) = parts(student), parts(teacher)
    square = temperature**2
    return DKD(square * kl(target_b, log_b).mean(), square * kl(target_rest, log_rest).mean())
