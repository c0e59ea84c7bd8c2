"""Models, losses and comparisons that several test modules need."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD

OURS = (DOTSGD, DOTAdamW, MoKDSGD, MoKDAdamW)


def student(dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)


def batches(n: int, dtype: torch.dtype = torch.float32, rows: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]


def two_losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Two losses that conflict in part and reach every parameter."""
    out = model(x)
    return [out.square().mean(), (out - 1).abs().mean()]


def k_losses(model: nn.Module, x: Tensor, k: int) -> list[Tensor]:
    out = model(x)
    return [(out - i).abs().pow(1 + i / k).mean() for i in range(k)]


def flat(params: Iterable[Any]) -> Tensor:
    return torch.cat(
        [torch.view_as_real(p.detach()).flatten() if p.is_complex() else p.detach().flatten() for p in params]
    )


def assert_same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"tensor {i} differs by {(x - y).abs().max().item():.3g}"


def summed(model: nn.Module, x: Tensor) -> Tensor:
    task, distill = two_losses(model, x)
    return task + distill


def train(optimizer: Any, model: nn.Module, xs: Sequence[Tensor], losses: Any = None, *, plain: bool = False) -> None:
    """With the losses as a list; or the way an untouched loop does it."""
    for x in xs:
        optimizer.zero_grad()
        if plain:
            summed(model, x).backward()
            optimizer.step()
        else:
            optimizer.step((losses or two_losses)(model, x))


def gradients(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Any]:
    """Per loss the gradient of every parameter, by autograd.grad: a way that the package does not go."""
    return [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a refused call must leave alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    collected = optimizer.__dict__.get("_collected")
    return copy.deepcopy(
        {
            "params": [p.detach() for p in params],
            "grads": [p.grad for p in params],
            "state": [dict(optimizer.state[p]) for p in params if p in optimizer.state],
            "collected": collected.gradients if collected else [],
            "options": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        }
    )


def assert_same_tree(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_tree(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@contextmanager
def refused(optimizer: torch.optim.Optimizer, error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises this error, whose message has these words, and leaves the optimizer as it was."""
    before = snapshot(optimizer)
    with pytest.raises(error) as raised:
        yield
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"
    assert_same_tree(before, snapshot(optimizer))


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU the block raises where the host waits for the device, or reads from it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
