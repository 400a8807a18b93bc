"""A whole run, from the configuration to the saved adapter. Every step can be called alone with plain values.

    RunConfig -> read_data -> prepare_rows -> prepare_model -> loop.build_trainer -> train -> output folder

The output folder holds the Trainer's checkpoints as they are, the trained adapter (or model) with its tokenizer,
`run.json` (what went in and what came out) and `metrics.jsonl` (one record a line).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train import card, checkpoints, manifest, preflight, processes, results
from pyfinetune.train.config import RunConfig, config_digest
from pyfinetune.train.head_model import load_with_head, widen_trainable
from pyfinetune.train.head_rows import tokenizer_for
from pyfinetune.train.heads import HEADS, Head, choose_head, may_be_unanswered
from pyfinetune.train.methods import add_method
from pyfinetune.train.model import check_length, choose_device, load_model
from pyfinetune.train.packing import check_isolation, is_flat
from pyfinetune.train.reading import Data, Rows, prepare_rows, read_data
from pyfinetune.train.report import rows_lines


@dataclass
class TrainResult:
    """What came of a run.

    Args:
        output_dir: where everything was saved.
        steps: optimizer steps done in all.
        interrupted: whether it was stopped before its end.
        resumed_from: the checkpoint it went on from, or None.
        train_loss: mean training loss of the steps of this session.
        eval_loss_before: held-out loss before the first step, per token; None when nothing is held out.
        eval_loss: held-out loss of the saved weights.
        perplexity_before: exp of `eval_loss_before`.
        perplexity: exp of `eval_loss`.
        tokens: tokens trained on in all, without padding.
        tokens_per_second: over this session's training, without evaluations and checkpoints.
        peak_memory_gb: GiB.
        seconds: of this session's training, all told.
        metrics: of a model with a head, over the held-out rows: name to `value`, `low`, `high` (95 %) and `rows`.
        floor: what the least clever guess reaches: `what` it is, and name to value.
    """

    output_dir: str
    steps: int = 0
    interrupted: bool = False
    resumed_from: str | None = None
    train_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    perplexity_before: float | None = None
    perplexity: float | None = None
    tokens: int = 0
    tokens_per_second: float = 0.0
    peak_memory_gb: float = 0.0
    seconds: float = 0.0
    metrics: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None


def prepare_model(
    config: RunConfig,
    device: torch.device,
    head: Head = HEADS["causal_lm"],
    labels: Sequence[str] = (),
    pad_token_id: int | None = None,
) -> tuple[Any, Any]:
    """Load a run's model, quantize it, add adapters, and swap the kernels in.

    Args:
        config: the run's configuration.
        device: where the run will be.
        head: the head that is trained.
        labels: names of its classes.
        pad_token_id: what rows are filled up with, which a head has to know.

    Returns:
        The model as it will be trained, and the report of `pf.patch` (None with `patch: false`).

    Raises:
        UserError: there is no such model, it is too short for `max_length`, or it lets packed documents see each other.

    Example:
        >>> model, report = prepare_model(config, torch.device("cpu"))  # doctest: +SKIP
    """
    from transformers import set_seed

    set_seed(config.seed)
    options = {"method": config.method, "dtype": config.dtype, "device": device, "dropout": config.dropout}
    options["attn_implementation"] = config.attn_implementation
    fresh: list[str] = []
    if head.kind == "causal_lm":
        model = load_model(config.model_name_or_path, **options)
    else:
        options |= {"labels": labels, "outputs": head.outputs, "pad_token_id": pad_token_id}
        model, fresh = load_with_head(config.model_name_or_path, head.auto_class, **options)
    check_length(model.config, config.max_length + config.virtual_tokens, config.model_name_or_path)
    model = add_method(model, config, head.task_type, fresh)
    if config.method != "full" and head.kind != "causal_lm":
        widen_trainable(model)
    report = pf.patch(model) if config.patch else None
    if config.packing:
        flat = is_flat(getattr(model.config, "_attn_implementation", None))
        check_isolation(model, model.get_input_embeddings().weight.shape[0], flat)
    return model, report


def find_start(config: RunConfig, data_hash: str, say: Any) -> Path | None:
    """The checkpoint a run goes on from.

    Args:
        config: the run's configuration; `resume` is `auto`, `never` or a path.
        data_hash: digest of the training data, to tell another run from this one.
        say: called with each message for the person at the screen.

    Returns:
        The checkpoint's folder, or None to start from the beginning.

    Raises:
        UserError: the folder holds another run, the named checkpoint cannot be used, or `never` would overwrite one.

    Example:
        >>> find_start(config, "", print)  # doctest: +SKIP
        PosixPath('out/checkpoint-40')
    """
    with processes.first_process_first(choose_device(config.device)):
        if processes.is_first():
            checkpoints.clear_leftovers(Path(config.output_dir))
    existing = checkpoints.list_checkpoints(config.output_dir)
    sharded = processes.shards_weights(config)
    if config.resume not in ("auto", "never"):
        named = checkpoints.check_resume_path(config.resume)
        checkpoints.check_kind(named, sharded)
        return named
    if not existing:
        return None
    if config.resume == "never":
        raise UserError(
            f"output_dir: {config.output_dir} holds checkpoints of an earlier run, and resume is never",
            fix="set another output_dir, delete that folder, or set resume: auto to go on",
        )
    earlier = manifest.read_manifest(Path(config.output_dir) / "run.json")
    batch = processes.batch_of(config).to_dict()
    manifest.check_same_run(earlier, config_digest(config), data_hash, config.output_dir, batch)
    found, skipped = checkpoints.newest_complete(config.output_dir)
    for sentence in skipped:
        say(f"warning: {sentence}")
    if found is not None:
        checkpoints.check_kind(found, sharded)
    say(f"going on from {found}" if found else "no whole checkpoint found: starting from the beginning")
    return found


def train(
    config: RunConfig,
    console: Console | None = None,
    repeats: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Run a fine-tuning from its configuration to its output folder.

    Args:
        config: what `config.load_config` or `config.parse_config` returned.
        console: where messages and the progress bar go; standard error by default.
        repeats: `run.json` of the run that this one repeats, or None; what differs is said.
        callbacks: further `TrainerCallback`s.

    Returns:
        What came of it.

    Raises:
        UserError: a file, row, key or model is at fault; names it and the mend.

    Example:
        >>> train(parse_config({"model_name_or_path": "m", "train_file": "a.json", "output_dir": "out"})).eval_loss
        ... # doctest: +SKIP
    """
    # Under torchrun every process runs this; one of them speaks.
    console = console or Console(stderr=True, quiet=not processes.is_first())
    device = choose_device(config.device)
    processes.check_sharding(config)
    out = Path(config.output_dir)
    if out.exists() and not out.is_dir():
        raise UserError(f"output_dir: {out} is a file", fix="give the path of a folder, existing or not")
    with processes.first_process_first(device):
        data = read_data(config, unanswered=may_be_unanswered(config))
    earlier = manifest.read_manifest(out / "run.json")
    if _already_complete(earlier, config, data):
        _say(console, f"{out} holds this very run, complete: nothing to do (change output_dir to run it again)")
        if processes.is_first():
            results.complete_report(config)
        return TrainResult(**earlier["result"])
    start = find_start(config, data.sha256, lambda message: _say(console, message))
    head = choose_head(config, data.train)
    tokenizer = tokenizer_for(config, data.format, head)
    rows = prepare_rows(data, tokenizer, config, head)
    for line in rows_lines(rows.counts, config.max_length, head.kind == "causal_lm"):
        _say(console, line)
    preflight.require(config, data, rows, tokenizer, lambda message: _say(console, message))
    model, report = prepare_model(config, device, head, rows.labels, tokenizer.pad_token_id)
    if report is not None and report.rows:
        _say(console, str(report))
    return _fit(config, console, device, data, rows, tokenizer, model, report, start, repeats, callbacks)


