"""Bad input: a message that names the argument and the mend, and nothing changed."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, MultiLossClosure, joint_loss
from tests.helpers import OURS, batches, refused, student, two_losses

# Called with arguments of wrong types, on purpose.
dot_sgd: Any = DOTSGD
dot_adamw: Any = DOTAdamW
mokd_sgd: Any = MoKDSGD
mokd_adamw: Any = MoKDAdamW


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: dot_sgd(p, momentum=1.0, delta=0), ValueError, ["momentum", "1.0", "[0, 1)"]),
        (lambda p: dot_sgd(p, momentum=0.95), ValueError, ["delta=0.075", "'distill'", "1.025", "smaller delta"]),
        (lambda p: dot_sgd(p, momentum=0.05), ValueError, ["delta=0.075", "'task'", "-0.025"]),
        (lambda p: dot_sgd(p, momentums={"task": 1.2}), ValueError, ["momentums['task']=1.2"]),
        (lambda p: dot_sgd(p, momentums={"kd": 0.5}), ValueError, ["momentums", "'kd'", "'distill'"]),
        (lambda p: dot_sgd(p, momentums=[0.5, 0.6]), TypeError, ["momentums", "mapping"]),
        (lambda p: dot_sgd(p, gain="both"), ValueError, ["gain='both'", "'matched'"]),
        (lambda p: dot_sgd(p, lr=-1), ValueError, ["learning rate"]),
        (lambda p: dot_adamw(p, delta=0.2), ValueError, ["delta=0.2", "beta1", "1.1"]),
        (lambda p: dot_adamw(p, beta1s={"distill": -0.1}), ValueError, ["beta1s['distill']=-0.1"]),
        (lambda p: dot_sgd(p, losses=("a", "a")), ValueError, ["losses", "'a'", "twice"]),
        (lambda p: dot_sgd(p, losses=0), ValueError, ["losses=0"]),
        (lambda p: dot_sgd(p, losses=()), ValueError, ["losses"]),
        (lambda p: mokd_sgd(p, losses="task"), TypeError, ["losses='task'", "sequence of names"]),
        (lambda p: mokd_sgd(p, losses=("a", 3)), TypeError, ["losses", "3"]),
        (lambda p: mokd_sgd(p, losses=2.0), TypeError, ["losses=2.0"]),
        (lambda p: mokd_sgd(p, combine="max_norm"), ValueError, ["combine='max_norm'", "'min_norm'"]),
        (lambda p: mokd_sgd(p, combine=3), TypeError, ["combine=3"]),
        (lambda p: mokd_sgd(p, dominance="exp"), ValueError, ["dominance='exp'", "'log'"]),
        (lambda p: mokd_sgd(p, every=0), ValueError, ["every=0"]),
        (lambda p: mokd_adamw(p, every=1.5), TypeError, ["every=1.5"]),
        (lambda p: mokd_adamw(p, process_group="all"), ValueError, ["process_group='all'", "'auto'"]),
        (lambda p: dot_sgd(p, foreach=True, fused=True), RuntimeError, ["fused", "foreach"]),
        (lambda p: dot_sgd([{"params": p, "losses": ("a", "b")}]), ValueError, ["losses", "whole optimizer"]),
        (lambda p: mokd_sgd([{"params": p, "every": 2}]), ValueError, ["every=2", "whole optimizer"]),
        (lambda p: dot_sgd([{"params": p, "delta": 0.2}]), ValueError, ["delta=0.2"]),
    ],
)
def test_a_constructor_refuses(make: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        make(list(student().parameters()))
    for word in words:
        assert word in str(raised.value)


def partly_trained(cls: Any, **options: Any) -> tuple[Any, Any]:
    """With momentum, a collected gradient and a .grad in place, so that there is something to spoil."""
    model = student()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    x, y = batches(2)
    optimizer.step(two_losses(model, x))
    optimizer.zero_grad()
    optimizer.backward(two_losses(model, y))
    return model, optimizer


def freed(m: nn.Module, x: Tensor) -> list[Tensor]:
    losses = two_losses(m, x)
    losses[1].backward()
    return losses


def second_freed(m: nn.Module, x: Tensor) -> list[Tensor]:
    losses = [two_losses(m, x)[0], two_losses(m, x)[1]]
    losses[1].backward()
    for p in m.parameters():
        p.grad = None
    return losses


BAD_LOSSES: list[tuple[Any, type[Exception], list[str]]] = [
    (lambda m, x: two_losses(m, x)[:1], ValueError, ["losses", "got 1", "'task', 'distill'"]),
    (lambda m, x: [*two_losses(m, x), m(x).sum()], ValueError, ["losses", "got 3", "losses=3"]),
    (lambda m, x: [], ValueError, ["losses", "got 0"]),
    (lambda m, x: {}, ValueError, ["losses", "empty"]),
    (lambda m, x: {"task": m(x).sum(), "kd": m(x).sum()}, ValueError, ["'kd'", "'distill'", "rename"]),
    (lambda m, x: [m(x).sum(), m(x)], ValueError, ["losses['distill']", "scalar", "(8, 4)", "mean"]),
    (lambda m, x: [m(x).sum(), m(x).sum().detach()], ValueError, ["losses['distill']", "no graph", "detached"]),
    (lambda m, x: [m(x).sum(), 0.5], TypeError, ["losses['distill']", "float"]),
    (lambda m, x: [m(x).sum(), m(x).sum() * 1j], ValueError, ["losses['distill']", "real"]),
    (
        lambda m, x: [m(x).sum(), torch.ones(3, requires_grad=True).sum()],
        ValueError,
        ["losses['distill']", "none of this optimizer's parameters"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("losses", "error", "words"), BAD_LOSSES)
@pytest.mark.parametrize("cls", OURS)
def test_bad_losses_are_refused(cls: Any, losses: Any, error: type[Exception], words: list[str]) -> None:
    model, optimizer = partly_trained(cls)
    x = batches(1)[0]
    with refused(optimizer, error, *words):
        optimizer.step(losses(model, x))
    with refused(optimizer, error, *words):
        optimizer.backward(losses(model, x))
    with refused(optimizer, error, *words):
        optimizer.step(lambda: losses(model, x))
    if "none of" not in words[-1]:
        with refused(optimizer, error, *words):
            joint_loss(losses(model, x), optimizer)
    optimizer.step()


@pytest.mark.parametrize("cls", OURS)
def test_a_freed_graph_is_refused(cls: Any) -> None:
    model = student()
    optimizer = cls(model.parameters(), lr=0.01)
    optimizer.step(two_losses(model, batches(1)[0]))
    for make in freed, second_freed:
        losses = make(model, batches(1)[0])
        with refused(optimizer, ValueError, "freed", "retain_graph"):
            optimizer.step(losses)


@pytest.mark.parametrize("every", [1, 2])
def test_a_freed_graph_is_refused_also_where_one_backward_does(every: int) -> None:
    model, optimizer = partly_trained(MoKDSGD, every=every)
    optimizer.step()
    optimizer.zero_grad()
    losses = second_freed(model, batches(1)[0])
    with refused(optimizer, ValueError, "freed"):
        optimizer.step(losses)


@pytest.mark.parametrize("given", [torch.tensor(1.0, requires_grad=True), 3.0, "losses", iter([])])
@pytest.mark.parametrize("cls", OURS)
def test_step_takes_nothing_else(cls: Any, given: Any) -> None:
    _, optimizer = partly_trained(cls)
    with refused(optimizer, TypeError, "closure", type(given).__name__):
        optimizer.step(given)


@pytest.mark.parametrize("cls", OURS)
def test_sparse_gradients_are_refused(cls: Any) -> None:
    embedding, linear = nn.Embedding(5, 6, sparse=True), nn.Linear(6, 4)
    optimizer = cls([*embedding.parameters(), *linear.parameters()])
    out = linear(embedding(torch.tensor([1, 2])))
    with refused(optimizer, ValueError, "losses['task']", "sparse", "nn.Embedding(sparse=False)"):
        optimizer.step([out.sum(), out.square().sum()])


def test_a_schedule_that_leaves_the_range_is_refused_before_anything_moves() -> None:
    model, optimizer = partly_trained(DOTSGD)
    optimizer.param_groups[0]["momentum"] = 0.95
    with refused(optimizer, ValueError, "delta=0.075", "1.025"):
        optimizer.step()
    with refused(optimizer, ValueError, "delta=0.075", "1.025"):
        optimizer.step(two_losses(model, batches(1)[0]))


@pytest.mark.parametrize("cls", [DOTSGD, DOTAdamW])
def test_dot_refuses_through(cls: Any) -> None:
    model, optimizer = partly_trained(cls)
    out = model(batches(1)[0])
    with refused(optimizer, ValueError, "through", "MoKDSGD"):
        optimizer.step([out.sum(), out.square().sum()], through=out)


@pytest.mark.parametrize("cls", [MoKDSGD, MoKDAdamW])
def test_mokd_refuses_a_wrong_through(cls: Any) -> None:
    model = student()
    optimizer = cls(model.parameters())
    x = batches(1)[0]

    def losses() -> tuple[list[Tensor], Tensor]:
        out = model(x)
        return [out.sum(), out.square().sum()], out

    given, out = losses()
    with refused(optimizer, ValueError, "through", "require grad"):
        optimizer.step(given, through=out.detach())
    with refused(optimizer, ValueError, "through", "losses['task']", "does not pass"):
        optimizer.step(given, through=model(x))
    with refused(optimizer, TypeError, "through", "str"):
        optimizer.step(given, through=["logits"])
    with refused(optimizer, ValueError, "through", "same call"):
        optimizer.step(through=out)
    optimizer.backward(given)
    given, out = losses()
    with refused(optimizer, ValueError, "through", "same way"):
        optimizer.backward(given, through=out)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("cls", OURS)
def test_a_scaler_with_nothing_collected_is_refused(cls: Any, fused: bool | None) -> None:
    model = student()
    optimizer = cls(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.step(two_losses(model, batches(1)[0]))
    optimizer.zero_grad()
    scaler.scale(torch.ones(()))
    with refused(optimizer, ValueError, "scaler.step(optimizer)", "no gradient", "optimizer.backward"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


@pytest.mark.parametrize("cls", OURS)
def test_a_state_dict_with_other_losses_is_refused(cls: Any) -> None:
    _, optimizer = partly_trained(cls)
    other = cls(student().parameters(), losses=("ce", "kd"))
    with refused(optimizer, ValueError, "state_dict", "('ce', 'kd')", "('task', 'distill')"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("cls", OURS)
def test_a_closure_for_another_optimizer_is_refused(cls: Any) -> None:
    model, optimizer = partly_trained(cls)
    other = cls(student().parameters())
    with refused(optimizer, ValueError, "closure", "another optimizer"):
        optimizer.step(MultiLossClosure(lambda: two_losses(model, batches(1)[0]), other))


def test_closures_and_joint_losses_refuse() -> None:
    model, optimizer = partly_trained(DOTSGD)
    x = batches(1)[0]
    with refused(optimizer, TypeError, "fn: expected a function", "list"):
        MultiLossClosure(cast(Any, [1.0]), optimizer)
    with refused(optimizer, TypeError, "optimizer: expected a torch optimizer", "Sequential"):
        MultiLossClosure(lambda: [], model)
    with refused(optimizer, TypeError, "optimizer: expected one of distill_optim's", "SGD"):
        joint_loss(two_losses(model, x), torch.optim.SGD(model.parameters()))
    with refused(optimizer, TypeError, "losses: expected a list", "Tensor"):
        joint_loss(model(x).sum(), optimizer)
    # A closure begins with zero_grad(), so what was collected is gone before its function is asked.
    optimizer.zero_grad()
    with refused(optimizer, TypeError, "fn: it returned Tensor"):
        optimizer.step(MultiLossClosure(lambda: model(x).sum(), optimizer))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("k", [2, 3, 9])
@pytest.mark.parametrize("cls", OURS)
def test_a_gradient_that_is_not_finite_raises_nothing(cls: Any, k: int, value: float) -> None:
    """Without a scaler the parameters become what torch would make them: not finite."""
    model = student()
    optimizer = cls(model.parameters(), losses=k)
    out = model(batches(1)[0])
    optimizer.step([out.square().mean() * (value if i == 1 else 1.0) for i in range(k)])
    assert not any(torch.isfinite(p).all() for p in model.parameters())
