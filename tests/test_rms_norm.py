"""Op rms_norm: root-mean-square normalisation, with the residual sum before it, Gemma's offset, and both gradients."""

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


@dataclasses.dataclass
class Case:
    """Inputs of one call; all of them are leaves."""

    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0

    def inputs(self):
        return [t for t in (self.x, self.weight, self.residual) if t is not None]

    def forward(self):
        """[y], or [y, new residual stream]."""
        result = pf.ops.rms_norm(self.x, self.weight, self.eps, residual=self.residual, offset=self.offset)
        return [result] if self.residual is None else list(result)

    def eager(self):
        """What Hugging Face's modules compute: Llama's, and Gemma's where there is an offset."""
        x = self.x if self.residual is None else self.x + self.residual
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            y = (normal * (self.offset + self.weight.to(normal.dtype))).to(x.dtype)
        else:
            y = (self.weight * normal.to(x.dtype)).to(x.dtype)
        return [y] if self.residual is None else [y, x]

    def run(self, function=None):
        """Results and gradients, of pf.ops by default."""
        results = (function or self.forward)()
        upstream = [gradient(i, y, self.x.dtype) for i, y in enumerate(results)]
        return [*results, *torch.autograd.grad(results, self.inputs(), upstream)]

    def exact(self):
        """Results and gradients by the reference in float64, from the new residual stream as it is rounded."""
        if self.residual is not None:
            # The stream is rounded by definition, so its own error must not be held against what comes after it.
            total = (self.x + self.residual).detach()
            y, dx, dweight, dresidual = Stream(self, total).run()
            return [y, total.double(), dx, dweight, dresidual]
        case = Case(self.x.double(), self.weight.double(), None, self.eps, self.offset).leaves()
        with pf.use_backend("reference"):
            results = case.forward()
            return [*results, *torch.autograd.grad(results, case.inputs(), gradient(0, results[0], self.x.dtype))]

    def leaves(self):
        """The same with leaves that require grad."""
        parts = (self.x, self.weight, self.residual)
        return dataclasses.replace(
            self,
            **{
                field: None if part is None else part.detach().requires_grad_()
                for field, part in zip(("x", "weight", "residual"), parts, strict=True)
            },
        )


@dataclasses.dataclass
class Stream:
    """The exact result of a case with a residual, given its rounded sum."""

    case: Case
    total: torch.Tensor

    def run(self):
        inner = Case(self.total.double(), self.case.weight.double(), None, self.case.eps, self.case.offset).leaves()
        with pf.use_backend("reference"):
            (y,) = inner.forward()
            dx, dweight = torch.autograd.grad(y, inner.inputs(), gradient(0, y, self.total.dtype))
        dx = dx + gradient(1, y, self.total.dtype)
        return y, dx, dweight, dx


