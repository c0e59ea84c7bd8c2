"""A smooth version of the worst loss (smooth Tchebycheff scalarisation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_optim.combine.dominance import floored
from distill_optim.combine.rules import State, Stateful, keep


@dataclass(frozen=True)
class STCH(Stateful):
    r"""Smooth Tchebycheff scalarisation: descend on a smooth maximum of the losses, each relative to where it began.

    .. math:: \min_\theta\ K \mu \log \sum_i e^{\log(L_i / n_i) / \mu}, \qquad
        w = K \operatorname{softmax}\bigl(\log(L / n) / \mu\bigr)

    Lin et al., *Smooth Tchebycheff Scalarization for Multi-Objective Optimization* (ICML 2024), in the form of the
    authors' code for multi-task learning: of the logarithms, relative to the nadir n, the mean of each loss over
    a warm-up during which every weight is 1. The weights belong to the gradients of the log losses, hence to
    ``dominance="log"``, and sum to K. As :math:`\mu \to 0` only the worst loss is left. At :math:`\mu = 1` it is the
    descent on :math:`\log \sum_i L_i / n_i`, so the weights on the raw gradients are in the fixed ratio
    :math:`1/n_i`.

    Where this departs from the authors' code: its warm-up is four epochs, and the nadir the mean over the fifth; here
    warm-up and mean are the first ``warmup`` steps. And :math:`|L_i|` has the floor of
    :func:`~distill_optim.combine.dominance_scales` where theirs adds :math:`10^{-20}`.

    A step with a loss that is not finite gives no weights (NaN) and is not counted.

    Args:
        mu: smoothness μ. The authors' code for multi-task learning takes 1; the paper compares 0.01 to 1.
        warmup: number of steps before the method sets in.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> rule = STCH(mu=0.5, warmup=1)
        >>> weights, state = rule(None, torch.tensor([1.0, 8.0]), rule.init(torch.zeros(2)))
        >>> weights
        tensor([1., 1.], dtype=torch.float64)
        >>> rule(None, torch.tensor([1.0, 4.0]), state)[0]
        tensor([1.6000, 0.4000], dtype=torch.float64)
    """

    mu: float = 1.0
    warmup: int = 100

    uses_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise ValueError(f"mu={self.mu}: expected a positive number")
        if not isinstance(self.warmup, int) or isinstance(self.warmup, bool) or self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r}: expected a whole number of steps, at least 1")

    def init(self, losses: Tensor) -> State:
        nadir = torch.zeros_like(losses, dtype=torch.float64)
        return {"nadir": nadir, "step": nadir.clone()}

    def __call__(self, gram: Tensor | None, losses: Tensor, state: State) -> tuple[Tensor, State]:
        losses, nadir, step = losses.double(), state["nadir"], state["step"]
        # Every loss counts the steps that it was given in; the warm-up is over when the last one's is.
        warm = step < self.warmup
        relative = floored(losses) / floored(nadir)
        # Where all losses are 0, or all were, none is the worst.
        relative = torch.where((relative > 0) & torch.isfinite(relative), relative, 1)
        weights = torch.where(warm.any(), 1, losses.numel() * (relative.log() / self.mu).softmax(-1))
        new = {
            "nadir": torch.where(warm, nadir + losses.abs() / self.warmup, nadir),
            "step": torch.where(warm, step + 1, step),
        }
        finite = torch.isfinite(losses).all()
        return torch.where(finite, weights, torch.nan), keep(finite, new, state)
