"""`Config4bit` and `load_4bit`: the same bits as `pf.quantize`, one dense weight at a time, bitsandbytes both ways."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_models import base_model, batch
from torch import nn

import pyfinetune as pf
from pyfinetune.errors import InvalidInput, UserError

transformers = pytest.importorskip("transformers")

from pyfinetune.hf import quantizer  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
SETTINGS = [("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 32), ("fp4", False, 64)]
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def saved(model: nn.Module, folder, **options) -> str:
    """The folder into which the model was saved."""
    model.save_pretrained(folder, **options)
    return str(folder)


def four_bit(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, pf.Linear4bit)]


def dense(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


def bitsandbytes_config(quant_type: str = "nf4", double_quant: bool = True, **options):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, **options
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits


@pytest.fixture(scope="module", name="llama")
def llama_fixture(tmp_path_factory) -> str:
    """A bfloat16 Llama."""
    return saved(base_model("llama", torch.bfloat16), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", name="packed")
def packed_fixture(llama, tmp_path_factory) -> str:
    """The same, in 4 bits."""
    return saved(pf.load_4bit(llama), tmp_path_factory.mktemp("packed"))


# --- a plain checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quant_type", "double_quant", "block_size"), SETTINGS)
def test_loading_gives_what_quantize_makes(llama, dtype, quant_type, double_quant, block_size):
    config = pf.Config4bit(quant_type, double_quant, block_size)
    model = AutoModel.from_pretrained(llama, quantization_config=config, dtype=dtype)
    want = pf.quantize(AutoModel.from_pretrained(llama, dtype=dtype), quant_type, double_quant, block_size)
    assert_same_state(model, want)
    assert dense(model) == dense(want) == ["lm_head"]
    assert model.config.quantization_config == want.config.quantization_config
    assert not model.training
    assert torch.equal(logits(model), logits(want))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in want.parameters()]


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("skip", [("lm_head",), (), ("lm_head", "layers.0", "v_proj")])
def test_biases_tied_heads_and_skipped_modules(tmp_path, options, skip):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_key_value_heads=2, initializer_range=0.3, **SIZES, **options
    )
    model = AutoModel.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    path = saved(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    got = pf.load_4bit(path, quantization_config=pf.Config4bit(skip=skip))
    assert_same_state(got, pf.quantize(model, skip=skip))
    assert ("lm_head" in four_bit(got)) == (skip == () and not options.get("tie_word_embeddings"))
    tied = got.lm_head.weight is got.model.embed_tokens.weight
    assert tied == options.get("tie_word_embeddings", False)
    again = pf.load_4bit(saved(got, tmp_path / "again", max_shard_size="40KB"))
    assert_same_state(again, got)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_one_dense_weight_lives_at_a_time(tmp_path, monkeypatch):
    sizes = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(hidden_size=72, intermediate_size=88, **sizes)
    path = saved(AutoModel.from_config(config), tmp_path)
    shapes, counts, quantize = {(72, 72), (88, 72), (72, 88)}, [], quantizer.quantize_4bit

    def counting(*args, **kwargs):
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
        living = [each for each in tensors if tuple(each.shape) in shapes and each.dtype == torch.float32]
        counts.append(len({each.data_ptr() for each in living if not each.is_meta}))
        return quantize(*args, **kwargs)

    gc.collect()
    monkeypatch.setattr(quantizer, "quantize_4bit", counting)
    model = pf.load_4bit(path)
    assert counts == [1] * 7
    everything = AutoModel.from_pretrained(path)
    counting(torch.zeros(64))
    assert counts[-1] == 7  # the count does see them
    assert len(four_bit(model)) == len(dense(everything)) - 1


def test_freed_memory_goes_back_to_the_system_on_the_way(llama, monkeypatch):
    calls = []
    monkeypatch.setattr(quantizer, "_return_memory", lambda: calls.append(1))
    monkeypatch.setattr(quantizer, "_TRIM_EVERY", 20_000)  # the layers have 147 kB
    pf.load_4bit(llama)
    assert 4 < len(calls) < 10


def test_conv1d_layers_are_transposed(tmp_path):
    """GPT-2's linear layers are stored [in, out]."""
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    path = saved(AutoModel.from_config(config), tmp_path)
    plain, model = AutoModel.from_pretrained(path), pf.load_4bit(path)
    assert len(four_bit(model)) == 8
    for name in four_bit(model):
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight.T
        packed = pf.ops.quantize_4bit(weight.contiguous(), double_quant=True)
        assert torch.equal(layer.dequantize(), pf.ops.dequantize_4bit(packed))
    assert (logits(model) - logits(plain)).abs().max() < 0.2 * logits(plain).abs().max()
    again = pf.load_4bit(saved(model, tmp_path / "again"))
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))


