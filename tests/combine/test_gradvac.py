"""The theorems about gradient vaccine, and its memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine.gradvac import GradVac
from distill_optim.combine.pcgrad import pcgrad, random_orders
from distill_optim.combine.rules import State
from distill_optim.testing import gradients, gram_of, independent_gradients, reach
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps
CPU = torch.device("cpu")

seeds = st.integers(0, 2**32 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_of(targets: Tensor) -> State:
    return {"targets": targets.double()}


@st.composite
def targets_for(draw: st.DrawFn, k: int) -> Tensor:
    """Not symmetric, which they are at the start only."""
    entries = draw(st.lists(st.integers(-15, 15), min_size=k * k, max_size=k * k))
    return torch.tensor(entries).double().view(k, k) / 16


@st.composite
def vaccinations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows = draw(independent_gradients(max_losses=6))
    return rows, draw(targets_for(len(rows)))


def assert_same_weights(actual: Tensor, expected: Tensor, gram: Tensor, tolerance: float = testing.ROUNDING) -> None:
    """In the unit of the vectors: an error of wᵢ moves the step by ‖gᵢ‖ times it."""
    norms = gram.diagonal().sqrt()
    error = torch.where(norms > 0, (actual - expected) * norms, actual - expected)
    assert (error.abs() <= tolerance * reach(expected, gram)).all()


@given(vaccinations(), st.floats(0, 1), seeds)
def test_agrees_with_the_algorithm_on_vectors(drawn: tuple[Tensor, Tensor], beta: float, seed: int) -> None:
    """Cosines to ROUNDING; a coefficient multiplies their errors by 1/√(1 − φ̂²) ≤ 3 for every gradient visited."""
    rows, targets = drawn
    weights, state = GradVac(beta, seeded(seed))(gram_of(rows), torch.ones(len(rows)), state_of(targets))
    orders = random_orders((len(rows),), CPU, seeded(seed)).tolist()
    expected = reference.gradvac(rows.numpy(), orders, targets.numpy(), beta)
    assert_same_weights(weights, torch.from_numpy(expected.weights), gram_of(rows), 3 * len(rows) * testing.ROUNDING)
    torch.testing.assert_close(
        state["targets"], torch.from_numpy(expected.phi), rtol=0, atol=3 * len(rows) * testing.ROUNDING
    )


@given(vaccinations(), st.floats(0, 1), seeds)
def test_agrees_with_torchjd(drawn: tuple[Tensor, Tensor], beta: float, seed: int) -> None:
    """Its random orders given to it, and its 1e-8 taken from it."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows, targets = drawn
    k = len(rows)
    orders = random_orders((k,), CPU, seeded(seed))
    drawn_orders: Iterator[Tensor] = iter([order - (order > i).long() for i, order in enumerate(orders)])
    theirs = aggregation.GradVacWeighting(beta=beta, eps=0.0)
    theirs._phi_t, theirs._state_key = targets.clone(), (k, torch.float64)
    with patch("torch.randperm", lambda n: next(drawn_orders)):
        expected = theirs(gram_of(rows))
    weights, state = GradVac(beta, seeded(seed))(gram_of(rows), torch.ones(k), state_of(targets))
    assert_same_weights(weights, expected, gram_of(rows), 3 * k * testing.ROUNDING)
    torch.testing.assert_close(state["targets"], theirs._phi_t, rtol=0, atol=3 * k * testing.ROUNDING)


@given(gradients(1, 8), seeds)
def test_targets_of_zero_make_it_pcgrad(rows: Tensor, seed: int) -> None:
    gram = gram_of(rows)
    rule = GradVac(generator=seeded(seed))
    weights, _ = rule(gram, torch.ones(len(rows)), rule.init(torch.ones(len(rows))))
    # The root of a length that has all but cancelled knows half the digits.
    assert_same_weights(weights, pcgrad(gram, generator=seeded(seed)), gram, testing.ROUNDING**0.5)


