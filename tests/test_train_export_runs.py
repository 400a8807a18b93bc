"""Exports of runs, the command line, and every mistake that a typed error names."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from export_cases import adapter_model, changed_weights, save_adapter, save_base
from safetensors.torch import load_file
from tiny_heads import NAMES, save_encoder, save_encoder_decoder
from tiny_model import make_tokenizer

from pyfinetune import cli
from pyfinetune.errors import UserError
from pyfinetune.train.chat import open_chat
from pyfinetune.train.config import parse_config
from pyfinetune.train.export.exporting import Request, export
from pyfinetune.train.heads.kinds import HEADS
from pyfinetune.train.run import train
from pyfinetune.train.saved import find_saved, load_saved


@pytest.fixture(scope="module", name="base")
def base_fixture(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", name="adapter")
def adapter_fixture(tmp_path_factory, base) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


def settings(base: str, folder: Path, **change) -> dict:
    data = folder / "sums.jsonl"
    if not data.exists():
        rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(5)]
        data.write_text("\n".join(map(json.dumps, rows)))
    section = {"max_steps": 4, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    values = {"model_name_or_path": base, "train_file": str(data), "output_dir": str(folder / "run"), "max_length": 64}
    values |= {"test_size": 10, "lora_r": 4, "device": "cpu", "report": False, "save_steps": 2, "trainer": section}
    return {**values, **change}


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory, base) -> str:
    """A run of QLoRA, begun in its own folder, with paths that are relative to that."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(base, folder / "model")
    here = os.getcwd()
    os.chdir(folder)
    try:
        values = settings("model", Path("."), method="qlora", output_dir="run", train_file="sums.jsonl")
        train(parse_config(values))
    finally:
        os.chdir(here)
    return str(folder / "run")


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyfinetune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def test_a_run_is_compared_on_its_held_out_rows(run, tmp_path):
    result = export(Request(run, output_dir=str(tmp_path / "out"), device="cpu"))
    assert result.rows == "8 of the run's held-out rows"
    saved = find_saved(run)
    assert saved.in_4bit
    assert saved.dtype == "float32"
    assert Path(saved.base).is_dir()
    ids = torch.tensor([[4, 9, 61, 77]])
    with torch.no_grad():
        want = load_saved(saved)(ids).logits
        have = load_saved(find_saved(tmp_path / "out"))(ids).logits
    assert (have - want).norm() < 2e-6 * want.norm()


def test_a_checkpoint_of_a_run_knows_its_run(run, tmp_path):
    saved = find_saved(Path(run) / "checkpoint-2")
    assert saved.in_4bit
    result = export(Request(str(saved.folder), "adapter", str(tmp_path / "out"), device="cpu"))
    assert result.base_in_4bit
    inside = Path(run) / "an adapter"
    export(Request(run, "adapter", str(inside), device="cpu"))
    assert find_saved(run).folder == Path(run)  # one export inside is no second adapter to choose from
    assert find_saved(inside).record is None
    shutil.rmtree(inside)


def test_rows_that_are_gone_are_replaced(run, tmp_path):
    shutil.copytree(Path(run).parent, tmp_path / "moved")
    record = tmp_path / "moved" / "run" / "run.json"
    record.write_text(record.read_text().replace("sums.jsonl", "gone.jsonl"))
    result = export(Request(str(record.parent), output_dir=str(tmp_path / "out"), device="cpu"))
    assert result.rows.startswith("8 fixed texts (the run's data cannot be read: ")
    assert "gone.jsonl" in result.rows


def test_a_full_run_is_copied(base, tmp_path):
    train(parse_config(settings(base, tmp_path, method="full")))
    result = export(Request(str(tmp_path / "run"), dtype="bfloat16", device="cpu"))
    assert result.output_dir == str(tmp_path / "run-merged")
    assert result.dtype == "bfloat16"
    with pytest.raises(UserError, match="is a whole model, without an adapter"):
        export(Request(str(tmp_path / "run"), "adapter"))


def test_a_base_that_changed_since_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    train(parse_config(settings(str(tmp_path / "model"), tmp_path)))
    with changed_weights(tmp_path / "model" / "model.safetensors") as tensors:
        tensors["model.norm.weight"][3] *= 1.5
    with pytest.raises(UserError, match="are not those that it was trained on") as caught:
        export(Request(str(tmp_path / "run"), output_dir=str(tmp_path / "out")))
    assert "--base PATH" in caught.value.fix
    result = export(Request(str(tmp_path / "run"), output_dir=str(tmp_path / "out"), base=base, device="cpu"))
    assert result.source["base"] == base
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match=r"its base model .* is not there"):
        find_saved(tmp_path / "run")


