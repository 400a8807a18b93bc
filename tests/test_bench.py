"""The benchmark: what it times and refuses to time, how runs become a table, and that every quick case is right."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pyfinetune import ops
from pyfinetune.bench import (
    bench_lora_linear,
    bench_nf4,
    bench_rms_norm,
    bench_rope,
    cases_of,
    ceilings,
    checks,
    harness,
    op_names,
    peers,
    report,
    runner,
)
from pyfinetune.bench import worker as worker_module
from pyfinetune.bench.harness import (
    MAX_ROUNDS,
    OURS,
    Case,
    Setup,
    Target,
    Verdict,
    floor_seconds,
    interleave,
    measure,
    saved_bytes,
)
from pyfinetune.bench.request import Request
from pyfinetune.bench.results import lines_of, markdown_of
from pyfinetune.bench.runner import Output
from pyfinetune.errors import UserError

CPU = torch.device("cpu")
RATES = {"copy_gbs": 10.0, "gemm_bf16_gflops": 400.0, "gemm_fp32_gflops": 100.0}
ROOT = Path(__file__).parent.parent
UNFORCED = [case for case in cases_of([], quick=True) if case.isa is None]
# bitsandbytes and PEFT warn about what they import; their warnings are not ours to judge.
peers_may_warn = pytest.mark.filterwarnings("ignore")


def make_case(ours_ok: bool = True, peer_ok: bool = True, calls: list | None = None) -> Case:
    """A case whose calls record themselves, and whose results are right or wrong as asked for."""
    calls = [] if calls is None else calls

    def build(device):
        return Setup(
            {OURS: lambda i: calls.append((OURS, i)), "peer": lambda i: calls.append(("peer", i))},
            {OURS: lambda: Verdict(ours_ok, "ours checked"), "peer": lambda: Verdict(peer_ok, "peer checked")},
        )

    return Case("some_op", "a case", build, flops=4e9, bytes=1e6, target=Target(2.0, 1.0))


def row(case="a case", ours=1.0, peer: float | None = 4.0, **more):
    """A row as a worker would send it."""
    results = {OURS: {"ok": True, "detail": "fine", "ms": ours}}
    if peer is not None:
        results["peer"] = {"ok": True, "detail": "fine", "ms": peer}
    base = {"op": "some_op", "case": case, "floor_ms": 0.5, "target": vars(Target(2.0, 1.5)), "isa": None}
    return base | {"versus": None, "missing": {}, "results": results} | more


def result(**runs):
    """A result of `runner.run` with these rows for each allocator setting."""
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "quick": False,
        "device": "cpu",
        "machine": {
            "cpu": {"model": "Some CPU", "threads": 2, "isa": "avx2"},
            "versions": {"pyfinetune": "0", "torch": "2", "bitsandbytes": None, "peft": "1"},
        },
        "interrupted": False,
        "runs": {page: {"ceilings": dict(RATES), "rows": rows} for page, rows in runs.items()},
    }


@pytest.fixture(autouse=True)
def small_yardsticks(monkeypatch):
    """The machine's rates on small operands: what they are does not matter here."""
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "_GEMM_SIZE", 64)


