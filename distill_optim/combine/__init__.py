"""From the Gram matrix of the per-loss gradients and the loss values to one weight per loss.

Pure functions: no optimizer, no hidden state, no read of a tensor on the host. The walk is

    Gram matrix, losses → dominance handling → a method such as :func:`min_norm` → :func:`weights`.

A method is a function of the Gram matrix after dominance handling, shape (K, K), and the loss values, shape (K,),
both float64 on one device; it returns K weights. One that remembers, such as :class:`FAMO`, is a :class:`Stateful`
rule: state in, state out. Those that have a name are listed by :func:`names`; options of a function are given by
``functools.partial(cagrad, c=0.4)``, of a rule by its constructor, ``FAMO(lr=0.01)``.
"""

from distill_optim.combine.aligned_mtl import aligned_mtl
from distill_optim.combine.cagrad import cagrad
from distill_optim.combine.config import config
from distill_optim.combine.dominance import DOMINANCE, EMANorm, dominance_rule, dominance_scales
from distill_optim.combine.dualproj import dualproj
from distill_optim.combine.dwa import DWA
from distill_optim.combine.fairgrad import fairgrad
from distill_optim.combine.famo import FAMO
from distill_optim.combine.fixed import constant, mean, sum
from distill_optim.combine.gls import gls
from distill_optim.combine.gradnorm import GradNorm
from distill_optim.combine.gradvac import GradVac
from distill_optim.combine.gram import gram
from distill_optim.combine.imtl_g import imtl_g
from distill_optim.combine.methods import method, names, own_dominance
from distill_optim.combine.min_norm import min_norm
from distill_optim.combine.nash_mtl import nash_mtl
from distill_optim.combine.pcgrad import pcgrad, pcgrad_average
from distill_optim.combine.qp import orthant_qp, simplex_qp
from distill_optim.combine.random import random
from distill_optim.combine.rules import Method, State, Stateful, losses_only, uses_gram
from distill_optim.combine.sdmgrad import sdmgrad
from distill_optim.combine.stch import STCH
from distill_optim.combine.uncertainty import Uncertainty
from distill_optim.combine.upgrad import upgrad
from distill_optim.combine.weights import (
    advance,
    initial,
    looks_back,
    merge,
    needs_gram,
    observe,
    select,
    solve,
    weights,
)

__all__ = [
    "DOMINANCE",
    "DWA",
    "FAMO",
    "STCH",
    "EMANorm",
    "GradNorm",
    "GradVac",
    "Method",
    "State",
    "Stateful",
    "Uncertainty",
    "advance",
    "aligned_mtl",
    "cagrad",
    "config",
    "constant",
    "dominance_rule",
    "dominance_scales",
    "dualproj",
    "fairgrad",
    "gls",
    "gram",
    "imtl_g",
    "initial",
    "looks_back",
    "losses_only",
    "mean",
    "merge",
    "method",
    "min_norm",
    "names",
    "nash_mtl",
    "needs_gram",
    "observe",
    "orthant_qp",
    "own_dominance",
    "pcgrad",
    "pcgrad_average",
    "random",
    "sdmgrad",
    "select",
    "simplex_qp",
    "solve",
    "sum",
    "upgrad",
    "uses_gram",
    "weights",
]
