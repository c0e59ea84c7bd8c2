"""The whole walk from Gram matrix and losses to the weights on the raw gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import combine
from distill_optim.combine import DOMINANCE, dominance_scales, min_norm, weights
from tests.properties.gradients import ROUNDING, gradients, gram_of, independent_gradients

EPS = torch.finfo(torch.float64).eps

# "ema" has a memory, and is "norm" in its first step.
dominances = st.sampled_from([name for name in DOMINANCE if name != "ema"])


def losses_of(gram: Tensor) -> Tensor:
    """Some losses, positive and far from one another."""
    return torch.arange(1, len(gram) + 1, dtype=torch.float64) ** 3


@given(gradients(max_losses=12), dominances)
def test_rescaled_weights_sum_to_k(rows: Tensor, dominance: str) -> None:
    gram = gram_of(rows)
    result = weights(gram, losses_of(gram), dominance=dominance)
    assert (result >= 0).all()
    assert abs(result.sum() / len(rows) - 1) <= 2 * len(rows) * EPS  # two sums of K terms


@given(gradients(max_losses=12), dominances)
def test_rescaling_changes_the_length_alone(rows: Tensor, dominance: str) -> None:
    gram = gram_of(rows)
    raw = weights(gram, losses_of(gram), dominance=dominance, rescale=False)
    # Two sums of K terms, and a handful of products.
    torch.testing.assert_close(
        weights(gram, losses_of(gram), dominance=dominance),
        raw * (len(rows) / raw.sum()),
        rtol=(2 * len(rows) + 8) * EPS,
        atol=0,
    )


@given(gradients(max_losses=12), dominances)
def test_raw_weights_are_shares_times_scales(rows: Tensor, dominance: str) -> None:
    """wᵢ = πᵢ sᵢ with π the min-norm weights of the scaled gradients."""
    gram = gram_of(rows)
    scales = dominance_scales(dominance, gram, losses_of(gram))
    expected = min_norm(gram * torch.outer(scales, scales)) * scales
    assert torch.equal(weights(gram, losses_of(gram), dominance=dominance, rescale=False), expected)


@given(independent_gradients(), st.data())
def test_log_step_does_not_see_the_unit_of_a_loss(rows: Tensor, data: st.DataObject) -> None:
    """(cᵢ Lᵢ, cᵢ gᵢ) give the step of (Lᵢ, gᵢ), above the floor: wᵢ cᵢ is the same."""
    k = len(rows)
    c = torch.tensor(data.draw(st.lists(st.floats(0.02, 50), min_size=k, max_size=k)), dtype=torch.float64)
    losses = losses_of(rows)
    before = weights(gram_of(rows), losses, rescale=False)
    after = weights(gram_of(rows * c[:, None]), losses * c, rescale=False)
    # πᵢ = wᵢ Lᵢ loses the digits of the condition number, 1e4 at most.
    torch.testing.assert_close(after * c * losses, before * losses, rtol=0, atol=1e4 * ROUNDING)


@given(independent_gradients(), st.data())
def test_norm_step_does_not_see_the_length_of_a_gradient(rows: Tensor, data: st.DataObject) -> None:
    k = len(rows)
    c = torch.tensor(data.draw(st.lists(st.floats(0.02, 50), min_size=k, max_size=k)), dtype=torch.float64)
    length = gram_of(rows).diagonal().sqrt()
    before = weights(gram_of(rows), losses_of(rows), dominance="norm", rescale=False)
    after = weights(gram_of(rows * c[:, None]), losses_of(rows), dominance="norm", rescale=False)
    torch.testing.assert_close(after * c * length, before * length, rtol=0, atol=1e4 * ROUNDING)  # as above


@pytest.mark.parametrize("dominance", ["none", "norm"])
@pytest.mark.parametrize("k", range(2, 9))
def test_equal_gradients_weigh_exactly_one(k: int, dominance: str) -> None:
    """So that the step is, to the last bit, the one on the summed loss."""
    for row in torch.randn(20, 5):
        gram = gram_of(row.expand(k, 5))
        assert weights(gram, losses_of(gram), dominance=dominance).tolist() == [1] * k


@pytest.mark.parametrize("k", range(2, 9))
def test_equal_losses_and_gradients_weigh_exactly_one(k: int) -> None:
    for row in torch.randn(20, 5):
        loss = row.square().sum()
        assert weights(gram_of(row.expand(k, 5)), loss.expand(k)).tolist() == [1] * k


def test_no_gradient_at_all() -> None:
    assert weights(torch.zeros(3, 3), torch.ones(3)).tolist() == [1, 1, 1]


def test_function_gets_what_enters_the_combination() -> None:
    """The Gram matrix after dominance and the losses as they are, both float64."""
    seen: list[Tensor] = []

    def first(gram: Tensor, losses: Tensor) -> Tensor:
        seen.extend((gram, losses))
        return torch.tensor([1.0, 0.0])

    result = weights(torch.tensor([[4.0, 2.0], [2.0, 9.0]]), torch.tensor([2.0, 0.5]), combine=first, rescale=False)
    assert [t.dtype for t in (*seen, result)] == [torch.float64] * 3
    assert seen[0].tolist() == [[1, 2], [2, 36]]
    assert seen[1].tolist() == [2, 0.5]
    assert result.tolist() == [0.5, 0]


def test_name_and_function_are_the_same_door() -> None:
    gram = gram_of(torch.randn(3, 4))
    assert torch.equal(
        weights(gram, torch.ones(3)), weights(gram, torch.ones(3), combine=lambda gram, losses: min_norm(gram))
    )


@pytest.mark.parametrize("dominance", combine.DOMINANCE)
@pytest.mark.parametrize("name", combine.names())
def test_every_name_leads_to_a_method(name: str, dominance: str) -> None:
    gram = gram_of(torch.randn(3, 5))
    result = weights(gram, losses_of(gram), combine=name, dominance=dominance)
    assert result.dtype == torch.float64
    assert abs(result.abs().sum() - 3) <= 6 * EPS  # two sums of three terms


def test_unknown_names() -> None:
    options = ", ".join(map(repr, combine.names()))
    with pytest.raises(ValueError, match=f"^combine='max': expected one of {options}, or a function$"):
        weights(torch.eye(2), torch.ones(2), combine="max")
    with pytest.raises(ValueError, match=r"^dominance='exp': expected one of 'log', 'norm', 'none', 'ema'$"):
        weights(torch.eye(2), torch.ones(2), dominance="exp")


def test_neither_a_name_nor_a_function() -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"^combine=3: expected a name or a function \(gram, losses\) -> weights$"):
        weights(torch.eye(2), torch.ones(2), combine=wrong)
    with pytest.raises(TypeError, match=r"^dominance=3: expected a name or a function \(gram, losses\) -> scales$"):
        weights(torch.eye(2), torch.ones(2), dominance=wrong)


def test_negative_weights_are_rescaled_by_their_magnitude() -> None:
    """Their plain sum may vanish while the step does not."""
    gram = torch.eye(3)
    signs = torch.tensor([1.0, -1.0, 2.0])
    assert weights(gram, torch.ones(3), combine=lambda gram, losses: signs).tolist() == [0.75, -0.75, 1.5]
    signs[2] = 0
    assert weights(gram, torch.ones(3), combine=lambda gram, losses: signs).tolist() == [1.5, -1.5, 0]


def test_no_weight_at_all_is_no_step() -> None:
    assert weights(torch.eye(2), torch.ones(2), combine=lambda gram, losses: 0 * losses).tolist() == [0, 0]
