"""Distillation losses as their papers write them: loops over examples, classes and pairs, numpy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def kl(p: Array, q: Array) -> float:
    """Σ p log(p/q), where 0 log 0 is 0."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def kd(student: Array, teacher: Array, temperature: float) -> float:
    """Hinton, Vinyals & Dean 2015: T² KL(teacher ‖ student), the mean over the rows."""
    rows = [kl(softmax(t / temperature), softmax(s / temperature)) for s, t in zip(student, teacher, strict=True)]
    return float(temperature**2 * np.mean(rows))


def dkd(student: Array, teacher: Array, labels: Array, temperature: float) -> tuple[float, float]:
    """Zhao et al., CVPR 2022, eq. 5 and 6: TCKD and NCKD, times T², means over the rows."""
    target, others = [], []
    for s, t, y in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        target.append(kl(np.array([p_t[y], 1 - p_t[y]]), np.array([p_s[y], 1 - p_s[y]])))
        rest_s, rest_t = np.delete(p_s, y), np.delete(p_t, y)
        others.append(kl(rest_t / rest_t.sum(), rest_s / rest_s.sum()))
    return float(temperature**2 * np.mean(target)), float(temperature**2 * np.mean(others))


def dist(student: Array, teacher: Array, temperature: float) -> tuple[float, float]:
    """Huang et al., NeurIPS 2022, with Pearson's correlation by np.corrcoef."""
    y_s = np.stack([softmax(s / temperature) for s in student])
    y_t = np.stack([softmax(t / temperature) for t in teacher])
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(y_s, y_t, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(y_s.T, y_t.T, strict=True)])
    return float(temperature**2 * inter), float(temperature**2 * intra)


def hint(student: Array, teacher: Array) -> float:
    """Romero et al., ICLR 2015, as a mean."""
    return float(np.mean([(a - b) ** 2 for a, b in zip(student.ravel(), teacher.ravel(), strict=True)]))


def attention_transfer(student: Array, teacher: Array) -> float:
    """Zagoruyko & Komodakis, ICLR 2017, as in the authors' code: the mean of the squares."""

    def attention(features: Array) -> Array:
        q = np.array([[sum(c[i, j] ** 2 for c in features) for j in range(w)] for i in range(h)]).ravel()
        return np.asarray(q / np.sqrt((q**2).sum()))

    _, _, h, w = student.shape
    return float(np.mean([(attention(s) - attention(t)) ** 2 for s, t in zip(student, teacher, strict=True)]))


def huber(a: float, b: float) -> float:
    d = abs(a - b)
    return 0.5 * d * d if d <= 1 else d - 0.5


def rkd(student: Array, teacher: Array) -> tuple[float, float]:
    """Park et al., CVPR 2019, eq. 4 to 9; averages over all N² pairs and N³ triples, as the authors'."""
    n = len(student)

    def distances(x: Array) -> Array:
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return np.asarray(d / np.mean([d[i, j] for i, j in itertools.permutations(range(n), 2)]))

    def cosine(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths > 0 else 0.0

    d_s, d_t = distances(student), distances(teacher)
    distance = np.mean([huber(a, b) for a, b in zip(d_s.ravel(), d_t.ravel(), strict=True)])
    triples = itertools.product(range(n), repeat=3)
    angle = np.mean([huber(cosine(student, *ijk), cosine(teacher, *ijk)) for ijk in triples])
    return float(distance), float(angle)


def generalized_jsd(student: Array, teacher: Array, mask: Array, beta: float, temperature: float) -> float:
    """Agarwal et al., ICLR 2024: the mean over the tokens that count; the Kullback-Leibler divergences at the ends."""
    values = []
    for s, t, counts in zip(student, teacher, mask, strict=True):
        if counts:
            p, q = softmax(t / temperature), softmax(s / temperature)
            m = beta * p + (1 - beta) * q
            if beta == 0:
                values.append(kl(p, q))
            elif beta == 1:
                values.append(kl(q, p))
            else:
                values.append(beta * kl(p, m) + (1 - beta) * kl(q, m))
    return float(np.mean(values))


def standardize(logits: Array) -> Array:
    """Sun et al., CVPR 2024."""
    return np.stack([(row - np.mean(row)) / np.sqrt(np.mean((row - np.mean(row)) ** 2)) for row in logits])


def normalized_distance(student: Array, teacher: Array) -> float:
    """Li & Bilen 2020: of maps (N, C, H, W), mean over n, h, w of Σ_c (f̂_s − f̂_t)²."""
    n, _, h, w = student.shape
    total = 0.0
    for i, y, x in itertools.product(range(n), range(h), range(w)):
        s, t = student[i, :, y, x], teacher[i, :, y, x]
        total += float(((s / np.sqrt((s**2).sum() + 1e-6) - t / np.sqrt((t**2).sum() + 1e-6)) ** 2).sum())
    return float(total / (n * h * w))


def projected(student: Array, teacher: Array, p: Array) -> float:
    """Smooth L1 between P z_s and layer_norm(z_t), the mean over all elements; eps 1e-5 as layer_norm's."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        target = (t - t.mean()) / np.sqrt(t.var() + 1e-5)
        values += [huber(a, b) for a, b in zip(p @ s, target, strict=True)]
    return float(np.mean(values))


def orthonormal(x: Array) -> Array:
    """The Cayley transform as it is written, with the whole skew-symmetric matrix; the first k columns."""
    n, k = x.shape
    a = np.zeros((n, n))
    a[:, :k] = np.concatenate([x[:k] - x[:k].T, x[k:]])
    a[:k, k:] = -x[k:].T
    eye = np.eye(n)
    return np.asarray(np.linalg.solve(eye - a / 2, eye + a / 2)[:, :k])
