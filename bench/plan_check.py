"""What `pyfinetune plan` predicts against what runs take, on the CPU: `python -m pyfinetune.bench.plan_check`.

Each configuration trains a random model for two steps with this package's own trainer in a process of its own, and its
resident set at the most (VmHWM, set back just before the first step) is held against the prediction. The C library is
told to give freed memory back, so that this is what the run needs and not what the library keeps. With `--tensors` a
second process asks torch's profiler for the most bytes of tensors there were at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pyfinetune.bench.results import facts_to_share
from pyfinetune.errors import UserError

TOLERANCE = 0.10
_STEPS = 2  # the first makes the optimizer's state
# From 64 KiB up every tensor has pages of its own, which go back when it is freed.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(64 << 10)}
_SHAPES = {
    "29M": {
        "vocab_size": 16000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "71M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One run to compare.

    Args:
        shape: a key of the table of model shapes.
        method: `lora`, `dora`, `qlora` or `full`.
        dtype: of the weights.
        batch_size, length: rows of a batch, and tokens in each.
        documents: documents packed into each row.
        checkpointing: whether layers are recomputed.
        patch: whether the kernels are swapped in.
        accumulation: batches of one step.
        dropout: of the adapters.
        dora: whether the adapters are DoRA's.
    """

    shape: str
    method: str
    dtype: str
    batch_size: int
    length: int
    documents: int = 1
    checkpointing: bool = False
    patch: bool = True
    accumulation: int = 1
    dropout: float = 0.0
    dora: bool = False

    def __str__(self) -> str:
        words = [self.shape, self.method, {"bfloat16": "bf16", "float32": "fp32"}[self.dtype]]
        words.append(
            f"{self.batch_size} x {self.length}" + (f" ({self.documents} packed)" if self.documents > 1 else "")
        )
        words += ["checkpointing"] if self.checkpointing else []
        words += [] if self.patch else ["unpatched"]
        words += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        words += [f"dropout {self.dropout}"] if self.dropout else []
        words += ["with DoRA"] if self.dora else []
        return ", ".join(words)


CONFIGURATIONS = (
    Configuration("29M", "full", "float32", 4, 256, patch=False),
    Configuration("29M", "full", "float32", 4, 256, documents=4, checkpointing=True),
    Configuration("71M", "full", "bfloat16", 1, 256),
    Configuration("71M", "lora", "bfloat16", 2, 512, documents=4),
    Configuration("71M", "lora", "bfloat16", 2, 512, checkpointing=True, patch=False),
    Configuration("29M", "lora", "float32", 2, 512, documents=4, patch=False),
    Configuration("29M", "lora", "bfloat16", 4, 512, accumulation=2, dropout=0.1),
    Configuration("71M", "qlora", "bfloat16", 4, 512, documents=2, checkpointing=True),
    Configuration("71M", "qlora", "float32", 2, 256),
    Configuration("29M", "qlora", "bfloat16", 4, 512, patch=False),
    Configuration("71M", "lora", "bfloat16", 2, 512, documents=4, dora=True),
    Configuration("71M", "qlora", "bfloat16", 2, 512, dora=True),
    Configuration("29M", "lora", "float32", 2, 512, patch=False, dora=True),
)


def write_model(shape: str, folder: Path) -> str:
    """A folder with nothing but a Llama's config.json.

    Args:
        shape: a key of the table of model shapes.
        folder: where to make it.
    """
    from transformers import LlamaConfig

    path = folder / shape
    LlamaConfig(**_SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192).save_pretrained(path)
    return str(path)


def run_config(configuration: Configuration, model: str, output_dir: str) -> Any:
    """The run's configuration, as a YAML file would have it.

    Args:
        configuration: what to run.
        model: a folder with config.json.
        output_dir: where the run writes.
    """
    from pyfinetune.train.config import parse_config
    from pyfinetune.train.planning.step import checkpointing_key

    return parse_config(
        {
            "model_name_or_path": model,
            "train_file": "none.jsonl",
            "output_dir": output_dir,
            "method": configuration.method,
            "dtype": configuration.dtype,
            "device": "cpu",
            "max_length": configuration.length,
            "packing": configuration.documents > 1,
            "patch": configuration.patch,
            "lora_dropout": configuration.dropout,
            "use_dora": configuration.dora,
            "trainer": {
                "max_steps": _STEPS,
                "per_device_train_batch_size": configuration.batch_size,
                "gradient_accumulation_steps": configuration.accumulation,
                checkpointing_key(): configuration.checkpointing,
                "save_strategy": "no",
            },
        }
    )


