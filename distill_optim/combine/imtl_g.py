"""Equal projections on all gradients (IMTL-G)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.linalg import ROUNDING, equal_projections, unit_rows
from distill_optim.combine.rules import where_finite


def imtl_g(gram: Tensor, losses: Tensor | None = None) -> Tensor:
    r"""Weights whose combination has the same projection on every gradient.

    .. math:: \Bigl\langle \sum_j \alpha_j g_j,\ \frac{g_i}{\lVert g_i\rVert} \Bigr\rangle = p \ \text{ for every } i,
        \qquad \sum_j \alpha_j = 1

    Liu et al., *Towards impartial multi-task learning* (ICLR 2021). With C the Gram matrix of the unit gradients
    the solution is

    .. math:: \alpha_i = \frac{x_i / \lVert g_i\rVert}{\sum_j x_j / \lVert g_j\rVert}, \qquad x = C^+ \mathbf 1

    which for independent gradients is the paper's :math:`g_1 U^\top (D U^\top)^{-1}`. Departures from it:

    * Where :math:`\sum_j x_j / \lVert g_j\rVert` is negative (a short gradient between two long ones) the paper's step
      climbs every loss, :math:`p < 0`. Here its absolute value divides: the weights sum to -1, and :math:`p > 0`.
    * Where that sum vanishes no such weights exist. It counts as no smaller than its rounding error, so the weights
      grow to about 1e14, finite and in the right direction, and sum to less than 1.
    * Dependent gradients, which have no inverse, get the pseudo-inverse: equal projections where any combination has
      them, the least-squares fit otherwise. Opposed gradients leave no direction at all and have weights of 0.
    * A zero gradient has weight 0 and takes no part.

    Args:
        gram: inner products of the gradients, shape (..., K, K), of any real dtype.
        losses: not looked at.

    Returns:
        Weights of shape (..., K), float64, negative ones among them. Where the Gram matrix is not finite the weights
        are not finite either.

    Example:
        >>> imtl_g(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    gram = gram.double()
    cosines, lengths = unit_rows(gram)
    x, _, _ = equal_projections(cosines)
    weights = torch.where(lengths == 0, 0, x / lengths)
    size = weights.abs().sum(-1, keepdim=True)
    total = torch.maximum(weights.sum(-1, keepdim=True).abs(), ROUNDING * size)
    return where_finite(gram, weights / torch.where(size == 0, 1, total))
