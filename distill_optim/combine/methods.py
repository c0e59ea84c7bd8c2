"""The methods that have a name."""

from __future__ import annotations

from distill_optim.combine.aligned_mtl import aligned_mtl
from distill_optim.combine.cagrad import cagrad
from distill_optim.combine.config import config
from distill_optim.combine.dualproj import dualproj
from distill_optim.combine.dwa import DWA
from distill_optim.combine.fairgrad import fairgrad
from distill_optim.combine.famo import FAMO
from distill_optim.combine.fixed import constant, mean, sum
from distill_optim.combine.gls import gls
from distill_optim.combine.gradnorm import GradNorm
from distill_optim.combine.gradvac import GradVac
from distill_optim.combine.imtl_g import imtl_g
from distill_optim.combine.min_norm import min_norm
from distill_optim.combine.nash_mtl import nash_mtl
from distill_optim.combine.pcgrad import pcgrad, pcgrad_average
from distill_optim.combine.random import random
from distill_optim.combine.rules import Method, Stateful
from distill_optim.combine.sdmgrad import sdmgrad
from distill_optim.combine.stch import STCH
from distill_optim.combine.uncertainty import Uncertainty
from distill_optim.combine.upgrad import upgrad

_METHODS: dict[str, Method | Stateful] = {
    # of the Gram matrix
    "min_norm": min_norm,
    "pcgrad": pcgrad,
    "pcgrad_average": pcgrad_average,
    "gradvac": GradVac(),
    "cagrad": cagrad,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "config": config,
    "sdmgrad": sdmgrad,
    # of the losses, and perhaps the gradients' lengths
    "uncertainty": Uncertainty(),
    "gradnorm": GradNorm(),
    "dwa": DWA(),
    "famo": FAMO(),
    "gls": gls,
    "stch": STCH(),
    # of nothing
    "random": random,
    "mean": mean,
    "sum": sum,
    "constant": constant,
}

# Defined on the gradients of the log losses.
_OF_LOGS = (FAMO, STCH)


def names() -> tuple[str, ...]:
    """Names that ``combine=`` takes.

    Example:
        >>> "min_norm" in names()
        True
    """
    return tuple(_METHODS)


def method(combine: str | Method | Stateful) -> Method | Stateful:
    """The rule behind a name; a rule stands for itself.

    Args:
        combine: one of :func:`names`, a function of the Gram matrix and the losses, or a :class:`Stateful` rule.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something that is neither a name nor callable.

    Example:
        >>> method("gradnorm")
        GradNorm(alpha=1.5, lr=0.025)
    """
    if isinstance(combine, str):
        if combine not in _METHODS:
            raise ValueError(f"combine={combine!r}: expected one of {', '.join(map(repr, names()))}, or a function")
        return _METHODS[combine]
    if not callable(combine):
        raise TypeError(f"combine={combine!r}: expected a name or a function (gram, losses) -> weights")
    return combine


def own_dominance(combine: str | Method | Stateful) -> str:
    """The dominance handling under which a method is the published one: ``"log"`` or ``"none"``.

    Example:
        >>> own_dominance("famo"), own_dominance("pcgrad")
        ('log', 'none')
    """
    rule = method(combine)
    return "log" if rule is gls or isinstance(rule, _OF_LOGS) else "none"
