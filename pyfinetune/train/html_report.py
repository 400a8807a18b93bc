"""`report.html`: one file that shows what a run did, to be opened, sent and kept.

    run.json, metrics.jsonl, examples.json -> write_report -> report.html, plots/*.png

Made from the files of the output folder alone. What stands in them came from somebody's data: the template escapes all
of it, the page holds no script, and its policy would let none run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pyfinetune.errors import UserError
from pyfinetune.train import answers, curves, manifest
from pyfinetune.train.config import LORA_METHODS

_TEMPLATE = "report.html.jinja"
_NO_CURVES = "The curves need matplotlib: pip install matplotlib"
_COUNTS = (
    ("examples", "examples"),
    ("documents", "documents"),
    ("rows", "rows after packing"),
    ("tokens", "tokens"),
    ("learned_tokens", "learned tokens"),
    ("longest", "longest example, tokens"),
    ("cut_short", "answers cut short"),
    ("dropped", "left out, answer cut off"),
)
_RESULT_UNITS = {"tokens_per_second": "tokens/s", "peak_memory_gb": "GiB", "seconds": "s"}


def write_report(output_dir: str | Path) -> Path:
    """Write a run's report and its plots.

    Args:
        output_dir: the run's output folder, which holds `run.json`.

    Returns:
        The report's path.

    Raises:
        UserError: there is no `run.json` in that folder.

    Example:
        >>> write_report("out")  # doctest: +SKIP
        PosixPath('out/report.html')
    """
    from markupsafe import Markup

    out = Path(output_dir)
    record = manifest.read_manifest(out / "run.json")
    if record is None:
        raise UserError(f"{out}: holds no run.json", fix="give the output_dir of a run")
    drawn = []
    if can_draw():
        drawn = [
            Markup(curves.draw(curve, out / "plots" / f"{curve.name}.png"))  # matplotlib's own, of numbers alone
            for curve in curves.series(curves.read_metrics(out / "metrics.jsonl"))
        ]
    facts = dict(
        **_facts(record),
        curves=drawn,
        no_curves=_NO_CURVES if not can_draw() else "No record was written.",
        samples=answers.read_samples(out),
        samples_note=_samples_note(record),
    )
    return write_page(out / "report.html", _TEMPLATE, facts)


def write_page(path: Path, template: str, facts: dict[str, Any]) -> Path:
    """Write a page whole or not at all.

    Args:
        path: the file.
        template: name of the template beside this file; all that is put into it is escaped.
        facts: what it shows.

    Returns:
        The path.

    Example:
        >>> write_page(Path("out/report.html"), "report.html.jinja", facts)  # doctest: +SKIP
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(template).render(**facts)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)
    return path


def can_draw() -> bool:
    """Whether matplotlib is there to draw the curves.

    Returns:
        False where it is not installed; the report then says so.

    Example:
        >>> can_draw() in (True, False)
        True
    """
    return importlib.util.find_spec("matplotlib") is not None


