"""Make the measured tables from the results that were kept: `python -m pyfinetune.bench.report`.

The page beside the results shows all of them, the project's README what has a target.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pyfinetune.bench.results import markdown_of
from pyfinetune.errors import UserError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOT_MEASURED = (
    "Not measured yet: `pyfinetune bench --json bench/results/NAME.json`, then `python -m pyfinetune.bench.report`."
)


def block_of(folder: Path, promised: bool) -> str:
    """The Markdown for every result in the folder, by file name; see `markdown_of`."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            parts.append(markdown_of(result, promised))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: is no result of the benchmark ({type(error).__name__}: {error})",
                fix=f"remove it, or write it again: pyfinetune bench --json {path}",
            ) from error
    return "\n\n".join(parts) or NOT_MEASURED


def rewritten(text: str, block: str, name: str) -> str:
    """The text with what stands between the two marks replaced.

    Raises:
        UserError: the marks are missing, doubled or in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise UserError(f"{name}: needs exactly one {BEGIN} and, below it, one {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Rewrite the blocks, or with --check say whether they are up to date; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results"), help="folder of JSON files and README.md"
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a block is out of date")
    args = parser.parse_args(argv)
    pages: list[tuple[Path, str, str]] = []
    try:
        for path, promised in ((args.readme, True), (args.results / "README.md", False)):
            if not path.is_file():
                raise UserError(f"{path}: no such file", fix="run this in a checkout, or pass --readme and --results")
            text = path.read_text(encoding="utf-8")
            pages.append((path, text, rewritten(text, block_of(args.results, promised), str(path))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        return int(any(new != text for _path, text, new in pages))
    for path, _text, new in pages:
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
