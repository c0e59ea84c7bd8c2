"""Knowledge distillation: the Kullback-Leibler divergence of softened outputs."""

from __future__ import annotations

from torch import Tensor, nn

from distill_optim.distill.inputs import expect_positive, expect_same, pair

# Far below any logarithm that counts, far above the end of float32.
_LOWEST = -1e30


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Log softmax over the last dimension. A class that is ruled out (−inf) gets probability 0 and a finite logarithm.

    So 0 · log 0 is 0 in the divergences, and padded vocabularies and teachers of which only the best k logits were
    kept need no case of their own.
    """
    return (logits / temperature).clamp_min(_LOWEST).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Divergence :math:`\mathrm{KL}(p \,\Vert\, q) = \sum_c p_c (\log p_c - \log q_c)` over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Divergence of the student's softened outputs from the teacher's.

    .. math:: \mathrm{KD} = \frac{T^2}{N} \sum_n \mathrm{KL}\bigl(\sigma(z^t_n / T) \,\Vert\, \sigma(z^s_n / T)\bigr)

    Hinton, Vinyals & Dean, *Distilling the knowledge in a neural network* (2015). :math:`T^2` keeps the gradient's size
    about the same at every temperature. For logits of shape (N, C) it is ``T**2 * F.kl_div(..., "batchmean")``.
    Adding a constant to all logits of an example, the student's or the teacher's, changes nothing.

    Args:
        student: logits, shape (..., C): the classes come last, everything before counts the N examples. For maps of
            shape (N, C, H, W) give ``logits.movedim(1, -1)``.
        teacher: logits of the same shape; taken as a constant.
        temperature: T, by which the logits are divided.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: for shapes that differ, what is no floating-point tensor, or a temperature that is not
            positive.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> kd(teacher + 3, teacher)
        tensor(0.)
        >>> kd(torch.zeros(2, 2), teacher, temperature=1.0)
        tensor(0.2194)
    """
    expect_positive(temperature)
    student, teacher = pair(student, teacher)
    expect_same(student.shape, teacher.shape, "both need the same examples and the same classes")
    log_q, log_p = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    return temperature**2 * kl(log_p, log_q).mean()


class KDLoss(nn.Module):
    """:func:`kd` as a criterion, for code that makes its losses once and calls them as modules.

    Args:
        temperature: T, by which the logits are divided.

    Raises:
        ValueError: for a temperature that is not positive.

    Example:
        >>> criterion = KDLoss(temperature=2.0)
        >>> criterion(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))
        tensor(0.4438)
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        expect_positive(temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd(student, teacher, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
