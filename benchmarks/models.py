"""What is measured on: sets of parameter shapes, and small students to train. Built here, nothing to download."""

from __future__ import annotations

import re
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


def _resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> list[Shape]:
    """ResNet for ImageNet (He et al., 2016), shortcuts of kind B."""

    def conv(i: int, o: int, size: int) -> list[Shape]:
        return [(o, i, size, size), (o,), (o,)]  # and its batch norm

    shapes, channels = conv(3, 64, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                shapes += conv(channels, width, 1) + conv(width, width, 3) + conv(width, out, 1)
            else:
                shapes += conv(channels, width, 3) + conv(width, out, 3)
            if block == 0 and channels != out:
                shapes += conv(channels, out, 1)
            channels = out
    return [*shapes, (1000, channels), (1000,)]


def _transformer(width: int, layers: int) -> list[Shape]:
    norm: list[Shape] = [(width,), (width,)]

    def linear(i: int, o: int) -> list[Shape]:
        return [(o, i), (o,)]

    attention = [*norm, *linear(width, 3 * width), *linear(width, width)]
    return (attention + norm + linear(width, 4 * width) + linear(4 * width, width)) * layers + norm


def _slim(count: int) -> list[Shape]:
    """So many tensors of a deep and slim network: 3 × 3 convolutions of 16 channels, each with its batch norm."""
    block: list[Shape] = [(16, 16, 3, 3), (16,), (16,)]
    return (block * count)[:count]


SETS: dict[str, list[Shape]] = {
    "resnet18": _resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": _resnet((3, 4, 6, 3), bottleneck=True),
    "vit_s16": [(1, 1, 384), (1, 197, 384), (384, 3, 16, 16), (384,), *_transformer(384, 12), (1000, 384), (1000,)],
    "gpt2": [(50257, 768), (1024, 768), *_transformer(768, 12)],  # 124 M parameters; the head is the embedding
    "54": _slim(54),
    "330": _slim(330),
    "1600": [(64,)] * 1600,
    "huge": [(50_000_000,)],
}


def shapes_of(name: str) -> list[Shape]:
    """The shapes of a named set, or of ``COUNTxELEMENTS``.

    Example:
        >>> shapes_of("2x10")
        [(10,), (10,)]
    """
    if name in SETS:
        return SETS[name]
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    if match is None:
        raise ValueError(f"set {name!r}: expected one of {', '.join(SETS)}, or COUNTxELEMENTS such as 100x5000")
    return [(int(match[2]),)] * int(match[1])


# ---------------------------------------------------------------- students, for 32 × 32 images and 10 classes


def mlp() -> nn.Module:
    """1,210 parameters, as in the demo: almost no work per operation."""
    return nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 64, 5), nn.Tanh(), nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 10)
    )


def conv() -> nn.Module:
    """Nine convolutions with batch norm, 1.25 M parameters."""

    def block(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    widths = [(3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2),
              (256, 256, 1), (256, 32, 1)]  # fmt: skip
    return nn.Sequential(*(m for w in widths for m in block(*w)), nn.Flatten(), nn.Linear(32 * 16, 10))


class Block(nn.Module):
    """Pre-norm layer of an encoder, of modules that can be hooked (torch's own attention calls none)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.norm = nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.feed_forward(x)
        return y


class Transformer(nn.Module):
    """Pre-norm encoder on 64 patches of 4 × 4 pixels."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.patches(x).flatten(2).mT).mean(1))
        return logits


def transformer() -> nn.Module:
    """Six layers of width 192, 2.7 M parameters."""
    return Transformer(192, 6)


def vit() -> nn.Module:
    """Six layers of width 384, 10.7 M parameters."""
    return Transformer(384, 6)


def wide() -> nn.Module:
    """Five linear layers of width 1024, 7.4 M parameters."""
    widths = [3 * 1024, *[1024] * 5]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, 10))


def deep() -> nn.Module:
    """110 slim convolutions with batch norm, 329 tensors and 0.26 M parameters: many small operations."""

    def block(i: int, o: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    body = [m for _ in range(108) for m in block(16, 16)]
    return nn.Sequential(*block(3, 16, 4), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


STUDENTS = {"mlp": mlp, "wide": wide, "conv": conv, "deep": deep, "transformer": transformer, "vit": vit}


def losses_of(logits: Tensor, k: int) -> list[Tensor]:
    """K losses of the logits whose gradients differ."""
    log_p = logits.log_softmax(1)
    return [-log_p[:, i % log_p.shape[1]].mean() + (0.01 * i) * logits.square().mean() for i in range(k)]
