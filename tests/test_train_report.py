"""What a run leaves for people: report, plots, answers, model card; and `--from run.json`, which repeats it."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from chromium import open_page
from safetensors.torch import load_file
from tiny_model import save_tiny
from typer.testing import CliRunner

from pyfinetune.errors import UserError
from pyfinetune.train import manifest
from pyfinetune.train.config import parse_config
from pyfinetune.train.report import answers, curves, html_report
from pyfinetune.train.report.card import model_card
from pyfinetune.train.run import train

HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=console.error('owned')>"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Output folder of a run over rows that are an attack on its report."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny(folder / "model")
    rows = [
        {"prompt": f"{a}+{b}= {HOSTILE}", "completion": f"{a + b} <b>&amp;</b>"} for a in range(5) for b in range(5)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "model_name_or_path": model,
        "train_file": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "max_length": 128,
        "test_size": 0.2,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "device": "cpu",
        "report_examples": 2,
        "trainer": {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_total_limit": 1},
    }
    train(parse_config(values))
    return folder / "out"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def record_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


class TestReport:
    @pytest.mark.parametrize("width", [1280, 390])
    def test_it_opens_without_a_word_on_the_console_and_fits_the_window(self, run, tmp_path, width):
        page = open_page(run / "report.html", width)
        assert page.console == []
        assert (page.overflow, page.wide) == (0, [])
        assert (page.scripts, page.external) == (0, [])
        assert page.title == "model, lora"
        result = record_of(run)["result"]
        for shown in (HOSTILE, "<b>&amp;</b>", f"{result['eval_loss']:,.4f}", "LoRA over nn.Linear", "swapped"):
            assert shown in page.text
        for heading in (
            "Curves",
            "Examples, before and after",
            "Data",
            "Kernels",
            "Settings",
            "Environment",
            "Sources",
        ):
            assert heading in page.text

    def test_it_is_one_file_with_its_pictures_inside(self, run):
        text = (run / "report.html").read_text()
        assert text.count("<svg") == 4
        assert "http://" not in text.replace("http://www.w3.org/", "")
        assert "https://" not in text
        names = {path.name for path in (run / "plots").iterdir()}
        assert names == {"loss.png", "learning_rate.png", "tokens_per_second.png", "grad_norm.png"}

    def test_hostile_names_and_settings_are_escaped_too(self, copy, tmp_path):
        record = record_of(copy)
        record["model"]["name_or_path"] = record["config"]["train_file"] = record["device"] = HOSTILE
        record["versions"][HOSTILE] = HOSTILE
        record["kernels"]["rows"][0] |= {"reason": HOSTILE, "status": "left"}
        record["config"]["columns"] = {HOSTILE: HOSTILE}
        manifest.write_manifest(copy / "run.json", record)
        (copy / "metrics.jsonl").write_text('{"step": 1, "loss": "<script>"}\n{"loss": 2, "step": 1}\n[]\n{"st')
        page = open_page(html_report.write_report(copy))
        assert (page.console, page.scripts, page.overflow) == ([], 0, 0)
        assert "owned" not in page.title.replace(HOSTILE.rpartition("/")[2], "")

    def test_of_little_it_still_tells_what_there_is(self, copy, monkeypatch):
        record = record_of(copy)
        del record["result"], record["finished"]
        record |= {"status": "running", "kernels": {"swapped": 0, "left": 0, "rows": []}}
        manifest.write_manifest(copy / "run.json", record)
        (copy / "metrics.jsonl").unlink()
        (copy / "examples.json").write_text("[{")
        text = html_report.write_report(copy).read_text()
        assert "No record was written." in text
        assert "running" in text
        assert "Examples" not in text
        monkeypatch.setattr(html_report, "can_draw", lambda: False)
        assert "pip install matplotlib" in html_report.write_report(copy).read_text()
        (copy / "run.json").unlink()
        with pytest.raises(UserError, match=r"holds no run\.json"):
            html_report.write_report(copy)

    def test_it_can_be_switched_off(self, run, tmp_path):
        config = record_of(run)["config"] | {"output_dir": str(tmp_path / "out"), "report": False}
        train(parse_config(config | {"trainer": {**config["trainer"], "max_steps": 1}}))
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert not names & {"report.html", "plots", "examples.json"}
        assert names >= {"run.json", "README.md", "metrics.jsonl"}


class TestAnswers:
    def test_before_is_the_base_models_and_after_the_tuned_ones(self, run):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        samples = answers.read_samples(run)
        assert len(samples) == 2
        tokenizer = AutoTokenizer.from_pretrained(run)
        base = AutoModelForCausalLM.from_pretrained(record_of(run)["model"]["name_or_path"])
        tuned = AutoModelForCausalLM.from_pretrained(run)
        for sample in samples:
            assert sample.before == answers.answer(base, tokenizer, sample.prompt)
            assert sample.after == answers.answer(tuned, tokenizer, sample.prompt)
            assert sample.question.endswith(HOSTILE)

    def test_they_leave_no_trace_in_the_randomness_and_keep_to_their_time(self, run, monkeypatch):
        samples = answers.read_samples(run)
        asked = []
        monkeypatch.setattr(answers, "answer", lambda *args: asked.append(torch.rand(1)) or "yes")
        torch.manual_seed(3)
        state = torch.get_rng_state()
        answers.answer_all(samples, "after", None, None)
        assert len(asked) == 2
        assert torch.equal(torch.get_rng_state(), state)
        answers.answer_all(samples, "before", None, None, seconds=0)
        assert len(asked) == 2


class TestCurves:
    def test_only_what_was_recorded_and_is_a_number_is_drawn(self):
        records = [
            {"step": 1, "loss": 2.0},
            {"step": 2, "loss": math.nan, "grad_norm": math.inf},
            {"step": 0, "eval_loss": 3},
        ]
        (loss,) = curves.series(records)
        assert loss.lines == {"training": [(1, 2.0)], "held out": [(0, 3)]}
        assert curves.series([]) == []

    def test_long_runs_are_thinned_and_keep_their_end(self):
        (loss,) = curves.series([{"step": step, "loss": 1 / (step + 1)} for step in range(100_000)])
        assert len(loss.lines["training"]) < 3100
        assert loss.lines["training"][-1][0] == 99_999

    def test_equal_curves_give_equal_text(self):
        curve = curves.Curve("loss", "Loss", {"training": [(1, 2.0), (2, 1.0)]})
        assert curves.draw(curve) == curves.draw(curve)


class TestCard:
    def test_the_hub_accepts_it(self, run):
        from huggingface_hub import ModelCard

        card = ModelCard.load(run / "README.md")
        record = record_of(run)
        assert card.data.base_model == record["model"]["name_or_path"]
        assert card.data.library_name == "peft"
        assert {"lora", "pyfinetune"} <= set(card.data.tags)
        assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
            "loss": record["result"]["eval_loss"],
            "perplexity": record["result"]["perplexity"],
        }
        for name in ("torch", "transformers", "peft"):
            assert f"- {name} {record['versions'][name]}" in card.text
        assert record["data"]["sha256"] in card.text

    def test_its_three_lines_load_the_model(self, run):
        (snippet,) = (run / "README.md").read_text().split("```python\n")[1:]
        lines = snippet.split("```")[0].strip().splitlines()
        assert len(lines) == 3
        names: dict = {}
        exec("\n".join(lines), names)
        weights = load_file(run / "adapter_model.safetensors")
        loaded = dict(names["model"].named_parameters())
        found = [key for key in loaded if "lora_B" in key]
        assert len(found) == sum("lora_B" in key for key in weights)
        assert all(loaded[key].abs().max() > 0 for key in found)

    def test_odd_names_break_neither_yaml_nor_markdown(self, run):
        record = record_of(run)
        odd = "a: [b]\n---\n# `x` \"'|"
        record["config"] |= {"train_file": odd, "output_dir": f"/tmp/{odd}"}
        record["model"]["name_or_path"] = odd
        text = model_card(record)
        front = yaml.safe_load(text.split("\n---\n\n#")[0].removeprefix("---\n"))
        assert front["base_model"] == odd
        assert text.count("\n# ") == 1


class TestRepeat:
    def repeat(self, *arguments):
        from pyfinetune.cli import app

        return CliRunner().invoke(app, ["train", *map(str, arguments)])

    def test_it_ends_at_the_same_bits_and_says_that_nothing_differs(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = self.repeat("--from", run / "run.json", "--output-dir", tmp_path / "again")
        assert done.exit_code == 0, done.output
        assert "the same data, model, versions and machine as in the run that is repeated" in done.output
        weights, again = (load_file(out / "adapter_model.safetensors") for out in (run, tmp_path / "again"))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert record_of(run)["result"]["eval_loss"] == record_of(tmp_path / "again")["result"]["eval_loss"]

    def test_it_says_what_differs(self, run):
        there, here = record_of(run), record_of(run)
        there["data"]["sha256"] = there["model"]["sha256"] = "0" * 64
        there["versions"]["torch"] = "1.0"
        there["machine"]["threads"] = 99
        del here["versions"]["peft"]
        said = manifest.compare_runs(there, here)
        assert [line.split(" differs")[0].removeprefix("warning: ") for line in said] == [
            "the training data",
            "the model's weights",
            "the machine's threads",
            "the version of peft",
            "the version of torch",
        ]
        assert "1.0 there" in said[-1]

    def test_paths_are_those_of_the_folder_it_was_started_in(self, run, copy, tmp_path):
        from pyfinetune.train.repeat import load_repeat

        record = record_of(copy)
        record["working_directory"] = str(run.parent)
        record["config"] |= {"train_file": "rows.jsonl", "model_name_or_path": "model", "output_dir": "out"}
        manifest.write_manifest(copy / "run.json", record)
        config, _ = load_repeat(copy / "run.json")
        assert config.train_file == str(run.parent / "rows.jsonl")
        assert config.model_name_or_path == str(run.parent / "model")
        assert config.output_dir == os.path.join(str(run.parent), "out-repeat")

    def test_a_users_mistake_is_named(self, run, tmp_path):
        from pyfinetune.train.repeat import load_repeat

        with pytest.raises(UserError, match="no such file"):
            load_repeat(tmp_path / "run.json")
        (tmp_path / "run.json").write_text('{"a": 1}')
        with pytest.raises(UserError, match="no record of a run"):
            load_repeat(tmp_path / "run.json")
        with pytest.raises(UserError, match="is where that run is"):
            load_repeat(run / "run.json", str(run))
        done = self.repeat(run / "run.yaml", "--from", run / "run.json")
        assert done.exit_code == 2
        done = self.repeat()
        assert done.exit_code == 2
