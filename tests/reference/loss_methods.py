"""Methods that look at loss values, simulated step by step with torch's autograd and optimizers, as in the papers.

``losses`` is a T × K tensor, the K losses of T steps as the training loop would see them; so the simulations take the
losses as given and ask for the weights alone. Row t of a result has the weights *used* in step t: what step t teaches
is in row t + 1. All is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uncertainty(losses: Tensor, lr: float, *, c: float = 2.0, betas: tuple[float, float] = (0.9, 0.999)) -> Tensor:
    """Weights 1/(c e^sᵢ) of the gradients, with a learned log-variance sᵢ for every loss.

    Kendall, Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, with s = log σ², which
    they train for stability, as the authors of KD4MTL write it: Σ Lᵢ/(c e^sᵢ) + sᵢ/2, c = 2. s starts at 0 and is
    trained by Adam on that total with the losses as constants. Right because autograd differentiates the total as it
    stands.

    Args:
        losses: (T, K).
        lr: learning rate of Adam for s.
        c: 2 for a regression's loss, as written.
        betas: Adam's.
    """
    s = torch.zeros(losses.shape[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=lr, betas=betas)
    weights = []
    for values in losses.double().detach():
        seen = values.clone().requires_grad_()
        total = (seen / (c * s.exp()) + s / 2).sum()
        adam.zero_grad()
        total.backward()
        # The weight of a gradient is ∂total/∂Lᵢ.
        assert seen.grad is not None
        weights.append(seen.grad)
        adam.step()
    return torch.stack(weights)


def gradnorm(
    losses: Tensor, norms: Tensor, *, alpha: float = 1.5, lr: float = 0.025, betas: tuple[float, float] = (0.9, 0.999)
) -> Tensor:
    """Weights trained so that faster losses get shorter gradients.

    Chen et al., "GradNorm", ICML 2018, Algorithm 1: Gᵢ = wᵢ ‖gᵢ‖, Ḡ their mean, L̃ᵢ = Lᵢ/Lᵢ(0), rᵢ = L̃ᵢ / mean L̃;
    L_grad = Σ |Gᵢ − Ḡ rᵢ^α| with the targets as constants is differentiated in w, Adam takes a step (lr 0.025 in their
    experiments), and w is scaled to Σ wᵢ = K. w starts at 1. Beyond the paper, L_grad is divided by the mean ‖gᵢ‖, so
    that Adam's ε means the same at any scale of the gradients.

    Args:
        losses: (T, K).
        norms: lengths of the unweighted gradients, (T, K).
        alpha: strength of the restoring force.
        lr: learning rate of Adam for w.
        betas: Adam's.
    """
    k = losses.shape[1]
    w = torch.ones(k, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=lr, betas=betas)
    weights = []
    for values, lengths in zip(losses.double(), norms.double(), strict=True):
        weights.append(w.detach().clone())
        weighted = w * lengths
        ratio = values / losses[0].double()
        rate = ratio / ratio.mean()
        target = (weighted.mean() * rate**alpha).detach()
        total = (weighted - target).abs().sum() / lengths.mean()
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            w.mul_(k / w.sum())
    return torch.stack(weights)


def dwa(losses: Tensor, n: int, *, tau: float = 2.0) -> Tensor:
    """Weights from how fast the losses fell lately: K softmax((L̄ₑ₋₁/L̄ₑ₋₂)/τ).

    Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, "Dynamic Weight Average", with the
    mean losses L̄ of epochs of n steps. In the first two epochs the weights are 1.

    Args:
        losses: (T, K).
        n: steps in an epoch.
        tau: temperature.
    """
    t, k = losses.shape
    means = [losses[start : start + n].double().mean(0) for start in range(0, t - n + 1, n)]
    weights = []
    for epoch in (step // n for step in range(t)):
        if epoch < 2:
            weights.append(torch.ones(k, dtype=torch.float64))
        else:
            weights.append(k * torch.softmax(means[epoch - 1] / means[epoch - 2] / tau, 0))
    return torch.stack(weights)


def famo(before: Tensor, after: Tensor, *, lr: float = 0.025, weight_decay: float = 1e-3) -> Tensor:
    """Weights z = softmax(w) of the gradients of the *log* losses, trained so that all losses improve at one rate.

    Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, Algorithm 1: after the step the same batch's
    losses give δᵢ = log Lᵢ(before) − log Lᵢ(after); the gradient in w is (∂z/∂w)ᵀδ, and Adam takes it, with a weight
    decay that goes through its moments. w starts at 0. Right because autograd has the softmax's Jacobian. (The paper's
    step also divides by Σ zᵢ/Lᵢ, a common factor, which is not in these weights.)

    Args:
        before: losses before every step, (T, K).
        after: losses of the same batches after it, (T, K).
        lr: learning rate of Adam for w.
        weight_decay: of Adam, γ in the paper.
    """
    w = torch.zeros(before.shape[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=lr, weight_decay=weight_decay)
    weights = []
    for old, new in zip(before.double(), after.double(), strict=True):
        z = torch.softmax(w, 0)
        weights.append(z.detach().clone())
        delta = old.log() - new.log()
        (w.grad,) = torch.autograd.grad(z, w, grad_outputs=delta)
        adam.step()
    return torch.stack(weights)


def gls(losses: Tensor) -> Tensor:
    """Weights of the gradients of the *log* losses that give the gradient of the losses' geometric mean.

    Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR workshops 2019: L = (Π Lᵢ)^(1/K). ∂L/∂log Lᵢ = L/K, the same for all.

    Args:
        losses: (..., K), positive.
    """
    values = losses.double()
    mean = values.log().mean(-1, keepdim=True).exp()
    return (mean / values.shape[-1]).expand_as(values)


def stch(losses: Tensor, warmup: int, *, mu: float = 1.0) -> Tensor:
    """Weights of the gradients of the *log* losses from the smooth maximum of their ratios to a nadir point.

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, in the form of the
    authors' multi-task code: K μ log Σ exp(log(Lᵢ/nadirᵢ)/μ), the nadir point being the mean losses of the first steps;
    in those the step is that of Σ log Lᵢ, weights 1. Autograd differentiates the total in log Lᵢ. (The code waits some
    epochs, averages over the one that follows, and adds 1e-20 to every ratio; here all first steps count, and nothing
    is added.)

    Args:
        losses: (T, K), positive.
        warmup: number of first steps.
        mu: smoothing; the weights sum to K at any.
    """
    k = losses.shape[1]
    weights = []
    for step, values in enumerate(losses.double()):
        if step < warmup:
            weights.append(torch.ones(k, dtype=torch.float64))
            continue
        nadir = losses[:warmup].double().mean(0)
        logs = values.log().detach().requires_grad_()
        total = mu * torch.logsumexp((logs - nadir.log()) / mu, 0) * k
        weights.extend(torch.autograd.grad(total, logs))
    return torch.stack(weights)


def ema_norms(norms: Tensor, beta: float) -> Tensor:
    """Weights 1/m̂ᵢ, m̂ the exponential moving average of the gradients' lengths with Adam's correction of its bias.

    Kingma & Ba, "Adam", ICLR 2015, section 3: m ← β m + (1−β) ‖g‖ from 0, m̂ = m/(1−βᵗ). So m̂ is a weighted *mean* of
    the lengths up to and with this step, and its weights, in proportion β^(t−s), are written out here.

    Args:
        norms: (T, K), positive.
        beta: decay.
    """
    weights = []
    for t in range(1, len(norms) + 1):
        shares = torch.tensor([beta ** (t - s) for s in range(1, t + 1)], dtype=torch.float64)
        weights.append(1 / ((shares / shares.sum()) @ norms[:t].double()))
    return torch.stack(weights)
