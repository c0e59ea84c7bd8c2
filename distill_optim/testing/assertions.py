r"""Assertions about combination weights, with tolerances that follow from rounding.

**The unit.** Weights w make the vector :math:`g = \sum_j w_j g_j`. Before anything cancels it has the length
:math:`r = \sum_j |w_j| \lVert g_j \rVert`, see :func:`reach`. An entry of a Gram matrix in float64 carries at most N
roundings of :math:`\lVert g_i \rVert \lVert g_j \rVert` for gradients of N elements, and its product with the weights
at most K more. So :math:`\langle g, g_i \rangle` is known up to :math:`(N + K)\, \varepsilon\, r \lVert g_i \rVert`
and no better, see :func:`rounding`: no method can be held to more, and none here is held to less. With K = 64 that is
3e-14 of :math:`r \lVert g_i \rVert`, so a conflict of one part in 1e6, or in 1e12, is seen.

**Vectors are compared by their distance in the metric of the Gram matrix**, because dependent gradients have many
weights of one vector, see :func:`assert_same_vector`.

Everything raises AssertionError itself, so it does so under ``python -O`` and outside of pytest, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_optim import combine
from distill_optim.combine import rules

EPS = torch.finfo(torch.float64).eps

#: :func:`rounding` of up to 31 losses and 33 elements.
ROUNDING = 64 * EPS

#: A name of :func:`distill_optim.combine.names`, a function ``(gram, losses) -> weights``, or a rule with a memory.
AnyMethod = str | combine.Method | combine.Stateful

# Powers of 4 from 1e-30 to 1e30: cG and its square roots are G and its square roots with another exponent, to the bit.
_SCALES = tuple(4.0**n for n in (-50, -25, -10, 10, 25, 50))


def gram_of(rows: Tensor) -> Tensor:
    """Gram matrix of gradients that are rows, in float64 whatever their dtype.

    Args:
        rows: shape (K, N).

    Returns:
        Tensor of shape (K, K).

    Example:
        >>> gram_of(torch.tensor([[3.0, 0.0], [1.0, 2.0]]))
        tensor([[9., 3.],
                [3., 5.]], dtype=torch.float64)
    """
    return combine.gram([[row] for row in rows])


def reach(weights: Tensor, gram: Tensor) -> Tensor:
    r""":math:`\sum_i |w_i| \lVert g_i \rVert`, the length that the combination has before anything cancels.

    It is the unit of the combination's rounding errors.

    Args:
        weights: shape (K,).
        gram: shape (K, K).

    Returns:
        Tensor of shape ().

    Example:
        >>> reach(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, -2.0], [-2.0, 4.0]]))
        tensor(3., dtype=torch.float64)
    """
    return weights.double().abs() @ gram.double().diagonal().sqrt()


def rounding(k: int, elements: int | None = None) -> float:
    r"""Relative error that rounding may leave in :math:`\langle \sum_j w_j g_j, g_i \rangle`.

    (N + K) ε, see the head of this module; the unit roundoff is ε/2, so half of it is for the rounding of what is
    compared, and half for a method that is backward stable, which is to say exact for a G that it cannot tell from
    this one. Never less than 64 ε, for methods that do more with a small matrix than sum it up.

    Args:
        k: number of gradients.
        elements: N, the length of a gradient; K + 2 as in this package's strategies unless given.

    Example:
        >>> rounding(8) == ROUNDING, rounding(8, 1_000_000) < 1e-9
        (True, True)
    """
    return max(64, k + (k + 2 if elements is None else elements)) * EPS


# Of weights and the Gram matrix. ----------------------------------------------------------------------------------


def assert_same_vector(actual: Tensor, expected: Tensor, gram: Tensor, *, elements: int | None = None) -> None:
    r"""Both weights give the same vector: :math:`\lVert \sum_i (a_i - e_i) g_i \rVert^2` is no more than rounding.

    Optima are compared by their vectors because dependent gradients have many optimal weights. The tolerance is on the
    square: an error ε in G moves the minimum of ‖g‖² by ε, and two points of a convex set whose squared norms are
    within ε of the minimum are within √(4ε) of each other. In relative length that is 2e-7, which is also how far from
    each other two vectors have to be before their Gram matrix shows it.

    Args:
        actual: weights, shape (K,).
        expected: weights, shape (K,).
        gram: shape (K, K).
        elements: length of the gradients, see :func:`rounding`.

    Raises:
        AssertionError: if the vectors differ, or are not finite.

    Example:
        >>> gram = gram_of(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        >>> assert_same_vector(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.0, 0.5, 0.5]), gram)
        >>> assert_same_vector(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.5, 0.0, 0.500001]), gram)
        Traceback (most recent call last):
        AssertionError: vectors 1e-06 apart, 1e-06 of their reach; rounding explains 2.4e-07
    """
    gram = _checked(gram, actual, expected)
    offset = actual.double() - expected.double()
    unit = torch.maximum(reach(actual, gram), reach(expected, gram))
    tolerance = 4 * rounding(len(gram), elements)
    distance = offset @ gram @ offset
    if not distance <= tolerance * unit**2:
        raise AssertionError(
            f"vectors {distance.sqrt():.2g} apart, {distance.sqrt() / unit:.2g} of their reach; "
            f"rounding explains {tolerance**0.5:.2g}"
        )


def assert_non_conflicting(weights: Tensor, gram: Tensor, *, elements: int | None = None) -> None:
    r"""The step conflicts with no loss: :math:`\langle g, g_i \rangle \ge 0` for every i, up to rounding.

    .. math:: \langle g, g_i \rangle \ge -u\, r \lVert g_i \rVert - \max(0,\ u\, r^2 - \lVert g \rVert^2)

    with u from :func:`rounding`, which is 1.4e-14 for a few short gradients and still below 1e-6 for gradients of four
    billion elements. A long gradient does not excuse a conflict with a short one. The second term is zero unless g is:
    rounding may leave a G that is not positive semidefinite, by :math:`u\, r^2` along w, and where everything cancels
    (:math:`\lVert g \rVert^2 < u\, r^2`) a method that is exact for this G comes out as much below zero.

    Weights that are all zero conflict with none; :func:`assert_on_simplex` sees those.

    Args:
        weights: shape (K,).
        gram: shape (K, K).
        elements: length of the gradients, see :func:`rounding`.

    Raises:
        AssertionError: for a conflict, and for weights that are not finite.

    Example:
        >>> gram = gram_of(torch.tensor([[1.0, 0.0], [-1e-6, 1.0]]))
        >>> assert_non_conflicting(torch.tensor([0.5, 0.5]), gram)
        >>> assert_non_conflicting(torch.tensor([1.0, 0.0]), gram)
        Traceback (most recent call last):
        AssertionError: the step conflicts with loss 1: ⟨g, gᵢ⟩ is -1e-06 of r‖gᵢ‖; rounding explains 1.4e-14
    """
    gram = _checked(gram, weights)
    w = weights.double()
    slope, r, u = gram @ w, reach(w, gram), rounding(len(w), elements)
    unit = r * gram.diagonal().sqrt()
    allowed = u * unit + (u * r**2 - w @ slope).clamp_min(0)
    if not (slope >= -allowed).all():
        worst = int(((slope + allowed) / unit).nan_to_num(torch.inf).argmin())
        raise AssertionError(
            f"the step conflicts with loss {worst}: ⟨g, gᵢ⟩ is {slope[worst] / unit[worst]:.2g} of r‖gᵢ‖; "
            f"rounding explains {allowed[worst] / unit[worst]:.2g}"
        )


def assert_positive(weights: Tensor) -> None:
    """Every weight is above zero, and finite.

    Args:
        weights: shape (..., K).

    Raises:
        AssertionError: otherwise.

    Example:
        >>> assert_positive(torch.tensor([1e-30, 2.0]))
        >>> assert_positive(torch.tensor([0.0, 2.0]))
        Traceback (most recent call last):
        AssertionError: not positive: [0, 2]
    """
    if not ((weights > 0) & weights.isfinite()).all():
        raise AssertionError(f"not positive: {_short(weights.flatten())}")


def assert_on_simplex(weights: Tensor, *, total: float = 1.0) -> None:
    """No weight is below zero, not by a rounding either, and their sum is ``total``.

    Quotients by their sum are off by a rounding each and by those of the sum, and so is the sum that is taken here:
    K + 1 roundings of the weights' dtype in all.

    Args:
        weights: shape (..., K).
        total: 1 for shares, K for weights of which each is about 1.

    Raises:
        AssertionError: otherwise.

    Example:
        >>> assert_on_simplex(torch.tensor([0.25, 0.75]))
        >>> assert_on_simplex(torch.tensor([0.5, 1.5]), total=2)
        >>> assert_on_simplex(torch.tensor([-1e-9, 1.0]))
        Traceback (most recent call last):
        AssertionError: weight 0 is -1e-09
    """
    if not (weights >= 0).all():
        flat = weights.flatten()
        worst = int(torch.where(flat >= 0, torch.inf, flat.nan_to_num(-torch.inf)).argmin())
        raise AssertionError(f"weight {worst} is {flat[worst]:.2g}")
    excess = weights.double().sum(-1) / total - 1
    tolerance = (weights.shape[-1] + 1) * torch.finfo(weights.dtype).eps
    if not (excess.abs() <= tolerance).all():
        raise AssertionError(
            f"the weights sum to {total:g} · (1 + {excess.flatten().tolist()}); rounding explains {tolerance:.2g}"
        )


def assert_kkt(
    weights: Tensor,
    gram: Tensor,
    *,
    linear: Tensor | None = None,
    lower: Tensor | None = None,
    total: float | None = 1.0,
    elements: int | None = None,
) -> None:
    r"""The weights solve a quadratic program: by default that of the shortest vector in the convex hull (min-norm).

    .. math:: \min_w \tfrac12 w^\top G w + b^\top w \quad \text{subject to} \quad w \ge l,\ \sum_i w_i = t

    The conditions of Karush, Kuhn and Tucker, with the slope :math:`d = Gw + b` and the slack :math:`z = w - l \ge 0`:
    no vertex improves on the optimum,

    .. math:: \sum_j z_j (d_j - d_i) \le 0 \quad \text{for every } i,

    and where the sum is free (``total=None``) :math:`d_i \ge 0` and :math:`\sum_j z_j d_j \le 0`. They are sufficient,
    because the program is convex. Here :math:`d_i` is known up to a rounding of :math:`r \lVert g_i \rVert + |b_i|`,
    and that is what they are held to, loss by loss. For min-norm they say :math:`\langle g^*, g_i \rangle \ge
    \lVert g^* \rVert^2`, and any solution of theirs conflicts with no loss.

    Args:
        weights: w, shape (K,).
        gram: G, shape (K, K).
        linear: b, shape (K,); zero unless given.
        lower: l, shape (K,); zero unless given. UPGrad's and GEM's duals have one.
        total: t; None leaves the sum free.
        elements: length of the gradients, see :func:`rounding`.

    Raises:
        AssertionError: if the weights violate a constraint or are not optimal.

    Example:
        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> assert_kkt(torch.tensor([0.2, 0.8], dtype=torch.float64), gram)
        >>> assert_kkt(torch.tensor([0.200001, 0.799999], dtype=torch.float64), gram)
        Traceback (most recent call last):
        AssertionError: loss 1 would improve on these weights: by 1e-06, of which rounding explains 3.8e-14
    """
    gram, w = _checked(gram, weights), weights.double()
    b = torch.zeros_like(w) if linear is None else linear.double()
    low = torch.zeros_like(w) if lower is None else lower.double()
    slack = w - low
    if not (slack >= 0).all():
        raise AssertionError(f"weight {int(slack.argmin())} is {-slack.min():.2g} below its bound")
    if total is not None and not abs(w.sum() - total) <= (len(w) + 1) * EPS * w.abs().sum():
        raise AssertionError(f"the weights sum to {w.sum():.17g}, not {total:g}")
    d = gram @ w + b
    unit = rounding(len(w), elements) * (reach(w, gram) * gram.diagonal().sqrt() + b.abs())
    if total is None:
        if not (d >= -unit).all():
            worst = int((d + unit).argmin())
            raise AssertionError(f"loss {worst} would improve on these weights: d = {d[worst]:.2g}")
        gap, room = (slack @ d)[None], (slack @ unit)[None]
    else:
        gap, room = slack @ d - slack.sum() * d, slack @ unit + slack.sum() * unit
    if not (gap <= room).all():
        worst = int((gap - room).argmax())
        raise AssertionError(
            f"loss {worst} would improve on these weights: by {gap[worst]:.2g}, of which rounding explains "
            f"{room[worst]:.2g}"
        )


# Of a method and gradients. ---------------------------------------------------------------------------------------


def assert_defined(method: AnyMethod, rows: Tensor, losses: Tensor | None = None) -> None:
    """The method gives K finite numbers in float64.

    Args:
        method: name, function or rule with a memory.
        rows: finite gradients, shape (K, N).
        losses: shape (K,); ones unless given.

    Raises:
        AssertionError: otherwise.

    Example:
        >>> assert_defined("min_norm", torch.zeros(3, 2))
        >>> assert_defined(lambda gram, losses: 1 / gram.diagonal(), torch.zeros(3, 2))
        Traceback (most recent call last):
        AssertionError: not finite: [inf, inf, inf]
    """
    weights = _weights(method, gram_of(rows), _losses(losses, rows))
    if weights.dtype != torch.float64:
        raise AssertionError(f"weights in {weights.dtype}")
    if not weights.isfinite().all():
        raise AssertionError(f"not finite: {_short(weights)}")


def assert_scale_invariant(
    method: AnyMethod, rows: Tensor, losses: Tensor | None = None, *, degree: float = 0.0
) -> None:
    r"""A common scale does not matter: the weights for cG are those for G, with c from 1e-30 to 1e30.

    That is what a guard relative to the scale of its input keeps and an absolute one, ``+ 1e-8``, breaks. The scales
    are powers of 4: nothing is rounded differently then, so that a method may be as discontinuous as it likes. The
    vectors are compared, see :func:`assert_same_vector`.

    Args:
        method: name, function or rule with a memory.
        rows: gradients, shape (K, N).
        losses: shape (K,), the same for every c; ones unless given.
        degree: q, for a method whose weights for cG are by definition :math:`c^q` times those for G; −1/2 where the
            weights are inverse lengths.

    Raises:
        AssertionError: if the vector depends on the scale.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> assert_scale_invariant("min_norm", rows)
        >>> assert_scale_invariant(lambda gram, losses: 1 / gram.diagonal().sqrt(), rows, degree=-0.5)
        >>> assert_scale_invariant(lambda gram, losses: gram.diagonal() / (gram.trace() + 1e-8), rows)
        Traceback (most recent call last):
        AssertionError: c = 7.9e-31: vectors 1.9 apart, 0.96 of their reach; rounding explains 2.4e-07
    """
    gram, losses = gram_of(rows), _losses(losses, rows)
    expected = _weights(method, gram, losses)
    for c in _SCALES:
        actual = _weights(method, c * gram, losses) / c**degree
        _same(actual, expected, gram, rows, f"c = {c:.2g}")


def assert_permutation_equivariant(method: AnyMethod, rows: Tensor, losses: Tensor | None = None) -> None:
    """The order of the losses does not matter: the weights move with them, up to weights of the same vector.

    Tried are a cycle of all losses, a swap of the first two and the reversal. Every permutation is a product of the
    first two, so a method that these leave the same on all gradients is left the same by all permutations. The
    reversal sees a tie that is decided by position at once, as by ``argmax``.

    Args:
        method: name, function or rule with a memory.
        rows: gradients, shape (K, N).
        losses: shape (K,), which move with the gradients; ones unless given.

    Raises:
        AssertionError: if the vector depends on the order.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> assert_permutation_equivariant("min_norm", rows)
        >>> def shortest(gram, losses):
        ...     return torch.nn.functional.one_hot(gram.diagonal().argmin(), len(gram)).double()
        >>> assert_permutation_equivariant(shortest, rows)
        Traceback (most recent call last):
        AssertionError: losses moved on by one: vectors 1.4 apart, 1.4 of their reach; rounding explains 2.4e-07
    """
    gram, losses, k = gram_of(rows), _losses(losses, rows), len(rows)
    expected = _weights(method, gram, losses)
    orders = {
        "moved on by one": [*range(1, k), 0],
        "the first two swapped": [*range(k)[1::-1], *range(2, k)],
        "reversed": [*range(k)[::-1]],
    }
    for name, order in orders.items():
        actual = torch.empty_like(expected)
        actual[order] = _weights(method, gram[order][:, order], losses[order])
        _same(actual, expected, gram, rows, f"losses {name}")


def assert_invariant_to_row_scaling(
    method: AnyMethod, rows: Tensor, losses: Tensor | None = None, factors: Tensor | None = None
) -> None:
    r"""The unit of a loss does not matter: :math:`(c_i L_i, c_i g_i)` give the direction of :math:`(L_i, g_i)`.

    True of methods such as Nash-MTL and IMTL-G, and of any method under dominance ``"norm"``; not of min-norm, nor of
    PCGrad. Directions are compared, by the vectors at reach 1: a method that normalises its weights does so in another
    unit for other factors.

    Args:
        method: name, function or rule with a memory.
        rows: gradients, shape (K, N).
        losses: shape (K,); ones unless given.
        factors: c, positive, shape (K,); powers of two over 12 orders of magnitude unless given, which round nothing.

    Raises:
        AssertionError: if the direction depends on the units.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> assert_invariant_to_row_scaling(lambda gram, losses: 1 / gram.diagonal().sqrt(), rows)
        >>> assert_invariant_to_row_scaling(lambda gram, losses: 1 / gram.diagonal(), rows)
        Traceback (most recent call last):
        AssertionError: factors [1, 1.05e+06]: vectors 0.32 apart, 0.32 of their reach; rounding explains 2.4e-07
    """
    gram, losses = gram_of(rows), _losses(losses, rows)
    if factors is None:
        factors = torch.tensor([(0, 20, -20, 7, -3)[i % 5] for i in range(len(rows))]).double().exp2()
    c = factors.double()
    expected = _weights(method, gram, losses)
    actual = _weights(method, gram * torch.outer(c, c), losses * c) * c
    expected, actual = (w / torch.where(reach(w, gram) == 0, 1, reach(w, gram)) for w in (expected, actual))
    _same(actual, expected, gram, rows, f"factors {_short(c)}")


def assert_not_finite_in_not_finite_out(
    method: AnyMethod, rows: Tensor, losses: Tensor | None = None, *, in_losses: bool = False
) -> None:
    """A gradient that is not finite gives weights of which none is finite: no exception, and no silent default.

    A gradient scaler has to find the overflow, and it looks at what the weights made. Tried are a nan, an inf and a
    −inf in the first and in the last gradient, and a finite gradient whose square overflows. A method that is marked
    as one that never looks at the gradients (``combine.losses_only``) is asked for its losses alone.

    Args:
        method: name, function or rule with a memory.
        rows: finite gradients, shape (K, N).
        losses: finite, shape (K,); ones unless given.
        in_losses: whether the method looks at the losses: then one that is not finite has to show as well.

    Raises:
        AssertionError: if a weight is finite.

    Example:
        >>> assert_not_finite_in_not_finite_out("min_norm", torch.eye(3))
        >>> assert_not_finite_in_not_finite_out(lambda gram, losses: gram.diagonal(), torch.eye(2))
        Traceback (most recent call last):
        AssertionError: nan in gradient 0, weights [nan, 1]
    """
    gram, losses = gram_of(rows), _losses(losses, rows).double()
    for i in sorted({0, len(rows) - 1}):
        for bad in (torch.nan, torch.inf, -torch.inf):
            if combine.uses_gram(combine.method(method)):
                gradients = rows.double().clone()
                gradients[i, -1] = bad
                _assert_not_finite(method, gram_of(gradients), losses, f"{bad} in gradient {i}")
            if in_losses:
                values = losses.clone()
                values[i] = bad
                _assert_not_finite(method, gram, values, f"{bad} in loss {i}")
        if combine.uses_gram(combine.method(method)):
            overflown = gram.clone()
            overflown[i, i] = torch.inf
            _assert_not_finite(method, overflown, losses, f"the square of gradient {i} is inf")


def assert_batch_is_a_loop(method: AnyMethod, rows: Tensor, losses: Tensor | None = None) -> None:
    """Leading dimensions are problems of their own: G of shape (2, 2, K, K) gives what four calls give.

    The four are these gradients, the same in reverse, the same at 1e12 times the length, and some that are not finite,
    which may not harm the rest. Vectors are compared, see :func:`assert_same_vector`.

    Args:
        method: name or function.
        rows: gradients, shape (K, N).
        losses: shape (K,); ones unless given.

    Raises:
        AssertionError: if one problem's result depends on the others, or a shape is wrong.

    Example:
        >>> assert_batch_is_a_loop("min_norm", torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> def by_length(gram, losses):
        ...     return gram.diagonal(dim1=-2, dim2=-1) / gram.amax()
        >>> assert_batch_is_a_loop(by_length, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        Traceback (most recent call last):
        AssertionError: problem 0 of a batch: weights [nan, nan], alone [0.2, 1]
    """
    gram, losses, k = gram_of(rows), _losses(losses, rows), len(rows)
    grams = torch.stack([gram, gram.flip(0, 1), gram * 4.0**40, torch.full_like(gram, torch.nan)])
    values = torch.stack([losses, losses.flip(0), losses, losses])
    batched = _weights(method, grams.view(2, 2, k, k), values.view(2, 2, k)).view(4, k)
    for number, (actual, g, x) in enumerate(zip(batched, grams, values, strict=True)):
        expected = _weights(method, g, x)
        if not torch.equal(actual.isfinite(), expected.isfinite()):
            raise AssertionError(f"problem {number} of a batch: weights {_short(actual)}, alone {_short(expected)}")
        if g.isfinite().all():
            _same(actual, expected, g, rows, f"problem {number} of a batch")


def assert_takes_any_dtype(method: AnyMethod, rows: Tensor, losses: Tensor | None = None) -> None:
    """Float32, bfloat16 and float16 in, float64 out; computed in float64, so the result is that of the same numbers.

    The Gram matrix and the losses are brought to 1 at most before, so that nothing overflows.

    Args:
        method: name, function or rule with a memory.
        rows: gradients, shape (K, N).
        losses: shape (K,); ones unless given.

    Raises:
        AssertionError: if the weights are not float64, or not those of the same numbers in float64, to the bit.

    Example:
        >>> assert_takes_any_dtype("min_norm", torch.eye(2))
        >>> assert_takes_any_dtype(lambda gram, losses: gram.diagonal(), torch.eye(2))
        Traceback (most recent call last):
        AssertionError: weights in torch.float32 from torch.float32
    """
    gram, losses = gram_of(rows), _losses(losses, rows)
    gram = gram / torch.where(gram.amax() > 0, gram.amax(), 1)
    losses = losses / torch.where(losses.abs().amax() > 0, losses.abs().amax(), 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        g, x = gram.to(dtype), losses.to(dtype)
        actual, expected = _weights(method, g, x), _weights(method, g.double(), x.double())
        if actual.dtype != torch.float64:
            raise AssertionError(f"weights in {actual.dtype} from {dtype}")
        if not torch.equal(actual.nan_to_num(torch.pi), expected.nan_to_num(torch.pi)):
            raise AssertionError(
                f"weights {_short(actual)} from {dtype}, {_short(expected)} from its numbers in float64"
            )


def _weights(method: AnyMethod, gram: Tensor, losses: Tensor) -> Tensor:
    """A call of the method, with a fresh memory, if any; each one sees the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        weights, _ = rules.apply(combine.method(method), gram, losses, {})
    if weights.shape != losses.shape:
        raise AssertionError(f"weights of shape {tuple(weights.shape)} for losses of shape {tuple(losses.shape)}")
    return weights


def _losses(losses: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.float64) if losses is None else losses


def _checked(gram: Tensor, *weights: Tensor) -> Tensor:
    """The Gram matrix in float64, after a look whether it is one: gradients in its place would pass for a while."""
    k = len(gram)
    if gram.shape != (k, k) or any(w.shape != (k,) for w in weights):
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"expected weights (K,) and a Gram matrix (K, K), got {shapes} and {tuple(gram.shape)}")
    if not torch.equal(gram, gram.mT):
        raise ValueError("the Gram matrix is not symmetric")
    for w in weights:
        if not w.isfinite().all():
            raise AssertionError(f"not finite: {_short(w)}")
    return gram.double()


def _same(actual: Tensor, expected: Tensor, gram: Tensor, rows: Tensor, what: str) -> None:
    try:
        assert_same_vector(actual, expected, gram, elements=rows[0].numel())
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _assert_not_finite(method: AnyMethod, gram: Tensor, losses: Tensor, what: str) -> None:
    weights = _weights(method, gram, losses)
    if weights.isfinite().any():
        raise AssertionError(f"{what}, weights {_short(weights)}")


def _short(values: Tensor) -> str:
    shown = ", ".join(f"{v:.3g}" for v in values[:8].tolist())
    return f"[{shown}{', …' if len(values) > 8 else ''}]"
