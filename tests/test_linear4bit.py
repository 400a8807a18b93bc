"""`Linear4bit` and `quantize`: numbers, bitsandbytes' checkpoints in both directions, and what is refused."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from oracle import BACKWARD, FORWARD, assert_as_good_as
from torch import nn

import pyfinetune as pf
from pyfinetune.errors import InvalidInput

bnb = pytest.importorskip("bitsandbytes")

SETTINGS = [("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 64), ("fp4", False, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(in_features: int = 128, out_features: int = 96, bias: bool = True, dtype: torch.dtype = torch.float32):
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def theirs_from(linear: nn.Linear, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64):
    """bitsandbytes' layer, quantized by bitsandbytes."""
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype
    )
    options = {"compress_statistics": double_quant, "quant_type": quant_type, "blocksize": block_size}
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, **options).to("cpu")
    layer.bias = linear.bias
    return layer


def theirs_loaded(state: dict[str, torch.Tensor], linear: nn.Linear):
    """bitsandbytes' layer, loaded the way transformers loads a quantized checkpoint."""
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype
    )
    parts = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    layer.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], parts, device="cpu", module=layer)
    layer.bias = None if linear.bias is None else nn.Parameter(state["bias"])
    return layer


def bnb_decoded(layer) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# --- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_the_decoded_layer(dtype, rows, bias):
    layer = pf.Linear4bit.from_linear(dense(bias=bias, dtype=dtype))
    x, dout = torch.randn(rows, 128).to(dtype), torch.randn(rows, 96).to(dtype)

    def run(call, to):
        leaf = x.to(to).requires_grad_()
        y = call(leaf)
        return y, torch.autograd.grad(y, leaf, dout.to(to))[0]

    def decoded(to):
        weight = layer.dequantize(dtype).to(to)
        shift = None if layer.bias is None else layer.bias.to(to)
        return lambda leaf: nn.functional.linear(leaf, weight, shift)

    ours, eager, exact = run(layer, dtype), run(decoded(dtype), dtype), run(decoded(torch.float64), torch.float64)
    assert ours[0].dtype == dtype
    assert_as_good_as(ours[0], eager[0], exact[0], FORWARD, "y")
    assert_as_good_as(ours[1], eager[1], exact[1], BACKWARD, "dx")


def test_bias_trains_and_weight_does_not():
    layer = pf.Linear4bit.from_linear(dense())
    layer(torch.randn(3, 128)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((96,), 3.0))
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_autocast_computes_in_its_dtype():
    layer = pf.Linear4bit.from_linear(dense())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 128)).dtype == torch.bfloat16


def test_from_linear_leaves_the_layer_and_keeps_its_mode():
    linear = dense().eval()
    before = linear.weight.clone()
    layer = pf.Linear4bit.from_linear(linear, "fp4", double_quant=False, block_size=32)
    assert torch.equal(linear.weight, before)
    assert type(linear) is nn.Linear
    assert not layer.training
    assert layer.bias is linear.bias
    assert (layer.quant_type, layer.double_quant, layer.block_size) == ("fp4", False, 32)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (128, 96)


# --- bitsandbytes, both ways


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant", "block_size"), SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_bitsandbytes_byte_for_byte(quant_type, double_quant, block_size, dtype, bias):
    linear = dense(bias=bias, dtype=dtype)
    ours = pf.Linear4bit.from_linear(linear, quant_type, double_quant, block_size).state_dict()
    theirs = theirs_from(linear, quant_type, double_quant, block_size).state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "double_quant", "block_size"), SETTINGS)
