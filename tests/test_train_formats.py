"""The tasks' rows: CoNLL, aligned files, a file a label, and each format as a question with an answer."""

from __future__ import annotations

import gzip
import json

import pytest
from tiny_model import CHATML, END, make_tokenizer, tiny_fixture  # noqa: F401

from pyfinetune.errors import UserError
from pyfinetune.train.config import parse_config
from pyfinetune.train.data.files import Row, load_aligned_rows, load_dataset_rows, load_labelled_rows, load_rows
from pyfinetune.train.data.formats import to_examples
from pyfinetune.train.data.reading import read_data
from pyfinetune.train.data.tokenizing import load_tokenizer, tokenize

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def example(fields, task="auto"):
    return to_examples([Row(fields, "f.jsonl", 1)], task=task)[0]


def chat(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("fields", "name", "question", "answer"),
    [
        ({"instruction": "a", "context": "b", "response": "c"}, "dolly", "a\n\nb", "c"),
        ({"instruction": "a", "context": "", "response": "c"}, "dolly", "a", "c"),
        ({"prompt": "a", "response": "b", "source": "s"}, "gpt4all", "a", "b"),
        ({"question": "a", "answer": "b"}, "question_answering", "a", "b"),
        ({"question": "a", "context": "c", "answers": {"text": ["b", "d"]}}, "question_answering", "c\n\na", "b"),
        ({"question": "a", "answers": ["b"]}, "question_answering", "a", "b"),
        ({"dialogue": "a", "summary": "b"}, "summarization", "Summarize the text.\n\na", "b"),
        ({"article": "a", "highlights": "b"}, "summarization", "Summarize the text.\n\na", "b"),
        ({"translation": {"de": "a", "en": "b"}}, "translation", "Translate from de to en.\n\na", "b"),
        ({"source": "a", "target": "b"}, "translation", "Translate the text.\n\na", "b"),
        ({"text": "a", "label": "pos"}, "classification", "Classify the text.\n\na", "pos"),
        ({"text": "a", "label": 0}, "classification", "Classify the text.\n\na", "0"),
        ({"text": "a", "text_pair": "b", "label": 1}, "classification", "Classify the text.\n\na\n\nb", "1"),
        (
            {"tokens": ["Ann", "Lee", "of", "Bonn"], "ner_tags": ["B-per", "I-per", "O", "B-loc"]},
            "token_classification",
            "List the named entities of the text.\n\nAnn Lee of Bonn",
            "per: Ann Lee\nloc: Bonn",
        ),
        ({"tokens": ["a"], "tags": ["O"]}, "token_classification", "List the named entities of the text.\n\na", "none"),
    ],
)
def test_a_task_becomes_a_question_with_an_answer(fields, name, question, answer):
    found = example(fields)
    assert found.format == name
    assert [(m["role"], m["content"]) for m in found.messages] == [("user", question), ("assistant", answer)]
    assert found.fields == ({} if name in ("dolly", "gpt4all") else fields)


def test_spans_follow_the_tags():
    """Two entities of one type stand side by side, and one begins without a B tag."""
    tags = ["B-a", "B-a", "I-a", "O", "I-b", "I-c"]
    fields = {"tokens": list("uvwxyz"), "tags": tags}
    assert example(fields).messages[1]["content"] == "a: u\na: v w\nb: y\nc: z"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "tokens has 2 entries, but tags has 1"),
        ({"tokens": "a b", "tags": ["O"]}, "tokens is str, not a list"),
        ({"tokens": ["a", 5], "tags": ["O", "O"]}, "tokens holds something that is not text"),
        ({"tokens": [], "tags": []}, "tokens is empty and asks nothing"),
        ({"text": "a", "label": 0.5}, "label is float, not a class"),
        ({"text": "a", "label": " "}, "label is empty and leaves nothing to learn"),
        ({"text": "", "label": "pos"}, "text is empty"),
        ({"question": "a", "answers": {"text": []}}, "answers is empty and leaves nothing to learn"),
        ({"question": "a", "answers": 5}, "answers is int, not a list"),
        ({"question": 5, "answer": "b"}, "question is int, not text"),
        ({"translation": {"de": "a"}}, "translation does not hold two languages"),
        ({"translation": "a"}, "translation does not hold two languages"),
        ({"translation": {"de": "a", "en": None}}, "translation is NoneType, not text"),
        ({"dialogue": "a", "summary": ""}, "summary is empty and leaves nothing to learn"),
        ({"dialogue": "  ", "summary": "a"}, "dialogue is empty and asks nothing"),
        (chat("assistant", "user"), "message 1 is from 'assistant', but nothing was asked before it"),
        (chat("system", "assistant"), "message 2 is from 'assistant', but nothing was asked before it"),
        (chat("user", "assistant", "assistant"), "message 3 is from 'assistant', and so is the one before it"),
        (chat("user", "user", "assistant"), "message 2 is from 'user', and so is the one before it"),
        (chat("user", "system", "assistant"), "message 2 is from 'system', which can only come first"),
        (chat("user", "tool", "assistant"), "message 2 is from 'tool', but no assistant called it"),
        (chat("user", "narrator"), "message 2 is from 'narrator', a role that is not known"),
        ({"messages": [None, ANSWER]}, "message 1 has no role"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": None}}]}, "content is dict, not text"),
        ({"conversations": [{"from": None, "value": "x"}]}, "a turn is from None"),
    ],
)
def test_a_row_that_teaches_nothing_is_named(fields, message):
    with pytest.raises(UserError) as caught:
        example(fields)
    assert caught.value.message.startswith("f.jsonl, row 1: ")
    assert message in caught.value.message
    assert caught.value.fix


