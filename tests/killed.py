"""Training that may be killed at any moment: a program for tests/test_faults.py.

``python -m tests.killed FOLDER MOMENT`` trains every variant, goes on from FOLDER's checkpoint if there is one, and
ends itself with SIGKILL at that moment.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, joint_loss

VARIANTS: dict[str, Any] = {
    "DOTSGD": partial(DOTSGD, nesterov=True),
    "DOTSGD, fused": partial(DOTSGD, fused=True),
    "DOTAdamW": partial(DOTAdamW, amsgrad=True),
    "MoKDSGD": partial(MoKDSGD, momentum=0.9),
    "MoKDSGD, every=3": partial(MoKDSGD, momentum=0.9, every=3),
    "MoKDAdamW": MoKDAdamW,
    "MoKDAdamW, famo": partial(MoKDAdamW, combine="famo"),
    "MoKDAdamW, famo, every=3": partial(MoKDAdamW, combine="famo", every=3),
    "MoKDSGD, gradvac, ema": partial(MoKDSGD, combine="gradvac", dominance="ema"),
}
STEPS = 14
EVERY = 4


class Student(nn.Module):
    """Dropout, batch norm and a head of its own for the second loss: all that a checkpoint has to bring back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Tanh(), nn.Linear(12, 4))
        self.head = nn.Linear(4, 3)

    def losses(self, x: Tensor) -> list[Tensor]:
        out = self.trunk(x)
        return [out.square().mean(), (self.head(out) - 1).abs().mean()]


class Run:
    """One variant: a model, its optimizer, a schedule, a scaler."""

    def __init__(self, make: Any) -> None:
        self.model = Student()
        self.optimizer = make(self.model.parameters(), lr=0.02)
        self.schedule = CosineAnnealingLR(self.optimizer, STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
        self.parts: list[Any] = [self.model, self.optimizer, self.schedule, self.scaler]

    def collect(self, step: int, part: Tensor) -> None:
        losses = [loss / 2 for loss in self.model.losses(part)]
        if step % 2:
            self.optimizer.backward(losses, scaler=self.scaler)
        else:
            self.scaler.scale(joint_loss(losses, self.optimizer)).backward()

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(folder: Path, contents: dict[str, Any], *, killed: bool) -> None:
    """Whole or not at all: written beside, and then moved to the checkpoint's place."""
    unfinished = folder / "checkpoint.unfinished"
    torch.save(contents, unfinished)
    if killed:
        unfinished.write_bytes(unfinished.read_bytes()[: unfinished.stat().st_size // 2])
        die()
    unfinished.replace(folder / "checkpoint.pt")


def run(folder: Path, moment: str = "") -> dict[str, Any]:
    """Trains to the end, or until the moment comes.

    Args:
        folder: where the checkpoint is.
        moment: "step 6": when some of its gradients are collected; "saving 8": when half of a checkpoint is written.
    """
    torch.set_num_threads(1)
    runs = {name: Run(make) for name, make in VARIANTS.items()}
    torch.manual_seed(2)
    first = 0
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)  # torch's default, weights_only=True: a checkpoint is data
        first = saved["step"]
        torch.set_rng_state(saved["rng"])
        for name, one in runs.items():
            for part, state in zip(one.parts, saved[name], strict=True):
                part.load_state_dict(state)
    for step in range(first, STEPS):
        if step and step % EVERY == 0 and step > first:
            contents = {name: [part.state_dict() for part in one.parts] for name, one in runs.items()}
            save(folder, {"step": step, "rng": torch.get_rng_state(), **contents}, killed=moment == f"saving {step}")
        x = torch.randn(8, 6)
        for n, one in enumerate(runs.values()):
            one.optimizer.zero_grad()
            one.collect(step, x[:4])
            if moment == f"step {step}" and n == len(runs) // 2:
                die()
            one.collect(step, x[4:])
            one.step()
    return {name: [one.model.state_dict(), one.optimizer.state_dict()] for name, one in runs.items()}


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
