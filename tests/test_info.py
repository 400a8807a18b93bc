"""pf.info: what it says, that it says it without importing anything, and its reasons."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import pyfinetune as pf
from pyfinetune._native import native
from pyfinetune.errors import BackendUnavailable

module = importlib.import_module("pyfinetune.machine")


def test_names_versions_and_machine():
    facts = pf.info()
    assert facts["versions"]["pyfinetune"] == pf.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["cpu"]["isa"] == native.isa()
    assert facts["cpu"]["isa"] in facts["cpu"]["isas"]
    assert facts["cpu"]["isas"][-1] == "scalar"
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["cores"] >= 1
    assert facts["cpu"]["memory_gb"] > 0
    assert facts["backends"]["cpu"] is None
    assert facts["backends"]["reference"] is None


def test_is_json_and_text():
    facts = pf.info()
    assert json.loads(json.dumps(facts)) == facts
    text = str(facts)
    for part in ("pyfinetune", torch.__version__, facts["cpu"]["model"], native.isa(), "backend cuda", "available"):
        assert part in text
    assert len({line.index("  ") > 0 for line in text.splitlines()}) == 1


def test_imports_none_of_the_packages_it_names():
    code = (
        "import sys, pyfinetune as pf\n"
        "print(pf.info())\n"
        "loaded = {'transformers', 'peft', 'trl', 'triton', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_forced_isa_that_cannot_run_is_told(monkeypatch):
    def refuse():
        raise BackendUnavailable("PYFINETUNE_CPU_ISA=avx99: this machine can run scalar")

    monkeypatch.setattr(module, "native", SimpleNamespace(isa=refuse, isas=native.isas, cuda_archs="", __version__="1"))
    monkeypatch.setenv("PYFINETUNE_CPU_ISA", "avx99")
    facts = pf.info()
    assert facts["cpu"]["isa"] is None
    assert "avx99" in facts["backends"]["cpu"]
    assert facts["environment"]["PYFINETUNE_CPU_ISA"] == "avx99"
    assert "avx99" in str(facts)


def test_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", (*module.PACKAGES, "no-such-package-anywhere"))
    facts = pf.info()
    assert facts["versions"]["no-such-package-anywhere"] is None
    assert "not installed" in str(facts)


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with one GPU of compute capability 8.9, as torch would describe it."""
    properties = SimpleNamespace(name="Some GPU", major=8, minor=9, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return properties


@pytest.mark.parametrize(
    ("archs", "reason"),
    [
        ("80,89", None),
        ("80,86", None),  # machine code of an earlier minor version runs
        ("80,90", None),
        ("90,120", "built for sm_90, sm_120, not for sm_89"),
        ("", "this build has no CUDA kernels; build from source on this machine"),
    ],
)
def test_cuda_backend_with_a_gpu(monkeypatch, one_gpu, archs, reason):
    monkeypatch.setattr(
        module, "native", SimpleNamespace(isa=native.isa, isas=native.isas, cuda_archs=archs, __version__="1")
    )
    facts = pf.info()
    assert facts["backends"]["cuda"] == reason
    assert facts["gpus"] == [{"name": "Some GPU", "capability": "89", "memory_gb": 24.0}]
    assert "Some GPU, sm_89, 24 GB" in str(facts)
    assert facts["cuda_archs"] == (archs.split(",") if archs else [])
    (line,) = [line for line in str(facts).splitlines() if line.startswith("cuda kernels")]
    assert line.endswith(", ".join(f"sm_{arch}" for arch in facts["cuda_archs"]) or "none in this build")


def test_cuda_backend_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        module, "native", SimpleNamespace(isa=native.isa, isas=native.isas, cuda_archs="80", __version__="1")
    )
    facts = pf.info()
    assert facts["gpus"] == []
    assert facts["backends"]["cuda"] in ("torch sees no GPU", "this torch is a CPU build")
    assert facts["backends"]["triton"] is not None
    assert "none that torch can use" in str(facts)
