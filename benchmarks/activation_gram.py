"""The exact Gram matrix from activation gradients: how much of a whole MoKD training step it would save.

    python -m benchmarks activation_gram --students wide conv transformer vit --losses 2 8

Walking back through a layer makes two products, the gradient of its input and that of its weight. Where the first kind
is enough for the Gram matrix, the second is needed once, for the weighted sum, and not K times. A linear layer with
input X (N rows) and output gradients D_k has the weight gradients D_kᵀ X, whose inner products are

    ⟨D_aᵀ X, D_bᵀ X⟩ = ⟨X Xᵀ D_a, D_b⟩.

That takes N² (d_in + K d_out) multiplications and saves (K − 1) N d_in d_out: it pays where N is small beside the
widths. A convolution is a linear layer of its patches. Layers where it pays are taken so, the others as ever.

The rows "Gram matrix free" take every weight as 1 and look at no Gram matrix: what lies between them is the most that
any way to have it without the weight gradients can save. Before the clock starts, Gram matrix and weighted gradient
are compared in float64 with those of K plain passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from benchmarks import common
from benchmarks.common import Contender, Row
from benchmarks.models import STUDENTS, losses_of
from distill_optim import MoKDSGD, combine

# Images in a batch: N = 128 for the linear layers of "wide", 16 × 64 tokens for "vit".
IMAGES = {"wide": 128, "vit": 16}


@dataclass(frozen=True)
class Call:
    """A linear or convolutional layer in one forward pass.

    Attributes:
        layer: which.
        x: its input.
        y: its output, whose gradient is D.
    """

    layer: nn.Linear | nn.Conv2d
    x: Tensor
    y: Tensor

    def pays(self, k: int) -> bool:
        """Whether K losses take fewer multiplications with activation gradients than with weight gradients."""
        d_out, d_in = self.layer.weight.flatten(1).shape
        n = self.y.numel() // d_out
        return n * (d_in + k * d_out) < (k - 1) * d_in * d_out

    def input_rows(self) -> Tensor:
        """X, shape (N, d_in)."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return self.x.flatten(0, -2)
        assert isinstance(layer.padding, tuple)  # what the students have: no padding by name
        patches = F.unfold(self.x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.mT.flatten(0, 1)

    def output_rows(self, d: Tensor) -> Tensor:
        """D, shape (N, d_out), from the output's gradient."""
        return (d if isinstance(self.layer, nn.Linear) else d.movedim(1, -1)).flatten(0, -2)

    def gram(self, ds: Sequence[Tensor]) -> Tensor:
        """Inner products of the weight's gradients, shape (K, K), float64, from the output's."""
        x, d = self.input_rows(), torch.cat([self.output_rows(d) for d in ds], 1)
        here, there = (rows.unflatten(1, (len(ds), -1)).transpose(0, 1).flatten(1) for rows in (x @ x.T @ d, d))
        products: Tensor = here @ there.T
        return products.double()

    def weight_gradient(self, d: Tensor) -> Tensor:
        """The weight's gradient from the output's."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return self.output_rows(d).T @ self.input_rows()
        options = layer.stride, layer.padding, layer.dilation, layer.groups
        gradient: Tensor = conv2d_weight(self.x, layer.weight.shape, d, *options)
        return gradient


def record(model: nn.Module) -> dict[Tensor, Call]:
    """The calls of the layers by their weights, filled anew in every forward pass.

    Each layer is called once in a pass, no weight is tied, and nothing overwrites an output.
    """
    calls: dict[Tensor, Call] = {}

    def note(layer: nn.Linear | nn.Conv2d, x: tuple[Tensor], y: Tensor) -> None:
        calls[layer.weight] = Call(layer, x[0].detach(), y)

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(note)
    return calls


def combined(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    calls: Mapping[Tensor, Call],
    chosen: Collection[Tensor],
    weigh: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gram matrix and weighted sum of the losses' gradients.

    Args:
        losses: K scalars, each of which reaches every parameter.
        params: the parameters.
        calls: of the forward pass that the losses come from, see :func:`record`.
        chosen: the weights that are taken by activation gradients.
        weigh: from the Gram matrix to the weights; None: weights of 1, and no Gram matrix.

    Returns:
        The Gram matrix or None, and per parameter the weighted sum.
    """
    # Autograd forms no more than it is asked for: where that is an output, the weight's gradient is left out.
    asked = [calls[p].y if p in chosen else p for p in params]
    walked = [torch.autograd.grad(loss, asked, retain_graph=loss is not losses[-1]) for loss in losses]
    matrix, weights = None, losses[0].new_ones(len(losses))
    if weigh is not None:
        matrix = combine.gram([[g for p, g in zip(params, own, strict=True) if p not in chosen] for own in walked])
        for p, *ds in zip(params, *walked, strict=True):
            if p in chosen:
                matrix += calls[p].gram(ds)
        weights = weigh(matrix).to(weights)
    total = torch._foreach_mul(walked[0], weights[0])
    for own, weight in zip(walked[1:], weights[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(own, weight))
    return matrix, [calls[p].weight_gradient(d) if p in chosen else d for p, d in zip(params, total, strict=True)]


def check(net: nn.Module, x: Tensor, k: int, choose: Callable[[Call], bool]) -> int:
    """Compares with K plain passes, to 1e-10 of the largest inner product and of the gradient's length.

    Returns:
        The number of layers that were chosen.
    """
    calls, params = record(net), list(net.parameters())
    losses = losses_of(net(x), k)
    plain = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    expected = combine.gram(plain)
    weights = combine.weights(expected, torch.stack(losses).detach())
    chosen = {p for p, call in calls.items() if choose(call)}
    matrix, total = combined(losses, params, calls, chosen, lambda _: weights)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    wanted = weights.to(x) @ torch.stack([torch.cat([g.flatten() for g in own]) for own in plain])
    found = torch.cat([g.flatten() for g in total])
    torch.testing.assert_close((found - wanted).norm() / wanted.norm(), x.new_zeros(()), rtol=0, atol=1e-10)
    return len(chosen)


def contenders(student: Callable[[], nn.Module], k: int, x: Tensor) -> list[Contender]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return student().to(x)

    def mokd() -> Callable[[], object]:
        net = model()
        optimizer = MoKDSGD(net.parameters(), lr=1e-3, losses=k, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.step(losses_of(net(x), k))

        return step

    def prototype(choose: Callable[[Call], bool], *, free: bool = False) -> Callable[[], object]:
        net = model()
        calls, params = record(net), list(net.parameters())
        optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)

        def step() -> None:
            losses = losses_of(net(x), k)
            values = torch.stack(losses).detach()
            chosen = {p for p, call in calls.items() if choose(call)}
            weigh = None if free else lambda matrix: combine.weights(matrix, values)
            for p, g in zip(params, combined(losses, params, calls, chosen, weigh)[1], strict=True):
                p.grad = g
            optimizer.step()
            calls.clear()

        return step

    return [
        Contender("MoKDSGD", mokd()),
        Contender("K weight gradients", prototype(lambda _: False)),
        Contender("by activation gradients where it pays", prototype(lambda call: call.pays(k))),
        Contender("K weight gradients, Gram matrix free", prototype(lambda _: False, free=True)),
        Contender("by activation gradients, Gram matrix free", prototype(lambda _: True, free=True)),
    ]


def measure(student: str, k: int, options: argparse.Namespace) -> list[Row]:
    x = torch.randn(options.batch or IMAGES.get(student, 32), 3, 32, 32, device=options.device, dtype=options.dtype)
    net = STUDENTS[student]().to(x.device, torch.float64)
    case = {"student": student, "K": k, "layers chosen": check(net, x.double(), k, lambda call: call.pays(k))}
    running = common.pick(contenders(STUDENTS[student], k, x), options)
    taken = common.race(running, options.device, options.rounds)
    common.profile(running, options, f"{student}, K = {k}")
    return common.rows_of(case, running, taken, common.references(running, options))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=20)
    parser.add_argument("--students", nargs="+", default=["wide", "conv", "transformer", "vit"], choices=STUDENTS,
                        metavar="STUDENT", help=f"{', '.join(STUDENTS)}")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 8], help="numbers of losses K")
    parser.add_argument("--batch", type=int, help="images in a batch; default: 128 for wide, 16 for vit, 32 for others")
    parser.set_defaults(against=["K weight gradients, Gram matrix free"])
    options = common.parse(parser, arguments)
    rows: list[Row] = []
    for student in options.students:
        found = [row for k in options.losses for row in measure(student, k, options)]
        common.compare(student, found)
        chosen = (f"{row['layers chosen']} at K = {row['K']}" for row in found if row["contender"] == "MoKDSGD")
        print("layers by activation gradients where it pays: " + ", ".join(chosen), flush=True)
        rows += found
    common.finish(rows, options, lambda row: f"{row['student']}, K = {row['K']}", rows[0]["contender"])


if __name__ == "__main__":
    main()
