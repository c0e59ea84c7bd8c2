"""What was recorded, in words: who is against whom, who drowns out whom, and what to try."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill_optim.monitor.history import DOMINANT, History

# How advice begins.
_TRY = "→ "

# Fewer records say little about a rate.
_FEW = 20
# From these shares of the records on a finding is worth a word of advice.
_OFTEN = 0.25
_HARMFUL = 0.05
_DOMINATED = 0.5
# A loss of which the step takes less than this is as good as left out.
_IGNORED = 0.05
# A mean cosine nearer to zero than this is that of gradients at right angles, whose signs are noise.
_ORTHOGONAL = 0.05
# So many pairs of losses are spelt out.
_PAIRS = 5


def diagnose(history: History) -> str:
    """Advice in a few lines: what was found, with the numbers behind it, and what to try.

    Args:
        history: what was recorded.

    Returns:
        Lines of text; those with advice begin with an arrow.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> with distill_optim.monitor.Monitor(torch.optim.SGD([w], lr=0.1)) as monitor:
        ...     monitor.observe([w[0] + w[1], -2 * w[0] + w[1]])
        >>> print(monitor.diagnose())  # doctest: +ELLIPSIS
        1 record of SGD, of step 0. Losses: task, distill.
        Fewer than 20 records: a first impression.
        task and distill conflict (cosine < 0) in 100 % of the records; mean cosine -0.32.
        ...
    """
    return "\n".join(_lines(history))


def _lines(history: History) -> Iterator[str]:
    names = ", ".join(history.names)
    if not history.steps:
        yield (
            "Nothing was recorded yet. Our optimizers are recorded by themselves in steps over several losses; around "
            "any other call monitor.observe(losses) before .backward()."
        )
        return
    span = f"of step {history.steps[0]}" if len(history) == 1 else f"of steps {history.steps[0]} to {history.steps[-1]}"
    yield f"{len(history)} record{'s' * (len(history) > 1)} of {history.optimizer}, {span}. Losses: {names}."
    if len(history.names) == 1:
        yield "One loss has nothing to conflict with."
        return
    if not history.norms[:, 0].isfinite().any():
        yield "No two gradients were seen: no parameter is shared, or the steps walk back a weighted sum."
        yield f"{_TRY}For cosines take a combine= that needs gradients, or a monitor around the torch optimizer."
        return
    if len(history) < _FEW:
        yield f"Fewer than {_FEW} records: a first impression."
    lost = history.weights.isfinite() & ~history.norms[:, 0].isfinite()
    if lost.any():
        yield f"{int(lost.any(-1).sum())} of the records have a gradient that is not finite; they are left out below."
        yield f"{_TRY}Lower the learning rate, or clip."
    found = [*_conflict(history), *_dominance(history), *_steps(history)]
    yield from found
    if not any(line.startswith(_TRY) for line in found):
        yield f"{_TRY}Nothing to mend: neither conflict nor dominance of consequence."


def _conflict(history: History) -> Iterator[str]:
    names, rates = history.names, history.conflicts()
    ordered = sorted(history.pairs, key=lambda pair: rates[0][pair].nan_to_num(-1).item(), reverse=True)
    often = [pair for pair in ordered if rates[0][pair] >= _OFTEN]
    means = [history.cosines[:, 0, i, j].nanmean().item() for i, j in often]
    for i, j in often[:_PAIRS] or ordered[:1]:
        yield (
            f"{names[i]} and {names[j]} conflict (cosine < 0) in {_percent(rates[0, i, j])} of the records; "
            f"mean cosine {history.cosines[:, 0, i, j].nanmean():.2f}.{_places(history, rates[:, i, j])}"
        )
    if len(often) > _PAIRS:
        yield f"So do {len(often) - _PAIRS} more pairs, in at least {_percent(_OFTEN)}."
    harmed = {name: share for name, share in zip(names, history.harm(), strict=True) if share >= _HARMFUL}
    adaptive = history.optimizer.startswith("MoKD")
    total = "weighted sum" if adaptive else "sum"
    for name, share in harmed.items():
        yield f"The {total} of the gradients makes {name} worse, to first order, in {_percent(share)} of the records."
    if harmed and not adaptive:
        yield (
            f"{_TRY}Try MoKD{_base(history)}: its default combination makes no loss worse, to first order. Compare it "
            "with the sum at a tuned fixed weight, which is a strong competitor."
        )
    elif harmed:
        yield f'{_TRY}Take every=1, no through=, and a combine= without compromise, such as "min_norm" or "upgrad".'
    elif often and not adaptive and min(means) > -_ORTHOGONAL:
        yield "On average they are not against each other: the sign is mostly noise."
    elif often:
        yield f"Their {total} makes none of them worse all the same."


def _dominance(history: History) -> Iterator[str]:
    rates, adaptive = history.dominance(), history.optimizer.startswith("MoKD")
    for i, name in enumerate(history.names):
        if not rates[0, i] >= _DOMINATED:
            continue
        others = history.norms[:, 0, [j for j in range(len(history.names)) if j != i]].nan_to_num(0).amax(-1)
        ratio = torch.where(others > 0, history.norms[:, 0, i] / others, torch.nan).nanquantile(0.5).item()
        yield (
            f"{name} dominates: its gradient is more than {DOMINANT:g} times as long as every other in "
            f"{_percent(rates[0, i])} of the records, median {ratio:.3g} times.{_places(history, rates[:, i])}"
        )
        if not adaptive:
            yield (
                f"{_TRY}Multiply {name} by some {1 / ratio:.2g}, or tune that factor; or try MoKD{_base(history)}, "
                'which weighs anew in every step (dominance="log", or "norm" for equal lengths).'
            )


def _steps(history: History) -> Iterator[str]:
    """What the optimizer makes of it, where that is something else than the sum."""
    middle = history.weights.nanquantile(0.5, 0).tolist()
    if history.optimizer.startswith("MoKD"):
        weights = ", ".join(f"{name} {w:.2g}" for name, w in zip(history.names, middle, strict=True))
        yield f"Median weights: {weights}."
        for name, w in zip(history.names, middle, strict=True):
            if abs(w) < _IGNORED:
                yield (
                    f"{_TRY}{name} is hardly learnt from: min-norm follows short gradients. Look at its scale, or try "
                    'another dominance= or combine="upgrad".'
                )
    elif history.optimizer.startswith("DOT"):
        ratios, raw = ((t[:, 0] / t[:, 0, :1]).nanquantile(0.5, 0).tolist() for t in (history.updates, history.norms))
        for name, ratio, before in list(zip(history.names, ratios, raw, strict=True))[1:]:
            yield (
                f"Momentum goes {ratio:.3g} times as far along {name} as along {history.names[0]} (median); their "
                f"gradients are {before:.3g} to 1."
            )
            if history.optimizer == "DOTSGD" and ratio > DOMINANT * before:
                yield f'{_TRY}Where that weight is not wanted, gain="matched" takes it out and keeps the memory.'


def _base(history: History) -> str:
    return "AdamW" if "Adam" in history.optimizer else "SGD"


def _places(history: History, rates: Tensor) -> str:
    """Where in the model the rate is highest and lowest."""
    known = [(rate, unit) for rate, unit in zip(rates[1:].tolist(), history.units[1:], strict=True) if rate == rate]
    if len(known) < 2:
        return ""
    (low, least), (high, most) = min(known), max(known)
    return f" Most in {most} ({_percent(high)}), least in {least} ({_percent(low)})."


def _percent(share: float | Tensor) -> str:
    return f"{100 * float(share):.0f} %"
