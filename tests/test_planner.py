"""`pf.plan`: what a step takes, counted without memory, against what a real one takes; and what the planner refuses."""

from __future__ import annotations

import pytest
import torch
from hf_models import enable_checkpointing
from tiny_model import make_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pyfinetune as pf
from pyfinetune.errors import InvalidInput
from pyfinetune.ops import _linear_cross_entropy_cpu as head_cpu
from pyfinetune.ops._cost import cost_of
from pyfinetune.planner import Plan, extrapolate, layers_of

BATCH, LENGTH = 2, 128


def batch_of(vocabulary: int = 400, documents: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (BATCH, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(BATCH * (LENGTH - 1))}
    if documents:
        starts = torch.arange(BATCH + 1, dtype=torch.int32) * LENGTH
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    return batch


def llama(layers: int = 2, adapters: bool = False, patched: bool = False) -> nn.Module:
    """A tiny model in the state in which it would be trained, without masks, as where no row is packed."""
    from peft import LoraConfig, get_peft_model

    from pyfinetune.hf.shadow import leave_masks_out

    model = make_model(layers=layers)
    model.config.use_cache = False
    if adapters:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    if patched:
        pf.patch(model)
    else:
        leave_masks_out(model)
    return model.train()


def allocated(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """The most bytes that torch's allocator has handed out during the second optimizer step of a real run."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def loss():
        return model(**batch).loss / 1

    def step():
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    present = [*model.parameters(), *model.buffers(), *state, *batch.values()]
    live = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in present}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    peak = live
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class TestCounting:
    def test_what_is_there_before_a_step_is_exact(self):
        model = llama()
        found = pf.plan(model, batch_of())
        parameters = list(model.parameters())
        bytes_of = [*parameters, *model.buffers()]
        assert found.parts["weights"] == sum(tensor.nbytes for tensor in bytes_of)
        assert found.parts["optimizer"] == sum(2 * p.nbytes + 4 for p in parameters)
        assert found.parameters == found.trainable == sum(p.numel() for p in parameters)
        assert found.moments["optimizer"]["gradients"] == sum(p.nbytes for p in parameters)

    def test_adapters_are_told_from_weights(self):
        model = llama(adapters=True)
        found = pf.plan(model, batch_of())
        adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert found.parts["adapters"] == adapters
        assert found.moments["optimizer"]["gradients"] == adapters
        assert found.trainable * 4 == adapters

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
    def test_a_real_step_of_plain_torch_takes_as_much(self, adapters, checkpointing):
        model, batch = llama(adapters=adapters), batch_of()
        found = pf.plan(model, batch, gradient_checkpointing=checkpointing)
        if checkpointing:
            model.enable_input_require_grads()
            enable_checkpointing(model, reentrant=False)
        assert found.peak == pytest.approx(allocated(model, batch), rel=0.005)

    @pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
    def test_a_real_step_on_the_kernels_takes_as_much(self, adapters):
        model, batch = llama(adapters=adapters, patched=True), batch_of(documents=True)
        found = pf.plan(model, batch)
        # Of the scratch torch's allocator sees what is made anew, and nothing of what the kernels allocate.
        real = allocated(model, batch)
        assert 0.995 * (found.peak - found.parts["scratch"]) <= real <= 1.005 * found.peak

    def test_gradients_of_tied_weights_are_summed_in_place(self):
        """As autograd does with real tensors; a copy more of the embedding's would be the peak here."""
        from transformers import LlamaConfig, LlamaForCausalLM

        shapes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 64}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, tie_word_embeddings=True, use_cache=False, **shapes))
        pf.patch(model)
        ids = torch.randint(8000, (1, 16))
        starts = torch.tensor([0, 16], dtype=torch.int32)
        batch = {"input_ids": ids, "labels": ids, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        found = pf.plan(model.train(), batch)
        assert found.peak_at == "backward, embedding"
        real = allocated(model, batch)
        assert 0.995 * (found.peak - found.parts["scratch"]) <= real <= 1.005 * found.peak

    def test_the_head_s_scratch_is_what_the_kernel_allocates(self):
        head_cpu._scratch.buffer = None
        hidden, weight = torch.randn(96, 64, requires_grad=True), torch.randn(4000, 64, requires_grad=True)
        labels = torch.randint(4000, (96,))
        args = (hidden.detach(), weight.detach(), labels, None, -100, 0.0, 0, False, True, True, False)
        pf.ops.linear_cross_entropy(hidden, weight, labels)
        cost = cost_of("linear_cross_entropy", args, "cpu")
        assert cost.kept == {"tiles of logits": head_cpu._scratch.buffer.numel()}
        assert cost.flops == 3 * 2.0 * 96 * 64 * 4000

    def test_nothing_real_is_touched(self):
        model = llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        pf.plan(model, batch_of(), gradient_checkpointing=True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not model.is_gradient_checkpointing
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_the_meta_device_gives_the_same(self):
        model = llama()
        found = pf.plan(model, batch_of())
        assert pf.plan(model.to("meta"), {k: v.to("meta") for k, v in batch_of().items()}) == found

    def test_gradients_stay_while_batches_accumulate(self):
        model = llama()
        one, several = (pf.plan(model, batch_of(), accumulation=count) for count in (1, 4))
        start = "forward, first layer"
        assert one.moments[start].get("gradients", 0) == 0
        assert several.moments[start]["gradients"] == sum(p.nbytes for p in model.parameters())
        assert sum(several.flops.values()) == 2 * sum(one.flops.values())


class TestLayers:
    def test_few_layers_stand_for_many(self):
        plans = {count: pf.plan(llama(count), batch_of()) for count in (2, 3, 5)}
        found = extrapolate(plans[2], plans[3], (2, 3), 5)
        assert (found.peak, found.parts, found.peak_at) == (plans[5].peak, plans[5].parts, plans[5].peak_at)
        assert found.flops == plans[5].flops
        assert (found.parameters, found.trainable) == (plans[5].parameters, plans[5].trainable)

    @pytest.mark.parametrize("layers", [(1, 2), (3, 3)])
    def test_too_few_to_tell_are_refused(self, layers):
        empty = Plan({}, {}, 0, 0)
        with pytest.raises(InvalidInput, match="needs two different numbers from 2 up"):
            extrapolate(empty, empty, layers, 8)

    def test_the_repeated_blocks_are_found(self):
        assert len(layers_of(llama(3))) == 3
        assert layers_of(nn.Linear(2, 2)) == []


class TestFlops:
    def test_products_are_counted(self):
        """Six operations a weight and token, forward and backward, and the attention's."""
        model = llama()
        found = pf.plan(model, batch_of())
        products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
        attention = 3.5 * 4.0 * BATCH * LENGTH * LENGTH * 64 * 2
        first_dx = 0  # the embedding trains, so the first layer's input has a gradient too
        assert sum(found.flops.values()) == 6.0 * BATCH * LENGTH * products + attention - first_dx


class TestRefusals:
    def test_what_cannot_be_planned_says_why(self):
        model = llama()
        with pytest.raises(InvalidInput, match="model is int, needs an"):
            pf.plan(3, {})
        with pytest.raises(InvalidInput, match="device is 'tpu'"):
            pf.plan(model, batch_of(), device="tpu")
        with pytest.raises(InvalidInput, match="accumulation is 0"):
            pf.plan(model, batch_of(), accumulation=0)
        with pytest.raises(InvalidInput, match="put labels into the batch"):
            pf.plan(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
        with pytest.raises(InvalidInput, match="no parameter of the model trains"):
            pf.plan(model.requires_grad_(False), batch_of())

    def test_a_model_that_looks_at_values_is_named(self):
        class Looks(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3))

            def forward(self, x):
                return (self.weight * x).sum() if bool((x > 0).any()) else x.sum()

        with pytest.raises(InvalidInput, match="cannot run without values: DataDependent"):
            pf.plan(Looks(), {"x": torch.ones(3)})

    def test_no_checkpointing_to_switch_on(self):
        with pytest.raises(InvalidInput, match="Linear has no gradient checkpointing"):
            pf.plan(nn.Linear(2, 2), {"input": torch.ones(1, 2)}, gradient_checkpointing=True)
