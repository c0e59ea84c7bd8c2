"""Features that meet in one space: an orthonormal map between the student's and the teacher's width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_optim.distill.inputs import channels_last, expect_same, full_precision, pair


def orthonormal(x: Tensor) -> Tensor:
    r"""The first k columns of a rotation, from any matrix of shape (n, k), n ≥ k.

    The Cayley transform :math:`(I - \frac12 A)^{-1} (I + \frac12 A)` of the skew-symmetric

    .. math:: A = \begin{pmatrix} B & -C^\top \\ C & 0 \end{pmatrix}, \qquad B = X_1 - X_1^\top, \quad C = X_2

    with the square upper part :math:`X_1` and the lower part :math:`X_2`. Its first k columns need one inverse, of a
    matrix of size k, whose symmetric part is at least I, so that there always is one:

    .. math:: Q = \begin{pmatrix} 2 S^{-1} - I \\ C S^{-1} \end{pmatrix}, \qquad S = I - \tfrac12 B + \tfrac14 C^\top C

    Example:
        >>> q = orthonormal(torch.randn(5, 3))
        >>> torch.allclose(q.T @ q, torch.eye(3), atol=1e-6)
        True
    """
    k = x.shape[1]
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    b, c = x[:k] - x[:k].mT, x[k:]
    # inv_ex, because inv looks at the host whether there is one.
    inverse = torch.linalg.inv_ex(eye - b / 2 + c.mT @ c / 4).inverse
    return torch.cat([2 * inverse - eye, c @ inverse])


class SubspaceProjector(nn.Module):
    r"""Loss between the student's features, projected by a matrix with orthonormal rows or columns, and the teacher's.

    .. math:: \mathcal L = \operatorname{smooth\,L1}\bigl(P z_s,\ \operatorname{layer\_norm}(z_t)\bigr), \qquad
        P^\top P = I \text{ or } P P^\top = I

    the mean over all elements. MoKD's subspace learning (Hayder et al., 2025), of which no code was published, in the
    form of the closest published one: Miles, Elezi & Deng, *VkD: improving knowledge distillation using orthogonal
    projections* (CVPR 2024). A P that keeps distances cannot take over from the student what is to be learned. It goes
    either way: with a narrower student :math:`P^\top P = I`, and its space lies in the teacher's; with a wider one
    :math:`P P^\top = I`, and a part of its features has to agree.

    P is the Cayley transform of a free matrix, :func:`orthonormal`, and not
    ``torch.nn.utils.parametrizations.orthogonal``. There the Cayley map solves a system of the larger width with a
    check that waits for the GPU, and half-precision parameters raise or give a P that is orthonormal to three digits.
    Here the system has the smaller width, nothing waits, and P is computed in float32 or wider, under autocast and from
    half-precision parameters too. Every P has such a form but for a set of measure zero; of a square P, rotations only.

    Train it with the student: put its parameter into the same optimizer, best in a group with ``weight_decay=0``,
    because decay draws P to the identity.

    Args:
        student_width: of the student's features.
        teacher_width: of the teacher's.

    Raises:
        ValueError: for a width that is not at least 1.

    Example:
        >>> projector = SubspaceProjector(3, 5)
        >>> p = projector.weight
        >>> torch.allclose(p.T @ p, torch.eye(3), atol=1e-6)
        True
        >>> loss = projector(torch.randn(8, 3, requires_grad=True), torch.randn(8, 5))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        if min(student_width, teacher_width) < 1:
            raise ValueError(f"student_width={student_width}, teacher_width={teacher_width}: expected at least 1")
        self.student_width, self.teacher_width = student_width, teacher_width
        longer, shorter = sorted((student_width, teacher_width), reverse=True)
        self.free = nn.Parameter(torch.empty(longer, shorter))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random rotation, by angles of all sizes but none near the π that the transform cannot reach."""
        nn.init.normal_(self.free, std=len(self.free) ** -0.5)

    @property
    def weight(self) -> Tensor:
        """P, of shape (teacher_width, student_width)."""
        with full_precision(self.free):
            q = orthonormal(self.free.to(torch.promote_types(self.free.dtype, torch.float32)))
        return q if self.teacher_width >= self.student_width else q.mT

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a scalar in float32 or wider.

        Args:
            student: features: vectors (N, d_s), tokens (N, L, d_s) or maps (N, d_s, H, W).
            teacher: features (N, d_t), (N, L, d_t) or (N, d_t, H, W); taken as a constant.

        Raises:
            TypeError, ValueError: for shapes that do not fit, or what is no floating-point tensor.
        """
        student, teacher = pair(student, teacher)
        z_s, z_t = channels_last(student), channels_last(teacher)
        for name, z, width in (("student", z_s, self.student_width), ("teacher", z_t, self.teacher_width)):
            if z.shape[-1] != width:
                raise ValueError(
                    f"{name}: {z.shape[-1]} channels, but {name}_width={width}; construct it for that width"
                )
        expect_same(z_s.shape[:-1], z_t.shape[:-1], "pool both, or resize one", "batch and positions")
        with full_precision(z_s):
            projected = z_s @ self.weight.mT.to(z_s.dtype)
        return F.smooth_l1_loss(projected, F.layer_norm(z_t, z_t.shape[-1:]))

    def extra_repr(self) -> str:
        return f"{self.student_width}, {self.teacher_width}"
