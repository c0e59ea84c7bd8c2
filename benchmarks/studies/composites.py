"""Two of scikit-learn's digits on one small canvas, and four tasks on it: two classes, a segmentation, a denoising.

The tasks differ as those of the multi-task benchmarks do. The right digit is dimmer than the left one, so its class is
harder. A class is one answer per image, a region one per pixel, and the clean image a regression, whose absolute error
is a smaller number than a cross entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_optim.demo.data import CLASSES

DIGIT, HEIGHT, WIDTH = 8, 10, 14  # of a digit and of the canvas, in pixels
SHIFTS = 3  # places where a digit may be, in either direction
REGIONS = 3  # background, left digit, right digit
BRIGHTNESS = (1.0, 0.6)  # of the left and the right digit
INK = 0.25  # where a pixel is brighter, before it is dimmed, the digit is
NOISE = 0.2  # standard deviation; a pixel is in [0, 1]

# The channels of each task's output.
TASKS = {"left": CLASSES, "right": CLASSES, "regions": REGIONS, "clean": 1}
DENSE = ("regions", "clean")

DIGITS = {"train": 900, "validation": 397, "test": 500}


class Composites(NamedTuple):
    """Images (n, 1, 10, 14), the answers by task, and the digits' rows in the data set (n, 2)."""

    images: Tensor
    answers: dict[str, Tensor]
    rows: Tensor


def load_splits(sizes: Mapping[str, int], seed: int) -> dict[str, Composites]:
    """As many training, validation and test composites as are asked for. No digit is in two of the splits."""
    # Part of an extra, without which this module has to be importable.
    from sklearn.datasets import load_digits

    inputs, classes = load_digits(return_X_y=True)
    digits = torch.as_tensor(inputs / 16, dtype=torch.float32).unflatten(1, (DIGIT, DIGIT))
    labels = torch.as_tensor(classes, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(digits), generator=generator).split(list(DIGITS.values()))
    splits = {}
    for split, rows in zip(DIGITS, parts, strict=True):
        pairs = rows[torch.randint(len(rows), (sizes[split], 2), generator=generator)]
        splits[split] = compose(digits, labels, pairs, generator)
    return splits


def compose(digits: Tensor, labels: Tensor, rows: Tensor, generator: torch.Generator) -> Composites:
    """A composite per pair of rows: both digits somewhere on their side, the brighter pixel in front, and noise."""
    placed = torch.stack(
        [place(digits[rows[:, side]], column, generator) for side, column in enumerate((0, WIDTH - DIGIT - SHIFTS + 1))]
    )
    seen = placed * torch.tensor(BRIGHTNESS).reshape(2, 1, 1, 1)
    ink = placed > INK
    clean = seen.amax(0)
    regions = torch.where(ink.any(0), (seen * ink).argmax(0) + 1, 0)
    images = clean + NOISE * torch.randn(clean.shape, generator=generator)
    # In units of the noise: what a network gets that changes nothing is about 0.8.
    answers = {"left": labels[rows[:, 0]], "right": labels[rows[:, 1]], "regions": regions, "clean": clean / NOISE}
    return Composites(images[:, None], answers, rows)


def place(digits: Tensor, column: int, generator: torch.Generator) -> Tensor:
    """Digits (n, 8, 8) on canvases (n, 10, 14), in rows that begin 0 to 2, and columns 0 to 2 after this one."""
    top, left = torch.randint(SHIFTS, (2, len(digits), 1, 1), generator=generator)
    example, along = torch.arange(len(digits)).reshape(-1, 1, 1), torch.arange(DIGIT)
    where = (example, top + along[:, None], column + left + along)
    return digits.new_zeros(len(digits), HEIGHT, WIDTH).index_put(where, digits)


def loss(task: str, output: Tensor, answer: Tensor) -> Tensor:
    """Cross entropy of a class, per image or per pixel; mean absolute error of the clean image."""
    return absolute_error(output, answer) if task == "clean" else F.cross_entropy(output, answer)


def absolute_error(output: Tensor, clean: Tensor) -> Tensor:
    """Of an output (n, 1, 10, 14); the answer may lack the channel."""
    return F.l1_loss(output, clean.reshape(output.shape))


def metric(task: str, output: Tensor, answer: Tensor) -> float:
    """Accuracy of the classes, mean intersection over union of the regions, mean absolute error of the clean image."""
    if task == "clean":
        return float(absolute_error(output, answer))
    found = output.argmax(1)
    if task == "regions":
        counts = torch.bincount((REGIONS * answer + found).flatten(), minlength=REGIONS**2).reshape(REGIONS, REGIONS)
        both = counts.diagonal()
        return float((both / (counts.sum(0) + counts.sum(1) - both)).mean())
    return float((found == answer).float().mean())


def score(task: str, value: float) -> float:
    """A metric with the sign with which higher is better."""
    return -value if task == "clean" else value


def gains(metrics: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    r"""Improvement of each task over the network of that task alone, in percent; higher is better.

    .. math:: \Delta_t = 100 \, (-1)^{l_t} \, \frac{M_t - M^{single}_t}{M^{single}_t}

    with l = 1 where the metric is an error. The mean over the tasks is the paper's Δ.
    """
    return {task: 100 * score(task, metrics[task] - own) / own for task, own in single.items()}
