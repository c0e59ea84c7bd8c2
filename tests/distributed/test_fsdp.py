"""Parameters sharded by FSDP2: those of one process on the joined batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from distill_optim import MoKDSGD
from tests.distributed import fsdp
from tests.distributed.ddp import OPTIMIZERS
from tests.distributed.models import STEPS, WAYS
from tests.processes import Pool

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture(scope="module")
def four(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    four = Pool(tmp_path_factory.mktemp("four"), world=4)
    yield four
    four.stop()


@pytest.mark.parametrize("way", WAYS)
@every_optimizer
def test_shards_are_one_process_on_the_joined_batch(pool: Pool, name: str, way: str) -> None:
    """50 steps."""
    pool.run(fsdp.follows_one_process, OPTIMIZERS[name], way, steps=STEPS)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("way", ["backward", "joint_loss"])
@pytest.mark.parametrize("name", ["DOTSGD", "MoKDSGD"])
def test_micro_batches_and_losses_that_miss_parameters(pool: Pool, name: str, way: str, heads: bool) -> None:
    pool.run(fsdp.follows_one_process, OPTIMIZERS[name], way, heads=heads, micro=2)


@pytest.mark.parametrize("way", ["list", "joint_loss"])
@pytest.mark.parametrize("reshard", [True, False])
def test_parameters_that_stay_whole_after_the_forward(pool: Pool, way: str, reshard: bool) -> None:
    options = {"reshard_after_forward": reshard}
    pool.run(fsdp.follows_one_process, OPTIMIZERS["MoKDSGD"], way, options=options)


@pytest.mark.parametrize("way", ["list", "joint_loss"])
@every_optimizer
def test_shards_that_are_replicated(four: Pool, name: str, way: str) -> None:
    """A mesh of 2 × 2: sharded over one dimension, copied along the other (HSDP)."""
    four.run(fsdp.follows_one_process, OPTIMIZERS[name], way, (2, 2), heads=True)


@pytest.mark.parametrize("way", ["list", "joint_loss"])
@every_optimizer
def test_layers_that_are_split_too(four: Pool, name: str, way: str) -> None:
    """A mesh of 2 × 2: FSDP2 over one dimension, tensor parallel over the other."""
    four.run(fsdp.splits_layers_too, OPTIMIZERS[name], way)


@pytest.mark.parametrize("rule", ["famo", "uncertainty"])
def test_methods_of_the_values_alone(pool: Pool, rule: str) -> None:
    pool.run(fsdp.follows_one_process, partial(MoKDSGD, lr=0.05, combine=rule), "list", heads=True)


@pytest.mark.parametrize("rule", ["pcgrad", "gradvac", "random"])
def test_random_draws_are_those_of_the_first_process(pool: Pool, rule: str) -> None:
    pool.run(fsdp.draws_the_same, partial(MoKDSGD, lr=0.05, losses=3, combine=rule))


@pytest.mark.parametrize("way", ["backward", "joint_loss"])
@every_optimizer
def test_scaling_and_clipping(pool: Pool, name: str, way: str) -> None:
    """An overflow of one loss in one process skips the step in all."""
    pool.run(fsdp.clips_and_scales, OPTIMIZERS[name], way)


@pytest.mark.parametrize("name", ["DOTSGD", "MoKDSGD"])
def test_parameters_that_stay_whole_between_the_passes(pool: Pool, name: str) -> None:
    pool.run(fsdp.gathers_once, OPTIMIZERS[name])


@every_optimizer
def test_an_edit_in_one_shard_is_one_of_the_parameter(pool: Pool, name: str) -> None:
    pool.run(fsdp.edits_one_shard, OPTIMIZERS[name])


def test_one_backward_pass_is_refused(pool: Pool) -> None:
    pool.run(fsdp.one_pass_is_refused)


def test_gradients_that_are_not_reduced_are_refused(pool: Pool) -> None:
    pool.run(fsdp.gradients_that_are_not_reduced_are_refused)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "famo"])
def test_a_checkpoint_of_two_processes_is_loaded_by_two_and_four(
    pool: Pool, four: Pool, tmp_path: Path, name: str, flat: bool
) -> None:
    make = OPTIMIZERS[name] if name in OPTIMIZERS else partial(MoKDSGD, lr=0.05, momentum=0.9, combine="famo")
    pool.run(fsdp.saves, make, str(tmp_path), flat)
    for processes in pool, four:
        processes.run(fsdp.loads, make, str(tmp_path), flat)
