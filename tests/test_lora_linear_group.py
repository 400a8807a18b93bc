"""Op lora_linear_group: several linear layers with low-rank updates over one input."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED
from lora_cases import Case, eager, make, upstream
from oracle import BACKWARD, FORWARD, assert_as_good_as, layouts

import pyfinetune as pf
from pyfinetune.ops._op import REGISTRY

HALF = DTYPES[1]  # a 16-bit type that all the backends under test take


def name(value):
    return str(value).removeprefix("torch.")


class Group:
    """Several cases over the first one's x."""

    def __init__(self, cases: list[Case]):
        seeds = range(100, 100 + len(cases))
        self.cases = [dataclasses.replace(c, x=cases[0].x, seed=s) for c, s in zip(cases, seeds, strict=True)]

    @property
    def x(self):
        return self.cases[0].x

    def args(self):
        each = [case.args() for case in self.cases]
        columns = [list(column) for column in zip(*each, strict=True)]
        x, weights, a, b, scalings, biases, ps, seeds, magnitudes = columns
        return (x[0], weights, a, b, scalings, biases, ps, seeds, magnitudes)

    def inputs(self):
        return [self.x, *(leaf for case in self.cases for leaf in case.inputs()[1:])]

    def forward(self):
        return pf.ops.lora_linear_group(*self.args())

    def results(self, ys):
        douts = [upstream(y, self.x.dtype) for y in ys]
        return [*ys, *torch.autograd.grad(ys, self.inputs(), douts)]

    def run(self):
        """(ys, gradients of x and of every leaf) through the group."""
        return self.results(self.forward())

    def separate(self):
        """The same by one call of lora_linear for each layer."""
        return self.results([case.forward() for case in self.cases])

    def exact(self):
        """By the reference in float64, layer by layer."""
        return self.combine([case.exact() for case in self.cases])

    def eager(self):
        """By torch's plain operators in the same dtype."""
        return self.combine([case.without_packed(eager(case.cast(self.x.dtype))) for case in self.cases])

    @staticmethod
    def combine(each):
        dx = each[0][1]
        for results in each[1:]:
            dx = dx + results[1]
        return [*(results[0] for results in each), dx, *(grad for results in each for grad in results[2:])]


# Of each layer: width, rank, and options of `make`.
KINDS = {
    "qkv": [(80, 8, {}), (16, 8, {}), (16, 8, {})],
    "ranks": [(48, 3, {}), (33, 16, {}), (20, 40, {})],
    "bias": [(48, 4, {"bias": True}), (16, 0, {"bias": True}), (16, 4, {})],
    "dropout": [(48, 4, {"dropout_p": 0.3}), (16, 4, {"dropout_p": 0.1}), (16, 4, {})],
    "dora": [(48, 4, {"dora": True, "bias": True}), (16, 4, {}), (16, 4, {"dora": True, "dropout_p": 0.2})],
    "no adapter": [(48, 0, {}), (16, 0, {})],
    "one": [(48, 4, {})],
}
# Which layers are in 4 bits.
PACKED = {"dense": (False, False, False), "4bit": (True, True, True), "mixed": (False, True, True)}


def group(kind: str, packed: str = "dense", rows: int = 40, inner: int = 96, dtype=torch.float32, **options) -> Group:
    layers = zip(KINDS[kind], PACKED[packed], strict=False)
    return Group(
        [
            make(rows, out, inner, rank, dtype=dtype, packed=four_bit, **options, **more)
            for (out, rank, more), four_bit in layers
        ]
    )


def hold_to_the_oracle(backend: str, *args, draws: int = 2, **options):
    """Several draws are judged together: the largest of a few rounding errors is a matter of luck."""
    ours, theirs, exact = [], [], []
    for _ in range(draws):
        made = group(*args, **options)
        with pf.use_backend(backend):
            ours.append(made.run())
        theirs.append(made.eager())
        exact.append(made.exact())
    for i in range(len(ours[0])):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        assert_as_good_as(*stacked, BACKWARD if i >= len(made.cases) else FORWARD, f"output {i}")


# Against float64, and gradcheck


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_as_good_as_eager(backend, dtype, packed, kind):
    hold_to_the_oracle(backend, kind, packed, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("packed", PACKED)
def test_any_number_of_rows(packed, rows):
    for kind in ("qkv", "dropout"):
        hold_to_the_oracle(FAST_BACKENDS[0], kind, packed, rows=rows, dtype=HALF)


@pytest.mark.parametrize("packed", PACKED)
def test_float32_adapters_on_a_16_bit_base(packed):
    options = {"dtype": HALF, "adapter_dtype": torch.float32}
    made = group("qkv", packed, **options)
    grads = made.run()[len(made.cases) :]
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in made.inputs()]
    hold_to_the_oracle(FAST_BACKENDS[0], "qkv", packed, **options)


