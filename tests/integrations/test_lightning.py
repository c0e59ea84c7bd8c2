"""Lightning: training under it is the loop written by hand, to the last bit."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from distill_optim import DOTSGD, DOTAdamW, MultiLossClosure
from tests.helpers import assert_same_bits, assert_same_tree
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
L: Any = pytest.importorskip("lightning", reason=ADVICE)

# Lightning's own, none of them about the optimizer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
script: Any = load("with_lightning")


def batches() -> Any:
    """Seven, so that with two micro-batches per step one is left over."""
    return DataLoader(Subset(script.digits()[0], range(420)), batch_size=60)


def student() -> Any:
    return script.network(8, seed=1)


def teacher() -> Any:
    """Random: as good as any where two ways of training are compared."""
    return script.network(32, seed=3)


def under_lightning(kind: Any, make: Make, *, epochs: int = 1, **options: Any) -> list[Tensor]:
    module = kind(student(), make, teacher())
    script.quiet_trainer(max_epochs=epochs, **options).fit(module, batches())
    return weights(module.net)


def by_hand(make: Make, *, epochs: int = 1, **options: Any) -> list[Tensor]:
    net, loader = student(), batches()
    optimizer = make(net.parameters())
    losses_of = script.Distiller(net, None, teacher()).losses
    for _ in range(epochs):
        plain_loop(net, optimizer, loader, losses_of, **options)
    return weights(net)


class GivesAClosure(script.ManualDistiller):  # type: ignore[misc]  # a module loaded by its path has no types
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        optimizer.step(closure=lambda: self.losses(batch))


class CallsBackward(script.ManualDistiller):  # type: ignore[misc]  # a module loaded by its path has no types
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        optimizer.backward(self.losses(batch))
        optimizer.step()


class GivesAMultiLossClosure(script.ManualDistiller):  # type: ignore[misc]  # a module loaded by its path has no types
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.step(MultiLossClosure(lambda: self.losses(batch), optimizer))


class Untouched(script.Distiller):  # type: ignore[misc]  # a module loaded by its path has no types
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ce, kd = self.losses(batch)
        return ce + kd  # type: ignore[no-any-return]  # the same


class Scheduled(script.Distiller):  # type: ignore[misc]  # a module loaded by its path has no types
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=14, max_momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fp16_plugin(init_scale: float = 2.0**10, device: str = "cpu") -> Any:
    """Lightning takes precision="16-mixed" on a CPU for bf16; the plugin itself works there."""
    scaler = torch.amp.GradScaler(device, init_scale=init_scale)
    return L.pytorch.plugins.MixedPrecision("16-mixed", device=device, scaler=scaler)


# ---------------------------------------------------------------- the script


def test_the_script_trains_a_student_and_reports_what_the_losses_did() -> None:
    result = script.main(epochs=8)
    assert result["teacher"] > 0.93
    assert result["student"] > 0.88
    assert {"loss/task", "loss/distill", "cosine/task_distill"} <= result.keys()


def test_the_script_with_manual_optimization_gives_the_same_student() -> None:
    assert_same_tree(script.main(epochs=2), script.main(script.ManualDistiller, epochs=2))


def test_the_script_runs_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "with_lightning.py"), run_name="__main__")
    assert "'student': 0." in capsys.readouterr().out


# ---------------------------------------------------------------- equal to a plain loop


@pytest.mark.parametrize("name", OURS)
def test_automatic_optimization_is_the_plain_loop(name: str) -> None:
    assert_same_bits(under_lightning(script.Distiller, OURS[name], epochs=2), by_hand(OURS[name], epochs=2))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "kind",
    [script.ManualDistiller, GivesAClosure, GivesAMultiLossClosure, CallsBackward],
    ids=lambda kind: kind.__name__,
)
def test_manual_optimization_is_the_plain_loop(name: str, kind: Any) -> None:
    assert_same_bits(under_lightning(kind, OURS[name]), by_hand(OURS[name]))


@pytest.mark.parametrize("name", OURS)
def test_accumulation_and_clipping_are_those_of_the_plain_loop(name: str) -> None:
    framework = under_lightning(script.Distiller, OURS[name], accumulate_grad_batches=2, gradient_clip_val=CLIP)
    assert_same_bits(framework, by_hand(OURS[name], accumulate=2, clip=CLIP))


def test_accumulation_and_clipping_reach_the_gradient_of_every_loss() -> None:
    framework = under_lightning(script.Distiller, OURS["DOTSGD"], accumulate_grad_batches=2, gradient_clip_val=CLIP)
    net = student()
    expected = two_sgds(net, batches(), script.Distiller(net, None, teacher()).losses, left_over=2)
    torch.testing.assert_close(framework, expected, rtol=1e-5, atol=1e-6)  # another order of additions


@pytest.mark.parametrize("name", BASES)
def test_an_untouched_module_does_what_the_torch_optimizer_does(name: str) -> None:
    ours, base = BASES[name]
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    assert_same_bits(under_lightning(Untouched, ours, **options), under_lightning(Untouched, base, **options))


def test_a_schedule_of_rate_and_momentum_is_followed() -> None:
    net = student()
    optimizer = OURS["DOTSGD"](net.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=14, max_momentum=0.9)
    losses_of = script.Distiller(net, None, teacher()).losses
    for batch in [*batches(), *batches()]:
        optimizer.step(losses_of(batch))
        optimizer.zero_grad()
        scheduler.step()
    assert_same_bits(under_lightning(Scheduled, OURS["DOTSGD"], epochs=2), weights(net))


def test_a_module_logs_the_statistics_through_lightnings_wrapper() -> None:
    class Logs(script.Distiller):  # type: ignore[misc]  # a module loaded by its path has no types
        def on_train_batch_end(self, *args: Any) -> None:
            self.log_dict(self.optimizers().stats.as_dict())

    module = Logs(student(), OURS["MoKDSGD"], teacher())
    trainer = script.quiet_trainer(max_epochs=1)
    trainer.fit(module, batches())
    weight = [trainer.callback_metrics[f"weight/{name}"].item() for name in ("task", "distill")]
    assert sum(weight) == pytest.approx(2)
    assert weight == pytest.approx(module.optimizers().stats.weights.tolist())


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("name", OURS)
def test_bf16_mixed_is_autocast_in_the_plain_loop(name: str) -> None:
    framework = under_lightning(script.Distiller, OURS[name], precision="bf16-mixed", gradient_clip_val=CLIP)
    assert_same_bits(framework, by_hand(OURS[name], autocast=torch.bfloat16, clip=CLIP))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", [script.Distiller, script.ManualDistiller], ids=lambda kind: kind.__name__)
def test_the_fp16_plugin_is_a_scaler_in_the_plain_loop(name: str, kind: Any) -> None:
    manual = kind is script.ManualDistiller
    options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    framework = under_lightning(kind, OURS[name], plugins=[fp16_plugin()], **options)
    mine: dict[str, Any] = {} if manual else {"accumulate": 2, "clip": CLIP}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert_same_bits(framework, by_hand(OURS[name], autocast=torch.float16, scaler=scaler, **mine))


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    plugin = fp16_plugin(init_scale=2.0**40)
    assert_same_bits(under_lightning(script.Distiller, OURS["DOTSGD"], plugins=[plugin]), weights(student()))
    assert plugin.scaler.get_scale() == 2.0 ** (40 - 7)


def test_the_fp16_plugin_clips_under_a_fused_optimizer() -> None:
    def make(params: Any) -> Any:
        return DOTAdamW(params, lr=0.005, fused=True)

    framework = under_lightning(script.Distiller, make, plugins=[fp16_plugin()], gradient_clip_val=CLIP)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert_same_bits(framework, by_hand(make, autocast=torch.float16, scaler=scaler, clip=CLIP))


@pytest.mark.parametrize("kind", [GivesAClosure, GivesAMultiLossClosure], ids=lambda kind: kind.__name__)
def test_the_fp16_plugin_fails_on_a_closure_that_does_not_use_its_scaler(kind: Any) -> None:
    with pytest.raises(AssertionError, match="_scale is None"):  # torch's: nobody has asked the scaler for its scale
        under_lightning(kind, OURS["DOTSGD"], plugins=[fp16_plugin()])


def test_the_fp16_plugin_discards_losses_that_a_closure_returns_and_ours_says_what_is_missing() -> None:
    plugin = fp16_plugin()
    plugin.scaler.scale(torch.ones(()))  # the scaler has been in use
    with pytest.raises(ValueError, match="no gradient to step on"):
        under_lightning(GivesAClosure, OURS["DOTSGD"], plugins=[plugin])


def test_backward_with_the_plugins_scaler_is_a_scaler_in_the_plain_loop() -> None:
    class WithScaler(script.ManualDistiller):  # type: ignore[misc]  # a module loaded by its path has no types
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.backward(self.losses(batch), scaler=self.trainer.precision_plugin.scaler)
            optimizer.step()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    mine = by_hand(OURS["MoKDSGD"], autocast=torch.float16, scaler=scaler)
    assert_same_bits(under_lightning(WithScaler, OURS["MoKDSGD"], plugins=[fp16_plugin()]), mine)


@pytest.mark.cuda
@pytest.mark.parametrize("name", OURS)
def test_16_mixed_on_a_gpu_ends_near_float32_on_a_cpu(name: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    framework = under_lightning(
        script.Distiller, OURS[name], accelerator="gpu", devices=1, plugins=[fp16_plugin(device="cuda")], **options
    )
    for a, b in zip(framework, by_hand(OURS[name], accumulate=2, clip=CLIP), strict=True):
        # Four steps with gradients of 11 bits. Adam's first steps are as long for a gradient near zero as for any.
        torch.testing.assert_close(a.cpu(), b, rtol=0.02, atol=0.02 if "AdamW" in name else 2e-3)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("kind", [script.Distiller, script.ManualDistiller], ids=lambda kind: kind.__name__)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, kind: Any, tmp_path: Path) -> None:
    make = REMEMBERING[name]
    first = script.quiet_trainer(max_epochs=2)
    first.fit(kind(student(), make, teacher()), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")

    module = kind(student(), make, teacher())
    second = script.quiet_trainer(max_epochs=4)
    second.fit(module, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert second.global_step == 28
    assert_same_bits(weights(module.net), under_lightning(kind, make, epochs=4))


# ---------------------------------------------------------------- what is refused


def test_lightning_refuses_a_list_of_losses() -> None:
    class GivesAList(script.ManualDistiller):  # type: ignore[misc]  # a module loaded by its path has no types
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step(self.losses(batch))

    with pytest.raises(Exception, match="closure should be callable"):
        under_lightning(GivesAList, OURS["DOTSGD"])


def test_a_module_whose_optimizer_is_not_ours_is_told_so() -> None:
    with pytest.raises(TypeError, match="expected one of distill_optim's"):
        under_lightning(script.Distiller, partial(torch.optim.SGD, lr=0.02))


def test_a_module_with_losses_of_other_names_is_refused_a_checkpoint(tmp_path: Path) -> None:
    trainer = script.quiet_trainer(max_epochs=1)
    trainer.fit(script.Distiller(student(), OURS["DOTSGD"], teacher()), batches())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    renamed = script.Distiller(student(), partial(DOTSGD, lr=0.02, losses=("ce", "kd")), teacher())
    with pytest.raises(ValueError, match="it was saved with losses"):
        script.quiet_trainer(max_epochs=2).fit(renamed, batches(), ckpt_path=tmp_path / "one.ckpt")
