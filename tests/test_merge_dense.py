"""Adapters on a loaded 4-bit model: they train, and merge into dense weights that compute the same."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hf_models import enable_checkpointing
from peft_models import METHODS, assert_close, base_model, batch, exact_twin, lora_layers, randomise, run
from torch import nn

import pyfinetune as pf
from pyfinetune.errors import InvalidInput

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from pyfinetune.hf.merge import merge_dense  # noqa: E402
from pyfinetune.hf.quantizer import to_dense  # noqa: E402


@pytest.fixture(scope="module", name="folders")
def folders_fixture(tmp_path_factory) -> dict[torch.dtype, str]:
    """A Qwen2, whose q, k and v have biases, by dtype."""
    folders = {}
    for dtype in (torch.float32, torch.bfloat16):
        folders[dtype] = str(tmp_path_factory.mktemp(str(dtype)))
        base_model("qwen2", dtype).save_pretrained(folders[dtype])
    return folders


def adapted(folder: str, target_modules="all-linear", **options):
    """The 4-bit model with random adapters in its own dtype."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, task_type="CAUSAL_LM", **options)
    base = pf.load_4bit(folder)
    return randomise(peft.get_peft_model(base, pf.lora_config(config), autocast_adapter_dtype=False))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits


# --- merging


@pytest.mark.parametrize("options", [*METHODS.values(), {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_computes_what_the_adapters_did(folders, options, dtype, tmp_path):
    model = adapted(folders[dtype], **options)
    twin, before = exact_twin(model), logits(model)
    eager = copy.deepcopy(twin).to(dtype)
    merged = merge_dense(model)
    assert type(merged).__name__ == "Qwen2ForCausalLM"
    assert not any(isinstance(module, pf.Linear4bit) or hasattr(module, "lora_A") for module in merged.modules())
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    after, exact = logits(merged), logits(twin)
    assert not torch.equal(before, after)
    assert_close({"logits": after}, {"logits": logits(eager)}, {"logits": exact}, dtype)
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), after)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_weight_is_rounded_once(folders, method):
    model = adapted(folders[torch.bfloat16], **METHODS[method])
    want = {}
    for name, layer in lora_layers(model.get_base_model()).items():
        weight = layer.base_layer.dequantize(torch.float32).double()
        delta = (
            layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        scale = 1.0
        if method == "dora":
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            scale = (magnitude / (weight + delta).norm(dim=1))[:, None]
        want[name] = (scale * (weight + delta)).detach()
    merged = merge_dense(model)
    for name, exact in want.items():
        weight = merged.get_submodule(name).weight
        # The sum is made in float32, which moves a rounding only at a tie.
        assert (weight == exact.to(torch.bfloat16)).double().mean() > 0.99, name
        assert ((weight.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() * 0.501 + 1e-7).all()


def test_only_active_adapters_and_layers_without_any(folders):
    model = adapted(folders[torch.float32], target_modules=["q_proj"])
    model.add_adapter("other", pf.lora_config(peft.LoraConfig(r=2, target_modules=["v_proj"])))
    randomise(model, seed=5)
    model.set_adapter("other")
    before = logits(model)
    merged = merge_dense(model)
    plain = to_dense(pf.load_4bit(folders[torch.float32]))
    ours, theirs = merged.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    changed = {key for key, value in theirs.items() if not torch.equal(ours[key], value)}
    assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}
    assert (logits(merged) - before).abs().max() < 1e-5 * before.abs().max()


def test_merging_to_another_dtype_takes_all_of_the_model(folders):
    model = adapted(folders[torch.float32])
    before = logits(model)
    merged = merge_dense(model, torch.bfloat16)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged).float() - before).abs().max() < 0.1 * before.abs().max()


def test_merging_after_quantize_is_the_same(folders):
    config = pf.lora_config(peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    base = pf.quantize(transformers.AutoModelForCausalLM.from_pretrained(folders[torch.bfloat16]))
    other = randomise(peft.get_peft_model(base, config, autocast_adapter_dtype=False))
    ours, theirs = merge_dense(adapted(folders[torch.bfloat16])).state_dict(), merge_dense(other).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_cannot_be_merged_is_named_and_left(folders):
    folder = folders[torch.float32]
    with pytest.raises(InvalidInput, match="is Linear, needs a PEFT model"):
        merge_dense(nn.Linear(4, 4))
    model = adapted(folder)
    before = logits(model)
    report = pf.patch(model)
    with pytest.raises(InvalidInput, match=r"report\.undo"):
        merge_dense(model)
    report.undo()
    with pytest.warns(UserWarning, match="rounds it again"):
        model.merge_adapter()
    with pytest.raises(InvalidInput, match="unmerge_adapter"):
        merge_dense(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    merge_dense(model)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    with pytest.raises(InvalidInput, match=r"make the adapters with pf\.lora_config"):
        merge_dense(peft.get_peft_model(pf.load_4bit(folder), config))


# --- back to dense without adapters


@pytest.mark.parametrize("door", [lambda model: model.dequantize(), to_dense])
def test_dequantize_gives_the_decoded_model(folders, door, tmp_path):
    model = pf.load_4bit(folders[torch.bfloat16])
    decoded = {name: module.dequantize() for name, module in model.named_modules() if isinstance(module, pf.Linear4bit)}
    result = door(model)
    assert len(decoded) == 14
    for name, weight in decoded.items():
        layer = result.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        assert layer.weight.requires_grad
        assert not list(layer.buffers())
    result.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(result))
    assert pf.quantize(result).model.layers[0].mlp.up_proj.block_size == 64


def test_to_dense_without_transformers_keeps_each_dtype():
    model = pf.quantize(nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64)))
    want = [layer.dequantize() for layer in model]
    to_dense(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, want, strict=True))
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32]


def test_to_dense_refuses_adapters(folders):
    with pytest.raises(InvalidInput, match="merge_dense takes them along"):
        to_dense(adapted(folders[torch.float32]))


# --- training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_under_checkpointing_are_those_without(folders, use_reentrant):
    model = adapted(folders[torch.float32]).train()
    want = run(model, batch())
    enable_checkpointing(model.get_base_model(), use_reentrant)
    model.enable_input_require_grads()
    model(**batch()).loss.backward()  # re-entrant checkpointing refuses `torch.autograd.grad`
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {*got, "logits"} == {*want}
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_the_trainer_takes_it_with_adapters_and_only_with(folders, tmp_path):
    folder = folders[torch.float32]
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(8)["input_ids"]]
    options = {"max_steps": 8, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "use_cpu": True}
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, **options
    )
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(pf.load_4bit(folder), arguments, train_dataset=rows)
    config = pf.lora_config(peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = peft.get_peft_model(pf.load_4bit(folder), config)
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
