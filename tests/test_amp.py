"""Mixed precision: a GradScaler between the backward passes and the step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_optim import MoKDSGD, joint_loss
from tests.helpers import OURS, assert_same_bits, batches, flat, student, two_losses


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("way", ["backward", "joint"])
@pytest.mark.parametrize("cls", OURS)
def test_a_scaled_run_is_the_unscaled_run(cls: Any, way: str, clip: bool, fused: bool | None) -> None:
    """Bit for bit, because the scale is a power of two; and an overflow in one loss skips that step whole."""
    scaled, plain = student(), student()
    a, b = cls(scaled.parameters(), lr=0.01, fused=fused), cls(plain.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for i, x in enumerate(batches(8)):
        losses = two_losses(scaled, x)
        if i in (0, 4):
            losses[1] = losses[1] * torch.inf
        before = copy.deepcopy((list(scaled.parameters()), a.state_dict()["state"]))
        a.zero_grad()
        if way == "joint":
            scaler.scale(joint_loss(losses, a)).backward()
        else:
            a.backward(losses, scaler=scaler)
        if clip:
            scaler.unscale_(a)
            nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(a)
        scaler.update()
        if i in (0, 4):
            assert_same_bits(before[0], scaled.parameters())
            assert str(before[1]) == str(a.state_dict()["state"])
            continue
        b.zero_grad()
        b.backward(two_losses(plain, x))
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        b.step()
    assert scaler.get_scale() == 2.0**10
    if clip:
        # The factor is read off two norms, which are rounded differently at another scale.
        torch.testing.assert_close(flat(scaled.parameters()), flat(plain.parameters()), rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(scaled.parameters(), plain.parameters())


@pytest.mark.parametrize("cls", OURS)
def test_a_disabled_scaler_changes_nothing(cls: Any) -> None:
    models = student(), student()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for model, used in zip(models, (True, False), strict=True):
        optimizer = cls(model.parameters())
        for x in batches(3):
            optimizer.zero_grad()
            if used:
                optimizer.backward(two_losses(model, x), scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step(two_losses(model, x))
    assert_same_bits(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize("dominance", ["log", "norm", "none"])
@pytest.mark.parametrize("rescale", [True, False])
def test_weights_at_a_tensor_do_not_depend_on_the_scale(dominance: str, rescale: bool) -> None:
    results = []
    for scaler in None, torch.amp.GradScaler("cpu", init_scale=2.0**10):
        model = student(torch.float64)
        optimizer = MoKDSGD(model.parameters(), lr=0.1, dominance=dominance, rescale=rescale)
        out = model(batches(1, torch.float64)[0])
        optimizer.backward([out.square().mean(), (out - 1).abs().mean()], scaler=scaler, through=out)
        scaler.step(optimizer) if scaler else optimizer.step()
        results.append(flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", OURS)
def test_autocast_follows_float32(cls: Any, dtype: torch.dtype) -> None:
    def run(autocast: bool) -> Tensor:
        model = student()
        optimizer = cls(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=autocast and dtype is torch.float16)
        for x in batches(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=autocast):
                out = model(x).float()
            optimizer.backward([out.square().mean(), (out - 1).abs().mean()], scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        return flat(model.parameters())

    start = flat(student().parameters())
    moved = (run(False) - start).norm()
    # Half precision keeps 8 (bfloat16) or 11 bits: per cents of the way travelled.
    assert (run(True) - run(False)).norm() < 0.15 * moved
