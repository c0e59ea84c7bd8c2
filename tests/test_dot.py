"""DOTSGD and DOTAdamW against torch's own optimizers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler

from distill_optim import DOTSGD, DOTAdamW
from tests.helpers import assert_same_bits, batches, flat, gradients, k_losses, student, summed, train, two_losses

STEPS = 50


def apply(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0, 0.03])
@pytest.mark.parametrize(("dampening", "nesterov"), [(0, False), (0.2, False), (0, True)])
@pytest.mark.parametrize("scheduled", [False, True])
def test_is_two_sgds_stepped_one_after_the_other(
    dtype: torch.dtype,
    foreach: bool | None,
    maximize: bool,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    scheduled: bool,
) -> None:
    """Bit for bit over 50 steps: SGD(μ−Δ, weight decay) on the task, then SGD(μ+Δ) on the distillation loss."""
    ours, theirs = student(dtype), student(dtype)

    def groups(model: nn.Sequential, wd: float) -> list[dict[str, Any]]:
        return [
            {"params": list(model[0].parameters()), "weight_decay": wd},
            {"params": list(model[2].parameters()), "lr": 0.02, "weight_decay": 2 * wd},
        ]

    flags: dict[str, Any] = {
        "lr": 0.05, "dampening": dampening, "nesterov": nesterov, "maximize": maximize, "foreach": foreach,
    }  # fmt: skip
    dot = DOTSGD(groups(ours, weight_decay), momentum=0.9, delta=0.075, **flags)
    task = SGD(groups(theirs, weight_decay), momentum=0.9 - 0.075, **flags)
    distill = SGD(groups(theirs, 0), momentum=0.9 + 0.075, **flags)
    schedulers = [lr_scheduler.StepLR(o, 7, 0.7) for o in (dot, task, distill)] if scheduled else []
    params = list(theirs.parameters())
    for x in batches(STEPS, dtype):
        dot.zero_grad()
        dot.step(two_losses(ours, x))
        g_task, g_distill = gradients(two_losses(theirs, x), params)
        apply(task, params, g_task)
        apply(distill, params, g_distill)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_bits(ours.parameters(), params)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_is_k_sgds(k: int, foreach: bool) -> None:
    ours, theirs = student(), student()
    momenta = {name: 0.5 + 0.1 * i for i, name in enumerate("abcde"[:k])}
    dot = DOTSGD(ours.parameters(), lr=0.03, losses=tuple(momenta), momentums=momenta, foreach=foreach)
    singles = [SGD(theirs.parameters(), lr=0.03, momentum=m, foreach=foreach) for m in momenta.values()]
    params = list(theirs.parameters())
    for x in batches(20):
        dot.zero_grad()
        dot.step(k_losses(ours, x, k))
        for single, grads in zip(singles, gradients(k_losses(theirs, x, k), params), strict=True):
            apply(single, params, grads)
    assert_same_bits(ours.parameters(), params)


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
def test_fused_is_two_fused_sgds(lr: float | Tensor) -> None:
    ours, theirs = student(), student()
    dot = DOTSGD(ours.parameters(), lr=lr, weight_decay=0.01, fused=True)
    task = SGD(theirs.parameters(), lr=lr, momentum=0.9 - 0.075, weight_decay=0.01, fused=True)
    distill = SGD(theirs.parameters(), lr=lr, momentum=0.9 + 0.075, fused=True)
    params = list(theirs.parameters())
    for x in batches(20):
        dot.zero_grad()
        dot.step(two_losses(ours, x))
        g_task, g_distill = gradients(two_losses(theirs, x), params)
        apply(task, params, g_task)
        apply(distill, params, g_distill)
    assert_same_bits(ours.parameters(), params)


PLAIN_SGD: list[dict[str, Any]] = [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}, {"momentum": 0.9, "maximize": True},
    {"momentum": 0.9, "foreach": False}, {"momentum": 0.9, "foreach": True}, {"momentum": 0.9, "fused": True},
    {"momentum": 0.9, "lr": torch.tensor(0.02)},
]  # fmt: skip
PLAIN_ADAMW: list[dict[str, Any]] = [
    {}, {"amsgrad": True}, {"maximize": True}, {"foreach": False}, {"foreach": True}, {"fused": True},
    {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": torch.tensor(0.02)},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", PLAIN_SGD)
def test_untouched_loop_is_sgd(flags: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = student(dtype), student(dtype)
    ours_, theirs_ = (
        DOTSGD(ours.parameters(), **{"momentum": 0, "delta": 0, "lr": 0.03} | flags),
        SGD(theirs.parameters(), **{"lr": 0.03} | flags),
    )
    train(ours_, ours, batches(STEPS, dtype), plain=True)
    train(theirs_, theirs, batches(STEPS, dtype), plain=True)
    assert_same_bits(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", PLAIN_ADAMW)
def test_untouched_loop_is_adamw(flags: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = student(dtype), student(dtype)
    ours_, theirs_ = DOTAdamW(ours.parameters(), **flags), AdamW(theirs.parameters(), **flags)
    train(ours_, ours, batches(STEPS, dtype), plain=True)
    train(theirs_, theirs, batches(STEPS, dtype), plain=True)
    assert_same_bits(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "flags",
    [{}, {"foreach": False}, {"foreach": True}, {"amsgrad": True}, {"maximize": True}, {"fused": True},
     {"weight_decay": 0.2, "betas": (0.7, 0.9), "eps": 1e-5}, {"lr": torch.tensor(0.01)},
     {"amsgrad": True, "foreach": False, "maximize": True}],
)  # fmt: skip
def test_dot_adamw_without_delta_is_adamw_on_the_sum(flags: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = student(dtype), student(dtype)
    dot = DOTAdamW(ours.parameters(), **{"lr": 0.01, "delta": 0.0} | flags)
    adamw = AdamW(theirs.parameters(), **{"lr": 0.01} | flags)
    train(dot, ours, batches(STEPS, dtype))
    train(adamw, theirs, batches(STEPS, dtype), plain=True)
    # Two moments rounded apart instead of one; Adam's quotient carries a relative error of the gradient (some eps) over
    # to the step unamplified, lr times 50 steps of it.
    rounding = 50 * 0.01 * 1000 * torch.finfo(dtype).eps
    assert (flat(ours.parameters()) - flat(theirs.parameters())).abs().max() < rounding


def test_dot_adamw_without_delta_is_adamw_also_where_losses_come_and_go() -> None:
    """A name that is missing in a step counts as a zero gradient, as in the sum."""
    ours, theirs = student(torch.float64), student(torch.float64)
    dot, adamw = DOTAdamW(ours.parameters(), delta=0.0), AdamW(theirs.parameters())
    for step, x in enumerate(batches(30, torch.float64)):
        names = [("task", "distill"), ("task",), ("distill",)][step % 3]
        for model, optimizer in (ours, dot), (theirs, adamw):
            losses = dict(zip(("task", "distill"), two_losses(model, x), strict=True))
            losses = {name: losses[name] for name in names}
            optimizer.zero_grad()
            if optimizer is dot:
                optimizer.step(losses)
            else:
                torch.stack(list(losses.values())).sum().backward()
                optimizer.step()
    torch.testing.assert_close(flat(ours.parameters()), flat(theirs.parameters()), rtol=1e-12, atol=1e-13)


def reference_dot_adamw(
    p: Tensor, grads: list[Tensor], m: list[Tensor], v: Tensor, t: int, betas: list[float], beta2: float = 0.999
) -> None:
    """The equations of the docstring, one line each."""
    lr, eps, decay = 0.01, 1e-8, 0.01
    p *= 1 - lr * decay
    v.copy_(beta2 * v + (1 - beta2) * sum(grads) ** 2)
    denominator = (v / (1 - beta2**t)).sqrt() + eps
    for m_i, g, beta in zip(m, grads, betas, strict=True):
        m_i.copy_(beta * m_i + (1 - beta) * g)
        p -= lr * m_i / (1 - beta**t) / denominator


@pytest.mark.parametrize("foreach", [False, True])
def test_dot_adamw_is_its_equations(foreach: bool) -> None:
    model, plain = student(torch.float64), student(torch.float64)
    dot = DOTAdamW(model.parameters(), lr=0.01, delta=0.05, losses=3, foreach=foreach)
    params = list(plain.parameters())
    m = [[torch.zeros_like(p) for _ in range(3)] for p in params]
    v = [torch.zeros_like(p) for p in params]
    for t, x in enumerate(batches(20, torch.float64), 1):
        dot.zero_grad()
        dot.step(k_losses(model, x, 3))
        grads = gradients(k_losses(plain, x, 3), params)
        with torch.no_grad():
            for i, p in enumerate(params):
                own = [g[i] for g in grads]
                reference_dot_adamw(p, own, m[i], v[i], t, [0.85, 0.95, 0.95])
    torch.testing.assert_close(flat(model.parameters()), flat(params), rtol=1e-12, atol=1e-13)


class TwoHeads(nn.Module):
    """A trunk that both losses reach, a head for each, and a layer that none reaches."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.a, self.b, self.idle = (nn.Linear(6, 6, dtype=dtype) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x).tanh()
        return [self.a(h).square().mean(), (self.b(h) - 1).square().mean()]


