"""The direction with equal cosines (ConFIG)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.linalg import equal_projections, unit_rows


def config(gram: Tensor, losses: Tensor | None = None) -> Tensor:
    r"""Weights of a step that has the same, positive, cosine with every one of independent gradients.

    .. math:: g_c = \Bigl(\sum_i \langle g_i, \hat d \rangle\Bigr) \hat d, \qquad \hat d = \frac{d}{\lVert d\rVert},
        \qquad d = U^+ \mathbf 1, \quad U = \Bigl[\frac{g_i}{\lVert g_i\rVert}\Bigr]_i

    Liu et al., *ConFIG: towards conflict-free training of physics informed neural networks* (ICLR 2025), eq. 2.
    The pseudo-inverse of U is :math:`U^\top C^+` with :math:`C = U U^\top`, so that

    .. math:: w_j = \frac{\sum_i \lVert g_i\rVert\, (C x)_i}{\mathbf 1^\top x} \cdot \frac{x_j}{\lVert g_j\rVert},
        \qquad x = C^+ \mathbf 1

    The step is the orthogonal projection of the summed gradient on d. Where the gradients are independent, that of
    :func:`~distill_optim.combine.imtl_g` has the same direction and another length.

    For dependent gradients equal cosines may be out of reach; d is the least-squares fit then, and where even that
    vanishes, as for opposed gradients, the weights are 0 and there is no step. A zero gradient has weight 0.

    Args:
        gram: inner products of the gradients, shape (..., K, K), of any real dtype.
        losses: not looked at.

    Returns:
        Weights of shape (..., K), float64, negative ones among them; 1 for a single gradient, so in the manner of a
        sum. Where the Gram matrix is not finite the weights are not finite either.

    Example:
        >>> config(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.7500, 1.5000], dtype=torch.float64)
    """
    cosines, lengths = unit_rows(gram.double())
    x, projections, squared = equal_projections(cosines)
    length = (lengths * projections).sum(-1) / torch.where(squared == 0, 1, squared)  # Σ ⟨gᵢ, d⟩ / ‖d‖²
    return torch.where(lengths == 0, 0, x / lengths) * length[..., None]
