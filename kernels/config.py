"""How a kernel is launched: its block sizes, warps and stages, what a GPU has room for, and the choice among them.

Every kernel module lists its configurations for a GPU and a class of shapes, best first by its own argument, as a
`Family`, and launches what the family chooses:

    pruned      those whose shared memory or registers the GPU does not have, before anything is launched
    measured    in this process (PYFINETUNE_AUTOTUNE=1), in the user's PYFINETUNE_AUTOTUNE_FILE, in measured.json
    model       otherwise the first that kernels/roofline.py sees no faster one for

`compilations` of each module says what would be launched where, so that all of it can be compiled without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyfinetune.kernels import measured, roofline
from pyfinetune.kernels.gpus import GPUS, gpu_of
from pyfinetune.kernels.roofline import Work

# Bytes of shared memory that one block may have, by compute capability.
SHARED_BYTES = {capability: gpu.block_shared for capability, gpu in GPUS.items()}
INTERPRETER = 0  # stands for the capability of no GPU at all
MOST_MEASURED = 6  # configurations that a first call may try
SHIPPED = Path(__file__).with_name("measured.json")

# By name, every kernel of the modules imported so far.
FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Args:
        blocks: block sizes by the names of the kernel's constants.
        num_warps, num_stages: of a block, and of its loads in a loop.
        shared_bytes: an upper bound of the shared memory; 0 where there is next to none.
        registers: of a thread, as far as its module can estimate them; 0 where it does not.
        work: what a launch does, for the model; None where the module's own order decides.
    """

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    shared_bytes: int = 0
    registers: int = field(default=0, compare=False)
    work: Work | None = field(default=None, compare=False)

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
        options: of the compiler, beside what `config` says.
        alternative: whether it is launched only where a measurement says so.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: Config
    matmul: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    alternative: bool = False


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


def size_class(count: int, least: int, most: int) -> int:
    """The power of two that stands for a count in a class of shapes, within bounds that are such themselves."""
    return least if count <= least else most if count >= most else 1 << (count - 1).bit_length()


def why_not(config: Config, capability: int) -> str | None:
    """What a GPU has not got for a configuration, in words, or None."""
    limit = shared_limit(capability)
    if config.shared_bytes > limit:
        return f"takes {config.shared_bytes} bytes of shared memory of {limit}"
    if capability == INTERPRETER:
        return None
    most = gpu_of(capability).most_registers(config.num_warps)
    if config.registers > most:
        return f"takes about {config.registers} registers a thread of {most}"
    return None


@dataclass(frozen=True)
class Chosen:
    """A configuration, why it is the one, and whether there is anything left to measure."""

    config: Config
    source: str
    settled: bool


