"""Op varlen_attn: attention over packed documents; causal, windowed, capped, with grouped heads."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from attention_cases import HEADS, NAMES, Case, cu, hold_to_the_oracle, make, same
from backends import DTYPES, FAST_BACKENDS, INTERPRETED

import pyfinetune as pf
from pyfinetune.ops._op import REGISTRY

OPTIONS = [
    {},
    {"causal": False},
    {"window_size": (7, 0)},
    {"window_size": (70, 3)},
    {"causal": False, "window_size": (16, 5)},
    {"causal": False, "window_size": (-1, 40)},
    {"softcap": 3.0},
    {"causal": False, "softcap": 0.7, "window_size": (20, 20)},
    {"softmax_scale": 0.3},
    {"softmax_scale": -8.0},
]
HALF = torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float16
EVERY_HEADS = [] if INTERPRETED else [(4, 1), (2, 2)]
PACKED = [37, 1, 64, 0, 90]
# Queries at the end of longer keys, as in decoding; and fewer keys than queries, so that the first see none.
UNEQUAL = {"short queries": ([5, 1, 33, 70], [40, 17, 33, 131]), "short keys": ([40, 7, 9, 70], [9, 0, 1, 67])}


def name(value):
    return str(value).removeprefix("torch.")


def option_name(options):
    return "-".join(f"{key}{value}" for key, value in options.items()) or "default"


every_option = pytest.mark.parametrize("options", OPTIONS, ids=option_name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)
# Numpy runs the interpreter's arithmetic, and has opinions about infinities and NaNs.
numpy_may_warn = pytest.mark.filterwarnings("ignore::RuntimeWarning" if INTERPRETED else "error::RuntimeWarning")
every_backend = pytest.mark.parametrize("backend", FAST_BACKENDS)


# 1. reference against float64


@every_option
@every_dtype
def test_reference_is_as_good_as_eager(dtype, options):
    hold_to_the_oracle("reference", PACKED, dtype=dtype, dim=32, heads=(4, 2), rest=3, draws=2, **options)


@pytest.mark.parametrize("lengths", UNEQUAL.values(), ids=UNEQUAL)
@every_dtype
def test_reference_with_unequal_lengths(dtype, lengths):
    hold_to_the_oracle("reference", *lengths, dtype=dtype, dim=24, dim_v=16, heads=(3, 1), draws=2)


@every_option
@pytest.mark.parametrize("lengths", [(PACKED, None), *UNEQUAL.values()], ids=["equal", *UNEQUAL])
def test_reference_in_float64_is_the_formula(lengths, options):
    case = make(*lengths, dim=5, dim_v=3, heads=(6, 2), rest=2, **options).cast(torch.float64)
    for name, ours, plain in zip(NAMES, case.run(), case.plain(), strict=True):
        torch.testing.assert_close(ours, plain, msg=lambda text, name=name: f"{name}: {text}")


def test_one_document_is_torchs_own_attention():
    case = make([50], dim=16, heads=(4, 2)).cast(torch.float64)
    q, k, v = (x.transpose(0, 1)[None] for x in case.inputs())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(case.forward(), expected[0].transpose(0, 1))


# 2. gradcheck


@every_option
@pytest.mark.parametrize("lengths", [([4, 1, 0, 3], None), ([2, 5], [4, 3])], ids=["equal", "unequal"])
def test_gradcheck_of_the_reference(lengths, options):
    case = make(*lengths, dim=3, dim_v=2, heads=(4, 2), rest=1, **options).cast(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: case.with_inputs(*x).forward(), case.inputs())


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_lse_has_no_gradient_and_each_gradient_comes_alone(backend):
    case = make([20, 13], dim=16, heads=(4, 2))
    with pf.use_backend(backend):
        out, lse = pf.ops.varlen_attn(*case.args(), return_lse=True)
        assert out.requires_grad
        assert not lse.requires_grad
        expected = case.run()[2:]
        for i in range(3):
            leaves = [x if j == i else x.detach() for j, x in enumerate(case.inputs())]
            out = case.with_inputs(*leaves).forward()
            (grad,) = torch.autograd.grad(out, leaves[i], case.dout(out.dtype))
            assert torch.equal(grad, expected[i]), NAMES[2 + i]


@every_backend
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window_size": (9, 0)}, {"causal": False}], ids=option_name)
def test_finite_differences_through_every_backend(backend, options):
    case = make([33, 1, 70], dim=32, heads=(4, 2), **options)
    with pf.use_backend(backend):
        grads, dout = case.run()[2:], case.dout(torch.float32)
        for leaf, grad in zip(case.inputs(), grads, strict=True):
            direction, step = torch.randn_like(leaf), 1e-2
            with torch.no_grad():
                moved = []
                for sign in (1, -1):
                    leaf.add_(direction, alpha=sign * step)
                    moved.append((case.forward() * dout).sum(dtype=torch.float64))
                    leaf.sub_(direction, alpha=sign * step)
            numeric = (moved[0] - moved[1]) / (2 * step)
            torch.testing.assert_close((grad * direction).sum(dtype=torch.float64), numeric, rtol=2e-2, atol=2e-2)


# 3. every backend against the reference


@every_option
@every_dtype
@every_backend
def test_backend_is_as_good_as_eager(backend, dtype, options):
    hold_to_the_oracle(backend, PACKED, dtype=dtype, rest=3, **options)


@every_option
@pytest.mark.parametrize("lengths", UNEQUAL.values(), ids=UNEQUAL)
@every_dtype
@every_backend
def test_backend_with_unequal_lengths(backend, dtype, lengths, options):
    if INTERPRETED and dtype == torch.float32 and options.get("softcap"):
        pytest.skip("numpy's float32 exp, which the interpreter calls, is three times as far off as torch's")
    heads = (2, 1) if INTERPRETED else (4, 1)
    hold_to_the_oracle(backend, *lengths, dtype=dtype, heads=heads, dim=32, rest=2, draws=2, **options)


@pytest.mark.parametrize("dim", [16, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("heads", [HEADS, *EVERY_HEADS], ids=str)
@every_dtype
@every_backend
def test_backend_at_every_head_dim(backend, dtype, heads, dim):
    if INTERPRETED and dtype == torch.float32 and dim == 256:
        pytest.skip("numpy sums the 256 float32 products of a score in one chain, where torch splits it")
    hold_to_the_oracle(backend, [33, 66], dtype=dtype, dim=dim, heads=heads)


@pytest.mark.parametrize("dims", [(64, 32), (40, 128), (16, 256), (192, 24)], ids=str)
@every_dtype
@every_backend
def test_backend_with_another_head_dim_for_v(backend, dtype, dims):
    # With few keys each weight is large, and so is what numpy's float32 exp is off by, which the interpreter calls.
    short = 41 if INTERPRETED and dtype == torch.float32 else 9
    hold_to_the_oracle(backend, [70, short], dtype=dtype, dim=dims[0], dim_v=dims[1], heads=(4, 2), causal=False)


# 4. layouts


def fused(case: Case):
    """q, k and v as views of one projection's output [tokens, heads, head_dim]."""
    sizes = [x.shape[1] for x in case.inputs()]
    return (
        torch.cat([x.detach() for x in case.inputs()], dim=1)
        .flatten(1)
        .unflatten(1, (sum(sizes), -1))
        .split(sizes, dim=1)
    )


