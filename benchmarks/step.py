"""The update alone: one step from gradients that are there, beside torch's, the DOT authors' and others.

    python -m benchmarks step --sets resnet18 330 1600 --losses 2 --against "authors" "bare"

Gradients are drawn anew in every round. "update" is what step(losses) does after its backward passes; "step() after
backward()" also looks at what was done to .grad in between; "collect" is what follows the backward passes in both. GB/s
is of the words that the equations need at least, whatever the code moves, so that all rows of one equation compare;
the last column sets it beside a copy of one set of gradients in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Contender, Row
from benchmarks.dot_authors import AuthorsDOT
from benchmarks.models import SETS, Shape, shapes_of
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from distill_optim.gradients import Collected, Column

# The learning rate is too small to matter: the parameters are the same tensors for all contenders.
LR = 1e-6


class Gradients:
    """Parameters, K gradients of each, and their sum in ``.grad``."""

    def __init__(self, shapes: Sequence[Shape], k: int, device: torch.device, dtype: torch.dtype) -> None:
        def zeros() -> list[Tensor]:
            return [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]

        self.params = [torch.nn.Parameter(p) for p in zeros()]
        self.each = [zeros() for _ in range(k)]
        self.draw()

    def draw(self) -> None:
        """Fresh numbers in the same memory."""
        for own in self.each:
            for gradient in own:
                gradient.normal_()

    def sum_up(self) -> None:
        """Leaves what the backward passes would leave, in memory that is there already if it is."""
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.params if p.grad is not None]
        torch._foreach_copy_(grads, self.each[0])
        for own in self.each[1:]:
            torch._foreach_add_(grads, own)

    def collected(self) -> Collected:
        """As they are when an optimizer has walked the losses back."""
        made = Collected(len(self.each))
        made.align(self.params)
        made.gradients = [list(own) for own in self.each]
        made.values = self.values()
        return made

    def values(self) -> dict[int, Tensor]:
        return {i: torch.ones((), device=self.params[0].device) for i in range(len(self.each))}


def contenders(gradients: Gradients, *, compiled: bool) -> list[Contender]:
    params, each, k = gradients.params, gradients.each, len(gradients.each)
    heavy: dict[str, Any] = {"lr": LR, "momentum": 0.9}
    light: dict[str, Any] = {"lr": LR}
    paths: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    paths["for-loop"] = {"foreach": False}
    found = []

    # Words: read the gradient, read and write buffers and parameter.
    for path, flags in paths.items():
        found.append(
            Contender(f"torch SGD on the sum, {path}", torch.optim.SGD(params, **heavy, **flags).step, words=5)
        )
    found.append(Contender("K bare fused SGD calls", bare(params, each), words=3 * k + 2))
    if k == 2:
        authors = AuthorsDOT(params, **heavy)
        found.append(Contender("the DOT authors' loop", lambda: authors.step(*each), words=3 * k + 2))
    for path, flags in paths.items():
        found.append(update(f"DOTSGD update, {path}", DOTSGD(params, losses=k, **heavy, **flags), gradients, 3 * k + 2))
    dot = DOTSGD(params, losses=k, fused=True, **heavy)
    found.append(after_backward("DOTSGD step() after backward(), fused", dot, gradients, 3 * k + 2))
    mokd = MoKDSGD(params, losses=k, fused=True, **heavy)
    found.append(update("MoKDSGD update, fused", mokd, gradients, 2 * k + 4))
    mokd = MoKDSGD(params, losses=k, foreach=True, **heavy)
    found.append(update("MoKDSGD update, foreach", mokd, gradients, 2 * k + 4))
    found.append(collect(gradients))

    for path, flags in paths.items():
        found.append(
            Contender(f"torch AdamW on the sum, {path}", torch.optim.AdamW(params, **light, **flags).step, words=7)
        )
    for path in paths:
        if path == "fused" and params[0].device.type == "cpu":
            continue  # torch has no kernel for several first moments
        dot_adamw = DOTAdamW(params, losses=k, **light, **paths[path])
        found.append(update(f"DOTAdamW update, {path}", dot_adamw, gradients, 3 * k + 4))
    mokd_adamw = MoKDAdamW(params, losses=k, fused=True, **light)
    found.append(update("MoKDAdamW update, fused", mokd_adamw, gradients, 2 * k + 6))

    if compiled:
        sgd, adamw = (make(params, lr=torch.tensor(LR), **flags) for make, flags in COMPILED)
        found.append(Contender("torch SGD on the sum, compiled", torch.compile(sgd.step), words=5))
        found.append(Contender("torch AdamW on the sum, compiled", torch.compile(adamw.step), words=7))
    return found + peers(gradients, heavy)


COMPILED: list[tuple[Any, dict[str, Any]]] = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]


def bare(params: Sequence[Tensor], each: Sequence[list[Tensor]]) -> Callable[[], None]:
    """The least that torch's own kernels do it in: one call per loss."""
    buffers = [[torch.zeros_like(p) for p in params] for _ in each]
    momenta = [0.825] + [0.975] * (len(each) - 1)
    target = [p.detach() for p in params]
    options: dict[str, Any] = {"weight_decay": 0.0, "lr": LR, "dampening": 0.0}
    options |= {"nesterov": False, "maximize": False, "is_first_step": False}

    def run() -> None:
        for grads, own, momentum in zip(each, buffers, momenta, strict=True):
            torch._fused_sgd_(target, grads, own, momentum=momentum, **options)

    return run


