"""MoKDSGD and MoKDAdamW against torch's own optimizers and the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from distill_optim import MoKDAdamW, MoKDSGD
from tests.helpers import assert_same_bits, batches, flat, gradients, k_losses, student, summed, train, two_losses
from tests.test_dot import PLAIN_ADAMW, PLAIN_SGD, STEPS, TwoHeads

BOTH: list[tuple[Any, Any]] = [(MoKDSGD, SGD), (MoKDAdamW, AdamW)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "flags"), [(BOTH[0], f) for f in PLAIN_SGD] + [(BOTH[1], f) for f in PLAIN_ADAMW])
def test_untouched_loop_is_the_base(classes: tuple[Any, Any], flags: dict[str, Any], dtype: torch.dtype) -> None:
    models = student(dtype), student(dtype)
    for cls, model in zip(classes, models, strict=True):
        optimizer = cls(model.parameters(), **flags)
        train(optimizer, model, batches(STEPS, dtype), plain=True)
    assert_same_bits(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize("dominance", ["log", "norm", "none"])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("classes", BOTH)
def test_equal_losses_give_the_step_of_the_sum(classes: tuple[Any, Any], k: int, dominance: str) -> None:
    """K times the same loss: the weights are exactly 1, and the step is that of K · L."""
    ours, theirs = student(torch.float64), student(torch.float64)
    optimizer = classes[0](ours.parameters(), lr=0.01, losses=k, dominance=dominance)
    base = classes[1](theirs.parameters(), lr=0.01)
    for x in batches(10, torch.float64):
        optimizer.zero_grad()
        optimizer.step([two_losses(ours, x)[0]] * k)
        assert torch.equal(optimizer.stats.weights, torch.ones(k, dtype=torch.float64))
        base.zero_grad()
        (k * two_losses(theirs, x)[0]).backward()
        base.step()
    # g + g + g against 3·g, and the same for the steps that follow: some roundings.
    torch.testing.assert_close(flat(ours.parameters()), flat(theirs.parameters()), rtol=1e-12, atol=1e-13)


def combined(model: nn.Module, losses: list[Tensor], weights: Tensor) -> Tensor:
    grads = gradients(losses, list(model.parameters()))
    return torch.stack([flat(g) for g in grads]).T @ weights.to(grads[0][0])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dominance", ["log", "norm", "none"])
def test_the_step_is_the_min_norm_point(dominance: str, rescale: bool) -> None:
    """For K = 2 by the clamped formula, from gradients taken another way."""
    model = student(torch.float64)
    optimizer = MoKDSGD(model.parameters(), lr=1.0, dominance=dominance, rescale=rescale)
    clamped = 0
    for i, x in enumerate(batches(40, torch.float64)):
        reference = student(torch.float64, seed=i)
        model.load_state_dict(reference.state_dict())
        losses = two_losses(reference, x * 10 ** (i % 5 - 2))
        g = torch.stack([flat(own) for own in gradients(losses, list(reference.parameters()))])
        values = torch.stack(losses).detach()
        scale = {"log": 1 / values, "norm": 1 / g.norm(dim=1), "none": torch.ones(2, dtype=torch.float64)}[dominance]
        u = g * scale[:, None]
        share = ((u[1] @ u[1] - u[0] @ u[1]) / (u[0] - u[1]).square().sum()).clamp(0, 1)
        clamped += bool(share.item() in (0, 1))
        weights = torch.stack([share, 1 - share]) * scale
        if rescale:
            weights = 2 * weights / weights.sum()
        optimizer.zero_grad()
        optimizer.step(two_losses(model, x * 10 ** (i % 5 - 2)))
        assert optimizer.stats is not None
        # The formula's own rounding: the difference of nearly equal gradients costs it digits.
        torch.testing.assert_close(optimizer.stats.weights, weights, rtol=1e-9, atol=1e-12)
        expected = flat(reference.parameters()) - g.T @ weights
        torch.testing.assert_close(flat(model.parameters()), expected, rtol=1e-9, atol=1e-12)
    assert 0 < clamped < 40 or dominance != "none", "the inputs should reach the clamp and the inside"


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_a_small_step_worsens_no_loss(k: int) -> None:
    """⟨g*, ∇Lᵢ⟩ ≥ 0 for every i: the direction conflicts with none, though the gradients conflict."""
    model = student(torch.float64)
    optimizer = MoKDSGD(model.parameters(), lr=1.0, losses=k)
    for x in batches(10, torch.float64):
        before = flat(model.parameters())
        g = torch.stack([flat(own) for own in gradients(k_losses(model, x, k), list(model.parameters()))])
        optimizer.zero_grad()
        optimizer.step(k_losses(model, x, k))
        direction = before - flat(model.parameters())
        assert optimizer.stats is not None
        # Rounding of an inner product of vectors of these lengths.
        assert (g @ direction >= -1e-12 * g.norm(dim=1) * direction.norm()).all()
        assert (optimizer.stats.weights >= 0).all()
        torch.testing.assert_close(optimizer.stats.gram, g @ g.T, rtol=1e-10, atol=1e-14)


def test_a_parameter_that_one_loss_reaches_takes_its_gradient_as_it_is() -> None:
    """The heads see neither the weights nor the Gram matrix them."""
    model = TwoHeads(torch.float64)
    reference = copy.deepcopy(model)
    optimizer = MoKDSGD(model.parameters(), lr=0.1)
    x = batches(1, torch.float64)[0]
    a, b = gradients(reference(x), list(reference.parameters()))
    optimizer.step(model(x))
    assert optimizer.stats is not None
    trunk = torch.stack([flat(a[:2]), flat(b[:2])])
    torch.testing.assert_close(optimizer.stats.gram, trunk @ trunk.T, rtol=1e-12, atol=0)
    for p, q, g, h in zip(model.parameters(), reference.parameters(), a, b, strict=True):
        if g is None and h is None:
            assert torch.equal(p, q)
        elif g is None or h is None:
            torch.testing.assert_close(p, q - 0.1 * (g if h is None else h), rtol=1e-14, atol=0)
        else:
            w = optimizer.stats.weights
            torch.testing.assert_close(p, q - 0.1 * (w[0] * g + w[1] * h), rtol=1e-12, atol=1e-15)


def test_a_loss_that_shares_nothing_is_not_combined() -> None:
    """It would be a zero row of the Gram matrix, and the shortest vector then zero: nobody else would train."""
    shared, own = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = MoKDSGD([shared, own], lr=0.1, losses=3, dominance="none")
    optimizer.step([shared.sum(), (2 * shared).sum(), own.sum()])
    assert optimizer.stats is not None
    assert optimizer.stats.weights.tolist() == [2, 0, 1]
    assert torch.equal(shared.detach(), torch.full((3,), 0.8))
    assert torch.equal(own.detach(), torch.full((3,), 0.9))


def test_combine_may_be_a_function() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def halves(gram: Tensor, losses: Tensor) -> Tensor:
        seen.append((gram, losses))
        return torch.full_like(losses, 0.5)

    ours, theirs = student(), student()
    optimizer = MoKDSGD(ours.parameters(), lr=0.1, combine=halves, dominance="none")
    x = batches(1)[0]
    optimizer.step(two_losses(ours, x))
    base = SGD(theirs.parameters(), lr=0.1)
    summed(theirs, x).backward()
    base.step()
    assert seen[0][0].shape == (2, 2)
    assert seen[0][1].dtype == torch.float64
    # The sum of two gradients, rounded in another order.
    torch.testing.assert_close(flat(ours.parameters()), flat(theirs.parameters()), rtol=1e-6, atol=1e-7)


class CountBackward(torch.autograd.Function):
    """The identity; counts how often it is walked back."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        CountBackward.calls += 1
        return grads[0]


