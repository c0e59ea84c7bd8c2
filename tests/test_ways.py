"""All ways of handing the losses over take the same steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from distill_optim import DOTSGD, MoKDAdamW, MoKDSGD, MultiLossClosure, joint_loss
from tests.helpers import OURS, assert_same_bits, batches, flat, gradients, student, summed, two_losses

Way = Callable[[Any, nn.Module, Tensor], Any]


def by_name(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    task, distill = two_losses(model, x)
    return {"distill": distill, "task": task}


def two_phases(o: Any, m: nn.Module, x: Tensor) -> None:
    o.backward(two_losses(m, x))
    o.step()


def joint(o: Any, m: nn.Module, x: Tensor) -> None:
    joint_loss(two_losses(m, x), o).backward()
    o.step()


def closure_with_its_own_backward(o: Any, m: nn.Module, x: Tensor) -> None:
    def closure() -> float:
        o.zero_grad()
        o.backward(two_losses(m, x))
        return 1.0

    assert o.step(closure) == 1.0


def in_micro_batches(o: Any, m: nn.Module, x: Tensor) -> None:
    for part in x.chunk(4):
        o.backward([loss / 4 for loss in two_losses(m, part)])
    o.step()


def in_joint_micro_batches(o: Any, m: nn.Module, x: Tensor) -> None:
    for part in x.chunk(4):
        (joint_loss(two_losses(m, part), o) / 4).backward()
    o.step()


def divided_afterwards(o: Any, m: nn.Module, x: Tensor) -> None:
    for part in x.chunk(4):
        o.backward(two_losses(m, part))
    for p in m.parameters():
        assert p.grad is not None
        p.grad /= 4
    o.step()


EXACT: dict[str, Way] = {
    "tuple": lambda o, m, x: o.step(tuple(two_losses(m, x))),
    "mapping": lambda o, m, x: o.step(by_name(m, x)),
    "closure": lambda o, m, x: o.step(lambda: two_losses(m, x)),
    "closure of a mapping": lambda o, m, x: o.step(closure=lambda: by_name(m, x)),
    "closure with its own backward": closure_with_its_own_backward,
    "MultiLossClosure": lambda o, m, x: o.step(MultiLossClosure(lambda: two_losses(m, x), o)),
    "two phases": two_phases,
    "joint": joint,
}
ROUNDED: dict[str, Way] = {
    "micro-batches": in_micro_batches,
    "joint micro-batches": in_joint_micro_batches,
    "divided afterwards": divided_afterwards,
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("way", [*EXACT, *ROUNDED])
@pytest.mark.parametrize("cls", OURS)
def test_every_way_takes_the_same_steps(cls: Any, way: str, set_to_none: bool) -> None:
    listed, other = student(torch.float64), student(torch.float64)
    a, b = cls(listed.parameters(), lr=0.02, weight_decay=0.01), cls(other.parameters(), lr=0.02, weight_decay=0.01)
    for x in batches(12, torch.float64):
        a.zero_grad()
        a.step(two_losses(listed, x))
        b.zero_grad(set_to_none)
        (EXACT | ROUNDED)[way](b, other, x)
    if way in EXACT:
        assert_same_bits(listed.parameters(), other.parameters())
    else:
        # Means of means are rounded apart from the mean.
        torch.testing.assert_close(flat(listed.parameters()), flat(other.parameters()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", OURS)
def test_step_leaves_the_sum_in_grad_and_returns_the_losses(cls: Any) -> None:
    model = student(torch.float64)
    optimizer = cls(model.parameters())
    x = batches(1, torch.float64)[0]
    reference = [p.grad for p in copy.deepcopy(model).parameters()]
    twin = student(torch.float64)
    summed(twin, x).backward()
    reference = [p.grad for p in twin.parameters()]
    losses = two_losses(model, x)
    returned = optimizer.step(losses)
    for p, grad in zip(model.parameters(), reference, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-13, atol=1e-15)
    assert isinstance(returned, list)
    assert [r.item() for r in returned] == [loss.item() for loss in losses]
    assert not any(r.requires_grad for r in returned)
    assert isinstance(optimizer.step(tuple(two_losses(model, x))), tuple)
    assert list(optimizer.step(by_name(model, x))) == ["distill", "task"]
    assert optimizer.step() is None


@pytest.mark.parametrize("returned", [None, 3.5, torch.tensor(2.0), torch.tensor([2.0])])
@pytest.mark.parametrize("cls", OURS)
def test_an_ordinary_closure_has_done_its_own_backward(cls: Any, returned: Any) -> None:
    """A number, None or a tensor of one element never mean several losses."""
    ours, theirs = student(), student()
    a = cls(ours.parameters())
    base = SGD(theirs.parameters(), lr=1e-3, momentum=a.defaults["momentum"]) if isinstance(a, SGD) else None
    b = base or AdamW(theirs.parameters())
    for model, optimizer in (ours, a), (theirs, b):

        def closure(model: nn.Module = model, optimizer: Optimizer = optimizer) -> Any:
            optimizer.zero_grad()
            assert torch.is_grad_enabled()
            summed(model, batches(1)[0]).backward()
            return returned

        assert optimizer.step(closure) is returned
    assert_same_bits(ours.parameters(), theirs.parameters())
    assert a.stats is None


def test_one_loop_compares_them_all() -> None:
    """MultiLossClosure is an ordinary closure for a torch optimizer: zero_grad, sum, backward, the total."""
    plain = student()
    usual = SGD(plain.parameters(), lr=0.1, momentum=0.5)
    models = [student(), student()]
    optimizers: list[Any] = [
        SGD(models[0].parameters(), lr=0.1, momentum=0.5),
        DOTSGD(models[1].parameters(), lr=0.1, momentum=0.5, delta=0),
    ]
    for x in batches(5):
        usual.zero_grad()
        loss = summed(plain, x)
        loss.backward()
        usual.step()
        for model, optimizer in zip(models, optimizers, strict=True):
            total = optimizer.step(MultiLossClosure(partial(two_losses, model, x), optimizer))
            assert not total.requires_grad
            torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=0)
    assert_same_bits(plain.parameters(), models[0].parameters())
    # DOT without Δ is SGD on the sum, with the two gradients rounded apart.
    torch.testing.assert_close(flat(models[1].parameters()), flat(plain.parameters()), rtol=1e-4, atol=1e-6)


class Wrapper(Optimizer):
    """The shape of a framework's wrapper: an Optimizer that holds another in ``.optimizer``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state, self.param_groups, self.defaults = optimizer.state, optimizer.param_groups, optimizer.defaults