@given(independent_gradients(max_losses=2), targets_for(2))
def test_two_gradients_get_the_target_cosine(rows: Tensor, targets: Tensor) -> None:
    """cos(gᵢ′, gⱼ) = max(φ, φ̂ᵢⱼ), and the targets are that much closer to φ."""
    gram = gram_of(rows)
    norms = gram.diagonal().sqrt()
    weights, state = GradVac(beta=0.25)(gram, torch.ones(2), state_of(targets))
    phi = gram[0, 1] / norms.prod()
    for i, j in ((0, 1), (1, 0)):
        share = weights[j] - 1
        inner = gram[i, j] + share * gram[j, j]
        length = (gram[i, i] + 2 * share * gram[i, j] + share**2 * gram[j, j]).sqrt()
        expected = torch.maximum(phi, targets[i, j])
        # The share as a difference of the weight from 1 loses digits by the ratio of the lengths.
        rounding = testing.ROUNDING * (1 + norms[j] / norms[i]) * 10
        assert abs(inner / (length * norms[j]) - expected) <= rounding
        assert abs(state["targets"][i, j] - (0.75 * targets[i, j] + 0.25 * phi)) <= testing.ROUNDING
    assert torch.equal(state["targets"].diagonal(), targets.diagonal())


@given(gradients(1, 12), st.data())
def test_weights_are_at_least_one(rows: Tensor, data: st.DataObject) -> None:
    """Only positive multiples of gradients are added."""
    targets = data.draw(targets_for(len(rows)))
    weights, state = GradVac()(gram_of(rows), torch.ones(len(rows)), state_of(targets))
    assert (weights >= 1).all()
    assert weights.isfinite().all()
    assert (state["targets"].abs() <= 1).all()


@given(gradients(1, 6), st.data())
def test_gradient_without_an_angle_takes_no_part(rows: Tensor, data: st.DataObject) -> None:
    k = len(rows)
    targets = data.draw(targets_for(k + 1))
    weights, state = GradVac()(gram_of(torch.cat([rows, 0 * rows[:1]])), torch.ones(k + 1), state_of(targets))
    assert weights[-1] == 1
    assert torch.equal(state["targets"][-1], targets[-1])
    assert torch.equal(state["targets"][:, -1], targets[:, -1])


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1])
def test_gradient_that_has_cancelled_has_no_angle(factor: float) -> None:
    """What is left of g₁ − g₁ is rounding: it neither asks for more nor teaches the targets."""
    row = torch.randn(5, dtype=torch.float64)
    gram = gram_of(torch.stack([row, -factor * row, torch.randn(5).double()]))
    before = state_of(torch.full((3, 3), 0.5))
    for seed in range(8):
        rule = GradVac(generator=seeded(seed))
        weights, state = rule(gram, torch.ones(3), before)
        first = random_orders((3,), CPU, seeded(seed))[:, 0]
        kept = state["targets"] == 0.5
        assert kept[0, 2] == (first[0] == 1)
        assert kept[1, 2] == (first[1] == 0)
        assert weights.max() < 10 * max(factor, 1 / factor)


def test_equal_gradients_stay_as_they_are() -> None:
    """And what comes after years of agreement is finite: the target is 1 then, which only the parallel can reach."""
    rule, losses = GradVac(), torch.ones(3)
    state = rule.init(losses)
    gram = gram_of(torch.tensor([[0.3, -1.7, 2.9]]).expand(3, 3))
    for _ in range(100):
        weights, state = rule(gram, losses, state)
        assert torch.equal(weights, torch.ones(3).double())
    others = 1 - torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(state["targets"], others, rtol=0, atol=4 * EPS)
    weights, state = rule(torch.eye(3), losses, state)
    assert weights.isfinite().all()
    assert weights.min() > 1e6
    torch.testing.assert_close(state["targets"], others / 2, rtol=0, atol=1e-6)  # of 1/√(1 − φ̂²) = 6e6


