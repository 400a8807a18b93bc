"""Counter-based dropout: one generator, the same bits everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import DTYPES as KERNEL_DTYPES
from backends import FAST_BACKENDS

from pyfinetune._native import capsule, native
from pyfinetune.ops._philox import dropout, random_words

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_dropout_mask_is_the_same_on_every_backend():
    for dtype, shape in itertools.product(DTYPES, [(1, 1), (3, 5), (64, 65), (200, 97)]):
        x = torch.randn(shape).to(dtype)
        for p, seed in ((0.1, 0), (0.5, 2**40 + 3), (0.9, 2**62)):
            expected = dropout(x, p, torch.tensor(seed))
            out = torch.empty_like(x)
            native.dropout(capsule(x), capsule(out), p, seed, 2)
            assert torch.equal(out, expected)


@pytest.mark.skipif("triton" not in FAST_BACKENDS, reason="it is about the Triton kernels")
def test_the_mask_of_the_triton_kernels_is_the_same():
    """Tiles of whole counters and tiles that start inside one; seeds of one word and of two."""
    from pyfinetune.kernels import lora_linear as kernels

    for dtype, shape in itertools.product(KERNEL_DTYPES, [(1, 1), (3, 5), (65, 260), (70, 131)]):
        x = torch.randn(shape).to(dtype)
        for p, seed in ((0.1, 0), (0.5, 2**40 + 3), (0.9, 2**62), (2**-32, 5), (0.3, -7)):
            seed = torch.tensor(seed)
            expected = dropout(x, p, seed)
            mask, out = kernels.Dropout(seed, p), torch.empty_like(x)
            kernels.up(out, None, None, mask.scale, inner=x, dropout=mask)
            assert torch.equal(out, expected)
            s, copy = x.new_empty((shape[0], 2)), torch.empty_like(x)
            kernels.down_dropped(x, x[:1].expand(2, -1), s, mask, copy)
            assert torch.equal(copy, expected)


def test_random_words_are_philox():
    """Known answers of Philox 4x32-10, from the generator's published test vectors (counter 0, key 0)."""
    assert [hex(word) for word in random_words(torch.tensor(0), 4).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_it_should(p):
    words = dropout(torch.ones(1000, 1000), p, torch.tensor(9))
    kept = (words != 0).float().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert abs(words.mean().item() - 1) < 0.01


def test_dropped_infinities_do_not_spread():
    """A mask that multiplies turns a dropped infinity into NaN; this one selects."""
    x = torch.full((1, 64), float("inf"))
    assert not dropout(x, 0.5, torch.tensor(3)).isnan().any()
    out = torch.empty_like(x)
    native.dropout(capsule(x), capsule(out), 0.5, 3, 1)
    assert not out.isnan().any()