def offset(x):
    """The same values at an odd address."""
    return torch.cat([torch.zeros(3, dtype=x.dtype), x.reshape(-1)])[3:].view(x.shape)


LAYOUTS = {
    "fused projection": fused,
    "heads in front": lambda case: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.inputs()],
    "odd offset": lambda case: [offset(x) for x in case.inputs()],
    "wide rows": lambda case: [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in case.inputs()],
    "every other element": lambda case: [torch.stack([x, x], dim=-1)[..., 0] for x in case.inputs()],
    "elements in front": lambda case: [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in case.inputs()],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
@every_backend
def test_any_layout_gives_the_same_bits(backend, dtype, layout):
    case = make([9, 1, 33] if INTERPRETED else [37, 1, 64], dtype=dtype, heads=HEADS if INTERPRETED else (6, 2), rest=2)
    views = [x.detach().requires_grad_() for x in LAYOUTS[layout](case)]
    assert not all(x.is_contiguous() for x in views) or layout == "odd offset"
    before = [x.detach().clone() for x in views]
    with pf.use_backend(backend):
        dout, expected = case.dout(dtype), case.run()
        assert same(case.with_inputs(*views).run(), expected)
        for change in (
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
            offset,
            lambda x: x.mT.contiguous().mT,
        ):
            assert same(case.run(change(dout)), expected)
    assert same(views, before)


