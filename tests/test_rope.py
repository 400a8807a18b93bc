"""Op rope: rotary position embedding of queries and keys in Hugging Face's layout and packed, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED
from oracle import BACKWARD, FORWARD, assert_as_good_as, layouts

import pyfinetune as pf
from pyfinetune.ops._op import REGISTRY

LOW = DTYPES[1]  # bfloat16 where the backend has it


def name(value):
    return str(value).removeprefix("torch.")


def tables(tokens, rotary_dim, batch=None, dtype=torch.float32, equal_halves=True):
    """cos and sin [batch, tokens, rotary_dim] ([tokens, rotary_dim] without batch) of as many positions."""
    frequencies = 10000 ** -(torch.arange(rotary_dim // 2) / max(rotary_dim // 2, 1))
    angles = torch.outer(torch.arange(tokens) + 3.0, frequencies)
    angles = torch.cat([angles, angles if equal_halves else angles * 1.7 + 0.3], dim=-1)
    if batch is not None:
        angles = angles + 11.0 * torch.arange(batch)[:, None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def eager(q, k, cos, sin):
    """Hugging Face's apply_rotary_pos_emb in the tables' dtype, on the rotated part; the rest passes through."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(x):
        inner, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = inner.chunk(2, dim=-1)
        inner = inner * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([inner.to(x.dtype), rest], dim=-1)

    return rotate(q), rotate(k)


@dataclasses.dataclass
class Case:
    """Inputs of one call, and the gradients from above."""

    q: torch.Tensor
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    douts: tuple[torch.Tensor, torch.Tensor]

    def run(self, function=pf.ops.rope):
        """[q, k, dq, dk]."""
        results = function(self.q, self.k, self.cos, self.sin)
        return [*results, *torch.autograd.grad(results, [self.q, self.k], self.douts)]

    def exact(self):
        """The same by the reference in float64."""
        q, k, cos, sin, *douts = (t.detach().double() for t in (self.q, self.k, self.cos, self.sin, *self.douts))
        with pf.use_backend("reference"):
            return Case(q.requires_grad_(), k.requires_grad_(), cos, sin, tuple(douts)).run()


def make(q_shape, kv_heads, *, rotary_dim=None, dtype=torch.float32, table_dtype=None, shared=True, equal_halves=True):
    """q of a shape [batch, heads, tokens, head_dim] or [tokens, heads, head_dim]; `shared` tables have batch 1."""
    rotary_dim = rotary_dim or q_shape[-1]
    k_shape = (q_shape[0], kv_heads, *q_shape[2:])
    packed = len(q_shape) == 3
    batch = None if packed else (1 if shared else q_shape[0])
    tokens = q_shape[0] if packed else q_shape[2]
    cos, sin = tables(tokens, rotary_dim, batch, table_dtype or dtype, equal_halves)
    values = [torch.randn(shape).to(dtype) for shape in (q_shape, k_shape, q_shape, k_shape)]
    return Case(values[0].requires_grad_(), values[1].requires_grad_(), cos, sin, (values[2], values[3]))


SHAPES = [((2, 4, 5, 64), 2), ((1, 3, 7, 32), 3), ((9, 4, 64), 1), ((3, 1, 1, 128), 1), ((1, 6, 33, 80), 2)]
OPTIONS = [{}, {"rotary_dim": 8}, {"shared": False}, {"equal_halves": False, "rotary_dim": 22}]


def option_name(options):
    return "-".join(f"{key}{value}" for key, value in options.items()) or "plain"


def hold_to_the_oracle(backend, *sizes, draws=3, **options):
    """Several draws are judged together: the largest of a few rounding errors is a matter of luck."""
    ours, theirs, exact = [], [], []
    for _ in range(draws):
        case = make(*sizes, **options)
        with pf.use_backend(backend):
            ours.append(case.run())
        theirs.append(case.run(eager))
        exact.append(case.exact())
    for i, label in enumerate(("q", "k", "dq", "dk")):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        assert_as_good_as(*stacked, BACKWARD if i >= 2 else FORWARD, label)


