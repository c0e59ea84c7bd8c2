"""Weights that look at nothing: the baselines that every method has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_optim.combine.rules import losses_only, vector


@losses_only
def sum(gram: Tensor | None, losses: Tensor) -> Tensor:
    """Weight 1 for every loss: the step of the summed loss.

    Args:
        gram: not looked at.
        losses: values of the losses, shape (..., K); their shape, type and device count.

    Returns:
        Weights of shape (..., K), float64.

    Example:
        >>> sum(None, torch.zeros(2))
        tensor([1., 1.], dtype=torch.float64)
    """
    return torch.ones_like(losses, dtype=torch.float64)


@losses_only
def mean(gram: Tensor | None, losses: Tensor) -> Tensor:
    """Weight 1/K for every loss.

    Args:
        gram: not looked at.
        losses: values of the losses, shape (..., K); their shape, type and device count.

    Returns:
        Weights of shape (..., K), float64.

    Example:
        >>> mean(None, torch.zeros(2))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return torch.full_like(losses, 1 / losses.shape[-1], dtype=torch.float64)


@losses_only
def constant(gram: Tensor | None, losses: Tensor, *, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Given weights, as in ``functools.partial(combine.constant, weights=[0.1, 0.9])``.

    Args:
        gram: not looked at.
        losses: values of the losses, shape (..., K).
        weights: K numbers; None stands for ones.

    Returns:
        Weights of shape (..., K), float64.

    Raises:
        ValueError: for another number of weights than of losses.

    Example:
        >>> constant(None, torch.zeros(2), weights=[0.1, 0.9])
        tensor([0.1000, 0.9000], dtype=torch.float64)
    """
    if weights is None:
        return torch.ones_like(losses, dtype=torch.float64)
    if len(weights) != losses.shape[-1]:
        raise ValueError(f"weights: expected one for each of {losses.shape[-1]} losses, got {len(weights)}")
    return vector(weights, losses.double()).expand_as(losses)
