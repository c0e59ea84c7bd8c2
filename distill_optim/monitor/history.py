"""What a monitor recorded, on the host: arithmetic on it, and its way into a file and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A gradient dominates where it is so many times as long as each of the others. At right angles the sum then stands 72°
# away from the shorter one.
DOMINANT = 3.0

# The unit that is the whole model.
ALL = "all"


@dataclass(frozen=True, eq=False)
class History:
    """Records of N steps with K losses, over U units: the whole model, then modules and parameter groups.

    Inner products are over those parameters of a unit that several losses reach. What is not known is nan: a loss that
    a step lacked, a cosine with a gradient of length zero, a unit that was not there yet.

    Attributes:
        optimizer: name of the optimizer's class.
        names: names of the losses.
        units: names of the units; the first is ``"all"``.
        steps: the number of each step, from 0.
        losses: shape (N, K), float64, as all that follow.
        weights: factors of the raw gradients in the step, shape (N, K).
        norms: lengths of the raw gradients, shape (N, U, K).
        cosines: between the raw gradients, shape (N, U, K, K).
        updates: how far each step went along each loss, before the learning rate, shape (N, U, K). MoKD and torch's
            optimizers: the weighted gradient wᵢgᵢ. DOTSGD: the momentum buffer cᵢ‖vᵢ‖; DOTAdamW: the first moment,
            corrected for its bias, before the division by √v.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> with distill_optim.monitor.Monitor(torch.optim.SGD([w], lr=0.1)) as monitor:
        ...     monitor.observe([w[0] + w[1], w[0] - 3 * w[1]])
        >>> history = monitor.history()
        >>> history.steps, history.names, history.norms[0, 0].tolist()
        ([0], ('task', 'distill'), [1.4142135623730951, 3.1622776601683795])
        >>> round(history.as_dict()["cosine/task_distill"], 3)
        -0.447
    """

    optimizer: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    steps: list[int]
    losses: Tensor
    weights: Tensor
    norms: Tensor
    cosines: Tensor
    updates: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of losses, by their positions."""
        return list(combinations(range(len(self.names)), 2))

    def conflicts(self) -> Tensor:
        """Share of the steps in which two gradients point against each other, shape (U, K, K)."""
        return _share(self.cosines < 0, self.cosines.isfinite())

    def dominance(self) -> Tensor:
        """Share of the steps in which a gradient is more than ``DOMINANT`` times as long as every other, (U, K)."""
        lengths = self.norms.nan_to_num(0, posinf=0)
        second = lengths.topk(min(2, len(self.names)), -1).values[..., -1:]
        comparable = (lengths > 0).sum(-1) > 1
        return _share(lengths > DOMINANT * second, comparable[..., None].expand_as(lengths))

    def harm(self) -> Tensor:
        """Share of the steps in which the weighted sum of the gradients, to first order, makes a loss worse, (K,)."""
        norms, cosines = self.norms[:, 0].nan_to_num(0), self.cosines[:, 0].nan_to_num(0)
        parts = norms * self.weights.nan_to_num(0)
        gain = (cosines * parts[:, None]).sum(-1)
        # Orthogonal, up to rounding, is no harm: a method may stop just there.
        return _share(gain < -1e-9 * parts.abs().sum(-1, keepdim=True), norms > 0)

    # ---------------------------------------------------------------- numbers by name

    def entries(self, n: int) -> dict[str, float]:
        """Record n by name; nan where something is not known."""
        found = {f"loss/{name}": v for name, v in zip(self.names, self.losses[n].tolist(), strict=True)}
        found |= {f"weight/{name}": v for name, v in zip(self.names, self.weights[n].tolist(), strict=True)}
        for u, unit in enumerate(self.units):
            norms, updates, cosines = (t[n, u].tolist() for t in (self.norms, self.updates, self.cosines))
            found |= {_key("norm", name, unit): v for name, v in zip(self.names, norms, strict=True)}
            found |= {_key("update", name, unit): v for name, v in zip(self.names, updates, strict=True)}
            for i, j in self.pairs:
                pair = f"{self.names[i]}_{self.names[j]}"
                found[_key("cosine", pair, unit)] = cosines[i][j]
                found[_key("norm_ratio", pair, unit)] = norms[j] / norms[i] if norms[i] else math.nan
        return found

    def as_dict(self) -> dict[str, float]:
        """The last record, and the rates over all of them, as plain numbers for a logger.

        Returns:
            ``loss/NAME``, ``weight/NAME``, ``norm/NAME``, ``update/NAME``, ``dominance_rate/NAME``, ``harm_rate/NAME``;
            ``cosine/A_B``, ``norm_ratio/A_B`` (how many times as long as A's gradient B's is), ``conflict_rate/A_B``;
            of a unit with its name behind, as ``cosine/A_B/UNIT``. What is not known is left out. Empty before the
            first record.
        """
        if not self.steps:
            return {}
        found = self.entries(-1)
        conflicts, dominance = self.conflicts().tolist(), self.dominance().tolist()
        for u, unit in enumerate(self.units):
            for i, j in self.pairs:
                found[_key("conflict_rate", f"{self.names[i]}_{self.names[j]}", unit)] = conflicts[u][i][j]
            found |= {_key("dominance_rate", name, unit): v for name, v in zip(self.names, dominance[u], strict=True)}
        found |= {f"harm_rate/{name}": v for name, v in zip(self.names, self.harm().tolist(), strict=True)}
        return {name: v for name, v in found.items() if not math.isnan(v)}

    # ---------------------------------------------------------------- files

    def write_json_lines(self, path: str | Path) -> None:
        """Writes one line per record: its step, the optimizer, and what :meth:`entries` says, null where not finite."""
        lines = (
            {"step": step, "optimizer": self.optimizer}
            | {name: v if math.isfinite(v) else None for name, v in self.entries(n).items()}
            for n, step in enumerate(self.steps)
        )
        Path(path).write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), "utf-8")

    @classmethod
    def read_json_lines(cls, path: str | Path) -> History:
        """Reads what :meth:`write_json_lines` wrote.

        Raises:
            ValueError: for a file that is something else.
        """
        try:
            rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
            return cls._of_rows(rows)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: expected lines as History.write_json_lines writes them; {error!r}") from error

    @classmethod
    def _of_rows(cls, rows: list[Mapping[str, Any]]) -> History:
        # The last line knows the most units.
        names = tuple(key.removeprefix("loss/") for key in rows[-1] if key.startswith("loss/"))
        first = f"norm/{names[0]}/"
        units = (ALL, *(key.removeprefix(first) for key in rows[-1] if key.startswith(first)))

        def numbers(keys: Iterable[str]) -> Tensor:
            known = list(keys)
            found = [[row.get(key) for key in known] for row in rows]
            return torch.tensor([[math.nan if v is None else v for v in row] for row in found], dtype=torch.float64)

        def per_unit(kind: str) -> Tensor:
            return numbers(_key(kind, name, unit) for unit in units for name in names).view(-1, len(units), len(names))

        norms = per_unit("norm")
        cosines = torch.full((*norms.shape, len(names)), math.nan, dtype=torch.float64)
        cosines.diagonal(dim1=-2, dim2=-1).copy_(torch.where(norms > 0, 1.0, math.nan))
        for i, j in combinations(range(len(names)), 2):
            between = numbers(_key("cosine", f"{names[i]}_{names[j]}", unit) for unit in units)
            cosines[..., i, j] = cosines[..., j, i] = between
        return cls(
            optimizer=rows[-1]["optimizer"],
            names=names,
            units=units,
            steps=[row["step"] for row in rows],
            losses=numbers(f"loss/{name}" for name in names),
            weights=numbers(f"weight/{name}" for name in names),
            norms=norms,
            cosines=cosines,
            updates=per_unit("update"),
        )


def _key(kind: str, name: str, unit: str) -> str:
    return f"{kind}/{name}" if unit == ALL else f"{kind}/{name}/{unit}"


def _share(those: Tensor, among: Tensor) -> Tensor:
    """Along the first dimension; nan where there are none."""
    return (those & among).sum(0) / among.sum(0).double()
