"""How a Triton kernel's configuration is chosen: by the module's order, by measured.json, by measuring; and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pyfinetune as pf
from pyfinetune.kernels import config as kernel_config
from pyfinetune.kernels.config import Config, choose, chosen, describe, first_fitting, remembered
from pyfinetune.ops._op import REGISTRY, Backend

SMALL = Config({"BLOCK": 64}, num_warps=4, num_stages=2, shared_bytes=10_000)
LARGE = Config({"BLOCK": 128}, num_warps=8, num_stages=3, shared_bytes=150_000)
WIDE = Config({"BLOCK": 128}, num_warps=4, num_stages=3, shared_bytes=90_000)
CONFIGS = [LARGE, WIDE, SMALL]


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(kernel_config, "_remembered", {})
    monkeypatch.setattr(kernel_config, "_measured", dict)


def entry(config, **changes):
    return {
        "kernel": "k",
        "capability": 90,
        "shape_class": "bf16",
        "blocks": config.blocks,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **changes,
    }


def as_table(*entries):
    table = {}
    for made in entries:
        fields = {name: made[name] for name in ("blocks", "num_warps", "num_stages")}
        table[made["kernel"], made["capability"], made["shape_class"]] = fields
    return lambda: table


def on_a_gpu(monkeypatch, milliseconds):
    """As on a GPU, where the configurations take so long."""
    monkeypatch.setenv("PYFINETUNE_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        kernel_config,
        "_fastest",
        lambda configs, launch: min(((c, milliseconds[str(c)]) for c in configs), key=lambda pair: pair[1]),
    )


class TestChoice:
    def test_the_first_that_fits(self):
        assert first_fitting(CONFIGS, 90) == LARGE
        assert first_fitting(CONFIGS, 86) == WIDE
        assert choose("k", "bf16", CONFIGS, 86) == WIDE
        with pytest.raises(ValueError, match="no configuration fits 101376 bytes"):
            choose("k", "bf16", [LARGE], 120)

    def test_what_was_measured_before(self, monkeypatch):
        monkeypatch.setattr(kernel_config, "_measured", as_table(entry(SMALL)))
        assert chosen("k", "bf16", CONFIGS, 90) == (SMALL, "measured before")
        assert choose("k", "bf16", CONFIGS, 100) == LARGE
        assert choose("k", "fp32", CONFIGS, 90) == LARGE
        assert choose("other", "bf16", CONFIGS, 90) == LARGE

    def test_an_old_entry_is_passed_over(self, monkeypatch):
        monkeypatch.setattr(kernel_config, "_measured", as_table(entry(SMALL, blocks={"BLOCK": 32})))
        assert choose("k", "bf16", CONFIGS, 90) == LARGE

    def test_an_entry_that_does_not_fit_is_passed_over(self, monkeypatch):
        monkeypatch.setattr(kernel_config, "_measured", as_table(entry(LARGE, capability=86)))
        assert choose("k", "bf16", CONFIGS, 86) == WIDE


class TestMeasuring:
    def test_only_when_asked(self, monkeypatch):
        on_a_gpu(monkeypatch, dict.fromkeys(map(str, CONFIGS), 1.0) | {str(SMALL): 0.5})
        monkeypatch.delenv("PYFINETUNE_AUTOTUNE")
        assert choose("k", "bf16", CONFIGS, 90, lambda config: None) == LARGE
        assert remembered() == []

    def test_the_fastest_is_remembered(self, monkeypatch):
        on_a_gpu(monkeypatch, dict.fromkeys(map(str, CONFIGS), 1.0) | {str(SMALL): 0.5})
        assert choose("k", "bf16", CONFIGS, 90) == LARGE  # nothing to launch
        assert choose("k", "bf16", CONFIGS, 0, lambda config: None) == LARGE  # no GPU
        assert choose("k", "bf16", CONFIGS, 90, lambda config: None) == SMALL
        monkeypatch.setattr(kernel_config, "_fastest", None)
        assert chosen("k", "bf16", CONFIGS, 90, lambda config: None) == (SMALL, "measured in this process")
        assert choose("k", "bf16", CONFIGS, 90) == SMALL
        assert remembered() == [{**entry(SMALL), "ms": 0.5}]

    def test_at_most_six(self, monkeypatch):
        seen = []
        on_a_gpu(monkeypatch, {})
        monkeypatch.setattr(kernel_config, "_fastest", lambda configs, launch: seen.extend(configs) or (configs[0], 1))
        choose("k", "bf16", [Config({"BLOCK": 2**i}) for i in range(9)], 90, lambda config: None)
        assert len(seen) == 6

    def test_not_while_a_graph_is_captured(self, monkeypatch):
        on_a_gpu(monkeypatch, dict.fromkeys(map(str, CONFIGS), 1.0) | {str(SMALL): 0.5})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose("k", "bf16", CONFIGS, 90, lambda config: None) == LARGE

    def test_what_does_not_run_is_not_the_fastest(self, monkeypatch):
        triton = pytest.importorskip("triton")
        from triton.runtime.errors import OutOfResources

        def do_bench(function, **options):
            config = function()
            return {64: 2.0, 128: 3.0}[config.blocks["BLOCK"]]

        def launch(config):
            if config == LARGE:
                raise OutOfResources(1, 0, "shared memory")
            return config

        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        assert kernel_config._fastest(CONFIGS, launch) == (SMALL, 2.0)


class TestTable:
    def test_the_file_is_read(self, monkeypatch):
        path = Path(kernel_config.__file__).with_name("measured.json")
        table = json.loads(path.read_text(encoding="utf-8"))
        monkeypatch.undo()
        assert len(kernel_config._measured()) == len(table["entries"])
        for made in table["entries"]:
            assert {"kernel", "capability", "shape_class", "blocks", "num_warps", "num_stages"} <= set(made)


def test_explain_tells_the_configuration(monkeypatch):
    op = REGISTRY["dequantize_4bit"]
    backends = [
        Backend("triton", None, lambda *args: None, lambda *args: describe("k", "bf16", CONFIGS, 86)),
        *(backend for backend in op.backends if backend.name != "triton"),
    ]
    monkeypatch.setattr(op, "backends", backends)
    explanation = pf.explain("dequantize_4bit", pf.ops.quantize_4bit(torch.randn(64)))
    text = "k: BLOCK=128 warps=4 stages=3, by the kernel's own order"
    assert {choice.backend: choice.detail for choice in explanation.choices}["triton"] == text
    assert str(explanation).splitlines()[0] == "dequantize_4bit: triton"
    assert f"  triton: chosen ({text})" in str(explanation).splitlines()