@pytest.mark.parametrize("fused", [False, True])
def test_a_parameter_that_one_loss_reaches_uses_the_base_momentum(fused: bool) -> None:
    """The heads train as under SGD(μ) with weight decay, each by its own loss; the idle layer stays."""
    ours, theirs = TwoHeads(), TwoHeads()
    idle = copy.deepcopy(ours.idle.state_dict())
    flags: dict[str, Any] = {"lr": 0.05, "fused": fused or None}
    dot = DOTSGD(ours.parameters(), momentum=0.9, weight_decay=0.02, **flags)
    trunk = list(theirs.trunk.parameters())
    heads = SGD([*theirs.a.parameters(), *theirs.b.parameters()], momentum=0.9, weight_decay=0.02, **flags)
    task = SGD(trunk, momentum=0.9 - 0.075, weight_decay=0.02, **flags)
    distill = SGD(trunk, momentum=0.9 + 0.075, **flags)
    for x in batches(20):
        dot.zero_grad()
        dot.step(ours(x))
        a, b = gradients(theirs(x), list(theirs.parameters()))
        for p, g, h in zip(theirs.parameters(), a, b, strict=True):
            p.grad = g if g is not None else h
        heads.step()
        apply(task, trunk, a[:2])
        apply(distill, trunk, b[:2])
    assert_same_bits(ours.parameters(), theirs.parameters())
    assert_same_bits(ours.idle.state_dict().values(), idle.values())


