"""The optimizers with every combination method that has a name: training, memory, checkpoints, one backward pass."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from distill_optim import MoKDAdamW, MoKDSGD, MultiLossClosure, combine, joint_loss
from tests.helpers import assert_same_bits, assert_same_tree, batches, flat, k_losses, refused, student, two_losses
from tests.helpers import gradients as gradients_of

DTYPE = torch.float64
MEMORY = ("gradvac", "uncertainty", "gradnorm", "dwa", "famo", "stch")
OF_VALUES = ("uncertainty", "dwa", "famo", "gls", "stch", "random", "mean", "sum", "constant")
LOOK_AT_THE_GRAM = tuple(name for name in combine.names() if name not in OF_VALUES)


def quick(name: str) -> Any:
    """The method, with windows and warm-ups short enough for a test to see their ends."""
    return {"dwa": combine.DWA(window=2), "stch": combine.STCH(warmup=2)}.get(name, name)


@pytest.mark.parametrize("dominance", combine.DOMINANCE)
@pytest.mark.parametrize("name", combine.names())
def test_every_method_lowers_both_losses(name: str, dominance: str) -> None:
    """A linear student towards two near targets; the loss at the end is below a third of that at the start."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, dtype=DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.1, momentum=0.9, combine=quick(name), dominance=dominance)
    x = torch.randn(64, 6, dtype=DTYPE)
    target = x @ torch.randn(6, 4, dtype=DTYPE)
    near = target + 0.05 * torch.randn(64, 4, dtype=DTYPE)

    def losses() -> list[Tensor]:
        out = model(x)
        return [(out - target).square().mean(), (out - near).square().mean()]

    before = torch.stack(losses()).detach()
    for _ in range(60):
        optimizer.zero_grad()
        optimizer.step(losses())
        assert optimizer.stats is not None
        assert abs(optimizer.stats.weights.abs().sum() - 2) < 1e-12
    assert (torch.stack(losses()).detach() < before / 3).all()


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("name", combine.names())
def test_any_number_of_losses(name: str, k: int) -> None:
    model = student(DTYPE)
    optimizer = MoKDAdamW(model.parameters(), lr=1e-3, losses=k, combine=quick(name))
    for x in batches(4, DTYPE):
        optimizer.zero_grad()
        optimizer.step(k_losses(model, x, k))
    assert optimizer.stats is not None
    assert optimizer.stats.weights.shape == (k,)
    assert flat(model.parameters()).isfinite().all()


@pytest.mark.parametrize("name", combine.names())
def test_step_is_the_weighted_sum(name: str) -> None:
    """What SGD does with Σ wᵢgᵢ, for the weights that the statistics show, over several steps of the memory."""
    model, lr = student(DTYPE), 0.05
    optimizer = MoKDSGD(model.parameters(), lr=lr, combine=quick(name), dominance="none", rescale=False)
    params = list(model.parameters())
    for x in batches(6, DTYPE):
        before = [p.detach().clone() for p in params]
        gradients = gradients_of(two_losses(model, x), params)
        optimizer.zero_grad()
        optimizer.step(two_losses(model, x))
        assert optimizer.stats is not None
        w = optimizer.stats.weights
        for p, old, a, b in zip(params, before, *gradients, strict=True):
            # A product and a sum per loss in one order or the other, and the update: a few roundings.
            torch.testing.assert_close(p.detach(), old - lr * (w[0] * a + w[1] * b), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", combine.names())
def test_weights_are_those_of_the_pure_function(name: str) -> None:
    """The optimizer's memory is the function's state, step by step."""
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine=quick(name), dominance="ema")
    params = list(model.parameters())
    state: combine.State = {}
    for step, x in enumerate(batches(6, DTYPE)):
        losses = two_losses(model, x)
        gram = combine.gram(gradients_of(losses, params))
        torch.manual_seed(step)  # the orders and draws of those that have any
        expected, state = combine.advance(
            gram, torch.stack(losses).detach(), state, combine=quick(name), dominance="ema", rescale=True
        )
        optimizer.zero_grad()
        torch.manual_seed(step)
        optimizer.step(losses)
        assert optimizer.stats is not None
        torch.testing.assert_close(optimizer.stats.weights, expected, rtol=1e-12, atol=0)
    assert state  # "ema" has a memory in any case


# ---------------------------------------------------------------- one backward pass where the values are enough


def passes(name: str, **options: Any) -> int:
    """Backward passes of the second step."""
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, losses=3, combine=quick(name), **options)
    for x in batches(2, DTYPE):
        optimizer.zero_grad()
        losses = k_losses(model, x, 3)
        with patch.object(torch.autograd, "backward", wraps=torch.autograd.backward) as backward:
            optimizer.step(losses)
    return backward.call_count


