"""Whole runs on a tiny model: the held-out loss falls, what is saved loads, and no stop loses more than it must."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import CHATML, save_tiny, tiny_fixture  # noqa: F401

import pyfinetune as pf
import pyfinetune.train.loop as loop
from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.train.answers import read_samples
from pyfinetune.train.checkpoints import CHECKSUMS, list_checkpoints, newest_complete
from pyfinetune.train.config import config_digest, parse_config
from pyfinetune.train.run import train


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """Forty additions as prompt/completion rows."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def settings(model: str, data: str, out: Path, **change):
    trainer = {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": 6, **change.pop("trainer", {})}
    values = {
        "model_name_or_path": model,
        "train_file": data,
        "output_dir": str(out),
        "max_length": 64,
        "test_size": 0.2,
        "lora_r": 4,
        "save_steps": 2,
        "device": "cpu",
        "report": False,
    }
    return parse_config({**values, **change, "trainer": trainer})


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# PEFT asks transformers 5.23 for a property by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_learns_and_saves_what_peft_and_transformers_load(tiny, sums, tmp_path, method):
    out = tmp_path / "out"
    rate = 1e-3 if method == "full" else 2e-2
    section = {"max_steps": 12, "learning_rate": rate}
    result = train(settings(tiny, sums, out, method=method, report=True, report_examples=1, trainer=section))
    assert result.steps == 12
    assert not result.interrupted
    assert result.eval_loss < result.eval_loss_before - 0.01
    assert result.tokens > 0
    assert result.tokens_per_second > 0
    assert result.peak_memory_gb > 0

    assert method in (out / "report.html").read_text()
    (sample,) = read_samples(out)
    assert sample.question.endswith("=")
    assert sample.after != sample.before

    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).eos_token_id is not None
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.use_cache
    elif method == "lora":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), out)
    else:
        base = pf.quantize(AutoModelForCausalLM.from_pretrained(tiny))
        model = PeftModel.from_pretrained(base, out, config=pf.lora_config(PeftConfig.from_pretrained(out)))
    reloaded = settings(tiny, sums, tmp_path / "again", method=method)
    assert held_out_loss(model, reloaded) == pytest.approx(result.eval_loss, rel=1e-5)


def held_out_loss(model, config) -> float:
    """Held-out loss of a model on a run's held-out rows."""
    from pyfinetune.train.run import prepare_rows, read_data
    from pyfinetune.train.tokenizing import load_tokenizer

    data = read_data(config)
    tokenizer = load_tokenizer(config.model_name_or_path, data_format=data.format)
    rows = prepare_rows(data, tokenizer, config)
    arguments = loop.training_arguments(config, train_rows=len(rows.train), held_out=True)
    trainer = loop.build_trainer(model, arguments, rows.train, rows.held_out, tokenizer=tokenizer, max_length=64)
    return trainer.evaluate()["eval_loss"]


def test_held_out_loss_falls_on_grade_school_maths(tmp_path):
    folder = os.environ.get("PYFINETUNE_TEST_DATA")
    if not folder:
        pytest.skip("PYFINETUNE_TEST_DATA is not set")
    rows = json.loads((Path(folder) / "instruct" / "gsm8k_alpaca.json").read_text())[:96]
    data = tmp_path / "slice.json"
    data.write_text(json.dumps(rows))
    model = save_tiny(tmp_path / "model", chat_template=CHATML)
    result = train(
        settings(
            model,
            str(data),
            tmp_path / "out",
            method="qlora",
            packing=True,
            max_length=512,
            trainer={"max_steps": 24, "learning_rate": 1e-2},
        )
    )
    assert result.eval_loss < result.eval_loss_before - 0.1


