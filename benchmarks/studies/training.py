"""Steps of a method that plain options describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.studies.harness import Options
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from distill_optim.multi_loss import MultiLossOptimizer

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    made.__name__: made for made in (SGD, AdamW, DOTSGD, DOTAdamW, MoKDSGD, MoKDAdamW)
}


class Forward(NamedTuple):
    """The losses of a batch, the task first, and a tensor that all of them pass."""

    losses: list[Tensor]
    shared: Tensor


def fit(
    params: Iterable[Parameter],
    batches: Sequence[Tensor],
    forward: Callable[[Tensor], Forward],
    options: Options,
) -> Iterator[Any]:
    """One step per batch, the learning rate on a half cosine down to 0.

    Args:
        params: what is trained.
        batches: indices of the examples of every step.
        forward: from such indices to losses.
        options: ``optimizer``, by its name; ``lr``; ``arguments`` for it; ``weights``, factors of the losses, where 0
            leaves one out; ``through``, whether the tensor that all losses pass is handed over; ``observe``, whether
            the optimizer is shown every batch again after its step.

    Yields:
        The optimizer, after every step.
    """
    optimizer = OPTIMIZERS[options["optimizer"]](params, lr=options["lr"], **options.get("arguments", {}))
    schedule = CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        losses, shared = forward(batch)
        if "weights" in options:
            losses = [w * loss for w, loss in zip(options["weights"], losses, strict=True) if w]
        if isinstance(optimizer, MultiLossOptimizer):
            optimizer.step(losses, through=shared if options.get("through") else None)
        else:
            sum(losses[1:], start=losses[0]).backward()
            optimizer.step()
        if options.get("observe"):
            with torch.no_grad():
                optimizer.observe(forward(batch).losses)
        schedule.step()
        yield optimizer


def shuffled(examples: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Whole batches of shuffled epochs, as many as there are steps."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(examples, generator=generator)
        batches += order[: examples // size * size].split(size)
    return batches[:steps]