def _status(key: str) -> int:
    """Bytes that /proc says of this process: VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise UserError(f"/proc/self/status has no {key}", fix="measure on Linux")


def _trainer(configuration: Configuration, model_folder: str, output_dir: str) -> Any:
    """A random model as the run would have it, and a trainer over random rows."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    import pyfinetune as pf
    from pyfinetune.train.data.tokenizing import Document
    from pyfinetune.train.loop import build_trainer, training_arguments
    from pyfinetune.train.methods import add_method
    from pyfinetune.train.model import read_config

    run = run_config(configuration, model_folder, output_dir)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(read_config(model_folder), dtype=getattr(torch, configuration.dtype))
    model.config.use_cache = False
    if run.method == "qlora":
        pf.quantize(model)
    model = add_method(model, run)
    if run.patch:
        pf.patch(model)
    length = configuration.length // configuration.documents
    vocab = _SHAPES[configuration.shape]["vocab_size"]
    draw = np.random.default_rng(0)
    learned = np.arange(length) > 0
    count = _STEPS * configuration.batch_size * configuration.accumulation
    rows = [
        [Document(draw.integers(3, vocab, length), learned) for _ in range(configuration.documents)]
        for _ in range(count)
    ]
    arguments = training_arguments(run, train_rows=count, held_out=False)
    core = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    return build_trainer(model, arguments, rows, tokenizer=tokenizer, max_length=run.max_length)


def _resident(configuration: Configuration, folder: str) -> dict[str, int]:
    """The process's resident set before there is a model, and at its largest while it trains."""
    from pyfinetune.train.planning.step import process_base

    base = process_base()
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(configuration, folder, out)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again
        trainer.train()
    return {"base": base, "resident": _status("VmHWM")}


def _allocated(configuration: Configuration, folder: str) -> dict[str, int]:
    """The most bytes of tensors there were at a time while it trained."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(configuration, folder, out)
        tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
        live = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"allocated": peak}


def measure(configuration: Configuration, folder: str, tensors: bool) -> dict[str, int]:
    """Run a configuration in a process of its own.

    Args:
        configuration: what to run.
        folder: the model's, with config.json.
        tensors: run it a second time, for `allocated`.

    Returns:
        Bytes: `base` before the model, `resident` at the most, and `allocated` in tensors.

    Raises:
        UserError: the run failed.
    """
    found: dict[str, int] = {}
    for kind in ("resident", "allocated") if tensors else ("resident",):
        command = [sys.executable, "-m", "pyfinetune.bench.plan_check", "--worker", kind, "--folder", folder]
        command += ["--configuration", json.dumps(dataclasses.asdict(configuration))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_MALLOC})
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{configuration}: exit code {done.returncode}: {last}")
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(configuration: Configuration, folder: Path, tensors: bool = False) -> dict[str, Any]:
    """Predicted and measured bytes of one configuration.

    Args:
        configuration: what to run.
        folder: where the model's config.json goes.
        tensors: also measure what torch's allocator hands out.

    Returns:
        `name`; the predicted `peak` (tensors and scratch), its `parts` and `total` (with the process); what was
        measured: `base`, `resident`, `grown` (their difference), `allocated`; and `errors`: predicted / measured - 1
        of `resident` (against `total`), `grown` (against `peak` with what torch's libraries take) and `allocated`
        (against `peak` without the scratch, which torch does not see).
    """
    from pyfinetune.train.planning.forecast import forecast

    model = write_model(configuration.shape, folder)
    run = run_config(configuration, model, str(folder / "out"))
    found = forecast(run, quick=True, gpus=(), has_data=False, documents=configuration.documents)
    measured = measure(configuration, model, tensors)
    measured["grown"] = measured["resident"] - measured["base"]
    predicted = {"resident": found.total, "grown": found.step.peak + found.libraries}
    predicted["allocated"] = found.step.peak - found.step.parts["scratch"]
    return {
        "name": str(configuration),
        "peak": found.step.peak,
        "peak_at": found.step.peak_at,
        "parts": found.step.parts,
        "total": found.total,
        **measured,
        "errors": {key: predicted[key] / measured[key] - 1 for key in predicted if key in measured},
    }


def main(argv: list[str] | None = None) -> int:
    """Compare all configurations, or those whose name contains a text; 1 when one is off by more than a tenth."""
    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.plan_check", description=__doc__)
    parser.add_argument("--only", default="", help="text in the names of the configurations to run")
    parser.add_argument("--tensors", action="store_true", help="also measure the bytes of tensors")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--worker", choices=("resident", "allocated"), help=argparse.SUPPRESS)
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        configuration = Configuration(**json.loads(args.configuration))
        print(json.dumps((_resident if args.worker == "resident" else _allocated)(configuration, args.folder)))
        return 0
    chosen = [each for each in CONFIGURATIONS if args.only in str(each)]
    if not chosen:
        print(f"error: no configuration's name contains {args.only!r}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for configuration in chosen:
            row = compare(configuration, Path(folder), args.tensors)
            rows.append(row)
            errors = ", ".join(f"{key} {error:+.1%}" for key, error in row["errors"].items())
            sizes = f"{row['total'] / 2**20:8.1f} {row['resident'] / 2**20:8.1f} MiB"
            print(f"{row['name']:<60} {sizes}  {errors}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": facts_to_share(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(row["errors"]["resident"]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
