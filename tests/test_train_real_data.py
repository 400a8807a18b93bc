"""Every kind of real data, read through the configuration as a user would name it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_model import save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.train.config import parse_config
from pyfinetune.train.data.reading import read_data
from pyfinetune.train.preflight.checks import examine

FOLDER = Path(os.environ.get("PYFINETUNE_TEST_DATA", ""))
pytestmark = pytest.mark.skipif(not os.environ.get("PYFINETUNE_TEST_DATA"), reason="PYFINETUNE_TEST_DATA is not set")


def named(*parts: str) -> str:
    return str(FOLDER.joinpath(*parts))


# name: (keys, format, rows, question and answer of the first row begin with, rows that repeat an earlier one)
SETS = {
    "instructions": (
        {"train_file": named("instruct", "gsm8k_alpaca.json")},
        "alpaca",
        7473,
        ("Natalia sold clips", "Natalia sold 48/2"),
        0,
    ),
    "sentiment": (
        {
            "train_file": {
                "pos": named("sentiment", "rt-polarity.pos"),
                "neg": named("sentiment", "rt-polarity.neg"),
            },
            "task": "classification",
        },
        "classification",
        10662,
        ("Classify the text.\n\nthe rock is destined", "pos"),
        0,
    ),
    "entities": (
        {"train_file": named("ner", "wnut17_train.conll")},
        "token_classification",
        3394,
        ("List the named entities of the text.\n\n@paulwalk", "location: Empire State Building\nlocation: ESB"),
        91,
    ),
    "entities, held out": (
        {"train_file": named("ner", "wnut17_dev.conll"), "task": "token_classification"},
        "token_classification",
        1009,
        ("List the named entities of the text.\n\nStabilized approach", "none"),
        2,
    ),
    "summaries": (
        {"train_file": named("summarization", "dialogsum_dev.jsonl"), "task": "summarization"},
        "summarization",
        500,
        ("Summarize the text.\n\n#Person1#", "#Person2# has trouble"),
        0,
    ),
    "translation": (
        {"train_file": {"source": named("translation", "train.de.gz"), "target": named("translation", "train.en.gz")}},
        "translation",
        29000,
        ("Translate the text.\n\nZwei junge", "Two young"),
        3,
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_real_set_is_read_whole(name):
    keys, format_, rows, (question, answer), repeated = SETS[name]
    data = read_data(parse_config({"model_name_or_path": "m", "output_dir": "o", **keys}))
    assert data.format == format_
    assert len(data.train) == rows
    first = data.train[0].messages
    assert first[0]["content"].startswith(question)
    assert first[1]["content"].startswith(answer)
    assert {f.kind: len(f.rows) for f in data.findings} == ({"duplicate": repeated} if repeated else {})


def test_tasks_are_mixed_and_checked(tiny, tmp_path):
    """Summaries and entities in one run, of which the duplicates and the answers that are too long are told."""
    sources = [SETS["summaries"][0] | {"weight": 1}, SETS["entities, held out"][0] | {"weight": 1}]
    values = {"model_name_or_path": tiny, "output_dir": str(tmp_path / "out"), "device": "cpu"}
    found = examine(parse_config({**values, "sources": sources, "test_size": 0.1, "max_length": 512, "packing": True}))
    assert found.ok, found.problems
    assert [source["used"] for source in found.data["sources"]] == [450, 450]
    assert found.counts["train"]["examples"] == 900
    assert found.counts["held_out"]["examples"] == 50 + 101
    assert found.counts["train"]["ended"] + found.counts["train"]["cut_short"] == found.counts["train"]["documents"]
    assert found.packing["filled"] > 0.9
    assert any("are cut short" in problem.message for problem in found.problems)
    assert any(
        problem.message.startswith("2 rows are ") and "duplicates" in problem.message for problem in found.problems
    )
