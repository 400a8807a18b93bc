"""`patch`: logits, gradients and dropout of the patched model are those of the unpatched one."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import enable_checkpointing
from peft_models import METHODS, adapted, assert_close, batch, exact_twin, lora_layers, patch_lora, run

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

BASES = ["dense", "4bit", "bnb"]


# --- the numbers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_logits_and_every_gradient_are_as_good_as_pefts(arch, dtype, base, method):
    model = adapted(arch, dtype, base, autocast_adapter_dtype=False, **METHODS[method])
    exact, eager = run(exact_twin(model), batch()), run(model, batch())
    report = patch_lora(model)
    assert report.swapped == 14, report
    assert report.left == 0
    assert {row.backend for row in report.rows} == {"cpu"}
    assert_close(run(model, batch()), eager, exact, dtype)


@pytest.mark.parametrize("base", BASES)
def test_under_autocast_float32_adapters_are_as_good_as_pefts(base):
    model = adapted("qwen2", torch.float32 if base == "dense" else torch.bfloat16, base)
    exact = run(exact_twin(model), batch())

    def autocast_run():
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, batch())

    eager = autocast_run()
    assert patch_lora(model).swapped == 14
    ours = autocast_run()
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in eager.items()}
    assert_close(ours, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("base", BASES)
def test_float32_adapters_on_a_bfloat16_base_compute_as_under_autocast(base):
    model = adapted("llama", torch.bfloat16, base)
    low = copy.deepcopy(model)
    for name, parameter in [*model.named_parameters(), *low.named_parameters()]:
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    for name, parameter in low.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    exact, eager = run(exact_twin(model), batch()), run(low, batch())
    assert patch_lora(model).swapped == 14
    ours = run(model, batch())
    assert {value.dtype for name, value in ours.items() if name != "logits"} == {torch.float32}
    assert_close(ours, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_trainable_dense_base_gets_its_gradient(method):
    model = adapted("qwen2", torch.float32, **METHODS[method])
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_()
    exact, eager = run(exact_twin(model), batch()), run(model, batch())
    assert patch_lora(model).swapped == 14
    ours = run(model, batch())
    assert any("base_layer.weight" in name for name in ours)
    assert any("base_layer.bias" in name for name in ours)
    assert_close(ours, eager, exact, torch.float32)


def test_a_frozen_base_stays_frozen():
    model = adapted("qwen2")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    patch_lora(model)
    model(**batch()).loss.backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# --- dropout


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_dropout_follows_the_seed_and_the_mode(base, method):
    model = adapted("llama", torch.float32, base, lora_dropout=0.5, **METHODS[method])
    assert patch_lora(model).swapped == 14
    layer = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    x = torch.randn(6, 64)

    def at(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(at(0), at(0))
    assert not torch.equal(at(0), at(1))
    model.eval()
    state = torch.get_rng_state()
    plain = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(plain, at(5))
    model.train()
    mean = torch.stack([at(seed) for seed in range(400)]).mean(0)
    spread = torch.stack([at(seed) for seed in range(400)]).std(0) / 20
    assert ((mean - plain).abs() <= 5 * spread + 1e-5).double().mean() > 0.99


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_gradient_checkpointing_replays_the_dropout(base, reentrant):
    def grads(checkpointing: bool):
        model = adapted("llama", torch.float32, base, lora_dropout=0.2)
        patch_lora(model)
        if checkpointing:
            enable_checkpointing(model, reentrant)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**batch()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = grads(False), grads(True)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]), name