# 1. reference against float64


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_is_as_good_as_eager(dtype, options):
    hold_to_the_oracle("reference", (2, 4, 5, 64), 2, dtype=dtype, **options)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_reference_in_float64_is_the_formula(options, sizes):
    case = make(*sizes, dtype=torch.float64, **options)
    for ours, theirs in zip(case.run(), case.run(eager), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_rotation_by_minus_the_angle_is_the_inverse():
    case = make((2, 4, 5, 64), 2, dtype=torch.float64)
    q, k = pf.ops.rope(*pf.ops.rope(case.q, case.k, case.cos, case.sin), case.cos, -case.sin)
    torch.testing.assert_close(q, case.q)
    torch.testing.assert_close(k, case.k)


# 2. gradcheck


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("shape", [(2, 2, 3, 24), (3, 2, 24)], ids=str)
def test_gradcheck_of_the_reference(shape, options):
    case = make(shape, 1, dtype=torch.float64, **options)
    assert torch.autograd.gradcheck(lambda q, k: pf.ops.rope(q, k, case.cos, case.sin), (case.q, case.k))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_finite_differences_through_every_backend(backend, options):
    case = make((2, 3, 5, 40), 2, **options)
    with pf.use_backend(backend):
        *_results, dq, dk = case.run()
        for leaf, grad in ((case.q, dq), (case.k, dk)):
            direction, step, moved = torch.randn_like(leaf), 1e-2, []
            with torch.no_grad():
                for sign in (1, -1):
                    leaf.add_(direction, alpha=sign * step)
                    results = pf.ops.rope(case.q, case.k, case.cos, case.sin)
                    moved.append(sum((y * g).sum().double() for y, g in zip(results, case.douts, strict=True)))
                    leaf.sub_(direction, alpha=sign * step)
            numeric = (moved[0] - moved[1]) / (2 * step)
            torch.testing.assert_close((grad * direction).sum().double(), numeric, rtol=2e-2, atol=2e-2)


# 3. every backend against the reference


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_is_as_good_as_eager(backend, dtype, sizes, options):
    hold_to_the_oracle(backend, *sizes, dtype=dtype, **options)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_tables_of_another_dtype(backend, dtype, table_dtype):
    hold_to_the_oracle(backend, (2, 4, 5, 64), 2, dtype=dtype, table_dtype=table_dtype)


@pytest.mark.parametrize("rotary_dim", [2, 4, 30, 32, 34, 62, 64, 126, 256, 510, 512, 600])
def test_every_rotary_dim(rotary_dim):
    case = make((1, 2, 3, 600), 1, rotary_dim=rotary_dim)
    with pf.use_backend("reference"):
        expected = case.run()
    for a, b in zip(case.run(), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a[..., rotary_dim:], b[..., rotary_dim:])


# 4. layouts


@pytest.mark.parametrize("field", ["q", "k", "cos", "sin"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 32), (5, 4, 32)], ids=str)
def test_any_layout_of_every_input(shape, field):
    case = make(shape, 2, shared=False)
    expected = case.run()
    for layout, view in layouts(getattr(case, field).detach()).items():
        before = view.clone()
        leaf = view.requires_grad_(field in "qk")
        for a, b in zip(dataclasses.replace(case, **{field: leaf}).run(), expected, strict=True):
            assert torch.equal(a, b), layout
        assert torch.equal(view, before)


