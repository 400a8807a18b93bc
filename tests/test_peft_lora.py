"""PEFT's LoRA over `Linear4bit`: merge, unmerge, DoRA, several adapters, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from peft_models import METHODS, adapted, assert_close, base_model, batch, exact_twin, lora_layers, randomise, run
from torch import nn

import pyfinetune as pf
from pyfinetune.errors import InvalidInput

peft = pytest.importorskip("peft")

from pyfinetune.hf.peft_lora import LoraLinear4bit  # noqa: E402

MERGE_WARNING = "rounds it again"


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, bias: bool = True, double_quant: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(128, 96, bias=bias, dtype=dtype)
        pf.quantize(self, double_quant=double_quant)

    def forward(self, x):
        return self.linear(x)


def one(bias: bool = True, double_quant: bool = False, dtype: torch.dtype = torch.float32, **options):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["linear"], **options)
    return randomise(peft.get_peft_model(One(bias, double_quant, dtype), pf.lora_config(config)))


def layer_of(model) -> LoraLinear4bit:
    return model.base_model.model.linear


def dense_effect(layer: LoraLinear4bit, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 weight and bias that the layer with these adapters stands for."""
    base = layer.base_layer.dequantize(torch.float32).double()
    weight, bias = base, layer.base_layer.bias.detach().double()
    for name in names:
        lora_b, scaling = layer.lora_B[name], layer.scaling[name]
        delta = scaling * lora_b.weight.double() @ layer.lora_A[name].weight.double()
        weight = weight + delta
        if layer.use_dora[name]:
            magnitude = layer.lora_magnitude_vector[name].weight.double()
            weight = weight * (magnitude / (base + delta).norm(dim=1))[:, None]
        if lora_b.bias is not None:
            bias = bias + scaling * lora_b.bias.double()
    return weight.detach(), bias.detach()


# --- the configuration


def test_lora_config_leaves_its_input_and_can_be_given_twice():
    config = peft.LoraConfig(r=4, target_modules=["linear"])
    ours = pf.lora_config(config)
    assert ours is not config
    assert config._custom_modules is None
    assert ours.to_dict() == config.to_dict()
    again = pf.lora_config(ours)
    assert isinstance(layer_of(peft.get_peft_model(One(), again)), LoraLinear4bit)


@pytest.mark.parametrize("value", [{"r": 4}, None, peft.IA3Config() if hasattr(peft, "IA3Config") else 3])
def test_lora_config_refuses_other_things(value):
    with pytest.raises(InvalidInput, match=r"needs a peft\.LoraConfig"):
        pf.lora_config(value)


def test_all_linear_finds_the_layers_and_adapters_have_a_float_dtype():
    config = pf.lora_config(peft.LoraConfig(r=4, target_modules="all-linear"))
    # An older PEFT takes the stored weight's dtype or, where that is an integer's, leaves the adapter in float32.
    asks_the_layer = hasattr(peft.tuners.tuners_utils.BaseTunerLayer, "_get_base_layer_device_and_dtype")
    for autocast, want in ((True, torch.float32), (False, torch.bfloat16 if asks_the_layer else torch.float32)):
        model = pf.quantize(base_model(dtype=torch.bfloat16))
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
        layers = lora_layers(model)
        assert len(layers) == 14
        assert all(type(layer) is LoraLinear4bit for layer in layers.values())
        assert all(layer.lora_A["default"].weight.dtype == want for layer in layers.values())
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trainable
        assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initialisations_that_rewrite_the_base_are_refused(init):
    with pytest.raises(InvalidInput, match="rewrites the base weight"):
        one(init_lora_weights=init)


# --- numbers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_those_of_the_decoded_model(method, dtype):
    # Adapters in the model's dtype: PEFT then computes all of it in that dtype, in both models.
    model = adapted("qwen2", dtype, "4bit", autocast_adapter_dtype=False, **METHODS[method])
    exact = run(exact_twin(model), batch())
    eager = run(exact_twin(model).to(dtype), batch())
    assert_close(run(model, batch()), eager, exact, dtype)


