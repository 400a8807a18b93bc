"""The loop for a model with a head: its loss, its batches, and its predictions when the run is over.

Head, Part, tokenizer, model -> trainer_parts -> loop.build_trainer;  model, Part -> outputs_of -> numpy arrays
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig
from pyfinetune.train.encoders import IGNORED, HeadRows, MaskedRows, collator_of
from pyfinetune.train.heads import Head
from pyfinetune.train.loop import RunTrainer


class HeadTrainer(RunTrainer):
    """`RunTrainer` for a model with a head: labels stay outside of the model, and every head's loss is made alike.

    The heads of transformers average each batch by themselves, so that with accumulation a step over uneven batches
    would not be the step over all of their rows; here loss = sum_i loss_i / number of labels in the step.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = False
        self.compute_loss_func = self._head_loss
        self._loss_shifts_labels = False
        self._mask: torch.Tensor | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, which takes the labels out of the inputs and hands them to `_head_loss`."""
        self._mask = inputs["attention_mask"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _head_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        return head_loss(outputs, labels, self._mask, num_items_in_batch, smoothing)


class Epochs(TrainerCallback):
    """Tells rows that are drawn anew for each epoch which one begins.

    Args:
        dataset: has `set_epoch`.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not all of accelerate's loaders pass the epoch on; in a run that goes on it is a fraction.
        self.dataset.set_epoch(int(state.epoch + 1e-6))


def head_loss(
    outputs: Any,
    labels: torch.Tensor,
    attention_mask: torch.Tensor,
    num_items_in_batch: Any = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of a head's outputs: the sum over the labels that count, by their number.

    Args:
        outputs: of the model: `logits` [rows, classes] or [rows, length, classes], or `start_logits` and `end_logits`
            [rows, length].
        labels: int64 [rows], [rows, length] or, of starts and ends, [rows, 2]; -100 does not count.
        attention_mask: [rows, length]; no span starts or ends in the padding.
        num_items_in_batch: labels that count in the whole step, or None for those given here.
        label_smoothing: share of the probability that is spread over all classes.

    Returns:
        The loss, float32 scalar.

    Example:
        >>> outputs = {"logits": torch.zeros(1, 4)}
        >>> round(head_loss(outputs, torch.tensor([2]), torch.ones(1, 3)).item(), 4)
        1.3863
    """
    logits = head_logits(outputs, attention_mask)
    counted = labels.ne(IGNORED)
    total = torch.nn.functional.cross_entropy(
        logits[counted].float(), labels[counted], reduction="sum", label_smoothing=label_smoothing
    )
    count = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return total / count.clamp(min=1)


def trainer_parts(head: Head, rows: Any, tokenizer: Any, model: Any, config: RunConfig) -> dict[str, Any]:
    """What `loop.build_trainer` is given for a model with a head.

    Args:
        head: the head.
        rows: what `reading.prepare_rows` returned.
        tokenizer: the model's.
        model: the model as it will be trained.
        config: the run's configuration.

    Returns:
        `train_rows`, `eval_rows`, `collator`, `kind` and `callbacks`.

    Example:
        >>> build_trainer(model, arguments, **trainer_parts(head, rows, tokenizer, model, config))  # doctest: +SKIP
    """
    if head.kind == "reward":
        from pyfinetune.train.reward_loop import reward_parts

        return reward_parts(rows, tokenizer)
    train, held_out, callbacks = HeadRows(rows.train), HeadRows(rows.held_out), []
    if head.kind == "masked_lm":
        train = MaskedRows(rows.train, tokenizer, config.mlm_probability, config.seed, fixed=False)
        held_out = MaskedRows(rows.held_out, tokenizer, config.mlm_probability, config.seed, fixed=True)
        callbacks.append(Epochs(train))
    return {
        "train_rows": train,
        "eval_rows": held_out,
        "collator": collator_of(head, tokenizer, model),
        "kind": HeadTrainer,
        "callbacks": callbacks,
    }


def arguments_kind(head: Head) -> dict[str, Any]:
    """What makes the Trainer's arguments, where it is not transformers.

    Args:
        head: the head.

    Returns:
        `kind` for `loop.training_arguments`, or nothing.

    Raises:
        UserError: TRL is needed and not installed.

    Example:
        >>> arguments_kind(HEADS["masked_lm"])
        {}
    """
    if head.kind != "reward":
        return {}
    try:
        from pyfinetune.train.reward_loop import reward_arguments
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "trl":
            raise
        raise UserError(
            "head: reward needs trl, which is not installed", fix="pip install 'pyfinetune[sft]'"
        ) from error
    return {"kind": reward_arguments}


@torch.no_grad()
def outputs_of(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collator: Any,
    batch_size: int,
    read: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> list[np.ndarray]:
    """What the model says of each row, without its padding.

    Args:
        model: the trained model.
        rows: what the collator takes.
        collator: what `encoders.collator_of` returned.
        batch_size: rows at once.
        read: from logits, of any shape, to what is kept of them.

    Returns:
        A row's entry of the logits, cut to the row's own length where they have one for each token; of spans
        float32 [2, length].

    Example:
        >>> outputs_of(model, part.rows, collator, 8, lambda logits: logits.argmax(-1))[0]  # doctest: +SKIP
        array(1)
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collator([rows[index] for index in chosen])
        inputs = {k: v.to(device) for k, v in batch.items() if k not in ("num_tokens", "labels")}
        outputs = model(**inputs)
        logits = head_logits(outputs, inputs["attention_mask"])
        kept = read(logits).cpu()
        kept = kept.float().numpy() if kept.is_floating_point() else kept.numpy()
        # Which tokens are the row's own, on whichever side it was filled up.
        masks = inputs["attention_mask"].bool().cpu().numpy()
        for index, values, mask in zip(chosen, kept, masks, strict=True):
            if "start_logits" in outputs:
                values = values[:, mask]
            elif logits.dim() == 3:
                values = values[mask]
            found[index] = values
    model.train(was_training)
    return found


def head_logits(outputs: Any, attention_mask: torch.Tensor) -> torch.Tensor:
    """A head's outputs as one tensor.

    Args:
        outputs: of the model.
        attention_mask: [rows, length].

    Returns:
        The logits; of spans [rows, 2, length], where nothing starts or ends in the padding.

    Example:
        >>> head_logits({"logits": torch.zeros(1, 4)}, torch.ones(1, 3)).shape
        torch.Size([1, 4])
    """
    if "start_logits" not in outputs:
        return outputs["logits"]
    logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
    return logits.masked_fill(attention_mask[:, None] == 0, torch.finfo(logits.dtype).min)
