"""Make pairs of a good and a bad answer out of questions with worked answers, for a reward model to tell apart.

    python docs/answer_pairs.py data/gsm8k_alpaca.json --output pairs.jsonl

The good answer is the one in the file. The bad one is the good one with its steps in another order (every second row),
the answer to another question, or the good one with one of its numbers changed (every fourth row each). The first shows
in the answer alone, the second takes a look at the question, the third at the sums.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pyfinetune.errors import UserError

_NUMBER = re.compile(r"\d+")


def with_a_wrong_number(answer: str, random_: random.Random) -> str | None:
    """An answer with one of its numbers changed by a little, or None where it has none.

    Args:
        answer: the right one.
        random_: decides which number, and into what.

    Returns:
        The wrong one.

    Example:
        >>> with_a_wrong_number("48", random.Random(0)) != "48"
        True
    """
    numbers = list(_NUMBER.finditer(answer))
    if not numbers:
        return None
    chosen = random_.choice(numbers)
    value = int(chosen[0])
    wrong = random_.choice([other for other in range(max(0, value - 9), value + 10) if other != value])
    return f"{answer[: chosen.start()]}{wrong}{answer[chosen.end() :]}"


def out_of_order(answer: str, random_: random.Random) -> str | None:
    """An answer with its lines in another order, or None where there is no other.

    Args:
        answer: the right one.
        random_: decides which order.

    Returns:
        The same lines, drawn until they stand otherwise.

    Example:
        >>> out_of_order("first\\nsecond", random.Random(0))
        'second\\nfirst'
    """
    lines = answer.split("\n")
    if len(set(lines)) < 2:
        return None
    drawn = list(lines)
    while drawn == lines:
        random_.shuffle(drawn)
    return "\n".join(drawn)


def pairs_of(rows: Sequence[tuple[str, str]], seed: int = 0) -> list[dict[str, str]]:
    """Pairs for a reward model.

    Args:
        rows: question and right answer, at least two.
        seed: of all that is drawn.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, and in `kind` how the bad answer was made.

    Raises:
        UserError: there are no two different answers.

    Example:
        >>> [row["kind"] for row in pairs_of([("1+1?", "1+1\\n= 2"), ("2+2?", "4")])]
        ['out of order', 'another answer']
    """
    if len({answer for _, answer in rows}) < 2:
        raise UserError("a bad answer is one to another question, and all answers are the same", fix="give more rows")
    draw, pairs = random.Random(seed), []
    for index, (question, answer) in enumerate(rows):
        wrong, kind = None, "another answer"
        if index % 2 == 0:
            wrong, kind = out_of_order(answer, draw), "out of order"
        elif index % 4 == 3:
            wrong, kind = with_a_wrong_number(answer, draw), "wrong number"
        kind = "another answer" if wrong is None else kind
        while wrong is None or wrong == answer:
            wrong = rows[draw.randrange(len(rows))][1]
        pairs.append({"prompt": question, "chosen": answer, "rejected": wrong, "kind": kind})
    return pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pairs of a file of questions and answers as JSON lines; returns the exit code."""
    from pyfinetune.train.data.files import load_rows
    from pyfinetune.train.data.formats import to_examples

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", metavar="FILE", help="of any format that train knows: Alpaca, prompt/completion")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        examples = to_examples(load_rows([args.questions]))
        rows = [(e.messages[0]["content"], e.messages[-1]["content"]) for e in examples if len(e.messages) == 2]
        pairs = pairs_of(rows, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(args.output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs), encoding="utf-8")
    print(f"{args.output}: {len(pairs):,} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