@every_backend
def test_expanded_heads_tokens_and_gradients(backend):
    case = make([20, 30], heads=(6, 1))
    with pf.use_backend(backend):
        once = case.with_inputs(*(x.detach() for x in case.inputs()))
        heads = once.with_inputs(once.q, once.k.expand(-1, 6, -1), once.v.expand(-1, 6, -1))
        assert torch.equal(heads.forward(), heads.with_inputs(*(x.contiguous() for x in heads.inputs())).forward())
        tokens = once.with_inputs(once.q, once.k[:1].expand(50, -1, -1), once.v)
        assert torch.equal(tokens.forward(), tokens.with_inputs(*(x.contiguous() for x in tokens.inputs())).forward())
        one = torch.ones(())
        assert same(case.run(one.expand(50, 6, 64)), case.run(torch.ones(50, 6, 64)))


def test_gradients_flow_into_a_fused_projection():
    projection = torch.randn(80, 10 * 64, requires_grad=True)
    bounds = cu([33, 47])

    def run(x):
        q, k, v = (part.unflatten(1, (-1, 64)) for part in x.split([6 * 64, 2 * 64, 2 * 64], dim=1))
        out = pf.ops.varlen_attn(q, k, v, bounds)
        return [out.detach(), torch.autograd.grad(out.square().sum(), x)[0]]

    with pf.use_backend("reference"):
        expected = run(projection)
    for a, b in zip(run(projection), expected, strict=True):
        torch.testing.assert_close(a, b)


# 5. edge shapes


ODD = [1, 31, 32, 33, 63, 64, 65, 129] if INTERPRETED else [1, 63, 64, 65, 127, 130, 513]


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": (64, 0)}], ids=option_name)
@every_dtype
@every_backend
def test_lengths_around_the_tiles(backend, dtype, options):
    hold_to_the_oracle(backend, ODD, dtype=dtype, heads=(2, 1), dim=32, draws=1, **options)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0, 0, 2, 0]], ids=str)
@pytest.mark.parametrize("rest", [0, 1, 3])
@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_empty_and_tiny(backend, rest, lengths):
    for dtype in DTYPES:
        case = make(lengths, dtype=dtype, rest=rest)
        with pf.use_backend(backend):
            out, lse, *grads = case.run()
        covered = sum(lengths)
        assert [x.shape for x in grads] == [x.shape for x in case.inputs()]
        assert all(x.is_contiguous() for x in (out, lse, *grads))
        assert not any(x[covered:].any() for x in (out, *grads))
        assert (lse[:, covered:] == float("-inf")).all()
        assert out[:covered].isfinite().all()
        assert lse[:, :covered].isfinite().all()


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_rows_past_the_last_document_are_not_read(backend):
    case = make([30, 4], rest=20, dtype=HALF)
    with pf.use_backend(backend):
        expected = case.run()
        for x in case.inputs():
            x.data[34:] = float("nan")
        out, lse, *grads = case.run()
    assert same([out, lse, *grads], expected)
    assert not any(x[34:].any() for x in (out, *grads))


@numpy_may_warn
@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_queries_that_see_no_key(backend):
    """Zeros, -inf and no gradient, even where the values are infinite."""
    case = make([10, 6], [4, 6], heads=(4, 2))
    with pf.use_backend(backend):
        out, lse, dq, dk, dv = case.run()
        assert not out[:6].any()
        assert not dq[:6].any()
        assert (lse[:, :6] == float("-inf")).all()
        assert lse[:, 6:].isfinite().all()
        dout = case.dout(torch.float32)
        dout[:6] = 1e30
        assert same(case.run(dout), [out, lse, dq, dk, dv])
        case.v.data.fill_(float("inf"))
        assert not case.forward()[:6].any()


