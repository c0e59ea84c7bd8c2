"""The Nash bargaining solution among the losses (Nash-MTL)."""

from __future__ import annotations

from torch import Tensor

from distill_optim.combine.fairgrad import fairgrad


def nash_mtl(gram: Tensor, losses: Tensor | None = None) -> Tensor:
    r"""Weights of the Nash bargaining solution.

    .. math:: G \alpha = 1/\alpha, \qquad \alpha > 0

    elementwise, the optimality condition of :math:`\max_d \sum_i \log \langle g_i, d \rangle` over the directions of a
    given length (Navon et al., *Multi-task learning as a bargaining game*, ICML 2022, claim 3.1). Every loss
    contributes the same to the step, :math:`\alpha_i \langle g_i, d \rangle = 1`, and the direction does not change
    when a gradient is multiplied by a positive number.

    That is :func:`~distill_optim.combine.fairgrad` with α = 1, and solved as it is there. The authors approximate the
    solution by twenty convex programs, which CVXPY solves on the host, and keep the previous step's weights where a
    solver fails. Here :math:`G/\lVert G \rVert_F` stands for G, so that the weights do not depend on the unit of the
    gradients. Clipping of the step to length 1 is part of their code and not of this function.

    Args:
        gram: inner products of the gradients, shape (..., K, K).
        losses: not looked at.

    Returns:
        Positive weights, shape (..., K), float64.

    Example:
        >>> nash_mtl(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([1.0153, 2.0305], dtype=torch.float64)
    """
    return fairgrad(gram, alpha=1.0)