@pytest.mark.parametrize("name", OF_VALUES)
def test_values_need_one_backward_pass(name: str) -> None:
    assert passes(name) == 1
    assert passes(name, dominance="norm") == 3


@pytest.mark.parametrize("name", LOOK_AT_THE_GRAM)
def test_gradients_need_one_backward_pass_each(name: str) -> None:
    assert passes(name) == 3


@pytest.mark.parametrize("name", OF_VALUES)
def test_one_pass_is_the_step_of_three(name: str) -> None:
    """A parameter of one loss alone takes its gradient as it is, and a loss that shares nothing has weight 1."""
    trunk, head, apart = (nn.Parameter(torch.randn(4, dtype=DTYPE)) for _ in range(3))

    def losses() -> list[Tensor]:
        return [(trunk.square().sum() + head.square().sum()), (trunk - 1).square().sum(), apart.square().sum()]

    steps = []
    for needs_gram in (False, True):
        params = [copy.deepcopy(p) for p in (trunk, head, apart)]
        optimizer = MoKDSGD([trunk, head, apart], lr=0.1, losses=3, combine=quick(name))
        for seed in range(4):
            optimizer.zero_grad()
            torch.manual_seed(seed)
            with patch.object(combine, "needs_gram", lambda *_, needs_gram=needs_gram: needs_gram):
                optimizer.step(losses())
        assert optimizer.stats is not None
        assert optimizer.stats.weights[2] == 1
        steps.append([p.detach().clone() for p in (trunk, head, apart)])
        for p, old in zip((trunk, head, apart), params, strict=True):
            p.data.copy_(old)
    # One backward of the weighted sum, or the sum of three: a rounding here and there.
    for one, three in zip(*steps, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "famo", "gls", "mean"])
@pytest.mark.parametrize("way", ["closure", "phases", "joint"])
def test_every_way_in_is_the_same_step(name: str, way: str) -> None:
    ends = []
    for chosen in ("list", way):
        model = student(DTYPE)
        optimizer = MoKDSGD(model.parameters(), lr=0.05, combine=quick(name))
        for x in batches(5, DTYPE):
            if chosen == "closure":
                optimizer.step(MultiLossClosure(functools.partial(two_losses, model, x), optimizer))
                continue
            optimizer.zero_grad()
            losses = two_losses(model, x)
            if chosen == "list":
                optimizer.step(losses)
            elif chosen == "phases":
                optimizer.backward(losses)
                optimizer.step()
            else:
                joint_loss(losses, optimizer).backward()
                optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert_same_bits(*ends)


def test_memory_counts_steps_and_not_micro_batches() -> None:
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine=combine.DWA(window=2))
    xs = batches(6, DTYPE)
    for a, b in zip(xs[::2], xs[1::2], strict=True):
        optimizer.zero_grad()
        optimizer.backward(two_losses(model, a))
        optimizer.backward(two_losses(model, b))
        optimizer.step()
    assert optimizer.param_groups[0]["combine_state"]["combine.step"].tolist() == [3, 3]


def test_missing_loss_does_not_count() -> None:
    """The mean over a window, or of the lengths, is that of the steps in which the loss was there."""
    model = student(DTYPE)
    optimizer = MoKDSGD(
        model.parameters(), lr=0.0, losses=["a", "b", "c"], combine=combine.DWA(window=2), dominance="ema"
    )
    x = batches(1, DTYPE)[0]
    for step in range(4):
        optimizer.zero_grad()
        given = dict(zip("abc", k_losses(model, x, 3), strict=True))
        if step % 2:
            del given["c"]
        optimizer.step(given)
    state = optimizer.param_groups[0]["combine_state"]
    assert state["combine.step"].tolist() == [4, 4, 2]
    assert state["dominance.count"].tolist() == [4, 4, 2]
    # lr = 0: every mean is the value itself, up to the rounding of a sum and of the average's correction.
    values = torch.stack(k_losses(model, x, 3)).detach()
    torch.testing.assert_close(state["combine.last"], values, rtol=1e-14, atol=0)


def test_skipped_step_leaves_the_memory() -> None:
    """zero_grad() instead of step(), as after an overflow."""
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine="uncertainty")
    optimizer.step(two_losses(model, batches(1, DTYPE)[0]))
    before = copy.deepcopy(optimizer.param_groups[0]["combine_state"])
    optimizer.zero_grad()
    optimizer.backward(two_losses(model, batches(1, DTYPE)[0]))
    optimizer.zero_grad()
    assert_same_tree(before, optimizer.param_groups[0]["combine_state"])


# ---------------------------------------------------------------- memory in copies and checkpoints


