"""Reward models: pairs of answers, TRL's loss in this package's loop, and what is saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_heads import encoder_fixture, records, scores_at_least, settings  # noqa: F401
from tiny_heads import preferences, write_rows
from tiny_model import CHATML, save_tiny, tiny_fixture  # noqa: F401

import pyfinetune.train.loop as loop
from pyfinetune.errors import UserError
from pyfinetune.train.data.reading import prepare_rows, read_data
from pyfinetune.train.data.tokenizing import load_tokenizer
from pyfinetune.train.heads.kinds import HEADS, choose_head
from pyfinetune.train.heads.loop import arguments_kind, trainer_parts
from pyfinetune.train.heads.rows import tokenizer_for
from pyfinetune.train.heads.scores import rewards_of
from pyfinetune.train.preflight.checks import examine
from pyfinetune.train.run import prepare_model, train


def test_a_run_prefers_the_better_answers_and_saves_what_peft_loads(tiny, tmp_path):
    out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", preferences())
    config = settings(tiny, data, out, max_length=128, trainer={"max_steps": 12})
    result = train(config)
    assert result.eval_loss < result.eval_loss_before - 0.1
    scores_at_least(result, "accuracy", 0.9)
    assert set(result.metrics) == {"accuracy"}
    assert result.floor["what"] in ("the longer answer", "the shorter answer")
    assert json.loads((out / "run.json").read_text())["head"]["kind"] == "reward"
    assert all(record["tokens_per_second"] > 0 for record in records(out) if "loss" in record)

    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    assert any(name.endswith("score.weight") for name in load_file(out / "adapter_model.safetensors"))
    base = AutoModelForSequenceClassification.from_pretrained(tiny, config=AutoConfig.from_pretrained(out))
    model = PeftModel.from_pretrained(base, out)
    rows = prepare_rows(read_data(config), load_tokenizer(str(out)), config, HEADS["reward"])
    tokenizer = tokenizer_for(config, "preference", HEADS["reward"])
    rewards = rewards_of(rows.parts["held_out"], model, tokenizer)
    gaps = torch.tensor(rewards["chosen"]) - torch.tensor(rewards["rejected"])
    assert result.eval_loss == pytest.approx(-torch.nn.functional.logsigmoid(gaps).mean().item(), rel=1e-4)
    assert (gaps > 0).double().mean().item() == result.metrics["accuracy"]["value"]


def first_step(config, batch: int, accumulation: int) -> tuple[dict, float]:
    """Gradients of the first step, and the held-out loss before it."""
    data = read_data(config)
    head = choose_head(config, data.train)
    assert head.kind == "reward"
    tokenizer = tokenizer_for(config, data.format, head)
    rows = prepare_rows(data, tokenizer, config, head)
    model, _ = prepare_model(config, torch.device("cpu"), head, (), tokenizer.pad_token_id)
    section = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    section |= {"max_grad_norm": 0.0, "optim": "sgd", "per_device_eval_batch_size": batch, "learning_rate": 0.0}
    config = config.model_copy(update={"trainer": section})
    arguments = loop.training_arguments(config, train_rows=len(rows.train), held_out=True, **arguments_kind(head))
    found = {}

    class Keeper(loop.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    parts = trainer_parts(head, rows, tokenizer, model, config)
    parts["callbacks"] = [*parts["callbacks"], Keeper()]
    trainer = loop.build_trainer(model, arguments, **parts, tokenizer=tokenizer, max_length=config.max_length)
    held_out = trainer.evaluate()["eval_loss"]
    trainer.train()
    return found, held_out


def test_accumulated_batches_give_the_gradients_of_one(tiny, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", preferences())
    config = settings(tiny, data, tmp_path / "out", max_length=128, method="full")
    one, loss = first_step(config, 4, 1)
    two, same_loss = first_step(config, 2, 2)
    assert loss == pytest.approx(same_loss, rel=1e-5)
    assert any(grad.abs().max() > 1e-4 for grad in one.values())
    for name, grad in one.items():
        assert torch.allclose(grad, two[name], rtol=1e-4, atol=1e-6), name


def test_chats_are_written_by_the_template_and_faults_are_named(tmp_path):
    model = save_tiny(tmp_path / "model", chat_template=CHATML)
    ask, fine, poor = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "a"), ("assistant", "b")))
    rows = [
        {"chosen": [ask, fine], "rejected": [ask, poor]},
        {"prompt": [ask], "chosen": [fine], "rejected": [poor]},
        {"prompt": "hi", "chosen": [fine], "rejected": [poor]},
    ]
    config = settings(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path, test_size=None, max_length=64)
    data = read_data(config)
    tokenizer = tokenizer_for(config, data.format, HEADS["reward"])
    made = prepare_rows(data, tokenizer, config, HEADS["reward"]).train
    assert made[0] == made[1] == made[2]
    text = tokenizer.decode(made[0]["rejected_ids"])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"

    def refused(row: dict, match: str, **change) -> None:
        path = write_rows(tmp_path / "bad.jsonl", [rows[0], row])
        with pytest.raises(UserError, match=match):
            prepare_rows(read_data(settings(model, path, tmp_path, test_size=None, **change)), tokenizer, config)

    refused({"chosen": [ask, fine], "rejected": [ask, fine]}, r"bad\.jsonl, row 2: chosen and rejected are the same")
    refused({"chosen": "a", "rejected": [ask, poor]}, "of chosen and rejected one is a text")
    refused({"prompt": [ask], "chosen": "a", "rejected": "b"}, "prompt holds messages, but chosen is a text")
    refused({"chosen": "a", "rejected": " "}, "rejected is empty")
    with pytest.raises(UserError, match=r"head: causal_lm does not fit .* which is preference") as caught:
        choose_head(config.model_copy(update={"head": "causal_lm"}), data.train)
    assert "set head: reward" in caught.value.fix


def test_pairs_that_are_too_long_are_left_out_and_said(encoder, tmp_path):
    rows = [*preferences(8), {"prompt": "", "chosen": "good " * 60, "rejected": "bad"}]
    config = settings(encoder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path, test_size=None, eos_token="[SEP]")
    found = examine(config)
    assert found.ok, found.problems
    assert (found.counts["train"]["rows"], found.counts["train"]["dropped"]) == (8, 1)
    assert any("1 pairs are left out, longer than max_length 32" in problem.message for problem in found.problems)
    with pytest.raises(UserError, match="max_length 4 is under the length of every pair"):
        prepare_rows(
            read_data(config),
            tokenizer_for(config, "preference", HEADS["reward"]),
            config.model_copy(update={"max_length": 4}),
            HEADS["reward"],
        )


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "pyfinetune.train.heads.reward_loop", raising=False)
    with pytest.raises(UserError, match="head: reward needs trl") as caught:
        arguments_kind(HEADS["reward"])
    assert caught.value.fix == "pip install 'pyfinetune[sft]'"


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(tiny, tmp_path):
    data, weights = write_rows(tmp_path / "rows.jsonl", preferences()), []
    for name in ("straight", "stopped"):
        out = tmp_path / name
        config = settings(tiny, data, out, max_length=128, trainer={"max_steps": 8})
        train(config)
        if name == "stopped":
            for path in Path(out).glob("checkpoint-8/*"):
                path.unlink()
            (out / "checkpoint-8").rmdir()
            record = json.loads((out / "run.json").read_text())
            (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
            assert train(config).resumed_from == str(out / "checkpoint-4")
        weights.append(load_file(out / "adapter_model.safetensors"))
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key]), key
