"""Accelerate: training under it is the loop written by hand, to the last bit."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from distill_optim import MoKDSGD
from tests.helpers import assert_same_bits, assert_same_tree, snapshot
from tests.integrations.scripts import (
    ADVICE,
    BASES,
    CLIP,
    FOLDER,
    OURS,
    REMEMBERING,
    Make,
    load,
    plain_loop,
    two_sgds,
    weights,
)

pytest.importorskip("sklearn", reason=ADVICE)
accelerate: Any = pytest.importorskip("accelerate", reason=ADVICE)

pytestmark = pytest.mark.usefixtures("accelerate_forgets")
script: Any = load("with_accelerate")


def batches() -> Any:
    """Seven, so that with two micro-batches per step one is left over."""
    return DataLoader(Subset(script.digits()[0], range(420)), batch_size=60)


def student() -> Any:
    return script.network(8, seed=1)


def teacher() -> Any:
    """Random: as good as any where two ways of training are compared."""
    return script.network(32, seed=3).requires_grad_(False)


class Run:
    """A student under Accelerate."""

    def __init__(self, make: Make, *, scaler: torch.amp.GradScaler | None = None, cpu: bool = True, **options: Any):
        self.accelerator = accelerate.Accelerator(cpu=cpu, gradient_accumulation_steps=2, **options)
        if scaler is not None:
            # Accelerate has no fp16 on a CPU. Its own code is the same with a scaler for the CPU in it.
            self.accelerator.scaler = scaler
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
        net = student()
        self.net, self.optimizer, self.loader = self.accelerator.prepare(net, make(net.parameters()), batches())
        self.teacher = teacher().to(self.accelerator.device)

    def epoch(self, clip: float = CLIP) -> list[Tensor]:
        script.distil_one_epoch(self.accelerator, self.net, self.teacher, self.optimizer, self.loader, clip)
        return weights(self.net)


def by_hand(make: Make, *, around: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    net, frozen = student(), teacher()

    def forward(inputs: Tensor) -> Tensor:
        """Accelerate's autocast is around the model alone, and gives its outputs back in float32."""
        with torch.autocast("cpu", around or torch.bfloat16, enabled=around is not None):
            logits: Tensor = net(inputs)
        return logits.float()

    return plain_loop(
        net,
        make(net.parameters()),
        batches(),
        lambda batch: script.losses_of(forward, frozen, *batch),
        **{"accumulate": 2, "clip": CLIP, **options},
    )


# ---------------------------------------------------------------- the script


def test_the_script_trains_a_student_and_reports_what_the_losses_did() -> None:
    result = script.main()
    assert result["teacher"] > 0.93
    assert result["student"] > 0.8
    assert {"loss/task", "loss/distill", "weight/task"} <= result.keys()


def test_the_script_trains_in_bf16() -> None:
    assert script.main(epochs=8, precision="bf16")["student"] > 0.8


def test_the_script_runs_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "with_accelerate.py"), run_name="__main__")
    assert "'student': 0." in capsys.readouterr().out


# ---------------------------------------------------------------- equal to a plain loop


@pytest.mark.parametrize("name", OURS)
def test_prepare_accumulate_and_clip_are_the_plain_loop(name: str) -> None:
    assert_same_bits(Run(OURS[name]).epoch(), by_hand(OURS[name]))


