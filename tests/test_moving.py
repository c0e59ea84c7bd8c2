"""Loops of others and the same loops with ours end at the same parameters: before and after of docs/moving.md, run.

A peer that is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.dot_authors import AuthorsDOT
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, combine
from tests.helpers import assert_same_bits, batches, flat, k_losses, student, two_losses

STEPS = 20
# Both sides in float64, but for the order of sums.
ROUNDING = 1e-12
PUBLISHED: dict[str, Any] = {"dominance": "none", "rescale": False}

Losses = Callable[[nn.Module, Tensor], Sequence[Tensor]]


def in_double() -> nn.Module:
    net: nn.Module = student(torch.float64)
    return net


def ends(
    make: Callable[[nn.Module], Any],
    step: Callable[[Any, nn.Module, Sequence[Tensor]], None],
    losses: Losses,
    model: Callable[[], nn.Module] = in_double,
) -> Tensor:
    """The parameters that a loop ends at."""
    net = model()
    optimizer = make(net)
    for x in batches(STEPS, next(net.parameters()).dtype):
        optimizer.zero_grad()
        step(optimizer, net, losses(net, x))
    return flat(net.parameters())


def ours(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
    optimizer.step(list(losses))


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def mokd(**options: Any) -> Callable[[nn.Module], MoKDSGD]:
    return lambda net: MoKDSGD(net.parameters(), lr=0.05, momentum=0.9, **{**PUBLISHED, **options})


# ---------------------------------------------------------------- torch.optim and weights by hand


@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.optim.SGD, DOTSGD), (torch.optim.SGD, MoKDSGD),
     (torch.optim.AdamW, DOTAdamW), (torch.optim.AdamW, MoKDAdamW)],
)  # fmt: skip
def test_a_weighted_sum_that_nobody_takes_apart_stays_what_it_was(before: Any, after: Any) -> None:
    """First only the constructor's line changes, and that changes nothing."""

    def summed(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
        (0.1 * losses[0] + 0.9 * losses[1]).backward()
        optimizer.step()

    memory = {"momentum": 0.9} if before is torch.optim.SGD else {}

    def make(cls: Any, net: nn.Module) -> Any:
        return cls(net.parameters(), lr=0.01, **memory)

    found = [ends(partial(make, cls), summed, two_losses) for cls in (before, after)]
    assert_same_bits([found[0]], [found[1]])


@pytest.mark.parametrize(
    "after",
    [lambda net: DOTSGD(net.parameters(), lr=0.05, momentum=0.9, delta=0),
     mokd(combine=partial(combine.constant, weights=[1, 1])),
     mokd(combine="sum")],
    ids=["dot", "constant", "sum"],
)  # fmt: skip
def test_weights_by_hand_stay_with_the_losses(after: Callable[[nn.Module], Any]) -> None:
    def weighted(net: nn.Module, x: Tensor) -> list[Tensor]:
        task, distill = two_losses(net, x)
        return [0.1 * task, 0.9 * distill]

    def summed(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
        (losses[0] + losses[1]).backward()
        optimizer.step()

    torch.testing.assert_close(ends(after, ours, weighted), ends(sgd, summed, weighted), rtol=0, atol=ROUNDING)


def test_weights_by_hand_may_become_an_option() -> None:
    def weighted(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
        (0.1 * losses[0] + 0.9 * losses[1]).backward()
        optimizer.step()

    after = ends(mokd(combine=partial(combine.constant, weights=[0.1, 0.9])), ours, two_losses)
    torch.testing.assert_close(after, ends(sgd, weighted, two_losses), rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------- the DOT authors' two calls


class Distilled(nn.Module):
    """A student with an adaptor that the distillation loss alone reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.student = student(torch.float64)
        self.adaptor = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.student(x)
        return logits, self.adaptor(logits)


def distilled(net: nn.Module, x: Tensor) -> list[Tensor]:
    logits, features = net(x)
    return [logits.square().mean(), (features - 1).abs().mean()]


class TwoCalls:
    """The interface of the authors' class, ``step_kd`` after one backward pass and ``step`` after the other."""

    def __init__(self, net: nn.Module, momentum: float, momentum_kd: float, **options: Any) -> None:
        self.params = list(net.parameters())
        mean, half = (momentum + momentum_kd) / 2, (momentum_kd - momentum) / 2
        self.rule = AuthorsDOT(self.params, momentum=mean, delta=half, **options)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def step_kd(self) -> None:
        self.distill = [p.grad for p in self.params]

    def step(self) -> None:
        self.rule.step([p.grad for p in self.params], self.distill)


def two_calls(optimizer: TwoCalls, net: nn.Module, losses: Sequence[Tensor]) -> None:
    task, distill = losses
    distill.backward(retain_graph=True)
    optimizer.step_kd()
    optimizer.zero_grad()
    task.backward()
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0, 5e-4])
def test_the_dot_authors_loop(weight_decay: float) -> None:
    before = ends(
        lambda net: TwoCalls(net, momentum=0.825, momentum_kd=0.975, lr=0.05, weight_decay=weight_decay),
        two_calls, two_losses,
    )  # fmt: skip
    after = ends(
        lambda net: DOTSGD(net.parameters(), lr=0.05, momentum=0.9, delta=0.075, weight_decay=weight_decay),
        ours, two_losses,
    )  # fmt: skip
    torch.testing.assert_close(after, before, rtol=0, atol=ROUNDING)


def test_the_dot_authors_loop_with_an_adaptor() -> None:
    """Without weight decay, which theirs leaves out of the first step of what distillation alone reaches."""
    before = ends(
        lambda net: TwoCalls(net, momentum=0.825, momentum_kd=0.975, lr=0.05), two_calls, distilled, Distilled
    )
    after = ends(lambda net: DOTSGD(net.parameters(), lr=0.05), ours, distilled, Distilled)
    torch.testing.assert_close(after, before, rtol=0, atol=ROUNDING)


def test_a_run_of_the_dot_authors_goes_on() -> None:
    """Their checkpoint, with its names changed as the page says."""
    net, twin = student(torch.float64), student(torch.float64)
    theirs = TwoCalls(net, momentum=0.825, momentum_kd=0.975, lr=0.05, weight_decay=5e-4)
    first, second = batches(6, torch.float64)[:3], batches(6, torch.float64)[3:]
    for x in first:
        theirs.zero_grad()
        two_calls(theirs, net, two_losses(net, x))
    twin.load_state_dict(net.state_dict())
    state = {
        i: {"momentum_buffer": theirs.rule.task[p].clone(), "momentum_kd_buffer": theirs.rule.distill[p].clone()}
        for i, p in enumerate(theirs.params)
    }

    optimizer = DOTSGD(twin.parameters(), lr=0.05, momentum=0.9, delta=0.075, weight_decay=5e-4)
    saved = optimizer.state_dict()
    saved["state"] = {
        i: {"momentum_buffer": s["momentum_buffer"], "momentum_buffer/distill": s["momentum_kd_buffer"]}
        for i, s in state.items()
    }
    optimizer.load_state_dict(saved)
    for x in second:
        theirs.zero_grad()
        two_calls(theirs, net, two_losses(net, x))
        optimizer.zero_grad()
        optimizer.step(two_losses(twin, x))
    torch.testing.assert_close(flat(twin.parameters()), flat(net.parameters()), rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------- TorchJD


def jacobian_descent(aggregator: Any) -> Callable[[Any, nn.Module, Sequence[Tensor]], None]:
    autojac = pytest.importorskip("torchjd.autojac")

    def step(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
        autojac.backward(list(losses))
        autojac.jac_to_grad(net.parameters(), aggregator)
        optimizer.step()

    return step


def beside(aggregator: Any, name: str, k: int, tolerance: float) -> None:
    losses = partial(k_losses, k=k)
    before = ends(sgd, jacobian_descent(aggregator), losses)
    after = ends(mokd(losses=k, combine=name), ours, losses)
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("theirs", "name", "k", "tolerance"),
    [
        ("Sum", "sum", 3, ROUNDING),
        ("Mean", "mean", 3, ROUNDING),
        ("MGDA", "min_norm", 2, ROUNDING),
        ("PCGrad", "pcgrad", 2, ROUNDING),
        ("IMTLG", "imtl_g", 2, ROUNDING),
        ("ConFIG", "config", 3, 1e-9),  # theirs decomposes the Jacobian, ours its Gram matrix
        # What their regularisation and early stop come to over 20 steps, where parameters move by 1.
        ("UPGrad", "upgrad", 3, 1e-2),
        ("MGDA", "min_norm", 3, 5e-2),
    ],
)
def test_torchjd(theirs: str, name: str, k: int, tolerance: float) -> None:
    beside(getattr(pytest.importorskip("torchjd.aggregation"), theirs)(), name, k, tolerance)


def test_torchjd_without_its_regularisation() -> None:
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0, reg_eps=1e-12)
    beside(pytest.importorskip("torchjd.aggregation").UPGrad(projector=projector), "upgrad", 3, 1e-9)


def test_torchjd_with_an_option() -> None:
    cagrad = pytest.importorskip("torchjd.aggregation").CAGrad(c=0.5)
    beside(cagrad, "cagrad", 3, 1e-6)  # their solver's own tolerance


class Heads(nn.Module):
    """A trunk and a head per loss."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = student(torch.float64)
        self.heads = nn.ModuleList(nn.Linear(4, 2, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.trunk(x)
        return features


def of_heads(net: Any, x: Tensor) -> list[Tensor]:
    net.features = net(x)
    first, second = (head(net.features) for head in net.heads)
    return [first.square().mean(), (second + first.detach() - 1).abs().mean()]


def test_torchjd_with_heads() -> None:
    """``mtl_backward`` gives a head its own loss's gradient, and so do ours without being told what a head is."""
    autojac = pytest.importorskip("torchjd.autojac")
    aggregator = pytest.importorskip("torchjd.aggregation").MGDA()

    def step(optimizer: Any, net: Any, losses: Sequence[Tensor]) -> None:
        autojac.mtl_backward(list(losses), features=net.features)
        autojac.jac_to_grad(net.trunk.parameters(), aggregator)
        optimizer.step()

    after = ends(mokd(combine="min_norm"), ours, of_heads, Heads)
    torch.testing.assert_close(after, ends(sgd, step, of_heads, Heads), rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------- PCGrad's forks


def pcgrad_mean(gram: Tensor, losses: Tensor) -> Tensor:
    """What ``reduction="mean"`` is there."""
    return combine.pcgrad(gram) / losses.numel()


class Surgery:
    """``PCGrad(optimizer)`` and ``pc_backward(losses)`` for two losses, written from the paper's algorithm 1."""

    def __init__(self, net: nn.Module) -> None:
        self.params, self.inner = list(net.parameters()), sgd(net)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()

    def pc_backward(self, losses: Sequence[Tensor]) -> None:
        a, b = (
            flat(torch.autograd.grad(loss, self.params, retain_graph=True, materialize_grads=True)) for loss in losses
        )
        conflict = min(float(a @ b), 0.0)
        cut = (a - conflict * b / b.square().sum()) + (b - conflict * a / a.square().sum())
        for p, part in zip(self.params, cut.split([p.numel() for p in self.params]), strict=True):
            p.grad = part.view_as(p) / 2


def surgery(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
    optimizer.pc_backward(list(losses))
    optimizer.step()


def test_pcgrad_written_out() -> None:
    after = ends(mokd(combine=pcgrad_mean), ours, two_losses)
    torch.testing.assert_close(after, ends(Surgery, surgery, two_losses), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("reduction", "rule"), [("mean", pcgrad_mean), ("sum", "pcgrad")])
def test_pcgrad_of_pytorch_optimizer(reduction: str, rule: Any) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    before = ends(lambda net: peer.PCGrad(sgd(net), reduction=reduction), surgery, two_losses)
    after = ends(mokd(combine=rule), ours, two_losses)
    torch.testing.assert_close(after, before, rtol=0, atol=ROUNDING)


def test_pcgrad_of_pytorch_optimizer_cuts_heads_too() -> None:
    """What differs: there a head is part of the vectors that are projected."""
    peer = pytest.importorskip("pytorch_optimizer")
    before = ends(lambda net: peer.PCGrad(sgd(net)), surgery, of_heads, Heads)
    after = ends(mokd(combine=pcgrad_mean), ours, of_heads, Heads)
    assert (after - before).abs().max() > 1e-3


# ---------------------------------------------------------------- ConFIG


@pytest.mark.parametrize("k", [2, 3])
def test_conflictfree(k: int) -> None:
    operators = pytest.importorskip("conflictfree.grad_operator")
    get_gradient_vector = pytest.importorskip("conflictfree.utils").get_gradient_vector
    operator = operators.ConFIGOperator()

    def step(optimizer: Any, net: nn.Module, losses: Sequence[Tensor]) -> None:
        vectors = []
        for loss in losses:
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            vectors.append(get_gradient_vector(net))
        operator.update_gradient(net, vectors)
        optimizer.step()

    losses = partial(k_losses, k=k)
    # Theirs works in the default dtype, so both sides are in float32: 1e-7 a step, and directions amplify it.
    before = ends(sgd, step, losses, student)
    after = ends(mokd(losses=k, combine="config"), ours, losses, student)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
