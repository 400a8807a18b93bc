"""Repeated, nearly repeated, wrongly decoded, empty and leaked rows: found by number, and dropped on request only."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfinetune.errors import UserError
from pyfinetune.train.config import parse_config
from pyfinetune.train.data.cleaning import exact_duplicates, mojibake, near_duplicates, similarity
from pyfinetune.train.data.reading import read_data

WORDS = [f"word{n}" for n in range(400)]
LONG = "the storm tore the roof from the old barn and the cows stood in the rain until noon"


def sentence(rng: random.Random, length: int = 30) -> list[str]:
    return rng.choices(WORDS, k=length)


def write(path, *pairs) -> str:
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in pairs))
    return str(path)


def read(near: bool = False, **values):
    return read_data(parse_config({"model_name_or_path": "m", "output_dir": "o", **values}), near)


def found(data) -> dict:
    return {
        (finding.kind, finding.part): [place.rpartition(" ")[2] for place, _ in finding.rows]
        for finding in data.findings
    }


def test_near_duplicates_are_those_that_brute_force_finds():
    rng = random.Random(0)
    texts = []
    for number in range(300):
        words = sentence(rng) if number % 3 else list(rng.choice(texts or [" ".join(sentence(rng))]).split())
        for _ in range(rng.choice((0, 1, 2, 8))):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    truth = {}
    for later in range(len(texts)):
        earlier = next((e for e in range(later) if similarity(texts[e], texts[later]) >= 0.8), None)
        if earlier is not None:
            truth[later] = earlier
    assert len(truth) > 50
    assert near_duplicates(texts) == truth
    assert near_duplicates(texts) == near_duplicates(list(texts))


def test_similarity_is_the_share_of_common_shingles():
    assert similarity("a b c d", "A, b c. d!") == 1.0
    assert similarity("a b c d e", "b c d e f") == pytest.approx(2 / 4)
    assert similarity("f(x) + 1 = 2", "f(x) - 1 = 2") < 0.8
    assert similarity("今天天气很好", "今天天气不好") < 0.8
    assert (similarity("", ""), similarity("", "a"), similarity("!", "?")) == (1.0, 0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12))
def test_any_text_can_be_compared(texts):
    for later, earlier in near_duplicates(texts).items():
        assert earlier < later
        assert similarity(texts[earlier], texts[later]) >= 0.8
    for later, earlier in exact_duplicates(texts).items():
        assert texts[later].split() == texts[earlier].split()
    assert all(text is None or text for text in map(mojibake, texts))


def test_short_rows_of_one_pattern_are_no_duplicates():
    assert near_duplicates([f"{a}+{b}= {a + b}" for a in range(9) for b in range(9)]) == {}


def test_only_pairs_across_the_border_count_for_a_leak():
    texts = [LONG, LONG + " sharp", "something else entirely is written here", LONG]
    assert near_duplicates(texts) == {1: 0, 3: 0}
    assert near_duplicates(texts, since=2) == {3: 0}
    assert near_duplicates(texts, since=3) == {3: 0}


def test_a_huge_row_is_compared_in_blocks():
    text = " ".join(str(number) for number in np.random.default_rng(0).integers(0, 10**6, 60_000))
    assert near_duplicates([text, "short", text + " more"]) == {2: 0}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("café", "cafÃ©"),
        ("it\u2019s", "itâ€™s"),
        ("Größe", "GrÃ¶ÃŸe"),
        ("21 °C", "21 Â°C"),
        ("при", "Ð¿Ñ€Ð\u00b8"),
        ("日本", "æ—¥æœ¬"),
    ],
)
def test_text_of_another_encoding_is_seen(right, wrong):
    assert mojibake(right) is None
    assert mojibake(f"a {wrong} b") is not None


@pytest.mark.parametrize(
    "text",
    [
        "« CAFÉ »",
        "il a passé\u00a0»",
        "é\u00a0»",
        "NÃO",
        "JOÃO",
        "5\u00a0€",
        "señor ¿qué?",
        "fiancé—he",
        "“É”",
        "À\u00a0«",
        "日本語",
        "😀",
        "",
    ],
)
def test_real_accents_are_left_alone(text):
    assert mojibake(text) is None


@pytest.mark.parametrize("text", ["caf\ufffd", "it\x92s"])
def test_signs_that_no_text_has(text):
    assert mojibake(text) is not None


ROWS = [
    ("a", "one"),
    ("b", LONG),
    ("a", " one"),
    ("b", LONG.upper() + "!"),
    ("c", "cafÃ©"),
    ("d", "four"),
]


def test_findings_name_the_rows_and_drop_nothing_unasked(tmp_path):
    data = read(near=True, train_file=write(tmp_path / "a.jsonl", *ROWS))
    assert found(data) == {
        ("mojibake", "train"): ["5"],
        ("duplicate", "train"): ["3"],
        ("near_duplicate", "train"): ["4"],
    }
    assert len(data.train) == 6
    assert not any(finding.dropped for finding in data.findings)
    duplicate = next(f for f in data.findings if f.kind == "duplicate").to_dict()
    assert duplicate["rows"] == [
        {"row": f"{tmp_path / 'a.jsonl'}, row 3", "detail": f"repeats {tmp_path / 'a.jsonl'}, row 1"}
    ]


@pytest.mark.parametrize(
    ("clean", "left"),
    [("mojibake", 5), ("duplicate", 5), ("near_duplicate", 5), (["duplicate", "mojibake"], 4), ("all", 3)],
)
def test_clean_drops_what_it_names(tmp_path, clean, left):
    path = write(tmp_path / "a.jsonl", *ROWS)
    assert len(read(train_file=path, clean=clean).train) == left


def test_rows_at_fault_are_dropped_on_request_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"messages": None},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
        {"messages": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"row 1: no known format"):
        read(train_file=str(path))
    with pytest.raises(UserError, match=r"row 3: messages: message 1 is from 'assistant'") as caught:
        read(train_file=str(path), clean=["missing"])
    assert "clean: [roles]" in caught.value.fix
    data = read(train_file=str(path), clean=["missing", "roles", "empty"])
    assert found(data) == {("missing", "train"): ["1"], ("roles", "train"): ["3"], ("empty", "train"): ["4", "5"]}
    assert all(finding.dropped for finding in data.findings)
    assert len(data.train) == 1


def test_a_wrong_type_is_never_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 5}')
    with pytest.raises(UserError, match="row 2: completion is int, not text"):
        read(train_file=str(path), clean="all")


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl: no row is left: clean: drops all of them"):
        read(train_file=write(tmp_path / "a.jsonl", ("a", "cafÃ©")), clean="mojibake")
    with pytest.raises(UserError, match=r"a\.jsonl: no row is left: clean: drops all 1 of them"):
        read(train_file=write(tmp_path / "a.jsonl", ("a", "")), clean="empty")


def test_leaks_are_found_by_content_and_by_resemblance(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "one"), ("b", LONG), ("c", "three"), ("a", "one "))
    held = write(tmp_path / "b.jsonl", ("a", "one"), ("b", LONG + "!"), ("x", "new"))
    assert found(read(train_file=train, validation_file=held))["leak", "validation"] == ["1"]
    assert found(read(near=True, train_file=train, validation_file=held))["leak", "validation"] == ["1", "2"]
    data = read(train_file=train, validation_file=held, clean="leak")
    assert [example.messages[0]["content"] for example in data.train] == ["c"]
    assert len(data.held_out) == 3
    assert found(read(train_file=train, test_file=held))["leak", "test"] == ["1"]
    with pytest.raises(UserError, match="every training row is also held out"):
        read(train_file=train, validation_file=train, clean="leak")


def test_a_task_leaks_by_its_question(tmp_path):
    """The same text under another label is no new text to be judged on."""
    for name, label in (("a.jsonl", "pos"), ("b.jsonl", "neg")):
        (tmp_path / name).write_text(json.dumps({"text": "a film", "label": label}))
    data = read(train_file=str(tmp_path / "a.jsonl"), validation_file=str(tmp_path / "b.jsonl"))
    assert found(data) == {("leak", "validation"): ["1"]}


def test_duplicates_are_dropped_before_the_split(tmp_path):
    pairs = [(f"q{n % 20}", f"a{n % 20}") for n in range(60)]
    path = write(tmp_path / "a.jsonl", *pairs)
    assert ("leak", "validation") in found(read(train_file=path, test_size=0.3))
    data = read(train_file=path, test_size=0.3, clean="duplicate")
    assert ("leak", "validation") not in found(data)
    assert len(data.train) + len(data.held_out) == 20
