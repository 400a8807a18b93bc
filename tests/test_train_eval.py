"""`pyfinetune eval`: a batch answers as its rows alone, likelihoods are exact, every kind of model is found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import call
from test_train_run import settings
from tiny_model import CHATML, make_model, make_tokenizer, save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.train import generating
from pyfinetune.train.data import Row
from pyfinetune.train.evaluating import EvalRequest, evaluate, longest_answer, task_of
from pyfinetune.train.formats import to_examples
from pyfinetune.train.generating import document_losses, generate_answers
from pyfinetune.train.predicting import (
    CausalPredictor,
    document_of,
    last_answer,
    prompts_of,
    reference_of,
    with_answer,
)
from pyfinetune.train.run import train
from pyfinetune.train.tasks import tags_of_answer
from pyfinetune.train.tokenizing import load_tokenizer, tokenize
from pyfinetune.train.using import find_model, load_for_use, tokenizer_of

# PEFT asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "parity": (a + b) % 2} for a in range(6) for b in range(5)]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def examples_of(rows: list[dict]):
    return to_examples([Row(row, "f", number) for number, row in enumerate(rows, start=1)])


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """The output folder of a run on additions, whose rows carry a column `parity`."""
    folder = tmp_path_factory.mktemp("eval")
    out = folder / "out"
    train(settings(tiny, write_rows(folder / "sums.jsonl", SUMS), out, trainer={"max_steps": 10}))
    return out


# generation


def varied_prompts(count: int = 11) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 400, size=size).tolist() for size in generator.integers(1, 40, size=count)]


@pytest.mark.parametrize("batch_size", [2, 4, 11])
def test_a_batch_says_what_each_row_says_alone(batch_size):
    model, tokenizer = make_model(layers=3), make_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # answers that depend on the prompt, and that end now and then
        model.lm_head.weight[0] += 0.5
    prompts = varied_prompts()
    alone = [generate_answers(model, tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    batched = generate_answers(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    assert [a.text for a in alone] == [b.text for b in batched]
    assert [a.tokens for a in alone] == [b.tokens for b in batched]
    assert len({a.text for a in alone}) > 5
    assert model.training  # as it was


def test_an_answer_ends_at_a_stopping_token_and_counts_it():
    model, tokenizer = make_model(), make_tokenizer()
    (free,) = generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=8)
    assert free.tokens == 8
    with torch.no_grad():
        said = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 3:]
    third = int(said[2])
    first = said.tolist().index(third)
    (stopped,) = generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=8, stop_ids=[third])
    assert stopped.tokens == first + 1
    assert free.text.startswith(stopped.text)


def test_a_checkpoints_sampling_and_penalties_are_left_aside():
    model, tokenizer = make_model(), make_tokenizer()
    before = generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=8)[0].text
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=5.0, top_k=3)
    assert generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=8)[0].text == before


def test_batches_are_reported_as_they_come():
    seen = []
    prompts = varied_prompts(5)
    generate_answers(
        make_model(),
        make_tokenizer(),
        prompts,
        max_new_tokens=2,
        batch_size=2,
        on_batch=lambda indices, answers: seen.append((indices, len(answers))),
    )
    assert sorted(at for indices, _ in seen for at in indices) == [0, 1, 2, 3, 4]
    assert [count for _, count in seen] == [2, 2, 1]
    assert generate_answers(make_model(), make_tokenizer(), [], max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[1], []], {"max_new_tokens": 2}, "prompt 2 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 1, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_generation_refuses(prompts, options, said):
    with pytest.raises(InvalidInput, match=said):
        generate_answers(make_model(), make_tokenizer(), prompts, **options)


def test_losses_are_the_models_own_whatever_the_batch():
    model, tokenizer = make_model().eval(), make_tokenizer()
    documents = tokenize(examples_of(SUMS[:7]), tokenizer, 64).documents
    losses, targets = document_losses(model, documents, pad_token_id=0, batch_size=3)
    for document, loss, count in zip(documents, losses, targets, strict=True):
        ids = torch.tensor(document.input_ids[None].astype(np.int64))
        labels = ids.masked_fill(~torch.tensor(document.learned)[None], -100)
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss
        assert loss / count == pytest.approx(float(mean), rel=1e-5)
        assert count == document.learned.sum()


# prompts and references


def test_prompts_are_those_of_training():
    tokenizer = make_tokenizer(chat_template=CHATML, end="<|im_end|>")
    chat = {
        "messages": [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2+2"},
            {"role": "assistant", "content": "4"},
        ]
    }
    (example,) = examples_of([chat])
    (prompt,), stops = prompts_of([example], tokenizer)
    text = tokenizer.decode(prompt)
    assert text.endswith("2+2<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>assistant\n2<|im_end|>" in text
    assert stops == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    document = document_of(example, tokenizer)
    assert tokenizer.decode(document.input_ids[last_answer(document) :]) == "4<|im_end|>"
    assert reference_of(example, "sft") == "4"
    assert with_answer(example, "5").messages[-1]["content"] == "5"
    assert example.messages[-1]["content"] == "4"


def test_references_of_tasks():
    squad = {"question": "Who?", "context": "Ann ran.", "answers": {"text": ["Ann", "she"]}}
    assert reference_of(examples_of([squad])[0], "question_answering") == ["Ann", "she"]
    assert reference_of(examples_of([{"text": "fine", "label": 3}])[0], "classification") == "3"
    tagged = {"tokens": ["In", "York"], "tags": ["O", "B-place"]}
    assert reference_of(examples_of([tagged])[0], "token_classification") == ["O", "B-place"]
    assert task_of(examples_of([tagged])) == "token_classification"
    assert task_of(examples_of(SUMS)) == "sft"
    tool = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}
    with pytest.raises(UserError, match="row 1: its last answer is not text"):
        reference_of(examples_of([tool])[0], "sft")
    with pytest.raises(UserError, match="raw text"):
        prompts_of(examples_of([{"text": "once"}]), make_tokenizer())


@pytest.mark.parametrize(
    ("answer", "tags"),
    [
        ("none", ["O"] * 5),
        ("place: New York\nperson: Ann", ["B-place", "I-place", "O", "B-person", "O"]),
        ("person: Ann\nplace: New York", ["B-place", "I-place", "O", "B-person", "O"]),  # out of order
        ("place: New\nplace: New", ["B-place", "O", "O", "O", "B-place"]),  # the same word twice
        ("place: Paris\n: \nplace:\nx", ["O"] * 5),
        ("place: New York\nplace: New York", ["B-place", "I-place", "O", "O", "O"]),  # said once too often
    ],
)
def test_tags_are_read_from_an_answer(answer, tags):
    assert tags_of_answer(["New", "York", "met", "Ann", "New"], answer) == tags


def test_every_answer_that_is_learned_reads_back_as_its_tags():
    from pyfinetune.train.tasks import token_classification

    tokens = ["Bob", "Bob", "and", "New", "York", "City"]
    tags = ["B-per", "B-per", "O", "B-loc", "I-loc", "I-loc"]
    _, answer = token_classification({"tokens": tokens, "tags": tags})
    assert tags_of_answer(tokens, answer) == tags


# labels by likelihood


def test_the_most_likely_label_is_chosen_by_its_whole_text():
    model, tokenizer = make_model(seed=3).eval(), load_plain(make_tokenizer())
    examples = examples_of([{"text": f"film {n}", "label": "neg"} for n in range(5)])
    labels = ["pos", "positive", "neg"]  # one begins with another
    predictor = CausalPredictor(model, tokenizer, "classification", labels, batch_size=4)
    said = predictor.predict(examples)
    for example, answer in zip(examples, said, strict=True):
        likely = []
        for label in labels:
            document = document_of(with_answer(example, label), tokenizer)
            ids = torch.tensor(document.input_ids.astype(np.int64))[None]
            with torch.no_grad():
                log_p = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            likely.append(float(log_p[torch.tensor(document.learned[1:])].sum()))
        assert answer.prediction == labels[int(np.argmax(likely))]
        assert answer.tokens_in > 0
        assert answer.tokens_out > 0


def load_plain(tokenizer):
    """A tokenizer as `load_tokenizer` leaves one without a template, for a task's rows."""
    from pyfinetune.train.tokenizing import _PLAIN_TEMPLATE

    tokenizer.chat_template = _PLAIN_TEMPLATE
    return tokenizer


