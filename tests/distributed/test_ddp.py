"""Replicas under DistributedDataParallel: identical to the last bit, and those of one process on the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch.optim import SGD, AdamW

from distill_optim import MoKDSGD, combine
from tests.distributed import ddp
from tests.distributed.ddp import FLAGS, OPTIMIZERS
from tests.distributed.models import FEW, WAYS
from tests.processes import Pool

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_flag = pytest.mark.parametrize("flags", FLAGS)


@every_flag
@pytest.mark.parametrize("way", WAYS)
@every_optimizer
def test_replicas_are_one_process_on_the_joined_batch(pool: Pool, name: str, way: str, flags: str) -> None:
    """50 steps."""
    pool.run(ddp.follows_one_process, OPTIMIZERS[name], way, FLAGS[flags])


@every_flag
@pytest.mark.parametrize("way", ["list", "joint_loss"])
@pytest.mark.parametrize("name", ["DOTSGD", "MoKDSGD"])
def test_each_loss_may_miss_parameters(pool: Pool, name: str, way: str, flags: str) -> None:
    pool.run(ddp.follows_one_process, OPTIMIZERS[name], way, FLAGS[flags], True, 1, FEW)


@every_flag
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("way", ["backward", "joint_loss"])
@pytest.mark.parametrize("name", ["DOTSGD", "MoKDSGD"])
def test_micro_batches_with_and_without_no_sync(pool: Pool, name: str, way: str, heads: bool, flags: str) -> None:
    pool.run(ddp.follows_one_process, OPTIMIZERS[name], way, FLAGS[flags], heads, 2, FEW)


RULES: dict[str, Callable[..., Any]] = {
    "famo": partial(MoKDSGD, lr=0.05, combine="famo"),
    "uncertainty": partial(MoKDSGD, lr=0.05, combine="uncertainty"),
    "every": partial(MoKDSGD, lr=0.05, every=3),
}


@every_flag
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_one_backward_pass_of_the_weighted_sum(pool: Pool, rule: str, heads: bool, flags: str) -> None:
    pool.run(ddp.walks_back_once, RULES[rule], False, FLAGS[flags], heads)


@every_flag
@pytest.mark.parametrize("heads", [False, True])
def test_through_a_tensor(pool: Pool, heads: bool, flags: str) -> None:
    pool.run(ddp.walks_back_once, partial(MoKDSGD, lr=0.05), True, FLAGS[flags], heads)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("rule", ["pcgrad", "gradvac", "random"])
def test_random_draws_are_those_of_the_first_process(pool: Pool, rule: str, heads: bool) -> None:
    make = partial(MoKDSGD, lr=0.05, losses=3, combine=combine.method(rule))
    pool.run(ddp.draws_the_same, make, heads)


@pytest.mark.parametrize("flags", ["default", "gradient_as_bucket_view", "find_unused_parameters"])
@every_optimizer
def test_a_loss_that_one_process_lacks_is_zero_there(pool: Pool, name: str, flags: str) -> None:
    pool.run(ddp.losses_come_and_go, OPTIMIZERS[name], FLAGS[flags])


@pytest.mark.parametrize("way", ["backward", "joint_loss"])
@every_optimizer
def test_scaling_and_clipping(pool: Pool, name: str, way: str) -> None:
    """An overflow of one loss in one process skips the step in all."""
    pool.run(ddp.clips_and_scales, OPTIMIZERS[name], way)


@pytest.mark.parametrize("when", ["before", "with"])
@pytest.mark.parametrize("name", ["DOTSGD", "MoKDSGD"])
def test_gradients_of_no_name_are_averaged_too(pool: Pool, name: str, when: str) -> None:
    pool.run(ddp.foreign_gradients_are_averaged, OPTIMIZERS[name], when)


@every_optimizer
def test_a_wrapper_is_not_needed(pool: Pool, name: str) -> None:
    pool.run(ddp.without_a_wrapper, OPTIMIZERS[name])


@pytest.mark.parametrize("flags", ["default", "gradient_as_bucket_view"])
@every_optimizer
def test_a_process_without_batches_follows_within_join(pool: Pool, name: str, flags: str) -> None:
    pool.run(ddp.batches_run_out, OPTIMIZERS[name], FLAGS[flags])


def test_join_takes_losses_in_step_only(pool: Pool) -> None:
    pool.run(ddp.joining_in_two_phases_is_refused)


def test_what_one_process_refuses_is_an_error_in_all(pool: Pool) -> None:
    pool.run(ddp.one_refuses_for_all)


def test_different_parameters_are_refused(pool: Pool) -> None:
    pool.run(ddp.different_parameters_are_refused)


def test_different_losses_are_refused_where_one_pass_has_to_do(pool: Pool) -> None:
    pool.run(ddp.different_losses_in_one_pass_are_refused)


def test_independent_processes_stay_apart(pool: Pool) -> None:
    pool.run(ddp.independent_processes_stay_apart)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("DOTSGD", partial(SGD, lr=0.05, weight_decay=1e-3, momentum=0.9)),
        ("DOTAdamW", partial(AdamW, lr=1e-3)),
        ("MoKDSGD", partial(SGD, lr=0.05, momentum=0.9)),
        ("MoKDAdamW", partial(AdamW, lr=1e-3)),
    ],
)
def test_the_untouched_loop_is_the_base(pool: Pool, name: str, base: Callable[..., Any]) -> None:
    pool.run(ddp.a_plain_step_is_the_base, OPTIMIZERS[name], base)


def test_averages_of_many_tensors(pool: Pool) -> None:
    pool.run(ddp.in_large_buckets)
