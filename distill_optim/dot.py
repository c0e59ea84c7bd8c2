"""DOT: a momentum per loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import is_not
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach

from distill_optim.combine import gram
from distill_optim.gradients import (
    Collected,
    Column,
    backward_onto,
    hides_leaves,
    leaves_above,
    lengths_of,
    refuse_graphed,
    refuse_unreached,
)
from distill_optim.multi_loss import MultiLossOptimizer, Present, Walk
from distill_optim.stats import Stats
from distill_optim.update import bias_corrections, decay, descend, dot_adamw, dot_sgd


class _DOT(MultiLossOptimizer):
    """What both share: every loss's memory from the option ``_memory`` and Δ, and a buffer of its own."""

    _memory: ClassVar[str]
    _memories: ClassVar[str]
    _buffer: ClassVar[str]

    def _keys(self) -> list[str]:
        """The state's name of each loss's buffer: the first is the torch optimizer's, so that checkpoints fit."""
        return [self._buffer, *(f"{self._buffer}/{name}" for name in self._names[1:])]

    def _base_memory(self, group: Mapping[str, Any]) -> Any:
        return group[self._memory]

    def _memory_per_loss(self, group: Mapping[str, Any]) -> list[Any]:
        """μ − Δ for the first loss, μ + Δ for the others, or what is given by name. Schedulers write μ, so this is
        worked out in every step.
        """
        base, delta, named = self._base_memory(group), group["delta"], group[self._memories] or {}
        return [
            named[name] if name in named else base - delta if i == 0 else base + delta
            for i, name in enumerate(self.defaults["losses"])
        ]

    def _check_group(self, group: Mapping[str, Any]) -> None:
        named = group[self._memories]
        if named is not None:
            if not isinstance(named, Mapping):
                raise TypeError(f"{self._memories}={named!r}: expected a mapping from names of losses to numbers")
            for name in named:
                if name not in self.defaults["losses"]:
                    raise ValueError(f"{self._memories}: {name!r} is not one of the losses {self.defaults['losses']!r}")
        base = self._base_memory(group)
        for name, value in zip(self.defaults["losses"], self._memory_per_loss(group), strict=True):
            if not _on_device(value) and not 0 <= value < 1:
                source = (
                    f"{self._memories}[{name!r}]={value}"
                    if named is not None and name in named
                    else f"delta={group['delta']} takes the {self._memory} of {name!r} from {base} to {value:.6g}"
                )
                raise ValueError(
                    f"{source}, outside [0, 1); choose a smaller delta (0 gives every loss the same "
                    f"{self._memory}), or set {self._memories}= by name"
                )
        if not _on_device(base) and not 0 <= base < 1:
            raise ValueError(f"{self._memory}={base}: outside [0, 1)")

    def _collect(self, losses: Mapping[int, Tensor], present: Present, walk: Walk) -> None:
        if walk.through is not None:
            raise ValueError(
                f"through: {type(self).__name__} needs every loss's gradient of every parameter, so one backward pass "
                "cannot do; leave it out, or use MoKDSGD or MoKDAdamW"
            )
        super()._collect(losses, present, walk)

    def _plain_step(self) -> None:
        super()._plain_step()
        stepped = [
            p for p in self._params() if p.grad is not None and self._buffers_of(p).get(self._buffer) is not None
        ]
        self._fill_buffers(stepped)

    def _buffers_of(self, p: Tensor) -> Mapping[str, Any]:
        """The state of a parameter; looking at it makes none, as without momentum torch makes none either."""
        state: Mapping[str, Any] = self.state.get(p, {})
        return state

    def _fill_buffers(self, params: Iterable[Tensor]) -> None:
        """A first step of any kind makes all of a parameter's buffers, because a distributed checkpoint is loaded
        into those that a step without losses made, and drops the others.
        """
        keys = self._keys()
        for p in params:
            state = self.state[p]
            for key in keys:
                if state.get(key) is None:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _remember(self, collected: Collected) -> None:
        present = collected.present

        def shared_gram() -> Tensor:
            shared = [n for n, count in enumerate(collected.reach()) if count > 1]
            return gram(collected.columns(shared, present))

        self._stats = Stats(self._present_names(collected), self._values(collected), None, shared_gram)

    def _gains(self, group: Mapping[str, Any], i: int, params: Sequence[Tensor]) -> list[Any]:
        """What loss i's buffer is multiplied by in the step of each of these parameters, which several losses reach."""
        raise NotImplementedError  # not an ABC, for the reason beside MultiLossOptimizer._update

    def _step_lengths(self, collected: Collected) -> list[Column]:
        reach, keys = collected.reach(), self._keys()
        found: list[Column] = [[None] * len(reach) for _ in keys]
        for group, positions in self._grouped():
            for i, own in enumerate(collected.gradients):
                shared = [n for n in positions if reach[n] > 1 and own[n] is not None]
                if not shared:
                    continue
                params = [collected.params[n] for n in shared]
                # Without any momentum there is no buffer, and the gradient is the step.
                buffers = [self._buffers_of(p).get(keys[i]) for p in params]
                stepped = [own[n] if buffer is None else buffer for n, buffer in zip(shared, buffers, strict=True)]
                lengths = lengths_of([v for v in stepped if v is not None])
                for n, length in zip(shared, torch._foreach_mul(lengths, self._gains(group, i, params)), strict=True):
                    found[i][n] = length
        return found


