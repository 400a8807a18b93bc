"""Cases of the op `lora_linear`: 4-bit linear, LoRA, QLoRA and DoRA layers, against bitsandbytes and PEFT."""

from __future__ import annotations

import functools
import math

import torch

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.bench_nf4 import named, packed_bytes
from pyfinetune.bench.ceilings import sets_beyond_cache
from pyfinetune.bench.checks import close_to_exact
from pyfinetune.bench.harness import OURS, Case, Passes, Setup, Target
from pyfinetune.bench.peer_names import BITSANDBYTES, PEFT, PEFT_4BIT
from pyfinetune.bench.shapes import Sizes, short
from pyfinetune.ops._philox import dropout as philox_dropout

_RANK = 16
SCALING = 2.0
_FORWARD, _BACKWARD = 1.5, 2.0  # how much worse than torch's eager code in the same dtype a result may be


def _plain(x, weight, lora_a, lora_b, keep=None, magnitude=None):
    """The layer in torch's plain operators, in x's dtype; `keep` is dropout's mask with its scale."""
    weight, a, b = weight.to(x.dtype), lora_a.to(x.dtype), lora_b.to(x.dtype)
    dropped = x if keep is None else x * keep.to(x.dtype)
    y = x @ weight.T + SCALING * ((dropped @ a.T) @ b.T)
    if magnitude is None:
        return y
    norm = (weight + SCALING * (b @ a)).detach().norm(dim=1)
    return y * (magnitude.to(x.dtype) / norm)


def _with_grads(function, leaves, dout):
    """The function's result on detached copies of the leaves, and their gradients."""
    with torch.enable_grad():
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = function(*copies)
        grads = torch.autograd.grad(y, copies, dout.to(y.dtype))
    return [y.detach(), *grads]


