"""Weights drawn anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.combine.rules import losses_only


@losses_only
def random(gram: Tensor | None, losses: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Random loss weighting: a softmax of standard normal numbers.

    .. math:: w = \operatorname{softmax}(z), \qquad z_i \sim \mathcal{N}(0, 1)

    Lin, Ye, Zhang & Tsang, *Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning* (TMLR
    2022).
    In the mean over the draws every loss weighs 1/K: what a method gains over this it gains by looking.

    The numbers are drawn on the device of the losses, so nothing waits. In our optimizers several processes that train
    one model take what the first one drew; who calls this by hand gives each of them a generator of the same seed.

    Args:
        gram: not looked at.
        losses: shape (..., K); their shape and device count.
        generator: on the device of ``losses``; None: torch's own, as ``torch.manual_seed`` sets it.

    Returns:
        Weights on the simplex, shape (..., K), float64.

    Example:
        >>> random(None, torch.zeros(3)).sum()
        tensor(1., dtype=torch.float64)
    """
    normal = torch.randn(losses.shape, generator=generator, dtype=torch.float64, device=losses.device)
    return normal.softmax(-1)
