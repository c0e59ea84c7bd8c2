"""Pictures of the walk from losses to a step, from numbers that the package computes.

    python -m benchmarks maths

Writes the pictures of ``docs/maths.md``: a few gradients in the plane, and a parameter that is pushed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from torch import Tensor

from benchmarks.gallery import COLOURS, RESULT, draw_arrow, draw_cone
from distill_optim import DOTSGD, combine

WIDTH = 3.75  # inches: 360 px, a phone's width, so that there the letters are as large as here
TASK, DISTILL = COLOURS[:2]


def polar(degrees: Sequence[float], lengths: Sequence[float]) -> Tensor:
    """Gradients in the plane, shape (K, 2)."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1) * torch.tensor(lengths, dtype=torch.float64)[:, None]


# ---------------------------------------------------------------- the numbers

CONFLICT = polar((150, 20), (1.2, 0.5))
DOMINANCE = polar((85, 20), (0.35, 1.5))
HULL_OF_TWO = polar((125, 15), (1.0, 1.3))
HULL_OF_THREE = polar((130, 75, 0), (1.1, 1.5, 1.2))

# The gradients of two losses with respect to a tensor z, and ∂z/∂θ, which stretches one direction and crushes another.
AT_Z = polar((120, 0), (1.0, 1.0))
JACOBIAN = torch.tensor([[1.3, 0.0], [0.35, 0.46]], dtype=torch.float64)

MOMENTUM, DELTA = 0.9, 0.075
PUSHED, REST = 200, 120  # steps with a gradient of 1, and then with none


