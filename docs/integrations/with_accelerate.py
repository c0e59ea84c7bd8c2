"""Distillation on scikit-learn's digits with Accelerate: python docs/integrations/with_accelerate.py"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from distill_optim import DOTSGD, joint_loss


def digits():
    inputs, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels))
    return random_split(data, [1200, 597], torch.Generator().manual_seed(0))


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def losses_of(student, teacher, inputs, labels, temperature=4.0):
    logits = student(inputs)
    ours, theirs = (F.log_softmax(z / temperature, dim=1) for z in (logits, teacher(inputs)))
    ce = F.cross_entropy(logits, labels)
    kd = temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return [ce, kd]


def fit_teacher(loader):
    teacher = network(128, seed=0)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.005)
    for _ in range(10):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs), labels).backward()
            optimizer.step()
    return teacher.eval().requires_grad_(False)


def distil_one_epoch(accelerator, student, teacher, optimizer, loader, clip):
    for inputs, labels in loader:
        with accelerator.accumulate(student):
            ce, kd = losses_of(student, teacher, inputs, labels)
            accelerator.backward(joint_loss([ce, kd], optimizer))  # was: accelerator.backward(ce + kd)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(student.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def accuracy(model, data):
    ((inputs, labels),) = DataLoader(data, batch_size=len(data))
    with torch.no_grad():
        return (model(inputs).argmax(1) == labels).float().mean().item()


def main(make_optimizer=lambda params: DOTSGD(params, lr=0.02, momentum=0.9), epochs=8, clip=1.0, precision="no"):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    train, held_out = digits()
    loader = DataLoader(train, batch_size=60, shuffle=True, generator=torch.Generator().manual_seed(0))
    teacher = fit_teacher(loader)

    student = network(8, seed=1)
    student, optimizer, loader = accelerator.prepare(student, make_optimizer(student.parameters()), loader)
    for _ in range(epochs):
        distil_one_epoch(accelerator, student, teacher, optimizer, loader, clip)
    # Accelerate's wrapper passes on what torch's optimizers have; the rest is on the one inside.
    stats = optimizer.optimizer.stats
    return {"teacher": accuracy(teacher, held_out), "student": accuracy(student, held_out), **stats.as_dict()}


if __name__ == "__main__":
    print(main())
