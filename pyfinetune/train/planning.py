"""A run's memory and time before anything is loaded: `pf.plan` on the model that a configuration describes.

RunConfig -> Settings -> skeleton (meta device, adapters, kernels) -> pf.plan of few layers -> extrapolate -> Plan
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.planner import Plan, extrapolate, fake_copy, layers_of, plan
from pyfinetune.train.config import RunConfig
from pyfinetune.train.heads import CAUSAL, family_of
from pyfinetune.train.model import add_adapters, choose_device, choose_dtype, load_skeleton, read_config

# Layers of the two models that stand for one of many.
_FEW, _MORE = 2, 3
PLANNED = ("qlora", "lora", "full")
_AS = {"rslora": "lora", "dora": "lora"}  # the same step, but for the scale and `Settings.dora`


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the memory of a step depends on.

    Args:
        model: a name on the hub or a folder with config.json.
        method: `lora`, `qlora` or `full`.
        dtype: of the weights.
        autocast: type that the model runs in where that is another one, or None.
        device: "cpu" or "cuda".
        batch_size: rows of a batch.
        length: tokens in a row.
        documents: documents in a row.
        checkpointing: whether layers are recomputed in the backward pass.
        patch: whether this package's kernels are swapped in.
        r: rank of the adapters; nothing for `full`.
        dora: whether the adapters learn magnitudes apart.
        dropout: of the adapters.
        targets: names of the layers with adapters.
        accumulation: batches of one optimizer step.
        attention: name of the attention, or None.
        optim: a name of transformers' `OptimizerNames`.
        clip: largest norm of the gradients; 0 for no clipping.
    """

    model: str
    method: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    device: str
    batch_size: int
    length: int
    documents: int = 1
    checkpointing: bool = False
    patch: bool = True
    r: int = 16
    dora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    accumulation: int = 1
    attention: str | None = None
    optim: str = "adamw_torch_fused"
    clip: float = 1.0


def settings_of(config: RunConfig, device: torch.device | None = None, documents: int = 1) -> Settings:
    """The settings of a run.

    Args:
        config: the run's configuration.
        device: where it will be; the configuration's choice when None.
        documents: how many documents a packed row holds.

    Returns:
        The settings, with the Trainer's defaults where the section `trainer:` is silent.

    Raises:
        UserError: there is no such model, or transformers refuses a value.

    Example:
        >>> settings_of(load_config("run.yaml")).batch_size  # doctest: +SKIP
        4
    """
    from pyfinetune.train.loop import training_arguments

    family = family_of(read_config(config.model_name_or_path))
    if config.head not in ("auto", "causal_lm") or family != CAUSAL:
        what = f"head {config.head}" if config.head != "auto" else f"an {family}"
        raise UserError(
            f"plan: the memory of {what} cannot be predicted, only that of causal language models",
            fix="train for a few steps (trainer: max_steps: 3) and read the peak at its end",
        )
    method = _AS.get(config.method, config.method)
    if method not in PLANNED:
        raise UserError(
            f"plan: method {config.method!r} cannot be predicted",
            fix=f"set method to one of {', '.join([*PLANNED, *_AS])}, or train two steps and read peak_memory_gb",
        )
    if config.dropout:
        raise UserError(
            f"plan: the memory of a model with dropout: {config.dropout} cannot be predicted",
            fix="leave dropout out, or train two steps and read peak_memory_gb",
        )
    device = device or choose_device(config.device)
    arguments = training_arguments(config, train_rows=1, held_out=False)
    on_gpu = device.type == "cuda"
    if on_gpu and config.dtype == "auto":
        # Every GPU that is asked about here has bfloat16, whatever the machine that asks.
        dtype = torch.float32 if config.method == "full" else torch.bfloat16
    else:
        dtype = choose_dtype(config.dtype, config.method, checkpoint_dtype(config.model_name_or_path), device)
    mixed = (on_gpu and config.method == "full" and dtype == torch.float32) or arguments.bf16 or arguments.fp16
    targets = config.target_modules
    return Settings(
        model=config.model_name_or_path,
        method=method,
        dtype=dtype,
        autocast=(torch.float16 if arguments.fp16 else torch.bfloat16) if mixed else None,
        device=device.type,
        batch_size=arguments.per_device_train_batch_size,
        length=config.max_length,
        documents=documents if config.packing else 1,
        checkpointing=bool(getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing),
        patch=config.patch,
        r=config.lora_r,
        dora=config.dora,
        dropout=config.lora_dropout,
        targets=targets if isinstance(targets, str) else tuple(targets),
        accumulation=arguments.gradient_accumulation_steps,
        attention=config.attn_implementation,
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        clip=arguments.max_grad_norm or 0.0,
    )


