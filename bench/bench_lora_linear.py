"""Cases of the op `lora_linear`: 4-bit linear, LoRA, QLoRA and DoRA layers, against bitsandbytes and PEFT."""

from __future__ import annotations

import functools

import torch

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.bench_nf4 import packed_bytes
from pyfinetune.bench.ceilings import sets_beyond_cache
from pyfinetune.bench.checks import close_to_exact
from pyfinetune.bench.harness import OURS, Case, Setup, Target
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


def build_forward(device: torch.device, rows: int, size: int) -> Setup:
    """A frozen 4-bit linear layer as a training step calls it: gradients on, in training mode."""
    memory_bound = rows < 128
    count = sets_beyond_cache(int(packed_bytes(size)), device) if memory_bound else 2
    weights = [torch.randn(size, size, device=device).mul_(0.02).bfloat16() for _ in range(count)]
    packed = [pf.ops.quantize_4bit(weight) for weight in weights]
    x = torch.randn(rows, size, device=device).bfloat16().requires_grad_()

    def ours(i):
        with torch.enable_grad():
            return pf.ops.lora_linear(x, packed[i % count], None, None, 1.0)

    calls, missing = {OURS: ours}, {}
    why = peers.why_missing("bitsandbytes")
    if why:
        missing["bitsandbytes"] = why
    else:
        layers = [peers.bnb_linear(weight) for weight in weights]

        def bitsandbytes(i):
            with torch.enable_grad():
                return layers[i % count](x)

        calls["bitsandbytes"] = bitsandbytes

    dense = pf.ops.dequantize_4bit(packed[0])
    exact, eager = x.detach().double() @ dense.double().T, x.detach() @ dense.T

    def check(call):
        return lambda: close_to_exact([call(0).detach()], [exact], [eager], ["y"], [_FORWARD])

    return Setup(calls, {name: check(call) for name, call in calls.items()}, missing)


def build_adapter(device: torch.device, rows: int, size: int, four_bit: bool, dropout: float, dora: bool) -> Setup:
    """A layer with an adapter, forward and backward: gradients of x and of every parameter that trains.

    The adapter is float32 on a bfloat16 base, which is what PEFT makes by default.
    """
    weight = torch.randn(size, size, device=device).mul_(0.02).bfloat16()
    x = torch.randn(rows, size, device=device).bfloat16().requires_grad_()
    dout = torch.randn(rows, size, device=device).bfloat16()
    a = torch.randn(_RANK, size, device=device).mul_(size**-0.5).requires_grad_()
    b = torch.randn(size, _RANK, device=device).mul_(0.02).requires_grad_()
    base = pf.ops.quantize_4bit(weight) if four_bit else weight
    dense = pf.ops.dequantize_4bit(base) if four_bit else weight
    m = (dense.float().norm(dim=1) * 1.1).requires_grad_() if dora else None
    leaves = [x, a, b] + ([m] if dora else [])

    def ours_forward(x=x, a=a, b=b, m=m, seed=None):
        return pf.ops.lora_linear(x, base, a, b, SCALING, dropout_p=dropout, seed=seed, magnitude=m)

    def ours(i):
        with torch.enable_grad():
            return torch.autograd.grad(ours_forward(), leaves, dout)

    names = ["y", "dx", "d_lora_a", "d_lora_b", "d_magnitude"][: len(leaves) + 1]
    factors = [_FORWARD, *[_BACKWARD] * len(leaves)]

    def judge(got, keep):
        """Held against the plain form in float64; the plain form in bfloat16 says how much error is usual."""

        def plain(x, a, b, m=None):
            return _plain(x, dense, a, b, keep, m)

        exact = _with_grads(plain, [leaf.double() for leaf in leaves], dout)
        eager = _with_grads(plain, [leaf.bfloat16() for leaf in leaves], dout)
        return close_to_exact(got, exact, eager, names, factors)

    def check_ours():
        seed = torch.tensor(1234, device=device)
        keep = (
            philox_dropout(torch.ones(rows, size, dtype=torch.float64, device=device), dropout, seed)
            if dropout
            else None
        )
        return judge(_with_grads(functools.partial(_call_in_order, ours_forward, seed=seed), leaves, dout), keep)

    setup = Setup({OURS: ours}, {OURS: check_ours}, inputs=[*leaves, dout, weight, *_tensors(base)])
    setup.forward[OURS] = _enabled(ours_forward)
    _add_peft(setup, (x, a, b, m), weight, dout, judge, four_bit, dropout)
    return setup


def _call_in_order(function, x, a, b, m=None, **more):
    return function(x=x, a=a, b=b, m=m, **more)


def _tensors(base) -> list[torch.Tensor]:
    return [base] if isinstance(base, torch.Tensor) else [t for t in base.tensors() if t is not None]


def _enabled(function):
    def call():
        with torch.enable_grad():
            return function()

    return call


