"""What varlen_attn takes and refuses, what its native door checks again before it takes a pointer, and forks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from attention_cases import Case, cu, make, same
from backends import DTYPES, FAST_BACKENDS, native_kernels
from oracle import Guarded

import pyfinetune as pf
from pyfinetune._native import capsule, native

EVERY_BACKEND = pytest.mark.parametrize("backend", ["cpu", "reference"])


@native_kernels
def test_the_backend_is_chosen_by_dtype_and_head_dim():
    for dtype in DTYPES:
        assert pf.explain("varlen_attn", *make([5], dtype=dtype).args()).backend == FAST_BACKENDS[0]
    for other, why in [
        (make([5], dim=20), "head_dim is 20"),
        (make([5], dim=264), "head_dim is 264"),
        (make([5], dim_v=8), "v's head_dim is 8"),
        (make([5], dtype=torch.float64), "no kernel for float64"),
    ]:
        explanation = pf.explain("varlen_attn", *other.args())
        assert explanation.backend == "reference"
        assert why in str(explanation)
        with pf.use_backend("cpu"), pytest.raises(pf.BackendUnavailable, match=why):
            other.forward()


def change(case: Case, **values):
    options = {
        key: values.pop(key) for key in list(values) if key not in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    }
    return dataclasses.replace(case, **values, options=case.options | options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"q": torch.randn(10, 64)}, r"q is \[10, 64\], needs \[total_q, num_heads, head_dim\]"),
        ({"q": torch.ones(10, 4, 64, dtype=torch.int32)}, "q is int32, needs float32 or"),
        ({"q": [1.0]}, "q is list, needs a tensor"),
        ({"q": torch.randn(10, 5, 64)}, "k has 2 heads, needs a divisor of q's 5"),
        ({"q": torch.randn(10, 1, 64)}, "k has 2 heads, needs a divisor of q's 1"),
        ({"q": torch.randn(10, 0, 64)}, r"q is \[10, 0, 64\], needs at least one head"),
        ({"k": torch.randn(10, 0, 64)}, r"k is \[10, 0, 64\], needs at least one head"),
        ({"k": torch.randn(10, 2, 32)}, "needs q's head_dim 64"),
        ({"k": torch.randn(10, 2, 64).half()}, "k is float16, needs float32"),
        ({"v": torch.randn(9, 2, 64)}, r"v is \[9, 2, 64\], needs \[10, 2\]"),
        ({"v": torch.randn(10, 4, 64)}, r"v is \[10, 4, 64\], needs \[10, 2\]"),
        ({"v": torch.randn(10, 2, 64).bfloat16()}, "v is bfloat16, needs float32"),
        ({"cu_seqlens_q": torch.tensor([0, 10])}, "cu_seqlens_q is int64, needs int32"),
        ({"cu_seqlens_q": cu([10])[None]}, r"cu_seqlens_q is \[1, 2\], needs \[documents \+ 1\]"),
        ({"cu_seqlens_k": cu([])[:0]}, r"cu_seqlens_k is \[0\], needs \[documents \+ 1\]"),
        ({"cu_seqlens_k": cu([5, 5])}, "cu_seqlens_k has 2 documents and cu_seqlens_q 1"),
        ({"cu_seqlens_k": cu([10]).to("meta")}, "cu_seqlens_k is on meta"),
        ({"window_size": (4, -2)}, r"window_size is \(4, -2\), needs"),
        ({"window_size": 4}, "window_size is 4, needs"),
        ({"window_size": (4.0, 0)}, r"window_size is \(4.0, 0\), needs"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
        ({"max_seqlen_q": -3}, "max_seqlen_q is -3"),
        ({"max_seqlen_k": 3.5}, "max_seqlen_k is 3.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(values, message):
    case = make([10], heads=(4, 2))
    with pytest.raises(pf.InvalidInput, match=f"varlen_attn: .*{message}"):
        change(case, **values).forward()


BAD_BOUNDS = {
    "starts late": ([1, 10], "starts at 1, needs 0"),
    "starts below": ([-1, 10], "starts at -1, needs 0"),
    "decreases": ([0, 7, 3, 10], "decreases at element 2"),
    "negative": ([0, -5], "decreases at element 1"),
    "too long": ([0, 4, 11], "ends at 11, beyond the 10 tokens"),
    "huge": ([0, 2**31 - 1], "ends at 2147483647, beyond the 10 tokens"),
    "out and back": ([0, 2**31 - 1, 10], "decreases at element 2"),
}


@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("bad", BAD_BOUNDS)
@EVERY_BACKEND
def test_bad_boundaries_are_named(backend, bad, side):
    values, message = BAD_BOUNDS[bad]
    case = make([10], heads=(4, 2))
    even = torch.tensor([0, *[10] * (len(values) - 1)], dtype=torch.int32)
    bounds = {"cu_seqlens_q": even, "cu_seqlens_k": even, side: torch.tensor(values, dtype=torch.int32)}
    with pf.use_backend(backend), pytest.raises(pf.InvalidInput, match=f"^varlen_attn: {side} {message}"):
        dataclasses.replace(case, **bounds).forward()
    out, lse = pf.ops.varlen_attn(*case.args(), return_lse=True)
    op = torch.ops.pyfinetune.varlen_attn_bwd
    options = (True, 0.125, -1, -1, 0.0, True, True, True)
    with pf.use_backend(backend), pytest.raises(pf.InvalidInput, match=f"^varlen_attn: {side} {message}"):
        op(out, *case.inputs(), out, lse, *bounds.values(), *options)


@pytest.mark.skipif("triton" not in FAST_BACKENDS, reason="only what never waits for a GPU cannot name them")
@pytest.mark.parametrize("bad", BAD_BOUNDS)
def test_bad_boundaries_on_the_device_stay_within_the_tensors(bad):
    from pyfinetune.kernels import varlen_attn as kernel

    bounds = torch.tensor(BAD_BOUNDS[bad][0], dtype=torch.int32)
    tensors = [Guarded((10, heads, 16), torch.float32) for heads in (4, 4, 2, 2, 4, 4, 2, 2)]
    dout, q, k, v, out, dq, dk, dv = (guarded.tensor for guarded in tensors)
    lse, options = Guarded((4, 10), torch.float32), (True, 0.25, -1, -1, 0.0)
    for x in (dout, q, k, v):
        x.normal_()
    kernel.varlen_attn(q, k, v, bounds, bounds, out, lse.tensor, *options)
    kernel.varlen_attn_bwd(dout, q, k, v, out, lse.tensor, bounds, bounds, dq, dk, dv, *options)
    for guarded in (*tensors, lse):
        guarded.check()


def test_strided_boundaries_are_read_right():
    case = make([3, 7], heads=(4, 2))
    expected = case.run()
    for layout in (torch.stack([case.cu_seqlens_q] * 2, dim=1)[:, 0], torch.cat([cu([9]), case.cu_seqlens_q])[2:]):
        assert same(dataclasses.replace(case, cu_seqlens_q=layout).run(), expected)


def native_arguments(**changes):
    """Arguments of native.varlen_attn for a small good call, with some replaced."""
    good = {
        "q": torch.randn(10, 4, 16),
        "k": torch.randn(10, 2, 16),
        "v": torch.randn(10, 2, 16),
        "cu_seqlens_q": cu([3, 7]),
        "cu_seqlens_k": cu([3, 7]),
        "out": torch.zeros(10, 4, 16),
        "lse": torch.zeros(4, 10),
    }
    tensors = [x if x is None else capsule(x) for x in (good | changes).values()]
    return (*tensors, True, 0.25, -1, -1, 0.0, 1)


NATIVE_MISTAKES = {
    "q of two dimensions": {"q": torch.randn(10, 64)},
    "q of integers": {"q": torch.ones(10, 4, 16, dtype=torch.int32)},
    "q of doubles": {"q": torch.randn(10, 4, 16, dtype=torch.float64)},
    "q with scattered rows": {"q": torch.randn(16, 10, 4).permute(1, 2, 0)},
    "k of another dtype": {"k": torch.randn(10, 2, 16).half()},
    "k with other heads": {"k": torch.randn(10, 3, 16)},
    "k with no heads": {"k": torch.randn(10, 0, 16), "v": torch.randn(10, 0, 16)},
    "k with another head_dim": {"k": torch.randn(10, 2, 24)},
    "v with other rows": {"v": torch.randn(9, 2, 16)},
    "v with other heads": {"v": torch.randn(10, 4, 16)},
    "v wider than out": {"v": torch.randn(10, 2, 24)},
    "an odd head_dim": {"q": torch.randn(10, 4, 20), "k": torch.randn(10, 2, 20)},
    "long boundaries": {"cu_seqlens_q": cu([3, 7]).long()},
    "boundaries of two dimensions": {"cu_seqlens_q": cu([3, 7])[None]},
    "no boundaries": {"cu_seqlens_q": cu([])[:0], "cu_seqlens_k": cu([])[:0]},
    "other documents in k": {"cu_seqlens_k": cu([3, 3, 4])},
    "boundaries past the rows": {"cu_seqlens_k": cu([3, 8])},
    "a short out": {"out": torch.zeros(9, 4, 16)},
    "out of another dtype": {"out": torch.zeros(10, 4, 16).half()},
    "a strided out": {"out": torch.zeros(4, 10, 16).transpose(0, 1)},
    "a short lse": {"lse": torch.zeros(4, 9)},
    "lse of doubles": {"lse": torch.zeros(4, 10, dtype=torch.float64)},
}


@native_kernels
@pytest.mark.parametrize("mistake", NATIVE_MISTAKES)
def test_the_native_door_checks_again(mistake):
    native.varlen_attn(*native_arguments())
    with pytest.raises(pf.InvalidInput, match=r"^varlen_attn: "):
        native.varlen_attn(*native_arguments(**NATIVE_MISTAKES[mistake]))


@native_kernels
@pytest.mark.parametrize(
    "change", [("dq", torch.zeros(9, 4, 16)), ("dk", torch.zeros(10, 4, 16)), ("dv", torch.zeros(10, 2, 16).half())]
)
def test_the_native_backward_checks_again(change):
    q, k, v, cu_q, cu_k, out, lse, *options = native_arguments()
    grads = {"dq": torch.zeros(10, 4, 16), "dk": torch.zeros(10, 2, 16), "dv": torch.zeros(10, 2, 16)}
    dout, wrong = capsule(torch.zeros(10, 4, 16)), grads | {change[0]: change[1]}
    with pytest.raises(pf.InvalidInput, match=r"^varlen_attn: "):
        native.varlen_attn_bwd(dout, q, k, v, out, lse, cu_q, cu_k, *map(capsule, wrong.values()), *options)


@native_kernels
def test_no_write_leaves_the_outputs_and_no_read_the_inputs():
    """Inputs lie between NaNs, which would show in the results; outputs between sentinels, which must stay."""
    case = make([65, 1, 30], dim=72, heads=(4, 2), rest=1)
    inputs = [Guarded(tuple(x.shape), x.dtype) for x in (*case.inputs(), case.dout(torch.float32))]
    for guarded, x in zip(inputs, (*case.inputs(), case.dout(torch.float32)), strict=True):
        guarded.buffer.fill_(float("nan"))
        guarded.tensor.copy_(x.detach())
    q, k, v, dout = (guarded.tensor for guarded in inputs)
    with pf.use_backend("cpu"):
        expected = case.run()
    results = [Guarded(tuple(x.shape), x.dtype) for x in expected]
    for guarded in results:
        guarded.tensor.fill_(float("nan"))
    out, lse, *grads = (capsule(guarded.tensor) for guarded in results)
    bounds, options = capsule(case.cu_seqlens_q), (True, 72**-0.5, -1, -1, 0.0, 2)
    native.varlen_attn(*map(capsule, (q, k, v)), bounds, capsule(case.cu_seqlens_q), out, lse, *options)
    saved = [capsule(guarded.tensor) for guarded in results[:2]]
    bounds = [capsule(case.cu_seqlens_q) for _ in range(2)]
    native.varlen_attn_bwd(*map(capsule, (dout, q, k, v)), *saved, *bounds, *grads, *options)
    assert same([guarded.tensor for guarded in results], expected)
    for guarded in results:
        guarded.check()


def test_a_forked_child_does_not_hang():
    """OpenMP's pool does not survive fork: data loaders that call a threaded kernel in a worker hang for ever."""
    script = (
        "import os, numpy, torch, pyfinetune as pf\n"
        "capsule, native = pf._native.capsule, pf._native.native\n"
        "q, kv, cu = torch.randn(90, 4, 64), torch.randn(90, 2, 64), torch.tensor([0, 30, 90], dtype=torch.int32)\n"
        "with pf.use_backend('cpu'):\n"
        "    expected = pf.ops.varlen_attn(q, kv, kv, cu)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    out = torch.from_numpy(numpy.zeros((90, 4, 64), numpy.float32))\n"  # torch's own kernels hang in a child
        "    lse = torch.from_numpy(numpy.zeros((4, 90), numpy.float32))\n"
        "    tensors = [capsule(x) for x in (q, kv, kv, cu, cu, out, lse)]\n"
        "    native.varlen_attn(*tensors, True, 0.125, -1, -1, 0.0, 2)\n"
        "    os._exit(0 if out.numpy().tobytes() == expected.numpy().tobytes() else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
