"""Distillation on scikit-learn's digits with Lightning: python docs/integrations/with_lightning.py"""

import lightning as L
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


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Classifier(L.LightningModule):
    """The teacher's own training: one loss, nothing to change."""

    def __init__(self, net, make_optimizer):
        super().__init__()
        self.net, self.make_optimizer = net, make_optimizer

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters())


class Distiller(Classifier):
    def __init__(self, net, make_optimizer, teacher):
        super().__init__(net, make_optimizer)
        self.teacher = teacher.eval().requires_grad_(False)

    def losses(self, batch, temperature=4.0):
        inputs, labels = batch
        logits = self.net(inputs)
        ours, theirs = (F.log_softmax(z / temperature, dim=1) for z in (logits, self.teacher(inputs)))
        ce = F.cross_entropy(logits, labels)
        kd = temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return [ce, kd]

    def training_step(self, batch, batch_idx):
        ce, kd = self.losses(batch)
        return joint_loss([ce, kd], self.optimizers())  # was: return ce + kd


class ManualDistiller(Distiller):
    """The same, for those who have taken the loop out of Lightning's hands."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        ce, kd = self.losses(batch)
        optimizer.zero_grad()
        self.manual_backward(joint_loss([ce, kd], optimizer))  # was: self.manual_backward(ce + kd)
        optimizer.step()


def quiet_trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "enable_checkpointing": False, **quiet, **options})


def main(kind=Distiller, make_optimizer=lambda params: DOTSGD(params, lr=0.02, momentum=0.9), epochs=8, **options):
    train, held_out = digits()
    loader = DataLoader(train, batch_size=60, shuffle=True, generator=torch.Generator().manual_seed(0))
    validation = DataLoader(held_out, batch_size=597)

    teacher = Classifier(network(128, seed=0), lambda params: torch.optim.Adam(params, lr=0.005))
    quiet_trainer(max_epochs=10).fit(teacher, loader)

    student = kind(network(8, seed=1), make_optimizer, teacher.net)
    trainer = quiet_trainer(max_epochs=epochs, **options)
    trainer.fit(student, loader)
    (result,) = trainer.validate(student, validation, verbose=False)
    (best,) = trainer.validate(teacher, validation, verbose=False)
    return {"teacher": best["accuracy"], "student": result["accuracy"], **student.optimizers().stats.as_dict()}


if __name__ == "__main__":
    print(main(gradient_clip_val=1.0, accumulate_grad_batches=2))
