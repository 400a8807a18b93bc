"""Op lora_linear: a base weight, dense or in 4 bits, with a low-rank update; dropout, bias, DoRA."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED, native_kernels
from lora_cases import eager, make, upstream
from oracle import BACKWARD, FORWARD, assert_as_good_as, layouts

import pyfinetune as pf
from pyfinetune.ops import _lora_linear_cpu as cpu
from pyfinetune.ops._op import REGISTRY

HALF = DTYPES[1]  # a 16-bit type that all the backends under test take


def name(value):
    return str(value).removeprefix("torch.")


def hold_to_the_oracle(backend: str, *sizes, draws: int = 3, **options):
    """Several draws are judged together: the largest of a few rounding errors is a matter of luck."""
    ours, theirs, exact = [], [], []
    for _ in range(draws):
        case = make(*sizes, **options)
        with pf.use_backend(backend):
            ours.append(case.run())
        theirs.append(case.without_packed(eager(case.cast(case.x.dtype))))
        exact.append(case.exact())
    for i in range(len(ours[0])):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        assert_as_good_as(*stacked, BACKWARD if i else FORWARD, f"output {i}")


OPTIONS = [
    {"rank": 0},
    {"rank": 0, "bias": True},
    {"rank": 8},
    {"rank": 4, "bias": True, "dropout_p": 0.25},
    {"rank": 8, "dora": True, "bias": True},
    {"rank": 3, "dora": True, "dropout_p": 0.5},
]


def option_name(options):
    return "-".join(f"{key}{value}" for key, value in options.items())


# 1. reference against float64


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_is_as_good_as_eager(dtype, packed, options):
    hold_to_the_oracle("reference", 24, 48, 64, dtype=dtype, packed=packed, **options)


def test_reference_in_float64_is_the_formula():
    case = make(5, 12, 32, 4, dtype=torch.float32, packed=False, bias=True).cast(torch.float64)
    update = case.lora_b @ case.lora_a
    expected = case.x @ (case.weight + case.scaling * update).T + case.bias
    torch.testing.assert_close(case.run()[0], expected)
    dora = make(5, 12, 32, 4, dtype=torch.float32, packed=False, dora=True).cast(torch.float64)
    merged = dora.weight + dora.scaling * dora.lora_b @ dora.lora_a
    expected = dora.x @ (dora.magnitude / merged.norm(dim=1))[:, None].mul(merged).T
    torch.testing.assert_close(dora.run()[0], expected)


# 2. gradcheck


@pytest.mark.parametrize("options", [o for o in OPTIONS if "dora" not in o], ids=option_name)
def test_gradcheck_of_the_reference(options):
    case = make(3, 6, 32, dtype=torch.float32, packed=False, **options).cast(torch.float64)

    def f(*leaves):
        x, weight, *rest = leaves
        a, b = rest[:2] if case.lora_a is not None else (None, None)
        bias = rest[-1] if case.bias is not None else None
        return pf.ops.lora_linear(x, weight, a, b, case.scaling, bias, case.dropout_p, case.seed)

    assert torch.autograd.gradcheck(f, case.inputs())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_dora(dropout_p):
    """The norm is a constant by definition, so A and B are checked by formula, the rest numerically."""
    case = make(3, 6, 32, 2, dtype=torch.float32, packed=False, dora=True, bias=True, dropout_p=dropout_p)
    case = case.cast(torch.float64)
    weight, a, b = (t.detach() for t in (case.weight, case.lora_a, case.lora_b))

    def f(x, bias, magnitude):
        return pf.ops.lora_linear(x, weight, a, b, case.scaling, bias, dropout_p, case.seed, magnitude)

    assert torch.autograd.gradcheck(f, (case.x, case.bias, case.magnitude))
    for ours, theirs in zip(case.run(), eager(case), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("rows", [3, 40])
def test_finite_differences_through_every_backend(backend, rows):
    case = make(rows, 16, 64, 4, dtype=torch.float32, packed=True, bias=True, dropout_p=0.2)
    with pf.use_backend(backend):
        y, *grads = case.run()
        dout = upstream(y, torch.float32)
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
            torch.testing.assert_close((grad * direction).sum().double(), numeric, rtol=2e-2, atol=2e-2)


# 3. every backend against the reference


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("rows", [1, 33, 70] if INTERPRETED else [1, 7, 32, 33, 70])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_is_as_good_as_eager(backend, dtype, packed, rows, options):
    hold_to_the_oracle(backend, rows, 80, 192, dtype=dtype, packed=packed, **options)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
def test_float32_adapters_on_a_16_bit_base(packed, backend):
    options = {"dtype": HALF, "adapter_dtype": torch.float32, "packed": packed}
    case = make(40, 64, 128, 8, **options)
    _y, *grads = case.run()
    assert [g.dtype for g in grads[-2:]] == [torch.float32, torch.float32]
    hold_to_the_oracle(backend, 40, 64, 128, 8, **options)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("options", [{"rank": 16, "dropout_p": 0.25}, {"rank": 17, "dora": True}], ids=option_name)
@pytest.mark.parametrize("rows", [63, 64, 65, 129])
def test_rows_next_to_a_tile(backend, rows, options):
    for out, inner in ((127, 128), (128, 129), (129, 127)):
        hold_to_the_oracle(backend, rows, out, inner, draws=2, dtype=torch.float32, packed=rows > 64, **options)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("rank", [1, 15, 16, 32, 33, 128, 256])
def test_every_rank(backend, rank):
    for packed in (False, True):
        hold_to_the_oracle(backend, 33, 40, 96, rank, draws=2, dtype=HALF, packed=packed, bias=True)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"dora": True}, {"dora": True, "dropout_p": 0.5}], ids=str)
def test_an_adapter_of_rank_zero(packed, options):
    if "dora" in options and "cpu" in FAST_BACKENDS:
        pytest.skip("the CPU kernel of the norms refuses a rank of zero")
    case = make(5, 12, 32, 2, dtype=torch.float32, packed=packed, bias=True, **options)
    case = dataclasses.replace(case, lora_a=torch.zeros(0, 32).requires_grad_(), lora_b=case.lora_b[:, :0].detach())
    case.lora_b.requires_grad_()
    with pf.use_backend("reference"):
        expected = case.run()
    for a, b in zip(case.run(), expected, strict=True):
        torch.testing.assert_close(a, b)


# 4. layouts


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("rows", [6, 40])
def test_any_layout_of_every_input(rows, packed):
    case = make(rows, 48, 64, 4, dtype=torch.float32, packed=packed, bias=True, dropout_p=0.1, dora=True)
    expected = case.forward()
    for field in ("x", "weight", "lora_a", "lora_b"):
        if field == "weight" and packed:
            continue
        for layout, view in layouts(getattr(case, field).detach()).items():
            before = view.clone()
            result = dataclasses.replace(case, **{field: view}).forward()
            torch.testing.assert_close(result, expected, msg=f"{field}, {layout}")
            assert torch.equal(view, before)


def test_leading_dimensions_and_expanded_input():
    case = make(24, 16, 64, 4, dtype=torch.float32, packed=True)
    flat = case.forward()
    shaped = dataclasses.replace(case, x=case.x.view(2, 3, 4, 64)).forward()
    assert torch.equal(shaped.view(24, 16), flat)
    row = torch.randn(1, 64)
    expanded = dataclasses.replace(case, x=row.expand(40, 64)).forward()
    torch.testing.assert_close(expanded, dataclasses.replace(case, x=row.repeat(40, 1)).forward())


def test_a_strided_gradient():
    case = make(40, 16, 64, 4, dtype=torch.float32, packed=True)
    y = case.forward()
    dout = torch.randn(16, 40).T
    expected = torch.autograd.grad(y, case.inputs(), dout.contiguous())
    for a, b in zip(torch.autograd.grad(case.forward(), case.inputs(), dout), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_mutated():
    case = make(40, 48, 64, 4, dtype=torch.float32, packed=True, bias=True, dora=True, dropout_p=0.1)
    everything = [*case.inputs(), *(t for t in case.packed.tensors() if t is not None)]
    before = [t.detach().clone() for t in everything]
    case.run()
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def test_second_backward_gives_the_same_gradients():
    case = make(40, 48, 64, 4, dtype=HALF, packed=True, bias=True, dora=True, dropout_p=0.1)
    y = case.forward()
    dout = torch.randn_like(y)
    first = torch.autograd.grad(y, case.inputs(), dout, retain_graph=True)
    case.run()
    second = torch.autograd.grad(y, case.inputs(), dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# 5. edge shapes


@pytest.mark.parametrize("shape", [(0, 8, 32), (3, 0, 32), (1, 1, 1), (2, 3, 33), (35, 5, 63), (33, 130, 100)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
def test_empty_and_odd_shapes(packed, shape):
    rows, out, inner = shape
    for dtype in (torch.float32, HALF):
        case = make(rows, out, inner, 2, dtype=dtype, packed=packed, bias=True)
        with pf.use_backend("reference"):
            expected = case.run()
        result = case.run()
        for a, b in zip(result, expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=6e-2)


@native_kernels
@pytest.mark.parametrize("inner", [64, 96, 1000, 1024, 1090, 2048, 2112])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_small_product_at_every_depth(dtype, inner):
    for rows in (1, 2, 5, 6, 7, 12, 31, 32):
        case = make(rows, 21, inner, 0, dtype=dtype, packed=True)
        exact = case.x.double() @ case.weight.double().T
        y = case.forward()
        plain = torch.nn.functional.linear(case.x, case.weight)
        assert_as_good_as(y, plain, exact, FORWARD, f"{rows} rows")


@native_kernels
def test_weights_wider_than_the_scratch():
    case = make(40, 6, 300_000, 2, dtype=torch.float32, packed=True)
    with pf.use_backend("reference"):
        expected = case.forward()
    torch.testing.assert_close(case.forward(), expected, rtol=1e-3, atol=1e-3)


@native_kernels
def test_the_whole_decoded_weight_never_exists():
    """The scratch holds a few MiB, whatever the weight: the working set of a 4-bit layer stays a 4-bit layer's."""
    case = make(64, 4096, 4096, 4, dtype=torch.bfloat16, packed=True)
    cpu._scratch.buffer = None
    tracker = LargestAllocation()
    with tracker:
        y = case.forward()
        torch.autograd.grad(y, [case.x, case.lora_a, case.lora_b], torch.ones_like(y))
    assert tracker.largest <= cpu.SCRATCH_BYTES < 4096 * 4096 * 2


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that any torch operation inside the block returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and "pyfinetune" not in str(func):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 63)}, r"x is \[3, 63\], needs \[..., 64\]"),
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, "x is int64, needs"),
        ({"lora_a": torch.randn(4, 63)}, r"lora_a is \[4, 63\], needs \[r, 64\]"),
        ({"lora_b": torch.randn(48, 5)}, r"lora_b is \[48, 5\], needs \[48, 4\]"),
        ({"lora_b": None}, "lora_a and lora_b go together"),
        ({"bias": torch.randn(47)}, r"bias is \[47\], needs \[48\]"),
        ({"magnitude": torch.randn(1, 48)}, r"magnitude is \[1, 48\], needs \[48\]"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0, needs 0 <= p < 1"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, "seed is torch.float32"),
        ({"lora_a": None, "lora_b": None, "magnitude": torch.ones(48)}, "magnitude needs lora_a and lora_b"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    case = make(3, 48, 64, 4, dtype=torch.float32, packed=True)
    with pytest.raises(pf.InvalidInput, match=f"lora_linear: .*{message}"):
        dataclasses.replace(case, **change).forward()


# 6. opcheck, fullgraph and dynamic compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_opcheck(packed, options):
    case = make(5, 16, 64, dtype=torch.float32, packed=packed, **options)
    torch.library.opcheck(torch.ops.pyfinetune.lora_linear.default, REGISTRY["lora_linear"].prepare(*case.args()))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
def test_fullgraph_compile_and_dynamic_shapes(packed):
    case = make(8, 48, 64, 4, dtype=torch.float32, packed=packed, bias=True, dora=True, dropout_p=0.2)

    def step(x, a, b):
        return dataclasses.replace(case, x=x, lora_a=a, lora_b=b).forward().square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 12, 40):
        leaves = [torch.randn(rows, 64).requires_grad_(), case.lora_a, case.lora_b]
        expected = torch.autograd.grad(step(*leaves), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_compiles_it_in_one_graph():
    case = make(8, 48, 64, 4, dtype=torch.float32, packed=True, bias=True)
    compiled = torch.compile(lambda x: dataclasses.replace(case, x=x).forward() * 2, fullgraph=True)
    torch.testing.assert_close(compiled(case.x), case.forward() * 2)


def test_autocast_sets_the_compute_dtype():
    case = make(40, 48, 64, 4, dtype=torch.float32, packed=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.forward()
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, case.inputs(), torch.ones_like(y))
    assert {g.dtype for g in grads} == {torch.float32}


def test_a_drawn_seed_follows_the_generator():
    case = make(40, 48, 64, 4, dtype=torch.float32, packed=True, dropout_p=0.3)
    case = dataclasses.replace(case, seed=None)
    torch.manual_seed(1)
    first, second = case.forward(), case.forward()
    torch.manual_seed(1)
    assert torch.equal(case.forward(), first)
    assert not torch.equal(first, second)


# 7. determinism


@pytest.mark.parametrize("rows", [4, 40])
def test_same_bits_a_hundred_times(rows):
    case = make(rows, 96, 256, 8, dtype=HALF, packed=True, bias=True, dropout_p=0.1)
    expected = case.run()
    for _ in range(5 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@native_kernels
def test_the_small_product_does_not_depend_on_the_thread_count():
    case = make(9, 101, 1500, 0, dtype=torch.float32, packed=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.forward())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# 8. named regressions


def test_bias_and_dropout_and_dora_stay_on_the_fast_path():
    """unsloth #23, #373: the fast path switched itself off for biases, dropout and DoRA, and said nothing."""
    case = make(40, 48, 64, 4, dtype=HALF, packed=True, bias=True, dora=True, dropout_p=0.1)
    assert pf.explain("lora_linear", *case.args()).backend == FAST_BACKENDS[0]


def test_a_fresh_adapter_changes_nothing():
    """With B = 0 the layer is the base layer, and A gets a zero gradient."""
    case = make(40, 48, 64, 4, dtype=torch.float32, packed=True)
    case.lora_b.data.zero_()
    base = dataclasses.replace(case, lora_a=None, lora_b=None).forward()
    y, _dx, da, db = case.run()
    if FAST_BACKENDS == ["cpu"]:
        assert torch.equal(y, base)
    else:  # the adapter's columns, all zeros, stand in the base's own sum, which may be cut elsewhere for it
        torch.testing.assert_close(y, base)
    assert db.any() and not da.any()  # noqa: PT018


def test_rows_that_are_no_multiple_of_the_block_in_4_bits():
    """bitsandbytes decodes rows that are no multiple of the block wrongly; bands and slabs must start mid-block."""
    for rows in (4, 40):
        case = make(rows, 70, 2720 // 16, 4, dtype=torch.float32, packed=True)
        with pf.use_backend("reference"):
            expected = case.run()
        for a, b in zip(case.run(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
