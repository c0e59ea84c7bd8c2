"""What a step over several losses saw and did."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Stats:
    """Statistics of the last step over several losses, as tensors on the device.

    Nothing here waits for the device but :meth:`as_dict`.

    Attributes:
        names: names of the losses that the step was given, K of them.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = distill_optim.MoKDSGD([w], lr=0.1)
        >>> _ = optimizer.step([w[0] ** 2, 0.5 * w[1] ** 2])
        >>> optimizer.stats.names, optimizer.stats.norms.tolist()
        (('task', 'distill'), [2.0, 1.0])
        >>> round(optimizer.stats.as_dict()["weight/distill"], 3)
        1.333
    """

    def __init__(
        self,
        names: Sequence[str],
        losses: Tensor,
        weights: Tensor | None,
        gram: Tensor | Callable[[], Tensor] | None,
    ) -> None:
        self.names = tuple(names)
        self._losses = losses
        self._weights = weights
        self._gram = gram

    # A step does for its statistics what cannot be done later, which on small models is time that counts.

    @property
    def losses(self) -> Tensor:
        """Values of the losses, shape (K,), float64; over micro-batches, their sum."""
        return self._losses.double()

    @property
    def weights(self) -> Tensor:
        """The factors of the raw gradients in the step, shape (K,), float64.

        DOT weighs by memory, not by factors: all 1.
        """
        return torch.ones_like(self.losses) if self._weights is None else self._weights

    @property
    def gram(self) -> Tensor | None:
        """Inner products of the raw gradients over the parameters that several losses reach, (K, K), float64.

        Before any rescaling by ``weights``, after what was done to ``.grad``. MoKD computes it in the step; with
        ``through`` it is that at the tensor given, and between two computations of ``every`` the last one (None
        right after a checkpoint was loaded). DOT needs none, so for DOT it is computed when it is first asked for,
        from the step's gradients, which are kept until ``zero_grad`` or the next backward pass; None after that.
        """
        if callable(self._gram):
            with torch.no_grad():
                self._gram = self._gram()
        return self._gram

    @property
    def norms(self) -> Tensor | None:
        """Lengths of the raw gradients, shape (K,)."""
        gram = self.gram
        return None if gram is None else gram.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the raw gradients, shape (K, K); a zero gradient is at right angles to all."""
        gram, norms = self.gram, self.norms
        if gram is None or norms is None:
            return None
        lengths = torch.where(norms == 0, torch.ones_like(norms), norms)
        return gram / torch.outer(lengths, lengths)

    def release(self) -> None:
        """Lets go of the step's gradients."""
        if callable(self._gram):
            self._gram = None

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for a logger. Waits for the device.

        Returns:
            ``loss/NAME``, ``weight/NAME``, ``norm/NAME`` and ``cosine/NAME_NAME`` per loss and pair of losses; the
            last two only where there is a Gram matrix.
        """
        columns = {"loss": self.losses, "weight": self.weights, "norm": self.norms}
        entries = {
            f"{kind}/{name}": v
            for kind, c in columns.items()
            if c is not None
            for name, v in zip(self.names, c.unbind(), strict=True)
        }
        cosines = self.cosines
        if cosines is not None:
            for j in range(len(self.names)):
                for i in range(j):
                    entries[f"cosine/{self.names[i]}_{self.names[j]}"] = cosines[i, j]
        home = self.weights.device
        numbers = torch.stack([v.to(home, torch.float64) for v in entries.values()]).tolist()
        return dict(zip(entries, numbers, strict=True))

    def __repr__(self) -> str:
        return f"Stats({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"
