"""The check before a run: every planted mistake is caught by its exact message, and a good run passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_model import CHATML, make_tokenizer, save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.errors import UserError
from pyfinetune.train.config import parse_config
from pyfinetune.train.preflight.checks import Preflight, examine, examine_file
from pyfinetune.train.preflight.view import show
from pyfinetune.train.run import train

NEW = [{"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "y"}]
SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(5)]


@pytest.fixture
def write(tmp_path):
    """Writes rows, text or bytes into a file and gives its path."""

    def writer(content, name="a.jsonl") -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
        return str(path)

    return writer


@pytest.fixture
def config(tiny, tmp_path):
    """Makes a configuration of a tiny run."""

    def maker(data: str, **change):
        values = {"model_name_or_path": tiny, "train_file": data, "output_dir": str(tmp_path / "out")}
        return parse_config({**values, "max_length": 64, "device": "cpu", "lora_r": 4, **change})

    return maker


def errors(found: Preflight) -> list[tuple[str, str]]:
    return [(problem.message, problem.fix) for problem in found.problems if problem.severity == "error"]


def warnings(found: Preflight) -> list[str]:
    return [problem.message for problem in found.problems if problem.severity == "warning"]


def test_a_good_run_passes_with_its_facts(config, write, tiny):
    found = examine(config(write(SUMS), test_size=0.2, packing=True, trainer={"num_train_epochs": 2}))
    assert found.ok
    assert found.problems == []
    assert found.counts["train"]["examples"] == 32
    assert found.counts["held_out"]["examples"] == 8
    assert found.counts["train"]["answers"] == found.counts["train"]["ended"] == 32
    assert found.ends == [{"token": "<|end|>", "answers": 32, "stops": True}]
    assert found.model["type"] == "llama"
    assert found.model["trainable_parameters"] == 32768 // 16 * 4
    rows = found.counts["train"]["rows"]
    assert found.packing["rows"] == found.packing["rows_if_packed"] == rows < 32
    assert found.packing["filled"] == found.counts["train"]["tokens"] / (rows * 64) > 0.7
    assert found.steps == 2
    first = json.loads(Path(found.example_place.rpartition(",")[0]).read_text().split("\n")[_number(found) - 1])
    assert found.example == [
        {"text": first["prompt"], "tokens": len(make_tokenizer()(first["prompt"])["input_ids"]), "learned": False},
        {
            "text": first["completion"] + "<|end|>",
            "tokens": len(make_tokenizer()(first["completion"])["input_ids"]) + 1,
            "learned": True,
        },
    ]
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


def _number(found: Preflight) -> int:
    return int(found.example_place.rsplit(" ", 1)[1])


def test_no_weights_are_needed_or_touched(config, write, tiny, tmp_path):
    """A model whose weights are no weights passes, so they were not read."""
    folder = tmp_path / "hollow"
    folder.mkdir()
    for path in Path(tiny).iterdir():
        (folder / path.name).write_bytes(b"" if path.suffix == ".safetensors" else path.read_bytes())
    assert examine(config(write(SUMS), model_name_or_path=str(folder))).ok
    (folder / "model.safetensors").unlink()
    (message, _), *rest = errors(examine(config(write(SUMS), model_name_or_path=str(folder))))
    assert message == f"model_name_or_path: {str(folder)!r} has no .safetensors weights"
    assert rest == []


def long_rows(count: int = 3, prompt: int = 2, answer: int = 50) -> list[dict]:
    return [{"prompt": f"{n}" * prompt, "completion": "ab" * answer} for n in range(count)]


def test_nothing_trained(config, write):
    path = write(long_rows(prompt=80))
    ((message, fix),) = errors(examine(config(path)))
    assert message == (
        f"no token would be learned: max_length 64 cuts off every one of the 3 answers (first: {path}, row 1)"
    )
    assert fix == "raise max_length; the longest row has 181 tokens"


@pytest.mark.parametrize(
    ("section", "message", "fix"),
    [
        ({"learning_rate": 0}, "trainer: learning_rate: 0 trains nothing", "set learning_rate, such as 2e-4"),
        (
            {"num_train_epochs": 0},
            "trainer: num_train_epochs: 0 trains nothing",
            "set num_train_epochs: 1, or max_steps",
        ),
    ],
)
def test_no_weight_moves(config, write, section, message, fix):
    assert errors(examine(config(write(SUMS), trainer=section))) == [(message, fix)]


def test_no_layer_is_adapted(config, write):
    ((message, fix),) = errors(examine(config(write(SUMS), target_modules=["query"])))
    assert message == "target_modules: no layer of the model is called 'query'"
    assert "q_proj" in fix


def test_all_truncated_never_shows_an_end(config, write):
    path = write(long_rows())
    found = examine(config(path))
    assert errors(found) == [
        (
            "the end token is never learned, so the model would never stop: max_length 64 cuts every one of the 3"
            " answers short",
            "raise max_length; the longest row has 103 tokens",
        )
    ]
    (warning,) = warnings(found)
    assert warning == (
        f"3 answers are cut short, without their end, by max_length 64 (longest: 103 tokens): {path}, rows 1, 2, 3"
    )
    assert found.counts["train"]["lost_tokens"] == 3 * (103 - 64)


def test_some_truncated_and_some_cut_off(config, write):
    path = write([SUMS[0], *long_rows(1), *long_rows(1, prompt=70), *SUMS[1:3]])
    found = examine(config(path))
    assert found.ok
    assert warnings(found) == [
        f"1 answers are cut short, without their end, by max_length 64 (longest: 171 tokens): {path}, row 2",
        f"1 rows are left out, their whole answer cut off by max_length 64 (longest: 171 tokens): {path}, row 3",
    ]
    assert found.counts["train"]["lost_tokens"] == (103 - 64) + 101


def test_an_end_that_does_not_stop_generation(write, config, tmp_path):
    """Named regression: a chat model fine-tuned to end with a token at which nothing stops."""
    folder = save_tiny(tmp_path / "model", chat_template=CHATML)
    found = examine(config(write(SUMS), model_name_or_path=folder))
    assert [(problem.message, problem.fix) for problem in found.problems] == [
        (
            "the end token is never learned: 40 answers end with '<|im_end|>', at which generation does not stop",
            "set eos_token: '<|im_end|>', or tell what generates to stop at it",
        )
    ]
    assert examine(config(write(SUMS), model_name_or_path=folder, eos_token="<|im_end|>")).problems == []


def test_answers_that_a_template_does_not_end(write, config, tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    folder = save_tiny(tmp_path / "model", chat_template=template)
    roles = ("user", "assistant", "user", "assistant")
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    assert warnings(examine(config(write([row]), model_name_or_path=folder))) == [
        "1 of 2 answers are not followed by an end token: the chat template writes none between turns"
    ]


def test_a_template_that_leaves_the_answers_out(write, config, tmp_path):
    answer = "{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}<|im_end|>{% endif %}"
    template = "{% for m in messages %}" + answer + "{% endfor %}"
    folder = save_tiny(tmp_path / "model", chat_template=template)
    path = write(SUMS)
    assert errors(examine(config(path, model_name_or_path=folder))) == [
        (
            f"no token would be learned: the chat template writes none of the 40 answers (first: {path}, row 1)",
            "set chat_template: plain, or the path of a template that writes the assistant's messages",
        )
    ]


def test_some_rows_fully_masked(write, config, tmp_path):
    template = CHATML.replace("message['content'] +", "(message['content'] if message['content'] != 'no' else '') +")
    folder = save_tiny(tmp_path / "model", chat_template=template)
    path = write([*SUMS[:4], {"prompt": "a", "completion": "no"}])
    found = examine(config(path, model_name_or_path=folder, eos_token="<|im_end|>"))
    assert warnings(found) == [
        f"1 rows are left out, because the chat template writes nothing of their answers: {path}, row 5"
    ]
    assert found.counts["train"]["masked"] == 1
    assert found.counts["train"]["documents"] == 4


def test_duplicates_are_named(config, write):
    long = "the storm tore the roof from the old barn and the cows stood in the rain until noon"
    path = write(
        [*SUMS, SUMS[0], SUMS[3], {"prompt": "a", "completion": long}, {"prompt": "a", "completion": long + "!"}]
    )
    found = examine(config(path, max_length=256))
    assert [(problem.message, problem.fix) for problem in found.problems] == [
        (
            f"2 rows are duplicates: {path}, rows 41, 42 (repeats {path}, row 1)",
            "correct them, or drop them with clean: [duplicate]",
        ),
        (
            f"1 rows are near-duplicates: {path}, row 44 (resembles {path}, row 43)",
            "correct them, or drop them with clean: [near_duplicate]",
        ),
    ]
    assert found.ok
    cleaned = examine(config(path, max_length=256, clean=["duplicate", "near_duplicate"]))
    assert cleaned.problems == []
    assert [finding["dropped"] for finding in cleaned.data["findings"]] == [True, True]


def test_leaked_rows_are_refused_when_they_are_many(config, write):
    train_file, held = write(SUMS), write([*SUMS[:2], {"prompt": "x", "completion": "y"}], "b.jsonl")
    assert errors(examine(config(train_file, validation_file=held))) == [
        (
            f"2 of 3 held-out rows are also in the training set: {held}, rows 1, 2 (as {train_file}, row 1)",
            "drop them from the training set with clean: [leak], or hold other rows out",
        )
    ]
    assert examine(config(train_file, validation_file=held, clean="leak")).ok
    others = [{"prompt": f"x{n}", "completion": "y"} for n in range(20)]
    few = examine(config(train_file, validation_file=write([SUMS[0], *others], "c.jsonl")))
    assert few.ok
    assert len(warnings(few)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            [{"question": "a", "reply": "b"}],
            "{path}, row 1: no known format has the columns 'question', 'reply'",
        ),
        (
            "a.jsonl",
            [SUMS[0], {"prompt": "a", "answer": "b"}],
            "{path}, row 2: has no 'completion' (its columns: 'prompt',",
        ),
        (
            "a.jsonl",
            [SUMS[0], {"instruction": "a", "output": "b"}],
            "{path}, row 2: is Alpaca, but {path}, row 1 is prompt/completion",
        ),
        ("a.jsonl", "", "{path}: holds no rows"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n',
            "{path}, row 2: broken JSON: Expecting property",
        ),
        ("a.json", '[{"prompt": "a"}, {"prompt": }]', "{path}, row 2 (line 1): broken JSON: Expecting value"),
        ("a.csv", "prompt,answer\na,b\n", "{path}, row 1: no known format has the columns 'prompt', 'answer'"),
        ("a.csv", "prompt,completion\na,b\nc\n", "{path}, row 2 (line 3): 1 cells, but 2 columns"),
        ("a.csv", b"prompt,completion\na,\xff\n", "{path}, line 2: byte 20 is not UTF-8"),
        (
            "a.jsonl",
            [{"messages": [{"role": "assistant", "content": "b"}]}],
            "{path}, row 1: messages: message 1 is from 'assistant', but nothing was asked before it",
        ),
        (
            "a.jsonl",
            [{"messages": [{"role": "bot", "content": "b"}]}],
            "{path}, row 1: messages: message 1 is from 'bot', a role that is not known",
        ),
    ],
)
def test_a_file_or_row_at_fault_is_the_one_error(config, write, name, content, message):
    path = write(content, name)
    ((found, fix),) = errors(examine(config(path)))
    assert found.startswith(message.format(path=path))
    assert fix


def test_tokens_that_the_model_has_not(config, write, tmp_path):
    from tiny_model import make_model

    make_model(260).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    path = write([{"prompt": "a", "completion": "sold clips"}])
    ((message, _),) = errors(examine(config(path, model_name_or_path=str(tmp_path / "model"))))
    assert message.startswith(f"{path}, row 1: token ")
    assert "beyond the 260 embeddings" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 1000}, "max_length: 1000 is beyond the 512 positions of"),
        ({"trainer": {"lr_scheduler_type": "nope"}}, "trainer: transformers refuses these arguments"),
        ({"model_name_or_path": "/no/such/model"}, "no tokenizer can be loaded from '/no/such/model'"),
        ({"chat_template": "no.jinja"}, "chat_template: no.jinja: no such file"),
    ],
)
def test_what_train_would_refuse_is_refused_now(config, write, change, message):
    ((found, fix),) = errors(examine(config(write(SUMS), **change)))
    assert message in found
    assert fix


def test_replay_with_too_few_rows_is_said(config, write):
    old = write([{"prompt": "old", "completion": "row"}], "old.jsonl")
    found = examine(config(write(SUMS), replay={"train_file": old, "share": 0.2}))
    assert warnings(found) == [f"replay: {old} has 1 rows, and its share asks for 10"]
    assert [source["used"] for source in found.data["sources"]] == [40, 1]


def test_the_prediction_is_asked_for_when_the_run_is_sound(config, write):
    asked = []

    def predict(config, found):
        asked.append((config.max_length, found.counts["train"]["rows"]))
        return ["peak memory: 1.0 GB"]

    assert examine(config(write(SUMS)), predict).prediction == ["peak memory: 1.0 GB"]
    assert examine(config(write("")), predict).prediction == []
    assert asked == [(64, 40)]


def test_train_refuses_the_same_before_the_model_is_loaded(config, write, monkeypatch):
    monkeypatch.setattr("pyfinetune.train.run.prepare_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="the end token is never learned, so the model would never stop"):
        train(config(write(long_rows())), Console(quiet=True))


def printed(found: Preflight) -> tuple[str, str]:
    out, problems = Console(record=True, width=80, quiet=False), Console(record=True, width=80)
    with out.capture() as facts, problems.capture() as faults:
        show(found, out, problems)
    return facts.get(), faults.get()


def test_what_is_printed(config, write):
    facts, faults = printed(examine(config(write([*SUMS, SUMS[0]]), validation_file=write(NEW, "b.jsonl"))))
    assert "training" in facts
    assert "held-out" in facts
    assert "end token learned: '<|end|>' (41 answers)" in facts
    assert "⟦" in facts
    assert "<|end|>⟧" in facts
    assert facts.rstrip().endswith("ready to train, with 1 warning")
    assert faults.startswith("warning: 1 rows are duplicates: ")
    facts, faults = printed(examine(config(write(""))))
    assert "ready" not in facts
    assert faults.startswith("error: ")
    assert "  fix: give a file with at least one row" in faults


def test_a_mistake_in_the_yaml_is_a_problem_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ntrain_fil: a\noutput_dir: o\n")
    assert errors(examine_file(str(path))) == [(f"{path}: unknown key 'train_fil'", "did you mean train_file?")]


def test_the_command(tiny, write, tmp_path, monkeypatch, capsys):
    from pyfinetune import cli

    values = {
        "model_name_or_path": tiny,
        "train_file": write(SUMS),
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))

    def run(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["pyfinetune", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code

    assert run("check", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["train"]["examples"] == 40
    path.write_text(yaml.safe_dump({**values, "max_length": 2}))
    assert run("check", str(path)) == 2
    captured = capsys.readouterr()
    assert "error: no token would be learned: max_length 2 cuts off every one of the 40 answers" in captured.err
    assert "fix: raise max_length; the longest row has" in captured.err
    assert run("check", str(path), "--json") == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert not (tmp_path / "out").exists()
