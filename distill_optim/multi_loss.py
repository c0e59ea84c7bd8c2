"""The optimizer shell that all four share: losses in, one gradient per loss kept, the subclass's update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from distill_optim.gradients import (
    Collected,
    Column,
    Losses,
    Replicas,
    Sharded,
    backward_each,
    by_index,
    check_losses,
    detached,
    is_losses,
    loss_names,
    values,
)
from distill_optim.stats import Stats

Through = Tensor | list[Tensor] | tuple[Tensor, ...]

# The losses that any process has, or a function that asks the others.
Present = Sequence[int] | Callable[[], Sequence[int]]


class Walk(NamedTuple):
    """How losses are walked back.

    Attributes:
        scale: what their gradients are multiplied by, a scalar tensor.
        through: see :meth:`MultiLossOptimizer.backward`.
        joint: whether this is in the middle of somebody's backward pass of a joint loss.
        retain_graph: whether the last loss leaves the graph in place.
        stepping: whether the step follows at once.
        late: whether the update will see to the sum in ``.grad``.
    """

    scale: Tensor | None = None
    through: Through | None = None
    joint: bool = False
    retain_graph: bool = False
    stepping: bool = False
    late: bool = False


class MultiLossOptimizer(Optimizer):
    """What turns a torch optimizer into one that is given its losses one by one.

    Meant to stand before the torch optimizer among the bases: ``class DOTSGD(MultiLossOptimizer, SGD)``. A subclass
    says which torch optimizer does the plain step (``_base``), and what to do with several losses (``_update``).

    A framework's wrapper may be a subclass made on the fly with a copy of this object's attributes (Lightning's is), so
    what is called on it is passed on to the optimizer inside.
    """

    _base: ClassVar[type[Optimizer]]
    # Options of the losses; every parameter group has a copy, as torch's checkpoints and repr expect, but they hold
    # for the whole optimizer.
    _per_optimizer: ClassVar[tuple[str, ...]] = ("losses", "process_group")

    _stats: Stats | None = None

    # Whether an update puts the sum into .grad itself (Collected.sum_up), after what it needs memory for.
    _sums_late: ClassVar[bool] = False

    # Shown one gradient per loss before every update, which may write into them. Copies of the optimizer have none.
    _watchers: tuple[Callable[[Collected], None], ...] = ()

    # The group that was asked for, the parameters that its processes have in common, and the processes.
    _replicated: tuple[Any, list[Tensor], Replicas | None] | None = None

    @property
    def stats(self) -> Stats | None:
        """What the last step over several losses saw and did; None before the first."""
        inner: MultiLossOptimizer = unwrap(self)
        return inner._stats

    def _set_options(self, **options: Any) -> None:
        """Options beside those of the torch optimizer; to be called before its constructor, which adds the groups."""
        self._options = {**options, "losses": loss_names(options["losses"])}
        group = options["process_group"]
        if isinstance(group, str) and group != "auto":
            raise ValueError(f"process_group={group!r}: expected 'auto', None or a process group")

    @cached_property
    def _collected(self) -> Collected:
        return Collected(len(self._names))

    @cached_property
    def _known_same(self) -> dict[Tensor, tuple[Tensor, int]]:
        return {}

    @property
    def _names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self.defaults["losses"]
        return names

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _grouped(self) -> Iterator[tuple[dict[str, Any], range]]:
        """Each parameter group, and where its parameters stand among all."""
        start = 0
        for group in self.param_groups:
            stop = start + len(group["params"])
            yield group, range(start, stop)
            start = stop

    # ---------------------------------------------------------------- what a training loop calls

    def step(
        self,
        closure: Losses | Callable[[], Any] | None = None,
        *,
        through: Through | None = None,
    ) -> Any:
        """Takes one step.

        Args:
            closure: the scalar losses, as a list or tuple in the order of ``losses=`` or as a mapping by name (where
                a name may be missing); or a callable, called with grad enabled, that returns such losses, or has
                done its own backward and returns anything else; or None, for a step from what :meth:`backward` or
                :func:`~distill_optim.joint_loss` collected, and where they collected nothing from ``.grad``, as the
                torch optimizer would.
            through: see :meth:`backward`.

        Returns:
            The losses given, detached; or what the callable returned.

        Raises:
            TypeError, ValueError: for losses or options that cannot be right. Parameters, buffers and collected
                gradients are as before then.
        """
        losses: Losses | None = None
        returned: Any = None
        if is_losses(closure):
            losses = closure
        elif callable(closure):
            owner = getattr(closure, "optimizer", None)
            if isinstance(owner, Optimizer) and unwrap(owner) is not self:
                raise ValueError("closure: this MultiLossClosure was made for another optimizer; make one for this one")
            with torch.enable_grad():
                returned = closure()
            if is_losses(returned):
                losses = returned
        elif closure is not None:
            raise TypeError(
                f"closure: expected losses as a list, tuple or mapping, a callable, or None, got "
                f"{type(closure).__name__}; for one loss call .backward() on it and then step()"
            )
        if losses is not None:
            # A compiled update leaves .grad alone.
            late = self._sums_late and not torch.compiler.is_compiling()
            self._backward(losses, Walk(through=through, stepping=True, late=late))
            returned = detached(losses) if losses is closure else returned
        elif through is not None:
            raise ValueError("through: it needs the losses in the same call; give them to step, or it to backward")
        elif self._collected:
            self._check_groups()
            with torch.no_grad():
                params = self._params()
                self._collected.follow(params, [p.grad for p in params])
        if self._collected:
            self._collected.align(self._params())
            for watch in self._watchers:
                watch(self._collected)
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                self._update(self._collected)
            self._collected = Collected(len(self._names))
        else:
            self._plain_step()
        self.__dict__.pop("_known_same", None)
        return returned

    def backward(self, losses: Losses, scaler: Any = None, through: Through | None = None) -> None:
        """Collects the gradient of every loss, for a later :meth:`step`.

        Called again before the step, it adds to what is there: micro-batches. ``.grad`` is left as
        ``sum(losses).backward()`` would have left it. If it is a multiple of that by the time of the step (unscaled,
        clipped, divided by the number of micro-batches), every loss's gradient is multiplied in the same way, parameter
        by parameter. If it is anything else (another loss walked back on top, a clamp, noise), the losses that reach
        the parameter share it equally, which is the step of the summed loss. A parameter whose ``.grad`` is None is
        left out.

        Args:
            losses: scalar losses: a list or tuple in the order of ``losses=``, or a mapping by name.
            scaler: a ``torch.amp.GradScaler`` whose scale the gradients are multiplied by.
            through: a tensor (or several) that all losses pass on their way to most of the parameters, such as the
                student's logits. MoKD then compares the gradients there and walks the rest of the graph back once,
                for the weighted sum, which is what ``.grad`` then holds.

        Raises:
            TypeError, ValueError: as :meth:`step`.
        """
        inner = unwrap(self)
        if inner is not self:
            inner.backward(losses, scaler, through)
            return
        scale = None
        if scaler is not None:
            given = next(iter(losses.values() if isinstance(losses, Mapping) else losses), None)
            device = given.device if isinstance(given, Tensor) else torch.device("cpu")
            scale = scaler.scale(torch.ones((), device=device))
        self._backward(losses, Walk(scale, through))
        with torch.no_grad():
            self._collected.remember()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients: ``.grad``, and those collected per loss.

        Args:
            set_to_none: as in ``torch.optim.Optimizer.zero_grad``.
        """
        inner = unwrap(self)
        if inner is not self:
            inner.zero_grad(set_to_none)
            return
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        self._collected = Collected(len(self._names))
        self.__dict__.pop("_known_same", None)
        if self._stats is not None:
            self._stats.release()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the options checked."""
        self.defaults.update(self.__dict__.pop("_options", {}))
        if isinstance(param_group, dict):
            for option in self._per_optimizer:
                if option in param_group and param_group[option] != self.defaults[option]:
                    raise ValueError(
                        f"{option}={param_group[option]!r} in a parameter group: it holds for the whole optimizer, "
                        f"which has {self.defaults[option]!r}; give it to the constructor"
                    )
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; None for options that describe this process, or that are functions: a checkpoint is data."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            for option in self._per_optimizer:
                if option == "process_group" or callable(group[option]):
                    group[option] = None
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; also takes a state dict of the torch optimizer that this one replaces.

        Raises:
            ValueError: for a state dict of an optimizer with other losses, or with the memory of another rule of
                combination, besides torch's own reasons.
        """
        super().load_state_dict(state_dict)

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        """Refuses the parameter groups of a state dict that this optimizer could not go on from."""
        for group in groups:
            saved = group.get("losses")
            if saved is not None and tuple(saved) != self._names:
                raise ValueError(
                    f"state_dict: it was saved with losses={tuple(saved)!r}, this optimizer has {self._names!r}; "
                    "construct it with the same losses, in the same order"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" not in state:
            # Not a copy, but the end of load_state_dict, after its hooks and before anything is taken over.
            self._check_loaded(state["param_groups"])
            for group in state["param_groups"]:
                group.update(
                    {option: self.defaults[option] for option in self._per_optimizer if group.get(option) is None}
                )
        super().__setstate__(state)
        # A checkpoint of the torch optimizer, or of an older version, lacks our options.
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)

    # ---------------------------------------------------------------- what a subclass says

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Refuses options of a group that a step over several losses could not use."""

    def _check_groups(self) -> None:
        """Before every such step, because schedulers and users write into the groups."""
        for group in self.param_groups:
            self._check_group(group)
            # What torch's optimizers would say in the middle of the step.
            if group["fused"] and (odd := {p.dtype for p in group["params"] if not p.is_floating_point()}):
                raise ValueError(
                    f"fused=True: it takes floating-point parameters only, and there are some of "
                    f"{', '.join(sorted(map(str, odd)))}; leave it out"
                )
            if group["foreach"] and isinstance(group["lr"], Tensor) and group.get("capturable") is False:
                raise ValueError(
                    f"lr={group['lr']}: a tensor is not supported with foreach=True and capturable=False; write a "
                    "number into the group, or leave foreach out"
                )

    def _update(self, collected: Collected) -> None:
        """The step from one gradient per loss."""
        # Not an ABC: frameworks make subclasses of optimizers on the fly, with a plain metaclass in mind.
        raise NotImplementedError

    def _step_lengths(self, collected: Collected) -> list[Column] | None:
        """How far the step went along each loss's memory, per loss and parameter, before the learning rate.

        Of the parameters that several losses reach, in the units of a gradient. None where a loss has no memory of its
        own, so that the step has its weighted gradient.
        """
        return None

    def _plain_step(self) -> None:
        """The step from ``.grad``, as the torch optimizer takes it."""
        if "found_inf" in self.__dict__ and not any(p.grad is not None for p in self._params()):
            # See _step_supports_amp_scaling. The scaler would have taken these back.
            del self.__dict__["found_inf"], self.__dict__["grad_scale"]
            raise ValueError(
                "scaler.step(optimizer): there is no gradient to step on; call "
                "optimizer.backward(losses, scaler=scaler), or scaler.scale(joint_loss(losses, optimizer)).backward(), "
                "first"
            )
        self._base_step()

    # ---------------------------------------------------------------- what a subclass builds on

    # Autograd's passes are no part of a compiled step, and sets of tensors are nothing that dynamo can trace.
    @_disable_dynamo
    def _backward(self, losses: Losses, walk: Walk) -> None:
        """Losses → gradients: checks them, and walks the graph back."""
        replicas = self._replicas()
        joined = self._join(stepping=walk.stepping)
        try:
            indexed = by_index(losses, self._names)
            check_losses(indexed, self._names)
            self._check_groups()
        except Exception:
            if replicas is not None:
                replicas.any([True] + [False] * len(self._names))
            raise
        present: Present = list(indexed)
        if replicas is not None:
            # Processes that have run out of batches first match what the first backward pass has the others do.
            ask = partial(self._present_anywhere, replicas, indexed)
            present = ask if joined else ask()
        if self._stats is not None:
            self._stats.release()
        self._collect(indexed, present, walk)

    def _present_anywhere(self, replicas: Replicas, losses: Mapping[int, Tensor]) -> list[int]:
        """The losses that any process has, which all of them reduce."""
        refused, *given = replicas.any([False, *(i in losses for i in range(len(self._names)))])
        if refused:
            raise RuntimeError("losses: another process refused its own, so that no process can go on; see its error")
        return [i for i, has in enumerate(given) if has]

    def _collect(self, losses: Mapping[int, Tensor], present: Present, walk: Walk) -> None:
        """One backward pass per loss."""
        params, replicas = self._params(), self._replicas()
        gradients, before = backward_each(
            losses,
            params,
            self._names,
            scale=walk.scale,
            retain_graph=walk.retain_graph,
            present=present,
            replicas=replicas,
        )
        given = self._mean({i: loss.detach() for i, loss in losses.items()}, list(gradients))

        def finish(before: Column) -> None:
            with torch.no_grad():
                same, late = self._same_everywhere(before), walk.late and replicas is None
                self._collected.add(params, gradients, same, given, joint=walk.joint, late=late)
                self._note_same()

        if not walk.joint:
            finish(before)
            return

        # A joint loss is walked back in the middle of somebody's backward pass, in which other losses may leave their
        # gradients in .grad too; what they leave belongs to no loss by name, and is known when that pass ends.
        def at_the_end() -> None:
            finish([p.grad for p in params])
            with torch.no_grad():
                self._collected.remember()

        for p, grad in zip(params, before, strict=True):
            p.grad = grad
        torch.autograd.Variable._execution_engine.queue_callback(at_the_end)

    # ---------------------------------------------------------------- several processes

    def _processes(self) -> Replicas | Sharded | None:
        """The processes that train this model together; None where there is one, or where they are independent."""
        group, distributed = self.defaults["process_group"], torch.distributed
        if group is None or not (distributed.is_available() and distributed.is_initialized()):
            return None
        params = self._params()
        mesh = next((p.device_mesh for p in params if hasattr(p, "device_mesh")), None)
        if mesh is not None and group == "auto":
            return Sharded(mesh) if mesh.size() > 1 else None
        group = distributed.group.WORLD if group == "auto" else group
        known = self._replicated
        if known is None or known[0] is not group or list(map(id, known[1])) != list(map(id, params)):
            signature = (self._names, [(tuple(p.shape), p.dtype) for p in params])
            replicas = Replicas(group, signature) if distributed.get_world_size(group) > 1 else None
            known = self._replicated = (group, params, replicas)
        return known[2]

    def _replicas(self) -> Replicas | None:
        """Those processes, if each holds all of the parameters."""
        processes = self._processes()
        return processes if isinstance(processes, Replicas) else None

    def _mean(self, values: Mapping[int, Tensor], present: Sequence[int]) -> dict[int, Tensor]:
        """Values of the losses, averaged over the processes; a loss that is missing in one of them is zero there."""
        processes = self._processes()
        if processes is None:
            return dict(values)
        home = self._home()
        zero = torch.zeros((), dtype=torch.float64, device=home)
        own = [values[i].to(home, torch.float64).reshape(()) if i in values else zero for i in present]
        return dict(zip(present, processes.mean(torch.stack(own)).unbind(), strict=True))

    def _same_everywhere(self, grads: Column) -> Column:
        """These ``.grad``, with those averaged that may differ between the processes: what nobody here left there."""
        replicas = self._replicas()
        if replicas is None:
            return grads
        params, foreign = self._params(), list(grads)
        for n, p in enumerate(params):
            same, version = self._known_same.get(p, (None, None))
            if same is not None and grads[n] is same and same._version == version:
                foreign[n] = None
        averages = replicas.average(foreign, params)()
        return [grad if average is None else average for grad, average in zip(grads, averages, strict=True)]

    def _note_same(self) -> None:
        """Takes down which ``.grad`` are the same in all processes: those of now."""
        if self._replicas() is not None:
            self._known_same = {p: (p.grad, p.grad._version) for p in self._params() if p.grad is not None}

    def _join(self, *, stepping: bool) -> bool:
        """Tells processes that have run out of batches, within ``torch.distributed.algorithms.Join``, that we go on."""
        if self._join_config is None or not self._join_config.enable:
            return False
        from torch.distributed.algorithms.join import Join

        if not stepping:
            raise ValueError(
                "Join: processes that have run out of batches can follow step(losses) only; give the losses to step, "
                "not to backward or joint_loss"
            )
        Join.notify_join_context(cast(Any, self))
        return True

    # What torch.distributed.algorithms.Join asks of the things it is given.

    _join_config: Any = None

    @property
    def join_device(self) -> torch.device:
        """Where the tensors live that ``torch.distributed.algorithms.Join`` counts with."""
        return self._home()

    @property
    def join_process_group(self) -> Any:
        """The processes that ``torch.distributed.algorithms.Join`` waits for."""
        replicas = self._replicas()
        return torch.distributed.group.WORLD if replicas is None else replicas.group

    def join_hook(self, **_: Any) -> Any:
        """What a process does that has run out of batches, in every step of the others: it adds nothing and steps too.

        Example:
            ``with Join([model, optimizer]): ...``
        """
        from torch.distributed.algorithms.join import JoinHook

        optimizer = self

        class Follow(JoinHook):
            def main_hook(self) -> None:
                replicas = optimizer._replicas()
                if replicas is not None:
                    optimizer.zero_grad()
                    present = partial(optimizer._present_anywhere, replicas, {})
                    optimizer._collect({}, present, Walk(stepping=True))
                    with torch.no_grad():
                        optimizer._update(optimizer._collected)
                    optimizer._collected = Collected(len(optimizer._names))

        return Follow()

    def _base_step(self) -> None:
        """The torch optimizer's step from ``.grad``, without its hooks, which are already around ours."""
        step: Any = self._base.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        step(self)

    def _values(self, collected: Collected) -> Tensor:
        """Values of the losses that were given."""
        return values([collected.values[i] for i in collected.present], self._home())

    def _home(self) -> torch.device:
        """The device of the first parameter, where statistics live."""
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))

    def _present_names(self, collected: Collected) -> list[str]:
        return [self._names[i] for i in collected.present]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by ``GradScaler.step``: whether ours handles a scaled ``.grad`` itself.

        It does not, so that the scaler unscales, and skips a step on an overflow in any one loss, which leaves
        everything as it was, the rules' memory too; and frameworks clip, which Lightning refuses to do for optimizers
        that unscale by themselves. Except where there is nothing to step on: there the scaler would fail with a message
        about inf checks before we could tell what is missing.
        """
        return not any(p.grad is not None for p in self._params())

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it with ``fused=True``."""


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside a framework's wrapper (Lightning's and Accelerate's hold it in ``.optimizer``)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
