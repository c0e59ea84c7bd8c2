"""Relational knowledge distillation: distances and angles within a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_optim.distill.inputs import expect_same, full_precision, pair, unit


class RKD(NamedTuple):
    """The two parts of :func:`rkd`, scalars."""

    distance: Tensor
    angle: Tensor


def relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, N) in units of their mean, and the cosines (N, N, N) of the angles at the first index."""
    difference = x[None] - x[:, None]
    distance = torch.linalg.vector_norm(difference, dim=-1)
    mean = distance.sum() / (len(x) * (len(x) - 1))
    direction = unit(difference)
    with full_precision(x):
        cosine = direction @ direction.mT
    return distance / mean.masked_fill(mean == 0, 1), cosine


def rkd(student: Tensor, teacher: Tensor) -> RKD:
    r"""What examples are to each other instead of what they are.

    With Huber's :math:`\ell` (δ = 1), the mean distance μ of two examples, and :math:`e_{ij} = (x_j - x_i)/\lVert x_j -
    x_i \rVert`,

    .. math:: \mathrm{distance} = \frac1{N^2} \sum_{i,j} \ell\Bigl(\frac{\lVert x^s_i - x^s_j \rVert}{\mu_s},
        \frac{\lVert x^t_i - x^t_j \rVert}{\mu_t}\Bigr), \qquad
        \mathrm{angle} = \frac1{N^3} \sum_{i,j,k} \ell\bigl(\langle e^s_{ij}, e^s_{ik} \rangle, \langle e^t_{ij},
        e^t_{ik} \rangle\bigr)

    Park et al., *Relational knowledge distillation* (CVPR 2019), eq. 4 to 9, averaged as in the authors' code, over
    equal indices too. The widths may differ. Moving, turning or scaling all embeddings of one side changes nothing.
    The paper's weights are 25 and 50 for classification, and 1 and 2 for metric learning.

    Args:
        student: embeddings of shape (N, D), N at least 2. Memory grows with N²·D and N³.
        teacher: embeddings of shape (N, D'); taken as a constant.

    Returns:
        A named tuple of two scalars, in float32 or wider, for ``optimizer.step([ce, *rkd(...)])``.

    Raises:
        TypeError, ValueError: for shapes that do not fit, or what is no floating-point tensor.

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> turned = teacher @ torch.tensor([[0.0, 4.0], [-4.0, 0.0]])
        >>> rkd(turned, teacher)
        RKD(distance=tensor(0.), angle=tensor(0.))
    """
    student, teacher = pair(student, teacher)
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(
                f"{name}: expected embeddings of shape (N, D), N at least 2, got {tuple(x.shape)}; pool or flatten them"
            )
    expect_same(student.shape[:1], teacher.shape[:1], "both need the same examples", "batch")
    (distance, angle), (target_distance, target_angle) = relations(student), relations(teacher)
    return RKD(F.smooth_l1_loss(distance, target_distance), F.smooth_l1_loss(angle, target_angle))
