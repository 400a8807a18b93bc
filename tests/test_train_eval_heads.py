"""`pyfinetune eval` of models with heads: what a run said of its held-out rows is found again, loss and metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_train_heads import encoder_decoder_fixture, encoder_fixture, settings  # noqa: F401
from tiny_heads import people, preferences, questions, reviews, translations, write_rows
from tiny_model import tiny_fixture  # noqa: F401

from pyfinetune.errors import UserError
from pyfinetune.train.compare_config import parse_compare
from pyfinetune.train.comparison import compare
from pyfinetune.train.evaluating import EvalRequest, evaluate
from pyfinetune.train.run import train

# PEFT asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def trained(base: str, rows: list[dict], folder: Path, **change) -> tuple[str, dict]:
    """The output folder of a short run, and what its run.json says came of it."""
    data = write_rows(folder / "rows.jsonl", rows)
    train(settings(base, data, folder / "out", **{"trainer": {"max_steps": 8}, **change}))
    return str(folder / "out"), json.loads((folder / "out" / "run.json").read_text())["result"]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("rows", [reviews, people, questions], ids=lambda rows: rows.__name__)
def test_an_encoders_run_is_found_again(encoder, tmp_path, rows, method):
    out, result = trained(encoder, rows(), tmp_path, method=method, doc_stride=8)
    found = evaluate(EvalRequest(out, device="cpu", batch_size=3))
    assert found.scores["loss"].value == pytest.approx(result["eval_loss"], rel=1e-4)
    assert result["metrics"]
    for name, value in result["metrics"].items():
        assert found.scores[name].value == pytest.approx(value["value"]), name
    assert "perplexity" not in found.scores
    assert found.answered_by.startswith("its head")


def test_an_encoder_decoders_run_is_found_again(encoder_decoder, tmp_path):
    out, result = trained(encoder_decoder, translations(), tmp_path, method="full")
    # The run lets an answer be as long as its longest training answer: four words and the end.
    found = evaluate(EvalRequest(out, max_new_tokens=5, device="cpu", answers=str(tmp_path / "said.jsonl")))
    assert found.scores["loss"].value == pytest.approx(result["eval_loss"], rel=1e-4)
    assert found.scores["perplexity"].value > 1
    assert found.scores["bleu"].value == pytest.approx(result["metrics"]["bleu"]["value"])
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert all(line["tokens_in"] > 0 and line["tokens_out"] > 0 for line in said)


def test_masked_words_have_a_loss_alone(encoder, tmp_path):
    rows = [{"text": row["text"]} for row in reviews()]
    out, result = trained(encoder, rows, tmp_path, method="full", task="pretrain")
    found = evaluate(EvalRequest(out, device="cpu"))
    assert found.scores["loss"].value == pytest.approx(result["eval_loss"], rel=1e-4)
    assert set(found.scores) == {"loss", "perplexity"}


def test_a_classifier_without_its_run_is_known_by_what_it_was_saved_as(encoder, tmp_path):
    out, _ = trained(encoder, reviews(), tmp_path, method="full")
    alone = shutil.copytree(out, tmp_path / "alone", ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    data = write_rows(tmp_path / "test.jsonl", reviews(12))
    with_run = evaluate(EvalRequest(out, (data,), device="cpu"))
    found = evaluate(EvalRequest(str(alone), (data,), device="cpu"))
    assert found.scores == with_run.scores
    with pytest.raises(UserError, match="was never trained"):
        evaluate(EvalRequest(encoder, (data,), device="cpu"))


def test_a_small_encoder_is_compared_with_a_prompted_language_model(encoder, tiny, tmp_path):
    rows = reviews(80)
    out, _ = trained(encoder, rows, tmp_path, test_size=24, trainer={"max_steps": 40})
    given = {"run": out, "latency_rows": 2, "device": "cpu", "resamples": 100}
    other = {"name": "llama", "model_name_or_path": tiny, "prompts": ["labels named"], "retrieved": 1}
    found = compare(parse_compare({**given, "models": [other]}))
    assert [s.name for s in found.systems] == ["tuned", "llama, labels named", "llama, retrieved (1 example)"]
    tuned = found.systems[0]
    assert tuned.scores["accuracy"].value > 0.9
    assert tuned.latency > 0
    assert tuned.tokens_in > 3
    assert "for the best prompt (llama" in found.verdict.sentence
    again = compare(parse_compare({**given, "models": [other]}))
    assert again.verdict == found.verdict
    with pytest.raises(UserError, match="cannot be prompted") as caught:
        compare(parse_compare(given))
    assert "models:" in str(caught.value)


def test_a_reward_model_answers_nothing(tiny, tmp_path):
    out, _ = trained(tiny, preferences(), tmp_path, trainer={"max_steps": 2})
    with pytest.raises(UserError, match="reward model"):
        evaluate(EvalRequest(out, device="cpu"))
