"""Adam handed in and out, against torch's; and what every rule with a memory keeps to."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim.combine.adam import adam, adam_state
from distill_optim.combine.dwa import DWA
from distill_optim.combine.famo import FAMO
from distill_optim.combine.gradnorm import GradNorm
from distill_optim.combine.rules import State, Stateful, apply, keep, uses_gram
from distill_optim.combine.stch import STCH
from distill_optim.combine.uncertainty import Uncertainty
from distill_optim.testing import on_fake_cuda
from tests.helpers import assert_same_tree

EPS = torch.finfo(torch.float64).eps

# The memory of each turns over within a few steps.
RULES = [Uncertainty(), GradNorm(), DWA(window=2), FAMO(), STCH(mu=0.5, warmup=2)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)

STEPS = 5


def sequences(steps: int, elements: st.SearchStrategy[float], max_losses: int = 64) -> st.SearchStrategy[Tensor]:
    return st.integers(1, max_losses).flatmap(
        lambda k: arrays(np.float64, (steps, k), elements=elements).map(torch.from_numpy)
    )


def grams(losses: Tensor, seed: int = 0) -> Tensor:
    """Gram matrices for a sequence of losses, of gradients whose lengths differ by up to some 1e3."""
    generator = torch.Generator().manual_seed(seed)
    steps, k = losses.shape
    rows = torch.randn(steps, k, 5, generator=generator, dtype=torch.float64)
    rows *= (2 * torch.randn(steps, k, 1, generator=generator, dtype=torch.float64)).exp()
    return rows @ rows.mT


def run(rule: Stateful, grams: Tensor, losses: Tensor, after: Tensor | None = None) -> tuple[Tensor, State]:
    """The weights of every step, and the last memory; ``after``: the losses after each step, if they are looked at."""
    state = rule.init(losses[0])
    weights = []
    for t, (gram, values) in enumerate(zip(grams, losses, strict=True)):
        w, state = rule(gram, values, state)
        weights.append(w)
        if after is not None:
            state = rule.observe(after[t], state)
    return torch.stack(weights), state


def fallen(losses: Tensor) -> Tensor:
    """Some losses after each step: nine tenths of those before and a tenth of another step's."""
    return 0.9 * losses + 0.1 * losses.roll(1, 0)


def looks(rule: Stateful, losses: Tensor) -> list[Tensor | None]:
    """What to hand to :func:`run` for the losses after each step."""
    return [None, fallen(losses)] if rule.looks_back else [None]


# Adam


options = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-4, 1),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 1e-3, 0.5]),
    }
)


@given(sequences(6, st.floats(-1e6, 1e6)), options)
def test_adam_is_that_of_torch(gradients: Tensor, options: dict[str, Any]) -> None:
    """From the same memory the moments agree to the last bit, and the value up to the last digit of the step."""
    value, *gradients_ = gradients
    parameter = value.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], **options)
    state = adam_state(value)
    for gradient in gradients_:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        value, state = adam(before, gradient, state, **options)
        for name, entry in state.items():
            assert torch.equal(entry, optimizer.state[parameter][name].double())
        # 1 − βᵗ has one rounding of βᵗ, from pow, and with β ≤ 0.9999 it is at least 1e-4; its root, a quotient and a
        # product have one each. The sum has one more.
        size = (value - before).abs()
        assert ((value - parameter.detach()).abs() <= EPS * (1e4 + 4) * size + EPS * before.abs()).all()


