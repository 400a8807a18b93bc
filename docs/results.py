"""The table of what the tutorials' runs came to, in README.md, from results.json: `python docs/results.py`.

`python docs/tutorial.py PAGE --data DIR` adds a page's runs to that file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError

DOCS = Path(__file__).resolve().parent
FILE, INDEX = DOCS / "results.json", DOCS / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_NAMES = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "span_f1": "span F1",
    "f1": "F1 of words",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
}


def measure(page: str, config_path: Path, output_dir: Path) -> dict[str, Any]:
    """What a run came to, and what needs no model on the same rows.

    Args:
        page: the tutorial's name.
        config_path: the run's configuration.
        output_dir: the run's output folder.

    Returns:
        JSON values: the run's metrics and the floor's, with 95 % intervals, and what was run.

    Raises:
        UserError: the run held nothing out.

    Example:
        >>> measure("sentiment", Path("sentiment.yaml"), Path("runs/sentiment"))["floor"]  # doctest: +SKIP
        "'pos', the most frequent class"
    """
    from floors import floor_of

    from pyfinetune.train.config import load_config
    from pyfinetune.train.evaluation.evaluating import EvalRequest, evaluate

    record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    result = record["result"]
    own, scores = result.get("floor") or {}, result.get("metrics")
    if "perplexity" in own or record["data"]["format"] == "preference":
        what, floor = own["what"], {name: {"value": value} for name, value in own.items() if name != "what"}
        if record["data"]["format"] == "preference" and floor["accuracy"]["value"] < 0.5:
            what, floor = "a coin", {"accuracy": {"value": 0.5}}
    else:
        found = floor_of(load_config(config_path))
        what, floor = found.what, {name: dataclasses.asdict(score) for name, score in found.scores.items()}
        first = next(iter(floor))
        if scores and scores[first]["rows"] < floor[first]["rows"]:  # an encoder-decoder answers the first rows only
            what, floor = own["what"], {name: {"value": value} for name, value in own.items() if name != "what"}
    # Of rows of a task its own metric counts, of text and chats how well it is foreseen.
    main = "perplexity" if "perplexity" in floor else next(iter(floor))
    if main == "perplexity":
        scores = {main: {"value": result[main]}}
    elif scores is None:
        answered = evaluate(EvalRequest(str(output_dir), batch_size=32))
        scores = {name: dataclasses.asdict(score) for name, score in answered.scores.items()}
    return {
        "page": page,
        "file": config_path.name,
        "held_out": scores[main].get("rows", record["data"]["held_out"]["examples"]),
        "metric": main,
        "floor": what,
        "floor_scores": floor,
        "scores": scores,
        "parameters": record["model"]["trainable_parameters"],
        "steps": result["steps"],
        "device": record["device"],
        "versions": record["versions"],
    }


def keep(measured: Sequence[dict[str, Any]], path: Path = FILE) -> None:
    """Add runs to the results, in place of older ones of the same files.

    Args:
        measured: what `measure` returned, of each.
        path: the results.

    Example:
        >>> keep([measure("sentiment", Path("sentiment.yaml"), Path("runs/sentiment"))])  # doctest: +SKIP
    """
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = {result["file"]: result for result in (*old, *measured)}
    ordered = sorted(new.values(), key=lambda result: (result["page"], result["file"]))
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown.

    Args:
        results: what `keep` wrote.

    Returns:
        A table, a row a run.

    Example:
        >>> table([]).count("|")
        14
    """
    lines = ["| file | held-out rows | metric | without a model | the run | its model |", "|---|---|---|---|---|---|"]
    for result in results:
        main = result["metric"]
        floor, score = (_score(result[key][main]) for key in ("floor_scores", "scores"))
        how = f"{result['parameters'] / 1e6:.1f}M parameters, {result['steps']:,} steps"
        cells = [
            f"[{result['file']}]({result['page']}.md)",
            f"{result['held_out']:,}",
            _NAMES[main],
            f"{floor} ({result['floor']})",
            f"**{score}**",
            how,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rewritten(text: str, block: str) -> str:
    """A page with what stands between the two marks replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"the page needs exactly one {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def _score(score: dict[str, Any]) -> str:
    """A value, with its interval where it has one; what goes to 100 or beyond has a digit less."""
    digits = 1 if score["value"] > 2 or score.get("high", 0) > 2 else 3
    interval = f" ({score['low']:.{digits}f} to {score['high']:.{digits}f})" if "low" in score else ""
    return f"{score['value']:.{digits}f}{interval}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the table; returns the exit code."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    block = table(json.loads(FILE.read_text(encoding="utf-8")))
    INDEX.write_text(rewritten(INDEX.read_text(encoding="utf-8"), block), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
