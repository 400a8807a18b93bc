"""`patch`: what it changes, what it leaves and why, its report, and the exact undo."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from peft_models import adapted, base_model, batch, lora_layers, patch_lora, randomise, run
from torch import nn

import pyfinetune as pf
from pyfinetune.errors import BackendUnavailable, InvalidInput
from pyfinetune.hf import patch as patch_module

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from pyfinetune.hf import changes, lora_linear  # noqa: E402
from pyfinetune.hf.lora_linear import FastLora  # noqa: E402

BASES = ["dense", "4bit", "bnb"]


def fast_layers(model: nn.Module) -> int:
    return sum(isinstance(module, FastLora) for module in model.modules())


def reasons(report) -> set[str]:
    return {row.reason for row in report.rows if row.status == "left"}


# --- nothing else changes


def test_patching_leaves_no_trace():
    model = adapted("llama", lora_dropout=0.1)
    model(**batch()).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.base_model.model.model.layers[0].eval()

    def trace():
        modes = [module.training for module in model.modules()]
        tensors = {name: (value.data_ptr(), value._version) for name, value in model.named_parameters()}
        return modes, tensors, list(model.state_dict()), torch.get_rng_state().tolist()

    before, ids = trace(), [id(module) for module in model.modules()]
    patch_lora(model)
    assert trace() == before
    assert [id(module) for module in model.modules()] == ids
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("base", BASES)
def test_undo_is_exact(base):
    model = adapted("qwen2", torch.bfloat16, base, use_dora=True)
    before, classes = run(model, batch()), [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    report = patch_lora(model)
    assert fast_layers(model) == 14
    run(model, batch())
    report.undo()
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    after = run(model, batch())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    report.undo()
    assert patch_lora(model).swapped == 14


def test_saved_adapter_has_the_same_keys_and_bytes(tmp_path):
    from safetensors.torch import load_file

    model = adapted("llama", base="4bit", use_dora=True)
    model.save_pretrained(tmp_path / "before")
    patch_lora(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    configs = [(tmp_path / part / "adapter_config.json").read_text() for part in ("before", "after")]
    assert configs[0] == configs[1]


def test_deepcopy_of_a_patched_model():
    model = adapted("llama", base="4bit")
    patch_lora(model)
    twin = copy.deepcopy(model)
    ours, theirs = run(model, batch()), run(twin, batch())
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    randomise(twin, seed=9)
    assert all(torch.equal(value, ours[name]) for name, value in run(model, batch()).items())


def test_a_patched_layer_compiles_as_one_graph():
    model = adapted("llama", torch.float32, "4bit", use_dora=True)
    patch_lora(model)
    layer, x = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"], torch.randn(3, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# --- at run time, what the op does not cover runs on PEFT's forward


@pytest.mark.filterwarnings("ignore:Merging into a 4-bit weight:UserWarning")
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_fallbacks_are_bit_for_bit_pefts(base):
    model = adapted("llama", torch.float32, base).eval()
    model.add_adapter("second", pf.lora_config(peft.LoraConfig(r=2, target_modules="all-linear")))
    randomise(model)
    inputs = batch(4, 8)

    def outputs(model):
        found = {}
        with model.disable_adapter():
            found["disabled"] = model(**inputs).logits
        names = ["default", "__base__", "second", "default"]
        found["mixed batch"] = model(**inputs, adapter_names=names).logits
        model.base_model.set_adapter(["default", "second"])
        found["two adapters"] = model(**inputs).logits
        model.base_model.set_adapter("default")
        model.merge_adapter()
        found["merged"] = model(**inputs).logits
        model.unmerge_adapter()
        return found

    before = outputs(copy.deepcopy(model))  # PEFT's unmerging leaves rounding errors in a dense base
    assert patch_lora(model).swapped == 14
    after = outputs(model)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    model.base_model.set_adapter("second")
    model.set_adapter("second")
    assert not torch.equal(model(**inputs).logits, before["two adapters"])


def test_a_hook_added_later_is_heard():
    model = adapted("llama")
    patch_lora(model)
    layer = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    x, seen = torch.randn(3, 64), []
    layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    layer(x)
    assert seen == [1]


def test_wrong_calls_raise_as_in_peft():
    model = adapted("llama")
    patch_lora(model)
    layer = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 64, dtype=torch.bfloat16))
    with pytest.raises(TypeError):
        layer(torch.randn(3, 64), 1, 2)


# --- what is left alone, and why


def swapped_op(change):
    """The op with a fault."""

    def op(x, weight, lora_a, lora_b, scaling, bias=None, **options):
        return change(x, weight, lora_a, lora_b, scaling, bias, options)

    return op


def halved_gradient(y):
    return y * 0.5 + y.detach() * 0.5


FAULTS = {
    "wrong scaling": lambda x, w, a, b, s, bias, o: pf.ops.lora_linear(x, w, a, b, s * 1.05, bias, **o),
    "no update": lambda x, w, a, b, s, bias, o: pf.ops.lora_linear(x, w, None, None, 1.0, bias),
    "no bias": lambda x, w, a, b, s, bias, o: pf.ops.lora_linear(x, w, a, b, s, None, **o),
    "wrong gradient": lambda x, w, a, b, s, bias, o: halved_gradient(pf.ops.lora_linear(x, w, a, b, s, bias, **o)),
    "frozen A": lambda x, w, a, b, s, bias, o: pf.ops.lora_linear(x, w, a.detach(), b, s, bias, **o),
    "NaN": lambda x, w, a, b, s, bias, o: pf.ops.lora_linear(x, w, a, b, s, bias, **o) * float("nan"),
    "crash": lambda x, w, a, b, s, bias, o: pf.ops.lora_linear(x, w, a.T, b, s, bias, **o),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_a_fault_even_at_fresh_adapters(fault, dtype, monkeypatch):
    model = base_model("qwen2", dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))  # B is zero
    before = run(model, batch())
    with monkeypatch.context() as context:
        context.setattr(lora_linear, "lora_linear", swapped_op(FAULTS[fault]))
        report = patch_lora(model)
    assert report.swapped == 0
    assert fast_layers(model) == 0
    assert all(reason.startswith("the probe failed: ") for reason in reasons(report))
    assert all(torch.equal(value, before[name]) for name, value in run(model, batch()).items())
    assert json.loads(report.to_json())["left"] == 2
    assert patch_lora(model).swapped == 2


def hook_a_child(layer):
    layer.base_layer.register_forward_hook(lambda *args: None)


def hook_a_backward(layer):
    layer.lora_B["default"].register_full_backward_hook(lambda *args: None)


def accelerate_hook(layer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer, ModelHook())


def own_forward(layer):
    layer.forward = layer.forward


def to_meta(layer):
    layer.base_layer.to("meta")


def subclass_of_the_base(layer):
    layer.base_layer.__class__ = type("MyLinear", (nn.Linear,), {})


def odd_adapter(layer):
    layer.lora_A["default"] = type("MyLinear", (nn.Linear,), {})(64, 4, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_a_child, "its base_layer has hooks"),
        (hook_a_backward, "its lora_B.default has hooks"),
        (accelerate_hook, "_hf_hook"),
        (own_forward, "it has a forward of its own"),
        (to_meta, "base_layer.weight is on the meta device"),
        (subclass_of_the_base, "no kernel for lora.layer.Linear over"),
        (odd_adapter, "adapter weights are in a MyLinear"),
    ],
)
def test_left_alone_with_a_reason(change, message):
    model = adapted("llama")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    layer = lora_layers(model)[name]
    kind = type(layer)
    change(layer)
    report = patch_lora(model)
    assert report.swapped == 13
    (row,) = [row for row in report.rows if row.status == "left"]
    assert (row.name, row.backend, row.probe_error) == (name, None, None)
    assert message in row.reason
    assert message in str(report).replace("\n", " ")
    assert type(layer) is kind


def test_adapters_of_other_kinds_are_left():
    model = adapted("qwen2", lora_bias=True, target_modules=["q_proj"])
    report = patch_lora(model)
    assert report.swapped == 0
    assert reasons(report) == {"the adapter has a bias (lora_bias)"}
    model = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    report = patch_lora(model)
    assert report.swapped == 2
    assert reasons(report) == {"no kernel for lora.layer.Embedding over torch.nn.modules.sparse.Embedding"}
    model = peft.get_peft_model(base_model(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert reasons(patch_lora(model)) == {"no kernel for ia3.layer.Linear over torch.nn.modules.linear.Linear"}


def test_bitsandbytes_settings_that_round_differently_are_left():
    model = adapted("llama", torch.bfloat16, "bnb")
    for layer in lora_layers(model).values():
        layer.base_layer.compute_dtype = torch.float32
    report = patch_lora(model)
    assert report.swapped == 0
    assert "set bnb_4bit_compute_dtype=torch.bfloat16" in reasons(report).pop()


def test_a_weight_that_bitsandbytes_decodes_wrongly_is_left():
    """Named regression: bitsandbytes' AVX-512 decode of rows that are no multiple of the block is 89 % wrong."""
    import bitsandbytes as bnb

    from pyfinetune.hf.lora_bnb import packed_of

    model = adapted("llama", torch.bfloat16, "bnb", intermediate_size=96)
    report = patch_lora(model)
    base = lora_layers(model)["base_model.model.model.layers.0.mlp.down_proj"].base_layer
    theirs = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    right = torch.equal(theirs, pf.ops.dequantize_4bit(packed_of(base)))
    down = [row for row in report.rows if row.name.endswith("down_proj")]
    assert {row.status for row in down} == ({"swapped"} if right else {"left"})
    assert right or "decodes this weight wrongly (rows of 96, blocks of 64)" in down[0].reason
    assert report.swapped >= 12


