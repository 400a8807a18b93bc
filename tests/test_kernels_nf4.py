"""The Triton kernel of nf4 without a GPU: run by the interpreter, compiled for each target."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TRITON_UNDER_THE_INTERPRETER = """
import itertools, torch, pyfinetune as pf
from pyfinetune.kernels import nf4 as kernel

for shape, block_size, quant_type, double_quant in itertools.product(
    [(1,), (33,), (7, 65), (40, 130), (64, 128)], [32, 64, 1024], ["nf4", "fp4"], [False, True]
):
    packed = pf.ops.quantize_4bit(torch.randn(shape), block_size, quant_type, double_quant)
    for dtype in (torch.float32, torch.float16):  # the interpreter truncates to bfloat16 where hardware rounds
        out = torch.full(shape, float("nan"), dtype=dtype)
        kernel.dequantize_4bit(out, *packed.tensors(), block_size, packed.nested_block_size, out.numel())
        assert torch.equal(out, pf.ops.dequantize_4bit(packed, dtype)), (shape, block_size, quant_type, dtype)
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


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_the_triton_kernel_compiles_for(capability, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pyfinetune.kernels import nf4 as kernel

    pointers = ["out_ptr", "codes_ptr", "absmax_ptr", "quant_map_ptr"]
    pointers += ["nested_absmax_ptr", "nested_map_ptr", "nested_offset_ptr"]
    types = dict(zip(pointers, ["*bf16", "*u8", "*u8", *["*fp32"] * 4], strict=True)) | {"numel": "i64"}
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "NESTED": True, "BYTES": 1024}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel._dequantize_4bit_kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared <= 99 * 1024
    assert len(compiled.asm["cubin"]) > 0
