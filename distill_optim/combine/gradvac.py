"""Gradient vaccine (GradVac): every gradient brought to the cosines with the others that are usual."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from distill_optim.combine.linalg import ROUNDING, unit_rows
from distill_optim.combine.pcgrad import random_orders
from distill_optim.combine.rules import State, Stateful


@dataclass(frozen=True)
class GradVac(Stateful):
    r"""Weights of the sum of the gradients, each turned towards those that it is less alike than it used to be.

    With :math:`\phi_{ij}` the cosine of :math:`g_i'` and :math:`g_j`, for all :math:`j \ne i` in random order

    .. math:: g_i' \leftarrow g_i' + \frac{\lVert g_i'\rVert
        \bigl(\hat\phi_{ij}\sqrt{1-\phi_{ij}^2} - \phi_{ij}\sqrt{1-\hat\phi_{ij}^2}\bigr)}
        {\lVert g_j\rVert\sqrt{1-\hat\phi_{ij}^2}}\, g_j \quad\text{if } \phi_{ij} < \hat\phi_{ij},
        \qquad \hat\phi_{ij} \leftarrow (1-\beta)\,\hat\phi_{ij} + \beta\,\phi_{ij}

    Wang et al., *Gradient vaccine* (ICLR 2021), eq. 3 and 4 and algorithm 1, with all parameters in one group;
    :math:`g_i'` starts as :math:`g_i`, which has afterwards the cosine :math:`\hat\phi_{ij}` with :math:`g_j`, and the
    step is :math:`\sum_i g_i'`. It begins with targets of 0, and those make it
    :func:`~distill_optim.combine.pcgrad.pcgrad`.

    A gradient that is zero, or that its own corrections have cancelled, has no angle: neither it nor the target
    changes. A target of 1, which equal gradients approach, asks for an infinite weight of any other; it counts as
    :math:`1 - 1.4\cdot 10^{-14}`, the last that the cosine of equal gradients is known to exceed.

    The state is ``targets``, :math:`\hat\phi`, shape (K, K). A Gram matrix that is not finite leaves it as it was.

    Args:
        beta: share of the newest cosine in the target.
        generator: draws the orders, on the device of the Gram matrix; None stands for that device's default generator.
            A copy of the rule has a generator of its own in the same state.

    Raises:
        ValueError: for a beta outside [0, 1].

    Example:
        >>> rule, losses = GradVac(), torch.ones(2)
        >>> weights, state = rule(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), losses, rule.init(losses))
        >>> weights
        tensor([1.2500, 2.0000], dtype=torch.float64)
        >>> state["targets"]
        tensor([[ 0.0000, -0.2500],
                [-0.2500,  0.0000]], dtype=torch.float64)
    """

    beta: float = 0.5
    generator: torch.Generator | None = field(default=None, compare=False)

    uses_losses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta!r}: expected a number from 0 to 1")

    def init(self, losses: Tensor) -> State:
        """Targets of 0."""
        return {"targets": losses.new_zeros((len(losses), len(losses)), dtype=torch.float64)}

    def __call__(self, gram: Tensor, losses: Tensor, state: State) -> tuple[Tensor, State]:
        """Weights, at least 1 each, or nan for a Gram matrix that is not finite; and the targets of the next step."""
        gram, targets, k = gram.double(), state["targets"], len(gram)
        visits = random_orders((k,), gram.device, self.generator)
        cosines, lengths = unit_rows(gram)
        entries = cosines.flatten().expand(k, k * k)
        nonzero = lengths.expand(k, k).gather(-1, visits) > 0
        before = targets.gather(-1, visits)
        target = before.clamp(ROUNDING - 1, 1 - ROUNDING)
        cotangent = target / (1 - target**2).sqrt()
        # Of gᵢ′/‖gᵢ‖: the inner products with the unit gradients that are still to be visited, the square, and the
        # length before anything cancels, by which rounding is measured.
        inner = entries.gather(-1, torch.arange(k, device=gram.device)[:, None] * k + visits)
        squared = reach = cosines.diagonal()[:, None]
        shares, changes = [inner[:, :0]], [inner[:, :0]]
        for position in range(k - 1):
            angled = (squared > ROUNDING * reach**2) & nonzero[:, position, None]
            size = torch.where(angled, squared, 1).sqrt()
            phi = (inner[:, :1] / size).clamp(-1, 1)
            # ‖gᵢ′‖ (cot ϑ̂ sin ϑ − cos ϑ) with φ = cos ϑ and φ̂ = cos ϑ̂.
            share = size * (cotangent[:, position, None] * (1 - phi**2).sqrt() - phi)
            share = torch.where(angled & (phi < target[:, position, None]), share, 0)
            squared, reach = squared + share * (2 * inner[:, :1] + share), reach + share
            rest = entries.gather(-1, visits[:, position, None] * k + visits[:, position + 1 :])
            inner = inner[:, 1:] + share * rest
            shares.append(share)
            changes.append(torch.where(angled, phi - before[:, position, None], 0))
        # Back from the order of the visit to that of the losses: gᵢ′/‖gᵢ‖ = gᵢ/‖gᵢ‖ + Σⱼ cᵢⱼ gⱼ/‖gⱼ‖.
        zeros = torch.zeros_like(cosines)
        c, change = (zeros.scatter(-1, visits, torch.cat(x, -1)) for x in (shares, changes))
        weights = 1 + (lengths[:, None] * c).sum(0) / torch.where(lengths > 0, lengths, 1)
        finite = torch.isfinite(gram).all()
        targets = torch.where(finite, targets + self.beta * change, targets)
        return torch.where(finite, weights, torch.nan), {"targets": targets}
