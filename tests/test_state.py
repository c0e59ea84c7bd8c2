"""Checkpoints, copies and pickles: training goes on identically."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from tests.helpers import OURS, assert_same_bits, assert_same_tree, batches, student, train, two_losses

# Two optimizers for the state of one: what is resumed is compared with what was never stopped.
VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (DOTSGD, {"lr": 0.05, "dampening": 0.1, "weight_decay": 0.01}),
    (DOTSGD, {"lr": 0.05, "gain": "matched", "losses": ("ce", "kd"), "momentums": {"kd": 0.95}}),
    (DOTAdamW, {"amsgrad": True}),
    (MoKDSGD, {"lr": 0.05, "momentum": 0.9}),
    (MoKDSGD, {"lr": 0.05, "momentum": 0.9, "every": 4}),
    (MoKDAdamW, {"every": 3, "dominance": "norm"}),
]


class Heads(nn.Module):
    """A trunk and a head that only one loss reaches: what ``every`` has to know again after a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = student(), nn.Linear(4, 3)


def losses_of(model: Heads, x: Tensor) -> list[Tensor]:
    out = model.trunk(x)
    return [out.square().mean(), (model.head(out) - 1).abs().mean()]


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_training_goes_on_identically(cls: Any, options: dict[str, Any], how: str) -> None:
    xs = batches(13)
    straight = Heads()
    optimizer = cls(straight.parameters(), **options)
    train(optimizer, straight, xs[:6], losses_of)
    if how == "file":
        # weights_only, torch's default: nothing in the state dict needs code to be loaded.
        buffer = io.BytesIO()
        torch.save([straight.state_dict(), optimizer.state_dict()], buffer)
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        resumed = Heads()
        resumed.load_state_dict(weights)
        other = cls(resumed.parameters(), **options)
        other.load_state_dict(state)
    else:
        pair = (straight, optimizer)
        resumed, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert other.defaults.keys() == optimizer.defaults.keys()
    for x in xs[6:]:
        for model, o in (straight, optimizer), (resumed, other):
            o.zero_grad()
            o.step(losses_of(model, x))
    assert_same_bits(straight.parameters(), resumed.parameters())
    assert_same_tree(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("cls", "base", "flags"),
    [
        (DOTSGD, SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
        (DOTSGD, SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        (MoKDSGD, SGD, {"lr": 0.05}),
        (MoKDSGD, SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.2}),
        (DOTAdamW, AdamW, {"lr": 0.01, "amsgrad": True}),
        (MoKDAdamW, AdamW, {"lr": 0.01}),
    ],
)
def test_a_checkpoint_of_the_base_loads(cls: Any, base: Any, flags: dict[str, Any]) -> None:
    """The untouched loop goes on bit for bit; then it may hand over losses."""
    xs = batches(10)
    theirs = student()
    before = base(theirs.parameters(), **flags)
    train(before, theirs, xs[:5], plain=True)
    ours = copy.deepcopy(theirs)
    after = cls(ours.parameters(), lr=1.0)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for model, optimizer in (theirs, before), (ours, after):
        train(optimizer, model, xs[5:], plain=True)
    assert_same_bits(theirs.parameters(), ours.parameters())
    after.step(two_losses(ours, xs[0]))


def test_a_function_is_not_saved() -> None:
    """A state dict holds data; how the gradients are combined is said again by whoever loads it."""

    def halves(gram: Tensor, losses: Tensor) -> Tensor:
        return torch.full_like(losses, 0.5)

    optimizer = MoKDSGD(student().parameters(), combine=halves)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["combine"] is None
    assert state["param_groups"][0]["process_group"] is None
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["combine"] is halves


def test_options_of_the_losses_are_loaded_like_others() -> None:
    saved = MoKDSGD(student().parameters(), dominance="norm", every=3).state_dict()
    optimizer = MoKDSGD(student().parameters())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["dominance"] == "norm"
    assert optimizer.param_groups[0]["every"] == 3


@pytest.mark.parametrize("cls", OURS)
def test_a_group_added_later_trains(cls: Any) -> None:
    model = student()
    optimizer = cls(model[2].parameters(), lr=0.01)
    xs = batches(6)
    train(optimizer, model, xs[:3])
    before = [p.detach().clone() for p in model[0].parameters()]
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.1})
    train(optimizer, model, xs[3:])
    assert not any(torch.equal(p, q) for p, q in zip(before, model[0].parameters(), strict=True))


@pytest.mark.parametrize("cls", OURS)
def test_named_parameters_and_repr(cls: Any) -> None:
    optimizer = cls(student().named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    assert "losses: ('task', 'distill')" in repr(optimizer)
    assert isinstance(optimizer, SGD | AdamW)


@pytest.mark.parametrize("plain", [True, False])
def test_without_momentum_there_is_no_state(plain: bool) -> None:
    """As under torch's SGD."""
    model = student()
    optimizer = DOTSGD(model.parameters(), lr=0.1, momentum=0, delta=0)
    train(optimizer, model, batches(2), plain=plain)
    assert optimizer.state_dict()["state"] == {}


def test_the_package_is_typed() -> None:
    import distill_optim

    assert (Path(distill_optim.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "options", [{"every": 3}, {"combine": "famo"}, {"combine": "gradvac", "dominance": "ema"}], ids=str
)
def test_a_flattened_state_dict_carries_everything(options: dict[str, Any]) -> None:
    """As for distributed checkpoints: loaded into what an empty optimizer has, and training goes on identically."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    straight = student()
    optimizer = MoKDSGD(straight.parameters(), lr=0.05, momentum=0.9, **options)
    train(optimizer, straight, batches(10)[:5])
    saved = copy.deepcopy(get_optimizer_state_dict(straight, optimizer, options=flat))

    resumed = copy.deepcopy(straight)
    other = MoKDSGD(resumed.parameters(), lr=7.0, momentum=0.9, **options)
    empty = get_optimizer_state_dict(resumed, other, options=flat)
    assert empty.keys() == saved.keys()
    set_optimizer_state_dict(resumed, other, saved, options=flat)
    for model, o in (straight, optimizer), (resumed, other):
        train(o, model, batches(10)[5:])
    assert_same_bits(straight.parameters(), resumed.parameters())
    assert_same_tree(optimizer.state_dict(), other.state_dict())
