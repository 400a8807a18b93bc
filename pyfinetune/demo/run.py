"""The demo from its settings to its result.

    texts -> tokenizer and small model -> unsupervised stage -> QLoRA -> the same steps without the kernels -> summary

Training is `pyfinetune.train`'s, step by step; what is here chooses texts, sizes and times, and shows what came of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import pyfinetune as pf
from pyfinetune.demo import base, compare, docstrings, stages
from pyfinetune.demo.screen import Screen, loading_lines, verdict
from pyfinetune.demo.settings import MARK, Clock, Settings, check
from pyfinetune.train.report import answers

_HELD_OUT = 0.1
_LONGEST_HELD_OUT_SET = 400  # rows of a given file
_MUON_LR, _PRETRAIN_LR, _QLORA_LR = 0.02, 3e-3, 2e-3
_GIVEN_MODEL_LR = 2e-4  # a model of the usual size wants the usual rate
_TOKENS_A_STEP = 2048
_ENDINGS = {"train": "", "validation": "-held-out"}
_GIVEN_LENGTH = 512  # tokens in a row, of a given model or file


@dataclass
class DemoResult:
    """What came of the demo.

    Args:
        model, data: what was fine-tuned, and on what.
        adapter: the adapter's folder.
        load: Python lines that load it.
        seed: as given.
        device: in words.
        pretrain: the unsupervised stage, or None with a given model.
        finetune: the QLoRA stage.
        samples: held-out questions with the answers before and after.
        comparison: rates and losses with and without the kernels, the ratio and a sentence; or only the sentence.
        kernels: what `pf.patch` did, in a line.
        peak_memory_gb: GiB.
        seconds: all told.
    """

    model: str
    data: str
    adapter: str
    load: list[str]
    seed: int
    device: str
    pretrain: dict[str, Any] | None
    finetune: dict[str, Any]
    samples: list[dict[str, str]]
    comparison: dict[str, Any]
    kernels: str
    peak_memory_gb: float
    seconds: float


def demo(settings: Settings, console: Console | None = None) -> DemoResult:
    """Run the demo.

    Args:
        settings: what the user asked for.
        console: where it is shown; standard output by default.

    Returns:
        What came of it; also written to `demo.json` in the output folder.

    Raises:
        UserError: a setting, the model or the data is at fault.

    Example:
        >>> demo(Settings(minutes=1)).finetune["loss"]  # doctest: +SKIP
        3.2
    """
    check(settings)
    clock, screen = Clock(60 * settings.minutes), Screen(console or Console())
    if settings.model is None or Path(settings.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing has to be fetched, so nothing is asked for
    with _quiet():
        return _demo(settings, clock, screen)


def _demo(settings: Settings, clock: Clock, screen: Screen) -> DemoResult:
    from pyfinetune.train import manifest, run
    from pyfinetune.train.callbacks import peak_memory_gb
    from pyfinetune.train.model import choose_device

    device = choose_device(settings.device)
    out = Path(settings.output_dir)
    given = _given_data(settings)
    manifest.write_manifest(out / MARK, {"status": "running"})
    screen.title("pyfinetune demo", _facts(settings, device))
    values, texts = _texts(settings, given, device, screen)
    pretrain = None
    if settings.model is None:
        pretrain = _pretrain(settings, clock, screen, texts, device)

    screen.stage(f"QLoRA: {settings.base} in 4 bits (NF4), with adapters that learn the answers")
    stage = stages.prepare(values)
    kernels = _kernels_line(stage.report)
    screen.line(kernels)
    start = compare.adapter_state(stage.model)
    samples = answers.choose(stage.rows.held_out, stage.tokenizer, settings.seed)
    for sample in samples:
        sample.before = answers.answer(stage.model, stage.tokenizer, sample.prompt)
    batch_rows = stage.config.trainer["per_device_train_batch_size"]
    steps = settings.steps or stages.plan_steps(stage, clock.share(0.6), batch_rows)
    finetune = stages.train(stage, steps, screen.console)
    screen.outcome(finetune)
    for sample in samples:
        sample.after = answers.answer(stage.model, stage.tokenizer, sample.prompt)
    run.save_final(stage.model, stage.tokenizer, settings.adapter)

    screen.stage("The same steps with and without the kernels")
    comparison = _compare(stage, start, clock, screen)
    result = DemoResult(
        model=settings.base,
        data=settings.data or "docstrings of the Python standard library",
        adapter=settings.adapter,
        load=loading_lines(settings.base, settings.adapter),
        seed=settings.seed,
        device=manifest.device_name(device),
        pretrain=pretrain and _plain(pretrain),
        finetune=_plain(finetune),
        samples=[{key: getattr(s, key) for key in ("question", "truth", "before", "after")} for s in samples],
        comparison=_comparison_values(comparison),
        kernels=kernels,
        peak_memory_gb=round(peak_memory_gb(device), 3),
        seconds=round(clock.elapsed, 1),
    )
    manifest.write_manifest(out / MARK, {"status": "complete", **dataclasses.asdict(result)})
    facts = [
        ("kernels", kernels),
        ("peak memory", f"{result.peak_memory_gb:.2f} GB"),
        ("time", f"{result.seconds:.0f} s"),
    ]
    screen.summary(pretrain, finetune, samples, comparison, facts)
    recipe = _write_recipe(values, finetune.steps, out)
    screen.saved(settings.base, settings.adapter, _again(settings, pretrain, finetune, recipe))
    return result


def _given_data(settings: Settings) -> Any:
    """The given file as `run.Data`, so that a fault in it is found first; None without one."""
    if settings.data is None:
        return None
    from pyfinetune.train import run
    from pyfinetune.train.config import parse_config
    from pyfinetune.train.data.splits import split_rows

    values = {"model_name_or_path": settings.base, "train_file": settings.data, "output_dir": settings.output_dir}
    data = run.read_data(parse_config(values, source="demo"))
    count = min(max(1, round(_HELD_OUT * len(data.train))), _LONGEST_HELD_OUT_SET)
    data.train, data.held_out = split_rows(data.train, count, settings.seed)
    return data


def _texts(settings: Settings, given: Any, device: torch.device, screen: Screen) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the QLoRA stage, with its data files written, and the raw texts of the stage before."""
    out = Path(settings.output_dir)
    learn, held_out = [], []
    if given is None or settings.model is None:
        screen.stage("Texts: the docstrings of this Python's standard library")
        entries = docstrings.gather()
        learn, held_out = docstrings.split(entries, _HELD_OUT, settings.seed)
        screen.line(
            f"{len(entries):,} different docstrings; {len(learn):,} to learn from, {len(held_out):,} held out"
            " (by object, without any that resembles one learned from)"
        )
        for name, part in (("docstrings", learn), ("docstrings-held-out", held_out)):
            _write_rows(out / "data" / f"{name}.jsonl", [{"text": entry.text} for entry in part])
    files = {"train_file": settings.data, "test_size": given and len(given.held_out)}
    if given is None:
        for name, part in (("questions", learn), ("questions-held-out", held_out)):
            _write_rows(out / "data" / f"{name}.jsonl", docstrings.questions(part))
        files = {f"{name}_file": str(out / "data" / f"questions{end}.jsonl") for name, end in _ENDINGS.items()}
    texts = [entry.text for entry in learn] + [_raw(example) for example in (given.train if given else [])]
    custom = given is not None or settings.model is not None
    length = min(_GIVEN_LENGTH, _positions(settings)) if custom else settings.size.max_length
    values = {
        "model_name_or_path": settings.base,
        **{key: value for key, value in files.items() if value is not None},
        "output_dir": settings.adapter,
        "method": "qlora",
        "packing": True,
        "max_length": length,
        "device": device.type,
        "seed": settings.seed,
        "trainer": _trainer(length, _QLORA_LR if settings.model is None else _GIVEN_MODEL_LR),
    }
    return values, texts