def test_gradcheck_of_the_reference():
    cases = [
        make(3, out, 8, 2, dtype=torch.float32, packed=False, bias=True, dropout_p=p) for out, p in ((5, 0.3), (4, 0))
    ]
    made = Group([case.cast(torch.float64) for case in cases])

    def f(x, *leaves):
        lists = [list(leaves[i::4]) for i in range(4)]
        weights, a, b, biases = lists
        return tuple(pf.ops.lora_linear_group(x, weights, a, b, [0.7, 0.7], biases, [0.3, 0.0], [1, 2]))

    assert torch.autograd.gradcheck(f, made.inputs())


# Against separate calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", PACKED)
def test_every_layer_is_what_it_is_alone(packed, kind):
    """Outputs and the parameters' gradients, bit for bit on a CPU; only dx is summed in another order."""
    made = group(kind, packed, dtype=HALF)
    together, alone = made.run(), made.separate()
    dx = len(made.cases)
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        if FAST_BACKENDS == ["cpu"]:
            assert i == dx or torch.equal(a, b), f"output {i}"
        else:  # the others' columns, all zeros, stand in each sum
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=f"output {i}")


def test_masks_are_independent():
    made = group("dropout")
    a, b = made.cases[:2]
    same = {"weight": a.weight, "lora_a": a.lora_a, "lora_b": a.lora_b, "bias": None, "dropout_p": 0.5}
    twins = [dataclasses.replace(case, **same) for case in (a, b)]
    first, second = pf.ops.lora_linear_group(*_twice(twins, seeds=[1, 2]))
    assert not torch.equal(first, second)
    first, second = pf.ops.lora_linear_group(*_twice(twins, seeds=[1, 1]))
    assert torch.equal(first, second)


def _twice(cases, seeds):
    made = Group(cases)
    made.cases = [dataclasses.replace(case, seed=seed) for case, seed in zip(made.cases, seeds, strict=True)]
    return made.args()


def test_drawn_seeds_follow_the_generator():
    x, *rest = group("dropout").args()
    rest[6] = None
    torch.manual_seed(1)
    first = pf.ops.lora_linear_group(x, *rest)
    again = pf.ops.lora_linear_group(x, *rest)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(pf.ops.lora_linear_group(x, *rest), first, strict=True))
    assert not torch.equal(first[0], again[0])


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_gradients_of_some_outputs_and_of_some_leaves(backend):
    with pf.use_backend(backend):
        made = group("dora", "mixed")
        made.cases[1].lora_a.requires_grad_(False)
        leaves = [made.x, made.cases[0].lora_b, made.cases[2].lora_a, made.cases[1].lora_b]
        for used in ([0], [1, 2], [0, 1, 2]):
            found = []
            for ys in (made.forward(), [case.forward() for case in made.cases]):
                total = sum((ys[i] * upstream(ys[i], torch.float32)).sum() for i in used)
                found.append(torch.autograd.grad(total, leaves, materialize_grads=True))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)
    frozen = group("qkv")
    with torch.no_grad():
        expected = frozen.forward()
    for leaf in frozen.inputs():
        leaf.requires_grad_(False)
    frozen.cases[1].lora_b.requires_grad_(True)
    ys = frozen.forward()
    assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))
    assert torch.autograd.grad(ys[1].sum(), frozen.cases[1].lora_b)[0].any()


# Layouts, edges, errors


def test_any_layout_of_x_and_of_the_gradients():
    made = group("dora", "mixed")
    expected = made.forward()
    for layout, view in layouts(made.x.detach()).items():
        before = view.clone()
        got = pf.ops.lora_linear_group(view, *made.args()[1:])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=layout)
        assert torch.equal(view, before)
    shaped = pf.ops.lora_linear_group(made.x.view(2, 20, -1), *made.args()[1:])
    assert all(torch.equal(a.view(40, -1), b) for a, b in zip(shaped, expected, strict=True))
    douts = [torch.randn(y.shape[1], 40).T for y in expected]
    found = torch.autograd.grad(made.forward(), made.inputs(), douts)
    plain = torch.autograd.grad(made.forward(), made.inputs(), [d.contiguous() for d in douts])
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_mutated_and_a_second_backward_is_the_same():
    made = group("dora", "mixed", dtype=HALF)
    packed = [t for case in made.cases if case.packed for t in case.packed.tensors() if t is not None]
    everything = [*made.inputs(), *packed]
    before = [t.detach().clone() for t in everything]
    ys = made.forward()
    douts = [upstream(y, HALF) for y in ys]
    first = torch.autograd.grad(ys, made.inputs(), douts, retain_graph=True)
    made.run()
    second = torch.autograd.grad(ys, made.inputs(), douts)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("shape", [(0, 32), (1, 1), (3, 33)], ids=str)
