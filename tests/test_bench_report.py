"""The benchmark's pictures, page and comparison: what they show, what they refuse, and how they look in a browser."""

from __future__ import annotations

import copy
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from chromium import open_page
from rich.console import Console

from pyfinetune.bench import plots
from pyfinetune.bench.comparison import FASTER, SAME, SLOWER, changes, check_comparable, show_comparison
from pyfinetune.bench.harness import OURS
from pyfinetune.bench.page import write_page
from pyfinetune.bench.request import Request
from pyfinetune.bench.results import lines_of, peers_line, read_result, rows_of
from pyfinetune.bench.runner import Output, main
from pyfinetune.bench.steps import LIMIT, breakdowns, step_lines
from pyfinetune.errors import UserError

RESULTS = Path(__file__).parent.parent / "bench" / "results"


def timed(milliseconds: float, **more) -> dict:
    """One side of a case, as a worker would send it, whose quartiles are 1 % apart on either side."""
    quartiles = {"ms_q1": 0.99 * milliseconds, "ms_q3": 1.01 * milliseconds}
    return {"ok": True, "detail": "fine", "ms": milliseconds, **quartiles, **more}


def row(case="a case", ours=1.0, peer=4.0, op="glu", **more) -> dict:
    base = {"op": op, "case": case, "bound": "copy_gbs", "floor_ms": 0.5, "bytes": 5e6, "flops": 0.0, "isa": None}
    base |= {"target": None, "targets": {}, "versus": None, "missing": {}}
    return base | {"results": {OURS: timed(ours), "eager": timed(peer)}} | more


def step_row() -> dict:
    parts = {"linear layers": 50.0, "attention": 25.0, "other, and the host": 25.0}
    ours = timed(200.0, parts_ms=parts, resident_mb=300.0, peak_mb={"both": 20.5})
    floors = {"linear layers": 60.0, "attention": 40.0}
    more = {"bound": "gemm_bf16_gflops", "floor_ms": 100.0, "tokens": 512, "parts_floor_ms": floors}
    return row("a step", op="step", **more) | {"results": {OURS: ours, "HF": timed(800.0, parts_ms=parts)}}


def result(*rows, **more) -> dict:
    rates = {"copy_gbs": 10.0, "gemm_bf16_gflops": 400.0, "gemm_fp32_gflops": 100.0}
    machine = {
        "cpu": {"model": "Some CPU", "threads": 2, "isa": "avx2"},
        "versions": {"pyfinetune": "0", "torch": "2", "bitsandbytes": None, "peft": "1"},
        "gpus": [],
    }
    base = {"created": "2026-01-02T03:04:05+00:00", "quick": False, "device": "cpu", "interrupted": False}
    return base | {"machine": machine, "runs": {"default": {"ceilings": rates, "rows": list(rows)}}} | more


def everything() -> dict:
    """Gains, a loss, a wrong case, one whose name would break a careless page, and a step."""
    wrong = row("wrong")
    wrong["results"][OURS] = {"ok": False, "detail": "y: error 3"}
    failed = {"op": "glu", "case": "failed", "isa": None, "error": "RuntimeError: <b>out of memory</b>"}
    peers = {"liger": {"version": None, "missing": "not installed", "left_out": None}}
    rows = [row(), row("lost", ours=8.0), wrong, failed, row("<script>alert(1)</script>", ours=2.0), step_row()]
    return result(*rows, peers=peers)


class TestComparison:
    def test_what_moved_and_what_did_not(self):
        before = result(row("a"), row("b"), row("c"), row("d"), row("gone"))
        after = result(row("a", ours=1.2), row("b", ours=0.8), row("c", ours=1.03), row("d"), row("new"))
        found = {change.case: change.verdict for change in changes(before, after)}
        assert found == {"a": SLOWER, "b": FASTER, "c": SAME, "d": SAME}
        (change,) = [change for change in changes(before, after) if change.case == "a"]
        assert change.ratio == pytest.approx(1.2)
        assert (change.low, change.high) == (pytest.approx(1.2 * 0.99 / 1.01), pytest.approx(1.2 * 1.01 / 0.99))

    def test_scatter_is_no_change(self):
        wide = row("a", ours=1.3)
        wide["results"][OURS] |= {"ms_q1": 0.9, "ms_q3": 1.9}
        assert [change.verdict for change in changes(result(row("a")), result(wide))] == [SAME]

    def test_a_machine_that_slowed_down_is_not_ours_to_answer_for(self):
        slowed = row("a", ours=1.3, floor_ms=0.65)
        (change,) = changes(result(row("a")), result(slowed))
        assert change.machine == pytest.approx(1.3)
        assert change.verdict == SAME

    def test_wrong_and_failed_cases_are_left_out(self):
        assert [change.case for change in changes(everything(), everything())] == [
            "a case",
            "lost",
            "<script>alert(1)</script>",
            "a step",
        ]

    def test_says_what_got_slower(self):
        out = StringIO()
        show_comparison(result(row("a")), result(row("a", ours=2.0)), False, Console(file=out, width=160))
        assert "slower: a (default, 2.00x)" in out.getvalue()
        out = StringIO()
        show_comparison(result(row("a")), result(row("a")), False, Console(file=out, width=160))
        assert "nothing of ours got slower" in out.getvalue()

    def test_another_machine(self):
        other = copy.deepcopy(result(row("a")))
        other["machine"]["cpu"] |= {"model": "Another", "threads": 8}
        cases = [("glu", "a")]
        with pytest.raises(UserError, match="processor was Another, is Some CPU; threads was 8, is 2"):
            check_comparable(other, result(row("a")), cases, any_machine=False)
        out = StringIO()
        show_comparison(other, result(row("a")), True, Console(file=out, width=160))
        assert "ANOTHER MACHINE" in out.getvalue()
        with pytest.raises(UserError, match="none of these cases"):
            check_comparable(result(row("b")), result(row("a")), cases, any_machine=True)

    def test_refused_before_anything_is_measured(self, tmp_path, monkeypatch):
        path = tmp_path / "old.json"
        path.write_text(json.dumps(result(row("a"))))
        monkeypatch.setattr("pyfinetune.bench.runner.run", lambda *args: pytest.fail("measured"))
        with pytest.raises(UserError, match="none of these cases"):
            main(Request(("glu",), quick=True), Output(compare_path=path))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": {"default": {"rows": [{"op": 1}]}}}', "\x00"])
    def test_files_that_are_no_results(self, tmp_path, text):
        path = tmp_path / "old.json"
        path.write_text(text)
        with pytest.raises(UserError, match="is no result of the benchmark"):
            read_result(path, "--compare")
        with pytest.raises(UserError, match="cannot be read"):
            read_result(tmp_path / "none.json", "--compare")

    @pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
    def test_the_results_that_are_kept_can_be_read(self, path):
        kept = read_result(path, "--compare")
        assert {change.verdict for change in changes(kept, kept)} == {SAME}


