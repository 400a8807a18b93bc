"""How a kernel is launched: its block sizes, warps and stages, and what a GPU has room for.

Every kernel module lists its configurations best first for a GPU and a class of shapes, and launches the first that
fits; `compilations` of each module says what would be launched where, so that all of it can be compiled without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Bytes of shared memory that one block may have, by compute capability.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
INTERPRETER = 0  # stands for the capability of no GPU at all


@dataclass(frozen=True)
class Config:
    """Block sizes by the names of a kernel's constants, warps, stages, and an upper bound of the shared memory taken."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    shared_bytes: int = 0

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.blocks.items())
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Compilation:
    """One kernel as it would be launched: what the compiler needs to know, and what its result has to show.

    Args:
        name: the kernel and what sets this instance apart.
        kernel: the `triton.jit` function.
        signature: by argument a type such as "*bf16", "i64" or "fp32".
        constants: by argument the value of each constant that `config` does not set.
        config: block sizes, warps and stages.
        matmul: whether it multiplies matrices and so has to use the tensor cores.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: Config
    matmul: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def capability_of(tensor: torch.Tensor) -> int:
    """80 for sm_80, and so on; `INTERPRETER` for a tensor on the CPU."""
    return _capability(tensor.device) if tensor.is_cuda else INTERPRETER


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_limit(capability: int) -> int:
    """Bytes of shared memory for one block; of a GPU that is not listed, those of the next older one that is."""
    older = [known for known in SHARED_BYTES if known <= capability]
    return SHARED_BYTES[max(older)] if older else max(SHARED_BYTES.values())


def first_fitting(configs: Sequence[Config], capability: int) -> Config:
    """The first configuration whose shared memory the GPU has.

    Raises:
        ValueError: none fits.
    """
    limit = shared_limit(capability)
    for config in configs:
        if config.shared_bytes <= limit:
            return config
    raise ValueError(f"no configuration fits {limit} bytes of shared memory: {', '.join(map(str, configs))}")
