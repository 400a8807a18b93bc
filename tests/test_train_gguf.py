"""GGUF exports: a converter's file is read back whole, and one with a fault is refused by the name of what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import brief_fixture, save_adapter, save_base  # noqa: F401
from tiny_model import make_tokenizer

from pyfinetune.errors import NotProved, UserError
from pyfinetune.train.export import gguf_file as gguf_export
from pyfinetune.train.export.exporting import Request, export
from pyfinetune.train.export.view import commands

gguf = pytest.importorskip("gguf")

CONVERTER = str(Path(__file__).parent / "llama_converter.py")
pytestmark = pytest.mark.usefixtures("brief")


@pytest.fixture(scope="module", name="adapter")
def adapter_fixture(tmp_path_factory) -> str:
    base = save_base(tmp_path_factory.mktemp("base"))
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(name="in_process")
def in_process_fixture(monkeypatch) -> None:
    """The converter is run in this process, which saves it the seconds that its imports take."""

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        import llama_converter

        assert command[:2] == [sys.executable, CONVERTER]
        monkeypatch.setattr(sys, "argv", command[1:])
        llama_converter.main()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf_export.subprocess, "run", run)


def exported(tmp_path: Path, source: str, kind: str = "f32"):
    request = Request(source, "gguf", str(tmp_path / "out"), converter=CONVERTER, gguf_type=kind, device="cpu")
    return export(request)


def check(result, what: str) -> dict:
    return next(entry for entry in result.checks if what in entry["what"])


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_right_file_is_proved(adapter, tmp_path, kind):
    result = exported(tmp_path, adapter, kind)
    (name,) = result.weights
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([name, "README.md", "export.json"])
    reader = gguf.GGUFReader(tmp_path / "out" / name)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    found = check(result, f"tensors of {name}")
    assert found["tensors"] == len(types)
    assert (found["error_in_steps"] > 0) == (kind == "q8_0")
    assert found["error_in_steps"] < 0.57
    assert check(result, "vocabulary")["chat_template"]
    assert check(result, "loaded by transformers")["error"] < 1e-5
    assert check(result, "agreement")["same_most_likely"] > 0.9
    assert commands(result) == [f"llama-cli -m {tmp_path / 'out' / name}"]
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["weights"][name]["bytes"] == (tmp_path / "out" / name).stat().st_size


@pytest.mark.usefixtures("in_process")
def test_tied_embeddings_are_written_once(tmp_path):
    base = save_base(tmp_path / "base", tied=True)
    result = exported(tmp_path, save_adapter(tmp_path / "adapter", base))
    (name,) = result.weights
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / name).tensors}


FAULTS = {
    "wrong": r"blk.1.ffn_up.weight \(model.layers.1.mlp.up_proj.weight\) is not the merged weight: 1 of 8,192 values",
    "swapped": r"blk.0.ffn_(up|gate).weight .* is not the merged weight: 8,1",
    "unpermuted": r"blk.0.attn_[qk].(weight|bias) .* is not the merged weight",
    "missing": r"blk.1.attn_v.weight \(model.layers.1.self_attn.v_proj.weight\) is missing",
    "extra": r"blk.0.attn_q_norm.weight is there, and the model has no such tensor",
    "theta": r"llama.rope.freq_base is 20000.0, and the model has 10000.0",
    "vocabulary": r"token 70 is ",
    "end": r"tokenizer.ggml.eos_token_id is 1, and the tokenizer's is 0",
    "template": r"tokenizer.chat_template is missing",
    "garbage": r"cannot be read back",
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused(adapter, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("CONVERTER_FAULT", fault)
    with pytest.raises(NotProved, match=FAULTS[fault]):
        exported(tmp_path, adapter, "q8_0" if fault == "swapped" else "f32")
    assert list(tmp_path.iterdir()) == []


def test_what_a_failing_converter_says_is_shown(adapter, tmp_path):
    script = tmp_path / "convert.py"
    for code, match in (
        ("print('INFO: indexing'); raise SystemExit('ValueError: no such architecture')", "no such architecture"),
        ("print('INFO: indexing')", r"wrote no .*F32.gguf; it said\n  \| INFO: indexing"),
    ):
        script.write_text(code)
        with pytest.raises(UserError, match=match):
            export(
                Request(adapter, "gguf", str(tmp_path / "out"), converter=str(script), gguf_type="f32", device="cpu")
            )
        assert list(tmp_path.iterdir()) == [script]


@pytest.mark.slow
def test_the_converter_is_run_as_a_program(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_CONVERTER", CONVERTER)
    result = export(Request(adapter, "gguf", str(tmp_path / "out"), gguf_type="q8_0", device="cpu"))
    assert check(result, "loaded by transformers")["error"] < 1e-5


@pytest.mark.usefixtures("in_process")
def test_biases_are_permuted_too_and_what_transformers_does_not_read_is_said(tmp_path):
    base = save_base(tmp_path / "base", bias=True)
    result = exported(tmp_path, save_adapter(tmp_path / "adapter", base))
    assert check(result, "tensors of adapter-F32.gguf")["tensors"] == 29
    assert "it takes attention_bias to be False, which is True" in result.notes[0]


def test_where_the_converter_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_CONVERTER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="not on PATH") as caught:
        gguf_export.find_converter(None)
    assert "--converter PATH" in caught.value.fix
    with pytest.raises(UserError, match=r"--converter nowhere.py: no such file"):
        gguf_export.find_converter("nowhere.py")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert gguf_export.find_converter(None) == script
    assert gguf_export.find_converter(str(tmp_path)) == script  # llama.cpp's folder will do
    monkeypatch.setenv("LLAMA_CPP_CONVERTER", CONVERTER)
    assert gguf_export.find_converter(None) == Path(CONVERTER)


def test_without_the_package_nothing_is_begun(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf") as caught:
        exported(tmp_path, adapter)
    assert caught.value.fix == "pip install 'pyfinetune[gguf]'"
    assert list(tmp_path.iterdir()) == []


def test_rows_of_q_and_k_go_out_and_back():
    """llama.cpp's order has a head's two halves alternating; back is the inverse."""

    class Text:
        num_attention_heads, num_key_value_heads = 4, 2

        def get_text_config(self):
            return self

    value = torch.arange(32.0)[:, None]
    there = gguf_export._laid_out(value, "model.layers.0.self_attn.q_proj.weight", "llama", Text())
    assert there[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(gguf_export._laid_back(there, "model.layers.0.self_attn.q_proj.weight", "llama", Text()), value)
    bias = gguf_export._laid_out(value[:, 0], "model.layers.0.self_attn.k_proj.bias", "llama", Text())
    assert bias[:4].tolist() == [0, 8, 1, 9]
    same = gguf_export._laid_out(value, "model.layers.0.self_attn.q_proj.weight", "qwen2", Text())
    assert torch.equal(same, value)


def test_scaled_rotary_frequencies_are_held_against_the_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters=rope,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)

    class Stored:
        data = (10000.0 ** -(torch.arange(16.0) / 16) / model.model.rotary_emb.inv_freq).numpy()

    gguf_export._check_frequencies(Path("m.gguf"), Stored, model)
    assert Stored.data[-1] == pytest.approx(8.0)
    Stored.data = Stored.data * 1.001
    with pytest.raises(NotProved, match=r"rope_freqs.weight is .* at \d+"):
        gguf_export._check_frequencies(Path("m.gguf"), Stored, model)


@pytest.mark.usefixtures("in_process")
def test_a_tokenizer_without_a_template_needs_none(tmp_path):
    base = save_base(tmp_path / "base")
    (Path(base) / "chat_template.jinja").unlink()
    make_tokenizer().save_pretrained(base)
    result = exported(tmp_path, save_adapter(tmp_path / "adapter", base))
    assert not check(result, "vocabulary")["chat_template"]