def test_the_order_in_memory_is_kept():
    """Queries of a [batch, tokens, heads, head_dim] projection come out that way, which is how attention reads them."""
    projected = [torch.randn(2, 7, heads * 32).to(LOW).requires_grad_() for heads in (6, 2)]
    q, k = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in projected)
    cos, sin = tables(7, 32, batch=1)
    for backend in ("reference", *FAST_BACKENDS):
        with pf.use_backend(backend):
            results = pf.ops.rope(q, k, cos, sin)
            assert all(y.transpose(1, 2).is_contiguous() for y in results)
            plain = pf.ops.rope(q.contiguous(), k.contiguous(), cos, sin)
            assert all(y.is_contiguous() for y in plain)
            assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
            fused = torch.cat(projected, dim=-1).unflatten(-1, (8, 32))
            q_view, k_view = fused[:, :, :6].transpose(1, 2), fused[:, :, 6:].transpose(1, 2)
            for a, b in zip(pf.ops.rope(q_view, k_view, cos, sin), results, strict=True):
                assert torch.equal(a, b)
                assert a.transpose(1, 2).is_contiguous()


def test_packed_is_the_same_as_one_sequence():
    case = make((1, 4, 9, 64), 2)
    tables_packed = (case.cos[0], case.sin[0])
    packed = pf.ops.rope(case.q[0].transpose(0, 1), case.k[0].transpose(0, 1), *tables_packed)
    for a, b in zip(packed, pf.ops.rope(case.q, case.k, case.cos, case.sin), strict=True):
        assert torch.equal(a.transpose(0, 1)[None], b)


def test_expanded_inputs_and_gradients():
    case = make((1, 1, 5, 32), 1)
    q, k = case.q.detach().expand(3, 4, 5, 32), case.k.detach().expand(3, 2, 5, 32)
    cos, sin = case.cos.expand(3, 5, 32), case.sin.expand(3, 5, 32)
    for a, b in zip(pf.ops.rope(q, k, cos, sin), pf.ops.rope(case.q, case.k, case.cos, case.sin), strict=True):
        assert torch.equal(a, b.expand(a.shape))
    results = pf.ops.rope(case.q, case.k, case.cos, case.sin)
    grads = torch.autograd.grad(sum(y.sum() for y in results), [case.q, case.k])
    case.douts = tuple(torch.ones_like(y) for y in results)
    assert all(torch.equal(a, b) for a, b in zip(grads, case.run()[2:], strict=True))


def test_inputs_are_not_changed():
    case = make((2, 4, 9, 64), 2, dtype=LOW)
    tensors = (case.q, case.k, case.cos, case.sin, *case.douts)
    before = [t.detach().clone() for t in tensors]
    case.run()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_second_backward_gives_the_same_gradients():
    case = make((2, 4, 9, 64), 2, dtype=LOW)
    results = pf.ops.rope(case.q, case.k, case.cos, case.sin)
    first = torch.autograd.grad(results, [case.q, case.k], case.douts, retain_graph=True)
    case.run()
    second = torch.autograd.grad(results, [case.q, case.k], case.douts)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# 5. edge shapes


@pytest.mark.parametrize(
    "sizes",
    [
        ((0, 2, 3, 8), 1),
        ((2, 0, 3, 8), 1),
        ((2, 2, 3, 8), 0),
        ((2, 2, 0, 8), 1),
        ((0, 2, 8), 1),
        ((1, 1, 1, 2), 1),
        ((1, 1, 2), 1),
        ((2, 3, 35, 6), 1),
        ((3, 5, 18), 2),
    ],
    ids=str,
)
def test_empty_and_odd_shapes(sizes):
    for dtype in DTYPES:
        case = make(*sizes, dtype=dtype, shared=False)
        with pf.use_backend("reference"):
            expected = case.run()
        for a, b in zip(case.run(), expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b)


def test_values_that_are_not_finite_stay_with_their_pair():
    case = make((1, 2, 3, 32), 1, rotary_dim=16)
    q = case.q.detach().clone()
    q[0, 1, 2, 3], q[0, 0, 1, 20] = float("nan"), float("inf")
    expected, (result, _k) = case.run()[0].clone(), pf.ops.rope(q, case.k, case.cos, case.sin)
    assert result[0, 1, 2, [3, 11]].isnan().all()
    expected[0, 1, 2, [3, 11]], expected[0, 0, 1, 20] = result[0, 1, 2, [3, 11]], float("inf")
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