def gradient(seed, y, dtype):
    """The same random gradient, representable in `dtype`, for every run of a case."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(5 + seed)
    return torch.randn(y.shape, generator=generator).to(dtype).to(y.dtype)


def make(*shape, dtype=torch.float32, weight_dtype=None, residual=False, offset=0.0, scale=1.0):
    x = (torch.randn(shape) * scale).to(dtype)
    weight = ((1.0 - offset) + 0.3 * torch.randn(shape[-1])).to(weight_dtype or dtype)
    second = (torch.randn(shape) * scale).to(dtype) if residual else None
    return Case(x, weight, second, offset=offset).leaves()


OPTIONS = [{}, {"offset": 1.0}, {"residual": True}, {"residual": True, "offset": 1.0}]


def option_name(options):
    return "-".join(f"{key}{value}" for key, value in options.items()) or "plain"


def hold_to_the_oracle(backend, *shape, draws=3, **options):
    """Several draws are judged together: the largest of a few rounding errors is a matter of luck."""
    ours, theirs, exact = [], [], []
    for _ in range(draws):
        case = make(*shape, **options)
        with pf.use_backend(backend):
            ours.append(case.run())
        theirs.append(case.run(case.eager))
        exact.append(case.exact())
    outputs = 2 if options.get("residual") else 1
    for i in range(len(ours[0])):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        assert_as_good_as(*stacked, BACKWARD if i >= outputs else FORWARD, f"result {i}")


# 1. reference against float64


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_is_as_good_as_eager(dtype, options):
    hold_to_the_oracle("reference", 24, 96, dtype=dtype, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_reference_in_float64_is_the_formula(options):
    case = make(3, 5, 32, dtype=torch.float64, **options)
    for ours, theirs in zip(case.run(), case.run(case.eager), strict=True):
        torch.testing.assert_close(ours, theirs)


# 2. gradcheck


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_gradcheck_of_the_reference(options):
    case = make(2, 3, 7, dtype=torch.float64, **options)

    def f(x, weight, residual=None):
        return tuple(dataclasses.replace(case, x=x, weight=weight, residual=residual).forward())

    assert torch.autograd.gradcheck(f, case.inputs())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_finite_differences_through_every_backend(backend, options):
    case = make(9, 40, **options)
    with pf.use_backend(backend):
        results = case.forward()
        upstream = [gradient(i, y, torch.float32) for i, y in enumerate(results)]
        grads = torch.autograd.grad(results, case.inputs(), upstream)
        for leaf, grad in zip(case.inputs(), grads, strict=True):
            direction, step, moved = torch.randn_like(leaf), 1e-2, []
            with torch.no_grad():
                for sign in (1, -1):
                    leaf.add_(direction, alpha=sign * step)
                    results = case.forward()
                    moved.append(sum((y * g).sum().double() for y, g in zip(results, upstream, strict=True)))
                    leaf.sub_(direction, alpha=sign * step)
            numeric = (moved[0] - moved[1]) / (2 * step)
            torch.testing.assert_close((grad * direction).sum().double(), numeric, rtol=2e-2, atol=2e-2)


# 3. every backend against the reference


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("shape", [(1, 576), (5, 33), (70, 128), (3, 2, 4096), (300, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_is_as_good_as_eager(backend, dtype, shape, options):
    hold_to_the_oracle(backend, *shape, dtype=dtype, **options)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_weights_of_another_dtype(backend, dtype, weight_dtype):
    case = make(40, 64, dtype=dtype, weight_dtype=weight_dtype)
    with pf.use_backend(backend):
        y, dx, dweight = case.run()
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, weight_dtype)
    hold_to_the_oracle(backend, 40, 64, dtype=dtype, weight_dtype=weight_dtype)


@pytest.mark.parametrize("scale", [1e-4, 1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_of_another_scale(backend, dtype, scale):
    hold_to_the_oracle(backend, 20, 128, dtype=dtype, scale=scale)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_gradient_of_the_weight_sums_many_rows_well(backend):
    """A single chain of thousands of float32 additions would gather more error than torch's sum in steps."""
    for dtype in (torch.float32, LOW):
        hold_to_the_oracle(backend, 1000 if INTERPRETED else 5000, 24, dtype=dtype, weight_dtype=torch.float32)


# 4. layouts


@pytest.mark.parametrize("field", ["x", "residual", "weight"])
def test_any_layout_of_every_input(field):
    case = make(6, 48, residual=True)
    expected = case.run()
    for layout, view in layouts(getattr(case, field).detach()).items():
        before = view.clone()
        result = dataclasses.replace(case, **{field: view}).leaves().run()
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b), layout
        assert torch.equal(view, before)


