"""Packing: rows are full, documents are whole, and no document touches another, proved to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_model import make_model

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train.data.packing import RowDataset, check_isolation, collate, is_flat, one_a_row, pack
from pyfinetune.train.data.tokenizing import Document
from pyfinetune.train.model import add_adapters


def document(length: int, seed: int = 0, vocab: int = 400) -> Document:
    learned = np.ones(length, dtype=bool)
    learned[:1] = False
    return Document(np.random.default_rng(seed).integers(1, vocab, length).astype(np.int32), learned)


def documents(*lengths: int) -> list[Document]:
    return [document(length, seed) for seed, length in enumerate(lengths)]


def per_token_loss(model, batch) -> torch.Tensor:
    """Loss of every target, float32 [rows, length - 1]; 0 where nothing is learned."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
    )


def test_rows_hold_whole_documents_and_are_nearly_full():
    rng = np.random.default_rng(0)
    docs = [document(int(length), seed) for seed, length in enumerate(rng.integers(2, 65, 300))]
    rows = pack(docs, 64)
    assert sorted(id(d) for row in rows for d in row) == sorted(map(id, docs))
    assert all(sum(map(len, row)) <= 64 for row in rows)
    assert len(rows) <= 1.05 * sum(map(len, docs)) / 64 + 1
    assert [[id(d) for d in row] for row in pack(docs, 64)] == [[id(d) for d in row] for row in rows]


def test_best_fit_fills_the_fullest_row_that_has_room():
    lengths = [[len(d) for d in row] for row in pack(documents(7, 6, 4, 3), 10)]
    assert lengths == [[7, 3], [6, 4]]


def test_documents_without_a_target_are_left_out_and_longer_ones_refused():
    nothing = Document(np.arange(4, dtype=np.int32), np.zeros(4, dtype=bool))
    assert [len(row) for row in pack([nothing, *documents(4)], 8)] == [1]
    assert len(one_a_row([nothing, *documents(4, 5)])) == 2
    assert pack([], 8) == []
    with pytest.raises(UserError, match="a document has 9 tokens and a row 8"):
        pack(documents(9), 8)


def test_a_packed_batch():
    first, second, third = documents(3, 2, 4)
    batch = collate([[first, second], [third]], pad_token_id=9, max_length=8)
    assert batch["input_ids"].tolist() == [
        [*first.input_ids, *second.input_ids, 9, 9, 9],
        [*third.input_ids, 9, 9, 9, 9],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["labels"][0].tolist() == [-100, *first.input_ids[1:], -100, second.input_ids[1], -100, -100, -100]
    assert batch["num_tokens"] == 9
    assert "attention_mask" not in batch


def test_single_documents_need_no_mask():
    """Positions that run on into the padding let attention take its causal fast path."""
    batch = collate([[d] for d in documents(3, 5)], pad_token_id=0)
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    assert (batch["labels"][0, 3:] == -100).all()
    # Learned positions end at max_length: padding may not run past them.
    assert collate([[d] for d in documents(3, 5)], 0, max_length=6)["input_ids"].shape == (2, 6)


def test_a_flat_batch_has_one_row_and_no_padding():
    batch = collate([documents(3, 2), documents(4)], pad_token_id=0, flat=True)
    assert batch["input_ids"].shape == (1, 9)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert is_flat("flash_attention_2")
    assert not is_flat("sdpa")
    assert not is_flat(None)


def test_row_dataset():
    rows = pack(documents(3, 2), 8)
    dataset = RowDataset(rows)
    assert len(dataset) == 1
    assert dataset[0] is rows[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_no_bit_of_a_document_moves_when_another_changes(attention, layout, dtype, method):
    """Named regression: packing that trains across documents. Losses and input gradients are compared bit for bit."""
    model = make_model().to(dtype)
    model.set_attn_implementation(attention)
    if method == "qlora":
        model = add_adapters(pf.quantize(model), r=4)
        assert pf.patch(model).swapped > 14
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # a fresh adapter adds nothing
                torch.nn.init.normal_(parameter, std=0.1)
    first, second, third, other_row = documents(9, 14, 5, 20)
    changed = Document((second.input_ids + 7) % 399 + 1, second.learned)
    losses, gradients = [], []
    for middle in (second, changed):
        batch = collate([[first, middle, third], [other_row]], pad_token_id=0, flat=layout == "flat")
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
        )
        losses.append(loss.detach().flatten())
        gradients.append(torch.autograd.grad(loss.sum(), embedded)[0].flatten(0, 1))
    # Target t is predicted at t - 1: the losses of the first document end one place before the second begins.
    assert torch.equal(losses[0][:8], losses[1][:8])
    assert torch.equal(losses[0][23:27], losses[1][23:27])
    assert not torch.equal(losses[0][9:22], losses[1][9:22])
    assert losses[0][8] == losses[0][22] == 0  # nothing predicts a document's first token
    for part in (slice(0, 9), slice(23, 28), slice(28, None)):
        assert torch.equal(gradients[0][part], gradients[1][part])
    assert not torch.equal(gradients[0][9:23], gradients[1][9:23])


def test_packed_losses_are_those_of_separate_documents():
    model = make_model()
    docs = documents(9, 14, 5)
    with torch.no_grad():
        packed = per_token_loss(model, collate([docs], pad_token_id=0))
        separate = [per_token_loss(model, collate([[d]], pad_token_id=0)).sum() for d in docs]
    assert torch.allclose(packed.sum(), torch.stack(separate).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_check_passes_a_model_that_keeps_documents_apart(attention):
    model = make_model().train()
    model.set_attn_implementation(attention)
    state = torch.get_rng_state()
    check_isolation(model, 400)
    check_isolation(model, 400, flat=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_check_finds_a_model_that_leaks():
    class Leaky(torch.nn.Module):
        """Adds the mean of all earlier tokens, whatever the position ids say."""

        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(50, 50)

        def forward(self, input_ids, position_ids=None, use_cache=None):
            hidden = self.embed(input_ids)
            logits = hidden + 0.1 * hidden.cumsum(1)
            return type("Output", (), {"logits": logits})

    with pytest.raises(UserError, match="lets documents in one row see each other"):
        check_isolation(Leaky(), 50)


def test_the_check_refuses_a_model_without_position_ids():
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(50, 50)

        def forward(self, input_ids):
            return self.embed(input_ids)

    with pytest.raises(UserError, match="Blind cannot keep documents in a row apart"):
        check_isolation(Blind(), 50)


def test_the_check_finds_the_leak_of_a_mask_of_ones(monkeypatch):
    """Named regression: a 2-D mask of ones switches off the separation that position ids ask for."""
    model = make_model()
    original = type(model).forward

    def with_mask(self, input_ids, **kwargs):
        return original(self, input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)

    monkeypatch.setattr(type(model), "forward", with_mask)
    with pytest.raises(UserError, match="set packing: false"):
        check_isolation(model, 400)
