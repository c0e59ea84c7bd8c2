"""A small causal transformer of the characters in Python's standard library, with a larger one as its teacher."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.harness import Measures, Options
from benchmarks.studies.training import Forward, fit, shuffled
from distill_optim.distill import kd

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 32
BATCH = 16
TEMPERATURE = 2.0
# Modules that every Python has, and that share no text. The teacher's are the student's and more.
STUDENT = ("argparse", "ast")
TEACHER = (*STUDENT, "difflib", "inspect", "locale", "mimetypes", "optparse", "typing")
VALIDATION = ("configparser", "csv")
TEST = ("gettext", "shutil", "tarfile", "textwrap")


@functools.cache
def pieces_of(modules: tuple[str, ...], count: int) -> Tensor:
    """The beginning of the modules' source, in so many pieces of one character more than the context, (count, 33)."""
    text = ""
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        text += Path(spec.origin).read_text("utf-8")
    known = filter(CHARACTERS.__contains__, text)  # there are some names with accents
    codes = [CHARACTERS.index(character) for character in itertools.islice(known, count * (CONTEXT + 1))]
    return torch.tensor(codes).view(count, CONTEXT + 1)


class Transformer(nn.Module):
    """Characters (n, t) to logits of the next ones, (n, t, 96). Its weights depend on the seed alone."""

    mask: Tensor

    def __init__(self, width: int, layers: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.characters = nn.Embedding(len(CHARACTERS), width)
            self.positions = nn.Embedding(CONTEXT, width)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, len(CHARACTERS))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.characters(codes) + self.positions.weight
        for layer in self.layers:
            x = layer(x, self.mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


def cross_entropy(logits: Tensor, pieces: Tensor) -> Tensor:
    """Nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


class Problem(NamedTuple):
    """Pieces of text (n, 33), the teacher's logits for the student's (n, 32, 96), and the problem's options."""

    own: Tensor
    logits: Tensor
    validation: Tensor
    test: Tensor
    options: Options


@functools.cache
def taught(count: int, width: int, layers: int, steps: int) -> Tensor:
    """The logits, for the student's pieces, of a teacher that was trained on five times as many, those among them."""
    pieces = pieces_of(TEACHER, 5 * count)
    teacher = Transformer(width, layers, seed=0)

    def forward(batch: Tensor) -> Forward:
        logits = teacher(pieces[batch, :-1])
        return Forward([cross_entropy(logits, pieces[batch])], logits)

    how = {"optimizer": "AdamW", "lr": 3e-3}
    for _ in fit(teacher.parameters(), shuffled(len(pieces), BATCH, steps, 0), forward, how):
        pass
    with torch.no_grad():
        logits: Tensor = teacher(pieces_of(STUDENT, count)[:, :-1])
    return logits


def prepare(options: Options, seed: int) -> Problem:
    """One teacher and one split for all seeds.

    Args:
        options: ``pieces`` of the student's text; its ``width``, and ``steps`` of its training; ``teacher``: width,
            layers and steps of the training.
        seed: of nothing here; of the student's initial weights and batches later.
    """
    count = options["pieces"]
    validation, test = pieces_of(VALIDATION, count // 2), pieces_of(TEST, count)
    return Problem(pieces_of(STUDENT, count), taught(count, *options["teacher"]), validation, test, options)


def train(problem: Problem, options: Options, seed: int, final: bool) -> Measures:
    """One student.

    Args:
        problem: text and teacher.
        options: those of ``fit``.
        seed: of initial weights and batches.
        final: whether to look at the test split.

    Returns:
        Losses over the student's text at the end, ``task`` in nats per character and ``logits``; ``validation``, the
        mean log probability of a character, and ``test``, bits per character.
    """
    student = Transformer(problem.options["width"], 1, seed)

    def forward(batch: Tensor) -> Forward:
        logits = student(problem.own[batch, :-1])
        losses = [cross_entropy(logits, problem.own[batch]), kd(logits, problem.logits[batch], TEMPERATURE)]
        return Forward(losses, logits)

    batches = shuffled(len(problem.own), BATCH, problem.options["steps"], seed)
    for _ in fit(student.parameters(), batches, forward, options):
        pass
    with torch.no_grad():
        task, logits = forward(torch.arange(len(problem.own))).losses
        measures = {"task": float(task), "logits": float(logits)}
        measures["validation"] = -float(cross_entropy(student(problem.validation[:, :-1]), problem.validation))
        if final:
            nats = cross_entropy(student(problem.test[:, :-1]), problem.test)
            measures["test"] = float(nats) / torch.log(torch.tensor(2.0)).item()
    return measures
