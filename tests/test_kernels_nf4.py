"""The Triton kernels of nf4 without a GPU: run by the interpreter, compiled for each target."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from backends import INTERPRETED

TRITON_UNDER_THE_INTERPRETER = """
import itertools, torch, pyfinetune as pf
from pyfinetune.kernels import nf4 as kernel

cpu = pf.use_backend("cpu")
cpu.__enter__()
for shape, block_size, quant_type, double_quant in itertools.product(
    [(1,), (33,), (7, 65), (40, 130), (64, 128), (2, 4095), (2, 4097)], [32, 64, 4096], ["nf4", "fp4"], [False, True]
):
    packed = pf.ops.quantize_4bit(torch.randn(shape), block_size, quant_type, double_quant)
    for dtype in (torch.float32, torch.float16):  # the interpreter truncates to bfloat16 where hardware rounds
        out = torch.full(shape, float("nan"), dtype=dtype)
        kernel.dequantize_4bit(out, *packed.tensors(), block_size, packed.nested_block_size, out.numel())
        decoded = pf.ops.dequantize_4bit(packed, dtype)
        assert torch.equal(out, decoded), (shape, block_size, quant_type, dtype)
        if len(shape) == 2:  # rows further apart than they are long
            wide = torch.full((shape[0], shape[1] + 8), 77, dtype=dtype)
            kernel.dequantize_4bit(
                wide[:, : shape[1]], *packed.tensors(), block_size, packed.nested_block_size, out.numel()
            )
            assert torch.equal(wide[:, : shape[1]], decoded), (shape, block_size, quant_type, dtype)
            assert (wide[:, shape[1] :] == 77).all()
print("equal")
"""


def test_the_triton_kernel_under_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRITON_UNDER_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets, and does not compile")
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_the_triton_kernels_compile_for(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pyfinetune.kernels import nf4 as kernel

    for made in kernel.compilations(capability):
        constants = made.constants | made.config.blocks
        names = made.kernel.arg_names
        types = {name: "constexpr" if name in constants else made.signature[name] for name in names}
        # A launch finds pointers and sizes divisible by 16, without which nothing is read 16 bytes at a time.
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind != "constexpr"}
        source = ASTSource(made.kernel, types, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=made.options)
        assert compiled.metadata.shared <= 99 * 1024
        ptx = compiled.asm["ptx"]
        if made.name.startswith("decode") and not made.alternative:
            assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, made.name  # noqa: PT018


def test_blocks_next_to_a_tile_are_encoded():
    """Around the size of a program's tile, encoding is the native kernel's, bit for bit."""
    pytest.importorskip("triton")
    if not INTERPRETED:
        pytest.skip("there is no GPU to run on")
    import pyfinetune as pf
    from pyfinetune.kernels.nf4 import ENCODE

    tile = 64 * ENCODE.choose(0, 4, 64, 1 << 16).blocks["BLOCKS"]
    for numel in (tile - 1, tile, tile + 1, 2 * tile + 33):
        weight = torch.randn(numel)
        packed = {}
        for backend in ("cpu", "triton"):
            with pf.use_backend(backend):
                packed[backend] = pf.ops.quantize_4bit(weight, 64, "nf4", True)
        for ours, theirs in zip(packed["triton"].tensors(), packed["cpu"].tensors(), strict=True):
            assert torch.equal(ours, theirs)
