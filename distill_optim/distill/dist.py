"""DIST: correlations between and within the classes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distill_optim.distill.inputs import centred_unit, expect_positive, expect_same, pair


class DIST(NamedTuple):
    """The two parts of :func:`dist`, scalars: over the classes of an example, and over the examples of a class."""

    inter: Tensor
    intra: Tensor


def pearson_distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    r"""Mean over the rest of :math:`1 - \rho(a, b)`, with Pearson's correlation along one dimension.

    Between 0 and 2. Scaling a or b by a positive number changes nothing, nor does shifting them.
    """
    return 1 - (centred_unit(a, dim) * centred_unit(b, dim)).sum(dim).mean()


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> DIST:
    r"""Relations between the predictions instead of the predictions: what is ranked how, over classes and examples.

    With :math:`Y = \sigma(Z / T)`, of shape (N, C), and Pearson's correlation :math:`\rho`,

    .. math:: \mathrm{inter} = \frac{T^2}{N} \sum_n 1 - \rho(Y^s_{n,:}, Y^t_{n,:}), \qquad
        \mathrm{intra} = \frac{T^2}{C} \sum_c 1 - \rho(Y^s_{:,c}, Y^t_{:,c})

    Huang et al., *Knowledge distillation from a stronger teacher* (NeurIPS 2022), eq. 8 and 9, with the authors' code's
    :math:`T^2`. A strong teacher's probabilities are further from what a student can reach than its ranking is. The
    published loss is a weighted sum of the two; here they come apart.

    A row that is constant correlates with nothing: its distance is 1, without a gradient. The authors add 10⁻⁸ to the
    norms instead, under which the columns of many small probabilities vanish.

    Args:
        student: logits of shape (N, C).
        teacher: logits of the same shape; taken as a constant.
        temperature: T, by which the logits are divided.

    Returns:
        A named tuple of two scalars, in float32 or wider, for ``optimizer.step([ce, *dist(...)])``.

    Raises:
        TypeError, ValueError: for shapes that do not fit, what is no floating-point tensor, or a temperature that is
            not positive.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 5.0]])
        >>> inter, intra = dist(teacher + 3, teacher)
        >>> inter.abs() < 1e-6, intra.abs() < 1e-6
        (tensor(True), tensor(True))
    """
    expect_positive(temperature)
    student, teacher = pair(student, teacher)
    expect_same(student.shape, teacher.shape, "both need the same examples and the same classes")
    if student.ndim != 2:
        raise ValueError(f"student: expected logits of shape (N, C), got {tuple(student.shape)}; flatten what counts N")
    y_s, y_t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    square = temperature**2
    return DIST(square * pearson_distance(y_s, y_t, 1), square * pearson_distance(y_s, y_t, 0))
