"""The solver against rational arithmetic, and its two algorithms against each other."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.combine import qp
from distill_optim.testing import assert_non_conflicting
from tests.properties.gradients import (
    ROUNDING,
    assert_same_vector,
    gradients,
    gram_of,
    independent_gradients,
    reach,
)
from tests.reference import min_norm as reference


def interior_point(gram: Tensor) -> Tensor:
    """The algorithm for large K, at any K."""
    with patch.object(qp, "MAX_FACES", 0):
        return qp.simplex_qp(gram)


@pytest.mark.parametrize("solve", [qp.simplex_qp, interior_point])
@given(gradients(max_losses=4))
def test_vector_is_the_exact_one(solve: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """‖Σ (πᵢ − π*ᵢ) gᵢ‖ in rational arithmetic on the gradients themselves."""
    gram, exact = gram_of(rows), reference.exact(rows.double().numpy())
    weights = solve(gram)
    offset = [Fraction(w) - e for w, e in zip(weights.tolist(), exact, strict=True)]
    unit = max(reach(weights, gram), reach(torch.tensor([float(e) for e in exact]).double(), gram))
    # On the square, as in assert_same_vector.
    assert reference.squared_norm(offset, rows.double().numpy()) <= 4 * ROUNDING * unit**2


@pytest.mark.parametrize("solve", [qp.simplex_qp, interior_point])
@given(independent_gradients(max_losses=4))
def test_unique_weights_are_the_exact_ones(solve: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    exact = torch.tensor([float(e) for e in reference.exact(rows.numpy())], dtype=torch.float64)
    # A condition number of 1e4 at most, see independent_gradients.
    torch.testing.assert_close(solve(gram_of(rows)), exact, rtol=0, atol=1e4 * ROUNDING)


@given(gradients(max_losses=qp.MAX_FACES))
def test_interior_point_finds_what_the_faces_give(rows: Tensor) -> None:
    gram = gram_of(rows)
    assert_same_vector(interior_point(gram), qp.simplex_qp(gram), gram)


@given(gradients(3, 12), st.integers(0, 11))
def test_zero_gradient_stops_the_step(rows: Tensor, position: int) -> None:
    """0 is in the hull, so g* = 0; a bound on the square, relative to what the weights reach."""
    rows[position % len(rows)] = 0
    gram = gram_of(rows)
    weights = qp.simplex_qp(gram)
    assert weights @ gram @ weights <= ROUNDING * reach(weights, gram) ** 2


def test_losses_outside_the_face_weigh_exactly_nothing() -> None:
    """The shortest gradient alone, where all others point further along it."""
    rows = torch.tensor([[5.0, 1.0, 0.0], [1.0, 0.0, 0.0], [7.0, 0.0, 2.0]])
    assert qp.simplex_qp(gram_of(rows)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("k", [32, 64])
def test_many_losses_of_lengths_far_apart(k: int) -> None:
    """Once lost, by a start of the interior point that suits fewer losses."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(-23, 24, (k, 1), generator=generator).double().exp2()
        rows = torch.randint(-3, 4, (k, k // 2 + 1), generator=generator).double() * lengths
        gram = gram_of(rows)
        assert_non_conflicting(qp.simplex_qp(gram), gram)