class TestTables:
    def test_only_columns_that_hold_something(self):
        headers, _rows = rows_of(lines_of(result(row())))
        assert "spread" in headers
        assert not {"saved, MB", "peak, MB", "forward, ms", "target"} & set(headers)
        more = row()
        more["results"][OURS] |= {"peak_mb": {"both": 3.25}, "forward": timed(0.25), "backward": timed(0.75)}
        headers, rows = rows_of(lines_of(result(more)))
        cells = dict(zip(headers, rows[0], strict=True))
        assert (cells["peak, MB"], cells["forward, ms"], cells["backward, ms"]) == ("3.2", "0.25", "0.75")

    def test_peers(self):
        assert peers_line(everything()) == "missing: liger (not installed)"

    def test_steps(self):
        assert step_lines(step_row()) == [
            [OURS, "2560", "200", "50%", "300", "320"],
            ["HF", "640", "800", "12%", "-", "-"],
            [LIMIT, "5120", "100", "100%", "-", "-"],
        ]
        found = breakdowns(step_row())
        assert list(found) == [OURS, "HF", LIMIT]
        assert found[OURS] == {"linear layers": 100.0, "attention": 50.0, "other, and the host": 50.0}
        assert found[LIMIT] == {"linear layers": 60.0, "attention": 40.0, "other, and the host": 0.0}


class TestPictures:
    def test_every_picture_is_written_twice_and_says_what_it_shows(self, tmp_path):
        written = plots.write_figures(everything(), tmp_path / "new")
        assert [name for name, _what, _path in written] == ["ratios", "time-glu", "step-1"]
        for _name, _what, path in written:
            assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        texts = {name: path.read_text() for name, _what, path in written}
        assert "0.50x" in texts["ratios"]
        assert all(label in texts["time-glu"] for label in ("read and written, MB", "time, ms", "limit: copy rate"))
        assert all(
            label in texts["step-1"] for label in ("2560 tokens/s", "linear layers", LIMIT, "time of a step, ms")
        )
        again = plots.write_figures(everything(), tmp_path / "again", png=False)
        assert [path.read_text() for *_, path in again] == [texts[name] for name, *_ in again]
        assert not list((tmp_path / "again").glob("*.png"))

    def test_losses_are_red(self):
        figure = plots.ratio_figure([line for line in lines_of(everything()) if line.compared])
        colors = [patch.get_facecolor() for patch in figure.axes[0].patches]
        assert colors[1] != colors[0] == colors[2]

    def test_the_roofline_goes_through_what_the_machine_could_do(self):
        # 5 MB at 10 GB/s take 0.5 ms.
        (axes,) = plots.size_figure(result(row()), "glu").axes
        (line,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("limit")]
        (x0, x1), (y0, y1) = line.get_data()
        assert y0 / x0 == pytest.approx(y1 / x1) == pytest.approx(0.5 / 5)

    def test_nothing_to_draw(self, tmp_path):
        assert plots.write_figures(result(), tmp_path) == []
        assert write_page(result(interrupted=True), tmp_path).read_text().count("Interrupted") == 1

    def test_mistakes(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is no folder"):
            Output(plot_dir=tmp_path / "file").check()
        with pytest.raises(UserError, match="there is no folder"):
            Output(json_path=tmp_path / "none" / "r.json").check()


class TestPage:
    def test_nothing_is_fetched_and_nothing_breaks_out(self, tmp_path):
        text = write_page(everything(), tmp_path).read_text()
        assert not re.search(r'(?:src|href)="(?!data:)', text)
        assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        assert "<h2>Where ours is slower</h2>" in text
        assert "WRONG" in text

    @pytest.mark.parametrize("width", [1280, 390])
    def test_in_a_browser(self, tmp_path, width):
        """Laid out without overflow, every picture decoded, nothing on the console, not blank."""
        shot = tmp_path / "shot.png"
        page = open_page(write_page(everything(), tmp_path), width, screenshot=shot)
        assert (page.console, page.overflow, page.external) == ([], 0, [])
        assert (page.pictures, page.broken) == (3, 0)
        from matplotlib.image import imread

        assert imread(shot)[:, :width, :3].std() > 0.05
