"""A whole training step with K losses, relative to forward + K separate backward passes + SGD step in the same run.

    python -m benchmarks.step --losses 2 4 8

Every contender is timed in turn in every round, so that whatever else the machine does falls on all alike; the table
has the median of the rounds' ratios and their quartiles. Peers are timed where they are installed (extra ``bench``).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD

Step = Callable[[], object]


def conv_net(classes: int = 10) -> nn.Sequential:
    """Nine convolutions with batch norm, 1.25 M parameters, for 32 × 32 images."""

    def block(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    widths = [(3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2),
              (256, 256, 1), (256, 32, 1)]  # fmt: skip
    return nn.Sequential(*(m for w in widths for m in block(*w)), nn.Flatten(), nn.Linear(32 * 16, classes))


def losses_of(logits: Tensor, k: int) -> list[Tensor]:
    """K losses of the logits whose gradients differ."""
    log_p = logits.log_softmax(1)
    return [-log_p[:, i % log_p.shape[1]].mean() + (0.01 * i) * logits.square().mean() for i in range(k)]


def contenders(k: int, batch: int, device: str, dtype: torch.dtype) -> dict[str, Step]:
    x = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype)

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return conv_net().to(device, dtype)

    def plain(total: bool, make: Any = torch.optim.SGD, **options: Any) -> Step:
        net = model()
        optimizer = make(net.parameters(), lr=1e-3, **options)

        def step() -> None:
            optimizer.zero_grad()
            losses = losses_of(net(x), k)
            if total:
                torch.stack(losses).sum().backward()
            else:
                for i, loss in enumerate(losses):
                    loss.backward(retain_graph=i < k - 1)
            optimizer.step()

        return step

    def ours(make: Any, through: bool = False, two_phases: bool = False, **options: Any) -> Step:
        net = model()
        optimizer = make(net.parameters(), lr=1e-3, losses=k, **options)

        def step() -> None:
            optimizer.zero_grad()
            logits = net(x)
            if two_phases:
                optimizer.backward(losses_of(logits, k))
                optimizer.step()
            else:
                optimizer.step(losses_of(logits, k), through=logits if through else None)

        return step

    heavy: dict[str, Any] = {"momentum": 0.9}
    steps = {
        "forward, K backward passes, SGD": plain(False, **heavy),
        "summed loss, SGD": plain(True, **heavy),
        "DOTSGD": ours(DOTSGD, **heavy),
        "DOTSGD, fused": ours(DOTSGD, fused=True, **heavy),
        "DOTAdamW": ours(DOTAdamW),
        "MoKDSGD": ours(MoKDSGD, **heavy),
        "MoKDSGD, backward then step": ours(MoKDSGD, two_phases=True, **heavy),
        "MoKDAdamW": ours(MoKDAdamW),
        "MoKDSGD, through=logits": ours(MoKDSGD, through=True, **heavy),
        "MoKDSGD, every=4 (mean of 4)": ours(MoKDSGD, every=4, **heavy),
    }
    return steps | peers(k, x, model)


def peers(k: int, x: Tensor, model: Callable[[], nn.Sequential]) -> dict[str, Step]:
    found: dict[str, Step] = {}
    try:
        from torchjd.aggregation import MGDA, UPGrad
        from torchjd.autojac import backward, jac_to_grad
    except ImportError:
        pass
    else:

        def torchjd(aggregator: Any, chunk: int | None) -> Step:
            net = model()
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
            params = list(net.parameters())

            def step() -> None:
                optimizer.zero_grad()
                backward(losses_of(net(x), k), parallel_chunk_size=chunk)
                jac_to_grad(params, aggregator)
                optimizer.step()

            return step

        found["TorchJD MGDA, SGD"] = torchjd(MGDA(), None)
        found["TorchJD MGDA, chunk 1, SGD"] = torchjd(MGDA(), 1)
        found["TorchJD UPGrad, chunk 1, SGD"] = torchjd(UPGrad(), 1)
    try:
        from pytorch_optimizer import PCGrad
    except ImportError:
        pass
    else:
        net = model()
        pcgrad = PCGrad(torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9))

        def step() -> None:
            pcgrad.zero_grad()
            pcgrad.pc_backward(losses_of(net(x), k))
            pcgrad.step()

        found["pytorch_optimizer PCGrad, SGD"] = step
    return found


def seconds(step: Step, device: str, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / times


def measure(k: int, batch: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    steps = contenders(k, batch, device, dtype)
    reference = next(iter(steps))
    for step in steps.values():
        seconds(step, device, 4)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, device, 4))
    rows = []
    for name, times in taken.items():
        ratios = [t / r for t, r in zip(times, taken[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({"losses": k, "contender": name, "ratio": middle, "quartiles": [low, high],
                     "milliseconds": 1e3 * statistics.median(times)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 4, 8], help="numbers of losses K")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, of 4 steps of each contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for k in options.losses:
        rows += measure(k, options.batch, options.device, getattr(torch, options.dtype), options.rounds)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    print("| step, relative to the first row | " + " | ".join(f"K = {k}" for k in options.losses) + " |")
    print("|---|" + "---|" * len(options.losses))
    for name in names:
        cells = [f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f}–{r['quartiles'][1]:.2f})" for r in rows
                 if r["contender"] == name]  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                 "threads": torch.get_num_threads(), "device": options.device, "dtype": options.dtype}  # fmt: skip
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
