"""Weights by how fast each loss has fallen of late (dynamic weight average)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_optim.combine.rules import State, Stateful, keep


@dataclass(frozen=True)
class DWA(Stateful):
    r"""Dynamic weight average: the slower a loss falls, the more it weighs.

    .. math:: w = K \operatorname{softmax}(r / T), \qquad r_i = \bar L_i^{(e-1)} / \bar L_i^{(e-2)}

    Liu, Johns & Davison, *End-To-End Multi-Task Learning with Attention* (CVPR 2019), eq. 7, with the mean
    :math:`\bar L^{(e)}` of a loss over epoch e. An optimizer does not know of epochs: set ``window`` to the number of
    steps in one. In the first two windows every weight is 1, as in the authors' code.

    A loss's unit does not matter. Absolute values count, which is the same for a mean that keeps its sign; the rate of
    a loss whose mean was exactly 0 is taken as 1. A step with a loss that is not finite gives no weights (NaN) and is
    not counted.

    Args:
        temperature: T; the larger, the more equal the weights.
        window: number of steps over which a loss is averaged.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> rule = DWA(window=1)
        >>> state = rule.init(torch.zeros(2))
        >>> for losses in ([1.0, 8.0], [1.0, 4.0], [1.0, 4.0]):
        ...     weights, state = rule(None, torch.tensor(losses), state)
        >>> weights
        tensor([1.1244, 0.8756], dtype=torch.float64)
    """

    temperature: float = 2.0
    window: int = 100

    uses_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive number")
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"window={self.window!r}: expected a whole number of steps, at least 1")

    def init(self, losses: Tensor) -> State:
        zeros = torch.zeros_like(losses, dtype=torch.float64)
        return {
            "step": zeros.clone(),  # every loss counts those that it was given in
            "total": zeros,  # of the window under way
            "last": zeros.clone(),  # mean over the window before
            "before_last": zeros.clone(),
        }

    def __call__(self, gram: Tensor | None, losses: Tensor, state: State) -> tuple[Tensor, State]:
        losses, last, before_last = losses.double(), state["last"], state["before_last"]
        # 0 also stands for a mean that there is not yet: equal weights.
        rate = torch.where(before_last == 0, 1, last.abs() / before_last.abs())
        weights = losses.numel() * (rate / self.temperature).softmax(-1)

        step, total = state["step"] + 1, state["total"] + losses
        full = step % self.window == 0
        new = {
            "step": step,
            "total": torch.where(full, 0, total),
            "last": torch.where(full, total / self.window, last),
            "before_last": torch.where(full, last, before_last),
        }
        finite = torch.isfinite(losses).all()
        return torch.where(finite, weights, torch.nan), keep(finite, new, state)