def test_a_called_tool_may_answer():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "content": None}
    found = example({"messages": [USER, call, {"role": "tool", "content": "5"}, ANSWER]})
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_sharegpt_row_with_a_system_column():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert [m["role"] for m in example({"conversations": turns, "system": "be kind"}).messages] == [
        "system",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("task", "fields", "format_"),
    [
        ("pretrain", {"text": "a", "label": 1}, "text"),
        ("classification", {"text": "a", "label": 1}, "classification"),
        ("summarization", {"text": "a", "summary": "b", "label": 1}, "summarization"),
        ("sft", {"text": "a", "label": 1}, "classification"),
        (
            "question_answering",
            {"prompt": "x", "completion": "y", "question": "a", "answer": "b"},
            "question_answering",
        ),
    ],
)
def test_the_task_decides_between_columns(task, fields, format_):
    assert example(fields, task).format == format_


@pytest.mark.parametrize(
    ("task", "fields", "message", "fix"),
    [
        (
            "classification",
            {"text": "a"},
            "task: classification does not fit f.jsonl, row 1, which is raw text",
            "pretrain",
        ),
        (
            "pretrain",
            {"prompt": "a", "completion": "b"},
            "does not fit f.jsonl, row 1, which is prompt/completion",
            "sft",
        ),
        ("sft", {"text": "a"}, "task: sft does not fit f.jsonl, row 1, which is raw text", "set task: pretrain"),
        ("translation", {"question": "a", "answer": "b"}, "which is question/answer", "set task: question_answering"),
    ],
)
def test_a_task_that_does_not_fit_is_named(task, fields, message, fix):
    with pytest.raises(UserError) as caught:
        example(fields, task)
    assert message in caught.value.message
    assert fix in caught.value.fix


def test_conll_sentences_are_rows(tmp_path):
    path = tmp_path / "a.conll"
    path.write_bytes("-DOCSTART- -X- O\r\n\r\nAnn\tB-per\r\né\tO\r\n\t\r\nin NN O\r\nRom NNP B-loc".encode())
    rows = load_rows([str(path)])
    assert [row.fields for row in rows] == [
        {"tokens": ["Ann", "é"], "tags": ["B-per", "O"]},
        {"tokens": ["in", "Rom"], "tags": ["O", "B-loc"]},
    ]
    assert rows[1].place == f"{path}, row 2"


def test_a_conll_line_without_a_tag_is_named(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("a\tO\n\nb\tO\nc\n")
    with pytest.raises(UserError, match=r"a\.conll, row 2 \(line 4\): 'c' is not a token and its tag"):
        load_rows([str(path)])


def test_lines_that_belong_together(tmp_path):
    source, target = tmp_path / "train.de.gz", tmp_path / "train.en"
    source.write_bytes(gzip.compress(b"Hund\r\n\r\nKatze\n"))
    target.write_text("dog\n\ncat")
    rows = load_aligned_rows({"source": str(source), "target": str(target)})
    assert [row.fields for row in rows] == [
        {"source": "Hund", "target": "dog"},
        {"source": "", "target": ""},
        {"source": "Katze", "target": "cat"},
    ]
    assert rows[2].place == f"{source} + {target}, row 3"
    target.write_text("dog\n")
    with pytest.raises(UserError, match=r"train\.de\.gz has 3 lines, .*train\.en has 1 lines"):
        load_aligned_rows({"source": str(source), "target": str(target)})


def test_a_file_for_each_label_and_for_each_column_in_a_run(tmp_path):
    for name, text in (("a.pos", "good\n\nfine\n"), ("a.neg", "bad\n")):
        (tmp_path / name).write_text(text)
    files = {"pos": str(tmp_path / "a.pos"), "neg": str(tmp_path / "a.neg")}
    assert [row.fields["label"] for row in load_labelled_rows(files)] == ["pos", "pos", "neg"]
    assert load_labelled_rows(files)[1].place == f"{tmp_path / 'a.pos'}, row 3"
    base = {"model_name_or_path": "m", "output_dir": "o"}
    data = read_data(parse_config({**base, "train_file": files, "task": "classification"}))
    assert [e.messages[1]["content"] for e in data.train] == ["pos", "pos", "neg"]
    aligned = {"source": str(tmp_path / "a.neg"), "target": str(tmp_path / "a.neg")}
    assert read_data(parse_config({**base, "train_file": aligned})).format == "translation"
    (tmp_path / "a.neg").write_text("\n \n")
    with pytest.raises(UserError, match=r"a\.neg: holds no rows"):
        load_labelled_rows(files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,prompt\na,b\n", "the column 'prompt' is there twice"),
        ("a.csv", b"\xef\xbb\xbfprompt,answer\r\na,b\r\n", "no known format has the columns 'prompt', 'answer'"),
        ("a.csv", b"prompt,completion\r\na,caf\xe9\r\n", "line 2: byte 24 is not UTF-8"),
        ("a.jsonl", b'{"messages": [{"role": null, "content": null}]}', "row 1: messages: message 1 has no role"),
        ("a.jsonl", b'{"prompt": null, "completion": null}', "no known format has the columns 'prompt', 'completion'"),
    ],
)
def test_hostile_bytes_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        to_examples(load_rows([str(path)]))
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_json_in_its_other_shapes(tmp_path):
    path = tmp_path / "a.json"
    row = {"prompt": "a", "completion": "b"}
    for content in ({"version": 1, "data": [row]}, row, [row]):
        path.write_text(json.dumps(content, indent=2))
        assert [found.fields for found in load_rows([str(path)])] == [row]
    path.write_text("5")
    with pytest.raises(UserError, match=r"a\.json, row 1: holds int, not an object"):
        load_rows([str(path)])


