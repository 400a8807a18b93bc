"""Exports: each form computes what was trained; one that does not is refused, by name, and leaves no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import OPTIONS, adapter_model, brief_fixture, changed_weights, save_adapter, save_base  # noqa: F401
from safetensors.torch import load_file
from tiny_model import make_tokenizer

import pyfinetune as pf
from pyfinetune.errors import NotProved, UserError
from pyfinetune.train.export import exporting
from pyfinetune.train.export import files as export_files
from pyfinetune.train.export.exporting import Request, export
from pyfinetune.train.export.quality import judge_quantized
from pyfinetune.train.saved import find_saved, load_saved

pytestmark = pytest.mark.usefixtures("brief")
IDS = torch.tensor([[5, 17, 40, 99, 250, 301, 7, 8, 61]])


@pytest.fixture(scope="module", name="base")
def base_fixture(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("base"), bias=True)


@pytest.fixture(scope="module", name="adapter")
def adapter_fixture(tmp_path_factory, base) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def exported(tmp_path: Path, source: str, to: str = "merged", **options):
    return export(Request(source, to, str(tmp_path / "out"), device="cpu", **options))


def check(result, what: str) -> dict:
    return next(entry for entry in result.checks if what in entry["what"])


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


# --- forms


# PEFT takes the bias of a lora_B for a matrix that was not gathered.
@pytest.mark.filterwarnings("ignore:Adapter .default.. .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("in_4bit", [False, True])
def test_merged_computes_what_the_adapter_model_does(base, tmp_path, name, in_4bit):
    from transformers import AutoModelForCausalLM

    source = save_adapter(tmp_path / "adapter", base, in_4bit=in_4bit, **OPTIONS[name])
    result = exported(tmp_path, source, in_4bit=in_4bit)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = logits(adapter_model(base, in_4bit=in_4bit, **OPTIONS[name]))
    assert (logits(model) - want).norm() < 2e-6 * want.norm()
    assert (want - logits(AutoModelForCausalLM.from_pretrained(base))).norm() > 0.1 * want.norm()
    found = check(result, "merged in float64")
    assert found["error"] <= found["allowed"] < 2e-7
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["to"] == "merged"
    assert record["dtype"] == "float32"
    assert record["source"]["sha256"] == find_saved(source).digest
    assert record["weights"]["model.safetensors"]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert left_over(tmp_path) == ["adapter", "out"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_16_bit_weights_are_rounded_once(base, adapter, tmp_path, dtype):
    result = exported(tmp_path, adapter, dtype=dtype)
    kind = getattr(torch, dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {kind}
    layer = adapter_model(base).get_base_model().model.layers[1].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    ulp = torch.finfo(kind).eps * exact.abs()
    assert ((stored["model.layers.1.self_attn.q_proj.weight"].double() - exact).abs() <= 0.501 * ulp + 1e-7).all()
    found = check(result, "read back, against")
    assert 0 < found["rounding_of_the_weights"] < found["allowed"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_a_16_bit_base_keeps_its_type(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    result = exported(tmp_path, save_adapter(tmp_path / "adapter", base))
    assert result.dtype == "bfloat16"
    assert check(result, "merged in float64")["error"] < 1e-12


def test_the_adapter_form_is_bit_equal_and_found_from_any_folder(base, adapter, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    result = exported(tmp_path, adapter, "adapter")
    assert {"logits of the adapter, read back, bit by bit"} <= {entry["what"] for entry in result.checks}
    monkeypatch.chdir("/")
    want = logits(adapter_model(base))
    assert torch.equal(logits(load_saved(find_saved(tmp_path / "out"))), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want)
    assert "chat_template.jinja" in left_over(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nbase_model:")


def test_an_adapter_over_4_bits_says_so(base, tmp_path):
    source = save_adapter(tmp_path / "adapter", base, in_4bit=True)
    exported(tmp_path, source, "adapter", in_4bit=True)
    again = find_saved(tmp_path / "out")
    assert again.in_4bit
    assert torch.equal(logits(load_saved(again)), logits(adapter_model(base, in_4bit=True)))


@pytest.mark.parametrize("in_4bit", [False, True])
def test_merged_4bit_is_a_bitsandbytes_checkpoint(base, tmp_path, in_4bit):
    source = save_adapter(tmp_path / "adapter", base, in_4bit=in_4bit)
    result = exported(tmp_path, source, "merged-4bit", in_4bit=in_4bit)
    model = pf.load_4bit(tmp_path / "out")
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, pf.Linear4bit)
    merged = adapter_model(base, in_4bit=in_4bit).get_base_model().model.layers[0].mlp.down_proj
    decoded = merged.base_layer.dequantize(torch.float32) if in_4bit else merged.base_layer.weight
    want = pf.ops.quantize_4bit((decoded + merged.get_delta_weight("default")).detach(), double_quant=True)
    assert (layer.packed.codes == want.codes).float().mean() > 0.999
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    found = check(result, "loss of the re-quantized")
    assert found["added_loss"] <= found["allowed"]
    assert found["added_by_quantizing_the_base"] is not None
    assert found["perplexity_of_export"] > 1
    found = check(result, "agreement")
    assert found["largest_difference"] > 0
    assert 0 <= found["greedy_tokens_equal"] <= found["greedy_tokens"] == 8


def test_a_whole_model_is_copied_and_checked(base, tmp_path):
    result = exported(tmp_path, base, dtype="bfloat16")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(Path(base) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value.bfloat16()) for name, value in theirs.items())
    assert result.source["base"] is None


@pytest.mark.parametrize("to", ["merged", "merged-4bit"])
def test_a_4_bit_model_becomes_a_plain_one(base, tmp_path, to):
    pf.load_4bit(base).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    if to == "merged-4bit":
        with pytest.raises(UserError, match="is a 4-bit model already"):
            exported(tmp_path, str(tmp_path / "model"), to)
        return
    exported(tmp_path, str(tmp_path / "model"), to)
    want = pf.load_4bit(base).model.layers[0].mlp.up_proj.dequantize(torch.float32)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"], want)


# --- adapters that are not plain


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("learned", [[], ["lm_head"]])
def test_tied_embeddings(tmp_path, learned):
    """A head that learned apart from its embedding is no longer tied, and the file says so."""
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", tied=True)
    model = adapter_model(base, modules_to_save=learned or None)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.01
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    exported(tmp_path, str(tmp_path / "adapter"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied is not bool(learned)
    assert (logits(again) - logits(model)).norm() < 2e-6 * logits(model).norm()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_resized_vocabulary(base, tmp_path):
    """Tokens that were added before training come along with their embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|tool|>", "<|more|>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "lora_B" in name:
            parameter.data += 0.01
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for form in ("merged", "adapter", "merged-4bit"):
        result = export(Request(str(tmp_path / "adapter"), form, device="cpu"))
        assert result.output_dir == str(tmp_path / f"adapter-{form}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter-merged")
    assert again.config.vocab_size == len(tokenizer)
    assert (logits(again) - logits(model)).norm() < 2e-6 * logits(model).norm()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_classifiers(base, tmp_path, task):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}[task]
    model = adapter_model(base, kind=_labelled(kind, 5), task=task, targets=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    result = exported(tmp_path, str(tmp_path / "adapter"))
    again = kind.from_pretrained(tmp_path / "out")
    assert again.config.num_labels == 5
    assert not any("greedy" in entry["what"] for entry in result.checks)
    assert (logits(again) - logits(model)).norm() < 2e-6 * logits(model).norm()
    four = export(Request(str(tmp_path / "adapter"), "merged-4bit", str(tmp_path / "four"), device="cpu"))
    assert "no base model to measure" in four.notes[0]
    with pytest.raises(UserError, match="is no language model"):
        _with_converter(tmp_path, str(tmp_path / "adapter"))


def _labelled(kind, count: int):
    class Labelled:
        @staticmethod
        def from_pretrained(path):
            return kind.from_pretrained(path, num_labels=count, pad_token_id=0)

    return Labelled


def _with_converter(tmp_path: Path, source: str):
    pytest.importorskip("gguf")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("")
    return export(Request(source, "gguf", str(tmp_path / "gguf"), converter=str(script), device="cpu"))


def test_an_encoder_with_masked_language_model_head(tmp_path):
    """A whole model of another kind than a causal one is loaded by the class that its configuration names."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = exported(tmp_path, str(tmp_path / "model"), dtype="bfloat16")
    assert BertForMaskedLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16
    assert check(result, "read back, against")["rows"] == 2


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "IA3"])
def test_other_methods_of_peft(base, tmp_path, kind):
    """What adds to the input or between the layers is exported as an adapter only; (IA)^3 scales, and merges."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {
        "PROMPT_TUNING": {"num_virtual_tokens": 4},
        "PREFIX_TUNING": {"num_virtual_tokens": 4},
        "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
        "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    }
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](task_type="CAUSAL_LM", **options[kind])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    exported(tmp_path, str(tmp_path / "adapter"), "adapter")
    assert torch.equal(logits(load_saved(find_saved(tmp_path / "out"))), logits(model))
    if kind == "IA3":
        exported(tmp_path, str(tmp_path / "adapter"))
        merged = logits(load_saved(find_saved(tmp_path / "out")))
        assert (merged - logits(model)).norm() < 2e-6 * merged.norm()
        return
    with pytest.raises(UserError, match=f"{kind} has no weights to merge"):
        exported(tmp_path, str(tmp_path / "adapter"))


