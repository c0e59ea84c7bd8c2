"""Hugging Face's Trainer: training under it is the loop written by hand, to the last bit."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_optim import DOTAdamW, MoKDAdamW
from tests.helpers import assert_same_bits
from tests.integrations.scripts import ADVICE, BASES, CLIP, FOLDER, OURS, REMEMBERING, Make, load, two_sgds, weights

pytest.importorskip("accelerate", reason=ADVICE)
pytest.importorskip("transformers", reason=ADVICE)

pytestmark = pytest.mark.usefixtures("accelerate_forgets")
script: Any = load("hf_trainer")
TRAIN, HELD_OUT = script.text(length=16, blocks=60)
SIZE = 8  # of a micro-batch. Fifty rows are seven: with two per step one is left over, and it is smaller.
BATCHES = [torch.stack([row["input_ids"] for row in TRAIN[i : i + SIZE]]) for i in range(0, len(TRAIN), SIZE)]


def student() -> Any:
    return script.model(8, seed=1)


def teacher() -> Any:
    """Random: as good as any where two ways of training are compared."""
    return script.model(16, seed=3).eval().requires_grad_(False)


def under_the_trainer(
    folder: Path,
    make: Make | None,
    kind: Any = script.Distiller,
    *,
    resume: Path | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> Any:
    """A Trainer after its training; with make=None as the options say."""
    net = student()
    own = {name: options.pop(name) for name in ("optimizer_cls_and_kwargs",) if name in options}
    defaults = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }
    trainer = kind(
        net,
        script.arguments(str(folder), **{**defaults, **options}),
        train_dataset=TRAIN,
        eval_dataset=HELD_OUT,
        optimizers=(None if make is None else make(net.parameters()), None),
        teacher=teacher(),
        **own,
    )
    if scaler is not None:
        # There is no fp16 on a CPU. The code is the same with a scaler for the CPU in it.
        trainer.accelerator.scaler = scaler
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def by_hand(
    make: Make,
    *,
    around: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    divide: bool = True,
    net: Any = None,
    clip: float = CLIP,
) -> list[Tensor]:
    """Two micro-batches a step, without joint_loss and without a framework."""
    net = student() if net is None else net
    optimizer, frozen = make(net.parameters()), teacher()
    net.train()
    for i in range(0, len(BATCHES), 2):
        together = BATCHES[i : i + 2]
        for rows in together:
            with torch.autocast("cpu", around or torch.bfloat16, enabled=around is not None):
                outputs = net(input_ids=rows, labels=rows)
            kd = script.distillation(outputs.logits.float(), frozen(rows).logits)
            divisor = len(together) if divide else 1  # that of a left-over micro-batch is 1
            optimizer.backward([outputs.loss.float() / divisor, kd / divisor], scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return weights(net)


class Untouched(script.Distiller):  # type: ignore[misc]  # a module loaded by its path has no types
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + script.distillation(outputs.logits, self.teacher(inputs["input_ids"]).logits)
        return (loss, outputs) if return_outputs else loss


# ---------------------------------------------------------------- the script


def test_the_script_runs_as_a_command_and_trains_a_student(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "hf_trainer.py"), run_name="__main__")
    result = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert result["before"] > 5.3  # ln 256 = 5.5: it knows nothing
    assert result["after"] < 4.2
    assert {"loss/task", "loss/distill", "weight/task"} <= result.keys()


# ---------------------------------------------------------------- equal to a plain loop


@pytest.mark.parametrize("name", OURS)
def test_accumulation_and_clipping_are_those_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    assert_same_bits(weights(under_the_trainer(tmp_path, OURS[name]).model), by_hand(OURS[name]))


def test_accumulation_and_clipping_reach_the_gradient_of_every_loss(tmp_path: Path) -> None:
    net, frozen = student(), teacher()

    def losses_of(rows: Tensor) -> list[Tensor]:
        outputs = net(input_ids=rows, labels=rows)
        return [outputs.loss, script.distillation(outputs.logits, frozen(rows).logits)]

    framework = weights(under_the_trainer(tmp_path, OURS["DOTSGD"]).model)
    # Another order of additions.
    torch.testing.assert_close(framework, two_sgds(net, BATCHES, losses_of, left_over=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_an_untouched_trainer_does_what_the_torch_optimizer_does(name: str, tmp_path: Path) -> None:
    ours, base = (under_the_trainer(tmp_path, make, Untouched) for make in BASES[name])
    assert_same_bits(weights(ours.model), weights(base.model))


@pytest.mark.parametrize("name", OURS)
def test_bf16_is_autocast_in_the_plain_loop(name: str, tmp_path: Path) -> None:
    trainer = under_the_trainer(tmp_path, OURS[name], bf16=True)
    assert_same_bits(weights(trainer.model), by_hand(OURS[name], around=torch.bfloat16))


def scaler(device: str = "cpu", init_scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=init_scale)


@pytest.mark.parametrize("name", OURS)
def test_fp16_is_autocast_and_a_scaler_in_the_plain_loop(name: str, tmp_path: Path) -> None:
    trainer = under_the_trainer(tmp_path, OURS[name], scaler=scaler())
    assert_same_bits(weights(trainer.model), by_hand(OURS[name], around=torch.float16, scaler=scaler()))


def test_an_overflow_skips_the_step(tmp_path: Path) -> None:
    trainer = under_the_trainer(tmp_path, OURS["DOTSGD"], scaler=scaler(init_scale=2.0**127))
    assert trainer.state.global_step == 4
    assert_same_bits(weights(trainer.model), weights(student()))


@pytest.mark.cuda
@pytest.mark.parametrize("name", OURS)
def test_fp16_on_a_gpu_ends_near_float32_on_a_cpu(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_cpu": False, "fp16": True}
    framework = weights(under_the_trainer(tmp_path, OURS[name], scaler=scaler("cuda"), **options).model)
    for a, b in zip(framework, by_hand(OURS[name]), strict=True):
        # Four steps with gradients of 11 bits. Adam's first steps are as long for a gradient near zero as for any.
        torch.testing.assert_close(a.cpu(), b, rtol=0.02, atol=0.03 if "AdamW" in name else 2e-3)


@pytest.mark.parametrize("cls", [DOTAdamW, MoKDAdamW])
def test_the_class_and_its_keywords_may_be_given_in_place_of_the_optimizer(cls: Any, tmp_path: Path) -> None:
    options = {"lr": 0.005, "losses": ("ce", "kd")}
    trainer = under_the_trainer(tmp_path, None, optimizer_cls_and_kwargs=(cls, options), weight_decay=0.1)
    assert isinstance(trainer.optimizer.optimizer, cls)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]

    net = student()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    mine = by_hand(lambda _: cls(groups, **options), net=net)
    assert_same_bits(weights(trainer.model), mine)


def test_evaluation_before_training_needs_no_optimizer(tmp_path: Path) -> None:
    trainer = script.Distiller(student(), script.arguments(str(tmp_path)), eval_dataset=HELD_OUT, teacher=teacher())
    assert trainer.evaluate()["eval_loss"] > 5


# ---------------------------------------------------------------- pitfalls that the page names


def test_a_language_models_losses_are_divided_only_if_the_trainer_is_told_so(tmp_path: Path) -> None:
    class NotTold(script.Distiller):  # type: ignore[misc]  # a module loaded by its path has no types
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.model_accepts_loss_kwargs = True  # what the Trainer finds by itself

    # With a clip so wide that it does nothing; else it would hide a factor.
    trainer = under_the_trainer(tmp_path, OURS["DOTSGD"], NotTold, max_grad_norm=1e6)
    assert_same_bits(weights(trainer.model), by_hand(OURS["DOTSGD"], divide=False, clip=1e6))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_train_epochs": 2, "lr_scheduler_type": "linear"}
    through = under_the_trainer(tmp_path, REMEMBERING[name], save_strategy="epoch", **options)
    half = tmp_path / "checkpoint-4"
    assert half.exists()

    second = under_the_trainer(tmp_path, REMEMBERING[name], resume=half, **options)
    assert second.state.global_step == 8
    assert_same_bits(weights(second.model), weights(through.model))
    for a, b in zip(second.optimizer.state.values(), through.optimizer.state.values(), strict=True):
        assert_same_bits((a[key] for key in sorted(a)), (b[key] for key in sorted(b)))
