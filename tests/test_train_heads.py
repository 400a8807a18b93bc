"""Heads chosen by model and rows; whole runs of classification of texts, and what every head's run keeps."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_heads import people, questions, reviews, save_encoder, save_encoder_decoder, translations, write_rows
from tiny_model import save_tiny, tiny_fixture  # noqa: F401

import pyfinetune.train.loop as loop
from pyfinetune.errors import UserError
from pyfinetune.train.config import load_config, parse_config
from pyfinetune.train.head_loop import head_loss, trainer_parts
from pyfinetune.train.head_model import load_with_head
from pyfinetune.train.head_rows import head_part, tokenizer_for
from pyfinetune.train.head_scores import predictions_of
from pyfinetune.train.heads import choose_head
from pyfinetune.train.preflight import examine
from pyfinetune.train.reading import prepare_rows, read_data
from pyfinetune.train.run import prepare_model, train
from pyfinetune.train.starter import starter_yaml

SLOW = pytest.mark.slow


@pytest.fixture(scope="session", name="encoder")
def encoder_fixture(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session", name="encoder_decoder")
def encoder_decoder_fixture(tmp_path_factory) -> str:
    return save_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder"))


def settings(model: str, data: str, out: Path, **change):
    section = {"learning_rate": 5e-3, "per_device_train_batch_size": 8, "max_steps": 12, **change.pop("trainer", {})}
    values = {"model_name_or_path": model, "train_file": data, "output_dir": str(out), "max_length": 32}
    values |= {"test_size": 0.25, "lora_r": 4, "device": "cpu", "report": False, "save_steps": 4, **change}
    return parse_config({**values, "trainer": section})


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class TestChoice:
    def kind(self, model, rows, tmp_path, **change) -> str:
        config = settings(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", **change)
        return choose_head(config, read_data(config).train).kind

    def test_an_encoder_gets_the_head_of_its_rows(self, encoder, tmp_path):
        assert self.kind(encoder, reviews(), tmp_path) == "sequence_classification"
        assert self.kind(encoder, people(), tmp_path) == "token_classification"
        assert self.kind(encoder, reviews(), tmp_path, task="pretrain") == "masked_lm"
        with pytest.raises(UserError, match="is an encoder, which has no head for prompt_completion rows"):
            self.kind(encoder, [{"prompt": "a", "completion": "b"}] * 8, tmp_path)

    def test_a_causal_model_learns_tasks_as_text_unless_told(self, tiny, tmp_path):
        assert self.kind(tiny, reviews(), tmp_path) == "causal_lm"
        assert self.kind(tiny, reviews(), tmp_path, head="sequence_classification") == "sequence_classification"

    def test_an_encoder_decoder_writes(self, encoder_decoder, tmp_path):
        assert self.kind(encoder_decoder, reviews(), tmp_path) == "seq2seq_lm"
        with pytest.raises(UserError, match=r"head: seq2seq_lm does not fit .*row 1?\d+, which is text"):
            self.kind(encoder_decoder, reviews(), tmp_path, task="pretrain")

    def test_what_does_not_fit_is_refused_with_what_does(self, encoder, tiny, tmp_path):
        with pytest.raises(
            UserError, match=r"head: token_classification does not fit .*, which is classification"
        ) as e:
            self.kind(encoder, reviews(), tmp_path, head="token_classification")
        assert "set head: sequence_classification" in e.value.fix
        with pytest.raises(UserError, match="which is classification") as e:
            self.kind(encoder, reviews(), tmp_path, head="masked_lm")
        assert "task: pretrain" in e.value.fix
        with pytest.raises(UserError, match=r"\(llama, a causal language model\) has no head masked_lm") as e:
            self.kind(tiny, reviews(), tmp_path, head="masked_lm", task="pretrain")
        assert "causal_lm" in e.value.fix
        with pytest.raises(UserError, match=r"\(bert, an encoder\) has no head causal_lm"):
            self.kind(encoder, reviews(), tmp_path, head="causal_lm")
        with pytest.raises(UserError, match="packing: is for causal language models"):
            self.kind(encoder, reviews(), tmp_path, packing=True)
        with pytest.raises(UserError, match="head: 'classifier' will not do"):
            settings(encoder, "a.jsonl", tmp_path, head="classifier")


def scores_at_least(result, name: str, value: float) -> None:
    assert result.metrics[name]["value"] >= value, result.metrics
    assert result.metrics[name]["low"] <= result.metrics[name]["value"] <= result.metrics[name]["high"]


class TestInit:
    def test_what_init_writes_checks_and_trains(self, encoder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = starter_yaml(encoder, write_rows(tmp_path / "rows.jsonl", reviews(60)))
        assert len(text.splitlines()) <= 12
        assert {"task: classification", "head: sequence_classification", "method: full"} <= set(text.splitlines())
        (tmp_path / "run.yaml").write_text(text)
        config = load_config("run.yaml")
        assert config.max_length == 32
        result = train(config.model_copy(update={"trainer": {**config.trainer, "max_steps": 2}, "report": False}))
        assert result.metrics["accuracy"]["rows"] == 6

    @pytest.mark.parametrize(("rows", "kind"), [(people, "token_classification"), (questions, "question_answering")])
    def test_the_head_is_that_of_the_rows(self, encoder, tmp_path, rows, kind):
        text = starter_yaml(encoder, write_rows(tmp_path / "rows.jsonl", rows(24)))
        assert f"task: {kind}\nhead: {kind}\n" in text

    def test_an_encoder_decoder_and_a_causal_model(self, encoder_decoder, tiny, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", translations(24))
        assert "task: translation\nhead: seq2seq_lm\n" in starter_yaml(encoder_decoder, data)
        assert "head:" not in starter_yaml(tiny, data)


class TestClassification:
    @pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=SLOW), pytest.param("qlora", marks=SLOW)])
    def test_a_run_learns_and_what_it_saves_predicts_the_same(self, encoder, tmp_path, method):
        out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", reviews())
        config = settings(encoder, data, out, method=method, report=True, trainer={"max_steps": 24})
        result = train(config)
        assert result.eval_loss < result.eval_loss_before - 0.1
        assert result.perplexity is None
        scores_at_least(result, "accuracy", 0.9)
        assert 0.3 <= result.floor["accuracy"] <= 0.7
        record = json.loads((out / "run.json").read_text())
        assert record["head"] == {"kind": "sequence_classification", "unit": "row", "labels": ["neg", "pos"]}
        assert record["result"]["metrics"] == result.metrics
        assert records(out)[-1]["metrics"] == result.metrics
        card = (out / "README.md").read_text()
        assert "pipeline_tag: text-classification" in card
        assert "most frequent label" in card
        assert "accuracy" in (out / "report.html").read_text()
        assert reloaded(out, encoder, method, config) == result.metrics["accuracy"]["value"]

    def test_a_decoder_takes_a_head_when_told(self, tiny, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", reviews())
        config = settings(tiny, data, tmp_path / "out", head="sequence_classification", trainer={"max_steps": 20})
        result = train(config)
        scores_at_least(result, "accuracy", 0.9)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"].count("score") == 1
        saved = json.loads((tmp_path / "out" / "config.json").read_text())
        assert saved["id2label"] == {"0": "neg", "1": "pos"}
        assert saved["pad_token_id"] == 0
        names = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert any(name.endswith("score.weight") for name in names)

    def test_whole_numbers_are_classes_and_a_pair_is_read(self, encoder, tmp_path):
        kinds = (("good", 10), ("bad", 2), ("fine", 33))
        rows = [
            {"text": " ".join(row["text"].split()[4:]), "text_pair": kinds[n % 3][0], "label": kinds[n % 3][1]}
            for n, row in enumerate(reviews())
        ]
        config = settings(
            encoder,
            write_rows(tmp_path / "rows.jsonl", rows),
            tmp_path / "out",
            method="full",
            trainer={"max_steps": 40, "learning_rate": 2e-3},
        )
        data = read_data(config)
        head = choose_head(config, data.train)
        prepared = prepare_rows(data, tokenizer_for(config, data.format, head), config, head)
        assert prepared.labels == ("2", "10", "33")
        assert prepared.train[0]["token_type_ids"].count(1) == 2
        scores_at_least(train(config), "accuracy", 0.6)

    def test_labels_at_fault_are_named(self, encoder, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", reviews(8))
        held = write_rows(tmp_path / "held.jsonl", [*reviews(2), {"text": "the film", "label": "so-so"}])
        config = settings(encoder, data, tmp_path / "out", validation_file=held, test_size=None)
        with pytest.raises(UserError, match=r"held.jsonl, row 3: the label 'so-so' is in no training row"):
            train(config)
        one = write_rows(tmp_path / "one.jsonl", [{**row, "label": "pos"} for row in reviews(8)])
        with pytest.raises(UserError, match="every training row has the label 'pos'"):
            train(settings(encoder, one, tmp_path / "out", test_size=None))
        many = [{**row, "label": "pos"} for row in reviews(199)] + [{"text": "bad", "label": "neg"}]
        found = examine(settings(encoder, write_rows(tmp_path / "many.jsonl", many), tmp_path / "out", test_size=None))
        assert found.ok
        assert [p.message.partition(":")[0] for p in found.problems if "99.5%" in p.message] == [
            "99.5% of the training rows have the label 'pos'"
        ]
        assert found.labels == {"pos": 199, "neg": 1}

    def test_check_shows_what_is_learned_and_what_is_cut(self, encoder, tmp_path):
        rows = [*reviews(16), {"text": "the plot " * 40, "label": "pos"}]
        config = settings(encoder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", test_size=None)
        found = examine(config)
        assert found.ok
        assert found.head == "sequence_classification"
        assert found.counts["train"]["learned_tokens"] == 17
        (problem,) = found.problems
        assert problem.message.startswith("1 rows lose 50 tokens to max_length 32 (longest: 82 tokens)")
        assert found.example[-1] == {"text": " → pos", "tokens": 0, "learned": True}
        full = prepare_model(config, torch.device("cpu"), choose_head(config, read_data(config).train), ("neg", "pos"))
        assert found.model["parameters"] == 83_714 or found.model["parameters"] > 0
        assert full[0].config.id2label == {0: "neg", 1: "pos"}


def reloaded(out: Path, base: str, method: str, config) -> float:
    """Accuracy of the saved folder, loaded as its card says, on the run's held-out rows."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    import pyfinetune as pf

    tokenizer = AutoTokenizer.from_pretrained(out)
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(out)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, config=AutoConfig.from_pretrained(out))
        if method == "qlora":
            model = pf.quantize(model, skip=("classifier", "pooler"))
            model = PeftModel.from_pretrained(model, out, config=pf.lora_config(PeftConfig.from_pretrained(out)))
        else:
            model = PeftModel.from_pretrained(model, out)
    data = read_data(config)
    head = choose_head(config, data.train)
    part = head_part(data.held_out, tokenizer, config, head, ("neg", "pos"))
    said = predictions_of(head, part, model, tokenizer)
    return sum(a == example.fields["label"] for a, example in zip(said, data.held_out, strict=True)) / len(said)