def test_several_adapters_have_to_be_chosen_from(base, tmp_path):
    model = adapter_model(base)
    model.add_adapter("other", pf.lora_config(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="holds 2 adapters: default, other") as caught:
        exported(tmp_path, str(tmp_path / "adapter"))
    assert "--adapter NAME" in caught.value.fix
    with pytest.raises(UserError, match="no adapter of this name"):
        exported(tmp_path, str(tmp_path / "adapter"), adapter="third")
    model.set_adapter("other")
    exported(tmp_path, str(tmp_path / "adapter"), adapter="other")
    assert (logits(load_saved(find_saved(tmp_path / "out"))) - logits(model)).norm() < 2e-6 * logits(model).norm()


# --- a wrong export is refused


def after(monkeypatch, module, name: str, change) -> None:
    """Let something happen to what a step has written."""
    step = getattr(module, name)

    def changed(*arguments, **options):
        result = step(*arguments, **options)
        change(*arguments)
        return result

    monkeypatch.setattr(module, name, changed)


def scale_one_b(stage: Path) -> None:
    with changed_weights(stage / "adapter_model.safetensors") as tensors:
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] *= 1.01


def swap_two(stage: Path) -> None:
    with changed_weights(stage / "model.safetensors") as tensors:
        a, b = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def lose_one(stage: Path) -> None:
    with changed_weights(stage / "model.safetensors") as tensors:
        del tensors["model.layers.1.input_layernorm.weight"]


