"""Mixed precision: a GradScaler between the backward passes and the step."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, joint_loss
from tests.helpers import (
    OURS,
    assert_same_bits,
    assert_same_tree,
    batches,
    flat,
    gradients,
    k_losses,
    student,
    train,
    two_losses,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# All that keeps something between steps, in buffers or in a parameter group.
KEEPING: list[Any] = [
    DOTSGD,
    partial(DOTAdamW, amsgrad=True),
    partial(MoKDSGD, momentum=0.9),
    partial(MoKDSGD, momentum=0.9, every=3),
    partial(MoKDSGD, combine="famo"),
    partial(MoKDAdamW, combine="gradvac", dominance="ema"),
]


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


def normalised() -> Any:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["backward", "joint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", OURS)
def test_the_standard_recipe_follows_float32(cls: Any, dtype: torch.dtype, way: str, device: str) -> None:
    """autocast, scale, two micro-batches, unscale_, clip, step, update; norm layers in the model."""

    def run(autocast: bool) -> Tensor:
        model = normalised().to(device)
        optimizer = cls(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(device, enabled=autocast and dtype is torch.float16)
        for x in batches(20, rows=32):
            optimizer.zero_grad()
            for part in x.to(device).chunk(2):
                with torch.autocast(device, dtype, enabled=autocast):
                    out = model(part).float()
                    losses = [out.square().mean() / 2, (out - 1).abs().mean() / 2]
                if way == "joint":
                    scaler.scale(joint_loss(losses, optimizer)).backward()
                else:
                    optimizer.backward(losses, scaler=scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            scaler.step(optimizer)
            scaler.update()
        return flat(model.parameters())

    start = flat(normalised().to(device).parameters())
    moved = (run(False) - start).norm()
    assert moved > 0
    # Half precision keeps 8 (bfloat16) or 11 bits: per cents of the way travelled.
    assert (run(True) - run(False)).norm() < 0.15 * moved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", OURS)
def test_the_scale_is_found_as_under_torch(cls: Any, device: str) -> None:
    """From one that overflows float16 in truth; at most one halving lower, as the losses' gradients may cancel."""
    scales: list[float] = []
    for plain in True, False:
        model = student().to(device)
        start = flat(model.parameters())
        optimizer = SGD(model.parameters(), lr=1e-3) if plain else cls(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**22, growth_interval=100)
        for x in batches(16):
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                out = model(x.to(device))
            losses = [out.float().square().mean(), (out.float() - 1).abs().mean()]
            scaler.scale(sum(losses) if plain else joint_loss(losses, optimizer)).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
        assert torch.isfinite(flat(model.parameters())).all()
        assert not torch.equal(flat(model.parameters()), start)
    assert scales[1] <= scales[0] < 2.0**22
    assert scales[1] >= scales[0] / 2


@pytest.mark.parametrize("clear", ["optimizer.zero_grad", "model.zero_grad", "zeros"])
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("kind", KEEPING)
def test_an_overflow_in_any_one_loss_leaves_no_trace(kind: Any, bad: int, clear: str) -> None:
    """In the second of two micro-batches, now of the first, now of the last loss: as if that batch had not been."""
    skipping, without = student(torch.float64), student(torch.float64)
    a, b = kind(skipping.parameters(), lr=0.01, losses=3), kind(without.parameters(), lr=0.01, losses=3)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]

    def step(model: Any, optimizer: Any, scaler: Any, x: Tensor, factor: float) -> None:
        {"optimizer.zero_grad": optimizer.zero_grad, "model.zero_grad": model.zero_grad}.get(
            clear, lambda: model.zero_grad(set_to_none=False)
        )()
        # GradVac draws the order in which it looks at the losses.
        torch.manual_seed(0)
        for i, part in enumerate(x.chunk(2)):
            losses = [loss / 2 for loss in k_losses(model, part, 3)]
            if i == 1:
                losses[bad] = losses[bad] * factor
            optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update(2.0**10)

    for i, x in enumerate(batches(9, torch.float64)):
        if i in (0, 4, 5):
            before = copy.deepcopy((list(skipping.parameters()), a.state_dict()))
            step(skipping, a, scalers[0], x, torch.inf if i == 4 else torch.nan)
            assert_same_bits(before[0], skipping.parameters())
            assert_same_tree(before[1], a.state_dict())
        else:
            step(skipping, a, scalers[0], x, 1.0)
            step(without, b, scalers[1], x, 1.0)
            assert_same_tree(a.stats.losses, b.stats.losses)
    if clear == "zeros":
        # What was collected for a skipped step is made zero, and added to.
        torch.testing.assert_close(flat(skipping.parameters()), flat(without.parameters()), rtol=1e-12, atol=1e-14)
    else:
        assert_same_bits(skipping.parameters(), without.parameters())
        assert_same_tree(a.state_dict(), b.state_dict())


def test_a_skipped_step_between_new_weights_is_no_micro_batch_of_the_next() -> None:
    """``every=3`` knew its weights in the skipped step; the next lacks a loss, and so is walked back loss by loss."""
    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.01, losses=3, every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, x in enumerate(batches(3)):
        model.zero_grad()
        losses = dict(zip(optimizer.defaults["losses"], k_losses(model, x, 3), strict=True))
        if i == 1:
            losses["task"] = losses["task"] * torch.inf
        elif i == 2:
            del losses["distill_2"]
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.stats is not None
    assert tuple(optimizer.stats.names) == ("task", "distill_1")
    assert torch.isfinite(flat(model.parameters())).all()


