"""The generalised Jensen-Shannon divergence."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.memory import PeakMemory
from distill_optim.distill import generalized_jsd, kd
from tests.distill.losses import EPS, matrices, temperatures
from tests.reference import distill as reference

betas = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
inner = st.floats(0.001, 0.999)
masks = st.lists(st.booleans(), min_size=4, max_size=4).filter(any).map(torch.tensor)
ATOL = 100 * EPS * 40  # sums of a few dozen logarithms of up to 40


@given(matrices(), matrices(), masks, betas, temperatures)
def test_equals_the_reference(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, temperature: float) -> None:
    value = generalized_jsd(student, teacher, mask, beta=beta, temperature=temperature)
    expected = reference.generalized_jsd(student.numpy(), teacher.numpy(), mask.numpy(), beta, temperature)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=2 * ATOL)


@given(matrices(), matrices(), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_it_lies_between_0_and_the_entropy_of_beta(student: Tensor, teacher: Tensor, beta: float) -> None:
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert -ATOL <= generalized_jsd(student, teacher, beta=beta) <= entropy + ATOL


def test_the_bound_is_reached() -> None:
    student, teacher = torch.tensor([[99.0, -99.0]]), torch.tensor([[-99.0, 99.0]])
    torch.testing.assert_close(generalized_jsd(student, teacher), torch.tensor(2.0).log())


@given(matrices(), matrices(), inner)
def test_swapped_sides_swap_beta(student: Tensor, teacher: Tensor, beta: float) -> None:
    value, swapped = generalized_jsd(student, teacher, beta=beta), generalized_jsd(teacher, student, beta=1 - beta)
    torch.testing.assert_close(value, swapped, rtol=1e-12, atol=ATOL)


@given(matrices(largest=2), matrices(largest=2))
def test_its_limits_are_the_two_divergences(student: Tensor, teacher: Tensor) -> None:
    """The next term is smaller by about β max p/q, at most e⁸ β here; rounding is divided by β too."""
    beta = 1e-7
    forward, reverse = generalized_jsd(student, teacher, beta=0.0), generalized_jsd(student, teacher, beta=1.0)
    atol = 5 * math.exp(8) * beta + ATOL / beta
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=beta) / beta, forward, rtol=0, atol=atol)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=1 - beta) / beta, reverse, rtol=0, atol=atol)


@given(matrices(), matrices(), temperatures)
def test_its_ends_are_kd_without_the_square(student: Tensor, teacher: Tensor, temperature: float) -> None:
    forward = generalized_jsd(student, teacher, beta=0.0, temperature=temperature)
    reverse = generalized_jsd(student, teacher, beta=1.0, temperature=temperature)
    torch.testing.assert_close(forward, kd(student, teacher, temperature) / temperature**2, rtol=1e-12, atol=2 * ATOL)
    torch.testing.assert_close(reverse, kd(teacher, student, temperature) / temperature**2, rtol=1e-12, atol=2 * ATOL)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_pieces_change_nothing(chunk: int, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["distill_optim.distill.jsd"], "_CHUNK", chunk)
    wide = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    student, teacher = wide[:, :-1], torch.randn(3, 5, 5, dtype=torch.float64)  # a slice that is no matrix
    mask = torch.rand(3, 5) > 0.3
    value = generalized_jsd(student, teacher, mask, beta=beta)
    (gradient,) = torch.autograd.grad(value, wide)
    plain = student.detach().requires_grad_()
    logs = plain.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0.3:
        m = (beta * logs[1].exp() + (1 - beta) * logs[0].exp()).log()
        terms = beta * logs[1].exp() * (logs[1] - m) + (1 - beta) * logs[0].exp() * (logs[0] - m)
    else:
        p, q = logs if beta else logs[::-1]
        terms = p.exp() * (p - q)
    expected = terms.sum(-1)[mask].mean()
    (expected_gradient,) = torch.autograd.grad(expected, plain)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :-1], expected_gradient)
    assert (gradient[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_the_logits_there_is_one_tensor_of_their_size(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient, in the dtype of the logits; and the pieces, here a hundredth."""
    monkeypatch.setattr(sys.modules["distill_optim.distill.jsd"], "_CHUNK", 4000)
    student = torch.randn(2, 200, 1000).to(dtype).requires_grad_()
    teacher, mask = torch.randn(2, 200, 1000).to(dtype), torch.rand(2, 200) > 0.2
    size = student.numel() * student.element_size()
    pieces = 20 * 4000 * 4
    with PeakMemory() as memory:
        value = generalized_jsd(student, teacher, mask)
    assert memory.peak < pieces
    with PeakMemory() as memory:
        value.backward()
    assert size <= memory.peak < size + pieces


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_does_not_count_may_be_anything(beta: float) -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    spoilt = student.index_fill(0, torch.tensor([1, 3]), torch.nan).requires_grad_()
    value = generalized_jsd(spoilt, teacher.index_fill(0, torch.tensor([3]), torch.inf), mask, beta=beta)
    assert torch.equal(value, generalized_jsd(student, teacher, mask, beta=beta))
    value.backward()
    assert spoilt.grad is not None
    assert torch.isfinite(spoilt.grad).all()
    assert (spoilt.grad[~mask] == 0).all()


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_token_that_counts_is_zero(tokens: int) -> None:
    student = torch.randn(2, tokens, 5, requires_grad=True)
    value = generalized_jsd(student, torch.randn(2, tokens, 5), torch.zeros(2, tokens, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_padded_vocabulary_is_not_there(beta: float) -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    ruled_out = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    padded = torch.cat([student, ruled_out], 1).requires_grad_()
    value = generalized_jsd(padded, torch.cat([teacher, ruled_out], 1), beta=beta)
    torch.testing.assert_close(value, generalized_jsd(student, teacher, beta=beta))
    value.backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all()


def test_it_can_be_walked_back_twice() -> None:
    student = torch.randn(4, 5, requires_grad=True)
    value = generalized_jsd(student, torch.randn(4, 5))
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_does_not_fit_is_refused() -> None:
    z = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"beta=1.5: expected a number in \[0, 1\]"):
        generalized_jsd(z, z, beta=1.5)
    with pytest.raises(TypeError, match=r"mask: expected booleans, got torch.int64; for an attention mask give"):
        generalized_jsd(z, z, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask: shape \(2, 3, 5\), but the tokens' is \(2, 3\); one for each"):
        generalized_jsd(z, z, torch.ones(2, 3, 5, dtype=torch.bool))