def state_dict_through_a_file(optimizer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("copied_by", ["checkpoint", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", MEMORY)
def test_copy_goes_on_identically(name: str, copied_by: str) -> None:
    model = student(DTYPE)
    make = functools.partial(MoKDSGD, lr=0.05, momentum=0.9, combine=quick(name), dominance="ema")
    optimizer = make(model.parameters())
    xs = batches(8, DTYPE)

    def train(model: Any, optimizer: Any, xs: Any) -> None:
        torch.manual_seed(3)
        for x in xs:
            optimizer.zero_grad()
            optimizer.step(two_losses(model, x))

    train(model, optimizer, xs[:5])
    if copied_by == "checkpoint":
        twin = copy.deepcopy(model)
        other = make(twin.parameters())
        other.load_state_dict(state_dict_through_a_file(optimizer))
    elif copied_by == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    else:
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, xs[5:])
    train(twin, other, xs[5:])
    assert_same_bits(model.parameters(), twin.parameters())
    assert optimizer.stats is not None
    assert other.stats is not None
    assert_same_bits([optimizer.stats.weights], [other.stats.weights])


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_named_numbers_in_the_first_group(name: str) -> None:
    """Shapes (), (K,) or (K, K), float64: what a checkpoint of any kind can hold."""
    model = student(DTYPE)
    optimizer = MoKDSGD(
        [{"params": [p]} for p in model.parameters()], lr=0.05, losses=3, combine=name, dominance="none"
    )
    optimizer.step(k_losses(model, batches(1, DTYPE)[0], 3))
    memory = optimizer.param_groups[0]["combine_state"]
    assert memory
    for value in memory.values():
        assert value.dtype == torch.float64
        assert value.shape in ((), (3,), (3, 3))
    assert not any("combine_state" in group for group in optimizer.param_groups[1:])


def test_memory_of_another_method_is_refused() -> None:
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine=combine.FAMO())
    optimizer.step(two_losses(model, batches(1, DTYPE)[0]))
    saved = optimizer.state_dict()
    other = MoKDSGD(model.parameters(), lr=0.05, combine=combine.DWA())
    with refused(other, ValueError, "state_dict", "DWA", "combine="):
        other.load_state_dict(saved)


@pytest.mark.parametrize("name", MEMORY)
def test_losses_may_be_missing_in_a_step(name: str) -> None:
    """Their part of the memory stays, that of the others goes on."""
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, losses=["a", "b", "c"], combine=quick(name))
    for step, x in enumerate(batches(8, DTYPE)):
        given = dict(zip("abc", k_losses(model, x, 3), strict=True))
        if step % 2:
            del given["b"]
        optimizer.zero_grad()
        optimizer.step(given)
        assert optimizer.stats is not None
        assert optimizer.stats.weights.isfinite().all()
        assert optimizer.stats.names == tuple(given)


# ---------------------------------------------------------------- looking back


def test_famo_learns_from_the_same_batch() -> None:
    """Weights of the second step are those of the pure function that was shown the losses after the first."""
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine="famo", rescale=False, dominance="none")
    first, second = batches(2, DTYPE)
    rule = combine.FAMO()
    before = torch.stack(two_losses(model, first)).detach()
    _, state = rule(None, before, rule.init(before))
    optimizer.step(two_losses(model, first))
    after = torch.stack(two_losses(model, first)).detach()
    optimizer.observe(two_losses(model, first))
    state = rule.observe(after, state)
    optimizer.zero_grad()
    optimizer.step(two_losses(model, second))
    losses = torch.ones(2, dtype=DTYPE)
    expected, _ = rule(None, losses, state)
    assert optimizer.stats is not None
    assert_same_bits([optimizer.stats.weights], [expected])
    assert expected[0] != expected[1]


def test_observe_needs_all_losses() -> None:
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine="famo")
    losses = two_losses(model, batches(1, DTYPE)[0])
    optimizer.step(losses)
    with refused(optimizer, ValueError, "losses", "'distill'", "missing"):
        optimizer.observe({"task": losses[0]})


@pytest.mark.parametrize("name", ["min_norm", "uncertainty"])
def test_others_take_no_notice_of_what_they_observe(name: str) -> None:
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine=name)
    optimizer.step(two_losses(model, batches(1, DTYPE)[0]))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.observe(two_losses(model, batches(1, DTYPE)[0]))
    assert_same_tree(before, optimizer.state_dict())


# ---------------------------------------------------------------- what a loss that is not finite does


@pytest.mark.parametrize("name", combine.names())
def test_overflow_is_no_exception(name: str) -> None:
    """The step behaves as torch's would: what is not finite reaches the parameters."""
    model = student(DTYPE)
    optimizer = MoKDSGD(model.parameters(), lr=0.05, combine=name)
    losses = two_losses(model, batches(1, DTYPE)[0])
    optimizer.step([losses[0], losses[1] * torch.inf])
    assert not flat(model.parameters()).isfinite().all()
