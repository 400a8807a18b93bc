"""The models of a training step, one for each way to train it, with equal weights and adapters."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.harness import OURS
from pyfinetune.bench.peer_names import STEP, STEP_4BIT, TRL_STEP
from pyfinetune.bench.shapes import MODELS, Model
from pyfinetune.errors import UserError
from pyfinetune.machine import info

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = ("lora", "qlora", "dora")
# By the beginning of a name in `MODELS`, what transformers calls the kind of model.
_KINDS = {
    "llama": "llama",
    "smollm2": "llama",
    "tinyllama": "llama",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "gemma-2": "gemma2",
}


@dataclass(frozen=True)
class Recipe:
    """A random model and how it is trained.

    Args:
        label: what it is called.
        config: the entries of its `config.json`.
        method: "lora", "qlora" or "dora".
        rank: of the adapters on all its linear layers.
        dtype: of the model.
        trl: beside the peer, as TRL's trainer would run it.
    """

    label: str
    config: dict[str, Any]
    method: str = "lora"
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    trl: bool = False

    def made(self) -> PretrainedConfig:
        """The configuration as transformers has it."""
        from transformers import AutoConfig

        values = {"max_position_embeddings": 8192, **self.config}
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def vocabulary(self) -> int:
        """Entries of its head."""
        return self.dimensions.vocab

    @property
    def dimensions(self) -> Model:
        """What its work follows from."""
        values = self.config
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        return Model(
            hidden,
            values["intermediate_size"],
            values["num_hidden_layers"],
            heads,
            values.get("num_key_value_heads") or heads,
            values.get("head_dim") or hidden // heads,
            values["vocab_size"],
            bool(values.get("tie_word_embeddings")),
        )


@dataclass
class Ways:
    """The models by the name of who runs them; `plain` is what the others are held against, `exact` in float32."""

    models: dict[str, torch.nn.Module]
    plain: str
    exact: torch.nn.Module | None
    swapped: int = 0
    missing: dict[str, str] = field(default_factory=dict)


def _config_of(name: str) -> dict[str, Any]:
    """The entries of `config.json` of a model of the table, of a file or folder, or of a model's name."""
    if name.lower() in MODELS:
        model = MODELS[name.lower()]
        return {
            "model_type": next(kind for start, kind in _KINDS.items() if name.lower().startswith(start)),
            "hidden_size": model.hidden,
            "intermediate_size": model.inner,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocab,
            "tie_word_embeddings": model.tied,
        }
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {name}: is no configuration that can be read ({str(error).strip().splitlines()[0]})",
            fix=f"pass a config.json, its folder, or one of: {', '.join(MODELS)}",
        ) from error


def recipe_of(name: str, method: str, layers: int | None, dtype: torch.dtype) -> Recipe:
    """The recipe of `pyfinetune bench step --model NAME --method METHOD`.

    Args:
        name: a name of `shapes.MODELS`, a `config.json`, its folder, or a model's name.
        method: one of `METHODS`.
        layers: so many of its layers, or None for all.
        dtype: of the model.

    Raises:
        UserError: the configuration cannot be read or is of no causal language model, or the method is not known.
    """
    if method not in METHODS:
        raise UserError(f"--method {method}: is not one of {', '.join(METHODS)}")
    config = _config_of(name)
    if layers is not None:
        most = config.get("num_hidden_layers", 0)
        if not 1 <= layers <= most:
            raise UserError(f"--layers {layers}: {name} has {most} layers, needs 1 to {most}")
        config |= {"num_hidden_layers": layers}
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:layers]
    recipe = Recipe(Path(name).name + (f", {layers} layers" if layers else ""), config, method, dtype=dtype, trl=True)
    try:
        recipe.dimensions  # noqa: B018
        recipe.made()
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"--model {name}: is no configuration of a causal language model ({error})") from error
    return recipe


def megabytes(model: torch.nn.Module) -> float:
    """What a model's parameters and buffers take, each once."""
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.untyped_storage().nbytes() for t in tensors.values()) / 2**20


def _fits(recipe: Recipe) -> None:
    """Raise where weights, a copy in float32, and what is made on the way cannot fit into this machine's memory."""
    model = recipe.dimensions
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = 2 * model.hidden * (queries + keys) + 3 * model.hidden * model.inner
    parameters = layer * model.layers + model.vocab * model.hidden * (1 if model.tied else 2)
    needs, has = parameters * (2 * recipe.dtype.itemsize + 4) / 2**30, info()["cpu"]["memory_gb"]
    if needs > 0.9 * has:
        raise UserError(
            f"--model {recipe.label}: {parameters / 1e9:.1f}e9 parameters need {needs:.0f} GB, there are {has:.0f} GB",
            fix=f"fewer layers: --layers {max(1, int(model.layers * 0.6 * has / needs))}",
        )