def build_forward(
    device: torch.device, rows: int, size: int, out: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Setup:
    """A frozen 4-bit linear layer as a training step calls it: gradients on, in training mode."""
    memory_bound, shape = rows < 128, (out or size, size)
    count = sets_beyond_cache(int(packed_bytes(math.prod(shape))), device) if memory_bound else 2
    weights = [torch.randn(shape, device=device).mul_(0.02).to(dtype) for _ in range(count)]
    packed = [pf.ops.quantize_4bit(weight) for weight in weights]
    x = torch.randn(rows, size, device=device).to(dtype).requires_grad_()

    def ours(i):
        with torch.enable_grad():
            return pf.ops.lora_linear(x, packed[i % count], None, None, 1.0)

    calls, missing = {OURS: ours}, {}
    why = peers.why_missing("bitsandbytes")
    if why:
        missing[BITSANDBYTES] = why
    else:
        layers = [peers.bnb_linear(weight) for weight in weights]

        def bitsandbytes(i):
            with torch.enable_grad():
                return layers[i % count](x)

        calls[BITSANDBYTES] = bitsandbytes

    dense = pf.ops.dequantize_4bit(packed[0])
    exact, eager = x.detach().double() @ dense.double().T, x.detach() @ dense.T

    def check(call):
        return lambda: close_to_exact([call(0).detach()], [exact], [eager], ["y"], [_FORWARD])

    return Setup(calls, {name: check(call) for name, call in calls.items()}, missing)


def build_adapter(
    device: torch.device,
    rows: int,
    size: int,
    four_bit: bool,
    dropout: float,
    dora: bool,
    out: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Setup:
    """A layer with an adapter, forward and backward: gradients of x and of every parameter that trains.

    The adapter is float32 on a bfloat16 base, which is what PEFT makes by default.
    """
    wide = out or size
    weight = torch.randn(wide, size, device=device).mul_(0.02).to(dtype)
    x = torch.randn(rows, size, device=device).to(dtype).requires_grad_()
    dout = torch.randn(rows, wide, device=device).to(dtype)
    a = torch.randn(_RANK, size, device=device).mul_(size**-0.5).requires_grad_()
    b = torch.randn(wide, _RANK, device=device).mul_(0.02).requires_grad_()
    base = pf.ops.quantize_4bit(weight) if four_bit else weight
    dense = pf.ops.dequantize_4bit(base) if four_bit else weight
    m = (dense.float().norm(dim=1) * 1.1).requires_grad_() if dora else None
    leaves = [x, a, b] + ([m] if dora else [])

    def ours_forward(x=x, a=a, b=b, m=m, seed=None):
        return pf.ops.lora_linear(x, base, a, b, SCALING, dropout_p=dropout, seed=seed, magnitude=m)

    names = ["y", "dx", "d_lora_a", "d_lora_b", "d_magnitude"][: len(leaves) + 1]
    factors = [_FORWARD, *[_BACKWARD] * len(leaves)]

    def judge(got, keep):
        """Held against the plain form in float64; the plain form in bfloat16 says how much error is usual."""

        def plain(x, a, b, m=None):
            return _plain(x, dense, a, b, keep, m)

        exact = _with_grads(plain, [leaf.double() for leaf in leaves], dout)
        eager = _with_grads(plain, [leaf.to(dtype) for leaf in leaves], dout)
        return close_to_exact(got, exact, eager, names, factors)

    def check_ours():
        seed = torch.tensor(1234, device=device)
        keep = (
            philox_dropout(torch.ones(rows, size, dtype=torch.float64, device=device), dropout, seed)
            if dropout
            else None
        )
        return judge(_with_grads(functools.partial(_call_in_order, ours_forward, seed=seed), leaves, dout), keep)

    setup = Setup({}, {OURS: check_ours}, inputs=[*leaves, dout, weight, *_tensors(base)])
    _add_halves(setup, OURS, ours_forward, leaves, [dout])
    _add_peft(setup, (x, a, b, m), weight, dout, judge, four_bit, dropout)
    return setup


def _call_in_order(function, x, a, b, m=None, **more):
    return function(x=x, a=a, b=b, m=m, **more)


def _tensors(base) -> list[torch.Tensor]:
    return [base] if isinstance(base, torch.Tensor) else [t for t in base.tensors() if t is not None]


def _add_halves(setup: Setup, name: str, function, leaves: list, douts: list) -> None:
    """Enter a call: what the function returns, and the gradients of the leaves from it."""

    def forward(_number=0):
        with torch.enable_grad():
            return function()

    setup.calls[name] = Passes(forward, lambda _number, made: torch.autograd.grad(made, leaves, douts))
    setup.forward[name] = forward


def _add_peft(setup: Setup, values: tuple, weight: torch.Tensor, dout, judge, four_bit: bool, dropout: float) -> None:
    """PEFT's layer over the same base with the same adapter."""
    name, packages = (PEFT_4BIT, ("peft", "bitsandbytes")) if four_bit else (PEFT, ("peft",))
    why = peers.why_missing(*packages)
    if why:
        setup.missing[name] = why
        return
    x, a, b, m = values
    out_features, in_features = weight.shape
    if four_bit:
        linear = peers.bnb_linear(weight)
    else:
        linear = torch.nn.Linear(in_features, out_features, bias=False, dtype=weight.dtype, device=weight.device)
        linear.weight.copy_(weight)
    layer = peers.peft_layer(linear, a.shape[0], dropout, dora=m is not None)
    params = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if m is not None:
        params.append(layer.lora_magnitude_vector["default"].weight)
    for param, value in zip(params, (a, b, m), strict=False):
        param.copy_(value)
    leaves = [x, *params]

    def check():
        # Its mask cannot be had, so it is judged with dropout off.
        layer.train(not dropout)
        with torch.enable_grad():
            y = layer(x)
            grads = torch.autograd.grad(y, leaves, dout.to(y.dtype))
        layer.train()
        return judge([y.detach(), *grads], None)

    setup.check[name] = check
    _add_halves(setup, name, lambda: layer(x), leaves, [dout])
    setup.inputs += [*layer.parameters()]


def _build_group(
    device: torch.device, rows: int, inner: int, widths: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> Setup:
    """Projections of one input with float32 adapters, forward and backward."""
    weights = [torch.randn(out, inner, device=device).mul_(0.02).to(dtype) for out in widths]
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
    douts = [torch.randn(rows, out, device=device).to(dtype) for out in widths]
    adapters = [torch.randn(_RANK, inner, device=device).mul_(inner**-0.5).requires_grad_() for _ in widths]
    adapters += [torch.randn(out, _RANK, device=device).mul_(0.02).requires_grad_() for out in widths]
    count = len(widths)

    def together(x, *adapters):
        return pf.ops.lora_linear_group(x, weights, adapters[:count], adapters[count:], [SCALING] * count)

    def plain(x, *adapters):
        return [_plain(x, w, a, b) for w, a, b in zip(weights, adapters[:count], adapters[count:], strict=True)]

    names = [*(f"y{i}" for i in range(count)), "dx", *(f"d_lora_a{i}" for i in range(count))]
    names += [f"d_lora_b{i}" for i in range(count)]
    factors = [_FORWARD] * count + [_BACKWARD] * (1 + 2 * count)

    def results(function, leaves, kind):
        with torch.enable_grad():
            copies = [leaf.detach().clone().to(kind or leaf.dtype).requires_grad_() for leaf in leaves]
            ys = function(*copies)
            grads = torch.autograd.grad(ys, copies, [d.to(ys[0].dtype) for d in douts])
        return [*(y.detach() for y in ys), *grads]

    def judge(got):
        leaves = [x, *adapters]
        exact, eager = results(plain, leaves, torch.float64), results(plain, leaves, dtype)
        return close_to_exact(got, exact, eager, names, factors)

    leaves = [x, *adapters]
    setup = Setup({}, {OURS: lambda: judge(results(together, leaves, None))}, inputs=[*leaves, *douts, *weights])
    _add_halves(setup, OURS, lambda: together(*leaves), leaves, douts)
    _add_peft_layers(setup, weights, leaves, douts, judge)
    return setup


def _add_peft_layers(setup: Setup, weights: list[torch.Tensor], leaves: list, douts: list, judge) -> None:
    """PEFT's layers one after the other over the same input, with the same bases and adapters."""
    why = peers.why_missing("peft")
    if why:
        setup.missing[PEFT] = why
        return
    layers = []
    for weight in weights:
        linear = torch.nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype, device=weight.device)
        linear.weight.copy_(weight)
        layers.append(peers.peft_layer(linear, _RANK, 0.0, dora=False))
    params = [layer.lora_A["default"].weight for layer in layers] + [layer.lora_B["default"].weight for layer in layers]
    for param, value in zip(params, leaves[1:], strict=True):
        param.copy_(value)

    def each():
        return [layer(leaves[0]) for layer in layers]

    def check():
        with torch.enable_grad():
            ys = each()
            grads = torch.autograd.grad(ys, [leaves[0], *params], douts)
        return judge([*(y.detach() for y in ys), *grads])

    setup.check[PEFT] = check
    _add_halves(setup, PEFT, each, [leaves[0], *params], douts)
    setup.inputs += [parameter for layer in layers for parameter in layer.parameters()]


def _note(dtype: torch.dtype) -> str:
    """The dtype in a case's name, where it is not the one of all the others."""
    return "" if dtype == torch.bfloat16 else f", {short(dtype)}"


def _forward(
    rows: int, size: int, target: Target | None, out: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Case:
    shape = (out or size, size)
    return Case(
        "lora_linear",
        f"NF4 linear {named(shape)}, M {rows}{_note(dtype)}, forward in training mode",
        functools.partial(build_forward, rows=rows, size=size, out=out, dtype=dtype),
        flops=2.0 * rows * math.prod(shape),
        dtype=dtype,
        bytes=packed_bytes(math.prod(shape)) + float(dtype.itemsize) * rows * sum(shape),
        target=target,
    )


def _adapter(
    method: str,
    rows: int,
    size: int,
    target: Target | None,
    dropout: float = 0.0,
    out: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    four_bit, dora, shape = method.startswith("Q"), method.endswith("DoRA"), (out or size, size)
    elements, sizes = math.prod(shape), {"rows": rows, "size": size}
    if shape[0] != size or dtype != torch.bfloat16:
        sizes |= {"out": out, "dtype": dtype}
    name = f"{method} linear {named(shape)}, M {rows}, r {_RANK}{_note(dtype)}"
    return Case(
        "lora_linear",
        name + (f", dropout {dropout}" if dropout else "") + ", fwd+bwd",
        functools.partial(build_adapter, **sizes, four_bit=four_bit, dropout=dropout, dora=dora),
        flops=4.0 * rows * elements,  # x W^T and dout W
        dtype=dtype,
        bytes=2 * (packed_bytes(elements) if four_bit else float(dtype.itemsize) * elements)
        + 2.0 * dtype.itemsize * rows * sum(shape),
        target=target,
    )


def _group(
    what: str,
    rows: int,
    inner: int,
    widths: tuple[int, ...],
    target: Target | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    total = sum(widths)
    return Case(
        "lora_linear",
        f"{what} of {inner} → {' + '.join(map(str, widths))}, M {rows}, r {_RANK}{_note(dtype)}, fwd+bwd",
        functools.partial(_build_group, rows=rows, inner=inner, widths=widths, dtype=dtype),
        flops=4.0 * rows * inner * total,
        dtype=dtype,
        bytes=2.0 * dtype.itemsize * (inner * total + rows * (inner + total)),
        target=target,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    if quick:
        return [
            _forward(1, 512, None),
            _forward(16, 512, None),
            _forward(128, 512, None),
            _adapter("QLoRA", 128, 512, None),
            _adapter("LoRA", 128, 512, None, dropout=0.1),
            _adapter("DoRA", 128, 512, None),
            _adapter("QDoRA", 128, 512, None),
            _group("QKV group", 128, 192, (192, 64, 64)),
        ]
    return [
        _forward(1, 4096, Target(8.0, 3.0)),
        _forward(16, 4096, Target(4.0, 1.5)),
        _forward(512, 4096, Target(1.1, 0.97)),
        _adapter("QLoRA", 2048, 2048, Target(of_floor=1.06)),
        _adapter("LoRA", 512, 2048, Target(1.3, 1.3), dropout=0.1),
        _adapter("DoRA", 512, 2048, Target(2.2, 2.2)),
        _adapter("QDoRA", 512, 2048, Target(2.2, 2.2)),
        _group("QKV group", 1024, 576, (576, 192, 192)),
        _group("gate/up group", 1024, 576, (1536, 1536)),
        _group("QKV group", 1024, 2048, (2048, 512, 512)),
        _group("gate/up group", 1024, 2048, (5632, 5632)),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's projections, or of M rows and a weight of N rows and K columns."""
    rows, model = sizes.tokens, sizes.model
    if model is None:
        one = {"out": sizes.out, "dtype": dtype}
        layers = [_adapter(method, rows, sizes.inner, None, **one) for method in ("LoRA", "QLoRA", "DoRA")]
        return [_forward(rows, sizes.inner, None, **one), *layers]
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return [
        _forward(1, model.inner, None, model.hidden, dtype),
        _adapter("QLoRA", rows, model.inner, None, out=model.hidden, dtype=dtype),
        _adapter("LoRA", rows, queries, None, dropout=0.1, out=model.hidden, dtype=dtype),
        _adapter("DoRA", rows, queries, None, out=model.hidden, dtype=dtype),
        _group("QKV group", rows, model.hidden, (queries, keys, keys), dtype=dtype),
        _group("gate/up group", rows, model.hidden, (model.inner, model.inner), dtype=dtype),
    ]
