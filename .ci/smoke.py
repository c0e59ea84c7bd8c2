"""What the wheel has to do where torch is and nothing else: python -I -W error smoke.py."""

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import torch

import distill_optim
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD

assert Path(distill_optim.__file__).is_relative_to(sys.prefix), f"not what was installed: {distill_optim.__file__}"
assert metadata.version("distill_optim") == distill_optim.__version__
assert resources.files("distill_optim").joinpath("py.typed").is_file()

torch.manual_seed(0)
inputs = torch.randn(8, 4)
for make in (DOTSGD, DOTAdamW, MoKDSGD, MoKDAdamW):
    model = torch.nn.Linear(4, 2)
    optimizer = make(model.parameters(), lr=0.05)
    totals = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(inputs)
        totals.append(sum(optimizer.step([outputs.square().mean(), (outputs - 1).square().mean()])))
    assert totals[0] > totals[1] > totals[2], f"{make.__name__}: {totals}"

for command in ([sys.executable, "-I", "-m", "distill_optim"], [str(Path(sys.executable).with_name("distill-optim"))]):
    subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
