"""The shortest vector in the convex hull of the gradients (MGDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.qp import simplex_qp
from distill_optim.combine.rules import where_finite


def min_norm(gram: Tensor, losses: Tensor | None = None) -> Tensor:
    r"""Weights of the shortest convex combination of the gradients.

    .. math:: \pi^* = \arg\min_{\pi \ge 0,\ \sum_i \pi_i = 1} \tfrac12 \Bigl\lVert \sum_i \pi_i g_i \Bigr\rVert^2

    Désidéri, *Multiple-gradient descent algorithm* (2012); Sener & Koltun (NeurIPS 2018); the dual of MoKD's
    and DTO-KD's worst relative improvement. :math:`g^* = \sum_i \pi^*_i g_i` conflicts with no loss:
    :math:`\langle g^*, g_i \rangle \ge \lVert g^* \rVert^2` for every i.

    For two losses the closed form

    .. math:: \pi_1 = \operatorname{clamp}\Bigl(\frac{g_{22} - g_{12}}{\lVert g_1 - g_2 \rVert^2}, 0, 1\Bigr)

    (the clamp is missing in the paper, where a weight may come out negative); for more an exact solution of the
    quadratic program, see :func:`~distill_optim.combine.qp.simplex_qp`. Gradients that are equal share their
    weight equally.

    Args:
        gram: inner products of the gradients, shape (..., K, K), of any real dtype.
        losses: not looked at.

    Returns:
        Weights on the simplex, shape (..., K), float64, on the device of ``gram``. Where the Gram matrix is not
        finite the weights are not finite either.

    Example:
        >>> min_norm(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    gram = gram.double()
    if gram.shape[-1] == 2:
        # ‖g₁ − g₂‖² = (g₁₁ − g₁₂) + (g₂₂ − g₁₂), so with both terms cut off at 0 the ratio is the clamped formula,
        # free of any guard that would have to know the scale.
        cross = gram[..., 0, 1]
        excess = torch.stack([gram[..., 1, 1] - cross, gram[..., 0, 0] - cross], -1).clamp_min(0)
        total = excess.sum(-1, keepdim=True)
        return where_finite(gram, torch.where(total == 0, 0.5, excess / total))
    return simplex_qp(gram)
