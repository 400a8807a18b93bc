"""What two processes of `torchrun` do in test_patch_distributed.py; each quantity they find is written to a file."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from hf_models import make, with_lora
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainer_runs import arguments, batch_of, recorder, result_of, rows

import pyfinetune as pf
from pyfinetune.errors import InvalidInput
from pyfinetune.hf.causal_lm_loss import LazyLogits
from pyfinetune.hf.script import PatchAtStart

RANK = int(os.environ["RANK"])


def model_of(method: str) -> nn.Module:
    return with_lora(make("Qwen2")) if method == "lora" else make("Qwen2")


def step(model: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    """Loss of the whole batch, and gradients, from this process's half of it."""
    batch = batch_of(rows(4)[2 * RANK : 2 * RANK + 2])
    items = sum(label != -100 for row in rows(4) for label in row["labels"][1:])
    module.zero_grad()
    out = model(**batch, num_items_in_batch=torch.tensor(items / 2))  # gradients are averaged over the processes
    out.loss.backward()
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    found = {"loss": loss / 2} | {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for name, grad in grads.items()
    }
    untouched = isinstance(out.logits, LazyLogits) and out.logits.computed is None
    return found | {"lazy": torch.tensor(untouched)}


def data_parallel(method: str, **options) -> dict[str, dict]:
    """Patched before wrapping; undone while wrapped."""
    module = model_of(method)
    report = pf.patch(module)
    model = DistributedDataParallel(module, **options)
    found = {"patched": step(model, module), "patched again": step(model, module)}
    report.undo()
    return found | {"undone": step(model, module)}


def patched_in_the_wrapper() -> dict[str, dict]:
    module = model_of("full")
    model = DistributedDataParallel(module)
    assert pf.patch(model).left == 0
    return {"patched": step(model, module)}


def sharded(alone: str | None = None, **options) -> dict[str, dict]:
    """Patched before FSDP takes the layers and the model, and `alone` by itself."""
    module, mesh = make("Qwen2"), init_device_mesh("cpu", (2,))
    report = pf.patch(module)
    if alone is not None:  # from the inside out
        fully_shard(module.get_submodule(alone), mesh=mesh, **options)
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    found = {"patched": step(module, module)}
    try:
        report.undo()
    except InvalidInput as error:
        found["refused"] = str(error)
    return found | {"after undo": step(module, module)}


def sharded_first() -> dict[str, dict]:
    module, mesh = make("Qwen2"), init_device_mesh("cpu", (2,))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    report = pf.patch(module)
    found = {"patched": step(module, module)}
    return found | {"rows": [(row.kind, row.status, row.reason) for row in report.rows]}


def trainer(folder: Path, method: str, patched: bool) -> dict[str, torch.Tensor]:
    """A `transformers.Trainer` of four rows in each process."""
    from transformers import Trainer

    model = model_of(method)
    settings = arguments(folder / "out", per_device_train_batch_size=4, max_steps=3, ddp_backend="gloo")
    callbacks = [PatchAtStart] if patched else []
    run = recorder(Trainer)(model, settings, train_dataset=rows(24), callbacks=callbacks)
    run.train()
    return result_of(run.losses, model)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    found: dict[str, dict] = {}
    for method in ("full", "lora"):
        for patched in (True, False):
            found[f"trainer {method} {'patched' if patched else 'plain'}"] = trainer(folder, method, patched)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found["ddp full"] = data_parallel("full")
    found["ddp lora"] = data_parallel("lora")
    found["ddp unused"] = data_parallel("lora", find_unused_parameters=True)
    found["ddp static"] = data_parallel("full", static_graph=True)
    found["ddp first"] = patched_in_the_wrapper()
    found["fsdp"] = sharded()
    found["fsdp head"] = sharded("lm_head")
    found["fsdp mlp"] = sharded("model.layers.0.mlp")
    found["fsdp bf16"] = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["fsdp first"] = sharded_first()
    torch.save(found, folder / f"{RANK}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
