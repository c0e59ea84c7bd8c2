"""The shell: what a monitor hangs on an optimizer, and the buffers on the device that it writes into."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from distill_optim.combine import gram
from distill_optim.gradients import (
    Collected,
    Column,
    Losses,
    by_index,
    check_losses,
    gradients_beside,
    is_losses,
    loss_names,
    values,
)
from distill_optim.monitor.advice import diagnose
from distill_optim.monitor.history import ALL, History
from distill_optim.monitor.picture import plot
from distill_optim.multi_loss import MultiLossOptimizer, unwrap
from distill_optim.stats import Stats


class Monitor:
    """Records what the losses do to each other in every n-th step, on the device and without waiting for it.

    Around one of our optimizers it records by itself, from the gradients that the steps have anyway. Around any other
    torch optimizer it takes them where :meth:`observe` is called. It changes nothing: with it and without it training
    is the same, bit for bit.

    Nothing is read on the host before one of the methods that hand something out is called. What a step collects
    belongs to the whole batch: after accumulation, unscaling, clipping and averaging over processes. It calls no
    collective of its own, except for sharded parameters (FSDP2), whose lengths are sums over all processes: there every
    process needs a monitor with the same ``every``.

    A copy, by ``copy.deepcopy`` or pickle, has the records and is closed.

    Args:
        optimizer: the optimizer, or a framework's wrapper that holds it in ``.optimizer``.
        every: one step in so many is recorded, beginning with the first.
        modules: also record these modules, each over its parameters: a model, for the modules directly inside it, or a
            mapping from names to modules. Parameter groups are recorded where there are several.
        capacity: so many records are kept, the latest.

    Raises:
        TypeError: for something that is not an optimizer.
        ValueError: for ``every`` or ``capacity`` below 1; for modules without any of the optimizer's parameters; for
            ``DOTSGD(fold=True)``, which never holds a gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = distill_optim.MoKDSGD(model.parameters(), lr=0.05)
        >>> with distill_optim.monitor.Monitor(optimizer, every=2) as monitor:
        ...     for _ in range(5):
        ...         out = model(torch.ones(3, 4))
        ...         _ = optimizer.step([out.square().mean(), out.abs().mean()])
        >>> monitor.history().steps
        [0, 2, 4]
        >>> sorted(monitor.as_dict())[:3]
        ['conflict_rate/task_distill', 'cosine/task_distill', 'dominance_rate/distill']
    """

    def __init__(
        self,
        optimizer: Any,
        every: int = 20,
        *,
        modules: nn.Module | Mapping[str, nn.Module] | None = None,
        capacity: int = 1000,
    ) -> None:
        inner = unwrap(optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
        for option, number in ("every", every), ("capacity", capacity):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{option}={number!r}: expected a whole number, at least 1")
        if inner.defaults.get("fold"):
            raise ValueError("optimizer: DOTSGD(fold=True) never holds a gradient to look at; leave fold out")
        self._optimizer: torch.optim.Optimizer | None = inner
        self._kind = type(inner).__name__
        self._every = every
        self._modules = _parameters_by_module(modules, _params(inner))
        self._names: tuple[str, ...] = ()
        self._units: tuple[str, ...] = (ALL,)
        self._seen = 0
        self._records: deque[tuple[int, Tensor]] = deque(maxlen=capacity)
        self._last: Stats | None = None
        # The gradients of the step under way, and their inner products in the units beyond the first.
        self._under_way: tuple[Collected, dict[str, Tensor]] | None = None
        self._hook: Any = None
        if isinstance(inner, MultiLossOptimizer):
            self._names = inner.defaults["losses"]
            self._last = inner.stats
            inner._watchers = (*inner._watchers, self._before_update)
            self._hook = inner.register_step_post_hook(self._after_step)

    # ---------------------------------------------------------------- what is looked at

    # In most steps there is nothing to do, for which entering no_grad would be the larger part.

    @_disable_dynamo
    def _before_update(self, collected: Collected) -> None:
        """Inner products that have to be taken before the update writes into the gradients."""
        if self._due:
            units = self._units_of(collected.params)
            del units[ALL]  # the step's own statistics have it
            columns = collected.columns(range(len(collected.params)), collected.present)
            with torch.no_grad():
                self._under_way = collected, _grams(columns, units)

    @_disable_dynamo
    def _after_step(self, optimizer: MultiLossOptimizer, args: Any, kwargs: Any) -> None:
        """Records the step that was taken, if it was one over several losses."""
        stats, under_way = optimizer.stats, self._under_way
        self._under_way = None
        if stats is None or stats is self._last:
            return
        self._last = stats
        if self._due:
            with torch.no_grad():
                self._record_step(optimizer, stats, under_way)
        self._seen += 1

    def _record_step(
        self, optimizer: MultiLossOptimizer, stats: Stats, under_way: tuple[Collected, dict[str, Tensor]] | None
    ) -> None:
        present = [self._names.index(name) for name in stats.names]
        grams = {} if stats.gram is None else {ALL: stats.gram}
        updates: dict[str, Tensor] = {}
        if under_way is not None:
            collected, beyond = under_way
            grams |= beyond
            lengths = optimizer._step_lengths(collected)
            if lengths is not None:
                columns = [lengths[i] for i in present]
                units = self._units_of(collected.params)
                updates = {unit: _whole_lengths(columns, own, stats.weights) for unit, own in units.items()}
        self._record(present, stats.losses, stats.weights, grams, updates)

    def observe(self, losses: Losses, scaler: Any = None) -> None:
        """Looks at losses that are about to be walked back, around an optimizer that is not one of ours.

        To be called before ``.backward()`` on their sum, in every step: every n-th call walks each loss back by itself,
        the others do nothing. ``.grad``, the graph, and whoever waits for the backward pass (such as
        ``DistributedDataParallel``) take no notice. Each micro-batch, and each process, is looked at for itself.

        Args:
            losses: scalar losses, as a list or tuple, or as a mapping by name. The first call fixes the names.
            scaler: a ``torch.amp.GradScaler``, whose scale keeps small gradients in float16 from vanishing; what is
                recorded is unscaled.

        Raises:
            TypeError, ValueError: for losses that no gradient can be taken of, or others than in the first call; for
                sharded parameters and reentrant checkpoints; around one of our optimizers; after :meth:`close`.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = torch.optim.SGD([w], lr=0.1)
            >>> monitor = distill_optim.monitor.Monitor(optimizer, every=1)
            >>> task, distill = w.square().sum(), (w[0] - w[1]).square() - w[0]
            >>> monitor.observe({"task": task, "distill": distill})
            >>> (task + distill).backward()
            >>> optimizer.step()
            >>> monitor.as_dict()["conflict_rate/task_distill"]
            1.0
        """
        if self._optimizer is None:
            raise ValueError("observe: this monitor is closed; make a new one")
        if isinstance(self._optimizer, MultiLossOptimizer):
            raise ValueError(f"observe: the steps of {self._kind} are recorded by themselves; leave it out")
        if not is_losses(losses):
            raise TypeError(f"losses: expected a list, tuple or mapping, got {type(losses).__name__}")
        named = losses if isinstance(losses, Mapping) else dict(zip(loss_names(len(losses)), losses, strict=True))
        known = self._names or tuple(named)
        if unknown := [name for name in named if name not in known]:
            raise ValueError(
                f"losses: {unknown[0]!r} is not one of {known!r}, with which this monitor began; give the same names"
            )
        indexed = by_index(named, known)
        check_losses(indexed, known)
        if self._due:
            params = _params(self._optimizer)
            scale = None
            if scaler is not None:
                scale = scaler.scale(torch.ones((), device=next(iter(indexed.values())).device))
            columns = list(gradients_beside(indexed, params, known, scale=scale).values())
            with torch.no_grad():
                grams = _grams(columns, self._units_of(params))
                if scale is not None:
                    grams = {unit: g / scale.to(g).square() for unit, g in grams.items()}
                given = values(list(indexed.values()), params[0].device)
                self._names = known
                self._record(list(indexed), given, torch.ones_like(given), grams, {})
        self._seen += 1

    @property
    def _due(self) -> bool:
        return self._seen % self._every == 0

    def _units_of(self, params: Sequence[Tensor]) -> dict[str, Sequence[int]]:
        """Positions of each unit's parameters."""
        assert self._optimizer is not None
        units: dict[str, Sequence[int]] = {ALL: range(len(params))}
        for name, own in self._modules.items():
            units[name] = [n for n, p in enumerate(params) if p in own]
        groups = self._optimizer.param_groups
        start = 0
        for g, group in enumerate(groups if len(groups) > 1 else ()):
            units[f"group_{g}"] = range(start, start := start + len(group["params"]))
        return units

    def _record(
        self,
        present: Sequence[int],
        losses: Tensor,
        weights: Tensor,
        grams: Mapping[str, Tensor],
        updates: Mapping[str, Tensor],
    ) -> None:
        """Puts a record into one row on the device: K losses, K weights, U Gram matrices, U × K lengths.

        Args:
            present: the losses that there are, P of K.
            losses: their values, shape (P,).
            weights: their weights, shape (P,).
            grams: inner products by unit, (P, P).
            updates: how far the step went along each, by unit, (P,); where it is not said, its weighted gradient.
        """
        assert self._optimizer is not None
        # Those that a row has are never fewer than in the row before.
        self._units = tuple(dict.fromkeys((*self._units, *self._units_of(_params(self._optimizer)))))
        home, k = weights.device, len(self._names)
        missing = torch.full((len(present), len(present)), math.nan, dtype=torch.float64, device=home)
        products = [grams.get(unit, missing).to(home) for unit in self._units]
        lengths = [
            updates[unit] if unit in updates else weights.abs() * g.diagonal().sqrt()
            for unit, g in zip(self._units, products, strict=True)
        ]
        parts = [
            _placed(losses.to(home), present, k),
            _placed(weights, present, k),
            _placed(_placed(torch.stack(products), present, k).mT, present, k),
            _placed(torch.stack(lengths), present, k),
        ]
        self._records.append((self._seen, torch.cat([part.reshape(-1) for part in parts])))

    # ---------------------------------------------------------------- what is handed out

    def history(self) -> History:
        """What was recorded, on the host. Waits for the device."""
        n, k, u = len(self._records), len(self._names), len(self._units)
        blank = torch.full((0, 2 * k + u * (k * k + k)), math.nan, dtype=torch.float64)
        chunks = [blank]
        # Units may have come in between, with a parameter group: earlier rows are shorter.
        for _, alike in groupby((row for _, row in self._records), Tensor.numel):
            rows = torch.stack(list(alike)).cpu()
            before = (rows.shape[1] - 2 * k) // (k * k + k)
            columns = rows.split([2 * k, before * k * k, before * k], 1)
            chunks.append(torch.cat([columns[0], *(_widened(c, c.shape[1] // before * u) for c in columns[1:])], 1))
        table = torch.cat(chunks)
        losses, weights, grams, updates = table.split([k, k, u * k * k, u * k], 1)
        products = grams.reshape(n, u, k, k)
        norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
        return History(
            optimizer=self._kind,
            names=self._names,
            units=self._units,
            steps=[step for step, _ in self._records],
            losses=losses,
            weights=weights,
            norms=norms,
            cosines=products / (norms[..., None] * norms[..., None, :]),
            updates=updates.reshape(n, u, k),
        )

    def as_dict(self) -> dict[str, float]:
        """The last record and the rates so far, for a logger: :meth:`History.as_dict`. Waits for the device."""
        return self.history().as_dict()

    def diagnose(self) -> str:
        """Advice in words: :func:`diagnose`. Waits for the device."""
        return diagnose(self.history())

    def write_json_lines(self, path: str | Path) -> None:
        """A line per record: :meth:`History.write_json_lines`. Waits for the device."""
        self.history().write_json_lines(path)

    def plot(self, path: str | Path) -> None:
        """A picture over time: :func:`plot`. Needs matplotlib. Waits for the device."""
        plot(self.history(), path)

    # ---------------------------------------------------------------- on and off

    def close(self) -> None:
        """Takes the monitor off the optimizer. What was recorded stays."""
        if isinstance(self._optimizer, MultiLossOptimizer):
            self._optimizer._watchers = tuple(w for w in self._optimizer._watchers if w != self._before_update)
            self._hook.remove()
        self.__dict__.update(self.__getstate__())

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to an optimizer."""
        return self.__dict__ | {"_optimizer": None, "_modules": {}, "_last": None, "_under_way": None, "_hook": None}


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _parameters_by_module(
    modules: nn.Module | Mapping[str, nn.Module] | None, params: Sequence[Tensor]
) -> dict[str, set[Tensor]]:
    """The parameters of each module among these; of a model's modules those that have any."""
    if modules is None:
        return {}
    children = isinstance(modules, nn.Module)
    if not isinstance(modules, nn.Module | Mapping):
        raise TypeError(f"modules: expected a model, or a mapping from names to modules, got {type(modules).__name__}")
    named = dict(modules.named_children()) if isinstance(modules, nn.Module) else modules
    found = {name: set(params).intersection(module.parameters()) for name, module in named.items()}
    for name, own in found.items():
        if name == ALL or not (own or children):
            raise ValueError(f"modules[{name!r}]: it has none of the optimizer's parameters")
    return {name: own for name, own in found.items() if own}


def _grams(columns: Sequence[Column], units: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Inner products over those of each unit's parameters that several losses reach, if there are any."""
    grams: dict[str, Tensor] = {}
    for unit, own in units.items():
        shared = [n for n in own if sum(column[n] is not None for column in columns) > 1]
        if shared:
            grams[unit] = gram([[column[n] for n in shared] for column in columns])
    return grams


def _whole_lengths(columns: Sequence[Column], own: Sequence[int], like: Tensor) -> Tensor:
    """The length of each column over these parameters, from those parameter by parameter."""
    none = torch.full_like(like[0], math.nan)
    found = [[x.to(like) for x in (column[n] for n in own) if x is not None] or [none] for column in columns]
    return torch.stack([torch.stack(lengths).square().sum().sqrt() for lengths in found])


def _placed(numbers: Tensor, present: Sequence[int], k: int) -> Tensor:
    """Numbers of the losses that there are, along the last dimension, among those of all K; nan for the others."""
    if len(present) == k:
        return numbers
    known = dict(zip(present, numbers.unbind(-1), strict=True))
    missing = torch.full_like(numbers[..., 0], math.nan)
    return torch.stack([known.get(i, missing) for i in range(k)], -1)


def _widened(rows: Tensor, width: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=math.nan)