def test_a_question_beyond_the_models_positions_is_answered_by_nothing():
    predictor = CausalPredictor(make_model(positions=48), make_tokenizer(), "sft", None, 8, 2, positions=48)
    rows = [{"prompt": "a b c " * 40, "completion": "x"}, {"prompt": "1+1=", "completion": "2"}]
    long, short = predictor.predict(examples_of(rows))
    assert (long.text, long.tokens_out) == ("", 0)
    assert short.tokens_out > 0


# whole evaluations


def test_a_run_is_evaluated_on_what_it_held_out(run):
    record = json.loads((run / "run.json").read_text())
    result = evaluate(EvalRequest(str(run), slices=("parity",), device="cpu"))
    assert result.rows == record["data"]["held_out"]["examples"] == 6
    assert result.scores["loss"].value == pytest.approx(record["result"]["eval_loss"], rel=1e-5)
    assert result.scores["perplexity"].value == pytest.approx(math.exp(result.scores["loss"].value))
    assert set(result.scores) == {"loss", "perplexity", "exact_match", "rougeL", "chrf"}
    assert sum(found["chrf"].rows for found in result.slices["parity"].values()) == 6
    assert result.answered_by == "greedy generation"


def test_an_adapters_folder_without_its_run_and_its_base_are_found(run, tiny, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", SUMS[:8])
    with_run = evaluate(EvalRequest(str(run), (data,), device="cpu"))
    adapter = evaluate(EvalRequest(str(run / "checkpoint-10"), (data,), device="cpu"))
    assert adapter.scores == with_run.scores
    base = evaluate(EvalRequest(tiny, (data,), device="cpu"))
    assert base.scores["loss"].value > with_run.scores["loss"].value


def test_a_full_and_a_4_bit_run_are_loaded_as_they_were_trained(tiny, tmp_path):
    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    for method in ("full", "qlora"):
        out = tmp_path / method
        result = train(settings(tiny, data, out, method=method, trainer={"max_steps": 3, "learning_rate": 1e-3}))
        found = evaluate(EvalRequest(str(out), device="cpu"))
        assert found.scores["loss"].value == pytest.approx(result.eval_loss, rel=1e-4), method


def test_classification_chooses_among_the_labels_of_training(tiny, tmp_path):
    rows = [
        {"text": f"{word} film {n}", "label": label}
        for n in range(8)
        for word, label in (("good", "pos"), ("bad", "neg"))
    ]
    out = tmp_path / "out"
    train(settings(tiny, write_rows(tmp_path / "rows.jsonl", rows), out, trainer={"max_steps": 2}))
    test = write_rows(tmp_path / "test.jsonl", [{"text": "good film", "label": "pos"}] * 4)
    found = evaluate(EvalRequest(str(out), (test,), device="cpu", answers=str(tmp_path / "said.jsonl")))
    assert found.answered_by == "the most likely of the labels"
    assert found.scores["answered"].value == 1.0
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {line["prediction"] for line in said} <= {"pos", "neg"}
    assert said[0]["reference"] == "pos"
    written = evaluate(EvalRequest(str(out), (test,), classify_by="generation", max_new_tokens=3, device="cpu"))
    assert written.answered_by == "greedy generation"
    plain = evaluate(EvalRequest(tiny, (test,), device="cpu"))
    assert "those of the evaluated rows" in " ".join(plain.notes)


def test_raw_text_has_a_loss_and_a_file_per_label_is_read(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox.\nA lazy dog.\n")
    found = evaluate(EvalRequest(tiny, (str(text),), device="cpu"))
    assert set(found.scores) == {"loss", "perplexity"}
    assert found.task == "pretrain"
    files = tuple(f"{label}={write_text(tmp_path / label, lines)}" for label, lines in (("a", "x\ny\n"), ("b", "z\n")))
    labelled = evaluate(EvalRequest(tiny, files, task="classification", device="cpu", rows=2))
    assert labelled.rows == 2
    with pytest.raises(UserError, match="2 files, of which 1 have a name"):
        evaluate(EvalRequest(tiny, (files[0], str(text)), device="cpu"))


def write_text(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_an_answer_may_be_as_long_as_the_longest_right_one(tiny):
    tokenizer = load_tokenizer(tiny, data_format="prompt_completion")
    examples = examples_of([{"prompt": "a", "completion": "x " * 40}, *SUMS[:2]])
    assert 40 < longest_answer(examples, tokenizer) < 120
    assert longest_answer(examples_of([{"prompt": "a", "completion": "x y " * 900}]), tokenizer) == 512


@pytest.mark.parametrize(
    ("request_", "said", "fix"),
    [
        ({"model": "no/such/folder/at-all", "data": ("DATA",)}, "cannot be loaded", "on the hub"),
        ({"model": "TINY"}, "is no run", "--data FILE"),
        ({"model": "TINY", "data": ("DATA",), "slices": ("nope",)}, "--slice nope", "name one"),
        ({"model": "TINY", "data": ("DATA",), "task": "classifcation"}, "no such task", "did you mean classification"),
        ({"model": "TINY", "data": ("DATA",), "rows": 0}, "rows: 0", "1 or more"),
        ({"model": "EMPTY", "data": ("DATA",)}, "holds neither a run", "output_dir"),
    ],
)
def test_mistakes_name_their_mend(tiny, tmp_path, request_, said, fix):
    (tmp_path / "empty").mkdir()
    places = {"TINY": tiny, "EMPTY": str(tmp_path / "empty"), "DATA": write_rows(tmp_path / "rows.jsonl", SUMS[:3])}
    given = {**request_, "model": places.get(request_["model"], request_["model"])}
    given["data"] = tuple(places[name] for name in given.get("data", ()))
    with pytest.raises(UserError, match=said) as caught:
        evaluate(EvalRequest(**given, device="cpu"))
    assert fix in str(caught.value)


def test_a_run_that_was_stopped_is_refused(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(UserError, match="not complete"):
        find_model(tmp_path)


def test_an_adapter_of_another_model_is_refused(run, tmp_path):
    other = save_tiny(tmp_path / "other")
    config = json.loads((Path(other) / "config.json").read_text())
    found = find_model(run / "checkpoint-10")
    model = make_model(positions=64)
    model.config.hidden_size = config["hidden_size"]
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig(**{**config, "hidden_size": 32, "head_dim": 8})
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    import dataclasses

    with pytest.raises(UserError, match="does not fit"):
        load_for_use(dataclasses.replace(found, base=str(tmp_path / "wide")), torch.device("cpu"))


def test_the_command_prints_and_takes_json(run, monkeypatch, capsys, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", SUMS[:5])
    given = ("eval", str(run), "--data", data, "--device", "cpu")
    assert call(monkeypatch, *given, "--slice", "parity") == 0
    out = capsys.readouterr().out
    assert "5 rows (sft), answered by greedy generation" in out
    assert "perplexity" in out
    assert "parity" in out
    assert call(monkeypatch, *given, "--json", "--rows", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 3
    assert 0 <= found["scores"]["exact_match"]["low"] <= found["scores"]["exact_match"]["high"] <= 1
    assert call(monkeypatch, "eval", str(run), "--data", str(tmp_path / "nope.jsonl")) == 2
    assert "no such file" in capsys.readouterr().err


def test_generating_leaves_no_trace_in_the_randomness():
    model = torch.nn.Linear(1, 1)
    before = torch.get_rng_state()
    with generating.answering(model):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_runs_tokenizer_writes_as_it_was_trained(run):
    found = find_model(run)
    assert tokenizer_of(found, "alpaca").chat_template is None  # prompt/completion, joined as it stands
