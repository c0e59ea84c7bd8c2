"""Pictures of what every method makes of two or three gradients, and of the ways it takes on a toy problem.

    python -m benchmarks gallery

Writes the pictures of ``docs/gallery.md`` and ``toy.json``, and prints where the ways end as a table. The ways are
taken by the real optimizer, one step after another, which is what the time goes into.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Wedge
from torch import Tensor

from distill_optim import MoKDAdamW, combine

# Okabe and Ito's palette, readable with every common kind of colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
RESULT = "#D55E00"
CONE = "#CFE8F7"
DPI = 100
MINUS = str.maketrans("-", "\N{MINUS SIGN}")

#: Names of methods whose weights have the same ratios.
Group = tuple[str, ...]


def solve(name: str, jacobian: Tensor, losses: Tensor) -> Tensor:
    """The published method's weights, in the scale of Σ |w| = 1; all 0 where it gives no step."""
    return combine.solve(name, jacobian, losses, kind="jacobian", rescale=True) / len(losses)


def groups(k: int) -> list[Group]:
    """All methods; together those that are one and the same for K losses, up to the length of the step."""
    torch.manual_seed(0)
    cases = [(torch.randn(k, 2, dtype=torch.float64), torch.rand(k, dtype=torch.float64)) for _ in range(20)]
    found: list[tuple[Group, Tensor]] = []
    for name in combine.names():
        weights = torch.stack([solve(name, jacobian, losses) for jacobian, losses in cases])
        if remembers_or_draws(name):
            weights = weights.fill_(torch.nan)  # its first step says nothing about the second: like no other
        for i, (group, other) in enumerate(found):
            if torch.allclose(weights, other, atol=1e-9):
                found[i] = ((*group, name), other)
                break
        else:
            found.append(((name,), weights))
    return [group for group, _ in found]


def remembers_or_draws(name: str) -> bool:
    return name == "random" or isinstance(combine.method(name), combine.Stateful)


# ---------------------------------------------------------------- what a method makes of a few gradients


@dataclass(frozen=True)
class Configuration:
    """Gradients in the plane.

    Attributes:
        name: of the file.
        title: of the picture.
        degrees: direction of every gradient.
        lengths: their lengths, and the values of the losses: what another unit of a loss would change together.
    """

    name: str
    title: str
    degrees: Sequence[float]
    lengths: Sequence[float]

    @property
    def losses(self) -> Tensor:
        """Shape (K,)."""
        return torch.tensor(self.lengths, dtype=torch.float64)

    @property
    def jacobian(self) -> Tensor:
        """Shape (K, 2)."""
        angles = torch.tensor(self.degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], -1) * self.losses[:, None]


CONFIGURATIONS = (
    Configuration("two-agree", "Two gradients without conflict: 50° apart, lengths 1 and 0.8", (70, 20), (1.0, 0.8)),
    Configuration("two-conflict", "Two gradients in conflict: 125° apart, lengths 1 and 0.5", (140, 15), (1.0, 0.5)),
    Configuration("two-dominance", "Conflict and dominance: 110° apart, lengths 1 and 5", (110, 0), (1.0, 5.0)),
    Configuration("two-opposed", "Two gradients nearly opposed: 160° apart, lengths 1 and 0.6", (170, 10), (1.0, 0.6)),
    Configuration("three-conflict", "Three gradients, the outer two in conflict", (150, 70, 15), (0.5, 0.8, 1.0)),
    Configuration("three-surrounded", "Three gradients with 0 in their hull", (90, 200, 330), (1.2, 0.8, 1.0)),
)


