"""`make gpu-check`: its parts end when their time is up, what they found is kept, and the whole is rehearsed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pyfinetune as pf
from pyfinetune.bench import gpu_check, gpu_results, gpu_step, gpu_timing, peers
from pyfinetune.bench.gpu_cases import GROUPS
from pyfinetune.bench.gpu_check import Part, run_part
from pyfinetune.bench.harness import OURS, Case, Setup, Verdict

ROOT = Path(__file__).parent.parent
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal on a CPU")


def part_of(tmp_path, code: str, kind: str = "tests", budget: float = 30.0) -> Part:
    """A part that runs this code, to which `path` is the file of its lines."""
    lines = tmp_path / "lines.jsonl"
    code = f"import json, os, time; path = {str(lines)!r}\n{code}"
    return Part("part", kind, [sys.executable, "-S", "-c", code], budget, lines)


def run(part: Part) -> dict:
    return run_part(part, time.monotonic() + 60)


WRITE = "def write(**line): open(path, 'a').write(json.dumps(line) + '\\n')\n"


class TestParts:
    def test_counts(self, tmp_path):
        code = WRITE + (
            "for test, outcome in (('a', 'passed'), ('b', 'skipped'), ('c', 'failed')):\n"
            "    write(test=test, outcome='started'); write(test=test, outcome=outcome, seconds=1.0, message='why')\n"
        )
        result = run(part_of(tmp_path, code))
        assert result["status"] == "failed"
        assert result["counts"] == {"passed": 1, "skipped": 1, "failed": 1}
        assert result["failures"] == [{"test": "c", "message": "why"}]
        assert result["skipped"] == {"why": 1}

    def test_a_timeout_keeps_what_is_there(self, tmp_path):
        code = WRITE + "write(test='a', outcome='passed'); write(test='b', outcome='started'); time.sleep(60)"
        start = time.monotonic()
        result = run(part_of(tmp_path, code, budget=1.5))
        assert time.monotonic() - start < 20
        assert result["status"] == "timed out"
        assert result["counts"] == {"passed": 1, "crashed or cut off": 1}
        assert result["failures"][0]["test"] == "b"

    def test_what_a_process_started_ends_with_it(self, tmp_path):
        start = "import subprocess; child = subprocess.Popen(['sleep', '60'])\n"
        run(part_of(tmp_path, start + "open(path + '.pid', 'w').write(str(child.pid)); time.sleep(60)", budget=1.5))
        stat = Path(f"/proc/{(tmp_path / 'lines.jsonl.pid').read_text()}/stat")
        end = time.monotonic() + 10
        while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < end:
            time.sleep(0.05)
        assert time.monotonic() < end

    def test_tests_go_on_after_a_broken_gpu_context(self, tmp_path):
        code = WRITE + (
            "count = len(open(path).readlines()) if os.path.exists(path) else 0\n"
            "write(test=str(count), outcome='failed' if count < 2 else 'passed', message='m')\n"
            "os._exit(99 if count < 2 else 0)\n"
        )
        result = run(part_of(tmp_path, code))
        assert result["counts"] == {"failed": 2, "passed": 1}
        assert (result["exit_code"], result["status"]) == (0, "failed")

    def test_not_for_ever(self, tmp_path):
        result = run(part_of(tmp_path, WRITE + "write(test=str(time.time()), outcome='failed'); os._exit(99)"))
        assert result["counts"] == {"failed": 4}
        assert result["exit_code"] == 99

    def test_a_benchmark_that_is_cut_off(self, tmp_path):
        row = {"op": "nf4", "case": "first", "error": "RuntimeError: no"}
        code = WRITE + f"write(ceilings={{}}); write(started='first'); write(row={row}); write(started='second')\n"
        result = run(part_of(tmp_path, code + "print('said'); raise SystemExit(3)", kind="bench"))
        assert result["status"] == "failed"
        assert result["cut_off"] == "second"
        assert result["errors"] == ["first: RuntimeError: no"]
        assert "said" in result["log"]

    def test_a_part_of_a_line_is_no_line(self, tmp_path):
        result = run(part_of(tmp_path, 'open(path, \'w\').write(\'{"test": "a", "outcome": "passed"}\\n{"te\')'))
        assert result["counts"] == {"passed": 1}

    def test_what_there_is_no_time_for_is_said(self, tmp_path):
        part = part_of(tmp_path, "open(path, 'w').write('ran')")
        result = run_part(part, time.monotonic() + 1)
        assert result["status"] == "left out: no time was left for it"
        assert not part.lines.exists()

    def test_everything_fits(self):
        timed = sum(group.budget for group in GROUPS.values() if group.timed)
        beside = max(group.budget for group in GROUPS.values() if not group.timed)
        assert gpu_check._TESTS + timed + beside <= gpu_check.TOTAL - 2 * gpu_check._GRACE

    def test_what_shares_the_gpu_runs_side_by_side(self, tmp_path):
        def part(name: str, alone: bool) -> Part:
            code = f"import time; open({str(tmp_path / name)!r}, 'w').write(str(time.time())); time.sleep(1)"
            code += f"; open({str(tmp_path / name)!r}, 'a').write(' ' + str(time.time()))"
            return Part(name, "bench", [sys.executable, "-S", "-c", code], 30.0, tmp_path / "none", alone=alone)

        order = []
        parts = [part("a", True), part("b", False), part("c", False), part("d", True)]
        gpu_check._run_all(parts, time.monotonic() + 60, lambda part, result: order.append(part.name))
        times = {name: [float(text) for text in (tmp_path / name).read_text().split()] for name in "abcd"}
        assert order[0] == "a"
        assert order[-1] == "d"
        assert max(times["b"][0], times["c"][0]) < min(times["b"][1], times["c"][1])
        assert times["a"][1] <= min(times["b"][0], times["c"][0])
        assert max(times["b"][1], times["c"][1]) <= times["d"][0]

    def test_every_op_with_kernels_is_tested(self, tmp_path):
        names = [part.name for part in gpu_check.test_parts(ROOT / "tests", tmp_path, True, None)]
        stems = {path.stem for path in (ROOT / "kernels").glob("*.py")} & {
            path.stem for path in (ROOT / "pyfinetune" / "ops").glob("[a-z]*.py")
        }
        assert {"GPU alone", *(f"test_{stem}" for stem in stems)} <= set(names)
        assert "test_row_kernels" not in names

    def test_small_shapes_run_under_the_sanitizer(self, tmp_path):
        parts = {part.name: part for part in gpu_check.test_parts(ROOT / "tests", tmp_path, False, "/the/sanitizer")}
        part = parts["compute-sanitizer"]
        assert part.command[:3] == ["/the/sanitizer", "--tool", "memcheck"]
        watched = part.command.index(sys.executable)
        assert part.command[watched : watched + 3] == [sys.executable, "-m", "pytest"]
        assert part.command[watched:].count(str(ROOT / "tests" / "test_gpu.py")) == 1
        assert part.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert parts["racecheck"].command[:3] == ["/the/sanitizer", "--tool", "racecheck"]
        for name in ("compute-sanitizer", "racecheck", "CUDA C++"):
            assert str(ROOT / "tests" / "test_gpu_nf4.py") in parts[name].command
        # On the GPU the tests of the ops make their tensors there; test_gpu.py does so by itself.
        assert parts["test_rope"].environment["PYFINETUNE_TEST_DEVICE"] == "cuda"

    def test_the_sanitizer_of_a_wheel_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_check, "_SANITIZER", ("no-such-program",))
        assert gpu_check.find_sanitizer(tmp_path) is None
        program = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\necho watched\n")
        found = gpu_check.find_sanitizer(tmp_path)
        assert found == str(program)
        assert subprocess.run([found], capture_output=True, text=True, check=True).stdout == "watched\n"


class TestReportLines:
    def test_results_are_written_and_not_made_again(self, tmp_path):
        (tmp_path / "test_it.py").write_text(
            "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
            "def test_not(): pytest.skip('why')\n@pytest.fixture\ndef broken(): raise ValueError\n"
            "def test_error(broken): pass\ndef test_sticky(): raise RuntimeError('an illegal memory access was met')\n"
            "def test_behind(): pass\n"
        )
        lines = tmp_path / "lines.jsonl"
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "PYFINETUNE_TEST_LINES": str(lines)}
        environment.pop("PYFINETUNE_TEST_LIMIT", None)
        command = [*gpu_check._pytest([tmp_path / "test_it.py"]), "--rootdir", str(tmp_path), "-c", "/dev/null"]

        def once():
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        assert once().returncode == 99
        assert once().returncode == 0
        found = gpu_check._tests_of([json.loads(line) for line in lines.read_text().splitlines()])
        assert found["counts"] == {"passed": 2, "failed": 3, "skipped": 1}
        assert list(found["skipped"]) == ["Skipped: why"]
        assert once().returncode == 5  # nothing is left
        lines.unlink()
        environment["PYFINETUNE_TEST_LIMIT"] = "1"
        assert once().returncode == 0
        assert len(lines.read_text().splitlines()) == 2


class TestTiming:
    def test_a_peer_that_fails_does_not_take_ours_along(self):
        def broken():
            raise RuntimeError("no kernel")

        calls = {OURS: lambda i: i, "peer": lambda i: i, "wrong": lambda i: i}
        check = {OURS: lambda: Verdict(True, "right"), "peer": broken, "wrong": lambda: Verdict(False, "off by one")}
        case = Case("op", "case", lambda device: Setup(calls, check), flops=1.0, bytes=1.0)
        rates = {"copy_gbs": 1.0, "gemm_bf16_gflops": 1.0, "gemm_fp32_gflops": 1.0}
        row = gpu_timing.measure(case, torch.device("cpu"), rates, 0.0)
        assert row["results"][OURS]["ms"] >= 0
        assert row["results"]["peer"]["detail"].startswith("RuntimeError")
        assert "ms" not in row["results"]["wrong"]
        text = gpu_results.markdown_of(
            {
                "created": "now",
                "seconds": 1.0,
                "dry_run": False,
                "problems": [],
                "notes": ["nobody watched"],
                "build_seconds": 0.5,
                "machine": {"gpus": [], "cpu": {"model": "cpu"}, "versions": {"torch": "2"}},
                "parts": [
                    {"name": "op", "kind": "bench", "status": "ok", "rows": [row], "ceilings": {}, "errors": ["e: x"]},
                    {"name": "t", "kind": "tests", "status": "timed out", "seconds": 1, "counts": {}, "failures": []},
                    {"name": "u", "kind": "bench", "status": "left out: no time", "rows": [], "errors": []},
                    {"name": "v", "kind": "bench", "status": "failed", "exit_code": 3, "log": "a\nlast", "rows": []},
                ],
            }
        )
        assert "| case |  | ours |" in text
        assert "not right here: off by one" in text
        assert "- t took longer than it may" in text
        assert "- u: left out: no time\n- v ended with 3: last\n" in text
        assert "- Note: nobody watched" in text

    def test_what_ours_ran_on(self):
        packed = pf.ops.quantize_4bit(torch.randn(64))
        with gpu_timing.backends_used() as used:
            pf.ops.dequantize_4bit(packed)
        assert used == {"dequantize_4bit: cpu"}


class TestStep:
    """A whole step's model, of which no dense copy is made."""

    def test_the_same_as_with_dense_layers(self):
        torch.manual_seed(0)
        base = gpu_step.build_base("tiny", torch.device("cpu"))
        kinds = {type(m).__name__ for m in base.modules() if isinstance(m, torch.nn.Linear)}
        assert kinds == {"Linear4bit", "Linear"}  # the head stays dense
        assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
        ids = torch.arange(40)[None]
        expected = base(ids).logits
        for make in (gpu_step._dense_linear, gpu_step._bnb_linear):
            if make is gpu_step._bnb_linear and peers.why_missing("bitsandbytes"):
                continue
            other = gpu_step._peer_base(base, "tiny", make)
            assert other.lm_head.weight is base.lm_head.weight
            assert torch.allclose(other(ids).logits, expected, atol=0.05, rtol=0.05)

    def test_tied_weights_stay_tied(self, monkeypatch):
        monkeypatch.setitem(gpu_step.SIZES, "tiny", gpu_step.SIZES["tiny"] | {"tie_word_embeddings": True})
        base = gpu_step.build_base("tiny", torch.device("cpu"))
        assert base.lm_head.weight is base.model.embed_tokens.weight

    def test_the_work_of_a_step(self):
        # 32 layers of 218 M weights and a head of 525 M: 6 and 4 operations each; the rest is a few per cent.
        least = 4096 * (6 * 32 * 218103808 + 4 * 128256 * 4096)
        assert 1.02 * least < gpu_step.step_flops("8B", 2, 2048) < 1.1 * least

    @pytest.mark.parametrize(
        ("losses", "theirs", "ok"),
        [
            ([3.0, 2.9, 2.8], None, True),
            ([3.0, 2.9, 2.8], [3.01, 2.9, 2.8], True),
            ([3.0, 2.9, 2.8], [3.0, 2.9, 2.7], False),
            ([3.0, 2.9, 3.0], None, False),
            ([3.0, float("nan"), 2.0], None, False),
        ],
    )
    def test_losses_have_to_fall_as_the_peers_do(self, losses, theirs, ok):
        assert gpu_step.judge(losses, theirs).ok is ok

    def test_out_of_memory_is_a_row(self, monkeypatch):
        def full(*args):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

        monkeypatch.setattr(gpu_step, "build_base", full)
        row = gpu_step.CappedStep("8B", 2, 2048, 12).measure(torch.device("cpu"))
        assert row["results"][OURS]["out_of_memory"]
        # Half a byte for each of 7 G weights, 2 for each of 1 G of embedding and head, and what a step adds.
        assert 5_500 < row["results"][OURS]["planned_mb"] < 12_000
        found = gpu_check._rows_of([{"started": row["case"]}, {"row": row}])
        assert found["errors"] == [f"{row['case']}: OUT OF MEMORY: CUDA out of memory. Tried to allocate 2 GiB"]
        cells = gpu_results._row_cells(row, OURS)
        assert len(cells) == len(gpu_results.HEADERS)
        assert cells[-1].startswith("OUT OF MEMORY: ")


