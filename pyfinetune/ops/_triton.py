"""Where the Triton kernels can run, and the way to those of one op."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from pyfinetune.ops._checks import FLOATS, tensors_why_not
from pyfinetune.ops._op import LEAST_CAPABILITY


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_dtypes() -> tuple[torch.dtype, ...]:
    """The float dtypes that the kernels take: in Python not bfloat16, which Triton gets wrong there."""
    return tuple(dtype for dtype in FLOATS if not (interpreted() and dtype == torch.bfloat16))


def triton_why_not(*tensors: torch.Tensor | None) -> str | None:
    """The reason why the Triton kernels cannot take these tensors, or None."""
    reason = tensors_why_not("cpu" if interpreted() else "cuda", *tensors, dtypes=triton_dtypes())
    if reason is not None:
        return reason
    if not _installed():
        return "triton is not installed"
    if interpreted():
        return None
    capability = kernels("config").capability_of(next(tensor for tensor in tensors if tensor is not None))
    return None if capability >= LEAST_CAPABILITY else f"the GPU is sm_{capability}, needs sm_{LEAST_CAPABILITY}"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels(stem: str) -> ModuleType:
    """The module of an op's Triton kernels, imported when first asked for."""
    return importlib.import_module(f"pyfinetune.kernels.{stem}")


def configuration(of: torch.Tensor, capability: int | None, describe: Callable[[int], Sequence[str]]) -> Sequence[str]:
    """What `describe` says of a capability, by default that of a tensor's GPU; nothing where no kernel takes it."""
    if not _installed() or of.dtype not in FLOATS:
        return ()
    return describe(kernels("config").capability_of(of) if capability is None else capability)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes a tensor's GPU the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
