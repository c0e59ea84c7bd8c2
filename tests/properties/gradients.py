"""Gradients of K losses in the mixtures that break solvers, and what rounding may do to statements about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from distill_optim import combine

# An entry of G carries at most n roundings of ‖gᵢ‖‖gⱼ‖ · eps for n elements, an entry of Gπ at most K more, and here
# n + K ≤ 66. Hence an error of ROUNDING · ‖gᵢ‖ · reach in ⟨g*, gᵢ⟩, where reach = Σ πⱼ‖gⱼ‖ bounds ‖g*‖.
ROUNDING = 64 * torch.finfo(torch.float64).eps

# A row is new, or stands in a relation to an earlier one. The first is what an example shrinks to.
_RELATIONS = ("new", "zero", "duplicate", "nearly equal", "parallel", "opposed")

# Up to this many losses every element is drawn on its own and shrinks; beyond, a seed gives the bulk.
_ELEMENTWISE = 4

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def gradients(
    draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> Tensor:
    """K gradients as rows, of rank 0 to K, lengths over 12 orders of magnitude, in any relation to one another.

    A row is u · 2^e. The shapes u live in a space of ``rank`` dimensions: small integers, whose relations every
    dtype keeps exactly, or a Gaussian embedding of them, whose relations hold up to that dtype's rounding.
    """
    k = draw(st.integers(min_losses, max_losses))
    rank = draw(st.integers(0, k))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes: NDArray[Any] = rng.integers(-3, 4, (k, rank)).astype(float)
    exponents = [0] * k
    spread = draw(st.sampled_from([0, 20]))  # 2^±20: 12 orders of magnitude
    zeros = draw(st.booleans())  # rarer than one row in six, or the origin is nearly always in the hull
    for i in range(k):
        if k <= _ELEMENTWISE:
            shapes[i] = draw(st.lists(st.integers(-3, 3), min_size=rank, max_size=rank))
        exponents[i] = draw(st.integers(-spread, spread))
        relation = draw(st.sampled_from(_RELATIONS)) if i else "new"
        if relation == "zero" and zeros:
            shapes[i] = 0
        elif relation not in ("new", "zero"):
            source = draw(st.integers(0, i - 1))
            shapes[i] = shapes[source]
            if relation == "opposed":
                shapes[i] *= -draw(st.sampled_from([1.0, 3.0, 0.1]))
            elif relation != "parallel":
                exponents[i] = exponents[source]
            if relation == "nearly equal" and rank:
                shapes[i, draw(st.integers(0, rank - 1))] += 10.0 ** -draw(st.integers(1, 12))
        if rank and not zeros and not shapes[i].any():
            shapes[i, 0] = 1
    if not rank:
        shapes = np.zeros((k, 1))
    elif draw(st.booleans()):
        # Summed row by row, not by BLAS, whose blocks may give equal rows unequal last digits.
        shapes = (shapes[:, :, None] * rng.standard_normal((rank, rank + 2))).sum(1)
    return torch.from_numpy(shapes * np.exp2(exponents)[:, None]).to(draw(st.sampled_from(dtypes)))


def gram_of(rows: Tensor) -> Tensor:
    return combine.gram([[row] for row in rows])


def reach(weights: Tensor, gram: Tensor) -> Tensor:
    """Σ πᵢ‖gᵢ‖, the length that Σ πᵢ gᵢ has before anything cancels: the unit of its rounding errors."""
    return weights @ gram.diagonal().sqrt()


def assert_same_vector(actual: Tensor, expected: Tensor, gram: Tensor) -> None:
    """Both weights give the same vector, in the metric of the Gram matrix.

    Optima are compared by their vectors because dependent gradients have many optimal weights. The tolerance is on the
    square: an error ε in G moves the minimum of ‖g‖² by ε, and two points of a convex set whose squared norms are
    within ε of the minimum are within √(4ε) of each other.
    """
    offset = actual - expected
    unit = torch.maximum(reach(actual, gram), reach(expected, gram))
    assert offset @ gram @ offset <= 4 * ROUNDING * unit**2


@st.composite
def independent_gradients(draw: st.DrawFn, min_losses: int = 2, max_losses: int = 12) -> Tensor:
    """Linearly independent rows over 12 orders of magnitude: the optimal weights are unique.

    Before the scaling the diagonal exceeds the rest of its row (2(K − 1) at most) and every row is within a factor
    of 4 of the others in length, so the condition number of the unit rows stays below some 100.
    """
    k = draw(st.integers(min_losses, max_losses))
    if k <= _ELEMENTWISE:
        small = torch.tensor(draw(st.lists(st.integers(-2, 2), min_size=k * k, max_size=k * k))).view(k, k)
    else:
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        small = torch.from_numpy(rng.integers(-2, 3, (k, k)))
    spread = draw(st.sampled_from([0, 20]))
    exponents = draw(st.lists(st.integers(-spread, spread), min_size=k, max_size=k))
    rows = small.fill_diagonal_(0).double() + 2 * k * torch.eye(k, dtype=torch.float64)
    return rows * torch.tensor(exponents).double().exp2()[:, None]