def test_targets_are_exponential_averages() -> None:
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    for beta, expected in ((0.0, [0.0, 0.0]), (0.5, [0.25, 0.375]), (1.0, [0.5, 0.5])):
        rule = GradVac(beta)
        state = rule.init(torch.ones(2))
        for target in expected:
            before = copy.deepcopy(state)
            _, after = rule(gram, torch.ones(2), state)
            assert torch.equal(state["targets"], before["targets"])  # a step does not change what it is given
            state = after
            torch.testing.assert_close(state["targets"], torch.tensor([[0.0, target], [target, 0.0]]).double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_batch_that_overflows_is_forgotten(bad: float) -> None:
    gram = gram_of(torch.randn(3, 4))
    gram[0, 1] = gram[1, 0] = bad
    before = state_of(torch.rand(3, 3))
    weights, state = GradVac()(gram, torch.ones(3), before)
    assert not weights.isfinite().any()
    assert torch.equal(state["targets"], before["targets"])


def test_default_generator_draws() -> None:
    gram, losses = gram_of(torch.randn(9, 3)), torch.ones(9)
    rule = GradVac()
    torch.manual_seed(3)
    first, second = (rule(gram, losses, rule.init(losses))[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(rule(gram, losses, rule.init(losses))[0], first)


def test_copies_draw_on_their_own() -> None:
    rule, gram, losses = GradVac(0.3, seeded(4)), gram_of(torch.randn(9, 3)), torch.ones(9)
    copies = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
    assert copies == [rule, rule]
    expected = rule(gram, losses, rule.init(losses))[0]
    for other in copies:
        assert torch.equal(other(gram, losses, rule.init(losses))[0], expected)
    assert not torch.equal(rule(gram, losses, rule.init(losses))[0], expected)


def test_rules_compare_by_their_options() -> None:
    assert GradVac(generator=seeded(1)) == GradVac(generator=seeded(2)) == GradVac(0.5)
    assert GradVac(0.1) != GradVac(0.5)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_is_a_share(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta={beta}"):
        GradVac(beta)


def test_memory_before_the_first_step() -> None:
    state = GradVac().init(torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(state["targets"], torch.zeros(3, 3, dtype=torch.float64))


# What holds for every method.


@given(gradients(1, 12))
@example(torch.zeros(3, 2))
@example(torch.randn(64, 3))
def test_defined(rows: Tensor) -> None:
    testing.assert_defined(GradVac(), rows)


@given(gradients(1, 8), st.integers(-100, 100), seeds, st.data())
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int, seed: int, data: st.DataObject) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram, losses, state = gram_of(rows), torch.ones(len(rows)), state_of(data.draw(targets_for(len(rows))))
    weights, after = GradVac(generator=seeded(seed))(gram, losses, state)
    scaled, same = GradVac(generator=seeded(seed))(gram * 2.0**exponent, losses, state)
    assert torch.equal(scaled, weights)
    assert torch.equal(same["targets"], after["targets"])


@given(independent_gradients(max_losses=6), st.lists(st.integers(-20, 20), min_size=6, max_size=6), seeds)
def test_cosines_do_not_look_at_lengths(rows: Tensor, exponents: list[int], seed: int) -> None:
    k = len(rows)
    scale = torch.tensor(exponents[:k]).double().exp2()
    state = state_of(torch.full((k, k), 0.25))
    _, after = GradVac(generator=seeded(seed))(gram_of(rows), torch.ones(k), state)
    _, same = GradVac(generator=seeded(seed))(gram_of(rows * scale[:, None]), torch.ones(k), state)
    torch.testing.assert_close(same, after, rtol=0, atol=testing.ROUNDING)


@given(gradients(1, 4))
def test_not_finite_in_not_finite_out(rows: Tensor) -> None:
    testing.assert_not_finite_in_not_finite_out(GradVac(), rows)


@given(gradients(1, 8))
def test_takes_any_dtype(rows: Tensor) -> None:
    testing.assert_takes_any_dtype(GradVac(), rows)


@pytest.mark.parametrize("k", [1, 2, 3, 9, 32])
def test_no_host_read(k: int) -> None:
    testing.assert_no_host_read(GradVac(), k)


@given(gradients(2, 2), targets_for(2))
def test_order_of_two_losses_does_not_matter(rows: Tensor, targets: Tensor) -> None:
    assume(rows.double().norm(dim=1).all())
    gram = gram_of(rows)
    weights, state = GradVac()(gram, torch.ones(2), state_of(targets))
    flipped, other = GradVac()(gram.flip(0, 1), torch.ones(2), state_of(targets.flip(0, 1)))
    assert torch.equal(flipped.flip(0), weights)
    assert torch.equal(other["targets"].flip(0, 1), state["targets"])