def _fit(
    config: RunConfig,
    console: Console,
    device: torch.device,
    data: Data,
    rows: Rows,
    tokenizer: Any,
    model: Any,
    report: Any,
    start: Path | None,
    repeats: dict[str, Any] | None,
    callbacks: Sequence[Any],
) -> TrainResult:
    from pyfinetune.train.callbacks import Interruption, ProgressBar, RunMetrics
    from pyfinetune.train.head_loop import arguments_kind
    from pyfinetune.train.loop import build_trainer, nothing_left, total_steps, training_arguments
    from pyfinetune.train.schedules import schedules_of

    out = Path(config.output_dir)
    arguments = training_arguments(
        config,
        train_rows=len(rows.train),
        held_out=bool(rows.held_out),
        bf16=_mixes_bf16(config, device, rows.head, model),
        from_start=start is None,
        **arguments_kind(rows.head),
    )
    metrics, bar, stop = RunMetrics(out / "metrics.jsonl"), ProgressBar(console), Interruption(console)
    steps = total_steps(arguments, len(rows.train))
    parts, further = _parts(config, rows, tokenizer, model)
    trainer = build_trainer(
        model,
        arguments,
        **parts,
        tokenizer=tokenizer,
        max_length=config.max_length,
        early_stopping_patience=config.early_stopping_patience,
        layerwise_lr_decay=config.layerwise_lr_decay,
        callbacks=[metrics, bar, stop, *schedules_of(config, model, steps), *further, *callbacks],
    )
    trainer.has_perplexity = rows.head.has_perplexity
    metrics.trainer = trainer
    record = _record(config, device, data, rows, model, report, arguments)
    is_main = trainer.is_world_process_zero()
    if is_main:
        _say(console, _model_line(record))
        for sentence in manifest.compare_runs(repeats, record) if repeats else []:
            _say(console, sentence)
        manifest.write_manifest(out / "run.json", record)
        metrics.keep_until(-1 if start is None else int(start.name.rsplit("-", 1)[-1]))
        if rows.head.kind == "causal_lm":
            results.answer_before(config, model, tokenizer, rows.held_out or rows.train, anew=start is None)
    outcome = None
    try:
        if start is not None and nothing_left(start, steps, config.early_stopping_patience):
            trainer.finish_from(start)
        else:
            outcome = trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        bar.close()
        stop.close()
    result = _result(config, trainer, outcome, metrics, start, interrupted=stop.signal is not None)
    whole = None if result.interrupted else trainer.whole_weights()
    if is_main and not result.interrupted and rows.held_out and rows.head.kind != "causal_lm":
        result = _scored(
            result, config, trainer, rows, model, tokenizer, metrics, lambda message: _say(console, message)
        )
    if is_main:
        record |= {"status": "interrupted" if result.interrupted else "complete", "finished": manifest.now()}
        record |= {"result": dataclasses.asdict(result)}
        if not result.interrupted:
            save_final(model, tokenizer, out, whole, rows.head)
            (out / "README.md").write_text(card.model_card(record), encoding="utf-8")
            checkpoints.sync_files(out)
        manifest.write_manifest(out / "run.json", record)
        if not result.interrupted and config.report:
            answering = model if whole is None else None  # spread over the processes, it would wait for the others
            results.finish_report(config, answering, tokenizer, lambda message: _say(console, message))
    return result