# 6. opcheck, fullgraph and dynamic compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4], OPTIONS[6]], ids=option_name)
@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_opcheck(backend, options):
    with pf.use_backend(backend):
        for case in (make([5, 1, 9], heads=(4, 2), dim=16, rest=1, **options), make([2], [7], dim=16, **options)):
            arguments = REGISTRY["varlen_attn"].prepare(*case.args(), **case.options)
            torch.library.opcheck(torch.ops.pyfinetune.varlen_attn.default, arguments)


@pytest.mark.parametrize("own_keys", [False, True], ids=["same keys", "own keys"])
def test_fullgraph_compile_and_dynamic_shapes(own_keys):
    torch._dynamo.reset()

    def step(q, k, v, bounds_q, bounds_k, longest):
        out, lse = pf.ops.varlen_attn(
            q, k, v, bounds_q, bounds_k, longest, longest, window_size=(20, 0), return_lse=True
        )
        return out.square().sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 8], [5, 8, 11], [40, 3, 0, 9]):
        case = make(lengths, lengths if own_keys else None, heads=(4, 2), dim=16)
        expected = torch.autograd.grad(step(*case.args(), max(lengths)), case.inputs())
        got = torch.autograd.grad(compiled(*case.args(), max(lengths)), case.inputs())
        assert same(got, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_compiles_it_in_one_graph():
    case = make([5, 8], heads=(4, 2), dim=16)
    compiled = torch.compile(lambda q: case.with_inputs(q, case.k, case.v).forward() * 2, fullgraph=True)
    torch.testing.assert_close(compiled(case.q), case.forward() * 2)


def test_autocast_sets_the_compute_dtype():
    case = make([20, 13], heads=(4, 2))
    mixed = case.with_inputs(case.q, case.k.detach().bfloat16().requires_grad_(), case.v)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed.forward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, case.cast(torch.bfloat16).forward())
    grads = torch.autograd.grad(out, mixed.inputs(), torch.ones_like(out))
    assert [x.dtype for x in grads] == [torch.float32, torch.bfloat16, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert case.cast(torch.float64).forward().dtype == torch.float64


# 7. determinism


@every_dtype
@every_backend
def test_same_bits_a_hundred_times(backend, dtype):
    case = make([37, 1, 64], dtype=dtype, heads=HEADS if INTERPRETED else (6, 2), rest=1)
    with pf.use_backend(backend):
        expected = case.run()
        assert all(same(case.run(), expected) for _ in range(2 if INTERPRETED else 100))


@pytest.mark.parametrize("lengths", [[300], [37, 1, 64, 0, 90, 130]], ids=["one document", "several"])
@pytest.mark.skipif("cpu" not in FAST_BACKENDS, reason="only the CPU's kernels have threads of torch's")
@every_dtype
@every_backend
def test_the_thread_count_changes_no_bit(backend, dtype, lengths):
    case = make(lengths, dtype=dtype, heads=(6, 2))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with pf.use_backend(backend):
                results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert same(results[1], results[0])
    assert same(results[2], results[0])


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_second_backward_gives_the_same_gradients_and_nothing_is_mutated(backend):
    case = make([37, 1, 64], [40, 3, 64], dtype=HALF, rest=1)
    before = [x.detach().clone() for x in case.args()]
    with pf.use_backend(backend):
        out = case.forward()
        kept, dout = out.detach().clone(), case.dout(out.dtype)
        first = torch.autograd.grad(out, case.inputs(), dout, retain_graph=True)
        case.run()
        assert same(torch.autograd.grad(out, case.inputs(), dout), first)
    assert torch.equal(out, kept)
    assert same(case.args(), before)


# 8. named regressions


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_thousands_of_documents_and_empty_ones_between(backend):
    """flash-attention #443, #1311, #2611: a crash or NaN with empty documents, or with very many of them."""
    lengths = [1] * (64 if INTERPRETED else 8192)
    case = make(lengths, heads=(3, 1), dim=16)
    with pf.use_backend(backend):
        out, lse, dq, _dk, dv = case.run()
    assert torch.equal(out, case.v.expand(-1, 3, -1))
    assert lse.isfinite().all()
    # One key has all the weight whatever q is: no gradient but what summing 16 products may leave.
    scale = torch.finfo(torch.float32).eps * 16 * case.dout(torch.float32).abs().max() * case.v.abs().max()
    assert dq.abs().max() <= scale * case.k.abs().max()
    torch.testing.assert_close(dv, case.dout(torch.float32).sum(dim=1, keepdim=True))
    between = case.with_inputs(*case.inputs())
    between.cu_seqlens_q = cu([length for one in lengths for length in (0, one)] + [0])
    with pf.use_backend(backend):
        assert same(between.run()[:2], [out, lse])


@pytest.mark.parametrize("filling", [0.0, 1e30, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"causal": False, "window_size": (30, 30)}], ids=option_name
)
@numpy_may_warn
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=name)
@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_no_document_sees_another(backend, dtype, options, filling):
    """unsloth #1207, transformers #46634: packed documents attended to each other, and nothing said so."""
    lengths = [37, 5, 64, 70, 1, 20]
    case = make(lengths, dtype=dtype, heads=HEADS if INTERPRETED else (4, 2), dim=16, rest=5, **options)
    bounds = case.cu_seqlens_q.tolist()
    with pf.use_backend(backend):
        dout = case.dout(dtype)
        expected = case.run(dout)
        for i in (2,) if INTERPRETED else (0, 2, 3, 4):
            inside = slice(bounds[i], bounds[i + 1])
            changed, other_dout = case.cast(dtype), dout.clone()
            for x in (*changed.inputs(), other_dout):
                x.data[inside] = filling
            for name, a, b in zip(NAMES, changed.run(other_dout), expected, strict=True):
                a, b = (x.T if name == "lse" else x for x in (a, b))
                others = [torch.cat([x[: inside.start], x[inside.stop :]]) for x in (a, b)]
                assert torch.equal(*others), f"{name} outside of document {i}"


