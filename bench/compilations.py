"""Compile the Triton kernels for any GPU, without one, and read off the result what it would take there.

Each kernel module says with `compilations(capability)` what it would launch on a GPU. The compiler tells the shared
memory, cuobjdump the registers and what they spill, and from both follows how many warps a multiprocessor can hold.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyfinetune.kernels.config import Compilation

_RESOURCES = re.compile(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)")
_TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")

CAPABILITIES = (80, 86, 89, 90, 100, 120)  # of kernels/gpus.py


@dataclass
class Compiled:
    """One kernel, compiled for one GPU.

    Args:
        module: the kernel module's name.
        name: what the module calls this instance.
        kernel: the kernel's own name.
        capability: 86 for sm_86, and so on.
        config: block sizes, warps and stages.
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared, shared_limit: bytes of a block, and how many it may have.
        occupancy: warps on a multiprocessor / warps that it could hold.
        tensor_cores: the instruction found; None where it needs none.
        seconds: taken to compile.
        violations: what must not be, in words.
    """

    module: str
    name: str
    kernel: str
    capability: int
    config: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    shared_limit: int = 0
    occupancy: float = 0.0
    tensor_cores: str | None = None
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def kernel_modules() -> list[str]:
    """The modules of kernels/ that say what they would launch, by their names."""
    folder = Path(importlib.util.find_spec("pyfinetune.kernels.config").origin).parent
    names = sorted(path.stem for path in folder.glob("*.py"))
    return [name for name in names if hasattr(_module(name), "compilations")]


def _module(name: str):
    return importlib.import_module(f"pyfinetune.kernels.{name}")


def compilations_of(module: str, capability: int) -> list[Compilation]:
    """What a module would launch on a GPU, without what another of the modules has said before it."""
    before = [c for name in kernel_modules() if name < module for c in _module(name).compilations(capability)]
    return [compilation for compilation in _module(module).compilations(capability) if compilation not in before]


def kernels_never_compiled(capability: int) -> list[str]:
    """Kernels of the modules that no module names among what it would launch on a GPU."""
    named, defined = set(), {}
    for module in kernel_modules():
        named |= {compilation.kernel for compilation in _module(module).compilations(capability)}
        for name, value in vars(_module(module)).items():
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                defined[value] = f"{value.__module__.rpartition('.')[2]}.{name}"
    return sorted(name for kernel, name in defined.items() if kernel not in named)


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that blocks of this size can fill.

    Args:
        capability: 86 for sm_86, and so on.
        registers: of a thread; a warp gets them in units of 256.
        shared: bytes of a block.
        warps: of a block.
    """
    from pyfinetune.kernels.gpus import GPUS

    has = GPUS[capability]
    return has.resident(warps, shared, registers) * warps / has.warps


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [tuple(map(int, match)) for match in _RESOURCES.findall(text)]
    if not found:
        raise ValueError(f"cuobjdump says nothing of registers: {text.strip()!r}")
    registers, stack, local = map(max, zip(*found, strict=True))
    return registers, max(stack, local)


def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _source(compilation: Compilation):
    """The kernel with what a launch tells the compiler: types, constants, and what is divisible by 16.

    A launch finds out that a pointer or a size is divisible by 16, as those of common models are; without that, loads
    are not vectorised and not pipelined, and the code is another.
    """
    from triton.compiler import ASTSource

    kernel = compilation.kernel
    constants = {**compilation.constants, **compilation.config.blocks}
    unknown = set(compilation.signature) | set(constants)
    unknown -= set(kernel.arg_names)
    if unknown:
        raise ValueError(f"no arguments of the kernel: {', '.join(sorted(unknown))}")
    types = {name: "constexpr" if name in constants else compilation.signature[name] for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*") or kind in ("i32", "i64")]
    return ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


def compile_one(module: str, compilation: Compilation, capability: int) -> Compiled:
    """Compile one kernel for one GPU; what goes wrong is among the violations."""
    from pyfinetune.kernels.config import shared_limit

    config = compilation.config
    name, limit = compilation.kernel.__name__, shared_limit(capability)
    row = Compiled(module, compilation.name, name, capability, str(config), shared_limit=limit)
    start = time.perf_counter()
    try:
        _compile_into(row, compilation)
    except Exception as error:  # a compiler's errors have no common class, and one must not hide the others
        # The first of a chain of errors says what is wrong, the others only where.
        while error.__cause__ is not None:
            error = error.__cause__
        last = str(error).strip().splitlines()[-1:] or [""]
        row.violations.append(f"does not compile: {type(error).__name__}: {last[0]}")
    row.seconds = time.perf_counter() - start
    return row


def _compile_into(row: Compiled, compilation: Compilation) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    config = compilation.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **compilation.options}
    target = GPUTarget("cuda", row.capability, 32)
    compiled = triton.compile(_source(compilation), target=target, options=options)
    row.shared = compiled.metadata.shared
    row.registers, row.spilled = resources(compiled.asm["cubin"])
    row.occupancy = occupancy(row.capability, row.registers, row.shared, compiled.metadata.num_warps)
    found = _TENSOR_CORES.search(compiled.asm["ptx"])
    row.tensor_cores = found.group(1) if found else None
    if row.shared > row.shared_limit:
        row.violations.append(f"takes {row.shared} bytes of shared memory of {row.shared_limit}")
    if config.shared_bytes and row.shared > config.shared_bytes:
        row.violations.append(f"takes {row.shared} bytes of shared memory, says at most {config.shared_bytes}")
    if row.spilled:
        row.violations.append(f"spills {row.spilled} bytes of registers")
    if not row.occupancy:
        row.violations.append("no block fits a multiprocessor")
    if compilation.matmul and found is None:
        row.violations.append("multiplies matrices without tensor cores")


def prepare_worker(cache: str) -> None:
    """Give a process that compiles a cache of its own, whatever its parent was told."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.pop("TRITON_INTERPRET", None)


def work(task: tuple[str, int, int]) -> Compiled:
    """Compile what stands at (module, capability, index), in a process that `prepare_worker` has made ready."""
    module, capability, index = task
    return compile_one(module, compilations_of(module, capability)[index], capability)


def tasks(modules: list[str], capabilities: list[int], alternatives: bool = True) -> Iterator[tuple[str, int, int]]:
    """Everything to compile, as `work` takes it; without `alternatives` what is launched where nothing is measured."""
    for module in modules:
        for capability in capabilities:
            for index, compilation in enumerate(compilations_of(module, capability)):
                if alternatives or not compilation.alternative:
                    yield module, capability, index
