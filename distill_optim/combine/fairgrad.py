"""Fair shares of the improvement (FairGrad)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.linalg import largest_square, reciprocal, unit_rows

# The weights may grow by three quarters, or fall by as much of themselves, in a step; so 1e6 is 25 steps away, and
# from there Newton's method doubles the digits.
_STEPS = 40
_TRUST = 0.75

# Where a combination of the gradients vanishes the weights have no bound but this one, 1/√ε in unit rows.
_PROXIMAL = 1e-13


def fairgrad(gram: Tensor, losses: Tensor | None = None, *, alpha: float = 2.0) -> Tensor:
    r"""Weights of the step that maximises the α-fair utility of the improvements.

    .. math:: G w = w^{-1/\alpha}, \qquad w > 0

    elementwise (Ban & Ji, *Fair resource allocation in multi-task learning*, ICML 2024, eq. 4): the stationary point of
    :math:`\max_d \sum_i \langle g_i, d \rangle^{1-\alpha}/(1-\alpha)` over the directions of a given length. α = 1 is
    proportional fairness, :func:`~distill_optim.combine.nash_mtl`; α → ∞ is max–min fairness, that of the smallest one.

    The equation is the optimality condition of the strictly convex

    .. math:: f(w) = \tfrac12 w^\top G w - \sum_i \frac{w_i^{1-1/\alpha}}{1-1/\alpha}

    (a logarithm for α = 1), which Newton's method minimises here, in rows scaled to unit length, with steps that change
    no weight by more than three quarters. On such a step the curvature of f changes by a bounded factor (its third
    derivative is at most :math:`(1 + 1/\alpha)/w_i` times its second), so that none is too long.

    The authors hand the equation to SciPy's ``least_squares`` on the host. Here :math:`G/\lVert G \rVert_F` stands for
    G, so that the weights do not depend on the unit of the gradients; the direction is the same, because the equation
    is homogeneous. Where some combination of the
    gradients with positive weights vanishes there is no solution; the weights then tend to that combination and end
    at about :math:`10^6`.

    Far from α = 1 the weights are the α-th powers of improvements, and those of gradients of very different lengths do
    not fit into the range of a float. The equation is solved to rounding for α from 0.5 to 2 and lengths over 12 orders
    of magnitude, and for α from 0.1 to 10 and gradients of about one length, which ``dominance="norm"`` brings about.

    Args:
        gram: inner products of the gradients, shape (..., K, K).
        losses: not looked at.
        alpha: α, greater than 0.

    Returns:
        Positive weights, shape (..., K), float64. A zero gradient weighs as one of unit length at right angles to all.

    Raises:
        ValueError: for an α that is not positive.

    Example:
        >>> fairgrad(torch.eye(2))
        tensor([1.2599, 1.2599], dtype=torch.float64)
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: expected more than 0")
    gram = gram.double()
    beta = 1 / alpha
    unit, lengths = unit_rows(gram)
    inverse = reciprocal(lengths)
    unit = unit + torch.diag_embed((lengths == 0).to(unit.dtype) + _PROXIMAL)
    # In z = w‖g‖: Cz = a z^(−β) with a = ‖g‖^(β − 1), the largest brought to 1; z then is off by its power 1/(1 + β).
    a = inverse ** (1 - beta)
    unit_of_a = a.amax(-1, keepdim=True)
    a = a / unit_of_a
    z = a ** (1 / (1 + beta))  # the solution for gradients at right angles
    for _ in range(_STEPS):
        wanted = a * z**-beta
        factor, _ = torch.linalg.cholesky_ex(unit + torch.diag_embed(beta * wanted / z))
        dz = torch.cholesky_solve((wanted - (unit @ z[..., None])[..., 0])[..., None], factor)[..., 0]
        z = z + dz * (_TRUST / (dz / z).abs().amax(-1, keepdim=True).clamp_min(_TRUST))
    # ‖G‖_F in units of the squared length of the longest gradient.
    frobenius = (gram / largest_square(gram)).square().sum((-2, -1), keepdim=True).sqrt()[..., 0]
    frobenius = torch.where(frobenius > 0, frobenius, torch.ones_like(frobenius))
    return z * inverse * (unit_of_a * frobenius) ** (1 / (1 + beta))