def mistake(name: str, folder: Path, base: str, adapter: str) -> tuple[Request, str, str]:
    """A request with one mistake, what the message says, and what the mend says."""
    out = str(folder / "out")
    if name == "no folder":
        return Request(str(folder / "absent")), "absent: no such folder", "output_dir"
    if name == "empty folder":
        return Request(str(folder)), "holds neither an adapter", "save_pretrained"
    if name == "unfinished run":
        (folder / "checkpoint-3").mkdir()
        (folder / "run.json").write_text(json.dumps({"status": "interrupted", "config": {"method": "lora"}}))
        return Request(str(folder)), "this run is interrupted, and saved no model yet", "checkpoint-3"
    if name == "form":
        return Request(adapter, "onnx", out), "--to onnx: no such choice", "merged-4bit"
    if name == "dtype":
        return Request(adapter, "merged", out, dtype="int8"), "--dtype int8: no such choice", "bfloat16"
    if name == "dtype of an adapter":
        return Request(adapter, "adapter", out, dtype="bfloat16"), "an adapter keeps its type", "leave --dtype out"
    if name == "gguf type":
        return Request(adapter, "gguf", out, gguf_type="q2_k"), "--gguf-type q2_k", "q8_0"
    if name == "place taken":
        (folder / "out").mkdir()
        (folder / "out" / "notes.txt").write_text("mine")
        return Request(adapter, "merged", out), "is not empty, and holds no earlier export", "another folder"
    if name == "place is a file":
        (folder / "out").write_text("mine")
        return Request(adapter, "merged", out), "is a file", "a folder"
    if name == "into itself":
        copy = shutil.copytree(adapter, folder / "adapter")
        return Request(str(copy), "adapter", str(copy)), "is what is exported", "another folder"
    copy = Path(shutil.copytree(adapter, folder / "adapter"))
    config = json.loads((copy / "adapter_config.json").read_text())
    if name == "missing base":
        config["base_model_name_or_path"] = "/nowhere/model"
        text, mend = "its base model /nowhere/model is not there", "--base PATH"
    elif name == "no base named":
        config["base_model_name_or_path"] = None
        text, mend = "names no base model", "--base NAME"
    elif name == "another base":
        other = save_base(folder / "other")
        path = Path(other) / "config.json"
        path.write_text(path.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
        config["base_model_name_or_path"] = other
        text, mend = "this adapter does not fit", "own base model"
    elif name == "pickle":
        (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
        text, mend = "adapter_model.bin is a pickle", "safetensors"
    elif name == "broken JSON":
        (copy / "adapter_config.json").write_text("{")
        return Request(str(copy), "merged", out), "not valid JSON", "anew"
    elif name == "another tokenizer":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"quick brown {i}" for i in range(5)])
        tokenizer.add_tokens(["The", " letter"])
        tokenizer.save_pretrained(copy)
        text, mend = "the tokenizer makes token id 38", "tokenizer that the model was trained with"
    else:
        raise ValueError(name)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return Request(str(copy), "merged", out), text, mend


