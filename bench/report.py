"""Make the measured tables from the results that were kept: `python -m pyfinetune.bench.report`.

The page beside the results shows all of them and their pictures, the project's README what has a target.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from pyfinetune.bench.results import markdown_of, read_result
from pyfinetune.errors import UserError

PLOTS = "plots"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOT_MEASURED = (
    "Not measured yet: `pyfinetune bench --json bench/results/NAME.json`, then `python -m pyfinetune.bench.report`."
)


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in the folder by file name, without its ending."""
    return {path.stem: read_result(path, "--results") for path in sorted(folder.glob("*.json"))}


def block_of(results: dict[str, dict[str, Any]], folder: Path, promised: bool) -> str:
    """The Markdown for the results, and where it is not what was promised only, the pictures that lie beside them."""
    parts = []
    for name, result in results.items():
        pictures = [] if promised else sorted((folder / PLOTS / name).glob("*.svg"))
        links = " ".join(f"[{path.stem}]({path.relative_to(folder).as_posix()})" for path in pictures)
        parts += [markdown_of(result, promised), *([f"Pictures: {links}"] if links else [])]
    return "\n\n".join(parts) or NOT_MEASURED


def draw(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Draw every result's pictures anew.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the pictures need matplotlib", fix="pip install 'pyfinetune[bench]', or pass --no-plots")
    from pyfinetune.bench.plots import write_figures

    for name, result in results.items():
        own = folder / PLOTS / name
        for old in own.glob("*.svg"):
            old.unlink()
        write_figures(result, own, png=False)


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
    parser.add_argument("--no-plots", action="store_true", help="leave the pictures as they are")
    args = parser.parse_args(argv)
    pages: list[tuple[Path, str, str]] = []
    try:
        results = kept(args.results)
        if not args.check and not args.no_plots:
            draw(results, args.results)
        for path, promised in ((args.readme, True), (args.results / "README.md", False)):
            if not path.is_file():
                raise UserError(f"{path}: no such file", fix="run this in a checkout, or pass --readme and --results")
            text = path.read_text(encoding="utf-8")
            pages.append((path, text, rewritten(text, block_of(results, args.results, promised), str(path))))
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
