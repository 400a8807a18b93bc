"""Make questions with answers out of tagged sentences: which person, which location, ... is named?

    python docs/entity_questions.py data/wnut17_train.conll --output questions_train.jsonl

A sentence gives a question for each kind of entity of which it names exactly one, so that one answer is right. The
answer is a stretch of the sentence, and `answer_start` is where it begins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError


def questions_of(tokens: Sequence[str], tags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Questions about one tagged sentence.

    Args:
        tokens: its words.
        tags: of the same length: O, or B- and I- with the kind of the entity.

    Returns:
        Rows as SQuAD has them.

    Example:
        >>> list(questions_of(["In", "New", "York"], ["O", "B-location", "I-location"]))[0]["answers"]
        {'text': ['New York'], 'answer_start': [3]}
    """
    from pyfinetune.train.evaluation.row_statistics import spans_of

    spans = spans_of(tags)
    for kind in sorted({kind for kind, _, _ in spans}):
        places = [(start, end) for other, start, end in spans if other == kind]
        if len(places) == 1:
            start, end = places[0]
            answer = " ".join(tokens[start:end])
            at = sum(len(token) + 1 for token in tokens[:start])
            yield {
                "context": " ".join(tokens),
                "question": f"Which {kind.replace('-', ' ')} is named?",
                "answers": {"text": [answer], "answer_start": [at]},
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the questions of a CoNLL file as JSON lines; returns the exit code."""
    from pyfinetune.train.data.files import load_rows

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("conll", metavar="FILE", help="words and tags, a sentence to a paragraph")
    parser.add_argument("--output", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        sentences = load_rows([args.conll])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row for sentence in sentences for row in questions_of(sentence.fields["tokens"], sentence.fields["tags"])]
    Path(args.output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.output}: {len(rows):,} questions about {len(sentences):,} sentences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
