"""Tiny convex quadratic programs over the orthant and the simplex: batched, in float64, without a branch on data."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.linalg import largest_square, reciprocal, unit_rows
from distill_optim.combine.rules import where_finite

# Up to this K all 2^K faces are solved at once (256 systems of order 8); beyond, interior-point steps.
MAX_FACES = 8

# Most problems are done after 10 steps, all of the tests' up to K = 64 after 20.
_INTERIOR_POINT_STEPS = 25

# Of the way to the boundary.
_STEP = 0.995

# Slack and variable of a row that lies just on the edge of a face come out of the same size; so the face is taken as
# the interior point has it, and with such rows left out, and let in.
_EDGES = (1.0, 1e4, 1e-4)

# A gap of this size is no gap: that of a sum of K products, for K up to 64.
_NO_GAP = 16 * torch.finfo(torch.float64).eps

# Of the faces that the interior point leads to.
_CORRECTIONS = 3

# Keeps the Cholesky factor of a rank-deficient matrix alive. It slows a Newton step by a hair and moves no optimum,
# because the residuals are taken from the matrix itself.
_PROXIMAL = 1e-13

# The same on a face, where the matrix may be singular and the interior point is within some 1e-7 of a solution.
_REFINING = 1e-9
_REFINEMENTS = 3


def simplex_qp(matrix: Tensor) -> Tensor:
    r""":math:`\arg\min \tfrac12 \pi^\top G \pi` over :math:`\pi \ge 0, \sum_i \pi_i = 1`, G positive semidefinite.

    With m the length of the shortest vector behind G, the minimum of

    .. math:: \tfrac12 x^\top G x + \tfrac12 m^2 (1 - \textstyle\sum_i x_i)^2, \qquad x \ge 0

    is a multiple of the optimal :math:`\pi`: for a fixed direction the best length leaves an increasing function of
    :math:`\pi^\top G \pi`. That is a problem over the orthant, see :func:`orthant_qp`, and as exact. Where the optimal
    weights are not unique any of them may come out, except that equal vectors have equal weights.

    All guards are relative: the result for :math:`cG` is that for G. The rows are scaled to unit diagonal before
    anything is solved, so that gradients of very different lengths lose no digits.

    Args:
        matrix: shape (..., K, K), float64, symmetric positive semidefinite up to rounding.

    Returns:
        Tensor of shape (..., K), float64; not finite where ``matrix`` is not finite.

    Example:
        >>> simplex_qp(torch.diag(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)))
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    unit, lengths = _regular_rows(matrix)
    inverse = reciprocal(lengths)
    # x = z · m/‖g‖ up to a common factor, which the normalisation takes out.
    s = inverse / inverse.amax(-1, keepdim=True)
    lifted, linear = unit + s[..., :, None] * s[..., None, :], -s[..., None, :]
    if matrix.shape[-1] <= MAX_FACES:
        candidates = _all_faces_optima(lifted, linear)
    else:
        # A sum that is held at 1 leads to very large z in fewer steps than one that is drawn there.
        z, y = interior_point(unit, torch.zeros_like(s), s)
        length = (1 + _quadratic(unit, z)).reciprocal()  # the best multiple of z
        candidates = _found_faces_optima(lifted, linear, (z * length)[..., None, :], (y * length)[..., None, :])
    weights = normalise(candidates[..., 0, :, :] * s[..., None, :])
    shared = share_alike(matrix, smallest(_simplex_gap(matrix, weights), weights))
    # Zero vectors, if there are any, are the shortest.
    zero = (torch.diagonal(matrix, dim1=-2, dim2=-1) == 0).to(matrix.dtype)
    count = zero.sum(-1, keepdim=True)
    return where_finite(matrix, torch.where(count > 0, zero / count, shared))