def test_wrapped_optimizers_are_unwrapped() -> None:
    model, twin = student(), student()
    optimizer, other = DOTSGD(model.parameters(), lr=0.1), DOTSGD(twin.parameters(), lr=0.1)
    x = batches(1)[0]
    joint_loss(two_losses(model, x), Wrapper(Wrapper(optimizer))).backward()
    optimizer.step()
    other.step(MultiLossClosure(lambda: two_losses(twin, x), Wrapper(other)))
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("cls", OURS)
def test_a_wrapper_that_is_a_subclass_with_copied_attributes_passes_on(cls: Any) -> None:
    """The shape of Lightning's: what is written on such an object never reaches the optimizer."""
    a, b = student(), student()
    optimizer, other = cls(a.parameters(), lr=0.01), cls(b.parameters(), lr=0.01)

    class Copied(cls):  # type: ignore[misc]  # a base that only the test knows
        def __init__(self, optimizer: Optimizer) -> None:
            self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
            self.optimizer = optimizer

        def step(self, *args: Any, **kwargs: Any) -> Any:
            return self.optimizer.step(*args, **kwargs)

    wrapped = Copied(optimizer)
    for x in batches(3):
        wrapped.zero_grad()
        wrapped.backward(two_losses(a, x))
        wrapped.step()
        other.zero_grad()
        other.step(two_losses(b, x))
    assert_same_bits(a.parameters(), b.parameters())
    assert wrapped.stats is optimizer.stats is not None


def test_joint_loss_is_the_sum() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters())
    losses = two_losses(model, batches(1)[0])
    total = joint_loss(losses, optimizer)
    assert total.shape == ()
    assert torch.equal(total, losses[0] + losses[1])
    with torch.no_grad():
        evaluated = joint_loss(two_losses(model, batches(1)[0]), optimizer)
    assert not evaluated.requires_grad


