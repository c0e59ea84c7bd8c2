"""Weights that bring the gradients' lengths, and the rates at which the losses fall, together (GradNorm)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_optim.combine.adam import adam, adam_state
from distill_optim.combine.rules import State, Stateful, keep

# On target up to this share of it: the objective has a kink there, and the sign of a rounding error is not a slope.
_ON_TARGET = 1e-12


@dataclass(frozen=True)
class GradNorm(Stateful):
    r"""Gradient normalisation: losses that have fallen less than the others get longer gradients.

    .. math::
        G_i = w_i \lVert g_i \rVert, \qquad
        r_i = \frac{L_i / L_i(0)}{\frac1K \sum_j L_j / L_j(0)}, \qquad
        \min_w \sum_i \bigl| G_i - \bar G r_i^\alpha \bigr|, \qquad \sum_i w_i = K

    Chen et al., *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks* (ICML 2018),
    eq. 1 and 2 and Algorithm 1: one step of Adam from the weights' gradient with the target :math:`\bar G r_i^\alpha`
    held, then the weights are rescaled to the sum K. The lengths are those of the gradients that are combined, so the
    paper's method is that with ``dominance="none"``.

    Where this departs from the paper, whose code was not published:

    * The objective is divided by the mean of :math:`\lVert g_i \rVert`, because Adam's :math:`\varepsilon` is absolute:
      a common factor of the gradients does not change the weights.
    * A step takes away at most half of a weight, so that weights stay positive, of which the paper says nothing.
    * The lengths are taken over all parameters, not the last shared layer.

    :math:`L_i(0)` is a loss's first value that is not 0, and magnitudes count. The weights are those before the step's
    update. A step with a value that is not finite gives no weights (NaN) and leaves the memory as it was.

    Args:
        alpha: strength of the pull towards a common rate; 0 makes the lengths equal. In the paper 0.12 to 1.5.
        lr: learning rate of the weights.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> rule = GradNorm()
        >>> gram, losses = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 1.0])
        >>> weights, state = rule(gram, losses, rule.init(losses))
        >>> weights
        tensor([1., 1.], dtype=torch.float64)
        >>> rule(gram, losses, state)[0]
        tensor([0.9750, 1.0250], dtype=torch.float64)
    """

    alpha: float = 1.5
    lr: float = 0.025

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha}: expected a number of at least 0")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a positive number")

    def init(self, losses: Tensor) -> State:
        weights = torch.ones_like(losses, dtype=torch.float64)
        return {"weights": weights, "initial": torch.zeros_like(weights), **adam_state(weights)}

    def __call__(self, gram: Tensor, losses: Tensor, state: State) -> tuple[Tensor, State]:
        gram, losses, weights = gram.double(), losses.double(), state["weights"]
        initial = torch.where(state["initial"] == 0, losses, state["initial"])
        ratio = torch.where(initial == 0, 1, losses.abs() / initial.abs())
        rate = ratio / _positive(ratio.mean())

        norms = gram.diagonal().sqrt()
        lengths = weights * norms  # G
        target = lengths.mean() * rate**self.alpha
        excess = lengths - target
        sign = torch.where(excess.abs() <= _ON_TARGET * target, 0, excess.sign())
        slope = sign * (norms / _positive(norms.mean()))

        stepped, memory = adam(weights, slope, state, lr=self.lr)
        positive = torch.maximum(stepped, weights / 2)
        updated = positive * (losses.numel() / positive.sum())
        finite = torch.isfinite(gram).all() & torch.isfinite(losses).all()
        return (
            torch.where(finite, weights, torch.nan),
            keep(finite, {"weights": updated, "initial": initial, **memory}, state),
        )


def _positive(x: Tensor) -> Tensor:
    """A denominator: where it is 0 the numerators are, too."""
    return torch.where(x > 0, x, 1)
