"""The same run in one process and in two: equal losses, weights, tokens and records, and checkpoints that change hands.

Two processes are started once, over gloo on the CPU; they make all of the runs that the tests look at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import make_model, tiny_fixture  # noqa: F401
from train_processes import stopped_at

from pyfinetune.errors import UserError
from pyfinetune.train import checkpoints, manifest, processes
from pyfinetune.train.config import parse_config
from pyfinetune.train.data.packing import IGNORED, RowDataset, collate
from pyfinetune.train.processes import Batch, FilledUp, batch_of, check_sharding, fill_up
from pyfinetune.train.run import train

EPS = torch.finfo(torch.float32).eps
STEPS = 8  # thirteen rows, four a step, twice
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
IN_PIECES = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
CHANGES = {
    "lora": {"method": "lora"},
    "packed": {"method": "lora", "packing": True, "max_length": 32},
    "qlora": {"method": "qlora"},
    "full": {"method": "full", "trainer": {"learning_rate": 0.05}},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 3},
    "half": {"method": "full", "freeze": "half", "freeze_every": 3, "trainer": {"learning_rate": 0.05}},
}
SHARDED = {
    "fsdp lora": ("lora", FSDP),
    "fsdp full": ("full", FSDP),
    "fsdp full in pieces": ("full", IN_PIECES),
    "fsdp lora in pieces": ("lora", IN_PIECES),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[str, str]:
    """Thirteen training rows and five held-out ones: neither is a multiple of anything."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"{a}+{b}=" * (1 + (a + b) % 4), "completion": str(a + b)} for a in range(6) for b in range(3)]
    for name, part in (("train", rows[:13]), ("held", rows[13:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return str(folder / "train.jsonl"), str(folder / "held.jsonl")


def values(tiny: str, data: tuple[str, str], out: Path, name: str = "lora", **change) -> dict:
    """A run of eight steps of four rows, by whatever number of processes."""
    base = {"model_name_or_path": tiny, "train_file": data[0], "validation_file": data[1], "output_dir": str(out)}
    base |= {"max_length": 64, "lora_r": 4, "save_steps": 3, "eval_steps": 4, "device": "cpu", "report": False}
    # With so large an epsilon AdamW's step is a mean gradient and not its sign, in which rounding errors would count.
    section = {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 0.5, "num_train_epochs": 2}
    section |= {"per_device_train_batch_size": 2}
    section |= {"per_device_eval_batch_size": 2, "max_grad_norm": 1.0, "save_total_limit": 9}
    given = CHANGES.get(name, {}) | change
    section |= CHANGES.get(name, {}).get("trainer", {}) | change.get("trainer", {})
    return {**base, "global_batch_size": 4, **given, "trainer": section}


def records(out: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights_of(out: str | Path) -> dict[str, torch.Tensor]:
    (path,) = (p for p in (Path(out) / n for n in ("model.safetensors", "adapter_model.safetensors")) if p.is_file())
    return load_file(path)


def assert_same_run(ours: str | Path, theirs: str | Path, steps: int = STEPS) -> None:
    """Losses and weights, but for what float32 loses when sums are added up in another order.

    Each step rounds every weight once, and a gradient's sum over rows a few times: some last places a step. A loss is a
    mean of numbers near 6, and moves with the weights.
    """
    a, b = (records(out) for out in (ours, theirs))
    for key in ("loss", "eval_loss", "grad_norm"):
        x, y = ({r["step"]: r[key] for r in part if key in r} for part in (a, b))
        assert x.keys() == y.keys(), key
        assert x, key
        for step in x:
            assert x[step] == pytest.approx(y[step], rel=16 * EPS * (step + 1)), (key, step)
    x, y = weights_of(ours), weights_of(theirs)
    assert x.keys() == y.keys()
    for name in x:
        allowed = 16 * EPS * steps * max(1e-2, y[name].abs().max().item())
        assert (x[name] - y[name]).abs().max().item() <= allowed, name


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of all runs, and what each of two processes says of those it took part in.

    `NAME-one` is a run in this process, `NAME-two` in the two; `-resumed` went on from the other's checkpoint.
    """
    folder = tmp_path_factory.mktemp("runs")
    for name in CHANGES:
        train(parse_config(values(tiny, data, folder / f"{name}-one", name)))
    entries = [{"name": name, "config": values(tiny, data, folder / f"{name}-two", name)} for name in CHANGES]
    for name in ("lora", "full", "half"):
        config = values(tiny, data, folder / f"{name}-two-resumed", name)
        entries.append({"name": f"{name} resumed", "config": config, "copy": [str(folder / f"{name}-one"), 3]})
    plain = values(tiny, data, folder / "silent", global_batch_size=None)
    train(parse_config(plain))
    entries.append(
        {"name": "silent", "config": plain | {"output_dir": str(folder / "s2")}, "copy": [str(folder / "silent"), 3]}
    )
    entries.append({"name": "odd", "config": values(tiny, data, folder / "odd", global_batch_size=5)})
    for name, (kind, section) in SHARDED.items():
        entries.append({"name": name, "config": values(tiny, data, folder / f"{name}-two", kind, trainer=section)})
    for name in ("fsdp lora", "fsdp full", "fsdp full in pieces"):
        kind, section = SHARDED[name]
        config = values(tiny, data, folder / f"{name}-resumed", kind, trainer=section)
        entries.append({"name": f"{name} resumed", "config": config, "copy": [str(folder / f"{name}-two"), 3]})
    config = values(tiny, data, folder / "mixed", trainer=FSDP)
    entries.append({"name": "mixed", "config": config, "copy": [str(folder / "lora-two"), 3]})
    for name in ("prompt", "qlora"):
        config = values(tiny, data, folder / f"{name}-fsdp", name, trainer=FSDP)
        entries.append({"name": f"{name} under fsdp", "config": config})
    (folder / "runs.json").write_text(json.dumps(entries))
    here = Path(__file__).parent
    launched(folder, [str(here / "train_processes.py"), str(folder)])
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")


def launched(folder: Path, command: list[str], by: tuple[str, ...] = TORCHRUN, code: int = 0):
    """What a launcher of two processes has printed."""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", *by, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=folder,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr[-6000:]
    return done


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("name", CHANGES)
    def test_they_take_the_steps_of_one(self, runs, name):
        folder, found = runs
        assert "error" not in found[0][name], found[0][name]
        assert_same_run(folder / f"{name}-two", folder / f"{name}-one")
        one = json.loads((folder / f"{name}-one" / "run.json").read_text())
        two = json.loads((folder / f"{name}-two" / "run.json").read_text())
        assert (one["world_size"], two["world_size"]) == (1, 2)
        assert one["batch"] == {"rows": 4, "per_device": 2, "accumulation": 2, "processes": 1}
        assert two["batch"] == {"rows": 4, "per_device": 2, "accumulation": 1, "processes": 2}
        assert one["result"]["tokens"] == two["result"]["tokens"] == found[1][name]["tokens"]
        assert one["result"]["steps"] == two["result"]["steps"]

    @pytest.mark.parametrize("name", CHANGES)
    def test_one_of_them_writes(self, runs, name):
        """As many records as one process makes, none of them twice."""
        folder, _ = runs
        one, two = (records(folder / f"{name}-{which}") for which in ("one", "two"))
        assert [sorted(record) for record in two] == [sorted(record) for record in one]
        assert [record["step"] for record in two] == [record["step"] for record in one]

    def test_a_checkpoint_goes_from_one_process_to_two_and_back(self, runs, tiny, data, tmp_path):
        folder, found = runs
        for name in ("lora", "full", "half"):
            assert found[0][f"{name} resumed"]["resumed_from"].endswith("checkpoint-3")
            assert_same_run(folder / f"{name}-two-resumed", folder / f"{name}-one")
            out = tmp_path / name
            stopped_at(folder / f"{name}-two", 3, out)
            assert not (out / "checkpoint-3" / "rng_state.pth").exists()
            assert train(parse_config(values(tiny, data, out, name))).resumed_from.endswith("checkpoint-3")
            assert_same_run(out, folder / f"{name}-one")

    def test_a_step_of_other_rows_is_refused(self, runs):
        """Without a global batch size, twice as many processes would take twice as many rows a step."""
        _, found = runs
        for rank in found:
            assert (
                "a step took 2 rows (2 x accumulation 1 x 1 processes) there, and takes 4 rows"
                in rank["silent"]["error"]
            )
            assert "set global_batch_size: 2" in rank["silent"]["error"]
            assert "global_batch_size: 5 rows cannot be shared among 2 processes" in rank["odd"]["error"]


@pytest.mark.slow
class TestSharded:
    """FSDP2, over gloo on the CPU."""

    @pytest.mark.parametrize("name", SHARDED)
    def test_they_take_the_steps_of_one(self, runs, name):
        folder, found = runs
        assert "error" not in found[0][name], found[0][name]
        assert_same_run(folder / f"{name}-two", folder / f"{SHARDED[name][0]}-one")

    @pytest.mark.parametrize("name", SHARDED)
    def test_every_processs_part_of_a_checkpoint_is_sealed(self, runs, name):
        checkpoint = runs[0] / f"{name}-two" / "checkpoint-3"
        assert checkpoints.find_flaw(checkpoint, 3) is None
        sealed = json.loads((checkpoint / checkpoints.CHECKSUMS).read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= sealed.keys()
        if "pieces" in name:
            for part in ("pytorch_model_fsdp_0", "optimizer_0"):
                assert {f"{part}/.metadata", f"{part}/__0_0.distcp", f"{part}/__1_0.distcp"} <= sealed.keys()

    @pytest.mark.parametrize("name", ["fsdp lora", "fsdp full", "fsdp full in pieces"])
    def test_a_stop_changes_nothing(self, runs, name):
        folder, found = runs
        assert "error" not in found[0][f"{name} resumed"], found[0][f"{name} resumed"]
        assert found[0][f"{name} resumed"]["resumed_from"].endswith("checkpoint-3")
        assert_same_run(folder / f"{name}-resumed", folder / f"{name}-two")

    def test_what_is_saved_loads(self, runs, tiny):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder, _ = runs
        for name in ("fsdp full", "fsdp full in pieces"):
            assert AutoModelForCausalLM.from_pretrained(folder / f"{name}-two").config.architectures == [
                "LlamaForCausalLM"
            ]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "fsdp lora-two")
        assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)

    def test_the_two_ways_of_checkpoints_are_kept_apart(self, runs, tiny, data, tmp_path):
        folder, found = runs
        assert "was written without FSDP" in found[0]["mixed"]["error"]
        stopped_at(folder / "fsdp lora-two", 3, tmp_path / "out")
        record = json.loads((tmp_path / "out" / "run.json").read_text())
        del record["config"]["trainer"]["fsdp"]
        (tmp_path / "out" / "run.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="was written under FSDP"):
            train(parse_config(values(tiny, data, tmp_path / "out")))
        for name in ("prompt", "qlora"):
            assert "cannot run under FSDP" in found[1][f"{name} under fsdp"]["error"]


@pytest.mark.slow
class TestCommandLine:
    def test_one_process_speaks(self, tiny, data, tmp_path):
        run = values(tiny, data, tmp_path / "out", trainer={"num_train_epochs": 1})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        done = launched(tmp_path, ["-m", "pyfinetune", "train", "run.yaml", "--json"])
        assert json.loads(done.stdout)["steps"] == 4
        assert done.stderr.count("a step takes 4 rows (2 x accumulation 1 x 2 processes)") == 1
        for command in (["check", "run.yaml"], ["plan", "run.yaml", "--quick", "--gpu", "0"]):
            done = launched(tmp_path, ["-m", "pyfinetune", *command, "--json"])
            json.loads(done.stdout)

    @pytest.mark.parametrize("options", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version=2"]])
    def test_accelerates_launcher_takes_the_same_steps(self, tiny, data, tmp_path, options):
        change = {"trainer": {"num_train_epochs": 1}}
        train(parse_config(values(tiny, data, tmp_path / "one", **change)))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values(tiny, data, tmp_path / "two", **change)))
        wrap = ["--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"] if "--use_fsdp" in options else []
        by = (*ACCELERATE, "--dynamo_backend=no", *options, *wrap)
        done = launched(tmp_path, ["-m", "pyfinetune", "train", "run.yaml", "--json"], by)
        assert json.loads(done.stdout)["steps"] == 4
        assert_same_run(tmp_path / "two", tmp_path / "one")
        sealed = json.loads((tmp_path / "two" / "checkpoint-3" / checkpoints.CHECKSUMS).read_text())["files"]
        assert any(name.startswith("pytorch_model_fsdp") for name in sealed) == bool(wrap)

    def test_a_mistake_is_said_once(self, tiny, data, tmp_path):
        missing = str(tmp_path / "none.jsonl")
        for change, message in (
            ({"target_modules": ["nope"]}, "error: target_modules: no layer of the model is called 'nope'"),
            ({"train_file": missing}, f"error: {missing}: no such file"),
        ):
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(values(tiny, data, tmp_path / "out", **change)))
            done = launched(tmp_path, ["-m", "pyfinetune", "train", "run.yaml"], code=2)
            assert done.stderr.count(message) == done.stderr.count("error: ") == 1, done.stderr


class TestRowsAndBatches:
    """What makes the above true, in one process."""

    def config(self, tmp_path, **change):
        return parse_config({"model_name_or_path": "m", "train_file": "a.json", "output_dir": str(tmp_path), **change})

    @pytest.mark.parametrize(
        ("total", "per_device", "world", "expected"),
        [
            (8, 2, 1, Batch(2, 4, 1)),
            (8, 2, 2, Batch(2, 2, 2)),
            (8, 2, 4, Batch(2, 1, 4)),
            (8, None, 1, Batch(8, 1, 1)),
            (24, None, 2, Batch(6, 2, 2)),
            (None, 3, 2, Batch(3, 1, 2)),
            (None, None, 1, Batch(8, 1, 1)),
        ],
    )
    def test_the_batch_in_any_number_of_processes(self, tmp_path, monkeypatch, total, per_device, world, expected):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        section = {} if per_device is None else {"per_device_train_batch_size": per_device}
        found = batch_of(self.config(tmp_path, global_batch_size=total, trainer=section))
        assert found == expected
        assert Batch.of(found.to_dict()) == found
        assert total in (None, found.rows)

    @pytest.mark.parametrize(
        ("total", "per_device", "world", "fix"),
        [
            (8, 2, 3, "start 1, 2, 4 processes, or set a multiple of 6"),
            (2, None, 4, "start 1, 2 processes, or set a multiple of 4"),
            (6, 4, 1, "or set a multiple of 4"),
        ],
    )
    def test_a_batch_that_cannot_be_shared(self, tmp_path, monkeypatch, total, per_device, world, fix):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        section = {} if per_device is None else {"per_device_train_batch_size": per_device}
        with pytest.raises(UserError, match=f"global_batch_size: {total} rows cannot be shared") as caught:
            batch_of(self.config(tmp_path, global_batch_size=total, trainer=section))
        assert fix in caught.value.fix

    def test_one_key_says_it(self, tmp_path):
        with pytest.raises(UserError, match="give global_batch_size or trainer: gradient_accumulation_steps, not both"):
            self.config(tmp_path, global_batch_size=8, trainer={"gradient_accumulation_steps": 2})

    def test_rows_are_filled_up_and_none_comes_twice(self):
        from accelerate.data_loader import BatchSamplerShard, DataLoaderShard

        for count in (0, 1, 7, 8, 9, 13):
            seen = []
            for rank in (0, 1):
                batches = torch.utils.data.BatchSampler(range(count), 4, drop_last=False)
                shard = BatchSamplerShard(batches, 2, rank)
                loader = fill_up(DataLoaderShard(list(range(count + 1)), batch_sampler=shard), count, 2)
                parts = [batch.tolist() for batch in loader]
                assert all(len(part) == 4 for part in parts)
                assert len(parts) == -(-count // 8)
                seen += [row for part in parts for row in part]
            assert sorted(row for row in seen if row < count) == list(range(count))

    def test_the_epoch_is_passed_on(self):
        class Order(list):
            def set_epoch(self, epoch):
                self.epoch = epoch

        order = Order([2, 0, 1])
        filled = FilledUp(order, 4, 3)
        filled.set_epoch(5)
        assert order.epoch == 5
        assert list(filled) == [2, 0, 1, 3]
        FilledUp(range(3), 4, 3).set_epoch(5)

    @pytest.mark.parametrize("flat", [False, True])
    def test_an_empty_row_adds_nothing(self, flat):
        rows = RowDataset([[]])
        assert (len(rows), rows[1]) == (1, ())
        batch = collate([()], pad_token_id=7, max_length=16, flat=flat)
        assert batch["num_tokens"] == 0
        assert batch["labels"].eq(IGNORED).all()
        assert batch["input_ids"].eq(7).all()
        model = make_model()
        batch.pop("num_tokens")
        loss = model(**batch, num_items_in_batch=torch.tensor(3)).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    def test_a_sharded_run_that_cannot_be_one(self, tmp_path, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with pytest.raises(UserError, match="spreads a model over processes, and this is one alone") as caught:
            check_sharding(self.config(tmp_path, trainer=FSDP))
        assert "torchrun --nproc-per-node 2 -m pyfinetune train run.yaml" in caught.value.fix
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UserError, match="method: prefix_tuning cannot run under FSDP"):
            check_sharding(self.config(tmp_path, method="prefix_tuning"))
        with pytest.raises(UserError, match="freeze: gradual cannot run under FSDP"):
            check_sharding(self.config(tmp_path, freeze="gradual"))
        check_sharding(self.config(tmp_path))
        assert processes.shards_weights(self.config(tmp_path))

    def test_a_record_from_before_a_key_goes_on(self, tmp_path):
        now = self.config(tmp_path).model_dump(mode="json")
        was = {key: value for key, value in now.items() if key not in ("use_dora", "num_virtual_tokens", "dropout")}
        manifest.check_same_run({"config": was}, now, "", "out")
        with pytest.raises(UserError, match="use_dora was False there and is True now"):
            manifest.check_same_run({"config": was}, now | {"use_dora": True}, "", "out")
