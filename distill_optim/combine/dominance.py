"""Gradient dominance: the scale at which each loss's gradient enters the combination."""

from __future__ import annotations

import torch
from torch import Tensor

DOMINANCE = ("log", "norm", "none")

# ∇log L = ∇L / L explodes as L → 0; below this share of the largest loss the denominator stays where it is.
_LOG_FLOOR = 1e-8


def dominance_scales(dominance: str, gram: Tensor, losses: Tensor) -> Tensor:
    r"""Factors :math:`s_i` such that :math:`s_i \nabla L_i` enter the combination.

    ========  ==========================================  =====================================
    name      :math:`s_i`                                 the gradients become
    ========  ==========================================  =====================================
    ``log``   :math:`1/\max(|L_i|, 10^{-8}\max_j|L_j|)`    :math:`\nabla \log L_i` (DTO-KD, eq. of the dual)
    ``norm``  :math:`1/\lVert\nabla L_i\rVert`             unit vectors; a zero gradient stays zero
    ``none``  1                                           the raw gradients
    ========  ==========================================  =====================================

    The logarithm needs positive losses. For a loss :math:`\le 0` its absolute value stands in the denominator:
    progress is then measured relative to the loss's magnitude, and the direction stays a descent direction.

    Args:
        dominance: ``"log"``, ``"norm"`` or ``"none"``.
        gram: inner products of the raw gradients, shape (..., K, K).
        losses: values of the losses, shape (..., K).

    Returns:
        Tensor of shape (..., K), dtype and device of ``gram``.

    Raises:
        ValueError: for any other name.

    Example:
        >>> dominance_scales("log", torch.eye(2, dtype=torch.float64), torch.tensor([2.0, 0.5]))
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    if dominance == "log":
        size = losses.to(gram).abs()
        size = torch.maximum(size, _LOG_FLOOR * size.amax(-1, keepdim=True))
    elif dominance == "norm":
        size = torch.diagonal(gram, dim1=-2, dim2=-1).sqrt()
    elif dominance == "none":
        size = torch.ones_like(losses.to(gram))
    else:
        raise ValueError(f"dominance={dominance!r}: expected one of {', '.join(map(repr, DOMINANCE))}")
    return torch.where(size == 0, torch.ones_like(size), size).reciprocal()
