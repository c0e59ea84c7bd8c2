"""torch's own OptimizerInfo entries with our optimizers in them, and a problem that every input is run on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

from distill_optim import DOTSGD, DOTAdamW
from tests.helpers import OURS

Losses = Callable[[], list[Tensor]]

DOT: list[dict[str, Any]] = [
    {"delta": 0.02},
    {"delta": 0.0, "weight_decay": 0.1},
    {"losses": 3, "weight_decay": 0.1, "maximize": True},
]
DOT_SGD: list[dict[str, Any]] = [
    {"gain": "matched", "momentum": 0.8, "nesterov": True},
    {"momentums": {"task": 0.0, "distill": 0.95}, "dampening": 0.3},
]
DOT_ADAMW: list[dict[str, Any]] = [{"beta1s": {"distill": 0.5}, "amsgrad": True}]
MOKD: list[dict[str, Any]] = [
    {"combine": "pcgrad", "dominance": "none", "weight_decay": 0.1},
    {"combine": "famo", "losses": 3},
    {"dominance": "norm", "rescale": False},
    {"dominance": "ema", "every": 2, "maximize": True},
]
# torch's generators have tensors for Adam on accelerators only. Learning rates that float32 holds exactly, because
# paths differ in what they take them to.
TENSOR_SGD: list[dict[str, Any]] = [{"lr": torch.tensor([2.0**-7]), "weight_decay": torch.tensor(0.125)}]
TENSOR_ADAMW: list[dict[str, Any]] = [
    {"lr": torch.tensor(2.0**-7), "weight_decay": 0.125},
    {
        "lr": torch.tensor([2.0**-7]),
        "betas": (torch.tensor([[[0.9]]], dtype=torch.float64), torch.tensor([[0.99]], dtype=torch.float64)),
        "amsgrad": True,
    },
]
OWN = frozenset({"losses", "delta", "gain", "momentums", "beta1s", "combine", "dominance", "rescale", "every"})


def base_of(cls: Any) -> Any:
    return cls._base


def base_options(cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the torch optimizer of the same base is given: DOTSGD alone has a default of its own."""
    own = {"momentum": 0.9} if cls is DOTSGD else {}
    return own | {k: v for k, v in kwargs.items() if k not in OWN}


def is_sgd(cls: Any) -> bool:
    return issubclass(cls, SGD)


def _info(cls: Any) -> OptimizerInfo:
    theirs = next(info for info in optim_db if info.optim_cls is base_of(cls))
    own = [*DOT, *(DOT_SGD if cls is DOTSGD else DOT_ADAMW)] if cls in (DOTSGD, DOTAdamW) else MOKD
    more = [*(TENSOR_SGD if is_sgd(cls) else TENSOR_ADAMW), *own]

    def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        described = [", ".join(f"{k}={v}" for k, v in kwargs.items()) for kwargs in more]
        ours = [OptimizerInput([], dict(kw), desc) for kw, desc in zip(more, described, strict=True)]
        return [*theirs.optim_inputs_func(device, dtype), *ours]

    names = (
        "scheduler_inputs",
        "supported_impls",
        "not_og_supported_flags",
        "has_capturable_arg",
        "optim_error_inputs_func",
        "supports_fused_on",
    )
    return OptimizerInfo(cls, optim_inputs_func=inputs, **{name: getattr(theirs, name) for name in names})


INFOS = {cls.__name__: _info(cls) for cls in OURS}
DEVICES: list[Any] = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


FOR_LOOP: dict[str, Any] = {"foreach": False, "fused": False}
FOREACH: dict[str, Any] = {"foreach": True, "fused": False}
FUSED: dict[str, Any] = {"foreach": False, "fused": True}
DIFFERENTIABLE: dict[str, Any] = {"differentiable": True}


