"""Small dense linear algebra that never looks at the host: batched, float64, every guard relative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# What the inner product of two unit vectors may be off by: some dozens of roundings. An eigenvalue of a Gram matrix
# below this share of the largest counts as zero, so singular values are known down to a share of 1.2e-7.
ROUNDING = 64 * torch.finfo(torch.float64).eps

# See _jacobi: steps before the sweeps and after each of them, and the largest angle of the latter. Without them 64 rows
# would take more than 20 sweeps; with them 6 are enough, and 8 are made.
_QR_STEPS = 4
_SIMULTANEOUS_STEPS = 2
_SMALL_ANGLE = 0.1


def unit_rows(gram: Tensor) -> tuple[Tensor, Tensor]:
    r"""The Gram matrix of :math:`g_i/\lVert g_i\rVert`, the cosines, and the lengths relative to the longest gradient.

    Args:
        gram: shape (..., K, K), float64.

    Returns:
        The cosines, shape (..., K, K), and the lengths, shape (..., K). A zero gradient has length 0 and cosine 0 with
        every one, itself included.

    Example:
        >>> cosines, lengths = unit_rows(torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
        >>> cosines, lengths
        (tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64), tensor([1.0000, 0.5000], dtype=torch.float64))
    """
    gram = gram / largest_square(gram)
    lengths = gram.diagonal(0, -2, -1).sqrt()
    inverse = reciprocal(lengths)
    return gram * inverse[..., :, None] * inverse[..., None, :], lengths


def largest_square(gram: Tensor) -> Tensor:
    """The squared length of the longest gradient, shape (..., 1, 1); 1 where all are zero.

    Example:
        >>> largest_square(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[4.]])
    """
    largest = gram.diagonal(0, -2, -1).amax(-1)[..., None, None]
    return torch.where(largest > 0, largest, 1)


def reciprocal(lengths: Tensor) -> Tensor:
    """Reciprocal lengths; 1, as for the longest, where a length is 0.

    Example:
        >>> reciprocal(torch.tensor([0.0, 0.5]))
        tensor([1., 2.])
    """
    return torch.where(lengths > 0, lengths, 1).reciprocal()


def slopes(gram: Tensor, weights: Tensor) -> Tensor:
    """Inner products of every gradient with the combination, G w; zero where all but rounding cancels.

    What rounding leaves of a combination that vanishes is in no gradient's span, and nothing can be projected along it.

    Args:
        gram: shape (..., K, K).
        weights: shape (..., K).

    Returns:
        Tensor of shape (..., K).

    Example:
        >>> gram = torch.tensor([[1.0, -3.0], [-3.0, 9.0]], dtype=torch.float64)
        >>> slopes(gram, torch.tensor([0.3, 0.1], dtype=torch.float64))
        tensor([0., 0.], dtype=torch.float64)
    """
    product = (gram @ weights[..., None])[..., 0]
    terms = (gram.abs() @ weights.abs()[..., None])[..., 0]
    return torch.where(product.abs() <= ROUNDING * terms, 0, product)


def equal_projections(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The vector with the same inner product, 1, with all of K unit vectors :math:`u_i`, as their combination.

    .. math:: d = \sum_i x_i u_i, \qquad x = C^+ \mathbf 1, \qquad C_{ij} = \langle u_i, u_j \rangle

    Where no vector has these inner products, d is the least-squares fit.

    Args:
        cosines: the matrix C, shape (..., K, K), float64; :func:`unit_rows` makes it.

    Returns:
        The coefficients x, shape (..., K), the inner products :math:`\langle u_i, d \rangle = (Cx)_i` that come about,
        shape (..., K), and :math:`\lVert d \rVert^2 = \mathbf 1^\top x`, shape (...). All are nan where ``cosines`` is
        not finite, and zero where the best vector is none, as for two opposed ones.

    Example:
        >>> x, projections, squared = equal_projections(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
        >>> x
        tensor([0.6250, 0.6250], dtype=torch.float64)
    """
    if cosines.shape[-1] == 2:
        return _equal_projections_of_two(cosines)
    values, vectors = eigh(cosines)
    held = values > ROUNDING * values[..., -1:]
    ones = vectors.sum(-2) * held  # their coordinates among the eigenvectors
    # Where all that is left of them are the roundings of K summands, there is nothing.
    ones = (ones * (ones.norm(dim=-1, keepdim=True) > ROUNDING * cosines.shape[-1]))[..., None, :]
    inverse = torch.where(held, values, 1).reciprocal()[..., None, :]
    return (vectors * ones * inverse).sum(-1), (vectors * ones).sum(-1), (ones * ones * inverse).sum((-2, -1))


