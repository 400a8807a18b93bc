"""The native functions behind rms_norm, glu and rope, called directly: writes stay inside, and hostile calls raise."""

from __future__ import annotations

import pytest
import torch
from oracle import Guarded

import pyfinetune as pf
from pyfinetune._native import capsule, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", [(37, 65), (3, 7), (1, 129)], ids=str)
COS, SIN = torch.randn(1, 5, 16), torch.randn(1, 5, 16)


def capsules(values):
    return [capsule(value) if isinstance(value, torch.Tensor) else value for value in values]


def strided(*shape, dtype=torch.float32):
    """Random rows with other memory between them."""
    return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., : shape[-1]]


def first_key(change):
    return next(iter(change))


@every_dtype
@every_shape
def test_rms_norm_writes_inside_its_results(shape, dtype):
    x, weight = strided(*shape, dtype=dtype), torch.randn(shape[-1]).to(dtype)
    y, total, dx = (Guarded(shape, dtype) for _ in range(3))
    rstd, dweight = Guarded(shape[:1], torch.float32), Guarded(shape[1:], dtype)
    native.rms_norm(*capsules((x, weight, x, 1e-6, 0.0, y.tensor, total.tensor, rstd.tensor)), 2)
    native.rms_norm_bwd(*capsules((x, None, x, weight, rstd.tensor, 0.0, dx.tensor, dweight.tensor)), 2)
    for guarded in (y, total, dx, rstd, dweight):
        guarded.check()
    assert torch.equal(y.tensor, pf.ops.rms_norm(x, weight, residual=x)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.randn(63)},
        {"weight": torch.randn(128)[::2]},
        {"residual": torch.randn(2, 64)},
        {"residual": torch.randn(3, 64).bfloat16()},
        {"residual": None},
        {"x": torch.randn(64, 3).T},
        {"x": torch.randn(3, 64).double()},
        {"x": torch.randn(4, 64)},
        {"y": torch.randn(3, 63)},
        {"y": torch.randn(3, 128)[:, :64]},
        {"sum": torch.randn(2, 64)},
        {"sum": None},
        {"rstd": torch.randn(2)},
        {"rstd": torch.randn(3).bfloat16()},
    ],
    ids=first_key,
)
def test_rms_norm_checks_again(change):
    call = {"x": torch.randn(3, 64), "weight": torch.randn(64), "residual": torch.randn(3, 64), "eps": 1e-6}
    call |= {"offset": 0.0, "y": torch.empty(3, 64), "sum": torch.empty(3, 64), "rstd": torch.empty(3)}
    with pytest.raises(pf.InvalidInput, match="rms_norm: "):
        native.rms_norm(*capsules((call | change).values()), 2)


@pytest.mark.parametrize(
    "change",
    [
        {"dout": torch.randn(3, 63)},
        {"dout": torch.randn(3, 64).half()},
        {"dsum": torch.randn(4, 64)},
        {"x": torch.randn(2, 64)},
        {"rstd": torch.randn(4)},
        {"dx": torch.randn(3, 65)},
        {"dweight": torch.randn(63)},
        {"dweight": torch.randn(64).half()},
    ],
    ids=first_key,
)
def test_rms_norm_bwd_checks_again(change):
    call = {"dout": torch.randn(3, 64), "dsum": torch.randn(3, 64), "x": torch.randn(3, 64)}
    call |= {"weight": torch.randn(64), "rstd": torch.randn(3), "offset": 0.0}
    call |= {"dx": torch.empty(3, 64), "dweight": torch.empty(64)}
    with pytest.raises(pf.InvalidInput, match="rms_norm: "):
        native.rms_norm_bwd(*capsules((call | change).values()), 2)


@every_dtype
@every_shape
def test_glu_writes_inside_its_results(shape, dtype):
    gate, up, dout = (strided(*shape, dtype=dtype) for _ in range(3))
    out, dgate, dup = (Guarded(shape, dtype) for _ in range(3))
    native.glu(*capsules((gate, up, 0, out.tensor)), 2)
    native.glu_bwd(*capsules((dout, gate, up, 0, dgate.tensor, dup.tensor)), 2)
    for guarded in (out, dgate, dup):
        guarded.check()
    assert torch.equal(out.tensor, pf.ops.swiglu(gate, up))


