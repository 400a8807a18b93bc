"""Every Triton kernel, compiled without a GPU as it would be launched on consumer and server GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from backends import INTERPRETED

from pyfinetune.bench import compilations, compile_report
from pyfinetune.bench.compilations import CAPABILITIES, kernel_modules, kernels_never_compiled, occupancy
from pyfinetune.kernels.config import SHARED_BYTES, Compilation, Config
from pyfinetune.kernels.gpus import GPUS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if INTERPRETED:
    pytest.skip("Triton interprets, and does not compile", allow_module_level=True)

TESTED = (86, 90, 120)


def wanted(request, *names: str) -> list[tuple]:
    """What the tests that were picked with these parameters ask for."""
    found = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return [tuple(params[name] for name in names) for params in found if set(params) == set(names)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[ProcessPoolExecutor]:
    with compile_report.pool_of(2, str(tmp_path_factory.mktemp("triton"))) as made:
        yield made


@pytest.fixture(scope="module")
def compiled(request, pool) -> dict[tuple[str, int], list[Future]]:
    """Everything that the tests that were picked need, under way."""
    return {
        (module, capability): [
            pool.submit(compilations.work, task)
            for task in compilations.tasks([module], [capability], alternatives=False)
        ]
        for module, capability in wanted(request, "kernels_of", "capability")
    }


@pytest.fixture(scope="module")
def samples(request, pool) -> dict[str, list[Future]]:
    """The first and the last instance of the modules of the tests that were picked, under way."""
    ends = {module: list(compilations.tasks([module], [86])) for (module,) in wanted(request, "kernels_of")}
    return {
        module: [pool.submit(compilations.work, task) for task in dict.fromkeys(tasks[:1] + tasks[-1:])]
        for module, tasks in ends.items()
    }


def check(futures: list[Future]) -> None:
    rows = [future.result() for future in futures]
    assert {row.name: row.violations for row in rows if row.violations} == {}
    assert all(row.registers > 0 and row.shared_limit == SHARED_BYTES[row.capability] for row in rows)


@pytest.mark.parametrize("kernels_of", kernel_modules())
def test_a_sample_compiles_and_fits(samples, kernels_of):
    check(samples[kernels_of])


@pytest.mark.slow  # hundreds of kernels, each a second or two
@pytest.mark.parametrize("kernels_of", kernel_modules())
@pytest.mark.parametrize("capability", TESTED)
def test_every_kernel_compiles_and_fits(compiled, kernels_of, capability):
    check(compiled[kernels_of, capability])


def test_every_gpu_that_is_known_is_compiled_for():
    assert tuple(GPUS) == CAPABILITIES


def test_every_kernel_is_among_what_is_compiled():
    left = [set(kernels_never_compiled(capability)) for capability in CAPABILITIES]
    assert set.intersection(*left) == set()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_module_has_something_for_every_gpu(capability):
    for module in kernel_modules():
        names = [compilation.name for compilation in compilations.compilations_of(module, capability)]
        assert len(names) == len(set(names)), f"{module}: two instances of one name among {names}"


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "share"),
    [
        (86, 32, 0, 4, 1.0),  # 48 warps: 12 blocks
        (86, 40, 0, 4, 1.0),
        (86, 255, 0, 8, 8 / 48),  # 8 warps of 8192 registers, which is one block
        (86, 64, 99 << 10, 4, 4 / 48),  # one block's memory
        (90, 128, 0, 4, 16 / 64),
        (90, 32, 0, 1, 32 / 64),  # 32 blocks at most
        (120, 256, 0, 16, 0.0),
    ],
)
def test_occupancy(capability, registers, shared, warps, share):
    assert occupancy(capability, registers, shared, warps) == pytest.approx(share)


SMALL = Config({"BLOCK": 512}, shared_bytes=4096)


@triton.jit
def _double_kernel(out_ptr, x_ptr, numel, BLOCK: tl.constexpr):
    # One block after another, each with all of it in registers at once.
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numel, other=0.0)
    tl.store(out_ptr + i, x + tl.sum(x) * 2.0, mask=i < numel)


class TestViolations:
    """The check finds what it is there to find."""

    def row(self, monkeypatch, tmp_path, config=SMALL, **changes):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        signature = {"out_ptr": "*bf16", "x_ptr": "*fp32", "numel": "i32"}
        made = Compilation(
            **{"constants": {}, **changes}, name="x", kernel=_double_kernel, signature=signature, config=config
        )
        return compilations.compile_one("module", made, 90)

    def test_nothing_to_find(self, monkeypatch, tmp_path):
        row = self.row(monkeypatch, tmp_path)
        assert row.violations == []
        assert row.registers >= 16
        assert 0 < row.shared <= 4096
        assert 0 < row.occupancy <= 1
        assert row.as_dict()["capability"] == 90

    def test_a_product_without_tensor_cores(self, monkeypatch, tmp_path):
        row = self.row(monkeypatch, tmp_path, matmul=True)
        assert row.violations == ["multiplies matrices without tensor cores"]

    def test_spilled_registers(self, monkeypatch, tmp_path):
        row = self.row(monkeypatch, tmp_path, config=Config({"BLOCK": 16384}), options={"maxnreg": 32})
        assert len(row.violations) == 1
        assert row.violations[0].startswith("spills ")

    def test_too_much_shared_memory(self, monkeypatch, tmp_path):
        monkeypatch.setitem(SHARED_BYTES, 90, 1)
        row = self.row(monkeypatch, tmp_path)
        assert row.violations == [f"takes {row.shared} bytes of shared memory of 1"]

    def test_more_shared_memory_than_was_said(self, monkeypatch, tmp_path):
        row = self.row(monkeypatch, tmp_path, config=Config({"BLOCK": 512}, shared_bytes=1))
        assert row.violations == [f"takes {row.shared} bytes of shared memory, says at most 1"]

    def test_an_error_of_the_compiler(self, monkeypatch, tmp_path):
        row = self.row(monkeypatch, tmp_path, constants={"NO_SUCH": 1})
        assert row.violations == ["does not compile: ValueError: no arguments of the kernel: NO_SUCH"]
        row = self.row(monkeypatch, tmp_path, config=Config({"BLOCK": 500}))
        assert "power of 2" in row.violations[0]


class TestCommand:
    def test_table_and_json(self, tmp_path, capsys):
        path = tmp_path / "rows.json"
        assert compile_report.main(["nf4", "--capability", "86", "--json", str(path)]) == 0
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert {row["module"] for row in rows} == {"nf4"}
        assert f"{len(rows)} compiled, 0 wrong" in capsys.readouterr().out

    def test_a_violation_is_an_exit_code(self, monkeypatch, capsys):
        row = compilations.Compiled("nf4", "decode", "kernel", 86, "", violations=["spills 8 bytes of registers"])
        monkeypatch.setattr(compile_report, "compile_all", lambda *args: [row])
        assert compile_report.main(["nf4"]) == 1
        assert "spills 8 bytes" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nope"], "nope: is no kernel module"),
            (["--capability", "75"], "75 is not known"),
            (["--capability", "x"], "needs numbers such as 86,90"),
        ],
    )
    def test_a_mistake_is_told(self, arguments, message, capsys):
        assert compile_report.main(arguments) == 2
        assert message in capsys.readouterr().err