def counted(model: nn.Sequential, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Losses of the logits, and the logits, with a counter in the trunk."""
    hidden = CountBackward.apply(model[0](x))  # type: ignore[no-untyped-call]  # torch's
    out = model[2](model[1](hidden))
    return [out.square().mean(), (out - 1).abs().mean(), (out + 1).square().mean()], out


@pytest.mark.parametrize("k", [2, 3])
def test_through_walks_the_trunk_back_once(k: int) -> None:
    """And steps along the weighted sum, with the weights of the gradients at the tensor."""
    model = student(torch.float64)
    optimizer = MoKDSGD(model.parameters(), lr=0.1, losses=k)
    x = batches(1, torch.float64)[0]
    reference = copy.deepcopy(model)
    losses, out = counted(model, x)
    CountBackward.calls = 0
    optimizer.step(losses[:k], through=out)
    assert CountBackward.calls == 1
    again, z = counted(reference, x)
    at = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in again[:k]])
    assert optimizer.stats is not None
    torch.testing.assert_close(optimizer.stats.gram, at @ at.T, rtol=1e-12, atol=1e-16)
    expected = flat(reference.parameters()) - 0.1 * combined(reference, again[:k], optimizer.stats.weights)
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=1e-12, atol=1e-14)


def heads(model: TwoHeads, x: Tensor) -> tuple[list[Tensor], Tensor]:
    h = model.trunk(x).tanh()
    return [model.a(h).square().mean(), 0.01 * (model.b(h) - 1).square().mean()], h


@pytest.mark.parametrize("ahead", ["through", "every"])
def test_one_backward_leaves_the_heads_their_own_gradient(ahead: str) -> None:
    """Also where the loss's weight is zero, which takes its gradient out of the weighted sum."""
    model = TwoHeads(torch.float64)
    optimizer = MoKDSGD(model.parameters(), lr=0.1, dominance="none", every=2 if ahead == "every" else 1)
    xs = batches(4, torch.float64)
    for i, x in enumerate(xs):
        reference = copy.deepcopy(model)
        losses, h = heads(model, x)
        optimizer.zero_grad()
        optimizer.step(losses, through=h if ahead == "through" else None)
        assert optimizer.stats is not None
        assert optimizer.stats.weights[0] == 0, "the small loss should take it all"
        a, b = gradients(heads(reference, x)[0], list(reference.parameters()))
        if ahead == "every" and i % 2 == 0:
            continue
        for p, q, g, h_ in zip(model.parameters(), reference.parameters(), a, b, strict=True):
            if g is None and h_ is None:
                continue
            if g is None or h_ is None:
                expected = q - 0.1 * (g if h_ is None else h_)
                torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-14)
            else:
                # 2⁻¹⁶ of the loss without weight is the price of dividing it out again.
                torch.testing.assert_close(p, q - 0.2 * h_, rtol=0, atol=0.1 * 2**-15 * float(g.abs().max()))


