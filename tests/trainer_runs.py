"""A few optimizer steps of a small model, recorded: what patched and unpatched runs are compared by."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

LENGTH = 24


def rows(count: int = 16, seed: int = 3) -> list[dict[str, list[int]]]:
    """Rows of equal length with padding at the end of some, and from one to all of their tokens as labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, 96, (LENGTH,), generator=generator)
        kept = torch.ones(LENGTH, dtype=torch.int64)
        kept[LENGTH - (i % 3) * 4 :] = 0
        labels = ids.masked_fill(kept == 0, -100)
        labels[: (i * 5) % 11] = -100
        found.append({"input_ids": ids.tolist(), "attention_mask": kept.tolist(), "labels": labels.tolist()})
    return found


def batch_of(part: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows as one batch."""
    return {key: torch.tensor([row[key] for row in part]) for key in part[0]}


def recorder(base: type):
    """A Trainer that keeps its losses and, but for TRL's, which makes none, the logits."""

    class Losses(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.losses, self.logits = [], []

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            self.losses.append(loss.detach().double())
            return loss

    class Recorder(Losses):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.logits.append(getattr(outputs, "logits", None))
            return (loss, outputs) if return_outputs else loss

    return Recorder if base.__module__ != "trl.trainer.sft_trainer" else Losses


def arguments(folder, kind: type | None = None, **options):
    """Settings of a Trainer for a few steps of plain SGD on the CPU, all of its losses kept, nothing written.

    AdamW's first steps turn every gradient into its sign, the zeros of a rounding error included: they say less.
    """
    from transformers import TrainingArguments

    settings = {
        "max_steps": 5,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
    }
    return (kind or TrainingArguments)(str(folder), **{**settings, **options})


def widened(exact: bool):
    """Where the exact run takes place: what asks for float32 gets float64."""
    from pyfinetune.hf.probe import Widened

    return Widened() if exact else contextlib.nullcontext()


def result_of(losses: list[torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """All losses, and every trained parameter as it has become."""
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.stack([loss.detach().double() for loss in losses]), **trained}


def trained(
    model: nn.Module, folder, exact: bool = False, base: type | None = None, callbacks=(), dataset=None, **options
):
    """Train with a `transformers.Trainer`; gives the result and the trainer."""
    from transformers import Trainer

    model, settings = model.double() if exact else model, arguments(folder, **options)
    with widened(exact):
        trainer = recorder(base or Trainer)(model, settings, train_dataset=dataset or rows(), callbacks=list(callbacks))
        trainer.train()
    return result_of(trainer.losses, model), trainer