def test_an_overflow_in_one_optimizer_skips_that_one() -> None:
    """One scaler for two: the student's, given several losses, and a projector's, given one."""
    model, projector = student(), nn.Linear(4, 3)
    ours, other = MoKDSGD(model.parameters(), lr=0.1), SGD(projector.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, x in enumerate(batches(3)):
        before = flat(model.parameters()), flat(projector.parameters())
        ours.zero_grad()
        other.zero_grad()
        scaler.scale(projector(model(x).detach()).square().mean() * (torch.inf if i == 1 else 1.0)).backward()
        losses = two_losses(model, x)
        ours.backward([losses[0], losses[1] * (torch.inf if i == 2 else 1.0)], scaler=scaler)
        scaler.step(ours)
        scaler.step(other)
        scaler.update(2.0**10)
        assert torch.equal(before[0], flat(model.parameters())) == (i == 2)
        assert torch.equal(before[1], flat(projector.parameters())) == (i == 1)


# ------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("cls", OURS)
def test_bfloat16_parameters_follow_float32(cls: Any, flags: dict[str, Any], device: str) -> None:
    """Buffers are of the parameters' dtype, as torch's are."""
    if flags.get("fused") and issubclass(cls, SGD) and device == "cpu":
        pytest.skip("torch's fused SGD on a CPU hardly moves bfloat16 parameters, plain steps neither")
    results = []
    for dtype in torch.float32, torch.bfloat16:
        model = student().to(device, dtype)
        start = flat(model.parameters()).float()
        optimizer = cls(model.parameters(), lr=0.02, **flags)
        train(optimizer, model, [x.to(device, dtype) for x in batches(20)])
        results.append(flat(model.parameters()).float() - start)
        for p in model.parameters():
            tensors = {k: v for k, v in optimizer.state[p].items() if v is not None and k != "step"}
            assert {v.dtype for v in tensors.values()} <= {dtype}
    # Eight bits per parameter: what is shorter than that is lost in every step.
    assert (results[1] - results[0]).norm() < 0.2 * results[0].norm()


def test_dot_in_bfloat16_is_two_sgds_in_bfloat16() -> None:
    ours, theirs = student(torch.bfloat16), student(torch.bfloat16)
    optimizer = DOTSGD(ours.parameters(), lr=0.05)
    params = list(theirs.parameters())
    pair = SGD(params, lr=0.05, momentum=0.9 - 0.075), SGD(params, lr=0.05, momentum=0.9 + 0.075)
    for x in batches(10, torch.bfloat16):
        optimizer.zero_grad()
        optimizer.step(two_losses(ours, x))
        for single, grads in zip(pair, gradients(two_losses(theirs, x), params), strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            single.step()
    assert_same_bits(ours.parameters(), params)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("reload", [False, True])
def test_bfloat16_gradients_of_float32_parameters(foreach: bool, reload: bool) -> None:
    """Where torch's SGD takes them: bit for bit two SGDs, with float32 buffers once a checkpoint made them so."""

    def half(model: Any) -> list[Any]:
        params = list(model.parameters())
        for p in params:
            p.grad_dtype = torch.bfloat16
        return params

    ours, theirs = student(), student()
    optimizer: Any = DOTSGD(half(ours), lr=0.05, foreach=foreach)
    params = half(theirs)
    pair = [SGD(params, lr=0.05, momentum=0.9 + sign * 0.075, foreach=foreach) for sign in (-1, 1)]
    for i, x in enumerate(batches(8)):
        optimizer.zero_grad()
        optimizer.backward(two_losses(ours, x))
        nn.utils.clip_grad_norm_(ours.parameters(), 1e6)
        assert all(p.grad is not None and p.grad.dtype is torch.bfloat16 for p in ours.parameters())
        optimizer.step()
        own: list[list[Any]] = []
        for loss in two_losses(theirs, x):
            theirs.zero_grad()
            loss.backward(retain_graph=True)
            own.append([p.grad for p in params])
        for single, grads in zip(pair, own, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            single.step()
        if i == 3 and reload:
            for one in optimizer, *pair:
                one.load_state_dict(copy.deepcopy(one.state_dict()))
    dtypes = {buffer.dtype for p in ours.parameters() for buffer in optimizer.state[p].values()}
    assert dtypes == {torch.float32 if reload else torch.bfloat16}
    assert_same_bits(ours.parameters(), params)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
def test_mokd_combines_bfloat16_gradients_of_float32_parameters() -> None:
    models = student(), student()
    for model, half in zip(models, (True, False), strict=True):
        for p in model.parameters():
            p.grad_dtype = torch.bfloat16 if half else torch.float32
        train(MoKDSGD(model.parameters(), lr=0.05, momentum=0.9), model, batches(10))
    start = flat(student().parameters())
    moved = flat(models[1].parameters()) - start
    assert (flat(models[0].parameters()) - start - moved).norm() < 0.02 * moved.norm()