class TestHarness:
    def test_calls_take_turns_and_turns_rotate(self):
        seen = []
        times = interleave({name: lambda i, n=name: seen.append((n, i)) for name in "abc"}, 0.0)
        assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 5)
        timed = seen[6:]  # two warm-up calls each come first
        assert [name for name, _ in timed] == list("abcbcacababcbca")
        assert [i for _, i in timed] == list(range(15))  # no call finds another one's inputs in the cache

    def test_a_long_call_is_warmed_up_once(self, monkeypatch):
        monkeypatch.setattr(harness, "LONG_CALL", 0.0)
        seen = []
        interleave({"a": seen.append}, 0.0)
        assert seen == [0, *range(5)]

    def test_goes_on_for_the_time_given_and_not_for_ever(self):
        assert len(interleave({"a": lambda i: None}, 60.0)["a"]) == MAX_ROUNDS

    def test_collector_is_off_only_while_timing(self):
        states = []
        interleave({"a": lambda i: states.append(gc.isenabled())}, 0.0)
        assert states == [True, True] + [False] * 5
        assert gc.isenabled()

        def fail(i):
            if not gc.isenabled():
                raise ValueError

        with pytest.raises(ValueError):
            interleave({"a": fail}, 0.0)
        assert gc.isenabled()

    def test_wrong_result_gets_no_time(self):
        calls = []
        measured = measure(make_case(ours_ok=False, calls=calls), CPU, RATES, 0.0)
        assert measured["results"] == {
            OURS: {"ok": False, "detail": "ours checked"},
            "peer": {"ok": True, "detail": "peer checked"},
        }
        assert calls == []

    def test_wrong_peer_gets_no_time(self):
        calls = []
        measured = measure(make_case(peer_ok=False, calls=calls), CPU, RATES, 0.0)
        assert "ms" not in measured["results"]["peer"]
        assert measured["results"][OURS]["ms"] >= 0
        assert {name for name, _ in calls} == {OURS}

    def test_floor_is_the_larger_of_work_and_traffic(self):
        floors = {"gemm_bf16_gflops": pytest.approx(0.01), "copy_gbs": pytest.approx(1e-4)}
        assert floor_seconds(make_case(), RATES) == floors
        floats = Case("o", "c", None, flops=4e9, dtype=torch.float32, bytes=1e9)
        assert floor_seconds(floats, RATES) == {"gemm_fp32_gflops": pytest.approx(0.04), "copy_gbs": pytest.approx(0.1)}

    def test_the_floor_is_measured_beside_the_calls(self, monkeypatch):
        """A machine that took twice as long for its own copy during the rounds sets a floor twice as high."""
        monkeypatch.setattr(harness, "yardstick", lambda rate, device: (lambda: None, {"copy_gbs": 3e9}[rate]))
        monkeypatch.setattr(harness, "interleave", lambda *a, **more: {harness.MACHINE: [0.5, 0.6, 9.0], OURS: [1, 1]})
        measured = measure(replace(make_case(), bytes=1e9), CPU, RATES, 0.0)
        assert measured["bound"] == "copy_gbs"
        assert measured["floor_ms"] == pytest.approx(1e3 * 0.6 / 3e9)

    def test_the_machine_is_timed_before_and_after(self):
        seen = []
        calls = {name: lambda i, n=name: seen.append(n) for name in "ab"}
        times = interleave(calls, 0.0, min_rounds=2, machine=lambda: seen.append("m"))
        assert "".join(seen) == "mmmmmm" + "aabb" + "ab" + "ba" + "mmmmmm"
        assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2, harness.MACHINE: 10}

    def test_saved_bytes_counts_what_the_inputs_do_not_own(self):
        x = torch.randn(100, requires_grad=True)
        assert saved_bytes(lambda: x * x, [x]) == 0
        assert saved_bytes(lambda: x.exp().exp(), [x]) == 800
        assert saved_bytes(lambda: x[:50] * x[50:], [x]) == 0

    def test_ceilings_are_rates(self):
        rates = ceilings.measure_ceilings(CPU, quick=True)
        assert set(rates) == set(RATES)
        assert all(rate > 0 for rate in rates.values())

    def test_sets_reach_beyond_the_cache(self, monkeypatch):
        monkeypatch.setattr(ceilings, "cache_bytes", lambda device: 32 << 20)
        assert ceilings.sets_beyond_cache(8 << 20, CPU) == 8
        assert ceilings.sets_beyond_cache(1 << 30, CPU) == 1
        assert ceilings.sets_beyond_cache(1, CPU) == 16


