"""The geometric mean of the losses (GLS)."""

from __future__ import annotations

from torch import Tensor

from distill_optim.combine.dominance import floored
from distill_optim.combine.rules import losses_only


@losses_only
def gls(gram: Tensor | None, losses: Tensor) -> Tensor:
    r"""Geometric loss strategy: descend on the geometric mean of the losses.

    .. math:: L = \Bigl(\prod_i L_i\Bigr)^{1/K}, \qquad \nabla L = \sum_i \frac{L}{K} \nabla \log L_i

    Chennupati et al., *MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning* (CVPR Workshops 2019). The weights belong to the gradients of the log losses, hence to
    ``dominance="log"``; they are all equal, so under ``rescale`` the step is that of :math:`\sum_i \log L_i`. A loss's
    unit does not change the direction.

    The mean is taken of the logarithms, because a product of many losses leaves the range of numbers. A loss
    :math:`\le 0` counts by its magnitude, with the floor of :func:`~distill_optim.combine.dominance_scales`.

    Args:
        gram: not looked at.
        losses: values of the losses, shape (..., K).

    Returns:
        Weights of shape (..., K), float64, all equal, in the unit of the losses; 0 where every loss is 0.

    Example:
        >>> gls(None, torch.tensor([4.0, 9.0]))
        tensor([3., 3.], dtype=torch.float64)
    """
    mean = floored(losses.double()).log().mean(-1, keepdim=True).exp()
    return (mean / losses.shape[-1]).expand_as(losses)