class Family:
    """One kernel's configurations, and the choice among them.

    Args:
        name: of the kernel, such as "rms_norm_fwd".
        fields: names of the integers that a class of shapes consists of. Two calls of one class launch the same
            configuration; what the last bits of a result must not depend on, such as the other rows, is left out.
        candidates: (capability, *shape) -> configurations, best first by the module's own argument.
    """

    def __init__(self, name: str, fields: Sequence[str], candidates: Callable[..., Sequence[Config]]):
        self.name, self.fields, self.candidates = name, tuple(fields), candidates
        self._known: dict[tuple[int, tuple[int, ...]], Chosen] = {}
        if name in FAMILIES:
            raise ValueError(f"{name}: two kernels of one name")
        FAMILIES[name] = self

    def choose(
        self,
        capability: int,
        *shape: int,
        launch: Callable[..., Any] | None = None,
        aside: Callable[[], Any] | None = None,
    ) -> Config:
        """The configuration to launch with.

        Args:
            capability: of the GPU, 86 for sm_86.
            shape: what the family's fields name.
            launch: runs the kernel once; without it nothing is measured.
            aside: makes what `launch` takes beside a configuration while it is measured: a copy of what the kernel both
                reads and writes.

        Raises:
            ValueError: none fits the GPU, or a table of measured configurations cannot be read.
        """
        found = self._known.get((capability, shape)) or self.chosen(capability, *shape)
        if _tuning is not None and launch is not None and not found.settled and _tuning.may_measure(capability):
            found = self._measure(capability, shape, launch, () if aside is None else (aside(),))
        return found.config

    def chosen(self, capability: int, *shape: int) -> Chosen:
        """The same with its reason; measures nothing."""
        key = capability, shape
        if key not in self._known:
            self._known[key] = self._look_up(capability, shape)
        return self._known[key]

    def describe(self, capability: int, *shape: int) -> str:
        """A line for `pf.explain`."""
        found = self.chosen(capability, *shape)
        return f"{self.name}: {found.config}, {found.source} [{self.shape_text(shape)}]"

    def shape_text(self, shape: Sequence[int]) -> str:
        """A class of shapes for readers."""
        return " ".join(f"{name}={value}" for name, value in zip(self.fields, shape, strict=True))

    def fitting(self, capability: int, *shape: int) -> list[Config]:
        """The configurations that the GPU has room for, by the model: the one it chooses, then the fastest first.

        Raises:
            ValueError: there is none.
        """
        candidates = self.candidates(capability, *shape)
        refusals = [why_not(config, capability) for config in candidates]
        found = [config for config, refusal in zip(candidates, refusals, strict=True) if refusal is None]
        if not found:
            texts = (f"{config} {refusal}" for config, refusal in zip(candidates, refusals, strict=True))
            text = "; ".join(texts)
            raise ValueError(f"{self.name}: no configuration fits sm_{capability}: {text}")
        if capability == INTERPRETER or len(found) == 1 or any(config.work is None for config in found):
            return found
        times = [self._seconds(capability, config) for config in found]
        first = next(i for i, taken in enumerate(times) if taken <= roofline.TIE * min(times))
        return [found[i] for i in sorted(range(len(found)), key=lambda i: (i != first, times[i]))]

    @staticmethod
    def _seconds(capability: int, config: Config) -> float:
        resources = config.num_warps, config.shared_bytes, config.registers, config.num_stages
        return roofline.seconds(gpu_of(capability), config.work, *resources)

    def instances(self, capability: int, *shape: int) -> Iterator[tuple[Config, str, bool]]:
        """For `compilations`: every configuration that could be launched, what sets it apart in words, and whether it
        is only an alternative to the chosen one, which comes first."""
        first = self.choose(capability, *shape)
        yield first, "", False
        for config in self.fitting(capability, *shape):
            if config != first:
                yield config, f" [{config}]", True

    def _look_up(self, capability: int, shape: tuple[int, ...]) -> Chosen:
        fitting = self.fitting(capability, *shape)
        for table, of_user in _tables():
            entry = table.get((self.name, capability, measured.shape_key(zip(self.fields, shape, strict=True))))
            if entry is None:
                continue
            config, refusal = self._of_entry(entry, capability, shape)
            if refusal is None:
                return Chosen(config, f"measured before, {entry.file.name}", of_user)
            warnings.warn(f"{entry}: not used, as it {refusal}", RuntimeWarning, stacklevel=4)
        if len(fitting) == 1:
            return Chosen(fitting[0], "the only one that fits", True)
        if capability == INTERPRETER or fitting[0].work is None:
            return Chosen(fitting[0], "by the kernel's own order", False)
        return Chosen(fitting[0], "by the roofline model", False)

    def _of_entry(self, entry, capability: int, shape: Sequence[int]) -> tuple[Config | None, str | None]:
        """The configuration that an entry names, and why it cannot be launched, or None."""
        for config in self.candidates(capability, *shape):
            if _as_launched(config) == entry.launched:
                return config, why_not(config, capability)
        return None, "is no configuration of the kernel any more"

    def _measure(self, capability: int, shape: tuple[int, ...], launch: Callable[..., Any], more: tuple) -> Chosen:
        def timed(config: Config) -> Any:
            return launch(config, *more)

        config, taken = _fastest(self.fitting(capability, *shape)[:MOST_MEASURED], timed, _tuning.clock)
        found = self._known[capability, shape] = Chosen(config, f"measured in this process, {taken:.3g} ms", True)
        named = dict(zip(self.fields, shape, strict=True))
        entry = {"kernel": self.name, "capability": capability, "shape": named, **_as_launched(config), "ms": taken}
        _remembered.append(entry)
        path = _user_file()
        if path is not None:
            measured.write(path, [entry])
        return found