@pytest.mark.parametrize("cls", OURS)
def test_joint_loss_may_keep_the_graph(cls: Any) -> None:
    """Walked back twice with retain_graph, it counts twice; without, the second time is refused as in torch."""
    model = student(torch.float64)
    optimizer = cls(model.parameters())
    loss = joint_loss(two_losses(model, batches(1, torch.float64)[0]), optimizer)
    loss.backward(retain_graph=True)
    once = flat([p.grad for p in model.parameters()])
    loss.backward()
    torch.testing.assert_close(flat([p.grad for p in model.parameters()]), 2 * once, rtol=1e-14, atol=0)
    with pytest.raises((RuntimeError, ValueError), match=r"second time|freed"):
        loss.backward()


@pytest.fixture(params=["read", "unread"])
def factors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as where reading them would be waiting for a device."""
    if request.param == "unread":
        monkeypatch.setattr("distill_optim.gradients.collected._readable", lambda numbers: list(numbers.unbind()))


@pytest.mark.usefixtures("factors")
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_between_the_phases_acts_on_every_loss(max_norm: float) -> None:
    """DOT after clip_grad_norm_ is two SGDs on two gradients, each times the coefficient of the sum."""
    ours, theirs = student(torch.float64), student(torch.float64)
    dot = DOTSGD(ours.parameters(), lr=0.1)
    pair = (
        SGD(theirs.parameters(), lr=0.1, momentum=0.9 - 0.075),
        SGD(theirs.parameters(), lr=0.1, momentum=0.9 + 0.075),
    )
    params = list(theirs.parameters())
    for x in batches(20, torch.float64):
        dot.zero_grad()
        dot.backward(two_losses(ours, x))
        nn.utils.clip_grad_norm_(ours.parameters(), max_norm)
        dot.step()
        own = gradients(two_losses(theirs, x), params)
        total = torch.stack([(a + b).norm() for a, b in zip(*own, strict=True)]).norm()
        coefficient = (max_norm / (total + 1e-6)).clamp(max=1)
        for single, grads in zip(pair, own, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g * coefficient
            single.step()
    if max_norm > 1:
        assert_same_bits(ours.parameters(), params)
    else:
        # The coefficient is read off norms, which are rounded.
        torch.testing.assert_close(flat(ours.parameters()), flat(params), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("factors")
def test_what_is_done_to_one_parameter_stays_there() -> None:
    """Clipping the student does not scale the projector; a .grad set to None leaves its parameter out."""
    model = student(torch.float64)
    before = copy.deepcopy(model)
    optimizer = DOTSGD(model.parameters(), lr=0.1)
    optimizer.backward(two_losses(model, batches(1, torch.float64)[0]))
    grads = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    model[0].weight.grad.mul_(0.25)
    model[0].bias.grad = None
    optimizer.step()
    assert torch.equal(model[0].bias, before[0].bias)
    for layer, factor in (model[0], 0.25), (model[2], 1.0):
        # In the first step the buffers are the gradients, so the step is along their sum.
        expected = before[0 if factor < 1 else 2].weight - 0.1 * factor * grads[layer.weight]
        torch.testing.assert_close(layer.weight.detach(), expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("factors")
def test_clipping_reaches_a_parameter_of_one_loss_once() -> None:
    """Its .grad is its only loss's gradient, but not the same memory."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = DOTSGD([a, b], lr=1.0)
    optimizer.backward([a.sum(), b.sum()])
    nn.utils.clip_grad_norm_([a, b], 0.6**0.5)
    optimizer.step()
    # Six ones, clipped to √0.6: each is √0.1. The coefficient of torch has 1e-6 in its denominator.
    for p in a, b:
        torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1**0.5), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("factors")
def test_gradients_that_cancel_out_are_not_lost() -> None:
    """0/0: the norm of a .grad that is zero from the start says nothing about a factor."""
    p = nn.Parameter(torch.ones(3))
    optimizer = DOTSGD([p], lr=0.1, momentum=0.9, delta=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([p.sum(), -p.sum()])
        nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()
    # v = ±1, then ±(μ ∓ Δ + 1): the second step is along 1.85 − 1.95.
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 + 0.1 * 0.1))


def regulariser(model: nn.Module) -> Tensor:
    return 0.1 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


