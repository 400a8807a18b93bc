"""Files into rows and rows into examples: every kind of file, every format, and a named error for every broken one."""

from __future__ import annotations

import gzip
import json

import pytest

from pyfinetune.errors import UserError
from pyfinetune.train.data.files import Row, hash_files, hash_rows, load_dataset_rows, load_rows
from pyfinetune.train.data.formats import recognise, to_examples
from pyfinetune.train.data.splits import split_rows

PAIR = {"prompt": "1+1=", "completion": "2"}


def write(path, content) -> str:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


def parquet(path) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR]), path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([PAIR, PAIR])),
        ("lines.json", json.dumps(PAIR) + "\n" + json.dumps(PAIR)),
        ("a.jsonl", json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n"),
        ("bom.jsonl", "\ufeff" + json.dumps(PAIR) + "\r\n" + json.dumps(PAIR)),
        ("a.csv", "prompt,completion\n1+1=,2\n1+1=,2\n"),
        ("a.tsv", "prompt\tcompletion\n1+1=\t2\n1+1=\t2\n"),
        ("a.jsonl.gz", gzip.compress((json.dumps(PAIR) + "\n" + json.dumps(PAIR)).encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    rows = load_rows([write(tmp_path / name, content)])
    assert [row.fields for row in rows] == [PAIR, PAIR]
    assert rows[0].place == f"{tmp_path / name}, row 1"


def test_parquet(tmp_path):
    rows = load_rows([parquet(tmp_path / "a.parquet")])
    assert [row.fields for row in rows] == [PAIR, PAIR]


def test_a_csv_cell_may_hold_quotes_commas_and_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,completion\n"a, b","he said ""c""\nand left\u2028"\n')
    assert load_rows([path])[0].fields == {"prompt": "a, b", "completion": 'he said "c"\nand left\u2028'}


@pytest.mark.parametrize(
    ("text", "sample_by", "expected"),
    [
        ("one\ntwo\n", "auto", ["one", "two"]),
        ("one\ntwo\n\nthree\n", "auto", ["one\ntwo", "three"]),
        ("one\r\ntwo\r\n\r\nthree", "auto", ["one\ntwo", "three"]),
        ("one\ntwo\n\nthree\n", "line", ["one", "two", "three"]),
        ("one\ntwo\n\nthree\n", "document", ["one\ntwo\n\nthree"]),
        ("one\ntwo\n", "paragraph", ["one\ntwo"]),
    ],
)
def test_plain_text_in_lines_paragraphs_or_whole(tmp_path, text, sample_by, expected):
    rows = load_rows([write(tmp_path / "a.txt", text)], sample_by)
    assert [row.fields["text"] for row in rows] == expected


def test_an_unknown_ending_is_plain_text_where_the_rows_of_one_are_named(tmp_path):
    """Corpora come as reviews.pos and europarl.en; `sample_by` says that they are text."""
    plain = write(tmp_path / "reviews.pos", "fine\ngrand\n")
    packed = write(tmp_path / "corpus.en.gz", gzip.compress(b"a dog\na cat\n"))
    assert [row.fields["text"] for row in load_rows([plain, packed], "line")] == ["fine", "grand", "a dog", "a cat"]
    with pytest.raises(UserError, match=r"unknown kind of file '\.pos'") as caught:
        load_rows([plain])
    assert "sample_by: line" in caught.value.fix
    rows = load_rows([write(tmp_path / "a.jsonl", json.dumps(PAIR))], "line")
    assert rows[0].fields == PAIR


def test_rows_keep_the_order_and_place_of_several_files(tmp_path):
    first = write(tmp_path / "a.jsonl", json.dumps(PAIR))
    second = write(tmp_path / "b.jsonl", json.dumps(PAIR))
    assert [row.place for row in load_rows([first, second])] == [f"{first}, row 1", f"{second}, row 1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "a.jsonl, row 2: broken JSON"),
        ("a.jsonl", "5\n", "a.jsonl, row 1: holds int, not an object"),
        ("a.json", '[{"a": 1}, {"a": 2}, {"a" 3}]', "a.json, row 3 (line 1): broken JSON"),
        ("a.json", '[{"a": 1}, {"a": 2} {"a": 3}]', "a.json, row 2 (line 1): broken JSON"),
        ("a.json", '[{"a": 1},\n "text"]', "a.json, row 2: holds str, not an object"),
        ("a.json", '[{"a": 1}, {"a": 2}', "a.json, row 2 (line 1): broken JSON"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.json", "", "a.json: holds no rows"),
        ("a.txt", "\n \n", "a.txt: holds no rows"),
        ("a.csv", "prompt,completion\na,b\nc\n", "row 2 (line 3): 1 cells, but 2 columns"),
        ("a.csv", "prompt,completion\na,b,c\n", "row 1 (line 2): 3 cells, but 2 columns"),
        ("a.csv", 'prompt,completion\n"a,b\n', "row 1 (line 2): broken CSV"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.jsonl", b'{"a": "caf\xe9"}', "line 1: byte 10 is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("a.xyz", "x", "unknown kind of file '.xyz'"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, name, content, message):
    with pytest.raises(UserError) as caught:
        load_rows([write(tmp_path / name, content)])
    assert str(tmp_path / name) in caught.value.message
    assert message in caught.value.message
    assert caught.value.fix


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no-such\.json: no such file"):
        load_rows([str(tmp_path / "no-such.json")])
    with pytest.raises(UserError, match="is a folder"):
        load_rows([str(tmp_path)])


def test_a_folder_through_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", json.dumps(PAIR))
    rows = load_dataset_rows(str(tmp_path / "data"))
    assert rows[0].fields == PAIR
    with pytest.raises(UserError, match=r"dataset_name: .* cannot be loaded"):
        load_dataset_rows(str(tmp_path / "data"), split="no-such-split")


def test_the_same_seed_splits_the_same_way():
    rows = list(range(100))
    train, held_out = split_rows(rows, 0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted(train + held_out) == rows
    assert split_rows(rows, 0.1, seed=3) == (train, held_out)
    assert split_rows(rows, 0.1, seed=4) != (train, held_out)
    assert len(split_rows(rows, 7, seed=0)[1]) == 7
    assert len(split_rows([1, 2], 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize("test_size", [3, 5, 0.9])
def test_a_split_that_leaves_nothing_is_refused(test_size):
    with pytest.raises(UserError, match="test_size"):
        split_rows([1, 2, 3], test_size, seed=0)


def test_hashes_change_with_the_contents(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    before = hash_files([path])
    write(tmp_path / "a.txt", "two")
    assert hash_files([path]) != before
    assert hash_rows([Row({"a": 1}, "f", 1)]) != hash_rows([Row({"a": 2}, "f", 1)])


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ALPACA = {"instruction": "add", "input": "1 1", "output": "2"}


@pytest.mark.parametrize(
    ("fields", "name", "question"),
    [
        (PAIR, "prompt_completion", "1+1="),
        (ALPACA, "alpaca", "add\n\n1 1"),
        ({"instruction": "add", "output": "2"}, "alpaca", "add"),
        ({"messages": MESSAGES, "id": 3}, "messages", "hi"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "messages", "hi"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            "conversations",
            "hi",
        ),
    ],
)
def test_formats_are_recognised_by_their_columns(fields, name, question):
    example = to_examples([Row(fields, "f.jsonl", 1)])[0]
    assert example.format == name
    assert [message["role"] for message in example.messages] == ["user", "assistant"]
    assert example.messages[0]["content"] == question


def test_raw_text_and_a_system_line():
    assert recognise(Row({"text": "once"}, "f.txt", 1)) == "text"
    assert to_examples([Row({"text": "once"}, "f.txt", 1)])[0].text == "once"
    system = to_examples([Row({**ALPACA, "system": "be brief"}, "f", 1)])[0].messages[0]
    assert system == {"role": "system", "content": "be brief"}


def test_columns_map_other_names():
    rows = [Row({"question": "1+1=", "answer": "2", "prompt": "ignored"}, "f.jsonl", 1)]
    example = to_examples(rows, {"prompt": "question", "completion": "answer"})[0]
    assert [message["content"] for message in example.messages] == ["1+1=", "2"]
    with pytest.raises(UserError, match="columns: maps prompt to 'q', which is not there"):
        to_examples(rows, {"prompt": "q"})


def assistant(content):
    return [MESSAGES[0], {"role": "assistant", "content": content}]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (PAIR, {"prompt": "a"}, "row 2: has no 'completion' (its columns: 'prompt')"),
        (PAIR, {"prompt": "a", "completion": None}, "row 2: has no 'completion'"),
        (PAIR, {"prompt": "a", "completion": " \n"}, "row 2: completion is empty"),
        (PAIR, {"prompt": "a", "completion": 5}, "row 2: completion is int, not text"),
        (PAIR, ALPACA, "row 2: is Alpaca, but f.jsonl, row 1 is prompt/completion"),
        (ALPACA, {"instruction": "a", "output": ""}, "row 2: output is empty"),
        (ALPACA, {"instruction": "", "output": "b"}, "row 2: instruction is empty"),
        (ALPACA, {"input": "a", "output": "b"}, "row 2: has no 'instruction'"),
        ({"text": "a"}, {"text": ""}, "row 2: text is empty"),
        ({"text": "a", "label": "b"}, {"text": "a"}, "row 2: has no 'label' (its columns: 'text')"),
        ({"text": "a", "label": "b"}, {"text": "a", "label": None}, "row 2: has no 'label'"),
        ({"messages": MESSAGES}, {"messages": []}, "row 2: messages is not a list of messages"),
        ({"messages": MESSAGES}, {"messages": MESSAGES[:1]}, "row 2: messages has no assistant message"),
        ({"messages": MESSAGES}, {"messages": assistant("")}, "message 2: content is empty"),
        ({"messages": MESSAGES}, {"messages": assistant(None)}, "message 2: content is NoneType, not text"),
        ({"messages": MESSAGES}, {"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": MESSAGES}, {"messages": [{"role": "user"}, MESSAGES[1]]}, "message 1 has no content"),
        ({"messages": MESSAGES}, {"messages": [{"role": "user", "content": 5}]}, "message 1: content is int"),
        (
            {"conversations": MESSAGES},
            {"conversations": [{"from": "alien", "value": "x"}]},
            "row 2: conversations: a turn is from 'alien'",
        ),
    ],
)
def test_a_row_at_fault_is_named(good, bad, message):
    with pytest.raises(UserError) as caught:
        to_examples([Row(good, "f.jsonl", 1), Row(bad, "f.jsonl", 2)])
    assert message in caught.value.message
    assert "f.jsonl, row 2" in caught.value.message
    assert caught.value.fix


def test_unknown_columns_list_what_is_there_and_how_to_map_them():
    with pytest.raises(UserError) as caught:
        to_examples([Row({"ask": "a", "reply": "b"}, "f.jsonl", 1)])
    assert "'ask', 'reply'" in caught.value.message
    assert "columns:" in caught.value.fix
    with pytest.raises(UserError, match="Alpaca but for 'output'"):
        to_examples([Row({"instruction": "a", "input": ""}, "f.jsonl", 1)])
