"""`patch` and `transformers.Trainer`: the same training, whatever the Trainer is told to do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hf_models import checkpointing, exact_run, make, run, with_lora
from peft_models import assert_close
from torch import nn
from trainer_runs import arguments, batch_of, recorder, rows, trained

import pyfinetune as pf

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import Trainer, TrainerCallback

from pyfinetune.hf.causal_lm_loss import LazyLogits
from pyfinetune.hf.script import PatchAtStart

# In what the model is kept, and what the Trainer is told.
PRECISIONS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "autocast": (torch.float32, {"bf16": True}),
}


def model_of(method: str, name: str = "Qwen2", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make(name, dtype)
    return with_lora(model).to(dtype) if method == "lora" else model


def untouched(logits: list) -> bool:
    """Whether nobody has computed any of these."""
    return bool(logits) and all(isinstance(value, LazyLogits) and value.computed is None for value in logits)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_five_steps_are_as_good_as_the_originals(method, precision, tmp_path):
    """Losses and parameters may be twice as far from a float64 run's as the unpatched run's, plus an ulp."""
    dtype, options = PRECISIONS[precision]
    model = model_of(method, dtype=dtype)
    exact, _ = trained(copy.deepcopy(model), tmp_path, exact=True)
    eager, _ = trained(copy.deepcopy(model), tmp_path, **options)
    assert pf.patch(model).left == 0
    ours, trainer = trained(model, tmp_path, **options)
    assert_close(ours, eager, exact, torch.bfloat16 if options else dtype)
    assert ours["losses"][-1] < ours["losses"][0]
    assert untouched(trainer.logits)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_patched_when_training_starts(method, precision, tmp_path):
    """As `pyfinetune run` does it: the Trainer, and accelerate's mixed precision, have the model already."""
    dtype, options = PRECISIONS[precision]
    model = model_of(method, dtype=dtype)
    before = copy.deepcopy(model)
    pf.patch(before)
    ours, _ = trained(before, tmp_path, **options)
    late, trainer = trained(model, tmp_path, callbacks=[PatchAtStart], **options)
    assert untouched(trainer.logits)
    assert all(torch.equal(late[name], value) for name, value in ours.items())


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_accumulation_does_not_change_the_gradient(method, tmp_path):
    """Named regression: micro-batches with unequal numbers of labels weighted as if they were equal (transformers
    #34191)."""

    def step(size: int, patched: bool = True):
        model, keep = model_of(method), KeepGradients()
        if patched:
            pf.patch(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = recorder(Trainer)(model, arguments(tmp_path, **options), train_dataset=rows(8), callbacks=[keep])
        trainer.train()
        return {"loss": torch.stack(trainer.losses).sum(), **keep.grads}

    # One row at a time, by hand, in float64.
    model = model_of(method).double()
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows(8)]
    assert len(set(counts)) > 3
    parts = [exact_run(model, batch_of([row])) for row in rows(8)]
    shares = [count / sum(counts) for count in counts]
    quantities = [key for key in parts[0] if key != "logits"]
    exact = {key: sum(s * part[key] for s, part in zip(shares, parts, strict=True)) for key in quantities}
    eager = step(8, patched=False)
    in_parts = step(1, patched=False)
    if not all(torch.allclose(in_parts[key], value, rtol=0.01, atol=1e-3) for key, value in eager.items()):
        pytest.skip("this Trainer weighs accumulated gradients wrongly itself")
    for size in (8, 4, 2, 1):
        ours = step(size)
        assert_close(ours, eager, {key: exact[key] for key in ours}, torch.float32)
        assert ours["loss"].item() == pytest.approx(eager["loss"].item(), rel=1e-6)
        found, expected = (torch.cat([grad.reshape(-1) for grad in list(part.values())[1:]]) for part in (ours, eager))
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluation(precision, tmp_path):
    dtype, options = PRECISIONS[precision]
    model = model_of("lora", dtype=dtype).eval()
    inputs = [batch_of(part) for part in (rows(8)[:4], rows(8)[4:])]
    kept = np.concatenate([part["attention_mask"] for part in inputs]).astype(bool)
    seen = []

    def metrics(prediction):
        seen.append(torch.tensor(prediction.predictions[kept]))
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits.mean())}

    def evaluate(loss_only: bool, model):
        settings = arguments(tmp_path, prediction_loss_only=loss_only, **options)
        trainer = recorder(Trainer)(model, settings, eval_dataset=rows(8), compute_metrics=metrics)
        return trainer.evaluate(), trainer

    exact = torch.cat([exact_run(model, part)["logits"] for part in inputs])
    eager, _ = evaluate(False, copy.deepcopy(model))
    pf.patch(model)
    ours, trainer = evaluate(False, model)
    assert len(trainer.logits) == 2
    logits = ({"logits": value} for value in (seen[1], seen[0], exact))
    assert_close(*logits, torch.bfloat16 if options else dtype)
    assert ours["eval_accuracy"] == pytest.approx(eager["eval_accuracy"], abs=0.01 if precision != "float32" else 0)
    alone, trainer = evaluate(True, model)
    assert untouched(trainer.logits)
    assert len(seen) == 2
    assert alone["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-6)


class OwnLoss(Trainer):
    """A loss of the script's own, from the logits of a model that was given labels, changed in place."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        logits = outputs.logits
        logits[..., :3] -= 1.0
        losses = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 96).to(outputs.loss.dtype), inputs["labels"][:, 1:].reshape(-1), reduction="none"
        )
        loss = (losses * torch.linspace(1, 2, len(losses), dtype=losses.dtype)).mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("base", "options"),
    [(Trainer, {"label_smoothing_factor": 0.1}), (OwnLoss, {})],
    ids=["label smoothing", "own loss"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses_from_the_logits(base, options, dtype, tmp_path):
    model = model_of("full", dtype=dtype)
    exact, _ = trained(copy.deepcopy(model), tmp_path, exact=True, base=base, **options)
    eager, _ = trained(copy.deepcopy(model), tmp_path, base=base, **options)
    pf.patch(model)
    ours, _ = trained(model, tmp_path, base=base, **options)
    assert_close(ours, eager, exact, dtype)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_compiled_trainer(method, tmp_path):
    model = model_of(method)
    exact, _ = trained(copy.deepcopy(model), tmp_path, exact=True)
    eager, _ = trained(copy.deepcopy(model), tmp_path)
    pf.patch(model)
    ours, _ = trained(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_close(ours, eager, exact, torch.float32)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "not re-entrant"])
def test_a_trainer_with_gradient_checkpointing_gives_the_same_bits(method, reentrant, tmp_path):
    model = model_of(method)
    plain = copy.deepcopy(model)
    pf.patch(plain)
    pf.patch(model)
    expected, _ = trained(plain, tmp_path)
    options = {checkpointing(): True, f"{checkpointing()}_kwargs": {"use_reentrant": reentrant}}
    ours, _ = trained(model, tmp_path, **options)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    def model():
        return model_of("lora")

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, first = model(), model()
    pf.patch(whole)
    pf.patch(first)
    expected, _ = trained(whole, tmp_path / "whole")
    trained(first, tmp_path / "part", **{**saving, "max_steps": 2})
    resumed = model()
    pf.patch(resumed)
    trainer = recorder(Trainer)(resumed, arguments(tmp_path / "part", **saving), train_dataset=rows())
    trainer.train(resume_from_checkpoint=True)
    after = {name: p for name, p in resumed.named_parameters() if p.requires_grad}
    assert all(torch.equal(expected[name], value) for name, value in after.items())
    assert torch.equal(torch.stack(trainer.losses), expected["losses"][2:])


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_a_padded_batch_after_training_is_still_right(name, tmp_path):
    """Nothing of one call is left over for the next: training, evaluation and generation take turns."""
    model = make(name)
    pf.patch(model)
    batch = batch_of(rows(4))
    prompt = {key: value[:, :7] for key, value in batch.items() if key != "labels"}
    before = run(model, batch), model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        model.eval()(**batch)
    model.train()(input_ids=batch["input_ids"])
    after = run(model, batch), model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
    assert torch.equal(before[1], after[1])