def _add_peft(setup: Setup, values: tuple, weight: torch.Tensor, dout, judge, four_bit: bool, dropout: float) -> None:
    """PEFT's layer over the same base with the same adapter."""
    name, packages = ("PEFT + bitsandbytes", ("peft", "bitsandbytes")) if four_bit else ("PEFT", ("peft",))
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

    def call(i):
        with torch.enable_grad():
            return torch.autograd.grad(layer(x), leaves, dout)

    def check():
        # Its mask cannot be had, so it is judged with dropout off.
        layer.train(not dropout)
        with torch.enable_grad():
            y = layer(x)
            grads = torch.autograd.grad(y, leaves, dout.to(y.dtype))
        layer.train()
        return judge([y.detach(), *grads], None)

    setup.calls[name], setup.check[name] = call, check
    setup.forward[name] = _enabled(lambda: layer(x))
    setup.inputs += [*layer.parameters()]


def _build_group(device: torch.device, rows: int, inner: int, widths: tuple[int, ...]) -> Setup:
    """Projections of one input with float32 adapters on a bfloat16 base, forward and backward."""
    weights = [torch.randn(out, inner, device=device).mul_(0.02).bfloat16() for out in widths]
    x = torch.randn(rows, inner, device=device).bfloat16().requires_grad_()
    douts = [torch.randn(rows, out, device=device).bfloat16() for out in widths]
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

    def results(function, leaves, dtype):
        with torch.enable_grad():
            copies = [leaf.detach().clone().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
            ys = function(*copies)
            grads = torch.autograd.grad(ys, copies, [d.to(ys[0].dtype) for d in douts])
        return [*(y.detach() for y in ys), *grads]

    def judge(got):
        leaves = [x, *adapters]
        exact, eager = results(plain, leaves, torch.float64), results(plain, leaves, torch.bfloat16)
        return close_to_exact(got, exact, eager, names, factors)

    def call_of(function, leaves):
        def call(i):
            with torch.enable_grad():
                return torch.autograd.grad(function(*leaves), leaves, douts)

        return call

    leaves = [x, *adapters]
    setup = Setup(
        {OURS: call_of(together, leaves)},
        {OURS: lambda: judge(results(together, leaves, None))},
        inputs=[*leaves, *douts, *weights],
    )
    setup.forward[OURS] = _enabled(lambda: together(*leaves))
    _add_peft_layers(setup, weights, leaves, douts, judge, call_of)
    return setup


def _add_peft_layers(setup: Setup, weights: list[torch.Tensor], leaves: list, douts: list, judge, call_of) -> None:
    """PEFT's layers one after the other over the same input, with the same bases and adapters."""
    why = peers.why_missing("peft")
    if why:
        setup.missing["PEFT"] = why
        return
    layers = []
    for weight in weights:
        linear = torch.nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype, device=weight.device)
        linear.weight.copy_(weight)
        layers.append(peers.peft_layer(linear, _RANK, 0.0, dora=False))
    params = [layer.lora_A["default"].weight for layer in layers] + [layer.lora_B["default"].weight for layer in layers]
    for param, value in zip(params, leaves[1:], strict=True):
        param.copy_(value)

    def each(x, *_params):
        return [layer(x) for layer in layers]

    def check():
        with torch.enable_grad():
            ys = each(leaves[0])
            grads = torch.autograd.grad(ys, [leaves[0], *params], douts)
        return judge([*(y.detach() for y in ys), *grads])

    setup.calls["PEFT"], setup.check["PEFT"] = call_of(each, [leaves[0], *params]), check
    setup.forward["PEFT"] = _enabled(lambda: each(leaves[0]))
    setup.inputs += [parameter for layer in layers for parameter in layer.parameters()]


def _forward(rows: int, size: int, target: Target | None) -> Case:
    return Case(
        "lora_linear",
        f"NF4 linear {size}², M {rows}, forward in training mode",
        functools.partial(build_forward, rows=rows, size=size),
        flops=2.0 * rows * size * size,
        bytes=packed_bytes(size) + 4.0 * rows * size,
        target=target,
    )


def _adapter(method: str, rows: int, size: int, target: Target | None, dropout: float = 0.0) -> Case:
    four_bit, dora = method.startswith("Q"), method.endswith("DoRA")
    return Case(
        "lora_linear",
        f"{method} linear {size}², M {rows}, r {_RANK}" + (f", dropout {dropout}" if dropout else "") + ", fwd+bwd",
        functools.partial(build_adapter, rows=rows, size=size, four_bit=four_bit, dropout=dropout, dora=dora),
        flops=4.0 * rows * size * size,  # x W^T and dout W
        bytes=2 * (packed_bytes(size) if four_bit else 2.0 * size * size) + 8.0 * rows * size,
        target=target,
    )


def _group(what: str, rows: int, inner: int, widths: tuple[int, ...], target: Target | None = None) -> Case:
    total = sum(widths)
    return Case(
        "lora_linear",
        f"{what} of {inner} → {' + '.join(map(str, widths))}, M {rows}, r {_RANK}, fwd+bwd",
        functools.partial(_build_group, rows=rows, inner=inner, widths=widths),
        flops=4.0 * rows * inner * total,
        bytes=4.0 * inner * total + 4.0 * rows * (inner + total),
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
