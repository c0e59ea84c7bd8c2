"""Features of a model, taken by the names of its layers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType

from torch import Tensor, nn


class Features(Mapping[str, Tensor]):
    """What the layers gave in the model's last forward pass, by their names; see :func:`features`.

    A layer is in the mapping once it has run. The tensors keep the graph of their pass alive until the next one.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"names={names!r}: expected several names; for one layer give [{names!r}]")
        self._taken: dict[str, Tensor] = {}
        known = dict(model.named_modules(remove_duplicate=False))
        names = list(names)
        for name in names:
            if name not in known:
                raise ValueError(f"names: the model has no layer {name!r}; {_near(name, known)}")
        self._handles = [known[name].register_forward_hook(self._hook(name, known[name])) for name in names]

    def _hook(self, name: str, layer: nn.Module) -> Callable[[nn.Module, object, object], None]:
        def take(module: nn.Module, args: object, output: object) -> None:
            # A deep copy of the model, such as an average of its weights, has a copy of the hook.
            if module is not layer:
                return
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor):
                raise TypeError(
                    f"names: layer {name!r} returns a {type(first).__name__}, expected a tensor or a tuple that begins "
                    "with one; name a layer inside it"
                )
            self._taken[name] = first

        return take

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._taken:
            raise KeyError(f"{name!r}: no features; it has not run, or was not among the names")
        return self._taken[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def __len__(self) -> int:
        return len(self._taken)

    def remove(self) -> None:
        """Takes the hooks off. What was taken stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Features:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _near(name: str, known: Iterable[str]) -> str:
    inside = [other for other in known if other.endswith(f".{name}")]
    near = [*inside, *difflib.get_close_matches(name, [other for other in known if other not in inside])]
    if near:
        return f"near it are {', '.join(map(repr, near))}"
    return "list them with [name for name, _ in model.named_modules()]"


def features(model: nn.Module, names: Iterable[str]) -> Features:
    """Takes the outputs of layers, by name, in every forward pass until it is told to stop.

    A forward hook on each layer; the model is not changed otherwise. ``remove()`` takes the hooks off, and so does the
    end of a ``with`` block; what was taken can be read afterwards. Of a layer that runs several times in a pass the
    last output stays. An in-place operation on the output, such as ``nn.ReLU(inplace=True)``, shows in what was taken.

    Args:
        model: any module. In a wrapper (``DistributedDataParallel``, ``torch.compile``) the names begin with that of
            the wrapped module; it is simpler to hand in the module that was wrapped.
        names: as ``model.named_modules()`` has them. A layer that returns a tuple, like many transformer blocks, gives
            its first element.

    Returns:
        A mapping from the names to the outputs.

    Raises:
        TypeError: for one string in the place of several; in the forward pass, for a layer that returns no tensor.
        ValueError: for a name that is not there, with those that are near.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with features(model, ["0", "1"]) as seen:
        ...     logits = model(torch.randn(5, 4))
        >>> {name: tuple(f.shape) for name, f in seen.items()}
        {'0': (5, 3), '1': (5, 3)}
    """
    return Features(model, names)
