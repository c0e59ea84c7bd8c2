r"""Hypothesis strategies of gradients in the mixtures that break solvers.

A draw is a matrix J of K gradients as rows, shape (K, N) with N ≤ K + 2. Its rows are :math:`u_i 2^{e_i}` with shapes
:math:`u_i` of small integers, which every dtype on offer holds exactly, and so does their scaling by a power of two.
What a docstring below claims is therefore true of the tensor itself, in exact arithmetic, and not up to rounding.

The first four elements of the first four rows are drawn on their own, whatever K is, and shrink towards zero; a seed
gives the bulk. So up to K = 4 everything shrinks, and there is nothing that a larger example would lose on its way
there. The number of losses shrinks towards ``min_losses``, exponents towards 0, the dtype towards the first one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Relation = Literal["zero", "duplicate", "nearly equal", "parallel", "opposed"]

# A row is new, or stands in a relation to an earlier one. The first is what an example shrinks to.
_RELATIONS = ("new", "zero", "duplicate", "nearly equal", "parallel", "opposed")

# Elements drawn on their own: this many, of this many rows.
_BLOCK = 4

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_EXACT_DTYPES = (torch.float64, torch.float32)  # integers up to 2^24


@st.composite
def gradients(
    draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> Tensor:
    """K gradients of rank 0 to K, lengths over 12 orders of magnitude, in any relation to one another.

    A row is u · 2^e. The shapes u live in a space of ``rank`` dimensions: small integers, whose relations every
    dtype keeps exactly, or a Gaussian embedding of them, whose relations hold up to that dtype's rounding. A row is
    new, zero, or a duplicate of an earlier one, nearly equal, parallel or opposed to it. This is the strategy to start
    from; it promises nothing but finite numbers.

    Args:
        min_losses: the least K, at least 1.
        max_losses: the largest K; 64 is as far as this was tried.
        dtypes: of J.

    Example:
        >>> from hypothesis import given, settings
        >>> from distill_optim.combine import min_norm
        >>> from distill_optim.testing import assert_non_conflicting, gram_of
        >>> @settings(max_examples=10, deadline=None)
        ... @given(gradients())
        ... def min_norm_conflicts_with_no_loss(rows):
        ...     assert_non_conflicting(min_norm(gram_of(rows)), gram_of(rows))
        >>> min_norm_conflicts_with_no_loss()
    """
    k = draw(st.integers(min_losses, max_losses))
    rank = draw(st.integers(0, k))
    shapes = _integers(draw, k, rank)
    embedding = draw(st.none() | st.integers(0, 99))
    dtype = draw(st.sampled_from(dtypes))
    exponents = [0] * k
    spread = draw(st.sampled_from([0, 20]))  # 2^±20: 12 orders of magnitude
    zeros = draw(st.booleans())  # rarer than one row in six, or the origin is nearly always in the hull
    for i in range(k):
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
    elif embedding is not None:
        basis = np.random.default_rng(embedding).standard_normal((rank, rank + 2))
        # Summed row by row, not by BLAS, whose blocks may give equal rows unequal last digits.
        shapes = (shapes[:, :, None] * basis).sum(1)
    return _scaled(shapes, np.array(exponents), dtype)


@st.composite
def independent_gradients(draw: st.DrawFn, min_losses: int = 2, max_losses: int = 12) -> Tensor:
    """Linearly independent rows over 12 orders of magnitude: optimal weights are unique, and can be compared.

    Before the scaling the diagonal is 2K and the rest of a row at most 2(K − 1) in sum. Diagonal dominance by 2 gives
    ‖J⁻¹‖₂ ≤ √K ‖J⁻¹‖_∞ ≤ √K/2, and ‖J‖₂ ≤ √(‖J‖₁‖J‖_∞) ≤ 4K: the condition number of the rows is 2K^1.5 at most, some
    100 for K = 12. That of their Gram matrix is its square. Their lengths are within a factor of 2 of each other, so
    scaling them to unit length, as a solver may do, changes it by as much.

    Args:
        min_losses: the least K, at least 1.
        max_losses: the largest K.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=10, deadline=None)
        ... @given(independent_gradients())
        ... def the_rank_is_full(rows):
        ...     assert torch.linalg.matrix_rank(rows / rows.norm(dim=1, keepdim=True)) == len(rows)
        >>> the_rank_is_full()
    """
    k = draw(st.integers(min_losses, max_losses))
    shapes = _integers(draw, k, k, size=2)
    np.fill_diagonal(shapes, 2 * k)
    (exponents,) = _per_row(draw, k, _exponents(draw))
    return _scaled(shapes, exponents, torch.float64)


@st.composite
def conflicting_gradients(
    draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> Tensor:
    """Two camps, neither of them empty: across them every cosine is −0.6 or below, so every gradient conflicts.

    A row is ±a on an axis of its camp's sign, and an integer vector p of d elements with ‖p‖² ≤ 9d beside it. With
    a = 6⌈√d⌉ or more, ‖p‖² ≤ a²/4, and between rows of different camps the cosine is at most
    −(a² − a²/4)/(a² + a²/4) = −3/5. Positive factors, here of 12 orders of magnitude, leave it.

    Args:
        min_losses: the least K; a single gradient, K = 1, has nothing to conflict with.
        max_losses: the largest K.
        dtypes: of J.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=10, deadline=None)
        ... @given(conflicting_gradients())
        ... def every_gradient_conflicts_with_another(rows):
        ...     rows = rows.double() / rows.double().norm(dim=1, keepdim=True)
        ...     assert ((rows @ rows.mT).amin(1) < -0.59).all()
        >>> every_gradient_conflicts_with_another()
    """
    k = draw(st.integers(min_losses, max_losses))
    d = draw(st.integers(0, k))
    shapes, dtype = _integers(draw, k, d), draw(st.sampled_from(dtypes))
    camps, exponents = _per_row(draw, k, st.sampled_from([1, -1]), _exponents(draw))
    camps[:2] = (1, -1)[:k]
    return _scaled(np.column_stack([camps * 6 * max(1, math.ceil(math.sqrt(d))), shapes]), exponents, dtype)


@st.composite
def slightly_conflicting_gradients(draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32) -> Tensor:
    """Every two gradients conflict by little: a cosine between −1/K and −1e-6/K, whatever their lengths.

    The shapes are the unit vectors less τ = 2⁻ᵐ/K in every element, 2 ≤ m ≤ 20. Two of them have the inner product
    −2τ + Kτ² = −x and the square 1 − x with x = (2 − 2⁻ᵐ)τ, hence the cosine −x/(1 − x), where 1.75τ ≤ x < 2τ. They
    are independent, and far from stationary: their sum is 1 − 2⁻ᵐ in every element. A method that overlooks small
    conflicts is caught here. Always float64: there the rounding of 1 − τ moves the cosine by one part in 1e8.

    Args:
        min_losses: the least K; a single gradient, K = 1, has nothing to conflict with.
        max_losses: the largest K.

    Example:
        >>> from hypothesis import given, settings
        >>> from distill_optim.testing import gram_of
        >>> @settings(max_examples=10, deadline=None)
        ... @given(slightly_conflicting_gradients())
        ... def every_pair_conflicts(rows):
        ...     assert (gram_of(rows).fill_diagonal_(-1) < 0).all()
        >>> every_pair_conflicts()
    """
    k = draw(st.integers(min_losses, max_losses))
    shapes = np.eye(k) - 2.0 ** -draw(st.integers(2, 20)) / k
    (exponents,) = _per_row(draw, k, _exponents(draw))
    return _scaled(shapes, exponents, torch.float64)


@st.composite
def stationary_gradients(
    draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32, dtypes: tuple[torch.dtype, ...] = _EXACT_DTYPES
) -> Tensor:
    """The origin is in the convex hull, exactly: no step helps every loss (a Pareto-stationary point).

    One row is −Σ aᵢuᵢ over the others' shapes, with integers 0 ≤ aᵢ ≤ 3; so 1 · u + Σ aᵢuᵢ = 0, and divided by the sum
    of its coefficients this is a convex combination. Scaling the rows by 2^e, 12 orders of magnitude, divides the
    coefficients by the same, which leaves them non-negative. The integers are 9(K − 1) at most, which both dtypes hold.
    With every a = 0 the row is a zero gradient, which is what an example shrinks to.

    Args:
        min_losses: the least K, at least 1; a single stationary gradient is zero.
        max_losses: the largest K.
        dtypes: of J; they have to hold integers up to 9(K − 1).

    Example:
        >>> from hypothesis import given, settings
        >>> from distill_optim.combine import min_norm
        >>> from distill_optim.testing import assert_same_vector, gram_of
        >>> @settings(max_examples=10, deadline=None)
        ... @given(stationary_gradients())
        ... def the_shortest_vector_is_zero(rows):
        ...     weights = min_norm(gram_of(rows))
        ...     assert_same_vector(weights, torch.zeros_like(weights), gram_of(rows))
        >>> the_shortest_vector_is_zero()
    """
    k, dtype = draw(st.integers(min_losses, max_losses)), draw(st.sampled_from(dtypes))
    shapes, exponents = _stationary(draw, k)
    return _scaled(shapes, exponents, dtype)


@st.composite
def nearly_stationary_gradients(
    draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32, dtypes: tuple[torch.dtype, ...] = _EXACT_DTYPES
) -> Tensor:
    """The shortest vector of the hull is known, and short: J[0, 0] in the first element, and zero elsewhere.

    Stationary shapes beside a first element ε = 2⁻ᵐ, 1 ≤ m ≤ 30, that all rows have, times a common 2^e. Every convex
    combination has ε first, so none is shorter than ε, and the one that is zero in the rest has that length. All the
    gradients agree with the first axis, by little: that is where a step ought to go, and what rounding hides. From
    m = 26 on, ε² is below the rounding of squares of 1, and no one who has only the Gram matrix can see it.

    Args:
        min_losses: the least K, at least 1.
        max_losses: the largest K.
        dtypes: of J; they have to hold integers up to 9(K − 1).

    Example:
        >>> from hypothesis import given, settings
        >>> from distill_optim.combine import min_norm
        >>> from distill_optim.testing import ROUNDING, gram_of, reach
        >>> @settings(max_examples=10, deadline=None)
        ... @given(nearly_stationary_gradients(max_losses=8))
        ... def the_shortest_vector_is_known(rows):
        ...     weights, gram = min_norm(gram_of(rows)), gram_of(rows)
        ...     assert weights @ gram @ weights - rows[0, 0].double() ** 2 <= ROUNDING * reach(weights, gram) ** 2
        >>> the_shortest_vector_is_known()
    """
    k, dtype = draw(st.integers(min_losses, max_losses)), draw(st.sampled_from(dtypes))
    epsilon, exponent = 2.0 ** -draw(st.integers(1, 30)), draw(st.integers(-20, 20))
    shapes, _ = _stationary(draw, k)
    return _scaled(np.column_stack([np.full(k, epsilon), shapes]), np.full(k, exponent), dtype)


@st.composite
def badly_scaled_gradients(
    draw: st.DrawFn, min_losses: int = 2, max_losses: int = 32, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> Tensor:
    """No zero row, and the longest gradient is more than 1e12 times as long as the shortest.

    A shape has at most 64 elements of size 3, so its length is between 1 and 24 < 2⁵; one exponent is 23 and another
    −23, so that the quotient of the lengths is 2⁴⁶⁻⁵ = 2⁴¹ > 2e12 at least.

    Args:
        min_losses: the least K, at least 2.
        max_losses: the largest K.
        dtypes: of J.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=10, deadline=None)
        ... @given(badly_scaled_gradients())
        ... def twelve_orders(rows):
        ...     lengths = rows.double().norm(dim=1)
        ...     assert lengths.amax() > 1e12 * lengths.amin() > 0
        >>> twelve_orders()
    """
    k = draw(st.integers(min_losses, max_losses))
    shapes, dtype = _integers(draw, k, draw(st.integers(1, min(k, 64)))), draw(st.sampled_from(dtypes))
    shapes[~shapes.any(1), 0] = 1
    longest = draw(st.integers(0, max_losses - 1)) % k
    shortest = (longest + 1 + draw(st.integers(0, max_losses - 2)) % (k - 1)) % k
    (exponents,) = _per_row(draw, k, st.integers(-23, 23))
    exponents[[longest, shortest]] = 23, -23
    return _scaled(shapes, exponents, dtype)


@st.composite
def related_gradients(
    draw: st.DrawFn,
    relation: Relation,
    min_losses: int = 2,
    max_losses: int = 32,
    dtypes: tuple[torch.dtype, ...] = _DTYPES,
) -> Tensor:
    """Gradients as :func:`gradients` draws them, and for certain one that stands in ``relation`` to another.

    ================  ==================================================================================
    ``zero``          0 · g
    ``duplicate``     g, to the last bit
    ``nearly equal``  g with 2⁻ᵐ‖g‖ added to one element, 3 ≤ m ≤ 40; a duplicate where the dtype loses that
    ``parallel``      2ᵉg, exactly, −3 ≤ e ≤ 3
    ``opposed``       −2ᵉg, exactly, −3 ≤ e ≤ 3
    ================  ==================================================================================

    Where g itself is zero the other one is, too.

    Args:
        relation: one of the above.
        min_losses: the least K, at least 2.
        max_losses: the largest K.
        dtypes: of J.

    Raises:
        ValueError: for another relation.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=10, deadline=None)
        ... @given(related_gradients("duplicate"))
        ... def two_rows_are_equal(rows):
        ...     assert len(rows.unique(dim=0)) < len(rows)
        >>> two_rows_are_equal()
    """
    if relation not in get_args(Relation):
        raise ValueError(f"relation={relation!r}: expected one of {', '.join(map(repr, get_args(Relation)))}")
    dtype, place, source = draw(st.sampled_from(dtypes)), draw(st.integers(0, 63)), draw(st.integers(0, 63))
    exponent, element, m = draw(st.integers(-3, 3)), draw(st.integers(0, 63)), draw(st.integers(3, 40))
    rows = draw(gradients(min_losses - 1, max_losses - 1, (torch.float64,)))
    k, n = rows.shape
    row = rows[source % k].clone()
    if relation == "zero":
        row.zero_()
    elif relation == "nearly equal":
        row[element % n] += row.norm() * 2.0**-m
    elif relation != "duplicate":
        row *= 2.0**exponent * (-1 if relation == "opposed" else 1)
    place %= k + 1
    return torch.cat([rows[:place], row[None], rows[place:]]).to(dtype)


@st.composite
def losses(draw: st.DrawFn, k: int) -> Tensor:
    """K positive losses over 24 orders of magnitude, shape (K,), float64: 2^(n/4) with integers −160 ≤ n ≤ 160.

    They shrink to ones.

    Args:
        k: the number of losses.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=10, deadline=None)
        ... @given(losses(3))
        ... def positive(values):
        ...     assert (values > 0).all()
        >>> positive()
    """
    return (torch.tensor(draw(st.lists(st.integers(-160, 160), min_size=k, max_size=k))).double() / 4).exp2()


@st.composite
def with_losses(draw: st.DrawFn, rows: st.SearchStrategy[Tensor]) -> tuple[Tensor, Tensor]:
    """Pairs of gradients and as many :func:`losses`.

    Args:
        rows: a strategy of gradients, one per row.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=10, deadline=None)
        ... @given(with_losses(gradients() | stationary_gradients()))
        ... def one_loss_for_each_row(drawn):
        ...     rows, values = drawn
        ...     assert len(rows) == len(values)
        >>> one_loss_for_each_row()
    """
    drawn = draw(rows)
    return drawn, draw(losses(len(drawn)))


def _integers(draw: st.DrawFn, k: int, n: int, size: int = 3) -> NDArray[Any]:
    """(K, N) integers from −size to size, as floats."""
    block = draw(st.lists(st.integers(-size, size), min_size=_BLOCK**2, max_size=_BLOCK**2))
    drawn = np.random.default_rng(draw(st.integers(0, 99))).integers(-size, size + 1, (k, n)).astype(float)
    drawn[:_BLOCK, :_BLOCK] = np.reshape(block, (_BLOCK, _BLOCK))[:k, :n]
    return drawn


def _exponents(draw: st.DrawFn) -> st.SearchStrategy[int]:
    """Of two, for one row: all of them 0, or over 12 orders of magnitude."""
    spread = draw(st.sampled_from([0, 20]))
    return st.integers(-spread, spread)


def _per_row(draw: st.DrawFn, k: int, *strategies: st.SearchStrategy[int]) -> list[NDArray[Any]]:
    """One number of each strategy for every row. Row by row and last, so that a row can go and take its own along."""
    rows = draw(st.lists(st.tuples(*strategies), min_size=k, max_size=k))
    return [np.array(column) for column in zip(*rows, strict=True)]


def _stationary(draw: st.DrawFn, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Integer rows of which a combination with coefficients 0 to 3, one of them 1, is zero; and exponents for them."""
    shapes = _integers(draw, k, draw(st.integers(1, k)))
    place = draw(st.integers(0, 63))
    coefficients, exponents = _per_row(draw, k, st.integers(0, 3), _exponents(draw))
    shapes[0] = 0 - coefficients[1:] @ shapes[1:]  # not a minus sign: that of a zero would show
    shapes = np.roll(shapes, place, 0)
    return shapes, exponents


def _scaled(shapes: NDArray[Any], exponents: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(shapes * np.exp2(exponents)[:, None]).to(dtype)
