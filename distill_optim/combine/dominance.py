"""Gradient dominance: the scale at which each loss's gradient enters the combination."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_optim.combine.rules import Method, State, Stateful, apply, keep, losses_only

# ∇log L = ∇L / L explodes as L → 0; below this share of the largest loss the denominator stays where it is.
_LOG_FLOOR = 1e-8


@losses_only
def _log(gram: Tensor | None, losses: Tensor) -> Tensor:
    return _reciprocal(floored(losses))


def _norm(gram: Tensor, losses: Tensor) -> Tensor:
    return _reciprocal(_norms(gram))


@losses_only
def _none(gram: Tensor | None, losses: Tensor) -> Tensor:
    return torch.ones_like(losses)


@dataclass(frozen=True)
class EMANorm(Stateful):
    r"""Gradients in units of their usual length: the scale of ``dominance="ema"``.

    .. math:: s_i = 1 / \hat m_i, \qquad m_i \leftarrow \beta m_i + (1-\beta) \lVert g_i \rVert, \qquad
        \hat m_i = m_i / (1 - \beta^t)

    the bias-corrected average of Adam (Kingma & Ba, ICLR 2015, section 3). As ``"norm"`` no loss dominates by the
    length of its gradient, but a gradient that vanishes for a step stays short in that step, and a noisy length does
    not become a noisy scale. A step whose Gram matrix is not finite is not remembered.

    Attributes:
        decay: β in [0, 1); 0 is ``"norm"``.

    Raises:
        ValueError: for a decay outside [0, 1).

    Example:
        >>> rule, losses = EMANorm(decay=0.5), torch.ones(2, dtype=torch.float64)
        >>> scales, state = rule(torch.diag(torch.tensor([4.0, 1.0])).double(), losses, rule.init(losses))
        >>> scales
        tensor([0.5000, 1.0000], dtype=torch.float64)
        >>> rule(torch.diag(torch.tensor([16.0, 1.0])).double(), losses, state)[0]
        tensor([0.3000, 1.0000], dtype=torch.float64)
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: expected a number in [0, 1)")

    def init(self, losses: Tensor) -> State:
        """The memory before the first step: average lengths, and how many went into them, both of shape (K,)."""
        zero = torch.zeros_like(losses, dtype=torch.float64)
        return {"norms": zero, "count": zero.clone()}

    def __call__(self, gram: Tensor, losses: Tensor, state: State) -> tuple[Tensor, State]:
        """Scales, shape (K,), and the next memory."""
        count = state["count"] + 1
        norms = torch.lerp(state["norms"], _norms(gram.double()), 1 - self.decay)
        scales = _reciprocal(norms / (1 - self.decay**count))
        return scales, keep(torch.isfinite(norms).all(), {"norms": norms, "count": count}, state)


_RULES: dict[str, Method | Stateful] = {"log": _log, "norm": _norm, "none": _none, "ema": EMANorm()}

DOMINANCE = tuple(_RULES)


def dominance_rule(dominance: str | Method | Stateful) -> Method | Stateful:
    """The rule behind a name; a rule stands for itself.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something that is neither a name nor callable.

    Example:
        >>> dominance_rule("ema")
        EMANorm(decay=0.9)
    """
    if isinstance(dominance, str):
        if dominance not in _RULES:
            raise ValueError(f"dominance={dominance!r}: expected one of {', '.join(map(repr, DOMINANCE))}")
        return _RULES[dominance]
    if not callable(dominance):
        raise TypeError(f"dominance={dominance!r}: expected a name or a function (gram, losses) -> scales")
    return dominance


def dominance_scales(dominance: str | Method | Stateful, gram: Tensor, losses: Tensor) -> Tensor:
    r"""Factors :math:`s_i` such that :math:`s_i \nabla L_i` enter the combination.

    ========  ============================================  ==============================================
    name      :math:`s_i`                                   the gradients become
    ========  ============================================  ==============================================
    ``log``   :math:`1/\max(|L_i|, 10^{-8}\max_j|L_j|)`     :math:`\nabla \log L_i` (DTO-KD, eq. of the dual)
    ``norm``  :math:`1/\lVert\nabla L_i\rVert`              unit vectors; a zero gradient stays zero
    ``ema``   1/average of :math:`\lVert\nabla L_i\rVert`   in units of their usual length, see EMANorm
    ``none``  1                                             the raw gradients
    ========  ============================================  ==============================================

    The logarithm needs positive losses. For a loss :math:`\le 0` its absolute value stands in the denominator:
    progress is then measured relative to the loss's magnitude, and the direction stays a descent direction.

    Args:
        dominance: one of the names, or a rule; of one with a memory, the first step.
        gram: inner products of the raw gradients, shape (..., K, K).
        losses: values of the losses, shape (..., K).

    Returns:
        Tensor of shape (..., K), dtype and device of ``gram``.

    Raises:
        ValueError: for any other name.

    Example:
        >>> dominance_scales("log", torch.eye(2, dtype=torch.float64), torch.tensor([2.0, 0.5]))
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    return apply(dominance_rule(dominance), gram, losses.to(gram), {})[0].to(gram)


def floored(losses: Tensor) -> Tensor:
    """Magnitudes of the losses, none below 1e-8 of the largest.

    Example:
        >>> floored(torch.tensor([2.0, -0.5, 0.0]))
        tensor([2.0000e+00, 5.0000e-01, 2.0000e-08])
    """
    size = losses.abs()
    return torch.maximum(size, _LOG_FLOOR * size.amax(-1, keepdim=True))


def _norms(gram: Tensor) -> Tensor:
    return torch.diagonal(gram, dim1=-2, dim2=-1).sqrt()


def _reciprocal(size: Tensor) -> Tensor:
    return torch.where(size == 0, torch.ones_like(size), size).reciprocal()
