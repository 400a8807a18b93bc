"""What is shipped: the wheel, that it runs from an empty folder, and which instructions are in its binary."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from pyfinetune._native import native

ROOT = Path(__file__).parent.parent
INSTALLED = Path(native.__file__)
SETS = ("avx2", "avx512", "avx512_bf16")

# An instruction's encoding tells its set without a list of mnemonics: in 64-bit code, 62 is EVEX (AVX-512 only), c4 and
# c5 are VEX (AVX, AVX2, FMA, and AVX-512's mask registers).
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*(?:\t(.*))?$")
_PREFIXES = {"66", "f2", "f3", "2e", "36", "3e", "26", "64", "65"}
_MASK = re.compile(r"%k[0-7]\b")


def isa_of(function: str) -> str | None:
    """The instruction set whose namespace a mangled name is in."""
    # The name of a namespace is mangled as its length and its letters.
    found = re.search(r"10pyfinetune(\d+)", function)
    if found is None:
        return None
    lengths = {f"{len(name)}{name}": name for name in SETS}
    rest = function[found.start(1) :]
    return next((name for mangled, name in sorted(lengths.items(), reverse=True) if rest.startswith(mangled)), None)


def misplaced(disassembly: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Instructions that are in a function that other machines run, and how many each set has where they belong.

    Args:
        disassembly: lines of `objdump -d`, with the bytes of each instruction.
    """
    wrong, counts = [], {"vex": 0, "evex": 0}
    function, isa = "", None
    for line in disassembly:
        header = _FUNCTION.match(line)
        if header:
            function = header.group(1)
            isa = isa_of(function)
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction or instruction.group(2) is None:
            continue
        encoding, text = instruction.group(1).split(), instruction.group(2).strip()
        first = next((byte for byte in encoding if byte not in _PREFIXES), "")
        if first == "62" or (first in {"c4", "c5"} and _MASK.search(text)):
            counts["evex"] += 1
            if isa not in ("avx512", "avx512_bf16"):
                wrong.append(f"{function}: {text}")
        elif first in {"c4", "c5"}:
            counts["vex"] += 1
            if isa is None:
                wrong.append(f"{function}: {text}")
    return wrong, counts


def tool(name: str) -> str:
    """A binary utility, or the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output_of(*command: str | Path) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def check_instructions(module: Path) -> None:
    """No AVX-512 instruction outside the AVX-512 objects, no AVX instruction outside of those and the AVX2 object."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instruction sets are looked at on x86-64 only")
    lines = output_of(tool("objdump"), "-d", "--show-raw-insn", "--insn-width=16", module).splitlines()
    wrong, counts = misplaced(lines)
    if native.cuda_archs:
        wrong = [text for text in wrong if "pyfinetune" in text or "pybind11" in text]  # not the CUDA runtime's own
    assert wrong == []
    # Both sets are there: a stripped or renamed symbol would otherwise pass for a clean one.
    assert counts["vex"] > 1000
    assert counts["evex"] > 1000


def check_needed(module: Path) -> None:
    """The OpenMP runtime by its plain name, which torch's copy answers to, and nothing of torch."""
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", output_of(tool("readelf"), "-d", module))
    assert "libgomp.so.1" in needed
    assert [name for name in needed if re.match(r"lib(torch|c10|cudart|python)", name)] == []


class TestDisassembly:
    @pytest.mark.parametrize(
        ("function", "isa"),
        [
            ("_ZN10pyfinetune6avx51212_GLOBAL__N_112row_squaresEPKv", "avx512"),
            ("_ZN10pyfinetune11avx512_bf1612_GLOBAL__N_17dropoutEPKvPv", "avx512_bf16"),
            ("_ZN10pyfinetune4avx212_GLOBAL__N_15decodeEPKv._omp_fn.0", "avx2"),
            ("_ZN10pyfinetune6scalar12_GLOBAL__N_15decodeEPKv", None),
            ("_ZN10pyfinetune7kernelsEv", None),
            ("_ZNSt6vectorIfSaIfEE9push_backEOf", None),
            ("PyInit__C", None),
        ],
    )
    def test_functions_are_assigned(self, function, isa):
        assert isa_of(function) == isa

    @pytest.mark.parametrize(
        ("function", "line", "is_wrong"),
        [
            ("_ZN10pyfinetune6scalar1fEv", "   10:\t62 f1 7c 48 58 c1    \tvaddps %zmm1,%zmm0,%zmm0", True),
            ("_ZN10pyfinetune4avx21fEv", "   10:\t62 f1 7c 28 58 c1    \tvaddps %ymm17,%ymm0,%ymm0", True),
            ("_ZN10pyfinetune4avx21fEv", "   10:\tc5 f8 92 c8          \tkmovw  %eax,%k1", True),
            ("_ZN10pyfinetune6avx5121fEv", "   10:\tc5 f8 92 c8          \tkmovw  %eax,%k1", False),
            ("_ZN10pyfinetune6avx5121fEv", "   10:\t62 f1 7c 48 58 c1    \tvaddps %zmm1,%zmm0,%zmm0", False),
            ("_ZN10pyfinetune4avx21fEv", "   10:\tc5 fc 58 c1          \tvaddps %ymm1,%ymm0,%ymm0", False),
            ("_ZNSt6vectorIfE1fEv", "   10:\tc5 fc 58 c1          \tvaddps %ymm1,%ymm0,%ymm0", True),
            ("_ZN10pyfinetune6scalar1fEv", "   10:\t0f 58 c1             \taddps  %xmm1,%xmm0", False),
        ],
    )
    def test_misplaced_instructions_are_found(self, function, line, is_wrong):
        wrong, _ = misplaced([f"0000000000000000 <{function}>:", line])
        assert bool(wrong) == is_wrong

    def test_installed_module_has_no_instruction_outside_its_set(self):
        check_instructions(INSTALLED)

    def test_installed_module_needs_openmp_and_no_torch(self):
        check_needed(INSTALLED)


