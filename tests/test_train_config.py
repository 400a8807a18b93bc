"""The YAML file: what is accepted, and that each mistake is an error naming the key and its mend."""

from __future__ import annotations

import pytest

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig, config_digest, load_config, parse_config

BASE = {"model_name_or_path": "m", "train_file": "a.json", "output_dir": "out"}


def test_a_short_file_is_enough(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ntrain_file: a.json\noutput_dir: out\ntrainer:\n  learning_rate: 2e-4\n")
    config = load_config(path)
    assert config.method == "lora"
    assert config.train_files == ["a.json"]
    assert config.validation_files == []
    assert config.trainer["learning_rate"] == pytest.approx(2e-4)  # a number although YAML 1.1 reads a string


def test_several_files_and_an_empty_trainer_section():
    config = parse_config({**BASE, "train_file": ["a.json", "b.json"], "trainer": None})
    assert config.train_files == ["a.json", "b.json"]
    assert config.trainer == {}


def test_digest_is_plain_json_and_complete():
    digest = config_digest(parse_config(BASE))
    assert set(digest) == set(RunConfig.model_fields)
    assert digest["seed"] == 42


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"max_lenght": 5}, "unknown key 'max_lenght'", "max_length"),
        ({"learning_rate": 1e-4}, "unknown key 'learning_rate'", "trainer:"),
        ({"zzzzzzzzz": 1}, "unknown key 'zzzzzzzzz'", "known keys are"),
        ({"method": "lara"}, "method: 'lara' is not available", "lora, rslora, dora, qlora, full"),
        ({"method": ["lora"]}, "method:", "lora, rslora, dora, qlora, full"),
        ({"max_length": 0}, "max_length: 0", "max_length"),
        ({"max_length": "long"}, "max_length: 'long'", "max_length"),
        ({"lora_dropout": 1.5}, "lora_dropout: 1.5", "lora_dropout"),
        ({"test_size": 1.5}, "test_size is 1.5", "edit"),
        ({"test_size": -1}, "test_size: -1", "test_size"),
        ({"test_size": 0.1, "validation_file": "b.json"}, "not both", "edit"),
        ({"train_file": None}, "exactly one of train_file", "edit"),
        ({"dataset_name": "d"}, "exactly one of train_file", "edit"),
        ({"dataset_config_name": "d"}, "dataset_config_name belongs to dataset_name", "edit"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs held-out rows", "edit"),
        ({"eval_steps": 2}, "eval_steps needs held-out rows", "edit"),
        ({"device": "tpu"}, "device: 'tpu'", "device"),
        ({"trainer": {"learning_rat": 1}}, "trainer: learning_rat is not", "did you mean learning_rate?"),
        ({"trainer": {"seed": 1}}, "trainer: seed has a key of its own", "top-level key seed"),
        ({"trainer": {"resume_from_checkpoint": "x"}}, "has a key of its own", "resume"),
        ({"trainer": {"packing": True}}, "trainer: packing is not", "move packing out"),
        ({"trainer": {"learning_rate": "fast"}}, "learning_rate: 'fast' is not a number", "5e-05"),
        ({"trainer": {"max_steps": None}}, "max_steps: None is not a number", "-1"),
        ({"trainer": {"bf16": "on"}}, "bf16: 'on' is not a truth value", "False"),
        ({"trainer": 5}, "trainer: 5", "trainer"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_mend(change, message, fix):
    with pytest.raises(UserError) as caught:
        parse_config({**BASE, **change}, source="run.yaml")
    assert "run.yaml" in caught.value.message
    assert message in caught.value.message
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"sources": [{"trian_file": "a"}]}, "sources: entry 1: unknown key 'trian_file'", "did you mean train_file?"),
        ({"sources": [{"train_file": "a"}, {}]}, "sources: entry 2: give exactly one of train_file", "edit run.yaml"),
        ({"sources": [{"train_file": "a", "weight": -1}]}, "sources: entry 1: weight: -1 will not do", "weight"),
        ({"sources": []}, "sources: [] will not do", "sources"),
        (
            {"sources": [{"train_file": "a"}], "columns": {"a": "b"}},
            "columns stands inside each of the sources",
            "edit",
        ),
        ({"sources": [{"train_file": "a"}], "train_file": "b"}, "exactly one of train_file, dataset_name", "edit"),
        ({"train_file": "a", "replay": {"train_file": "b"}}, "replay: share is missing", "share: ..."),
        (
            {"train_file": "a", "replay": {"train_file": "b", "share": 1}},
            "replay: share: 1 will not do",
            "replay: share",
        ),
        (
            {"train_file": "a", "replay": {"train_file": "b", "share": 0.1, "validation_file": "c"}},
            "trained on only",
            "edit",
        ),
        ({"train_file": "a", "clean": "leek"}, "clean: entry 1: 'leek' will not do", "clean"),
        ({"train_file": 5}, "train_file: 5 will not do", "correct the value of train_file"),
        ({"train_file": "a", "task": "sentiment"}, "task: 'sentiment' will not do", "task"),
        ({"train_file": "a", "group_column": "g"}, "group_column says how rows are parted", "edit"),
        ({"train_file": "a", "test_file": "b", "test_size": 0.1}, "give test_file or test_size, not both", "edit"),
        (
            {"train_file": "a", "validation_file": "b", "validation_size": 1},
            "validation_file or validation_size",
            "edit",
        ),
        ({"train_file": "a", "validation_size": 1.5}, "validation_size is 1.5", "edit"),
        ({"train_file": "a", "dataset_test_split": "test"}, "dataset_test_split belongs to dataset_name", "edit"),
    ],
)
def test_a_wrong_source_is_named_with_its_mend(change, message, fix):
    with pytest.raises(UserError) as caught:
        parse_config({"model_name_or_path": "m", "output_dir": "o", **change}, source="run.yaml")
    assert caught.value.message.startswith("run.yaml: ")
    assert message in caught.value.message
    assert fix in caught.value.fix


def test_what_is_recorded_can_be_read_again():
    sources = [{"train_file": {"source": "a", "target": "b"}, "weight": 2}, {"dataset_name": "d", "task": "sft"}]
    replay = {"train_file": ["c", "d"], "share": 0.1}
    base = {key: value for key, value in BASE.items() if key != "train_file"}
    config = parse_config({**base, "sources": sources, "replay": replay, "clean": "all", "test_size": 0.1})
    assert parse_config(config_digest(config)) == config
    assert [source.label for source in config.origins] == ["a, b", "d"]


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="output_dir is missing"):
        parse_config({"model_name_or_path": "m", "train_file": "a.json"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: key 'seed' is given twice"),
        ("- a\n- b\n", "holds list, not keys and values"),
        ("", "holds NoneType"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no-such\.yaml: no such file"):
        load_config(tmp_path / "no-such.yaml")
