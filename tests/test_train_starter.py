"""`pyfinetune init`: a dozen lines at most, which check and train as they are."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny_model import CHATML, save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.errors import UserError
from pyfinetune.train.config import load_config, parse_config
from pyfinetune.train.preflight.checks import examine_file
from pyfinetune.train.run import train
from pyfinetune.train.starter import starter_yaml


def write(path, count: int) -> str:
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(count)]
    path.write_text(json.dumps(rows))
    return str(path)


def test_what_init_writes_checks_and_trains(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = starter_yaml(tiny, write(tmp_path / "my data: 1.json", 60))
    assert len(text.splitlines()) <= 12
    (tmp_path / "run.yaml").write_text(text)
    found = examine_file("run.yaml")
    assert found.ok, found.problems
    assert found.counts["train"]["cut_short"] == found.counts["train"]["dropped"] == 0
    config = load_config("run.yaml")
    assert config.max_length == 64
    result = train(config.model_copy(update={"trainer": {**config.trainer, "max_steps": 3}}))
    assert result.steps == 3
    assert (tmp_path / config.output_dir / "adapter_model.safetensors").is_file()


def test_without_arguments_it_names_public_ones():
    text = starter_yaml()
    assert len(text.splitlines()) <= 12
    config = parse_config(yaml.safe_load(text))
    assert (config.dataset_name, config.test_size, config.packing) == ("yahma/alpaca-cleaned", 0.05, True)


def test_it_fits_the_rows(tiny, tmp_path):
    many = yaml.safe_load(starter_yaml(tiny, write(tmp_path / "many.json", 1000)))
    few = yaml.safe_load(starter_yaml(tiny, write(tmp_path / "few.json", 5)))
    assert (many["packing"], many["test_size"], many["trainer"]["num_train_epochs"]) == (True, 0.05, 1)
    assert "packing" not in few
    assert "test_size" not in few
    (tmp_path / "long.json").write_text(json.dumps([{"prompt": "a", "completion": "ab" * 2000}] * 3))
    assert yaml.safe_load(starter_yaml(tiny, str(tmp_path / "long.json")))["max_length"] == 512


def test_a_dataset_by_name_or_folder(tmp_path):
    assert yaml.safe_load(starter_yaml("m", "tatsu-lab/alpaca"))["dataset_name"] == "tatsu-lab/alpaca"
    assert yaml.safe_load(starter_yaml("m", str(tmp_path)))["dataset_name"] == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("no.json", None, "no such file"), ("a.json", "[]", "holds no rows"), ("a.json", '[{"a": 1}]', "no known format")],
)
def test_a_file_that_cannot_be_trained_on_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        starter_yaml("m", str(tmp_path / name))


def test_the_command_prints_the_yaml(tmp_path, monkeypatch, capsys):
    from pyfinetune import cli

    folder = save_tiny(tmp_path / "model", chat_template=CHATML)
    data = write(tmp_path / "a.json", 30)
    monkeypatch.setattr("sys.argv", ["pyfinetune", "init", "--model", folder, "--data", data])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert parse_config(yaml.safe_load(capsys.readouterr().out)).train_file == data
