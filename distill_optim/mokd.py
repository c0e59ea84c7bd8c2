"""MoKD: conflict and dominance resolved at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.optimizer import ParamsT, _get_capturable_supported_devices

from distill_optim import combine as combination
from distill_optim.gradients import (
    Collected,
    Column,
    Losses,
    Sharded,
    backward_weighted,
    by_index,
    cleared,
    hides_leaves,
    leaves_above,
    reached_alone,
    refuse_graphed,
    values,
    walked_back,
)
from distill_optim.multi_loss import MultiLossOptimizer, Present, Through, Walk, unwrap
from distill_optim.stats import Stats
from distill_optim.update import has_kernels, weighted_adamw, weighted_sgd, weighted_sum


class _MoKD(MultiLossOptimizer):
    """The combination of the gradients, in front of whatever the torch optimizer does with the result."""

    _per_optimizer = (*MultiLossOptimizer._per_optimizer, "combine", "dominance", "rescale", "every")

    # The memory of the sum, a set of gradients, is not taken while the Gram matrix has its own.
    _sums_late = True

    # Statistics of a step whose weights were known before its backward pass, so that .grad is all there is.
    _ahead: Stats | None = None
    # The parameters that one loss alone reaches, by loss, as the last full step found them.
    _alone: dict[int, list[Tensor]] | None = None

    # Whether those weights are those of a step before.
    _between = False

    # The memory of the rules after a step whose weights are known but that has not been taken.
    _next_memory: combination.State | None = None

    def _check_group(self, group: Mapping[str, Any]) -> None:
        combination.method(group["combine"])
        combination.dominance_rule(group["dominance"])
        every = group["every"]
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every={every!r}: expected a whole number of steps")
        if every < 1:
            raise ValueError(f"every={every}: expected at least 1")

    def _check_groups(self) -> None:
        super()._check_groups()
        # torch's AdamW would say so when the gradients are combined already.
        supported = _get_capturable_supported_devices()
        for group in self.param_groups:
            if not group.get("capturable") or torch.compiler.is_compiling():
                continue
            unsupported = {p.device.type for p in group["params"]}.difference(supported)
            if unsupported:
                raise ValueError(
                    f"capturable=True: torch supports it on {', '.join(supported)}, and there are parameters on "
                    f"{', '.join(sorted(unsupported))}; leave it out"
                )

    def _weights(self, gram: Tensor | None, losses: Tensor, members: Sequence[int]) -> tuple[Tensor, combination.State]:
        """Weights of the losses with these indices, and the memory of the rules for the step after this one."""
        group = self.param_groups[0]
        memory = {name: value.to(losses.device) for name, value in group.get("combine_state", {}).items()}
        options = {option: group[option] for option in ("combine", "dominance", "rescale")}
        if len(members) == len(self._names):
            weights, memory = combination.advance(gram, losses, memory, **options)
        else:
            every = losses.new_ones(len(self._names))
            memory = memory or combination.initial(every, combine=group["combine"], dominance=group["dominance"])
            at = _on(list(members), losses.device)
            weights, part = combination.advance(gram, losses, combination.select(memory, at), **options)
            memory = combination.merge(memory, part, at)
        processes = self._processes()
        if processes is not None:
            # Random orders, and the last digits of one machine's linear algebra, are not those of another.
            weights, *remembered = processes.same([weights, *memory.values()])
            memory = dict(zip(memory, remembered, strict=True))
        return weights, memory

    def _remember(self, memory: combination.State) -> None:
        """Keeps the memory in a parameter group, so that copies and checkpoints have it."""
        if memory:
            self.param_groups[0]["combine_state"] = memory

    def observe(self, losses: Losses) -> None:
        """Shows the losses of the same batch again, after the step: for ``combine="famo"``, which learns from them.

        Optional: where nobody calls it, the next step's losses stand in, with the noise of another batch. Other methods
        take no notice.

        Args:
            losses: all the losses of the step before, computed anew with the stepped parameters; no graph is needed.

        Raises:
            ValueError: for another number or other names.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = distill_optim.MoKDSGD([w], lr=0.1, combine="famo")
            >>> def losses_of(w):
            ...     return [w.square().sum(), (w - 2).abs().sum()]
            >>> _ = optimizer.step(losses_of(w))
            >>> with torch.no_grad():
            ...     optimizer.observe(losses_of(w))
        """
        inner = unwrap(self)
        if inner is not self:
            inner.observe(losses)
            return
        indexed = by_index(losses, self._names)
        if len(indexed) != len(self._names):
            missing = [name for i, name in enumerate(self._names) if i not in indexed]
            raise ValueError(f"losses: observe needs all of them, {', '.join(map(repr, missing))} is missing")
        group = self.param_groups[0]
        if "combine_state" in group:
            seen = self._given(indexed, self._home())
            self._remember(combination.observe(seen, group["combine_state"], combine=group["combine"]))

    # ---------------------------------------------------------------- gradients → weights → update

    def _update(self, collected: Collected) -> None:
        present, params, reach = collected.present, collected.params, collected.reach()
        shared = [n for n, count in enumerate(reach) if count > 1]
        columns = collected.columns(shared, present)
        gram = combination.gram(columns)
        losses = self._values(collected).double()
        # A loss that shares no parameter has nothing to be combined with.
        sharing = [a for a, own in enumerate(columns) if not all(map(is_, own, repeat(None)))]
        memory: combination.State = {}
        if len(sharing) == len(present):
            weights, memory = self._weights(gram, losses.to(gram), present)
        else:
            weights = torch.ones_like(losses)
            if sharing:
                among, memory = self._weights(
                    _rows(_rows(gram, sharing), sharing, -1),
                    _rows(losses, sharing).to(gram),
                    [present[a] for a in sharing],
                )
                weights = weights.index_put((_on(sharing, losses.device),), among.to(losses.device))
        self._stats = Stats(self._present_names(collected), losses, weights, gram)
        self._alone = {
            i: [p for p, g, n in zip(params, collected.gradients[i], reach, strict=True) if n == 1 and g is not None]
            for i in present
        }
        collected.sum_up()

        stepped: set[int] = set()
        for group, positions in self._grouped():
            if not group["fused"]:
                continue
            reached = [n for n in positions if reach[n]]
            own = [params[n] for n in reached]
            if has_kernels(own) and self._fused_step(group, own, collected.columns(reached, present), weights):
                stepped.update(reached)
        if len(stepped) < len(params):
            # Where one loss alone reaches a parameter, its own gradient.
            gradients: Column = [
                next((g for g in own if g is not None), None) for own in zip(*collected.gradients, strict=True)
            ]
            combined = [n for n in shared if n not in stepped]
            if combined:
                sums = weighted_sum(collected.columns(combined, present), weights)
                for n, summed in zip(combined, sums, strict=True):
                    gradients[n] = summed
            # The torch optimizer may need memory of its own.
            del columns
            collected.release()
            self._step_along([None if n in stepped else g for n, g in enumerate(gradients)])
        self._remember(memory)
        self._schedule(present, refreshed=True)

    def _fused_step(
        self, group: dict[str, Any], params: list[Tensor], gradients: Sequence[Column], weights: Tensor
    ) -> bool:
        """Combination and update in one kernel, which never writes the combined gradient; False where it cannot be."""
        raise NotImplementedError  # not an ABC, for the reason beside MultiLossOptimizer._update

    def _step_along(self, gradients: Column) -> None:
        """The torch optimizer's step with these gradients in the place of ``.grad``."""
        params = self._params()
        summed = [p.grad for p in params]
        try:
            for p, grad in zip(params, gradients, strict=True):
                p.grad = grad
            self._base_step()
        finally:
            for p, grad in zip(params, summed, strict=True):
                p.grad = grad

    def _plain_step(self) -> None:
        super()._plain_step()
        if self._ahead is not None:
            self._stats, self._ahead = self._ahead, None
            if self._next_memory is not None:
                self._remember(self._next_memory)
                self._next_memory = None
            self._schedule([self._names.index(name) for name in self._stats.names], refreshed=not self._between)

    # ---------------------------------------------------------------- weights known before the backward pass

    def _collect(self, losses: Mapping[int, Tensor], present: Present, walk: Walk) -> None:
        if self._ahead is not None and all(p.grad is None for p in self._params()):
            # Cleared by model.zero_grad() after a step that a GradScaler skipped: what was ahead of it is void.
            self._ahead = self._next_memory = None
        found = self._weights_ahead(losses, present, walk.scale, walk.through)
        if (self._collected if found else self._ahead) or (self._collected and walk.through is not None):
            raise ValueError(
                "through/every: the micro-batches of one step must all be walked back the same way; give the same "
                "through= and the same losses to each, or call zero_grad() before"
            )
        if found is None:
            super()._collect(losses, present, walk)
            return
        stats, alone = found
        before = backward_weighted(
            losses,
            dict(zip(losses, stats.weights.unbind(), strict=True)),
            self._params(),
            self._names,
            alone,
            scale=walk.scale,
            retain_graph=walk.retain_graph,
            replicas=self._replicas(),
        )
        with torch.no_grad():
            for p, grad in zip(self._params(), self._same_everywhere(before), strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else grad.add_(p.grad)
            self._note_same()
        self._ahead = stats

    def _weights_ahead(
        self, losses: Mapping[int, Tensor], present: Present, scale: Tensor | None, through: Through | None
    ) -> tuple[Stats, Mapping[int, Sequence[Tensor]]] | None:
        """Statistics with the weights, and what one loss alone reaches, where they need no full backward passes."""
        group = self.param_groups[0]
        if callable(present):
            if group["every"] > 1 or through is not None:
                raise ValueError(
                    "Join: processes that have run out of batches cannot follow through= and every=; leave them out"
                )
            return None
        names = tuple(self._names[i] for i in present)
        between = 0 < group.get("every_count", 0) < group["every"] and group["every_present"] == self._mask(present)
        self._between = between
        if not between and through is None and combination.needs_gram(group["combine"], group["dominance"]):
            return None
        processes = self._processes()
        if isinstance(processes, Sharded):
            if group["every"] > 1 or through is not None:
                raise ValueError(
                    "through/every: with sharded parameters (FSDP2) the graph does not say which of them a loss "
                    "reaches, so that one backward pass cannot do; leave them out"
                )
            return None
        known = through is not None or (between and self._alone is not None)
        hidden = not known and hides_leaves(losses.values())
        if processes is not None:
            lacking, hidden = processes.any([len(losses) < len(present), hidden])
            if lacking:
                raise ValueError(
                    f"losses: a process lacks some of {names!r}; with through=, every= and methods of the loss values "
                    "alone all processes have to give the same losses"
                )
        if hidden:
            return None
        if between:
            device = self._home()
            weights = _rows(group["every_weights"].to(device), list(present))
            if self._alone is None:
                self._alone = reached_alone({i: leaves_above([loss]) for i, loss in losses.items()}, self._params())
            last = None if self._stats is None or self._stats.names != names else self._stats.gram
            return Stats(names, self._given(losses, device), weights, last), self._alone
        if through is None:
            return self._weights_of_values(losses)
        at = [through] if isinstance(through, Tensor) else list(through)
        gram = self._gram_at(losses, at, scale)
        if processes is not None:
            # A process's loss is the mean over its rows, so of the mean over all a row's gradient is that share.
            gram = processes.mean(gram) / processes.size
        given = self._given(losses, gram.device)
        above = {i: leaves_above([loss], at) for i, loss in losses.items()}
        alone: dict[int, list[Tensor]] = {}
        if any(p in leaves for p in self._params() for leaves in above.values()):
            below = leaves_above(at)
            alone = reached_alone({i: leaves | below for i, leaves in above.items()}, self._params())
        self._alone = alone
        weights, self._next_memory = self._weights(gram, given, list(losses))
        return Stats(names, given, weights, gram), alone

    def _given(self, losses: Mapping[int, Tensor], device: torch.device) -> Tensor:
        """Values of the losses, averaged over the processes."""
        means = self._mean({i: loss.detach() for i, loss in losses.items()}, list(losses))
        return values(list(means.values()), device).double()

    def _weights_of_values(self, losses: Mapping[int, Tensor]) -> tuple[Stats, Mapping[int, Sequence[Tensor]]]:
        """Weights from rules that look at nothing but the values of the losses."""
        names = [self._names[i] for i in losses]
        given = self._given(losses, self._home())
        reached = {i: leaves_above([loss]) for i, loss in losses.items()}
        self._alone = alone = reached_alone(reached, self._params())
        # A loss that shares no parameter has nothing to be combined with.
        shared = set(self._params()).difference(*alone.values())
        sharing = [a for a, i in enumerate(losses) if not shared.isdisjoint(reached[i])]
        weights = torch.ones_like(given)
        total = given
        if self._ahead is not None:
            total = given + torch.where(cleared(self._params(), given.device), 0, self._ahead.losses)
        if sharing:
            at, members = _on(sharing, given.device), [list(losses)[a] for a in sharing]
            weights = weights.index_put((at,), self._weights(None, given[at], members)[0])
            # The memory learns from the whole step, be it of several micro-batches.
            self._next_memory = self._weights(None, total[at], members)[1]
        return Stats(names, total, weights, None), alone

    def _gram_at(self, losses: Mapping[int, Tensor], at: list[Tensor], scale: Tensor | None) -> Tensor:
        """Inner products of the losses' gradients with respect to the tensors that they pass."""
        for tensor in at:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"through: expected a tensor or several, got {type(tensor).__name__}")
            if not tensor.requires_grad:
                raise ValueError(
                    "through: the tensor does not require grad, so no gradient passes it; give one that the student "
                    "computed with grad enabled, not a detached copy"
                )
        refuse_graphed(losses, self._names, at)
        columns: list[tuple[Tensor | None, ...]] = []
        for i, loss in losses.items():
            seed = torch.ones_like(loss)
            with walked_back(self._names[i]):
                columns.append(
                    torch.autograd.grad(
                        loss, at, seed if scale is None else seed * scale.to(loss), retain_graph=True, allow_unused=True
                    )
                )
            if all(gradient is None for gradient in columns[-1]):
                raise ValueError(
                    f"through: losses[{self._names[i]!r}] does not pass the tensor; give one that all losses pass"
                )
        with torch.no_grad():
            gram = combination.gram(columns)
            return gram if scale is None else gram / scale.to(gram).square()

    def _schedule(self, present: Sequence[int], *, refreshed: bool) -> None:
        """Counts the steps since the weights were computed; in a parameter group, so that a checkpoint has it."""
        group = self.param_groups[0]
        if group["every"] == 1:
            return
        assert self._stats is not None
        if refreshed:
            weights = self._stats.weights
            every = torch.ones(len(self._names), dtype=weights.dtype, device=weights.device)
            every = every.index_put((_on(list(present), weights.device),), weights)
            group.update(every_count=1, every_present=self._mask(present), every_weights=every)
        else:
            group["every_count"] += 1

    def _mask(self, present: Sequence[int]) -> int:
        """The losses of a step as a number, which every kind of checkpoint takes."""
        return sum(1 << i for i in present)

    def _begin(self) -> None:
        """What is remembered between steps, before there were any: a distributed checkpoint fills what it finds."""
        group = self.param_groups[0]
        every = torch.ones(len(self._names), dtype=torch.float64, device=self._home())
        if "combine_state" not in group:
            self._remember(combination.initial(every, combine=group["combine"], dominance=group["dominance"]))
        if group["every"] > 1 and "every_count" not in group:
            group.update(every_count=0, every_present=0, every_weights=every)

    def _forget(self) -> None:
        super()._forget()
        self._ahead = self._next_memory = None

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        super()._check_loaded(groups)
        saved = groups[0]
        if "combine_state" in saved:
            rules = {option: saved.get(option) or self.defaults[option] for option in ("combine", "dominance")}
            missing = combination.initial(torch.ones(len(self._names)), **rules).keys() - saved["combine_state"].keys()
            if missing:
                raise ValueError(
                    f"state_dict: its memory of the combination lacks {', '.join(sorted(missing))}, which "
                    f"combine={rules['combine']!r} with dominance={rules['dominance']!r} needs; construct the "
                    "optimizer with the combine= and dominance= that it was saved with"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the options checked."""
        super().add_param_group(param_group)
        self._begin()
        # Between two computations of ``every`` nobody has seen yet which losses reach the new parameters.
        self._alone = None


def _on(indices: list[int], device: torch.device) -> Tensor:
    return torch.stack([torch.full((), i, device=device) for i in indices])


def _rows(tensor: Tensor, indices: list[int], dim: int = 0) -> Tensor:
    return torch.stack([tensor.select(dim, i) for i in indices], dim)


class MoKDSGD(_MoKD, SGD):
    r"""SGD on the combined gradient of several losses (MoKD).

    .. math:: \theta \leftarrow \operatorname{SGD}\Bigl(\theta, \sum_i w_i \nabla L_i\Bigr)

    The weights come from the Gram matrix of the per-loss gradients over the parameters that several losses reach. By
    default they are those of the shortest vector in the convex hull of the gradients of the *log* losses: the
    direction of the largest worst relative improvement, which no loss conflicts with and none dominates. A
    parameter that one loss alone reaches takes that loss's gradient as it is.

    Takes the place of ``torch.optim.SGD``: with ``loss.backward(); optimizer.step()`` it does what that does, bit for
    bit, and loads its checkpoints.

    Hayder et al., *DTO-KD* (ICLR 2026), and its withdrawn first version *MoKD* (arXiv 2505.08170); Désidéri, *MGDA*
    (2012). The clamp to the simplex, which the paper's closed form lacks, and ``rescale`` are ours.

    Args:
        params: parameters, groups or named parameters, as in torch.
        lr: learning rate, a number or a tensor.
        momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``, on the combined gradient.
        losses: names of the losses, the task first, or how many there are.
        combine: name of a method of :mod:`distill_optim.combine`, a function ``(gram, losses) -> weights``, or a rule
            with a memory such as ``combine.FAMO()``.
        dominance: ``"log"`` (gradients of the log losses), ``"norm"`` (unit gradients), ``"ema"`` (gradients in units
            of their usual length) or ``"none"``; or a rule, see :func:`distill_optim.combine.dominance_scales`.
        rescale: whether the magnitudes of the weights on the raw gradients sum to the number of losses, so that a
            learning rate tuned for the summed loss keeps its meaning and equal gradients give the summed loss's step.
        every: new weights in every so many steps; the steps between walk back the weighted sum, once. Methods of the
            loss values alone always do.
        maximize, foreach, differentiable, fused: as in ``torch.optim.SGD``.
        process_group: ``"auto"`` (all, where ``torch.distributed`` runs with more than one) or a group: the processes
            that train one model, over which losses and gradients are averaged; None: they are independent.

    Raises:
        ValueError: for a value out of range; see also :meth:`step`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = distill_optim.MoKDSGD(model.parameters(), lr=0.05, momentum=0.9)
        >>> out = model(torch.ones(3, 4))
        >>> ce, kd = out.square().mean(), out.abs().mean()
        >>> optimizer.zero_grad()
        >>> losses = optimizer.step([ce, kd])
        >>> round(optimizer.stats.weights.sum().item(), 6)
        2.0
    """

    _base = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        losses: int | Sequence[str] = ("task", "distill"),
        combine: str | combination.Method | combination.Stateful = "min_norm",
        dominance: str | combination.Method | combination.Stateful = "log",
        rescale: bool = True,
        every: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = "auto",
    ) -> None:
        self._set_options(
            losses=losses,
            combine=combine,
            dominance=dominance,
            rescale=rescale,
            every=every,
            process_group=process_group,
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

    def _fused_step(
        self, group: dict[str, Any], params: list[Tensor], gradients: Sequence[Column], weights: Tensor
    ) -> bool:
        remembers = group["momentum"] != 0
        buffers = [self.state.get(p, {}).get("momentum_buffer") if remembers else None for p in params]
        options = {
            name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        }
        if not weighted_sgd(params, gradients, weights, buffers, **options):
            return False
        if remembers:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer
        return True


class MoKDAdamW(_MoKD, AdamW):
    r"""AdamW on the combined gradient of several losses (MoKD).

    As :class:`MoKDSGD`, with ``torch.optim.AdamW`` in the place of SGD: the weighted sum of the per-loss gradients is
    the gradient that both moments see.

    Args:
        params: parameters, groups or named parameters, as in torch.
        lr, betas, eps, weight_decay, amsgrad: as in ``torch.optim.AdamW``, on the combined gradient.
        losses, combine, dominance, rescale, every: as in :class:`MoKDSGD`.
        maximize, foreach, capturable, differentiable, fused: as in ``torch.optim.AdamW``.
        process_group: ``"auto"`` (all, where ``torch.distributed`` runs with more than one) or a group: the processes
            that train one model, over which losses and gradients are averaged; None: they are independent.

    Raises:
        ValueError: for a value out of range; see also :meth:`step`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = distill_optim.MoKDAdamW(model.parameters(), lr=1e-3)
        >>> logits = model(torch.ones(3, 4))
        >>> losses = optimizer.step([logits.square().mean(), logits.abs().mean()], through=logits)
    """

    _base = AdamW

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
        combine: str | combination.Method | combination.Stateful = "min_norm",
        dominance: str | combination.Method | combination.Stateful = "log",
        rescale: bool = True,
        every: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = "auto",
    ) -> None:
        self._set_options(
            losses=losses,
            combine=combine,
            dominance=dominance,
            rescale=rescale,
            every=every,
            process_group=process_group,
        )
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

    def _fused_step(
        self, group: dict[str, Any], params: list[Tensor], gradients: Sequence[Column], weights: Tensor
    ) -> bool:
        stepping: list[Tensor] = []
        lists: list[list[Tensor]] = [[] for _ in range(5)]
        self._init_group(group, stepping, *lists)  # type: ignore[no-untyped-call]  # torch's
        _, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        beta1, beta2 = group["betas"]
        options = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
        # torch finds those with a .grad, which others may have written since.
        return len(stepping) == len(params) and weighted_adamw(
            params, gradients, weights, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
            beta1=beta1, beta2=beta2, **options,
        )  # fmt: skip