def test_empty_and_odd_shapes(packed, shape):
    rows, inner = shape
    for kind in ("qkv", "dropout", "dora"):
        made = group(kind, packed, rows=rows, inner=inner)
        with pf.use_backend("reference"):
            expected = made.run()
        for a, b in zip(made.run(), expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def change(args, at, value):
    args = list(args)
    args[at] = value(args[at]) if callable(value) else value
    return args


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.randn(3, 95), r"projection 0: x is \[3, 95\], needs \[..., 96\]"),
        (1, [], "there is no projection|has 3 elements, needs 0"),
        (2, lambda a: [a[0], torch.randn(8, 95), a[2]], r"projection 1: lora_a is \[8, 95\], needs \[r, 96\]"),
        (2, lambda a: a[:2], "lora_as has 2 elements, needs 3"),
        (3, lambda b: [*b[:2], None], "projection 2: lora_a and lora_b go together"),
        (4, [1.0], "scalings has 1 elements, needs 3"),
        (5, lambda b: [None, torch.randn(3), None], r"projection 1: bias is \[3\], needs \[16\]"),
        (6, [0.0, 1.0, 0.0], "projection 1: dropout_p is 1.0"),
        (7, [1, 2], "seeds has 2 elements, needs 3"),
        (8, lambda m: [None, None, torch.ones(15)], r"projection 2: magnitude is \[15\], needs \[16\]"),
    ],
)
def test_wrong_arguments_are_named(at, value, message):
    args = change(group("qkv").args(), at, value)
    with pytest.raises(pf.InvalidInput, match=f"lora_linear_group: .*({message})"):
        pf.ops.lora_linear_group(*args)


def test_the_lists_of_the_schema_are_counted():
    """The op itself may be called with anything; a missing or a spare tensor is an error, not a shifted list."""
    args = list(REGISTRY["lora_linear_group"].prepare(*group("qkv").args()))
    for at in (5, 6):
        for wrong in (args[at][:-1], [*args[at], args[at][0]]):
            with pytest.raises(pf.InvalidInput, match="lora_linear_group: a list has"):
                torch.ops.pyfinetune.lora_linear_group(*change(args, at, wrong))
    with pytest.raises(pf.InvalidInput, match="same number of projections"):
        torch.ops.pyfinetune.lora_linear_group(*change(args, 7, [1.0]))


# Registration, compilation, autocast


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(packed, kind):
    made = group(kind, packed, rows=5, inner=64)
    args = REGISTRY["lora_linear_group"].prepare(*made.args())
    torch.library.opcheck(torch.ops.pyfinetune.lora_linear_group.default, args)


def test_the_registered_gradient_is_the_eager_one():
    made = group("dora", "mixed")
    args = REGISTRY["lora_linear_group"].prepare(*made.args())
    registered = made.results(torch.ops.pyfinetune.lora_linear_group(*args)[0])
    assert all(torch.equal(a, b) for a, b in zip(registered, made.run(), strict=True))


@pytest.mark.parametrize("packed", PACKED)
def test_fullgraph_compile_and_dynamic_shapes(packed):
    made = group("dora", packed)
    leaves = [made.cases[0].lora_a, made.cases[2].lora_b]

    def step(x, *leaves):
        return sum(y.square().sum() for y in pf.ops.lora_linear_group(x, *made.args()[1:]))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 12, 40):
        inputs = [torch.randn(rows, 96).requires_grad_(), *leaves]
        expected = torch.autograd.grad(step(*inputs), inputs)
        for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_sets_the_compute_dtype():
    made = group("qkv", "mixed")
    with torch.autocast("cpu", torch.bfloat16):
        ys = made.forward()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    grads = torch.autograd.grad(ys, made.inputs(), [torch.ones_like(y) for y in ys])
    assert {g.dtype for g in grads} == {torch.float32}


def test_all_kinds_stay_on_the_fast_path():
    for kind in KINDS:
        for packed in PACKED:
            made = group(kind, packed, dtype=HALF)
            assert pf.explain("lora_linear_group", *made.args()).backend == FAST_BACKENDS[0], (kind, packed)


def test_a_second_derivative_is_refused():
    made = group("qkv")
    y = made.forward()[0]
    (dx,) = torch.autograd.grad(y.square().sum(), made.x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), made.x)


# Determinism and memory


@pytest.mark.parametrize("kind", ["qkv", "dropout", "dora"])
def test_same_bits_a_hundred_times(kind):
    made = group(kind, "mixed", dtype=HALF)
    expected = made.run()
    for _ in range(5 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(made.run(), expected, strict=True))


def test_the_graph_goes_with_its_outputs():
    """Nothing that the op keeps for its backward pass keeps itself alive."""
    made = group("qkv")
    gc.disable()
    try:
        kept = weakref.ref(made.forward()[0].grad_fn)
        assert kept() is None
    finally:
        gc.enable()
