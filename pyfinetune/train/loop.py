"""The loop: `transformers.Trainer` with this package's defaults, an exact held-out loss, and a clean way to stop.

`RunConfig` -> `training_arguments`; model, rows and arguments -> `build_trainer` -> `RunTrainer`. The optimizer, the
schedule, the accumulation and the checkpoints are the Trainer's own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig
from pyfinetune.train.packing import IGNORED, RowDataset, collate, is_flat

_MOST_STEPS_BETWEEN = 500  # between checkpoints of a long run


class RunTrainer(Trainer):
    """`transformers.Trainer` that counts the tokens it trains on and weighs held-out batches by their targets.

    The Trainer's own held-out loss is the mean over batches of each batch's mean, so that a token in a short answer
    counts for more than one in a long answer; here it is the mean over tokens: sum_t loss_t / number of targets.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokens_seen = 0
        if not self.model_accepts_loss_kwargs:  # a model that averages each batch by itself, whatever the accumulation
            self.compute_loss_func = _token_weighted_loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Batches of one optimizer step, with their token counts taken off."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # The other processes' batches are as large on average; asking each of them would stall every step.
        self.tokens_seen += sum(batch.pop("num_tokens") for batch in batches) * self.args.world_size
        return batches, num_items

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Loss of one held-out batch, added to the running sum by its number of targets."""
        inputs = {name: value for name, value in inputs.items() if name != "num_tokens"}
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if result[0] is not None:
            # Over several processes the loss is scaled by their number and divided by all their targets, so the mean
            # over processes times all targets is the sum.
            targets = self._get_num_items_in_batch([inputs], self.args.device)
            if targets is None:
                targets = inputs["labels"][..., 1:].ne(IGNORED).sum()
            loss = self.accelerator.reduce(result[0].detach().double(), reduction="mean")
            self._loss_sum += loss * targets
            self._targets += targets
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Held-out metrics, with the loss a mean over tokens, and its perplexity."""
        self._loss_sum, self._targets = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        # A data loader draws a seed when it starts. Giving it back keeps evaluation out of the training's randomness:
        # however often a run is evaluated, or stopped and continued, it ends at the same weights.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_loss" in output.metrics:
            loss = float(self._loss_sum / self._targets)
            output.metrics[f"{metric_key_prefix}_loss"] = loss
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
        return output


def training_arguments(
    config: RunConfig, *, train_rows: int, held_out: bool, bf16: bool = False, from_start: bool = True
) -> TrainingArguments:
    """The Trainer's arguments: this package's defaults, overridden by the section `trainer:`.

    Args:
        config: the run's configuration.
        train_rows: rows in the training set, from which the spacing of checkpoints follows.
        held_out: whether there are rows to evaluate on.
        bf16: compute in bfloat16 over float32 weights (full fine-tuning on a GPU).
        from_start: evaluate before the first step, to have something to compare with.

    Returns:
        The arguments. A checkpoint and an evaluation fall due ten times a run, and at least every 500 steps.

    Raises:
        UserError: transformers refuses a value.

    Example:
        >>> training_arguments(config, train_rows=1000, held_out=True).save_steps  # doctest: +SKIP
        38
    """
    given = dict(config.trainer)
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "use_cpu": config.device == "cpu",
        "learning_rate": 2e-5 if config.method == "full" else 2e-4,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # a loss that is not a number is shown and stops the run
        "logging_first_step": True,
        "save_total_limit": 3,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": config.early_stopping_patience is not None,
        "dataloader_pin_memory": torch.cuda.is_available() and config.device != "cpu",
        "bf16": bf16,
    }
    if config.early_stopping_patience is not None:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if given.get("fp16"):
        values.pop("bf16")
    values |= given
    try:
        plan = {name: value for name, value in values.items() if name != "load_best_model_at_end"}
        steps = total_steps(TrainingArguments(**plan), train_rows)
        spacing = max(1, min(_MOST_STEPS_BETWEEN, math.ceil(steps / 10)))
        eval_steps = config.eval_steps or spacing
        save_steps = config.save_steps or (eval_steps if config.early_stopping_patience else spacing)
        values = {
            "save_strategy": "steps",
            "save_steps": save_steps,
            "logging_steps": max(1, min(10, steps // 50)),
            "eval_strategy": "steps" if held_out else "no",
            **({"eval_steps": eval_steps, "eval_on_start": from_start} if held_out else {}),
            **values,
        }
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"trainer: transformers refuses these arguments: {' '.join(str(error).split())}",
            fix="correct that value in the section trainer:",
        ) from error
    if arguments.n_gpu > 1:
        # One process drives one GPU; several go through torchrun, where each process sees world_size > 1.
        arguments._n_gpu = 1
    return arguments


def total_steps(arguments: TrainingArguments, train_rows: int) -> int:
    """Optimizer steps of a run.

    Args:
        arguments: the Trainer's arguments.
        train_rows: rows in the training set.

    Returns:
        Steps over all epochs, or `max_steps` where it is set.

    Example:
        >>> total_steps(TrainingArguments("out", max_steps=7), 100)  # doctest: +SKIP
        7
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(train_rows / (arguments.per_device_train_batch_size * arguments.world_size))
    an_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return max(1, math.ceil(arguments.num_train_epochs * an_epoch))


def build_trainer(
    model: Any,
    arguments: TrainingArguments,
    train_rows: list,
    eval_rows: list | None = None,
    *,
    tokenizer: Any,
    max_length: int,
    early_stopping_patience: int | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> RunTrainer:
    """Put model, rows and arguments together.

    Args:
        model: the model as it will be trained.
        arguments: what `training_arguments` returned.
        train_rows: rows of documents (`packing.pack` or `packing.one_a_row`).
        eval_rows: held-out rows, or None.
        tokenizer: saved beside every checkpoint; its end token fills rows up where it has no padding token.
        max_length: no row is filled up beyond it.
        early_stopping_patience: evaluations without a better held-out loss before the run stops; None never stops.
        callbacks: more callbacks.

    Returns:
        The trainer, ready for `.train()`.

    Example:
        >>> build_trainer(model, arguments, rows, tokenizer=tokenizer, max_length=512).train()  # doctest: +SKIP
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    flat = is_flat(getattr(model.config, "_attn_implementation", None))
    if early_stopping_patience is not None:
        callbacks = [EarlyStoppingCallback(early_stopping_patience), *(callbacks or [])]
    if getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing:
        # The embedding is frozen, and a checkpointed layer whose input needs no gradient passes none back.
        model.enable_input_require_grads()
    trainer = RunTrainer(
        model=model,
        args=arguments,
        train_dataset=RowDataset(train_rows),
        eval_dataset=RowDataset(eval_rows) if eval_rows else None,
        data_collator=partial(collate, pad_token_id=pad, max_length=max_length, flat=flat),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _token_weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
