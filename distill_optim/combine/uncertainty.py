"""Weights by the uncertainty of each loss, learned beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_optim.combine.adam import adam, adam_state
from distill_optim.combine.rules import State, Stateful, keep


@dataclass(frozen=True)
class Uncertainty(Stateful):
    r"""Homoscedastic uncertainty: every loss has a variance, and the likelihood of all is maximised.

    .. math:: \min_{\theta, s} \sum_i \frac{L_i(\theta)}{c\,e^{s_i}} + \frac{s_i}{2}, \qquad
        w_i = \frac{1}{c\,e^{s_i}}

    Kendall, Gal & Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics*
    (CVPR 2018), eq. 7 and 10 with :math:`s = \log \sigma^2`: c is 2 for a regression, 1 for a classification. Where
    the losses stand still :math:`e^{s_i} = 2 L_i / c`, so :math:`w_i L_i = 1/2` for every loss, whatever its unit.

    The authors train s with the model's optimizer, from a start that they choose; here it has an Adam of its own and
    starts at 0. The objective is unbounded for a loss that stays :math:`\le 0`, whose weight grows
    without end: keep the losses positive.

    The weights are those before the step's update, and do not sum to anything. A step with a loss that is not finite
    gives no weights (NaN) and leaves the memory as it was.

    Args:
        lr: learning rate of s.
        c: the constant in the denominator.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> rule = Uncertainty()
        >>> losses = torch.tensor([4.0, 0.25])
        >>> weights, state = rule(None, losses, rule.init(losses))
        >>> weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> rule(None, losses, state)[0]
        tensor([0.4877, 0.5127], dtype=torch.float64)
    """

    lr: float = 0.025
    c: float = 2.0

    uses_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a positive number")
        if not self.c > 0:
            raise ValueError(f"c={self.c}: expected a positive number")

    def init(self, losses: Tensor) -> State:
        s = torch.zeros_like(losses, dtype=torch.float64)
        return {"log_variances": s, **adam_state(s)}

    def __call__(self, gram: Tensor | None, losses: Tensor, state: State) -> tuple[Tensor, State]:
        losses, s = losses.double(), state["log_variances"]
        weights = (-s).exp() / self.c
        updated, memory = adam(s, 0.5 - losses * weights, state, lr=self.lr)  # ∂/∂s = 1/2 − L e^{−s}/c
        finite = torch.isfinite(losses).all()
        return torch.where(finite, weights, torch.nan), keep(finite, {"log_variances": updated, **memory}, state)
