"""Faults: a process that is killed, and a batch that is not finite."""

from __future__ import annotations

import copy
import math
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from tests import killed
from tests.helpers import OURS, assert_same_bits, assert_same_tree, batches, flat, student, two_losses

BASES: dict[Any, Any] = {DOTSGD: SGD, DOTAdamW: AdamW, MoKDSGD: SGD, MoKDAdamW: AdamW}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


# ------------------------------------------------------------------------------------------------ a killed process


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that nobody disturbed, and one that was killed in the middle of a step and of writing a checkpoint."""
    folder = tmp_path_factory.mktemp("killed")

    def train_until(moment: str) -> None:
        command = [sys.executable, "-m", "tests.killed", str(folder), moment]
        process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
        assert process.returncode == -signal.SIGKILL, process.stderr

    train_until("step 6")
    train_until("saving 8")
    assert (folder / "checkpoint.unfinished").exists()
    assert torch.load(folder / "checkpoint.pt")["step"] == 4
    return killed.run(tmp_path_factory.mktemp("undisturbed")), killed.run(folder)


@pytest.mark.parametrize("variant", killed.VARIANTS)
def test_a_killed_run_resumes_bit_for_bit(results: tuple[dict[str, Any], dict[str, Any]], variant: str) -> None:
    """From the last whole checkpoint: parameters, running statistics, buffers and what the rules of MoKD remember."""
    undisturbed, resumed = (result[variant] for result in results)
    assert_same_tree(undisturbed[0], resumed[0])
    assert_same_tree(undisturbed[1], resumed[1])


# ------------------------------------------------------------------------------------------------ not finite


def losses_with(model: Any, x: Tensor, which: int, value: float, where: str) -> list[Tensor]:
    losses = two_losses(model, x)
    if where == "everywhere":
        losses[which] = losses[which] * value
    elif where == "in one element":
        losses[which] = losses[which] + model[2].bias[0] * value
    return losses


def run_with_a_bad_batch(optimizer: Any, model: Any, plain: bool, bad: Any) -> None:
    for i, x in enumerate(batches(3)):
        optimizer.zero_grad()
        losses = bad(model, x.to(model[0].weight.device)) if i == 1 else two_losses(model, x.to(model[0].weight.device))
        if plain:
            torch.stack(losses).sum().backward()
            optimizer.step()
        else:
            optimizer.step(losses)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["everywhere", "in one element"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("cls", OURS)
def test_a_bad_batch_makes_of_the_parameters_what_the_base_makes(
    cls: Any, which: int, value: float, where: str, device: str
) -> None:
    """No exception, now or in the step after; the same elements are finite, and nan and inf are where torch has them.

    MoKD's weights are one vector for all parameters that the losses share, so there a single bad element is in all.
    """
    ours, theirs = student().to(device), student().to(device)
    optimizer = cls(ours.parameters(), lr=0.01)
    flags = {"momentum": optimizer.defaults["momentum"]} if BASES[cls] is SGD else {}
    base = BASES[cls](theirs.parameters(), lr=0.01, **flags)
    bad = partial(losses_with, which=which, value=value, where=where)
    run_with_a_bad_batch(optimizer, ours, False, bad)
    run_with_a_bad_batch(base, theirs, True, bad)
    finite = torch.isfinite(flat(theirs.parameters()))
    assert not finite.all()
    if cls in (MoKDSGD, MoKDAdamW):
        assert not torch.isfinite(flat(ours.parameters())).any()
    else:
        assert torch.equal(torch.isfinite(flat(ours.parameters())), finite)


@pytest.mark.parametrize(
    "kind", [partial(MoKDSGD, combine="famo"), partial(MoKDAdamW, dominance="ema"), partial(MoKDSGD, combine="gradvac")]
)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_rule_learns_nothing_from_a_bad_batch(kind: Any, value: float) -> None:
    """So that whoever puts the parameters back finds its memory usable."""
    model = student()
    optimizer = kind(model.parameters(), lr=0.01)
    for x in batches(2):
        optimizer.zero_grad()
        optimizer.step(two_losses(model, x))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], optimizer.param_groups[0]))
    optimizer.zero_grad()
    optimizer.step(losses_with(model, batches(1)[0], 1, value, "everywhere"))
    # FAMO's last look at the losses is of the bad batch; the next step finds it so and takes no notice.
    memory = {k: v for k, v in optimizer.param_groups[0]["combine_state"].items() if not k.endswith("previous")}
    assert memory
    assert all(torch.isfinite(tensor).all() for tensor in memory.values())
    model.load_state_dict(before[0])
    optimizer.load_state_dict({"state": before[1], "param_groups": optimizer.state_dict()["param_groups"]})
    for x in batches(3):
        optimizer.zero_grad()
        optimizer.step(two_losses(model, x))
    assert torch.isfinite(flat(model.parameters())).all()


@pytest.mark.parametrize("cls", OURS)
def test_rolling_back_to_a_checkpoint_is_as_if_the_batch_had_not_been(cls: Any) -> None:
    """The remedy without a scaler: notice, load, go on."""
    ours, without = student(), student()
    a, b = cls(ours.parameters(), lr=0.01), cls(without.parameters(), lr=0.01)
    for i, x in enumerate(batches(6)):
        saved = copy.deepcopy((ours.state_dict(), a.state_dict()))
        a.zero_grad()
        a.step(losses_with(ours, x, 0, math.nan, "everywhere" if i == 3 else "nowhere"))
        if not torch.isfinite(flat(ours.parameters())).all():
            assert i == 3
            ours.load_state_dict(saved[0])
            a.load_state_dict(saved[1])
            continue
        b.zero_grad()
        b.step(two_losses(without, x))
    assert_same_bits(ours.parameters(), without.parameters())
    assert_same_tree(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("combine", ["min_norm", "famo"])
@pytest.mark.parametrize("cls", OURS)
def test_the_loss_that_is_returned_shows_the_bad_batch(cls: Any, combine: str) -> None:
    """What a loop can look at: step's result, and the statistics."""
    options = {"combine": combine} if cls in (MoKDSGD, MoKDAdamW) else {}
    model = student()
    optimizer = cls(model.parameters(), **options)
    returned = optimizer.step(losses_with(model, batches(1)[0], 1, math.nan, "everywhere"))
    assert [bool(loss.isfinite()) for loss in returned] == [True, False]
    assert torch.isfinite(optimizer.stats.losses).tolist() == [True, False]


@pytest.mark.parametrize("cleared", [True, False])
def test_a_step_whose_rule_fails_can_be_taken_again(cleared: bool) -> None:
    """Without anything of the step that failed: its losses were never walked to the end."""

    class Fails:
        calls = 0

        def __call__(self, gram: Tensor, losses: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ArithmeticError("no solution")
            return torch.full_like(losses, 0.5)

    results = []
    for rule in Fails(), "mean":
        model = student(torch.float64)
        optimizer = MoKDSGD(model.parameters(), lr=0.01, momentum=0.9, combine=rule, dominance="none")
        for n, x in enumerate(batches(3, torch.float64)):
            optimizer.zero_grad()
            if n == 1 and not isinstance(rule, str):
                with pytest.raises(ArithmeticError):
                    optimizer.step(two_losses(model, x))
                if cleared:
                    optimizer.zero_grad()
            optimizer.step(two_losses(model, x))
        results.append([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, yours in zip(*results, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-12, atol=1e-14)
