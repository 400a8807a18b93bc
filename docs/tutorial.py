"""Do what a page of this folder says, in a folder of its own: write its files and run its commands, in order.

    python docs/tutorial.py sentiment --data DIR            as it stands; adds the outcome to docs/results.json
    python docs/tutorial.py sentiment --data DIR --short    on few rows, for a few steps: does every command work?

A block of YAML or Python whose first line is `# NAME.yaml` or `# NAME.py` is a file,
and each line of a ```console block that begins with `$ ` is a command. What a page calls data/NAME is the file of that
name anywhere below DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import results
import yaml

from pyfinetune.errors import PyfinetuneError, UserError

DOCS = Path(__file__).resolve().parent
SHORT_ROWS, SHORT_STEPS = 96, 2
_FENCE = re.compile(r"^```(\w+)?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DATA = re.compile(r"(?<![\w/])data/([\w.-]*\w)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        language: what stands behind the opening fence.
        text: what is inside.
    """

    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """The file that the block is to be saved as, from its first line; None for a block that is only read."""
        found = re.match(r"# ([\w.-]+\.(?:yaml|py))\b", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a console block, each as its words; their output, which stands below them, is left out."""
        if self.language != "console":
            return []
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [shlex.split(line[2:], comments=True) for line in joined.splitlines() if line.startswith("$ ")]


@dataclass
class Step:
    """A command that was run.

    Args:
        words: the command.
        exit_code: 0 when it went well.
        output: what it printed.
        seconds: how long it took.
    """

    words: list[str]
    exit_code: int
    output: str
    seconds: float

    def __str__(self) -> str:
        return f"$ {shlex.join(self.words)}\n{self.output}(exit code {self.exit_code}, {self.seconds:.1f} s)"


@dataclass
class Tutorial:
    """A page, and the folder in which it is followed.

    Args:
        page: the page's file.
        folder: where its files go and its commands run.
        data: where its data files are, at any depth.
        short: on few rows and for a few steps, in this process.
        steps: the commands that were run.
    """

    page: Path
    folder: Path
    data: Path | None = None
    short: bool = False
    steps: list[Step] = field(default_factory=list)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """The page's configurations of runs, in order, each with its output folder."""
        files = [block for block in blocks(self.page) if block.language == "yaml"]
        values = {block.file_name: yaml.safe_load(block.text) for block in files}
        return [(name, content["output_dir"]) for name, content in values.items() if name and "output_dir" in content]

    def follow(self) -> None:
        """Write the files and run the commands, one after the other.

        Raises:
            UserError: a data file is not there, or a command fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _link(self.folder / "docs", DOCS)
        for name in sorted(set(_DATA.findall(self.page.read_text(encoding="utf-8")))):
            self._provide(name)
        for block in blocks(self.page):
            if block.file_name:
                text = shortened(block.text) if self.short and block.language == "yaml" else block.text
                (self.folder / block.file_name).write_text(text, encoding="utf-8")
            for words in block.commands:
                self._run(words)

    def _provide(self, name: str) -> None:
        target = self.folder / "data" / name
        target.parent.mkdir(exist_ok=True)
        found = sorted(self.data.rglob(name)) if self.data else []
        if target.exists() or not found:
            return  # a file that an earlier command of the page makes, or that the command will miss and name
        if self.short:
            target.write_bytes(head(found[0], SHORT_ROWS))
        else:
            _link(target, found[0].resolve())

    def _run(self, words: list[str]) -> None:
        start = time.monotonic()
        run = _inside if self.short and words[0] in ("pyfinetune", "python") else _outside
        with _inside_folder(self.folder):
            exit_code, output = run(words)
        self.steps.append(Step(words, exit_code, output, time.monotonic() - start))
        if exit_code:
            raise UserError(f"{self.page.name}: a command fails:\n{self.steps[-1]}")


def pages() -> list[Path]:
    """The tutorials of this folder, without its index."""
    return sorted(path for path in DOCS.glob("*.md") if path.name != "README.md")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(language, text) for language, text in _FENCE.findall(page.read_text(encoding="utf-8"))]


def shortened(text: str) -> str:
    """A configuration's text, made to train for two steps on what few rows there are, or to compare on fewer still."""
    values = yaml.safe_load(text)
    if "run" in values:
        return yaml.safe_dump({**values, "rows": SHORT_STEPS, "latency_rows": SHORT_STEPS}, sort_keys=False)
    trainer = values.setdefault("trainer", {})
    trainer.pop("num_train_epochs", None)
    trainer["max_steps"] = SHORT_STEPS
    for key in ("eval_steps", "save_steps"):
        values.pop(key, None)
    for key in ("test_size", "validation_size"):
        if isinstance(values.get(key), int):
            values[key] = 0.2
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def head(path: Path, rows: int) -> bytes:
    """The first rows of a data file, in its own format."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8")
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".json":
        text = json.dumps(json.loads(text)[:rows])
    elif kind == ".conll":
        text = "\n\n".join(re.split(r"\n[ \t]*\n", text)[:rows]) + "\n"
    else:
        text = "".join(line + "\n" for line in text.split("\n")[:rows])
    return gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()


def _link(place: Path, target: Path) -> None:
    if not place.is_symlink():
        place.symlink_to(target)


@contextlib.contextmanager
def _inside_folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _inside(words: Sequence[str]) -> tuple[int, str]:
    """Run a command of this project in this process, where everything is imported already."""
    from pyfinetune import cli

    out, before = io.StringIO(), (sys.argv, sys.stdin)
    sys.argv, sys.stdin = list(words[words[0] == "python" :]), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if words[0] == "python":
                runpy.run_path(words[1], run_name="__main__")
            else:
                cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv, sys.stdin = before
    return code, out.getvalue()


PROGRAMS = {
    "pyfinetune": ["-m", "pyfinetune.cli"],
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}


def _outside(words: Sequence[str]) -> tuple[int, str]:
    """Run a command as a person would, in a process of its own, with this Python."""
    if words[0] not in PROGRAMS:
        raise UserError(f"{words[0]}: not a program that a page may call", fix=f"use {', '.join(PROGRAMS)}")
    command = [sys.executable, *PROGRAMS[words[0]], *words[1:]]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False
    )
    return done.returncode, done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Follow one page; returns the exit code."""
    names = [page.stem for page in pages()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", choices=names)
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the page's data files are, at any depth")
    parser.add_argument("--folder", type=Path, help="where to work; build/docs/PAGE without")
    parser.add_argument("--short", action="store_true", help="few rows, few steps")
    args = parser.parse_args(argv)
    folder = (args.folder or DOCS.parent / "build" / "docs" / args.page).resolve()
    tutorial = Tutorial(DOCS / f"{args.page}.md", folder, args.data, args.short)
    try:
        tutorial.follow()
        if not args.short:
            with _inside_folder(folder):
                results.keep([results.measure(args.page, Path(name), Path(out)) for name, out in tutorial.runs])
            results.main([])
    except PyfinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
