"""Strategies draw what their docstrings claim, and every assertion passes a right method and catches a wrong one."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from distill_optim import combine, testing
from distill_optim.combine import min_norm
from distill_optim.testing import gram_of
from distill_optim.testing.strategies import Relation
from tests.reference import min_norm as reference

Method = Callable[[Tensor, Tensor], Tensor]
Strategy = st.SearchStrategy[Tensor]

SMALL: dict[str, Strategy] = {
    "gradients": testing.gradients(1, 6),
    "independent": testing.independent_gradients(1, 6),
    "conflicting": testing.conflicting_gradients(1, 6),
    "slightly conflicting": testing.slightly_conflicting_gradients(1, 6),
    "stationary": testing.stationary_gradients(1, 6),
    "nearly stationary": testing.nearly_stationary_gradients(1, 6),
    "badly scaled": testing.badly_scaled_gradients(2, 6),
    "duplicate": testing.related_gradients("duplicate", 2, 6),
    "nearly equal": testing.related_gradients("nearly equal", 2, 6),
    "opposed": testing.related_gradients("opposed", 2, 6),
}
ANY = st.one_of(*SMALL.values())

few = settings(max_examples=settings().max_examples // 5)


def falsified(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> str:
    """What Hypothesis reports after at most 300 draws: the strategy meets the error, and the assertion sees it."""

    @settings(max_examples=300, database=None, deadline=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(strategy)
    def run(drawn: Any) -> None:
        check(drawn)

    with pytest.raises(AssertionError) as report:
        run()
    return str(report.value)


# Right and wrong methods. -----------------------------------------------------------------------------------------


def unit_min_norm(gram: Tensor, losses: Tensor) -> Tensor:
    """Min-norm of the unit vectors: blind to lengths."""
    gram = gram.double()
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(length == 0, 1, length).reciprocal()
    unit = gram * inverse[..., :, None] * inverse[..., None, :]
    return combine.min_norm(unit) * inverse


def guarded(gram: Tensor, losses: Tensor) -> Tensor:
    """An absolute guard."""
    shares = 1 / (gram.double().diagonal(dim1=-2, dim2=-1) + 1e-8)
    return shares / shares.sum(-1, keepdim=True)


def first_of_the_shortest(gram: Tensor, losses: Tensor) -> Tensor:
    """A tie is decided by position."""
    return torch.nn.functional.one_hot(gram.diagonal().argmin(), len(gram)).double()


def one_pass(gram: Tensor, losses: Tensor) -> Tensor:
    """Each gradient, in order, is added up and freed of its conflict with the sum so far."""
    weights = torch.zeros_like(losses)
    for i in range(len(losses)):
        slope = gram[i] @ weights
        weights[i] += 1 + torch.where(gram[i, i] > 0, (-slope).clamp_min(0) / gram[i, i], 0)
    return weights


def overlooks_small_conflicts(gram: Tensor, losses: Tensor) -> Tensor:
    """Min-norm if two gradients have a cosine below −1e-5, otherwise the first gradient alone."""
    length = gram.diagonal().sqrt()
    if (gram < -1e-5 * torch.outer(length, length)).any():
        return min_norm(gram)
    return torch.eye(len(gram)).double()[0]


def tilted(gram: Tensor, losses: Tensor) -> Tensor:
    """Min-norm, with one part in 1e6 moved to the mean."""
    weights = min_norm(gram)
    return weights + 1e-6 * (1 / len(gram) - weights)


def mean(gram: Tensor, losses: Tensor) -> Tensor:
    return torch.full_like(losses, 1 / losses.shape[-1], dtype=torch.float64)


# Assertions about weights. ----------------------------------------------------------------------------------------


@few
@given(ANY)
def test_min_norm_passes_all_that_is_said_of_its_weights(rows: Tensor) -> None:
    gram = gram_of(rows)
    weights = min_norm(gram)
    testing.assert_on_simplex(weights)
    testing.assert_on_simplex(weights * len(weights), total=len(weights))
    testing.assert_non_conflicting(weights, gram)
    testing.assert_kkt(weights, gram)
    testing.assert_same_vector(weights, weights, gram)


@pytest.mark.parametrize("k", [2, 9, 64])
def test_min_norm_passes_with_many_losses(k: int) -> None:
    """64 gradients, for which a rounding is more than for 31."""

    @few
    @given(testing.gradients(k, k) | testing.stationary_gradients(k, k) | testing.conflicting_gradients(k, k))
    def run(rows: Tensor) -> None:
        gram = gram_of(rows)
        testing.assert_on_simplex(min_norm(gram))
        testing.assert_non_conflicting(min_norm(gram), gram)
        testing.assert_kkt(min_norm(gram), gram)

    run()


@pytest.mark.parametrize("part", [1e-6, 1e-12])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_a_conflict_of_one_part_in_a_million_is_seen(part: float, length: float) -> None:
    """And of a million million; with a gradient that is a million times shorter or longer, too."""
    rows = torch.tensor([[1.0, 0.0], [-part, 1.0]], dtype=torch.float64) * torch.tensor([[1.0], [length]]).double()
    with pytest.raises(AssertionError, match=f"conflicts with loss 1: .* is -{part:.0e} of"):
        testing.assert_non_conflicting(torch.tensor([1.0, 0.0]), gram_of(rows))


def test_small_conflicts_are_met() -> None:
    falsified(
        testing.slightly_conflicting_gradients(),
        lambda rows: testing.assert_non_conflicting(
            overlooks_small_conflicts(gram_of(rows), rows[:, 0]), gram_of(rows)
        ),
    )


@pytest.mark.parametrize("strategy", ["gradients", "conflicting", "stationary", "badly scaled", "opposed"])
def test_the_mean_conflicts(strategy: str) -> None:
    falsified(
        SMALL[strategy], lambda rows: testing.assert_non_conflicting(mean(gram_of(rows), rows[:, 0]), gram_of(rows))
    )


def test_a_long_gradient_does_not_excuse_a_conflict_with_a_short_one() -> None:
    rows = torch.tensor([[1e12, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    with pytest.raises(AssertionError, match="conflicts with loss 1"):
        testing.assert_non_conflicting(torch.ones(2), gram_of(rows))


def test_what_is_zero_as_far_as_the_gram_matrix_can_tell_conflicts_with_none() -> None:
    """The long ones cancel, up to 2e-14 of their lengths: the square of that is lost in G, its sign is not."""
    rows = torch.tensor([[1e6, 0.0], [-1e6, 0.0], [1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5 + 2e-14, 0.0], dtype=torch.float64)
    testing.assert_non_conflicting(weights, gram_of(rows))
    with pytest.raises(AssertionError, match="conflicts with loss"):
        testing.assert_non_conflicting(weights + torch.tensor([0, 1e-6, 0]), gram_of(rows))


def test_long_gradients_have_more_roundings() -> None:
    gram = torch.tensor([[1.0, -1e-13], [-1e-13, 1.0]], dtype=torch.float64)
    first = torch.tensor([1.0, 0.0])
    testing.assert_non_conflicting(first, gram, elements=1000)
    with pytest.raises(AssertionError, match="conflicts with loss 1"):
        testing.assert_non_conflicting(first, gram)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_pass_nothing(bad: float) -> None:
    weights, gram = torch.tensor([0.5, bad]), torch.ones(2, 2)
    checks: tuple[Callable[[], None], ...] = (
        lambda: testing.assert_same_vector(weights, weights, gram),
        lambda: testing.assert_non_conflicting(weights, gram),
        lambda: testing.assert_kkt(weights, gram),
        lambda: testing.assert_on_simplex(weights),
        lambda: testing.assert_positive(weights),
        lambda: testing.assert_defined(lambda gram, losses: weights.double(), gram),
    )
    for check in checks:
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize(
    "weights", [[0.5, 0.500001], [-1e-30, 1.0], [0.5, 0.5 - 1e-14], [1.0, 1.0], [0.0, 0.0], [0.5, -0.5]]
)
def test_off_the_simplex(weights: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"^(weight . is -|the weights sum to)"):
        testing.assert_on_simplex(torch.tensor(weights, dtype=torch.float64))


def test_simplex_of_a_batch_and_of_another_dtype() -> None:
    shares = torch.rand(5, 30)
    testing.assert_on_simplex(shares / shares.sum(-1, keepdim=True))  # float32: its own roundings
    shares[3] *= 1.00001
    with pytest.raises(AssertionError, match="sum to"):
        testing.assert_on_simplex(shares / shares[:3].sum(-1).mean())


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1e-30, 1.0]])
def test_not_positive(weights: list[float]) -> None:
    with pytest.raises(AssertionError, match="not positive"):
        testing.assert_positive(torch.tensor(weights))
    testing.assert_positive(torch.tensor(weights) + 1)


def test_another_vector() -> None:
    gram = gram_of(torch.tensor([[1.0, 0.0], [1.0, 1e-5]]))
    testing.assert_same_vector(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), gram)
    with pytest.raises(AssertionError, match=r"^vectors 1e-05 apart, 1e-05 of their reach"):
        testing.assert_same_vector(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), gram)


@pytest.mark.parametrize("strategy", ["independent", "conflicting", "badly scaled"])
def test_one_part_in_a_million_off_the_optimum_is_seen(strategy: str) -> None:
    message = falsified(
        SMALL[strategy], lambda rows: testing.assert_kkt(tilted(gram_of(rows), rows[:, 0]), gram_of(rows))
    )
    assert "would improve on these weights" in message


@few
@given(testing.independent_gradients(1, 6), st.data())
def test_kkt_of_non_negative_least_squares(rows: Tensor, data: st.DataObject) -> None:
    """min ‖Jᵀw − t‖², w ≥ l: what another solver finds passes, and a part in 1e6 beside it does not."""
    k = len(rows)
    rows = rows / rows.norm(dim=1, keepdim=True)
    target, lower = (torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=k, max_size=k))) for _ in "tl")
    x, _ = nnls(rows.T.numpy(), (target - lower.double() @ rows).numpy())
    weights, gram = torch.from_numpy(x) + lower, gram_of(rows)
    options: dict[str, Any] = {"linear": -rows @ target.double(), "lower": lower, "total": None}
    testing.assert_kkt(weights, gram, **options)
    with pytest.raises(AssertionError, match="would improve on these weights"):
        testing.assert_kkt(weights + 1e-6 * (1 + lower.abs().sum()), gram, **options)
    with pytest.raises(AssertionError, match=r"below its bound|would improve on these weights"):
        testing.assert_kkt(weights - 1e-6 * (1 + lower.abs().sum()), gram, **options)


def test_kkt_sees_the_constraints() -> None:
    gram = torch.eye(2).double()
    with pytest.raises(AssertionError, match=r"^the weights sum to 1.000000000000022, not 1$"):
        testing.assert_kkt(torch.tensor([0.5, 0.5 + 2.2e-14], dtype=torch.float64), gram)
    with pytest.raises(AssertionError, match=r"^weight 0 is 1e-20 below its bound$"):
        testing.assert_kkt(torch.tensor([-1e-20, 1.0], dtype=torch.float64), gram)
    testing.assert_kkt(torch.tensor([0.7, 0.3]).double(), gram, lower=torch.tensor([0.7, 0.0]).double())


def test_gradients_in_place_of_their_gram_matrix() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="the Gram matrix is not symmetric"):
        testing.assert_non_conflicting(torch.ones(2), rows)
    with pytest.raises(
        ValueError, match=r"expected weights \(K,\) and a Gram matrix \(K, K\), got \[\(2,\)\] and \(2, 3"
    ):
        testing.assert_kkt(torch.ones(2), torch.ones(2, 3))


# Assertions about methods. ----------------------------------------------------------------------------------------

BEHAVIOURS: dict[str, Callable[..., None]] = {
    "defined": testing.assert_defined,
    "scale": testing.assert_scale_invariant,
    "permutation": testing.assert_permutation_equivariant,
    "not finite": testing.assert_not_finite_in_not_finite_out,
    "batch": testing.assert_batch_is_a_loop,
    "dtype": testing.assert_takes_any_dtype,
}


@pytest.mark.parametrize("behaviour", ["defined", "scale", "permutation", "batch", "dtype"])
@few
@given(testing.with_losses(ANY))
def test_min_norm_passes(behaviour: str, drawn: tuple[Tensor, Tensor]) -> None:
    BEHAVIOURS[behaviour]("min_norm", *drawn)


@few
@given(ANY)
def test_min_norm_of_unit_vectors_is_blind_to_lengths(rows: Tensor) -> None:
    testing.assert_invariant_to_row_scaling(unit_min_norm, rows)
    testing.assert_scale_invariant(unit_min_norm, rows, degree=-0.5)


@few
@given(testing.with_losses(ANY))
def test_methods_of_the_losses_pass(drawn: tuple[Tensor, Tensor]) -> None:
    """The losses move with the gradients, and have their unit."""

    def inverse(gram: Tensor, losses: Tensor) -> Tensor:
        return 1 / losses.double()

    testing.assert_permutation_equivariant(inverse, *drawn)
    testing.assert_invariant_to_row_scaling(inverse, *drawn)
    testing.assert_batch_is_a_loop(inverse, *drawn)


def test_a_tie_of_any_two_losses_is_seen() -> None:
    for tie in combinations(range(4), 2):
        lengths = torch.full((4,), 2.0)
        lengths[list(tie)] = 1
        with pytest.raises(AssertionError, match=r"losses (moved on|the first two|reversed)"):
            testing.assert_permutation_equivariant(first_of_the_shortest, lengths.diag())


WRONG: dict[str, tuple[str, Method, str]] = {
    "division by a length of zero": ("defined", lambda gram, losses: 1 / gram.diagonal(), "not finite"),
    "another dtype": ("defined", lambda gram, losses: gram.diagonal().float(), "weights in torch.float32"),
    "another shape": ("defined", lambda gram, losses: gram, "weights of shape"),
    "one weight for all": ("defined", lambda gram, losses: losses.sum(), "weights of shape"),
    "an absolute guard": ("scale", guarded, "c = "),
    "an absolute threshold": (
        "scale",
        lambda gram, losses: torch.where(gram.diagonal() > 1e-20, 1.0, 0.0).double(),
        "c = ",
    ),
    "a large absolute threshold": (
        "scale",
        lambda gram, losses: torch.where(gram.diagonal() > 1e20, 1.0, 0.5).double(),
        "c = ",
    ),
    "not normalised": ("scale", unit_min_norm, "c = "),
    "argmin": ("permutation", first_of_the_shortest, "losses (moved on|the first two|reversed)"),
    "one pass": ("permutation", one_pass, "losses (moved on|the first two|reversed)"),
    "only the first": (
        "permutation",
        lambda gram, losses: torch.eye(len(losses)).double()[0],
        "losses (moved on|the first two|reversed)",
    ),
    "losses that stay": (
        "permutation",
        lambda gram, losses: torch.arange(1.0, len(losses) + 1).double(),
        "losses (moved on|the first two|reversed)",
    ),
    "a silent default": ("not finite", lambda gram, losses: min_norm(gram).nan_to_num(0.5), "in gradient 0, weights"),
    "one weight alone": ("not finite", lambda gram, losses: gram.diagonal(), "nan in gradient 0, weights"),
    "clamped": ("not finite", lambda gram, losses: min_norm(gram.clamp(-1e9, 1e9)), "inf in gradient 0, weights"),
    "common scale": (
        "batch",
        lambda gram, losses: gram.diagonal(dim1=-2, dim2=-1) / gram.amax(),
        "problem . of a batch",
    ),
    "another dimension": ("batch", lambda gram, losses: gram.double().sum(0), "weights of shape|problem . of a"),
    "the first problem for all": (
        "batch",
        lambda gram, losses: min_norm(gram.reshape(-1, *gram.shape[-2:])[0]).expand(losses.shape),
        "problem . of a batch",
    ),
    "dtype of the input": ("dtype", lambda gram, losses: gram.diagonal(dim1=-2, dim2=-1), "weights in torch.float32"),
    "computed in the dtype of the input": (
        "dtype",
        lambda gram, losses: (gram.sum(-1) / 3).double(),
        "from its numbers in float64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_is_caught(name: str) -> None:
    behaviour, method, message = WRONG[name]
    assert re.search(message, falsified(ANY, lambda rows: BEHAVIOURS[behaviour](method, rows)))


@pytest.mark.parametrize("name", ["min_norm", "mean"])
def test_methods_that_depend_on_lengths(name: str) -> None:
    falsified(ANY, lambda rows: testing.assert_invariant_to_row_scaling(combine.method(name), rows))


def test_losses_that_are_not_finite_have_to_show_where_they_are_looked_at() -> None:
    def of_losses(gram: Tensor, losses: Tensor) -> Tensor:
        return losses.double().softmax(-1) + 0 * (losses.sum() + gram.sum())

    testing.assert_not_finite_in_not_finite_out(of_losses, torch.eye(2), in_losses=True)
    with pytest.raises(AssertionError, match="nan in loss 0, weights"):
        testing.assert_not_finite_in_not_finite_out("min_norm", torch.eye(3), in_losses=True)


def test_a_method_that_never_looks_at_gradients_need_not_show_that_they_are_not_finite() -> None:
    marked = combine.losses_only(lambda gram, losses: losses.double().softmax(-1) + 0 * losses.sum())
    testing.assert_not_finite_in_not_finite_out(marked, torch.eye(3), in_losses=True)


def test_an_exception_of_the_method_is_not_swallowed() -> None:
    def refuses(gram: Tensor, losses: Tensor) -> Tensor:
        diagonal: Tensor = torch.linalg.cholesky(gram).diagonal()
        return diagonal

    with pytest.raises(RuntimeError, match="not positive-definite"):
        testing.assert_not_finite_in_not_finite_out(refuses, torch.eye(2))


def test_gradients_and_losses_are_left_as_they_were() -> None:
    rows, losses = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for check in BEHAVIOURS.values():
        check("min_norm", rows, losses)
    testing.assert_invariant_to_row_scaling(unit_min_norm, rows, losses)
    assert rows._version == losses._version == 0


def test_random_methods_see_the_same_numbers_in_every_call() -> None:
    state = torch.get_rng_state()
    for check in (testing.assert_scale_invariant, testing.assert_takes_any_dtype):
        check(lambda gram, losses: torch.rand(len(losses)).double(), torch.randn(4, 3))
        torch.set_rng_state(state)
    testing.assert_defined(lambda gram, losses: torch.rand(2).double(), torch.eye(2))
    assert torch.equal(torch.get_rng_state(), state)


@dataclass(frozen=True)
class Halves(combine.Stateful):
    """A rule with a memory: weight 2⁻ᵗ in step t."""

    on_host: bool = False

    def init(self, losses: Tensor) -> combine.State:
        return {"weights": torch.ones_like(losses, dtype=torch.float64)}

    def __call__(self, gram: Tensor, losses: Tensor, state: combine.State) -> tuple[Tensor, combine.State]:
        weights = state["weights"] / 2
        if self.on_host:
            weights = weights * weights.sum().item()
        return weights, {"weights": weights}


def test_rules_with_a_memory_are_called_with_a_fresh_one() -> None:
    for check in (testing.assert_defined, testing.assert_scale_invariant, testing.assert_takes_any_dtype):
        check(Halves(), torch.eye(3))
    testing.assert_no_host_read(Halves())
    with pytest.raises(AssertionError, match="the host reads a value"):
        testing.assert_no_host_read(Halves(on_host=True))


@pytest.mark.parametrize(("k", "batch"), [(1, ()), (2, (2, 3)), (9, ())])
def test_min_norm_reads_nothing_on_the_host(k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read("min_norm", k, batch)


@pytest.mark.parametrize(
    ("culprit", "message"),
    [
        (lambda gram, losses: losses if losses.sum() > 0 else -losses, "the host reads a value"),
        (lambda gram, losses: losses * float(losses[0]), "a read: __float__"),
        (lambda gram, losses: losses * gram[0, 0].item(), "the host reads a value"),
        (lambda gram, losses: losses * losses.numpy().max(), "a read: numpy"),
        (lambda gram, losses: losses * len(losses.nonzero()), "a read: nonzero"),
        (lambda gram, losses: gram.masked_select(gram > 0), "the host waits for a shape"),
        (lambda gram, losses: gram[losses > 0].sum(0), "a mask"),
        (lambda gram, losses: gram[losses.argmax()], "a position that the host has to read"),
        (lambda gram, losses: losses[[2, 1, 0]], "positions that the host sends"),
        (lambda gram, losses: losses * torch.tensor([1.0, 2.0, 3.0]), "on cpu"),
        (lambda gram, losses: torch.linalg.eigh(gram)[0], "the error code of a decomposition"),
        (lambda gram, losses: torch.linalg.svdvals(gram), "the error code of a decomposition"),
        (lambda gram, losses: torch.linalg.pinv(gram)[0], "the error code of a decomposition"),
        (lambda gram, losses: torch.linalg.eigvals(gram).real, "the error code of a decomposition"),
        (lambda gram, losses: torch.linalg.inv(gram)[0], "the error code of a decomposition"),
        (lambda gram, losses: losses, "torch.float32 on cuda"),
        (lambda gram, losses: gram.double(), r"weights of shape \(3, 3\)"),
    ],
)
def test_a_host_read_is_caught(culprit: Method, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.assert_no_host_read(culprit)


def test_what_does_not_wait_for_the_device_passes() -> None:
    def sorted_and_back(gram: Tensor, losses: Tensor) -> Tensor:
        order = losses.argsort()
        gram = gram.double()[order][:, order] + gram[order, order][:, None] + gram[..., None, 0] + gram[-1][1:].sum()
        solved: Tensor = torch.linalg.solve_ex(gram, gram).result
        return gram.sum(-1)[order.argsort()] + solved[0] + gram[:, order[:1]][:, 0]

    testing.assert_no_host_read(sorted_and_back, 4)


# Strategies. ------------------------------------------------------------------------------------------------------


@few
@given(testing.conflicting_gradients(2, 64))
def test_conflicting(rows: Tensor) -> None:
    """Every row has another at a cosine of −0.6 or below; all of it in integers, so exact."""
    gram = gram_of(rows)
    strongly = (gram < 0) & (25 * gram**2 >= 9 * torch.outer(gram.diagonal(), gram.diagonal()))
    assert strongly.any(1).all()


@few
@given(testing.slightly_conflicting_gradients(2, 64))
def test_slightly_conflicting(rows: Tensor) -> None:
    gram, k = gram_of(rows), len(rows)
    length = gram.diagonal().sqrt()
    cosines = (gram / torch.outer(length, length))[~torch.eye(k).bool()]
    assert (cosines < -1e-6 / k).all()
    assert (cosines > -1 / k).all()


@given(testing.stationary_gradients(1, 4))
def test_stationary(rows: Tensor) -> None:
    """In rational arithmetic the shortest vector is zero."""
    assert reference.squared_norm(reference.exact(rows.double().numpy()), rows.double().numpy()) == 0


@few
@given(testing.stationary_gradients(5, 64))
def test_many_stationary(rows: Tensor) -> None:
    gram = gram_of(rows)
    testing.assert_same_vector(min_norm(gram), torch.zeros(len(rows)), gram)


@given(testing.nearly_stationary_gradients(1, 4))
def test_nearly_stationary(rows: Tensor) -> None:
    """In rational arithmetic the shortest vector has the first element of each row, and nothing else."""
    weights, exact = reference.exact(rows.double().numpy()), [[Fraction(x) for x in row] for row in rows.tolist()]
    shortest = [sum((w * x for w, x in zip(weights, column, strict=True)), Fraction()) for column in zip(*exact)]  # noqa: B905
    assert shortest == [exact[0][0], *[0] * (len(shortest) - 1)]
    assert shortest[0] > 0


@few
@given(testing.badly_scaled_gradients(2, 64))
def test_badly_scaled(rows: Tensor) -> None:
    lengths = rows.double().norm(dim=1)
    assert lengths.amax() > 1e12 * lengths.amin() > 0


@few
@given(testing.independent_gradients(1, 64))
def test_independent(rows: Tensor) -> None:
    """The condition number that the docstring proves, before the scaling and, up to 2, of unit rows."""
    k = len(rows)
    unit = rows / rows.norm(dim=1, keepdim=True)
    before = rows / (rows.diagonal() / (2 * k))[:, None]
    assert torch.linalg.cond(before) <= 2 * k**1.5 * (1 + 1e-9)
    assert torch.linalg.cond(unit) <= 4 * k**1.5
    lengths = before.norm(dim=1)
    assert lengths.amax() <= 2 * lengths.amin()


def related(relation: Relation, a: Tensor, b: Tensor) -> bool:
    """Whether b stands in the relation to a."""
    a, b = a.double(), b.double()
    if relation == "zero":
        return not b.any()
    if relation == "duplicate":
        return torch.equal(a, b)
    if relation == "nearly equal":
        return bool((a - b).norm() <= (0.125 + 0.01) * a.norm())  # and the rounding of bfloat16
    sign = -1 if relation == "opposed" else 1
    return any(torch.equal(sign * 2.0**e * a, b) for e in range(-3, 4))


@pytest.mark.parametrize("relation", ["zero", "duplicate", "nearly equal", "parallel", "opposed"])
@few
@given(st.data())
def test_related(relation: Relation, data: st.DataObject) -> None:
    rows = data.draw(testing.related_gradients(relation, 2, 8))
    assert any(related(relation, a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j)


def test_unknown_relation() -> None:
    with pytest.raises(ValueError, match=r"^relation='equal': expected one of 'zero', 'duplicate', "):
        find(testing.related_gradients("equal"), lambda rows: True)  # type: ignore[arg-type]


@few
@given(testing.losses(5))
def test_losses_are_positive(losses: Tensor) -> None:
    assert losses.shape == (5,)
    assert losses.dtype == torch.float64
    assert ((losses >= 2.0**-40) & (losses <= 2.0**40)).all()


@few
@given(testing.with_losses(ANY))
def test_a_loss_for_each_gradient(drawn: tuple[Tensor, Tensor]) -> None:
    rows, losses = drawn
    assert losses.shape == (len(rows),)


@pytest.mark.parametrize("name", SMALL)
@few
@given(st.data())
def test_gradients_are_finite_and_short(name: str, data: st.DataObject) -> None:
    rows = data.draw(SMALL[name])
    assert rows.isfinite().all()
    assert 1 <= len(rows) <= 6
    assert 1 <= rows.shape[1] <= len(rows) + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", [testing.gradients, testing.conflicting_gradients, testing.badly_scaled_gradients])
def test_dtypes(strategy: Callable[..., Strategy], dtype: torch.dtype) -> None:
    @settings(max_examples=5)
    @given(strategy(dtypes=(dtype,)))
    def run(rows: Tensor) -> None:
        assert rows.dtype == dtype

    run()


def conflict(rows: Tensor) -> bool:
    return bool((gram_of(rows) < 0).any())


@pytest.mark.parametrize(
    ("strategy", "condition", "smallest"),
    [
        (testing.gradients(2, 6), conflict, [[1], [-1]]),
        (testing.conflicting_gradients(2, 6), lambda rows: rows.shape[1] > 1, [[6, 0], [-6, 0]]),
        (testing.nearly_stationary_gradients(1, 4), lambda rows: bool(rows[0, 0] < 0.1), [[0.0625, 0]]),
        (testing.independent_gradients(2, 6), conflict, [[4, 0], [-1, 4]]),
        (testing.losses(3), lambda losses: bool(losses[1] > 100), [1, 2**6.75, 1]),
    ],
)
def test_examples_shrink(strategy: Strategy, condition: Callable[[Tensor], bool], smallest: list[Any]) -> None:
    found = find(strategy, condition, settings=settings(max_examples=100, derandomize=True, database=None))
    assert torch.equal(found, torch.tensor(smallest, dtype=torch.float64))


# The package. -----------------------------------------------------------------------------------------------------


def test_hypothesis_is_needed_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.split(".")[0] == "distill_optim"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("distill_optim")
    assert "distill_optim.testing" not in sys.modules
    message = 'distill_optim.testing needs hypothesis: pip install "distill_optim[test]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        importlib.import_module("distill_optim.testing")


def test_every_public_name_is_listed() -> None:
    submodules = {"assertions", "fake_cuda", "strategies", "annotations"}
    assert set(testing.__all__) == {name for name in vars(testing) if name[0] != "_"} - submodules
