"""The shortest vector in a convex hull, written for certainty: from the gradients themselves, not their Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Rational = Sequence[Fraction]


def exact(rows: NDArray[Any]) -> list[Fraction]:
    """Optimal weights in rational arithmetic: the first face whose stationary point satisfies the KKT conditions."""
    k = len(rows)
    gradients = [[Fraction(float(x)) for x in row] for row in rows]
    gram = [[sum((x * y for x, y in zip(a, b, strict=True)), Fraction()) for b in gradients] for a in gradients]
    for face in (face for size in range(1, k + 1) for face in combinations(range(k), size)):
        # G π = λ 1 on the face, 1ᵀπ = 1.
        system = [[*(gram[i][j] for j in face), Fraction(-1), Fraction(0)] for i in face]
        system.append([*(Fraction(1) for _ in face), Fraction(0), Fraction(1)])
        solution = _solve(system)
        if solution is None or min(solution[:-1]) < 0:
            continue
        weights = [Fraction(0)] * k
        for i, weight in zip(face, solution[:-1], strict=True):
            weights[i] = weight
        if all(sum(g * w for g, w in zip(row, weights, strict=True)) >= solution[-1] for row in gram):
            return weights
    raise AssertionError("a convex quadratic has a minimum over the simplex")


def _solve(augmented: list[list[Fraction]]) -> list[Fraction] | None:
    """Gauss–Jordan elimination; None where the system is singular."""
    n = len(augmented)
    for column in range(n):
        pivot = next((row for row in range(column, n) if augmented[row][column]), None)
        if pivot is None:
            return None
        augmented[column], augmented[pivot] = augmented[pivot], augmented[column]
        head = [x / augmented[column][column] for x in augmented[column]]
        augmented[column] = head
        for row in range(n):
            factor = augmented[row][column]
            if row != column and factor:
                augmented[row] = [x - factor * y for x, y in zip(augmented[row], head, strict=True)]
    return [row[-1] for row in augmented]


def squared_norm(vector: Sequence[Fraction | float], rows: NDArray[Any]) -> float:
    """‖Σ vᵢ gᵢ‖², without rounding until the end."""
    exact_vector = [Fraction(v) for v in vector]
    columns = (
        sum((v * Fraction(float(x)) for v, x in zip(exact_vector, column, strict=True)), Fraction())
        for column in rows.T
    )
    return float(sum(c * c for c in columns))


def by_nnls(rows: NDArray[Any]) -> NDArray[Any]:
    """Optimal weights by non-negative least squares.

    min ‖Σ xᵢ gᵢ‖² + m² (1ᵀx − 1)² over x ≥ 0 has x = t π*, whatever m: for fixed direction π = x / 1ᵀx the
    minimum over t is an increasing function of ‖Σ πᵢ gᵢ‖. The columns are scaled to unit length first.
    """
    norms: NDArray[Any] = np.linalg.norm(rows, axis=1)
    if not norms.all():
        shares: NDArray[Any] = np.equal(norms, 0) / np.equal(norms, 0).sum()
        return shares
    m = norms.min()
    system = np.vstack([(rows / norms[:, None]).T, m / norms])
    x, _ = nnls(system, np.append(np.zeros(rows.shape[1]), m), maxiter=100 * len(rows))
    weights = x / norms
    shares = weights / weights.sum()
    return shares