def _pretrain(settings: Settings, clock: Clock, screen: Screen, texts: list[str], device: torch.device) -> Any:
    """Train the tokenizer and the small model on raw text; the checkpoint lands in the folder `base`."""
    from pyfinetune.train import run

    out, size = Path(settings.output_dir), settings.size
    screen.stage("Unsupervised: a byte-level BPE tokenizer and a small Llama learn from the raw text")
    tokenizer = base.train_tokenizer(texts, size.vocab_size)
    parameters = base.save_untrained(settings.base, tokenizer, size, settings.seed)
    half = _bf16_pays(device)
    files = {name: out / "data" / f"docstrings{end}.jsonl" for name, end in _ENDINGS.items()}
    if settings.data is not None:
        files["train"] = out / "data" / "texts.jsonl"
        _write_rows(files["train"], [{"text": text} for text in texts])
    values = {
        "model_name_or_path": settings.base,
        **{f"{name}_file": str(path) for name, path in files.items()},
        "output_dir": str(out / "pretraining"),
        "method": "full",
        "task": "pretrain",
        "packing": True,
        "max_length": size.max_length,
        "device": device.type,
        "seed": settings.seed,
        "trainer": _trainer(size.max_length, _PRETRAIN_LR),
    }
    optimizer = partial(base.MuonWithAdamW, matrix_lr=_MUON_LR, other_lr=_PRETRAIN_LR)
    stage = stages.prepare(values, bf16=half, optimizer=optimizer)
    screen.line(
        f"{parameters / 1e6:.1f} million parameters, {len(tokenizer):,} tokens in the vocabulary,"
        f" {stage.rows.counts['train']['tokens']:,} tokens to read, {'bfloat16' if half else 'float32'}"
    )
    batch_rows = stage.config.trainer["per_device_train_batch_size"]
    steps = settings.pretrain_steps or stages.plan_steps(stage, clock.share(0.6), batch_rows)
    outcome = stages.train(stage, steps, screen.console)
    screen.outcome(outcome)
    if half:
        stage.model.to(torch.bfloat16)
    run.save_final(stage.model, stage.tokenizer, settings.base)
    return outcome


