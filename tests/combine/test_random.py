"""Weights drawn anew in every step (RLW)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.combine.random import random
from distill_optim.combine.rules import uses_gram
from distill_optim.testing import on_fake_cuda

EPS = torch.finfo(torch.float64).eps


@given(st.one_of(st.tuples(st.integers(1, 64)), st.just((3, 5)), st.just((2, 0, 4))), st.integers(0, 99))
def test_weights_lie_on_the_simplex(shape: tuple[int, ...], seed: int) -> None:
    weights = random(None, torch.zeros(shape), generator=torch.Generator().manual_seed(seed))
    assert (weights.shape, weights.dtype) == (shape, torch.float64)
    assert (weights > 0).all()
    # One rounding per quotient, and those of the two sums.
    assert ((weights.sum(-1) - 1).abs() <= 2 * shape[-1] * EPS).all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_log_weights_are_standard_normal_up_to_their_mean(k: int) -> None:
    """Centred logarithms of a softmax are the centred normals: variance 1 − 1/K, covariance −1/K, mean 0."""
    n = 100_000
    logs = random(None, torch.zeros(n, k)).log()
    centred = logs - logs.mean(-1, keepdim=True)
    expected = torch.eye(k, dtype=torch.float64) - 1 / k
    # Means of n numbers of variance 1 at most, and of products of variance 2 at most, within five of their deviations.
    assert (centred.mean(0).abs() <= 5 / n**0.5).all()
    assert ((centred.mT @ centred / n - expected).abs() <= 5 * (2 / n) ** 0.5).all()


def test_in_the_mean_every_loss_weighs_the_same() -> None:
    n, k = 100_000, 4
    assert ((random(None, torch.zeros(n, k)).mean(0) - 1 / k).abs() <= 5 * 0.5 / n**0.5).all()  # deviation below ½


def test_generator_decides_and_torch_s_own_stands_in() -> None:
    losses = torch.zeros(3)

    def draws(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [random(None, losses, generator=generator) for _ in range(2)]

    first, second = draws(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, draws(1)[0])
    torch.manual_seed(1)
    assert torch.equal(first, random(None, losses))


@pytest.mark.parametrize("values", [torch.nan, 0.0, -1e30])
def test_losses_do_not_matter(values: float) -> None:
    torch.manual_seed(1)
    expected = random(None, torch.zeros(3))
    torch.manual_seed(1)
    assert torch.equal(random(None, torch.full((3,), values).bfloat16()), expected)


def test_agrees_with_torchjd() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    losses = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    scalarization.Random()(losses).backward()
    torch.manual_seed(3)
    assert torch.equal(random(None, losses), losses.grad)  # type: ignore[arg-type]  # it looks at no Gram matrix


def test_nothing_is_needed_and_nothing_is_read_on_the_host() -> None:
    assert not uses_gram(random)
    assert not uses_gram(partial(random, generator=torch.Generator()))
    result = on_fake_cuda(lambda losses: random(None, losses), (3,))
    assert (result.shape, result.dtype, result.device.type) == ((3,), torch.float64, "cuda")
