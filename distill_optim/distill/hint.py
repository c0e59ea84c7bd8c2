"""Hints: the squared distance of features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill_optim.distill.inputs import expect_same, pair


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of the features of one layer.

    .. math:: \frac1{|F|} \sum_i (F^s_i - F^t_i)^2

    Romero et al., *FitNets: hints for thin deep nets* (ICLR 2015), eq. 3, where it is half the sum and the student's
    features first pass a learned regressor; as a mean it does not grow with the batch and the layer. Where the widths
    differ, put a layer in between: ``hint(regressor(student), teacher)``.

    Args:
        student: features of any shape.
        teacher: features of the same shape; taken as a constant.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: for shapes that differ, or what is no floating-point tensor.

    Example:
        >>> hint(torch.zeros(2, 3), torch.full((2, 3), 2.0))
        tensor(4.)
    """
    student, teacher = pair(student, teacher)
    expect_same(student.shape, teacher.shape, "give the student's through a layer that maps its width to the teacher's")
    return F.mse_loss(student, teacher)
