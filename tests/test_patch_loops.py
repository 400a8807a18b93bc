"""`patch` and loops of one's own: PyTorch, accelerate, autocast, checkpointing, and what scripts do with logits."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import weakref

import numpy as np
import pytest
import torch
from hf_models import batches, disable_checkpointing, enable_checkpointing, exact_run, make, run, with_lora
from peft_models import assert_close
from torch import nn
from trainer_runs import batch_of, result_of, rows, widened

import pyfinetune as pf

pytest.importorskip("transformers")
pytest.importorskip("peft")

from pyfinetune.errors import InvalidInput
from pyfinetune.hf import causal_lm_loss
from pyfinetune.hf.causal_lm_loss import LazyLogits


def model_of(method: str, name: str = "Llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make(name, dtype)
    return with_lora(model).to(dtype) if method == "lora" else model


def patched(name: str = "Llama", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = make(name, dtype, **options)
    pf.patch(model)
    return model


def bare_loop(model: nn.Module, exact: bool = False, context=contextlib.nullcontext, backward=None, prepare=None):
    """Eight lines that many scripts begin with."""
    model = model.double() if exact else model
    with widened(exact):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        run, optimizer = (model, optimizer) if prepare is None else prepare(model, optimizer)
        losses, outputs = [], []
        for step in range(5):
            with context():
                out = run(**batch_of(rows()[step * 3 : step * 3 + 3]))
            (torch.Tensor.backward if backward is None else backward)(out.loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.loss)
            outputs.append(out.logits)
    return result_of(losses, model), outputs


def untouched(logits: list) -> bool:
    return all(isinstance(value, LazyLogits) and value.computed is None for value in logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_bare_loop(method, dtype):
    model = model_of(method, dtype=dtype)
    exact, _ = bare_loop(copy.deepcopy(model), exact=True)
    eager, _ = bare_loop(copy.deepcopy(model))
    pf.patch(model)
    ours, logits = bare_loop(model)
    assert_close(ours, eager, exact, dtype)
    assert untouched(logits)


def assert_same_where_tokens_are(logits, expected):
    """What stands at padding is nobody's: no attention there is zero here, and an average elsewhere."""
    kept = batch_of(rows()[:3])["attention_mask"].bool()
    torch.testing.assert_close(logits[kept].float(), expected[kept].float(), atol=0.05, rtol=0.0)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_autocast(method):
    model = model_of(method, "Qwen2")
    exact, _ = bare_loop(copy.deepcopy(model), exact=True)
    eager, theirs = bare_loop(copy.deepcopy(model), context=bfloat16)
    pf.patch(model)
    ours, logits = bare_loop(model, context=bfloat16)
    assert_close(ours, eager, exact, torch.bfloat16)
    assert untouched(logits)
    assert logits[0].dtype == theirs[0].dtype
    assert_same_where_tokens_are(logits[0], theirs[0])


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_with_mixed_precision(method, when):
    """It wraps the model's forward and casts what comes out: the logits are not computed for that."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def loop(model, late=False):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)

        def prepare(*parts):
            prepared = accelerator.prepare(*parts)
            if late:
                assert pf.patch(prepared[0]).left == 0
            return prepared

        try:
            return bare_loop(model, backward=accelerator.backward, prepare=prepare)
        finally:
            AcceleratorState._reset_state(True)

    model = model_of(method)
    exact, _ = bare_loop(copy.deepcopy(model), exact=True)
    eager, theirs = loop(copy.deepcopy(model))
    if when == "before":
        pf.patch(model)
    ours, logits = loop(model, late=when == "after")
    assert_close(ours, eager, exact, torch.bfloat16)
    assert untouched(logits)
    assert logits[0].dtype == theirs[0].dtype == torch.float32
    assert_same_where_tokens_are(logits[0], theirs[0])


@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "not re-entrant"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradient_checkpointing_gives_the_same_bits(method, reentrant, dtype):
    model = model_of(method, "Qwen2", dtype)
    pf.patch(model)
    for kind, inputs in batches("Qwen2").items():
        plain = run(model, inputs)
        enable_checkpointing(model, reentrant)
        if method == "lora" and reentrant:
            model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        disable_checkpointing(model)
        assert all(torch.equal(plain[name], grad) for name, grad in grads.items()), kind
        assert set(plain) - {"loss", "logits"} == set(grads)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_second_backward_gives_the_same_gradients(method):
    model = model_of(method)
    pf.patch(model)
    loss = model(**batches("Llama")["packed"]).loss
    wanted = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("when", ["patched outside", "patched inside"])
def test_evaluation_without_gradients(mode, when):
    model = make("Llama").eval()
    inputs = batches("Llama")["padded"]
    kept = inputs["attention_mask"].bool()
    exact, eager = exact_run(model, inputs), run(model, inputs)
    if when == "patched outside":
        pf.patch(model)
    with mode():
        if when == "patched inside":
            assert pf.patch(model).left == 0
        out = model(**inputs)
        assert not out.loss.requires_grad
        assert not out.logits.requires_grad
        found = {"loss": out.loss, "logits": out.logits[kept]}
    assert_close(found, *({key: part[key] for key in found} for part in (eager, exact)), torch.float32)
    again = run(model, inputs)
    assert_close(again, eager, exact, torch.float32)


def test_hidden_states_are_the_originals():
    model = make("Qwen2")
    inputs = batches("Qwen2")["plain"]
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)
        exact = copy.deepcopy(model).double()(**inputs, output_hidden_states=True)
        pf.patch(model)
        after = model(**inputs, output_hidden_states=True)
    assert len(after.hidden_states) == len(before.hidden_states) == 3
    states = ({f"{i}": state for i, state in enumerate(out.hidden_states)} for out in (after, before, exact))
    assert_close(*states, torch.float32)
    tuples = model(**inputs, return_dict=False)
    assert tuples[0] == after.loss
    assert torch.equal(tuples[1] + 0, after.logits + 0)


def test_attention_weights_cannot_be_had_and_it_says_so(caplog):
    """As with every implementation but eager; that one still gives them."""
    model, inputs = patched(), batches("Llama")["plain"]
    logger = logging.getLogger("pyfinetune.hf.attention")
    logger.addHandler(caplog.handler)
    type(logger).warning_once.cache_clear()
    try:
        assert not model(**inputs, output_attentions=True).attentions
    finally:
        logger.removeHandler(caplog.handler)
    assert "set_attn_implementation('eager')" in caplog.text
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True
    expected = model(**inputs).logits + 0
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 20, 20)] * 2
    torch.testing.assert_close(out.logits + 0, expected)


def test_logits_to_keep():
    model, plain = patched("Gemma2"), make("Gemma2")
    ids = batches("Gemma2")["plain"]["input_ids"]
    for labels in (None, ids[:, -3:]):
        ours, theirs = (part(input_ids=ids, labels=labels, logits_to_keep=3) for part in (model, plain))
        torch.testing.assert_close(ours.logits + 0, theirs.logits)
        if labels is not None:
            torch.testing.assert_close(ours.loss, theirs.loss)
    for part in (model, plain):
        with pytest.raises(ValueError):
            part(input_ids=ids, labels=ids, logits_to_keep=3)


def test_losses_as_the_forward_takes_them():
    """Labels in the fifth place, shifted ones, a number of items, none that counts."""
    model, plain = patched(), make("Llama")
    ids = batches("Llama")["plain"]["input_ids"]
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    calls = [
        ((ids, None, None, None, None, ids), {}),
        ((ids,), {"labels": ids, "shift_labels": shifted}),
        ((ids,), {"labels": ids, "num_items_in_batch": 7}),
        ((ids,), {"labels": ids, "num_items_in_batch": torch.tensor(7)}),
        ((ids,), {"labels": torch.full_like(ids, -100)}),
    ]
    for args, kwargs in calls:
        ours, theirs = (part(*args, **kwargs).loss for part in (model, plain))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


# --- what scripts do with logits of a model that was given labels


READS = {
    "numpy": lambda x: torch.from_numpy(x.detach().cpu().numpy()),
    "float numpy": lambda x: torch.from_numpy(x.detach().float().numpy()),
    "asarray": lambda x: torch.tensor(np.asarray(x.detach().float())),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "clone": lambda x: x.clone(),
    "slice": lambda x: x[..., :-1, :].contiguous(),
    "data": lambda x: x.data,
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "stack": lambda x: torch.stack([x, x])[1],
    "new": lambda x: torch.zeros_like(x) + x,
}


@pytest.mark.parametrize("grad", [True, False], ids=["with a graph", "without"])
@pytest.mark.parametrize("how", READS)
def test_logits_are_read_in_every_way(how, grad):
    model, inputs = patched(), batches("Llama")["plain"]
    expected = READS[how](make("Llama")(**inputs).logits.detach())
    with torch.set_grad_enabled(grad):
        logits = model(**inputs).logits
        torch.testing.assert_close(READS[how](logits).detach() + 0, expected)
    assert "LazyLogits" not in repr(logits)
    file = io.BytesIO()
    torch.save(logits.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), logits.detach() + 0)


def test_logits_changed_in_place_stay_changed():
    model, plain, inputs = patched(), make("Llama"), batches("Llama")["plain"]
    results = []
    for part in (model, plain):
        logits = part(**inputs).logits
        detached = logits.detach()
        logits *= 2
        logits[:, 0] = 1.0
        views = [logits, logits.float(), logits.double(), logits.detach(), detached]
        grad = torch.autograd.grad(logits.square().mean(), list(part.parameters()))
        results.append([*(view.detach().float() + 0 for view in views), *grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_detached_logits_have_no_graph_and_keep_none_alive():
    model, inputs = patched(), batches("Llama")["plain"]
    out = model(**inputs)
    kept, watch = out.logits.detach(), weakref.ref(out.logits.parts[0])
    assert not model.loss_function(kept, inputs["labels"], 96).requires_grad
    with torch.no_grad():
        cast = out.logits.bfloat16()
    assert not model.loss_function(cast, inputs["labels"], 96).requires_grad
    del out, cast
    gc.collect()
    assert watch() is None
    assert not kept.parts[0].requires_grad
    assert kept.shape == (2, 20, 96)


def test_who_listens_to_the_head_hears_values():
    model, inputs, heard = patched(), batches("Llama")["plain"], []
    expected = run(model, inputs)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: heard.append(out))
    found = run(model, inputs)
    assert type(heard[0]) is torch.Tensor
    torch.testing.assert_close(found, expected)
    handle.remove()
    assert isinstance(model(**inputs).logits, LazyLogits)


def test_a_weight_that_is_freed_after_the_forward_is_no_crash(monkeypatch):
    """As FSDP does around the head alone, if the hooks cannot be seen."""
    model, inputs = patched(), batches("Llama")["plain"]
    head = model.lm_head
    original = causal_lm_loss.lazy_logits

    def freed(*parts):
        logits = original(*parts)
        head.weight.untyped_storage().resize_(0)
        return logits

    monkeypatch.setattr(causal_lm_loss, "lazy_logits", freed)
    with pytest.raises(InvalidInput, match="freed after its forward"):
        model(**inputs)