def test_the_output_folder_tells_the_whole_story(tiny, sums, tmp_path):
    out = tmp_path / "out"
    result = train(settings(tiny, sums, out, packing=True))
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["seed"] == 42
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["data"]["sha256"]) == len(record["model"]["sha256"]) == 64
    assert record["data"]["train"]["examples"] == 32
    assert record["data"]["held_out"]["examples"] == 8
    assert record["data"]["train"]["rows"] < 32
    assert record["kernels"]["swapped"] == 25
    assert record["result"]["eval_loss"] == result.eval_loss
    lines = records(out)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    assert all("peak_memory_gb" in line for line in lines)
    assert next(line["step"] for line in lines if "eval_loss" in line) == 0
    assert {path.name for path in out.iterdir()} >= {"checkpoint-6", "adapter_model.safetensors", "tokenizer.json"}


def interrupt_at(monkeypatch, step: int, how=lambda: signal.raise_signal(signal.SIGINT)):
    """Deliver a signal, or an error, while the given step is computed."""
    original = loop.RunTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            how()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(loop.RunTrainer, "training_step", training_step)


@pytest.fixture(scope="module")
def straight(tiny, sums, tmp_path_factory):
    """Adapter and records of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight") / "out"
    train(settings(tiny, sums, out, lora_dropout=0.1))
    return load_file(out / "adapter_model.safetensors"), records(out)


def same_as(straight, out) -> None:
    weights, lines = straight
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    again = [(line["step"], line["loss"]) for line in records(out) if "loss" in line]
    assert dict(again) == losses
    assert len(again) == len(losses)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    tiny, sums, tmp_path, straight, monkeypatch, number
):
    out = tmp_path / "out"
    config = settings(tiny, sums, out, lora_dropout=0.1)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: signal.raise_signal(number))
        stopped = train(config)
    assert stopped.interrupted
    assert stopped.steps == 3  # between two regular checkpoints
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert not (out / "adapter_model.safetensors").exists()
    result = train(config)
    assert result.resumed_from == str(out / "checkpoint-3")
    assert result.steps == 6
    assert result.eval_loss_before is not None
    same_as(straight, out)


def test_a_second_ctrl_c_stops_at_once(tiny, sums, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    interrupt_at(monkeypatch, 3, twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny, sums, tmp_path / "out"))
    assert signal.getsignal(signal.SIGINT) is before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def swap(checkpoint: Path, name: str) -> None:
    shutil.copy(checkpoint.with_name("checkpoint-2") / name, checkpoint / name)


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (lambda c: (c / "trainer_state.json").unlink(), "no trainer_state.json"),
        (lambda c: flip_a_bit(c / "adapter_model.safetensors"), "adapter_model.safetensors has changed since it was"),
        (lambda c: cut(c / "optimizer.pt"), "optimizer.pt is cut short"),
        (lambda c: swap(c, "adapter_model.safetensors"), "adapter_model.safetensors is that of checkpoint-2"),
        (lambda c: (c / "extra.bin").touch(), "extra.bin was not there when it was saved"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_the_one_before_it_used(
    tiny, sums, tmp_path, straight, monkeypatch, capsys, damage, flaw
):

    def killed():
        raise RuntimeError("killed")

    out = tmp_path / "out"
    config = settings(tiny, sums, out, lora_dropout=0.1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    assert [step for step, _ in list_checkpoints(out)] == [4, 2]
    damage(out / "checkpoint-4")
    found, skipped = newest_complete(out)
    assert found == out / "checkpoint-2"
    assert flaw in skipped[0]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing a record, too
    result = train(config)
    assert result.resumed_from == str(out / "checkpoint-2")
    assert f"warning: {out / 'checkpoint-4'} is damaged ({flaw}" in capsys.readouterr().err.replace("\n", "")
    same_as(straight, out)


def test_a_run_killed_after_its_last_step_only_has_to_be_saved(tiny, sums, tmp_path, straight, monkeypatch):
    """Named regression: a Trainer that resumes at its last step, in the middle of an epoch, takes one step more."""

    def killed(*args):
        raise RuntimeError("killed")

    out = tmp_path / "out"
    config = settings(tiny, sums, out, lora_dropout=0.1)
    with monkeypatch.context() as patch:
        patch.setattr("pyfinetune.train.run.save_final", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    result = train(config)
    assert (result.steps, result.resumed_from) == (6, str(out / "checkpoint-6"))
    assert result.tokens > 0
    same_as(straight, out)


def test_a_full_disk_leaves_the_checkpoints_before_it(tiny, sums, tmp_path, straight, monkeypatch):
    out = tmp_path / "out"
    config = settings(tiny, sums, out, lora_dropout=0.1)
    seal = loop.checkpoints.seal

    def full(folder, step):
        if step == 4:
            raise OSError(28, "No space left on device")
        seal(folder, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoints, "seal", full)
        with pytest.raises(PyfinetuneError, match="checkpoint-4 could not be written: No space left on device"):
            train(config)
    assert [step for step, _ in list_checkpoints(out)] == [2]
    assert train(config).resumed_from == str(out / "checkpoint-2")
    same_as(straight, out)


def test_records_between_two_saves_are_carried_over(tiny, sums, tmp_path, monkeypatch):
    """A loss that is the mean over steps before and after a stop is the same as without the stop."""
    section = {"logging_steps": 4, "logging_first_step": False}
    train(settings(tiny, sums, tmp_path / "straight", trainer=section))
    config = settings(tiny, sums, tmp_path / "out", trainer=section)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        train(config)
    train(config)
    straight, out = ([r for r in records(tmp_path / name) if "loss" in r] for name in ("straight", "out"))
    assert [r["step"] for r in straight] == [4]
    assert [r["loss"] for r in out] == [r["loss"] for r in straight]


def test_without_a_whole_checkpoint_the_run_starts_anew(tiny, sums, tmp_path, straight, monkeypatch):
    out = tmp_path / "out"
    config = settings(tiny, sums, out, lora_dropout=0.1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        train(config)
    for _, folder in list_checkpoints(out):
        (folder / "trainer_state.json").unlink()
    assert train(config).resumed_from is None
    same_as(straight, out)


def test_a_finished_run_is_left_alone_and_a_changed_one_refused(tiny, sums, tmp_path):
    out = tmp_path / "out"
    first = train(settings(tiny, sums, out))
    stamp = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(settings(tiny, sums, out)) == first
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == stamp

    longer = train(settings(tiny, sums, out, trainer={"max_steps": 8}))
    assert longer.resumed_from == str(out / "checkpoint-6")
    assert longer.steps == 8

    with pytest.raises(UserError, match="holds another run: lora_r was 4 there and is 8 now"):
        train(settings(tiny, sums, out, lora_r=8))
    with pytest.raises(UserError, match=r"a step took 4 rows \(4 x .* there, and takes 2 rows"):
        train(settings(tiny, sums, out, trainer={"per_device_train_batch_size": 2}))
    with pytest.raises(UserError, match="resume is never"):
        train(settings(tiny, sums, out, resume="never"))
    copy = tmp_path / "sums.jsonl"
    copy.write_text(Path(sums).read_text().replace('"4"', '"5"'))
    record = json.loads((out / "run.json").read_text())
    record["config"]["train_file"] = str(copy)
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="on other training data"):
        train(settings(tiny, str(copy), out))
    (out / "run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json"):
        train(settings(tiny, sums, out))
    named = train(settings(tiny, sums, tmp_path / "other", resume=str(out / "checkpoint-6")))
    assert named.resumed_from == str(out / "checkpoint-6")
    with pytest.raises(UserError, match=r"resume: .*nowhere: no such folder"):
        train(settings(tiny, sums, tmp_path / "third", resume=str(tmp_path / "nowhere")))
    cut(out / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(UserError, match=r"not a whole checkpoint: optimizer\.pt is cut short"):
        train(settings(tiny, sums, tmp_path / "third", resume=str(out / "checkpoint-6")))


def test_early_stopping_keeps_the_best_weights(tiny, sums, tmp_path):
    out = tmp_path / "out"
    section = {"max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}  # learns by heart soon
    result = train(
        settings(tiny, sums, out, method="full", early_stopping_patience=2, eval_steps=2, save_steps=2, trainer=section)
    )
    assert result.steps < 60
    held_out = [line["eval_loss"] for line in records(out) if "eval_loss" in line and line["step"] > 0]
    assert min(held_out) < held_out[-2]
    assert result.eval_loss == pytest.approx(min(held_out), rel=1e-6)


def test_activation_checkpointing_gives_the_same_weights(tiny, sums, tmp_path):
    weights = []
    for name, section in (("plain", {}), ("checkpointed", {"activation_checkpointing": True})):
        train(settings(tiny, sums, tmp_path / name, trainer={"max_steps": 2, **section}))
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=1e-4, atol=1e-6)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in weights[0].items())


def test_a_loss_that_is_no_number_stops_the_run(tiny, sums, tmp_path):
    with pytest.raises(PyfinetuneError, match="the loss became nan at step"):
        train(settings(tiny, sums, tmp_path / "out", trainer={"learning_rate": 1e30, "max_grad_norm": 0}))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tiny, sums, tmp_path):
    alone = train(settings(tiny, sums, tmp_path / "alone"))
    both = settings(tiny, sums, tmp_path / "both", trainer={"per_device_train_batch_size": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_digest(both)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyfinetune", "train"]

    def in_two_processes() -> dict:
        done = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "run.yaml"), "--json"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # one process speaks

    together = in_two_processes()
    assert together["steps"] == alone.steps
    assert together["eval_loss_before"] == pytest.approx(alone.eval_loss_before, rel=1e-6)
    assert together["eval_loss"] == pytest.approx(alone.eval_loss, rel=1e-5)
    newest, skipped = newest_complete(tmp_path / "both")
    assert (newest.name, skipped) == ("checkpoint-6", [])
    sealed = json.loads((newest / CHECKSUMS).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= sealed.keys()

    # Its last part again, from the checkpoint that both processes wrote.
    shutil.rmtree(newest)
    record = json.loads((tmp_path / "both" / "run.json").read_text())
    (tmp_path / "both" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    resumed = in_two_processes()
    assert resumed["resumed_from"].endswith("checkpoint-4")
    assert resumed["eval_loss"] == together["eval_loss"]


def test_validation_file_and_raw_text(tiny, tmp_path):
    text, held = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("The quick brown fox.\n" * 20)
    held.write_text("The lazy dog sleeps.\n" * 4)
    config = settings(tiny, str(text), tmp_path / "out", validation_file=str(held), test_size=None, task="pretrain")
    result = train(config)
    assert result.eval_loss < result.eval_loss_before
    with pytest.raises(UserError, match="task: sft does not fit"):
        train(settings(tiny, str(text), tmp_path / "out2", task="sft"))
    with pytest.raises(UserError, match="raw text, which has no completion"):
        train(settings(tiny, str(text), tmp_path / "out2", completion_only_loss=True))


def test_a_model_at_fault_is_named(tiny, sums, tmp_path):
    with pytest.raises(UserError, match="no layer of the model is called 'qproj'") as caught:
        train(settings(tiny, sums, tmp_path / "out", target_modules=["qproj"]))
    assert "q_proj" in caught.value.fix
    with pytest.raises(UserError, match="max_length: 1024 is beyond the 512 positions"):
        train(settings(tiny, sums, tmp_path / "out", max_length=1024))
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        train(settings(str(tmp_path / "nowhere"), sums, tmp_path / "out"))


@pytest.mark.parametrize("case", ["pickle", "no config", "own code", "quantized"])
def test_a_model_folder_that_will_not_do_is_refused(sums, tmp_path, case):
    folder = Path(save_tiny(tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    if case == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        message = "cannot be loaded"
    elif case == "no config":
        (folder / "config.json").unlink()
        message = "is a folder without config.json"
    elif case == "own code":
        config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        message = "cannot be loaded"
    else:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        message = "is already quantized"
    if case in ("own code", "quantized"):
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(UserError, match=message) as caught:
        train(settings(str(folder), sums, tmp_path / "out"))
    assert caught.value.fix
