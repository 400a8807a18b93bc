"""The command line: reads arguments, calls one function, prints what it returned. No logic lives here.

A user's mistake prints what is wrong and what mends it, and exits 2; an interrupted run exits 130.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pyfinetune.errors import InvalidInput, PyfinetuneError, UserError

# What the extra [hf] installs; `pyfinetune info` does without.
_EXTRA = ("accelerate", "datasets", "peft", "pydantic", "safetensors", "transformers", "yaml")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fast, trustworthy kernels for fine-tuning language models.",
)

# The script's own options are not ours to read.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

# Under a launcher of several processes the other commands run in the first one alone.
_IN_EVERY_PROCESS = (["train"], ["run"])
_PATIENCE = 10.0  # seconds

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(metavar="[RUN.YAML]", help="The run's configuration.")] = None,
    repeats: Annotated[
        str | None, typer.Option("--from", metavar="RUN.JSON", help="Repeat the run that left this record.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where the repetition goes; the run's folder and -repeat.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model as a YAML file says; run it again to go on after an interruption."""
    if (config is None) == (repeats is None):
        raise typer.BadParameter("give a RUN.YAML, or --from RUN.JSON to repeat a run")
    if config is not None and output_dir is not None:
        raise typer.BadParameter("--output-dir goes with --from; a RUN.YAML has the key output_dir")
    from pyfinetune.train.pages import restart_with_recycled_pages

    restart_with_recycled_pages()
    from pyfinetune.train.config import load_config
    from pyfinetune.train.repeat import load_repeat
    from pyfinetune.train.report import result_lines
    from pyfinetune.train.run import train as run_train

    given = ["--from", repeats, *(["--output-dir", output_dir] if output_dir else [])] if repeats else [config]
    again = shlex.join(["pyfinetune", "train", *given])
    try:
        settings, record = load_repeat(repeats, output_dir) if repeats else (load_config(config), None)
        if settings.hpo is not None:
            from pyfinetune.train.search import search, search_lines

            result, lines_of = search(settings), search_lines
        else:
            result, lines_of = run_train(settings, repeats=record), result_lines
    except KeyboardInterrupt:
        typer.echo(f"stopped at once; go on from the last checkpoint with: {again}", err=True)
        raise typer.Exit(130) from None
    lines = [json.dumps(dataclasses.asdict(result))] if as_json else lines_of(result, again)
    if _is_first():
        typer.echo("\n".join(lines))
    if result.interrupted:
        raise typer.Exit(130)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A run's output_dir, an adapter, or a model.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Rows as train_file takes them, or LABEL=FILE; without, a run's held-out."),
    ] = None,
    task: Annotated[str, typer.Option(help="What the rows are for; auto looks at the run or the columns.")] = "auto",
    rows: Annotated[int | None, typer.Option(help="At most so many, drawn by the seed.")] = None,
    slice_by: Annotated[
        list[str] | None, typer.Option("--slice", metavar="COLUMN", help="Metrics for each value of it, too.")
    ] = None,
    classify_by: Annotated[str, typer.Option(help="likelihood of each label, or generation.")] = "likelihood",
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; without, as the right ones need.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the draw of rows and of the intervals.")] = 0,
    answers: Annotated[str | None, typer.Option(metavar="FILE", help="Write every answer there, as JSONL.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on rows it has not seen: loss, perplexity and the task's metrics, with 95 % intervals."""
    from pyfinetune.train.eval_view import evaluation_lines
    from pyfinetune.train.evaluating import EvalRequest
    from pyfinetune.train.evaluating import evaluate as run_eval

    given = (model, tuple(data or ()), task, rows, tuple(slice_by or ()), classify_by, max_new_tokens)
    result = run_eval(EvalRequest(*given, batch_size, device, seed, answers))
    typer.echo(json.dumps(dataclasses.asdict(result)) if as_json else "\n".join(evaluation_lines(result)))


@app.command()
def compare(
    config: Annotated[
        str, typer.Argument(metavar="COMPARE.YAML", help="What is compared; or a run's output_dir, for the defaults.")
    ],
    as_json: Json = False,
) -> None:
    """Was fine-tuning worth it? The tuned model against prompts of its base, and against other models."""
    from pyfinetune.train.compare_config import load_compare
    from pyfinetune.train.compare_view import comparison_lines, write_comparison
    from pyfinetune.train.comparison import compare as run_compare
    from pyfinetune.train.comparison import save_comparison

    settings = load_compare(config)
    try:
        result = run_compare(settings)
    except KeyboardInterrupt:
        again = shlex.join(["pyfinetune", "compare", config])
        typer.echo(f"stopped; the answers so far are in {settings.folder}/answers; go on with: {again}", err=True)
        raise typer.Exit(130) from None
    save_comparison(result)
    pages = write_comparison(result)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        typer.echo("\n".join([*comparison_lines(result), f"report: {pages[-1]}"]))


@app.command()
def check(
    config: Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run's configuration.")],
    as_json: Json = False,
) -> None:
    """Find what would spoil a run before it starts, without loading weights; exits 2 when there is an error."""
    from rich.console import Console

    from pyfinetune.train.forecast import memory_lines
    from pyfinetune.train.preflight import examine_file
    from pyfinetune.train.preflight_view import show

    found = examine_file(config, memory_lines)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        show(found, Console(), Console(stderr=True))
    raise typer.Exit(0 if found.ok else 2)


@app.command()
def init(
    model: Annotated[str | None, typer.Option(metavar="NAME", help="A causal language model's name or folder.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="A data file, or a dataset's name.")] = None,
) -> None:
    """Write a run's configuration, fitted to a model and a data file, to standard output."""
    from pyfinetune.train.starter import starter_yaml

    typer.echo(starter_yaml(model, data), nl=False)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="A causal language model's name or folder, instead of our own.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file that `train` accepts, instead of docstrings.")
    ] = None,
    output_dir: Annotated[str, typer.Option(metavar="FOLDER", help="Where model and adapter go.")] = "demo-output",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 42,
    minutes: Annotated[float, typer.Option(help="How long it may take, about.")] = 3.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    pretrain_steps: Annotated[
        int | None, typer.Option(help="Steps on raw text, instead of as many as the time allows.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of QLoRA, instead of as many as the time allows.")] = None,
    as_json: Json = False,
) -> None:
    """Make a small model and fine-tune it with QLoRA on this machine, offline, and show before and after."""
    from pyfinetune.train.pages import restart_with_recycled_pages

    restart_with_recycled_pages()
    from rich.console import Console

    from pyfinetune.demo.run import demo as run_demo
    from pyfinetune.demo.settings import Settings

    settings = Settings(model, data, output_dir, seed, minutes, device, pretrain_steps, steps)
    try:
        result = run_demo(settings, Console(stderr=as_json))
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was made so far is in {output_dir}, and `pyfinetune demo` starts over", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))


@app.command()
def plan(
    config: Annotated[str | None, typer.Argument(metavar="[RUN.YAML]", help="The run's configuration.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="A model's name or folder, without a file.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, rslora, dora, qlora or full.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the adapters.")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Recompute layers in the backward pass.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    gpu: Annotated[
        list[float] | None, typer.Option(metavar="GB", help="A GPU's size, in place of 8, 12, 16, 24; 0 for none.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Read no data and measure nothing: full rows, no hours.")] = False,
    as_json: Json = False,
) -> None:
    """Predict a run's peak memory and hours before anything is loaded, and what fits GPUs of usual sizes."""
    from pyfinetune.train.forecast import GPU_SIZES, forecast, given_config

    options = {"model_name_or_path": model, "method": method, "max_length": max_length, "batch_size": batch_size}
    options |= {"lora_r": r, "checkpointing": checkpointing, "dtype": dtype}
    sizes = GPU_SIZES if gpu is None else () if gpu == [0] else gpu
    found = forecast(given_config(config, options), quick=quick, gpus=sizes, has_data=config is not None)
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


@app.command()
def info(as_json: Json = False) -> None:
    """Say what this machine can run: versions, instruction set, GPU, and which kernels are available."""
    import pyfinetune as pf

    facts = pf.info()
    typer.echo(json.dumps(facts, default=str) if as_json else str(facts))


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops; all of them without.")] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes and little time: is everything right?")] = False,
    shapes: Annotated[
        list[str] | None, typer.Option(metavar="S", help="model:NAME, or M,N,K; may be given again and again.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows for --shapes model:NAME and --model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp32 or fp16: only cases in it.")] = None,
    backend: Annotated[str | None, typer.Option(help="What ours has to run on: cuda, triton, cpu, reference.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="P", help="Only this peer; may be given again and again.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="With `step`: a config.json, its folder, or a model's name.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="With --model: lora (as without), qlora or dora.")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="With --model: documents of 256 tokens.")] = False,
    layers: Annotated[int | None, typer.Option(help="With --model: only so many layers.")] = None,
    json_path: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="DIR", help="Write pictures and report.html there.")] = None,
    compare: Annotated[str | None, typer.Option(metavar="OLD.JSON", help="Compare with an older result.")] = None,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="... of another machine, too.")] = False,
    load: Annotated[str | None, typer.Option(metavar="FILE", help="Measure nothing, take this result.")] = None,
    recycled: Annotated[
        bool | None, typer.Option("--recycled/--default", help="One allocator setting only; both without.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Time to spend on timing each case.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compare our kernels with what you would use instead, on this machine; exits 1 when a result is wrong.

    `pyfinetune bench step --model CONFIG` measures a whole training step of a random model.
    """
    from pyfinetune.bench.request import Request
    from pyfinetune.bench.runner import Output
    from pyfinetune.bench.runner import main as run_bench

    request = Request(
        tuple(ops or ()),
        quick,
        tuple(shapes or ()),
        tokens,
        dtype,
        backend,
        tuple(peer or ()),
        device,
        seconds,
        model,
        method,
        packed,
        layers,
    )
    output = Output(*(None if path is None else Path(path) for path in (json_path, plot, compare)), any_machine)
    raise typer.Exit(run_bench(request, output, recycled, None if load is None else Path(load)))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(metavar="SCRIPT.PY [ARGUMENTS]...", help="The script and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT.PY is the name of a module, as for python -m.")] = False,
) -> None:
    """Run a training script unchanged, with the kernels swapped in when its Trainer starts."""
    from pyfinetune.train.pages import restart_with_recycled_pages

    restart_with_recycled_pages()
    from pyfinetune.hf.script import run_script

    run_script(script, context.args, module)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A causal language model's name or folder, or a PEFT adapter's.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto is the checkpoint's.")] = "auto",
    rank: Annotated[int, typer.Option(min=0, help="Add adapters of this rank; 0 trains all parameters.")] = 8,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps to compare.")] = 3,
    as_json: Json = False,
) -> None:
    """Compare a model with and without the kernels, both against the exact result; exits 1 when they differ."""
    from pyfinetune.hf.verify import verify_path

    verdict = verify_path(model, dtype, rank, steps)
    typer.echo(verdict.to_json() if as_json else str(verdict))
    raise typer.Exit(not verdict.ok)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's, an adapter's or a model's folder.")],
    to: Annotated[str, typer.Option(help="adapter, merged, merged-4bit or gguf.")] = "merged",
    output_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where it goes; the source with the form behind it.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of merged weights: float32, bfloat16, float16; auto is the base's.")
    ] = "auto",
    adapter: Annotated[str | None, typer.Option(metavar="NAME", help="Which of several adapters.")] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="The base model, where it is elsewhere now.")] = None,
    in_4bit: Annotated[
        bool | None,
        typer.Option("--base-in-4bit/--base-dense", help="Whether the base was in NF4 while the adapter learned."),
    ] = None,
    converter: Annotated[
        str | None, typer.Option(metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, for --to gguf.")
    ] = None,
    gguf_type: Annotated[str, typer.Option(help="For --to gguf: f32, f16, bf16 or q8_0.")] = "f16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write a trained model in the form it is used in, and prove that it is; exits 1 when it is not that model."""
    from pyfinetune.train.export import Request
    from pyfinetune.train.export import export as run_export
    from pyfinetune.train.export_view import commands, export_lines

    request = Request(source, to, output_dir, dtype, adapter, base, in_4bit, device, converter, gguf_type)
    result = run_export(request, lambda message: typer.echo(message, err=True))
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(result), "commands": commands(result)}))
    else:
        typer.echo("\n".join(export_lines(result)))