def every_input(
    *impls: dict[str, Any],
    of: Sequence[Any] = OURS,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    where: Callable[[dict[str, Any]], bool] = lambda kwargs: True,
) -> pytest.MarkDecorator:
    """Parametrises with (cls, device, kwargs, dtype): the inputs of torch's generators and ours, on every path.

    (torch's own helper for that never asks for foreach on the CPU.) The skip list, being what torch's optimizers refuse
    themselves:

    - foreach Adam with a tensor for lr or betas, but not capturable;
    - fused with complex parameters;
    - fused on the CPU with gaps in the memory of a parameter (see :func:`problem`);
    - betas given as tensors, in versions of torch whose AdamW does not take them (2.9).

    Args:
        impls: options that choose an implementation; none: whatever is the default.
        of: the optimizers.
        dtypes: those of the parameters.
        where: whether the test has something to say about these options.
    """
    params: list[Any] = []
    for device, cls, dtype in itertools.product(("cpu", "cuda"), of, dtypes):
        for given, impl in itertools.product(INFOS[cls.__name__].optim_inputs_func(device), impls or ({},)):
            kwargs = given.kwargs | impl
            tensors = not is_sgd(cls) and isinstance(kwargs.get("lr"), Tensor)
            if (tensors and kwargs.get("foreach") and not kwargs.get("capturable")) or not where(kwargs):
                continue
            if kwargs.get("fused") and dtype.is_complex:
                continue
            if device == "cpu" and not _taken_by_torch(cls, kwargs, dtype):
                continue
            how = "".join(f"-{k}" for k, v in impl.items() if v)
            name = f"{cls.__name__}-{device}-{str(dtype).removeprefix('torch.')}-{given.desc}{how}"
            marks = [pytest.mark.cuda] if device == "cuda" else []
            params.append(pytest.param(cls, device, kwargs, dtype, id=name, marks=marks))
    return pytest.mark.parametrize(("cls", "device", "kwargs", "dtype"), params)


def _taken_by_torch(cls: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the base's own step goes through with betas given as tensors."""
    if not isinstance(kwargs.get("betas", (0,))[0], Tensor):
        return True
    p = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    p.grad = torch.ones_like(p)
    known = torch.optim.AdamW([p]).defaults.keys() - {"differentiable"}  # which would not step a leaf
    theirs = {name: value for name, value in kwargs.items() if name in known}
    try:
        with torch.no_grad():
            torch.optim.AdamW([p], **theirs).step()
    except (TypeError, RuntimeError):
        return False
    return True


def make(cls: Any, params: Any, kwargs: dict[str, Any]) -> Any:
    """An optimizer with its own copy of the options: learning rates may be tensors, which schedulers write into."""
    return cls(params, **copy.deepcopy(kwargs))


def problem(
    kwargs: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[list[Any], Losses]:
    """Parameters of all shapes and strides, and as many losses of them as the options say, that conflict in part.

    Between them a parameter that the first loss alone reaches, one of the last loss alone, a 0-dim one, a transposed
    one, and one that no loss reaches: its gradient is None.
    """
    kwargs = kwargs or {}
    k = kwargs.get("losses", 2)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    # torch's fused kernels for the CPU walk over gaps in the memory as if they were elements.
    gaps = 1 if kwargs.get("fused") else 2
    values = [random(4, 3), random(), random(5, 2).t(), random(6)[::gaps], random(3), random(2), random(2)]
    params = [nn.Parameter(v) for v in values]
    targets = [[torch.full_like(p, (-1.0) ** i * (1 + i)) for p in params] for i in range(k)]
    first, last, none = params[-3], params[-2], params[-1]

    def losses() -> list[Tensor]:
        given = []
        for i, own in enumerate(targets):
            terms = [
                (p - t).abs().square().sum() * (1 + 0.3 * i)
                for p, t in zip(params, own, strict=True)
                if p is not none and not (p is first and i > 0) and not (p is last and i < k - 1)
            ]
            given.append(torch.stack(terms).sum())
        return given

    return params, losses


def run(optimizer: Any, losses: Losses, steps: int = 4, *, plain: bool = False) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        if plain:
            torch.stack(losses()).sum().backward()
            optimizer.step()
        else:
            optimizer.step(losses())


def assert_close_steps(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], kwargs: dict[str, Any], *, exact: bool
) -> None:
    """Bit for bit; or within the rounding of a few steps in double precision.

    With options in tensors torch's Adam works out the bias corrections in single precision, the fused one excepted.
    """
    single = any(isinstance(value, Tensor) for value in kwargs.values())
    for a, b in zip(ours, theirs, strict=True):
        if exact:
            assert torch.equal(a, b), f"differs by {(a - b).abs().max().item():.3g}"
        else:
            torch.testing.assert_close(a, b, rtol=1e-5 if single else 1e-9, atol=1e-6 if single else 1e-11)
