"""`patch` and TRL's `SFTTrainer`: packed, padding-free and padded batches, patched before, after and at the start."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hf_models import checkpointing, make, with_lora
from peft_models import assert_close
from tiny_model import make_tokenizer
from trainer_runs import arguments, recorder, result_of, widened

import pyfinetune as pf

pytest.importorskip("trl")
pytest.importorskip("peft")

import trl.trainer.utils
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from pyfinetune.hf.script import PatchAtStart

OWN_HEAD = hasattr(trl.trainer.utils, "add_fused_lm_head")  # older versions call the model's own
BATCHES = {
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
    "padded": {"max_length": 24},
}


def documents(seed: int = 5) -> Dataset:
    """Of 4 to 19 tokens, the first ones of each no labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(24):
        ids = torch.randint(3, 96, (4 + (i * 7) % 16,), generator=generator)
        found.append({"input_ids": ids.tolist(), "labels": ids.clone().index_fill(0, torch.arange(2), -100).tolist()})
    return Dataset.from_list(found)


def trainer_of(model, folder, batches: str, **options):
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, "bf16": False, checkpointing(): False}
    options = {**settings, **BATCHES[batches], "average_tokens_across_devices": False, **options}
    callbacks = options.pop("callbacks", [])
    config = arguments(folder, SFTConfig, **options)
    tokenizer = make_tokenizer()
    return recorder(SFTTrainer)(
        model, config, train_dataset=documents(), processing_class=tokenizer, callbacks=callbacks
    )


def trained(model, folder, batches: str, exact: bool = False, **options):
    model = model.double() if exact else model
    with widened(exact):
        trainer = trainer_of(model, folder, batches, **options)
        trainer.train()
    return result_of(trainer.losses, model)


def model_of(method: str, name: str = "Llama"):
    return with_lora(make(name)) if method == "lora" else make(name)


def loss_row(report):
    return next(row for row in report.rows if row.kind == "causal LM loss")


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_training(method, batches, tmp_path):
    """Patched before the trainer is made, after it, and when it starts."""
    model = model_of(method)
    exact = trained(copy.deepcopy(model), tmp_path, batches, exact=True)
    eager = trained(copy.deepcopy(model), tmp_path, batches)
    early, late = copy.deepcopy(model), copy.deepcopy(model)
    assert pf.patch(early).left == 0
    ours = trained(early, tmp_path, batches)
    assert_close(ours, eager, exact, torch.float32)
    start = dict(model.named_parameters())
    assert not any(torch.equal(value, start[name]) for name, value in ours.items() if "lora_B" in name)
    assert ours.keys() - {"losses"} == {name for name, parameter in start.items() if parameter.requires_grad}

    trainer = trainer_of(late, tmp_path, batches)
    report = pf.patch(trainer.model)
    if OWN_HEAD:
        assert loss_row(report).reason.endswith("such as TRL's own head")
    assert report.left == OWN_HEAD
    trainer.train()
    assert_close(result_of(trainer.losses, late), eager, exact, torch.float32)

    at_start = trained(model, tmp_path, batches, callbacks=[PatchAtStart])
    assert all(torch.equal(at_start[name], value) for name, value in result_of(trainer.losses, late).items())
    report.undo()
    assert not any(type(module).__name__.startswith("Fast") for module in late.modules())


@pytest.mark.parametrize("batches", ["packed", "padding-free"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_documents_of_a_batch_do_not_see_each_other(name, batches, tmp_path):
    """The trainer's own batch against each of its documents alone; no bit moves when another one changes."""
    model = make(name)
    trainer = trainer_of(model, tmp_path, batches)
    pf.patch(model)
    batch = {key: value for key, value in next(iter(trainer.get_train_dataloader())).items() if key != "labels"}
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 2
    plain, wide = make(name), make(name).double()
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits
        other = copy.deepcopy(batch)
        other["input_ids"][0, : starts[1]] = other["input_ids"][0, : starts[1]].flip(0)
        moved = model(**other, use_cache=False).logits
        assert torch.equal(together[0, starts[1] :], moved[0, starts[1] :])
        assert not torch.equal(together[0, : starts[1]], moved[0, : starts[1]])
        for first, last in itertools.pairwise(starts):
            ids = batch["input_ids"][:, first:last]
            with widened(True):
                exact = {"logits": wide(input_ids=ids).logits[0]}
            eager = {"logits": plain(input_ids=ids).logits[0]}
            assert_close({"logits": together[0, first:last]}, eager, exact, torch.float32)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_mixed_precision_and_checkpointing(method, tmp_path):
    options = {"bf16": True, checkpointing(): True}
    model = model_of(method)
    exact = trained(copy.deepcopy(model), tmp_path, "packed", exact=True)
    eager = trained(copy.deepcopy(model), tmp_path, "packed", **options)
    ours = trained(model, tmp_path, "packed", callbacks=[PatchAtStart], **options)
    assert_close(ours, eager, exact, torch.bfloat16)


def test_the_trainer_makes_the_adapters(tmp_path):
    """With `peft_config` there is nothing of PEFT to patch before."""
    from peft import LoraConfig
    from transformers import Trainer

    model = make("Qwen2")
    settings = {"max_steps": 2, "bf16": False, checkpointing(): False, **BATCHES["packed"]}
    config = arguments(tmp_path, SFTConfig, **settings)
    lora = LoraConfig(r=4, target_modules="all-linear")
    options = {"train_dataset": documents(), "processing_class": make_tokenizer(), "peft_config": lora}
    trainer = SFTTrainer(model, config, **options)
    assert isinstance(trainer, Trainer)
    report = pf.patch(trainer.model)
    kinds = {row.kind for row in report.rows if row.status == "swapped"}
    assert kinds - {"causal LM loss"} == {"LoRA over nn.Linear", "RMSNorm", "gated MLP", "attention block", "attention"}
    assert ("causal LM loss" in kinds) != OWN_HEAD
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def test_evaluation_with_and_without_logits(tmp_path):
    def evaluated(model, **options):
        trainer = trainer_of(model, tmp_path, "padded", per_device_eval_batch_size=4, **options)
        return trainer.evaluate(documents(7))["eval_loss"]

    model = make("Llama")
    expected = evaluated(copy.deepcopy(model), prediction_loss_only=True)
    pf.patch(model)
    assert evaluated(model, prediction_loss_only=True) == pytest.approx(expected, rel=1e-6)
