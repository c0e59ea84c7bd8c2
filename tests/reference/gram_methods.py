"""Methods that combine gradients, written for certainty: from the papers and the gradients themselves.

``rows`` is the K × N array of the gradients. A :class:`Step` has the vector that the paper ends with, and K weights
with Σ wᵢ gᵢ = vector. The weights are unique only where the gradients are independent; the vector is unique unless the
docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import combinations, permutations
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from tests.reference import min_norm

Array = NDArray[Any]


class Step(NamedTuple):
    """The combined gradient (N,), and K weights of the gradients that give it."""

    vector: Array
    weights: Array


class Vaccinated(NamedTuple):
    """A :class:`Step` of GradVac, and the targets (K, K) for the next one."""

    vector: Array
    weights: Array
    phi: Array


def rational(rows: Array) -> Array:
    """The same numbers as Fractions: functions that say so are exact on them."""
    exact = np.empty(rows.shape, dtype=object)
    for place, x in np.ndenumerate(rows):
        exact[place] = _fraction(x)
    return exact


def _fraction(x: Any) -> Fraction:
    return Fraction(x.item() if isinstance(x, np.generic) else x)


def _lengths(rows: Array) -> Array:
    norms: Array = np.linalg.norm(rows, axis=1)
    return norms


def _units(rows: Array) -> Array:
    """Rows of length 1; a zero row stays zero."""
    norms = _lengths(rows)
    scaled: Array = rows / np.where(norms > 0, norms, 1)[:, None]
    return scaled


def _total(parts: Sequence[Step]) -> Step:
    return Step(np.sum([p.vector for p in parts], axis=0), np.sum([p.weights for p in parts], axis=0))


def _inverse(rows: Array, rtol: float) -> Array:
    """The pseudoinverse (N, K); singular values up to that share of the largest count as zero."""
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    alive = values > rtol * values[0]
    inverse: Array = (right[alive].T / values[alive]) @ left[:, alive].T
    return inverse


# One gradient after the other: PCGrad and GradVac.


def _surgery(rows: Array, i: int, order: Sequence[int]) -> Step:
    """gᵢᴾᶜ, the part of loss i."""
    part, weights = rows[i], np.eye(len(rows))[i]
    if rows.dtype == object:
        weights = rational(weights)
    for j in order:
        inner = part @ rows[j]
        if inner < 0:
            share = inner / (rows[j] @ rows[j])
            part = part - share * rows[j]
            weights[j] = weights[j] - share
    return Step(part, weights)


def pcgrad(rows: Array, orders: Sequence[Sequence[int]]) -> Step:
    """Gradient surgery, step by step on the vectors.

    Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1: gᵢᴾᶜ starts as gᵢ; for every other
    j, in an order drawn at random for every i, if ⟨gᵢᴾᶜ, gⱼ⟩ < 0 then gᵢᴾᶜ ← gᵢᴾᶜ − ⟨gᵢᴾᶜ, gⱼ⟩/‖gⱼ‖² gⱼ, with the
    untouched gⱼ; the step is Σ gᵢᴾᶜ. Right because it is the algorithm word by word; the weights are kept beside the
    vectors. Exact on ``rational(rows)``.

    Args:
        rows: the gradients, (K, N).
        orders: for every i the other losses in the order of their visit.
    """
    for i, order in enumerate(orders):
        assert sorted(order) == [j for j in range(len(rows)) if j != i]
    parts = [_surgery(rows, i, order) for i, order in enumerate(orders)]
    return _total(parts)


def pcgrad_average(rows: Array) -> Step:
    """The expectation of :func:`pcgrad` over its random orders. Exact on ``rational(rows)``.

    The gᵢᴾᶜ do not look at each other, so that the mean of their sum is the sum of their means, each over the (K − 1)!
    orders of its own.
    """
    k = len(rows)
    orders = [list(permutations([j for j in range(k) if j != i])) for i in range(k)]
    total = _total([_surgery(rows, i, order) for i in range(k) for order in orders[i]])
    return Step(total.vector / len(orders[0]), total.weights / len(orders[0]))


def gradvac(rows: Array, orders: Sequence[Sequence[int]], phi: Array, beta: float) -> Vaccinated:
    """Gradient vaccine, step by step on the vectors.

    Wang et al., "Gradient Vaccine", ICLR 2021, Algorithm 1, with one group of parameters: gᵢ′ starts as gᵢ; for every
    other j in a random order, with φ = cos(gᵢ′, gⱼ) and the target φ̂ᵢⱼ: if φ < φ̂ᵢⱼ then
    gᵢ′ ← gᵢ′ + ‖gᵢ′‖ (φ̂ᵢⱼ √(1−φ²) − φ √(1−φ̂ᵢⱼ²)) / (‖gⱼ‖ √(1−φ̂ᵢⱼ²)) gⱼ, whose cosine to gⱼ is φ̂ᵢⱼ; then, in either
    case, φ̂ᵢⱼ ← (1−β) φ̂ᵢⱼ + β φ. The step is Σ gᵢ′. Right because it is the algorithm word by word, but for two things:
    √(1−φ²) is taken as the length of the part of gᵢ′/‖gᵢ′‖ across gⱼ, which a difference would round away; and the
    cosine with a zero vector, which the paper leaves undefined, is 0, and a zero gⱼ changes nothing.

    Args:
        rows: the gradients, (K, N).
        orders: for every i the other losses in the order of their visit.
        phi: the targets, (K, K), zeros at the start; its diagonal is never looked at.
        beta: share of the new cosine.

    Raises:
        ZeroDivisionError: for a target of ±1 that would have to be reached: no finite step does.
    """
    k = len(rows)
    parts, weights, phi = rows.astype(np.float64), np.eye(k), phi.astype(np.float64)
    for i, order in enumerate(orders):
        assert sorted(order) == [j for j in range(k) if j != i]
        for j in order:
            length_i, length_j = np.linalg.norm(parts[i]), np.linalg.norm(rows[j])
            cosine, across = 0.0, 1.0
            if length_i > 0 and length_j > 0:
                unit_i, unit_j = parts[i] / length_i, rows[j] / length_j
                cosine = float(unit_i @ unit_j)
                across = float(np.linalg.norm(unit_i - cosine * unit_j))
            target = float(phi[i, j])
            if cosine < target and length_j > 0:
                across_target = float(np.sqrt((1 - target) * (1 + target)))
                if across_target == 0:
                    raise ZeroDivisionError(f"target cosine {target} of losses {i} and {j}")
                share = length_i * (target * across - cosine * across_target) / (length_j * across_target)
                parts[i] += share * rows[j]
                weights[i, j] += share
            phi[i, j] = (1 - beta) * target + beta * cosine
    return Vaccinated(parts.sum(0), weights.sum(0), phi)


# Projections on the dual cone {d : ⟨gᵢ, d⟩ ≥ 0 for all i}: DualProj, UPGrad, CAGrad.


def project(rows: Array, vector: Array) -> Step:
    """The point of the dual cone nearest to a vector, and x ≥ 0 with point = vector + Σ xᵢ gᵢ.

    By Moreau's decomposition the projection of v on the cone is v minus its projection on the polar cone, which is
    {−Σ xᵢ gᵢ : x ≥ 0}: non-negative least squares, min ‖v + Σ xᵢ gᵢ‖, on the vectors themselves. Their lengths do not
    matter for the cone, so the columns get unit length.
    """
    norms, size = _lengths(rows), np.linalg.norm(vector)
    if not size:
        return Step(vector, np.zeros(len(rows)))
    x, _ = nnls(_units(rows).T, -vector / size, maxiter=100 * len(rows))
    x = np.divide(size * x, norms, out=np.zeros(len(rows)), where=norms > 0)
    return Step(vector + x @ rows, x)


def project_exact(rows: Array, vector: Array) -> tuple[Array, Array]:
    """:func:`project` in rational arithmetic, for few rows: the first face whose stationary point is optimal.

    With r = v + Σ xᵢ gᵢ the Karush–Kuhn–Tucker conditions of min ‖r‖² over x ≥ 0 are ⟨gᵢ, r⟩ ≥ 0, with equality where
    xᵢ > 0. They suffice, and one basic solution satisfies them. Arguments and results are arrays of Fractions.
    """
    k = len(rows)
    for face in (face for size in range(k + 1) for face in combinations(range(k), size)):
        system = [[*(rows[i] @ rows[j] for j in face), -(rows[i] @ vector)] for i in face]
        solution = min_norm._solve(system)
        if solution is None or any(x < 0 for x in solution):
            continue
        x = np.full(k, Fraction(0), dtype=object)
        x[list(face)] = solution
        point = vector + x @ rows
        if all(row @ point >= 0 for row in rows):
            return point, x
    raise AssertionError("a closed convex cone has a nearest point")


def dualproj(rows: Array, u: Array | None = None) -> Step:
    """The weighted mean of the gradients, moved the shortest way to where it conflicts with none.

    Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024: π_J(Jᵀu) with the π_J of eq. 3, after
    Lopez-Paz & Ranzato, "Gradient Episodic Memory", NeurIPS 2017. By their Proposition 1 the weights are
    argmin vᵀGv over v ≥ u; with v = u + x that is :func:`project`.

    Args:
        rows: the gradients, (K, N).
        u: K non-negative weights; None stands for 1/K.
    """
    u = np.full(len(rows), 1 / len(rows)) if u is None else u
    point, x = project(rows, u @ rows)
    return Step(point, u + x)


def upgrad(rows: Array, u: Array | None = None) -> Step:
    """The weighted mean of the gradients' projections on the dual cone.

    Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024: Σ uᵢ π_J(gᵢ).

    Args:
        rows: the gradients, (K, N).
        u: K non-negative weights; None stands for 1/K.
    """
    u = np.full(len(rows), 1 / len(rows)) if u is None else u
    parts = [project(rows, row) for row in rows]
    vector: Array = sum(share * part.vector for share, part in zip(u, parts, strict=True))
    return Step(vector, u + sum(share * part.weights for share, part in zip(u, parts, strict=True)))


def cagrad(rows: Array, c: float) -> Step:
    """Conflict-averse gradient descent, by its primal problem.

    Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021: the d that maximises
    minᵢ ⟨gᵢ, d⟩ in the ball ‖d − g₀‖ ≤ c ‖g₀‖, g₀ the mean gradient. The paper's Algorithm 1 solves the dual, min over
    the simplex of ⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖, and sets d = g₀ + c ‖g₀‖ g_w/‖g_w‖; here nothing of the dual is used. Let
    r(z) be the distance from g₀ to {d : ⟨gᵢ, d⟩ ≥ z for all i}. It grows with z; the largest z with r(z) ≤ c ‖g₀‖ is
    the optimum: bisection between z = minᵢ ⟨gᵢ, g₀⟩, where r = 0, and minᵢ (⟨gᵢ, g₀⟩ + c ‖g₀‖ ‖gᵢ‖), which no d in the
    ball exceeds, down to neighbouring floats. The distance is "least distance programming" of Lawson & Hanson (1974,
    chapter 23), one non-negative least squares problem, scaled so that rows and radius are 1.

    Where 0 is in the convex hull of the gradients, no d has minᵢ ⟨gᵢ, d⟩ > 0. If the ball reaches the dual cone, the
    maximum is 0, and every d in both has it (the paper's g_w/‖g_w‖ is 0/0 then); returned is the one nearest to g₀,
    that of :func:`dualproj`. If the ball does not reach it (c < 1), the maximum is negative, and d unique as elsewhere.

    Args:
        rows: the gradients, (K, N).
        c: radius of the ball in units of ‖g₀‖.
    """
    k, mean = len(rows), rows.mean(0)
    norms, radius = _lengths(rows), c * float(np.linalg.norm(mean))
    lower, weights = float((rows @ mean).min()), np.full(k, 1 / k)
    if radius == 0:
        return Step(mean, weights)
    upper = float((rows @ mean + radius * norms).min())
    alive = norms > 0
    unit, inner, norms = _units(rows[alive]), rows[alive] @ mean, norms[alive]

    def nearest(z: float) -> tuple[float, Array]:
        """r(z)/radius if it is below √3, and weights v ≥ 0 of the unit rows with d = g₀ + radius Σ vᵢ uᵢ."""
        # min ‖x‖ with ⟨uᵢ, x⟩ ≥ hᵢ, x = (d − g₀)/radius: min ‖(Uᵀ; hᵀ) y − e‖ over y ≥ 0, x = Uᵀy/(1 − hᵀy).
        h = (z - inner) / (norms * radius)
        system = np.vstack([unit.T, h])
        target = np.zeros(len(system))
        target[-1] = 1
        y, residual = nnls(system, target, maxiter=100 * k)
        rest = 1 - h @ y
        # residual² = rest = 1/(1 + r²), 0 where nothing satisfies the constraints; of the two it is the less rounded.
        if residual**2 < 1 / 4:
            return float("inf"), y
        return float(np.linalg.norm(unit.T @ y) / rest), y / rest

    # Zero is the one level that is special, so that it is tried first.
    if lower < 0 < upper:
        lower, upper = (0.0, upper) if nearest(0.0)[0] <= 1 else (lower, 0.0)
    while lower < (middle := lower + (upper - lower) / 2) < upper:
        lower, upper = (middle, upper) if nearest(middle)[0] <= 1 else (lower, middle)
    weights[alive] += radius * nearest(lower)[1] / norms
    return Step(weights @ rows, weights)


def cagrad_gap(rows: Array, c: float, step: Step) -> float:
    """How far a step of :func:`cagrad` may be from the optimum, in units of minᵢ ⟨gᵢ, d⟩: a certificate.

    By weak duality minᵢ ⟨gᵢ, d⟩ ≤ optimum ≤ ⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖ for every d in the ball and w on the simplex. At
    the optimum the weights beyond 1/K are proportional to w, but where 0 is in the convex hull w may be that of the
    shortest vector; the better of the two bounds counts.
    """
    mean = rows.mean(0)
    beyond = step.weights - 1 / len(rows)
    candidates = [min_norm.by_nnls(rows), beyond / beyond.sum() if beyond.sum() else np.eye(len(rows))[0]]
    worst = [w @ rows for w in candidates]
    bound = min(g_w @ mean + c * np.linalg.norm(mean) * np.linalg.norm(g_w) for g_w in worst)
    return float(bound - (rows @ step.vector).min())


# Linear systems: IMTL-G, ConFIG, Aligned-MTL.


def _root(x: Fraction, digits: int = 80) -> Fraction:
    """√x to so many digits."""
    scale = 10 ** (2 * digits)
    shift = max(0, len(str(x.denominator)) - len(str(x.numerator)))
    scale *= 10 ** (2 * shift)
    return Fraction(isqrt(x.numerator * scale // x.denominator), isqrt(scale))


def imtl_g(rows: Array) -> Step:
    """Impartial multi-task learning, the gradient part, in rational arithmetic.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, IMTL-G: Σ αᵢ = 1, and g = Σ αᵢ gᵢ has the same
    projection on all unit gradients uᵢ. With p for that projection ⟨g, gᵢ⟩ = p ‖gᵢ‖, that is G α = p d with d the
    lengths: α = G⁻¹d/1ᵀG⁻¹d, the same α as the paper's α₂.. = g₁Uᵀ(DUᵀ)⁻¹ from fewer roots. The lengths have 80 digits,
    all else is exact. Where 1ᵀG⁻¹d < 0, p is negative, and the method *ascends* along every gradient.

    Raises:
        ZeroDivisionError: for dependent rows, and where 1ᵀG⁻¹d = 0: no α with the sum 1 does it.
    """
    exact = rational(rows)
    system = [[*(a @ b for b in exact), _root(a @ a)] for a in exact]
    v = min_norm._solve(system)
    if v is None:
        raise ZeroDivisionError("the gradients are dependent")
    weights = np.array(v, dtype=object) / sum(v)
    return Step((weights @ exact).astype(np.float64), weights.astype(np.float64))


def imtl_g_pinv(rows: Array, *, unit: bool = False, rtol: float = 1e-12) -> Step:
    """:func:`imtl_g` where rows depend on each other: one of the solutions v of G v = d, or the nearest to one.

    Quinton & Rey 2024 (appendix on IMTL-G) take v = G⁺d. That makes it depend on the lengths which rows count as zero;
    with ``unit``, which is v = (UUᵀ)⁺1 divided by the lengths, it does not. From the gradients G⁺d = (J⁺)ᵀ(J⁺d), which
    spares the squared condition number. Both are :func:`imtl_g` where rows are independent. Elsewhere, where a vector
    with the same projection on all unit gradients exists, both find its direction, but Σ αᵢ = 1 gives it different
    *lengths*.

    Where no vector comes near the same projection on all (two opposed gradients: J⁺d = 0), the step is zero.

    Args:
        rows: the gradients, (K, N).
        unit: whether to take the pseudoinverse of the unit gradients.
        rtol: singular values up to that share of the largest count as zero, and so does a J⁺d no longer than it.

    Raises:
        ZeroDivisionError: where 1ᵀv = 0.
    """
    norms = _lengths(rows)
    alive, inverse = norms > 0, _inverse(_units(rows) if unit else rows, rtol)
    vector = inverse @ (alive if unit else norms)
    # uᵢᵀ J⁺d = 1 where that can be had, so that its length is a pure number.
    if np.linalg.norm(vector) <= rtol:
        return Step(np.zeros(rows.shape[1]), np.zeros(len(rows)))
    v = inverse.T @ vector
    if unit:
        v = np.divide(v, norms, out=np.zeros(len(rows)), where=alive)
    if abs(v.sum()) <= rtol * abs(v).sum():
        raise ZeroDivisionError("the weights cannot have the sum 1")
    weights = v / v.sum()
    return Step(weights @ rows, weights)


def config(rows: Array, *, rtol: float = 1e-12) -> Step:
    """The direction with the same cosine to every gradient, as long as the sum of the projections on it.

    Liu, Chu & Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", 2024, eq. 2:
    g_u = unit(U⁺ 1) with U the unit gradients, g = (Σ ⟨gᵢ, g_u⟩) g_u. Right because it is the equation, with the
    pseudoinverse from a singular value decomposition of the vectors. A zero row takes no part in U; where 1 is
    orthogonal to all that U reaches (two opposed gradients), U⁺1 = 0 has no direction, and the step is zero.

    Args:
        rows: the gradients, (K, N).
        rtol: singular values of U up to that share of the largest count as zero, and so does a U⁺1 no longer than it.
    """
    norms, unit = _lengths(rows), _units(rows)
    inverse = _inverse(unit, rtol)
    ones = (norms > 0).astype(np.float64)
    direction = inverse @ ones
    length = np.linalg.norm(direction)
    if length <= rtol:
        return Step(np.zeros(rows.shape[1]), np.zeros(len(rows)))
    direction = direction / length
    scale = (rows @ direction).sum()
    # U⁺ 1 = Uᵀ (U⁺)ᵀ U⁺ 1
    shares = scale * (inverse.T @ direction)
    return Step(scale * direction, np.divide(shares, norms, out=np.zeros(len(rows)), where=norms > 0))


def aligned_mtl(rows: Array, u: Array | None = None, *, rtol: float = 1e-12) -> Step:
    """The gradients made orthogonal, each as long as the smallest singular value.

    Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, Algorithm 1: of J = P Σ Qᵀ
    (here a gradient is a row) the nearest matrix with orthonormal rows is P Qᵀ, by the Procrustes problem; the step is
    (σ_min P Qᵀ)ᵀu = Jᵀ B u, B = σ_min P Σ⁻¹ Pᵀ, over the non-zero singular values. The algorithm takes the eigenvectors
    of JJᵀ; the singular value decomposition of J gives the same without the squared condition number. The paper leaves
    u to the user; u = 1 sums, as LibMTL does, u = 1/K averages, as TorchJD does.

    Args:
        rows: the gradients, (K, N).
        u: K weights; None stands for ones.
        rtol: singular values up to that share of the largest count as zero; the result jumps where one crosses it.
    """
    u = np.ones(len(rows)) if u is None else u
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    rank = int((values > rtol * values[0]).sum())
    if not rank:
        return Step(np.zeros(rows.shape[1]), np.zeros(len(rows)))
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    shares = left.T @ u
    return Step(values[-1] * (shares @ right), left @ (values[-1] / values * shares))


# Power equations: Nash-MTL, FairGrad.


def _decimal(x: Any) -> Decimal:
    fraction = _fraction(x)
    return Decimal(fraction.numerator) / Decimal(fraction.denominator)


def _power_equation(gram: Array, power: Fraction) -> list[Decimal]:
    """w > 0 with G w = w⁻ᵖ, to some 40 digits, by Newton's method in decimal arithmetic.

    G w − w⁻ᵖ is the gradient of ½ wᵀGw − Σ ∫wᵢ⁻ᵖ, strictly convex for w > 0, so that there is one solution at most,
    and damped Newton finds it. There is none just where 0 is in the convex hull of the gradients: for v ≥ 0 with
    G v = 0 the equation would say 0 = vᵀG w = vᵀw⁻ᵖ > 0. The unknowns are in units of the solution for G's diagonal.
    """
    k, one = len(gram), Decimal(1)
    if any(gram[i, i] <= 0 for i in range(k)):
        raise ValueError("a zero gradient: no solution")
    p = _decimal(power)
    matrix = [[_decimal(x) for x in row] for row in gram]
    unit = [matrix[i][i] ** (-one / (one + p)) for i in range(k)]
    # M y = b y⁻ᵖ with w = unit · y, M = unit G unit, b = unit^(1−p)
    m = [[unit[i] * matrix[i][j] * unit[j] for j in range(k)] for i in range(k)]
    b = [unit[i] ** (one - p) for i in range(k)]

    def value(y: list[Decimal]) -> Decimal:
        half = sum((y[i] * m[i][j] * y[j] for i in range(k) for j in range(k)), Decimal()) / 2
        integral = (x.ln() if p == 1 else x ** (one - p) / (one - p) for x in y)
        return half - sum((x * y for x, y in zip(b, integral, strict=True)), Decimal())

    y, now = [one] * k, value([one] * k)
    for _ in range(500):
        slope = [sum((m[i][j] * y[j] for j in range(k)), Decimal()) - b[i] * y[i] ** -p for i in range(k)]
        curvature = [[m[i][j] + (p * b[i] * y[i] ** (-p - one) if i == j else 0) for j in range(k)] for i in range(k)]
        step = _solve_spd(curvature, [-x for x in slope])
        decrement = -sum((a * s for a, s in zip(slope, step, strict=True)), Decimal())
        relative = max(abs(s / x) for s, x in zip(step, y, strict=True))
        if max(y) > Decimal("1e40"):
            break
        if relative < Decimal("1e-20"):  # converges quadratically: the next one is below 1e-38
            return [u * (x + s) for u, x, s in zip(unit, y, step, strict=True)]
        t = one
        while True:
            trial = [x + t * s for x, s in zip(y, step, strict=True)]
            if min(trial) > 0 and (new := value(trial)) <= now - t * decrement / 4:
                break
            t /= 2
        y, now = trial, new
    raise ValueError("no solution: 0 is in the convex hull of the gradients")


def _solve_spd(matrix: list[list[Decimal]], right: list[Decimal]) -> list[Decimal]:
    """Gaussian elimination, which needs no pivoting for a positive definite matrix."""
    n = len(right)
    rows = [[*row, x] for row, x in zip(matrix, right, strict=True)]
    for column in range(n):
        if rows[column][column] <= 0:
            raise ValueError("no solution: the matrix is no Gram matrix, or 0 is in the convex hull of the gradients")
        for below in range(column + 1, n):
            factor = rows[below][column] / rows[column][column]
            if factor:
                rows[below] = [x - factor * h for x, h in zip(rows[below], rows[column], strict=True)]
    solution = [Decimal()] * n
    for i in reversed(range(n)):
        known = sum((rows[i][j] * solution[j] for j in range(i + 1, n)), Decimal())
        solution[i] = (rows[i][n] - known) / rows[i][i]
    return solution


def fairgrad(gram: Array, alpha: float) -> Array:
    """Weights for which every loss gets its α-fair share of the improvement.

    Ban & Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, eq. 4: G w = w^(−1/α), w > 0. Right because
    the equation has one positive solution, and it is solved to 40 digits. The step is Σ wᵢ gᵢ.

    Args:
        gram: inner products of the gradients, (K, K), of floats or Fractions.
        alpha: 1 is proportional fairness, the limit 0 the plain sum, ∞ max–min fairness.

    Raises:
        ValueError: where 0 is in the convex hull of the gradients, a zero gradient for one: there is no solution.
    """
    with localcontext() as context:
        context.prec = 60
        weights = _power_equation(gram, 1 / Fraction(alpha))
    return np.array([float(w) for w in weights])


def nash_mtl(gram: Array, *, normalized: bool = True) -> Array:
    """The bargaining solution of the losses.

    Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, Claim 3.1: G a = 1/a, a > 0. Right because the
    equation has one positive solution, and it is solved to 40 digits. The step is Σ aᵢ gᵢ.

    Args:
        gram: inner products of the gradients, (K, K), of floats or Fractions.
        normalized: whether to take G/‖G‖_F for G, so that a does not depend on the scale of the gradients: √‖G‖_F times
            the other. The authors' code divides G by it, too, but puts the factor back in its constraint
            aᵢ ‖G‖_F (G/‖G‖_F a)ᵢ ≥ 1, so that what it approaches is the paper's a.

    Raises:
        ValueError: where 0 is in the convex hull of the gradients, a zero gradient for one: there is no solution.
    """
    with localcontext() as context:
        context.prec = 60
        weights = _power_equation(gram, Fraction(1))
        norm = sum((_decimal(x) ** 2 for x in gram.flat), Decimal()).sqrt()
        return np.array([float(w * norm.sqrt() if normalized else w) for w in weights])


# Shortest vectors.


def sdmgrad(rows: Array, lam: float) -> Step:
    """Direction-oriented multi-objective descent, with its inner problem solved exactly.

    Xiao, Ban & Ji, "Direction-oriented Multi-objective Learning", NeurIPS 2023: w = argmin over the simplex of
    ‖g_w + λ g₀‖², g₀ the mean gradient; the step is (g_w + λ g₀)/(1 + λ). As Σ wᵢ = 1, that is the shortest vector in
    the convex hull of the gᵢ + λ g₀. (The paper estimates g_w and g₀ from independent batches and takes a few projected
    gradient steps; this is where they lead with one batch.)

    Args:
        rows: the gradients, (K, N).
        lam: weight of the mean gradient, ≥ 0.
    """
    k = len(rows)
    weights = (min_norm.by_nnls(rows + lam * rows.mean(0)) + lam / k) / (1 + lam)
    return Step(weights @ rows, weights)