def _equal_projections_of_two(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In closed form: (1, 1) is the eigenvector that counts, with the eigenvalue 1 + cos."""
    value = 1 + cosines[..., 0, 1, None]
    held = value > 2 * ROUNDING
    # A zero vector takes no part; its cosine is 0.
    projections = ((cosines.diagonal(0, -2, -1) > 0) & held).to(cosines)
    projections = torch.where(torch.isfinite(cosines).all(-1).all(-1, keepdim=True), projections, torch.nan)
    x = projections / torch.where(held, value, 1)
    return x, projections, x.sum(-1)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of symmetric matrices, :math:`A = V \operatorname{diag}(\lambda) V^\top`.

    The CPU calls LAPACK. On an accelerator ``torch.linalg.eigh`` hands an error code to the host, which waits for it;
    there a fixed number of Jacobi sweeps takes its place: 340 launches for K = 4, 720 for K = 8 and 3500 for K = 32.

    Args:
        matrix: shape (..., K, K), float64; symmetric.

    Returns:
        The eigenvalues in ascending order, shape (..., K), and the eigenvectors in the columns, shape (..., K, K). Both
        are nan for a matrix that is not finite, which raises nothing and leaves the rest of the batch alone.

    Example:
        >>> values, vectors = eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        >>> values
        tensor([1., 3.], dtype=torch.float64)
    """
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None]
    largest = matrix.abs().amax((-2, -1))[..., None]
    # A power of two, so that nothing is rounded. No entry is above 2: no square overflows or vanishes.
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(torch.where(finite & (largest > 0), largest, 1))[1] - 1)
    safe = torch.where(finite[..., None], matrix / scale[..., None], 0)
    values, vectors = _lapack(safe) if safe.device.type == "cpu" else _jacobi(safe)
    return torch.where(finite, values * scale, torch.nan), torch.where(finite[..., None], vectors, torch.nan)


def _lapack(a: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`eigh`. From the upper triangle, with the diagonal ascending: then the reduction to a tridiagonal matrix
    starts at the large end, and small eigenvalues keep up to a hundred times more of their digits.
    """
    order = torch.diagonal(a, dim1=-2, dim2=-1).argsort(-1)
    a = torch.take_along_dim(torch.take_along_dim(a, order[..., None], -2), order[..., None, :], -1)
    values, vectors = torch.linalg.eigh(a, UPLO="U")
    return values, torch.take_along_dim(vectors, order.argsort(-1)[..., None], -2)


def _jacobi(a: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobi's method on matrices without an entry above 1, K/2 rotations at a time.

    A round rotates the pairs (p, p + K/2), which share no row, by one product with an orthogonal Q. The same product
    moves the rows on as in a round-robin tournament (Brent & Luk, 1985): in K − 1 rounds every two meet once.

    By themselves the sweeps gain one digit each where eigenvalues lie close together or many orders of magnitude apart.
    Against the second a few steps of the QR algorithm go first, which sort by size. Against the first every sweep is
    followed by rotations of all pairs at once, by the small angles that first-order perturbation theory gives: they
    converge quadratically and leave a cluster alone, inside which a sweep rotates at will and so undoes its own work.
    """
    k = a.shape[-1]
    half = (k + 1) // 2
    if k % 2:
        # A row of its own makes K even. Its eigenvalue 2K is the largest, because none of the others exceeds K.
        corner = torch.full((1, 1), 2.0 * k, dtype=a.dtype, device=a.device)
        a = pad(a, (0, 1, 0, 1)) + pad(corner, (k, 0, k, 0))
    identity = torch.eye(2 * half, dtype=a.dtype, device=a.device)
    # The first row stays, the others go round in a ring, half → 1 → 2 → … → half − 1 → K − 1 → … → half + 1 → half.
    # For K = 2 the ring is one row, which is written twice here.
    ring = [identity[half : half + 1], identity[1 : half - 1], identity[half + 1 :], identity[half - 1 : half]]
    move = torch.cat([identity[:1], *ring])[: 2 * half]
    turn = move @ torch.cat([identity[half:], -identity[:half]])
    vectors = identity
    # A single pair is done after one rotation.
    sweeps, before, after = ((2 * half).bit_length() + 1, _QR_STEPS, _SIMULTANEOUS_STEPS) if half > 1 else (1, 0, 0)
    for _ in range(before):
        q = torch.linalg.qr(a).Q.mT
        a, vectors = q @ a @ q.mT, q @ vectors
    for _ in range(sweeps):
        for _ in range(2 * half - 1):
            diagonal = a.diagonal(0, -2, -1)
            # tan 2θ = 2 a_pq / (a_pp − a_qq), |θ| ≤ 45°; 0/0 is a pair that needs no rotation.
            ratio = a.diagonal(half, -2, -1) / (diagonal[..., :half] - diagonal[..., half:])
            angle = (2 * torch.nan_to_num(ratio)).atan() / 2
            angle = torch.cat([angle, angle], -1)[..., None, :]
            q = move * angle.cos() + turn * angle.sin()
            a, vectors = q @ a @ q.mT, q @ vectors
        for _ in range(after):
            diagonal = a.diagonal(0, -2, -1)
            # X = a_pq / (a_pp − a_qq) takes a_pq off to first order; Cayley's Q = (I − X/2)⁻¹ (I + X/2) is orthogonal.
            x = torch.nan_to_num(a / (diagonal[..., :, None] - diagonal[..., None, :]))
            x = torch.where(x.abs() < _SMALL_ANGLE, x, 0)
            x = (x - x.mT) / 2
            q = torch.linalg.solve_ex(identity - x / 2, identity + x / 2).result
            a, vectors = q @ a @ q.mT, q @ vectors
    values, order = a.diagonal(0, -2, -1).sort(-1)
    vectors = torch.take_along_dim(vectors.mT, order[..., None, :], -1)
    return values[..., :k], vectors[..., :k, :k]