@pytest.mark.parametrize("assign", [True, False])
def test_their_checkpoint_loads_in_ours(quant_type, double_quant, block_size, dtype, assign):
    linear = dense(dtype=dtype)
    theirs = theirs_from(linear, quant_type, double_quant, block_size)
    # The module was made for other settings; those of the checkpoint count.
    ours = pf.Linear4bit(128, 96, dtype=torch.float16, device="meta" if assign else None)
    ours.load_state_dict(theirs.state_dict(), assign=assign)
    assert torch.equal(ours.dequantize(), bnb_decoded(theirs))
    assert (ours.quant_type, ours.block_size, ours.dtype_of_weight) == (quant_type, block_size, dtype)
    ours.bias = nn.Parameter(linear.bias.detach().clone())  # loading has copied it into a bias of the module's dtype
    x = torch.randn(40, 128).to(dtype)
    exact = nn.functional.linear(x.double(), bnb_decoded(theirs).double(), linear.bias.double())
    assert_as_good_as(ours(x), theirs(x), exact, FORWARD)


@pytest.mark.parametrize(("quant_type", "double_quant", "block_size"), SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_our_checkpoint_loads_in_theirs(quant_type, double_quant, block_size, bias):
    linear = dense(bias=bias, dtype=torch.bfloat16)
    ours = pf.Linear4bit.from_linear(linear, quant_type, double_quant, block_size)
    theirs = theirs_loaded(ours.state_dict(), linear)
    assert torch.equal(bnb_decoded(theirs), ours.dequantize())
    x = torch.randn(40, 128, dtype=torch.bfloat16)
    shift = 0 if ours.bias is None else ours.bias.double()
    exact = x.double() @ ours.dequantize().double().T + shift
    assert_as_good_as(ours(x), theirs(x), exact, FORWARD)


def test_bytes_stored_under_another_dtype_load():
    """bitsandbytes' quant_storage: the code bytes viewed as bfloat16, as FSDP wants them."""
    linear = dense()
    state = theirs_from(linear).state_dict()
    state["weight"] = state["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    ours = pf.Linear4bit(128, 96)
    ours.load_state_dict(state)
    assert torch.equal(ours.dequantize(), pf.Linear4bit.from_linear(linear).dequantize())


def test_round_trip_inside_a_model():
    model = pf.quantize(nn.Sequential(dense(), nn.ReLU(), dense(96, 64, bias=False)))
    twin = nn.Sequential(pf.Linear4bit(128, 96), nn.ReLU(), pf.Linear4bit(96, 64, bias=False))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 128)
    assert torch.equal(model(x), twin(x))
    loaded = twin[0].weight
    model[0].weight.data.zero_()
    assert loaded.any()  # copied, not shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r'Missing key.*"0\.weight"'),
        (lambda s: s.pop("0.weight.absmax"), r'Missing key.*"0\.weight\.absmax"'),
        (lambda s: s.pop("0.weight.nested_quant_map"), r'Missing key.*"0\.weight\.nested_quant_map"'),
        (
            lambda s: s.pop("0.weight.quant_state.bitsandbytes__nf4"),
            r'Missing key.*"0\.weight\.quant_state\.bitsandbytes__nf4"',
        ),
        (lambda s: s.pop("0.bias"), r'Missing key.*"0\.bias"'),
        (lambda s: s.update({"0.weight.zero": torch.zeros(1)}), r'Unexpected key.*"0\.weight\.zero"'),
        (lambda s: s.update({"0.bias": torch.zeros(7)}), r"0\.bias is \[7\], the module needs \[96\]"),
        (lambda s: s.update({"0.weight": s["0.weight"][:10]}), r"0\.weight: codes has 10 bytes, needs 6144"),
        (lambda s: s.update({"0.weight.absmax": s["0.weight.absmax"][:3]}), r"0\.weight: absmax has 3 elements"),
        (
            lambda s: s.update({"0.weight.quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}),
            r"0\.weight\.quant_state\.bitsandbytes__nf4 is no quantization state",
        ),
    ],
)
def test_a_broken_checkpoint_is_named(change, message):
    model = pf.quantize(nn.Sequential(dense()))
    state = model.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(pf.Linear4bit(128, 96)).load_state_dict(state)


def test_a_checkpoint_of_another_shape_is_named():
    state = pf.quantize(nn.Sequential(dense(64, 192))).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight is \[192, 64\], the module needs \[96, 128\]"):
        nn.Sequential(pf.Linear4bit(128, 96)).load_state_dict(state)


def test_a_float_checkpoint_is_refused_with_the_mend():
    with pytest.raises(RuntimeError, match=r"weight is a float32 weight.*pf\.quantize"):
        pf.Linear4bit(128, 96).load_state_dict(dense().state_dict())


def test_loading_onto_meta_needs_assign():
    with pytest.raises(RuntimeError, match="assign=True"):
        pf.Linear4bit(128, 96, device="meta").load_state_dict(pf.Linear4bit.from_linear(dense()).state_dict())


def test_without_strict_missing_and_unknown_keys_pass():
    layer = pf.Linear4bit.from_linear(dense())
    before = layer.dequantize()
    result = layer.load_state_dict({"bias": torch.ones(96), "other": torch.ones(1)}, strict=False)
    assert "weight.absmax" in result.missing_keys
    assert torch.equal(layer.bias, torch.ones(96))
    assert torch.equal(layer.dequantize(), before)


# --- as a module


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_casts_reach_the_bias_only(cast, double_quant):
    layer = pf.Linear4bit.from_linear(dense(), double_quant=double_quant)
    before = layer.dequantize()
    cast(layer)
    assert layer.bias.dtype in (torch.float16, torch.bfloat16, torch.float64)
    assert layer.weight.dtype == torch.uint8
    assert all(b.dtype in (torch.float32, torch.uint8) for b in layer.buffers())
    assert torch.equal(layer.dequantize(), before)


def test_copies_and_moves():
    layer = pf.Linear4bit.from_linear(dense())
    x = torch.randn(3, 128)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.weight.data.zero_()
    assert not torch.equal(twin(x), layer(x))
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.is_meta
    assert list(meta.state_dict()) == list(layer.state_dict())
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_every_buffer_is_saved_and_no_table_is_shared():
    model = pf.quantize(nn.Sequential(dense(), dense(96, 96)))
    for module in model:
        assert not module._non_persistent_buffers_set
    pointers = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(set(pointers)) == len(pointers)


def test_a_new_layer_is_zero_until_loaded():
    layer = pf.Linear4bit(128, 96, double_quant=True)
    assert not layer(torch.randn(2, 128)).any()
    with pytest.raises(InvalidInput, match="no initialisation"):
        layer.reset_parameters()


def test_compiles_as_one_graph():
    layer = pf.Linear4bit.from_linear(dense())
    x = torch.randn(3, 128)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "quant_type is 'int4'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 48}, "block_size is 48"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_bad_settings_of_a_layer(options, message):
    with pytest.raises(InvalidInput, match=message):
        pf.Linear4bit(128, 96, **options)


def test_from_linear_refuses_what_is_none():
    for layer in (nn.Embedding(4, 4), pf.Linear4bit(64, 64)):
        with pytest.raises(InvalidInput, match="needs an nn"):
            pf.Linear4bit.from_linear(layer)
    with pytest.raises(InvalidInput, match="float64"):
        pf.Linear4bit.from_linear(dense(dtype=torch.float64))


# --- quantize


class Net(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        self.lm_head = nn.Linear(64, 32, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.lm_head(h + self.mlp(h))


def four_bit(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, pf.Linear4bit)]


def test_quantize_in_place_takes_linears_and_nothing_else():
    model = Net()
    mlp, parameters = model.mlp[0], dict(model.named_parameters())
    assert pf.quantize(model) is model
    assert four_bit(model) == ["mlp.0", "mlp.2"]  # attention reads out_proj.weight itself
    assert model.mlp[0] is mlp
    kept = {name: p for name, p in model.named_parameters() if not name.startswith("mlp") or name.endswith("bias")}
    assert all(parameters[name] is p and p.requires_grad for name, p in kept.items())
    model(torch.tensor([[1, 2, 3]])).sum().backward()


@pytest.mark.parametrize("skip", [(), "mlp.2", ("mlp",), ("lm_head", "2")])
def test_skip(skip):
    model = pf.quantize(Net(), skip=skip)
    want = {
        (): ["mlp.0", "mlp.2", "lm_head"],
        "mlp.2": ["mlp.0", "lm_head"],
        ("mlp",): ["lm_head"],
        ("lm_head", "2"): ["mlp.0"],
    }[skip]
    assert four_bit(model) == want


def test_a_tied_head_is_never_quantized():
    model = pf.quantize(Net(tied=True), skip=())
    assert four_bit(model) == ["mlp.0", "mlp.2"]
    assert model.lm_head.weight is model.embed.weight


def test_hooks_and_subclasses_survive():
    class Marked(nn.Linear):
        pass

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Marked(64, 64), Doubling(64, 64))
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    pf.quantize(model)
    assert four_bit(model) == ["0"]
    model(torch.randn(2, 64))
    assert seen == [1]
    with pytest.raises(InvalidInput, match="4-bit already"):
        pf.quantize(model)


def test_a_linear_by_itself_and_one_shared_by_two_parents():
    assert isinstance(pf.quantize(nn.Linear(64, 64)), pf.Linear4bit)
    shared = nn.Linear(64, 64)
    model = pf.quantize(nn.ModuleDict({"a": shared, "b": shared}))
    assert model["a"] is model["b"]
    assert isinstance(model["b"], pf.Linear4bit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "quant_type is 'int4', needs one of"),
        ({"block_size": 0}, "block_size is 0, needs one of"),
        ({"block_size": 48}, "block_size is 48, needs one of"),
        ({"skip": ("lm_hed",)}, "skip names 'lm_hed'"),
        ({"skip": ("mlp", "lm_head")}, r"nothing to quantize \(left out: mlp.0, mlp.2, lm_head\)"),
    ],
)
def test_quantize_refuses_bad_settings(options, message):
    model = Net()
    with pytest.raises(InvalidInput, match=message):
        pf.quantize(model, **options)
    assert four_bit(model) == []