def other_theta(stage: Path) -> None:
    path = stage / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    path.write_text(json.dumps(config))


def other_alpha(stage: Path) -> None:
    path = stage / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6', '"lora_alpha": 12'))


def other_template(stage: Path) -> None:
    (stage / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def refused(tmp_path: Path, source: str, to: str, match: str, **options) -> None:
    """The export is refused, and nothing of it is there."""
    before = left_over(tmp_path)
    with pytest.raises(NotProved, match=match):
        exported(tmp_path, source, to, **options)
    assert left_over(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (scale_one_b, r"adapter_model.safetensors: base_model.model.model.layers.1.mlp.up_proj.lora_B.weight differs"),
        (other_alpha, r"the adapter, read back is not the model that was trained: fixed text 1: its logits differ"),
    ],
)
def test_a_wrong_adapter_is_refused(adapter, tmp_path, monkeypatch, change, match):
    after(monkeypatch, export_files, "copy_adapter", lambda saved, stage: change(stage))
    refused(tmp_path, adapter, "adapter", match)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (swap_two, r"model.layers.0.mlp.gate_proj.weight differs from what was to be written: 8,1"),
        (lose_one, r"the merged model: model.layers.1.input_layernorm.weight is missing"),
        (other_theta, r"computes something else .* its configuration is not: fixed text \d: its logits are off by"),
        (other_template, r"another chat template"),
    ],
)
def test_a_wrong_file_is_refused(adapter, tmp_path, monkeypatch, change, match, dtype):
    after(monkeypatch, export_files, "write_model", lambda stage, *rest: change(stage))
    refused(tmp_path, adapter, "merged", match, dtype=dtype)