def save_final(
    model: Any,
    tokenizer: Any,
    output_dir: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
    head: Head = HEADS["causal_lm"],
) -> None:
    """Save the trained adapter, or the whole model when it has none, with its tokenizer.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        output_dir: the folder; `PeftModel.from_pretrained` (or the head's class of transformers) reads it.
        weights: the model's, by name, where it does not hold them itself.
        head: the head that was trained.

    Example:
        >>> save_final(model, tokenizer, "out")  # doctest: +SKIP
    """
    # The cache is off for training only; a saved model that says so would generate slowly ever after.
    has_cache = hasattr(model.config, "use_cache")
    if has_cache:
        model.config.use_cache = True
    model.save_pretrained(output_dir, **({} if weights is None else {"state_dict": weights}))
    if head.kind not in ("causal_lm", "seq2seq_lm") and hasattr(model, "peft_config"):
        # Adapters are saved without it, and it has the names of the classes and the size of the head.
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        config.save_pretrained(output_dir)
    if has_cache:
        model.config.use_cache = False
    tokenizer.save_pretrained(output_dir)


def _result(
    config: RunConfig, trainer: Any, outcome: Any, metrics: Any, start: Path | None, interrupted: bool
) -> TrainResult:
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    final = history[-1] if history else None
    stale = trainer.args.load_best_model_at_end or final is None or final["step"] != trainer.state.global_step
    if trainer.eval_dataset is not None and not interrupted and stale:
        final = trainer.evaluate()
    before = next((entry for entry in history if entry["step"] == 0), {})
    return TrainResult(
        output_dir=config.output_dir,
        steps=trainer.state.global_step,
        interrupted=interrupted and trainer.state.global_step < trainer.state.max_steps,
        resumed_from=str(start) if start else None,
        train_loss=outcome and outcome.training_loss,
        eval_loss_before=before.get("eval_loss"),
        eval_loss=final and final["eval_loss"],
        perplexity_before=before.get("eval_perplexity"),
        perplexity=final and final.get("eval_perplexity"),
        tokens=trainer.tokens_seen,
        tokens_per_second=round(metrics.session_rate, 1),
        peak_memory_gb=round(metrics.peak_memory_gb, 3),
        seconds=round(outcome.metrics.get("train_runtime", 0.0), 3) if outcome else 0.0,
    )


