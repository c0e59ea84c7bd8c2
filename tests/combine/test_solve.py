"""The maths alone: what solve takes, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from distill_optim import combine
from distill_optim.combine import solve

ROWS = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 0.0]], dtype=torch.float64)
LOSSES = torch.tensor([0.5, 2.0])


@pytest.mark.parametrize("name", [name for name in combine.names() if name not in ("random", "pcgrad", "gradvac")])
def test_list_jacobian_and_gram_matrix_are_the_same(name: str) -> None:
    expected = solve(name, ROWS @ ROWS.T, LOSSES)
    # Inner products summed in another order.
    torch.testing.assert_close(solve(name, ROWS, LOSSES), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(solve(name, list(ROWS), LOSSES), expected, rtol=1e-14, atol=0)


def test_square_jacobian_is_one_unless_it_is_symmetric() -> None:
    square = torch.tensor([[3.0, 1.0], [0.0, 0.5]])
    assert torch.equal(solve("min_norm", square), solve("min_norm", square @ square.T))
    symmetric = torch.diag(torch.tensor([3.0, 0.5]))
    assert torch.equal(solve("min_norm", symmetric), combine.min_norm(symmetric))
    assert torch.equal(solve("min_norm", symmetric, kind="jacobian"), combine.min_norm(symmetric @ symmetric))
    assert torch.equal(solve("min_norm", square, kind="gram"), combine.min_norm(square))


def test_gram_matrix_with_nan_is_one() -> None:
    gram = torch.eye(2)
    gram[0, 0] = torch.nan
    assert not solve("upgrad", gram).isfinite().any()


@pytest.mark.parametrize("name", ["famo", "gls", "stch"])
def test_published_form_of_the_methods_of_logs(name: str) -> None:
    expected = combine.weights(ROWS @ ROWS.T, LOSSES, combine=name, dominance="log", rescale=False)
    assert torch.equal(solve(name, ROWS @ ROWS.T, LOSSES), expected)


@pytest.mark.parametrize("name", ["pcgrad", "dwa", "mean"])
def test_published_form_of_the_others(name: str) -> None:
    expected = combine.weights(ROWS @ ROWS.T, LOSSES, combine=name, dominance="none", rescale=False)
    assert torch.equal(solve(name, ROWS @ ROWS.T, LOSSES), expected)


def test_options() -> None:
    half = partial(combine.cagrad, c=0.25)
    assert torch.equal(solve(half, ROWS), combine.cagrad(combine.gram([[row] for row in ROWS]), c=0.25))
    assert solve("mean", ROWS, rescale=True).tolist() == [1, 1]
    assert solve("mean", ROWS, LOSSES, dominance="log").tolist() == [1, 0.25]


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "dwa", "famo", "gls", "stch"])
def test_losses_that_are_needed(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^losses: combine='{name}' needs the values of the 2 losses$"):
        solve(name, ROWS)


def test_losses_that_are_not() -> None:
    for name in ("gradvac", "min_norm", "random", "sum"):
        assert solve(name, ROWS).shape == (2,)


@pytest.mark.parametrize(
    ("gradients", "options", "message"),
    [
        ([], {}, "^gradients: expected K tensors of one shape, a Jacobian or a Gram matrix$"),
        ([torch.ones(2), torch.ones(3)], {}, "^gradients: expected K tensors of one shape"),
        ([torch.ones(2), 3], {}, "^gradients: expected K tensors of one shape"),
        (torch.ones(3), {}, r"^gradients: expected a matrix of K rows, got shape \(3,\)$"),
        (torch.ones(0, 2), {}, r"^gradients: expected a matrix of K rows, got shape \(0, 2\)$"),
        (torch.ones(2, 3), {"kind": "gram"}, r"^gradients: a Gram matrix is square, got shape \(2, 3\); see kind=$"),
        (torch.ones(2, 3), {"kind": "rows"}, "^kind='rows': expected 'auto', 'jacobian' or 'gram'$"),
        (torch.ones(2, 3), {"losses": torch.ones(3)}, r"^losses: expected a tensor of shape \(2,\), got \(3,\)$"),
        (torch.ones(2, 3), {"dominance": "log"}, "^losses: combine='min_norm' needs the values of the 2 losses$"),
    ],
)
def test_what_is_refused(gradients: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve("min_norm", gradients, **options)
