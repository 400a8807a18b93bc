"""The numeric probe: a swap is made only where outputs and gradients are as close to the truth as the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        replacement: the class that would replace its own.
        reason: why it is left alone; None if only the probe is still to come.
        signature: modules that share it are proved by one probe.
        prove: the probe: (module, replacement) -> proof and the backend that ran.
    """

    kind: str
    name: str
    module: nn.Module
    replacement: type | None
    reason: str | None
    signature: tuple | None
    prove: Callable[[Any, Any], tuple[Proof, str]]


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