@pytest.mark.parametrize(
    "name",
    [
        "no folder",
        "empty folder",
        "unfinished run",
        "form",
        "dtype",
        "dtype of an adapter",
        "gguf type",
        "place taken",
        "place is a file",
        "into itself",
        "missing base",
        "no base named",
        "another base",
        "pickle",
        "broken JSON",
        "another tokenizer",
    ],
)
def test_mistakes_are_named_with_their_mend(base, adapter, tmp_path, name):
    request, text, mend = mistake(name, tmp_path, base, adapter)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        export(request)
    assert text in caught.value.message
    assert mend in caught.value.fix
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_says_what_was_proved_and_how_to_use_it(adapter, tmp_path, monkeypatch, capsys):
    out = tmp_path / "an export"
    assert call(monkeypatch, "export", adapter, "--to", "merged", "--output-dir", str(out), "--device", "cpu") == 0
    text, steps = capsys.readouterr()
    assert f"exported: {out} (merged: float32), " in text
    assert "exact logits of the model merged in float64 off by at most" in text
    assert f"pyfinetune chat '{out}'" in text
    assert f"transformers serve '{out}'" in text
    assert "merging in float64" in steps
    assert call(monkeypatch, "export", adapter, "--to", "merged-4bit", "--output-dir", str(out), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["to"] == "merged-4bit"
    assert record["commands"][1].endswith("# pip install 'transformers[serving]' bitsandbytes")


def test_the_command_line_exits_1_when_it_is_not_the_model_and_2_for_a_mistake(adapter, tmp_path, monkeypatch, capsys):
    from pyfinetune.train.export import files as export_files

    write = export_files.write_model

    def wrong(stage, *rest):
        write(stage, *rest)
        with changed_weights(stage / "model.safetensors") as tensors:
            tensors["model.layers.0.self_attn.o_proj.weight"][2, 2] += 1

    monkeypatch.setattr(export_files, "write_model", wrong)
    out = tmp_path / "out"
    assert call(monkeypatch, "export", adapter, "--output-dir", str(out)) == 1
    assert "error: the merged model: model.layers.0.self_attn.o_proj.weight differs" in capsys.readouterr().err
    assert not out.exists()
    assert call(monkeypatch, "export", str(tmp_path / "absent")) == 2
    assert "absent: no such folder\n  fix: " in capsys.readouterr().err


def test_a_model_without_room_for_float64_is_proved_in_16_bit_only(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("pyfinetune.train.export.proof.double_fits", lambda model: False)
    with pytest.raises(UserError, match="no memory for a float64 copy"):
        export(Request(adapter, output_dir=str(tmp_path / "out"), device="cpu"))
    result = export(Request(adapter, output_dir=str(tmp_path / "out"), dtype="bfloat16", device="cpu"))
    assert any("against float32" in check["what"] for check in result.checks)


def test_a_record_of_several_sources_is_found_from_any_folder(tmp_path, monkeypatch):
    """Paths below `sources`, by column and in lists come along when a run is repeated or exported from elsewhere."""
    from pyfinetune.train.repeat import config_of

    for name in ("a.jsonl", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    values = {"model_name_or_path": "m", "output_dir": "o"}
    values["sources"] = [{"train_file": "a.jsonl"}, {"train_file": {"source": "b.txt", "target": "c.txt"}}]
    monkeypatch.chdir("/")
    config = config_of({"working_directory": str(tmp_path), "config": values}, "run.json")
    assert config.sources[0].train_file == str(tmp_path / "a.jsonl")
    assert config.sources[1].train_file == {"source": str(tmp_path / "b.txt"), "target": str(tmp_path / "c.txt")}


def test_an_adapter_model_is_the_one_in_memory(base, adapter):
    ids = torch.tensor([[4, 9, 61, 77]])
    with torch.no_grad():
        assert torch.equal(load_saved(find_saved(adapter))(ids).logits, adapter_model(base)(ids).logits)


@pytest.mark.parametrize(
    ("head", "method"),
    [
        ("sequence_classification", "lora"),
        ("sequence_classification", "qlora"),
        ("token_classification", "lora"),
        ("question_answering", "lora"),
        ("masked_lm", "lora"),
        ("seq2seq_lm", "lora"),
        ("sequence_classification", "full"),
    ],
)
def test_runs_with_heads(tmp_path, head, method):
    """Every head is exported with the names of its classes, and computes what was trained."""
    import transformers

    model = (save_encoder_decoder if head == "seq2seq_lm" else save_encoder)(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in head_rows(head)))
    values = settings(
        model, tmp_path, train_file=str(data), method=method, head=head, test_size=None, max_length=48, doc_stride=8
    )
    train(parse_config(values))
    result = export(Request(str(tmp_path / "run"), device="cpu"))
    assert result.rows == "6 of the run's training rows"
    kind = getattr(transformers, HEADS[head].auto_class)
    again = kind.from_pretrained(tmp_path / "run-merged")
    if "classification" in head:
        labels = json.loads((tmp_path / "run" / "run.json").read_text())["head"]["labels"]
        assert again.config.id2label == dict(enumerate(labels))
    if method != "full":
        copied = export(Request(str(tmp_path / "run"), "adapter", device="cpu"))
        assert copied.base_in_4bit is (method == "qlora")
        assert load_saved(find_saved(copied.output_dir)).config.num_labels == again.config.num_labels
    with pytest.raises(UserError, match=r"gives no text") if head != "seq2seq_lm" else contextlib.nullcontext():
        open_chat(tmp_path / "run-merged", "cpu", max_new_tokens=4).ask("who ran home ?", lambda piece: None)


def head_rows(head: str) -> list[dict]:
    """Six rows that differ in a name."""
    if head == "token_classification":
        return [{"tokens": ["then", name, "ran"], "tags": ["O", "B-person", "O"]} for name in NAMES]
    if head == "question_answering":
        return [{"question": "who ran ?", "context": f"then {n} ran home", "answers": {"text": [n]}} for n in NAMES]
    if head == "seq2seq_lm":
        return [{"source": f"hund katze {name}", "target": f"dog cat {name}"} for name in NAMES]
    texts = [{"text": f"a film that {name} saw .", "label": ("neg", "pos")[i % 2]} for i, name in enumerate(NAMES)]
    return [{"text": row["text"]} for row in texts] if head == "masked_lm" else texts


def test_layers_that_are_read_to_float32(tmp_path):
    """T5 keeps some weights in float32 when it is read in float16; its file has them in float16 all the same."""
    model = save_encoder_decoder(tmp_path / "model")
    result = export(Request(model, output_dir=str(tmp_path / "out"), dtype="float16", device="cpu"))
    assert result.dtype == "float16"
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
