"""A trainer that adds up a dict of losses: untouched it is the torch optimizer, changed in one line it is ours."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from tests.helpers import assert_same_bits, assert_same_tree
from tests.integrations.scripts import FOLDER, Make, load, weights

pytest.importorskip("sklearn", reason="pip install -c constraints.txt -e '.[test]'")
script: Any = load("research_trainer")

NAMES = ("ce", "kd", "hint")
PAIRS: dict[str, tuple[Make, Make]] = {
    "DOTSGD": (
        lambda params: DOTSGD(params, lr=0.02, momentum=0.9, weight_decay=1e-3, losses=NAMES),
        lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-3),
    ),
    "DOTAdamW": (
        lambda params: DOTAdamW(params, lr=0.005, losses=NAMES),
        lambda params: torch.optim.AdamW(params, lr=0.005),
    ),
    "MoKDSGD": (
        lambda params: MoKDSGD(params, lr=0.02, momentum=0.9, losses=NAMES),
        lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
    ),
    "MoKDAdamW": (
        lambda params: MoKDAdamW(params, lr=0.005, losses=NAMES),
        lambda params: torch.optim.AdamW(params, lr=0.005),
    ),
}


def batches() -> Any:
    return DataLoader(Subset(script.digits()[0], range(420)), batch_size=60)


def model() -> Any:
    return script.Distiller(script.Network(8, seed=1), script.Network(32, seed=3))


def trained(kind: Any, make: Make) -> list[Tensor]:
    net = model()
    kind(net, make(net.trainable())).fit(batches(), epochs=2)
    return weights(net)


def test_the_script_trains_a_student_with_three_losses() -> None:
    result = script.main()
    assert result["teacher"] > 0.93
    assert result["student"] > 0.9
    assert {"loss/ce", "loss/kd", "loss/hint", "cosine/ce_hint"} <= result.keys()


def test_the_script_untouched_gives_the_torch_optimizers_student() -> None:
    with_sgd = script.main(script.Trainer, lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9))
    assert_same_tree(script.main(script.Trainer), with_sgd)


def test_the_script_runs_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "research_trainer.py"), run_name="__main__")
    assert "joint_loss, DOTSGD: {" in capsys.readouterr().out


@pytest.mark.parametrize("name", PAIRS)
def test_the_untouched_trainer_with_ours_is_the_torch_optimizer(name: str) -> None:
    ours, base = PAIRS[name]
    assert_same_bits(trained(script.Trainer, ours), trained(script.Trainer, base))


@pytest.mark.parametrize("name", PAIRS)
def test_the_changed_line_is_the_loop_that_hands_the_losses_to_step(name: str) -> None:
    ours, _ = PAIRS[name]
    net = model()
    optimizer = ours(net.trainable())
    for _ in range(2):
        for inputs, labels in batches():
            optimizer.zero_grad()
            optimizer.step(net(inputs, labels)[1])
    changed = trained(script.OursInIt, ours)
    assert_same_bits(changed, weights(net))
    untouched = trained(script.Trainer, ours)
    assert any(not torch.equal(a, b) for a, b in zip(changed, untouched, strict=True))


def test_the_order_of_the_dict_does_not_matter() -> None:
    class Backwards(script.OursInIt):  # type: ignore[misc]  # a module loaded by its path has no types
        def backward(self, losses: dict[str, Tensor]) -> None:
            super().backward(dict(reversed(losses.items())))

    ours, _ = PAIRS["MoKDSGD"]
    for a, b in zip(trained(Backwards, ours), trained(script.OursInIt, ours), strict=True):
        torch.testing.assert_close(a, b)  # .grad is summed in another order


def test_a_loss_that_the_optimizer_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="'hint' is not one of this optimizer's losses"):
        trained(script.OursInIt, lambda params: DOTSGD(params, lr=0.02, losses=("ce", "kd")))
