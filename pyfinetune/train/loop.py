"""The loop: `transformers.Trainer` with this package's defaults, an exact held-out loss, and a clean way to stop.

`RunConfig` -> `training_arguments`; model, rows and arguments -> `build_trainer` -> `RunTrainer`. The optimizer, the
schedule, the accumulation and the checkpoints are the Trainer's own.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerState

from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.train import checkpoints
from pyfinetune.train.config import RunConfig
from pyfinetune.train.methods import before_training, has_virtual_tokens
from pyfinetune.train.packing import IGNORED, RowDataset, collate, is_flat
from pyfinetune.train.processes import batch_of, fill_up, share_on_cpu
from pyfinetune.train.schedules import layerwise_groups

_MOST_STEPS_BETWEEN = 500  # between checkpoints of a long run


class RunTrainer(Trainer):
    """`transformers.Trainer` that counts its tokens, weighs held-out batches by their targets, and saves whole or not.

    The Trainer's own held-out loss is the mean over batches of each batch's mean, so that a token in a short answer
    counts for more than one in a long answer; here it is the mean over tokens: sum_t loss_t / number of targets.

    Its own checkpoints are written in place; here they are written into a folder aside, which `checkpoints` seals and
    renames.
    """

    has_perplexity = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._tokens: int | torch.Tensor = 0
        self._loss_of_all: float | None = None  # while a checkpoint is being written
        self._run_dir: str | None = None  # where a checkpoint is being written, while it is
        self._to_push: str | None = None
        self.layerwise_lr_decay: float | None = None
        if not self.model_accepts_loss_kwargs:  # a model that averages each batch by itself, whatever the accumulation
            self.compute_loss_func = _token_weighted_loss

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own; where FSDP is asked for, it is there on the CPU too, which accelerate passes over."""
        super().create_accelerator_and_postprocess()
        share_on_cpu(self)

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far in all processes, without padding."""
        return int(self._tokens)

    @tokens_seen.setter
    def tokens_seen(self, tokens: int) -> None:
        self._tokens = tokens

    @property
    def loss_so_far(self) -> float:
        """Sum of the losses since the last record."""
        return float(self._tr_loss) if self._loss_of_all is None else self._loss_of_all

    def get_train_dataloader(self) -> Any:
        """The Trainer's own, its batches filled up with empty rows where several processes share them."""
        loader = super().get_train_dataloader()
        return (
            fill_up(loader, len(self.train_dataset), self.args.world_size)
            if getattr(self.train_dataset, "has_filler", False)
            else loader
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Likewise: no held-out row counts twice."""
        loader = super().get_eval_dataloader(eval_dataset)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return fill_up(loader, len(rows), self.args.world_size) if getattr(rows, "has_filler", False) else loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, its groups split by depth where the learning rate falls with it."""
        anew = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if anew and self.layerwise_lr_decay is not None:
            optimizer.param_groups[:] = layerwise_groups(self.model, optimizer.param_groups, self.layerwise_lr_decay)
        return optimizer

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """At the very start, of the base model."""
        with before_training(self.model) if self.state.global_step == 0 else contextlib.nullcontext():
            return super()._evaluate(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Batches of one optimizer step, with their token counts taken off."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch.pop("num_tokens") for batch in batches)
        if self.args.world_size > 1:  # summed where the batches are; it is waited for when a record is made
            tokens = self.accelerator.reduce(torch.tensor(tokens, device=device), reduction="sum")
        self._tokens = self._tokens + tokens
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
                targets = self._targets_in(inputs)
            loss = self.accelerator.reduce(result[0].detach().double(), reduction="mean")
            self._loss_sum += loss * targets
            self._targets += targets
        return result

    def _targets_in(self, inputs: dict[str, Any]) -> Any:
        """How many targets the loss of a batch is a mean over, where the Trainer does not count them."""
        return inputs["labels"][..., 1:].ne(IGNORED).sum()

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
            if self.has_perplexity:
                output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
        return output

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Every weight in one piece, on the first process, where they are spread over all; every process has to ask.

        Returns:
            Name to tensor; None where the model holds them itself.
        """
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return self._run_dir or super()._get_output_dir(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._run_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:  # the upload goes on in the background, and this folder is about to be renamed
            self._to_push = checkpoint_folder

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint aside, every process its part; then one process seals it and gives it its name."""
        out = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staged, final = out / checkpoints.SAVING / name, out / name
        if self.args.should_save:
            checkpoints.clear_leftovers(out)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(staged.parent)
        if self.args.world_size > 1:
            self._loss_of_all = float(self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean"))
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
                checkpoints.seal(staged, self.state.global_step)
                checkpoints.sync_files(out)  # the records up to here are on the disk before the checkpoint is
                checkpoints.publish(staged, final)
        except OSError as error:
            raise PyfinetuneError(
                f"{final} could not be written: {error.strerror or error}. The checkpoints before it are whole: make"
                " room, and run the same command to go on from the newest"
            ) from error
        finally:
            self._run_dir = self._loss_of_all = None
        if self.args.should_save:
            checkpoints.rotate(out, self.args.save_total_limit, final, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self._to_push is not None:
            self._to_push = None
            super()._push_from_checkpoint(str(final))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        flaw = checkpoints.find_flaw(best)
        if flaw is not None:
            raise PyfinetuneError(
                f"{best}, which has the best held-out loss, is damaged: {flaw}. Delete that folder, and the same"
                " command takes the weights of the last checkpoint instead"
            )
        super()._load_best_model()

    def finish_from(self, checkpoint: Path) -> None:
        """Take over the weights and the records of a run that had nothing left to train when it was killed.

        Args:
            checkpoint: its last checkpoint. `train` would take one step more from it.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.tokens_seen = _saved_attributes(self.state.stateful_callbacks, "SumsSoFar").get("tokens", 0)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()


class SumsSoFar(TrainerCallback, ExportableState):
    """Carries the sums since the last record, and the tokens, over into a resumed run: its next record is the same."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        sums: dict[str, Any] = {"tokens": self.trainer.tokens_seen}
        if hasattr(self.trainer, "_tr_loss"):
            sums |= {"loss": self.trainer.loss_so_far, "last_logged": self.trainer._globalstep_last_logged}
        return {"args": {}, "attributes": sums}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        sums = _saved_attributes(state.stateful_callbacks, "SumsSoFar")
        self.trainer.tokens_seen = sums.get("tokens", 0)
        if "loss" in sums and hasattr(self.trainer, "_tr_loss"):
            self.trainer._tr_loss += sums["loss"]
            self.trainer._globalstep_last_logged = sums["last_logged"]
            self.trainer._total_loss_scalar -= sums["loss"]  # the mean of this session leaves it out


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that goes on counting where the checkpoint's count stood."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = _evaluations_without_gain(state.stateful_callbacks)


def nothing_left(checkpoint: Path, steps: int, early_stopping_patience: int | None = None) -> bool:
    """Whether a run that was killed had trained all it was to train.

    Args:
        checkpoint: its last whole checkpoint.
        steps: optimizer steps of the whole run.
        early_stopping_patience: evaluations without a better held-out loss before it stops, or None.

    Returns:
        True when it only has to be saved.

    Example:
        >>> nothing_left(Path("out/checkpoint-40"), 40)  # doctest: +SKIP
        True
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] >= steps:
        return True
    count = _evaluations_without_gain(state["stateful_callbacks"])
    return early_stopping_patience is not None and count >= early_stopping_patience


def _evaluations_without_gain(saved: dict[str, Any]) -> int:
    return _saved_attributes(saved, "EarlyStopping").get("early_stopping_patience_counter", 0)


def _saved_attributes(saved: dict[str, Any], name: str) -> dict[str, Any]:
    return saved.get(name, {}).get("attributes", {})


def training_arguments(
    config: RunConfig,
    *,
    train_rows: int,
    held_out: bool,
    bf16: bool = False,
    from_start: bool = True,
    kind: Callable[..., TrainingArguments] = TrainingArguments,
) -> TrainingArguments:
    """The Trainer's arguments: this package's defaults, overridden by the section `trainer:`.

    Args:
        config: the run's configuration.
        train_rows: rows in the training set, from which the spacing of checkpoints follows.
        held_out: whether there are rows to evaluate on.
        bf16: compute in bfloat16 over float32 weights (full fine-tuning on a GPU).
        from_start: evaluate before the first step, to have something to compare with.
        kind: makes them of names and values.

    Returns:
        The arguments. A checkpoint and an evaluation fall due ten times a run, and at least every 500 steps.

    Raises:
        UserError: transformers refuses a value.

    Example:
        >>> training_arguments(config, train_rows=1000, held_out=True).save_steps  # doctest: +SKIP
        38
    """
    given, batch = dict(config.trainer), batch_of(config)
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        # Without a GPU it has to be said: several processes would else not know of each other.
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "learning_rate": 2e-5 if config.method == "full" else 2e-4,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # a loss that is not a number is shown and stops the run
        "logging_first_step": True,
        "gradient_accumulation_steps": batch.accumulation,
        "per_device_train_batch_size": batch.per_device,
        "save_total_limit": 3,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available() and config.device != "cpu",
        "bf16": bf16,
    }
    if config.freeze is not None:
        # A weight that is frozen for now has no gradient, for which the other processes would wait.
        values["ddp_find_unused_parameters"] = True
    if config.early_stopping_patience is not None:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if given.get("fp16"):
        values.pop("bf16")
    values |= given | {"restore_callback_states_from_checkpoint": False}  # ours restore themselves
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
        arguments = kind(**values)
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
    layerwise_lr_decay: float | None = None,
    callbacks: list[TrainerCallback] | None = None,
    collator: Any = None,
    kind: type[RunTrainer] = RunTrainer,
) -> RunTrainer:
    """Put model, rows and arguments together.

    Args:
        model: the model as it will be trained.
        arguments: what `training_arguments` returned.
        train_rows: rows of documents (`packing.pack` or `packing.one_a_row`), or what `collator` takes.
        eval_rows: held-out rows, or None.
        tokenizer: saved beside every checkpoint; its end token fills rows up where it has no padding token.
        max_length: no row is filled up beyond it.
        early_stopping_patience: evaluations without a better held-out loss before the run stops; None never stops.
        layerwise_lr_decay: what a block's learning rate is of the next one's; None for equal rates.
        callbacks: more callbacks.
        collator: makes batches of rows that are no documents; see `head_loop`.
        kind: the trainer's class.

    Returns:
        The trainer, ready for `.train()`.

    Example:
        >>> build_trainer(model, arguments, rows, tokenizer=tokenizer, max_length=512).train()  # doctest: +SKIP
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    virtual = has_virtual_tokens(model)
    flat = not virtual and is_flat(getattr(model.config, "_attn_implementation", None))
    if early_stopping_patience is not None:
        callbacks = [EarlyStopping(early_stopping_patience), *(callbacks or [])]
    if getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing:
        # The embedding is frozen, and a checkpointed layer whose input needs no gradient passes none back.
        model.enable_input_require_grads()
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=_dataset(train_rows),
        eval_dataset=_dataset(eval_rows) if eval_rows else None,
        data_collator=collator
        or partial(collate, pad_token_id=pad, max_length=max_length, flat=flat, positions=not virtual),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.layerwise_lr_decay = layerwise_lr_decay
    trainer.remove_callback(PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, SumsSoFar(trainer))  # the others read what it restores
    return trainer


def _dataset(rows: Any) -> torch.utils.data.Dataset:
    return RowDataset(rows) if isinstance(rows, list) else rows


def _token_weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