def _on_device(value: Any) -> bool:
    """Whether looking at a hyperparameter's value would wait for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


class DOTSGD(_DOT, SGD):
    r"""SGD with a momentum per loss (DOT).

    .. math:: v_i \leftarrow \mu_i v_i + (1 - \tau)\, \nabla L_i, \qquad
        \theta \leftarrow \theta - \gamma \sum_i c_i v_i, \qquad
        \mu_\text{task} = \mu - \Delta,\ \mu_\text{distill} = \mu + \Delta

    Takes the place of ``torch.optim.SGD``: with ``loss.backward(); optimizer.step()`` it does what that does, bit for
    bit, and loads its checkpoints; with ``optimizer.step([ce, kd])`` it is, bit for bit, one ``SGD`` per loss over
    the same parameters, stepped one after the other. Weight decay joins the first loss that reaches a
    parameter, and a parameter that one loss alone reaches in a step uses μ.

    The long-run gain of a buffer is :math:`1/(1-\mu_i)`: at μ = 0.9 and Δ = 0.075 the distillation loss weighs seven
    times the task loss. ``gain="matched"`` takes that out (:math:`c_i = (1-\mu_i)/(1-\mu)`, otherwise 1), so that Δ
    changes the memory and nothing else.

    Zhao et al., *DOT: A Distillation-Oriented Trainer*, ICCV 2023.

    Args:
        params: parameters, groups or named parameters, as in torch.
        lr: learning rate γ, a number or a tensor.
        momentum: μ, in [0, 1).
        dampening: τ.
        weight_decay: L2 penalty.
        nesterov: Nesterov's momentum, for each loss.
        losses: names of the losses, the task first, or how many there are.
        delta: Δ.
        momentums: momenta by name, in place of μ ∓ Δ, for some losses or all.
        gain: ``"paper"`` or ``"matched"``.
        fold: whether ``step(losses)`` has autograd add each loss's gradient to its momentum buffer, so that no gradient
            is stored: less memory than a step on the summed loss takes. Then ``.grad`` stays None, and there is
            nothing to clip, to unscale or to average, so that it is for one process without a GradScaler; and a
            backward pass that fails in the middle leaves the buffers as far as it came.
        maximize, foreach, differentiable, fused: as in ``torch.optim.SGD``.
        process_group: ``"auto"`` (all, where ``torch.distributed`` runs with more than one) or a group: the processes
            that train one model, over which losses and gradients are averaged; None: they are independent.

    Raises:
        ValueError: for a value out of range; see also :meth:`step`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = distill_optim.DOTSGD(model.parameters(), lr=0.05, momentum=0.9)
        >>> out = model(torch.ones(3, 4))
        >>> ce, kd = out.square().mean(), out.abs().mean()
        >>> optimizer.zero_grad()
        >>> losses = optimizer.step([ce, kd])
    """

    _base = SGD
    _memory = "momentum"
    _memories = "momentums"
    _buffer = "momentum_buffer"
    _per_optimizer = (*_DOT._per_optimizer, "fold")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        losses: int | Sequence[str] = ("task", "distill"),
        delta: float = 0.075,
        momentums: Mapping[str, float] | None = None,
        gain: str = "paper",
        fold: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = "auto",
    ) -> None:
        self._set_options(
            losses=losses, delta=delta, momentums=momentums, gain=gain, fold=fold, process_group=process_group
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _check_group(self, group: Mapping[str, Any]) -> None:
        if group["gain"] not in ("paper", "matched"):
            raise ValueError(f"gain={group['gain']!r}: expected 'paper' or 'matched'")
        if group["fold"]:
            for option in ("nesterov", "dampening", "maximize", "differentiable"):
                if group[option]:
                    raise ValueError(f"fold=True: it cannot do {option}={group[option]!r}; leave one of them out")
            if isinstance(group["weight_decay"], Tensor):
                raise ValueError("fold=True: it takes a number for weight_decay, not a tensor")
        super()._check_group(group)
        if group["fold"] and not all([group["momentum"], *self._memory_per_loss(group)]):
            raise ValueError(
                f"fold=True: without momentum there is no buffer to add a gradient to, and the momenta are "
                f"{group['momentum']} and {self._memory_per_loss(group)}; choose others, or leave fold out"
            )

    def _gain(self, group: Mapping[str, Any], momentum: float) -> float:
        """c of a loss with this momentum, where several losses reach a parameter."""
        if group["gain"] == "paper":
            return 1
        gain: float = (1 - momentum) / (1 - group["momentum"])
        return gain

    def _gains(self, group: Mapping[str, Any], i: int, params: Sequence[Tensor]) -> list[Any]:
        return [self._gain(group, self._memory_per_loss(group)[i])] * len(params)

    def _collect(self, losses: Mapping[int, Tensor], present: Present, walk: Walk) -> None:
        if not self.defaults["fold"] or walk.through is not None:
            super()._collect(losses, present, walk)
            return
        params = self._params()
        leaves = self._check_fold(losses, params, stepping=walk.stepping)
        reaching = [[i for i, reached in leaves.items() if p in reached] for p in params]
        self._fill_buffers(p for p, by in zip(params, reaching, strict=True) if by)
        folded: dict[int, Column] = {}
        for i in losses:
            key = self._keys()[i]
            with torch.no_grad():
                for group, positions in self._grouped():
                    alike: defaultdict[tuple[float, float], list[Tensor]] = defaultdict(list)
                    for p, by in ((params[n], reaching[n]) for n in positions if i in reaching[n]):
                        momentum = self._memory_per_loss(group)[i] if len(by) > 1 else group["momentum"]
                        alike[momentum, group["weight_decay"] if i == by[0] else 0].append(p)
                    for (momentum, weight_decay), members in alike.items():
                        own = [self.state[p][key] for p in members]
                        decay(members, own, momentum=momentum, weight_decay=weight_decay)
            folded[i] = [self.state[p][key] if i in by else None for p, by in zip(params, reaching, strict=True)]
            backward_onto(i, losses, params, folded[i], self._names)
        self._collected.align(params)
        for i, buffers in folded.items():
            self._collected.gradients[i] = buffers
        self._collected.values = {i: loss.detach() for i, loss in losses.items()}

    def _check_fold(
        self, losses: Mapping[int, Tensor], params: Sequence[Tensor], *, stepping: bool
    ) -> dict[int, set[Tensor]]:
        """The leaves that each loss reaches; raises where gradients cannot be folded, before anything is changed."""
        if not stepping:
            raise ValueError(
                "fold=True: no gradient is stored, so that there is nothing between backward and step; give the losses "
                "to step, or leave fold out"
            )
        if self._processes() is not None:
            raise ValueError("fold=True: it is for one process, as gradients that are not stored are not averaged")
        if any(p.grad is not None for p in params):
            raise ValueError("fold=True: there are gradients in .grad, which it would lose; call zero_grad() before")
        if any(p._post_accumulate_grad_hooks for p in params):
            raise ValueError("fold=True: a post-accumulate hook would be shown a momentum buffer; remove it")
        if hides_leaves(losses.values()):
            raise ValueError(
                "fold=True: a reentrant checkpoint hides which parameters a loss reaches; call "
                "checkpoint(..., use_reentrant=False)"
            )
        refuse_graphed(losses, self._names)
        leaves = {i: leaves_above([loss]) for i, loss in losses.items()}
        for i, reached in leaves.items():
            if reached.isdisjoint(params):
                refuse_unreached(self._names[i])
        return leaves

    def _update(self, collected: Collected) -> None:
        if self.defaults["fold"]:
            self._descend(collected)
            return
        self._remember(collected)
        present, keys = collected.present, self._keys()
        if any(group["nesterov"] or group["differentiable"] for group in self.param_groups):
            # torch's foreach path of Nesterov, and the recorded weight decay, write into the gradients, so what is to
            # be read off them is read now.
            assert self._stats is not None
            _ = self._stats.gram
        reach = collected.reach()
        for group, positions in self._grouped():
            momenta = self._memory_per_loss(group)
            reached = [n for n in positions if reach[n]]
            params = [collected.params[n] for n in reached]
            states = [state or {} for state in map(self.state.get, params)]
            known = [[state.get(key) for state in states] for key in keys]
            buffers = [list(known[i]) for i in present]
            dot_sgd(
                params,
                collected.columns(reached, present),
                buffers,
                lr=group["lr"],
                momentum=group["momentum"],
                momenta=[momenta[i] for i in present],
                gains=[self._gain(group, momenta[i]) for i in present],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                foreach=group["foreach"],
                fused=group["fused"],
            )
            if all(all(map(is_not, column, repeat(None))) for column in known):
                continue
            for i, column in zip(present, buffers, strict=True):
                for p, before, buffer in zip(params, known[i], column, strict=True):
                    if buffer is not before:
                        self.state[p][keys[i]] = buffer
            if any(momenta):
                self._fill_buffers(params)

    def _descend(self, collected: Collected) -> None:
        """The step along buffers that hold the gradients already."""
        reach = collected.reach()
        self._stats = Stats(self._present_names(collected), self._values(collected), None, None)
        for group, positions in self._grouped():
            lr, momenta = group["lr"], self._memory_per_loss(group)
            for i in collected.present:
                gain = self._gain(group, momenta[i])
                for shared in True, False:
                    mine = [
                        (collected.params[n], collected.gradients[i][n]) for n in positions if (reach[n] > 1) is shared
                    ]
                    own = [(p, buffer) for p, buffer in mine if buffer is not None]
                    if own:
                        descend([p for p, _ in own], [v for _, v in own], lr=lr * gain if shared else lr)


class DOTAdamW(_DOT, AdamW):
    r"""AdamW with a first moment per loss (DOT carried over to Adam).

    .. math::
        m_i &\leftarrow \beta_{1i} m_i + (1-\beta_{1i}) \nabla L_i, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) \Bigl(\sum_i \nabla L_i\Bigr)^2 \\
        \theta &\leftarrow (1 - \gamma\lambda)\theta - \gamma \sum_i \hat m_i / (\sqrt{\hat v} + \epsilon)

    with :math:`\beta_{1,\text{task}} = \beta_1 - \Delta` and :math:`\beta_1 + \Delta` for every other loss, each first
    moment corrected for its own bias. Δ = 0 is AdamW on the sum. Because a moment of Adam is a mean, Δ changes a loss's
    memory and not its weight.

    Takes the place of ``torch.optim.AdamW``: the untouched loop does what that does, bit for bit, and its
    checkpoints load. A loss that is missing in a step counts as a zero gradient, as it would in the sum. The paper
    has SGD only; this is our extension. With ``fused`` several losses are one kernel on a GPU, and elsewhere
    the foreach or the for-loop path.

    Args:
        params: parameters, groups or named parameters, as in torch.
        lr: learning rate γ, a number or a tensor.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        amsgrad: whether the denominator takes the running maximum of v.
        losses: names of the losses, the task first, or how many there are.
        delta: Δ.
        beta1s: β₁ by name, in place of β₁ ∓ Δ, for some losses or all.
        maximize, foreach, capturable, differentiable, fused: as in ``torch.optim.AdamW``.
        process_group: ``"auto"`` (all, where ``torch.distributed`` runs with more than one) or a group: the processes
            that train one model, over which losses and gradients are averaged; None: they are independent.

    Raises:
        ValueError: for a value out of range; see also :meth:`step`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = distill_optim.DOTAdamW(model.parameters(), lr=1e-3)
        >>> out = model(torch.ones(3, 4))
        >>> losses = optimizer.step({"task": out.square().mean(), "distill": out.abs().mean()})
    """

    _base = AdamW
    _memory = "beta1"
    _memories = "beta1s"
    _buffer = "exp_avg"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        losses: int | Sequence[str] = ("task", "distill"),
        delta: float = 0.075,
        beta1s: Mapping[str, float] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = "auto",
    ) -> None:
        self._set_options(losses=losses, delta=delta, beta1s=beta1s, process_group=process_group)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _base_memory(self, group: Mapping[str, Any]) -> Any:
        return group["betas"][0]

    def _gains(self, group: Mapping[str, Any], i: int, params: Sequence[Tensor]) -> list[Any]:
        steps = [self.state[p]["step"] for p in params]
        on_device = bool(group["capturable"] or group["fused"])
        return [1 / c for c in bias_corrections(self._memory_per_loss(group)[i], steps, on_device)]

    def _update(self, collected: Collected) -> None:
        self._capture_check()
        self._remember(collected)
        keys = self._keys()
        for group, positions in self._grouped():
            stepping = [n for n in positions if collected.params[n].grad is not None]
            params: list[Tensor] = []
            summed: list[Tensor] = []
            lists: list[list[Tensor]] = [[], [], [], []]
            self._init_group(group, params, summed, *lists)  # type: ignore[no-untyped-call]  # torch's
            _, exp_avg_sqs, max_exp_avg_sqs, steps = lists
            self._fill_buffers(params)
            foreach = group["foreach"]
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(params, group["differentiable"], use_fused=False)
                foreach = foreach and (group["capturable"] or not isinstance(group["lr"], Tensor))
            dot_adamw(
                params,
                collected.columns(stepping, range(len(keys))),
                summed,
                [[self.state[p][key] for p in params] for key in keys],
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta1s=self._memory_per_loss(group),
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                foreach=foreach,
                fused=group["fused"],
                on_device=bool(group["capturable"] or group["fused"]),
                differentiable=group["differentiable"],
            )

    def _capture_check(self) -> None:
        """torch's own, that a step under graph capture is capturable; its name changed between versions."""
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            check = getattr(Optimizer, name, None)
            if check is not None:
                check(self)
                return