@pytest.mark.parametrize("cls", [DOTSGD, DOTAdamW])
def test_any_first_step_makes_every_buffer(cls: type[DOTSGD] | type[DOTAdamW]) -> None:
    """A distributed checkpoint is loaded into what a step from zero gradients made."""
    model = student()
    optimizer = cls(model.parameters(), losses=("ce", "kd", "hint"))
    summed(model, batches(1)[0]).backward()
    optimizer.step()
    for p in model.parameters():
        for name in ("kd", "hint"):
            assert torch.count_nonzero(optimizer.state[p][f"{optimizer._buffer}/{name}"]) == 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_matched_gain_keeps_the_long_run_weight(nesterov: bool) -> None:
    """Under constant gradients the speed of the parameters tends to that of SGD(μ) on the sum, whatever Δ."""
    g = [torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)]
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DOTSGD([p], lr=1.0, momentum=0.9, delta=0.075, gain="matched", nesterov=nesterov)
    for _ in range(1000):
        before = p.detach().clone()
        optimizer.zero_grad()
        optimizer.step([(p * g_i).sum() for g_i in g])
    # 0.975^1000 = 1e-11 of the transient is left.
    torch.testing.assert_close(p.detach() - before, -sum(g) / (1 - 0.9), rtol=1e-9, atol=0)


def test_matched_gain_without_delta_changes_nothing() -> None:
    a, b = student(), student()
    for model, gain in (a, "paper"), (b, "matched"):
        optimizer = DOTSGD(model.parameters(), lr=0.05, delta=0, gain=gain)
        train(optimizer, model, batches(10))
    assert_same_bits(a.parameters(), b.parameters())


