"""Principal components of equal size (Aligned-MTL)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.linalg import ROUNDING, eigh

SCALES = ("min", "median", "rmse")


def aligned_mtl(gram: Tensor, losses: Tensor | None = None, *, scale: str = "min") -> Tensor:
    r"""Weights of the sum of the gradients whose matrix has been given a condition number of 1.

    .. math:: w = B \mathbf 1, \qquad B = \sqrt{\lambda}\, V \Lambda^{-1/2} V^\top, \qquad G = V \Lambda V^\top

    Senushkin et al., *Independent component alignment for multi-task learning* (CVPR 2023), algorithm 1. The rows
    :math:`\hat g_i = \sum_j B_{ij} g_j` are orthogonal and :math:`\sqrt\lambda` long where the gradients are
    independent, and of all such rows the closest to the gradients; their sum is the step. With :math:`\lambda` the
    smallest eigenvalue no component of a gradient is lengthened.

    Only eigenvalues above :math:`1.4\cdot 10^{-14}` of the largest take part. So a gradient that is 1e-7 of the longest
    is lost, unless ``dominance`` brings them to one length first: inner products in float64 say no more.

    The importance of a loss, which the paper leaves to the user, is 1 for each as in the authors' code: orthogonal
    gradients of one length are summed.

    Args:
        gram: inner products of the gradients, shape (..., K, K), of any real dtype.
        losses: not looked at.
        scale: which of the inverted eigenvalues :math:`\lambda` is: ``"min"``, ``"median"``, the lower of the two in
            the middle for an even number, or ``"rmse"``, their mean.

    Returns:
        Weights of shape (..., K), float64, in the manner of a sum; 1 each where all gradients are zero. Where the Gram
        matrix is not finite the weights are not finite either.

    Raises:
        ValueError: for another scale.

    Example:
        >>> aligned_mtl(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: expected one of {', '.join(map(repr, SCALES))}")
    values, vectors = eigh(gram.double())
    held = values > ROUNDING * values[..., -1:].clamp_min(0)
    rank = held.sum(-1, keepdim=True)
    if scale == "rmse":
        chosen = torch.where(held, values, 0).sum(-1, keepdim=True) / rank
    else:
        # They ascend, so those that are held are the last ones.
        first = values.shape[-1] - rank + ((rank - 1) // 2 if scale == "median" else 0)
        chosen = torch.take_along_dim(values, first.clamp(0, values.shape[-1] - 1), -1)
    ratio = torch.where(held, chosen / values, 0).sqrt()
    weights = (vectors * (ratio * vectors.sum(-2))[..., None, :]).sum(-1)
    return torch.where((rank == 0) & torch.isfinite(values), 1, weights)
