"""What each process does in the tests of frameworks over several processes."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from distill_optim import joint_loss
from tests.distributed.models import (
    FEW,
    assert_close,
    assert_same_everywhere,
    batches,
    losses_of,
    part,
    student,
    tensors_of,
)
from tests.processes import leave

CLIP = 0.05


def one_process(make: Any, micro: int) -> list[Tensor]:
    """A loop by hand: so many batches per step, and clipping."""
    model = student()
    optimizer = make(model.parameters(), process_group=None)
    xs = batches(FEW)
    for i in range(0, FEW, micro):
        for x in xs[i : i + micro]:
            (joint_loss(losses_of(model, x), optimizer) / micro).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model, optimizer)


def with_accelerate(rank: int, port: int, make: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    accelerate: Any = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = student()
    optimizer = make(model.parameters())
    replica, wrapper = accelerator.prepare(model, optimizer)
    for x in batches(FEW):
        with accelerator.accumulate(replica):
            accelerator.backward(joint_loss(losses_of(replica, part(x, rank, 2)), wrapper))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(replica.parameters(), CLIP)
            wrapper.step()
            wrapper.zero_grad()
    assert_same_everywhere(tensors_of(model, optimizer))
    assert_close(tensors_of(model, optimizer), one_process(make, 2))
    distributed.destroy_process_group()
    leave()


def lightning_module(make: Any) -> Any:
    lightning: Any = import_module("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]  # typed where it is installed
        def __init__(self) -> None:
            super().__init__()
            self.student = student()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return joint_loss(losses_of(self.student, part(batch[0], self.global_rank, 2)), self.optimizers())

        def configure_optimizers(self) -> Any:
            return make(self.student.parameters())

        def on_train_end(self) -> None:
            tensors = tensors_of(self.student, self.trainer.optimizers[0])
            assert distributed.get_world_size() == 2
            assert_same_everywhere(tensors)
            assert_close(tensors, one_process(make, 1))

    return Module()


def with_lightning(make: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    lightning: Any = import_module("lightning")
    rows = torch.cat(batches(FEW))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=1,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # every process sees the whole batch and takes its rows
    )
    trainer.fit(lightning_module(make), DataLoader(TensorDataset(rows), batch_size=8))
