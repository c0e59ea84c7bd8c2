"""The best worst improvement near the mean gradient (CAGrad)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill_optim.combine.linalg import ROUNDING, largest_square, reciprocal, slopes, unit_rows
from distill_optim.combine.qp import (
    MAX_FACES,
    all_faces,
    candidate_faces,
    on_faces,
    orthant_qp,
    refined_on_faces,
    share_alike,
    simplex_qp,
    smallest,
)

_STEPS = 30
_STEP = 0.99
_PROXIMAL = 1e-13

# Share of the squared radius that a step's squared length is known to.
_KNOWN = 0.1

# Of the faces that the interior point leads to.
_CORRECTIONS = 8


def cagrad(gram: Tensor, losses: Tensor | None = None, *, c: float = 0.5) -> Tensor:
    r"""Weights of the direction of the largest worst improvement within a ball around the mean gradient.

    .. math:: d^* = \arg\max_{\lVert d - g_0 \rVert \le c \lVert g_0 \rVert}\ \min_i \langle g_i, d \rangle,
        \qquad g_0 = \tfrac1K \sum_i g_i

    (Liu et al., *Conflict-averse gradient descent*, NeurIPS 2021, eq. 2). By duality (their eq. 3)
    :math:`d^* = g_0 + c \lVert g_0 \rVert\, g_w / \lVert g_w \rVert` with :math:`g_w = \sum_i w_i g_i`, where w
    minimises :math:`\langle g_w, g_0 \rangle + c \lVert g_0 \rVert \lVert g_w \rVert` over the simplex. c = 0 is the
    mean; for c → ∞ the direction tends to min-norm's.

    With :math:`u = d - g_0 = \sum_i y_i g_i` and :math:`\lambda = \min_i \langle g_i, d \rangle` the optimality
    conditions are :math:`y \ge 0`, :math:`Gy + Gu_0 - \lambda 1 \ge 0` (where :math:`u_0 = 1/K`), their product zero
    and :math:`y^\top G y = c^2 \lVert g_0 \rVert^2`. On a face that is a linear system and a quadratic equation for λ.
    Up to K = 8 all faces are tried, beyond, the faces that an interior-point method points at; the candidate with the
    smallest duality gap is taken.

    Where 0 is in the hull of the gradients :math:`g_w / \lVert g_w \rVert` may not exist. Then the step is the limit of
    those of a smoothed norm, which is the projection of :math:`g_0` onto the cone of directions without conflict
    (:func:`~distill_optim.combine.dualproj`), if it is within the ball.

    Args:
        gram: inner products of the gradients, shape (..., K, K).
        losses: not looked at.
        c: radius of the ball, relative to the mean gradient; at least 0. The authors' scripts have 0.4 to 0.9.

    Returns:
        Weights :math:`1/K + y`, shape (..., K), float64; they sum to more than 1.

    Raises:
        ValueError: for a negative c.

    Example:
        >>> cagrad(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0590], dtype=torch.float64)
    """
    if not c >= 0:
        raise ValueError(f"c={c}: expected at least 0")
    gram = gram.double()
    unit, lengths = unit_rows(gram)
    inverse, relative = reciprocal(lengths), gram / largest_square(gram)
    radius = c * relative.mean(-1).mean(-1).clamp_min(0).sqrt()[..., None]
    # In unit rows: z = y‖g‖, Cz + β − λs ≥ 0, zᵀCz = r².
    beta = slopes(relative, torch.full_like(lengths, 1 / gram.shape[-1])) * inverse
    s = inverse / inverse.amax(-1, keepdim=True)
    if gram.shape[-1] <= MAX_FACES:
        faces = all_faces(unit).expand(*gram.shape[:-2], -1, -1)
        sphere = _on_sphere(unit, beta, s, radius, faces, on_faces)[0]
        shares = torch.cat([sphere, _shortest(unit, s)[..., None, :]], -2)
    else:
        z, y = _interior_point(unit, beta, s, radius)
        faces = candidate_faces(z, y)
        found = [z[..., None, :]]
        for _ in range(_CORRECTIONS):
            # What is in, and what the solution there wants in: the active-set method, from a few good guesses.
            z, level = _on_sphere(unit, beta, s, radius, faces, refined_on_faces)
            found.append(z.clamp_min(0))
            faces = z > z @ unit + beta[..., None, :] - level * s[..., None, :]
        sphere = shares = torch.cat(found, -2)
    projected = orthant_qp(unit, beta[..., None, :])
    s, beta, radius = s[..., None, :], beta[..., None, :], radius[..., None, :]
    sphere = sphere.clamp_min(0)
    length = _dot(sphere, sphere @ unit).clamp_min(0).sqrt()
    sphere = sphere * torch.where(length > 0, radius / length, 0)
    # Where weights cancel one another to the last digits nobody knows how long their sum is.
    vague = ROUNDING * _dot(sphere, sphere @ unit.abs()) > _KNOWN * radius.square()
    # What is left where all cancels is the mean itself.
    sphere = torch.cat([torch.where(vague, 0, sphere), torch.zeros_like(projected)], -2)

    # Weak duality: the value of the dual at any shares is at least the best worst improvement λ.
    shares = shares.clamp_min(0) / _dot(s, shares.clamp_min(0))
    bound = _dot(beta, shares) + radius * _dot(shares, shares @ unit).clamp_min(0).sqrt()
    bound = torch.where(torch.isfinite(bound), bound, torch.inf).amin(-2, keepdim=True)
    # The projection first: where 0 is in the hull, much else has the worst improvement 0 as well.
    candidates = torch.cat([projected, sphere], -2)
    short = bound * s - beta - candidates @ unit
    # Weights that cancel one another cost as many digits as they are large.
    gap = short.amax(-1) + ROUNDING * (candidates @ unit.abs()).amax(-1)
    gap = gap / torch.where(radius > 0, radius / c if c > 0 else radius, torch.ones_like(radius))[..., 0]
    outside = _dot(projected, projected @ unit) > radius.square() * (1 + ROUNDING)
    gap = torch.cat([torch.where(outside[..., 0], torch.inf, gap[..., :1]), gap[..., 1:]], -1)
    # Of those that are as good as rounding allows, the first.
    return 1 / gram.shape[-1] + share_alike(gram, smallest(gap.clamp_min(ROUNDING), candidates) * inverse)


def _on_sphere(
    unit: Tensor, beta: Tensor, s: Tensor, radius: Tensor, faces: Tensor, solve: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Solutions z on faces (…, F, K) of Cz + β = λs with zᵀCz = r², of any sign, and λ (…, F, 1)."""
    p, q = solve(unit[..., None, :, :], faces, torch.stack([s, beta], -1)[..., None, :, :]).unbind(-1)
    s, beta, radius = s[..., None, :], beta[..., None, :], radius[..., None, :]
    # z = λP − Q with zᵀCz = λ² sᵀP − 2λ sᵀQ + βᵀQ; of the two roots the larger is the larger worst improvement.
    half, leading = _dot(s, q), _dot(s, p)
    root = (half.square() - leading * (_dot(beta, q) - radius.square())).clamp_min(0).sqrt()
    level = (half + root) / leading
    return level * p - q, level


