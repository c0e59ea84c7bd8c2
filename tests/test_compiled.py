"""Compiled models and CUDA graphs: several backward passes through what was made for one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

from distill_optim import DOTSGD, MoKDAdamW, MoKDSGD, joint_loss
from tests.helpers import OURS, batches, flat, refused, student, summed, train, two_losses

# What the compiler warns about (deprecations within torch, caches that are off) is none of ours.
pytestmark = pytest.mark.filterwarnings("ignore")

# Inductor needs a C++ compiler; the other backend runs the same traced forward and backward graphs through torch.
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler, and there is none here"
        ),
    ),
]


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, in this process or in a cache: a cached backward may be of the other kind."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, force_disable_caches=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch.compiler.reset()


def compiled(model: nn.Module, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def joint(optimizer: Any, losses: Any) -> None:
    joint_loss(losses, optimizer).backward()
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_takes_the_steps_of_the_model(backend: str) -> None:
    """One compilation, made by the first step over several losses; every optimizer and way, and a plain step after."""
    model = student(torch.float64)
    forward = compiled(model, backend)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    kinds: list[Any] = [*OURS, partial(MoKDSGD, momentum=0.9, every=3), partial(MoKDAdamW, combine="famo")]
    for kind in kinds:
        for step in (lambda optimizer, losses: optimizer.step(losses)), joint:
            model.load_state_dict(start)
            eager = student(torch.float64)
            for net, called in (model, forward), (eager, eager):
                optimizer = kind(net.parameters(), lr=0.02)
                for x in batches(4, torch.float64):
                    optimizer.zero_grad()
                    step(optimizer, two_losses(called, x))
                train(optimizer, called, batches(1, torch.float64), plain=True)
            torch.testing.assert_close(flat(model.parameters()), flat(eager.parameters()), rtol=1e-10, atol=1e-12)


def test_through_the_output_of_a_compiled_trunk() -> None:
    results = []
    for compile_ in True, False:
        model = student(torch.float64)
        forward = compiled(model, "aot_eager") if compile_ else model
        optimizer = MoKDSGD(model.parameters(), lr=0.1)
        # Even where the first backward was an ordinary one: the trunk is walked back once.
        train(optimizer, forward, batches(2, torch.float64), plain=True)
        for x in batches(4, torch.float64):
            out = forward(x)
            optimizer.zero_grad()
            optimizer.step([out.square().mean(), (out - 1).abs().mean()], through=out)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_donated_buffers_are_refused_and_the_mend_works() -> None:
    """A model whose first backward was an ordinary one: whatever the way, the message says what to set.

    The stage of the compiler that donates buffers is the same for every backend.
    """
    model = student(torch.float64)
    forward = compiled(model, "aot_eager")
    x = batches(1, torch.float64)[0]
    optimizers = [cls(model.parameters(), lr=0.02) for cls in OURS]
    summed(forward, x).backward()
    for optimizer in optimizers:
        for call in (
            lambda o: o.step(two_losses(forward, x)),
            lambda o: o.backward(two_losses(forward, x)),
            lambda o: joint(o, two_losses(forward, x)),
        ):
            with refused(optimizer, ValueError, "losses['task']", "torch._functorch.config.donated_buffer = False"):
                call(optimizer)
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        model.zero_grad()
        summed(forward, x).backward()
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.step(two_losses(forward, x))


def test_through_refuses_donated_buffers_above_it() -> None:
    trunk, head = student(torch.float64), nn.Linear(4, 3, dtype=torch.float64)
    forward = compiled(nn.Sequential(nn.Tanh(), head), "aot_eager")
    x = batches(1, torch.float64)[0]
    forward(trunk(x)).sum().backward()
    optimizer = MoKDSGD([*trunk.parameters(), *head.parameters()], lr=0.02)
    hidden = trunk(x)
    out = forward(hidden)
    with refused(optimizer, ValueError, "losses['task']", "donated_buffer = False"):
        optimizer.step([out.square().mean(), (out - 1).abs().mean()], through=hidden)


def test_losses_compiled_into_one_graph_reach_all_its_parameters() -> None:
    """A compiled graph hands a zero gradient to what a loss does not reach, so a head counts as shared there."""
    trunk, heads = nn.Linear(6, 5), [nn.Linear(5, 2), nn.Linear(5, 2)]
    params = [*trunk.parameters(), *heads[0].parameters(), *heads[1].parameters()]

    def losses(x: Tensor) -> list[Tensor]:
        hidden = trunk(x).tanh()
        return [head(hidden).square().mean() for head in heads]

    x = batches(1)[0]
    for forward, zero in (losses, False), (torch.compile(losses, backend="aot_eager"), True):
        optimizer = DOTSGD(params, lr=0.0)
        optimizer.zero_grad()
        optimizer.backward(forward(x))
        strange = optimizer._collected.gradients[0][4]  # the second head's weight
        assert (strange is not None) == zero
        if strange is not None:
            assert not strange.any()


# ------------------------------------------------------------------------------------------------ CUDA graphs


def graphed(body: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What make_graphed_callables makes, as far as a graph shows it: a Function of this name."""

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return body(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            gradient: Tensor = grads[0] * 2 * ctx.saved_tensors[0]
            return gradient

    def apply(x: Tensor) -> Tensor:
        result: Tensor = Graphed.apply(x)  # type: ignore[no-untyped-call]  # torch's
        return result

    return apply


@pytest.mark.parametrize("cls", OURS)
def test_a_graphed_callable_is_refused(cls: Any) -> None:
    model = student()
    square = graphed(torch.square)
    optimizer = cls(model.parameters(), lr=0.02)
    train(optimizer, model, batches(2))
    out = square(model(batches(1)[0]))
    for call in (
        lambda losses: optimizer.step(losses),
        lambda losses: optimizer.backward(losses),
        lambda losses: joint(optimizer, losses),
    ):
        with refused(optimizer, ValueError, "losses['task']", "make_graphed_callables", "torch.cuda.CUDAGraph"):
            call([out.mean(), (out - 1).abs().mean()])
    # The mends: the plain sum, and one loss.
    optimizer.zero_grad()
    (out.mean() + (out - 1).abs().mean()).backward()
    optimizer.step()
    optimizer.step({"task": square(model(batches(1)[0])).mean()})


def test_through_a_graphed_callable() -> None:
    """Below the tensor it is walked back once, which is right; above it once per loss, which is refused."""
    model = student()
    square = graphed(torch.square)
    optimizer = MoKDSGD(model.parameters(), lr=0.02)
    below = square(model(batches(1)[0]))
    optimizer.step([below.mean(), (below - 1).abs().mean()], through=below)
    optimizer.zero_grad()
    hidden = model(batches(1)[0])
    above = square(hidden)
    with refused(optimizer, ValueError, "losses['task']", "make_graphed_callables"):
        optimizer.step([above.mean(), (above - 1).abs().mean()], through=hidden)


@pytest.mark.cuda
@pytest.mark.parametrize("cls", OURS)
def test_a_graphed_module_is_refused_on_a_gpu(cls: Any) -> None:
    """The name that the test above stands in for is still torch's."""
    x = batches(1)[0].cuda()
    model: Any = torch.cuda.make_graphed_callables(student().cuda(), (x,))
    optimizer = cls(model.parameters(), lr=0.02)
    with refused(optimizer, ValueError, "make_graphed_callables"):
        optimizer.step(two_losses(model, x))
    train(optimizer, model, [x], plain=True)


@pytest.mark.cuda
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("cls", OURS)
def test_a_captured_step_is_the_step(cls: Any, phases: int) -> None:
    """Forward, backward passes, clipping and update in one CUDA graph, replayed on new batches."""
    flags: dict[str, Any] = {"capturable": True} if issubclass(cls, torch.optim.AdamW) else {}
    xs = [x.cuda() for x in batches(10)]
    models = [student().cuda() for _ in range(2)]
    optimizers = [cls(model.parameters(), lr=0.01, **flags) for model in models]
    static = xs[0].clone()

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        optimizer.zero_grad()
        if phases == 1:
            optimizer.step(two_losses(model, x))
        else:
            optimizer.backward(two_losses(model, x))
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    # As torch asks: a few steps on a side stream before the capture, which itself takes none.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in xs[:3]:
            static.copy_(x)
            step(models[0], optimizers[0], static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(models[0], optimizers[0], static)
    for x in xs[3:]:
        static.copy_(x)
        graph.replay()
    for x in xs:
        step(models[1], optimizers[1], x)
    torch.cuda.synchronize()
    torch.testing.assert_close(flat(models[0].parameters()), flat(models[1].parameters()), rtol=1e-5, atol=1e-6)
    # The statistics are of the captured memory: each replay writes new ones there.
    assert optimizers[0].stats is not None
    torch.testing.assert_close(optimizers[0].stats.weights, optimizers[1].stats.weights, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("cls", OURS)
def test_a_model_compiled_on_a_gpu_takes_the_steps_of_the_model(cls: Any) -> None:
    model, eager = student(torch.float64).cuda(), student(torch.float64).cuda()
    forward: Any = torch.compile(model)
    for net, called in (model, forward), (eager, eager):
        optimizer = cls(net.parameters(), lr=0.02)
        train(optimizer, called, [x.cuda() for x in batches(4, torch.float64)])
    torch.testing.assert_close(flat(model.parameters()), flat(eager.parameters()), rtol=1e-9, atol=1e-11)
