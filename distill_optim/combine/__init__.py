"""From the Gram matrix of the per-loss gradients and the loss values to one weight per loss.

Pure functions: no optimizer, no state, no read of a tensor on the host. The walk is

    Gram matrix, losses → :func:`dominance_scales` → a method such as :func:`min_norm` → :func:`weights`.

A method is a function of the Gram matrix after dominance handling, shape (K, K), and the loss values, shape (K,),
both float64 on one device; it returns K weights. Those that have a name are listed by :func:`names`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill_optim.combine.dominance import DOMINANCE, dominance_scales
from distill_optim.combine.gram import gram
from distill_optim.combine.min_norm import min_norm
from distill_optim.combine.qp import simplex_qp

__all__ = ["DOMINANCE", "Method", "dominance_scales", "gram", "method", "min_norm", "names", "simplex_qp", "weights"]

Method = Callable[[Tensor, Tensor], Tensor]

_METHODS: dict[str, Method] = {"min_norm": lambda gram, losses: min_norm(gram)}


def names() -> tuple[str, ...]:
    """Names that ``combine=`` takes.

    Example:
        >>> "min_norm" in names()
        True
    """
    return tuple(_METHODS)


def method(combine: str | Method) -> Method:
    """The function behind a name; a function stands for itself.

    Args:
        combine: one of :func:`names`, or a function of the Gram matrix and the losses.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something that is neither a name nor callable.

    Example:
        >>> method("min_norm")(torch.eye(2), torch.ones(2))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if isinstance(combine, str):
        if combine not in _METHODS:
            raise ValueError(f"combine={combine!r}: expected one of {', '.join(map(repr, names()))}, or a function")
        return _METHODS[combine]
    if not callable(combine):
        raise TypeError(f"combine={combine!r}: expected a name or a function (gram, losses) -> weights")
    return combine


def weights(
    gram: Tensor,
    losses: Tensor,
    *,
    combine: str | Method = "min_norm",
    dominance: str = "log",
    rescale: bool = True,
) -> Tensor:
    r"""Weights on the raw gradients, as :class:`~distill_optim.MoKDSGD` applies them.

    With :math:`s` from ``dominance``, :math:`\pi` from ``combine`` on the Gram matrix of the gradients
    :math:`s_i g_i`, the weights are :math:`w_i = \pi_i s_i`. ``rescale`` brings their sum to K, so that a learning
    rate tuned for the summed loss keeps its meaning; without it the step is :math:`\sum_i \pi_i s_i g_i` itself.

    Args:
        gram: inner products of the raw gradients, shape (K, K).
        losses: values of the losses, shape (K,).
        combine: name or function, see :func:`method`.
        dominance: ``"log"``, ``"norm"`` or ``"none"``, see :func:`dominance_scales`.
        rescale: whether the weights sum to K.

    Returns:
        Tensor of shape (K,), float64, on the device of ``gram``.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2), dominance="none")
        tensor([0.4000, 1.6000], dtype=torch.float64)
    """
    gram = gram.double()
    losses = losses.to(gram)
    scales = dominance_scales(dominance, gram, losses)
    shares = method(combine)(gram * torch.outer(scales, scales), losses).to(gram)
    if not rescale:
        return shares * scales
    # Relative to the largest first: equal ones are exactly 1 then, and so are the weights of equal gradients.
    raw = shares * (scales / scales.amax())
    raw = raw / raw.abs().amax()
    return raw * (raw.numel() / raw.sum())
