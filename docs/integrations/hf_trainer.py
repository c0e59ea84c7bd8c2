"""Distillation of a tiny language model with the Hugging Face Trainer: python docs/integrations/hf_trainer.py

The text is the source of one of Python's own modules, read byte by byte, so there is no tokenizer to download.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from distill_optim import DOTAdamW, joint_loss


def text(length=64, blocks=240):
    """Blocks of bytes: the first five sixths to train on, the rest held out."""
    source = Path(argparse.__file__).read_bytes()[: length * blocks]
    rows = torch.tensor(list(source)).split(length)
    rows = [{"input_ids": row, "labels": row} for row in rows]
    return rows[: blocks * 5 // 6], rows[blocks * 5 // 6 :]


def model(width, seed):
    set_seed(seed)
    shape = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 256}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Distiller(Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        self.model_accepts_loss_kwargs = False  # our losses are means over a micro-batch: the Trainer is to divide them

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        kd = distillation(outputs.logits, self.teacher(inputs["input_ids"]).logits)
        loss = joint_loss([outputs.loss, kd], self.optimizer) if model.training else outputs.loss
        return (loss, outputs) if return_outputs else loss


def distillation(logits, teacher_logits, temperature=2.0):
    ours, theirs = (F.log_softmax(z.flatten(0, 1).float() / temperature, dim=1) for z in (logits, teacher_logits))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def arguments(folder, **options):
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    sizes = {"per_device_train_batch_size": 20, "per_device_eval_batch_size": 40}
    return TrainingArguments(folder, **{**quiet, **sizes, **options})


def fit_teacher(train, folder):
    teacher = model(64, seed=0)
    Trainer(teacher, arguments(folder, num_train_epochs=6, learning_rate=5e-3), train_dataset=train).train()
    return teacher


def main(make_optimizer=lambda params: DOTAdamW(params, lr=5e-3), epochs=5, **options):
    train, held_out = text()
    with tempfile.TemporaryDirectory() as folder:
        teacher = fit_teacher(train, folder)
        student = model(16, seed=1)
        optimizer = make_optimizer(student.parameters())
        options = {"num_train_epochs": epochs, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, **options}
        trainer = Distiller(
            student,
            arguments(folder, **options),
            train_dataset=train,
            eval_dataset=held_out,
            optimizers=(optimizer, None),
            teacher=teacher,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return {"before": before, "after": trainer.evaluate()["eval_loss"], **optimizer.stats.as_dict()}


if __name__ == "__main__":
    print(main())
