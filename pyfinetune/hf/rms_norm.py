"""RMS norms of any model, on `pf.ops.rms_norm`: found by structure, their offset measured, proved by a probe."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from pyfinetune.hf.changes import ClassSwap
from pyfinetune.hf.fast_class import Fast, fast_class
from pyfinetune.hf.probe import Candidate, Proof, Widened, attempt, compare, run_with_grads, twin_of, why_fixed
from pyfinetune.ops import rms_norm
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain

KIND = "RMSNorm"
_EPS = ("variance_epsilon", "eps")


class FastRMSNorm(Fast):
    """The forward that the swapped classes share; the class made for each original says what is added to the weight."""

    offset: float
    eps_name: str

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or x.dtype != self.weight.dtype:  # some promote, some cast: that stays the original's
            return super().forward(x, *args, **kwargs)
        return rms_norm(x, self.weight, getattr(self, self.eps_name), offset=self.offset)


def _eps_name(module: nn.Module) -> str | None:
    """The attribute that holds the epsilon, if the module is built like an RMS norm: one vector and nothing else."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    if shapes != {"weight": 1} or any(True for _ in module.buffers()) or any(True for _ in module.children()):
        return None
    if isinstance(module, nn.LayerNorm):
        return None
    return next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)


def _offset_of(module: nn.Module) -> float:
    """What the norm adds to its weight: 0, or 1 as in Gemma. Measured with a weight of zero."""
    twin, weight = twin_of(module), module.weight
    x = torch.linspace(-2, 3, weight.shape[0], device=weight.device).to(weight.dtype).expand(2, -1)
    with torch.no_grad():
        zeros = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        found = torch.func.functional_call(twin, {"weight": zeros}, (x,))
    return 1.0 if bool(found.any()) else 0.0


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module that is built like an RMS norm."""
    for name, module in model.named_modules():
        eps_name = _eps_name(module)
        if eps_name is None:
            continue
        reason = "already patched" if isinstance(module, FastRMSNorm) else _why_not(module)
        if reason is not None:
            yield Candidate(KIND, name, module, None, reason, None, None)
            continue
        offset, reason = attempt(functools.partial(_offset_of, module))
        if reason is not None:
            yield Candidate(KIND, name, module, None, reason, None, None)
            continue
        fast = fast_class(FastRMSNorm, type(module), eps_name=eps_name, offset=offset)
        weight = module.weight
        signature = (fast, weight.shape, weight.dtype, weight.device, weight.requires_grad, getattr(module, eps_name))
        prove = functools.partial(_prove, module, fast)
        yield Candidate(KIND, name, module, ClassSwap(module, fast), None, signature, prove)


def _why_not(module: nn.Module) -> str | None:
    if module.weight.dtype not in FLOATS:
        return f"its weight is {module.weight.dtype}"
    return why_fixed(module)


def _prove(module: nn.Module, fast: type) -> tuple[Proof, str]:
    generator = torch.Generator().manual_seed(0)
    weight = module.weight

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(weight.dtype).to(weight.device)

    inputs = {"x": normal(2, 5, *weight.shape).requires_grad_(), "weight": normal(*weight.shape)}
    inputs["weight"].requires_grad_(weight.requires_grad)
    dout = normal(2, 5, *weight.shape)

    def run(kind: type, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        twin = twin_of(module)
        twin.__class__ = kind

        def call(leaves):
            return torch.func.functional_call(twin, {"weight": leaves["weight"]}, (leaves["x"],))

        return run_with_grads(call, values, dout)

    wide = {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in inputs.items()}
    with Widened():
        exact = run(type(module), wide)
    proof = compare(run(fast, inputs), run(type(module), inputs), exact, weight.dtype)
    return proof, explain("rms_norm", inputs["x"], inputs["weight"]).backend
