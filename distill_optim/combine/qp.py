"""Tiny quadratic programs over the simplex: batched, in float64, without a branch on data."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

# Up to this K all 2^K − 1 faces are solved at once (255 systems of order 9); beyond, interior-point steps.
MAX_FACES = 8

# 14 bring the relative duality gap to rounding on most matrices, 18 not yet on all of the nightly tests'.
_INTERIOR_POINT_STEPS = 25

# Keeps the Cholesky factor of a rank-deficient matrix alive. It slows a Newton step by a hair and moves no optimum,
# because the residuals are taken from the matrix itself.
_PROXIMAL = 1e-13


def simplex_qp(matrix: Tensor) -> Tensor:
    r""":math:`\arg\min \tfrac12 \pi^\top G \pi` over :math:`\pi \ge 0, \sum_i \pi_i = 1`, G positive semidefinite.

    Up to K = 8 exact by enumeration: on every face of the simplex the unconstrained optimum solves a linear
    (Karush–Kuhn–Tucker) system, the optimum of the whole is one of them, and some face with it has affinely
    independent vertices and hence a regular system (Carathéodory). All systems are solved in one batched call.
    Beyond, a fixed number of interior-point steps (Mehrotra's predictor–corrector) finds the face, whose system
    is then solved in the same way. Every candidate is judged by its relative duality gap

    .. math:: \max_i \frac{\pi^\top G \pi - (G\pi)_i}{r\,(\lVert g_i \rVert + r)},
        \qquad r = \sum_j \pi_j \lVert g_j \rVert

    and the best is taken; the denominator is the size of the numerator's rounding error, so that a long gradient does
    not hide a gap at a short one. Where the optimal weights are not unique any of them may come out, except that equal
    vectors have equal weights.

    All guards are relative: the result for :math:`cG` is that for G. The rows are scaled to unit diagonal before
    anything is solved, so that gradients of very different lengths lose no digits.

    Args:
        matrix: shape (..., K, K), float64, symmetric positive semidefinite up to rounding.

    Returns:
        Tensor of shape (..., K), float64: not finite where ``matrix`` is not finite.

    Example:
        >>> simplex_qp(torch.diag(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)))
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    k = matrix.shape[-1]
    largest = torch.diagonal(matrix, dim1=-2, dim2=-1).amax(-1)[..., None, None]
    matrix = matrix / torch.where(largest > 0, largest, torch.ones_like(largest))
    norms = torch.diagonal(matrix, dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, norms, torch.ones_like(norms)).reciprocal()
    unit = matrix * inverse[..., :, None] * inverse[..., None, :]
    # π = z · inverse (up to the common factor, which the normalisation takes out).
    scale = inverse / inverse.amax(-1, keepdim=True)
    if k <= MAX_FACES:
        # Face f holds vertex i where bit i of f is set; made on the device, because a copy from the host would wait.
        number = torch.arange(1, 2**k, device=matrix.device)[:, None]
        faces = ((number >> torch.arange(k, device=matrix.device)) & 1).bool()
        candidates = _face_optimum(unit[..., None, :, :], scale[..., None, :], faces)
    else:
        z, y = _interior_point(unit, scale)
        candidates = torch.stack([z, _face_optimum(unit, scale, z > y)], -2)
    weights = _share_alike(matrix, _best(matrix, _normalise(candidates * scale[..., None, :])))
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None]
    return torch.where(finite, weights, torch.nan)


def _face_optimum(unit: Tensor, scale: Tensor, face: Tensor) -> Tensor:
    """Stationary point on the affine hull of a face: C z = λ s and sᵀz = 1 on it, z = 0 off it."""
    on = face.to(unit.dtype)
    top = unit * on[..., :, None] * on[..., None, :] + torch.diag_embed(1 - on)
    border = (scale * on)[..., None]
    system = torch.cat(
        [torch.cat([top, border], -1), torch.cat([border.mT, torch.zeros_like(border[..., :1, :])], -1)], -2
    )
    right = torch.zeros_like(system[..., :1])
    right[..., -1, :] = 1
    # A singular system leaves infinities, which no one picks; solve() itself would raise, after a look at the host.
    solution: Tensor = torch.linalg.solve_ex(system, right).result
    return solution[..., :-1, 0]


