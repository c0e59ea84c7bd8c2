"""Teacher annealing: from the teacher's answers to the labels."""

from __future__ import annotations


def anneal(step: int, total: int) -> float:
    r"""The share of the labels in the target, :math:`\lambda = \min(\mathrm{step}/\mathrm{total}, 1)`.

    Clark et al., *BAM! Born-again multi-task networks for natural language understanding* (ACL 2019): the target of a
    task is :math:`\lambda y + (1 - \lambda) p^t`, the labels mixed with the outputs of the task's own teacher.
    Cross entropy is linear in its target, so up to a constant the loss is

    .. math:: L = \lambda\,\mathrm{CE}(y, p^s) + (1 - \lambda)\,\mathrm{KL}(p^t \,\Vert\, p^s)

    with :func:`~distill_optim.distill.kd` at temperature 1.

    Args:
        step: steps taken so far.
        total: steps of the whole training.

    Returns:
        A number from 0, all teacher, to 1, all labels.

    Raises:
        ValueError: for a negative step, or a total that is not positive.

    Example:
        >>> [anneal(step, 4) for step in (0, 1, 4, 5)]
        [0.0, 0.25, 1.0, 1.0]
    """
    if step < 0 or total < 1:
        raise ValueError(f"step={step}, total={total}: expected a step of at least 0, and a total of at least 1")
    return min(step / total, 1.0)
