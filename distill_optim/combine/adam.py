"""What the rules that learn share: a step of Adam, and a step that leaves no trace."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.rules import State


def adam_state(value: Tensor) -> State:
    """Adam's memory before the first step: both moments, shaped like ``value``, and the number of steps, a scalar."""
    return {
        "exp_avg": torch.zeros_like(value),
        "exp_avg_sq": torch.zeros_like(value),
        "step": torch.zeros((), dtype=value.dtype, device=value.device),
    }


def adam(
    value: Tensor,
    gradient: Tensor,
    state: State,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, State]:
    r"""One step of Adam, handed in and out.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        x &\leftarrow x - \frac{\mathrm{lr}}{1 - \beta_1^t} \cdot \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon}

    Kingma & Ba, *Adam* (ICLR 2015), Algorithm 1, with the decay added to the gradient g: :class:`torch.optim.Adam`,
    every operation in its order. There the number of steps lives on the host, here nothing does, so the factors with
    :math:`\beta^t` may differ in the last digit. :math:`\varepsilon` is absolute: give it gradients without a unit.

    Args:
        value: what is learned, shape (K,), float64.
        gradient: shape (K,).
        state: Adam's memory; it is not changed, and other entries in it are not looked at.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: this times ``value`` is added to the gradient.

    Returns:
        The next value, and Adam's next memory alone.

    Example:
        >>> value = torch.zeros(2, dtype=torch.float64)
        >>> value, state = adam(value, torch.tensor([3.0, -0.1]).double(), adam_state(value), lr=0.025)
        >>> value
        tensor([-0.0250,  0.0250], dtype=torch.float64)
    """
    beta1, beta2 = betas
    step = state["step"] + 1
    gradient = gradient.add(value, alpha=weight_decay)
    first = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
    second = torch.addcmul(state["exp_avg_sq"] * beta2, gradient, gradient, value=1 - beta2)
    length = lr / (1 - beta1**step)
    scale = second.sqrt() / (1 - beta2**step).sqrt() + eps
    return value - length * first / scale, {"exp_avg": first, "exp_avg_sq": second, "step": step}
