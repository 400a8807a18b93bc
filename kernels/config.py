"""How a kernel is launched: its block sizes, warps and stages, and what a GPU has room for.

Every kernel module lists its configurations best first for a GPU and a class of shapes, and launches the first that
fits; `compilations` of each module says what would be launched where, so that all of it can be compiled without a GPU.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Bytes of shared memory that one block may have, by compute capability.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
INTERPRETER = 0  # stands for the capability of no GPU at all
MOST_MEASURED = 6  # configurations that a first call may try

# By kernel, capability and shape class, the configuration and its milliseconds: what this process has measured.
_remembered: dict[tuple[str, int, str], tuple[Config, float]] = {}


@dataclass(frozen=True)
class Config:
    """Block sizes by the names of a kernel's constants, warps, stages, and an upper bound of the shared memory."""

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
    return _fitting(configs, capability)[0]


def _fitting(configs: Sequence[Config], capability: int) -> list[Config]:
    limit = shared_limit(capability)
    found = [config for config in configs if config.shared_bytes <= limit]
    if not found:
        raise ValueError(f"no configuration fits {limit} bytes of shared memory: {', '.join(map(str, configs))}")
    return found


# --- The choice among those that fit: measured before (measured.json), measured now, or the module's own order


def choose(
    kernel: str,
    shape_class: str,
    configs: Sequence[Config],
    capability: int,
    launch: Callable[[Config], Any] | None = None,
) -> Config:
    """The configuration to launch a kernel with.

    What this process has measured comes first, then what measured.json says, then the order of `configs`. With
    PYFINETUNE_AUTOTUNE=1 the first call of a shape class on a GPU measures the first six that fit; which one wins may
    differ from process to process, and with it the last bits of what the kernel adds up.

    Args:
        kernel: its name, such as "rms_norm_fwd".
        shape_class: what the choice depends on, as a short text such as "bf16 cols=4096"; not every single size.
        configs: best first by the module's own argument.
        capability: of the GPU, 86 for sm_86.
        launch: runs the kernel once; must give the same result however often it runs. None measures nothing.

    Raises:
        ValueError: none fits the GPU's shared memory.
    """
    return chosen(kernel, shape_class, configs, capability, launch)[0]


def chosen(
    kernel: str,
    shape_class: str,
    configs: Sequence[Config],
    capability: int,
    launch: Callable[[Config], Any] | None = None,
) -> tuple[Config, str]:
    """The same with the reason in words, for `pf.explain`, which launches nothing."""
    fitting, key = _fitting(configs, capability), (kernel, capability, shape_class)
    if key not in _remembered and launch is not None and len(fitting) > 1 and _may_measure(capability):
        _remembered[key] = _fastest(fitting[:MOST_MEASURED], launch)
    if key in _remembered:
        return _remembered[key][0], "measured in this process"
    entry = _measured().get(key)
    if entry is not None:
        for config in fitting:
            # One that the module no longer has is not launched, whatever the table says.
            if _as_launched(config) == entry:
                return config, "measured before"
    return fitting[0], "by the kernel's own order"


def describe(kernel: str, shape_class: str, configs: Sequence[Config], capability: int) -> str:
    """What `chosen` says, as a `Backend.configuration` tells it to `pf.explain`."""
    config, why = chosen(kernel, shape_class, configs, capability)
    return f"{kernel}: {config}, {why}"


def remembered() -> list[dict[str, Any]]:
    """What this process has measured, as entries of measured.json."""
    return [
        {"kernel": kernel, "capability": capability, "shape_class": shape_class, "ms": ms, **_as_launched(config)}
        for (kernel, capability, shape_class), (config, ms) in _remembered.items()
    ]


def _as_launched(config: Config) -> dict[str, Any]:
    return {"blocks": config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}


@functools.cache
def _measured() -> dict[tuple[str, int, str], dict[str, Any]]:
    """measured.json, by kernel, capability and shape class."""
    table = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))
    fields = ("blocks", "num_warps", "num_stages")
    return {
        (entry["kernel"], entry["capability"], entry["shape_class"]): {name: entry[name] for name in fields}
        for entry in table["entries"]
    }


def _may_measure(capability: int) -> bool:
    # A stream that is being captured takes no events.
    return (
        capability != INTERPRETER
        and os.environ.get("PYFINETUNE_AUTOTUNE") == "1"
        and not torch.cuda.is_current_stream_capturing()
    )


def _fastest(configs: Sequence[Config], launch: Callable[[Config], Any]) -> tuple[Config, float]:
    """The fastest of the configurations and its milliseconds; one that does not run at all is not the fastest."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = []
    for config in configs:
        try:
            times.append(do_bench(functools.partial(launch, config), warmup=5, rep=20, return_mode="median"))
        except OutOfResources:
            times.append(float("inf"))
    best = min(range(len(times)), key=times.__getitem__)
    return configs[best], times[best]
