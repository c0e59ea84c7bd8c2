"""A research code's trainer, whose model returns a dict of losses: python docs/integrations/research_trainer.py"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from distill_optim import DOTSGD, joint_loss


def digits():
    inputs, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels))
    return random_split(data, [1200, 597], torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk, self.head = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, inputs):
        features = self.trunk(inputs).relu()
        return self.head(features), features


class Distiller(nn.Module):
    """Student, frozen teacher, and a projector that only one of the losses reaches."""

    def __init__(self, student, teacher, temperature=4.0):
        super().__init__()
        self.student, self.temperature = student, temperature
        self.teacher = teacher.eval().requires_grad_(False)
        torch.manual_seed(2)
        self.projector = nn.Linear(student.trunk.out_features, teacher.trunk.out_features)

    def trainable(self):
        return [*self.student.parameters(), *self.projector.parameters()]

    def forward(self, inputs, labels):
        logits, features = self.student(inputs)
        wanted, hints = self.teacher(inputs)
        ours, theirs = (F.log_softmax(z / self.temperature, dim=1) for z in (logits, wanted))
        return logits, {
            "ce": F.cross_entropy(logits, labels),
            "kd": self.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True),
            "hint": F.mse_loss(self.projector(features), hints),
        }


class Trainer:
    """As such codes have it. Nothing in here knows about distill_optim."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def fit(self, loader, epochs):
        for _ in range(epochs):
            for inputs, labels in loader:
                self.optimizer.zero_grad()
                _, losses = self.model(inputs, labels)
                self.backward(losses)
                self.optimizer.step()

    def backward(self, losses):
        sum(losses.values()).backward()


class OursInIt(Trainer):
    def backward(self, losses):
        joint_loss(losses, self.optimizer).backward()  # was: sum(losses.values()).backward()


def fit_teacher(loader):
    teacher = Network(128, seed=0)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.005)
    for _ in range(10):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs)[0], labels).backward()
            optimizer.step()
    return teacher


def accuracy(model, data):
    ((inputs, labels),) = DataLoader(data, batch_size=len(data))
    with torch.no_grad():
        return (model(inputs)[0].argmax(1) == labels).float().mean().item()


def make_ours(params):
    return DOTSGD(params, lr=0.02, momentum=0.9, losses=("ce", "kd", "hint"))


def main(kind=OursInIt, make_optimizer=make_ours, epochs=8):
    train, held_out = digits()
    loader = DataLoader(train, batch_size=60, shuffle=True, generator=torch.Generator().manual_seed(0))
    teacher = fit_teacher(loader)
    model = Distiller(Network(8, seed=1), teacher)
    optimizer = make_optimizer(model.trainable())
    kind(model, optimizer).fit(loader, epochs)
    stats = getattr(optimizer, "stats", None)
    return {
        "teacher": accuracy(teacher, held_out),
        "student": accuracy(model.student, held_out),
        **(stats.as_dict() if stats else {}),
    }


if __name__ == "__main__":
    print("sum, SGD:", main(Trainer, lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9)))
    print("sum, DOTSGD:", main(Trainer))
    print("joint_loss, DOTSGD:", main())
