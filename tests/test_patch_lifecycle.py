"""What becomes of a patched model: copies, files, merging, resizing; and models that cannot be patched everywhere."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from hf_models import batches, make, run, with_lora
from peft_models import to_bitsandbytes
from torch import nn

import pyfinetune as pf
from pyfinetune.errors import InvalidInput

pytest.importorskip("transformers")
pytest.importorskip("peft")

INPUTS = {name: batches(name)["packed"] for name in ("Llama", "Gemma2", "Phi3", "GPT2")}


def assert_same_bits(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


def fast_classes(model: nn.Module) -> list[str]:
    return sorted(type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fast"))


def reasons(report) -> dict[str, str]:
    return {f"{row.kind} {row.name}".strip(): row.reason for row in report.rows if row.status == "left"}


# --- copies and files


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", INPUTS)
def test_copies_and_pickles_are_patched_and_on_their_own(name, adapters):
    model = with_lora(make(name)) if adapters else make(name)
    report = pf.patch(model)
    expected = run(model, INPUTS[name])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert fast_classes(twin) == fast_classes(model)
        assert_same_bits(run(twin, INPUTS[name]), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert pf.patch(twin).swapped == 0  # already patched
    assert_same_bits(run(model, INPUTS[name]), expected)
    report.undo()
    assert not fast_classes(model)


def test_a_pickled_model_runs_in_a_new_process(tmp_path):
    model = make("Llama")
    pf.patch(model)
    torch.save(
        {"model": model, "loss": model(**INPUTS["Llama"]).loss.item(), "inputs": INPUTS["Llama"]}, tmp_path / "m"
    )
    script = (
        "import sys, torch; kept = torch.load(sys.argv[1], weights_only=False); "
        "loss = kept['model'](**kept['inputs']).loss.item(); "
        "assert abs(loss - kept['loss']) <= 1e-6 * loss, loss; print(type(kept['model'].model.norm).__name__)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "FastLlamaRMSNorm", done.stderr


def test_weights_and_configuration_say_nothing_of_the_patch(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make("Qwen2")
    keys, expected = list(model.state_dict()), run(model, INPUTS["Llama"])
    model.save_pretrained(tmp_path / "before")
    pf.patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after").train()
    assert loaded.config._attn_implementation == "sdpa"
    assert_same_bits(run(loaded, INPUTS["Llama"]), expected)
    other = make("Qwen2")
    nn.init.zeros_(other.lm_head.weight)
    pf.patch(other)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same_bits(run(other, INPUTS["Llama"]), run(model, INPUTS["Llama"]))


def test_merging_and_unloading_leaves_a_patched_model_without_adapters(tmp_path):
    model = with_lora(make("Llama")).eval()
    expected = model(**INPUTS["Llama"]).logits
    report = pf.patch(model)
    merged = model.merge_and_unload()
    assert "FastLinear" not in fast_classes(merged)
    assert "FastLlamaMLP" in fast_classes(merged)
    torch.testing.assert_close(merged(**INPUTS["Llama"]).logits + 0, expected)
    merged.save_pretrained(tmp_path)
    report.undo()
    assert not fast_classes(merged)
    torch.testing.assert_close(merged(**INPUTS["Llama"]).logits, expected)


def test_adapters_made_after_the_patch():
    """The other way round than documented: the adapters run as PEFT's own, and a second patch takes them over."""
    expected = run(with_lora(make("Llama")), INPUTS["Llama"])
    model = make("Llama")
    first = pf.patch(model)
    model = with_lora(model)
    torch.testing.assert_close(run(model, INPUTS["Llama"]), expected)
    second = pf.patch(model)
    assert {row.kind for row in second.rows if row.status == "swapped"} == {"LoRA over nn.Linear"}
    torch.testing.assert_close(run(model, INPUTS["Llama"]), expected)
    second.undo()
    first.undo()
    assert not fast_classes(model)
    assert_same_bits(run(model, INPUTS["Llama"]), expected)


def test_tied_weights_stay_one():
    model = make("Llama", tie_word_embeddings=True)
    eager = run(model, INPUTS["Llama"])
    report = pf.patch(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(run(model, INPUTS["Llama"]), eager)
    model.tie_weights()
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    report.undo()
    assert_same_bits(run(model, INPUTS["Llama"]), eager)


def test_a_larger_vocabulary():
    """The head becomes another module: still right, and after undo and patch as fast as before."""
    model, plain = make("Llama"), make("Llama")
    report = pf.patch(model)
    for part in (model, plain):
        torch.manual_seed(0)
        part.resize_token_embeddings(101, mean_resizing=False)
    torch.testing.assert_close(run(model, INPUTS["Llama"]), run(plain, INPUTS["Llama"]))
    report.undo()
    assert not fast_classes(model)
    assert pf.patch(model).left == 0
    torch.testing.assert_close(run(model, INPUTS["Llama"]), run(plain, INPUTS["Llama"]))


def test_to_another_dtype_and_back_in_training_mode():
    model = make("Qwen2")
    pf.patch(model)
    before = run(model, INPUTS["Llama"])
    model.bfloat16()
    assert run(model, INPUTS["Llama"])["logits"].dtype == torch.bfloat16
    model.float().eval().train()
    after = run(model, INPUTS["Llama"])
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.0)


def test_patching_again_is_nothing():
    model = with_lora(make("Llama"))
    report = pf.patch(model)
    before, hooks = run(model, INPUTS["Llama"]), len(model.base_model.model._forward_pre_hooks)
    again = pf.patch(model)
    assert (again.swapped, again.left) == (0, report.swapped)
    assert set(reasons(again).values()) == {"already patched"}
    assert len(model.base_model.model._forward_pre_hooks) == hooks
    again.undo()
    assert_same_bits(run(model, INPUTS["Llama"]), before)
    report.undo()
    assert not fast_classes(model)
    assert not model.base_model.model._forward_pre_hooks