def checkpointing_key() -> str:
    """The training argument that recomputes layers; transformers has renamed it."""
    from transformers import TrainingArguments

    newer = "activation_checkpointing"
    return (
        newer if newer in {field.name for field in dataclasses.fields(TrainingArguments)} else "gradient_checkpointing"
    )


@functools.cache
def checkpoint_dtype(model: str) -> torch.dtype | None:
    """The type that a checkpoint's config.json names, or None.

    Args:
        model: a name on the hub or a folder.
    """
    return getattr(read_config(model), "dtype", None)


@functools.cache
def step_plan(settings: Settings) -> Plan:
    """The plan of one step, from two models of few layers where all layers are alike.

    Args:
        settings: what the run is.

    Returns:
        The plan.

    Raises:
        UserError: no such model, or its layers, optimizer or target modules cannot be planned.

    Example:
        >>> step_plan(settings).peak  # doctest: +SKIP
    """
    layers = getattr(read_config(settings.model).get_text_config(), "num_hidden_layers", 0)
    if layers <= _MORE:
        return _simulated(settings, None)
    return extrapolate(_simulated(settings, _FEW), _simulated(settings, _MORE), (_FEW, _MORE), layers)


def _simulated(settings: Settings, layers: int | None) -> Plan:
    model = skeleton(settings, layers)
    if layers is not None and len(layers_of(model)) != layers:
        raise UserError(
            f"plan: {settings.model!r} has no list of {layers} equal layers, so a part cannot stand for the whole",
            fix="call pf.plan on the whole model on the meta device",
        )
    try:
        return plan(
            model,
            batch_of(settings, model),
            device=settings.device,
            gradient_checkpointing=settings.checkpointing,
            accumulation=settings.accumulation,
            autocast=settings.autocast,
            max_grad_norm=settings.clip,
            optimizer=functools.partial(_optimizer, settings.optim),
        )
    except InvalidInput as error:
        raise UserError(str(error), fix="leave that setting out, or train on a few rows and read the peak") from error


def skeleton(settings: Settings, layers: int | None = None) -> torch.nn.Module:
    """The model as it will be trained, without memory: quantized, with adapters and kernels.

    Args:
        settings: what the run is.
        layers: how many of its layers; all when None.

    Returns:
        The model; its tensors have shapes but no memory.

    Raises:
        UserError: as `model.load_skeleton` and `model.add_adapters`.

    Example:
        >>> skeleton(settings, layers=2)  # doctest: +SKIP
    """
    from pyfinetune.hf.shadow import leave_masks_out, patch_shadow

    model = load_skeleton(
        settings.model,
        method=settings.method,
        dtype=settings.dtype,
        attn_implementation=settings.attention,
        layers=layers,
    )
    if settings.method != "full":
        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        with torch.device("meta"):
            model = add_adapters(
                model, r=settings.r, dropout=settings.dropout, target_modules=targets, dora=settings.dora
            )
    shadow = fake_copy(model, FakeTensorMode())
    if settings.patch:
        patch_shadow(shadow)
    if settings.documents == 1:
        leave_masks_out(shadow)
    return shadow


def batch_of(settings: Settings, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A batch as the model is given it, on the meta device.

    Args:
        settings: what the run is.
        model: its `skeleton`.
    """
    from pyfinetune.hf.shadow import takes_documents

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = (settings.batch_size, settings.length)
    batch = {name: empty(*rows) for name in ("input_ids", "labels", "position_ids")}
    batch["num_items_in_batch"] = empty()
    if takes_documents(model):
        # Without values no document can be found in position ids; the collator's way says where they are.
        starts = empty(settings.batch_size * settings.documents + 1, dtype=torch.int32)
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    return batch


def _optimizer(name: str, parameters: list) -> torch.optim.Optimizer:
    """The Trainer's optimizer over these parameters."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments("unused", optim=name, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **options)


@functools.cache
def process_base() -> int:
    """Bytes that a training process holds before it has a model: Python, torch, transformers, PEFT and the Trainer.

    Measured on this very process when first asked for; all of these are imported for it.
    """
    import peft  # noqa: F401

    import pyfinetune.hf.patch
    import pyfinetune.train.loop  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