def orthant_qp(matrix: Tensor, linear: Tensor) -> Tensor:
    r""":math:`\arg\min \tfrac12 v^\top G v + q^\top v` over :math:`v \ge 0`, G positive semidefinite, q in its range.

    The optimum is the solution of the linear complementarity problem :math:`v \ge 0,\ y = Gv + q \ge 0,\ v^\top y = 0`.

    Up to K = 8 exact by enumeration: on every face of the orthant the stationary point solves a linear system, the
    optimum is one of them, and some face with it has linearly independent vertices and hence a regular system
    (Carathéodory). All systems are solved in one batched call. Beyond, a fixed number of interior-point steps
    (Mehrotra's predictor–corrector) finds the face, whose system is then solved in the same way. Every candidate is
    judged by its gap, how much it violates feasibility, row by row relative to the row's rounding error, and
    complementarity,

    .. math:: \max_i \frac{-y_i}{b_i}, \qquad \frac{v^\top y}{v^\top b},
        \qquad b = \lvert G \rvert v + \max_i \lvert q_i \rvert

    in rows scaled to unit diagonal, and the best is taken.

    Args:
        matrix: G, shape (..., K, K), float64, symmetric positive semidefinite up to rounding.
        linear: M vectors q for every matrix, shape (..., M, K).

    Returns:
        Tensor of shape (..., M, K), float64; not finite where ``matrix`` is not finite.

    Example:
        >>> orthant_qp(torch.eye(2).double(), torch.tensor([[-1.0, 2.0]]).double())
        tensor([[1., 0.]], dtype=torch.float64)
    """
    unit, lengths = _regular_rows(matrix)
    inverse, square = reciprocal(lengths), largest_square(matrix)
    scaled = linear * inverse[..., None, :]
    # Of the order of 1, as the matrix is. A problem with q = 0 has the solution 0, which is 0 times whatever comes out.
    size = scaled.abs().amax(-1, keepdim=True)
    scaled = scaled / torch.where(size > 0, size, torch.ones_like(size))
    if matrix.shape[-1] <= MAX_FACES:
        candidates = _all_faces_optima(unit, scaled)
    else:
        each = unit[..., None, :, :].expand(*scaled.shape, -1)
        candidates = _found_faces_optima(unit, scaled, *interior_point(each, scaled))
    best = smallest(_orthant_gap(unit, scaled, candidates), candidates)
    return best * (size / square * inverse[..., None, :])


