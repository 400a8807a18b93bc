"""Every configuration that a measurement could choose gives the right result, and measuring leaves it right."""

from __future__ import annotations

import importlib

import pytest
import torch
from backends import INTERPRETED
from oracle import BACKWARD, assert_as_good_as

import pyfinetune as pf

pytest.importorskip("triton")
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from pyfinetune.bench.compilations import kernel_modules
from pyfinetune.kernels import config as kernel_config

DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
ROWS, WIDTH, OUT, RANK = 70, 96, 160, 5


def _lora(weight_of, **options):
    def call(x, a, b):
        return pf.ops.lora_linear(x, weight_of(x), a, b, 0.5, **options)

    return call, [(ROWS, WIDTH), (RANK, WIDTH), (OUT, RANK)]


def _dense(x):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(OUT, WIDTH, generator=generator).to(x.device, x.dtype)


def _packed(x):
    with pf.use_backend("reference"):
        return pf.ops.quantize_4bit(_dense(x.float()), 64, "nf4", True)


def _dora(x, a, b, magnitude):
    return pf.ops.lora_linear(x, _packed(x), a, b, 0.5, magnitude=magnitude)


def _loss(hidden, weight):
    labels = torch.arange(hidden.shape[0], device=hidden.device) % weight.shape[0]
    return pf.ops.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def _attention(q, k, v):
    cu_seqlens = torch.tensor([0, 30, ROWS], dtype=torch.int32, device=q.device)
    return pf.ops.varlen_attn(q, k, v, cu_seqlens)


def _angles(q):
    angles = torch.outer(torch.arange(ROWS), 10000 ** -torch.linspace(0, 1, 16)).repeat(1, 2).to(q.device)
    return angles.cos(), angles.sin()


CASES = {
    "lora_linear dense": _lora(_dense),
    "lora_linear packed": _lora(_packed),
    "lora_linear dropout": _lora(_packed, dropout_p=0.25, seed=7),
    "lora_linear DoRA": (_dora, [(ROWS, WIDTH), (RANK, WIDTH), (OUT, RANK), (OUT,)]),
    "rms_norm": (pf.ops.rms_norm, [(ROWS, 300), (300,)]),
    "rms_norm wide": (pf.ops.rms_norm, [(1, 17000), (17000,)]),
    "glu": (pf.ops.swiglu, [(ROWS, WIDTH), (ROWS, WIDTH)]),
    "varlen_attn": (_attention, [(ROWS, 4, 32), (ROWS, 2, 32), (ROWS, 2, 32)]),
    "rope": (lambda q, k: pf.ops.rope(q, k, *_angles(q))[0], [(ROWS, 4, 32), (ROWS, 2, 32)]),
}
if not INTERPRETED:  # it has one configuration there
    CASES["linear_cross_entropy"] = _loss, [(ROWS, WIDTH), (300, WIDTH)]


def _run(call, inputs, backend):
    with pf.use_backend(backend):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        result = call(*leaves)
        dout = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(result)
        grads = torch.autograd.grad(result, leaves, dout, allow_unused=True)
    return [result, *(grad for grad in grads if grad is not None)]


@pytest.fixture
def _unknown(monkeypatch):
    """Nothing is known of any kernel before."""
    for module in kernel_modules():
        importlib.import_module(f"pyfinetune.kernels.{module}")
    for family in kernel_config.FAMILIES.values():
        monkeypatch.setattr(family, "_known", {})
    monkeypatch.setattr(kernel_config, "_remembered", [])
    monkeypatch.setattr(kernel_config, "_tables", list)
    monkeypatch.delenv("PYFINETUNE_AUTOTUNE_FILE", raising=False)


@pytest.mark.parametrize("place", [1, 2, 3])  # the first is what all other tests launch
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_unknown")
def test_each_is_right(monkeypatch, name, place):
    def measured(configs, launch, clock):
        for config in configs[: place + 1]:
            launch(config)  # as a measurement does, before the call itself
        return configs[min(place, len(configs) - 1)], 1.0

    monkeypatch.setattr(kernel_config, "_fastest", measured)
    call, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for shape in shapes]
    with kernel_config.autotuning(clock=lambda launch: 1.0):
        found = _run(call, inputs, "triton")
    assert kernel_config.remembered()
    eager, exact = _run(call, inputs, "reference"), _run(call, [t.double() for t in inputs], "reference")
    for i, parts in enumerate(zip(found, eager, exact, strict=True)):
        assert_as_good_as(*parts, BACKWARD, f"{name} {i}")


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.usefixtures("_unknown")
def test_each_has_the_same_codes_and_values(monkeypatch, place):
    monkeypatch.setattr(kernel_config, "_fastest", lambda configs, *rest: (configs[min(place, len(configs) - 1)], 1.0))
    weight = torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    with pf.use_backend("reference"):
        wanted = pf.ops.quantize_4bit(weight, 64, "nf4", True)
        values = pf.ops.dequantize_4bit(wanted)
    with pf.use_backend("triton"), kernel_config.autotuning(clock=lambda launch: 1.0):
        packed = pf.ops.quantize_4bit(weight, 64, "nf4", True)
        assert torch.equal(packed.codes, wanted.codes)
        assert torch.equal(pf.ops.dequantize_4bit(packed), values)
    assert {entry["kernel"] for entry in kernel_config.remembered()} == {"nf4_encode", "nf4_decode"}