@pytest.mark.parametrize("way", ["before", "in the same pass", "in the same pass, first"])
@pytest.mark.parametrize("cls", OURS)
def test_a_loss_of_no_name_is_shared_by_those_with_one(cls: Any, way: str) -> None:
    """A regulariser walked back the ordinary way is part of the step, as under torch; half of it for either loss."""
    ours, named = student(torch.float64), student(torch.float64)
    a, b = cls(ours.parameters(), lr=0.01), cls(named.parameters(), lr=0.01)
    for x in batches(3, torch.float64):
        a.zero_grad()
        if way == "before":
            regulariser(ours).backward()
            a.step(two_losses(ours, x))
        elif way == "in the same pass":
            (joint_loss(two_losses(ours, x), a) + regulariser(ours)).backward()
            a.step()
        else:
            (regulariser(ours) + joint_loss(two_losses(ours, x), a)).backward()
            a.step()
        b.zero_grad()
        half = regulariser(named) / 2
        task, distill = two_losses(named, x)
        # Its value is not theirs: dominance looks at the losses that were named.
        b.step([task + (half - half.detach()), distill + (half - half.detach())])
    torch.testing.assert_close(flat(ours.parameters()), flat(named.parameters()), rtol=1e-11, atol=1e-13)


def add_noise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def mask_rows(model: Any) -> None:
    model[0].weight.grad[:4] = 0


EDITS: dict[str, Callable[[Any], Any]] = {
    "another backward": lambda m: regulariser(m).backward(),
    "a clamp": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01),
    "noise": add_noise,
    "masked rows": mask_rows,
    "another tensor": lambda m: setattr(m[0].weight, "grad", torch.ones_like(m[0].weight)),
}