def kernel_groups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a patch report, those alike counted together.

    Args:
        rows: `kernels: rows` of `run.json`.

    Returns:
        For each group kind, status, backend, reason, count and error (the largest, as text).

    Example:
        >>> kernel_groups([])
        []
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["status"], row["backend"], row["reason"]), []).append(row)
    found = []
    for (kind, status, backend, reason), members in groups.items():
        errors = [row["probe_error"] for row in members if row["probe_error"] is not None]
        facts = {"kind": kind, "status": status, "backend": backend, "reason": reason, "count": len(members)}
        found.append(facts | {"error": f"{max(errors):.1e}" if errors else ""})
    return found


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What the template shows, as text and rows of text."""
    config, model, result = record["config"], record["model"], record.get("result") or {}
    kernels = record["kernels"]
    held = {name: counts for name, counts in record["data"].items() if isinstance(counts, dict) and counts["examples"]}
    return {
        "title": f"{Path(model['name_or_path']).name}, {config['method']}",
        "subtitle": f"{_day(record['started'])} to {_day(record.get('finished'))}, on {record['device']}",
        "status": record["status"],
        "tiles": _tiles(record, result),
        "comparison": _comparison(result, record.get("head", {}).get("unit", "token")),
        "metrics": _metrics(result),
        "floor": (result.get("floor") or {}).get("what", ""),
        "warnings": _warnings(held, config["max_length"]),
        "data_columns": [name.replace("_", " ") for name in held],
        "data_rows": [[label, *(f"{counts[key]:,}" for counts in held.values())] for key, label in _COUNTS],
        "kernels": kernel_groups(kernels["rows"]),
        "kernels_note": f"{kernels['swapped']} modules run on this package's kernels, {kernels['left']} were left as"
        " they were. The probe holds each candidate against the module it takes over before the first step.",
        "facts": [
            ("Settings", _settings(record)),
            ("Environment", _environment(record)),
            ("Sources", _sources(record)),
        ],
        "settings": yaml.safe_dump(
            {**config, "training_arguments": record.get("training_arguments", {})}, sort_keys=False, allow_unicode=True
        ),
    }


def _day(time: str | None) -> str:
    return "now" if time is None else time[:16].replace("T", " ") + " UTC"


def _tiles(record: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    if result.get("eval_loss") is not None:
        tiles += [("held-out loss", _arrow(result, "eval_loss_before", "eval_loss", ".3f"))]
        if result["perplexity"] is not None:
            tiles += [("held-out perplexity", _arrow(result, "perplexity_before", "perplexity", ",.2f"))]
        tiles += [(name, f"{score['value']:.3f}") for name, score in list((result.get("metrics") or {}).items())[:2]]
    if result:
        tiles += [
            ("steps", f"{result['steps']:,}"),
            ("tokens trained on", f"{result['tokens']:,}"),
            ("tokens per second", f"{result['tokens_per_second']:,.0f}"),
            ("peak memory, GiB", f"{result['peak_memory_gb']:.2f}"),
        ]
    return tiles


def _arrow(result: dict[str, Any], before: str, after: str, form: str) -> str:
    first = "" if result.get(before) is None else f"{result[before]:{form}} → "
    return f"{first}{result[after]:{form}}"


def _metrics(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, floor, value and interval of each metric."""
    metrics, floor = result.get("metrics") or {}, result.get("floor") or {}
    rows = [
        (name, f"{floor[name]:.3f}", f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}")
        for name, score in metrics.items()
    ]
    if not metrics and "loss" in floor:
        rows.append(("loss", f"{floor['loss']:.4f}", f"{result['eval_loss']:.4f}", ""))
    return rows


def _comparison(result: dict[str, Any], unit: str) -> list[tuple[str, ...]]:
    rows = []
    pairs = ((f"loss per {unit}", "eval_loss_before", "eval_loss"), ("perplexity", "perplexity_before", "perplexity"))
    for label, before, after in pairs:
        if result.get(before) is not None and result.get(after) is not None:
            first, last = result[before], result[after]
            rows.append((label, f"{first:,.4f}", f"{last:,.4f}", f"{(last - first) / first:+.1%}" if first else ""))
    return rows


def _warnings(held: dict[str, dict[str, int]], max_length: int) -> list[str]:
    found = []
    for name, counts in held.items():
        rows = name.replace("_", " ")
        if counts["cut_short"]:
            found.append(f"{rows}: {counts['cut_short']:,} answers lost their end to max_length {max_length:,}")
        if counts["dropped"]:
            found.append(f"{rows}: {counts['dropped']:,} rows lost their whole answer to max_length {max_length:,}")
    return found


def _settings(record: dict[str, Any]) -> list[tuple[str, Any]]:
    config = record["config"]
    names = ["model_name_or_path", "method", "max_length", "packing", "seed", "dtype", "attn_implementation"]
    if config["method"] in LORA_METHODS:
        names += ["lora_r", "lora_alpha", "lora_dropout", "target_modules"]
    names += ["num_virtual_tokens", "prompt_tuning_init_text", "adapter_len", "adapter_layers", "dropout"]
    rows = [(name, config[name]) for name in names if config.get(name) is not None]
    rows += [(name, True) for name in ("use_dora", "use_rslora") if config.get(name)]
    rows.append(("trainable parameters", f"{record['model']['trainable_parameters']:,}"))
    return [*rows, *record.get("training_arguments", {}).items()]


def _environment(record: dict[str, Any]) -> list[tuple[str, Any]]:
    machine = record.get("machine", {})
    return [("device", record["device"]), *machine.items(), *record["versions"].items()]


def _sources(record: dict[str, Any]) -> list[tuple[str, Any]]:
    config, data, model = record["config"], record["data"], record["model"]
    rows = [("model", model["name_or_path"]), ("model, SHA-256 or commit", model.get("sha256") or model.get("commit"))]
    rows += [(name, config[name]) for name in ("train_file", "dataset_name", "validation_file") if config[name]]
    rows += [("data format", data["format"]), ("training data, SHA-256", data["sha256"])]
    return [*rows, ("held-out data, SHA-256", data.get("held_out_sha256") or "split off the training data")]


def _samples_note(record: dict[str, Any]) -> str:
    held_out = record["data"].get("held_out", {}).get("examples")
    rows = "Held-out rows" if held_out else "Training rows, as nothing was held out"
    return f"{rows}; the most likely answer, token by token, up to 40 tokens."