# --- the report


def test_report_rows_and_json_and_text():
    model = adapted("llama", torch.bfloat16, "4bit")
    report = patch_lora(model)
    assert [row.name for row in report.rows] == list(lora_layers(model))
    assert {row.kind for row in report.rows} == {"LoRA over pf.Linear4bit"}
    assert all(row.reason is None and 0 < row.probe_error < 0.05 for row in report.rows)
    parsed = json.loads(report.to_json())
    assert (parsed["swapped"], parsed["left"]) == (14, 0)
    assert parsed["rows"][0].keys() == {"kind", "name", "status", "backend", "reason", "probe_error"}
    text = str(report)
    assert text.startswith("14 of 14 modules swapped")
    assert "q_proj" in text
    assert len(text.splitlines()) < 12
    again = patch_lora(model)
    assert again.swapped == 0
    assert reasons(again) == {"already patched"}
    assert {row.kind for row in again.rows} == {"LoRA over pf.Linear4bit"}
    again.undo()
    assert fast_layers(model) == 14


def test_one_probe_for_layers_that_agree(monkeypatch):
    probed = []
    original = lora_linear._prove
    monkeypatch.setattr(lora_linear, "_prove", lambda *args: probed.append(args[0]) or original(*args))
    assert patch_lora(adapted("llama")).swapped == 14
    assert len(probed) == 4  # q and o; k and v; gate and up; down


