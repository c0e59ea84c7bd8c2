"""The theorems about gradient surgery, and its orders."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from itertools import permutations
from math import factorial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine.pcgrad import pcgrad, pcgrad_average, random_orders
from distill_optim.testing import conflicting_gradients, gradients, gram_of, reach, slightly_conflicting_gradients
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps
CPU = torch.device("cpu")

module: Any = importlib.import_module("distill_optim.combine.pcgrad")  # the function has the module's name

seeds = st.integers(0, 2**32 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_weights(actual: Tensor, expected: Tensor, gram: Tensor) -> None:
    """The weights are unique, and their unit is that of the vectors: an error of wᵢ moves the step by ‖gᵢ‖ times it.

    A share is off by K roundings of what has been added to its gradient before, and that is part of the reach.
    """
    norms = gram.diagonal().sqrt()
    error = torch.where(norms > 0, (actual - expected) * norms, actual - expected)
    assert (error.abs() <= testing.ROUNDING * reach(expected, gram)).all()


@given(gradients(max_losses=2) | conflicting_gradients(max_losses=2) | slightly_conflicting_gradients(max_losses=2))
def test_two_losses_have_a_closed_form(rows: Tensor) -> None:
    """w₁ = 1 + max(0, −g₁₂/g₁₁), whatever the order: a quotient and a sum, with a rounding each."""
    gram = gram_of(rows)
    cross = Fraction(gram[0, 1].item())
    expected = [float(1 + max(Fraction(), -cross / Fraction(x.item()))) if x > 0 else 1.0 for x in gram.diagonal()]
    for method in (pcgrad, pcgrad_average):
        torch.testing.assert_close(method(gram), torch.tensor(expected, dtype=torch.float64), rtol=2 * EPS, atol=0)


@given(gradients(max_losses=2) | conflicting_gradients(max_losses=2) | slightly_conflicting_gradients(max_losses=2))
def test_step_of_two_losses_conflicts_with_neither(rows: Tensor) -> None:
    testing.assert_non_conflicting(pcgrad(gram_of(rows)), gram_of(rows))


def test_step_of_three_losses_may_conflict() -> None:
    """What the method does not promise. The first two gradients, nearly opposed to the third, outvote it."""
    rows = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -0.9]])
    conflicts = [(gram_of(rows) @ pcgrad(gram_of(rows), generator=seeded(seed))).min() < -1e-3 for seed in range(50)]
    assert any(conflicts)


@given(slightly_conflicting_gradients(max_losses=12), st.sampled_from([1, 3, None]))
def test_small_conflicts_count(rows: Tensor, orders: int | None) -> None:
    """Down to a cosine of −1e-6/K; every gradient conflicts with every other here.

    Of one length: the share that a much longer one gets of a short one vanishes beside the 1.
    """
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert (pcgrad(gram_of(rows), orders=orders) > 1).all()


@given(gradients(1, 8), st.sampled_from([1, 3, None]))
def test_weights_are_at_least_one(rows: Tensor, orders: int | None) -> None:
    """Only positive multiples of gradients are added."""
    assert (pcgrad(gram_of(rows), orders=orders) >= 1).all()


@given(gradients(1, 8), st.sampled_from([1, 3, None]))
def test_without_conflict_the_gradients_are_summed(rows: Tensor, orders: int | None) -> None:
    assert (pcgrad(gram_of(rows.abs()), orders=orders) == 1).all()


@given(gradients(1, 8), st.sampled_from([1, None]))
def test_zero_gradient_takes_no_part(rows: Tensor, orders: int | None) -> None:
    weights = pcgrad(gram_of(torch.cat([rows, torch.zeros_like(rows[:1])])), orders=orders)
    assert weights[-1] == 1


def test_square_that_underflows_is_zero() -> None:
    gram = torch.tensor([[1.0, -1e-170], [-1e-170, 0.0]], dtype=torch.float64)
    assert pcgrad(gram).tolist() == [1, 1]


@pytest.mark.parametrize("k", [2, 3, 6, 7])
def test_opposed_gradients_cancel(k: int) -> None:
    rows = torch.tensor([[1.0, 2.0], [-3.0, -6.0]])[torch.arange(k) % 2]
    testing.assert_same_vector(pcgrad_average(gram_of(rows)), torch.zeros(k), gram_of(rows))


@given(gradients(1, 6) | conflicting_gradients(2, 6), seeds)
def test_agrees_with_the_algorithm_in_rational_arithmetic(rows: Tensor, seed: int) -> None:
    orders = random_orders((1, len(rows)), CPU, seeded(seed))
    expected = reference.pcgrad(reference.rational(rows.double().numpy()), orders[0].tolist()).weights.astype(float)
    actual = pcgrad(gram_of(rows), generator=seeded(seed))
    assert_same_weights(actual, torch.from_numpy(expected), gram_of(rows))


@given(gradients(1, 4) | conflicting_gradients(2, 4))
def test_average_is_the_mean_over_all_orders(rows: Tensor) -> None:
    expected = reference.pcgrad_average(reference.rational(rows.double().numpy())).weights.astype(float)
    assert_same_weights(pcgrad_average(gram_of(rows)), torch.from_numpy(expected), gram_of(rows))


@pytest.mark.parametrize("k", [5, 6])
def test_average_of_five_and_six(k: int) -> None:
    rows = torch.randn(k, 4, dtype=torch.float64)
    expected = reference.pcgrad_average(rows.numpy()).weights
    assert_same_weights(pcgrad_average(gram_of(rows)), torch.from_numpy(expected), gram_of(rows))


@pytest.mark.parametrize("k", [4, 8])
def test_average_is_what_many_draws_come_to(k: int) -> None:
    """Beyond K = 6 the average is an estimate, too, but one without bias, and √120 times as good as a single draw."""
    gram = gram_of(torch.randn(k, 3))
    draws = torch.stack([pcgrad(gram) for _ in range(400)])
    spread = draws.std(0)
    assert (spread > 0).any()
    # Five standard errors; of the estimate, too, beyond K = 6.
    error = 5 * spread * (1 / 400 + (1 / 120 if k > 6 else 0)) ** 0.5
    assert ((draws.mean(0) - pcgrad_average(gram)).abs() <= error + EPS * draws.amax()).all()
    estimates = torch.stack([pcgrad_average(gram) for _ in range(100)])
    if k <= 6:
        assert (estimates == estimates[0]).all()  # nothing is drawn
    else:
        # The standard deviation of 100 is known to 1/√200.
        assert (estimates.std(0) <= 1.5 * spread / 120**0.5).all()


@given(gradients(1, 12), st.integers(1, 4), seeds)
def test_orders_are_averaged(rows: Tensor, orders: int, seed: int) -> None:
    gram, generator = gram_of(rows), seeded(seed)
    mean = torch.stack([pcgrad(gram, generator=generator) for _ in range(orders)]).mean(0)
    assert_same_weights(pcgrad(gram, orders=orders, generator=seeded(seed)), mean, gram)


def test_default_generator_draws() -> None:
    gram = gram_of(torch.randn(12, 3))
    torch.manual_seed(3)
    first, second = pcgrad(gram), pcgrad(gram)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(pcgrad(gram), first)
    assert torch.equal(pcgrad(gram, generator=seeded(3)), first)


@pytest.mark.parametrize("k", range(1, 8))
def test_all_orders_are_there_once(k: int) -> None:
    visits = module._all_orders(k, CPU)
    assert visits.shape == (factorial(k - 1), k, k - 1)
    for i in range(k):
        others = [j for j in range(k) if j != i]
        assert sorted(map(tuple, visits[:, i].tolist())) == sorted(permutations(others))


@pytest.mark.parametrize("k", [1, 2, 5, 64])
def test_random_orders_have_the_others_once(k: int) -> None:
    visits = random_orders((3, k), CPU, None)
    assert visits.shape == (3, k, k - 1)
    for i in range(k):
        assert (visits[:, i].sort(-1).values == torch.tensor([j for j in range(k) if j != i])).all()


def test_random_orders_are_equally_likely() -> None:
    visits = random_orders((6000, 4), CPU, seeded(1))
    for i in range(4):
        counts = Counter(map(tuple, visits[:, i].tolist()))
        assert len(counts) == 6
        # χ² with 5 degrees of freedom exceeds 25.7 once in 10 000 times.
        assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 25.7
    # Those of different losses are drawn apart: 36 pairs, χ² with 35 degrees of freedom, once in 10 000.
    pairs = Counter(zip(map(tuple, visits[:, 0].tolist()), map(tuple, visits[:, 1].tolist()), strict=True))
    assert sum((n - 6000 / 36) ** 2 / (6000 / 36) for n in pairs.values()) < 76.4


@pytest.mark.parametrize("orders", [0, -1])
def test_orders_are_a_positive_number(orders: int) -> None:
    with pytest.raises(ValueError, match=f"orders={orders}.*positive"):
        pcgrad(torch.eye(2), orders=orders)


@given(gradients(1, 8), seeds)
def test_agrees_with_torchjd(rows: Tensor, seed: int) -> None:
    """Its random orders of all K, the loss itself among them, given to it."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    gram = gram_of(rows)
    orders = random_orders((1, len(rows)), CPU, seeded(seed))[0]
    drawn: Iterator[Tensor] = iter([torch.cat([order, torch.tensor([i])]) for i, order in enumerate(orders)])
    with patch("torch.randperm", lambda n: next(drawn)):
        expected = aggregation.PCGradWeighting()(gram)
    assert_same_weights(pcgrad(gram, generator=seeded(seed)), expected, gram)