def _interior_point(c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mehrotra's predictor–corrector for min ½ zᵀCz subject to sᵀz = 1, z ≥ 0; returns z and the slacks y."""
    z = torch.ones_like(s) / s.sum(-1, keepdim=True)
    y = torch.ones_like(s)
    multiplier = torch.zeros_like(s[..., :1])
    for _ in range(_INTERIOR_POINT_STEPS):
        dual = (c @ z[..., None])[..., 0] - multiplier * s - y
        primal = (s * z).sum(-1, keepdim=True) - 1
        factor, _ = torch.linalg.cholesky_ex(c + torch.diag_embed(y / z + _PROXIMAL))
        newton = partial(_newton, factor, torch.cholesky_solve(s[..., None], factor)[..., 0], s, z, y, dual, primal)

        dz, dy, _ = newton(torch.zeros_like(z))
        length = torch.minimum(_to_boundary(z, dz), _to_boundary(y, dy))
        mu = (z * y).mean(-1, keepdim=True)
        mu_affine = ((z + length * dz) * (y + length * dy)).mean(-1, keepdim=True)
        centre = (mu_affine / mu) ** 3 * mu

        dz, dy, d_multiplier = newton(centre - dz * dy)
        length = 0.99 * torch.minimum(_to_boundary(z, dz), _to_boundary(y, dy))
        z_next, y_next, m_next = z + length * dz, y + length * dy, multiplier + length * d_multiplier
        # At the end of its digits a step may fail; then the last good point stays.
        good = ((z_next > 0) & (y_next > 0)).all(-1, keepdim=True)
        good = good & torch.isfinite(z_next + y_next + m_next).all(-1, keepdim=True)
        z, y = torch.where(good, z_next, z), torch.where(good, y_next, y)
        multiplier = torch.where(good, m_next, multiplier)
    return z, y


def _newton(
    factor: Tensor, solved_s: Tensor, s: Tensor, z: Tensor, y: Tensor, dual: Tensor, primal: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's direction (Δz, Δy, Δλ) towards z ∘ y = centre.

    With Δy = (centre − y Δz)/z − y put in, the equations are (C + Y/Z) Δz = s Δλ − dual − y + centre/z, sᵀΔz = −primal.
    """
    solved = torch.cholesky_solve((centre / z - y - dual)[..., None], factor)[..., 0]
    d_multiplier = -(primal + (s * solved).sum(-1, keepdim=True)) / (s * solved_s).sum(-1, keepdim=True)
    dz = solved + d_multiplier * solved_s
    return dz, (centre - y * dz) / z - y, d_multiplier


def _to_boundary(x: Tensor, dx: Tensor) -> Tensor:
    """The longest step of at most 1 that keeps x + step · dx ≥ 0."""
    return torch.where(dx < 0, -x / dx, torch.ones_like(x)).amin(-1, keepdim=True).clamp_max(1)


def _normalise(weights: Tensor) -> Tensor:
    positive = weights.clamp_min(0)
    return positive / positive.sum(-1, keepdim=True)


def _best(matrix: Tensor, candidates: Tensor) -> Tensor:
    """The candidate (…, F, K) with the smallest relative duality gap."""
    norms = torch.diagonal(matrix, dim1=-2, dim2=-1).sqrt()
    slope = candidates @ matrix
    value = (candidates * slope).sum(-1, keepdim=True)
    reach = (candidates * norms[..., None, :]).sum(-1, keepdim=True)
    unit = reach * (norms[..., None, :] + reach)
    gap = ((value - slope) / torch.where(unit > 0, unit, torch.ones_like(unit))).amax(-1)
    gap = torch.where(torch.isfinite(gap), gap, torch.inf)
    return torch.take_along_dim(candidates, gap.argmin(-1)[..., None, None], -2)[..., 0, :]


def _share_alike(matrix: Tensor, weights: Tensor) -> Tensor:
    """Gives equal vectors equal weights, which leaves their sum Σ πᵢ gᵢ where it is; zero vectors, if any, take all."""
    # Whole rows: two vectors that are 1e-8 apart have equal norms and inner product to the last bit.
    alike = (matrix[..., :, None, :] == matrix[..., None, :, :]).all(-1).to(matrix.dtype)
    shared = (alike * weights[..., None, :]).sum(-1) / alike.sum(-1)
    zero = (torch.diagonal(matrix, dim1=-2, dim2=-1) == 0).to(matrix.dtype)
    count = zero.sum(-1, keepdim=True)
    return torch.where(count > 0, zero / count, shared)