def test_momenta_follow_a_scheduler_that_writes_them() -> None:
    """OneCycleLR writes momentum in every step; μ ∓ Δ follow it."""
    ours, theirs = student(), student()
    dot = DOTSGD(ours.parameters(), lr=0.05, momentum=0.9, delta=0.05)
    singles = [SGD(theirs.parameters(), lr=0.05, momentum=0.9) for _ in range(2)]

    def cycle(o: torch.optim.Optimizer) -> lr_scheduler.OneCycleLR:
        return lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=31, base_momentum=0.7, max_momentum=0.9)

    clock, shadow = cycle(dot), cycle(singles[0])
    params = list(theirs.parameters())
    for x in batches(30):
        dot.zero_grad()
        dot.step(two_losses(ours, x))
        now = dict(singles[0].param_groups[0])
        for single, grads, sign in zip(singles, gradients(two_losses(theirs, x), params), (-1, 1), strict=True):
            single.param_groups[0].update(lr=now["lr"], momentum=now["momentum"] + sign * 0.05)
            apply(single, params, grads)
        singles[0].param_groups[0]["momentum"] = now["momentum"]
        clock.step()
        shadow.step()
    assert_same_bits(ours.parameters(), params)


def test_untouched_loop_takes_any_schedule() -> None:
    """OneCycleLR starts at a momentum of 0.95, where μ + Δ would be refused: no concern of a loop without losses."""
    models = student(), student()
    for model, cls in zip(models, (DOTSGD, SGD), strict=True):
        optimizer = cls(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=11)
        for x in batches(10):
            train(optimizer, model, [x], plain=True)
            scheduler.step()
    assert_same_bits(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize("cls", [DOTSGD, DOTAdamW])
def test_complex_parameters(cls: type[DOTSGD] | type[DOTAdamW]) -> None:
    """A complex parameter takes the same path as its real view."""
    value = torch.randn(5, dtype=torch.complex128)
    z, w = nn.Parameter(value.clone()), nn.Parameter(torch.view_as_real(value).clone())
    a, b = cls([z], lr=0.05), cls([w], lr=0.05)
    target = torch.randn(5, dtype=torch.complex128)
    for _ in range(10):
        for p, optimizer in (z, a), (w, b):
            as_complex = p if p.is_complex() else torch.view_as_complex(p)
            optimizer.zero_grad()
            optimizer.step([(as_complex - target).abs().square().sum(), as_complex.abs().sum()])
    # Products of complex numbers with a real factor are rounded differently.
    torch.testing.assert_close(torch.view_as_real(z.detach()), w.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", [(DOTSGD, partial(SGD, momentum=0.9)), (DOTAdamW, AdamW)], ids=["DOTSGD", "DOTAdamW"])
def test_a_plain_differentiable_step_records_itself(make: tuple[Any, Any]) -> None:
    """As under torch, a gradient with respect to the start flows through two updates."""

    def sensitivity(construct: Any) -> Tensor:
        start = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = construct([p], lr=0.1, differentiable=True)
        for factor in (1.0, 2.0):
            p.grad = factor * start.square()
            optimizer.step()
        return torch.autograd.grad(p.sum(), start)[0]

    ours, theirs = (sensitivity(construct) for construct in make)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_parameter_that_joins_later_has_a_first_step_of_its_own(foreach: bool) -> None:
    """A fused call takes buffers all new or all old; in float64, in which fused multiply-adds are next to nothing."""
    models = [student(torch.float64) for _ in range(2)]
    paths: list[dict[str, Any]] = [{"fused": True}, {"foreach": foreach}]
    optimizers = [DOTSGD(m.parameters(), lr=0.1, dampening=0.5, **path) for m, path in zip(models, paths, strict=True)]
    for n, x in enumerate(batches(6, torch.float64)):
        for model, optimizer in zip(models, optimizers, strict=True):
            model[0].requires_grad_(n >= 2)
            optimizer.zero_grad()
            optimizer.step(two_losses(model, x))
    torch.testing.assert_close(*(flat(m.parameters()) for m in models), rtol=1e-12, atol=1e-14)
