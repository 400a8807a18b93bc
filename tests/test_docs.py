"""The pages of docs/: every file on them is accepted, every link leads somewhere, and every command works."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import floors
import pytest
import results
import small_model
import tutorial
import yaml
from answer_pairs import out_of_order, pairs_of, with_a_wrong_number
from entity_questions import questions_of
from tiny_model import save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.train.comparing.config import load_compare
from pyfinetune.train.config import load_config, parse_config

INDEX = tutorial.DOCS / "README.md"
PAGES = tutorial.pages()
FILES = [(page, block) for page in PAGES for block in tutorial.blocks(page) if block.language == "yaml"]
a_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", INDEX.read_text(encoding="utf-8"))
    assert set(linked) == {page.name for page in PAGES}


@pytest.mark.parametrize("page", [INDEX, *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(("page", "block"), FILES, ids=lambda value: getattr(value, "file_name", None) or value.stem)
def test_every_configuration_is_accepted(page, block, tmp_path):
    assert block.file_name, f"{page.name}: a YAML block does not begin with `# NAME.yaml`"
    for name, text in (("as_it_stands", block.text), ("short", tutorial.shortened(block.text))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        if "run" in yaml.safe_load(text):
            config = load_compare(path)
            continue
        config = load_config(path)
        assert config.output_dir.startswith("runs/")
    assert (config.rows if "run" in yaml.safe_load(text) else config.trainer["max_steps"]) == tutorial.SHORT_STEPS


@a_page
def test_a_page_has_commands_and_its_files_are_used(page):
    commands = [words for block in tutorial.blocks(page) for words in block.commands]
    assert commands
    for words in commands:
        assert words[0] in tutorial.PROGRAMS, words
        if words[0] == "python":
            assert (tutorial.DOCS.parent / words[1]).is_file(), words
    given = {word for words in commands for word in words}
    for block in tutorial.blocks(page):
        assert block.file_name is None or block.file_name in given, f"{page.name}: {block.file_name} is not used"


# PEFT asks transformers 5.23 for a property by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.slow
@a_page
def test_a_page_can_be_followed(page, tmp_path, test_data, monkeypatch):
    monkeypatch.setenv("PYFINETUNE_RECYCLE_PAGES", "0")
    followed = tutorial.Tutorial(page, tmp_path, test_data, short=True)
    followed.follow()
    assert followed.steps
    assert followed.runs
    for name, output_dir in followed.runs:
        config = load_config(tmp_path / name)
        record = json.loads((tmp_path / output_dir / "run.json").read_text())
        assert record["status"] == "complete"
        assert record["result"]["steps"] == tutorial.SHORT_STEPS
        assert (tmp_path / output_dir / "report.html").is_file() == config.report


def test_a_page_is_read_as_files_and_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```yaml\n# a.yaml\nkey: 1\n```\n\n"
        "```console\n$ pyfinetune train \\\n    'a b.yaml'  # slow\nout\n$ python x.py\n```\n"
        "```\nplain\n```\n\n```python\n# x.py\nprint(1)\n```\n"
    )
    found = tutorial.blocks(page)
    assert [(block.language, block.file_name) for block in found] == [
        ("yaml", "a.yaml"),
        ("console", None),
        ("", None),
        ("python", "x.py"),
    ]
    assert found[1].commands == [["pyfinetune", "train", "a b.yaml"], ["python", "x.py"]]
    assert found[0].commands == []


def test_a_failing_command_is_shown_with_what_it_printed(tmp_path):
    def follow(command: str, short: bool):
        (tmp_path / "page.md").write_text(f"```console\n$ {command}\n```\n")
        tutorial.Tutorial(tmp_path / "page.md", tmp_path / "work", short=short).follow()

    with pytest.raises(UserError, match=r"no-such\.yaml: no such file(.|\n)*exit code 2"):
        follow("pyfinetune train no-such.yaml", short=True)
    with pytest.raises(UserError, match=r"\nfirst\n(.|\n)*exit code 3"):
        follow("python -c \"print('first'); raise SystemExit(3)\"", short=False)
    with pytest.raises(UserError, match="rm: not a program that a page may call"):
        follow("rm -r data", short=False)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "1\n2\n3\n", "1\n2\n"),
        ("a.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3}\n', '{"a": 1}\n{"a": 2}\n'),
        ("a.json", "[1, 2, 3]", "[1, 2]"),
        ("a.conll", "a\tO\nb\tO\n\t\nc\tO\n\nd\tO\n", "a\tO\nb\tO\n\nc\tO\n"),
    ],
)
def test_the_first_rows_of_a_file(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert tutorial.head(tmp_path / name, 2).decode() == expected
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert gzip.decompress(tutorial.head(tmp_path / f"{name}.gz", 2)).decode() == expected


def test_short_trains_two_steps_and_leaves_the_rest_alone():
    text = (
        "output_dir: runs/x\ntest_size: 500\neval_steps: 50\ntrainer:\n  num_train_epochs: 3\n  learning_rate: 1.0e-3\n"
    )
    assert yaml.safe_load(tutorial.shortened(text)) == {
        "output_dir": "runs/x",
        "test_size": 0.2,
        "trainer": {"learning_rate": 1e-3, "max_steps": tutorial.SHORT_STEPS},
    }


def small(kind: str, folder: Path, texts: str, *more: str) -> Path:
    size = ["--vocab-size", "400", "--hidden-size", "32", "--layers", "1", "--heads", "2", "--positions", "64"]
    assert small_model.main([kind, "--texts", texts, "--output-dir", str(folder), *size, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("texts") / "reviews.pos"
    path.write_text("A grand film in Paris .\nA dull film , über-dull .\n" * 20, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("encoder", "AutoModelForMaskedLM"),
        ("decoder", "AutoModelForCausalLM"),
        ("encoder-decoder", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_small_model_loads_by_its_folder_and_follows_its_seed(tmp_path, words, kind, auto):
    import torch
    import transformers

    models = [
        getattr(transformers, auto).from_pretrained(small(kind, tmp_path / name, words, "--seed", seed))
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    ]
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) <= models[0].get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id == models[0].config.pad_token_id
    ids = tokenizer("A grand film in Paris .")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) in ("A grand film in Paris .", "A grand film in Paris.")
    if kind == "encoder":
        assert ids[0] == tokenizer.cls_token_id
        assert ids[-1] == tokenizer.sep_token_id
        assert tokenizer.mask_token_id is not None
        assert tokenizer.unk_token_id not in ids
    if kind == "encoder-decoder":
        assert ids[-1] == tokenizer.eos_token_id == models[0].config.eos_token_id
        assert models[0].config.decoder_start_token_id == tokenizer.pad_token_id


def test_a_lowercase_encoder_reads_capitals_as_small_letters(tmp_path, words):
    from transformers import AutoTokenizer

    folder = small("encoder", tmp_path / "lower", words, "--lowercase")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("FILM ÜBER")["input_ids"] == tokenizer("film über")["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer("FILM ÜBER")["input_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100, "heads": 3}, "no multiple of twice the 3 heads"),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(InvalidInput, match=message):
        small_model.Shape(**change)


def test_a_missing_text_is_named(capsys, tmp_path):
    assert small_model.main(["decoder", "--texts", "no-such.txt", "--output-dir", str(tmp_path)]) == 2
    assert "no-such.txt: no such file" in capsys.readouterr().err


def test_every_text_column_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}], "label": "pos", "n": 3}) + "\n"
    )
    (tmp_path / "a.conll").write_text("New\tB-place\nYork\tI-place\n")
    assert small_model.read_texts([str(tmp_path / "a.jsonl")]) == ["hi"]
    assert small_model.read_texts([str(tmp_path / "a.conll")]) == ["New York"]


def test_a_question_has_one_answer_and_says_where_it_begins():
    tokens = ["Ann", "met", "Bo", "Li", "in", "New", "York", "."]
    tags = ["B-person", "O", "B-person", "I-person", "O", "B-creative-work", "I-creative-work", "O"]
    (row,) = questions_of(tokens, tags)  # two persons: which of them is meant?
    assert row["question"] == "Which creative work is named?"
    (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
    assert row["context"][start : start + len(answer)] == answer == "New York"
    assert list(questions_of(["Hi"], ["O"])) == []


def test_pairs_differ_and_are_made_in_turn():
    import random

    rows = [(f"{n}+{n}?", f"{n}+{n}\n= {2 * n}") for n in range(1, 9)]
    pairs = pairs_of(rows, seed=3)
    assert pairs == pairs_of(rows, seed=3) != pairs_of(rows, seed=4)
    for (question, answer), pair in zip(rows, pairs, strict=True):
        assert (pair["prompt"], pair["chosen"]) == (question, answer)
        assert pair["rejected"] != answer
        assert (pair["rejected"] in [a for _, a in rows]) == (pair["kind"] == "another answer")
        same_lines = sorted(pair["rejected"].split("\n")) == sorted(answer.split("\n"))
        assert same_lines == (pair["kind"] == "out of order")
    kinds = [pair["kind"] for pair in pairs[:4]]
    assert kinds == ["out of order", "another answer", "out of order", "wrong number"]
    assert with_a_wrong_number("none here", random.Random(0)) is None
    assert out_of_order("same\nsame", random.Random(0)) is None
    with pytest.raises(UserError, match="all answers are the same"):
        pairs_of([("a", "1"), ("b", "1")])


def held_out_run(tmp_path: Path, train: list[dict], held: list[dict], model: str = "m", **more):
    for name, rows in (("train", train), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model_name_or_path": model, "output_dir": "runs/x", "train_file": str(tmp_path / "train.jsonl")}
    return parse_config({**values, "validation_file": str(tmp_path / "held.jsonl"), **more})


def test_floors_of_tasks_are_what_a_hand_counts(tmp_path):
    def floor(train, held):
        return floors.floor_of(held_out_run(tmp_path, train, held))

    labels = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}, {"text": "c", "label": "y"}]
    found = floor(labels, [{"text": "d", "label": "y"}, {"text": "e", "label": "x"}])
    assert "'x'" in found.what
    assert found.scores["accuracy"].value == 0.5

    tagged = [{"tokens": ["In", "New", "York"], "tags": ["O", "B-place", "I-place"]}]
    tagged += [{"tokens": ["New", "idea"], "tags": ["B-thing", "O"]}]
    held = [{"tokens": ["To", "New", "York", "and", "Rome"], "tags": ["O", "B-place", "I-place", "O", "B-place"]}]
    scores = floor(tagged, held).scores
    assert scores["span_precision"].value == 1.0  # the longest entry, not the thing "New"
    assert scores["span_recall"].value == 0.5

    asked = [{"question": "Who?", "context": "here is Ann Li .", "answer": "Ann Li"}]
    assert floor(asked, asked).scores["exact_match"].value == 1.0

    dialogue = [{"dialogue": "one two\nthree four\nfive", "summary": "one two three four"}]
    found = floor(dialogue, dialogue)
    assert found.what == "the first 2 lines"
    assert found.scores["rougeL"].value == 1.0

    pair = [{"source": "Berlin ist eine sehr schöne Stadt", "target": "Berlin is a very beautiful city"}]
    same = [{"source": "a b c d e", "target": "a b c d e"}]
    assert floor(pair, pair).scores["bleu"].value < 20
    assert floor(pair, same).scores["bleu"].value == pytest.approx(100)


def test_the_floor_of_a_language_model_is_its_token_frequencies(tiny, tmp_path):
    rows = [{"prompt": "p", "completion": "0 1 2"}] * 3
    found = floors.floor_of(held_out_run(tmp_path, rows, rows[:1], model=tiny))
    rare = floors.floor_of(held_out_run(tmp_path, rows, [{"prompt": "p", "completion": "fox"}], model=tiny))
    assert 1 < found.scores["perplexity"].value < rare.scores["perplexity"].value
    with pytest.raises(UserError, match="nothing is held out"):
        floors.floor_of(held_out_run(tmp_path, rows, rows, model=tiny, validation_file=None))


def test_the_table_is_that_of_the_results():
    text = INDEX.read_text(encoding="utf-8")
    kept = json.loads(results.FILE.read_text(encoding="utf-8"))
    assert results.rewritten(text, results.table(kept)) == text, "run python docs/results.py"
    files = {block.file_name for _, block in FILES}
    for result in kept:
        assert result["file"] in files
        assert (tutorial.DOCS / f"{result['page']}.md").is_file()


def test_results_replace_older_ones_of_the_same_file(tmp_path):
    old = {"page": "b", "file": "b.yaml", "metric": "accuracy"}
    results.keep([old, {"page": "a", "file": "a.yaml"}], tmp_path / "results.json")
    results.keep([old | {"metric": "bleu"}], tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"page": "a", "file": "a.yaml"},
        old | {"metric": "bleu"},
    ]
    with pytest.raises(UserError, match="needs exactly one"):
        results.rewritten("no marks", "table")


def test_a_run_is_measured_beside_its_floor(tiny, tmp_path):
    """Of a causal model on labelled rows: the accuracy that `eval` gives, and that of the most frequent class."""
    from pyfinetune.train.run import train

    labels = [{"text": f"film {n}", "label": "pos" if n % 3 else "neg"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    values = {"model_name_or_path": tiny, "train_file": str(tmp_path / "rows.jsonl"), "test_size": 0.5, "lora_r": 2}
    values |= {"output_dir": str(tmp_path / "out"), "max_length": 64, "report": False, "device": "cpu"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "trainer": {"max_steps": 1}}))
    train(load_config(tmp_path / "run.yaml"))
    found = results.measure("page", tmp_path / "run.yaml", tmp_path / "out")
    assert (found["metric"], found["held_out"], found["steps"]) == ("accuracy", 12, 1)
    assert found["floor_scores"]["accuracy"]["value"] == pytest.approx(8 / 12, abs=0.2)
    assert 0 <= found["scores"]["accuracy"]["low"] <= found["scores"]["accuracy"]["value"]
    assert "[run.yaml](page.md) | 12 | accuracy" in results.table([found])
