"""The rules of the house, checked on the source: who may import whom, what is banned, how long things may be.

Floors: a file imports from its own floor or from lower ones. The table below is the only place that says which file is
on which; a new file has to be entered.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import pyfinetune as pf

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

# Module prefix -> floor; the longest prefix that fits counts.
FLOORS = {
    "pyfinetune.errors": 2,
    "pyfinetune._native": 2,
    "pyfinetune._C": 2,
    "pyfinetune.ops": 3,
    "pyfinetune.kernels": 1,
    "pyfinetune.linear4bit": 4,
    "pyfinetune.parity": 4,
    "pyfinetune.planner": 4,
    "pyfinetune.machine": 4,
    "pyfinetune.hf": 5,
    "pyfinetune.train": 6,
    "pyfinetune.demo": 6,
    "pyfinetune.bench": 6,
    "pyfinetune.cli": 7,
    "pyfinetune.__main__": 7,
}
# The package itself gives out the public names: its module-level imports are floor 3, and `import pyfinetune as pf` is
# what everything from floor 4 up may write.
PACKAGE = "pyfinetune"
PACKAGE_FLOOR = 3
HUGGING_FACE = {"transformers", "peft", "trl"}
SECTIONS = [
    "# 1. reference against float64",
    "# 2. gradcheck",
    "# 3. every backend against the reference",
    "# 4. layouts",
    "# 5. edge shapes",
    "# 6. opcheck, fullgraph and dynamic compile",
    "# 7. determinism",
    "# 8. named regressions",
]


def sources() -> dict[str, Path]:
    """Module name -> file, of everything that the wheel carries."""
    found = {}
    for package, folder in ((PACKAGE, "pyfinetune"), ("pyfinetune.kernels", "kernels"), ("pyfinetune.bench", "bench")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts])
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
OP_STEMS = sorted(path.stem for path in (ROOT / "pyfinetune" / "ops").glob("*.py") if not path.stem.startswith("_"))
KERNELS = [module for module in SOURCES if module.startswith("pyfinetune.kernels.")]
# Test code inside the package: an assert is what it is for.
NOT_TESTS = sorted(set(SOURCES) - {"pyfinetune.bench.test_cases"})
every_module = pytest.mark.parametrize("module", sorted(SOURCES))
every_op = pytest.mark.parametrize("stem", OP_STEMS)


def floor_of(module: str) -> int | None:
    """The floor of a module of this package; None for one that is on no floor."""
    if module == PACKAGE:
        return PACKAGE_FLOOR
    fitting = [prefix for prefix in FLOORS if module == prefix or module.startswith(prefix + ".")]
    return FLOORS[max(fitting, key=len)] if fitting else None


def is_type_checking(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(tree: ast.AST, module: str, inside: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(imported module, whether inside a function, line) of every import that runs."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            for other in node.orelse:
                yield from imports_of(other, module, inside)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, inside, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                # `from package import module` imports the module, `from module import name` does not.
                full = f"{node.module}.{alias.name}"
                yield (full if full in SOURCES or full in FLOORS else node.module), inside, node.lineno
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, module, inside or is_function)


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def includes_of(path: Path) -> list[str]:
    """What a C++ file includes, with its quotes or brackets."""
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(encoding="utf-8"), re.MULTILINE)


class TestFloors:
    @every_module
    def test_every_file_is_on_a_floor(self, module):
        assert floor_of(module) is not None, f"give {module} a floor in {__file__}"

    @every_module
    def test_imports_go_down(self, module):
        floor = floor_of(module)
        for imported, inside, line in imports_of(TREES[module], module):
            if imported.partition(".")[0] != PACKAGE:
                continue
            if module == PACKAGE and inside:
                continue  # the package's own names are loaded when first asked for
            target = floor_of(imported)
            assert target is not None, f"{module}:{line}: imports {imported}, which is on no floor"
            assert target <= floor, f"{module}:{line} (floor {floor}): imports {imported} (floor {target})"
            if imported.startswith("pyfinetune.kernels") and not module.startswith("pyfinetune.kernels"):
                assert inside, f"{module}:{line}: imports {imported} outside of a function"
            if imported == PACKAGE:
                assert floor > PACKAGE_FLOOR, f"{module}:{line}: imports the package that imports it"

    @every_module
    def test_hugging_face_is_known_above_only(self, module):
        for imported, inside, line in imports_of(TREES[module], module):
            package = imported.partition(".")[0]
            if package not in HUGGING_FACE | {"datasets", "accelerate"}:
                continue
            floor = floor_of(module)
            assert floor >= (5 if package in HUGGING_FACE else 6) or (package == "accelerate" and floor >= 5), (
                f"{module}:{line}: imports {package}"
            )
            # A script of a user's is what `bench/scripts` holds.
            if not module.startswith(("pyfinetune.hf.", "pyfinetune.train.", "pyfinetune.bench.scripts.")):
                assert inside, f"{module}:{line}: imports {package} outside of a function"

    @pytest.mark.parametrize("module", KERNELS)
    def test_kernels_stand_alone(self, module):
        for imported, _inside, line in imports_of(TREES[module], module):
            package = imported.partition(".")[0]
            allowed = package in {"torch", "triton"} or package in sys.stdlib_module_names
            allowed |= imported.startswith("pyfinetune.kernels.")
            assert allowed, f"{module}:{line}: imports {imported}"

    def test_kernels_are_no_package(self):
        """A regular package called `kernels` would shadow Hugging Face's."""
        assert not (ROOT / "kernels" / "__init__.py").exists()

    def test_the_floors_are_checked(self):
        """The walk over imports finds what it is there to find."""
        source = "import trl\nif TYPE_CHECKING:\n    import peft\ndef f():\n    from pyfinetune.ops import nf4\n"
        found = list(imports_of(ast.parse(source), "m"))
        assert found == [("trl", False, 1), ("pyfinetune.ops.nf4", True, 5)]
        assert floor_of("pyfinetune.ops.nf4") == 3
        assert floor_of("pyfinetune.opsy") is None

    def test_no_module_bears_a_public_name(self):
        """Importing such a module would put it where the function was."""
        clashes = [name for name in pf.__all__ if name != "ops" and f"{PACKAGE}.{name}" in SOURCES]
        clashes += [name for name in pf.ops.__all__ if name in OP_STEMS and inspect.ismodule(getattr(pf.ops, name))]
        assert clashes == []


