"""What real training loops do around a step: accumulate, clip, freeze, add groups, checkpoint, hook, tie, normalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, MultiLossClosure, joint_loss
from tests.helpers import (
    OURS,
    assert_same_bits,
    assert_same_tree,
    batches,
    flat,
    gradients,
    refused,
    student,
    train,
    two_losses,
)


def step_list(optimizer: Any, losses: Callable[[], Any]) -> None:
    optimizer.step(losses())


def step_two_phases(optimizer: Any, losses: Callable[[], Any]) -> None:
    optimizer.backward(losses())
    optimizer.step()


def step_joint(optimizer: Any, losses: Callable[[], Any]) -> None:
    joint_loss(losses(), optimizer).backward()
    optimizer.step()


def step_closure(optimizer: Any, losses: Callable[[], Any]) -> None:
    optimizer.step(MultiLossClosure(losses, optimizer))


WAYS: dict[str, Callable[[Any, Callable[[], Any]], None]] = {
    "list": step_list,
    "two phases": step_two_phases,
    "joint": step_joint,
    "closure": step_closure,
}
# Every way through the package that a loop can take: K backward passes, or one with weights known before.
KINDS: list[Any] = [
    *OURS,
    partial(MoKDSGD, momentum=0.9, every=3),
    partial(MoKDAdamW, combine="famo"),
]


def named(kind: Any) -> str:
    if isinstance(kind, partial):
        options = ",".join(f"{k}={v}" for k, v in kind.keywords.items())
        return f"{kind.func.__name__}({options})"
    return str(kind.__name__) if isinstance(kind, type) else ""


def two_sgds(params: Sequence[Tensor], own: Sequence[Sequence[Tensor]], pair: Sequence[SGD]) -> None:
    """DOT's oracle: one SGD per loss, stepped one after the other."""
    for single, grads in zip(pair, own, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        single.step()


# ------------------------------------------------------------------------------------------------ accumulation


def test_a_loss_that_some_micro_batches_lack_is_accumulated_from_the_others() -> None:
    """The teacher is asked for half of the micro-batches: two SGDs, on the sums of what was there."""
    ours, theirs = student(torch.float64), student(torch.float64)
    optimizer = DOTSGD(ours.parameters(), lr=0.05)
    params = list(theirs.parameters())
    pair = SGD(params, lr=0.05, momentum=0.9 - 0.075), SGD(params, lr=0.05, momentum=0.9 + 0.075)
    for x in batches(6, torch.float64):
        optimizer.zero_grad()
        sums: list[list[Any]] = [[0.0] * len(params), [0.0] * len(params)]
        for i, part in enumerate(x.split([1, 4, 3])):
            task, distill = two_losses(ours, part)
            optimizer.backward({"task": task, "distill": distill} if i != 1 else {"task": task})
            for n, grads in enumerate(gradients(two_losses(theirs, part), params)):
                if n == 0 or i != 1:
                    sums[n] = [a + g for a, g in zip(sums[n], grads, strict=True)]
        optimizer.step()
        two_sgds(params, sums, pair)
    torch.testing.assert_close(flat(ours.parameters()), flat(params), rtol=1e-12, atol=1e-14)


# Not with FAMO: a method of the losses' values has its weights before the backward pass, so each micro-batch its own.
@pytest.mark.parametrize("kind", KINDS[:-1], ids=named)
def test_a_step_every_fourth_micro_batch_under_a_scaler_with_clipping(kind: Any) -> None:
    """The whole recipe at once follows the run on the joined batch."""
    ours, joined = student(torch.float64), student(torch.float64)
    a, b = kind(ours.parameters(), lr=0.02), kind(joined.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    xs = batches(24, torch.float64)
    for i, x in enumerate(xs):
        scaler.scale(joint_loss([loss / 4 for loss in two_losses(ours, x)], a)).backward()
        if i % 4 == 3:
            scaler.unscale_(a)
            nn.utils.clip_grad_norm_(ours.parameters(), 0.3)
            scaler.step(a)
            scaler.update()
            a.zero_grad()
            b.zero_grad()
            b.backward(two_losses(joined, torch.cat(xs[i - 3 : i + 1])))
            nn.utils.clip_grad_norm_(joined.parameters(), 0.3)
            b.step()
    torch.testing.assert_close(flat(ours.parameters()), flat(joined.parameters()), rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_batch_that_clipping_refuses_leaves_no_trace(kind: Any) -> None:
    """``error_if_nonfinite=True`` raises between the phases; the loop drops the batch and goes on."""
    ours, theirs = student(), student()
    a, b = kind(ours.parameters(), lr=0.02), kind(theirs.parameters(), lr=0.02)
    for i, x in enumerate(batches(8)):
        a.zero_grad()
        losses = two_losses(ours, x)
        if i in (2, 3):
            losses[1] = losses[1] * torch.inf
            a.backward(losses)
            with pytest.raises(RuntimeError, match="non-finite"):
                nn.utils.clip_grad_norm_(ours.parameters(), 1.0, error_if_nonfinite=True)
            continue
        a.backward(losses)
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0, error_if_nonfinite=True)
        a.step()
        b.zero_grad()
        b.backward(two_losses(theirs, x))
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        b.step()
    assert_same_bits(ours.parameters(), theirs.parameters())
    assert_same_tree(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("foreach", [True, False])
def test_layers_are_clipped_apart(foreach: bool) -> None:
    """A norm per layer is a factor per layer: in a first step DOT moves along what is in .grad."""
    model = student(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = DOTSGD(model.parameters(), lr=0.1)
    optimizer.backward(two_losses(model, batches(1, torch.float64)[0]))
    for bound, layer in (0.01, model[0]), (0.02, model[2]):
        nn.utils.clip_grad_norm_(layer.parameters(), bound, foreach=foreach)
        total = nn.utils.get_total_norm([p.grad for p in layer.parameters()])
        torch.testing.assert_close(total.item(), bound, rtol=1e-3, atol=0)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, grad in zip(model.parameters(), before, clipped, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * grad, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------ freezing, groups


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_frozen_layer_rests_and_the_others_do_not_notice(kind: Any, way: str) -> None:
    """Frozen in the middle: parameters and buffers stay, and the rest steps as if the optimizer had the rest alone."""
    model, other = student(), student()
    a = kind(model.parameters(), lr=0.02, weight_decay=0.1)
    b = kind(other[2].parameters(), lr=0.02, weight_decay=0.1)
    model[0].requires_grad_(False)
    other[0].requires_grad_(False)
    start = [p.detach().clone() for p in model[0].parameters()]
    for net, optimizer in (model, a), (other, b):
        for x in batches(5):
            optimizer.zero_grad()
            WAYS[way](optimizer, partial(two_losses, net, x))
    assert_same_bits(model.parameters(), other.parameters())
    assert_same_bits(model[0].parameters(), start)
    assert not any(p in a.state for p in model[0].parameters())


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_layer_frozen_for_a_while_resumes_with_its_buffers(kind: Any) -> None:
    model = student()
    optimizer = kind(model.parameters(), lr=0.02)
    xs = batches(9)
    train(optimizer, model, xs[:3])
    model[0].requires_grad_(False)
    rested = [p.detach().clone() for p in model[0].parameters()]
    state = [dict(optimizer.state[p]) for p in model[0].parameters()]
    buffers = [{k: v.clone() for k, v in own.items()} for own in state]
    train(optimizer, model, xs[3:6])
    assert_same_bits(rested, model[0].parameters())
    assert_same_tree(buffers, [dict(optimizer.state[p]) for p in model[0].parameters()])
    model[0].requires_grad_(True)
    train(optimizer, model, xs[6:])
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(model[0].parameters(), rested, strict=True)
    )


@pytest.mark.parametrize("when", ["between steps", "between the phases"])
def test_a_group_that_is_added_gets_two_sgds_of_its_own(when: str) -> None:
    """What was collected before the group came does not reach it; its own lr, momentum and Δ hold for it alone."""
    ours, theirs = student(torch.float64), student(torch.float64)
    optimizer = DOTSGD(ours[2].parameters(), lr=0.02)
    params = list(theirs.parameters())
    pair = [SGD(theirs[2].parameters(), lr=0.02, momentum=0.9 + s * 0.075) for s in (-1, 1)]
    for i, x in enumerate(batches(8, torch.float64)):
        ours.zero_grad()
        if i == 4 and when == "between steps":
            optimizer.add_param_group({"params": ours[0].parameters(), "lr": 0.1, "momentum": 0.5, "delta": 0.2})
        optimizer.backward(two_losses(ours, x))
        own = gradients(two_losses(theirs, x), params)
        if i == 4 and when == "between the phases":
            optimizer.add_param_group({"params": ours[0].parameters(), "lr": 0.1, "momentum": 0.5, "delta": 0.2})
            # Its .grad is of no loss's name: the gradient of the sum, from before the group was ours.
            for p in ours[0].parameters():
                p.grad = None
            own = [[None, None, *grads[2:]] for grads in own]
        if i == 4:
            for sign, single in zip((-1, 1), pair, strict=True):
                single.add_param_group({"params": theirs[0].parameters(), "lr": 0.1, "momentum": 0.5 + sign * 0.2})
        optimizer.step()
        two_sgds(params, own, pair)
    assert_same_bits(ours.parameters(), params)


# ------------------------------------------------------------------------------------------------ checkpointing


class Checkpointed(nn.Module):
    """A trunk that may be recomputed in the backward pass, dropout in it, and a head for each loss, too."""

    def __init__(self, mode: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mode = mode
        self.stem = nn.Linear(6, 12)
        self.trunk = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(12, 4), nn.Linear(12, 4)])
        self.to(dtype)

    def again(self, module: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = module(x) if self.mode == "kept" else checkpoint(module, x, use_reentrant=self.mode != "new")
        return result

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.again(self.trunk, self.stem(x))
        return [self.again(head, hidden).square().mean() + i / 2 for i, head in enumerate(self.heads)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["new", "reentrant"])
@pytest.mark.parametrize("kind", [*KINDS, partial(MoKDSGD, combine="mean", rescale=False)], ids=named)
def test_recomputed_activations_change_nothing(kind: Any, mode: str, way: str) -> None:
    """Dropout included: every recomputation draws the masks of the forward pass."""
    results = []
    for model in Checkpointed("kept"), Checkpointed(mode):
        optimizer = kind(model.parameters(), lr=0.02)
        torch.manual_seed(5)
        for x in batches(5, torch.float64):
            optimizer.zero_grad()
            WAYS[way](optimizer, partial(model, x))
        results.append((flat(model.parameters()), optimizer.stats.as_dict()))
    # Where the losses' values alone give the weights, a reentrant checkpoint takes one backward pass per loss.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)
    for name, value in results[0][1].items():
        if name.startswith(("loss", "weight")):
            assert value == pytest.approx(results[1][1][name], rel=1e-11)


@pytest.mark.parametrize("mode", ["new", "reentrant"])
def test_through_and_recomputed_activations_of_the_trunk(mode: str) -> None:
    results = []
    for model in Checkpointed("kept"), Checkpointed(mode):
        optimizer = MoKDSGD(model.parameters(), lr=0.02)
        torch.manual_seed(5)
        for x in batches(5, torch.float64):
            hidden = model.again(model.trunk, model.stem(x))
            optimizer.zero_grad()
            optimizer.step([head(hidden).square().mean() for head in model.heads], through=hidden)
        results.append(list(model.parameters()))
    assert_same_bits(*results)


def plain_sum(model: Checkpointed, x: Tensor) -> Tensor:
    """The sum of the losses with all activations kept."""
    mode, model.mode = model.mode, "kept"
    try:
        return torch.stack(model(x)).sum()
    finally:
        model.mode = mode


@pytest.mark.parametrize("combine", ["min_norm", "famo"])
def test_every_finds_a_reentrant_head_after_a_checkpoint(combine: str) -> None:
    """What one loss alone reaches cannot be read off such a graph, and still it takes that loss's gradient."""
    model = Checkpointed("reentrant")
    optimizer = MoKDSGD(model.parameters(), lr=0.02, every=3, combine=combine)
    xs = batches(3, torch.float64)
    optimizer.step(model(xs[0]))
    resumed = MoKDSGD(model.parameters(), lr=0.02, every=3, combine=combine)
    resumed.load_state_dict(optimizer.state_dict())
    start = [p.detach().clone() for p in model.heads.parameters()]
    torch.manual_seed(9)
    own = torch.autograd.grad(plain_sum(model, xs[1]), list(model.heads.parameters()))
    torch.manual_seed(9)
    resumed.zero_grad()
    resumed.step(model(xs[1]))
    for p, old, grad in zip(model.heads.parameters(), start, own, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.02 * grad, rtol=1e-11, atol=1e-13)


def test_through_refuses_a_reentrant_checkpoint_above_it() -> None:
    model = Checkpointed("reentrant")
    optimizer = MoKDSGD(model.parameters(), lr=0.02, momentum=0.9)
    x = batches(1, torch.float64)[0]
    optimizer.step(model(x))
    hidden = model.again(model.trunk, model.stem(x))
    losses = [model.again(head, hidden).square().mean() for head in model.heads]
    with refused(optimizer, ValueError, "through", "losses['task']", "use_reentrant=False"):
        optimizer.step(losses, through=hidden)


@pytest.mark.parametrize("mode", ["kept", "new", "reentrant"])
@pytest.mark.parametrize("cls", OURS)
def test_a_recomputed_batch_norm_counts_every_recomputation(cls: Any, mode: str) -> None:
    """As torch has it: the forward pass, and one recomputation per backward pass, of which there is one per loss."""
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12))
    hidden = model[0](batches(1)[0])
    out = model[1](hidden) if mode == "kept" else checkpoint(model[1], hidden, use_reentrant=mode == "reentrant")
    cls(model.parameters()).step([out.square().mean(), (out - 1).abs().mean()])
    assert model[1].num_batches_tracked == (1 if mode == "kept" else 1 + 2)


# ------------------------------------------------------------------------------------------------ hooks


def gradient_of_joint(optimizer: Any, losses: Sequence[Tensor]) -> None:
    joint_loss(losses, optimizer).backward()


COLLECT: dict[str, Callable[[Any, Any], None]] = {
    "two phases": lambda optimizer, losses: optimizer.backward(losses),
    "joint": gradient_of_joint,
}


@pytest.mark.parametrize("collect", COLLECT)
@pytest.mark.parametrize("hook", ["parameter", "activation", "accumulated"])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_hook_sees_every_loss_and_a_linear_one_acts_as_on_the_sum(kind: Any, hook: str, collect: str) -> None:
    """Called once per backward pass; a factor of 1/4 on a layer is the layer with a quarter of the gradient."""
    hooked, scaled = student(torch.float64), student(torch.float64)
    a, b = kind(hooked.parameters(), lr=0.02), kind(scaled.parameters(), lr=0.02)
    calls: list[None] = []

    def quarter(gradient: Tensor) -> Tensor:
        calls.append(None)
        return gradient / 4

    def accumulated(p: Tensor) -> None:
        calls.append(None)
        assert p.grad is not None
        p.grad /= 4

    layer = hooked[0].weight
    if hook == "parameter":
        layer.register_hook(quarter)
    elif hook == "accumulated":
        layer.register_post_accumulate_grad_hook(accumulated)
    else:
        hooked[2].register_full_backward_hook(lambda module, given, of_output: calls.append(None))
    passes = 0
    for i, x in enumerate(batches(6, torch.float64)):
        a.zero_grad()
        COLLECT[collect](a, two_losses(hooked, x))
        one_pass = kind is KINDS[-1] or (kind is KINDS[-2] and i % 3 > 0)
        passes += 1 if one_pass else 2
        assert len(calls) == passes
        a.step()
        b.zero_grad()
        if hook == "activation":
            b.step(two_losses(scaled, x))
        else:
            # The same factor in the graph: the weight as used has four times the gradient of the weight as stored.
            weight = scaled[0].weight
            through = weight / 4 + (weight - weight / 4).detach()
            inner = nn.functional.linear(x, through, scaled[0].bias)
            out = scaled[2](scaled[1](inner))
            b.step([out.square().mean(), (out - 1).abs().mean()])
    torch.testing.assert_close(flat(hooked.parameters()), flat(scaled.parameters()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("collect", COLLECT)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_what_a_hook_keeps_is_not_written_into(kind: Any, collect: str) -> None:
    """The combination and the update work in place, but not in memory that autograd gave to somebody else."""
    model = student(torch.float64)
    optimizer = kind(model.parameters(), lr=0.02)
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(gradient: Tensor) -> None:
        kept.append(gradient)
        copies.append(gradient.clone())

    for p in model.parameters():
        p.register_hook(keep)
    for x in batches(3, torch.float64):
        optimizer.zero_grad()
        COLLECT[collect](optimizer, two_losses(model, x))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert len(kept) >= 12
    assert_same_bits(kept, copies)


@pytest.mark.parametrize("cls", OURS)
def test_a_hook_that_raises_leaves_everything_as_it_was(cls: Any) -> None:
    """In the second loss's backward pass, when the first gradient is there already."""
    model = student()
    optimizer = cls(model.parameters(), lr=0.02)
    train(optimizer, model, batches(2))
    calls: list[None] = []

    def fail(gradient: Tensor) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise ArithmeticError("from the hook")

    model[0].weight.register_hook(fail)
    losses = two_losses(model, batches(1)[0])
    with refused(optimizer, ArithmeticError, "from the hook"):
        optimizer.step(losses)
    train(optimizer, model, batches(1))


@pytest.mark.parametrize("cls", OURS)
def test_a_hook_that_takes_the_gradient_away_is_refused(cls: Any) -> None:
    """An optimizer inside the backward pass leaves nothing to be told apart."""
    model = student()
    optimizer = cls(model.parameters(), lr=0.02)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with refused(optimizer, ValueError, "losses['task']", "reaches none"):
        optimizer.step(two_losses(model, batches(1)[0]))


# ------------------------------------------------------------------------------------------------ tied weights


class Tied(nn.Module):
    """One matrix, used on the way in and on the way out, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.out = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.middle = nn.Linear(5, 5)
        self.double()

    def forward(self, tokens: Tensor) -> list[Tensor]:
        hidden = self.middle(self.embedding(tokens)).tanh()
        return [self.out(hidden).logsumexp(-1).mean(), (self.out(hidden) - 1).square().mean()]


def token_batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 7, (4, 3), generator=generator) for _ in range(n)]


@pytest.mark.parametrize("way", WAYS)
def test_tied_weights_are_two_sgds_on_the_sum_of_both_uses(way: str) -> None:
    ours, theirs = Tied(), Tied()
    optimizer = DOTSGD(ours.parameters(), lr=0.05)
    params = list(theirs.parameters())
    assert len(params) == 3
    pair = SGD(params, lr=0.05, momentum=0.9 - 0.075), SGD(params, lr=0.05, momentum=0.9 + 0.075)
    for tokens in token_batches(8):
        optimizer.zero_grad()
        WAYS[way](optimizer, partial(ours, tokens))
        two_sgds(params, gradients(theirs(tokens), params), pair)
    # A gradient of two uses is added up by whoever comes first.
    torch.testing.assert_close(flat(ours.parameters()), flat(params), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("cls", [MoKDSGD, MoKDAdamW, DOTAdamW])
def test_tied_weights_are_one_parameter_of_the_combination(cls: Any) -> None:
    """The statistics are those of three tensors; with the weights on the losses, the base takes the same step."""
    ours, theirs = Tied(), Tied()
    optimizer = cls(ours.parameters(), lr=0.05)
    base: Any = (SGD if cls is MoKDSGD else AdamW)(theirs.parameters(), lr=0.05)
    params = list(theirs.parameters())
    for tokens in token_batches(6):
        optimizer.zero_grad()
        optimizer.step(ours(tokens))
        own = [torch.cat([g.flatten() for g in grads]) for grads in gradients(theirs(tokens), params)]
        expected = torch.stack([torch.stack([a @ b for b in own]) for a in own])
        torch.testing.assert_close(optimizer.stats.gram, expected, rtol=1e-11, atol=0)
        if cls is not DOTAdamW:
            base.zero_grad()
            (torch.stack(theirs(tokens)) * optimizer.stats.weights).sum().backward()
            base.step()
            torch.testing.assert_close(flat(ours.parameters()), flat(params), rtol=1e-10, atol=1e-12)
        theirs.load_state_dict(ours.state_dict())


def test_a_loss_per_use_of_a_tied_weight_shares_it() -> None:
    """One loss comes through the way in, the other through the way out: a parameter of both."""
    model = Tied()
    optimizer = MoKDSGD(model.parameters(), lr=0.05)
    tokens = token_batches(1)[0]
    fixed = torch.ones(3, 5, dtype=torch.float64)
    optimizer.step([model.embedding(tokens).square().mean(), (model.out(fixed) - 1).square().mean()])
    assert optimizer.stats is not None
    assert optimizer.stats.gram is not None
    assert optimizer.stats.gram[0, 1] != 0
    assert optimizer.stats.weights[0] != optimizer.stats.weights[1]


# ------------------------------------------------------------------------------------------------ batch norm


def normalised(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_running_statistics_move_once_per_forward_pass(kind: Any, way: str) -> None:
    """Not once per loss: they are those of the plain loop, to the last bit, as long as the parameters are the same."""
    ours, plain = normalised(), normalised()
    # Without a learning rate both see the same activations in every step.
    optimizer, base = kind(ours.parameters(), lr=0.0, weight_decay=0.0), SGD(plain.parameters(), lr=0.0)
    for x in batches(5, torch.float64):
        optimizer.zero_grad()
        WAYS[way](optimizer, partial(two_losses, ours, x))
        base.zero_grad()
        torch.stack(two_losses(plain, x)).sum().backward()
        base.step()
    assert ours[1].num_batches_tracked == 5
    assert_same_bits(ours.buffers(), plain.buffers())
