"""Every input of torch's generators, and ours beside them: plain steps against the base, steps over losses against
torch's optimizers put together by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from tests.contract.inputs import (
    DIFFERENTIABLE,
    FOR_LOOP,
    FOREACH,
    FUSED,
    assert_close_steps,
    base_of,
    base_options,
    every_input,
    make,
    problem,
    run,
)
from tests.helpers import assert_same_tree


def state_of(optimizer: Any, params: list[Any]) -> list[dict[str, Any]]:
    """Without the buffers of ours that a plain step leaves empty."""
    return [{k: v for k, v in optimizer.state.get(p, {}).items() if "/" not in k} for p in params]


@every_input(FOR_LOOP, FOREACH, FUSED, DIFFERENTIABLE, dtypes=(torch.float32, torch.complex64))
def test_the_untouched_loop_is_the_base_bit_for_bit(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    """Also in what it leaves in the state; with gradients that are None, zero, strided, and that have a graph."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 2), (), (2, 5), (4,), (3,)]
    leaves = [torch.randn(s, generator=generator, dtype=dtype).to(device).requires_grad_() for s in shapes]
    grads = [[torch.randn(s, generator=generator, dtype=dtype).to(device) for s in shapes[:-1]] for _ in range(4)]
    differentiable = kwargs.get("differentiable", False)
    if differentiable and kwargs.get("amsgrad"):
        grads = grads[:1]  # torch's AdamW writes into what the second step's graph needs
    seen = []
    for which in cls, base_of(cls):
        # Torch takes a differentiable step from parameters that have a graph behind them.
        params = [x.clone() if differentiable else x.detach().clone().requires_grad_() for x in leaves]
        for p in params:
            p.retain_grad()
        optimizer = make(which, params, kwargs if which is cls else base_options(cls, kwargs))
        first = [g.clone().requires_grad_(differentiable) for g in grads[0]]
        for own in first, *grads[1:]:
            for p, g in zip(params, own, strict=False):
                p.grad = g.mul(1).t().contiguous().t() if g.dim() == 2 else g.mul(1)
            params[1].grad = torch.zeros_like(params[1])
            optimizer.step()
        found: list[Any] = [p.detach() for p in params]
        if differentiable:
            out = torch.stack([p.abs().square().sum() for p in params]).sum()
            found += torch.autograd.grad(out, [*leaves, *first], allow_unused=True)
        seen.append((found, state_of(optimizer, params)))
    assert_same_tree(seen[0][0], seen[1][0])
    assert_same_tree(seen[0][1], seen[1][1])


def steps_of(cls: Any, device: str, kwargs: Any, dtype: torch.dtype, impl: dict[str, Any]) -> list[Any]:
    params, losses = problem(kwargs, dtype, device)
    before = copy.deepcopy(params)
    run(make(cls, params, kwargs | impl), losses)
    assert torch.equal(params[-1], before[-1]), "no loss reaches this one"
    assert not any(torch.equal(p, q) for p, q in zip(params[:-1], before[:-1], strict=True))
    return params


@every_input(FOREACH, dtypes=(torch.float64, torch.complex128))
def test_foreach_takes_the_steps_of_the_for_loop_over_several_losses(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype
) -> None:
    """Bit for bit on the CPU: the same operations, parameter by parameter. A GPU's foreach kernels round otherwise."""
    ours, loop = (steps_of(cls, device, kwargs, dtype, impl) for impl in (FOREACH, FOR_LOOP))
    assert_close_steps(ours, loop, kwargs, exact=device == "cpu")


@every_input(FUSED)
def test_fused_takes_the_steps_of_the_for_loop_over_several_losses(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype
) -> None:
    """Up to rounding: torch's fused kernels order the operations otherwise."""
    ours, loop = (steps_of(cls, device, kwargs, dtype, impl) for impl in (FUSED, FOR_LOOP))
    assert_close_steps(ours, loop, kwargs, exact=False)


@every_input(
    FOR_LOOP,
    FOREACH,
    FUSED,
    of=[DOTSGD],
    dtypes=(torch.float64, torch.complex128),
    where=lambda kwargs: kwargs.get("gain") != "matched",  # SGD has no gain
)
def test_dot_sgd_is_sgds_stepped_one_after_the_other(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    """Bit for bit, on every path of torch's."""
    k = kwargs.get("losses", 2)
    params, losses = problem(kwargs, dtype, device)
    run(make(cls, params, kwargs), losses)

    twins, twin_losses = problem(kwargs, dtype, device)
    theirs = base_options(cls, kwargs)
    delta, named = kwargs.get("delta", 0.075), kwargs.get("momentums") or {}
    names = ["task", "distill"] if k == 2 else ["task", "distill_1", "distill_2"]
    momenta = [named.get(n, theirs["momentum"] + (-delta if i == 0 else delta)) for i, n in enumerate(names)]
    alone = {0: twins[-3], k - 1: twins[-2]}
    decay = theirs.get("weight_decay", 0)
    sgds = []
    for i, momentum in enumerate(momenta):
        groups: list[dict[str, Any]] = [
            {"params": twins[:-3], "momentum": momentum, "weight_decay": decay if i == 0 else 0}
        ]
        if i in alone:
            groups.append({"params": [alone[i]]})
        sgds.append(make(base_of(cls), groups, theirs))
    for _ in range(4):
        given = [torch.autograd.grad(loss, twins, allow_unused=True) for loss in twin_losses()]
        for sgd, grads in zip(sgds, given, strict=True):
            for p, g in zip(twins, grads, strict=True):
                p.grad = g
            sgd.step()
    assert_close_steps(params, twins, kwargs, exact=True)


@every_input(
    FOR_LOOP,
    FOREACH,
    FUSED,
    of=[DOTAdamW, MoKDSGD, MoKDAdamW],
    dtypes=(torch.float64, torch.complex128),
    # Weights that sum to one give the step of the mean.
    where=lambda kwargs: kwargs.get("rescale", True),
)
def test_without_conflict_a_step_over_losses_is_the_base_on_their_sum(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype
) -> None:
    """MoKD with equal losses, DOTAdamW with one β₁, up to rounding."""
    k = kwargs.get("losses", 2)
    same = {"delta": 0, "beta1s": None} if cls is DOTAdamW else {}

    def given() -> tuple[list[Any], Any]:
        params, losses = problem(kwargs, dtype, device)
        return params, losses if cls is DOTAdamW else lambda: [torch.stack(losses()).sum()] * k

    params, losses = given()
    run(make(cls, params, kwargs | same), losses)
    twins, twin_losses = given()
    run(make(base_of(cls), twins, base_options(cls, kwargs)), twin_losses, plain=True)
    assert_close_steps(params, twins, kwargs, exact=False)