def _compare(stage: Any, start: dict[str, torch.Tensor], clock: Clock, screen: Screen) -> Any:
    screen.line("in turns, from the same adapters, over the same rows")
    gc.collect()
    step = stages.step_seconds(stage, stage.config.trainer["per_device_train_batch_size"])
    turns = max(1, min(3, int(clock.share(0.8) / (compare.STEPS * 2.5 * step))))
    try:
        comparison = compare.compare(stage, start, turns)
    except Exception as error:  # the baseline is not ours: whatever stops it, the adapter has been trained and saved
        return f"the run without the kernels failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    screen.line(f"{len(comparison.ours.rates)} steps of each timed")
    return comparison


def _comparison_values(comparison: Any) -> dict[str, Any]:
    if isinstance(comparison, str):
        return {"verdict": comparison}
    return {
        "ours": _side(comparison.ours),
        "theirs": _side(comparison.theirs),
        "ratio": round(comparison.ratio, 3),
        "largest_loss_difference": comparison.difference,
        "equal_loss": comparison.equal,
        "verdict": verdict(comparison),
    }


def _side(side: compare.Side) -> dict[str, Any]:
    return {**dataclasses.asdict(side), "tokens_per_second": side.tokens_per_second}


def _plain(outcome: stages.Outcome) -> dict[str, Any]:
    return {
        **dataclasses.asdict(outcome),
        "perplexity_before": outcome.perplexity_before,
        "perplexity": outcome.perplexity,
    }


def _kernels_line(report: Any) -> str:
    backends = sorted({row.backend for row in report.rows if row.backend})
    errors = [row.probe_error for row in report.rows if row.probe_error is not None]
    line = f"{report.swapped} of {len(report.rows)} modules swapped to the kernels"
    if backends:
        line += f" (backend: {', '.join(backends)})"
    if errors:
        line += f", each kind proved on random input, largest error {max(errors):.1e}"
    reasons = sorted({row.reason for row in report.rows if row.reason})
    return line + "".join(f"; left: {reason}" for reason in reasons)


def _trainer(length: int, learning_rate: float) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": max(1, _TOKENS_A_STEP // length),
        "per_device_eval_batch_size": max(1, _TOKENS_A_STEP // length),
        "learning_rate": learning_rate,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
    }


def _positions(settings: Settings) -> int:
    if settings.model is None:
        return 2 * settings.size.max_length
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.model)
    except (OSError, ValueError, KeyError):  # the loader, which comes to it soon, says it better
        return _GIVEN_LENGTH
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _GIVEN_LENGTH


def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in pf._native.native.isas()


def _raw(example: Any) -> str:
    return example.text or "\n".join(str(message.get("content", "")) for message in example.messages)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _facts(settings: Settings, device: torch.device) -> str:
    from pyfinetune.train.manifest import device_name

    isa = "" if device.type == "cuda" else f" ({pf._native.native.isa()})"
    return f"{device_name(device)}{isa}; about {settings.minutes:g} minutes; seed {settings.seed}"


def _write_recipe(values: dict[str, Any], steps: int, out: Path) -> Path:
    """The QLoRA stage as a file for `pyfinetune train`, to go on from."""
    import yaml

    path = out / "qlora.yaml"
    values = {**values, "output_dir": str(out / "train"), "trainer": {**values["trainer"], "max_steps": steps}}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _again(settings: Settings, pretrain: Any, finetune: Any, recipe: Path) -> list[str]:
    given = [
        f"--{name} {value}" for name, value in (("model", settings.model), ("data", settings.data)) if value is not None
    ]
    steps = [f"--pretrain-steps {pretrain.steps}"] if pretrain else []
    command = ["pyfinetune demo", *given, f"--seed {settings.seed}", *steps, f"--steps {finetune.steps}"]
    if settings.output_dir != Settings.output_dir:
        command.append(f"--output-dir {settings.output_dir}")
    return [
        f"All numbers:        {Path(settings.output_dir) / MARK}",
        f"The same run again: {' '.join(command)}",
        f"To change and run:  pyfinetune train {recipe}",
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing but the demo speaks: no warnings, no logs, no progress bars of libraries."""
    from transformers.utils import logging as transformers_logging

    disabled, level = logging.root.manager.disable, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(disabled)
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()
