"""DOTSGD(fold=True): autograd adds the gradients to the momentum buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_optim import DOTSGD, MultiLossClosure, joint_loss
from tests.helpers import assert_same_bits, assert_same_tree, batches, flat, k_losses, refused, student, two_losses


class Heads(nn.Module):
    """A trunk that both losses reach, a head for each, and a layer that none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads, self.idle = (
            nn.Linear(6, 5),
            nn.ModuleList([nn.Linear(5, 2) for _ in range(2)]),
            nn.Linear(1, 1),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x).tanh()
        return [head(hidden).square().mean() for head in self.heads]


def both(model: nn.Module, **options: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    """A model that folds and one that does not, by foreach functions, which round as autograd does."""
    twin = copy.deepcopy(model)

    def groups(m: nn.Module) -> list[dict[str, Any]]:
        first, *others = m.parameters()
        return [{"params": [first], "lr": 0.02, "weight_decay": 2 * options.get("weight_decay", 0)}, {"params": others}]

    return (
        model,
        DOTSGD(groups(model), fold=True, **{"lr": 0.1, **options}),
        twin,
        DOTSGD(groups(twin), foreach=True, **{"lr": 0.1, **options}),
    )


def heads(model: nn.Module, x: Tensor) -> list[Tensor]:
    losses: list[Tensor] = model(x)
    return losses


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("gain", ["paper", "matched"])
@pytest.mark.parametrize("case", ["student", "heads"])
def test_takes_the_steps_that_stored_gradients_take(case: str, gain: str, lr: Any) -> None:
    """To the last bit, buffers included: v·μ + g is rounded twice in both."""
    model, losses = (student(), two_losses) if case == "student" else (Heads(), heads)
    a, folded, b, stored = both(model, lr=lr, gain=gain, delta=0.05)
    for x in batches(30):
        folded.step(losses(a, x))
        stored.zero_grad()
        stored.step(losses(b, x))
        assert all(p.grad is None for p in a.parameters())
    if isinstance(lr, Tensor) and gain == "matched":
        # lr times the gain is rounded to float32 in a tensor.
        torch.testing.assert_close(flat(a.parameters()), flat(b.parameters()), rtol=1e-5, atol=1e-6)
        return
    assert_same_bits(a.parameters(), b.parameters())
    assert_same_tree(folded.state_dict()["state"], stored.state_dict()["state"])


@pytest.mark.parametrize("k", [1, 3])
def test_weight_decay_and_several_losses(k: int) -> None:
    """Up to the order of a sum: μv + λθ + g here, μv + (g + λθ) there."""
    a, folded, b, stored = both(student(torch.float64), losses=k, weight_decay=0.1, momentum=0.8, delta=0.1)
    for x in batches(30, torch.float64):
        folded.step(k_losses(a, x, k))
        stored.zero_grad()
        stored.step(k_losses(b, x, k))
    torch.testing.assert_close(flat(a.parameters()), flat(b.parameters()), rtol=1e-11, atol=1e-13)


def test_a_loss_that_is_missing() -> None:
    a, folded, b, stored = both(student(), momentum=0.5)
    for n, x in enumerate(batches(12)):
        for model, optimizer in (a, folded), (b, stored):
            task, distill = two_losses(model, x)
            optimizer.zero_grad()
            optimizer.step({"task": task} if n % 3 == 1 else {"distill": distill} if n % 3 == 2 else [task, distill])
    assert_same_bits(a.parameters(), b.parameters())


def test_a_checkpoint_goes_on_either_way() -> None:
    a, folded, b, stored = both(student())
    xs = batches(8)
    for x in xs[:4]:
        folded.step(two_losses(a, x))
    b.load_state_dict(a.state_dict())
    # The option is in the checkpoint, as every option is.
    state = copy.deepcopy(folded.state_dict())
    for group in state["param_groups"]:
        group["fold"] = False
        group["foreach"] = True
    stored.load_state_dict(state)
    for x in xs[4:]:
        folded.step(two_losses(a, x))
        stored.zero_grad()
        stored.step(two_losses(b, x))
    assert_same_bits(a.parameters(), b.parameters())


def test_the_last_loss_frees_the_graph() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), fold=True)
    losses = two_losses(model, batches(1)[0])
    optimizer.step(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


def test_stats_have_values_and_no_gram_matrix() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), fold=True)
    losses = optimizer.step(two_losses(model, batches(1)[0]))
    assert optimizer.stats is not None
    assert optimizer.stats.losses.tolist() == [loss.double().item() for loss in losses]
    assert optimizer.stats.gram is None
    assert optimizer.stats.as_dict().keys() == {"loss/task", "loss/distill", "weight/task", "weight/distill"}