def _parts(config: RunConfig, rows: Rows, tokenizer: Any, model: Any) -> tuple[dict[str, Any], list[Any]]:
    """What the trainer is given of the rows, and callbacks that they need."""
    if rows.head.kind == "causal_lm":
        return {"train_rows": rows.train, "eval_rows": rows.held_out}, []
    from pyfinetune.train.head_loop import trainer_parts

    parts = trainer_parts(rows.head, rows, tokenizer, model, config)
    return parts, parts.pop("callbacks")


def _record(
    config: RunConfig, device: torch.device, data: Data, rows: Rows, model: Any, report: Any, arguments: Any
) -> dict[str, Any]:
    """`run.json` before the run starts."""
    record = manifest.describe_run(config, device, {"sha256": data.sha256, "format": data.format, **rows.counts}, model)
    record["training_arguments"] = manifest.notable_arguments(arguments, config.trainer)
    record["head"] = {"kind": rows.head.kind, "unit": rows.head.unit, "labels": list(rows.labels)}
    record["kernels"] = {"swapped": 0, "left": 0, "rows": []} if report is None else json.loads(report.to_json())
    return record


def _scored(
    result: TrainResult,
    config: RunConfig,
    trainer: Any,
    rows: Rows,
    model: Any,
    tokenizer: Any,
    metrics: Any,
    say: Callable[[str], None],
) -> TrainResult:
    """The result with its metrics; a run is not lost for want of a package that only they need."""
    from pyfinetune.train.head_scores import scores_of_run

    if trainer.is_fsdp_enabled:
        say("no metrics: the weights are spread over the processes; pyfinetune eval scores the saved model")
        return result
    try:
        found = scores_of_run(config, rows, model, tokenizer, trainer.args.per_device_eval_batch_size)
    except UserError as error:
        say(f"warning: no metrics: {error}")
        return result
    metrics.append({"step": result.steps, **found})
    return dataclasses.replace(result, **found)


def _mixes_bf16(config: RunConfig, device: torch.device, head: Head, model: Any) -> bool:
    """Whether the model runs in bfloat16 over trained weights in float32."""
    if head.kind != "causal_lm" and config.method != "full" and model.dtype == torch.bfloat16:
        return True
    is_causal = head.kind == "causal_lm"
    wanted = config.method == "full" or not is_causal
    return wanted and device.type == "cuda" and torch.cuda.is_bf16_supported()


def _already_complete(earlier: dict[str, Any] | None, config: RunConfig, data: Data) -> bool:
    if config.resume != "auto" or not earlier or earlier.get("status") != "complete":
        return False
    return earlier.get("config") == config_digest(config) and earlier["data"]["sha256"] == data.sha256


def _model_line(record: dict[str, Any]) -> str:
    model, kernels = record["model"], record["kernels"]
    words = (
        f"model: {model['name_or_path']}, {record['config']['method']}, {model['dtype']} on {record['device']},"
        f" {model['trainable_parameters']:,} trainable parameters, {kernels['swapped']} modules on fast kernels"
    )
    return words if record["world_size"] == 1 else f"{words}\na step takes {processes.Batch.of(record['batch'])}"


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)
