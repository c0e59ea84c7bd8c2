"""Flags of torch's, each by what it means: over several losses as in a plain step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD, joint_loss
from tests.contract.inputs import DEVICES, INFOS, base_of, base_options, every_input, is_sgd, make, problem, run
from tests.helpers import OURS, assert_same_bits, batches, flat, refused, student, train, two_losses


@every_input()
def test_maximize_descends_on_the_negative_losses(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    """Bit for bit. (MoKD without the logarithm, which takes no notice of a sign.)"""
    kwargs = kwargs | ({"dominance": "none", "combine": "min_norm"} if cls in (MoKDSGD, MoKDAdamW) else {})
    seen = []
    for maximize in False, True:
        params, losses = problem(kwargs, dtype, device)

        def given(sign: int = -1 if maximize else 1, losses: Any = losses) -> list[Tensor]:
            return [sign * loss for loss in losses()]

        run(make(cls, params, kwargs | {"maximize": maximize}), given)
        seen.append(params)
    assert_same_bits(*seen)


@every_input()
def test_a_complex_parameter_is_its_two_real_parts(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    """Up to the rounding of the Gram matrix's sums."""
    z = torch.randn(2, 3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1)).to(device)
    seen = []
    for as_complex in True, False:
        start = [x.clone() if as_complex else torch.view_as_real(x.clone()) for x in z]
        params = [nn.Parameter(x) for x in start]
        k = kwargs.get("losses", 2)

        def losses(params: list[Any] = params, as_complex: bool = as_complex, k: int = k) -> list[Tensor]:
            ps = [p if as_complex else torch.view_as_complex(p) for p in params]
            return [torch.stack([(p - (1 + i) * 1j**i).abs().square().sum() for p in ps]).sum() for i in range(k)]

        run(make(cls, params, kwargs), losses)
        seen.append([torch.view_as_real(p.detach()) if as_complex else p.detach() for p in params])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plain", [True, False])
@every_input()
def test_a_tensor_lr_is_a_number_that_schedulers_write_into(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype, plain: bool
) -> None:
    seen = []
    for as_tensor in False, True:
        lr = float(kwargs.get("lr", 2.0**-7))
        params, losses = problem(kwargs, dtype, device)
        given = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
        optimizer = cls(params, **copy.deepcopy(kwargs) | {"lr": given})
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            run(optimizer, losses, 1, plain=plain)
            scheduler.step()
        assert not as_tensor or optimizer.param_groups[0]["lr"] is given
        assert float(optimizer.param_groups[0]["lr"]) == lr / 8
        seen.append(params)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # torch's Adam: bias corrections in single precision


@every_input()
def test_no_gradient_is_no_step(cls: Any, device: str, kwargs: Any, dtype: torch.dtype) -> None:
    params, _ = problem(kwargs, dtype, device)
    before = copy.deepcopy(params)
    optimizer = make(cls, params, kwargs)
    optimizer.step()
    assert_same_bits(params, before)
    assert not optimizer.state


@pytest.mark.parametrize("plain", [True, False])
@every_input()
def test_zero_gradients_leave_the_parameters_to_weight_decay(
    cls: Any, device: str, kwargs: Any, dtype: torch.dtype, plain: bool
) -> None:
    params, losses = problem(kwargs, dtype, device)
    kwargs = {"weight_decay": 0} | kwargs
    twins = copy.deepcopy(params)
    run(make(cls, params, kwargs), lambda: [0 * loss for loss in losses()], plain=plain)
    theirs = make(base_of(cls), twins, base_options(cls, kwargs) | ({"momentum": 0} if is_sgd(cls) else {})
                  | ({"nesterov": False} if kwargs.get("nesterov") else {}))  # fmt: skip
    for p in twins[:-1]:
        p.grad = torch.zeros_like(p)
    for _ in range(4):
        theirs.step()
    if kwargs["weight_decay"] == 0 or not is_sgd(cls):
        assert_same_bits(params, twins)
    else:
        assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", OURS)
def test_a_model_in_several_dtypes_and_on_several_devices(cls: Any, device: str, plain: bool) -> None:
    """Foreach and for-loop alike; half precision within its own rounding."""
    seen = []
    for foreach in False, True:
        params = [
            nn.Parameter(torch.linspace(-1, 1, 6).to(place, dtype))
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
            for place in dict.fromkeys(("cpu", device))
        ]

        def losses(params: list[Any] = params) -> list[Tensor]:
            terms = [p.double().cpu() for p in params]
            return [torch.stack([(t - i).square().sum() for t in terms]).sum() for i in (0, 2)]

        # torch's generators too give Adam this ε in half precision, which has no 1e-8.
        run(cls(params, lr=0.01, foreach=foreach, **({} if is_sgd(cls) else {"eps": 0.1})), losses, plain=plain)
        seen.append(params)
    for a, b in zip(*seen, strict=True):
        if a.dtype in (torch.float16, torch.bfloat16):
            torch.testing.assert_close(a, b, rtol=0, atol=0.02)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("cls", [DOTAdamW, MoKDAdamW])