def _regular_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`unit_rows`, with zero vectors as unit vectors at right angles to all, which no program wants in."""
    unit, lengths = unit_rows(matrix)
    return unit + torch.diag_embed((lengths == 0).to(unit.dtype)), lengths


def normalise(weights: Tensor) -> Tensor:
    """Divided by their sum, as a point of the simplex.

    Example:
        >>> normalise(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    return weights / weights.sum(-1, keepdim=True)


def share_alike(matrix: Tensor, weights: Tensor) -> Tensor:
    """Gives equal vectors equal weights, which leaves the sum Σ wᵢgᵢ where it is.

    Example:
        >>> share_alike(torch.ones(2, 2), torch.tensor([1.0, 0.0]))
        tensor([0.5000, 0.5000])
    """
    # Whole rows: two vectors that are 1e-8 apart have equal norms and inner product to the last bit.
    alike = (matrix[..., :, None, :] == matrix[..., None, :, :]).all(-1).to(matrix.dtype)
    return (alike * weights[..., None, :]).sum(-1) / alike.sum(-1)


def all_faces(matrix: Tensor) -> Tensor:
    """All 2^K subsets of the K rows, shape (2^K, K), bool; made on the device: a copy from the host would wait.

    Example:
        >>> all_faces(torch.eye(2)).tolist()
        [[False, False], [True, False], [False, True], [True, True]]
    """
    k = matrix.shape[-1]
    number = torch.arange(2**k, device=matrix.device)[:, None]
    return ((number >> torch.arange(k, device=matrix.device)) & 1).bool()


def on_faces(matrix: Tensor, face: Tensor, right: Tensor) -> Tensor:
    """Solves the principal subsystems: ``matrix[F, F] x = right[F]`` with x = 0 off F; broadcasts.

    A singular system leaves infinities or nans.

    Args:
        matrix: (..., K, K).
        face: (..., K), bool.
        right: (..., K, M).

    Returns:
        (..., K, M).
    """
    on = face.to(matrix.dtype)
    system = matrix * (on[..., :, None] * on[..., None, :]) + torch.diag_embed(1 - on)
    # solve() itself would raise, after a look at the host.
    solution: Tensor = torch.linalg.solve_ex(system, torch.where(face[..., None], right, 0)).result
    return solution


def refined_on_faces(matrix: Tensor, face: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """As :func:`on_faces`, for faces on which dependent rows may meet, so that the system is singular but consistent.

    A few steps of iterative refinement from a guess, which stays what it is in the null space.

    Args:
        matrix: (..., K, K), positive semidefinite.
        face: (..., K), bool.
        right: (..., K, M).
        start: (..., K, M), the guess; None stands for 0.

    Returns:
        (..., K, M).
    """
    on = face.to(matrix.dtype)
    system = matrix * (on[..., :, None] * on[..., None, :]) + torch.diag_embed(1 - on + _REFINING * on)
    factor, _ = torch.linalg.cholesky_ex(system)
    x = torch.zeros_like(right * on[..., None]) if start is None else start * on[..., None]
    for _ in range(_REFINEMENTS):
        x = x + torch.cholesky_solve((right - matrix @ x) * on[..., None], factor)
    return x


def _all_faces_optima(c: Tensor, q: Tensor) -> Tensor:
    """Stationary points on all faces for C (…, K, K) and q (…, M, K): (…, M, 2^K, K)."""
    return on_faces(c[..., None, :, :], all_faces(c), -q.mT[..., None, :, :]).movedim(-1, -3).clamp_min(0)


def candidate_faces(v: Tensor, y: Tensor) -> Tensor:
    """Faces that an interior point with slacks y points at, shape (..., F, K), bool.

    Example:
        >>> candidate_faces(torch.tensor([1.0, 1e-9]), torch.tensor([1e-9, 1e-9])).tolist()
        [[True, False], [True, False], [True, True]]
    """
    return torch.stack([v > edge * y for edge in _EDGES], -2)


def _found_faces_optima(c: Tensor, q: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """What the interior point came to, v and y (…, M, K), and what the faces give that it points at: (…, M, F, K)."""
    on = candidate_faces(v, y)
    c, v = c[..., None, None, :, :], v[..., None, :]
    right = -q[..., None, :].expand(on.shape)[..., None]
    found = [on_faces(c, on, right)[..., 0]]
    start: Tensor | None = v[..., None]
    for _ in range(_CORRECTIONS):
        # Where dependent rows meet, the face's system is singular: there the interior point's solution is refined. Then
        # the active-set method: what is in, and what the solution there wants in.
        x = refined_on_faces(c, on, right, start)
        found.append(x[..., 0])
        on, start = (x > c @ x - right)[..., 0], None
    return torch.cat([*found, v], -2).clamp_min(0)


def _quadratic(matrix: Tensor, x: Tensor) -> Tensor:
    """xᵀ matrix x, shape (…, 1)."""
    return ((matrix @ x[..., None])[..., 0] * x).sum(-1, keepdim=True)


def _orthant_gap(c: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """How far v (…, M, F, K) is from feasible and complementary, relative to rounding: (…, M, F)."""
    q = q[..., None, :]
    y = v @ c[..., None, :, :] + q
    # Every entry of q is known to a rounding of the largest, which is 1: it may be what is left of terms that cancel.
    size = v @ c.abs()[..., None, :, :] + 1
    reach = (v * size).sum(-1)
    complementarity = (v * y.clamp_min(0)).sum(-1) / torch.where(reach > 0, reach, torch.ones_like(reach))
    gap = torch.maximum((-y / size).amax(-1), complementarity).clamp_min(_NO_GAP)
    # Weights that cancel one another may hide any gap in their own rounding. So what has none ranks by its size, in
    # steps of a thousand, below which the first is as good as any.
    thousands = torch.floor(torch.log2(v.sum(-1).clamp_min(1)) / 10)
    return torch.where(gap <= _NO_GAP, _NO_GAP * (1 - 1 / (2 + thousands)), gap)


def _simplex_gap(matrix: Tensor, weights: Tensor) -> Tensor:
    """Duality gap of weights (…, F, K), row by row relative to rounding: (…, F)."""
    norms = torch.diagonal(matrix, dim1=-2, dim2=-1).sqrt()[..., None, :]
    slope = weights @ matrix
    value = (weights * slope).sum(-1, keepdim=True)
    reach = (weights * norms).sum(-1, keepdim=True)
    size = reach * (norms + reach)
    return ((value - slope) / torch.where(size > 0, size, torch.ones_like(size))).amax(-1).clamp_min(_NO_GAP)


def smallest(gap: Tensor, candidates: Tensor) -> Tensor:
    """The candidate (..., F, K) with the smallest gap (..., F), the first of several; nan where none is finite.

    Example:
        >>> smallest(torch.tensor([0.5, 0.1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([3., 4.])
    """
    gap = torch.where(torch.isfinite(gap), gap, torch.inf)
    smallest, which = gap.min(-1, keepdim=True)
    best = torch.take_along_dim(candidates, which[..., None], -2)[..., 0, :]
    return torch.where(torch.isfinite(smallest), best, torch.nan)


def interior_point(c: Tensor, q: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mehrotra's predictor–corrector for min ½ vᵀCv + qᵀv over v ≥ 0, where s is given with sᵀv = 1.

    Args:
        c: (..., K, K), positive semidefinite, of unit diagonal.
        q: (..., K), of order 1.
        s: (..., K), positive.

    Returns:
        v and the slacks y = Cv + q − λs, both (..., K) and positive.
    """
    v, y = torch.ones_like(q), torch.ones_like(q)
    level = torch.zeros_like(q[..., :1])  # λ
    c_proximal = c + torch.diag_embed(torch.full_like(q, _PROXIMAL))
    if s is not None:
        v = v / s.sum(-1, keepdim=True)
    for _ in range(_INTERIOR_POINT_STEPS):
        # Where y has it, the dual residual Cv + q − λs − y cancels: −residual − y = λs − q − Cv.
        away = -q - (c @ v[..., None])[..., 0]
        ratio = y / v
        factor, _ = torch.linalg.cholesky_ex(c_proximal + torch.diag_embed(ratio))
        if s is None:
            free = torch.cholesky_solve(away[..., None], factor)[..., 0]
            dv = free
        else:
            away = away + level * s
            free, along = torch.cholesky_solve(torch.stack([away, s], -1), factor).unbind(-1)
            curvature, short = (s * along).sum(-1, keepdim=True), 1 - (s * v).sum(-1, keepdim=True)
            dv = free + (short - (s * free).sum(-1, keepdim=True)) / curvature * along

        # Predictor, towards v ∘ y = 0: (C + Y/V) Δv = s Δλ + away, sᵀΔv = 1 − sᵀv, Δy = −y − (Y/V) Δv. So with
        # ρ = Δv/v the longest step is 1/max(−Δv/v, −Δy/y) = 1/max(−ρ, 1 + ρ), and Δv ∘ Δy = −v y ρ (1 + ρ).
        rho = dv / v
        length = ((rho + 0.5).abs().amax(-1, keepdim=True) + 0.5).clamp_min(1).reciprocal()
        product = v * y
        second = -product * rho * (1 + rho)
        mu = product.mean(-1, keepdim=True)
        mu_predicted = (1 - length) * mu + length * length * second.mean(-1, keepdim=True)

        # Corrector, towards v ∘ y = centre, with what the predictor's product says of the curvature.
        pull = ((mu_predicted / mu) ** 3 * mu - second) / v
        dv = free + torch.cholesky_solve(pull[..., None], factor)[..., 0]
        if s is not None:
            d_level = (short - (s * dv).sum(-1, keepdim=True)) / curvature
            dv = dv + d_level * along
        dy = pull - y - ratio * dv
        length = _STEP / (-torch.minimum(dv / v, dy / y).amin(-1, keepdim=True)).clamp_min(_STEP)
        # At the end of its digits a step may fail; its length is nan then, and the last good point stays.
        length = torch.nan_to_num(length)
        v = torch.addcmul(v, length, torch.nan_to_num(dv))
        y = torch.addcmul(y, length, torch.nan_to_num(dy))
        if s is not None:
            level = torch.addcmul(level, length, torch.nan_to_num(d_level))
    return v, y
