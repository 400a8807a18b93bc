"""Where the CUDA C++ kernels can run."""

from __future__ import annotations

import functools

import torch

from pyfinetune._native import native
from pyfinetune.ops._checks import FLOATS, tensors_why_not


def cuda_why_not(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """The reason why the CUDA kernels cannot take these tensors, or None."""
    if not native.cuda_archs:
        return "this build has no CUDA kernels"
    reason = tensors_why_not("cuda", *tensors, dtypes=dtypes)
    if reason is not None:
        return reason
    device = next(tensor for tensor in tensors if tensor is not None).device
    return not_built_for(capability_of(device.index), native.cuda_archs)


@functools.cache
def capability_of(index: int | None) -> int:
    """The compute capability of a GPU, such as 89."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def not_built_for(capability: int, archs: str) -> str | None:
    """Why kernels built for `archs` ("80,90") do not run on a GPU: machine code runs on its own major version only."""
    for arch in map(int, archs.split(",")):
        if arch // 10 == capability // 10 and arch <= capability:
            return None
    return f"built for sm_{archs.replace(',', ', sm_')}, not for sm_{capability}"


def stream_of(tensor: torch.Tensor) -> int:
    """The current stream of a tensor's GPU, as the native module takes it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