def test_adam_counts_as_torch_does() -> None:
    """A hundred steps along one number, whose every step is nearly lr."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.025)
    value = torch.zeros(1, dtype=torch.float64)
    state = adam_state(value)
    for t in range(100):
        gradient = torch.tensor([1.0 + 0.1 * t], dtype=torch.float64)
        parameter.grad = gradient
        optimizer.step()
        value, state = adam(value, gradient, state, lr=0.025)
    assert state["step"] == optimizer.state[parameter]["step"] == 100
    torch.testing.assert_close(value, parameter.detach(), rtol=100 * 4 * EPS, atol=0)  # four roundings a step


@given(sequences(2, st.floats(-1e3, 1e3)))
def test_adam_changes_nothing_that_it_is_handed(tensors: Tensor) -> None:
    value, gradient = tensors
    state = adam_state(value)
    before = copy.deepcopy((value, gradient, state))
    adam(value, gradient, state, lr=0.1, weight_decay=0.1)
    assert_same_tree(before, (value, gradient, state))


def test_keep_takes_the_whole_memory_or_none_of_it() -> None:
    old, new = {"a": torch.zeros(2), "b": torch.zeros(())}, {"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(())}
    assert_same_tree(keep(torch.tensor(False), new, old), old)
    assert keep(torch.tensor(True), new, old)["b"] == 1


# Every rule with a memory


@every_rule
@given(losses=sequences(STEPS, st.floats(1e-3, 1e3), 16), random=st.randoms(use_true_random=False))
def test_order_of_the_losses_does_not_matter(rule: Stateful, losses: Tensor, random: Any) -> None:
    """Over a whole sequence of steps."""
    k = losses.shape[1]
    order = torch.tensor(random.sample(range(k), k))
    gram = grams(losses)
    for after in looks(rule, losses):
        expected, _ = run(rule, gram, losses, after)
        permuted, _ = run(
            rule, gram[:, order][:, :, order], losses[:, order], None if after is None else after[:, order]
        )
        # Sums over K in another order: K roundings, of numbers that a handful of others have been multiplied with. Adam
        # divides by √v + 1e-8, so where FAMO's gradient is nothing but rounding, of logarithms up to log 1e6 < 14, a
        # step of lr has an error of K · 14 · eps/1e-8.
        rounding = STEPS * k * EPS * (14 * 0.025 / 1e-8 if isinstance(rule, FAMO) else 16)
        torch.testing.assert_close(permuted, expected[:, order], rtol=rounding, atol=rounding)


@every_rule
@pytest.mark.parametrize("look_back", [True, False])
def test_nothing_that_is_handed_in_is_changed(rule: Stateful, look_back: bool) -> None:
    losses = torch.rand(STEPS, 3, dtype=torch.float64) + 0.1
    state = rule.init(losses[0])
    for gram, values in zip(grams(losses), losses, strict=True):
        handed = copy.deepcopy([gram, values, state])
        _, after = rule(gram, values, state)
        assert_same_tree(handed, [gram, values, state])
        handed = copy.deepcopy([values, after])
        observed = rule.observe(values, after)
        assert_same_tree(handed, [values, after])
        state = observed if look_back else after


@every_rule
@given(
    losses=sequences(
        STEPS, st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1e30, -1.0, -1e30])), 16
    )
)
def test_weights_of_any_finite_losses_are_positive_and_finite(rule: Stateful, losses: Tensor) -> None:
    some = grams(losses)
    for gram in (some, torch.zeros_like(some)) if uses_gram(rule) else (some,):
        for after in looks(rule, losses):
            weights, state = run(rule, gram, losses, after)
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()
            assert (weights.sum(-1) > 0).all()
            # The logarithm of losses that are all 0 is kept to be compared with the next.
            assert all(torch.isfinite(entry).all() for name, entry in state.items() if name != "previous")


@every_rule
@pytest.mark.parametrize("k", [1, 2, 64])
def test_memory_has_entries_that_a_checkpoint_can_hold(rule: Stateful, k: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        losses = torch.arange(1, 4 * k + 1).view(4, k).to(dtype)
        weights, state = run(rule, grams(losses).to(torch.float32), losses)
        assert (weights.shape, weights.dtype) == ((4, k), torch.float64)
        for values in (rule.init(losses[0]), state, rule.observe(losses[0], state)):
            for name, entry in values.items():
                assert isinstance(name, str)
                assert entry.dtype == torch.float64
                assert entry.shape in ((), (k,))


@every_rule
def test_first_memory_does_not_depend_on_the_values(rule: Stateful) -> None:
    """An optimizer may need it before it has seen a loss."""
    assert_same_tree(rule.init(torch.zeros(3)), rule.init(torch.tensor([1.0, torch.nan, -3.0])))


@every_rule
def test_an_empty_memory_stands_for_the_first(rule: Stateful) -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0]])
    expected = rule(grams(losses)[0], losses[0], rule.init(losses[0]))
    assert_same_tree(apply(rule, grams(losses)[0], losses[0], {}), expected)


@every_rule
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("when", [0, 1, 3, 5])
def test_a_loss_that_is_not_finite_leaves_no_trace(rule: Stateful, when: int, bad: float) -> None:
    """All weights of that step are NaN, and those of the others are as if it had not been."""
    losses = torch.tensor([[1.0, 2.0, 4.0], [0.5, 3.0, 2.0], [2.0, 1.0, 1.0]], dtype=torch.float64).repeat(2, 1)
    spoilt = losses.new_tensor([[1.0, bad, 1.0]])
    gram = grams(losses)

    def insert(sequence: Tensor, new: Tensor) -> Tensor:
        return torch.cat([sequence[:when], new, sequence[when:]])

    expected, _ = run(rule, gram, losses, fallen(losses))
    weights, _ = run(rule, insert(gram, gram[:1]), insert(losses, spoilt), insert(fallen(losses), spoilt))
    assert weights[when].isnan().all()
    assert torch.equal(torch.cat([weights[:when], weights[when + 1 :]]), expected)


@every_rule
def test_copies_and_pickles(rule: Stateful) -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [0.5, 3.0, 2.0], [2.0, 1.0, 1.0]])
    expected = run(rule, grams(losses), losses)
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert twin == rule
        assert hash(twin) == hash(rule)
        assert_same_tree(run(twin, grams(losses), losses), expected)


@every_rule
@pytest.mark.parametrize("k", [1, 3, 64])
def test_nothing_is_read_on_the_host(rule: Stateful, k: int) -> None:
    """Two steps and a look back."""

    def steps(gram: Tensor, losses: Tensor) -> Tensor:
        _, state = rule(gram, losses, rule.init(losses))
        state = rule.observe(losses, state)
        weights, state = rule(gram, losses, state)
        assert all(entry.device.type == "cuda" for entry in state.values())
        return weights

    result = on_fake_cuda(steps, (k, k), (k,))
    assert (result.shape, result.dtype, result.device.type) == ((k,), torch.float64, "cuda")


@every_rule
def test_rules_that_need_no_gram_matrix_say_so(rule: Stateful) -> None:
    assert uses_gram(rule) == isinstance(rule, GradNorm)
    if not uses_gram(rule):
        losses: Any = torch.ones(2)
        without: Any = None
        weights, _ = rule(without, losses, rule.init(losses))
        assert torch.isfinite(weights).all()


@every_rule
def test_options_cannot_be_changed(rule: Stateful) -> None:
    name = fields(cast(Any, rule))[0].name
    with pytest.raises(AttributeError):
        setattr(rule, name, 1)
