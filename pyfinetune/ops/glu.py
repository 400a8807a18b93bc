"""Op `glu`: gated linear units, an activation of one tensor times another; publicly `swiglu` and `geglu`."""

from __future__ import annotations

import math

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops._checks import ALL_FLOATS, check_tensor, cpu_why_not, fail
from pyfinetune.ops._layout import unit_rows
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import configuration, kernels, on_device_of, triton_why_not

# By the name that crosses the schema; the order is the kernels' (Activation in csrc/cpu/dispatch.h).
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_INDEX = {name: index for index, name in enumerate(ACTIVATIONS)}
_GELU = {"tanh": "gelu_tanh", "none": "gelu"}


def _check(op: str, gate, up, activation):
    check_tensor(op, "gate", gate, ALL_FLOATS)
    _check_like(op, "up", up, gate)
    if activation not in _INDEX:
        fail(op, f"activation is {activation!r}, needs one of {ACTIVATIONS}")


def _check_like(op: str, name: str, tensor: torch.Tensor, gate: torch.Tensor) -> None:
    check_tensor(op, name, tensor, (gate.dtype,))
    if tensor.shape != gate.shape:
        fail(op, f"{name} is {list(tensor.shape)}, needs gate's shape {list(gate.shape)}")
    if tensor.device != gate.device:
        fail(op, f"gate is on {gate.device}, {name} is on {tensor.device}")


def _check_bwd(dout, gate, up, activation):
    _check("glu_bwd", gate, up, activation)
    _check_like("glu_bwd", "dout", dout, gate)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _activate(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and its derivative."""
    if activation == "gelu":
        cumulative = 0.5 * torch.erfc(x * -math.sqrt(0.5))  # torch's ndtr cancels in the tail
        return x * cumulative, cumulative + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "silu":
        inner, slope = x, 1.0
    else:  # 0.5 (1 + tanh u) = sigmoid(2 u)
        inner = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    sigmoid = torch.sigmoid(inner)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid) * slope)


def _fake(gate, up, activation):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_bwd(dout, gate, up, activation):
    return _fake(gate, up, activation), _fake(gate, up, activation)


def _reference(gate, up, activation):
    return (_activate(_wide(gate), activation)[0] * _wide(up)).to(gate.dtype).contiguous()


def _reference_bwd(dout, gate, up, activation):
    value, slope = _activate(_wide(gate), activation)
    dgate, dup = _wide(dout) * _wide(up) * slope, _wide(dout) * value
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    return unit_rows(tensor) if tensor.dim() else tensor


def _rows(tensor: torch.Tensor):
    return capsule(_unit(tensor))


def _cpu(gate, up, activation):
    out = _fake(gate, up, activation)
    native.glu(_rows(gate), _rows(up), _INDEX[activation], capsule(out), threads())
    return out


def _cpu_bwd(dout, gate, up, activation):
    dgate, dup = _fake_bwd(dout, gate, up, activation)
    native.glu_bwd(_rows(dout), _rows(gate), _rows(up), _INDEX[activation], capsule(dgate), capsule(dup), threads())
    return dgate, dup


def _triton(gate, up, activation):
    out = _fake(gate, up, activation)
    with on_device_of(gate):
        kernels("glu").glu(out, _unit(gate), _unit(up), activation)
    return out


def _triton_bwd(dout, gate, up, activation):
    dgate, dup = _fake_bwd(dout, gate, up, activation)
    with on_device_of(gate):
        kernels("glu").glu_bwd(dgate, dup, _unit(dout), _unit(gate), _unit(up), activation)
    return dgate, dup


_bwd = Op(
    "glu_bwd",
    "(Tensor dout, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    backends=[
        Backend("triton", _triton_bwd, lambda dout, gate, *rest: triton_why_not(gate)),
        Backend("cpu", _cpu_bwd, lambda dout, gate, *rest: cpu_why_not(gate)),
    ],
)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, dout):
    gate, up = ctx.saved_tensors
    need_gate, need_up, _ = ctx.needs_input_grad
    dgate, dup = _bwd(dout, gate, up, ctx.activation)
    return dgate if need_gate else None, dup if need_up else None, None


def _configuration(capability, gate, up, activation):
    return configuration(gate, capability, lambda on: kernels("glu").describe(on, _unit(gate), _unit(up)))


def _make(name: str, prepare) -> Op:
    """One public function's op: they differ in the activations that they offer, and in the name that errors bear."""
    return Op(
        name,
        "(Tensor gate, Tensor up, str activation) -> Tensor",
        check=lambda *args: _check(name, *args),
        fake=_fake,
        reference=_reference,
        backends=[
            Backend("triton", _triton, lambda gate, *rest: triton_why_not(gate), _configuration),
            Backend("cpu", _cpu, lambda gate, *rest: cpu_why_not(gate)),
        ],
        prepare=prepare,
        setup_context=_setup_context,
        backward=_backward,
    )


def _prepare_swiglu(gate: torch.Tensor, up: torch.Tensor) -> tuple:
    check_tensor("swiglu", "gate", gate)
    check_tensor("swiglu", "up", up)
    return gate, up, "silu"


def _prepare_geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> tuple:
    check_tensor("geglu", "gate", gate)
    check_tensor("geglu", "up", up)
    if approximate not in _GELU:
        fail("geglu", f"approximate is {approximate!r}, needs 'tanh' or 'none'")
    return gate, up, _GELU[approximate]


_swiglu, _geglu = _make("swiglu", _prepare_swiglu), _make("geglu", _prepare_geglu)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gated unit of Llama's MLP.

    h = silu(gate) * up,  silu(x) = x * sigmoid(x); in float32, rounded once (16-bit results
    from at least 13 right bits).

    Args:
        gate: [..., features], float32, float16, bfloat16 (float64 on the reference backend); any strides, so that
            it may be a view of one projection that made both.
        up: of gate's shape and dtype.

    Returns:
        h, of gate's shape and dtype, contiguous. Backward recomputes the activation: only gate and up are kept.

    Raises:
        InvalidInput: shapes, dtypes or devices that differ; the message names the argument.

    Example:
        >>> gate, up = torch.randn(2, 16, 2 * 64).chunk(2, dim=-1)
        >>> h = pf.ops.swiglu(gate, up)

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    return _swiglu(*_prepare_swiglu(gate, up))


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """The gated unit of Gemma's MLP.

    h = gelu(gate) * up,  gelu(x) = x * Phi(x), Phi the normal distribution function ("none"), or
    x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3) ("tanh"); in float32, rounded once (16-bit results from
    at least 13 right bits).

    Args:
        gate: [..., features], float32, float16, bfloat16 (float64 on the reference backend); any strides.
        up: of gate's shape and dtype.
        approximate: "tanh" or "none", as in `torch.nn.functional.gelu`.

    Returns:
        h, of gate's shape and dtype, contiguous. Backward recomputes the activation: only gate and up are kept.

    Raises:
        InvalidInput: another `approximate`, or shapes, dtypes or devices that differ; the message names the argument.

    Example:
        >>> gate, up = torch.randn(2, 16, 2 * 64).chunk(2, dim=-1)
        >>> h = pf.ops.geglu(gate, up)

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; Hendrycks and Gimpel 2016,
    https://arxiv.org/abs/1606.08415.
    """
    return _geglu(*_prepare_geglu(gate, up, approximate))