def test_any_layout_of_the_gradients():
    case = make(6, 48, residual=True)
    douts = [torch.randn(6, 48), torch.randn(6, 48)]
    expected = torch.autograd.grad(case.forward(), case.inputs(), douts)
    for first, second in zip(layouts(douts[0]).values(), layouts(douts[1]).values(), strict=True):
        result = torch.autograd.grad(case.forward(), case.inputs(), [first, second])
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    expanded = torch.autograd.grad(sum(y.sum() for y in case.forward()), case.inputs())
    ones = torch.autograd.grad(case.forward(), case.inputs(), [torch.ones(6, 48)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_heads_of_a_fused_projection(dtype):
    """Norms of queries and keys see views of one projection, heads before or after tokens."""
    fused = torch.randn(2, 7, 5 * 32).to(dtype)
    weight = torch.randn(32).to(dtype)
    heads = fused[..., 32 : 4 * 32].unflatten(-1, (3, 32))
    for view in (heads, heads.transpose(1, 2), heads.permute(2, 1, 0, 3), heads[:, ::2], heads[:, :, :1]):
        assert torch.equal(pf.ops.rms_norm(view, weight), pf.ops.rms_norm(view.contiguous(), weight))
        case, plain = Case(view, weight).leaves(), Case(view.contiguous(), weight).leaves()
        assert all(torch.equal(a, b) for a, b in zip(case.run(), plain.run(), strict=True))


def test_many_dimensions_and_expanded_input():
    case = make(2, 1, 3, 2, 1, 2, 24)
    flat = dataclasses.replace(case, x=case.x.detach().reshape(24, 24)).leaves()
    for a, b in zip(case.run(), flat.run(), strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    row = torch.randn(1, 24)
    expanded = pf.ops.rms_norm(row.expand(9, 24), case.weight)
    assert torch.equal(expanded, pf.ops.rms_norm(row, case.weight).expand(9, 24))
    assert torch.equal(pf.ops.rms_norm(row[0], case.weight), expanded[0])


def test_inputs_are_not_changed():
    case = make(40, 48, residual=True, dtype=LOW)
    before = [t.detach().clone() for t in case.inputs()]
    results = case.forward()
    upstream = [torch.randn_like(y) for y in results]
    held = [t.detach().clone() for t in (*results, *upstream)]
    torch.autograd.grad(results, case.inputs(), upstream)
    assert all(torch.equal(a, b) for a, b in zip(case.inputs(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*results, *upstream), held, strict=True))


def test_second_backward_gives_the_same_gradients():
    case = make(40, 48, residual=True, dtype=LOW)
    results = case.forward()
    upstream = [torch.randn_like(y) for y in results]
    first = torch.autograd.grad(results, case.inputs(), upstream, retain_graph=True)
    case.run()
    second = torch.autograd.grad(results, case.inputs(), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# 5. edge shapes


@pytest.mark.parametrize(
    "shape", [(0, 8), (2, 0, 8), (1,), (7,), (1, 1), (3, 17), (2, 31), (33, 65), (2, 1023)], ids=str
)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_empty_and_odd_shapes(shape, options):
    for dtype in DTYPES:
        case = make(*shape, dtype=dtype, **options)
        with pf.use_backend("reference"):
            expected = case.run()
        for a, b in zip(case.run(), expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_zero_rows_and_rows_that_are_not_finite_stay_alone(dtype):
    case = make(6, 40, dtype=dtype)
    clean = case.run()
    x = case.x.detach().clone()
    x[1], x[3, 7], x[4, 9] = 0, float("inf"), float("nan")
    y, dx, _dweight = dataclasses.replace(case, x=x).leaves().run()
    assert not y[1].any()
    assert y[4].isnan().all() & y[3, 7].isnan()
    for row in (0, 2, 5):
        assert torch.equal(y[row], clean[0][row])
        assert torch.equal(dx[row], clean[1][row])
    assert dx[1].isfinite().all()


def test_rows_further_apart_than_32_bits():
    """Row strides are 64-bit numbers: two rows more than 2^31 elements apart."""
    stride, before = 2**31 + 64, torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # pages that nothing touches cost nothing
    try:
        buffer = torch.empty(stride + 64, dtype=LOW)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    x = buffer.as_strided((2, 64), (stride, 1))
    x.copy_(torch.randn(2, 64))
    weight = torch.randn(64)
    assert torch.equal(pf.ops.rms_norm(x, weight), pf.ops.rms_norm(x.contiguous(), weight))


def test_gradients_that_are_not_wanted_are_not_computed():
    case = make(8, 32, residual=True)
    for wanted in ({"x"}, {"weight"}, {"residual"}, {"x", "weight"}):
        leaves = {f: getattr(case, f).detach().requires_grad_(f in wanted) for f in ("x", "weight", "residual")}
        some = dataclasses.replace(case, **leaves)
        everything = dict(zip(("x", "weight", "residual"), case.run()[2:], strict=True))
        results = some.forward()
        upstream = [gradient(i, y, torch.float32) for i, y in enumerate(results)]
        inputs = [leaves[f] for f in sorted(wanted)]
        for field, grad in zip(sorted(wanted), torch.autograd.grad(results, inputs, upstream), strict=True):
            assert torch.equal(grad, everything[field])


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_results_may_be_unused(used):
    case = make(8, 32, residual=True)
    results = case.forward()
    grads = torch.autograd.grad(results[used], case.inputs(), torch.ones_like(results[used]), allow_unused=True)
    zeros = [torch.zeros_like(results[0]), torch.zeros_like(results[1])]
    zeros[used] += 1
    expected = torch.autograd.grad(case.forward(), case.inputs(), zeros)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(wanted) if grad is None else grad, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, "x is int64, needs"),
        ({"x": "text"}, "x is str, needs a tensor"),
        ({"x": torch.tensor(1.0)}, r"x is \[\], needs"),
        ({"x": torch.empty(3, 0), "weight": torch.empty(0)}, r"x is \[3, 0\], needs \[..., features\]"),
        ({"weight": torch.randn(63)}, r"weight is \[63\], needs \[64\]"),
        ({"weight": torch.randn(1, 64)}, r"weight is \[1, 64\], needs \[64\]"),
        ({"weight": None}, "weight is NoneType, needs a tensor"),
        ({"weight": torch.ones(64, dtype=torch.int8)}, "weight is int8, needs"),
        ({"weight": torch.ones(64, device="meta")}, r"x is on \S+, weight is on meta"),
        ({"residual": torch.randn(64)}, r"residual is \[64\], needs x's shape \[3, 64\]"),
        ({"residual": torch.randn(3, 64).bfloat16()}, "residual is bfloat16, needs float32"),
        ({"eps": -1e-6}, "eps is -1e-06, needs 0 <= eps"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    case = make(3, 64)
    with pytest.raises(pf.InvalidInput, match=f"rms_norm: {message}"):
        dataclasses.replace(case, **change).forward()


# 6. opcheck, fullgraph and dynamic compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_opcheck(backend, options):
    case = make(3, 4, 16, **options)
    prepared = REGISTRY["rms_norm"].prepare(case.x, case.weight, residual=case.residual, offset=case.offset)
    with pf.use_backend(backend):
        torch.library.opcheck(torch.ops.pyfinetune.rms_norm.default, prepared)
        transposed = (prepared[0].detach().transpose(0, 1).requires_grad_(), case.weight, None, 1e-6, 0.0)
        torch.library.opcheck(torch.ops.pyfinetune.rms_norm.default, transposed)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_fullgraph_compile_and_dynamic_shapes(options):
    case = make(8, 48, **options)

    def step(x, weight, residual=None):
        results = dataclasses.replace(case, x=x, weight=weight, residual=residual).forward()
        return sum(y.square().sum() for y in results)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 12, 40):
        leaves = [torch.randn(rows, 48).requires_grad_(), case.weight]
        leaves += [torch.randn(rows, 48).requires_grad_()] if options.get("residual") else []
        expected = torch.autograd.grad(step(*leaves), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


# 7. determinism


def test_same_bits_a_hundred_times():
    case = make(150, 96, dtype=LOW, residual=True)
    expected = case.run()
    for _ in range(10 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="threads are the CPU kernels'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_the_thread_count_changes_no_bit(dtype):
    case, threads = make(3000, 100, dtype=dtype), torch.get_num_threads()
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


def test_a_float32_weight_keeps_the_dtype_of_x():
    """transformers #30236: with float32 norm weights on bfloat16 activations Llama's norm returns float32, and the
    bfloat16 layer behind it fails."""
    case = make(4, 32, dtype=LOW, weight_dtype=torch.float32, residual=True)
    assert [y.dtype for y in case.forward()] == [LOW, LOW]


def test_statistics_of_float16_do_not_overflow():
    """meta-llama/llama #1048: normalised in float16, where squares overflow beyond 256, a model writes nonsense."""
    case = make(4, 64, dtype=torch.float16, scale=6000.0)
    hold_to_the_oracle(FAST_BACKENDS[0], 4, 64, dtype=torch.float16, scale=6000.0)
    assert case.forward()[0].isfinite().all()


def test_gemma_multiplies_before_it_rounds():
    """transformers #29402: Gemma's gain 1 + weight is float32 and is applied before the rounding; small weights are
    lost when the sum is rounded to bfloat16."""
    case = make(4, 64, dtype=LOW, offset=1.0)
    case = dataclasses.replace(case, weight=torch.full((64,), 1e-3, dtype=LOW)).leaves()
    exact = case.exact()[0]
    without = dataclasses.replace(case, weight=torch.zeros(64)).leaves().exact()[0]
    assert (exact - without).abs().max() > 1e-3  # the weight matters
    assert_as_good_as(case.forward()[0], case.eager()[0], exact, FORWARD)


def test_the_upstream_gradient_survives():
    """Liger-Kernel #370: dx was written over dout, which Gemma 2 still needs for its second branch."""
    case = make(16, 64, residual=True)
    inner = torch.randn(16, 64, requires_grad=True)
    y, stream = pf.ops.rms_norm(case.x, case.weight, residual=inner)
    branch = y * 2
    loss = (branch + stream).square().sum()
    dout = torch.autograd.grad(loss, y, retain_graph=True)[0]
    kept = dout.clone()
    torch.autograd.grad(y, [case.x, case.weight], dout, retain_graph=True)
    assert torch.equal(dout, kept)


def test_the_gradient_of_the_stream_is_added_after_the_norm():
    """quack #53: the stream's own gradient was added to dout before the norm's backward, and normalised with it."""
    case = make(6, 32, residual=True)
    y, stream = case.forward()
    dout, dstream = torch.randn_like(y), torch.randn_like(stream)
    both = torch.autograd.grad([y, stream], [case.x, case.residual], [dout, dstream], retain_graph=True)
    alone = torch.autograd.grad([y], [case.x, case.residual], [dout])
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, b + dstream)


def test_a_broadcast_gradient_is_read_by_its_strides():
    """TransformerEngine (ROCm) #623: the gradient of a plain sum is one element with strides of zero; a kernel that
    took it for rows read past its end."""
    case = make(16, 48)
    (dx,) = torch.autograd.grad(case.forward()[0].sum(), [case.x])
    (wanted,) = torch.autograd.grad(case.forward()[0], [case.x], torch.ones(16, 48))
    assert torch.equal(dx, wanted)