def names_in(wheel: Path) -> list[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if not name.endswith("/"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout's source archive, built with the tools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    (archive,) = folder.glob("pyfinetune-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    output_of(*pip, "-w", folder, "-C", "cmake.define.PYFINETUNE_CUDA=OFF", archive)
    (wheel,) = folder.glob("pyfinetune-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel is installed to."""
    target = tmp_path_factory.mktemp("installed")
    output_of(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel)
    return target


def run_python(code: str, installed: Path, folder: Path) -> str:
    """Run code in a folder, with the installed package before anything else on the path."""
    start = f"import sys\nsys.path.insert(0, {str(installed)!r})\nsys.meta_path[:] = " + (
        "[finder for finder in sys.meta_path if 'ScikitBuild' not in type(finder).__name__]\n"
    )
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
class TestWheel:
    def test_contents(self, wheel):
        names = names_in(wheel)
        assert any(re.fullmatch(r"pyfinetune/_C\.[\w-]+\.so", name) for name in names)
        for name in ("__init__.py", "cli.py", "ops/nf4.py", "bench/__init__.py", "bench/runner.py", "kernels/nf4.py"):
            assert f"pyfinetune/{name}" in names
        shipped = {path.name for path in (ROOT / "kernels").glob("*.*")}
        assert {Path(name).name for name in names if name.startswith("pyfinetune/kernels/")} == shipped
        assert "pyfinetune/kernels/__init__.py" not in names
        tops = {name.partition("/")[0] for name in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"pyfinetune"}
        assert not any(name.endswith((".pyc", ".cpp", ".cu", ".h")) for name in names)
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    def test_runs_from_an_empty_folder(self, installed, tmp_path):
        out = run_python(
            "import importlib.util, torch, pyfinetune as pf, pyfinetune.bench.runner\n"
            f"assert pf.__file__.startswith({str(installed)!r}), pf.__file__\n"
            f"assert pf._native.native.__file__.startswith({str(installed)!r})\n"
            "assert importlib.util.find_spec('pyfinetune.kernels.nf4') is not None\n"
            "weight = torch.randn(96, 160)\n"
            "packed = pf.ops.quantize_4bit(weight, double_quant=True)\n"
            "decoded = pf.ops.dequantize_4bit(packed)\n"
            "with pf.use_backend('reference'):\n"
            "    assert torch.equal(decoded, pf.ops.dequantize_4bit(packed))\n"
            "print(pf.explain('dequantize_4bit', packed).backend, float((decoded - weight).abs().max()) < 1)\n",
            installed,
            tmp_path,
        )
        assert out.split() == ["cpu", "True"]

    def test_command_line(self, installed, tmp_path):
        out = run_python(
            "sys.argv = ['pyfinetune', 'info']\nfrom pyfinetune.cli import main\nmain()\n", installed, tmp_path
        )
        assert "backend cpu" in out
        assert str(installed) in out

    def test_native_module(self, wheel, tmp_path):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".so"))
            module = Path(archive.extract(name, tmp_path))
        check_instructions(module)
        check_needed(module)

    def test_the_source_archive_has_every_module(self, wheel):
        """The wheel is built from the archive: what that leaves out, the wheel lacks."""
        homes = {"pyfinetune": "pyfinetune", "kernels": "pyfinetune/kernels", "bench": "pyfinetune/bench"}
        modules = {
            f"{shipped}/{path.relative_to(ROOT / home).as_posix()}"
            for home, shipped in homes.items()
            for path in (ROOT / home).rglob("*.py")
        }
        assert len(modules) > 100
        assert modules == {name for name in names_in(wheel) if name.endswith(".py")}
