"""The numeric probe: a swap is made only where outputs and gradients are as close to the truth as the original's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pyfinetune.hf.changes import Change

# How far a replacement may be off, in units of the original's own error: that of a backend's gradients.
_FACTOR = 2.0


@dataclass(frozen=True)
class Proof:
    """The outcome of one probe.

    Args:
        error: largest error of the replacement, relative to the largest exact value of its quantity; None where
            nothing was compared.
        reason: why the replacement is not made, such as the quantity in which it is too far off; else None.
    """

    error: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A module that a kind of block has looked at.

    Args:
        kind: what it is, in words.
        name: its path in the model.
        module: the module.
        change: what would put the kernels in; None where it is left alone.
        reason: why it is left alone; None if only the probe is still to come.
        signature: modules that share it are proved by one probe.
        prove: the probe; gives the proof and the backend that ran.
    """

    kind: str
    name: str
    module: nn.Module
    change: Change | None
    reason: str | None
    signature: tuple | None
    prove: Callable[[], tuple[Proof, str]] | None


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether someone listens to calls of this module itself."""
    return any(module.__dict__[hooks] for hooks in HOOKS)


def why_own_forward(module: nn.Module, it: str = "it") -> str | None:
    """The reason why a class's forward would not be what a call of this module runs, or None."""
    if hasattr(module, "_hf_hook"):
        return f"{it} is dispatched by accelerate (_hf_hook)"
    if "forward" in module.__dict__:
        return f"{it} has a forward of its own (instance attribute)"
    return None


def why_fixed(module: nn.Module) -> str | None:
    """The reason why a module cannot take another class, or its children be run past, whatever it computes; or None."""
    for name, child in module.named_modules():
        where = f"its {name}" if name else "it"
        own = why_own_forward(child, where)
        if own is not None:
            return own
        if name and has_hooks(child):
            return f"{where} has hooks, which the op would run past"
        if hasattr(child, "parametrizations"):
            return f"{where} is parametrized"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            return f"{name} is on the meta device"
        if hasattr(tensor, "device_mesh"):
            return f"{name} is sharded already (DTensor); patch before"
    return None


def twin_of(module: nn.Module) -> nn.Module:
    """A second module object over the same tensors and children, without the first one's hooks."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers, twin._modules = (
        dict(part) for part in (module._parameters, module._buffers, module._modules)
    )
    twin.__dict__.update({key: value for key, value in nn.Module().__dict__.items() if key.endswith("_hooks")})
    return twin


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call gives that runs somebody's module on made-up inputs, or the reason why it gave nothing."""
    try:
        return call(), None
    except Exception as error:  # whatever it is, the module stays as it is and the report says so
        return None, f"it could not be tried: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Widened(TorchFunctionMode):
    """Inside, whatever asks for float32 gets float64, so that code which computes "in float32" can be run exactly."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function with float64 where float32 was asked for."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def run_with_grads(
    call: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], inputs: Mapping[str, torch.Tensor], dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output of a call and the gradients of its inputs, nothing accumulated anywhere.

    Args:
        call: takes the inputs by name.
        inputs: by name; those that require grad are differentiated. They are copied into fresh leaves.
        dout: gradient of the output; cast to the output's dtype.

    Returns:
        "output", and for each differentiated input "grad of <name>".
    """
    leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    # The caller may be under no_grad, inference mode or autocast; the probe computes in the dtypes it is given.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(dout.device.type, enabled=False):
        output = call(leaves)
        grads = torch.autograd.grad(output, list(wanted.values()), dout.to(output.dtype))
    return {"output": output.detach(), **{f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}}


def compare(
    ours: Mapping[str, torch.Tensor],
    original: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Proof:
    """Whether every quantity of ours is about as close to the exact one as the original's.

    The root mean square of its error may be twice the original's plus one ulp of the quantity. The largest error
    scatters from sample to sample, above all with few rows, so it gets twice that; it is there to find single wrong
    elements, which a mean would hide.

    Args:
        ours, original, exact: quantities by name, as `run_with_grads` returns them.
        dtype: the compute dtype of ours and the original, whose ulp it is.
    """
    worst = 0.0
    for name, truth in exact.items():
        sizes, errors, limits = _sizes(truth), _sizes(ours[name] - truth), _sizes(original[name] - truth)
        for measure, slack in ((0, 1.0), (1, 2.0)):
            allowed = slack * (_FACTOR * limits[measure] + torch.finfo(dtype).eps * sizes[measure])
            if not errors[measure] <= allowed:  # so written, a NaN fails
                reason = f"the probe failed: {name} is off by {errors[measure]:.2g}, allowed are {allowed:.2g}"
                return Proof(errors[1] / sizes[1] if sizes[1] and math.isfinite(errors[1]) else None, reason)
        worst = max(worst, errors[1] / sizes[1] if sizes[1] else 0.0)
    return Proof(worst)


def _sizes(value: torch.Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude."""
    if not value.numel():
        return 0.0, 0.0
    return value.square().mean().sqrt().item(), value.abs().max().item()
