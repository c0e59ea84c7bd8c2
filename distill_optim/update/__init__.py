"""From gradients to parameters: pure functions on lists of tensors, updated in place."""

from distill_optim.update.dot_adamw import bias_corrections, dot_adamw
from distill_optim.update.dot_sgd import dot_sgd
from distill_optim.update.folded_sgd import decay, descend
from distill_optim.update.multi_tensor import has_kernels
from distill_optim.update.triton_weighted import weighted_adamw, weighted_sgd
from distill_optim.update.weighted_sum import weighted_sum

__all__ = [
    "bias_corrections",
    "decay",
    "descend",
    "dot_adamw",
    "dot_sgd",
    "has_kernels",
    "weighted_adamw",
    "weighted_sgd",
    "weighted_sum",
]
