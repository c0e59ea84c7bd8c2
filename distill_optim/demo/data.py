"""The digits of scikit-learn in four disjoint splits, and labels that are wrong on purpose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 10
PIXELS = 64
# The teacher sees few labels, all right; the student many, some wrong. So neither source is enough.
STUDENT, TEACHER, VALIDATION, TEST = 600, 200, 400, 597


class Split(NamedTuple):
    """Some of the images: inputs (n, 64) in [0, 1], labels (n,), and their rows in the data set (n,)."""

    inputs: Tensor
    labels: Tensor
    rows: Tensor


class Digits(NamedTuple):
    student: Split
    teacher: Split
    validation: Split
    test: Split


def load_splits(device: str = "cpu", seed: int = 0) -> Digits:
    """Deal the 1797 shuffled digits to student, teacher, validation and test. All labels are clean."""
    # Part of the extra, without which this module has to be importable.
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    inputs = torch.as_tensor(images / 16, dtype=torch.float32)
    labels = torch.as_tensor(classes, dtype=torch.int64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order, [STUDENT, TEACHER, VALIDATION, TEST])
    return Digits(*(Split(inputs[rows].to(device), labels[rows].to(device), rows) for rows in parts))


def flip_labels(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Symmetric noise: ``round(share * n)`` labels become another class, every other class equally likely."""
    flipped = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, CLASSES, (len(flipped),), generator=generator)  # 0 would keep the label
    offset = torch.zeros(len(labels), dtype=torch.int64).index_put((flipped,), shift)
    return (labels + offset.to(labels.device)) % CLASSES
