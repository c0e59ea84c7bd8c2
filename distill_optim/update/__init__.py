"""From gradients to parameters: pure functions on lists of tensors, updated in place."""

from distill_optim.update.dot_adamw import dot_adamw
from distill_optim.update.dot_sgd import dot_sgd
from distill_optim.update.folded_sgd import decay, descend
from distill_optim.update.weighted_sum import weighted_sum

__all__ = ["decay", "descend", "dot_adamw", "dot_sgd", "weighted_sum"]
