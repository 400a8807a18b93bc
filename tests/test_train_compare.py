"""`pyfinetune compare`: prompts, retrieval without leaks, the three verdicts, and answers that outlive a stop."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chromium import open_page
from test_cli import call
from test_train_run import settings
from tiny_model import CHATML, make_tokenizer, save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.errors import UserError
from pyfinetune.train import comparison
from pyfinetune.train.answer_cache import AnswerCache, digest, file_name
from pyfinetune.train.compare_config import Price, load_compare, parse_compare
from pyfinetune.train.compare_view import comparison_lines, draw_bars, write_comparison
from pyfinetune.train.comparison import Comparison, SystemResult, compare
from pyfinetune.train.data import Row
from pyfinetune.train.formats import to_examples
from pyfinetune.train.metrics import Score
from pyfinetune.train.predicting import CausalPredictor
from pyfinetune.train.prompts import PromptMaker, Style, fill, question_of, repeated_questions
from pyfinetune.train.run import train
from pyfinetune.train.verdicts import Verdict, judge, rows_to_tell, verdict_on_other, verdict_on_tuning

# PEFT asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FILMS = [
    {"text": f"a {word} film about {topic}, number {n}", "label": label, "topic": topic}
    for n in range(16)
    for word, label in (("good", "pos"), ("bad", "neg"))
    for topic in ("war", "love")
]


def examples_of(rows: list[dict]):
    return to_examples([Row(row, "f", number) for number, row in enumerate(rows, start=1)])


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """The output folder of a run that tells good films from bad ones, with 24 rows held out."""
    folder = tmp_path_factory.mktemp("compare")
    out = folder / "out"
    data = write_rows(folder / "films.jsonl", FILMS)
    section = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    often = {"save_steps": 60, "eval_steps": 60}
    train(settings(tiny, data, out, method="full", max_length=128, test_size=24, trainer=section, **often))
    return out


@pytest.fixture(scope="module")
def result(run, tmp_path_factory) -> Comparison:
    """A comparison of that run, with everything that can be asked for."""
    folder = tmp_path_factory.mktemp("result")
    text = folder / "general.txt"
    text.write_text("\n".join(f"The quick brown fox jumps over {n} lazy dogs." for n in range(6)))
    config = parse_compare(
        {
            "run": str(run),
            "output_dir": str(folder / "compare"),
            "prompts": {"plain": "{question}", "curt": "{text}\nLabel ({labels}):"},
            "few_shot": 2,
            "retrieved": 2,
            "models": [{"name": "again", "model_name_or_path": str(run), "price": {"hour": 2}}],
            "general_file": str(text),
            "slices": "topic",
            "price": {"input": 1.0, "output": 10.0},
            "latency_rows": 3,
            "resamples": 200,
            "device": "cpu",
        }
    )
    found = compare(config)
    comparison.save_comparison(found)
    write_comparison(found)
    return found


# prompts


def test_a_template_is_filled_from_the_row():
    (example,) = examples_of([{"instruction": "Add.", "input": "1 1", "output": "2", "level": 3}])
    assert fill("L{level} {{x}} {question}", example) == "L3 {x} Add.\n\n1 1"
    assert fill("{question} [{labels}]", example, ["a", "b"]).endswith("[a, b]")
    with pytest.raises(UserError, match="levle") as caught:
        fill("{levle}", example)
    assert "did you mean level?" in str(caught.value)
    with pytest.raises(UserError, match="__class__"):
        fill("{question.__class__}", example)


def test_fixed_examples_have_each_label_in_turn_and_never_the_row_itself():
    pool = examples_of(FILMS)
    maker = PromptMaker(pool, ["neg", "pos"], seed=1)
    chosen = maker.chosen(Style("few", examples=4), examples_of([{"text": "new", "label": "pos"}])[0])
    assert sorted(pool[at].messages[-1]["content"] for at in chosen) == ["neg", "neg", "pos", "pos"]
    again = maker.chosen(Style("few", examples=4), pool[chosen[0]])
    assert chosen[0] not in again
    assert len(again) == 4


def test_retrieved_examples_are_the_most_similar_and_equal_ones_are_passed_over():
    pool = examples_of(
        [*FILMS, {"text": "An  elephant in a BOAT", "label": "pos"}, {"text": "an elephant", "label": "neg"}]
    )
    maker = PromptMaker(pool, ["neg", "pos"])
    (row,) = examples_of([{"text": "an elephant in a boat", "label": "pos"}])
    chosen = maker.chosen(Style("near", examples=3, choice="similar"), row)
    assert question_of(pool[chosen[-1]]).endswith("an elephant")  # the nearest stands nearest to the question
    assert len(chosen) == 3
    assert all("BOAT" not in question_of(pool[at]) for at in chosen)
    assert repeated_questions([row], pool) == 1
    assert PromptMaker([]).chosen(Style("near", examples=3, choice="similar"), row) == []


def test_retrieval_reads_signs_and_other_scripts():
    rows = [{"prompt": p, "completion": "x"} for p in ("1+1=", "7*8=", "我爱你", "Käse essen")]
    maker = PromptMaker(examples_of(rows))
    for asked, nearest in (("7*9=", 1), ("我爱他", 2), ("Käse kaufen", 3)):
        row = examples_of([{"prompt": asked, "completion": "x"}])[0]
        assert maker.chosen(Style("near", examples=1, choice="similar"), row) == [nearest], asked


def test_examples_are_turns_of_a_chat_or_joined_as_they_stand():
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(4)]
    *pool, row = examples_of(rows)
    maker = PromptMaker(pool)
    style = Style("few", "Q: {question}", examples=2)
    chat = make_tokenizer(chat_template=CHATML, end="<|im_end|>")
    asked = maker.ask(style, row, chat, None, 8)
    assert [m["role"] for m in asked.example.messages] == ["user", "assistant"] * 3
    assert chat.decode(asked.prompt).endswith("Q: 3+1=<|im_end|>\n<|im_start|>assistant\n")
    bare = make_tokenizer()
    text = bare.decode(maker.ask(style, row, bare, None, 8).prompt)
    assert re.fullmatch(r"(Q: \d\+1=\d\n\n){2}Q: 3\+1=", text)


def test_examples_are_dropped_from_the_front_until_the_prompt_fits():
    pool = examples_of(FILMS)
    maker, tokenizer = PromptMaker(pool, ["neg", "pos"]), make_tokenizer(chat_template=CHATML, end="<|im_end|>")
    (row,) = examples_of([{"text": "a good film about war", "label": "pos"}])
    style = Style("near", examples=4, choice="similar")
    whole = maker.ask(style, row, tokenizer, None, 8)
    assert (whole.examples, whole.dropped) == (4, 0)
    cut = maker.ask(style, row, tokenizer, len(whole.prompt) + 7, 8)
    assert (cut.examples, cut.dropped) == (3, 1)
    assert len(cut.prompt) + 8 <= len(whole.prompt) + 7
    kept = [m["content"] for m in cut.example.messages]
    assert kept == [m["content"] for m in whole.example.messages[2:]]
    hopeless = maker.ask(style, row, tokenizer, 10, 8)
    assert (hopeless.examples, hopeless.dropped) == (0, 4)


# verdicts


@pytest.mark.parametrize(
    ("difference", "worth", "decision"),
    [
        (Score(0.26, 0.22, 0.30, 500), 0.0, "worth it"),
        (Score(0.26, 0.22, 0.30, 500), 0.25, "cannot tell"),
        (Score(0.26, 0.22, 0.30, 500), 0.35, "not worth it"),
        (Score(0.02, -0.05, 0.09, 500), 0.0, "cannot tell"),
        (Score(-0.1, -0.15, -0.05, 500), 0.0, "not worth it"),
        (Score(0.0, 0.0, 0.0, 500), 0.0, "not worth it"),  # not one answer more is right
        (Score(1.0, 1.0, 1.0, 19), 0.0, "cannot tell"),  # resamples of a few equal rows are all equal
    ],
)
def test_the_three_verdicts(difference, worth, decision):
    assert judge(difference, worth) == decision
    scores = (Score(0.81, 0.78, 0.84, difference.rows), Score(0.55, 0.51, 0.59, difference.rows))
    verdict = verdict_on_tuning("accuracy", *scores, "few-shot (4 examples)", difference, worth)
    assert verdict.decision == decision
    assert "accuracy 0.810 (0.780 to 0.840) against 0.550" in verdict.sentence
    assert "few-shot (4 examples)" in verdict.sentence
    begins = {
        "worth it": "fine-tuning was worth it",
        "not worth it": "fine-tuning was not",
        "cannot tell": "cannot tell",
    }
    assert verdict.sentence.startswith(begins[decision])
    assert ("a gain of" in verdict.sentence) == (worth > 0)


def test_a_verdict_says_how_many_rows_would_tell():
    assert rows_to_tell(Score(0.05, -0.05, 0.15, 100)) == 400
    assert rows_to_tell(Score(0.0, -0.1, 0.1, 100)) is None
    assert rows_to_tell(Score(0.1, 0.0, 0.2, 100)) > 100
    verdict = verdict_on_tuning("f1", *[Score(0.5, 0.4, 0.6, 100)] * 2, "plain", Score(0.05, -0.05, 0.15, 100))
    assert "about 400 rows would tell" in verdict.sentence
    assert "20 rows or more" in verdict_on_tuning("f1", *[Score(1, 1, 1, 3)] * 2, "p", Score(0, 0, 0, 3)).sentence


def test_a_verdict_on_another_model():
    other = Score(0.5, 0.4, 0.6, 100)
    assert "is better than large" in verdict_on_other("f1", "large", other, Score(0.2, 0.1, 0.3, 100)).sentence
    assert "is worse than large" in verdict_on_other("f1", "large", other, Score(-0.2, -0.3, -0.1, 100)).sentence
    assert "cannot be told from" in verdict_on_other("f1", "large", other, Score(0.0, -0.1, 0.1, 100)).sentence


# prices and configuration


def test_prices():
    assert Price(input=2, output=10).of(100, 50, 9.0) == pytest.approx(700e-6)
    assert Price(hour=1.8).of(100, 50, 2.0) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"promts": {}}, "did you mean prompts"),
        ({"models": [{"model_name_or_path": "m", "few_shots": 2}]}, "did you mean few_shot"),
        ({"price": {"inptu": 1}}, "did you mean input"),
        ({"price": {"input": 1}}, "give both input and output"),
        ({"price": {"input": 1, "output": 1, "hour": 1}}, "give input and output"),
        ({"rows": 0}, "rows: 0 will not do"),
        ({"models": [{"model_name_or_path": "x/tuned"}]}, "the name 'tuned' is taken"),
    ],
)
def test_a_wrong_configuration_names_its_mend(change, said):
    with pytest.raises(UserError) as caught:
        parse_compare({"run": "r", **change}, source="compare.yaml")
    assert said in str(caught.value)
    assert "compare.yaml" in str(caught.value)


def test_a_configuration_is_a_file_or_a_folder(tmp_path):
    assert load_compare(tmp_path).folder == tmp_path / "compare"
    path = tmp_path / "compare.yaml"
    path.write_text("run: a\noutput_dir: b\nslices: topic\n")
    assert load_compare(path).slices == ["topic"]
    with pytest.raises(UserError, match="run is missing"):
        parse_compare({})


# the cache


def test_the_cache_outlives_a_line_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "a" / "answers.jsonl"
    strange = "ä\u2028\x85\r\n\x0c"
    AnswerCache(path).add({"1": {"answer": strange}, "2": {"answer": "b"}})
    with open(path, "a") as file:
        file.write('{"key": "3", "ans')
    cache = AnswerCache(path)
    assert cache.get("3") is None
    cache.add({"4": {"answer": "d"}})
    assert AnswerCache(path).get("1")["answer"] == strange
    assert AnswerCache(path).get("4")["answer"] == "d"


def test_file_names_are_plain_and_differ():
    names = ["base, plain", "base, few-shot (4 examples)", "base/../../etc", "模型", "模型二", "a:b", "a;b"]
    files = [file_name(name) for name in names]
    assert files[0] == "base-plain"
    assert len(set(files)) == len(files)
    assert all(re.fullmatch(r"[\w-]+", name, flags=re.ASCII) for name in files)
    assert digest("a") != digest("b")


# whole comparisons


def test_a_comparison_ranks_the_systems(result, run):
    names = [system.name for system in result.systems]
    assert names == [
        "base, plain",
        "base, curt",
        "base, few-shot (2 examples)",
        "base, retrieved (2 examples)",
        "tuned",
        "again",
    ]
    by_name = {system.name: system for system in result.systems}
    tuned = by_name["tuned"]
    assert (result.rows, result.task, result.metric) == (24, "classification", "accuracy")
    assert tuned.scores["accuracy"].value > 0.9  # it has learned to tell a good film from a bad one
    assert result.verdict.decision == "worth it"
    assert "fine-tuning was worth it: accuracy" in result.verdict.sentence
    assert by_name["again"].scores == tuned.scores  # the same model as another one
    assert by_name["again"].against_tuned.value == 0.0
    assert "says the same as again" in result.others[0].sentence
    assert by_name["base, few-shot (2 examples)"].tokens_in > 1.5 * by_name["base, plain"].tokens_in
    for system in result.systems:
        assert 0 < system.latency <= system.latency_p90
        assert sum(found["accuracy"].rows for found in system.slices["topic"].values()) == 24
    assert tuned.cost == pytest.approx(1000 * (tuned.tokens_in + 10 * tuned.tokens_out) / 1e6)
    assert 0 < by_name["again"].cost < 1000 * 2


def test_answers_can_be_read(result):
    folder = Path(result.output_dir) / "answers"
    lines = [json.loads(line) for line in (folder / "base-curt.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert all("Label (neg, pos):" in line["prompt"] for line in lines)
    assert sum(line["alone"] for line in lines) == 3
    assert {line["reference"] for line in lines} == {"neg", "pos"}


def test_forgetting_is_the_difference_of_losses(result):
    found = result.forgetting
    assert found.difference.value == pytest.approx(found.after.value - found.before.value)
    worse, better = found.difference.low > 0, found.difference.high < 0
    words = "less familiar" if worse else "more familiar" if better else "no forgetting"
    assert found.sentence.startswith(("general text is " if worse or better else "") + words)
    assert found.tokens > 6 * 8


def test_the_pages_say_what_the_comparison_says(result):
    out = Path(result.output_dir)
    markdown, page = (out / "compare.md").read_text(), (out / "compare.html").read_text()
    assert "fine-tuning was worth it" in markdown
    assert "![" in markdown
    assert (out / "plots" / "compare.png").stat().st_size > 1000
    assert "<svg" in page
    assert "<script" not in page
    assert "retrieved (2 examples)" in page
    assert json.loads((out / "compare.json").read_text())["verdict"]["decision"] == "worth it"
    lines = comparison_lines(result)
    assert lines[-1] == result.verdict.sentence
    assert any("cost of 1,000" in line for line in lines)
    assert any("war (" in line for line in lines)


def test_names_and_answers_of_others_are_not_markup(tmp_path):
    score = {"accuracy": Score(0.5, 0.4, 0.6, 30)}
    answers = tmp_path / "a.jsonl"
    AnswerCache(answers).add({"1": {"row": "<b>", "text": "<script>alert(1)</script>", "reference": "&"}})
    systems = [
        SystemResult("<img src=x> $a_b$ |", "base", True, score, answers=str(answers)),
        SystemResult("tuned", "tuned", False, score, answers=str(answers)),
    ]
    verdict = Verdict("worth it", "<script>", score["accuracy"])
    found = Comparison("r", "classification", "accuracy", 30, "x", systems, verdict, output_dir=str(tmp_path))
    write_comparison(found)
    page = (tmp_path / "compare.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "$a_b$" in draw_bars(found)
    assert "\\<img src=x\\> $a\\_b$ \\|" in (tmp_path / "compare.md").read_text()


def test_an_interrupted_comparison_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    given = {"run": str(run), "output_dir": str(tmp_path), "rows": 20, "few_shot": 0, "retrieved": 0, "device": "cpu"}
    config = parse_compare({**given, "latency_rows": 2, "batch_size": 4, "resamples": 100})
    original, seen = CausalPredictor._choose, []

    def choose(self, examples, prompts, fitting, keep):
        def counted(indices, answers):
            keep(indices, answers)
            seen.extend(indices)
            if stop_after is not None and len(seen) >= stop_after:
                raise KeyboardInterrupt

        original(self, examples, prompts, fitting, counted)

    monkeypatch.setattr(CausalPredictor, "_choose", choose)
    stop_after = 30
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "answers").iterdir())
    assert 20 < kept < 60
    stop_after, before = None, len(seen)
    first = compare(config)
    warm_ups = len(seen) - before - (60 - kept)
    assert 0 <= warm_ups <= 3
    count = len(seen)
    again = compare(config)
    assert len(seen) == count  # nothing was asked twice
    assert [s.scores for s in again.systems] == [s.scores for s in first.systems]
    assert again.verdict == first.verdict


def test_generation_compares_what_is_written(tiny, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    out = tmp_path / "out"
    train(settings(tiny, write_rows(tmp_path / "sums.jsonl", rows), out, test_size=6, trainer={"max_steps": 2}))
    given = {"run": str(out), "retrieved": 0, "few_shot": 1, "latency_rows": 1, "device": "cpu", "resamples": 100}
    found = compare(parse_compare(given))
    assert (found.task, found.metric, found.answered_by) == ("sft", "exact_match", "greedy generation")
    assert found.verdict.decision == "cannot tell"
    assert "cannot tell with 6 rows" in found.verdict.sentence
    assert found.output_dir == str(out / "compare")
    with pytest.raises(UserError, match="metric: 'bleu' is none of sft"):
        compare(parse_compare({**given, "metric": "bleu"}))
    with pytest.raises(UserError, match="is no run"):
        compare(parse_compare({**given, "run": tiny}))
    other = {"model_name_or_path": tiny, "prompts": ["plane"]}
    with pytest.raises(UserError, match="did you mean plain"):
        compare(parse_compare({**given, "models": [other]}))


def test_the_command_compares_a_run_folder(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"run: {run}\noutput_dir: {tmp_path / 'out'}\nrows: 4\nfew_shot: 0\nretrieved: 1\ndevice: cpu\nresamples: 100\n"
    )
    assert call(monkeypatch, "compare", str(path)) == 0
    out = capsys.readouterr().out
    assert "cannot tell with 4 rows" in out
    assert "labels named" in out
    assert str(tmp_path / "out" / "compare.html") in out
    assert call(monkeypatch, "compare", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare", interrupted)
    assert call(monkeypatch, "compare", str(path)) == 130
    assert f"go on with: pyfinetune compare {path}" in capsys.readouterr().err


def test_a_model_of_another_kind_is_saved_and_asked(run, tmp_path):
    """A plain model with a chat template of its own, prompted, beside the run."""
    other = save_tiny(tmp_path / "chatty", chat_template=CHATML, end="<|im_end|>", seed=4)
    model = {"model_name_or_path": other, "prompts": ["labels named"], "retrieved": 1}
    given = {"run": str(run), "output_dir": str(tmp_path / "o"), "rows": 4, "few_shot": 0, "retrieved": 0}
    found = compare(parse_compare({**given, "models": [model], "device": "cpu", "resamples": 100}))
    assert [system.name for system in found.systems] == [
        "base, plain",
        "base, labels named",
        "tuned",
        "chatty, labels named",
        "chatty, retrieved (1 example)",
    ]
    lines = (tmp_path / "o" / "answers" / "chatty-labels-named.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["prompt"].startswith("<|im_start|>user\n")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_on_a_telephone_and_a_screen(result, width):
    page = open_page(Path(result.output_dir) / "compare.html", width=width)
    assert page.console == []
    assert page.overflow == 0
    assert "fine-tuning was worth it" in page.text
    assert "again" in page.text
