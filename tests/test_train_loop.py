"""The loop: losses weighted by tokens whatever the accumulation, in training and on held-out rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_model import make_model, make_tokenizer

from pyfinetune.errors import UserError
from pyfinetune.train.config import parse_config
from pyfinetune.train.data.packing import collate, one_a_row
from pyfinetune.train.data.tokenizing import Document
from pyfinetune.train.loop import build_trainer, total_steps, training_arguments


def config(tmp_path, **change):
    trainer = {"use_cpu": None, **change.pop("trainer", {})}
    trainer.pop("use_cpu")
    values = {"model_name_or_path": "m", "train_file": "a.json", "output_dir": str(tmp_path / "out"), "device": "cpu"}
    return parse_config({**values, **change, "trainer": trainer})


def uneven_rows(*learned: int, length: int = 24):
    """Rows of equal length with very different numbers of targets."""
    documents = []
    for seed, count in enumerate(learned):
        mask = np.zeros(length, dtype=bool)
        mask[length - count :] = True
        documents.append(Document(np.random.default_rng(seed).integers(1, 300, length).astype(np.int32), mask))
    return one_a_row(documents)


def one_step(tmp_path, rows, batch: int, accumulation: int, accepts_loss_kwargs: bool):
    torch.manual_seed(0)
    model = make_model()
    model.accepts_loss_kwargs = accepts_loss_kwargs
    trainer_section = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "save_strategy": "no",
    }
    arguments = training_arguments(
        config(tmp_path, method="full", trainer=trainer_section), train_rows=len(rows), held_out=False
    )
    trainer = build_trainer(model, arguments, rows, tokenizer=make_tokenizer(), max_length=64)
    trainer.train()
    logged = trainer.state.log_history[0]
    return logged["loss"], logged["grad_norm"], {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_accumulation_does_not_change_the_step(tmp_path, accepts_loss_kwargs):
    """Named regression: a loss averaged batch by batch, which weighs the tokens of short answers more."""
    rows = uneven_rows(1, 23, 2, 12)
    loss, norm, weights = one_step(tmp_path, rows, 4, 1, accepts_loss_kwargs)
    before = {name: p.detach() for name, p in make_model().named_parameters()}
    assert max((weights[name] - before[name]).abs().max() for name in weights) > 1e-3  # the step moved something
    for batch, accumulation in ((2, 2), (1, 4)):
        other_loss, other_norm, other_weights = one_step(tmp_path, rows, batch, accumulation, accepts_loss_kwargs)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        for name in weights:
            assert torch.allclose(weights[name], other_weights[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_held_out_loss_is_the_mean_over_tokens(tmp_path, accepts_loss_kwargs):
    rows = uneven_rows(1, 23, 2, 12, 7)
    model = make_model().eval()
    model.accepts_loss_kwargs = accepts_loss_kwargs
    total, targets, means = 0.0, 0, []
    for row in rows:
        batch = collate([row], pad_token_id=0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none")
        total += losses.sum().item()
        targets += (batch["labels"] != -100).sum().item()
        means.append(losses.sum().item() / (batch["labels"] != -100).sum().item())
    assert abs(total / targets - np.mean(means)) > 1e-3  # the two ways of averaging differ here
    for batch_size in (1, 2, 8):
        arguments = training_arguments(
            config(
                tmp_path,
                method="full",
                test_size=0.1,
                trainer={"per_device_eval_batch_size": batch_size, "max_steps": 1},
            ),
            train_rows=5,
            held_out=True,
        )
        trainer = build_trainer(model, arguments, rows, rows, tokenizer=make_tokenizer(), max_length=64)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / targets, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(np.exp(total / targets), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [(10, 4, 1, 3), (10, 4, 2, 1), (9, 2, 2, 2), (3, 8, 4, 1), (7, 1, 1, 0.5)],
)
def test_the_planned_steps_are_those_of_the_trainer(tmp_path, rows, batch, accumulation, epochs):
    section = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
        "save_strategy": "no",
    }
    arguments = training_arguments(config(tmp_path, trainer=section), train_rows=rows, held_out=False)
    trainer = build_trainer(
        make_model(layers=1), arguments, uneven_rows(*[3] * rows, length=4), tokenizer=make_tokenizer(), max_length=64
    )
    trainer.train()
    assert trainer.state.global_step == total_steps(arguments, rows)


def test_defaults_and_what_overrides_them(tmp_path):
    arguments = training_arguments(config(tmp_path, test_size=0.1), train_rows=8000, held_out=True)
    assert (arguments.save_steps, arguments.eval_steps) == (300, 300)  # ten a run of 3000 steps
    assert arguments.learning_rate == 2e-4
    assert arguments.report_to == []
    assert not arguments.push_to_hub
    arguments = training_arguments(config(tmp_path), train_rows=800_000, held_out=False)
    assert arguments.save_steps == 500
    assert str(arguments.eval_strategy.value) == "no"
    section = {"learning_rate": 1e-3, "save_total_limit": 9, "eval_strategy": "epoch"}
    arguments = training_arguments(
        config(tmp_path, test_size=0.1, save_steps=7, trainer=section), train_rows=80, held_out=True
    )
    assert (arguments.learning_rate, arguments.save_total_limit, arguments.save_steps) == (1e-3, 9, 7)
    assert arguments.eval_strategy.value == "epoch"
    early = config(tmp_path, test_size=0.1, early_stopping_patience=2, eval_steps=3)
    arguments = training_arguments(early, train_rows=80, held_out=True)
    assert arguments.load_best_model_at_end
    assert arguments.save_steps == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which device: auto takes")
def test_without_a_gpu_a_run_that_leaves_the_device_open_is_one_on_the_cpu(tmp_path):
    """Else two processes of torchrun on a CPU train by themselves and write over each other."""
    assert training_arguments(config(tmp_path, device="auto"), train_rows=8, held_out=False).use_cpu


@pytest.mark.parametrize("section", [{"lr_scheduler_type": "no-such"}, {"save_strategy": "sometimes"}])
def test_a_value_that_transformers_refuses_is_a_users_error(tmp_path, section):
    with pytest.raises(UserError, match="trainer:") as caught:
        training_arguments(config(tmp_path, trainer=copy.deepcopy(section)), train_rows=8, held_out=False)
    assert "trainer:" in caught.value.fix
