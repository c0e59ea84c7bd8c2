"""What holds of every method that has a name, and of which ones it does not."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from torch import Tensor

from distill_optim import combine, testing
from distill_optim.combine import names

MEMORY = tuple(name for name in names() if isinstance(combine.method(name), combine.Stateful))
# The order in which they visit the losses, or the weights themselves, are drawn.
DRAWN = ("pcgrad", "gradvac", "random")
CONFLICT_FREE = ("min_norm", "upgrad", "dualproj", "nash_mtl", "fairgrad")
# An eigenvalue counts as zero below a share of the largest: the weights jump where rounding takes one across.
JUMPS = ("aligned_mtl",)
# Weights that may be negative.
SIGNED = ("imtl_g", "config", "aligned_mtl")
LOOK_AT_THE_GRAM = tuple(name for name in names() if combine.uses_gram(combine.method(name)))
LOOK_AT_LOSSES = ("uncertainty", "gradnorm", "dwa", "famo", "gls", "stch")

every_method = pytest.mark.parametrize("name", names())


@every_method
@given(testing.with_losses(testing.gradients(1, 64)))
def test_weights_are_finite(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    """Zero rows, duplicates, opposed and dependent gradients, any rank, 12 orders of magnitude, K from 1 to 64."""
    testing.assert_defined(combine.method(name), *drawn)


@every_method
@given(testing.with_losses(testing.gradients(1, 12)))
def test_common_scale_does_not_matter(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    """f(c·G) = f(G) for c from 1e-30 to 1e30; for a power of two not a bit changes."""
    testing.assert_scale_invariant(combine.method(name), *drawn)


@pytest.mark.parametrize("name", [name for name in names() if name not in DRAWN + JUMPS])
@given(testing.with_losses(testing.gradients(2, 6)))
def test_order_of_the_losses_does_not_matter(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    testing.assert_permutation_equivariant(combine.method(name), *drawn)


@every_method
@given(testing.with_losses(testing.gradients(1, 12)))
def test_every_dtype_is_computed_in_float64(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    testing.assert_takes_any_dtype(combine.method(name), *drawn)


@pytest.mark.parametrize("name", LOOK_AT_THE_GRAM)
@given(testing.with_losses(testing.gradients(2, 10)))
def test_not_finite_in_not_finite_out(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    testing.assert_not_finite_in_not_finite_out(combine.method(name), *drawn)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", LOOK_AT_LOSSES)
def test_loss_that_is_not_finite_gives_no_weights(name: str, bad: float) -> None:
    rule, losses = combine.method(name), torch.tensor([1.0, bad, 2.0]).double()
    for dominance in ("none", "log"):
        weights = combine.weights(torch.eye(3), losses, combine=rule, dominance=dominance, rescale=False)
        # Those whose weights do not depend on the losses of the step itself give them, times a scale that may be nan.
        if name in ("gls", "stch", "gradnorm", "famo"):
            assert not weights.isfinite().any()


@pytest.mark.parametrize("name", [name for name in names() if name not in (*MEMORY, *DRAWN, *JUMPS, "pcgrad_average")])
@given(testing.with_losses(testing.gradients(2, 10)))
def test_batch_is_a_loop(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    testing.assert_batch_is_a_loop(combine.method(name), *drawn)


@pytest.mark.parametrize("name", CONFLICT_FREE)
@given(testing.slightly_conflicting_gradients())
def test_conflict_of_a_millionth_is_resolved(name: str, rows: Tensor) -> None:
    gram = testing.gram_of(rows)
    testing.assert_non_conflicting(combine.solve(name, gram, kind="gram"), gram)


@pytest.mark.parametrize("name", [name for name in names() if name not in SIGNED])
@given(testing.with_losses(testing.gradients(1, 20)))
def test_no_weight_is_negative(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    rows, losses = drawn
    assert (combine.solve(name, testing.gram_of(rows), losses, kind="gram") >= 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 64])
@pytest.mark.parametrize("name", [name for name in combine.names() if name not in ("random", "pcgrad", "gradvac")])
def test_equal_gradients_and_losses_weigh_the_same(name: str, k: int) -> None:
    """But for the methods that draw."""
    rows = torch.tensor([0.3, -1.7, 2.9]).expand(k, 3)
    weights = combine.weights(testing.gram_of(rows), torch.full((k,), 0.7), combine=name)
    # Exactly, so that the step is that of the summed loss; but for those that divide eigenvectors or orders.
    rough = name in ("aligned_mtl", "imtl_g", "config", "pcgrad_average", "nash_mtl", "fairgrad")
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-14 if rough else 0)


# In pairs: how many losses there are does not matter to the scales.
@pytest.mark.parametrize(("k", "dominance"), list(zip([1, 2, 3, 9, 32], itertools.cycle(combine.DOMINANCE))))
@every_method
def test_nothing_is_read_on_the_host(name: str, k: int, dominance: str) -> None:
    """Two steps, so that a memory is used; on tensors that claim to be on CUDA and have no data."""

    def two_steps(gram: Tensor, losses: Tensor) -> Tensor:
        state: combine.State = {}
        for _ in range(2):
            weights, state = combine.advance(gram, losses, state, combine=name, dominance=dominance)
        again = combine.observe(losses, state, combine=name)
        assert all(value.device.type == "cuda" for value in again.values())
        return weights

    result = testing.on_fake_cuda(lambda gram, losses: two_steps(gram.double(), losses.double()), (k, k), (k,))
    assert (result.shape, result.dtype, result.device.type) == ((k,), torch.float64, "cuda")


@pytest.mark.parametrize("name", MEMORY)
def test_some_of_the_losses_on_the_device(name: str) -> None:
    """Selecting and merging memories reads nothing either."""

    def some(gram: Tensor, losses: Tensor) -> Tensor:
        members = torch.arange(0, 4, 2, device=gram.device)
        whole = combine.initial(losses, combine=name, dominance="ema")
        part = combine.select(whole, members)
        weights, part = combine.advance(
            gram.index_select(0, members).index_select(1, members),
            losses.index_select(0, members),
            part,
            combine=name,
            dominance="ema",
        )
        combine.merge(whole, part, members)
        return weights

    assert testing.on_fake_cuda(lambda gram, losses: some(gram.double(), losses.double()), (4, 4), (4,)).shape == (2,)