def _as_launched(config: Config) -> dict[str, Any]:
    return {"blocks": config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}


# --- What was measured before


@functools.cache
def _tables() -> list[tuple[dict, bool]]:
    """The measured configurations, and whether they are the user's own: read once, by the first choice."""
    path, tables = _user_file(), []
    if path is not None and path.exists():
        tables.append((measured.read(path), True))
    return [*tables, (measured.read(SHIPPED), False)]


def _user_file() -> Path | None:
    text = os.environ.get("PYFINETUNE_AUTOTUNE_FILE")
    return Path(text) if text else None


def problems(path: Path) -> list[str]:
    """What is wrong with the entries of a file of measured configurations, in words; all kernel modules imported.

    Raises:
        ValueError: the file cannot be read as such a table.
    """
    found = []
    for entry in measured.read(path).values():
        family, refusal = FAMILIES.get(entry.kernel), None
        if family is None:
            refusal = "is of a kernel that there is not"
        elif set(entry.shape) != set(family.fields):
            refusal = f"needs a shape of {', '.join(family.fields)}"
        else:
            shape = [entry.shape[name] for name in family.fields]
            refusal = family._of_entry(entry, entry.capability, shape)[1]
        if refusal is not None:
            found.append(f"{entry}: {refusal}")
    return found


# --- Measuring

# What this process has measured, as entries of measured.json.
_remembered: list[dict[str, Any]] = []


def remembered() -> list[dict[str, Any]]:
    """What this process has measured, as entries of measured.json."""
    return list(_remembered)


@dataclass(frozen=True)
class _Tuning:
    """That choices are to be measured: with which clock, in milliseconds, and until when."""

    clock: Callable[[Callable[[], Any]], float] | None = None
    until: float = float("inf")

    def may_measure(self, capability: int) -> bool:
        if time.monotonic() > self.until:
            return False
        if capability == INTERPRETER:
            return self.clock is not None
        return not torch.cuda.is_current_stream_capturing()  # such a stream takes no events


def _asked_to_tune() -> _Tuning | None:
    text = os.environ.get("PYFINETUNE_AUTOTUNE", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"PYFINETUNE_AUTOTUNE={text!r}: needs 1 to measure configurations, or 0")
    return _Tuning() if text == "1" else None


# Of the whole process, as a backward runs on threads of autograd's.
_tuning = _asked_to_tune()


@contextlib.contextmanager
def autotuning(clock: Callable[[Callable[[], Any]], float] | None = None, seconds: float = float("inf")):
    """Measure, inside the block, every choice that no measurement of this process or the user's has settled.

    Args:
        clock: takes a call and returns its milliseconds; Triton's on a GPU, and nothing without one, by default.
        seconds: after which no more is measured.
    """
    global _tuning
    previous, _tuning = _tuning, _Tuning(clock, time.monotonic() + seconds)
    try:
        yield
    finally:
        _tuning = previous


def _fastest(configs: Sequence[Config], launch: Callable[[Config], Any], clock) -> tuple[Config, float]:
    """The fastest of the configurations and its milliseconds; one that does not run at all is not the fastest."""
    from triton.runtime.errors import OutOfResources

    times = []
    for config in configs:
        try:
            times.append((clock or _gpu_clock)(functools.partial(launch, config)))
        except OutOfResources:
            times.append(float("inf"))
    best = min(range(len(times)), key=times.__getitem__)
    return configs[best], times[best]


def _gpu_clock(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="median")
