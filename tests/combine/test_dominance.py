"""The scale at which each gradient enters the combination."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim.combine import DOMINANCE, EMANorm, dominance_rule, dominance_scales
from tests.properties.gradients import gradients, gram_of, independent_gradients
from tests.reference import loss_methods as reference

EPS = torch.finfo(torch.float64).eps

factors = st.lists(st.floats(0.02, 50), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))


def scaled(dominance: str, gram: Tensor, losses: Tensor) -> Tensor:
    """The Gram matrix that the combination sees."""
    scales = dominance_scales(dominance, gram, losses)
    return gram * torch.outer(scales, scales)


@given(independent_gradients(4, 4), factors, factors)
def test_log_does_not_see_the_unit_of_a_loss(rows: Tensor, losses: Tensor, c: Tensor) -> None:
    """(cᵢ Lᵢ, cᵢ gᵢ) are combined as (Lᵢ, gᵢ), above the floor: ∇log is blind to a constant factor."""
    gram = gram_of(rows)
    # The products with c, the reciprocals and the products with the scales: some six roundings on either side.
    torch.testing.assert_close(
        scaled("log", gram * torch.outer(c, c), losses * c), scaled("log", gram, losses), rtol=16 * EPS, atol=0
    )


@given(independent_gradients(4, 4), factors)
def test_norm_does_not_see_the_length_of_a_gradient(rows: Tensor, c: Tensor) -> None:
    gram, losses = gram_of(rows), torch.ones(4)
    torch.testing.assert_close(  # roundings as above
        scaled("norm", gram * torch.outer(c, c), losses), scaled("norm", gram, losses), rtol=16 * EPS, atol=0
    )


@given(gradients())
def test_norm_gives_unit_vectors_and_leaves_zeros(rows: Tensor) -> None:
    gram = gram_of(rows)
    diagonal = scaled("norm", gram, torch.ones(len(rows))).diagonal()
    # A square root, a reciprocal and two products: 2 · (½ + 1) + 2 roundings.
    torch.testing.assert_close(diagonal, (gram.diagonal() > 0).double(), rtol=8 * EPS, atol=0)


def test_log_is_the_gradient_of_the_logarithm() -> None:
    theta = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([theta.square().sum(), 3 * theta.exp().prod()])
    raw = torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in losses])
    logarithmic = torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in losses.log()])
    scales = dominance_scales("log", gram_of(raw), losses.detach())
    torch.testing.assert_close(scales[:, None] * raw, logarithmic, rtol=4 * EPS, atol=0)  # a quotient either way


@pytest.mark.parametrize("small", [1e-9, 1e-300, 0.0, -1e-9])
def test_log_has_a_floor_relative_to_the_largest_loss(small: float) -> None:
    """As L → 0 the scale stops at 1e8 times that of the largest loss, whatever the loss's unit."""
    for unit in (1.0, 1e-20, 1e20):
        scales = dominance_scales("log", torch.eye(2).double(), torch.tensor([4.0, small]).double() * unit)
        assert scales.tolist() == pytest.approx([0.25 / unit, 0.25e8 / unit], rel=4 * EPS)  # three roundings


def test_log_measures_a_negative_loss_by_its_magnitude() -> None:
    assert dominance_scales("log", torch.eye(3), torch.tensor([-2.0, 4.0, -0.5])).tolist() == [0.5, 0.25, 2]


def test_log_of_losses_that_are_all_zero() -> None:
    assert dominance_scales("log", torch.eye(2), torch.zeros(2)).tolist() == [1, 1]


def test_none_leaves_everything() -> None:
    assert dominance_scales("none", torch.eye(3), torch.tensor([0.0, -1.0, 1e9])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dominance", DOMINANCE)
def test_batch_is_a_loop(dominance: str) -> None:
    rows, losses = torch.randn(5, 3, 4), torch.randn(5, 3)
    gram = rows @ rows.mT
    each = [dominance_scales(dominance, g, x) for g, x in zip(gram, losses, strict=True)]
    assert torch.equal(dominance_scales(dominance, gram, losses), torch.stack(each))


@pytest.mark.parametrize("dominance", DOMINANCE)
def test_result_has_the_dtype_of_the_gram_matrix(dominance: str) -> None:
    assert dominance_scales(dominance, torch.eye(2).double(), torch.ones(2).bfloat16()).dtype == torch.float64


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"^dominance='Log': expected one of 'log', 'norm', 'none', 'ema'$"):
        dominance_scales("Log", torch.eye(2), torch.ones(2))


# ---------------------------------------------------------------- the average of the norms

sequences = st.lists(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3), min_size=1, max_size=8).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)


def over_steps(rule: EMANorm, norms: Tensor) -> Tensor:
    """Scales step by step, for gradients at right angles with these norms (T, K)."""
    state = rule.init(norms[0])
    scales = []
    for row in norms:
        now, state = rule(torch.diag(row.square()), torch.ones_like(row), state)
        scales.append(now)
    return torch.stack(scales)


@given(sequences, st.floats(0, 0.999))
def test_average_is_that_of_the_norms(norms: Tensor, decay: float) -> None:
    # The correction 1 − βᵗ loses the digits that 1 − β has less than 1: three at most, of some ten roundings.
    torch.testing.assert_close(
        over_steps(EMANorm(decay), norms), reference.ema_norms(norms, decay), rtol=1e3 * 16 * EPS, atol=0
    )


@given(sequences)
def test_without_decay_it_is_the_norm(norms: Tensor) -> None:
    expected = torch.stack([dominance_scales("norm", torch.diag(row.square()), row) for row in norms])
    torch.testing.assert_close(over_steps(EMANorm(0.0), norms), expected, rtol=4 * EPS, atol=0)  # 1 − 0 and a quotient


@given(sequences, st.integers(-60, 60))
def test_average_scales_with_the_gradients(norms: Tensor, exponent: int) -> None:
    """To the bit for a power of two."""
    assert torch.equal(over_steps(EMANorm(), norms * 2.0**exponent) * 2.0**exponent, over_steps(EMANorm(), norms))


def test_gradient_that_vanishes_for_a_step_stays_short() -> None:
    scales = over_steps(EMANorm(0.5), torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert scales[1, 0] == 1
    assert scales[1, 1] == 3  # the average of 1 and 0, the younger counting twice


def test_gradient_that_never_was_anything_but_zero() -> None:
    assert over_steps(EMANorm(), torch.zeros(2, 2, dtype=torch.float64)).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"^decay=.*: expected a number in \[0, 1\)$"):
        EMANorm(decay)


def test_rules_are_named_or_themselves() -> None:
    assert dominance_rule("ema") == EMANorm()
    assert dominance_rule(EMANorm(0.5)) == EMANorm(0.5)
    with pytest.raises(TypeError, match=r"^dominance=3: expected a name or a function"):
        dominance_rule(3)  # type: ignore[arg-type]  # what is refused
