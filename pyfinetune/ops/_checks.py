"""Checks that ops share. Each raises InvalidInput with a message that starts with the op and the argument's name."""

from __future__ import annotations

from typing import NoReturn

import torch

from pyfinetune.errors import InvalidInput

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALL_FLOATS = (*FLOATS, torch.float64)


def fail(op: str, message: str) -> NoReturn:
    """Raise InvalidInput("op: message"); behind an `if`, so that a good call never pays for a message."""
    raise InvalidInput(f"{op}: {message}")


def check_tensor(op: str, name: str, value, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """The value is a tensor of one of the dtypes."""
    if not isinstance(value, torch.Tensor):
        fail(op, f"{name} is {type(value).__name__}, needs a tensor")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        fail(op, f"{name} is {str(value.dtype).removeprefix('torch.')}, needs {wanted}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors given are on one device."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        fail(op, ", ".join(f"{name} is on {device}" for name, device in present.items()))


def tensors_why_not(device: str, *tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason why kernels for a type of device and these float dtypes cannot take the tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"a tensor is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            return f"no kernel for {str(tensor.dtype).removeprefix('torch.')}"
    return None


def cpu_why_not(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """The reason why the native CPU kernels cannot take these tensors, or None."""
    return tensors_why_not("cpu", *tensors, dtypes=dtypes)