def update(name: str, optimizer: Any, gradients: Gradients, words: int) -> Contender:
    def prepare() -> None:
        optimizer._collected = gradients.collected()

    def run() -> None:
        with torch.no_grad():
            optimizer._update(optimizer._collected)

    return Contender(name, run, prepare, words)


def after_backward(name: str, optimizer: Any, gradients: Gradients, words: int) -> Contender:
    def prepare() -> None:
        gradients.sum_up()
        optimizer._collected = gradients.collected()
        with torch.no_grad():
            optimizer._collected.remember()

    return Contender(name, optimizer.step, prepare, words)


def collect(gradients: Gradients) -> Contender:
    """The sum into .grad: where autograd is handed K losses one by one, it does this itself."""

    collected: list[Collected] = []

    def prepare() -> None:
        collected[:] = [Collected(len(gradients.each))]
        for p in gradients.params:
            p.grad = None

    def run() -> None:
        with torch.no_grad():
            each: dict[int, Column] = {i: list(own) for i, own in enumerate(gradients.each)}
            collected[0].add(gradients.params, each, [None] * len(gradients.params), gradients.values())

    return Contender("collect", run, prepare, words=len(gradients.each) + 1)


def peers(gradients: Gradients, heavy: dict[str, Any]) -> list[Contender]:
    found: list[Contender] = []
    try:
        from torchjd.aggregation import MGDA
        from torchjd.autojac import jac_to_grad
    except ImportError:
        pass
    else:
        params = gradients.params
        sgd, mgda = torch.optim.SGD(params, fused=True, **heavy), MGDA()

        def prepare() -> None:
            for p, *own in zip(params, *gradients.each, strict=True):
                p.grad = None
                p.jac = torch.stack(own)

        def run() -> None:
            jac_to_grad(params, mgda)
            sgd.step()

        found.append(Contender("TorchJD jac_to_grad(MGDA), SGD fused", run, prepare, 2 * len(gradients.each) + 4))
    return found


def measure(name: str, k: int, options: argparse.Namespace) -> list[Row]:
    gradients = Gradients(shapes_of(name), k, options.device, options.dtype)
    size = sum(p.numel() for p in gradients.params) * gradients.params[0].element_size()
    gradients.sum_up()
    whole = torch.empty(size, dtype=torch.uint8, device=options.device)
    other = torch.empty_like(whole)
    copy = Contender("a copy of one set", lambda: whole.copy_(other), words=2)
    running = [*common.pick(contenders(gradients, compiled=options.compile), options), copy]

    def guarded(contender: Contender) -> Contender:
        """With a .grad to step from, which some contenders take away."""

        def prepare() -> None:
            if gradients.params[0].grad is None:
                gradients.sum_up()
            if contender.prepare is not None:
                contender.prepare()

        return Contender(contender.name, contender.run, prepare, contender.words)

    running = [guarded(c) for c in running]
    taken = common.race(running, options.device, options.rounds, refresh=gradients.draw)
    case = {
        "set": name,
        "tensors": len(gradients.params),
        "parameters": size // gradients.params[0].element_size(),
        "K": k,
    }
    rows = common.rows_of(case, running, taken, common.references(running, options))
    for row, contender in zip(rows, running, strict=True):
        assert contender.words is not None
        row["GB/s"] = contender.words * size / row["milliseconds"][0] / 1e6
    for row in rows:
        row["of a copy"] = row["GB/s"] / rows[-1]["GB/s"]
    common.profile(running, options, f"{name}, K = {k}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=25)
    parser.add_argument("--sets", nargs="+", default=["54", "330", "1600", "resnet18"], metavar="SET",
                        help=f"parameters: {', '.join(SETS)}, or COUNTxELEMENTS")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[2], help="numbers of losses K")
    parser.add_argument("--compile", action="store_true", help="also torch's optimizers compiled, which takes minutes")
    options = common.parse(parser, arguments)
    rows: list[Row] = []
    for name in options.sets:
        for k in options.losses:
            found = measure(name, k, options)
            first = found[0]
            print(f"\n{name}: {first['tensors']} tensors, {first['parameters']:,} parameters, K = {k}\n")
            heads = ["update", "ms", *(f"of “{to}”" for to in first["ratios"]), "GB/s", "of a copy"]
            cells = [
                [
                    row["contender"],
                    common.milliseconds(row["milliseconds"]),
                    *map(common.number, row["ratios"].values()),
                    f"{row['GB/s']:.1f}",
                    f"{row['of a copy']:.0%}",
                ]
                for row in found
            ]
            print(common.table(heads, cells), flush=True)
            rows += found
    common.finish(rows, options, lambda row: f"{row['set']}, K = {row['K']}", rows[0]["contender"])


if __name__ == "__main__":
    main()
