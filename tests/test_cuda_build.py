"""The CUDA kernels compile for every supported GPU, into the instructions meant, and fit it; no GPU is needed."""

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
def build_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def build_log(build_folder) -> str:
    """What the compilers say while the native module is built with PYFINETUNE_CUDA=ON."""
    for name in ("nvcc", "cmake", "ninja"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not on PATH")
    pybind11 = pytest.importorskip("pybind11")
    folder = build_folder
    run(
        *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DPYFINETUNE_CUDA=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSKBUILD_PROJECT_VERSION=0",
        "-DPYFINETUNE_KERNEL_FLAGS=-O0",  # the CPU's kernels are only linked here
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


# By a part of the mangled name: threads of a block at most, registers of a thread, and how many kernels there are.
KERNELS = {
    "dequantize_4bit_kernel": (256, 64, 3),
    "quantize_4bit_kernel": (256, 85, 6),  # the decoders' names contain it, too
    "quantize_absmax_kernel": (256, 64, 1),
    "vector_kernel": (128, 128, 10),
    "lora_linear_kernel": (128, 255, 8),
    "lora_linear_bwd_kernel": (256, 255, 6),
}
REGISTERS = 65536  # of a multiprocessor, of every GPU built for


@pytest.mark.slow
def test_every_architecture_is_built_without_spills(build_log):
    found = resources(build_log)
    assert {arch for arch, _ in found} == ARCHITECTURES
    names = {kernel for _, kernel in found}
    assert set(found) == {(arch, kernel) for arch in ARCHITECTURES for kernel in names}
    assert all(any(part in kernel for part in KERNELS) for kernel in names)
    for part, (threads, registers, count) in KERNELS.items():
        chosen = {key: use for key, use in found.items() if part in key[1]}
        assert len(chosen) == count * len(ARCHITECTURES), part
        for (arch, kernel), use in chosen.items():
            assert use["stores"] == use["loads"] == use["stack"] == 0, f"sm_{arch} {kernel} spills: {use}"
            assert use["registers"] <= registers, f"sm_{arch} {kernel}: {use}"
            assert use["registers"] * threads <= REGISTERS, f"sm_{arch} {kernel}: {use}"


def instructions(sass: str) -> dict[tuple[str, str], set[str]]:
    """(architecture, mangled kernel) -> the instructions it has, from what `cuobjdump -sass` prints."""
    found: dict[tuple[str, str], set[str]] = {}
    arch, current = "", set()
    for line in sass.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            current = found.setdefault((arch, match[1]), set())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", line):
            current.add(match[1])
    return found


# What makes a kernel as wide as the memory, and its products the matrix unit's; a prefix of the instruction.
WANTED = {
    "dequantize_4bit_kernel": ("LDG.E.128", "STG.E.128"),
    "quantize_4bit_kernel": ("LDG.E.128", "STG.E.128"),
    "lora_linear_kernel": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.128"),
    "lora_linear_bwd_kernel": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128"),
    "vector_kernel": ("LDG.E.128",),
}
# Rows that begin between two words of codes are read byte by byte; the template's argument says which those are.
RAGGED = "Lb1E"


@pytest.mark.slow
def test_instructions(build_log, build_folder):
    """128-bit loads and stores, asynchronous copies, the matrix unit; and no local memory."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = instructions(run(tool, "-sass", build_folder / "libpyfinetune_cuda.a"))
    assert {arch for arch, _ in found} == ARCHITECTURES
    for (arch, kernel), used in found.items():
        assert not any(name.startswith(("LDL", "STL")) for name in used), f"sm_{arch} {kernel} uses local memory"
        for part, wanted in WANTED.items():
            for name in wanted if part in kernel else ():
                assert any(one.startswith(name) for one in used), f"sm_{arch} {kernel} has no {name}"
        if "lora_linear_kernel" in kernel and RAGGED not in kernel:
            assert any(one.startswith("LDG.E.128") for one in used), f"sm_{arch} {kernel} reads codes in small pieces"


def test_instructions_are_read():
    sass = (
        "Fatbin elf code:\narch = sm_90\n\t\tFunction : _Z1fv\n"
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00 */\n"
        "        /*0110*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;\n"
        "        /*1000*/              @UP1 HMMA.16816.F32.BF16 R4, R8, R2, R4 ;\n"
    )
    assert instructions(sass) == {("90", "_Z1fv"): {"LDC", "LDG.E.128.CONSTANT", "HMMA.16816.F32.BF16"}}


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