@needs_no_gpu
class TestCommand:
    def test_without_a_gpu_it_says_so(self, capsys):
        assert gpu_check.main([]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err
        assert gpu_check.main(["--dry-run", "--tests", "nowhere"]) == 2
        assert "holds no test_gpu.py" in capsys.readouterr().err

    def test_wheels_that_are_not_there(self, tmp_path):
        assert gpu_check.install_wheels(tmp_path, tmp_path / "site") == f"{tmp_path} holds no wheels"
        (tmp_path / "broken-1-py3-none-any.whl").write_text("no archive")
        assert "broken" in gpu_check.install_wheels(tmp_path, tmp_path / "site")

    def rehearse(self, tmp_path, *arguments):
        code = gpu_check.main(["--dry-run", "--tests", str(ROOT / "tests"), "--out", str(tmp_path), *arguments])
        result = json.loads((tmp_path / "dry-run.json").read_text(encoding="utf-8"))
        wrong = {part["name"]: part for part in result["parts"] if part["status"] != "ok"}
        assert wrong == {}
        assert code == 0
        assert (tmp_path / "dry-run.md").read_text(encoding="utf-8").startswith("# GPU check (dry run")
        return result

    def test_rehearsal_of_a_group(self, tmp_path):
        result = self.rehearse(tmp_path, "--no-tests", "--bench", "rows")
        (part,) = result["parts"]
        assert [row["op"] for row in part["rows"]] == ["rms_norm", "glu", "rope"]
        assert all(row["results"][OURS]["ms"] > 0 for row in part["rows"])

    def test_what_has_been_found_is_written_at_once(self, tmp_path, monkeypatch):
        def end(part, deadline):
            raise KeyboardInterrupt

        monkeypatch.setattr(gpu_check, "run_part", end)
        with pytest.raises(KeyboardInterrupt):
            gpu_check.main(["--dry-run", "--no-tests", "--bench", "nf4,rows", "--out", str(tmp_path)])
        result = json.loads((tmp_path / "dry-run.json").read_text(encoding="utf-8"))
        assert [part["name"] for part in result["parts"]] == ["nf4", "rows"]
        assert "- rows: not run: the check was cut off before it" in (tmp_path / "dry-run.md").read_text()

    def test_the_build_counts(self, tmp_path, capsys):
        long_ago = str(time.time() - gpu_check.TOTAL)
        arguments = ["--dry-run", "--no-tests", "--bench", "rows", "--out", str(tmp_path), "--started", long_ago]
        assert gpu_check.main(arguments) == 1
        assert "no time was left" in capsys.readouterr().out

    @pytest.mark.slow
    def test_rehearsal_of_everything(self, tmp_path):
        result = self.rehearse(tmp_path)
        assert {part["name"] for part in result["parts"]} >= {"GPU alone", "test_nf4", *GROUPS}
        for part in result["parts"]:
            assert part.get("rows") or part["counts"].get("passed") or part["name"] == "CUDA C++", part  # needs a GPU
        assert result["seconds"] < gpu_check.TOTAL
