"""Projection of the mean gradient onto the cone of directions that no loss objects to (DualProj)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_optim.combine.linalg import slopes
from distill_optim.combine.qp import orthant_qp, share_alike
from distill_optim.combine.rules import vector


def dualproj(
    gram: Tensor, losses: Tensor | None = None, *, preference: Sequence[float] | Tensor | None = None
) -> Tensor:
    r"""Weights of the vector nearest to the preferred combination that conflicts with no loss.

    .. math:: g^* = \arg\min_{d} \lVert d - \textstyle\sum_i u_i g_i \rVert
        \quad \text{subject to} \quad \langle d, g_i \rangle \ge 0 \text{ for all } i

    with :math:`u_i = 1/K` where no preference is given. By duality :math:`g^* = \sum_i w_i g_i` with

    .. math:: w = \arg\min_{w \ge u} \tfrac12 w^\top G w

    (Quinton & Rey, *Jacobian descent for multi-objective optimization*, 2024, eq. 3 and proposition 1; the projection
    itself is that of Lopez-Paz & Ranzato, *Gradient episodic memory*, NeurIPS 2017). If the preferred combination
    conflicts with nobody it is returned as it is. An exact solution, see :func:`~distill_optim.combine.qp.orthant_qp`.

    Args:
        gram: inner products of the gradients, shape (..., K, K).
        losses: not looked at.
        preference: K numbers of at least 0; None stands for 1/K each.

    Returns:
        Weights, shape (..., K), float64, none below its preference.

    Raises:
        ValueError: for another number of preferences than of losses.

    Example:
        >>> dualproj(torch.tensor([[1.0, -0.5], [-0.5, 4.0]]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> dualproj(torch.tensor([[1.0, -1.5], [-1.5, 4.0]]))
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """
    gram = gram.double()
    u = preferred(gram, preference)
    return u + share_alike(gram, orthant_qp(gram, slopes(gram, u)[..., None, :])[..., 0, :])


def preferred(gram: Tensor, preference: Sequence[float] | Tensor | None) -> Tensor:
    """The preference as a tensor of shape (..., K); its sum is 1 where none is given.

    Example:
        >>> preferred(torch.eye(2), None)
        tensor([0.5000, 0.5000])
    """
    k = gram.shape[-1]
    if preference is None:
        return torch.full_like(gram[..., 0], 1 / k)
    if len(preference) != k:
        raise ValueError(f"preference: expected one for each of {k} losses, got {len(preference)}")
    return vector(preference, gram).expand(gram.shape[:-1])
