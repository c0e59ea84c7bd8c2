"""The DOT authors' optimizer, said again in our own words: what a step costs there, and what it has to come to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class AuthorsDOT:
    r"""One parameter at a time, two momentum buffers each (ICCV 2023; ``mdistiller/engine/dot.py`` at a08d46f).

    .. math::
        v_\text{task} \leftarrow (\mu - \Delta)\, v_\text{task} + (1 - \tau)(g_\text{task} + \lambda\theta), \quad
        v_\text{kd} \leftarrow (\mu + \Delta)\, v_\text{kd} + (1 - \tau)\, g_\text{kd}, \quad
        \theta \leftarrow \theta - \gamma v_\text{task} - \gamma v_\text{kd}

    It walks the parameters twice, the task's gradients first, and asks of each parameter whether the other loss
    reaches it too, by walking the other's list: time that grows with the square of the number of tensors. Momentum 0,
    several parameter groups and loading a checkpoint are left out.

    Args:
        params: parameters.
        lr, momentum, dampening, weight_decay: γ, μ, τ, λ.
        delta: Δ.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        momentum: float = 0.9,
        delta: float = 0.075,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = list(params)
        self.lr, self.momentum, self.delta = lr, momentum, delta
        self.dampening, self.weight_decay = dampening, weight_decay
        self.task: dict[Tensor, Tensor] = {}
        self.distill: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, task: Sequence[Tensor | None], distill: Sequence[Tensor | None]) -> None:
        """Takes one step.

        Args:
            task: the task loss's gradient of each parameter, None where it does not reach it.
            distill: the distillation loss's.
        """
        task_params = [p for p, g in zip(self.params, task, strict=True) if g is not None]
        distill_params = [p for p, g in zip(self.params, distill, strict=True) if g is not None]
        for p, grad in zip(task_params, (g for g in task if g is not None), strict=True):
            if self.weight_decay != 0:
                grad = grad.add(p, alpha=self.weight_decay)
            momentum = self.momentum - self.delta if among(p, distill_params) else self.momentum
            p.add_(self._follow(self.task, p, grad, momentum), alpha=-self.lr)
        for p, grad in zip(distill_params, (g for g in distill if g is not None), strict=True):
            shared = among(p, task_params)
            # What a parameter that distillation alone reaches decays by is forgotten in its first step.
            if self.weight_decay != 0 and not shared and p in self.distill:
                grad = grad.add(p, alpha=self.weight_decay)
            momentum = self.momentum + self.delta if shared else self.momentum
            p.add_(self._follow(self.distill, p, grad, momentum), alpha=-self.lr)

    def _follow(self, buffers: dict[Tensor, Tensor], p: Tensor, grad: Tensor, momentum: float) -> Tensor:
        if p in buffers:
            return buffers[p].mul_(momentum).add_(grad, alpha=1 - self.dampening)
        buffers[p] = grad.clone()
        return buffers[p]


def among(p: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether it is one of them: tensors have no ``==`` that would tell."""
    for other in params:  # noqa: SIM110  # any() would walk a generator, which takes longer than theirs
        if p is other:
            return True
    return False