@pytest.mark.usefixtures("factors")
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("phases", ["backward", "joint"])
def test_an_edit_that_is_no_factor_gives_the_plain_step(edit: str, phases: str) -> None:
    """Nobody can tell the losses apart in such a .grad, so the step is along .grad itself, along nothing else."""
    model = student(torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = DOTSGD(model.parameters(), lr=0.1)
    losses = two_losses(model, batches(1, torch.float64)[0])
    if phases == "joint":
        joint_loss(losses, optimizer).backward()
    else:
        optimizer.backward(losses)
    EDITS[edit](model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        # In the first step the buffers are the gradients, so the step is along their sum.
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * grads[name], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("factors")
def test_a_factor_is_followed_out_of_place_too() -> None:
    a, b = student(), student()
    first, second = DOTSGD(a.parameters(), lr=0.1), DOTSGD(b.parameters(), lr=0.1)
    for x in batches(3):
        for model, optimizer in (a, first), (b, second):
            optimizer.zero_grad()
            optimizer.backward(two_losses(model, x))
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad = p.grad / 4
            q.grad /= 4
        first.step()
        second.step()
    assert_same_bits(a.parameters(), b.parameters())


@pytest.mark.usefixtures("factors")
def test_cancelled_gradients_are_unscaled_like_the_others() -> None:
    """Where .grad is zero there is nothing to read a factor off; the rest of the model tells it."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = DOTSGD([p, q], lr=0.1, momentum=0.9, delta=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([p.sum() + q.sum(), q.sum() - p.sum()], scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    # v = ±1, then ±(μ ∓ Δ + 1): the second step is along 1.85 − 1.95.
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 + 0.1 * 0.1))


@pytest.mark.parametrize("cls", OURS)
def test_model_zero_grad_forgets_the_collected_gradients_too(cls: Any) -> None:
    """After a skipped step with an infinite gradient, whichever way the user clears .grad."""
    for set_to_none in True, False:
        a, b = student(), student()
        first, second = cls(a.parameters(), lr=0.01), cls(b.parameters(), lr=0.01)
        x, y = batches(2)
        first.backward([loss * torch.inf for loss in two_losses(a, x)])
        a.zero_grad(set_to_none)
        first.backward(two_losses(a, y))
        first.step()
        second.step(two_losses(b, y))
        if set_to_none:
            assert_same_bits(a.parameters(), b.parameters())
        else:
            torch.testing.assert_close(flat(a.parameters()), flat(b.parameters()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", OURS)
def test_hooks_fire_once_and_schedulers_count(cls: Any) -> None:
    model = student()
    SGD(model.parameters(), lr=0.1)
    AdamW(model.parameters())
    optimizer = cls(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    for way in EXACT.values():
        fired.clear()
        optimizer.zero_grad()
        way(optimizer, model, batches(1)[0])
        scheduler.step()
        assert fired == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_the_graph_is_freed_by_the_last_loss() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters())
    losses = two_losses(model, batches(1)[0])
    optimizer.step(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


@pytest.mark.parametrize("cls", OURS)
def test_several_dtypes_in_one_optimizer(cls: Any) -> None:
    a, b = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.bfloat16)
    optimizer = cls([*a.parameters(), *b.parameters()], lr=0.01)
    before = [p.detach().clone() for p in [*a.parameters(), *b.parameters()]]
    for x in batches(3, torch.float64):
        out = b(a(x).bfloat16()).float()
        optimizer.zero_grad()
        optimizer.step([out.square().mean(), (out - 1).abs().mean()])
    after = [*a.parameters(), *b.parameters()]
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_other_leaves_get_the_gradient_of_the_sum() -> None:
    """Parameters of another optimizer see an ordinary backward."""
    model = student(torch.float64)
    x = batches(1, torch.float64)[0].requires_grad_()
    optimizer = MoKDSGD(model[2].parameters(), lr=0.1)
    optimizer.backward(two_losses(model, x))
    ours = [x.grad, *(p.grad for p in model.parameters())]
    twin, y = student(torch.float64), x.detach().clone().requires_grad_()
    summed(twin, y).backward()
    for grad, expected in zip(ours, [y.grad, *(p.grad for p in twin.parameters())], strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-15)


def test_through_is_taken_by_joint_loss_and_closure() -> None:
    results = []
    for way in "step", "joint", "closure", "backward":
        model = student()
        optimizer = MoKDAdamW(model.parameters(), lr=0.01)
        for x in batches(5):
            kept: list[Tensor] = []

            def fn(m: nn.Module = model, x: Tensor = x, kept: list[Tensor] = kept) -> list[Tensor]:
                out = m(x)
                kept.append(out)
                return [out.square().mean(), (out - 1).abs().mean()]

            optimizer.zero_grad()
            if way == "closure":
                optimizer.step(MultiLossClosure(fn, optimizer, through=kept.pop))
            elif way == "step":
                optimizer.step(fn(), through=kept[-1])
            elif way == "joint":
                joint_loss(fn(), optimizer, through=kept[-1]).backward()
                optimizer.step()
            else:
                optimizer.backward(fn(), through=kept[-1])
                optimizer.step()
        results.append(flat(model.parameters()))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("factors")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("cls", OURS)
def test_a_factor_is_followed_in_every_dtype(cls: Any, dtype: torch.dtype) -> None:
    """Half of .grad is the gradient of half the losses: a power of two, so to the last bit."""
    start = torch.randn(7, dtype=dtype), torch.randn(3, 2, dtype=dtype).t()
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a, b = cls(ours, lr=0.01), cls(theirs, lr=0.01)

    def losses(params: list[nn.Parameter]) -> list[Tensor]:
        task = torch.stack([p.abs().square().sum().float() for p in params]).sum()
        return [task, torch.stack([(p - 1).abs().sum().float() for p in params]).sum()]

    for _ in range(4):
        a.zero_grad()
        a.backward(losses(ours))
        for p in ours:
            assert p.grad is not None
            p.grad.mul_(0.5)
        a.step()
        b.zero_grad()
        b.step([loss / 2 for loss in losses(theirs)])
    assert_same_bits(ours, theirs)


@pytest.mark.usefixtures("factors")
@pytest.mark.parametrize("edit", ["factor", "one element"])
def test_grad_is_compared_piece_by_piece(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in the last piece of a large tensor is seen."""
    monkeypatch.setattr("distill_optim.gradients.collected._BUCKET", 100)
    w = nn.Parameter(torch.randn(1_001, dtype=torch.float64))
    start, x = w.detach().clone(), torch.randn(1_001, dtype=torch.float64)
    optimizer = DOTSGD([w], lr=0.1)
    optimizer.backward([(w * x).sum(), (w * x.flip(0)).sum()])
    assert w.grad is not None
    if edit == "factor":
        w.grad *= 0.3
    else:
        w.grad[1_000] += 100
    optimizer.step()
    torch.testing.assert_close(w.detach(), start - 0.1 * w.grad, rtol=1e-12, atol=1e-14)
