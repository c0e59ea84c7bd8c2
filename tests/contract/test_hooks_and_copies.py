"""Hooks, state dicts, copies and files, for every input of torch's generators and ours."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distill_optim import DOTSGD, MultiLossClosure
from tests.contract.inputs import base_of, base_options, every_input, make, problem, run
from tests.helpers import OURS, assert_same_bits, assert_same_tree, batches, student, train, two_losses

WAYS = ["plain", "list", "two phases", "closure"]


def step(optimizer: Any, losses: Any, way: str) -> None:
    optimizer.zero_grad()
    if way == "plain":
        torch.stack(losses()).sum().backward()
        optimizer.step()
    elif way == "list":
        optimizer.step(losses())
    elif way == "two phases":
        optimizer.backward(losses())
        optimizer.step()
    else:
        optimizer.step(MultiLossClosure(losses, optimizer))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", OURS)
def test_step_hooks_fire_once_in_torchs_order(cls: Any, way: str) -> None:
    """Global and own, around whole steps; a removed one is silent."""
    base_of(cls)([torch.ones(1, requires_grad=True)])  # the first of its class puts hooks around its step, for good
    params, losses = problem()
    optimizer = cls(params)
    fired: list[Any] = []

    def hook(name: str) -> Any:
        return lambda opt, args, kwargs: fired.append((name, opt is optimizer, [p.detach().clone() for p in params]))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
    ]
    before = [p.detach().clone() for p in params]
    try:
        step(optimizer, losses, way)
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, _, _ in fired] == ["global pre", "pre", "post", "global post"]
    assert all(ours for _, ours, _ in fired)
    for _, _, seen in fired[:2]:
        assert_same_bits(seen, before)
    for _, _, seen in fired[2:]:
        assert_same_bits(seen, params)
    step(optimizer, losses, way)
    assert len(fired) == 4


@pytest.mark.parametrize("cls", OURS)
def test_a_pre_hook_may_change_the_arguments_of_a_step(cls: Any) -> None:
    """As in torch; here it puts in the losses."""
    params, losses = problem()
    twins, twin_losses = problem()
    optimizer, other = cls(params), cls(twins)
    with_losses = optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, losses()), {}))
    optimizer.step()
    with_losses.remove()
    other.step(twin_losses())
    assert_same_bits(params, twins)


@pytest.mark.parametrize("cls", OURS)
def test_state_dict_hooks_run_once_and_may_replace_the_dict(cls: Any) -> None:
    optimizer = cls(problem()[0])
    fired = []

    def post(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        fired.append("post")
        return state_dict | {"more": len(fired)}

    optimizer.register_state_dict_pre_hook(lambda opt: fired.append("pre"))
    optimizer.register_state_dict_post_hook(post)
    saved = optimizer.state_dict()
    assert fired == ["pre", "post"]
    assert saved["more"] == 2
    assert saved["param_groups"][0]["process_group"] is None, "what describes this process is not saved, hooks or not"


@pytest.mark.parametrize("cls", OURS)
def test_load_state_dict_hooks_run_once_and_may_replace_the_dict(cls: Any) -> None:
    optimizer = cls(problem()[0])
    fired = []

    def other_lr(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        fired.append("pre")
        mine = copy.deepcopy(state_dict)
        mine["param_groups"][0]["lr"] = 0.003
        return mine

    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(other_lr)
    optimizer.register_load_state_dict_pre_hook(lambda opt, state_dict: fired.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: fired.append(f"post {opt.param_groups[0]['lr']}"))
    optimizer.load_state_dict(saved)
    assert fired == ["first", "pre", "post 0.003"]
    assert saved["param_groups"][0]["lr"] == 0.001


@pytest.mark.parametrize("cls", OURS)
def test_a_load_hook_sees_a_foreign_state_dict_before_it_is_checked(cls: Any) -> None:
    """So that it can mend what would be refused, as in torch."""
    optimizer = cls(problem()[0])
    saved = cls(problem()[0], losses=["ce", "kd"]).state_dict()

    def rename(opt: Any, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            group["losses"] = ("task", "distill")

    with pytest.raises(ValueError, match="losses="):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(saved)


@every_input()
def test_state_dicts_are_deterministic_and_training_goes_on_from_them(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype
) -> None:
    """In memory, through a file that holds data only, a pickle and a deep copy; the saved one is left alone."""
    params, losses = problem(kwargs, dtype, device)
    optimizer = make(cls, params, kwargs)
    run(optimizer, losses, 3)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    assert_same_tree(optimizer.state_dict(), saved)

    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    from_file = torch.load(file, weights_only=True)
    at = [p.detach().clone() for p in params]
    runs = []
    for how in "state dict", "file", "deepcopy", "pickle":
        twins, twin_losses = problem(kwargs, dtype, device)
        for p, value in zip(twins, at, strict=True):
            p.data.copy_(value)
        if how in ("state dict", "file"):
            other = make(cls, twins, kwargs)
            other.load_state_dict(copy.deepcopy(kept if how == "state dict" else from_file))  # torch keeps the tensors
        else:
            again = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            other = make(cls, twins, kwargs)
            other.load_state_dict(copy.deepcopy(again.state_dict()))
            public = {k for k in optimizer.__dict__ if not k.startswith("_")}
            assert public == {k for k in again.__dict__ if not k.startswith("_")}
        assert_same_tree(other.state_dict(), kept)
        run(other, twin_losses, 2)
        runs.append((twins, other.state_dict()))
    run(optimizer, losses, 2)
    for twins, state in runs:
        assert_same_bits(params, twins)
        assert_same_tree(optimizer.state_dict(), state)


@every_input()
def test_older_state_dicts_load(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    """Of the torch optimizer: without the flags that torch added over the years, with step counts as numbers."""
    params, losses = problem(kwargs, dtype, device)
    theirs = make(base_of(cls), params, base_options(cls, kwargs))
    run(theirs, losses, 2, plain=True)
    old = copy.deepcopy(theirs.state_dict())
    for group in old["param_groups"]:
        for flag in ("foreach", "fused", "differentiable", "maximize", "capturable", "decoupled_weight_decay"):
            if not group.get(flag):
                group.pop(flag, None)
    for state in old["state"].values():
        if "step" in state:
            state["step"] = float(state["step"])
    kept = copy.deepcopy(old)
    twins = copy.deepcopy(params)
    optimizer = make(cls, twins, kwargs)
    optimizer.load_state_dict(old)
    assert_same_tree(old, kept)
    for group in optimizer.param_groups:
        assert group.keys() >= optimizer.defaults.keys()
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()
    theirs.step()
    assert_same_bits(params, twins)


@pytest.mark.parametrize("cls", OURS)
def test_named_and_nameless_state_dicts_load_into_each_other(cls: Any) -> None:
    for named, into in (True, False), (False, True), (True, True):
        model, other = student(), student()
        optimizer = cls(model.named_parameters() if named else model.parameters())
        optimizer.step(two_losses(model, batches(1)[0]))
        twin = cls(other.named_parameters() if into else other.parameters())
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.load_state_dict(model.state_dict())
        assert ("param_names" in optimizer.state_dict()["param_groups"][0]) is named
        for o, m in (optimizer, model), (twin, other):
            train(o, m, batches(2))
        assert_same_bits(model.parameters(), other.parameters())


@every_input()
def test_a_state_dict_is_cast_to_the_parameters_dtype(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    """As torch does it: every buffer, but the step count."""
    params, losses = problem(kwargs, dtype, device)
    optimizer = make(cls, params, kwargs)
    run(optimizer, losses, 2)
    twins, _ = problem(kwargs, torch.bfloat16, device)
    other = make(cls, twins, kwargs)
    other.load_state_dict(optimizer.state_dict())
    for p, state in other.state.items():
        for key, value in state.items():
            assert value.dtype == (torch.float32 if key == "step" else torch.bfloat16)
            assert key == "step" or value.shape == p.shape


@pytest.mark.cuda
@every_input(where=lambda kwargs: not kwargs.get("capturable"))
def test_a_state_dict_of_a_cpu_goes_on_where_the_parameters_are(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype
) -> None:
    params, losses = problem(kwargs, dtype, "cpu")
    optimizer = make(cls, params, kwargs)
    run(optimizer, losses, 3)
    moved, moved_losses = problem(kwargs, dtype, "cuda")
    for p, q in zip(moved, params, strict=True):
        p.data.copy_(q)
    other = make(cls, moved, kwargs)
    other.load_state_dict(optimizer.state_dict())
    for state in other.state.values():
        for key, value in state.items():
            assert value.device.type == ("cpu" if key == "step" else "cuda")
    run(optimizer, losses, 3)
    run(other, moved_losses, 3)
    for p, q in zip(moved, params, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", OURS)
def test_a_deep_copy_steps_its_own_parameters_by_itself(cls: Any) -> None:
    """Copied together with the model."""
    model, xs = student(), batches(2)
    optimizer = cls(model.parameters())
    optimizer.step(two_losses(model, xs[0]))
    other, twin = copy.deepcopy((model, optimizer))
    assert repr(twin) == repr(optimizer)
    assert next(iter(other.parameters())) is twin.param_groups[0]["params"][0]
    for m, o in (model, optimizer), (other, twin):
        o.zero_grad()
        o.step(two_losses(m, xs[1]))
    assert_same_bits(model.parameters(), other.parameters())


@pytest.mark.parametrize("cls", OURS)
def test_every_option_is_printed(cls: Any) -> None:
    printed = repr(cls([torch.ones(1, requires_grad=True)]))
    assert all(f"{option}: " in printed for option in cls([torch.ones(1, requires_grad=True)]).defaults)
    assert ("momentum: 0.9" in printed) == (cls is DOTSGD)
