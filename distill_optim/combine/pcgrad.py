"""Gradient surgery (PCGrad): every gradient without the part of it that opposes another."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this K the average goes over all (K − 1)! orders, 120 for each loss; beyond, over as many that are drawn.
_MAX_EXACT = 6
_DRAWS = 120


def pcgrad(
    gram: Tensor, losses: Tensor | None = None, *, orders: int | None = 1, generator: torch.Generator | None = None
) -> Tensor:
    r"""Weights of the sum of the gradients, each projected off those that it conflicts with.

    .. math:: g_i' \leftarrow g_i' - \frac{\langle g_i', g_j \rangle}{\lVert g_j \rVert^2}\, g_j
        \quad\text{if } \langle g_i', g_j \rangle < 0, \qquad\text{for all } j \ne i \text{ in random order}

    Yu et al., *Gradient surgery for multi-task learning* (NeurIPS 2020), algorithm 1; :math:`g_i'` starts as
    :math:`g_i`, the step is :math:`\sum_i g_i'`. For two losses it conflicts with neither. For more it may, and depends
    on the order; :func:`pcgrad_average` does not.

    Only the coefficients of the :math:`g_i'` are computed, for all i and all orders at once.

    Args:
        gram: inner products of the gradients, shape (..., K, K), of any real dtype.
        losses: not looked at.
        orders: number of random orders for every loss whose mean is taken. None stands for the mean over all orders,
            exact up to K = 6 and of 120 drawn ones beyond.
        generator: draws the orders, on the device of ``gram``; None stands for that device's default generator.

    Returns:
        Weights of shape (..., K), float64, at least 1 each. Where the Gram matrix is not finite the weights are not
        finite either.

    Raises:
        ValueError: for fewer orders than one.

    Example:
        >>> pcgrad(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([1.2500, 2.0000], dtype=torch.float64)
    """
    if orders is not None and orders < 1:
        raise ValueError(f"orders={orders!r}: expected a positive number, or None for the mean over all")
    gram = gram.double()
    k = gram.shape[-1]
    if orders is None and k <= _MAX_EXACT:
        visits = _all_orders(k, gram.device)
    else:
        visits = random_orders((*gram.shape[:-2], orders or _DRAWS, k), gram.device, generator)
    visits = visits.expand(*gram.shape[:-2], *visits.shape[-3:])
    entries = gram.flatten(-2)[..., None, None, :].expand(*visits.shape[:-1], k * k)
    squared = entries.gather(-1, visits * (k + 1))
    # ⟨gᵢ′, gⱼ⟩ for the j that are still to be visited.
    inner = entries.gather(-1, torch.arange(k, device=gram.device)[:, None] * k + visits)
    shares = [inner[..., :0]]
    for position in range(k - 1):
        conflict, length = inner[..., :1], squared[..., position, None]
        # A zero gradient conflicts with nothing, nor does one whose square underflows.
        shares.append(torch.where((conflict < 0) & (length > 0), -conflict / length, 0))
        rest = entries.gather(-1, visits[..., position, None] * k + visits[..., position + 1 :])
        inner = inner[..., 1:] + shares[-1] * rest
    # Back from the order of the visit to that of the losses: gᵢ′ = gᵢ + Σⱼ cᵢⱼ gⱼ.
    c = torch.zeros((*visits.shape[:-1], k), dtype=gram.dtype, device=gram.device)
    weights = 1 + c.scatter(-1, visits, torch.cat(shares, -1)).sum(-2).mean(-2)
    return torch.where(torch.isfinite(gram).all(-1).all(-1)[..., None], weights, torch.nan)


def pcgrad_average(gram: Tensor, losses: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """:func:`pcgrad` with the mean over all orders: the expectation of its step, which is the same every time.

    Args:
        gram: inner products of the gradients, shape (..., K, K), of any real dtype.
        losses: not looked at.
        generator: as for :func:`pcgrad`; it is asked only above K = 6, where 120 orders for every loss stand for all.

    Returns:
        Weights of shape (..., K), float64, at least 1 each. Where the Gram matrix is not finite the weights are not
        finite either.

    Example:
        >>> gram = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, 0.0], [-0.5, 0.0, 1.0]])
        >>> pcgrad_average(gram)
        tensor([2.0000, 1.6250, 1.6250], dtype=torch.float64)
    """
    return pcgrad(gram, losses, orders=None, generator=generator)


def random_orders(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """For each of K losses the K − 1 others in random order, shape (..., K, K − 1); ``shape`` is (..., K)."""
    k = shape[-1]
    numbers = torch.rand((*shape, k), dtype=torch.float64, device=device, generator=generator)
    # Row i without i, which comes last: all other numbers are below 1.
    return (numbers + torch.eye(k, dtype=torch.float64, device=device)).argsort(-1)[..., :-1]


def _all_orders(k: int, device: torch.device) -> Tensor:
    """For each of K losses the K − 1 others in every order, shape ((K − 1)!, K, K − 1)."""
    orders = torch.zeros((1, 0), dtype=torch.int64, device=device)
    for n in range(1, k):
        # All orders of n things: any of them first, then the rest in any order, which skips its number.
        first = torch.arange(n, device=device)[:, None, None].expand(n, len(orders), 1)
        orders = torch.cat([first, orders + (orders >= first)], -1).flatten(0, 1)
    return orders[:, None] + (orders[:, None] >= torch.arange(k, device=device)[:, None])
