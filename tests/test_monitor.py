"""The monitor: its numbers, that it changes nothing and reads nothing, and what it says."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from distill_optim.__main__ import main
from distill_optim.gradients import Collected
from distill_optim.monitor import History, Monitor, diagnose, plot
from distill_optim.stats import Stats
from distill_optim.testing import on_fake_cuda
from tests.helpers import (
    OURS,
    assert_same_bits,
    batches,
    flat,
    gradients,
    k_losses,
    no_waiting,
    student,
    train,
    two_losses,
)

NAMES = ("task", "distill_1", "distill_2")


def grouped(model: Any) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]


def assert_record(history: History, n: int, losses: Sequence[Tensor], model: Any) -> None:
    """Record n is what plain autograd says, over the model, its modules and its groups."""
    torch.testing.assert_close(history.losses[n], torch.stack(list(losses)).detach().double())
    parts = {"all": model, "0": model[0], "2": model[2], "group_0": model[0], "group_1": model[2]}
    for u, unit in enumerate(history.units):
        g = torch.stack([flat(own) for own in gradients(losses, list(parts[unit].parameters()))])
        # Sums of some hundred float64 in another order.
        torch.testing.assert_close(history.norms[n, u], g.norm(dim=1), rtol=1e-12, atol=0)
        cosines = nn.functional.cosine_similarity(g[:, None], g, dim=-1)
        torch.testing.assert_close(history.cosines[n, u], cosines, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", OURS)
def test_records_are_those_of_plain_autograd(cls: Any) -> None:
    model = student(torch.float64)
    flags = {"nesterov": True, "momentum": 0.9} if "SGD" in cls.__name__ else {}
    optimizer = cls(grouped(model), losses=3, lr=0.01, **flags)
    monitor = Monitor(optimizer, every=1, modules=model)
    for n, x in enumerate(batches(4, torch.float64)):
        losses = k_losses(model, x, 3)
        optimizer.zero_grad()
        kept = copy.deepcopy(model)
        optimizer.step(losses)
        history = monitor.history()
        assert_record(history, n, k_losses(kept, x, 3), kept)
        assert torch.equal(history.weights[n], optimizer.stats.weights)
    assert (history.optimizer, history.names, history.steps) == (cls.__name__, NAMES, [0, 1, 2, 3])
    assert history.units == ("all", "0", "2", "group_0", "group_1")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_around_a_plain_optimizer_too(make: Any) -> None:
    model = student(torch.float64)
    optimizer = make(grouped(model), lr=0.01)
    monitor = Monitor(optimizer, every=1, modules={"0": model[0]})
    for n, x in enumerate(batches(3, torch.float64)):
        optimizer.zero_grad()
        losses = k_losses(model, x, 3)
        monitor.observe(losses)
        assert_record(monitor.history(), n, losses, model)
        torch.stack(losses).sum().backward()
        optimizer.step()
    history = monitor.history()
    assert history.names == NAMES
    assert torch.equal(history.weights, torch.ones(3, 3, dtype=torch.float64))
    torch.testing.assert_close(history.updates, history.norms, rtol=0, atol=0)


# ---------------------------------------------------------------- steps along each loss


@pytest.mark.parametrize("cls", [MoKDSGD, MoKDAdamW])
def test_mokd_steps_along_weighted_gradients(cls: Any) -> None:
    model = student(torch.float64)
    optimizer = cls(grouped(model), losses=3, lr=0.01)
    monitor = Monitor(optimizer, every=1)
    train(optimizer, model, batches(3, torch.float64), lambda model, x: k_losses(model, x, 3))
    history = monitor.history()
    torch.testing.assert_close(history.updates, history.weights[:, None] * history.norms, rtol=1e-15, atol=0)


@pytest.mark.parametrize("gain", ["paper", "matched"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_dot_steps_along_its_buffers(gain: str, momentum: float) -> None:
    model = student(torch.float64)
    delta = 0.075 if momentum else 0.0
    optimizer = DOTSGD(grouped(model), lr=0.01, momentum=momentum, delta=delta, gain=gain)
    monitor = Monitor(optimizer, every=1)
    memory = [torch.zeros(flat(model.parameters()).numel(), dtype=torch.float64) for _ in range(2)]
    first = flat(model[0].parameters()).numel()
    for n, x in enumerate(batches(4, torch.float64)):
        optimizer.zero_grad()
        losses = two_losses(model, x)
        for i, own in enumerate(gradients(losses, list(model.parameters()))):
            mu = (momentum - delta, momentum + delta)[i]
            memory[i] = mu * memory[i] + flat(own)
            c = (1 - mu) / (1 - momentum) if gain == "matched" else 1
            memory_by_unit = memory[i], memory[i][:first], memory[i][first:]
            expected = torch.stack([c * v.norm() for v in memory_by_unit])
            if i == 0:
                task = expected
        optimizer.step(losses)
        updates = monitor.history().updates[n]
        torch.testing.assert_close(updates, torch.stack([task, expected], 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"amsgrad": True}])
def test_dot_adamw_steps_along_its_first_moments(flags: dict[str, Any]) -> None:
    model = student(torch.float64)
    optimizer = DOTAdamW(model.parameters(), lr=0.01, betas=(0.8, 0.99), delta=0.1, **flags)
    monitor = Monitor(optimizer, every=1)
    moments = [torch.zeros(flat(model.parameters()).numel(), dtype=torch.float64) for _ in range(2)]
    for n, x in enumerate(batches(4, torch.float64)):
        optimizer.zero_grad()
        losses = two_losses(model, x)
        expected = []
        for i, own in enumerate(gradients(losses, list(model.parameters()))):
            beta = (0.7, 0.9)[i]
            moments[i] = beta * moments[i] + (1 - beta) * flat(own)
            expected.append(moments[i].norm() / (1 - beta ** (n + 1)))
        optimizer.step(losses)
        torch.testing.assert_close(monitor.history().updates[n, 0], torch.stack(expected), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- it changes nothing


@pytest.mark.parametrize("way", ["step", "backward", "through"])
@pytest.mark.parametrize("cls", OURS)
def test_training_is_the_same_bit_for_bit(cls: Any, way: str) -> None:
    if way == "through" and "DOT" in cls.__name__:
        pytest.skip("DOT needs every gradient")
    found = []
    for watched in False, True:
        model = student()
        optimizer = cls(grouped(model), lr=0.01)
        monitor = Monitor(optimizer, every=1, modules=model) if watched else None
        for x in batches(5):
            optimizer.zero_grad()
            out = model(x)
            losses = [out.square().mean(), (out - 1).abs().mean()]
            if way == "backward":
                optimizer.backward(losses)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            else:
                optimizer.step(losses, through=out if way == "through" else None)
        found.append([*model.parameters(), *(p.grad for p in model.parameters())])
        assert monitor is None or len(monitor.history()) == 5
    assert_same_bits(*found)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_observing_leaves_no_trace(make: Any) -> None:
    """Parameters, buffers of batch norm, the state of the random generator, .grad, hooks on .grad."""
    found = []
    for watched in False, True:
        torch.manual_seed(3)
        model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
        optimizer = make(model.parameters(), lr=0.01)
        accumulated: list[Tensor] = []
        model[0].weight.register_post_accumulate_grad_hook(accumulated.append)
        monitor = Monitor(optimizer, every=2)
        for x in batches(5):
            optimizer.zero_grad()
            checkpointed = checkpoint(model, x, use_reentrant=False)
            losses = [checkpointed.square().mean(), checkpointed.abs().mean()]
            if watched:
                before = [p.grad for p in model.parameters()]
                random = torch.get_rng_state()
                monitor.observe(losses)
                assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
                assert torch.equal(torch.get_rng_state(), random)
            torch.stack(losses).sum().backward()
            optimizer.step()
        assert len(accumulated) == 5
        # A checkpoint recomputes batch norm's statistics in every walk, so that they alone are left out.
        found.append([*model.parameters(), torch.get_rng_state()])
    assert_same_bits(*found)


def test_running_statistics_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    monitor = Monitor(torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    losses = two_losses(model, batches(1)[0])
    before = [b.clone() for b in model.buffers()]
    monitor.observe(losses)
    assert_same_bits(before, model.buffers())


# ---------------------------------------------------------------- when, and how much


def test_every_and_capacity() -> None:
    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=3, capacity=2)
    xs = batches(11)
    train(optimizer, model, xs)
    assert monitor.history().steps == [6, 9]
    plain = torch.optim.SGD(model.parameters(), lr=0.01)
    beside = Monitor(plain, every=3, capacity=2)
    for x in xs:
        beside.observe(two_losses(model, x))
    assert beside.history().steps == [6, 9]


def test_plain_steps_of_ours_are_not_recorded() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=1)
    xs = batches(2)
    train(optimizer, model, xs, plain=True)
    assert len(monitor.history()) == 0
    train(optimizer, model, xs)
    train(optimizer, model, xs, plain=True)
    assert monitor.history().steps == [0, 1]


@pytest.mark.parametrize("plain", [False, True])
def test_a_missing_loss_is_not_known(plain: bool) -> None:
    model = student()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01) if plain else DOTSGD(model.parameters(), losses=3)
    monitor = Monitor(optimizer, every=1)
    for x, missing in zip(batches(2), (None, 1), strict=True):
        losses = {name: v for i, (name, v) in enumerate(zip(NAMES, k_losses(model, x, 3), strict=True)) if i != missing}
        monitor.observe(losses) if plain else optimizer.step(losses)
    history = monitor.history()
    known = torch.tensor([[True, True, True], [True, False, True]])
    assert torch.equal(history.losses.isfinite(), known)
    assert torch.equal(history.weights.isfinite(), known)
    assert torch.equal(history.norms[:, 0].isfinite(), known)
    assert torch.equal(history.updates[:, 0].isfinite(), known)
    assert torch.equal(history.cosines[:, 0].isfinite(), known[:, :, None] & known[:, None])
    assert "cosine/task_distill_1" not in monitor.as_dict()
    assert monitor.as_dict()["conflict_rate/task_distill_1"] in (0.0, 1.0)


def test_units_without_shared_parameters_are_not_known() -> None:
    trunk, heads = nn.Linear(6, 4), [nn.Linear(4, 2), nn.Linear(4, 2)]
    everything = nn.ModuleList([trunk, *heads])
    optimizer = MoKDSGD(everything.parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=1, modules={"trunk": trunk, "head": heads[0]})
    z = trunk(batches(1)[0])
    optimizer.step([head(z).square().mean() for head in heads])
    norms = monitor.history().norms[0]
    assert torch.equal(norms.isfinite(), torch.tensor([[True, True], [True, True], [False, False]]))
    torch.testing.assert_close(norms[0], norms[1])


def test_a_weighted_sum_walked_back_has_the_gradients_that_there_are() -> None:
    model = student()
    for rule, known in {"famo": False, "min_norm": True}.items():
        optimizer = MoKDSGD(model.parameters(), lr=0.01, combine=rule)
        monitor = Monitor(optimizer, every=1, modules=model)
        out = model(batches(1)[0])
        losses = [out.square().mean(), (out - 1).abs().mean()]
        expected = torch.stack([flat(g).norm().double() for g in gradients(losses, [out])])
        optimizer.step(losses, through=out)
        history = monitor.history()
        assert bool(history.norms[0, 0].isfinite().all())
        assert not history.norms[0, 1:].isfinite().any()
        torch.testing.assert_close(history.norms[0, 0], expected)
        optimizer.step(two_losses(model, batches(1)[0]))
        assert bool(monitor.history().norms[1, 0].isfinite().all()) is known


def test_a_group_that_is_added() -> None:
    model = student()
    optimizer = MoKDSGD(model[0].parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=1)
    x = batches(1)[0]
    optimizer.step(two_losses(model, x))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.step(two_losses(model, x))
    history = monitor.history()
    assert history.units == ("all", "group_0", "group_1")
    assert torch.equal(history.norms.isfinite().all(-1), torch.tensor([[True, False, False], [True, True, True]]))
    assert history.norms[0, 0].isfinite().all()


# ---------------------------------------------------------------- loops


def test_micro_batches_are_recorded_as_the_joined_batch() -> None:
    model = student(torch.float64)
    optimizer = DOTSGD(model.parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=1)
    x = batches(1, torch.float64)[0]
    for part in x.chunk(4):
        optimizer.backward([loss / 4 for loss in k_losses(model, part, 2)])
    losses = k_losses(model, x, 2)
    expected = [flat(g).norm() for g in gradients(losses, list(model.parameters()))]
    optimizer.step()
    history = monitor.history()
    torch.testing.assert_close(history.losses[0], torch.stack(losses).detach())
    torch.testing.assert_close(history.norms[0, 0], torch.stack(expected))


@pytest.mark.parametrize("plain", [False, True])
def test_under_a_scaler_values_are_unscaled(plain: bool) -> None:
    found = []
    for scaled in False, True:
        model = student(torch.float64)
        optimizer: Any = (torch.optim.SGD if plain else MoKDSGD)(model.parameters(), lr=0.01)
        monitor = Monitor(optimizer, every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for x in batches(3, torch.float64):
            optimizer.zero_grad()
            losses = two_losses(model, x)
            if plain:
                monitor.observe(losses, scaler)
                scaler.scale(torch.stack(losses).sum()).backward()
            else:
                optimizer.backward(losses, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        history = monitor.history()
        found.append([history.losses, history.norms, history.cosines])
    assert_same_bits(*found)


def test_a_skipped_step_is_not_recorded() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for n, x in enumerate(batches(3)):
        optimizer.zero_grad()
        optimizer.backward([loss * (torch.inf if n == 1 else 1) for loss in two_losses(model, x)], scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert monitor.history().steps == [0, 1]


def test_a_wrapper_is_taken_off() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.01)
    monitor = Monitor(Wrapper(optimizer), every=1)
    train(optimizer, model, batches(2))
    assert len(monitor.history()) == 2


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own code
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="dynamo stops at statistics")
def test_a_compiled_step_is_the_step_and_has_no_statistics_to_record() -> None:
    found = []
    for watched in False, True:
        torch._dynamo.reset()
        model = student()
        optimizer = MoKDSGD(model.parameters(), lr=0.01)
        monitor = Monitor(optimizer, every=2) if watched else None
        step = torch.compile(optimizer.step, backend="eager")
        for x in batches(5):
            optimizer.zero_grad()
            step(two_losses(model, x))
        found.append(list(model.parameters()))
        assert optimizer.stats is None
        assert monitor is None or len(monitor.history()) == 0
    assert_same_bits(*found)


# ---------------------------------------------------------------- no host read


@pytest.mark.parametrize("cls", OURS)
def test_a_record_reads_nothing_on_the_host(cls: Any) -> None:
    flags = {"capturable": True} if "Adam" in cls.__name__ else {}
    optimizer = cls([{"params": [torch.zeros(2, 3)]}, {"params": [torch.zeros(4)]}], losses=3, **flags)
    monitor = Monitor(optimizer, every=1)

    def record(*tensors: Tensor) -> Tensor:
        *columns, losses, weights, gram = tensors
        collected = Collected(3)
        collected.params = [torch.zeros_like(columns[0]), torch.zeros_like(columns[1])]
        # The second of three losses is missing.
        collected.gradients = [[columns[0], columns[1]], [None, None], [columns[2], columns[3]]]
        collected.values = {0: losses[0], 2: losses[1]}
        for p in collected.params:
            optimizer.state[p] = {
                key: torch.zeros_like(p) for key in (optimizer._keys() if "DOT" in cls.__name__ else ())
            }
            optimizer.state[p]["step"] = torch.ones_like(losses[0])
        monitor._before_update(collected)
        optimizer._stats = Stats([NAMES[0], NAMES[2]], losses.double(), weights.double(), gram.double())
        monitor._after_step(optimizer, (), {})
        return monitor._records[-1][1]

    row = on_fake_cuda(record, (2, 3), (4,), (2, 3), (4,), (2,), (2,), (2, 2))
    assert (row.shape, row.dtype, row.device.type) == ((3 + 3 + 3 * (9 + 3),), torch.float64, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("cls", [*OURS, torch.optim.SGD])
def test_a_monitored_step_waits_for_no_gpu(cls: Any) -> None:
    model = student().cuda()
    optimizer = cls(grouped(model), lr=0.01, **({"capturable": True} if "Adam" in cls.__name__ else {}))
    monitor = Monitor(optimizer, every=1, modules=model)
    xs = [x.cuda() for x in batches(4)]
    for around in nullcontext, no_waiting:
        with around():
            for x in xs:
                optimizer.zero_grad()
                losses = two_losses(model, x)
                if cls in OURS:
                    optimizer.step(losses)
                else:
                    monitor.observe(losses)
    assert len(monitor.history()) == 8
    assert monitor.history().norms.isfinite().all()


# ---------------------------------------------------------------- on and off


@pytest.mark.parametrize("cls", OURS)
def test_closing_takes_everything_off(cls: Any) -> None:
    model = student()
    optimizer = cls(model.parameters(), lr=0.01)
    with Monitor(optimizer, every=1) as monitor, Monitor(optimizer, every=2) as other:
        train(optimizer, model, batches(2))
        monitor.close()
        monitor.close()
        train(optimizer, model, batches(2))
    assert (monitor.history().steps, other.history().steps) == ([0, 1], [0, 2])
    assert optimizer._watchers == ()
    assert not optimizer._optimizer_step_post_hooks
    train(optimizer, model, batches(1))
    assert len(monitor.history()) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor))])
@pytest.mark.parametrize("plain", [False, True])
def test_a_copy_has_the_records_and_is_closed(copied: Callable[[Monitor], Monitor], plain: bool) -> None:
    model = student()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01) if plain else DOTSGD(model.parameters())
    monitor = Monitor(optimizer, every=1, modules=model)
    monitor.observe(two_losses(model, batches(1)[0])) if plain else train(optimizer, model, batches(1))
    twin = copied(monitor)
    assert twin.as_dict() == monitor.as_dict()
    with pytest.raises(ValueError, match="closed"):
        twin.observe(two_losses(model, batches(1)[0]))
    monitor.observe(two_losses(model, batches(1)[0])) if plain else train(optimizer, model, batches(1))
    assert (len(monitor.history()), len(twin.history())) == (2, 1)


def test_a_copy_of_the_optimizer_is_not_watched() -> None:
    model = student()
    optimizer = DOTSGD(model.parameters())
    monitor = Monitor(optimizer, every=1)
    twin, optimizer_of_twin = copy.deepcopy((model, optimizer))
    train(optimizer_of_twin, twin, batches(2))
    assert len(monitor.history()) == 0


# ---------------------------------------------------------------- errors


def monitor_of(optimizer: Any, **options: Any) -> Monitor:
    return Monitor(optimizer, **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda model: monitor_of(model), TypeError, "expected a torch optimizer, got Sequential"),
        (lambda model: monitor_of(DOTSGD(model.parameters()), every=0), ValueError, "every=0"),
        (lambda model: monitor_of(DOTSGD(model.parameters()), capacity=2.5), ValueError, "capacity=2.5"),
        (lambda model: monitor_of(DOTSGD(model.parameters(), fold=True)), ValueError, "fold"),
        (lambda model: monitor_of(DOTSGD(model[0].parameters()), modules={"a": model[2]}), ValueError, "modules['a']"),
        (lambda model: monitor_of(DOTSGD(model.parameters()), modules={"all": model}), ValueError, "modules['all']"),
        (lambda model: monitor_of(DOTSGD(model.parameters()), modules=["0"]), TypeError, "modules: expected a model"),
    ],
)
def test_a_monitor_that_cannot_be(make: Callable[[Any], Monitor], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        make(student())
    assert words in str(raised.value)


def test_losses_that_cannot_be_observed() -> None:
    model, x = student(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(optimizer, every=1)

    def refused(words: str, losses: Any, beside: Monitor = monitor) -> None:
        with pytest.raises((TypeError, ValueError)) as raised:
            beside.observe(losses)
        assert words in str(raised.value)
        assert all(p.grad is None for p in model.parameters())

    refused("expected a list, tuple or mapping, got Tensor", model(x).sum())
    refused("has no graph", [model(x).sum(), torch.ones(())])
    refused("got shape", [model(x).sum(), model(x)])
    refused("reaches none", [model(x).sum(), torch.ones((), requires_grad=True) * 2])
    freed = model(x).sum()
    freed.backward()
    optimizer.zero_grad()
    refused("freed by an earlier backward", [freed, model(x).sum()])
    again = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    refused("use_reentrant=False", [again.sum(), again.square().sum()])
    assert len(monitor.history()) == 0
    monitor.observe({"ce": model(x).sum(), "kd": model(x).square().sum()})
    refused("'task' is not one of ('ce', 'kd')", two_losses(model, x))
    ours = Monitor(DOTSGD(model.parameters()))
    refused("the steps of DOTSGD are recorded by themselves", two_losses(model, x), ours)
    table = nn.Embedding(3, 2, sparse=True)
    sparse = Monitor(torch.optim.SGD(table.parameters(), lr=0.1))
    refused("torch.sparse_coo", [table(torch.tensor([1])).sum(), table(torch.tensor([1])).square().sum()], sparse)


def test_frozen_parameters_are_passed_over() -> None:
    model = student()
    model[0].requires_grad_(False)
    monitor = Monitor(torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    losses = two_losses(model, batches(1)[0])
    monitor.observe(losses)
    expected = [flat(g).norm().double() for g in gradients(losses, list(model[2].parameters()))]
    torch.testing.assert_close(monitor.history().norms[0, 0], torch.stack(expected))


# ---------------------------------------------------------------- numbers by name, and files


def constructed(*gradients: Sequence[Sequence[float]], optimizer: str = "SGD", weights: Any = None) -> History:
    """Records of these gradients, one list of vectors per record."""
    g = torch.tensor(gradients, dtype=torch.float64)
    norms = g.norm(dim=-1)
    n, k = norms.shape
    w = torch.ones(n, k, dtype=torch.float64) if weights is None else torch.tensor(weights).double().expand(n, k)
    cosines = torch.einsum("nid,njd->nij", g, g) / (norms[:, :, None] * norms[:, None])
    names = ("task", "distill") if k == 2 else NAMES
    return History(
        optimizer, names, ("all",), list(range(n)), norms, w, norms[:, None], cosines[:, None], (w * norms)[:, None]
    )


def test_rates_are_counted() -> None:
    """Against loops over the records."""
    g = torch.randn(50, 3, 2, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2])[:, None]
    w = torch.rand(50, 3, dtype=torch.float64)
    history = constructed(*g.tolist(), weights=w.tolist())
    for i in range(3):
        others = [j for j in range(3) if j != i]
        dominates = [bool(one[i].norm() > 3 * max(one[j].norm() for j in others)) for one in g]
        assert history.dominance()[0, i] == sum(dominates) / 50
        harmed = [bool(one[i] @ (v @ one) < 0) for one, v in zip(g, w, strict=True)]
        assert history.harm()[i] == sum(harmed) / 50
        for j in others:
            assert history.conflicts()[0, i, j] == sum(bool(one[i] @ one[j] < 0) for one in g) / 50
    assert 0 < history.harm().max() < 1
    assert 0 < history.dominance().max() < 1


def test_orthogonal_up_to_rounding_is_no_harm() -> None:
    for cosine, harm in (-1e-12, 0.0), (-1e-6, 1.0):
        history = constructed(AGREEING, weights=[0.0, 1.0])
        history.cosines[:] = torch.tensor([[1.0, cosine], [cosine, 1.0]])
        assert history.harm().tolist() == [harm, 0.0]


def test_min_norm_does_no_harm() -> None:
    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.05, losses=3)
    monitor = Monitor(optimizer, every=1)
    train(optimizer, model, batches(40), lambda model, x: k_losses(model, x, 3))
    history = monitor.history()
    assert history.conflicts().max() > 0
    assert torch.equal(history.harm(), torch.zeros(3, dtype=torch.float64))


def test_a_dictionary_for_loggers() -> None:
    model = student()
    optimizer: Any = MoKDSGD(grouped(model), lr=0.01)
    monitor = Monitor(optimizer, every=1)
    assert monitor.as_dict() == {}
    train(optimizer, model, batches(2))
    found = monitor.as_dict()
    kinds = {"norm", "update", "dominance_rate"}
    pairs = {"cosine", "norm_ratio", "conflict_rate"}
    units = ["", "/group_0", "/group_1"]
    assert set(found) == {
        *(f"{kind}/{name}" for kind in ("loss", "weight", "harm_rate") for name in ("task", "distill")),
        *(f"{kind}/{name}{unit}" for kind in kinds for name in ("task", "distill") for unit in units),
        *(f"{kind}/task_distill{unit}" for kind in pairs for unit in units),
    }
    assert all(type(v) is float for v in found.values())
    stats = optimizer.stats.as_dict()
    assert {name: pytest.approx(v, rel=1e-12) for name, v in stats.items()} == {name: found[name] for name in stats}
    assert found["norm_ratio/task_distill"] == found["norm/distill"] / found["norm/task"]


def test_json_lines_and_back(tmp_path: Path) -> None:
    model = student()
    optimizer = DOTSGD(model[0].parameters(), losses=3)
    monitor = Monitor(optimizer, every=1, modules={"loss": model[0]})
    for n, x in enumerate(batches(4)):
        if n == 2:
            optimizer.add_param_group({"params": list(model[2].parameters())})
        optimizer.zero_grad()
        losses = dict(zip(NAMES, k_losses(model, x, 3), strict=True))
        optimizer.step({name: losses[name] for name in NAMES[: 2 if n == 1 else 3]})
    path = tmp_path / "run.jsonl"
    monitor.write_json_lines(path)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["loss/distill_2"] is None
    history, read = monitor.history(), History.read_json_lines(path)
    assert (read.optimizer, read.names, read.units, read.steps) == (
        history.optimizer, history.names, history.units, history.steps
    )  # fmt: skip
    for kind in "losses", "weights", "norms", "updates":
        assert torch.equal(getattr(read, kind).nan_to_num(-1), getattr(history, kind).nan_to_num(-1)), kind
    # On the diagonal the file has no digits, but 1.
    torch.testing.assert_close(read.cosines, history.cosines, rtol=0, atol=1e-15, equal_nan=True)
    assert diagnose(read) == monitor.diagnose()


@pytest.mark.parametrize(
    "text", ["", "no json", '{"step": 0}', "[1]", '{"step": 0, "loss/task": "x", "optimizer": ""}']
)
def test_a_file_of_something_else(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="expected lines as"):
        History.read_json_lines(path)
    assert main(["diagnose", str(path)]) == 1
    assert "expected lines as" in capsys.readouterr().err


def test_the_command_line_says_what_the_monitor_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = student()
    optimizer = MoKDSGD(model.parameters())
    monitor = Monitor(optimizer, every=1)
    train(optimizer, model, batches(3))
    monitor.write_json_lines(tmp_path / "run.jsonl")
    assert main(["diagnose", str(tmp_path / "run.jsonl")]) == 0
    assert capsys.readouterr().out == monitor.diagnose() + "\n"
    assert main(["diagnose", str(tmp_path / "gone.jsonl")]) == 1
    assert "gone.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------- advice


AGREEING = [[1.0, 0.0], [1.0, 0.2]]
OPPOSED = [[1.0, 0.0], [-2.0, 1.0]]
LONG = [[0.1, 0.0], [1.0, 0.2]]
ORTHOGONAL = [[[1.0, 0.0], [0.01, 1.0]], [[1.0, 0.0], [-0.01, 1.0]]]


def test_agreement_needs_nothing() -> None:
    text = diagnose(constructed(*[AGREEING] * 30))
    assert "conflict (cosine < 0) in 0 % of the records; mean cosine 0.98" in text
    assert "Nothing to mend" in text
    assert text.count("→") == 1


def test_a_conflict_that_harms_is_named_with_its_numbers() -> None:
    text = diagnose(constructed(*[OPPOSED] * 15, *[AGREEING] * 15))
    assert "30 records of SGD, of steps 0 to 29. Losses: task, distill." in text
    assert "task and distill conflict (cosine < 0) in 50 % of the records; mean cosine 0.04" in text
    assert "makes task worse, to first order, in 50 %" in text
    assert "Try MoKDSGD" in text
    assert "distill worse" not in text
    assert "Try MoKDAdamW" in diagnose(constructed(*[OPPOSED] * 30, optimizer="AdamW"))


def test_dominance_is_named_with_its_ratio() -> None:
    text = diagnose(constructed(*[LONG] * 30))
    assert "distill dominates: its gradient is more than 3 times as long as every other in 100 %" in text
    assert "median 10.2 times" in text
    assert "Multiply distill by some 0.098" in text
    assert "task dominates" not in text


def test_right_angles_are_noise() -> None:
    text = diagnose(constructed(*ORTHOGONAL * 15))
    assert "in 50 % of the records" in text
    assert "the sign is mostly noise" in text
    assert "Nothing to mend" in text


def test_mokd_is_told_what_its_weights_do() -> None:
    resolved = diagnose(constructed(*[OPPOSED] * 30, optimizer="MoKDSGD", weights=[1.4, 0.6]))
    assert "none of them worse" in resolved
    assert "Median weights: task 1.4, distill 0.6." in resolved
    starved = diagnose(constructed(*[LONG] * 30, optimizer="MoKDSGD", weights=[1.99, 0.01]))
    assert "distill is hardly learnt from" in starved
    assert "Multiply" not in starved
    harmed = diagnose(constructed(*[OPPOSED] * 30, optimizer="MoKDSGD", weights=[1.0, 1.0]))
    assert "makes task worse" in harmed
    assert "every=1" in harmed


def test_dot_is_told_how_its_memory_weighs() -> None:
    history = constructed(*[AGREEING] * 30, optimizer="DOTSGD")
    history.updates.mul_(torch.tensor([1.0, 7.0]))
    text = diagnose(history)
    assert "7.14 times as far along distill as along task" in text
    assert "1.02 to 1" in text
    assert 'gain="matched"' in text
    assert "matched" not in diagnose(constructed(*[AGREEING] * 30, optimizer="DOTSGD"))


def test_what_cannot_be_judged_is_said() -> None:
    assert "Nothing was recorded yet" in Monitor(DOTSGD(student().parameters())).diagnose()
    assert "a first impression" in diagnose(constructed(AGREEING))
    assert "One loss" in diagnose(
        History("SGD", ("task",), ("all",), [0], *(torch.ones(1, *s) for s in ((1,), (1,), (1, 1), (1, 1, 1), (1, 1))))
    )
    unseen = constructed(*[AGREEING] * 30)
    unseen.norms.fill_(math.nan)
    assert "No two gradients were seen" in diagnose(unseen)
    lost = constructed(*[AGREEING] * 30)
    lost.norms[3:5] = math.inf
    assert "2 of the records have a gradient that is not finite" in diagnose(lost)


def test_of_many_losses_the_worst_pairs_are_named() -> None:
    k = 5
    g = torch.cat([torch.eye(k), -torch.ones(1, k)])  # five at right angles, and one against all
    history = constructed(*[g[:3].tolist()] * 30)
    assert diagnose(history).count("conflict (cosine < 0)") == 1
    names = tuple("abcdef")
    cosines = nn.functional.cosine_similarity(g[:, None], g, dim=-1).double().expand(30, 1, 6, 6)
    ones = torch.ones(30, 6, dtype=torch.float64)
    many = History("SGD", names, ("all",), list(range(30)), ones, ones, ones[:, None], cosines, ones[:, None])
    assert diagnose(many).count("conflict (cosine < 0) in 100 %") == 5
    worse = many.cosines.clone().fill_(-0.2)
    text = diagnose(History("SGD", names, ("all",), many.steps, ones, ones, ones[:, None], worse, ones[:, None]))
    assert "So do 10 more pairs" in text


def test_where_it_is_worst() -> None:
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(optimizer, every=1, modules=model)
    first, last = model[0].weight.sum(), model[2].weight.sum()
    monitor.observe([first + last, 2 * last - first])
    assert "Most in 0 (100 %), least in 2 (0 %)." in monitor.diagnose()


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_the_picture_has_all_its_text_inside(k: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    model = student()
    optimizer = MoKDSGD(model.parameters(), lr=0.01, losses=[f"a rather long name {i}" for i in range(k)])
    monitor = Monitor(optimizer, every=1)
    train(optimizer, model, batches(30), lambda model, x: k_losses(model, x, k))
    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, path: Path) -> None:
        drawn.append(figure)
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", kept)
        monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    texts = {text for text in figure.findobj(Text) if text.get_text() and text.get_visible()}
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = axis.get_view_interval()
        # Ticks beyond the limits are there and not drawn.
        texts -= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    for text in texts:
        box = text.get_window_extent()
        inside = 0 <= box.x0 < box.x1 <= figure.bbox.x1, 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert all(inside), text.get_text()
    assert len(figure.axes) == 5


def test_nothing_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was recorded"):
        Monitor(DOTSGD(student().parameters())).plot(tmp_path / "run.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install"):
        plot(constructed(AGREEING), tmp_path / "run.png")