HEADS = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
ARCHITECTURES = {
    "mixtral": ("AutoModelForCausalLM", 8, {**SIZES, **HEADS, "num_local_experts": 4}),  # experts are no linear layers
    "phi3": ("AutoModelForCausalLM", 8, {**SIZES, **HEADS, "pad_token_id": 0}),
    "opt": ("AutoModelForCausalLM", 14, {**SIZES, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 32}),
    "t5": ("AutoModelForSeq2SeqLM", 28, {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(tmp_path, kind):
    name, count, options = ARCHITECTURES[kind]
    auto = getattr(transformers, name)
    config = transformers.AutoConfig.for_model(kind, **options)
    path = saved(auto.from_config(config, dtype=torch.bfloat16), tmp_path / "plain")
    model = pf.load_4bit(path, model_class=auto)
    assert len(four_bit(model)) == count
    assert_same_state(model, pf.quantize(auto.from_pretrained(path)))
    packed = saved(model, tmp_path / "packed")
    assert_same_state(pf.load_4bit(packed, model_class=auto), model)
    pytest.importorskip("bitsandbytes")
    assert_same_state(auto.from_pretrained(packed), model)


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="this transformers has no such model")
def test_weights_that_a_checkpoint_holds_fused(tmp_path):
    config = transformers.HrmTextConfig(
        hidden_size=64, intermediate_size=128, head_dim=16, num_layers_per_stack=1, **{**SIZES, "num_hidden_layers": 8}
    )
    path = saved(AutoModel.from_config(config), tmp_path)
    model = pf.load_4bit(path)
    assert_same_state(model, pf.quantize(AutoModel.from_pretrained(path)))
    again = pf.load_4bit(saved(model, tmp_path / "again"))
    assert_same_state(again, model)


def test_a_head_that_the_checkpoint_has_not_stays_dense(llama, tmp_path):
    classifier = transformers.AutoModelForSequenceClassification
    model = pf.load_4bit(llama, model_class=classifier, num_labels=3)
    assert dense(model) == ["score"]
    assert model.score.weight.shape == (3, 64)
    assert model.score.weight.isfinite().all()
    assert model.score.weight.std() > 0
    assert model.config.quantization_config["llm_int8_skip_modules"] == ["score"]
    again = pf.load_4bit(saved(model, tmp_path), model_class=classifier)
    assert_same_state(again, model)


def test_keywords_reach_transformers(llama):
    model = pf.load_4bit(
        llama,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map={"": "cpu"},
        use_cache=False,
        revision="main",
    )
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert not model.config.use_cache
    config = transformers.AutoConfig.from_pretrained(llama)
    config.rms_norm_eps = 0.5
    model = pf.load_4bit(llama, config=config)
    assert model.model.norm.variance_epsilon == 0.5
    assert model.dtype == torch.bfloat16
    assert getattr(config, "quantization_config", None) is None
    model, info = pf.load_4bit(llama, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_planned_memory_counts_the_scales(llama):
    sizes = {}
    for double_quant in (True, False):
        config = pf.Config4bit(double_quant=double_quant)
        model = AutoModel.from_pretrained(llama, quantization_config=config)
        twin = AutoModel.from_pretrained(llama)
        planner = type(model.hf_quantizer)(config, pre_quantized=False)
        planner._process_model_before_weight_loading(twin)
        for name, parameter in twin.named_parameters():
            planned = planner.param_element_size(twin, name, parameter) * parameter.numel()
            layer = model.get_submodule(name.rpartition(".")[0])
            held = [layer.weight]
            if isinstance(layer, pf.Linear4bit):
                held += [layer.weight_absmax, layer.weight_nested_absmax]
            sizes[double_quant, name] = planned
            # A last block of 256 scales that is not full counts for more.
            assert 0 <= sum(t.numel() * t.element_size() for t in held if t is not None) - planned < 4, name
    name = "model.layers.0.mlp.up_proj.weight"
    assert sizes[True, name] < sizes[False, name] < 64 * 128


# --- bitsandbytes, both ways


@pytest.mark.parametrize(("quant_type", "double_quant", "block_size"), SETTINGS)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_what_we_save_opens_in_transformers_with_bitsandbytes(tmp_path, arch, quant_type, double_quant, block_size):
    bnb = pytest.importorskip("bitsandbytes")
    plain = saved(base_model(arch, torch.bfloat16), tmp_path / "plain")
    config = pf.Config4bit(quant_type, double_quant, block_size)
    ours = AutoModel.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    path = saved(ours, tmp_path / "packed")
    assert json.loads(Path(path, "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    theirs = AutoModel.from_pretrained(path, dtype=torch.bfloat16)
    assert type(theirs.lm_head) is nn.Linear
    assert_same_state(theirs, ours)
    assert_same_state(pf.load_4bit(path), ours)
    if block_size > 64:
        return  # bitsandbytes decodes wrongly on CPUs with AVX-512 where a row is no multiple of the block
    for name in four_bit(ours):
        weight = theirs.get_submodule(name).weight
        assert type(weight) is bnb.nn.Params4bit
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded, ours.get_submodule(name).dequantize()), name
    scale = logits(ours).abs().max()
    assert (logits(ours) - logits(theirs)).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * scale


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_what_they_save_opens_here(tmp_path, arch, quant_type, double_quant):
    plain = saved(base_model(arch, torch.bfloat16), tmp_path / "plain")
    config = bitsandbytes_config(quant_type, double_quant)
    theirs = AutoModel.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    path = saved(theirs, tmp_path / "packed", max_shard_size="30KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    ours = pf.load_4bit(path)
    assert len(four_bit(ours)) == 14
    assert_same_state(ours, theirs)
    settings = {(layer.quant_type, layer.double_quant) for layer in map(ours.get_submodule, four_bit(ours))}
    assert settings == {(quant_type, double_quant)}
    again = pf.load_4bit(saved(ours, tmp_path / "again"))
    assert_same_state(again, ours)
    assert_same_state(AutoModel.from_pretrained(tmp_path / "again", dtype=torch.bfloat16), theirs)


def test_bytes_stored_as_bfloat16_and_another_dtype_asked_for(tmp_path):
    """bitsandbytes' quant_storage: the code bytes look like floats, and must not be cast as such."""
    plain = saved(base_model("qwen2", torch.bfloat16), tmp_path / "plain")
    config = bitsandbytes_config(bnb_4bit_quant_storage="bfloat16")
    theirs = AutoModel.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    path = saved(theirs, tmp_path / "packed")
    ours, want = pf.load_4bit(path), pf.load_4bit(plain)
    assert_same_state(ours, want)
    ours = pf.load_4bit(path, dtype=torch.float32)
    layer = ours.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.dequantize(), want.model.layers[0].self_attn.q_proj.dequantize())
    assert layer.bias.dtype == ours.lm_head.weight.dtype == ours.model.norm.weight.dtype == torch.float32
    assert logits(ours).dtype == torch.float32


def test_their_conv1d_checkpoint_opens_here(tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    plain = saved(AutoModel.from_config(config), tmp_path / "plain")
    theirs = AutoModel.from_pretrained(plain, quantization_config=bitsandbytes_config())
    ours = pf.load_4bit(saved(theirs, tmp_path / "packed"))
    assert_same_state(ours, theirs)
    assert_same_state(ours, pf.load_4bit(plain))


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
import torch, transformers
import pyfinetune as pf
plain, packed, out = sys.argv[1:]
ids = torch.arange(20)[None]
for path in (plain, packed):
    model = pf.load_4bit(path)
    assert isinstance(model.model.layers[0].mlp.up_proj, pf.Linear4bit)
    assert model(ids).logits.isfinite().all()
    assert model.num_parameters() > 0
model.save_pretrained(out)
config = pf.Config4bit()
model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, pf.lora_config(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
model(ids, labels=ids).loss.backward()
assert any(p.grad is not None and p.grad.any() for p in model.parameters())
try:
    transformers.AutoModelForCausalLM.from_pretrained(packed)
except ImportError:
    print("blocked")
"""


def test_without_bitsandbytes(llama, tmp_path):
    theirs = AutoModel.from_pretrained(llama, quantization_config=bitsandbytes_config(), dtype=torch.bfloat16)
    packed = saved(theirs, tmp_path / "theirs")
    command = [sys.executable, "-c", WITHOUT, llama, packed, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "blocked" in done.stdout
    assert_same_state(pf.load_4bit(str(tmp_path / "out")), theirs)


# --- mistakes


def edit(folder, **quantization) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields["quantization_config"] = {**fields.get("quantization_config", {}), **quantization}
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit bitsandbytes checkpoint"),
        ({"quant_method": "bitsandbytes", "_load_in_8bit": True, "_load_in_4bit": False}, "8-bit bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "quantized with gptq"),
    ],
)
def test_other_quantizations_are_named(tmp_path, fields, message):
    saved(base_model(), tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(UserError, match=message) as caught:
        pf.load_4bit(tmp_path)
    assert "the model it was made from" in caught.value.fix


def test_a_real_8bit_checkpoint_is_named(llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    path = saved(AutoModel.from_pretrained(llama, quantization_config=config), tmp_path)
    with pytest.raises(UserError, match="8-bit bitsandbytes checkpoint"):
        pf.load_4bit(path)


def test_files_that_are_not_there(tmp_path, llama):
    with pytest.raises(UserError, match=r"load_4bit: 'no/such-model' cannot be loaded") as caught:
        pf.load_4bit("no/such-model")
    assert "safetensors" in caught.value.fix
    with pytest.raises(UserError, match="there is no such folder"):
        pf.load_4bit(tmp_path / "gone")
    with pytest.raises(UserError, match=r"folder without config\.json"):
        pf.load_4bit(tmp_path)
    (tmp_path / "config.json").write_text(Path(llama, "config.json").read_text())
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        pf.load_4bit(tmp_path)
    torch.save(base_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        pf.load_4bit(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        pf.load_4bit(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    saved(base_model(), tmp_path, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        pf.load_4bit(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"use_safetensors": False}, "safetensors files only"),
        ({"gguf_file": "model.gguf"}, "safetensors files only"),
        ({"quantization_config": {"load_in_4bit": True}}, r"is dict, needs a pf\.Config4bit"),
        ({"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}, r"needs a pf\.Config4bit"),
    ],
)
def test_what_is_not_done_is_refused(llama, options, message):
    with pytest.raises(UserError, match=message):
        pf.load_4bit(llama, **options)


def test_quantizing_what_is_4bit_is_refused(packed):
    with pytest.raises(UserError, match="4-bit already") as caught:
        pf.load_4bit(packed, quantization_config=pf.Config4bit("fp4"))
    assert "leave quantization_config out" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "Config4bit: quant_type is 'int4', needs one of"),
        ({"block_size": 48}, "Config4bit: block_size is 48, needs one of"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(options, message):
    with pytest.raises(InvalidInput, match=message):
        pf.Config4bit(**options)


@pytest.mark.parametrize(
    ("skip", "message"), [("lm_hed", "skip names 'lm_hed'"), (("model", "lm_head"), "nothing to quantize")]
)
def test_skip_is_checked_on_the_model(llama, skip, message):
    with pytest.raises(InvalidInput, match=message):
        AutoModel.from_pretrained(llama, quantization_config=pf.Config4bit(skip=skip))


def test_offloading_to_disk_is_refused(llama):
    with pytest.raises(InvalidInput, match="offloaded to disk"):
        pf.load_4bit(llama, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_weight_with_nan_is_named(tmp_path):
    model = base_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    path = saved(model, tmp_path)
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.down_proj\.weight has NaN.*\(and 1 more such layers\)"):
        pf.load_4bit(path)
    with pytest.raises(InvalidInput, match=r"has NaN or infinite values"):
        AutoModel.from_pretrained(path, quantization_config=pf.Config4bit())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, k: s.pop(f"{k}.absmax"), r"up_proj\.weight: the checkpoint has no .*up_proj\.weight\.absmax"),
        (lambda s, k: s.pop(f"{k}.quant_state.bitsandbytes__nf4"), r"the checkpoint has no .*bitsandbytes__nf4"),
        (lambda s, k: s.pop(k), r"the checkpoint has no .*up_proj\.weight$"),
        (lambda s, k: s.update({k: s[k][:10]}), r"up_proj\.weight: codes has 10 bytes, needs 4096"),
        (lambda s, k: s.update({f"{k}.absmax": s[f"{k}.absmax"][:3]}), "absmax has 3 elements"),
    ],
)
def test_a_broken_4bit_weight_is_named(packed, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    state = load_file(f"{packed}/model.safetensors")
    change(state, "model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(Path(packed, "config.json").read_text())
    with pytest.raises(InvalidInput, match=message):
        pf.load_4bit(tmp_path)


def test_a_checkpoint_of_another_shape_is_named(packed, tmp_path):
    saved(pf.quantize(base_model(dtype=torch.bfloat16, intermediate_size=96)), tmp_path)
    (tmp_path / "config.json").write_text(Path(packed, "config.json").read_text())
    with pytest.raises(InvalidInput, match=r"\[64, 96\], the module needs \[64, 128\]"):
        pf.load_4bit(tmp_path)