def shortest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, shape (K,), of the shortest vector in the hull of the rows, and the vector."""
    weights = combine.solve("min_norm", rows, kind="jacobian")
    return weights, weights @ rows


def angle(a: Tensor, b: Tensor) -> float:
    """In degrees."""
    return math.degrees(torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1)).item())


def angles_by_unit(method: str, dominance: str, factors: Tensor) -> Tensor:
    """How far the step turns away from the first gradient as the second loss is measured in another unit.

    Args:
        method, dominance: as of :func:`distill_optim.combine.solve`.
        factors: of the second loss, shape (N,).

    Returns:
        Degrees, shape (N,).
    """
    found = []
    for factor in factors.tolist():
        losses = torch.tensor([1.0, factor], dtype=torch.float64)
        rows = HULL_OF_TWO * losses[:, None]
        weights = combine.solve(method, rows, losses, kind="jacobian", dominance=dominance)
        found.append(angle(weights @ rows, rows[0]))
    return torch.tensor(found)


def speeds(pushes: Sequence[float], which: int, delta: float = DELTA, gain: str = "paper") -> Tensor:
    """How far a parameter moves in every step of DOTSGD with lr = 1 while one of two losses pushes it.

    Args:
        pushes: the gradient of every step.
        which: the loss that pushes, 0 or 1.
        delta, gain: of :class:`distill_optim.DOTSGD`.

    Returns:
        Shape (steps,): the momentum buffer times its gain.
    """
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DOTSGD([p], lr=1.0, momentum=MOMENTUM, delta=delta, gain=gain)
    moved = []
    for push in pushes:
        before = p.item()
        losses = [0 * p.sum(), 0 * p.sum()]
        losses[which] = push * p.sum()
        optimizer.zero_grad()
        optimizer.step(losses)
        moved.append(before - p.item())
    return torch.tensor(moved)


# ---------------------------------------------------------------- the pictures


def draw_conflict() -> Figure:
    figure, panels = planes([torch.cat([rows, rows.sum(0, keepdim=True)]) for rows in (CONFLICT, DOMINANCE)], lines=2)
    for axes, rows, name in zip(panels, (CONFLICT, DOMINANCE), ("conflict", "dominance"), strict=True):
        total = rows.sum(0)
        draw_cone(axes, rows, 9.0)
        draw_gradients(axes, rows)
        draw_arrow(axes, total, RESULT, 2.4)
        label(axes, total, "sum", RESULT)
        axes.set_title(name)
        axes.set_xlabel("\n".join(f"sum: {angle(total, g):.0f}° from g{i + 1}" for i, g in enumerate(rows)))
    return figure


def draw_hull() -> Figure:
    figure, panels = planes([HULL_OF_TWO, HULL_OF_THREE], lines=1)
    for axes, rows in zip(panels, (HULL_OF_TWO, HULL_OF_THREE), strict=True):
        weights, point = shortest(rows)
        axes.add_patch(Polygon(rows.numpy(), facecolor="0.9", edgecolor="0.45", linewidth=1.2))
        axes.add_patch(Circle((0, 0), float(point.norm()), fill=False, linestyle=":", edgecolor="0.5"))
        along = 9 * torch.stack([-point[1], point[0]]) / point.norm()
        axes.plot(*torch.stack([point - along, point + along]).T.numpy(), "--", color=RESULT, linewidth=0.9)
        draw_gradients(axes, rows)
        draw_arrow(axes, point, RESULT, 2.4)
        label(axes, 0.5 * point, "g*", RESULT, beside=True)
        numbers = ", ".join(f"{w:.2f}" for w in (weights + 0.0).tolist())
        axes.set_xlabel(f"π = {numbers}")
    return figure


def draw_units() -> Figure:
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    factors = torch.logspace(-2, 2, 81, dtype=torch.float64)
    lines = [
        ("sum", "none", "sum", "0.4", (20, 4)),
        ("min_norm", "none", "raw", RESULT, (20, 5)),
        ("min_norm", "norm", "norm", COLOURS[2], (0.011, 4)),
        ("min_norm", "log", "log", TASK, (0.011, -13)),
    ]
    for method, dominance, name, colour, (where, above) in lines:
        found = angles_by_unit(method, dominance, factors)
        axes.plot(factors, found, color=colour, linewidth=2)
        nearest = int((factors.log() - math.log(where)).abs().argmin())
        axes.annotate(name, (where, float(found[nearest])), (0, above), textcoords="offset points", color=colour)
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    apart = angle(*HULL_OF_TWO)
    axes.set_yticks([0, apart / 2, apart], ["along g1", "halfway", "along g2"])
    axes.set_xlabel("factor of the second loss")
    axes.set_ylabel("direction of the step")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_momentum() -> Figure:
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    impulse, pushed = figure.subplots(2, 1, height_ratios=(2, 3))
    kick = [1.0] + [0.0] * 59
    push = [1.0] * PUSHED + [0.0] * REST
    lines = [
        ("task, μ − Δ", 0, DELTA, TASK, -13),
        ("one momentum, μ", 0, 0.0, "0.4", 4),
        ("distillation, μ + Δ", 1, DELTA, DISTILL, 2),
    ]
    for name, which, delta, colour, below in lines:
        impulse.plot(speeds(kick, which, delta), color=colour, linewidth=2, label=name)
        pushed.plot(speeds(push, which, delta), color=colour, linewidth=2)
        if delta:
            pushed.plot(speeds(push, which, delta, "matched"), color=colour, linewidth=1.2, linestyle="--")
        limit = 1 / (1 - MOMENTUM - (delta if which else -delta))
        pushed.annotate(f"{limit:.3g}", (130, limit), (0, below), textcoords="offset points", color=colour)
    impulse.set_title("one gradient of 1, at step 0")
    impulse.legend(frameon=False)
    pushed.set_title(f"a gradient of 1 for {PUSHED} steps, then none")
    pushed.annotate("dashed: matched gain", (42, 17), color="0.25")
    for axes in (impulse, pushed):
        axes.set_ylabel("movement per step")
        axes.spines[["top", "right"]].set_visible(False)
    pushed.set_xlabel("step")
    return figure


def draw_through() -> Figure:
    at_theta = AT_Z @ JACOBIAN
    weights, point = shortest(AT_Z)
    _, exact = shortest(at_theta)
    figure, (left, right) = planes([AT_Z, at_theta], lines=2)
    draw_cone(right, at_theta, 9.0)
    for axes, rows in ((left, AT_Z), (right, at_theta)):
        axes.plot(*rows.T.numpy(), color="0.45", linewidth=1.2)
        draw_gradients(axes, rows, "h" if rows is AT_Z else "g")
    draw_arrow(left, point, RESULT, 2.4)
    draw_arrow(right, weights @ at_theta, RESULT, 2.4)
    draw_arrow(right, exact, COLOURS[2], 2.4)
    left.set_title("at z")
    right.set_title("at θ")
    left.set_xlabel("red: the shortest here")
    right.set_xlabel("red: the same weights\ngreen: the shortest here")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "conflict": draw_conflict,
    "hull": draw_hull,
    "units": draw_units,
    "momentum": draw_momentum,
    "through": draw_through,
}


def planes(shown: Sequence[Tensor], lines: int) -> tuple[Figure, Sequence[Axes]]:
    """Two panels to one scale, with 0 and the tips of these arrows in view, and room for lines below."""
    corners = [torch.cat([tips, tips.new_zeros(1, 2)]) for tips in shown]
    middles = [(points.amin(0) + points.amax(0)) / 2 for points in corners]
    reach = torch.stack([(points.amax(0) - points.amin(0)) / 2 for points in corners]).amax(0)
    reach = reach + 0.3 * reach.amax()  # for the names beyond the tips
    height = 0.47 * WIDTH * float(reach[1] / reach[0]) + 0.45 + 0.17 * lines
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, middle in zip(panels, middles, strict=True):
        (left, low), (right, high) = (middle - reach).tolist(), (middle + reach).tolist()
        axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
    return figure, panels


def draw_gradients(axes: Axes, rows: Tensor, letter: str = "g") -> None:
    for i, (row, colour) in enumerate(zip(rows, COLOURS, strict=False)):
        draw_arrow(axes, row, colour, 1.8)
        label(axes, row, f"{letter}{i + 1}", colour)


def label(axes: Axes, tip: Tensor, text: str, colour: str, beside: bool = False) -> None:
    """Beyond the tip of an arrow, or beside it."""
    x, y = (tip / tip.norm()).tolist()
    x, y = (-y, x) if beside else (x, y)
    axes.annotate(
        text,
        (float(tip[0]), float(tip[1])),
        (8 * x, 8 * y),
        textcoords="offset points",
        color=colour,
        ha="center",
        va="center",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/_static/maths"), help="folder of what is written")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    # Letters as paths, and the same names in every run: a picture that is drawn anew is the same file.
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 10, "svg.hashsalt": "maths"}):
        for name, draw in PICTURES.items():
            draw().savefig(options.out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