class TestChecks:
    def test_same_bits(self):
        a = torch.arange(4)
        assert checks.same_bits([a], [a.clone()], ["a"]).ok
        wrong = checks.same_bits([a], [torch.tensor([0, 1, 9, 9])], ["a"])
        assert not wrong.ok
        assert wrong.detail == "a: 2 of 4 elements differ"
        assert not checks.same_bits([a], [a.float()], ["a"]).ok

    @pytest.mark.parametrize("spoil", [lambda y: y * 1.1, lambda y: y * float("nan"), lambda y: y[:-1]])
    def test_close_to_exact(self, spoil):
        x = torch.randn(64, 64, dtype=torch.float64)
        exact, eager = x @ x, x.bfloat16() @ x.bfloat16()
        assert checks.close_to_exact([eager], [exact], [eager], ["y"], [1.0]).ok
        verdict = checks.close_to_exact([spoil(eager)], [exact], [eager], ["y"], [1.5])
        assert not verdict.ok
        assert verdict.detail.startswith("y: ")

    @peers_may_warn
    def test_a_wrong_gradient_is_found(self, monkeypatch):
        """The whole way: a kernel that forgets the scaling in one gradient gets no time."""
        right = ops.lora_linear

        def wrong(x, base, a, b, scaling, **more):
            return right(x, base, a.detach() + 0.5 * (a - a.detach()), b, scaling, **more)

        case = next(case for case in cases_of(["lora_linear"], quick=True) if case.name.startswith("QLoRA"))
        monkeypatch.setattr(ops, "lora_linear", wrong)
        verdict = measure(case, CPU, RATES, 0.0)["results"][OURS]
        assert not verdict["ok"]
        assert verdict["detail"].startswith("d_lora_a: error")
        assert "ms" not in verdict


class TestCases:
    @peers_may_warn
    @pytest.mark.parametrize("case", UNFORCED, ids=lambda case: case.name)
    def test_ours_and_peers_are_right(self, case):
        measured = measure(case, CPU, RATES, 0.0, once=False)
        assert {name: r["ok"] for name, r in measured["results"].items()} == dict.fromkeys(measured["results"], True)
        assert measured["results"][OURS]["rounds"] == 5
        assert json.loads(json.dumps(measured)) == measured

    def test_names_are_unique_and_targets_are_for_full_shapes(self):
        for quick in (True, False):
            names = [(case.op, case.name) for case in cases_of([], quick)]
            assert len(set(names)) == len(names)
        assert not any(case.target or case.targets for case in cases_of([], quick=True))
        assert sum(case.target is not None for case in cases_of([], quick=False)) >= 12

    def test_ops(self):
        ops = ["glu", "linear_cross_entropy", "lora_linear", "nf4", "rms_norm", "rope", "step", "varlen_attn"]
        assert op_names() == ops
        assert {case.op for case in cases_of(["nf4"])} == {"nf4"}
        with pytest.raises(UserError, match="no benchmark for 'nf5'"):
            cases_of(["nf5"])

    @pytest.mark.parametrize("module", [bench_nf4, bench_lora_linear, bench_rms_norm, bench_rope])
    def test_missing_peers_are_told(self, monkeypatch, module):
        monkeypatch.setattr(peers, "find", lambda package: (None, "not installed (here)"))
        for case in module.cases(quick=True)[-2:]:
            measured = measure(case, CPU, RATES, 0.0)
            assert list(measured["results"]) == [OURS]
            assert "not installed (here)" in next(iter(measured["missing"].values()))


class TestResults:
    def test_headline_is_the_smaller_ratio(self):
        (line,) = lines_of(result(default=[row(peer=8.0)], recycled=[row(peer=3.0)]))
        assert line.ratio == {"default": 8.0, "recycled": 3.0}
        assert line.headline == 3.0
        assert line.of_limit == {"default": 0.5, "recycled": 0.5}
        assert line.met

    @pytest.mark.parametrize(
        ("peers", "target", "met"),
        [
            ((2.0, 1.5), Target(2.0, 1.5), True),
            ((1.9, 1.6), Target(2.0, 1.5), False),
            ((9.0, 1.4), Target(2.0, 1.5), False),
            ((1.0, 1.0), Target(of_floor=2.0), True),
            ((9.0, 9.0), Target(of_floor=1.9), False),
        ],
    )
    def test_targets(self, peers, target, met):
        rows = [row(peer=peer, target=vars(target)) for peer in peers]
        (line,) = lines_of(result(default=rows[:1], recycled=rows[1:]))
        assert line.met is met

    def test_a_peer_with_a_target_of_its_own(self):
        measured = row(peer=4.0, targets={"other": vars(Target(5.0))})
        measured["results"]["other"] = {"ok": True, "detail": "fine", "ms": 4.0}
        peer, other = lines_of(result(default=[measured]))
        assert (peer.met, other.met) == (True, False)
        case = replace(make_case(), target=None, targets={"peer": Target(0.0, 0.0)})
        (line,) = lines_of(result(default=[measure(case, CPU, RATES, 0.0)]))
        assert line.met

    def test_forced_isa_is_compared_with_ours_under_the_best(self):
        forced = row("decode, AVX2", ours=2.0, peer=None, isa="avx2", versus="decode")
        lines = lines_of(result(default=[row("decode", ours=1.5), forced]))
        assert lines[1].peer == "ours, best ISA"
        assert lines[1].ratio == {"default": 0.75}

    def test_markdown_says_what_is_wrong_and_missing(self):
        bad = row("bad")
        bad["results"][OURS] = {"ok": False, "detail": "y: error 3"}
        lone = row("lone", peer=None, missing={"peer": "not installed"})
        text = markdown_of(result(default=[row(), bad, lone]))
        assert "Some CPU, 2 threads, avx2; pyfinetune 0, torch 2, peft 1; 2026-01-02" in text
        assert "copy 10.0 GB/s" in text
        cells = [line.split("|") for line in text.splitlines() if line.startswith("| bad")]
        assert [cell[2].strip() for cell in cells] == ["WRONG"]
        (lone_line,) = [line for line in lines_of(result(default=[lone])) if line.case == "lone"]
        assert lone_line.problems == ["peer missing: not installed"]


