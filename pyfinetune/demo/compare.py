"""The same training steps twice: with the kernels, and as they would be run without this package.

Both sides start from the same adapters and see the same batches through the same trainer; they take turns, and the
losses of every step are kept, since a rate counts only at equal loss.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.demo.stages import Stage, build

STEPS = 6  # of a turn; the first warms up
_EQUAL = 0.01  # bfloat16 rounds a hidden state to 3 digits; two right implementations differ by less in their loss


@dataclass
class Side:
    """One side of the comparison.

    Args:
        name: what it is.
        losses: of each step of a turn; every turn repeats the same steps.
        rates: tokens per second of every timed step, over all turns.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Median over the timed steps."""
        return statistics.median(self.rates)


@dataclass
class Comparison:
    """Both sides of it.

    Args:
        ours: with the kernels.
        theirs: without.
    """

    ours: Side
    theirs: Side

    @property
    def ratio(self) -> float:
        """Our tokens per second over theirs."""
        return self.ours.tokens_per_second / self.theirs.tokens_per_second

    @property
    def difference(self) -> float:
        """Largest difference of the two losses of a step, relative to their mean."""
        pairs = zip(self.ours.losses, self.theirs.losses, strict=True)
        return max(abs(ours - theirs) / max((ours + theirs) / 2, 1e-9) for ours, theirs in pairs)

    @property
    def equal(self) -> bool:
        """Whether the losses agree to 1 %."""
        return self.difference <= _EQUAL


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's trainable parameters, by name.

    Args:
        model: any.

    Returns:
        Name to tensor.

    Example:
        >>> adapter_state(torch.nn.Linear(2, 1))["bias"].shape
        torch.Size([1])
    """
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def set_adapter_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Write copies back; the model's names and shapes must be the same.

    Args:
        model: any.
        state: what `adapter_state` returned.

    Raises:
        InvalidInput: the model trains other parameters.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> set_adapter_state(layer, adapter_state(layer))
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if trained.keys() != state.keys():
        raise pf.InvalidInput(f"set_adapter_state: the models differ in {sorted(trained.keys() ^ state.keys())[:3]}")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(state[name])


def compare(stage: Stage, start: dict[str, torch.Tensor], turns: int) -> Comparison:
    """Run the same few steps with and without the kernels, in turns.

    Args:
        stage: a QLoRA stage with a patched model; its trainable parameters are as before afterwards.
        start: the adapters that every turn begins with.
        turns: of each side; five steps of each are timed.

    Returns:
        Rates and losses of both sides.

    Example:
        >>> compare(stage, start, turns=2).ratio  # doctest: +SKIP
        1.6
    """
    end = adapter_state(stage.model)
    model, name, backend = _baseline(stage)
    result = Comparison(Side("pyfinetune"), Side(name))
    try:
        for _ in range(turns):
            _turn(stage, stage.model, start, result.ours, None)
            _turn(stage, model, start, result.theirs, backend)
    finally:
        set_adapter_state(stage.model, end)
    return result


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed.

    Example:
        >>> isinstance(has_bitsandbytes(), bool)
        True
    """
    return importlib.util.find_spec("bitsandbytes") is not None


def _turn(stage: Stage, model: Any, start: dict[str, torch.Tensor], side: Side, backend: str | None) -> None:
    from pyfinetune.train.callbacks import RunMetrics

    set_adapter_state(model, start)
    arguments = {"max_steps": STEPS, "logging_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        metrics = RunMetrics(Path(folder) / "metrics.jsonl")
        trainer = build(stage, arguments, [metrics], held_out=False, model=model)
        metrics.trainer = trainer
        with contextlib.nullcontext() if backend is None else pf.use_backend(backend):
            trainer.train()
        records = [json.loads(line) for line in metrics.path.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    side.losses = [entry["loss"] for entry in steps]
    side.rates += [entry["tokens_per_second"] for entry in steps[1:]]


def _baseline(stage: Stage) -> tuple[Any, str, str | None]:
    """The same model as it would be trained otherwise, its name, and the backend to force.

    PEFT over bitsandbytes; without that, PEFT over our 4-bit layer, decoded with torch.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from pyfinetune.train.model import add_adapters, load_model

    config, device = stage.config, next(stage.model.parameters()).device
    dtype = stage.model.config.dtype
    if has_bitsandbytes():
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": str(device)},
            use_safetensors=True,
        )
        model.config.use_cache = False
        name, backend = "PEFT over bitsandbytes' Linear4bit", None
    else:
        model = load_model(config.model_name_or_path, method="qlora", dtype=config.dtype, device=device)
        name, backend = "PEFT over a 4-bit layer decoded with torch (bitsandbytes is not installed)", "reference"
    model = add_adapters(
        model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
    )
    return model, name, backend
