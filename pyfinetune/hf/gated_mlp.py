"""Gated feed-forward blocks, down(act(gate(x)) * up(x)), on `pf.ops.swiglu` and `pf.ops.geglu`.

The three products stay with the block's own children, whatever they are: `nn.Linear`, adapters, 4-bit layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pyfinetune.hf.changes import ClassSwap
from pyfinetune.hf.fast_class import Fast, fast_class
from pyfinetune.hf.groups import shared_input
from pyfinetune.hf.probe import (
    Candidate,
    Proof,
    Widened,
    attempt,
    compare,
    has_hooks,
    run_with_grads,
    twin_of,
    why_fixed,
    why_own_forward,
)
from pyfinetune.ops import geglu, swiglu
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain

KIND = "gated MLP"
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_GATES = {
    "silu": (nn.functional.silu, swiglu),
    "gelu_tanh": (
        functools.partial(nn.functional.gelu, approximate="tanh"),
        functools.partial(geglu, approximate="tanh"),
    ),
    "gelu": (nn.functional.gelu, functools.partial(geglu, approximate="none")),
}
_EXPLAINED = {"silu": ("swiglu", {}), "gelu_tanh": ("geglu", {}), "gelu": ("geglu", {"approximate": "none"})}


class FastGatedMLP(Fast):
    """The forward that the swapped classes share; what is set on the class made for each original says the rest."""

    activation_name: str
    gate: str

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        activation = getattr(self, self.activation_name)
        listened = isinstance(activation, nn.Module) and has_hooks(activation)
        if args or kwargs or listened or (torch.is_autocast_enabled(x.device.type) and x.dtype not in FLOATS):
            return super().forward(x, *args, **kwargs)
        gate, up = self._gate_and_up(x)
        return self.down_proj(_GATES[self.gate][1](gate, up))

    def _gate_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if hasattr(self, "gate_up_proj"):
            return self.gate_up_proj(x).chunk(2, dim=-1)
        return shared_input((self.gate_proj, self.up_proj), x)


def _projections(module: nn.Module) -> tuple[str, ...] | None:
    """The names of the block's products, if it is built like one."""
    for names in (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")):
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return names
    return None


def _gate_of(activation: Callable) -> str | None:
    """The name of the activation, measured."""
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        found = activation(x)
    return next((name for name, (plain, _) in _GATES.items() if torch.allclose(found, plain(x), atol=1e-6)), None)


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module that is built like a gated feed-forward block."""
    for name, module in model.named_modules():
        projections = _projections(module)
        activation_name = next((key for key in _ACTIVATIONS if callable(getattr(module, key, None))), None)
        if projections is None or activation_name is None:
            continue
        activation = getattr(module, activation_name)
        gate, _ = attempt(functools.partial(_gate_of, activation))
        reason = _why_not(module, projections, activation, gate)
        if reason is not None:
            yield Candidate(KIND, name, module, None, reason, None, None)
            continue
        fast = fast_class(FastGatedMLP, type(module), activation_name=activation_name, gate=gate)
        dtype = next((p.dtype for p in module.parameters() if p.dtype in FLOATS), torch.float32)
        prove = functools.partial(_prove, module, fast, projections, dtype)
        yield Candidate(KIND, name, module, ClassSwap(module, fast), None, (fast, projections, dtype), prove)


def _why_not(module: nn.Module, projections: tuple[str, ...], activation: Callable, gate: str | None) -> str | None:
    if isinstance(module, FastGatedMLP):
        return "already patched"
    if gate is None:
        return f"no kernel for the activation {getattr(activation, '__name__', type(activation).__name__)}"
    own = why_own_forward(module)
    if own is not None:
        return own
    others = {name for name, _ in module.named_children()} - {*projections}
    extra = sorted(name for name in others if getattr(module, name) is not activation)
    if extra:
        return f"it also has {', '.join(extra)}"
    return why_fixed(activation) if isinstance(activation, nn.Module) else None


def _prove(module: nn.Module, fast: type, projections: tuple[str, ...], dtype: torch.dtype) -> tuple[Proof, str]:
    """The block with small dense products in its children's place: what is proved is how they are put together."""
    width, inner = 24, 40
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    shapes["gate_up_proj"] = (2 * inner, width)
    inputs = {f"{name}.weight": normal(*shapes[name]) / shapes[name][1] ** 0.5 for name in projections}
    inputs["x"] = normal(2, 5, width)
    inputs = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    dout = normal(2, 5, width)

    def run(kind: type, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        twin = twin_of(module)
        twin.__class__ = kind
        for name in projections:
            twin._modules[name] = nn.Linear(*shapes[name][::-1], bias=False, device="meta")

        def call(leaves):
            leaves = dict(leaves)
            return torch.func.functional_call(twin, leaves, (leaves.pop("x"),))

        return run_with_grads(call, values, dout)

    with Widened():
        exact = run(type(module), {key: value.detach().double().requires_grad_() for key, value in inputs.items()})
    proof = compare(run(fast, inputs), run(type(module), inputs), exact, dtype)
    op, options = _EXPLAINED[fast.gate]
    example = torch.zeros(1, inner, dtype=dtype, device=next((p.device for p in module.parameters()), None))
    return proof, explain(op, example, example, **options).backend