def test_quantize_refuses_bad_models():
    with pytest.raises(InvalidInput, match="needs an nn"):
        pf.quantize({"weight": 1})
    with pytest.raises(InvalidInput, match="nothing to quantize"):
        pf.quantize(nn.Sequential(nn.ReLU()))
    with torch.device("meta"):
        meta = Net()
    with pytest.raises(InvalidInput, match=r"mlp\.0\.weight has no values yet"):
        pf.quantize(meta)
    broken = Net()
    broken.mlp[2].weight.data[3, 4] = float("nan")
    with pytest.raises(InvalidInput, match=r"mlp\.2\.weight has NaN"):
        pf.quantize(broken)
    assert four_bit(broken) == []


def test_bitsandbytes_layers_are_left():
    model = nn.Sequential(dense(64, 64), theirs_from(dense(64, 64)))
    pf.quantize(model)
    assert four_bit(model) == ["0"]


# --- Hugging Face models


def tiny_llama(dtype: torch.dtype = torch.bfloat16, **change):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=0, bos_token_id=None, **sizes, **change)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def test_saved_model_opens_in_transformers_and_bitsandbytes(tmp_path):
    from transformers import AutoModelForCausalLM

    model = pf.quantize(tiny_llama()).train()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes"
    assert saved["llm_int8_skip_modules"] == ["lm_head"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert isinstance(loaded.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert type(loaded.lm_head) is nn.Linear
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ids = torch.randint(0, 64, (2, 20))
    scale = model(ids).logits.abs().max()
    assert (model(ids).logits - loaded(ids).logits).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * scale


def test_a_model_with_adapters_is_refused_with_the_mend():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InvalidInput, match="before get_peft_model"):
        pf.quantize(model)
    assert four_bit(model) == []


def test_tied_embeddings_of_a_real_model_stay_tied(tmp_path):
    from transformers import AutoModelForCausalLM

    model = pf.quantize(tiny_llama(tie_word_embeddings=True), skip=())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(four_bit(model)) == 14
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded.lm_head) is nn.Linear


def test_torch_can_save_and_load_the_state(tmp_path):
    from safetensors.torch import load_file, save_file

    model = pf.quantize(tiny_llama())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin = pf.quantize(tiny_llama())
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ids = torch.randint(0, 64, (1, 8))
    assert torch.equal(twin(ids).logits, model(ids).logits)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0
