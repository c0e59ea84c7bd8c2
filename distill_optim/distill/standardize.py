"""Logits that have mean 0 and standard deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim.distill.inputs import centred_unit, expect_numbers


def standardize(logits: Tensor) -> Tensor:
    r"""Z-scores of the logits, :math:`(z - \bar z)/\sigma(z)`, over the last dimension.

    Sun et al., *Logit standardization in knowledge distillation* (CVPR 2024). A student of less capacity then has to
    match the order and the proportions of the teacher's logits, not their range. Give both sides to any loss of logits:

        ``kd(standardize(student), standardize(teacher), temperature=2.0)``

    Logits multiplied by a positive number, or shifted, come out the same.

    Here :math:`\sigma` is the paper's, :math:`\sigma^2 = \frac1C \sum_c (z_c - \bar z)^2`; the authors' code divides by
    C − 1, which is the same as a temperature larger by :math:`\sqrt{C/(C-1)}`. Logits that are constant give 0,
    without a gradient.

    Args:
        logits: shape (..., C), all finite.

    Returns:
        The same shape, in float32 or wider.

    Raises:
        TypeError: for what is no floating-point tensor.

    Example:
        >>> standardize(torch.tensor([[1.0, 2.0, 3.0], [10.0, 30.0, 50.0]]))
        tensor([[-1.2247,  0.0000,  1.2247],
                [-1.2247,  0.0000,  1.2247]])
    """
    expect_numbers(logits=logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    root: float = logits.shape[-1] ** 0.5
    return root * centred_unit(wide)
