"""`pyfinetune plan`: from a configuration to memory, hours and what fits, and its refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny
from typer.testing import CliRunner

from pyfinetune.cli import app
from pyfinetune.errors import UserError
from pyfinetune.planner import Plan
from pyfinetune.train import forecast as module
from pyfinetune.train.forecast import SHARE_OF_PEAK, fits, forecast, given_config
from pyfinetune.train.planning import Settings, process_base, settings_of, skeleton, step_plan

RESULTS = Path(__file__).parent.parent / "bench" / "results" / "cpu-epyc-zen4-2-threads.json"


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory) -> str:
    """A model's folder with config.json and tokenizer, and no weights."""
    folder = save_tiny(tmp_path_factory.mktemp("planned"))
    (Path(folder) / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module", name="settings")
def settings_fixture(folder) -> Settings:
    return Settings(folder, "lora", torch.float32, None, "cpu", batch_size=2, length=64)


def run_file(folder: str, tmp_path: Path, **changes) -> Path:
    """A run's YAML file beside twelve rows of data."""
    rows = [{"prompt": f"How many clips did she sell in May, {i}?", "completion": "She sold 24."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content = {
        "model_name_or_path": folder,
        "train_file": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_length": 128,
        "device": "cpu",
        "trainer": {"per_device_train_batch_size": 4, "num_train_epochs": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")  # JSON is YAML
    return path


class TestSettings:
    def test_the_trainers_values_are_taken(self, folder, tmp_path):
        trainer = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_grad_norm": 0.0}
        config = given_config(str(run_file(folder, tmp_path, method="qlora", lora_r=4, trainer=trainer)), {})
        found = settings_of(config)
        assert (found.batch_size, found.accumulation, found.clip, found.r) == (3, 5, 0.0, 4)
        assert (found.method, found.dtype, found.device, found.optim) == (
            "qlora",
            torch.float32,
            "cpu",
            "adamw_torch_fused",
        )

    def test_on_a_gpu_it_is_bfloat16(self, folder):
        for method, dtype, autocast in (("lora", torch.bfloat16, None), ("full", torch.float32, torch.bfloat16)):
            config = given_config(None, {"model_name_or_path": folder, "method": method})
            found = settings_of(config, torch.device("cuda"))
            assert (found.dtype, found.autocast, found.device) == (dtype, autocast, "cuda")

    def test_a_method_that_is_not_planned_is_refused(self, folder):
        config = given_config(None, {"model_name_or_path": folder})
        with pytest.raises(UserError, match=r"plan: method 'other' cannot be predicted"):
            settings_of(config.model_copy(update={"method": "other"}))


class TestSkeleton:
    def test_it_is_the_model_that_a_run_would_train(self, folder, settings):
        from pyfinetune.hf.lora_linear import FastLoraLinear4bit
        from pyfinetune.linear4bit import Linear4bit

        model = skeleton(dataclasses.replace(settings, method="qlora"))
        kinds = [type(each) for each in model.modules()]
        assert kinds.count(Linear4bit) == kinds.count(FastLoraLinear4bit) == 14
        assert {p.requires_grad for name, p in model.named_parameters() if "lora_" in name} == {True}
        assert {p.requires_grad for name, p in model.named_parameters() if "lora_" not in name} == {False}
        assert skeleton(settings, 3).config.num_hidden_layers == 3

    def test_packed_rows_need_a_mask_without_the_kernels(self, settings):
        plain = dataclasses.replace(settings, patch=False)
        packed = dataclasses.replace(plain, documents=2)
        assert step_plan(packed).peak > step_plan(plain).peak

    @pytest.mark.parametrize("method", ["lora", "qlora", "full"])
    def test_checkpointing_takes_less(self, settings, method):
        kept = dataclasses.replace(settings, method=method, length=256)
        assert step_plan(dataclasses.replace(kept, checkpointing=True)).peak < step_plan(kept).peak

    def test_four_bits_are_counted_to_the_byte(self, settings):
        found = {m: step_plan(dataclasses.replace(settings, method=m)).parts["weights"] for m in ("lora", "qlora")}
        linears = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2
        saved = sum(4 * a * b for a, b in linears)
        # Codes, one byte a scale, a float32 a scale of scales, two maps and the offset.
        packed = sum(a * b // 2 + a * b // 64 + 4 * -(-a * b // (64 * 256)) + 4 * (16 + 256 + 1) for a, b in linears)
        assert found["lora"] - found["qlora"] == saved - packed


class TestForecast:
    def test_of_a_file_with_data(self, folder, tmp_path, monkeypatch):
        rates = {"copy_gbs": 10.0, "gemm_bf16_gflops": 100.0, "gemm_fp32_gflops": 50.0}
        monkeypatch.setattr("pyfinetune.bench.ceilings.measure_ceilings", lambda device, quick: rates)
        found = forecast(given_config(str(run_file(folder, tmp_path)), {}), gpus=())
        assert found.steps == 6  # twelve rows, four a batch, two epochs
        assert found.settings.length % 8 == 0
        assert found.settings.length < 128
        flops = sum(found.step.flops.values())
        update = 7 * 4 * found.step.trainable / 10e9
        low, high = found.seconds
        assert low == pytest.approx(flops / 50e9 / SHARE_OF_PEAK[True][1] + update)
        assert high == pytest.approx(flops / 50e9 / SHARE_OF_PEAK[True][0] + update)
        assert found.hours == pytest.approx((low * 6 / 3600, high * 6 / 3600))
        assert "6 steps" in str(found)

    def test_the_total_is_the_sum_of_what_is_shown(self, folder):
        config = given_config(None, {"model_name_or_path": folder, "max_length": 64, "dtype": "float32"})
        found = forecast(config, quick=True, gpus=(), has_data=False)
        assert found.total == sum(found.step.parts.values()) + process_base() + found.libraries
        shown = [float(x.replace(",", "")) for x in re.findall(r"([\d,]+\.\d)$", str(found), re.MULTILINE)]
        *parts, total, _margin = shown
        assert sum(parts) == pytest.approx(total, abs=0.5)
        assert found.seconds is None

    def test_shares_are_those_of_the_committed_results(self):
        runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"].values()
        for patched, name in ((True, "ours"), (False, "transformers + PEFT")):
            rows = [row for run in runs for row in run["rows"] if row["op"] == "step"]
            shares = [row["floor_ms"] / row["results"][name]["ms"] for row in rows]
            low, high = SHARE_OF_PEAK[patched]
            assert low == pytest.approx(min(shares), abs=0.01)
            assert high == pytest.approx(max(shares), abs=0.01)


class TestFits:
    def test_what_fits_is_the_most_that_fits(self, settings, monkeypatch):
        """Bytes a + n (b l + c l^2): the largest n and l are solved for, place by place."""

        def stub(asked: Settings) -> Plan:
            first = 1000 + asked.batch_size * (2 * asked.length + 0.01 * asked.length**2)
            second = 4000 + asked.batch_size * asked.length
            return Plan({"x": {"activations": round(first)}, "y": {"weights": second}}, {}, 1, 1)

        monkeypatch.setattr(module, "step_plan", stub)
        monkeypatch.setattr(module, "_positions", lambda model: None)
        room = module._Room(dataclasses.replace(settings, batch_size=1, length=100))
        assert room.rows(5000) == min((5000 - 1000) // 300, (5000 - 4000) // 100)
        assert room.rows(3999) == 0
        assert room.length(4400) == 384  # of 400 tokens, in steps of 64

    def test_a_larger_gpu_takes_more(self, settings, monkeypatch):
        monkeypatch.setattr(module, "PLANNED", ("full",))
        found = list(fits(dataclasses.replace(settings, length=256), [2, 0.5, 1]))
        assert [fit.gpu for fit in found] == [0.5] * 2 + [1] * 2 + [2] * 2
        assert all((fit.batch_size, fit.longest) == (0, 0) for fit in found[:2])  # less than a context takes
        for a, b in zip(found[2:4], found[4:], strict=True):
            assert (a.method, a.checkpointing, a.r) == (b.method, b.checkpointing, b.r)
            assert 0 < a.batch_size < b.batch_size
            assert a.longest == b.longest == 512  # all of the model's positions
        assert {fit.r for fit in found} == {None}


class TestCommand:
    def test_json(self, folder):
        options = [
            "plan",
            "--model",
            folder,
            "--method",
            "qlora",
            "--max-length",
            "64",
            "--quick",
            "--gpu",
            "0",
            "--json",
        ]
        found = json.loads(CliRunner().invoke(app, options, catch_exceptions=False).stdout)
        assert found["total"] == found["step"]["peak"] + found["base"] + found["libraries"]
        assert found["settings"]["method"] == "qlora"
        assert found["hours"] is None
        assert found["fits"] == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "there is no model"),
            (
                {"model_name_or_path": "m", "method": "full", "lora_r": 8},
                "full fine-tuning has no adapters of low rank",
            ),
            ({"model_name_or_path": "m", "method": "lara"}, "method: 'lara' is not available"),
            ({"model_name_or_path": "m", "batch_size": 0}, "--batch-size 0: needs at least one row"),
            ({"model_name_or_path": "m", "max_length": 1}, "max_length: 1 will not do"),
        ],
    )
    def test_options_that_do_not_go(self, options, message):
        with pytest.raises(UserError, match=re.escape(message)):
            given_config(None, options)

    def test_a_file_and_options_contradict_each_other(self, folder, tmp_path):
        with pytest.raises(UserError, match=r"says what to run, and so do method"):
            given_config(str(run_file(folder, tmp_path)), {"method": "lora"})

    def test_refusals_of_a_plan(self, folder, tmp_path):
        def ask(gpus=(), **options):
            config = given_config(None, {"model_name_or_path": folder, "max_length": 64, **options})
            return forecast(config, quick=True, gpus=gpus, has_data=False)

        with pytest.raises(UserError, match=r"gpu: -3 GB is no size of a GPU\n  fix: give its memory in GB"):
            ask(gpus=[-3])
        with pytest.raises(UserError, match=r"max_length: 4096 is beyond the 512 positions"):
            ask(max_length=4096)
        with pytest.raises(UserError, match=r"folder without config.json"):
            ask(model_name_or_path=str(tmp_path))
        with pytest.raises(UserError, match=r"cannot be loaded"):
            ask(model_name_or_path="no/such-model")
        with pytest.raises(UserError, match=r"target_modules: no layer of the model is called 'nope'"):
            ask(target_modules=["nope"])
        if not torch.cuda.is_available():
            with pytest.raises(UserError, match=r"cuda was asked for"):
                ask(device="cuda")


class TestCheck:
    @pytest.fixture(name="folder")
    def folder_of_a_model_with_weights(self, folder, tmp_path):
        copied = shutil.copytree(folder, tmp_path / "model")
        (copied / "model.safetensors").touch()  # that it is there is looked at, what is in it is not
        return str(copied)

    def test_it_says_how_much_memory_a_run_takes(self, folder, tmp_path):
        path = run_file(folder, tmp_path)
        shown = CliRunner().invoke(app, ["check", str(path)])
        assert shown.exit_code == 0, shown.output
        size = float(re.search(r"peak memory: about ([\d.]+) GiB on the cpu", shown.output)[1])
        made = forecast(given_config(str(path), {}), quick=True, gpus=())
        assert size == pytest.approx((made.total + made.holes) / 2**30, abs=0.2)

    def test_what_cannot_be_predicted_can_be_trained(self, monkeypatch, folder, tmp_path):
        def refuse(*args, **kwargs):
            raise UserError("the layers are unequal", fix="none")

        monkeypatch.setattr(module, "forecast", refuse)
        shown = CliRunner().invoke(app, ["check", str(run_file(folder, tmp_path)), "--json"])
        assert shown.exit_code == 0, shown.output
        found = json.loads(shown.output)
        assert found["prediction"] == ["peak memory: not predicted (the layers are unequal)"]
        assert found["ok"]


@pytest.mark.slow
def test_runs_take_what_was_predicted_within_a_tenth(tmp_path):
    """The resident set of processes that train, and what it grew by, in ten configurations."""
    command = [sys.executable, "-m", "pyfinetune.bench.plan_check", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len({row["name"] for row in rows}) == 10
    off = {row["name"]: row["errors"] for row in rows if any(abs(error) > 0.1 for error in row["errors"].values())}
    assert off == {}
