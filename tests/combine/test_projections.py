"""What UPGrad and DualProj, the two that project onto the dual cone, have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from distill_optim import testing
from distill_optim.combine import dualproj, upgrad

pytestmark = pytest.mark.parametrize("method", [dualproj, upgrad], ids=["dualproj", "upgrad"])
Method = Callable[..., Tensor]


@pytest.mark.parametrize("preferred", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_dtypes_batches_and_what_is_not_finite(method: Method, k: int, preferred: bool) -> None:
    chosen, rows = partial(method, preference=[2.0, *[0.5] * (k - 1)] if preferred else None), torch.randn(k, 5)
    testing.assert_takes_any_dtype(chosen, rows)
    testing.assert_batch_is_a_loop(chosen, rows)
    testing.assert_not_finite_in_not_finite_out(chosen, rows)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32, 64])
def test_equal_gradients_weigh_the_same(method: Method, k: int) -> None:
    row = torch.tensor([0.3, -1.7, 2.9], dtype=torch.float64)
    weights = method((row @ row).expand(k, k))
    assert weights.tolist() == [1 / k] * k


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
def test_nothing_is_read_on_the_host(method: Method, k: int, batch: tuple[int, ...]) -> None:
    testing.assert_no_host_read(method, k, batch)
    testing.assert_no_host_read(partial(method, preference=[1.0] * k), k, batch)


def test_preference_of_another_number(method: Method) -> None:
    with pytest.raises(ValueError, match=r"^preference: expected one for each of 3 losses, got 2$"):
        method(torch.eye(3), preference=[1.0, 2.0])