@every_dtype
@every_backend
def test_packed_equals_separate(backend, dtype):
    """The same as above: a document's bits are those of the document alone, wherever it stands."""
    lengths = [37, 1, 64, 130]
    case = make(lengths, dtype=dtype, heads=HEADS if INTERPRETED else (4, 2))
    bounds = case.cu_seqlens_q.tolist()
    with pf.use_backend(backend):
        packed, dout = case.run(), case.dout(dtype)
        for start, end in pairwise(bounds):
            leaves = [x.detach()[start:end].requires_grad_() for x in case.inputs()]
            alone = Case(*leaves, cu([end - start]), None, {}).run(dout[start:end])
            assert same(alone, [x[:, start:end] if x is packed[1] else x[start:end] for x in packed])


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_the_last_query_meets_the_last_key(backend):
    """flash-attention 2.1 and the static KV cache of transformers: aligned at the top left, a decoded token sees only
    the first key; each query must see what it saw when the whole document was one call."""
    whole = make([24], heads=(4, 2), dim=16)
    with pf.use_backend(backend):
        expected, lse = pf.ops.varlen_attn(*whole.args(), return_lse=True)
        for new in (1, 7):
            step = dataclasses.replace(whole, q=whole.q[-new:], cu_seqlens_q=cu([new]), cu_seqlens_k=cu([24]))
            out, step_lse = pf.ops.varlen_attn(*step.args(), return_lse=True)
            torch.testing.assert_close(out, expected[-new:])
            torch.testing.assert_close(step_lse, lse[:, -new:])
        # A cache with room to spare: keys past the document's end are there, and are not seen.
        spare = [torch.cat([x.detach(), torch.full_like(x, float("nan"))]) for x in (whole.k, whole.v)]
        out = pf.ops.varlen_attn(whole.q[-3:], *spare, cu([3]), cu([24]))
        torch.testing.assert_close(out, expected[-3:])


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_a_window_open_to_the_right_shows_a_causal_query_nothing_more(backend):
    """transformers passes a sliding window W as (W - 1, W - 1) with causal on; taken literally, queries see ahead."""
    both = make([50, 9], heads=(4, 2), dim=16, window_size=(6, 6))
    left = dataclasses.replace(both, options={"window_size": (6, 0)})
    with pf.use_backend(backend):
        assert same(both.run(), left.run())
        wide = dataclasses.replace(both, options={"window_size": (2**40, 2**62)})
        assert same(wide.run(), dataclasses.replace(both, options={}).run())