class TestRunner:
    def run_main(self, monkeypatch, value, **more):
        out = StringIO()
        monkeypatch.setattr(runner, "run", lambda *args: value)
        code = runner.main(Request(("nf4",)), Output(**more), console=Console(file=out, width=200))
        return code, out.getvalue()

    def test_all_right_exits_0(self, monkeypatch, tmp_path):
        path = tmp_path / "r.json"
        code, text = self.run_main(monkeypatch, result(default=[row()]), json_path=path)
        assert code == 0
        assert "4.00x" in text
        assert json.loads(path.read_text())["runs"]["default"]["rows"][0]["results"][OURS]["ms"] == 1.0

    def test_wrong_exits_1_and_shows_no_time(self, monkeypatch):
        bad = row(ours=123.0)
        bad["results"][OURS] = {"ok": False, "detail": "y: error 3"}
        code, text = self.run_main(monkeypatch, result(default=[bad]))
        assert code == 1
        assert "WRONG (default): y: error 3" in text
        assert "123" not in text

    def test_failed_case_exits_1(self, monkeypatch):
        failed = {"op": "some_op", "case": "a case", "isa": None, "error": "RuntimeError: out of memory"}
        code, text = self.run_main(monkeypatch, result(default=[failed]))
        assert code == 1
        assert "ERROR (default): RuntimeError: out of memory" in text

    def test_wrong_peer_is_no_fault_of_ours(self, monkeypatch):
        other = row()
        other["results"]["peer"] = {"ok": False, "detail": "89 % differ"}
        code, text = self.run_main(monkeypatch, result(default=[other]))
        assert code == 0
        assert "peer WRONG (default): 89 % differ" in text

    def test_interrupted_keeps_what_is_done(self, monkeypatch):
        def messages(arguments, environment):
            yield {"ceilings": dict(RATES)}
            yield {"start": "a case"}
            yield {"row": row()}
            raise KeyboardInterrupt

        monkeypatch.setattr(runner, "worker_messages", messages)
        got = runner.run(Request(("nf4",), quick=True))
        assert got["interrupted"]
        assert [r["case"] for r in got["runs"]["default"]["rows"]] == ["a case"]
        assert got["runs"]["recycled"]["rows"] == []
        code, text = self.run_main(monkeypatch, got | {"machine": result()["machine"]})
        assert code == 130
        assert "4.00x" in text

    def test_environments(self, monkeypatch):
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1")
        default = runner.worker_environment("default", None)
        assert not set(default) & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
        recycled = runner.worker_environment("recycled", "avx2", "reference")
        assert recycled["MALLOC_MMAP_THRESHOLD_"] == "8589934592"
        assert recycled["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
        assert recycled["PYFINETUNE_CPU_ISA"] == "avx2"
        assert recycled["PYFINETUNE_BACKEND"] == "reference"
        assert "GLIBC_TUNABLES" not in recycled

    def test_worker_goes_on_after_a_failed_case(self, monkeypatch):
        def fail(device):
            raise RuntimeError("no memory")

        monkeypatch.setattr(worker_module, "measure_ceilings", lambda device, quick: RATES)
        said = []
        request = Request(quick=True, seconds=0.0)
        worker_module.run_cases([Case("o", "bad", fail), make_case()], request, False, said.append)
        assert [next(iter(message)) for message in said] == ["ceilings", "start", "row", "start", "row"]
        assert said[2]["row"]["error"] == "RuntimeError: no memory"
        assert said[4]["row"]["results"][OURS]["ok"]
        assert "peak_mb" not in said[4]["row"]["results"][OURS]

    def test_worker_that_dies_is_told(self):
        environment = runner.worker_environment("default", None)
        said = list(runner.worker_messages(["--request", "nonsense"], environment))
        assert said[-1]["died"] == 2
        assert "nonsense" in said[-1]["stderr"]
        collected = {"ceilings": {}, "rows": []}
        runner._collect(collected, iter(said), print, print)
        assert lines_of(result() | {"runs": {"default": collected}})[0].wrong

    def test_workers_measure(self):
        got = runner.run(Request(("nf4",), quick=True, seconds=0.0, peers=("bitsandbytes",)), recycled=True)
        (run,) = got["runs"].values()
        assert set(run["ceilings"]) == set(RATES)
        cases = {case.name for case in cases_of(["nf4"], quick=True)}
        forced = {
            case.name
            for case in cases_of(["nf4"], quick=True)
            if case.isa not in (None, *got["machine"]["cpu"]["isas"])
        }
        assert {r["case"] for r in run["rows"]} == cases - forced
        lines = lines_of(got)
        assert not any(line.wrong for line in lines)
        assert all(line.ours["recycled"] > 0 for line in lines)
        assert all(line.peak[OURS] > 0 for line in lines)


class TestReport:
    def pages(self, tmp_path, text=f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"):
        """README, the page beside the results, and the arguments that name both."""
        readme, folder = tmp_path / "README.md", tmp_path / "results"
        folder.mkdir()
        for page in (readme, folder / "README.md"):
            page.write_text(text)
        return readme, folder / "README.md", ["--readme", str(readme), "--results", str(folder)]

    def test_rewrites_only_the_block(self, tmp_path):
        readme, page, arguments = self.pages(tmp_path)
        assert report.main([*arguments, "--check"]) == 1
        assert report.main(arguments) == 0
        assert readme.read_text() == f"before\n{report.BEGIN}\n{report.NOT_MEASURED}\n{report.END}\nafter\n"
        assert report.main([*arguments, "--check"]) == 0
        rows = [row(), row("no promise", target=None)]
        (page.parent / "cpu.json").write_text(json.dumps(result(default=rows)))
        assert report.main(arguments) == 0
        for path in (readme, page):
            text = path.read_text()
            assert "| a case |" in text
            assert "4.00x" in text
            assert text.startswith("before\n")
            assert text.endswith("\nafter\n")
            assert ("no promise" in text) == ("of limit" in text) == (path == page)
        page.write_text("no marks")
        assert report.main(arguments) == 2

    @pytest.mark.parametrize("text", ["none", f"{report.END}\n{report.BEGIN}", f"{report.BEGIN}\n" * 2 + report.END])
    def test_marks(self, tmp_path, capsys, text):
        readme, page, arguments = self.pages(tmp_path, text)
        assert report.main(arguments) == 2
        assert "exactly one" in capsys.readouterr().err
        assert readme.read_text() == page.read_text() == text

    def test_broken_result_is_named(self, tmp_path, capsys):
        _readme, page, arguments = self.pages(tmp_path)
        (page.parent / "bad.json").write_text('{"runs": {}}')
        assert report.main(arguments) == 2
        assert "bad.json" in capsys.readouterr().err

    def test_the_readme_shows_the_results_that_are_kept(self):
        arguments = ["--readme", str(ROOT / "README.md"), "--results", str(ROOT / "bench" / "results"), "--check"]
        assert report.main(arguments) == 0, "run: python -m pyfinetune.bench.report"
