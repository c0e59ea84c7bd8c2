"""The pictures of docs/maths.md: that they are drawn, and that what they show is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import maths
from benchmarks.__main__ import main
from distill_optim import combine

DOCS = Path(__file__).parent.parent / "docs"


def test_every_picture_is_drawn_and_on_the_page(tmp_path: Path) -> None:
    main(["maths", "--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"\{figure\} _static/maths/(\S+)", (DOCS / "maths.md").read_text("utf-8")))
    assert drawn == shown == {path.name for path in (DOCS / "_static" / "maths").iterdir()}
    for path in tmp_path.iterdir():
        text = path.read_text("utf-8")
        assert text.rstrip().endswith("</svg>")
        # A phone's width, in points of 1/72 inch, so that letters of 10 points stay letters of 10 points there.
        (width,) = re.findall(r'<svg[^>]* width="([\d.]+)pt"', text)
        assert float(width) <= 270


def test_the_sum_conflicts_with_one_and_leaves_the_other_out() -> None:
    assert maths.CONFLICT[0] @ maths.CONFLICT[1] < 0
    assert maths.CONFLICT[1] @ maths.CONFLICT.sum(0) < 0
    assert maths.DOMINANCE[0] @ maths.DOMINANCE[1] > 0
    near, far = (maths.angle(maths.DOMINANCE.sum(0), g) for g in (maths.DOMINANCE[1], maths.DOMINANCE[0]))
    assert 4 * near < far


@pytest.mark.parametrize("rows", [maths.HULL_OF_TWO, maths.HULL_OF_THREE], ids=["two", "three"])
def test_the_shortest_vector_has_the_hull_beyond_it(rows: torch.Tensor) -> None:
    """Karush, Kuhn and Tucker: ⟨gᵢ, g*⟩ ≥ ‖g*‖², with equality where the weight is not 0."""
    weights, point = maths.shortest(rows)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum().item(), 1.0)
    beyond = rows @ point - point.square().sum()
    assert beyond.min() > -1e-12
    assert (weights * beyond).abs().max() < 1e-12
    assert point.norm() < rows.norm(dim=1).min()


def test_the_hull_of_three_leaves_one_out() -> None:
    weights, _ = maths.shortest(maths.HULL_OF_THREE)
    assert (weights > 1e-9).tolist() == [True, False, True]


def test_logarithms_and_unit_lengths_know_no_units() -> None:
    factors = torch.tensor([0.01, 1.0, 100.0])
    for dominance in ("log", "norm"):
        found = maths.angles_by_unit("min_norm", dominance, factors)
        torch.testing.assert_close(found, found[:1].expand(3))
    along, apart = maths.angles_by_unit("sum", "none", factors), maths.angle(*maths.HULL_OF_TWO)
    assert along[0] < 1
    assert along[2] > apart - 1
    raw = maths.angles_by_unit("min_norm", "none", factors)
    assert raw[0] > raw[1] > raw[2]  # to the shorter one


def test_a_buffer_is_its_impulse_response() -> None:
    kick = [1.0] + [0.0] * 9
    for which, momentum in ((0, maths.MOMENTUM - maths.DELTA), (1, maths.MOMENTUM + maths.DELTA)):
        expected = momentum ** torch.arange(10)
        torch.testing.assert_close(maths.speeds(kick, which), expected)


def test_the_long_run_gains_are_those_in_the_picture() -> None:
    push = [1.0] * 1000
    ends = [maths.speeds(push, which)[-1].item() for which in (0, 1)]
    assert ends == pytest.approx([1 / 0.175, 1 / 0.025])
    assert [maths.speeds(push, which, gain="matched")[-1].item() for which in (0, 1)] == pytest.approx([10, 10])
    assert maths.speeds(push, 0, delta=0.0)[-1].item() == pytest.approx(10)


def test_through_is_the_shortest_of_a_bound() -> None:
    weights, at_z = maths.shortest(maths.AT_Z)
    at_theta = maths.AT_Z @ maths.JACOBIAN
    exact, cheap = maths.shortest(at_theta)[1], weights @ at_theta
    assert exact.norm() < cheap.norm() <= torch.linalg.matrix_norm(maths.JACOBIAN, 2) * at_z.norm()
    assert (maths.AT_Z @ at_z).min() > 0
    assert (at_theta @ exact).min() > 0
    assert (at_theta @ cheap).min() < 0  # it conflicts with the first loss, as the page says
    orthogonal = torch.linalg.qr(maths.JACOBIAN).Q
    torch.testing.assert_close(combine.solve("min_norm", maths.AT_Z @ orthogonal, kind="jacobian"), weights)