def test_heads_further_apart_than_32_bits():
    """Strides are 64-bit numbers: two heads more than 2^31 elements apart."""
    stride, before = 2**31 + 64, torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # pages that nothing touches cost nothing
    try:
        buffer = torch.empty(stride + 64, dtype=LOW)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    q = buffer.as_strided((1, 2, 2, 32), (0, stride, 32, 1))
    q.copy_(torch.randn(1, 2, 2, 32))
    cos, sin = tables(2, 32, batch=1)
    for a, b in zip(pf.ops.rope(q, q, cos, sin), pf.ops.rope(q.contiguous(), q.contiguous(), cos, sin), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_results_may_be_unused(used):
    case = make((2, 4, 5, 32), 2)
    expected = case.run()[2:]
    results = pf.ops.rope(case.q, case.k, case.cos, case.sin)
    leaf = (case.q, case.k)[used]
    assert torch.equal(torch.autograd.grad(results[used], leaf, case.douts[used])[0], expected[used])
    frozen = [t.detach().requires_grad_(i == used) for i, t in enumerate((case.q, case.k))]
    results = pf.ops.rope(*frozen, case.cos, case.sin)
    assert torch.equal(torch.autograd.grad(results[used], frozen[used], case.douts[used])[0], expected[used])


COS, SIN = tables(5, 16, batch=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 4, 5, 16, dtype=torch.int64)}, "q is int64, needs"),
        ({"q": None}, "q is NoneType, needs a tensor"),
        ({"q": torch.randn(5, 16)}, r"q is \[5, 16\], needs \[batch, heads, tokens, head_dim\]"),
        ({"k": torch.randn(2, 2, 5, 16).half()}, "k is float16, needs float32"),
        ({"k": torch.randn(2, 2, 6, 16)}, r"k is \[2, 2, 6, 16\], needs q's shape \[2, 4, 5, 16\] up to the heads"),
        ({"k": torch.randn(3, 2, 5, 16)}, r"k is \[3, 2, 5, 16\], needs"),
        ({"k": torch.randn(2, 5, 16)}, r"k is \[2, 5, 16\], needs"),
        ({"cos": COS[0]}, r"cos is \[5, 16\], needs \[2 or 1, 5, rotary_dim\] for q \[2, 4, 5, 16\]"),
        ({"cos": COS.expand(3, 5, 16)}, r"cos is \[3, 5, 16\], needs \[2 or 1, 5"),
        ({"cos": COS[:, :4]}, r"cos is \[1, 4, 16\], needs"),
        ({"cos": COS[:, :1]}, r"cos is \[1, 1, 16\], needs"),
        ({"cos": COS[..., :15], "sin": SIN[..., :15]}, r"cos is \[1, 5, 15\], needs an even last size"),
        ({"cos": COS[..., :0], "sin": SIN[..., :0]}, r"cos is \[1, 5, 0\], needs an even last size"),
        ({"cos": COS.repeat(1, 1, 2), "sin": SIN.repeat(1, 1, 2)}, r"cos is \[1, 5, 32\], needs .* 2 to 16"),
        ({"sin": SIN[..., :8]}, r"sin is \[1, 5, 8\], needs cos's shape \[1, 5, 16\]"),
        ({"sin": SIN.half()}, "sin is float16, needs float32"),
        ({"sin": SIN.to("meta")}, "sin is on meta"),
        ({"cos": COS.clone().requires_grad_()}, "cos requires grad, needs detaching"),
        ({"sin": SIN.clone().requires_grad_()}, "sin requires grad, needs detaching"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"q": torch.randn(2, 4, 5, 16), "k": torch.randn(2, 2, 5, 16), "cos": COS, "sin": SIN} | change
    with pytest.raises(pf.InvalidInput, match=f"rope: .*{message}"):
        pf.ops.rope(**arguments)


