"""Optimizers for training on several losses at once, distillation first."""

from distill_optim import combine, distill, monitor
from distill_optim.closure import MultiLossClosure, joint_loss
from distill_optim.dot import DOTSGD, DOTAdamW
from distill_optim.mokd import MoKDAdamW, MoKDSGD

__all__ = [
    "DOTSGD",
    "DOTAdamW",
    "MoKDAdamW",
    "MoKDSGD",
    "MultiLossClosure",
    "combine",
    "distill",
    "joint_loss",
    "monitor",
]

__version__ = "0.1.0"
