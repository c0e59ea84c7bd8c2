"""Peak memory, counted allocation by allocation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from benchmarks.memory import PeakMemory
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD


def wide(k: int) -> tuple[nn.Module, Callable[[], list[Tensor]], int]:
    """A model whose parameters outweigh everything else, so that peaks are counted in sets of gradients."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512))
    x = torch.randn(1, 512)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def losses() -> list[Tensor]:
        out = model(x)
        return [(out - i).square().mean() for i in range(k)]

    return model, losses, size


def peak_of_a_step(optimizer: Any, losses: Callable[[], list[Tensor]], how: str) -> int:
    """The peak of the third step: buffers are there by then."""

    def step() -> None:
        optimizer.zero_grad()
        if how == "plain":
            torch.stack(losses()).sum().backward()
            optimizer.step()
        elif how == "list":
            optimizer.step(losses())
        else:
            for _ in range(3 if how == "micro-batches" else 1):
                optimizer.backward(losses())
            optimizer.step()

    step()
    step()
    with PeakMemory() as memory:
        step()
    peak: int = memory.peak
    return peak


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("how", ["list", "two phases"])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(("cls", "base"), [(DOTSGD, SGD), (MoKDSGD, SGD), (DOTAdamW, AdamW), (MoKDAdamW, AdamW)])
def test_a_step_takes_at_most_k_more_gradient_sets(
    cls: Any, base: Any, k: int, how: str, foreach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set per loss beside the sum in .grad; the combination and the update need none of their own.

    Besides, the Gram matrix is taken, and .grad compared, in buckets of a fixed size, here made as small beside the
    model as they are beside a real one. In one call the Gram matrix comes before the sum, in whose memory a quarter of
    a set for its bucket is found.
    """
    bucket = 1 << 17 if how == "list" else 4096
    monkeypatch.setitem(sys.modules["distill_optim.combine.gram"].__dict__, "_BUCKET", {"cpu": bucket})
    monkeypatch.setattr("distill_optim.gradients.collected._BUCKET", 4096)
    flags: dict[str, Any] = {"foreach": foreach} | ({"momentum": 0.5} if base is SGD else {})
    model, losses, size = wide(k)
    plain = peak_of_a_step(base(model.parameters(), **flags), losses, "plain")
    ours = peak_of_a_step(cls(model.parameters(), losses=k, **flags), losses, how)
    # Activations, vectors of one width: some thousandths of a set.
    assert ours <= plain + (k + 0.02) * size, f"{(ours - plain) / size:.3f} more sets than a plain step"


@pytest.mark.parametrize("how", ["list", "two phases"])
def test_what_is_combined_is_let_go_before_the_update(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's foreach path makes sets of its own, which then take the place of the K."""
    monkeypatch.setitem(sys.modules["distill_optim.combine.gram"].__dict__, "_BUCKET", {"cpu": 4096})
    monkeypatch.setattr("distill_optim.gradients.collected._BUCKET", 4096)
    k = 4
    model, losses, size = wide(k)
    plain = peak_of_a_step(AdamW(model.parameters(), foreach=True), losses, "plain")
    assert plain > 1.5 * size, "torch's update should need memory of its own"
    ours = peak_of_a_step(MoKDAdamW(model.parameters(), losses=k, foreach=True), losses, how)
    assert ours <= max((k + 1) * size, plain + size) + 0.02 * size, f"{ours / size:.3f} sets"


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("cls", [DOTSGD, MoKDSGD, DOTAdamW, MoKDAdamW])
def test_micro_batches_take_at_most_two_rounds_of_gradients(cls: Any, k: int) -> None:
    """What was collected and its sum, and as much again of the micro-batch that is walked back."""
    model, losses, size = wide(k)
    ours = peak_of_a_step(cls(model.parameters(), losses=k), losses, "micro-batches")
    assert ours <= (2 * (k + 1) + 0.02) * size, f"{ours / size:.3f} sets"


def test_folded_gradients_take_no_memory() -> None:
    """Less than a plain step, which stores one set."""
    model, losses, size = wide(2)
    plain = peak_of_a_step(SGD(model.parameters(), momentum=0.5), losses, "plain")
    ours = peak_of_a_step(DOTSGD(model.parameters(), fold=True), losses, "list")
    # One layer's gradient exists between its making and its adding, a quarter of a set.
    assert ours <= plain - 0.7 * size, f"{(plain - ours) / size:.3f} sets less than a plain step"
