"""Op glu: silu and both gelus of one tensor times another, forward and backward in one pass each."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED
from oracle import BACKWARD, FORWARD, assert_as_good_as, layouts

import pyfinetune as pf
from pyfinetune.ops._op import REGISTRY
from pyfinetune.ops.glu import ACTIVATIONS

LOW = DTYPES[1]  # bfloat16 where the backend has it
numpy_may_warn = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # in the interpreter
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def name(value):
    return str(value).removeprefix("torch.")


def unit(gate, up, activation):
    """The public function for an activation."""
    if activation == "silu":
        return pf.ops.swiglu(gate, up)
    return pf.ops.geglu(gate, up, "tanh" if activation == "gelu_tanh" else "none")


def eager(gate, up, activation):
    """What Hugging Face's MLPs compute."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


@dataclasses.dataclass
class Case:
    """Inputs of one call, and the gradient from above."""

    gate: torch.Tensor
    up: torch.Tensor
    dout: torch.Tensor
    activation: str

    def run(self, function=unit):
        """[h, dgate, dup]."""
        h = function(self.gate, self.up, self.activation)
        return [h, *torch.autograd.grad(h, [self.gate, self.up], self.dout)]

    def exact(self):
        """The same by the reference in float64."""
        parts = [t.detach().double() for t in (self.gate, self.up, self.dout)]
        with pf.use_backend("reference"):
            return Case(parts[0].requires_grad_(), parts[1].requires_grad_(), parts[2], self.activation).run()


def make(*shape, activation="silu", dtype=torch.float32, scale=1.0):
    gate, up, dout = ((torch.randn(shape) * s).to(dtype) for s in (2 * scale, 1.0, 1.0))
    return Case(gate.requires_grad_(), up.requires_grad_(), dout, activation)


def with_gate(values, activation, dtype=torch.float32):
    """A case with the given gates, up and dout one."""
    gate = torch.as_tensor(values).to(dtype)
    return Case(gate.requires_grad_(), torch.ones_like(gate, requires_grad=True), torch.ones_like(gate), activation)


def hold_to_the_oracle(backend, *shape, draws=3, **options):
    """Several draws are judged together: the largest of a few rounding errors is a matter of luck."""
    ours, theirs, exact = [], [], []
    for _ in range(draws):
        case = make(*shape, **options)
        with pf.use_backend(backend):
            ours.append(case.run())
        theirs.append(case.run(eager))
        exact.append(case.exact())
    for i, label in enumerate(("h", "dgate", "dup")):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        assert_as_good_as(*stacked, BACKWARD if i else FORWARD, label)


# 1. reference against float64


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_is_as_good_as_eager(dtype, activation):
    hold_to_the_oracle("reference", 24, 96, dtype=dtype, activation=activation)


@every_activation
def test_reference_in_float64_is_the_formula(activation):
    case = make(5, 33, dtype=torch.float64, activation=activation)
    for ours, theirs in zip(case.run(), case.run(eager), strict=True):
        torch.testing.assert_close(ours, theirs)


# 2. gradcheck


@every_activation
def test_gradcheck_of_the_reference(activation):
    case = make(3, 7, dtype=torch.float64, activation=activation)
    assert torch.autograd.gradcheck(lambda gate, up: unit(gate, up, activation), (case.gate, case.up))


@every_activation
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_finite_differences_through_every_backend(backend, activation):
    case = make(9, 40, activation=activation)
    with pf.use_backend(backend):
        _h, *grads = case.run()
        for leaf, grad in zip((case.gate, case.up), grads, strict=True):
            direction, step, moved = torch.randn_like(leaf), 1e-2, []
            with torch.no_grad():
                for sign in (1, -1):
                    leaf.add_(direction, alpha=sign * step)
                    moved.append((unit(case.gate, case.up, activation) * case.dout).sum().double())
                    leaf.sub_(direction, alpha=sign * step)
            numeric = (moved[0] - moved[1]) / (2 * step)
            torch.testing.assert_close((grad * direction).sum().double(), numeric, rtol=2e-2, atol=2e-2)


# 3. every backend against the reference


