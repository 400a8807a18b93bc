"""`patch` over many architectures: the numbers, packed and padded batches, generation, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import CAUSAL, ENCODERS, batches, exact_run, make, no_change_of, run, with_lora
from peft_models import assert_close

import pyfinetune as pf

pytest.importorskip("transformers")
pytest.importorskip("peft")

MODELS = [*CAUSAL, *ENCODERS]
# What each architecture's blocks are made of, as far as kernels for them exist.
BLOCKS = {
    "Llama": {"RMSNorm": 5, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Mistral": {"RMSNorm": 5, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Qwen2": {"RMSNorm": 5, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Qwen3": {"RMSNorm": 9, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Qwen3Moe": {"RMSNorm": 9, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Gemma2": {"RMSNorm": 9, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Gemma3Text": {"RMSNorm": 13, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Phi3": {"RMSNorm": 5, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "SmolLM3": {"RMSNorm": 5, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Olmo2": {"RMSNorm": 9, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "Granite": {"RMSNorm": 5, "gated MLP": 2, "attention block": 2, "attention": 1, "causal LM loss": 1},
    "GPTNeoX": {"attention block": 2, "attention": 1, "causal LM loss": 1},
    "GPT2": {"attention": 1, "causal LM loss": 1},
    "Bert": {"attention": 1},
    "Roberta": {"attention": 1},
}


def swapped(report) -> dict[str, int]:
    """Number of swapped modules by kind."""
    found: dict[str, int] = {}
    for row in report.rows:
        if row.status == "swapped":
            found[row.kind] = found.get(row.kind, 0) + 1
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_is_swapped(name):
    report = pf.patch(make(name))
    assert swapped(report) == BLOCKS[name], report
    assert {row.backend for row in report.rows if row.status == "swapped"} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_as_good_as_the_originals(name, dtype):
    model = make(name, dtype)
    kinds = batches(name)
    eager = {kind: run(model, inputs) for kind, inputs in kinds.items()}
    exact = {kind: exact_run(model, inputs) for kind, inputs in kinds.items()}
    pf.patch(model)
    for kind, inputs in kinds.items():
        assert_close(run(model, inputs), eager[kind], exact[kind], dtype)


@pytest.mark.parametrize("name", MODELS)
def test_with_adapters_too(name):
    model = with_lora(make(name))
    if name == "Gemma2" and model.config._attn_implementation == "sdpa":
        pytest.skip("this version of transformers leaves the cap on the scores out")
    kinds = batches(name)
    eager = {kind: run(model, inputs) for kind, inputs in kinds.items()}
    exact = {kind: exact_run(model, inputs) for kind, inputs in kinds.items()}
    report = pf.patch(model)
    assert swapped(report).items() >= BLOCKS[name].items()
    for kind, inputs in kinds.items():
        assert_close(run(model, inputs), eager[kind], exact[kind], torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_undo_gives_the_same_bits_as_before(name):
    model = with_lora(make(name))
    inputs = batches(name)["padded"]
    before, classes = run(model, inputs), [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    with no_change_of(model):
        report = pf.patch(model)
        run(model, inputs)
        report.undo()
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    after = run(model, inputs)
    assert all(torch.equal(after[key], value) for key, value in before.items())


# How many rows an expert gets decides how its product is summed, patched or not.
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "Qwen3Moe"])
def test_no_bit_of_a_packed_document_moves_when_another_changes(name):
    """Named regression: packing that trains across documents."""
    model = make(name)
    pf.patch(model)
    inputs = batches(name)["packed"] | {"labels": None}
    other = copy.deepcopy(inputs)
    other["input_ids"][0, :9] = other["input_ids"][0, :9].flip(0)
    ours, changed = (model(**i).logits for i in (inputs, other))
    assert torch.equal(ours[0, 9:], changed[0, 9:])
    assert not torch.equal(ours[0, :9], changed[0, :9])


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_text_is_the_originals(name, padded, cache):
    model = make(name).eval()
    ids = batches(name)["plain"]["input_ids"][:, :12]
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}

    def text():
        out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
        return out.sequences, torch.stack(out.logits)

    expected, expected_logits = text()
    pf.patch(model)
    found, logits = text()
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_compiled_as_one_graph_and_right(name):
    """Documents are found in shapes that do not depend on values, so nothing interrupts a graph."""
    model = make(name)
    eager = {kind: run(model, inputs) for kind, inputs in batches(name).items()}
    exact = {kind: exact_run(model, inputs) for kind, inputs in batches(name).items()}
    pf.patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    for kind, inputs in batches(name).items():
        found = {key.replace("_orig_mod.", ""): value for key, value in run(compiled, inputs).items()}
        assert_close(found, eager[kind], exact[kind], torch.float32)
    body = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    inputs = {key: value for key, value in batches(name)["packed"].items() if key != "labels"}
    assert torch.equal(body(**inputs)[0], model.model(**inputs)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("name", "compiler"),
    [(name, "aot_eager") for name in MODELS if name not in ("Llama", "Gemma2")]
    + [("Llama", "inductor"), ("Gemma2", "inductor")],
)
def test_compiled(name, compiler):
    model = make(name)
    eager = {kind: run(model, inputs) for kind, inputs in batches(name).items()}
    exact = {kind: exact_run(model, inputs) for kind, inputs in batches(name).items()}
    pf.patch(model)
    compiled = torch.compile(model, backend=compiler)
    for kind, inputs in batches(name).items():
        found = {key.replace("_orig_mod.", ""): value for key, value in run(compiled, inputs).items()}
        assert_close(found, eager[kind], exact[kind], torch.float32)