@pytest.mark.parametrize("how", ["scaled", "dropped", "alpha"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_refused(adapter, tmp_path, monkeypatch, how, dtype):
    merge = exporting.merge_dense

    def wrong(model):
        layer = model.get_base_model().model.layers[0].self_attn.v_proj
        if how == "scaled":
            layer.lora_B["default"].weight.data *= 1.00001
        elif how == "alpha":
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.scaling["default"] *= 2
        else:
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.lora_B["default"].weight.data.zero_()
        return merge(model)

    monkeypatch.setattr(exporting, "merge_dense", wrong)
    refused(tmp_path, adapter, "merged", r"merged in float64 is not .* fixed text 1: its logits are off", dtype=dtype)


@pytest.mark.parametrize("change", [swap_two])
def test_wrong_4_bit_weights_are_refused(adapter, tmp_path, monkeypatch, change):
    def swap(stage, *rest):
        with changed_weights(stage / "model.safetensors") as tensors:
            for part in ("", ".absmax", ".nested_absmax"):
                a, b = (f"model.layers.0.mlp.{name}_proj.weight{part}" for name in ("gate", "up"))
                tensors[a], tensors[b] = tensors[b], tensors[a]

    after(monkeypatch, export_files, "write_model", swap)
    refused(tmp_path, adapter, "merged-4bit", r"model.layers.0.mlp.gate_proj.weight")


def test_quantizing_the_wrong_weights_is_refused(adapter, tmp_path, monkeypatch):
    quantize = pf.quantize

    def wrong(model, **settings):
        model.model.layers[1].self_attn.o_proj.weight.data *= 1.3
        return quantize(model, **settings)

    monkeypatch.setattr(pf, "quantize", wrong)
    refused(tmp_path, adapter, "merged-4bit", r"layers.1.self_attn.o_proj.weight is not the merged weight in 4 bits")


def test_a_broken_tie_is_refused(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", tied=True)
    source = save_adapter(tmp_path / "adapter", base)

    def untie(stage, *rest):
        path = stage / "config.json"
        path.write_text(path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
        with changed_weights(stage / "model.safetensors") as tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    after(monkeypatch, export_files, "write_model", untie)
    refused(tmp_path, source, "merged", "its head is apart from its embedding, and was tied to it before")


def test_a_loss_that_quantizing_made_worse_is_refused():
    own = torch.rand(64, generator=torch.Generator().manual_seed(0)).double() + 2
    noise = 0.01 * torch.randn(64, generator=torch.Generator().manual_seed(1)).double()
    base = (own, own + 0.02 + noise)
    assert judge_quantized(own, own + 0.03 + noise, base)["allowed"] == pytest.approx(0.04, abs=0.01)
    with pytest.raises(NotProved, match=r"the loss rises by 0\.\d+ .* twice what quantizing the base adds"):
        judge_quantized(own, own + 0.1 + noise, base)
    with pytest.raises(NotProved, match="a tenth of the loss"):
        judge_quantized(own, own + 0.5 + noise, None)
    with pytest.raises(NotProved):
        judge_quantized(own, own * float("nan"), base)


def test_a_killed_export_leaves_no_finished_folder(adapter, tmp_path, monkeypatch):
    (tmp_path / ".out.exporting").mkdir()
    (tmp_path / ".out.exporting" / "half.safetensors").write_text("x")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_files, "write_card", stop)
        with pytest.raises(KeyboardInterrupt):
            exported(tmp_path, adapter)
    assert left_over(tmp_path) == []
    exported(tmp_path, adapter)
    first = (tmp_path / "out" / "export.json").read_text()
    exported(tmp_path, adapter, dtype="bfloat16")  # an earlier export is replaced, by a whole one
    assert (tmp_path / "out" / "export.json").read_text() != first
    with monkeypatch.context() as patch:
        patch.setattr(export_files, "write_card", stop)
        with pytest.raises(KeyboardInterrupt):
            exported(tmp_path, adapter)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["dtype"] == "bfloat16"
