"""One training stage of the demo, made of the steps of `pyfinetune.train`, with as many steps as the time allows.

configuration -> read_data -> prepare_rows -> prepare_model -> (time a step) -> build_trainer -> train
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console

    from pyfinetune.train.config import RunConfig

_MOST_EPOCHS = 30  # beyond that a small data set is only learned by heart
_EVALUATIONS = 0.15  # share of a stage's time for the held-out loss, before and after


@dataclass
class Stage:
    """A stage with everything prepared, before its first step.

    Args:
        config: what it runs as.
        data: `run.Data`.
        rows: `run.Rows`; the held-out rows may be fewer than there are, so that they fit the time.
        tokenizer, model: as `pyfinetune.train` loaded them.
        report: what `pf.patch` swapped.
        bf16: whether float32 weights compute in bfloat16.
        optimizer: makes the optimizer of a model; None leaves it to the trainer.
    """

    config: RunConfig
    data: Any
    rows: Any
    tokenizer: Any
    model: Any
    report: Any
    bf16: bool = False
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None


@dataclass
class Outcome:
    """What a stage came to.

    Args:
        steps: optimizer steps.
        epochs: how often each row was seen.
        tokens: tokens trained on.
        tokens_per_second: while training, without evaluations.
        loss_before, loss: held-out loss per token before the first step and after the last.
        seconds: all told.
    """

    steps: int
    epochs: float
    tokens: int
    tokens_per_second: float
    loss_before: float
    loss: float
    seconds: float

    @property
    def perplexity_before(self) -> float:
        """exp of `loss_before`."""
        return math.exp(min(self.loss_before, 700.0))

    @property
    def perplexity(self) -> float:
        """exp of `loss`."""
        return math.exp(min(self.loss, 700.0))


def prepare(values: dict[str, Any], *, bf16: bool = False, optimizer: Any = None) -> Stage:
    """Load what a stage needs.

    Args:
        values: keys and values of a run's configuration.
        bf16: compute in bfloat16 over float32 weights.
        optimizer: makes the optimizer of a model; None leaves it to the trainer.

    Returns:
        The stage.

    Raises:
        UserError: data or model are at fault; names it and the mend.

    Example:
        >>> stage = prepare({"model_name_or_path": "m", "train_file": "a.jsonl", "output_dir": "o"})  # doctest: +SKIP
    """
    from pyfinetune.train import run
    from pyfinetune.train.config import parse_config
    from pyfinetune.train.data.tokenizing import load_tokenizer
    from pyfinetune.train.model import choose_device

    config = parse_config(values, source="demo")
    data = run.read_data(config)
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template, config.eos_token, data.format)
    rows = run.prepare_rows(data, tokenizer, config)
    model, report = run.prepare_model(config, choose_device(config.device))
    return Stage(config, data, rows, tokenizer, model, report, bf16, optimizer)


def step_seconds(stage: Stage, batch_rows: int) -> float:
    """Time a step on one batch; neither weights nor random state change.

    An optimizer of the stage's own is timed with it, on a copy of the model; the trainer's takes next to nothing.

    Args:
        stage: what `prepare` returned.
        batch_rows: rows in a batch.

    Returns:
        Seconds: the median of a few passes, so that a busy machine is planned for as it is.

    Example:
        >>> step_seconds(stage, 4)  # doctest: +SKIP
        0.31
    """
    from pyfinetune.train.data.packing import collate

    model, device = stage.model, next(stage.model.parameters()).device
    optimizer = None
    if stage.optimizer is not None:
        model = copy.deepcopy(model)
        optimizer = stage.optimizer(model)
    batch = collate(stage.rows.train[:batch_rows], 0, stage.config.max_length)
    inputs = {name: value.to(device) for name, value in batch.items() if name != "num_tokens"}
    times = []
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        for _ in range(6):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=stage.bf16):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return statistics.median(times[1:])


def plan_steps(stage: Stage, seconds: float, batch_rows: int) -> int:
    """How many steps fit, and no more held-out rows than can be evaluated on the side.

    Args:
        stage: what `prepare` returned; its held-out rows are cut where there are too many.
        seconds: what the stage may take.
        batch_rows: rows in a batch.

    Returns:
        Steps: at least 10, and at most 30 times through the rows.

    Example:
        >>> plan_steps(stage, 90, 4)  # doctest: +SKIP
        260
    """
    step = step_seconds(stage, batch_rows)
    # A forward pass is a third of a step, and there are two evaluations.
    affordable = max(batch_rows, int(_EVALUATIONS * seconds / 2 / (step / 3) * batch_rows))
    stage.rows.held_out = stage.rows.held_out[:affordable]
    evaluations = 2 * len(stage.rows.held_out) / batch_rows * step / 3
    most = math.ceil(_MOST_EPOCHS * len(stage.rows.train) / batch_rows)
    return max(10, min(most, int((seconds - evaluations) / (1.05 * step))))  # the optimizer takes its share


def train(stage: Stage, steps: int, console: Console) -> Outcome:
    """Train a stage, with its held-out loss before and after.

    Args:
        stage: what `prepare` returned; its model is trained in place.
        steps: optimizer steps.
        console: where the bar is drawn.

    Returns:
        What it came to.

    Example:
        >>> train(stage, 260, Console()).loss  # doctest: +SKIP
        3.1
    """
    from pyfinetune.train.callbacks import ProgressBar, RunMetrics

    bar = ProgressBar(console)
    metrics = RunMetrics(Path(stage.config.output_dir) / "metrics.jsonl")
    metrics.keep_until(-1)
    start = time.perf_counter()
    trainer = build(stage, {"max_steps": steps, "logging_steps": max(1, steps // 8)}, [metrics, bar], held_out=True)
    metrics.trainer = trainer
    try:
        trainer.train()
    finally:
        bar.close()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return Outcome(
        steps=steps,
        epochs=trainer.state.epoch,
        tokens=trainer.tokens_seen,
        tokens_per_second=metrics.session_rate,
        loss_before=losses[0],
        loss=losses[-1],
        seconds=time.perf_counter() - start,
    )


def build(stage: Stage, arguments: dict[str, Any], callbacks: list, *, held_out: bool, model: Any = None) -> Any:
    """The trainer of a stage.

    Args:
        stage: what `prepare` returned.
        arguments: added to the section `trainer:` of the stage's configuration.
        callbacks: of the trainer.
        held_out: evaluate before the first step and after the last.
        model: another model than the stage's.

    Returns:
        A `loop.RunTrainer`; its model keeps the forward that it had.

    Example:
        >>> build(stage, {"max_steps": 5}, [], held_out=False).train()  # doctest: +SKIP
    """
    from pyfinetune.train.loop import build_trainer, training_arguments

    config = stage.config.model_copy(
        update={
            "trainer": {**stage.config.trainer, "save_strategy": "no", **arguments},
            "eval_steps": arguments["max_steps"] if held_out else None,
        }
    )
    trainer = build_trainer(
        stage.model if model is None else model,
        training_arguments(config, train_rows=len(stage.rows.train), held_out=held_out, bf16=stage.bf16),
        stage.rows.train,
        stage.rows.held_out if held_out else None,
        tokenizer=stage.tokenizer,
        max_length=config.max_length,
        callbacks=callbacks,
    )
    if stage.optimizer is not None:
        trainer.optimizer = stage.optimizer(trainer.model)
    return trainer