def test_nothing_to_patch():
    report = patch_lora(nn.Sequential(nn.Linear(4, 4)))
    assert report.rows == ()
    assert "nothing to patch" in str(report)
    report.undo()
    with pytest.raises(InvalidInput, match="model is dict"):
        patch_lora({})


def test_a_forced_backend_that_cannot_run_raises_and_swaps_nothing():
    model = adapted("llama")
    with pytest.raises(BackendUnavailable), pf.use_backend("cuda"):
        patch_lora(model)
    assert fast_layers(model) == 0
    with pf.use_backend("reference"):
        assert {row.backend for row in patch_lora(model).rows} == {"reference"}


def test_an_undo_that_would_not_be_exact_raises():
    model = adapted("llama")
    report = patch_lora(model)
    layer = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    fast = type(layer)
    layer.__class__ = type("Wrapped", (fast,), {})
    with pytest.raises(InvalidInput, match="Wrapped"):
        report.undo()
    assert fast_layers(model) == 14
    layer.__class__ = fast
    report.undo()
    assert fast_layers(model) == 0


def test_a_failed_swap_is_taken_back(monkeypatch):
    model = adapted("llama")
    found = patch_module.candidates_in(model, ["lora_linear"])
    slotted = type("Slotted", (FastLora, type(found[-1].module)), {"__slots__": ("extra",)})
    change = changes.ClassSwap(found[-1].module, slotted)
    found[-1] = dataclasses.replace(found[-1], change=change, prove=found[0].prove, signature=found[-2].signature)
    monkeypatch.setattr(patch_module, "candidates_in", lambda model, kinds: found)
    with pytest.raises(TypeError):
        patch_lora(model)
    assert fast_layers(model) == 0


def test_a_report_keeps_no_model_alive():
    import gc
    import weakref

    model = adapted("llama")
    report, watch = patch_lora(model), weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None
    report.undo()
    assert report.swapped == 14


@pytest.mark.filterwarnings("ignore:Merging into a 4-bit weight:UserWarning")
def test_an_unregistered_adapter_over_our_layers_is_swapped_and_then_merges():
    model = pf.quantize(base_model())
    model = randomise(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))).eval()
    before = model(**batch()).logits
    report = patch_lora(model)
    assert report.swapped == 14
    assert torch.allclose(model(**batch()).logits, before, atol=1e-4)
    model.merge_adapter()
    model.unmerge_adapter()
    report.undo()
    assert torch.equal(model(**batch()).logits, before)