def test_through_counts_tied_weights_as_shared() -> None:
    """A weight of the trunk that a head uses too is reached by both losses, and takes the weighted sum."""
    torch.manual_seed(0)
    tied = nn.Linear(6, 6, dtype=torch.float64)
    reference = copy.deepcopy(tied)

    def losses(layer: nn.Linear, x: Tensor) -> tuple[list[Tensor], Tensor]:
        h = layer(x).tanh()
        return [layer(h).square().mean(), (h - 1).square().mean()], h

    optimizer = MoKDSGD(tied.parameters(), lr=0.1)
    x = batches(1, torch.float64)[0]
    given, h = losses(tied, x)
    optimizer.step(given, through=h)
    assert optimizer.stats is not None
    expected = flat(reference.parameters()) - 0.1 * combined(
        reference, losses(reference, x)[0], optimizer.stats.weights
    )
    torch.testing.assert_close(flat(tied.parameters()), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cls", [MoKDSGD, MoKDAdamW])
def test_every_walks_back_once_between_new_weights(cls: Any) -> None:
    model = student(torch.float64)
    optimizer = cls(model.parameters(), lr=0.01, every=3)
    passes, weights = [], []
    for x in batches(7, torch.float64):
        CountBackward.calls = 0
        optimizer.zero_grad()
        optimizer.step(counted(model, x)[0][:2])
        passes.append(CountBackward.calls)
        weights.append(optimizer.stats.weights.tolist())
    assert passes == [2, 1, 1, 2, 1, 1, 2]
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[4] == weights[5] != weights[6]


def test_every_sees_a_group_that_is_added_between_new_weights() -> None:
    """The head comes in the middle of a cycle, and takes its only loss's gradient as it is."""
    model = TwoHeads(torch.float64)
    optimizer = MoKDSGD(model.trunk.parameters(), lr=0.1, every=4)
    x, y = batches(2, torch.float64)
    optimizer.step(heads(model, x)[0])
    optimizer.add_param_group({"params": list(model.a.parameters())})
    reference = copy.deepcopy(model)
    optimizer.zero_grad()
    model.zero_grad()
    optimizer.step(heads(model, y)[0])
    assert optimizer.stats is not None
    assert optimizer.stats.weights[0] != 1, "the weight should have to be taken out again"
    own = torch.autograd.grad(heads(reference, y)[0][0], list(reference.a.parameters()))
    for p, q, g in zip(model.a.parameters(), reference.a.parameters(), own, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-10, atol=1e-14)


def test_every_renews_the_weights_when_other_losses_come() -> None:
    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.01, every=5)
    for names in ("task", "distill"), ("task", "distill"), ("task",), ("task", "distill"), ("task", "distill"):
        losses = dict(zip(("task", "distill"), two_losses(model, batches(1)[0]), strict=True))
        optimizer.zero_grad()
        optimizer.step({name: losses[name] for name in names})
        assert optimizer.stats is not None
        assert optimizer.stats.names == names


def test_micro_batches_of_every_and_through() -> None:
    """Two halves of a batch give the step of the whole where the weights are known before."""
    x = batches(1, torch.float64)[0]
    whole, halves = student(torch.float64), student(torch.float64)
    for model, parts in (whole, [x]), (halves, list(x.chunk(2))):
        optimizer = MoKDSGD(model.parameters(), lr=0.1, every=2)
        optimizer.step(two_losses(model, x))
        optimizer.zero_grad()
        for part in parts:
            optimizer.backward([loss / len(parts) for loss in two_losses(model, part)])
        optimizer.step()
    torch.testing.assert_close(flat(whole.parameters()), flat(halves.parameters()), rtol=1e-12, atol=1e-14)


def test_every_forgets_a_step_that_was_not_taken() -> None:
    """Walked back with the weights of before, then cleared: the next step, of other losses, has weights of its own."""
    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.1, every=3)
    x = batches(1)[0]
    out = model(x)
    optimizer.step([out.square().mean(), out.abs().mean()], through=out)
    optimizer.zero_grad()
    optimizer.backward(two_losses(model, x))
    optimizer.zero_grad()
    out = model(x)
    optimizer.step({"task": out.square().mean()}, through=out)
    assert optimizer.param_groups[0]["every_count"] == 1
    assert optimizer.param_groups[0]["every_present"] == 1