@every_activation
@pytest.mark.parametrize("shape", [(1, 1536), (7, 33), (2, 3, 128), (300, 64), (5, 20000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_is_as_good_as_eager(backend, dtype, shape, activation):
    hold_to_the_oracle(backend, *shape, dtype=dtype, activation=activation, draws=2)


@numpy_may_warn
@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_bfloat16_value(dtype, activation):
    """All finite values that bfloat16 has, tails, subnormals and huge ones included; judged piece by piece, so that
    the largest do not hide the small."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    values = bits.view(torch.bfloat16).to(dtype)
    edges = [0, 1e-30, 1e-3, 0.5, 2, 4, 6, 10, 20, 50, 100, 1e4, 1e12]
    for low, high in itertools.pairwise(edges):
        for sign in (1, -1):
            inside = values[(values * sign >= low) & (values * sign < high)]
            case = with_gate(inside, activation, dtype)
            for got, plain, exact in zip(case.run(), case.run(eager), case.exact(), strict=True):
                assert_as_good_as(got, plain, exact, BACKWARD, f"{sign} * [{low}, {high})")


@every_activation
def test_the_tails_are_right_to_one_unit_in_the_last_place(activation):
    """Far out on the negative side the activation is tiny; an absolute error of 1e-7 would be all of it."""
    gate = torch.linspace(-12.0, -0.01, 4000).bfloat16()
    h = with_gate(gate, activation).run()[0].bfloat16()
    exact = with_gate(gate, activation).exact()[0]
    numbers = torch.finfo(torch.bfloat16)
    # A sigmoid below the smallest normal number may be zero.
    assert ((h - exact).abs() <= numbers.eps * exact.abs() + gate.abs() * numbers.tiny).all()


# 4. layouts


@every_activation
@pytest.mark.parametrize("field", ["gate", "up", "dout"])
def test_any_layout_of_every_input(field, activation):
    case = make(6, 48, activation=activation)
    expected = case.run()
    for layout, view in layouts(getattr(case, field).detach()).items():
        before = view.clone()
        leaf = view.requires_grad_(field != "dout")
        result = dataclasses.replace(case, **{field: leaf}).run()
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=layout)
        assert torch.equal(view, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_halves_of_one_projection(dtype):
    """gate and up are usually two views of one result."""
    both = torch.randn(3, 5, 2 * 72).to(dtype).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    h = pf.ops.swiglu(gate, up)
    assert h.is_contiguous()
    copies = [t.detach().contiguous().requires_grad_() for t in (gate, up)]
    expected = pf.ops.swiglu(*copies)
    torch.testing.assert_close(h, expected)
    dout = torch.randn_like(h)
    (d_both,) = torch.autograd.grad(h, both, dout)
    torch.testing.assert_close(d_both, torch.cat(torch.autograd.grad(expected, copies, dout), dim=-1))


def test_many_dimensions_expanded_and_transposed_inputs():
    case = make(2, 1, 3, 2, 1, 2, 24)
    flat = pf.ops.swiglu(case.gate.reshape(24, 24), case.up.reshape(24, 24))
    torch.testing.assert_close(unit(case.gate, case.up, "silu").reshape(24, 24), flat)
    row = torch.randn(1, 24)
    torch.testing.assert_close(
        pf.ops.swiglu(row.expand(9, 24), row.expand(9, 24)), pf.ops.swiglu(row, row).expand(9, 24)
    )
    a, b = torch.randn(4, 6, 8).permute(2, 0, 1), torch.randn(8, 6, 4).transpose(1, 2)
    torch.testing.assert_close(pf.ops.swiglu(a, b), pf.ops.swiglu(a.contiguous(), b.contiguous()))


def test_inputs_are_not_changed():
    case = make(40, 48, dtype=LOW)
    before = [t.detach().clone() for t in (case.gate, case.up, case.dout)]
    case.run()
    assert all(torch.equal(a, b) for a, b in zip((case.gate, case.up, case.dout), before, strict=True))


def test_second_backward_gives_the_same_gradients():
    case = make(40, 48, dtype=LOW)
    h = unit(case.gate, case.up, "silu")
    first = torch.autograd.grad(h, [case.gate, case.up], case.dout, retain_graph=True)
    case.run()
    second = torch.autograd.grad(h, [case.gate, case.up], case.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# 5. edge shapes


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 8), (1,), (17,), (3, 1), (2, 31), (33, 65)], ids=str)
@every_activation
def test_empty_and_odd_shapes(shape, activation):
    for dtype in DTYPES:
        case = make(*shape, dtype=dtype, activation=activation)
        with pf.use_backend("reference"):
            expected = case.run()
        for a, b in zip(case.run(), expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@numpy_may_warn
@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_values_at_the_ends(dtype, activation):
    """Huge gates pass or give zero; NaN stays NaN and touches nothing else."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e4, -3e4, largest, -largest, float("inf"), 1.0]).to(dtype)
    h, dgate, dup = with_gate(gate[:-2], activation, dtype).run()
    torch.testing.assert_close(h, gate[:-2].relu())
    assert torch.equal(h, dup)
    finite = gate[:-2].abs() < 1e6  # torch's own slope of the tanh form is NaN where x^2 overflows
    torch.testing.assert_close(dgate[finite], torch.where(gate[:-2] == 0, 0.5, (gate[:-2] > 0).to(dtype))[finite])
    assert unit(gate, torch.ones_like(gate), activation)[-2] == float("inf")
    h, dgate, dup = with_gate([1.0, float("nan"), -2.0], activation, dtype).run()
    assert [t.isnan().tolist() for t in (h, dgate, dup)] == [[False, True, False]] * 3


def test_rows_further_apart_than_32_bits():
    """Row strides are 64-bit numbers: two rows more than 2^31 elements apart."""
    stride, before = 2**31 + 64, torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # pages that nothing touches cost nothing
    try:
        buffer = torch.empty(stride + 64, dtype=LOW)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    gate = buffer.as_strided((2, 64), (stride, 1))
    gate.copy_(torch.randn(2, 64))
    torch.testing.assert_close(pf.ops.swiglu(gate, gate), pf.ops.swiglu(gate.contiguous(), gate.contiguous()))


def test_one_gradient_alone():
    case = make(8, 32)
    expected = case.run()[1:]
    for i in range(2):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((case.gate, case.up))]
        (grad,) = torch.autograd.grad(pf.ops.swiglu(*leaves), leaves[i], case.dout)
        assert torch.equal(grad, expected[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.ones(3, 64, dtype=torch.int64)}, "gate is int64, needs"),
        ({"gate": 3.0}, "gate is float, needs a tensor"),
        ({"up": None}, "up is NoneType, needs a tensor"),
        ({"up": torch.randn(3, 63)}, r"up is \[3, 63\], needs gate's shape \[3, 64\]"),
        ({"up": torch.randn(64)}, r"up is \[64\], needs gate's shape \[3, 64\]"),
        ({"up": torch.randn(3, 64).bfloat16()}, "up is bfloat16, needs float32"),
        ({"up": torch.ones(3, 64, device="meta")}, r"gate is on \S+, up is on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"gate": torch.randn(3, 64), "up": torch.randn(3, 64)} | change
    for function, label in ((pf.ops.swiglu, "swiglu"), (pf.ops.geglu, "geglu")):
        with pytest.raises(pf.InvalidInput, match=f"{label}: {message}"):
            function(**arguments)


def test_a_wrong_approximation_is_named():
    for wrong in ("erf", None, True):
        with pytest.raises(pf.InvalidInput, match=r"geglu: approximate is .*, needs 'tanh' or 'none'"):
            pf.ops.geglu(torch.randn(3), torch.randn(3), wrong)
    with pytest.raises(pf.InvalidInput, match="swiglu: activation is 'relu'"):
        torch.ops.pyfinetune.swiglu(torch.randn(3), torch.randn(3), "relu")


# 6. opcheck, fullgraph and dynamic compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@every_activation
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_opcheck(backend, activation):
    case = make(3, 4, 16, activation=activation)
    public = "swiglu" if activation == "silu" else "geglu"
    op = getattr(torch.ops.pyfinetune, public).default
    with pf.use_backend(backend):
        torch.library.opcheck(op, (case.gate, case.up, activation))
        gate, up = torch.randn(4, 3, 32).transpose(0, 1).chunk(2, dim=-1)
        torch.library.opcheck(op, (gate.requires_grad_(), up.requires_grad_(), activation))


@every_activation
def test_fullgraph_compile_and_dynamic_shapes(activation):
    def step(gate, up):
        return unit(gate, up, activation).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 12, 40):
        case = make(rows, 48, activation=activation)
        leaves = [case.gate, case.up]
        expected = torch.autograd.grad(step(*leaves), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_explain_knows_both_functions():
    gate, up = torch.randn(2, 4), torch.randn(2, 4)
    assert pf.explain("swiglu", gate, up).backend == FAST_BACKENDS[0]
    assert pf.explain("geglu", gate, up, approximate="none").backend == FAST_BACKENDS[0]
    assert pf.explain("geglu", gate.double(), up.double()).backend == "reference"
    assert REGISTRY["glu_bwd"].prepare is None


# 7. determinism


@every_activation
def test_same_bits_a_hundred_times(activation):
    case = make(50, 96, dtype=LOW, activation=activation)
    expected = case.run()
    for _ in range(10 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="threads are the CPU kernels'")
@every_activation
@pytest.mark.parametrize("shape", [(301, 1000), (1, 300_001)], ids=str)
def test_the_thread_count_changes_no_bit(shape, activation):
    case, threads = make(*shape, activation=activation), torch.get_num_threads()
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


@every_activation
def test_backward_leaves_gate_and_up_alone(activation):
    """Liger-Kernel #254: dgate and dup were written over gate and up, which wrongs every other operation that saved
    them: here the exponential that gate came from."""
    x = torch.randn(8, 32, requires_grad=True)
    gate = x.exp()
    h = unit(gate, gate, activation)
    before = gate.detach().clone()
    (dx,) = torch.autograd.grad(h.sum(), x)
    assert torch.equal(gate, before)
    (expected,) = torch.autograd.grad(eager(x.exp(), x.exp(), activation).sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)


def test_a_broadcast_gradient_is_read_by_its_strides():
    """TransformerEngine (ROCm) #623: the gradient of a plain sum is one element with strides of zero; a kernel that
    took it for rows read past its end."""
    case = make(16, 48)
    grads = torch.autograd.grad(pf.ops.swiglu(case.gate, case.up).sum(), [case.gate, case.up])
    expected = torch.autograd.grad(pf.ops.swiglu(case.gate, case.up), [case.gate, case.up], torch.ones(16, 48))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
