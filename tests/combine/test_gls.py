"""The geometric mean of the losses (GLS)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim.combine import dominance_scales
from distill_optim.combine.gls import gls
from distill_optim.combine.rules import uses_gram
from distill_optim.testing import on_fake_cuda
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

# Up to a factor of 1e8 apart, where the logarithm's floor begins, and anywhere from 1e-30 to 1e30.
losses_of_one_size = arrays(np.float64, st.integers(1, 64), elements=st.floats(1e-3, 1e4)).map(torch.from_numpy)
units = st.floats(-30, 30).map(lambda e: 10.0**e)


def rounding(losses: Tensor) -> float:
    """Logarithms up to 80, each with the digits of its size, and a sum of K of them."""
    return (losses.shape[-1] + 4) * 80 * EPS


@given(losses_of_one_size, units)
def test_equals_the_reference(losses: Tensor, unit: float) -> None:
    losses = losses * unit
    torch.testing.assert_close(gls(None, losses), reference.gls(losses), rtol=rounding(losses), atol=0)


@given(losses_of_one_size, units)
def test_agrees_with_torchjd(losses: Tensor, unit: float) -> None:
    """TorchJD descends on the geometric mean itself: ∂/∂Lᵢ is our weight on ∇log Lᵢ over Lᵢ."""
    scalarization = pytest.importorskip("torchjd.scalarization")
    losses = (losses * unit).requires_grad_()
    scalarization.GeometricMean()(losses).backward()
    assert losses.grad is not None
    torch.testing.assert_close(gls(None, losses.detach()) / losses.detach(), losses.grad, rtol=rounding(losses), atol=0)


def test_weights_on_the_log_gradients_give_the_gradient_of_the_geometric_mean() -> None:
    theta = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([theta.square().sum(), 3 * theta.exp().prod(), theta.cos().sum() + 5])
    (expected,) = torch.autograd.grad(losses.prod() ** (1 / 3), theta, retain_graph=True)
    raw = torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in losses])
    values = losses.detach()
    weights = gls(None, values) * dominance_scales("log", values, values)
    torch.testing.assert_close(weights @ raw, expected, rtol=32 * EPS, atol=32 * EPS)  # a dozen operations


@given(losses_of_one_size, st.data())
def test_unit_of_a_loss_changes_the_length_alone(losses: Tensor, data: st.DataObject) -> None:
    k = len(losses)
    c = torch.tensor(data.draw(st.lists(st.floats(0.1, 1), min_size=k, max_size=k)), dtype=torch.float64)
    weights = gls(None, losses * c)
    assert (weights == weights[0]).all()
    expected = gls(None, losses) * c.log().mean().exp()
    torch.testing.assert_close(weights, expected, rtol=2 * rounding(losses), atol=0)


@pytest.mark.parametrize("small", [0.0, -0.0, 1e-300, -1e-300])
def test_floor_is_that_of_the_logarithm(small: float) -> None:
    for unit in (1.0, 1e-30, 1e30):
        weights = gls(None, torch.tensor([4.0, small]).double() * unit)
        assert weights.tolist() == pytest.approx([4e-4 * unit / 2] * 2, rel=rounding(weights))


def test_negative_losses_count_by_their_magnitude() -> None:
    assert torch.equal(gls(None, torch.tensor([-4.0, 9.0])), gls(None, torch.tensor([4.0, 9.0])))


def test_no_loss_left() -> None:
    assert gls(None, torch.zeros(4)).tolist() == [0] * 4


def test_many_losses_do_not_overflow() -> None:
    """64 losses of 1e30: their product is 1e1920."""
    torch.testing.assert_close(
        gls(None, torch.full((64,), 1e30).double()), torch.full((64,), 1e30 / 64).double(), rtol=68 * 80 * EPS, atol=0
    )


def test_batch_is_a_loop() -> None:
    losses = torch.rand(2, 3, 5) + 0.1
    each = torch.stack([torch.stack([gls(None, x) for x in row]) for row in losses])
    torch.testing.assert_close(gls(None, losses), each, rtol=rounding(losses), atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_leaves_no_weight_finite(bad: float) -> None:
    assert not torch.isfinite(gls(None, torch.tensor([1.0, bad, 0.0]))).any()


def test_nothing_is_needed_and_nothing_is_read_on_the_host() -> None:
    assert not uses_gram(gls)
    result = on_fake_cuda(lambda losses: gls(None, losses), (3,))
    assert (result.shape, result.dtype, result.device.type) == ((3,), torch.float64, "cuda")