def test_accumulation_and_clipping_reach_the_gradient_of_every_loss() -> None:
    net, frozen = student(), teacher()
    expected = two_sgds(net, batches(), lambda batch: script.losses_of(net, frozen, *batch), left_over=2)
    # Another order of additions.
    torch.testing.assert_close(Run(OURS["DOTSGD"]).epoch(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_an_untouched_loop_does_what_the_torch_optimizer_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "joint_loss", lambda losses, optimizer: sum(losses))
    ours, base = BASES[name]
    assert_same_bits(Run(ours).epoch(), Run(base).epoch())


def test_prepare_keeps_the_optimizers_options() -> None:
    made: list[Any] = []

    def make(params: Any) -> Any:
        made.append(REMEMBERING["a function"](params))
        before.append(snapshot(made[0])["options"])
        return made[0]

    before: list[Any] = []
    assert Run(make).optimizer.optimizer is made[0]
    assert_same_tree(before[0], snapshot(made[0])["options"])


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("name", OURS)
def test_bf16_is_autocast_in_the_plain_loop(name: str) -> None:
    assert_same_bits(Run(OURS[name], mixed_precision="bf16").epoch(), by_hand(OURS[name], around=torch.bfloat16))


@pytest.mark.parametrize("name", OURS)
def test_fp16_is_autocast_and_a_scaler_in_the_plain_loop(name: str) -> None:
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    mine = by_hand(OURS[name], around=torch.float16, scaler=scalers[1])
    assert_same_bits(Run(OURS[name], scaler=scalers[0]).epoch(), mine)


def test_an_overflow_skips_the_step_and_accelerate_says_so() -> None:
    run = Run(OURS["DOTSGD"], scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert_same_bits(run.epoch(), weights(student()))
    assert run.accelerator.optimizer_step_was_skipped


@pytest.mark.cuda
@pytest.mark.parametrize("name", OURS)
def test_fp16_on_a_gpu_ends_near_float32_on_a_cpu(name: str) -> None:
    # At torch's own first scale an overflow is likely here, and a step is skipped.
    scale = accelerate.utils.GradScalerKwargs(init_scale=2.0**10)
    framework = Run(OURS[name], cpu=False, mixed_precision="fp16", kwargs_handlers=[scale]).epoch()
    for a, b in zip(framework, by_hand(OURS[name]), strict=True):
        # Four steps with gradients of 11 bits. Adam's first steps are as long for a gradient near zero as for any.
        torch.testing.assert_close(a.cpu(), b, rtol=0.02, atol=0.02 if "AdamW" in name else 2e-3)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    first = Run(REMEMBERING[name])
    first.epoch()
    first.accelerator.save_state(str(tmp_path))
    through = first.epoch()

    second = Run(REMEMBERING[name])
    second.accelerator.load_state(str(tmp_path))
    assert_same_bits(second.epoch(), through)


# ---------------------------------------------------------------- pitfalls that the page names


def test_a_list_given_to_step_inside_accumulate_loses_every_other_batch() -> None:
    run = Run(OURS["DOTSGD"])
    for inputs, labels in run.loader:
        with run.accelerator.accumulate(run.net):
            run.optimizer.step(script.losses_of(run.net, run.teacher, inputs, labels))
            run.optimizer.zero_grad()

    net, frozen = student(), teacher()
    stepped_on = [batch for i, batch in enumerate(batches()) if i in (1, 3, 5, 6)]
    mine = plain_loop(
        net, OURS["DOTSGD"](net.parameters()), stepped_on, lambda batch: script.losses_of(net, frozen, *batch)
    )
    assert_same_bits(weights(run.net), mine)


def test_a_list_given_to_step_is_fine_without_accumulation() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net, frozen = student(), teacher()
    net, optimizer, loader = accelerator.prepare(net, OURS["MoKDSGD"](net.parameters()), batches())
    for inputs, labels in loader:
        optimizer.step(script.losses_of(net, frozen, inputs, labels))
        optimizer.zero_grad()
    assert_same_bits(weights(net), by_hand(OURS["MoKDSGD"], accumulate=1, clip=float("inf")))


def test_the_wrapper_has_neither_backward_nor_stats_but_the_optimizer_inside_has() -> None:
    run = Run(lambda params: MoKDSGD(params, lr=0.02))
    run.epoch()
    assert not hasattr(run.optimizer, "backward")
    assert not hasattr(run.optimizer, "stats")
    assert run.optimizer.optimizer.stats.names == ("task", "distill")
