"""The scripts of docs/integrations as modules, and what their tests have in common."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD

FOLDER = Path(__file__).parents[2] / "docs" / "integrations"
ADVICE = "pip install -c constraints.txt -e '.[integrations]'"

CLIP = 0.05  # below the norm of every gradient here
Make = Callable[[Any], Any]


def shortest_norm(gram: Tensor, losses: Tensor) -> Tensor:
    """A combination of the user's own, which no checkpoint can hold."""
    return 1 / gram.diagonal().clamp_min(1e-6).sqrt()


OURS: dict[str, Make] = {
    "DOTSGD": lambda params: DOTSGD(params, lr=0.02, momentum=0.9),
    "DOTAdamW": lambda params: DOTAdamW(params, lr=0.005),
    "MoKDSGD": lambda params: MoKDSGD(params, lr=0.02, momentum=0.9),
    "MoKDAdamW": lambda params: MoKDAdamW(params, lr=0.005),
}
# With something more to remember between two steps, or nothing of it in the checkpoint.
REMEMBERING: dict[str, Make] = {
    **OURS,
    "every=3": lambda params: MoKDSGD(params, lr=0.02, momentum=0.9, every=3),
    "gradvac": lambda params: MoKDAdamW(params, lr=0.005, combine="gradvac"),
    "a function": lambda params: MoKDSGD(params, lr=0.02, momentum=0.9, combine=shortest_norm),
}
# Ours, and the torch optimizer whose place it takes.
BASES: dict[str, tuple[Make, Make]] = {
    "DOTSGD": (OURS["DOTSGD"], lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9)),
    "DOTAdamW": (OURS["DOTAdamW"], lambda params: torch.optim.AdamW(params, lr=0.005)),
    "MoKDSGD": (OURS["MoKDSGD"], lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9)),
    "MoKDAdamW": (OURS["MoKDAdamW"], lambda params: torch.optim.AdamW(params, lr=0.005)),
}


def load(name: str) -> Any:
    """The script as a module, without running its main()."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def plain_loop(
    net: nn.Module,
    optimizer: Any,
    batches: Iterable[Any],
    losses_of: Callable[[Any], list[Tensor]],
    *,
    accumulate: int = 1,
    clip: float = math.inf,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor]:
    """The loop that every framework is compared with: written by hand, without joint_loss and without a framework.

    Left-over micro-batches at the end make a step of their own.
    """
    batches = list(batches)
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
            losses = losses_of(batch)
        optimizer.backward([loss / accumulate for loss in losses], scaler=scaler)
        if (i + 1) % accumulate and i + 1 < len(batches):
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip < math.inf:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return weights(net)


def two_sgds(
    net: nn.Module, batches: Iterable[Any], losses_of: Callable[[Any], list[Tensor]], *, left_over: float
) -> list[Tensor]:
    """What OURS["DOTSGD"] has to compute over two micro-batches a step and a clip, by torch alone.

    One SGD per loss over the same parameters: DOT, where every loss reaches every parameter. ``left_over`` is what the
    losses of a single micro-batch at the end are divided by.
    """
    params, batches = list(net.parameters()), list(batches)
    sgds = [torch.optim.SGD(params, lr=0.02, momentum=0.9 + sign * 0.075) for sign in (-1, 1)]
    for i in range(0, len(batches), 2):
        together = batches[i : i + 2]
        divisor = 2 if len(together) == 2 else left_over
        per_loss = [[torch.zeros_like(p) for p in params] for _ in sgds]
        for batch in together:
            for own, loss in zip(per_loss, losses_of(batch), strict=True):
                for total, grad in zip(own, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
                    total += grad / divisor
        norm = torch.cat([(a + b).flatten() for a, b in zip(*per_loss, strict=True)]).norm()
        assert norm > CLIP, "the clip has to do something"
        for sgd, own in zip(sgds, per_loss, strict=True):
            for p, grad in zip(params, own, strict=True):
                p.grad = grad * CLIP / norm
            sgd.step()
    return weights(net)
