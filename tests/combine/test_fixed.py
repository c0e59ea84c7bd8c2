"""Weights that look at nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.combine import fixed
from distill_optim.combine.rules import uses_gram
from distill_optim.testing import on_fake_cuda

shapes = st.one_of(st.tuples(st.integers(1, 64)), st.tuples(st.integers(0, 3), st.integers(1, 64)), st.just((2, 3, 5)))


@given(shapes)
def test_sum_is_ones(shape: tuple[int, ...]) -> None:
    assert torch.equal(fixed.sum(None, torch.full(shape, -3.0).double()), torch.ones(shape).double())


@given(shapes)
def test_mean_is_a_kth(shape: tuple[int, ...]) -> None:
    weights = fixed.mean(None, torch.randn(shape).double())
    assert torch.equal(weights, torch.full(shape, 1 / shape[-1], dtype=torch.float64))


@given(shapes, st.data())
def test_constant_is_what_it_is_given(shape: tuple[int, ...], data: st.DataObject) -> None:
    k = shape[-1]
    weights = data.draw(st.lists(st.floats(-1e9, 1e9), min_size=k, max_size=k))
    expected = torch.tensor(weights, dtype=torch.float64).expand(shape)
    given_as: tuple[list[float] | Tensor, ...] = (weights, expected.new_tensor(weights))
    for form in given_as:
        assert torch.equal(fixed.constant(None, torch.zeros(shape).double(), weights=form), expected)


def test_constant_without_weights_is_the_sum() -> None:
    assert torch.equal(fixed.constant(None, torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0], torch.ones(3)])
def test_constant_refuses_another_number_of_weights(weights: list[float] | Tensor) -> None:
    with pytest.raises(ValueError, match=rf"^weights: expected one for each of 2 losses, got {len(weights)}$"):
        fixed.constant(None, torch.zeros(2), weights=weights)


@pytest.mark.parametrize("values", [torch.nan, torch.inf, 0.0, -1.0])
def test_values_of_the_losses_do_not_matter(values: float) -> None:
    losses = torch.full((2,), values)
    assert fixed.sum(None, losses).tolist() == [1, 1]
    assert fixed.mean(None, losses).tolist() == [0.5, 0.5]
    assert fixed.constant(None, losses, weights=[1, 2]).tolist() == [1, 2]


@pytest.mark.parametrize(
    "method", [fixed.sum, fixed.mean, fixed.constant, partial(fixed.constant, weights=[0.1, 0.2, 0.7])]
)
def test_nothing_is_needed_and_nothing_is_read_on_the_host(method: partial[Tensor]) -> None:
    assert not uses_gram(method)
    result = on_fake_cuda(lambda losses: method(None, losses), (3,))
    assert (result.shape, result.device.type) == ((3,), "cuda")
