"""Every gradient projected onto the cone of directions that no loss objects to, then the mean (UPGrad)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill_optim.combine.dualproj import preferred
from distill_optim.combine.qp import orthant_qp, share_alike


def upgrad(gram: Tensor, losses: Tensor | None = None, *, preference: Sequence[float] | Tensor | None = None) -> Tensor:
    r"""Weights of the combination of the projected gradients.

    .. math:: g^* = \sum_i u_i\, \pi_J(g_i), \qquad
        \pi_J(g) = \arg\min_{d} \lVert d - g \rVert \ \text{ subject to } \ \langle d, g_j \rangle \ge 0
        \text{ for all } j

    with :math:`u_i = 1/K` where no preference is given (Quinton & Rey, *Jacobian descent for multi-objective
    optimization*, 2024, eq. 3 and 5). It conflicts with no loss, as a sum of vectors that do not, and unlike
    min-norm it grows linearly with every gradient that is in nobody's way. K quadratic programs that share their
    matrix, solved at once and exactly, see :func:`~distill_optim.combine.qp.orthant_qp`.

    Args:
        gram: inner products of the gradients, shape (..., K, K).
        losses: not looked at.
        preference: K numbers of at least 0; None stands for 1/K each.

    Returns:
        Weights, shape (..., K), float64, none below its preference.

    Raises:
        ValueError: for another number of preferences than of losses.

    Example:
        >>> upgrad(torch.tensor([[1.0, -0.5], [-0.5, 4.0]]))
        tensor([0.7500, 0.5625], dtype=torch.float64)
    """
    gram = gram.double()
    u = preferred(gram, preference)
    # Row i is G uᵢeᵢ, the linear term of the projection of uᵢgᵢ.
    return u + share_alike(gram, orthant_qp(gram, gram * u[..., :, None]).sum(-2))