class TestImportCost:
    @pytest.mark.parametrize("extra", ["", "import pyfinetune.cli, pyfinetune.bench.runner"])
    def test_import_brings_torch_and_no_more(self, extra):
        code = (
            f"import sys, pyfinetune\n{extra}\n"
            "heavy = {'transformers', 'peft', 'trl', 'triton', 'datasets', 'accelerate', 'bitsandbytes', 'pandas'}\n"
            "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


class TestNativeSources:
    @pytest.mark.parametrize("path", sorted(CSRC.rglob("*.*")), ids=lambda path: path.name)
    def test_includes(self, path):
        includes = includes_of(path)
        for include in includes:
            assert not re.match(r"[<\"](torch|ATen|c10|caffe2)/", include), f"{path.name} includes {include}"
        if path.parent.name != "bindings":
            assert not any("pybind11" in i or "Python.h" in i for i in includes), f"{path.name} knows Python"
        if path.suffix != ".cu" and path.name not in ("launch.h", "device.h"):
            assert not any(i.startswith("<cuda") for i in includes), f"{path.name} knows CUDA"

    @pytest.mark.parametrize(
        "path",
        [*sorted((CSRC / "cpu").glob("*.kernel.h")), CSRC / "cpu" / "vec.h", CSRC / "cpu" / "vec_math.h"],
        ids=lambda path: path.name,
    )
    def test_kernels_include_intrinsics_and_each_other(self, path):
        allowed = re.compile(
            r'<immintrin\.h>|<arm_neon\.h>|<stdint\.h>|"\.\./(nf4_format|tensor_view)\.h"|"(vec|vec_math|parallel)\.h"|"[a-z0-9_]+\.kernel\.h"'
        )
        for include in includes_of(path):
            assert allowed.fullmatch(include), f"{path.name} includes {include}"

    def test_every_kernel_file_is_compiled_for_every_instruction_set(self):
        included = set(includes_of(CSRC / "cpu" / "isa.cpp"))
        for path in (CSRC / "cpu").glob("*.kernel.h"):
            assert f'"{path.name}"' in included, f"isa.cpp does not include {path.name}"

    def test_kernel_code_is_in_the_namespace_of_its_instruction_set(self):
        """What is outside could be merged by the linker with a copy that was compiled for another machine."""
        for path in [
            *(CSRC / "cpu").glob("*.kernel.h"),
            *(CSRC / "cpu" / f"{n}.h" for n in ("vec", "vec_math", "parallel")),
        ]:
            text = path.read_text(encoding="utf-8")
            opening = "namespace pyfinetune {\nnamespace PYFINETUNE_ISA {\nnamespace {\n"
            assert text.count(opening) == 1, path.name
            head, _, _ = text.partition(opening)
            code = [line for line in head.splitlines() if line.strip() and not line.lstrip().startswith(("//", "#"))]
            assert code == [], f"{path.name}: code before the namespace"

    def test_cmake_is_short(self):
        assert len((ROOT / "CMakeLists.txt").read_text(encoding="utf-8").splitlines()) < 100


class TestSize:
    @pytest.mark.parametrize(
        "path",
        [*SOURCES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted(CSRC.rglob("*.*"))],
        ids=lambda path: str(path.relative_to(ROOT)),
    )
    def test_files(self, path):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"

    @every_module
    def test_functions(self, module):
        most = 150 if module.startswith("pyfinetune.kernels") else 80
        for function in functions_of(TREES[module]):
            lines = function.end_lineno - function.lineno + 1
            assert lines <= most, f"{module}:{function.lineno}: {function.name} has {lines} lines"


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as it is written."""
    return ast.unparse(node.func)


def banned_in(tree: ast.AST) -> Iterator[str]:
    """Every banned construct, with its line."""
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            yield f"{line}: assert (a user's input gets a typed error)"
        elif isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{line}: bare except"
            if all(isinstance(statement, ast.Pass) for statement in node.body):
                yield f"{line}: an exception is swallowed"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if name.partition(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}:
                    yield f"{line}: imports {name}"
        elif isinstance(node, ast.Call):
            name = called(node)
            if name in {"exec", "eval", "compile", "torch.load", "inspect.getsource", "os.system"}:
                yield f"{line}: calls {name}"
            for keyword in node.keywords:
                value = keyword.value
                true = isinstance(value, ast.Constant) and value.value is True
                if true and keyword.arg in {"trust_remote_code", "shell"}:
                    yield f"{line}: {keyword.arg}=True"


class TestBanned:
    @pytest.mark.parametrize("module", NOT_TESTS)
    def test_constructs(self, module):
        assert list(banned_in(TREES[module])) == []

    @pytest.mark.parametrize(
        "source",
        [
            "assert x",
            "try:\n    f()\nexcept:\n    raise",
            "try:\n    f()\nexcept ValueError:\n    pass",
            "import pickle",
            "from pickle import loads",
            "torch.load(path)",
            "exec(code)",
            "inspect.getsource(f)",
            "AutoModel.from_pretrained(name, trust_remote_code=True)",
        ],
    )
    def test_the_ban_is_checked(self, source):
        assert len(list(banned_in(ast.parse(source)))) == 1

    def test_methods_of_those_names_are_allowed(self):
        source = "model.eval()\ntorch.compile(f)\nre.compile('x')\nf(trust_remote_code=False)"
        assert list(banned_in(ast.parse(source))) == []


class TestOps:
    @every_op
    def test_has_the_eight_sections_in_order(self, stem):
        path = ROOT / "tests" / f"test_{stem}.py"
        assert path.is_file(), f"the op {stem} has no {path.relative_to(ROOT)}"
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        assert [line for line in lines if line in SECTIONS] == SECTIONS
        starts = [lines.index(section) for section in SECTIONS] + [len(lines)]
        for section, start, end in zip(SECTIONS, starts, starts[1:], strict=False):
            assert any(re.match(r"def test_", line) for line in lines[start:end]), f"{stem}: nothing under {section!r}"

    @every_op
    def test_regressions_name_the_fault(self, stem):
        text = (ROOT / "tests" / f"test_{stem}.py").read_text(encoding="utf-8")
        last = text[: text.find(SECTIONS[-1])].count("\n")
        for function in functions_of(ast.parse(text)):
            if function.lineno > last and function.name.startswith("test_"):
                assert ast.get_docstring(function), (
                    f"test_{stem}.py: {function.name} does not say which fault it guards"
                )

    @every_op
    def test_has_a_benchmark(self, stem):
        assert (ROOT / "bench" / f"bench_{stem}.py").is_file()

    @pytest.mark.parametrize("name", [n for n in pf.ops.__all__ if inspect.isfunction(getattr(pf.ops, n))])
    def test_public_functions_are_documented(self, name):
        function = getattr(pf.ops, name)
        text = inspect.getdoc(function) or ""
        for part in ("Args:", "Returns:", "Raises:", "Example:", ">>> "):
            assert part in text, f"pf.ops.{name}: the docstring has no {part}"
        described = set(re.findall(r"^ {4}(?:\*\*?)?(\w+)(?:, \w+)*:", text, re.MULTILINE))
        for parameter in inspect.signature(function).parameters:
            assert parameter in described, f"pf.ops.{name}: {parameter} is not described"

    @pytest.mark.parametrize("name", sorted(n for n in pf.__all__ if n != "ops"))
    def test_public_names_exist_and_are_documented(self, name):
        assert inspect.getdoc(getattr(pf, name)), f"pf.{name} has no docstring"


class TestDocs:
    README = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_the_example_run_is_valid(self):
        from pyfinetune.train.config import RunConfig

        (example,) = re.findall(r"```yaml\n(.*?)```", self.README, re.DOTALL)
        config = RunConfig(**yaml.safe_load(example))
        assert config.method == "qlora"

    def test_public_names_exist(self):
        for name in set(re.findall(r"\bpf\.((?:ops\.)?\w+)", self.README)):
            target = pf
            for part in name.split("."):
                target = getattr(target, part)

    def test_make_targets_exist(self):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for document in ("README.md", "CONTRIBUTING.md", "Makefile"):
            text = (ROOT / document).read_text(encoding="utf-8")
            for target in re.findall(r"^(?:#   )?make ([a-z][a-z-]*)", text, re.MULTILINE):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"