def test_packed_tables_have_no_batch():
    q = torch.randn(5, 4, 16)
    for cos, sin in ((COS, SIN), (COS[0, :1], SIN[0, :1])):
        with pytest.raises(pf.InvalidInput, match=r"rope: cos is .* needs \[5, rotary_dim\] for q \[5, 4, 16\]"):
            pf.ops.rope(q, q, cos, sin)


# 6. opcheck, fullgraph and dynamic compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
@pytest.mark.parametrize("shape", [(2, 4, 3, 16), (3, 4, 16)], ids=str)
def test_opcheck(backend, shape):
    case = make(shape, 2, rotary_dim=8)
    op = torch.ops.pyfinetune.rope.default
    views = [
        (case.q, case.k),
        [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (case.q, case.k)],
        [t.detach()[:, :1].expand(t.shape).requires_grad_() for t in (case.q, case.k)],
        [torch.cat([t.detach()] * 2, -1)[..., : t.shape[-1]].requires_grad_() for t in (case.q, case.k)],
        [t.detach().mT.contiguous().mT.requires_grad_() for t in (case.q, case.k)],
    ]
    with pf.use_backend(backend):
        for q, k in views:
            torch.library.opcheck(op, (q, k, case.cos, case.sin))
    assert REGISTRY["rope"].prepare is not None


@pytest.mark.parametrize("shape", [(2, 4, 3, 16), (3, 4, 16)], ids=str)
def test_fullgraph_compile_and_dynamic_shapes(shape):
    def step(q, k, cos, sin):
        return sum(y.square().sum() * (i + 1) for i, y in enumerate(pf.ops.rope(q, k, cos, sin)))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 6, 9):
        sizes = (2, 4, tokens, 16) if len(shape) == 4 else (tokens, 4, 16)
        case = make(sizes, 2, rotary_dim=8)
        leaves = [case.q, case.k]
        expected = torch.autograd.grad(step(*leaves, case.cos, case.sin), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves, case.cos, case.sin), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


# 7. determinism


def test_same_bits_a_hundred_times():
    case = make((2, 4, 33, 64), 2, dtype=LOW)
    expected = case.run()
    for _ in range(10 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="threads are the CPU kernels'")
def test_the_thread_count_changes_no_bit():
    case, threads = make((2, 8, 301, 64), 3), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# 8. named regressions


def test_float32_tables_are_not_rounded():
    """transformers #29285: tables rounded to bfloat16 move far positions; float32 ones are used as they are."""
    case = make((1, 2, 64, 32), 1, dtype=torch.bfloat16, table_dtype=torch.float32)
    (q, k), exact = pf.ops.rope(case.q, case.k, case.cos, case.sin), case.exact()
    assert (q.dtype, k.dtype) == (torch.bfloat16, torch.bfloat16)
    rounded = pf.ops.rope(case.q, case.k, case.cos.bfloat16(), case.sin.bfloat16())
    wrong, wrong_rounded = ((result != exact[0].bfloat16()).sum() for result in (q, rounded[0]))
    assert 10 * wrong < wrong_rounded


def test_a_broadcast_gradient_is_read_by_its_strides():
    """TransformerEngine (ROCm) #623: the gradient of a plain sum is one element with strides of zero; a kernel that
    took it for rows read past its end."""
    case = make((2, 4, 5, 32), 2)
    results = pf.ops.rope(case.q, case.k, case.cos, case.sin)
    grads = torch.autograd.grad(sum(y.sum() for y in results), [case.q, case.k])
    expected = torch.autograd.grad(
        pf.ops.rope(case.q, case.k, case.cos, case.sin), [case.q, case.k], [torch.ones_like(y) for y in results]
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
