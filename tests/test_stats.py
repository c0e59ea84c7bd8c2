"""Statistics of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill_optim import DOTSGD, DOTAdamW, MoKDSGD
from tests.helpers import OURS, batches, flat, gradients, k_losses, student, two_losses


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("cls", OURS)
def test_stats_are_those_of_the_gradients(cls: Any, nesterov: bool) -> None:
    model = student(torch.float64)
    flags = {"nesterov": True, "momentum": 0.9, "foreach": True} if nesterov and "SGD" in cls.__name__ else {}
    optimizer = cls(model.parameters(), losses=3, **flags)
    for x in batches(3, torch.float64):
        losses = k_losses(model, x, 3)
        g = torch.stack([flat(own) for own in gradients(losses, list(model.parameters()))])
        optimizer.zero_grad()
        optimizer.step(losses)
        stats = optimizer.stats
        assert stats.names == ("task", "distill_1", "distill_2")
        torch.testing.assert_close(stats.losses, torch.stack(losses).detach())
        torch.testing.assert_close(stats.gram, g @ g.T, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(stats.norms, g.norm(dim=1), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            stats.cosines, torch.corrcoef(g) * 0 + (g @ g.T) / g.norm(dim=1).outer(g.norm(dim=1))
        )
        named = stats.as_dict()
        assert named["loss/task"] == losses[0].item()
        assert named["cosine/task_distill_2"] == stats.cosines[0, 2].item()
        assert set(named) == {
            *(f"{kind}/{name}" for kind in ("loss", "weight", "norm") for name in stats.names),
            "cosine/task_distill_1", "cosine/task_distill_2", "cosine/distill_1_distill_2",
        }  # fmt: skip
        assert "weight/task=" in repr(stats)


@pytest.mark.parametrize("cls", [DOTSGD, DOTAdamW])
def test_dot_keeps_its_gradients_no_longer_than_grad(cls: Any) -> None:
    """Its Gram matrix is worked out on demand, until zero_grad; what was read stays."""
    model = student()
    optimizer = cls(model.parameters())
    optimizer.step(two_losses(model, batches(1)[0]))
    unread = optimizer.stats
    optimizer.zero_grad()
    assert unread.gram is None
    assert unread.cosines is None
    assert set(unread.as_dict()) == {"loss/task", "loss/distill", "weight/task", "weight/distill"}
    optimizer.step(two_losses(model, batches(1)[0]))
    assert optimizer.stats.gram is not None
    optimizer.zero_grad()
    assert optimizer.stats.gram is not None


def test_a_plain_step_has_none() -> None:
    model = student()
    optimizer = MoKDSGD(model.parameters())
    model(batches(1)[0]).sum().backward()
    optimizer.step()
    assert optimizer.stats is None


def test_losses_of_micro_batches_add_up() -> None:
    model = student(torch.float64)
    optimizer = MoKDSGD(model.parameters())
    x = batches(1, torch.float64)[0]
    for part in x.chunk(4):
        optimizer.backward([loss / 4 for loss in two_losses(model, part)])
    whole = torch.stack(two_losses(model, x)).detach()
    optimizer.step()
    assert optimizer.stats is not None
    torch.testing.assert_close(optimizer.stats.losses, whole)


def test_missing_losses_are_missing() -> None:
    model = student()
    optimizer = MoKDSGD(model.parameters(), losses=("ce", "kd", "hint"))
    ce, hint = two_losses(model, batches(1)[0])
    optimizer.step({"hint": hint, "ce": ce})
    assert optimizer.stats is not None
    assert optimizer.stats.names == ("ce", "hint")
    assert optimizer.stats.weights.shape == (2,)
