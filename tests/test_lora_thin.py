"""The native products of a LoRA linear whose one side is the rank: sizes, layouts, masks, dtypes, hostile arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import Guarded

import pyfinetune as pf
from pyfinetune._native import capsule, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, wide side, rank): around a vector, a block of rows, a slice of `outer`, a chain of sums, a strip.
SIZES = [(1, 1, 1), (2, 3, 2), (5, 16, 8), (13, 33, 16), (24, 64, 17), (37, 130, 5), (129, 257, 48), (300, 520, 16)]
SIZES += [(26, 100, 65), (7, 513, 130), (130, 31, 33)]


def name(value):
    return str(value).removeprefix("torch.")


def close(got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> None:
    """Within float32's rounding of the sum of magnitudes, and the result's own rounding; adapters are rounded too."""
    eps = torch.finfo(got.dtype).eps
    allowed = eps * exact.abs() + 1e-5 * scale + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - exact).abs() <= allowed).all())


def mask_of(rows: int, cols: int, p: float = 0.3, seed: int = 77, threads: int = 2):
    """The mask's bits as a tensor for the kernels, and as 0 and 1 in float64 by the dropout kernel itself."""
    n = rows * cols
    bits = torch.full(((n + 7) // 8 + 4,), 255, dtype=torch.uint8)
    native.dropout_mask(capsule(bits), n, p, seed, threads)
    dropped = torch.empty(n)
    native.dropout(capsule(torch.ones(n)), capsule(dropped), p, seed, threads)
    return bits, (dropped != 0).double().view(rows, cols)


def either_layout(matrix: torch.Tensor) -> list[torch.Tensor]:
    return [matrix, matrix.T.contiguous().T]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_products_against_float64(dtype, size, masked):
    m, k, r = size
    wide = torch.randn(m, k + 5).to(dtype)[:, :k]
    a, b = (torch.randn(shape).to(dtype) for shape in ((r, k), (k, r)))
    bits, keep = mask_of(m, k)
    bits, keep = (capsule(bits), keep) if masked else (None, torch.ones(m, k, dtype=torch.float64))
    x = wide.double() * keep
    exact, scale = 0.5 * x @ a.double().T, 0.5 * x.abs() @ a.double().abs().T
    for adapter, out_dtype in itertools.product([*either_layout(a), a.float()], {dtype, torch.float32}):
        guard = Guarded((m, r), out_dtype)
        native.thin_down(capsule(wide), capsule(adapter), capsule(guard.tensor), 0.5, bits, 2)
        close(guard.tensor, exact, scale)
        guard.check()
    s, y = torch.randn(m, r).to(dtype), torch.randn(m, k).to(dtype)
    update = 0.5 * keep * (s.double() @ b.double().T)
    exact, scale = y.double() + update, y.double().abs() + 0.5 * s.double().abs() @ b.double().abs().T
    for adapter in [*either_layout(b), b.float()]:
        guard = Guarded((m, k), dtype)
        guard.tensor.copy_(y)
        native.thin_up(capsule(s), capsule(adapter), capsule(guard.tensor), capsule(guard.tensor), 0.5, bits, None, 2)
        close(guard.tensor, exact, scale)
        guard.check()
    exact, scale = 0.5 * s.double().T @ x, 0.5 * s.double().abs().T @ x.abs()
    for transposed, out_dtype in itertools.product((False, True), {dtype, torch.float32}):
        guard = Guarded((k, r) if transposed else (r, k), out_dtype)
        out = guard.tensor.T if transposed else guard.tensor
        native.thin_outer(capsule(s), capsule(wide), capsule(out), 0.5, bits, 2)
        close(out, exact, scale)
        guard.check()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dora_against_float64(dtype, size):
    m, k, r = size
    z, base, dout = (torch.randn(m, k).to(dtype) for _ in range(3))
    s, b, bias = torch.randn(m, r).to(dtype), torch.randn(k, r).to(dtype), torch.randn(k).to(dtype)
    factor = torch.rand(k) + 0.5
    outs = [Guarded((m, k), dtype), Guarded((m, k), dtype)]
    parts = (capsule(factor), capsule(base), capsule(bias), capsule(outs[1].tensor))
    native.thin_up(capsule(s), capsule(b), capsule(z), capsule(outs[0].tensor), 0.5, None, parts, 2)
    inner = z.double()
    full = inner + 0.5 * s.double() @ b.double().T
    scale = inner.abs() + 0.5 * s.double().abs() @ b.double().abs().T
    close(outs[1].tensor, full, scale)
    close(outs[0].tensor, base.double() - inner + factor.double() * full + bias.double(), 4 * scale + 20)
    g, dz = Guarded((m, k), dtype), Guarded((k,), torch.float32)
    native.dora_grad(capsule(dout), capsule(z), capsule(factor), capsule(g.tensor), capsule(dz.tensor), 2)
    close(g.tensor, dout.double() * factor.double(), torch.zeros(1))
    products = dout.double() * z.double()
    close(dz.tensor, products.sum(0), products.abs().sum(0))
    for guard in (*outs, g, dz):
        guard.check()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_norms_against_float64(dtype, size):
    n, k, r = size
    w, a, b = torch.randn(n, k).to(dtype), torch.randn(r, k).to(dtype), torch.randn(n, r) * 0.1
    gram, norms = torch.empty(r, r), Guarded((n,), torch.float32)
    native.thin_down(capsule(a), capsule(a), capsule(gram), 1.0, None, 2)
    native.dora_norms(capsule(w), capsule(a), capsule(b), capsule(gram), 0.7, capsule(norms.tensor), 2)
    update = 0.7 * b.double() @ a.double()
    exact = (w.double() + update).norm(dim=1)
    # The squares are sums of this size, which may cancel.
    size_of_terms = w.double().norm(dim=1) + 0.7 * b.double().abs() @ a.double().norm(dim=1)
    error = (norms.tensor.double() ** 2 - exact**2).abs()
    assert bool((error <= 1e-5 * size_of_terms**2).all())
    norms.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_results_do_not_depend_on_the_thread_count(dtype):
    m, k, r = 301, 530, 20
    x, s, a, b = torch.randn(m, k), torch.randn(m, r), torch.randn(r, k), torch.randn(k, r)
    x, s = x.to(dtype), s.to(dtype)
    factor, gram = torch.rand(k), torch.randn(r, r)
    results = []
    for threads in (1, 2, 3):
        bits, _ = mask_of(m, k, threads=threads)
        down, up, outer = torch.empty(m, r, dtype=dtype), x.clone(), torch.empty(r, k)
        g, dz, norms = torch.empty_like(x), torch.empty(k), torch.empty(k)
        native.thin_down(capsule(x), capsule(a), capsule(down), 1.0, capsule(bits), threads)
        native.thin_up(capsule(s), capsule(b), capsule(up), capsule(up), 1.0, capsule(bits), None, threads)
        native.thin_outer(capsule(s), capsule(x), capsule(outer), 1.0, capsule(bits), threads)
        native.dora_grad(capsule(x), capsule(x.clone()), capsule(factor), capsule(g), capsule(dz), threads)
        w = x.T.contiguous()
        native.dora_norms(
            capsule(w), capsule(a[:, :m].contiguous()), capsule(b), capsule(gram), 1.0, capsule(norms), threads
        )
        results.append((bits[:-4], down, up, outer, g, dz, norms))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_a_dropped_infinity_is_dropped():
    """The mask selects: zero times infinity would be NaN."""
    m, k = 4, 64
    bits, keep = mask_of(m, k, p=0.5)
    x = torch.where(keep == 0, float("inf"), 1.0).float()
    s, outer = torch.empty(m, 3), torch.empty(3, k)
    native.thin_down(capsule(x), capsule(torch.ones(3, k)), capsule(s), 1.0, capsule(bits), 1)
    assert torch.equal(s, keep.sum(1, keepdim=True).float().expand(m, 3))
    native.thin_outer(capsule(torch.ones(m, 3)), capsule(x), capsule(outer), 1.0, capsule(bits), 1)
    assert torch.equal(outer, keep.sum(0).float().expand(3, k))


def test_empty_sides():
    outer, s = torch.full((3, 5), 7.0), torch.full((4, 3), 7.0)
    native.thin_outer(capsule(torch.empty(0, 3)), capsule(torch.empty(0, 5)), capsule(outer), 1.0, None, 2)
    assert not outer.any()
    native.thin_down(capsule(torch.empty(4, 0)), capsule(torch.empty(3, 0)), capsule(s), 1.0, None, 2)
    assert not s.any()
    y = torch.ones(4, 5)
    native.thin_up(capsule(torch.empty(4, 0)), capsule(torch.empty(5, 0)), capsule(y), capsule(y), 1.0, None, None, 2)
    assert torch.equal(y, torch.ones(4, 5))


def hostile():
    x, a, s, y = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2), torch.randn(4, 6)
    b, out, mask = torch.randn(6, 2), torch.randn(2, 6), torch.zeros(7, dtype=torch.uint8)
    f, gram, norms = torch.randn(6), torch.randn(2, 2), torch.randn(4)
    strided = torch.randn(6, 4)[::2, ::2]
    down, up, outer, norm, grad = (
        native.thin_down,
        native.thin_up,
        native.thin_outer,
        native.dora_norms,
        native.dora_grad,
    )
    yield down, (x, torch.randn(2, 5), s, 1.0, None, 1), "lora_a has another shape"
    yield down, (x, a, torch.randn(3, 2), 1.0, None, 1), "s has another shape"
    yield down, (x, a, s.half(), 1.0, None, 1), "s is float16"
    yield down, (x.T, a, s, 1.0, None, 1), "x has rows that are not contiguous"
    yield down, (x[:1].expand(4, 6), a, s, 1.0, None, 1), "overlapping rows"
    yield down, (x, a, s, 1.0, mask[:-1], 1), "mask has 6 elements"
    yield down, (x.double(), a, s, 1.0, None, 1), "x is float64"
    yield down, (torch.randn(4, 2), strided[:, :2], torch.randn(4, 3), 1.0, None, 1), "contiguous along neither side"
    yield up, (s, b, y, y[:3], 1.0, None, None, 1), "another shape"
    yield up, (s, torch.randn(5, 2), y, y, 1.0, None, None, 1), "lora_b has another shape"
    yield up, (s, b, y.half(), y, 1.0, None, None, 1), "the base term is float16"
    yield up, (s, b, y, y, 1.0, None, (f[:5], None, None, None), 1), "factor has 5 elements"
    yield up, (s, b, y, y, 1.0, None, (f, y[:3], None, None), 1), "base has another shape"
    yield up, (s, b, y, y, 1.0, None, (f, None, f[:2], None), 1), "bias has 2 elements"
    yield up, (s, b, y, y, 1.0, None, (f, None), 1), "is not"
    yield outer, (s, x[:3], out, 1.0, None, 1), "x has another shape"
    yield outer, (s, x.half(), out, 1.0, None, 1), "t is float32"
    yield outer, (s, x, out[:1], 1.0, None, 1), "the gradient has another shape"
    yield outer, (s, x, out[:1].expand(2, 6), 1.0, None, 1), "contiguous along neither side"
    yield norm, (x, a, torch.randn(3, 2), gram, 1.0, norms, 1), "lora_b has another shape"
    yield norm, (x, a, s, gram[:1], 1.0, norms, 1), "gram has 2 elements"
    yield norm, (x, a, s, gram, 1.0, norms[:3], 1), "norm has 3 elements"
    yield grad, (y, y[:3], f, y, f, 1), "z has 18 elements"
    yield grad, (y, y, f, y, None, 1), "go together"
    yield grad, (y, None, f[:2], y, None, 1), "factor has 2 elements"
    yield native.dropout_mask, (mask, 25, 0.5, 1, 1), "mask has 7 elements"
    yield native.dropout_mask, (mask, 24, 1.0, 1, 1), "outside"
    yield native.dropout_mask, (mask, -1, 0.5, 1, 1), "size"


def test_the_binding_checks_everything_again():
    for function, args, message in hostile():

        def given(value):
            if isinstance(value, tuple):
                return tuple(given(v) for v in value)
            return capsule(value) if isinstance(value, torch.Tensor) else value

        with pytest.raises(pf.InvalidInput, match=message):
            function(*(given(value) for value in args))