# What holds for every method.


@given(gradients(1, 8))
@example(torch.zeros(3, 2))
@example(torch.randn(64, 3))
def test_defined(rows: Tensor) -> None:
    testing.assert_defined(pcgrad, rows)
    testing.assert_defined(pcgrad_average, rows)


@given(gradients(1, 6))
def test_order_of_the_losses_does_not_matter_to_the_average(rows: Tensor) -> None:
    testing.assert_permutation_equivariant(pcgrad_average, rows)


@given(gradients(1, 12), st.integers(-100, 100), seeds)
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int, seed: int) -> None:
    """2^±100 covers 1e±30. Every guard is relative, so nothing is rounded differently."""
    gram = gram_of(rows)
    scaled = pcgrad(gram * 2.0**exponent, generator=seeded(seed))
    assert torch.equal(scaled, pcgrad(gram, generator=seeded(seed)))


@given(gradients(1, 4))
def test_not_finite_in_not_finite_out(rows: Tensor) -> None:
    testing.assert_not_finite_in_not_finite_out(pcgrad, rows)


@given(gradients(1, 5))
def test_batch_is_a_loop(rows: Tensor) -> None:
    testing.assert_batch_is_a_loop(pcgrad_average, rows)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("orders", [1, 3])
def test_batch_draws_in_the_order_of_a_loop(k: int, orders: int) -> None:
    grams = torch.stack([gram_of(torch.randn(k, 5)) for _ in range(4)])
    batched = pcgrad(grams.view(2, 2, k, k), orders=orders, generator=seeded(5)).view(4, k)
    generator = seeded(5)
    for weights, gram in zip(batched, grams, strict=True):
        assert torch.equal(weights, pcgrad(gram, orders=orders, generator=generator))


@given(gradients(1, 8))
def test_takes_any_dtype(rows: Tensor) -> None:
    testing.assert_takes_any_dtype(pcgrad, rows)


@pytest.mark.parametrize(("k", "batch"), [(1, ()), (2, ()), (2, (2,)), (3, (2,)), (9, ()), (32, ())])
@pytest.mark.parametrize("method", [pcgrad, partial(pcgrad, orders=3), pcgrad_average])
def test_no_host_read(method: Any, k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read(method, k, batch)
