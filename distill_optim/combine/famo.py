"""Weights that learn from how far each loss fell in the step before (FAMO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_optim.combine.adam import adam, adam_state
from distill_optim.combine.dominance import floored
from distill_optim.combine.rules import State, Stateful, keep


@dataclass(frozen=True)
class FAMO(Stateful):
    r"""Fast adaptive multitask optimization: the min-norm weights of the log losses, one descent step at a time.

    .. math::
        z = \operatorname{softmax}(\xi), \qquad d = \sum_i z_i \nabla \log L_i, \qquad
        \xi \leftarrow \xi - \mathrm{Adam}\Bigl(\frac{\partial z}{\partial \xi}^{\!\top} \delta + \gamma \xi\Bigr),
        \qquad \delta_i = \log L_i(\theta_t) - \log L_i(\theta_{t+1})

    Liu, Feng, Stone & Liu, *FAMO: Fast Adaptive Multitask Optimization* (NeurIPS 2023), Algorithm 1. Descent on
    :math:`\tfrac12 \lVert \sum_i z_i \nabla \log L_i \rVert^2` needs the products of d with every gradient; to first
    order those are how far each logarithm fell, so no gradient of a single loss is needed. It is DTO-KD's training
    algorithm, too. The weights belong to the gradients of the log losses, hence to ``dominance="log"``.

    Hand the losses of the same batch after the step to :meth:`observe`. Where nobody does, the next step's losses
    stand in, with the noise of another batch.

    Where this departs from the authors' code:

    * Weights sum to 1. The factor :math:`(\sum_i z_i / L_i)^{-1}`, which DTO-KD leaves out, is K⁻¹ of what ``rescale``
      applies after the dominance handling.
    * The logarithm is of :math:`|L_i|` with the floor of :func:`~distill_optim.combine.dominance_scales`, relative to
      the largest loss, in place of :math:`L_i - L_i^{\min} + 10^{-8}`.
    * Gradients are not clipped: that is the caller's.

    A step with a loss that is not finite gives no weights (NaN), and nothing is learned from it; nor is it from one
    that begins or ends with every loss at 0.

    Args:
        lr: learning rate of the logits.
        weight_decay: γ, which pulls towards equal weights: 1e-3 in the authors' scripts for CelebA, NYUv2 and QM9, 1e-2
            for Cityscapes.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> rule = FAMO()
        >>> weights, state = rule(None, torch.tensor([1.0, 1.0]), rule.init(torch.ones(2)))
        >>> state = rule.observe(torch.tensor([0.5, 0.9]), state)
        >>> rule(None, torch.tensor([0.6, 0.8]), state)[0]
        tensor([0.4875, 0.5125], dtype=torch.float64)
    """

    lr: float = 0.025
    weight_decay: float = 1e-3

    uses_gram: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a positive number")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay}: expected a number of at least 0")

    def init(self, losses: Tensor) -> State:
        logits = torch.zeros_like(losses, dtype=torch.float64)
        return {"logits": logits, **adam_state(logits), "previous": torch.full_like(logits, torch.nan)}

    def __call__(self, gram: Tensor | None, losses: Tensor, state: State) -> tuple[Tensor, State]:
        state = self.observe(losses, state)
        weights = torch.where(torch.isfinite(losses).all(), state["logits"].softmax(-1), torch.nan)
        return weights, {**state, "previous": _log(losses)}

    def observe(self, losses: Tensor, state: State) -> State:
        """Takes in the losses of the same batch after the step; with no step to look back on, does nothing.

        Args:
            losses: shape (K,).
            state: the memory that the step returned.

        Returns:
            The memory for the next step.
        """
        fall = state["previous"] - _log(losses)  # δ; nan where there is no step to look back on
        z = state["logits"].softmax(-1)
        gradient = z * (fall - (z * fall).sum())
        logits, memory = adam(state["logits"], gradient, state, lr=self.lr, weight_decay=self.weight_decay)
        looked_back = {**state, "previous": torch.full_like(fall, torch.nan)}
        return keep(torch.isfinite(gradient).all(), {**looked_back, "logits": logits, **memory}, looked_back)


def _log(losses: Tensor) -> Tensor:
    return floored(losses.double()).log()
