"""The choice of a backend, the choice of an instruction set, and the native module's own door."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pyfinetune as pf
from pyfinetune._native import capsule, native
from pyfinetune.ops import nf4
from pyfinetune.ops._op import REGISTRY


def test_cuda_asked_for_without_a_gpu_says_so():
    packed = pf.ops.quantize_4bit(torch.randn(64))
    with pf.use_backend("cuda"), pytest.raises(pf.BackendUnavailable, match="backend 'cuda' cannot run here"):
        pf.ops.dequantize_4bit(packed)
    with pytest.raises(pf.InvalidInput, match="'gpu' is no backend"), pf.use_backend("gpu"):
        pass


def test_a_forced_instruction_set_that_does_not_exist_is_refused():
    run = subprocess.run(
        [sys.executable, "-c", "import torch, pyfinetune as pf; pf.ops.quantize_4bit(torch.randn(64))"],
        env={**os.environ, "PYFINETUNE_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "BackendUnavailable: PYFINETUNE_CPU_ISA=avx1024: this machine can run" in run.stderr


def test_explain_names_the_backend_and_the_reasons():
    packed = pf.ops.quantize_4bit(torch.randn(64))
    explanation = pf.explain("dequantize_4bit", packed)
    assert explanation.backend == "cpu"
    reasons = {choice.backend: choice.reason for choice in explanation.choices}
    assert reasons["cpu"] is None
    assert reasons["triton"] == "a tensor is on cpu"
    with pf.use_backend("reference"):
        assert pf.explain("dequantize_4bit", packed).backend == "reference"
    with pytest.raises(pf.InvalidInput, match="'nope' is no op"):
        pf.explain("nope")


def test_a_forked_child_does_not_hang():
    script = (
        "import os, numpy, torch, pyfinetune as pf\n"
        "w = torch.randn(512, 512)\n"
        "packed = pf.ops.quantize_4bit(w)\n"
        "expected = pf.ops.dequantize_4bit(packed)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    same = pf._native.native.in_forked_child()\n"
        "    fields = pf.ops.nf4.packed_fields(packed.tensors(), 64, 0)\n"
        "    out = torch.from_numpy(numpy.zeros((512, 512), numpy.float32))\n"  # torch's own kernels hang in a child
        "    pf._native.native.dequantize_4bit(fields, 512, 512, 0, 0, pf._native.capsule(out), 2, False)\n"
        "    os._exit(0 if same and out.numpy().tobytes() == expected.numpy().tobytes() else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_native_door_checks_again():
    """The C++ side does not rely on Python's checks: dtype, size and contiguity are tested at the boundary."""
    packed = pf.ops.quantize_4bit(torch.randn(64, 128))
    out = torch.empty(64, 128)
    short = (*(None if t is None else capsule(t) for t in (packed.codes[:5], *packed.tensors()[1:])), 64, 0)
    with pytest.raises(pf.InvalidInput, match="codes has 5 elements, needs 4096"):
        native.dequantize_4bit(short, 64, 128, 0, 0, capsule(out), 1, False)
    fields = nf4.packed_fields(packed.tensors(), 64, 0)
    with pytest.raises(pf.InvalidInput, match="out reaches past the weight"):
        native.dequantize_4bit(fields, 64, 128, 1, 0, capsule(out), 1, False)
    with pytest.raises(pf.InvalidInput, match="not a DLPack capsule"):
        native.dequantize_4bit(fields, 64, 128, 0, 0, out, 1, False)
    with pytest.raises(pf.InvalidInput, match="size overflows 64 bits"):
        native.dequantize_4bit(fields, 2**40, 2**40, 0, 0, capsule(out), 1, False)
    with pytest.raises(pf.InvalidInput, match="block_size is less than 32"):
        native.quantize_4bit(capsule(torch.zeros(64)), "nf4", 1, capsule(out), capsule(out), 1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("registered", [False, True], ids=["public", "registered"])
def test_a_second_derivative_is_refused(backend, registered):
    """What backward reads from saved results carries no graph: a silent second derivative would be a wrong one."""
    x, a, b = torch.randn(5, 64), torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    packed = pf.ops.quantize_4bit(torch.randn(16, 64))
    op = REGISTRY["lora_linear"]
    with pf.use_backend(backend):
        args = op.prepare(x, packed, a, b, 0.5)
        y = (op.overload(*args) if registered else op(*args))[0]
        (d_lora_b,) = torch.autograd.grad(y.square().sum(), b, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            d_lora_b.square().sum().backward()
