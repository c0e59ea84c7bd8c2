"""From losses to one gradient per loss."""

from distill_optim.gradients.backward import (
    backward_each,
    backward_onto,
    backward_weighted,
    gradients_beside,
    refuse_graphed,
    refuse_unreached,
    walked_back,
)
from distill_optim.gradients.collected import Collected, Column, cleared, lengths_of
from distill_optim.gradients.graph import hides_leaves, leaves_above, reached_alone
from distill_optim.gradients.losses import Losses, by_index, check_losses, detached, is_losses, loss_names, values
from distill_optim.gradients.processes import Replicas, Sharded

__all__ = [
    "Collected",
    "Column",
    "Losses",
    "Replicas",
    "Sharded",
    "backward_each",
    "backward_onto",
    "backward_weighted",
    "by_index",
    "check_losses",
    "cleared",
    "detached",
    "gradients_beside",
    "hides_leaves",
    "is_losses",
    "leaves_above",
    "lengths_of",
    "loss_names",
    "reached_alone",
    "refuse_graphed",
    "refuse_unreached",
    "values",
    "walked_back",
]