def _shortest(unit: Tensor, s: Tensor) -> Tensor:
    """The shares of the shortest vector, as multiples of unit rows."""
    return simplex_qp(unit / s[..., :, None] / s[..., None, :]) / s


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _interior_point(c: Tensor, beta: Tensor, s: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Primal–dual path following for the dual, min βᵀz + r √(zᵀCz) over z ≥ 0, sᵀz = 1; returns z and the slacks.

    The norm has a kink where it vanishes. With √x = min over t > 0 of (x/t + t)/2 the problem is smooth and convex in
    z and t together: f(z, t) = βᵀz + r/2 (zᵀCz/t + t).
    """
    k = s.shape[-1]
    size = radius + beta.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    beta, radius = beta / size, radius / size
    z = s.rsqrt() / s.sqrt().sum(-1, keepdim=True)
    x = torch.cat([z, z.norm(dim=-1, keepdim=True)], -1)  # z and t
    y = torch.cat([s.sqrt(), torch.ones_like(radius)], -1)
    s = torch.cat([s, torch.zeros_like(radius)], -1)
    level = torch.zeros_like(radius)
    shrink = torch.full_like(radius, 0.3)
    for _ in range(_STEPS):
        z, t = x[..., :k], x[..., k:]
        image = (c @ z[..., None])[..., 0] / t
        square = _dot(z, image) / t  # zᵀCz/t²
        gradient = torch.cat([beta + radius * image, radius * (1 - square) / 2], -1)
        curvature = radius / t
        border = (-curvature * image)[..., None]
        top = torch.cat([curvature[..., None] * c, border], -1)
        hessian = torch.cat([top, torch.cat([border, (curvature * square)[..., None]], -2).mT], -2)
        ratio = y / x
        factor, _ = torch.linalg.cholesky_ex(hessian + torch.diag_embed(ratio + _PROXIMAL))
        pull = shrink * (x * y).mean(-1, keepdim=True) / x
        right = torch.stack([level * s - gradient + pull, s], -1)
        free, along = torch.cholesky_solve(right, factor).unbind(-1)
        d_level = (1 - _dot(s, x + free)) / _dot(s, along)
        dx = free + d_level * along
        dy = pull - y - ratio * dx
        length = _STEP / (-torch.minimum(dx / x, dy / y).amin(-1, keepdim=True)).clamp_min(_STEP)
        # At the end of its digits a step may fail; its length is nan then, and the last good point stays.
        length = torch.nan_to_num(length)
        x = torch.addcmul(x, length, torch.nan_to_num(dx))
        y = torch.addcmul(y, length, torch.nan_to_num(dy))
        level = torch.addcmul(level, length, torch.nan_to_num(d_level))
        # The longer the step was, the nearer to the end the next one aims.
        shrink = ((1 - length).square() + 1e-3).clamp_max(0.9)
    return x[..., :k], y[..., :k]