# --- merging


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_merge_quantizes_the_sum_once_and_unmerge_is_exact(options, double_quant, safe):
    model = one(double_quant=double_quant, **options)
    layer, x = layer_of(model), torch.randn(5, 128)
    weight, bias = dense_effect(layer, "default")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    y = model(x)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter(safe_merge=safe)
    assert layer.merged
    again = pf.ops.quantize_4bit(weight.float(), 64, "nf4", double_quant)
    # float32 sums differ in the last bit from float64 ones, which moves a code only at a tie.
    agree = (layer.base_layer.packed.codes == again.codes).double().mean()
    assert agree > 0.99
    if not double_quant:
        gap = 0.152 * again.absmax.repeat_interleave(64)[: weight.numel()].reshape(weight.shape)
        assert ((layer.base_layer.dequantize().double() - weight).abs() <= gap + 1e-6).all()
    merged = nn.functional.linear(x.double(), layer.base_layer.dequantize().double(), bias)
    assert torch.allclose(model(x).double(), merged, atol=1e-5)
    model.unmerge_adapter()
    assert not layer.merged
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(model(x), y)


def test_merged_dtype_is_the_weights_own():
    model = one(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        merged = model.merge_and_unload()
    assert type(merged.linear) is pf.Linear4bit
    assert merged.linear.dtype_of_weight == torch.bfloat16
    assert merged.linear.bias.dtype == torch.bfloat16
    assert merged(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_safe_merge_refuses_nan_and_changes_nothing():
    model = one()
    layer = layer_of(model)
    codes = layer.base_layer.weight.clone()
    layer.lora_B["default"].weight.data[3, 1] = float("nan")
    with pytest.raises(InvalidInput, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, codes)
    assert not layer.merged


def test_a_bias_with_nowhere_to_go_is_refused():
    with pytest.warns(UserWarning, match="has no bias"):
        model = one(bias=False, lora_bias=True)
    with pytest.raises(InvalidInput, match="has a bias"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_are_merged_in_one_rounding(dora):
    model = one(use_dora=dora)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["linear"], use_dora=dora)
    model.add_adapter("second", pf.lora_config(config))
    randomise(model)
    layer, x = layer_of(model), torch.randn(5, 128)
    codes = layer.base_layer.weight.clone()
    model.base_model.set_adapter(["default", "second"])
    weight, bias = dense_effect(layer, "default", "second")
    both = nn.functional.linear(x.double(), weight, bias)
    assert torch.allclose(model(x).double(), both, atol=1e-4)
    for name in ("default", "second"):
        with pytest.warns(UserWarning, match=MERGE_WARNING):
            layer.merge(adapter_names=[name])
    together = pf.ops.quantize_4bit(weight.float())
    assert (layer.base_layer.packed.codes == together.codes).double().mean() > 0.99
    assert layer.merged_adapters == ["default", "second"]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, codes)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_disable_switch_and_delete():
    model = one()
    x = torch.randn(5, 128)
    layer = layer_of(model)
    plain = layer.base_layer(x)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges on the way
        assert torch.equal(model(x), plain)
    adapted_y = model(x)
    assert not torch.equal(adapted_y, plain)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["linear"]))
    model.set_adapter("second")
    assert torch.equal(model(x), plain)  # a fresh adapter adds nothing
    model.set_adapter("default")
    assert torch.equal(model(x), adapted_y)
    model.delete_adapter("second")
    assert list(layer.lora_A) == ["default"]
    assert torch.equal(model(x), adapted_y)


# --- saving and loading


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_adapter_survives_saving(tmp_path, options):
    model = one(**options)
    x = torch.randn(5, 128)
    y = model(x)
    model.save_pretrained(tmp_path)
    config = pf.lora_config(peft.PeftConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(One(), tmp_path, config=config)
    assert type(layer_of(loaded)) is LoraLinear4bit
    assert torch.equal(loaded(x), y)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        loaded.merge_adapter()
    loaded.unmerge_adapter()
    assert torch.equal(loaded(x), y)
    plain = peft.PeftModel.from_pretrained(One(), tmp_path)  # without the registration: runs, does not merge
    assert torch.equal(plain(x), y)


def test_deepcopy_while_merged():
    model = one()
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter()
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert torch.equal(layer_of(twin).base_layer.weight, layer_of(model).base_layer.weight)


def test_three_steps_of_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted("llama", torch.float32, "4bit")
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    rows = [{key: value[0] for key, value in batch(1, 16).items()} for _ in range(6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, logging_steps=1,
        report_to=[], use_cpu=True, save_steps=3, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