def _base(recipe: Recipe, device: torch.device) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(recipe.made(), dtype=recipe.dtype)


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights are the very same tensors."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers that QLoRA stores in 4 bits."""
    kinds = (torch.nn.Linear, pf.Linear4bit)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if name.rpartition(".")[2] != "lm_head"}


def _adapted(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """With adapters on every linear layer but the head, as PEFT makes them by default, in training mode."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=sorted({name.rpartition(".")[2] for name in _linears(model)}),
        use_dora=recipe.method == "dora",
    )
    if recipe.method == "qlora":
        config = pf.lora_config(config)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config).train()


def _same_adapters(model: torch.nn.Module, source: torch.nn.Module) -> torch.nn.Module:
    """With the values of another model's adapters."""
    values = {name: value for name, value in source.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values.pop(name))
    if values:
        raise RuntimeError(f"{len(values)} adapters of the peer's have no counterpart, {next(iter(values))} for one")
    return model


def make(recipe: Recipe, device: torch.device) -> Ways:
    """Build the model for each way to run it.

    Raises:
        UserError: it does not fit into memory.
        RuntimeError: transformers or PEFT is missing, without which there is no step.
    """
    why = peers.why_missing("transformers", "peft")
    if why:
        raise RuntimeError(f"a training step needs transformers and peft: {why}")
    _fits(recipe)
    base = _base(recipe, device)
    ways = _four_bit(recipe, base) if recipe.method == "qlora" else _dense(recipe, base)
    if recipe.trl:
        _add_trl(ways)
    ways.swapped = pf.patch(ways.models[OURS]).swapped
    return ways


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a fresh B is zero, which hides both mistakes and work
            with torch.no_grad():
                parameter.normal_(std=0.02)
    return model


def _dense(recipe: Recipe, base: torch.nn.Module) -> Ways:
    """LoRA and DoRA over the weights as they are."""
    exact = copy.deepcopy(base)
    models = {OURS: _adapted(_twin(base), recipe), STEP: _randomised(_adapted(_twin(base), recipe))}
    plain = models[STEP]
    _same_adapters(models[OURS], plain)
    return Ways(models, STEP, _same_adapters(_adapted(exact, recipe), plain).float())


def _four_bit(recipe: Recipe, base: torch.nn.Module) -> Ways:
    """QLoRA over the same codes, ours and bitsandbytes'."""
    ours, exact = copy.deepcopy(base), copy.deepcopy(base)
    pf.quantize(ours, double_quant=True)
    for name, layer in _linears(exact).items():
        layer.weight.data = ours.get_submodule(name).dequantize().to(layer.weight.dtype)
    ours = _randomised(_adapted(ours, recipe))
    exact = _same_adapters(_adapted(exact, recipe), ours)
    why = peers.why_missing("bitsandbytes")
    if why:
        # Without it, the same weights undecoded are what can be compared with.
        plain = _same_adapters(_adapted(_twin(base), recipe), ours)
        return Ways({OURS: ours, STEP: plain}, STEP, exact.float(), missing={STEP_4BIT: why})
    theirs = _twin(base)
    for name, layer in _linears(theirs).items():
        theirs.set_submodule(name, peers.bnb_linear(layer.weight.data))
    theirs.is_loaded_in_4bit = True
    theirs = _same_adapters(_adapted(theirs, recipe), ours)
    return Ways({OURS: ours, STEP_4BIT: theirs}, STEP_4BIT, exact.float())


class TrlStep(torch.nn.Module):
    """A model with the head and the loss that TRL's SFT trainer gives it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        from trl.trainer.utils import add_fused_lm_head

        self.model = model
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))

    def forward(self, **batch):
        outputs = self.model(**batch, fused_lm_head=True)
        return SimpleNamespace(loss=-outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1))


def _add_trl(ways: Ways) -> None:
    """The plain model as TRL's trainer would have it, or why it cannot be had."""
    try:
        ways.models[TRL_STEP] = TrlStep(_twin(ways.models[ways.plain]))
    except ImportError as error:
        ways.missing[TRL_STEP] = f"not to be had ({error})"