# --- what is left alone, and why


def to_4bit(model):
    pf.quantize(model, skip=())


def to_bnb(model):
    to_bitsandbytes(model)
    model.lm_head.__class__ = type("Linear8bitLt", (nn.Linear,), {})


def own_forwards(model):
    for module in (model, model.model.layers[0].self_attn, model.model.layers[0].mlp, model.model.norm):
        module.forward = module.forward


def dispatched(model):
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def partly_meta(model):
    model.model.layers[1].to("meta")


def wholly_meta(model):
    model.to("meta")


def own_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().mean()


def own_head(model):
    model.lm_head = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 96))


def two_kinds(model):
    model.model.layers[0].to(torch.float64)


class _Doubled(nn.Module):
    """Looks like an RMS norm, and is none."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, 1e-6

    def forward(self, x):
        return 2 * x * self.weight


class _Gated(_Doubled):
    """Looks like an RMS norm until it is called."""

    def forward(self, x, gate):
        return x * gate


def odd_norms(model):
    model.model.layers[0].input_layernorm = _Doubled(model.model.norm)
    model.model.layers[1].extra = _Gated(model.model.norm)


def odd_activation(model):
    model.model.layers[0].mlp.act_fn = nn.PReLU(7)  # takes no vector of another length


LEFT = {
    to_4bit: {"causal LM loss": "its head is a Linear4bit"},
    to_bnb: {"causal LM loss": "its head is a Linear8bitLt"},
    own_forwards: {
        "RMSNorm model.norm": "it has a forward of its own",
        "gated MLP model.layers.0.mlp": "it has a forward of its own",
        "attention block model.layers.0.self_attn": "it has a forward of its own",
        "causal LM loss": "it has a forward of its own (instance attribute), such as TRL's own head",
    },
    dispatched: {
        "RMSNorm model.norm": "dispatched by accelerate",
        "gated MLP model.layers.1.mlp": "dispatched by accelerate",
        "attention block model.layers.1.self_attn": "dispatched by accelerate",
        "causal LM loss": "dispatched by accelerate",
    },
    partly_meta: {
        "RMSNorm model.layers.1.input_layernorm": "weight is on the meta device",
        "attention block model.layers.1.self_attn": "it is on the meta device",
    },
    wholly_meta: {
        "RMSNorm model.norm": "weight is on the meta device",
        "attention": "it is on the meta device",
        "causal LM loss": "weight is on the meta device",
    },
    own_loss: {"causal LM loss": "it has a loss function of its own"},
    own_head: {"causal LM loss": "its head is a Sequential"},
    two_kinds: {"RMSNorm model.layers.0.input_layernorm": "its weight is torch.float64"},
    odd_norms: {
        "RMSNorm model.layers.0.input_layernorm": "the probe failed: ",
        "RMSNorm model.layers.1.extra": "it could not be tried: ",
    },
    odd_activation: {"gated MLP model.layers.0.mlp": "no kernel for the activation "},
}


@pytest.mark.parametrize("change", LEFT)
def test_left_with_a_reason(change):
    """And never an exception, least of all when half of the model is swapped."""
    model = make("Llama")
    change(model)
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    report = pf.patch(model)
    found = reasons(report)
    for name, reason in LEFT[change].items():
        assert reason in found.get(name, "swapped"), name
    report.undo()
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before


@pytest.mark.parametrize("change", [to_4bit, own_forwards, dispatched, own_loss, own_head])
def test_what_is_left_alone_still_works(change):
    model = make("Llama")
    change(model)
    eager = run(model, INPUTS["Llama"])
    pf.patch(model)
    torch.testing.assert_close(run(model, INPUTS["Llama"]), eager)


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_an_attention_that_was_chosen_is_kept(chosen):
    model = make("Llama", attn_implementation=chosen)
    report = pf.patch(model)
    assert reasons(report) == {"attention": f"attn_implementation='{chosen}' was chosen"}
    assert model.config._attn_implementation == chosen
    if chosen == "eager":
        plain = make("Llama", attn_implementation=chosen)
        torch.testing.assert_close(run(model, INPUTS["Llama"]), run(plain, INPUTS["Llama"]))


def test_a_module_that_somebody_subclassed():
    """What computes the same is swapped, and keeps what was added; what does not is left."""
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    class Named(LlamaRMSNorm):
        def label(self):
            return f"eps {self.variance_epsilon}"

    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.01

    class Halved(LlamaMLP):
        def forward(self, x):
            return 0.5 * super().forward(x)

    model = make("Llama")
    model.model.norm.__class__ = Named
    model.model.layers[0].input_layernorm.__class__ = Shifted
    model.model.layers[0].mlp.__class__ = Halved
    eager = run(model, INPUTS["Llama"])
    report = pf.patch(model)
    assert set(reasons(report)) == {"RMSNorm model.layers.0.input_layernorm", "gated MLP model.layers.0.mlp"}
    assert type(model.model.norm).__name__ == "FastNamed"
    assert isinstance(model.model.norm, Named)
    assert model.model.norm.label() == "eps 1e-06"
    torch.testing.assert_close(run(model, INPUTS["Llama"]), eager)


def test_an_attention_switched_since_is_an_obstacle():
    model = make("Llama")
    report = pf.patch(model)
    model.set_attn_implementation("eager")
    with pytest.raises(InvalidInput, match="attention has become eager since"):
        report.undo()
    assert fast_classes(model)
    model.set_attn_implementation("sdpa")
    report.undo()
    assert not fast_classes(model)
