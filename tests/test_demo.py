"""The demo: its timing, its comparison, its answers, and the whole of it at a tiny size."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_model import make_model, tiny_fixture  # noqa: F401

import pyfinetune as pf
from pyfinetune import cli
from pyfinetune.demo import base, compare, docstrings, run, stages
from pyfinetune.demo.docstrings import Entry
from pyfinetune.demo.screen import Screen, verdict
from pyfinetune.demo.settings import Clock, Settings, check
from pyfinetune.train.config import load_config
from pyfinetune.train.report import answers

TINY = base.Size(vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=1, max_length=64)
OUTPUT_KEYS = {"model", "data", "adapter", "load", "seed", "device", "pretrain", "finetune", "samples", "comparison"}


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return docstrings.gather()


@pytest.fixture
def few_texts(entries, monkeypatch):
    """The demo reads a few hundred docstrings instead of thousands."""
    monkeypatch.setattr(docstrings, "gather", lambda: entries[::20])


class TestBase:
    def test_the_tokenizer_writes_anything_and_the_model_loads(self, tmp_path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = base.train_tokenizer(["the cat sat on the mat"] * 9, 300)
        parameters = base.save_untrained(tmp_path, tokenizer, TINY, seed=1)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "naïve 日本\n\tcat"
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.eos_token == "<|end|>"
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.num_parameters() == parameters
        assert all(linear.in_features % 64 == 0 for linear in model.modules() if isinstance(linear, torch.nn.Linear))

    def test_the_seed_decides_the_weights(self, tmp_path):
        tokenizer = base.train_tokenizer(["abc"], 300)
        contents = []
        for number, seed in enumerate((1, 1, 2)):
            base.save_untrained(tmp_path / str(number), tokenizer, TINY, seed)
            contents.append((tmp_path / str(number) / "model.safetensors").read_bytes())
        assert contents[0] == contents[1] != contents[2]

    def test_the_optimizer_takes_matrices_and_tables_apart(self):
        model = make_model()
        optimizer = base.MuonWithAdamW(model, matrix_lr=0.02, other_lr=0.003)
        muon, adamw = optimizer._parts
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        matrices = {id(value) for group in muon.param_groups for value in group["params"]}
        others = {id(value) for group in adamw.param_groups for value in group["params"]}
        assert {id(embedding), id(head)} <= others
        assert matrices.isdisjoint(others)
        assert matrices | others == {id(value) for value in model.parameters()}
        # A schedule over the whole reaches both parts.
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for value in model.parameters():
            value.grad = torch.ones_like(value)
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        optimizer.zero_grad()
        assert all(value.grad is None for value in model.parameters())


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"minutes": 0.0}, "--minutes: 0.0 is no length of time"),
            ({"minutes": float("nan")}, "--minutes: nan"),
            ({"seed": -1}, "--seed: -1 is below 0"),
            ({"steps": 0}, "--steps: 0 trains nothing"),
            ({"model": "m", "pretrain_steps": 5}, "--pretrain-steps: a given --model"),
            ({"data": "absent.jsonl"}, "--data: absent.jsonl: no such file"),
            ({"device": "tpu"}, "--device: 'tpu' is unknown"),
        ],
    )
    def test_a_mistake_is_named_with_its_mend(self, tmp_path, change, message):
        with pytest.raises(pf.UserError, match=message) as caught:
            check(Settings(output_dir=str(tmp_path / "out"), **change))
        assert caught.value.fix

    def test_somebody_elses_folder_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("x")
        with pytest.raises(pf.UserError, match="not an earlier demo's"):
            check(Settings(output_dir=str(tmp_path)))
        (tmp_path / "demo.json").write_text("{}")
        check(Settings(output_dir=str(tmp_path)))
        with pytest.raises(pf.UserError, match="is a file"):
            check(Settings(output_dir=str(tmp_path / "thesis.txt")))

    def test_the_clock_shares_what_is_left(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        clock = Clock(60)
        assert clock.share(0.5) == 30
        now[0] += 30
        assert clock.elapsed == 30
        assert clock.share(0.5) == 15
        now[0] += 400
        assert clock.share(0.5) == 10  # late, yet a stage is not starved


def tiny_values(tiny: str, folder: Path, **change) -> dict:
    rows = [{"prompt": f"How many is {a} and {b}?\n", "completion": str(a + b)} for a in range(9) for b in range(9)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    trainer = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2}
    values = {
        "model_name_or_path": tiny,
        "train_file": str(path),
        "test_size": 8,
        "output_dir": str(folder / "out"),
        "method": "qlora",
        "packing": True,
        "max_length": 64,
        "device": "cpu",
        "trainer": trainer,
    }
    return {**values, **change}


class TestStages:
    @pytest.mark.parametrize("own_optimizer", [False, True])
    def test_timing_a_step_changes_nothing(self, tiny, tmp_path, own_optimizer):
        change = {"method": "full"} if own_optimizer else {"lora_dropout": 0.1}
        stage = stages.prepare(tiny_values(tiny, tmp_path, **change))
        if own_optimizer:
            stage.optimizer = partial(base.MuonWithAdamW, matrix_lr=0.1, other_lr=0.1)
        before = {name: value.clone() for name, value in stage.model.state_dict().items()}
        state, mode = torch.get_rng_state(), stage.model.training
        assert stages.step_seconds(stage, 4) > 0
        assert torch.equal(torch.get_rng_state(), state)
        assert stage.model.training == mode
        assert all(parameter.grad is None for parameter in stage.model.parameters())
        for name, value in stage.model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_steps_follow_the_time(self, tiny, tmp_path, monkeypatch):
        stage = stages.prepare(tiny_values(tiny, tmp_path))
        monkeypatch.setattr(stages, "step_seconds", lambda *args: 0.1)
        rows, held_out = len(stage.rows.train), len(stage.rows.held_out)
        four, seven = (stages.plan_steps(stage, seconds, 4) for seconds in (4.0, 7.0))
        assert 30 < four < 4 / 0.105
        assert seven - four == pytest.approx(3 / 0.105, abs=1.5)
        assert stages.plan_steps(stage, 0.001, 4) == 10
        assert stages.plan_steps(stage, 1e6, 4) == -(-30 * rows // 4)
        assert len(stage.rows.held_out) == held_out

    def test_held_out_rows_that_would_take_too_long_are_cut(self, tiny, tmp_path, monkeypatch):
        stage = stages.prepare(tiny_values(tiny, tmp_path, test_size=60))
        monkeypatch.setattr(stages, "step_seconds", lambda *args: 0.3)
        before = len(stage.rows.held_out)
        stages.plan_steps(stage, 4.0, 2)
        assert len(stage.rows.held_out) == 6 < before

    def test_training_reports_before_and_after(self, tiny, tmp_path):
        stage = stages.prepare(tiny_values(tiny, tmp_path))
        outcome = stages.train(stage, 8, Console(quiet=True))
        assert outcome.steps == 8
        assert outcome.loss < outcome.loss_before
        assert outcome.perplexity == pytest.approx(torch.tensor(outcome.loss).exp().item(), rel=1e-4)
        assert outcome.tokens > 0
        assert outcome.tokens_per_second > 0
        assert not list(Path(stage.config.output_dir).glob("checkpoint-*"))


class TestCompare:
    def run(self, tiny, folder, **change):
        stage = stages.prepare(tiny_values(tiny, folder, **change))
        start = compare.adapter_state(stage.model)
        stages.train(stage, 3, Console(quiet=True))
        end = compare.adapter_state(stage.model)
        result = compare.compare(stage, start, turns=2)
        now = compare.adapter_state(stage.model)
        assert all(torch.equal(now[name], end[name]) for name in end)
        assert any(not torch.equal(start[name], end[name]) for name in end)
        return result

    def test_against_bitsandbytes(self, tiny, tmp_path, recwarn):
        pytest.importorskip("bitsandbytes")
        with run._quiet():
            result = self.run(tiny, tmp_path)
        assert result.theirs.name == "PEFT over bitsandbytes' Linear4bit"
        assert len(result.ours.losses) == len(result.theirs.losses) == compare.STEPS
        assert len(result.ours.rates) == len(result.theirs.rates) == 2 * (compare.STEPS - 1)
        assert result.difference < 1e-4  # float32: both compute the same
        assert result.equal
        assert len(set(result.ours.losses)) == compare.STEPS  # it learns, and each step is another batch
        assert result.ratio > 0

    def test_without_bitsandbytes_the_baseline_decodes_with_torch(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "has_bitsandbytes", lambda: False)
        used = []
        real = pf.use_backend
        monkeypatch.setattr(pf, "use_backend", lambda name: used.append(name) or real(name))
        result = self.run(tiny, tmp_path)
        assert used == ["reference"] * 2
        assert "bitsandbytes is not installed" in result.theirs.name
        assert result.difference < 1e-4

    def test_adapters_of_another_model_are_refused(self):
        state = compare.adapter_state(torch.nn.Linear(2, 2))
        with pytest.raises(pf.InvalidInput, match="bias"):
            compare.set_adapter_state(torch.nn.Linear(2, 2, bias=False), state)

    @pytest.mark.parametrize(
        ("ours", "theirs", "rates", "words"),
        [
            ([2.0, 1.0], [2.0, 1.0001], (200.0, 100.0), "is 2.00 times as fast; the losses agree to 0.01%"),
            ([2.0, 1.0], [2.0, 1.0001], (90.0, 100.0), "is not faster here: 0.90 times"),
            ([2.0, 1.0], [2.0, 1.2], (200.0, 100.0), "losses differ by 18.2%, so the rates are not to be compared"),
        ],
    )
    def test_the_verdict_is_honest(self, ours, theirs, rates, words):
        sides = [compare.Side("x", losses, [rate]) for losses, rate in zip((ours, theirs), rates, strict=True)]
        assert words in verdict(compare.Comparison(*sides))


class TestAnswers:
    def test_questions_end_where_the_answer_begins(self, tiny, tmp_path):
        stage = stages.prepare(tiny_values(tiny, tmp_path))
        samples = answers.choose(stage.rows.held_out, stage.tokenizer, seed=0)
        assert len(samples) == 3
        for sample in samples:
            assert sample.question.startswith("How many is ")
            assert sample.question.endswith("?\n")
            a, b = (int(word.strip("?\n")) for word in sample.question.split() if word[0].isdigit())
            assert sample.truth == str(a + b)
        assert samples == answers.choose(stage.rows.held_out, stage.tokenizer, seed=0)
        assert samples != answers.choose(stage.rows.held_out, stage.tokenizer, seed=1)

    def test_of_raw_text_the_beginning_is_given(self, tiny, tmp_path):
        rows = [{"text": f"{number} bottles of beer on the wall, {number} bottles"} for number in range(20)]
        path = tmp_path / "raw.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        stage = stages.prepare(tiny_values(tiny, tmp_path, train_file=str(path), test_size=4))
        for sample in answers.choose(stage.rows.held_out, stage.tokenizer, seed=0):
            assert sample.question + sample.truth in [row["text"] for row in rows]
            assert sample.question
            assert sample.truth

    def test_an_answer_is_greedy_and_leaves_the_model_as_it_was(self, tiny, tmp_path):
        stage = stages.prepare(tiny_values(tiny, tmp_path))
        stage.model.train()
        prompt = stage.tokenizer("How many is 1 and 2?\n")["input_ids"]
        with run._quiet():
            first = answers.answer(stage.model, stage.tokenizer, prompt)
            random.seed(5)
            torch.manual_seed(5)
            assert answers.answer(stage.model, stage.tokenizer, prompt) == first
        assert stage.model.training


def call(monkeypatch, *arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["pyfinetune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


class TestCommand:
    def test_the_whole_of_it(self, few_texts, tmp_path, capsys):
        """One tiny run, shown to a person: every promised part is there, and the printed lines load the adapter."""
        out = tmp_path / "out"
        settings = Settings(output_dir=str(out), pretrain_steps=4, steps=4, minutes=0.05, size=TINY)
        result = run.demo(settings, Console(width=160))
        shown, errors = capsys.readouterr()
        assert errors == ""
        for part in (
            "docstrings",
            "Unsupervised",
            "QLoRA",
            "held-out loss",
            "perplexity",
            "before",
            "after",
            "true",
            "tokens/s",
            "PEFT over",
            "peak memory",
            "modules swapped to the kernels",
            str(out / "adapter"),
            f"pyfinetune demo --seed 42 --pretrain-steps 4 --steps 4 --output-dir {out}",
        ):
            assert part in shown, part
        assert len(result.samples) == 3
        assert all(line in shown for line in result.load)
        saved = json.loads((out / "demo.json").read_text())
        assert saved["status"] == "complete"
        assert saved["finetune"] == result.finetune
        assert load_config(out / "qlora.yaml").trainer["max_steps"] == 4
        # The printed lines, in another process, give the model whose answer was shown.
        sample = result.samples[0]
        code = "\n".join(
            [
                *result.load,
                "from pyfinetune.train.report.answers import answer",
                f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(out / 'adapter')!r})",
                f"print(answer(model, tokenizer, tokenizer({sample['question']!r})['input_ids']))",
            ]
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == sample["after"]
        # The same seed and steps again, over the folder of the first run: the same numbers and answers.
        again = run.demo(settings, Console(quiet=True))
        for name in ("loss_before", "loss"):
            assert again.pretrain[name] == result.pretrain[name]
            assert again.finetune[name] == result.finetune[name]
        assert again.samples == result.samples

    def test_a_given_model_and_file(self, tiny, tmp_path, monkeypatch, capsys):
        """No docstring is read, no small model made, and standard output has the JSON to itself."""
        monkeypatch.setattr(docstrings, "gather", lambda: pytest.fail("docstrings were read"))
        data = tiny_values(tiny, tmp_path)["train_file"]
        out = tmp_path / "out"
        arguments = ["--model", tiny, "--data", data, "--output-dir", str(out), "--steps", "3", "--minutes", "0.05"]
        assert call(monkeypatch, "demo", *arguments, "--json") == 0
        stdout, stderr = capsys.readouterr()
        result = json.loads(stdout)
        assert result.keys() >= OUTPUT_KEYS
        assert result["pretrain"] is None
        assert (result["model"], result["data"]) == (tiny, data)
        assert result["finetune"]["steps"] == 3
        assert "Unsupervised" not in stderr
        assert "QLoRA" in stderr
        assert not (out / "base").exists()

    def test_a_given_file_alone_is_read_as_raw_text_first(self, few_texts, tiny, tmp_path):
        data = tiny_values(tiny, tmp_path)["train_file"]
        settings = Settings(
            data=data, output_dir=str(tmp_path / "o"), pretrain_steps=2, steps=2, minutes=0.05, size=TINY
        )
        result = run.demo(settings, Console(quiet=True))
        assert result.pretrain["steps"] == 2
        raw = (tmp_path / "o" / "data" / "texts.jsonl").read_text()
        assert "How many is" in raw
        held_out = [sample["question"] for sample in result.samples]
        assert all(question.startswith("How many is") for question in held_out)
        texts = [json.loads(line)["text"] for line in raw.splitlines()]
        assert not any(text.startswith(question.strip()) for question in held_out for text in texts)

    @pytest.mark.parametrize(
        ("arguments", "message", "fix"),
        [
            (["--data", "absent.jsonl"], "absent.jsonl: no such file", "give a JSON"),
            (["--minutes", "-1"], "--minutes: -1.0 is no length of time", "--minutes 3"),
            (["--model", "no/such/folder/anywhere"], "no tokenizer can be loaded", "give a"),
        ],
    )
    def test_a_mistake_exits_2(self, few_texts, tmp_path, monkeypatch, capsys, arguments, message, fix):
        assert call(monkeypatch, "demo", *arguments, "--output-dir", str(tmp_path / "out")) == 2
        problem, _, mend = capsys.readouterr().err.partition("\n  fix: ")
        assert message in problem
        assert fix in mend

    def test_a_broken_file_is_named_before_anything_is_written(self, tmp_path, monkeypatch, capsys):
        data = tmp_path / "rows.jsonl"
        data.write_text('{"prompt": "a", "completion": ""}\n')
        assert call(monkeypatch, "demo", "--data", str(data), "--output-dir", str(tmp_path / "out")) == 2
        assert f"{data}, row 1: completion is empty" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_ctrl_c_says_what_is_left(self, tmp_path, monkeypatch, capsys):
        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr("pyfinetune.demo.run.demo", interrupted)
        assert call(monkeypatch, "demo", "--output-dir", str(tmp_path)) == 130
        assert f"stopped; what was made so far is in {tmp_path}" in capsys.readouterr().err

    def test_a_baseline_that_fails_does_not_lose_the_result(self, tiny, tmp_path, monkeypatch, capsys):
        def broken(*args):
            raise RuntimeError("no such instruction")

        monkeypatch.setattr(compare, "compare", broken)
        data = tiny_values(tiny, tmp_path)["train_file"]
        settings = Settings(model=tiny, data=data, output_dir=str(tmp_path / "o"), steps=2, minutes=0.05)
        result = run.demo(settings, Console(width=120))
        assert "RuntimeError: no such instruction" in result.comparison["verdict"]
        assert "not compared: the run without the kernels failed" in capsys.readouterr().out
        assert (tmp_path / "o" / "adapter" / "adapter_model.safetensors").is_file()


def test_brackets_in_texts_are_not_markup(capsys):
    screen = Screen(Console(width=80))
    screen.line("a [bold]list[/bold] of [int]")
    assert "a [bold]list[/bold] of [int]" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_at_its_full_size(tmp_path):
    """Fewer steps of the real thing, as a person starts it: both losses fall clearly, at equal loss without kernels."""
    steps = ["--pretrain-steps", "60", "--steps", "40", "--minutes", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pyfinetune.cli", "demo", *steps, "--json", "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["pretrain"]["loss"] < result["pretrain"]["loss_before"] - 1
    assert result["finetune"]["loss"] < result["finetune"]["loss_before"] - 0.1
    assert result["comparison"]["equal_loss"], result["comparison"]
    assert all(sample["after"].strip() for sample in result["samples"])
