"""What goes around an optimizer in distillation: losses, adaptors, projectors, and features by layer name.

A loss is a function of the student's side and the teacher's, ``loss(student, teacher)``. It returns a scalar, or, where
the paper adds up parts, a named tuple of them: parts are losses of their own here, and go straight into ``step``:

    ``optimizer.step([cross_entropy, *dkd(student_logits, teacher_logits, labels)])``

All of them compute in float32 or wider, whatever comes in and under autocast too, and take the teacher as a constant.
What learns beside the student is a module: :class:`SubspaceProjector`, :class:`TaskAdaptors`.
"""

from distill_optim.distill.adaptors import TaskAdaptors
from distill_optim.distill.annealing import anneal
from distill_optim.distill.attention import attention_transfer
from distill_optim.distill.dist import DIST, dist
from distill_optim.distill.dkd import DKD, dkd
from distill_optim.distill.features import Features, features
from distill_optim.distill.hint import hint
from distill_optim.distill.jsd import generalized_jsd
from distill_optim.distill.kd import KDLoss, kd
from distill_optim.distill.projector import SubspaceProjector
from distill_optim.distill.rkd import RKD, rkd
from distill_optim.distill.standardize import standardize

__all__ = [
    "DIST",
    "DKD",
    "RKD",
    "Features",
    "KDLoss",
    "SubspaceProjector",
    "TaskAdaptors",
    "anneal",
    "attention_transfer",
    "dist",
    "dkd",
    "features",
    "generalized_jsd",
    "hint",
    "kd",
    "rkd",
    "standardize",
]
