"""Attention transfer: where a layer looks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill_optim.distill.inputs import expect_same, pair, unit


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of the attention maps of one layer.

    .. math:: Q = \operatorname{vec} \sum_c F_{c}^2, \qquad
        \mathrm{AT} = \frac1{N H W} \sum_n \Bigl\lVert \frac{Q^s_n}{\lVert Q^s_n \rVert} -
        \frac{Q^t_n}{\lVert Q^t_n \rVert} \Bigr\rVert^2

    Zagoruyko & Komodakis, *Paying more attention to attention* (ICLR 2017), eq. 2, as in the authors' code: the mean
    of the squares, where the equation has the norm. Its weight there is 1000/2. The widths may differ: channels are
    summed over. A map multiplied by a number other than 0 is the same map.

    Args:
        student: features of shape (N, C, H, W), or any other number of positions.
        teacher: features of the same shape but for the channels; taken as a constant.

    Returns:
        A scalar, in float32 or wider. For several layers, ``sum`` it over them.

    Raises:
        TypeError, ValueError: for shapes that do not fit, or what is no floating-point tensor.

    Example:
        >>> student = torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]])
        >>> attention_transfer(student, torch.cat([student, student], 1))
        tensor(0.)
    """
    student, teacher = pair(student, teacher)
    if student.ndim < 3:
        raise ValueError(
            f"student: expected features of shape (N, C, ...), got {tuple(student.shape)}; it has no positions"
        )
    s, t = (x.shape[:1] + x.shape[2:] for x in (student, teacher))
    expect_same(s, t, "resize one with F.adaptive_avg_pool2d or F.interpolate", "batch and positions")
    q_s, q_t = (unit(x.square().sum(1).flatten(1)) for x in (student, teacher))
    return F.mse_loss(q_s, q_t)