def draw_configuration(configuration: Configuration) -> Figure:
    jacobian = configuration.jacobian
    shown = [group for group in groups(len(jacobian)) if not remembers_or_draws(group[0])]
    corners = torch.cat([jacobian, jacobian.new_zeros(1, 2)])
    low, high = corners.amin(0), corners.amax(0)
    margin = 0.12 * float((high - low).max())
    low, high = low - margin, high + margin
    width, height = (high - low).tolist()
    height = max(height, 0.65 * width)

    columns, rows = 5, math.ceil(len(shown) / 5)
    figure = Figure(figsize=(9.5, rows * (1.85 * height / width + 0.75) + 0.75), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, group in zip(panels, shown, strict=False):
        axes.set_xlim(float(low[0]), float(high[0]))
        axes.set_ylim(float(low[1]), float(low[1]) + height)
        axes.set_aspect("equal")
        draw_answer(axes, group, jacobian, configuration.losses)
    handles = [Line2D([], [], color=COLOURS[i], lw=2, label=f"gradient {i + 1}") for i in range(len(jacobian))] + [
        Patch(facecolor="0.9", edgecolor="0.55", linestyle="--", label="their convex hull"),
        Patch(facecolor=CONE, label="in conflict with nobody"),
        Line2D([], [], color=RESULT, lw=2.6, label="Σ w g for Σ |w| = 1"),
        Line2D([], [], color=RESULT, lw=0.9, linestyle=":", label="its direction"),
    ]
    legend(figure, handles, columns=len(handles))
    figure.suptitle(configuration.title, fontsize=12)
    return figure


def draw_answer(axes: Axes, group: Group, jacobian: Tensor, losses: Tensor) -> None:
    """One panel: the gradients, their hull and cone, and the combination with its weights."""
    size = float(jacobian.norm(dim=1).max())
    torch.manual_seed(0)  # PCGrad's order
    weights = solve(group[0], jacobian, losses)
    step = weights @ jacobian
    draw_cone(axes, jacobian, 4 * size)
    axes.add_patch(Polygon(jacobian.numpy(), facecolor="0.9", edgecolor="0.55", linestyle="--", linewidth=0.9))
    for gradient, colour in zip(jacobian, COLOURS, strict=False):
        draw_arrow(axes, gradient, colour, 1.6)
    verdict = "no step"
    if float(step.norm()) > 1e-9 * size:
        far = 4 * size * step / step.norm()
        axes.plot([0, float(far[0])], [0, float(far[1])], ":", color=RESULT, linewidth=0.9)
        draw_arrow(axes, step, RESULT, 2.4)
        hurt = [str(i + 1) for i, slope in enumerate((jacobian @ step).tolist()) if slope < -1e-9 * size**2]
        verdict = f"conflicts with {' and '.join(hurt)}" if hurt else ""
    if verdict == "no step":
        axes.plot(0, 0, "o", color="white", mec=RESULT, mew=2.4, markersize=8, zorder=4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("0.8")
    axes.set_title(title(group), fontsize=9, fontweight="bold", pad=4)
    numbers = "  ".join(f"{value:.2f}" for value in (weights.round(decimals=2) + 0.0).tolist()).translate(MINUS)
    axes.set_xlabel(f"w = {numbers}\n{verdict}", fontsize=8, color=RESULT if verdict else "black", labelpad=3)


def draw_cone(axes: Axes, jacobian: Tensor, radius: float) -> None:
    """The directions d with ⟨gᵢ, d⟩ ≥ 0 for all i, which are those at most 90° from every gradient."""
    # The shortest vector in the hull is one of them, where there are any, so that angles from there are within ±90°.
    x, y = (combine.solve("min_norm", jacobian, kind="jacobian") @ jacobian).tolist()
    if math.hypot(x, y) > 1e-9 * radius:
        middle = math.degrees(math.atan2(y, x))
        angles = [(math.degrees(math.atan2(b, a)) - middle + 180) % 360 - 180 for a, b in jacobian.tolist()]
        edges = (middle + max(angles) - 90, middle + min(angles) + 90)
        axes.add_patch(Wedge((0, 0), radius, *edges, color=CONE, linewidth=0, zorder=0))


def draw_arrow(axes: Axes, tip: Tensor, colour: str, width: float) -> None:
    left, right = axes.get_xlim()
    if float(tip.norm()) < 0.1 * (right - left):  # a head would be longer than that
        axes.plot([0, float(tip[0])], [0, float(tip[1])], color=colour, linewidth=width)
        axes.plot(*tip.tolist(), "o", color=colour, markersize=2 * width)
        return
    style = {"arrowstyle": "-|>,head_width=0.25,head_length=0.45", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (float(tip[0]), float(tip[1])), (0, 0), arrowprops={**style, "color": colour, "linewidth": width})


# ---------------------------------------------------------------- ways on a toy problem

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
REACHED = 1.0  # from the Pareto front, which is 14 long


def toy_losses(theta: Tensor, scale: float) -> Tensor:
    r"""Two losses of a point in the plane: above the axis two steep valleys, below it a front of compromises.

    With :math:`c_\pm = \max(\pm\tanh(y/2), 0)`

    .. math::
        L_1 &= c_+ \bigl(\log \lvert \tfrac12(-x - 7) + \tanh y \rvert + 6\bigr)
            + c_- \bigl(\tfrac1{10} ((x - 7)^2 + 0.1 (y + 8)^2) - 20\bigr) \\
        L_2 &= c_+ \bigl(\log \lvert \tfrac12(-x + 7) - \tanh y \rvert + 6\bigr)
            + c_- \bigl(\tfrac1{10} ((x + 7)^2 + 0.1 (y + 8)^2) - 20\bigr)

    and the absolute values cut off at 5e-6 (Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning*,
    NeurIPS 2021, fig. 1, as in ``toy.py`` of the authors' code). Nash-MTL's and FAMO's authors take 0.1 of the first.

    Both are shifted by 21, before that factor, as FAMO's authors do: it changes no gradient, and methods that look at
    the values need positive ones.

    Args:
        theta: (x, y), shape (..., 2).
        scale: factor of the first loss.

    Returns:
        Shape (..., 2).
    """
    x, y = theta.unbind(-1)
    bend, side = y.tanh(), (y / 2).tanh()
    logs = torch.stack([(-x - 7) / 2 + bend, (-x + 7) / 2 - bend], -1).abs().clamp(5e-6).log() + 6
    bowls = (torch.stack([x - 7, x + 7], -1).square() + 0.1 * (y + 8).square()[..., None]) / 10 - 20
    first, second = (side.clamp(0)[..., None] * logs + (-side).clamp(0)[..., None] * bowls + 21).unbind(-1)
    return torch.stack([scale * first, second], -1)


def pareto_front() -> Tensor:
    """Minimisers of w L₁ + (1 − w) L₂ for w from 0 to 1, shape (1001, 2); the scales of the losses do not matter.

    Below the axis that sum is tanh(−y/2) q; of q's minimum over x, at 14w − 7, 19.6 w(1 − w) − 20 + 0.01 (y + 8)² is
    left.
    """
    w = torch.linspace(0, 1, 1001, dtype=torch.float64)
    y = torch.full_like(w, -8.0)
    for _ in range(50):  # ∂/∂y = 0 as a fixed point
        side = (-y / 2).tanh()
        q = 19.6 * w * (1 - w) - 20 + 0.01 * (y + 8).square()
        y = -8 + q * (1 - side.square()) / (0.04 * side)
    return torch.stack([14 * w - 7, y], -1)


def walk(name: str, start: Sequence[float], options: argparse.Namespace) -> Tensor:
    """The points that the optimizer visits, shape (steps + 1, 2)."""
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = MoKDAdamW(
        [theta],
        lr=options.lr,
        # Adam's own at the papers' 1e-3; at longer steps its second moment remembers as much of the way as there.
        betas=(min(0.9, 1 - 10 * options.lr), 1 - options.lr),
        weight_decay=0,
        losses=2,
        combine=name,
        dominance=combine.own_dominance(name),
        foreach=False,
    )
    points = [theta.detach().clone()]
    for _ in range(options.steps):
        optimizer.zero_grad()
        # FAMO learns from the losses after the step. Without noise those are the next step's, so nobody has to observe.
        optimizer.step(toy_losses(theta, options.scale).unbind())
        points.append(theta.detach().clone())
    return torch.stack(points)


@dataclass(frozen=True)
class End:
    """Where a way ends.

    Attributes:
        start: where it began, (x, y).
        point: the end, (x, y).
        losses: there, without scale and shift.
        distance: to the nearest point of the Pareto front.
    """

    start: Sequence[float]
    point: Sequence[float]
    losses: Sequence[float]
    distance: float

    @property
    def reached(self) -> bool:
        return self.distance < REACHED


def end_of(points: Tensor) -> End:
    last = points[-1]
    distance = (pareto_front() - last).norm(dim=-1).min().item()
    return End(points[0].tolist(), last.tolist(), (toy_losses(last, 1.0) - 21).tolist(), distance)


def draw_ways(ways: dict[Group, list[Tensor]], scale: float) -> Figure:
    """One panel per method: the ways from all starts, over the contours of the summed loss."""
    columns, rows = 6, math.ceil(len(ways) / 6)
    figure = Figure(figsize=(11, 2.15 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in panels[len(ways) :]:
        axes.set_axis_off()
    line = torch.linspace(-11, 11, 221, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    height = toy_losses(torch.stack([x, y], -1), scale).sum(-1)
    for axes, (group, walked) in zip(panels, ways.items(), strict=False):
        axes.contour(x.numpy(), y.numpy(), height.numpy(), 12, colors="0.85", linewidths=0.6, zorder=0)
        axes.plot(*pareto_front().T.numpy(), color="0.6", linewidth=5, solid_capstyle="round", zorder=1)
        for points, colour in zip(walked, COLOURS, strict=True):
            axes.plot(*points.T.numpy(), color=colour, linewidth=1.1)
            axes.plot(*points[0].tolist(), "s", color=colour, markersize=4.5)
            shape = "o" if end_of(points).reached else "X"
            axes.plot(*points[-1].tolist(), shape, color=colour, mec="black", mew=0.8, markersize=6.5, zorder=3)
        axes.set_title(title(group), fontsize=9, fontweight="bold", pad=4)
        axes.set_aspect("equal")
        axes.set_xlim(-11, 11)
        axes.set_ylim(-11, 11)
        axes.set_xticks([-7, 0, 7])
        axes.set_yticks([-8, 0, 8])
        axes.tick_params(labelsize=7.5, length=2)
        axes.spines[:].set_color("0.8")
    handles = [
        marker("s", "start"),
        marker("o", "end, at most 1 off the front", mec="black"),
        marker("X", "end, further away", mec="black"),
        Line2D([], [], color="0.6", linewidth=5, label="Pareto front"),
        Line2D([], [], color="0.8", linewidth=1, label="contours of the sum"),
    ]
    legend(figure, handles, columns=5)
    return figure


def draw_ends(ends: dict[Group, list[End]], scale: float) -> Figure:
    """One line per method: at which compromise its ways end, as the position along the front."""
    figure = Figure(figsize=(9, 0.27 * len(ends) + 1.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for row, found in enumerate(ends.values()):
        for lane, (end, colour) in enumerate(zip(found, COLOURS, strict=True)):
            face = colour if end.reached else "white"
            axes.plot(end.point[0], row + 0.15 * (lane - 2), "o", color=face, mec=colour, mew=1.3, markersize=5)
    axes.axvline(7 * (scale - 1) / (scale + 1), color="0.5", linewidth=0.9, linestyle="--", zorder=0)  # w = s / (1 + s)
    axes.axvline(0, color="0.5", linewidth=0.9, linestyle=":", zorder=0)
    axes.set_yticks(range(len(ends)), [", ".join(group) for group in ends], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(-7.4, 7.4)
    axes.set_xlabel("x of the end: on the front, L₂ is smallest at \N{MINUS SIGN}7 and L₁ at 7")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        *(marker("o", f"from {name_of(start)}", color=colour) for start, colour in zip(STARTS, COLOURS, strict=True)),
        marker("o", "more than 1 off the front", color="white", mec="0.3"),
        Line2D([], [], color="0.5", linewidth=0.9, linestyle="--", label="smallest sum"),
        Line2D([], [], color="0.5", linewidth=0.9, linestyle=":", label="L₁ = L₂ before the factor"),
    ]
    legend(figure, handles, columns=4)
    return figure


def table(ends: dict[Group, list[End]]) -> str:
    """Distance to the front and, in parentheses, both losses, per method and start."""
    rows = [["method", *(f"from {name_of(start)}" for start in STARTS)], ["---"] * (1 + len(STARTS))]
    for group, found in ends.items():
        cells = [f"{end.distance:.2f} ({end.losses[0]:.1f}, {end.losses[1]:.1f})".translate(MINUS) for end in found]
        rows.append([", ".join(group), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------- what both share


def title(group: Group) -> str:
    return textwrap.fill(", ".join(group), 22)


def name_of(start: Sequence[float]) -> str:
    return f"({start[0]:g}, {start[1]:g})".translate(MINUS)


def rounded(value: Any) -> Any:
    """To what a reader wants, and null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if math.isfinite(value) else None


def marker(shape: str, label: str, color: str = "0.5", **options: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker=shape, color=color, markersize=6, label=label, **options)


def legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        handlelength=1.6,
        columnspacing=1.4,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/_static/gallery"), help="folder of what is written")
    parser.add_argument("--steps", type=int, default=700, help="of every way (the papers: 35000 to 100000)")
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate of the ways (the papers: 0.001)")
    parser.add_argument("--scale", type=float, default=0.1, help="factor of the toy problem's first loss (CAGrad: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # systems of this size gain nothing from more
    options.out.mkdir(parents=True, exist_ok=True)
    for configuration in CONFIGURATIONS:
        draw_configuration(configuration).savefig(options.out / f"{configuration.name}.png")

    ways = {group: [walk(group[0], start, options) for start in STARTS] for group in groups(2)}
    ends = {group: [end_of(points) for points in walked] for group, walked in ways.items()}
    draw_ways(ways, options.scale).savefig(options.out / "ways.png")
    draw_ends(ends, options.scale).savefig(options.out / "ends.png")
    record = {
        "settings": {"steps": options.steps, "lr": options.lr, "scale": options.scale},
        "ends": [{"methods": group, "ends": [rounded(asdict(end)) for end in found]} for group, found in ends.items()],
    }
    (options.out / "toy.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(table(ends))


if __name__ == "__main__":
    main()
