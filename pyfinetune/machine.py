"""What this machine can run: versions, processor, GPUs, and the backends with the reason where one is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pyfinetune._native import native, threads
from pyfinetune.errors import BackendUnavailable
from pyfinetune.ops._cuda import not_built_for

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "safetensors")


class Info(dict):
    """A plain dictionary that serialises to JSON as it is and prints as a compact table."""

    def __str__(self) -> str:
        cpu = self["cpu"]
        isa = cpu["isa"] or "none"
        rows = [
            ("pyfinetune", f"{self['versions']['pyfinetune']}  ({self['path']})"),
            ("python", f"{self['versions']['python']}, {self['platform']}"),
            *((name, self["versions"][name] or "not installed") for name in PACKAGES),
            ("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['memory_gb']:.0f} GB"),
            ("instruction set", f"{isa}  (can run: {', '.join(cpu['isas'])})"),
            ("threads", str(cpu["threads"])),
            *(("gpu", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gb']:.0f} GB") for gpu in self["gpus"]),
            *([("gpu", "none that torch can use")] if not self["gpus"] else []),
            ("cuda kernels", ", ".join(f"sm_{arch}" for arch in self["cuda_archs"]) or "none in this build"),
            *((f"backend {name}", reason or "available") for name, reason in self["backends"].items()),
            *((name, value) for name, value in self["environment"].items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _cpu() -> dict[str, Any]:
    try:
        isa = native.isa()
    except BackendUnavailable:
        isa = None  # PYFINETUNE_CPU_ISA names one that this machine cannot run; `_backends` says so
    return {
        "model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(_memory_gb(), 1),
        "isa": isa,
        "isas": list(native.isas()),
        "threads": threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gb": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    return "torch sees no GPU"


def _backends(gpus: list[dict[str, Any]]) -> dict[str, str | None]:
    """Each backend with the reason why it cannot run here, or None."""
    try:
        native.isa()
        cpu = None
    except BackendUnavailable as error:
        cpu = str(error)
    cuda = _no_gpu()
    if not native.cuda_archs:
        cuda = "this build has no CUDA kernels" + (f", and {cuda}" if cuda else "; build from source on this machine")
    elif cuda is None:
        built = native.cuda_archs.split(",")
        missing = sorted(
            {gpu["capability"] for gpu in gpus if not_built_for(int(gpu["capability"]), native.cuda_archs)}
        )
        cuda = f"built for sm_{', sm_'.join(built)}, not for sm_{', sm_'.join(missing)}" if missing else None
    triton = "triton is not installed" if _version("triton") is None else _no_gpu()
    return {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": None}


def info() -> Info:
    """Say what this machine can run; nothing but torch is imported for it.

    Returns:
        A dictionary with `versions` (None where a package is missing), `platform`, `path`, `cpu` (model, cores,
        memory in GB, the instruction set in use and those that can run, threads), `gpus`, `cuda_archs` (what the CUDA
        kernels in this build were compiled for), `backends` (each with the reason why it cannot run, or None) and
        `environment` (the PYFINETUNE_* variables that are set). `print` shows it as a table and `json.dumps` takes it
        as it is.

    Raises:
        Nothing: what is missing is told, not raised.

    Example:
        >>> print(pf.info())
        >>> pf.info()["backends"]["triton"]
    """
    gpus = _gpus()
    versions = {"pyfinetune": native.__version__, "python": platform.python_version()}
    return Info(
        versions=versions | {package: _version(package) for package in PACKAGES},
        platform=f"{platform.system()} {platform.machine()}",
        path=str(Path(__file__).parent),
        cpu=_cpu(),
        gpus=gpus,
        cuda_archs=native.cuda_archs.split(",") if native.cuda_archs else [],
        backends=_backends(gpus),
        environment={name: os.environ[name] for name in sorted(os.environ) if name.startswith("PYFINETUNE_")},
    )