@pytest.mark.parametrize(("name", "place"), [("a.json", "a.json"), ("a.jsonl", "a.jsonl, row 1")])
def test_json_without_end_to_its_depth(tmp_path, name, place):
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(UserError, match=f"{place}: JSON nested too deeply|{place}.*broken JSON"):
        load_rows([str(tmp_path / name)])


def test_half_a_character_is_named_and_can_be_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "\\ud83d"}\n')
    values = {"model_name_or_path": "m", "output_dir": "o", "train_file": str(path)}
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: completion holds half a character") as caught:
        read_data(parse_config(values))
    assert "clean: [mojibake]" in caught.value.fix
    assert len(read_data(parse_config({**values, "clean": "mojibake"})).train) == 1
    turns = [{"role": "user", "content": "\ud83d"}, ANSWER]
    with pytest.raises(UserError, match="message 1: content holds half a character"):
        example({"messages": turns})


def test_a_byte_order_mark_and_carriage_returns_are_not_data(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\n")
    assert load_rows([str(path)])[0].fields == {"prompt": "a", "completion": "b"}


def test_a_huge_row_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "word " * 500_000}))
    assert len(example(load_rows([str(path)])[0].fields).messages[1]["content"]) == 2_500_000


def test_class_numbers_of_a_dataset_become_names(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    values = {"model_name_or_path": "m", "output_dir": "o", "dataset_name": "any", "dataset_test_split": "test"}
    with pytest.raises(UserError, match=r"any \(train\), row 3: has no 'label'"):
        read_data(parse_config(values))
    data = read_data(parse_config({**values, "clean": "missing"}))
    assert [e.messages[1]["content"] for e in (*data.train, *data.held_out)] == ["pos", "neg"] * 2
    assert {finding.kind for finding in data.findings} == {"missing", "leak"}
    assert [row.fields["label"] for row in load_dataset_rows("any")] == ["pos", "neg", None]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made.select([]))
    with pytest.raises(UserError, match=r"'any' \(split 'train'\) holds no rows"):
        load_dataset_rows("any")


def test_texts_and_questions_in_one_set_keep_their_order():
    tokenizer = make_tokenizer(chat_template=CHATML)
    mixed = [example({"text": "one"}), example({"prompt": "a", "completion": "two"}), example({"text": "three"})]
    written = [tokenizer.decode(document.input_ids) for document in tokenize(mixed, tokenizer, 64).documents]
    assert [next(word for word in ("one", "two", "three") if word in text) for text in written] == [
        "one",
        "two",
        "three",
    ]


def test_a_task_without_a_template_gets_headings(tiny):
    tokenizer = load_tokenizer(tiny, data_format="classification")
    (document,) = tokenize([example({"text": "fine", "label": "pos"})], tokenizer, 64).documents
    written = tokenizer.decode(document.input_ids)
    assert written == f"### User:\nClassify the text.\n\nfine\n\n### Assistant:\npos{END}"
    bare = load_tokenizer(tiny, "none", data_format="classification")
    (document,) = tokenize([example({"text": "fine", "label": "pos"})], bare, 64).documents
    assert bare.decode(document.input_ids) == f"Classify the text.\n\nfine\npos{END}"
