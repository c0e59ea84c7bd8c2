"""Min-norm drawn towards the mean gradient (SDMGrad)."""

from __future__ import annotations

from torch import Tensor

from distill_optim.combine.min_norm import min_norm


def sdmgrad(gram: Tensor, losses: Tensor | None = None, *, pull: float = 0.3) -> Tensor:
    r"""Weights of the direction-oriented min-norm vector.

    .. math:: g^* = \frac{1}{1+\lambda} \Bigl(\sum_i \pi_i^* g_i + \lambda g_0 \Bigr), \qquad
        \pi^* = \arg\min_{\pi \ge 0,\ \sum_i \pi_i = 1}
        \tfrac12 \Bigl\lVert \sum_i \pi_i g_i + \lambda g_0 \Bigr\rVert^2

    with :math:`g_0` the mean gradient (Xiao, Ban & Ji, *Direction-oriented multi-objective learning: simple and
    provable stochastic algorithms*, NeurIPS 2023, eq. 6). λ = 0 is min-norm, λ → ∞ the mean. Because the shares sum
    to 1 this is the shortest vector in the hull of :math:`g_i + \lambda g_0`, so it conflicts with none of those.

    The paper's algorithm is stochastic: twenty projected gradient steps on π, with gradients of independent batches
    for an unbiased product. Here one batch's Gram matrix is taken and the program solved exactly: no memory, no step
    size, no second and third batch, and the bias that the paper is about.

    Args:
        gram: inner products of the gradients, shape (..., K, K).
        losses: not looked at.
        pull: λ, at least 0; 0.3 in the authors' experiments.

    Returns:
        Weights on the simplex, shape (..., K), float64.

    Raises:
        ValueError: for a negative λ.

    Example:
        >>> sdmgrad(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), pull=0.0)
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    if not pull >= 0:
        raise ValueError(f"pull={pull}: expected at least 0")
    gram = gram.double()
    k = gram.shape[-1]
    with_mean = pull * gram.mean(-1)
    mean_squared = pull * with_mean.mean(-1)
    # ⟨gᵢ + λg₀, gⱼ + λg₀⟩
    shifted = gram + with_mean[..., :, None] + with_mean[..., None, :] + mean_squared[..., None, None]
    return (min_norm(shifted) + pull / k) / (1 + pull)
