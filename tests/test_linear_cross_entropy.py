"""Op linear_cross_entropy: the head's product and the cross-entropy in one, in tiles."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED, native_kernels
from cross_entropy_cases import (
    IGNORED,
    OPTIONS,
    hold_to_the_oracle,
    make,
    name,
    option_name,
    upstream,
)
from oracle import BACKWARD, assert_as_good_as, layouts

import pyfinetune as pf
from pyfinetune._native import capsule, native
from pyfinetune.ops import _linear_cross_entropy_cpu as cpu
from pyfinetune.ops._op import REGISTRY

LOW = DTYPES[1]  # one of 16 bits


@pytest.fixture(autouse=True)
def _fresh_scratch():
    """Memory that is reused between calls would hide what conftest poisons."""
    cpu._scratch.buffer = None


# 1. reference against float64


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_is_as_good_as_eager(dtype, options):
    hold_to_the_oracle("reference", 40, 333, 64, dtype=dtype, **options)
    hold_to_the_oracle("reference", 40, 333, 64, dtype=dtype, workspace=333 * 4 * 16, **options)


@pytest.mark.parametrize("options", [*OPTIONS, {"shift": True, "reduction": "none"}], ids=option_name)
def test_reference_in_float64_is_torch_cross_entropy(options):
    case = make((3, 7), 50, 12, dtype=torch.float64, workspace=8 * 50 * 4, **options)
    for ours, theirs in zip(case.run(), case.plain(), strict=True):
        torch.testing.assert_close(ours, theirs)


# 2. gradcheck


@pytest.mark.parametrize("options", [*OPTIONS, {"shift": True}], ids=option_name)
def test_gradcheck_of_the_reference(options):
    case = make((2, 4), 11, 5, dtype=torch.float64, **options)

    def f(hidden, weight, bias=None):
        return dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias).forward()

    assert torch.autograd.gradcheck(f, case.inputs())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_finite_differences_through_every_backend(backend, reduction):
    case = make(9, 200, 16, bias=True, softcap=4.0, reduction=reduction, workspace=4 * 64 * 4)
    with pf.use_backend(backend):
        loss, *grads = case.run()
        dout = upstream(loss)
        for leaf, grad in zip(case.inputs(), grads, strict=True):
            direction = torch.randn_like(leaf)
            step = 1e-2
            with torch.no_grad():
                moved = []
                for sign in (1, -1):
                    leaf.add_(direction, alpha=sign * step)
                    moved.append((case.forward() * dout).sum().double())
                    leaf.sub_(direction, alpha=sign * step)
            numeric = (moved[0] - moved[1]) / (2 * step)
            torch.testing.assert_close((grad * direction).sum().double(), numeric, rtol=2e-2, atol=2e-3)


# 3. every backend against the reference


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_is_as_good_as_eager(backend, dtype, tokens, options):
    ignored, draws = (0.3, 4) if tokens > 10 else (0.0, 16)
    hold_to_the_oracle(backend, tokens, 333, 64, dtype=dtype, ignored=ignored, draws=draws, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("workspace", [1, 1000 * 4 * 20] if INTERPRETED else [1, 64 * 2 * 30, 1000 * 4 * 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_workspace_is_as_good_as_eager(backend, dtype, workspace, options):
    """From tiles of one token and 64 entries to several chunks of whole rows."""
    tokens, vocab = (4, 300) if INTERPRETED and workspace == 1 else (50, 1000)
    hold_to_the_oracle(backend, tokens, vocab, 40, dtype=dtype, workspace=workspace, draws=2, **options)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_several_chunks_of_the_usual_size(backend):
    tokens = 300 if INTERPRETED else cpu.MAX_ROWS + 100  # in Python chunks are made by the tests of a workspace
    hold_to_the_oracle(backend, tokens, 130, 16, dtype=LOW, ignored=0.0, draws=1)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_set_of_gradients(wanted, reduction):
    """Only what is wanted is made, and it is the same whatever else is."""
    case = make(20, 333, 24, bias=True, reduction=reduction)
    expected = dict(zip("hwb", case.run()[1:], strict=True))
    leaves = [leaf.detach().requires_grad_(bool(wanted >> i & 1)) for i, leaf in enumerate(case.leaves())]
    loss = dataclasses.replace(case, hidden=leaves[0], weight=leaves[1], bias=leaves[2]).forward()
    kept = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(loss, kept, upstream(loss))
    for leaf, grad in zip(kept, grads, strict=True):
        index = next(i for i, other in enumerate(leaves) if other is leaf)
        torch.testing.assert_close(grad, expected["hwb"[index]])


# 4. layouts


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_any_layout_of_every_input(ignored, reduction):
    case = make(20, 130, 24, bias=True, ignored=ignored, reduction=reduction)
    expected = case.run()
    for field in ("hidden", "weight", "bias", "labels"):
        for layout, view in layouts(getattr(case, field).detach()).items():
            before = view.clone()
            leaf = view if field == "labels" else view.requires_grad_()
            for a, b in zip(dataclasses.replace(case, **{field: leaf}).run(), expected, strict=True):
                torch.testing.assert_close(a, b, msg=f"{field}, {layout}")
            assert torch.equal(view, before)


def test_leading_dimensions_and_expanded_inputs():
    case = make(24, 130, 16, reduction="none")
    flat = case.forward()
    shaped = dataclasses.replace(case, hidden=case.hidden.view(2, 3, 4, 16), labels=case.labels.view(2, 3, 4))
    assert torch.equal(shaped.forward().view(24), flat)
    single = dataclasses.replace(case, hidden=case.hidden[0], labels=torch.tensor(3))
    assert single.forward().shape == ()
    row = torch.randn(1, 16)
    expanded = dataclasses.replace(case, hidden=row.expand(24, 16).requires_grad_())
    repeated = dataclasses.replace(case, hidden=row.repeat(24, 1).requires_grad_())
    for a, b in zip(expanded.run(), repeated.run(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_strided_and_an_expanded_gradient():
    case = make((4, 6), 130, 16, reduction="none", bias=True)
    dout = torch.randn(6, 4).T
    for strided in (dout, torch.tensor(0.7).expand(4, 6)):
        expected = torch.autograd.grad(case.forward(), case.inputs(), strided.contiguous())
        for a, b in zip(torch.autograd.grad(case.forward(), case.inputs(), strided), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_is_mutated(reduction):
    case = make(20, 130, 24, bias=True, dtype=LOW, reduction=reduction, softcap=2.0)
    everything = [*case.inputs(), case.labels]
    before = [t.detach().clone() for t in everything]
    case.run()
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_gives_the_same_gradients(reduction, frozen):
    case = make(20, 130, 24, bias=True, dtype=LOW, reduction=reduction)
    case = case.frozen() if frozen else case
    leaves = [leaf for leaf in case.inputs() if leaf.requires_grad]
    loss = case.forward()
    dout = upstream(loss)
    first = torch.autograd.grad(loss, leaves, dout, retain_graph=True)
    torch.autograd.grad(case.forward(), leaves, dout * 3)
    second = torch.autograd.grad(loss, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused():
    case, dout = make(4, 30, 8).frozen(), torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(case.forward(), case.hidden, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# 5. edge shapes


@pytest.mark.parametrize(
    "shape",
    [(0, 8, 4), (1, 1, 1), (5, 1, 3), (3, 7, 0), (2, 65, 33), (33, 127, 5), (2, 2001 if INTERPRETED else 9001, 3)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_empty_and_odd_shapes(dtype, shape):
    for reduction in ("sum", "mean", "none"):
        case = make(*shape, dtype=dtype, bias=True, reduction=reduction)
        exact = case.cast(torch.float64).plain()
        for a, b in zip(case.run(), exact, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=3e-2, atol=3e-2, equal_nan=True)


def test_no_label_counts():
    """As torch has it: the mean of nothing is NaN, its gradients are zero."""
    for options in ({}, {"reduction": "sum"}, {"num_items": 0}, {"num_items": 5}, {"reduction": "none"}):
        case = make(6, 130, 8, bias=True, ignored=1.1, **options)
        for backend in (*FAST_BACKENDS, "reference"):
            with pf.use_backend(backend):
                ours, theirs = case.run(), case.plain()
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)), (options, backend)


# 6. opcheck, fullgraph and dynamic compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(options, frozen):
    case = make(9, 130, 16, **options)
    case = case.frozen() if frozen else case
    args = REGISTRY["linear_cross_entropy"].prepare(case.hidden, case.weight, case.labels, case.bias)
    torch.library.opcheck(torch.ops.pyfinetune.linear_cross_entropy.default, args)


def test_opcheck_of_the_backward_ops():
    case = make(9, 130, 16, bias=True)
    head = [t.detach() for t in (case.hidden, case.weight, case.labels, case.bias)]
    args = (torch.rand(9), *head, IGNORED, 3.0, 0, True, True, True)
    torch.library.opcheck(torch.ops.pyfinetune.linear_cross_entropy_bwd.default, args)
    scale = torch.ops.pyfinetune.linear_cross_entropy_scale.default
    torch.library.opcheck(scale, (head[0], torch.rand(9), torch.float32))
    torch.library.opcheck(scale, (head[1], torch.rand(1), torch.bfloat16))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile_and_dynamic_shapes(reduction):
    weight, bias = torch.randn(130, 16, requires_grad=True), torch.randn(130, requires_grad=True)
    options = {"reduction": reduction, "shift": True, "softcap": 3.0}

    def step(hidden, labels, items):
        options["num_items"] = items if reduction == "mean" else None
        return pf.ops.linear_cross_entropy(hidden * 2, weight, labels, bias, **options).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8, 13):
        case = make((3, tokens), 130, 16)
        args = (case.hidden, case.labels, torch.tensor(tokens * 2))
        leaves = [case.hidden, weight, bias]
        expected = torch.autograd.grad(step(*args), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*args), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), step(*args))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_compiles_it_in_one_graph():
    case = make(9, 130, 16)

    def step(hidden, weight):
        return dataclasses.replace(case, hidden=hidden, weight=weight).forward() * 2

    compiled = torch.compile(step, fullgraph=True)
    ours = torch.autograd.grad(compiled(case.hidden, case.weight), case.inputs())
    theirs = torch.autograd.grad(step(case.hidden, case.weight), case.inputs())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_sets_the_compute_dtype():
    case = make(20, 130, 16, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        results = case.run()
    assert {result.dtype for result in results} == {torch.float32}
    low = case.cast(torch.bfloat16)
    low.bias = case.bias
    for a, b in zip(results, low.run(), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-2, atol=1e-3)


def test_without_gradients_none_are_made():
    case = make(20, 130, 16)
    with torch.no_grad():
        loss, *grads = REGISTRY["linear_cross_entropy"](
            *REGISTRY["linear_cross_entropy"].prepare(case.hidden, case.weight, case.labels)
        )
    assert [grad.numel() for grad in grads] == [0, 0, 0]
    torch.testing.assert_close(loss, case.plain()[0] * (case.labels != IGNORED).sum())


# 7. determinism


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_a_hundred_times(reduction):
    case = make(30, 1000, 32, dtype=LOW, bias=True, reduction=reduction, workspace=64 * 2 * 30)
    expected = case.run()
    for _ in range(3 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@native_kernels
def test_the_kernels_do_not_depend_on_the_thread_count():
    """Everything but torch's GEMM: each row, or each column of a sum over rows, is one thread's."""
    rows, cols, width = 37, 700, 200
    logits, h = torch.randn(rows, cols) * 5, torch.randn(rows, width)
    targets, factors = torch.randint(cols, (rows,)), torch.rand(rows)
    results = []
    for count in (1, 2, 3, 5):
        z, state, total = logits.clone(), torch.zeros(5, rows), torch.zeros(rows, dtype=torch.float64)
        state[0] = -math.inf
        tile = (capsule(t) for t in (targets, state, total))
        targets_capsule, state_capsule, total_capsule = tile
        native.cross_entropy_tile(
            capsule(z), None, targets_capsule, 0, 2.0, state_capsule, total_capsule, None, True, count
        )
        sums, columns, combined = torch.ones(cols, width), torch.ones(width), torch.zeros(rows, width)
        native.add_rows_at(capsule(sums), capsule(targets), capsule(h), capsule(factors), count)
        native.weighted_column_sums(capsule(h), capsule(factors), capsule(columns), count)
        native.combine_rows(capsule(combined), None, capsule(h), capsule(factors), None, None, count)
        results.append([z, state, total, sums, columns, combined])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# 8. named regressions


def test_gradient_accumulation_is_the_whole_batch():
    """transformers #34191, axolotl #2262, unsloth-zoo #1023: parts of unequal length, each divided by its own count."""
    whole = make((4, 30), 130, 16, shift=True)
    whole.labels[0, 4:] = IGNORED
    expected = whole.run()
    items = (whole.labels[:, 1:] != IGNORED).sum()
    for num_items in (items, int(items), items.double()):
        options = whole.options | {"num_items": num_items}
        parts = [
            dataclasses.replace(whole, hidden=h, labels=y, options=options).forward()
            for h, y in zip(whole.hidden.split(1), whole.labels.split(1), strict=True)
        ]
        loss = torch.stack(parts).sum()
        for a, b in zip(whole.gradients(loss), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_what_stands_in_padding_reaches_nothing():
    """A product with 0 keeps a NaN: in torch's code one padded position that holds NaN spoils the whole d_weight."""
    for reduction in ("mean", "none"):
        case = make(12, 130, 16, bias=True, reduction=reduction)
        expected = case.run()
        for backend in (*FAST_BACKENDS, "reference"):
            hidden = case.hidden.detach().clone()
            hidden[case.labels == IGNORED] = math.nan
            with pf.use_backend(backend):
                spoilt = dataclasses.replace(case, hidden=hidden.requires_grad_()).run()
            for a, b in zip(spoilt, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_a_batch_without_labels_shows():
    """TRL's packing trained at a loss of 0.0 without a word when no label had survived truncation."""
    assert make(6, 130, 8, ignored=1.1).forward().isnan()


def test_a_label_outside_the_vocabulary_is_never_read():
    """A tokenizer with more entries than the head: peers read the logits of another token, or crash the GPU."""
    case = make(6, 130, 8, ignored=0.0)
    for label in (130, 2**40, -2, -(2**62)):
        case.labels[4] = label
        with pytest.raises(pf.InvalidInput, match=f"the label of row 4 is {label},"):
            case.forward()


def test_ignore_index_may_be_an_entry_of_the_vocabulary():
    """Models whose padding token is ignored by its id, not by -100."""
    case = make(30, 20, 8, ignored=0.0)
    other = dataclasses.replace(case, labels=torch.where(case.labels == 3, IGNORED, case.labels))
    case = dataclasses.replace(case, options={"ignore_index": 3})
    for a, b in zip(case.run(), other.run(), strict=True):
        assert torch.equal(a, b)


def test_a_scaled_loss_keeps_small_float16_gradients():
    """A loss scaler multiplies by 65536 what a mean has divided by: baked in early, the quotient would be lost."""
    case = make(200, 130, 16, dtype=torch.float16)
    case.options["num_items"] = 10**9
    exact = case.cast(torch.float64)
    losses = ((case.forward(), case), (case.plain_loss(), case), (exact.plain_loss(), exact))
    results = [torch.autograd.grad(loss, c.inputs(), torch.tensor(65536.0).to(loss.dtype)) for loss, c in losses]
    for ours, theirs, right in zip(*results, strict=True):
        assert_as_good_as(ours, theirs, right, BACKWARD)


def test_tokens_certain_of_their_label_still_learn():
    """TRL's fused loss: rounding within a vocabulary chunk drove the entropy down where errors looked the same size.

    With p = 0.998 rounded to bfloat16, the label's p - 1 is off by as much as it is. Each token has its own scale here.
    """
    for dtype in DTYPES:
        ours, theirs, exact = [], [], []
        for _ in range(4):
            case = make(64, 300, 16, dtype=dtype, ignored=0.0, reduction="sum")
            with torch.no_grad():
                direction = torch.nn.functional.normalize(case.weight[case.labels].float(), dim=1)
                case.hidden.copy_(direction * torch.linspace(2, 14, 64)[:, None])
            exact.append(case.cast(torch.float64).plain()[1])
            size = exact[-1].norm(dim=1, keepdim=True)
            exact[-1] = exact[-1] / size
            ours.append(case.run()[1] / size)
            theirs.append(case.plain()[1] / size)
        assert_as_good_as(torch.stack(ours), torch.stack(theirs).to(dtype), torch.stack(exact), BACKWARD, name(dtype))