@app.command()
def chat(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A run's, an adapter's or a model's folder.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before all else.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 for the most likely tokens; else they are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Talk with a saved model; /reset forgets, Ctrl-C stops an answer, /quit leaves. Reads lines from a pipe too."""
    from transformers import set_seed

    from pyfinetune.train.chat import converse, open_chat

    set_seed(seed)
    settings = {"system": system, "max_new_tokens": max_new_tokens, "temperature": temperature}
    converse(
        open_chat(folder, device, lambda message: typer.echo(message, err=True), **settings), sys.stdin, sys.stdout
    )


def main() -> None:
    """Run the command line and turn a user's mistake into a message and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not _is_first() and sys.argv[1:2] not in _IN_EVERY_PROCESS:
        return
    try:
        app()
    except (UserError, InvalidInput) as error:
        _fail(f"error: {error}", 2)
    except PyfinetuneError as error:
        _fail(f"error: {error}", 1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        _fail(f"error: this command needs {error.name}\n  fix: pip install 'pyfinetune[hf]'", 2)
    except Exception:
        _leave_the_word_to_the_first()
        raise


def _is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def _leave_the_word_to_the_first() -> None:
    """What fails in one process fails in all, or is waited for: the launcher ends the others when the first has ended.

    Only what went wrong here alone is said here, after a while.
    """
    if not _is_first():
        time.sleep(_PATIENCE)


def _fail(message: str, code: int) -> NoReturn:
    _leave_the_word_to_the_first()
    typer.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
