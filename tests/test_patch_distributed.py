"""`patch` and several processes: DDP and FSDP over gloo give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import exact_run, make, run, with_lora
from peft_models import assert_close
from trainer_runs import batch_of, rows, trained

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("two")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(here / "two_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module", params=["full", "lora"])
def expected(request) -> tuple[str, dict, dict]:
    """The same batch in one process, unpatched, and in float64."""
    model = with_lora(make("Qwen2")) if request.param == "lora" else make("Qwen2")
    batch = batch_of(rows(4))
    return request.param, *(without(part(model, batch), "logits") for part in (run, exact_run))


def without(part: dict, key: str) -> dict:
    return {name: value for name, value in part.items() if name != key}


def assert_right(step: dict, eager: dict, exact: dict, dtype: torch.dtype = torch.float32) -> None:
    assert_close(without(step, "lazy"), eager, exact, dtype)


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if key != "lazy")


def test_data_parallel(found, expected):
    method, eager, exact = expected
    for rank in found:
        for name in {"full": ("ddp full", "ddp static"), "lora": ("ddp lora", "ddp unused")}[method]:
            for step in ("patched", "undone"):
                assert_right(rank[name][step], eager, exact)
            assert same_bits(rank[name]["patched"], rank[name]["patched again"])
            assert rank[name]["patched"]["lazy"]
            assert not rank[name]["undone"]["lazy"]
            assert same_bits(rank[name]["patched"], found[0][name]["patched"])


def test_patched_inside_of_the_wrapper(found):
    assert all(same_bits(rank["ddp first"]["patched"], rank["ddp full"]["patched"]) for rank in found)


def test_a_trainer_in_two_processes(found, tmp_path):
    """Four rows in each are eight in one."""
    for method in ("full", "lora"):
        results = []
        for exact in (False, True):
            model = with_lora(make("Qwen2")) if method == "lora" else make("Qwen2")
            options = {"per_device_train_batch_size": 8, "max_steps": 3, "dataset": rows(24)}
            results.append(without(trained(model, tmp_path, exact, **options)[0], "losses"))
        eager, exact = results
        ours, plain = (found[0][f"trainer {method} {kind}"] for kind in ("patched", "plain"))
        assert same_bits(without(ours, "losses"), without(found[1][f"trainer {method} patched"], "losses"))
        # Losses are float32, rounded once more by each process that takes part in the mean.
        torch.testing.assert_close(ours["losses"], plain["losses"], rtol=4 * torch.finfo(torch.float32).eps, atol=0.0)
        for part in (ours, plain):
            assert_close(without(part, "losses"), eager, exact, torch.float32)


def test_sharded(found):
    model, batch = make("Qwen2"), batch_of(rows(4))
    eager, exact = (without(part(model, batch), "logits") for part in (run, exact_run))
    for rank in found:
        for name in ("fsdp", "fsdp head", "fsdp mlp", "fsdp first"):
            assert_right(rank[name]["patched"], eager, exact)
        for name in ("fsdp", "fsdp head", "fsdp mlp"):
            assert_right(rank[name]["after undo"], eager, exact)
        assert rank["fsdp"]["patched"]["lazy"]
        assert not rank["fsdp head"]["patched"]["lazy"]  # its weight is gone when the loss comes
        bf16 = rank["fsdp bf16"]  # against the same arrangement, unpatched
        assert_right(bf16["patched"], without(bf16["after undo"], "lazy"), exact, torch.bfloat16)


def test_undo_is_refused_where_fsdp_has_changed_what_was_swapped(found):
    for rank in found:
        assert "refused" not in rank["fsdp"]
        assert rank["fsdp head"]["refused"] == "undo: the head has become FSDPFastHead since; undo that first"
        assert rank["fsdp mlp"]["refused"] == "undo: modules have become FSDPFastQwen2MLP since; undo that first"


def test_what_is_sharded_already_is_left(found):
    left = {(kind, reason) for kind, status, reason in found[0]["fsdp first"]["rows"] if status == "left"}
    reason = "weight is sharded already (DTensor); patch before"
    assert left == {("RMSNorm", reason), ("causal LM loss", reason)}
    swapped = {kind for kind, status, _ in found[0]["fsdp first"]["rows"] if status == "swapped"}
    assert swapped == {"gated MLP", "attention block", "attention"}