@pytest.mark.parametrize(
    "change",
    [
        {"up": torch.randn(3, 63)},
        {"up": torch.randn(64)},
        {"up": torch.randn(64, 3).T},
        {"up": torch.randn(3, 64).bfloat16()},
        {"gate": torch.randn(3, 64).double()},
        {"gate": torch.ones(3, 64, dtype=torch.int32)},
        {"activation": 3},
        {"activation": -1},
        {"out": torch.randn(3, 63)},
        {"out": torch.randn(3, 64).bfloat16()},
        {"out": torch.randn(3, 128)[:, :64]},
    ],
    ids=first_key,
)
def test_glu_checks_again(change):
    call = {"gate": torch.randn(3, 64), "up": torch.randn(3, 64), "activation": 0, "out": torch.empty(3, 64)}
    with pytest.raises(pf.InvalidInput, match="glu: "):
        native.glu(*capsules((call | change).values()), 2)


@pytest.mark.parametrize(
    "change",
    [{"dout": torch.randn(2, 64)}, {"up": torch.randn(3, 1)}, {"dgate": torch.randn(64)}, {"dup": torch.randn(3, 65)}],
    ids=first_key,
)
def test_glu_bwd_checks_again(change):
    call = {"dout": torch.randn(3, 64), "gate": torch.randn(3, 64), "up": torch.randn(3, 64), "activation": 1}
    call |= {"dgate": torch.empty(3, 64), "dup": torch.empty(3, 64)}
    with pytest.raises(pf.InvalidInput, match="glu: "):
        native.glu_bwd(*capsules((call | change).values()), 2)


@every_dtype
@pytest.mark.parametrize(("shape", "rotary_dim"), [((2, 3, 5, 22), 10), ((1, 1, 37, 34), 34)], ids=str)
def test_rope_writes_inside_its_results(shape, rotary_dim, dtype):
    q, cos, sin = (
        strided(*shape, dtype=dtype),
        torch.randn(1, shape[2], rotary_dim),
        torch.randn(1, shape[2], rotary_dim),
    )
    q_out, k_out = Guarded(shape, dtype), Guarded(shape, dtype)
    native.rope(*capsules((q, q, cos, sin, q_out.tensor, k_out.tensor)), False, 2)
    q_out.check()
    k_out.check()
    assert torch.equal(q_out.tensor, pf.ops.rope(q, q, cos, sin)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(2, 4, 5, 16).double()},
        {"q": torch.randn(5, 16)},
        {"q": torch.randn(2, 4, 16, 5).mT},
        {"k": torch.randn(2, 2, 6, 16)},
        {"k": torch.randn(2, 2, 5, 16).half()},
        {"cos": COS.expand(3, 5, 16)},
        {"cos": COS[..., :15], "sin": SIN[..., :15]},
        {"cos": COS.repeat(1, 1, 2), "sin": SIN.repeat(1, 1, 2)},
        {"cos": COS[0]},
        {"sin": SIN[:, :4]},
        {"sin": SIN.half()},
        {"q_out": torch.empty(2, 3, 5, 16)},
        {"k_out": torch.empty(2, 2, 5, 16).half()},
        {"k_out": torch.empty(2, 2, 16, 5).mT},
    ],
    ids=first_key,
)
def test_rope_checks_again(change):
    call = {"q": torch.randn(2, 4, 5, 16), "k": torch.randn(2, 2, 5, 16), "cos": COS, "sin": SIN}
    call |= {"q_out": torch.empty(2, 4, 5, 16), "k_out": torch.empty(2, 2, 5, 16)}
    with pytest.raises(pf.InvalidInput, match="rope: "):
        native.rope(*capsules((call | change).values()), False, 2)


@every_dtype
@pytest.mark.parametrize("cols", [2048, 2040, 2031])
def test_large_results_that_go_past_the_caches(cols, dtype):
    """From 8 MiB on results are streamed, where their rows are aligned; the numbers are the same row by row."""
    rows = -(-(8 << 20) // (cols * dtype.itemsize))
    x, residual, dout = (torch.randn(rows, cols).to(dtype) for _ in range(3))
    some = slice(rows - 40, rows)
    leaves = [t.requires_grad_() for t in (x, residual)]
    weight = torch.randn(cols).to(dtype)
    tables = [torch.randn(rows, cols // 32 * 32) for _ in range(2)]

    def everything(rows):
        inputs = [t.detach()[rows].requires_grad_() for t in leaves]
        q = [t[:, None] for t in inputs]
        results = [
            pf.ops.rms_norm(inputs[0], weight),
            pf.ops.swiglu(*inputs),
            *(y[:, 0] for y in pf.ops.rope(*q, *(table[rows] for table in tables))),
        ]
        grads = [torch.autograd.grad(y, inputs, dout[rows], True, allow_unused=True) for y in results]
        return [*results, *(g for pair in grads for g in pair if g is not None)]

    assert all(y.numel() * dtype.itemsize >= 8 << 20 for y in everything(slice(None)))
    for large, small in zip(everything(slice(None)), everything(some), strict=True):
        assert torch.equal(large[some], small)