def test_capturable_on_a_cpu_is_what_torch_makes_of_it(cls: Any, plain: bool) -> None:
    """torch's AdamW refuses it in the step. DOTAdamW's own step over losses has no need to."""
    model = student()
    optimizer = cls(model.parameters(), lr=torch.tensor(1e-3), capturable=True)
    if plain:
        two_losses(model, batches(1)[0])[0].backward()
        with pytest.raises(AssertionError, match="capturable=True"):
            optimizer.step()
    elif cls is MoKDAdamW:
        with refused(optimizer, ValueError, "capturable=True", "parameters on cpu"):
            optimizer.step(two_losses(model, batches(1)[0]))
    else:
        other = student()
        train(optimizer, model, batches(3))
        train(cls(other.parameters(), lr=1e-3), other, batches(3))
        torch.testing.assert_close(flat(model.parameters()), flat(other.parameters()))


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [DOTAdamW, MoKDAdamW])
def test_a_capturable_step_over_losses_is_captured_in_a_graph(cls: Any, fused: bool) -> None:
    seen = []
    for captured in False, True:
        model, x = student().cuda(), batches(1)[0].cuda()
        optimizer = cls(model.parameters(), lr=torch.tensor(0.01, device="cuda"), capturable=True, fused=fused)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            train(optimizer, model, [x] * 3)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train(optimizer, model, [x])
            for _ in range(4):
                graph.replay()
        else:
            train(optimizer, model, [x] * 4)
        seen.append(flat(model.parameters()))
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)


RECORDED: list[tuple[Any, dict[str, Any]]] = [
    (DOTSGD, {}),
    (DOTSGD, {"nesterov": True, "gain": "matched"}),
    (DOTAdamW, {}),
    (DOTAdamW, {"amsgrad": True, "weight_decay": 0.1}),
    (MoKDSGD, {"momentum": 0.9}),
    (MoKDAdamW, {"dominance": "norm"}),
]


@pytest.mark.parametrize(("cls", "options"), RECORDED)
def test_a_differentiable_step_over_losses_records_itself(cls: Any, options: dict[str, Any]) -> None:
    """Its derivatives by the learning rate and the start are those of finite differences (gradients are constants)."""

    def after(lr: Tensor, start: Tensor) -> Tensor:
        p = start.clone()
        p.retain_grad()
        optimizer = cls([p], lr=lr, differentiable=True, **options)
        # Linear losses, whose gradients do not depend on where the step begins.
        optimizer.step([p @ torch.arange(1.0, 5.0).double() + 9, p @ torch.tensor([3.0, 1, -4, 1]).double() + 7])
        return p

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    if options.get("dominance") != "norm" and cls in (MoKDSGD, MoKDAdamW):
        options = options | {"dominance": "none"}  # weights of the logarithm move with the values
    assert after(lr, start).requires_grad
    assert torch.autograd.gradcheck(after, (lr, start))


@pytest.mark.parametrize("options", [{}, {"betas": True}])
def test_dot_adamw_records_several_steps(options: dict[str, Any]) -> None:
    """The graph has to be kept for those to come: joint_loss, whose backward takes retain_graph."""

    def after(lr: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
        p = torch.ones(2, dtype=torch.float64, requires_grad=True).clone()
        p.retain_grad()
        given: dict[str, Any] = {"betas": (beta1, beta2)} if options else {}
        optimizer = DOTAdamW([p], lr=lr, differentiable=True, **given)
        for step in range(3):
            optimizer.zero_grad()
            c = torch.tensor([1.0, 2.0], dtype=torch.float64) * (step + 1)
            joint_loss([p @ c, p @ c.flip(0)], optimizer).backward(retain_graph=True)
            optimizer.step()
        return p

    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.8, 0.9)]
    if options:
        assert torch.autograd.gradcheck(after, tuple(numbers))
    else:
        assert torch.autograd.gradcheck(lambda lr: after(lr, *numbers[1:]), (numbers[0],))


ERRORS = [
    pytest.param(cls, error, id=f"{cls.__name__}-{error.optimizer_error_input.desc}")
    for cls in OURS
    for error in INFOS[cls.__name__].optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("cls", "error"), ERRORS)
def test_what_torch_refuses_is_refused_in_its_words(cls: Any, error: Any) -> None:
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.ones(2))] if given.params is None else given.params
    with pytest.raises(error.error_type, match=error.error_regex):
        cls(params, **given.kwargs)


@pytest.mark.parametrize("cls", OURS)
def test_paths_exclude_each_other_as_in_torch(cls: Any) -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        cls(params, foreach=True, fused=True)
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        cls(params, fused=True, differentiable=True)


@pytest.mark.parametrize("cls", OURS)
def test_fused_refuses_a_complex_parameter_and_leaves_everything_as_it_was(cls: Any) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = cls([p], fused=True)
    with refused(optimizer, ValueError, "fused", "complex64"):
        optimizer.step([(p - i).abs().square().sum() for i in range(2)])


@pytest.mark.parametrize("cls", [DOTAdamW, MoKDAdamW])
def test_a_tensor_lr_written_into_a_foreach_group_is_refused_before_anything_moves(cls: Any) -> None:
    model = student()
    optimizer = cls(model.parameters(), foreach=True)
    train(optimizer, model, batches(1))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with refused(optimizer, ValueError, "lr=0.1", "foreach=True"):
        optimizer.step(two_losses(model, batches(1)[0]))


@pytest.mark.parametrize("cls", OURS)
def test_torchs_flags_are_ours(cls: Any) -> None:
    """Every option of torch's, with the same default, but for the momentum that DOT cannot do without."""
    params = [nn.Parameter(torch.ones(2))]
    theirs = base_of(cls)(params, **({"momentum": 0.9} if cls is DOTSGD else {})).defaults
    ours = cls(params).defaults
    assert {k: ours[k] for k in theirs} == theirs
    assert issubclass(cls, SGD | AdamW)
