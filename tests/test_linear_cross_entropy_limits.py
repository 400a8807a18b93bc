"""Op linear_cross_entropy at its limits: extreme numbers, the memory it may hold, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED, native_kernels
from cross_entropy_cases import IGNORED, LargestAllocation, make, name
from oracle import BACKWARD, FORWARD, Guarded, assert_as_good_as

import pyfinetune as pf
from pyfinetune._native import capsule, native
from pyfinetune.ops import _linear_cross_entropy_cpu as cpu


@pytest.fixture(autouse=True)
def _fresh_scratch():
    """Memory that is reused between calls would hide what conftest poisons."""
    cpu._scratch.buffer = None


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_large_logits_and_masked_entries(dtype):
    """Logits of +-1e4, entries that a bias of -inf excludes (whole tiles of them), a token certain of its label."""
    case = make(12, 200, 16, dtype=dtype, bias=True, workspace=64 * 12 * 4, ignored=0.2, scale=100.0)
    case.weight.data.mul_(20)
    with torch.no_grad():
        case.bias[:70], case.bias[130:] = -math.inf, -math.inf
        case.labels.copy_(torch.where(case.labels == IGNORED, IGNORED, case.labels % 60 + 70))
    for options in ({}, {"reduction": "none"}):
        case = dataclasses.replace(case, options=options)
        ours, theirs, exact = case.run(), case.plain(), case.cast(torch.float64).plain()
        for i, results in enumerate(zip(ours, theirs, exact, strict=True)):
            assert_as_good_as(*results, BACKWARD if i else FORWARD, f"output {i}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_nan_and_infinity_reach_the_loss():
    case = make(6, 300, 8, ignored=0.0, workspace=64 * 6 * 4, reduction="none", bias=True)
    hidden = case.hidden.detach().clone()
    hidden[1, 3], hidden[4, 2] = math.nan, math.inf
    loss = dataclasses.replace(case, hidden=hidden).forward()
    assert loss.isnan().tolist() == [False, True, False, False, True, False]
    case.bias.data.fill_(-math.inf)
    assert case.forward().isnan().all()
    case.bias.data[5] = math.nan
    assert case.forward().isnan().all()


def test_float16_sums_do_not_overflow():
    """A sum over a tile of the vocabulary, or over the tokens, may be beyond 65504 where the gradient is not."""
    case = make(300, 1200 if INTERPRETED else 4096, 4, dtype=torch.float16, ignored=0.0)
    with torch.no_grad():
        case.weight.fill_(60.0)
        case.hidden.fill_(1000.0 / 60)
        case.weight[0].neg_()
        case.labels.fill_(1)
    ours, exact = case.run(), case.cast(torch.float64).plain()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=1e-3)
    summed = dataclasses.replace(case, options={"reduction": "none"})
    _loss, *grads = summed.gradients(summed.forward() * 1e-4)
    _loss, *exact = dataclasses.replace(summed.cast(torch.float64), options={"reduction": "sum"}).plain()
    assert all(grad.isfinite().all() for grad in grads)


@native_kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_never_exist(reduction):
    case = make(600, 30_000, 16, dtype=torch.bfloat16, ignored=0.0, reduction=reduction).frozen()
    cpu._scratch.buffer = None
    with LargestAllocation() as tracker:
        loss = case.forward()
        torch.autograd.grad(loss, case.hidden, torch.ones_like(loss))
    assert tracker.largest < 2 * cpu.TILE_BYTES < 600 * 30_000 * 2


@native_kernels
@pytest.mark.parametrize("tokens", [1, 63, 64, 2048, 2049, 100_000])
@pytest.mark.parametrize("vocab", [1, 63, 65, 49_152, 262_144])
@pytest.mark.parametrize("workspace", [0, 1, 1000, 1 << 20, 1 << 30])
@pytest.mark.parametrize("keep", [False, True])
def test_the_plan_keeps_to_the_workspace(tokens, vocab, workspace, keep):
    plan = cpu.Plan.of(tokens, vocab, 2, workspace, keep)
    chunks, tiles = plan.chunks(tokens), plan.tiles(vocab)
    assert [i for chunk in chunks for i in chunk] == list(range(tokens))
    assert [i for tile in tiles for i in tile] == list(range(vocab))
    rows, cols = max(map(len, chunks)), max(map(len, tiles))
    assert rows <= cpu.MAX_ROWS
    assert cols <= cpu.MAX_COLS
    budget = workspace or (cpu.KEPT_BYTES if keep else cpu.TILE_BYTES)
    assert rows * (vocab if keep else cols) * 2 <= max(budget, 2 * (vocab if keep else 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(6, 7)}, r"weight is \[50, 8\], needs \[vocabulary, 7\]"),
        ({"hidden": torch.ones(6, 8, dtype=torch.int64)}, "hidden is int64, needs"),
        ({"hidden": torch.tensor(1.0)}, "hidden has no dimensions"),
        ({"weight": torch.randn(50, 8, dtype=torch.float16)}, "weight is float16, needs float32"),
        ({"weight": torch.randn(50)}, r"weight is \[50\], needs"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels is \[5\], needs \[6\]"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "labels is int32, needs int64"),
        ({"labels": torch.tensor([1, 2, IGNORED, 50, 0, 0])}, "the label of row 3 is 50, needs 0 <= label < 50"),
        ({"labels": torch.tensor([1, 2, IGNORED, -1, 0, 0])}, "the label of row 3 is -1, needs"),
        ({"bias": torch.randn(49)}, r"bias is \[49\], needs \[50\]"),
        ({"options": {"reduction": "max"}}, "reduction is 'max'"),
        ({"options": {"softcap": -1.0}}, "softcap is -1.0"),
        ({"options": {"softcap": math.nan}}, "softcap is nan"),
        ({"options": {"num_items": 3, "reduction": "sum"}}, "num_items is the denominator of reduction 'mean'"),
        ({"options": {"num_items": torch.ones(2)}}, r"num_items is \[2\], needs"),
        ({"options": {"num_items": "3"}}, "num_items is str, needs"),
        ({"workspace": 0}, "workspace_bytes is 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_wrong_arguments_are_named(backend, change, message):
    case = make(6, 50, 8)
    with pf.use_backend(backend), pytest.raises(pf.InvalidInput, match=f"linear_cross_entropy: .*{message}"):
        dataclasses.replace(case, **change).forward()


@native_kernels
@pytest.mark.parametrize("cols", [1, 15, 16, 33, 100, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_kernel_writes_beside_its_tensor(dtype, cols):
    rows = 3
    logits, out = Guarded((rows, cols), dtype), Guarded((rows, cols), dtype)
    state, total, stats = (
        Guarded((5, rows), torch.float32),
        Guarded((rows,), torch.float64),
        Guarded((2, rows), torch.float32),
    )
    sums, table = Guarded((cols,), torch.float32), Guarded((5, cols), torch.float32)
    logits.tensor.normal_()
    for guarded in (state, total, sums, table):
        guarded.tensor.zero_()
    targets, places, ones = torch.tensor([0, cols - 1, cols]), torch.tensor([4, 0, 4]), torch.ones(rows)
    handles = [capsule(t) for t in (targets, state.tensor, total.tensor, stats.tensor)]
    native.cross_entropy_tile(capsule(logits.tensor), None, handles[0], 0, 2.0, *handles[1:], True, 2)
    native.combine_rows(
        capsule(out.tensor), None, capsule(logits.tensor), capsule(ones), capsule(logits.tensor), capsule(ones), 2
    )
    native.add_rows_at(capsule(table.tensor), capsule(places), capsule(logits.tensor), capsule(ones), 2)
    native.weighted_column_sums(capsule(logits.tensor), capsule(ones), capsule(sums.tensor), 2)
    for guarded in (logits, out, state, total, stats, sums, table):
        guarded.check()


def call_tile(cols=8, **change):
    rows = 3
    values = {
        "logits": torch.randn(rows, cols),
        "bias": torch.zeros(cols),
        "targets": torch.zeros(rows, dtype=torch.int64),
        "state": torch.zeros(5, rows),
        "total": torch.zeros(rows, dtype=torch.float64),
        "stats": torch.zeros(2, rows),
    } | change
    logits, bias, targets, *rest = (capsule(t) for t in values.values())
    native.cross_entropy_tile(logits, bias, targets, 0, 0.0, *rest, True, 2)


def call_combine(**change):
    matrix, factors = torch.randn(3, 8), torch.ones(3)
    values = {"out": matrix.clone(), "rows": torch.arange(3), "x": matrix, "a": factors, "y": matrix, "b": factors}
    native.combine_rows(*(capsule(t) for t in (values | change).values()), 2)


def call_add(**change):
    values = {"out": torch.zeros(5, 8), "rows": torch.arange(3), "y": torch.randn(3, 8), "b": torch.ones(3)} | change
    native.add_rows_at(*(capsule(t) for t in values.values()), 2)


@native_kernels
@pytest.mark.parametrize(
    ("call", "change"),
    [
        (call_tile, {"cols": 4097}),
        (call_tile, {"logits": torch.zeros(3, 8, dtype=torch.int64)}),
        (call_tile, {"logits": torch.zeros(8, 3).T}),
        (call_tile, {"bias": torch.zeros(7)}),
        (call_tile, {"bias": torch.zeros(8, dtype=torch.float16)}),
        (call_tile, {"targets": torch.zeros(2, dtype=torch.int64)}),
        (call_tile, {"targets": torch.zeros(3, dtype=torch.int32)}),
        (call_tile, {"state": torch.zeros(4, 3)}),
        (call_tile, {"total": torch.zeros(3)}),
        (call_tile, {"stats": torch.zeros(1, 3)}),
        (call_combine, {"out": torch.zeros(2, 8), "rows": None}),
        (call_combine, {"out": torch.zeros(3, 9)}),
        (call_combine, {"out": torch.zeros(3, 8, dtype=torch.float16)}),
        (call_combine, {"rows": torch.tensor([0, 1, 3])}),
        (call_combine, {"rows": torch.tensor([0, -1, 2])}),
        (call_combine, {"x": torch.zeros(3, 8, dtype=torch.float16)}),
        (call_combine, {"a": torch.ones(2)}),
        (call_combine, {"y": torch.zeros(2, 8)}),
        (call_combine, {"y": torch.zeros(1, 8).expand(3, 8)}),
        (call_combine, {"b": torch.ones(4)}),
        (call_add, {"rows": torch.tensor([0, 1, 5])}),
        (call_add, {"out": torch.zeros(5, 7)}),
        (call_add, {"out": torch.zeros(5, 8, dtype=torch.bfloat16)}),
        (call_add, {"b": torch.ones(2)}),
    ],
)
def test_the_bindings_check_again(call, change):
    call()
    with pytest.raises(pf.InvalidInput, match="linear_cross_entropy: "):
        call(**change)


def test_explain_names_the_fast_path():
    case = make((2, 6), 50, 8, bias=True)
    args = (case.hidden, case.weight, case.labels, case.bias)
    chosen = pf.explain("linear_cross_entropy", *args, shift=True, softcap=2.0, reduction="none").backend
    assert chosen == FAST_BACKENDS[0]
    double = [t.double() if t.is_floating_point() else t for t in args]
    assert "no kernel for float64" in str(pf.explain("linear_cross_entropy", *double))


@pytest.mark.parametrize("gap", [80.0, 88.0, 90.0, 96.0, 103.0, 110.0, 200.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_label_far_above_all_others_has_a_finite_gradient(dtype, gap):
    """The sum of the others is subnormal then, and its reciprocal infinite."""
    hidden = torch.ones(3, 1, dtype=dtype, requires_grad=True)
    weight = torch.zeros(40, 1, dtype=dtype)
    weight[7] = gap
    loss = pf.ops.linear_cross_entropy(hidden, weight, torch.full((3,), 7))
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad)) or grad.abs().max() < 1e-30