def test_the_fresh_head_learns_and_is_saved_with_the_adapter(encoder, tmp_path):
    out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", reviews())
    config = settings(encoder, data, out)
    head = choose_head(config, read_data(config).train)
    model, _ = prepare_model(config, torch.device("cpu"), head, ("neg", "pos"), 0)
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    train(config)
    saved = load_file(out / "adapter_model.safetensors")
    for module, leaf in (("classifier", "weight"), ("pooler", "dense.weight")):  # neither is in the checkpoint
        (was,) = (p for name, p in before.items() if name.endswith(f"{module}.modules_to_save.default.{leaf}"))
        (now,) = (tensor for name, tensor in saved.items() if name.endswith(f"{module}.{leaf}"))
        assert not torch.equal(was, now), module


@pytest.fixture(scope="module")
def straight(encoder, tmp_path_factory):
    """Weights and losses of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    data = write_rows(folder / "rows.jsonl", reviews())
    found = {}
    for name, change in RUNS.items():
        train(settings(encoder, data, folder / name, **change))
        found[name] = weights_and_losses(folder / name)
    return data, found


# Epochs end within these runs, so that masks are drawn anew.
RUNS = {"classes": {}, "masked": {"task": "pretrain", "method": "full", "trainer": {"learning_rate": 1e-3}}}


def weights_and_losses(out: Path):
    (weights,) = out.glob("*model.safetensors")
    losses = [(r["step"], r[k]) for r in records(out) for k in ("loss", "eval_loss") if k in r]
    return load_file(weights), losses


@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("step", [3, pytest.param(7, marks=SLOW)])
def test_an_interrupted_run_goes_on_to_the_same_bits(encoder, tmp_path, straight, monkeypatch, name, step):
    data, found = straight
    out, original = tmp_path / "out", loop.RunTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunTrainer, "training_step", training_step)
        assert train(settings(encoder, data, out, **RUNS[name])).interrupted
    result = train(settings(encoder, data, out, **RUNS[name]))
    assert result.resumed_from == str(out / f"checkpoint-{step}")
    weights, losses = weights_and_losses(out)
    straight_weights, straight_losses = found[name]
    assert losses == straight_losses
    for key, tensor in weights.items():
        assert torch.equal(tensor, straight_weights[key]), key


def gradients(config, batch: int, accumulation: int) -> tuple[dict, float]:
    """Gradients of the first step, and the held-out loss before it."""
    data = read_data(config)
    head = choose_head(config, data.train)
    tokenizer = tokenizer_for(config, data.format, head)
    rows = prepare_rows(data, tokenizer, config, head)
    model, _ = prepare_model(config, torch.device("cpu"), head, rows.labels, tokenizer.pad_token_id)
    section = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    section |= {"max_grad_norm": 0.0, "optim": "sgd", "per_device_eval_batch_size": batch, "learning_rate": 0.0}
    config = config.model_copy(update={"trainer": section})
    arguments = loop.training_arguments(config, train_rows=len(rows.train), held_out=True)
    parts = trainer_parts(head, rows, tokenizer, model, config)
    found = {}

    class Keeper(loop.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    parts["callbacks"] = [*parts["callbacks"], Keeper()]
    trainer = loop.build_trainer(model, arguments, **parts, tokenizer=tokenizer, max_length=config.max_length)
    held_out = trainer.evaluate()["eval_loss"]
    trainer.train()
    return found, held_out


def test_label_smoothing_and_no_label_at_all():
    logits, mask = torch.randn(3, 4), torch.ones(3, 5)
    labels = torch.tensor([0, 3, -100])
    expected = torch.nn.functional.cross_entropy(logits[:2], labels[:2], label_smoothing=0.2)
    assert torch.allclose(head_loss({"logits": logits}, labels, mask, None, 0.2), expected)
    assert head_loss({"logits": logits}, torch.full((3,), -100), mask) == 0.0


def test_a_class_that_finds_none_of_its_weights_is_refused(tiny, encoder, tmp_path):
    """Of some models transformers makes a class whose weights have other names: it would be random, and say nothing."""
    data = write_rows(tmp_path / "rows.jsonl", questions())
    for method in ("full", "qlora"):
        with pytest.raises(UserError, match="AutoModelForQuestionAnswering of transformers does not find its weights"):
            train(settings(tiny, data, tmp_path / "out", head="question_answering", doc_stride=4, method=method))
    with pytest.raises(UserError, match="max_length: 200 is beyond the 128 positions"):
        train(settings(encoder, data, tmp_path / "out", doc_stride=4, max_length=200))


def test_a_head_of_other_labels_is_made_anew_and_one_of_the_same_goes_on(encoder, tmp_path):
    out, data = tmp_path / "first", write_rows(tmp_path / "rows.jsonl", reviews())
    train(settings(encoder, data, out, method="full", trainer={"max_steps": 2}))
    same, fresh = load_with_head(str(out), "AutoModelForSequenceClassification", labels=("neg", "pos"), method="full")
    assert fresh == []
    assert torch.equal(same.classifier.weight, load_file(out / "model.safetensors")["classifier.weight"])
    more = load_with_head(str(out), "AutoModelForSequenceClassification", labels=("a", "b", "c"), method="full")
    assert more[1] == ["classifier"]
    config = settings(str(out), data, tmp_path / "third", trainer={"max_steps": 1})
    assert train(config).steps == 1  # an adapter, with the head that was there trained further
    assert more[0].classifier.out_features == 3
    config = json.loads((out / "config.json").read_text())
    turned = {**config, "id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (out / "config.json").write_text(json.dumps(turned))
    again = settings(str(out), data, tmp_path / "second", method="full")
    found = read_data(again)
    head = choose_head(again, found.train)
    rows = prepare_rows(found, tokenizer_for(again, found.format, head), again, head)
    assert rows.labels == ("pos", "neg")  # the numbers that its head knows them by


def test_plan_refuses_what_it_cannot_predict(encoder, tiny, tmp_path):
    from pyfinetune.train.forecast import forecast

    data = write_rows(tmp_path / "rows.jsonl", reviews())
    for model, change in ((encoder, {}), (tiny, {"head": "sequence_classification"})):
        with pytest.raises(UserError, match=r"plan: the memory of .* cannot be predicted"):
            forecast(settings(model, data, tmp_path / "out", **change), quick=True)


def test_early_stopping_keeps_the_best_weights(encoder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", reviews())
    section = {"max_steps": 60, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    change = {"method": "full", "early_stopping_patience": 2, "eval_steps": 2, "save_steps": 2}
    result = train(settings(encoder, data, tmp_path / "out", trainer=section, **change))
    assert result.steps < 60
    held_out = [r["eval_loss"] for r in records(tmp_path / "out") if "eval_loss" in r and r["step"] > 0]
    assert result.eval_loss == pytest.approx(min(held_out), rel=1e-6)
