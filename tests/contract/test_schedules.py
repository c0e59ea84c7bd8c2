"""Learning-rate schedulers, weight averages: whatever reads and writes an optimizer's groups, or stands around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from distill_optim import DOTSGD, DOTAdamW
from tests.contract.inputs import INFOS, base_of, is_sgd, problem, run
from tests.helpers import OURS, assert_same_bits, batches, flat, student, summed, train, two_losses

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=2, base_momentum=0.7, max_momentum=0.85, cycle_momentum=True
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, base_momentum=0.7, max_momentum=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_the_list_has_all_of_torchs_schedulers() -> None:
    assert {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"} == SCHEDULES.keys()


def flags(cls: Any) -> dict[str, Any]:
    return {"lr": 0.05, "momentum": 0.9} if is_sgd(cls) else {"lr": 0.05}


def scheduled(optimizer: Any, model: nn.Module, schedule: Any, *, plain: bool, steps: int = 6) -> list[Any]:
    """Trains, and takes down what the schedule wrote."""
    scheduler = schedule(optimizer)
    written = []
    for x in batches(steps):
        train(optimizer, model, [x], plain=plain)
        group = optimizer.param_groups[0]
        written.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return written


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cls", OURS)
def test_the_untouched_loop_under_any_schedule_is_the_base(cls: Any, name: str) -> None:
    ours, theirs = student(), student()
    seen = scheduled(cls(ours.parameters(), **flags(cls)), ours, SCHEDULES[name], plain=True)
    usual = base_of(cls)(theirs.parameters(), **flags(cls))
    assert seen == scheduled(usual, theirs, SCHEDULES[name], plain=True)
    assert len(set(seen)) > 1
    assert_same_bits(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cls", OURS)
def test_a_schedule_reaches_steps_over_several_losses(cls: Any, name: str) -> None:
    """What it writes is what a new optimizer with these numbers, and the buffers so far, would step by."""
    scheduled_model, by_hand = student(), student()
    given = flags(cls) | ({"delta": 0.05} if hasattr(cls, "_memory") else {})
    written = scheduled(cls(scheduled_model.parameters(), **given), scheduled_model, SCHEDULES[name], plain=False)
    optimizer = cls(by_hand.parameters(), **given)
    for x, (lr, momentum, betas) in zip(batches(6), written, strict=True):
        group = optimizer.param_groups[0]
        group["lr"] = lr
        group.update({"momentum": momentum} if betas is None else {"betas": betas})
        train(optimizer, by_hand, [x])
    assert_same_bits(scheduled_model.parameters(), by_hand.parameters())
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({(momentum, betas) for _, momentum, betas in written}) > 1, "these write the momentum too"


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("cls", OURS)
def test_training_goes_the_right_way_under_torchs_own_schedules(cls: Any, plain: bool) -> None:
    """The combinations that torch's OptimizerInfo asks for."""
    for schedules in INFOS[cls.__name__].scheduler_inputs:
        params, losses = problem()
        optimizer = cls(params, lr=0.01)
        schedulers = [make(optimizer) for make in schedules]
        before = sum(loss.item() for loss in losses())
        for _ in range(12):
            run(optimizer, losses, 1, plain=plain)
            for scheduler in schedulers:
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert sum(loss.item() for loss in losses()) < before


@pytest.mark.parametrize("cls", OURS)
def test_a_schedule_goes_on_from_a_checkpoint(cls: Any) -> None:
    model, xs = student(), batches(6)
    optimizer = cls(model.parameters(), **flags(cls))
    scheduler = SCHEDULES["OneCycleLR"](optimizer)
    saved: Any = None
    for i, x in enumerate(xs):
        if i == 3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
        train(optimizer, model, [x])
        scheduler.step()
    other = student(seed=2)
    twin = cls(other.parameters(), **flags(cls))
    again = SCHEDULES["OneCycleLR"](twin)
    for part, state in zip((other, twin, again), saved, strict=True):
        part.load_state_dict(state)
    for x in xs[3:]:
        train(twin, other, [x])
        again.step()
    assert_same_bits(model.parameters(), other.parameters())


@pytest.mark.parametrize("cls", OURS)
def test_a_schedule_that_is_stepped_before_the_optimizer_is_warned_of(cls: Any) -> None:
    """So it counts the steps of ours, over losses too: the warning comes without one, and not with one."""
    model = student()
    optimizer = cls(model.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer = cls(model.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(two_losses(model, batches(1)[0]))
    scheduler.step()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("average", ["SWA", "EMA"])
@pytest.mark.parametrize("cls", OURS)
def test_averages_of_the_weights(cls: Any, average: str, plain: bool) -> None:
    """AveragedModel with SWALR and update_bn, around steps of ours."""
    model = nn.Sequential(student()[0], nn.BatchNorm1d(12), student()[2])
    averaged: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if average == "EMA" else None)
    optimizer = cls(model.parameters(), lr=0.05)
    scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    expected = None
    for n, x in enumerate(batches(4)):
        train(optimizer, model, [x], plain=plain)
        averaged.update_parameters(model)
        scheduler.step()
        now = flat(model.parameters())
        if expected is None:
            expected = now
        elif average == "EMA":
            expected = expected.lerp(now, 0.5)
        else:
            expected = expected + (now - expected) / (n + 1)
    assert expected is not None
    torch.testing.assert_close(flat(averaged.module.parameters()), expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    update_bn(batches(3), averaged)
    assert averaged.module[1].num_batches_tracked == 3
    assert summed(averaged, batches(1)[0]).isfinite()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("cls", OURS)
def test_every_group_steps_by_its_own_options(cls: Any, plain: bool) -> None:
    """As an optimizer for each would. (Of MoKD's weights the groups share one set, so: equal losses.)"""
    options: list[dict[str, Any]] = [{"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.01, "maximize": True}]
    together, apart = ([nn.Parameter(torch.linspace(-1, 1, 5) + i) for i in range(2)] for _ in range(2))

    def losses(params: list[Any]) -> list[torch.Tensor]:
        given = [torch.stack([p.square().sum() for p in params]).sum() for _ in range(2)]
        return [given[0], -3 * given[1]] if cls in (DOTSGD, DOTAdamW) else given

    run(cls([{"params": [p]} | own for p, own in zip(together, options, strict=True)]), lambda: losses(together),
        plain=plain)  # fmt: skip
    for p, own in zip(apart, options, strict=True):
        run(cls([p], **own), partial(losses, [p]), plain=plain)
    torch.testing.assert_close(together, apart)