def test_other_leaves_get_the_gradient_of_the_sum() -> None:
    model, outside = student(), nn.Parameter(torch.ones(()))
    DOTSGD(model.parameters(), fold=True).step([outside * loss for loss in two_losses(model, batches(1)[0])])
    twin = student()
    total = torch.stack([loss.detach() for loss in two_losses(twin, batches(1)[0])]).sum()
    assert outside.grad is not None
    torch.testing.assert_close(outside.grad, total)


def test_a_hook_on_a_gradient_is_heard() -> None:
    a, folded, b, stored = both(student())
    for model in a, b:
        for p in model.parameters():
            p.register_hook(lambda grad: 2 * grad)
    for x in batches(3):
        folded.step(two_losses(a, x))
        stored.zero_grad()
        stored.step(two_losses(b, x))
    assert_same_bits(a.parameters(), b.parameters())


def test_a_backward_pass_that_fails_leaves_the_parameters_and_no_gradient() -> None:
    """The buffers may be decayed; the documentation says so."""
    model = student()
    optimizer = DOTSGD(model.parameters(), fold=True)
    optimizer.step(two_losses(model, batches(1)[0]))
    before = flat(model.parameters()).clone()
    losses = two_losses(model, batches(1)[0])
    losses[1].backward()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="freed"):
        optimizer.step(losses)
    assert torch.equal(flat(model.parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    # Nothing of that step is left over for the next.
    task = two_losses(model, batches(1)[0])[0]
    optimizer.step({"task": task})
    assert optimizer.stats is not None
    assert optimizer.stats.names == ("task",)


REFUSED: list[tuple[str, Callable[[Any, nn.Module, Sequence[Tensor]], object]]] = [
    ("give the losses to step", lambda o, m, losses: o.backward(losses)),
    ("give the losses to step", lambda o, m, losses: joint_loss(losses, o).backward()),
    ("give the losses to step", lambda o, m, losses: o.step(MultiLossClosure(lambda: losses, o))),
    ("through", lambda o, m, losses: o.step(losses, through=losses[0])),
    ("reaches none", lambda o, m, losses: o.step([losses[0], torch.ones((), requires_grad=True)])),
    ("use_reentrant", lambda o, m, losses: o.step([losses[0], checkpointed(m)])),
]


def checkpointed(model: nn.Module) -> Tensor:
    x = batches(1)[0].requires_grad_()
    out: Tensor = checkpoint(model, x, use_reentrant=True)
    return out.square().mean()


@pytest.mark.parametrize(("words", "call"), REFUSED)
def test_what_cannot_be_folded_is_refused_before_anything_is_changed(words: str, call: Any) -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), fold=True)
    optimizer.step(two_losses(model, batches(1)[0]))
    losses = two_losses(model, batches(1)[0])
    with refused(optimizer, ValueError, words):
        call(optimizer, model, losses)


def test_gradients_that_are_there_are_not_lost() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), fold=True)
    two_losses(model, batches(1)[0])[0].backward()
    with refused(optimizer, ValueError, ".grad", "zero_grad"):
        optimizer.step(two_losses(model, batches(1)[0]))


def test_a_hook_would_be_shown_a_buffer() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), fold=True)
    handle = next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with refused(optimizer, ValueError, "post-accumulate hook"):
        optimizer.step(two_losses(model, batches(1)[0]))
    handle.remove()
    optimizer.step(two_losses(model, batches(1)[0]))


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"dampening": 0.1},
        {"maximize": True},
        {"differentiable": True},
        {"weight_decay": torch.tensor(0.1)},
        {"momentum": 0.0, "delta": 0.0},
        {"momentums": {"task": 0.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_need_the_gradient_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"fold=True.*{next(iter(options))[:8]}"):
        DOTSGD(student().parameters(), fold=True, **options)


def test_the_plain_step_is_torchs() -> None:
    ours, theirs = student(), student()
    a, b = DOTSGD(ours.parameters(), lr=0.1, fold=True), torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for x in batches(5):
        for model, optimizer in (ours, a), (theirs, b):
            optimizer.zero_grad()
            torch.stack(two_losses(model, x)).sum().backward()
            optimizer.step()
    assert_same_bits(ours.parameters(), theirs.parameters())
