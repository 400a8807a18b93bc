"""The CUDA kernels compile for every supported GPU, and need no more registers than a GPU has; no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {"80", "86", "89", "90", "100", "120"}


def run(*command: str | Path) -> str:
    """What a command prints, errors included; it has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def build_log(tmp_path_factory) -> str:
    """What the compilers say while the native module is built with PYFINETUNE_CUDA=ON."""
    for name in ("nvcc", "cmake", "ninja"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not on PATH")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda")
    run(
        *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DPYFINETUNE_CUDA=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSKBUILD_PROJECT_VERSION=0",
    )
    log = run("cmake", "--build", folder, "--target", "_C", "--verbose")
    assert list(folder.glob("_C*.so")), "no module was built"
    return log


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> registers, stack and spills, from what `ptxas -v` says."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)[a-z]?'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    numbers = ("stack", "stores", "loads", "registers")
    return {
        (found["arch"], found["kernel"]): {name: int(found[name]) for name in numbers}
        for found in pattern.finditer(log)
    }


@pytest.mark.slow
def test_every_architecture_is_built_without_spills(build_log):
    decode = {key: use for key, use in resources(build_log).items() if "dequantize_4bit_kernel" in key[1]}
    assert {arch for arch, _ in decode} == ARCHITECTURES
    kernels = {kernel for _, kernel in decode}
    assert len(kernels) == 3, "one for each of float32, float16 and bfloat16"
    assert set(decode) == {(arch, kernel) for arch in ARCHITECTURES for kernel in kernels}
    for (arch, kernel), use in decode.items():
        assert use["stores"] == use["loads"] == 0, f"sm_{arch} {kernel} spills: {use}"
        # 256 threads a block; at 64 registers each, four blocks fill a multiprocessor of every GPU built for.
        assert use["registers"] <= 64, f"sm_{arch} {kernel}: {use}"


@pytest.mark.slow
def test_module_holds_every_architecture(build_log):
    """The list that the module reports is the one it was compiled for."""
    (archs,) = set(re.findall(r'PYFINETUNE_CUDA_ARCHS=\\?"+([\d,]+)', build_log.replace('\\"', '"')))
    assert set(archs.split(",")) == ARCHITECTURES


def test_resources_are_read():
    log = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_86'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0]\n"
    )
    assert resources(log) == {("86", "_Z1fv"): {"stack": 8, "stores": 4, "loads": 12, "registers": 40}}
