"""The model of a run: its device and type, loaded, quantized, and given adapters.

Name or folder -> `load_model` -> `add_adapters` -> `pf.patch` -> `packing.check_isolation` -> the trainer. Weights
come from safetensors files only, and no code from a model's folder is ever run.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pyfinetune as pf
from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.linear4bit import Linear4bit, choose_targets

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Heads that PEFT trains and saves whole; of the latter two it learns too late that they take no adapters.
_SAVED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """The device of a run.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The torch device; `auto` takes a GPU where there is one.

    Raises:
        UserError: `cuda` was asked for and there is no GPU.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if device == "cuda" and not torch.cuda.is_available():
        reason = (
            "no CUDA GPU is visible" if torch.version.cuda else f"this torch ({torch.__version__}) is built for CPUs"
        )
        raise UserError(
            f"device: cuda was asked for, but {reason}",
            fix="set device: auto or cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_dtype(dtype: str, method: str, checkpoint_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type of a run's weights.

    Args:
        dtype: `auto` or a type's name.
        method: `lora`, `qlora` or `full`.
        checkpoint_dtype: the type the checkpoint was saved in, where it says.
        device: where the run will be.

    Returns:
        For `auto`: float32 for full fine-tuning, whose small updates bfloat16 would round away; with frozen weights
        bfloat16 on a GPU that has it (else float16), and on a CPU the checkpoint's own type, float16 becoming float32.

    Example:
        >>> choose_dtype("auto", "full", torch.bfloat16, torch.device("cpu"))
        torch.float32
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if method == "full":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return checkpoint_dtype if checkpoint_dtype in (torch.float32, torch.bfloat16) else torch.float32


def check_length(config: PretrainedConfig, max_length: int, name_or_path: str) -> None:
    """Check that a model has positions for the longest row.

    Args:
        config: the model's configuration.
        max_length: the longest row, in tokens.
        name_or_path: the model, for the message.

    Raises:
        UserError: it has fewer.

    Example:
        >>> check_length(model.config, 1024, "path/to/model")  # doctest: +SKIP
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UserError(
            f"max_length: {max_length} is beyond the {longest} positions of {name_or_path}",
            fix=f"set max_length: {longest} or less",
        )


def load_model(
    name_or_path: str,
    *,
    method: str = "lora",
    dtype: str = "auto",
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """Load a causal language model, quantized to NF4 for `qlora`.

    Args:
        name_or_path: a model's name on the hub or its folder.
        method: `lora`, `qlora` or `full`.
        dtype: `auto` or a type's name; see `choose_dtype`.
        device: where the run will be; None takes a GPU where there is one.
        attn_implementation: a name as `transformers` knows it; None lets it choose.
        dropout: chance that training drops a value wherever the model has dropout; None leaves the model's own.

    Returns:
        The model on `device`, its cache switched off.

    Raises:
        UserError: there is no such model, it has no safetensors weights, it needs code of its own, or it is no causal
            language model.

    Example:
        >>> load_model("path/to/model", method="qlora")  # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM

    device = device or choose_device("auto")
    with refusals(name_or_path):
        config = plain_config(name_or_path)
        chosen = choose_dtype(dtype, method, getattr(config, "dtype", None), device)
        options = _attention(attn_implementation) | dropouts(config, dropout)
        if method == "qlora":
            options["quantization_config"] = pf.Config4bit()
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=chosen, use_safetensors=True, **options)
    model.config.use_cache = False
    return model.to(device)


def name_head(config: PretrainedConfig, labels: Sequence[str], outputs: int | None, pad_token_id: int | None) -> bool:
    """Write a head's classes into a model's configuration.

    Args:
        config: the model's configuration, which is changed.
        labels: names of the classes; none for a head without.
        outputs: how many values a head without names gives, or None.
        pad_token_id: what rows are filled up with, or None.

    Returns:
        Whether the head has another size than the configuration had.

    Example:
        >>> name_head(config, ["neg", "pos"], None, 0)  # doctest: +SKIP
        False
    """
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
        config.pad_token_id = pad_token_id
    names = list(labels) or [f"LABEL_{number}" for number in range(outputs or 0)]
    if not names:
        return False
    other_size = config.num_labels != len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    if labels:
        config.problem_type = "single_label_classification"
    return other_size


def load_skeleton(
    name_or_path: str,
    *,
    method: str = "lora",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    layers: int | None = None,
    auto_class: str = "AutoModelForCausalLM",
    labels: Sequence[str] = (),
    outputs: int | None = None,
) -> PreTrainedModel:
    """Make the model that `load_model` would load on the meta device: shapes without memory; no weights are read.

    Args:
        name_or_path: a model's name on the hub or its folder, of which config.json is enough.
        method: `lora`, `qlora` or `full`.
        dtype: type of the weights; the checkpoint's own when None.
        attn_implementation: a name as `transformers` knows it; None lets it choose.
        layers: how many of its layers; all when None.
        auto_class: the class of transformers that makes it.
        labels: names of its head's classes, where it has one.
        outputs: how many values its head gives where they have no names.

    Returns:
        The model on the meta device, its cache switched off.

    Raises:
        UserError: as `load_model`.

    Example:
        >>> load_skeleton("path/to/model").num_parameters()  # doctest: +SKIP
    """
    import transformers

    with refusals(name_or_path):
        config = plain_config(name_or_path)
        name_head(config, labels, outputs, None)
        if layers is not None:
            text = config.get_text_config()
            text.num_hidden_layers = layers
            if isinstance(getattr(text, "layer_types", None), list):
                text.layer_types = text.layer_types[:layers]
        config.use_cache = False
        with torch.device("meta"):
            made = getattr(transformers, auto_class)
            model = made.from_config(config, dtype=dtype, **_attention(attn_implementation))
    if method == "qlora":
        for _, linear in choose_targets(model, pf.Config4bit().skip)[0]:
            size, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
            packed = Linear4bit(*size, bias=has_bias, dtype=linear.weight.dtype, device="meta").packed
            linear.__class__ = Linear4bit
            linear._set_packed(packed)
    return model


def read_config(name_or_path: str) -> Any:
    """A model's configuration; nothing else is read.

    Args:
        name_or_path: a model's name on the hub or its folder.

    Returns:
        What transformers makes of its config.json.

    Raises:
        UserError: as `load_model`.

    Example:
        >>> read_config("path/to/model").num_hidden_layers  # doctest: +SKIP
        30
    """
    with refusals(name_or_path):
        return plain_config(name_or_path)


@contextlib.contextmanager
def refusals(name_or_path: str) -> Iterator[None]:
    """Whatever transformers says against a model becomes one sentence and its mend.

    Args:
        name_or_path: the model, for the message.

    Raises:
        UserError: within, something was raised that a person can mend.

    Example:
        >>> with refusals("no/such-model"):
        ...     pass
    """
    where = f"model_name_or_path: {name_or_path!r}"
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(f"{where} is a folder without config.json", fix="give the folder that save_pretrained wrote")
    try:
        yield
    except PyfinetuneError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"model_name_or_path: {name_or_path!r} cannot be loaded: {reason}",
            fix="give a model's name on the hub, or its folder with config.json and .safetensors files",
        ) from error


def plain_config(name_or_path: str) -> Any:
    """A model's configuration, of plain weights.

    Args:
        name_or_path: a model's name on the hub or its folder.

    Returns:
        What transformers makes of its config.json.

    Raises:
        UserError: its weights are quantized.

    Example:
        >>> plain_config("path/to/model").model_type  # doctest: +SKIP
        'llama'
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name_or_path)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model_name_or_path: {name_or_path!r} is already quantized, and this command starts from plain weights",
            fix="give the model it was made from; method: qlora quantizes it while loading",
        )
    return config


def add_adapters(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    rslora: bool = False,
    dora: bool = False,
    task_type: str | None = "CAUSAL_LM",
    fresh: Sequence[str] = (),
) -> Any:
    """Freeze the model and add trainable low-rank adapters (PEFT) to its linear layers.

    Args:
        model: what `load_model` returned.
        r: rank.
        alpha: the adapters are scaled by alpha / r, or with `rslora` by alpha / sqrt(r).
        dropout: chance of dropping an input of an adapter while training.
        target_modules: names of the layers, or `all-linear` for every linear layer but the output head.
        rslora: scale by the root of the rank.
        dora: learn each weight's magnitude apart from its direction.
        task_type: PEFT's name of what the model is for; it knows which heads are trained and saved whole.
        fresh: paths of further modules that are trained and saved whole, because no checkpoint has them.

    Returns:
        The PEFT model.

    Raises:
        UserError: no layer has such a name.

    Example:
        >>> add_adapters(model, r=8).print_trainable_parameters()  # doctest: +SKIP
    """
    from peft import LoraConfig

    if isinstance(target_modules, list):
        check_targets(model, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        use_rslora=rslora,
        use_dora=dora,
        task_type=task_type,
        modules_to_save=whole_modules(model, task_type, fresh),
    )
    try:
        return wrap(model, pf.lora_config(config))
    except ValueError as error:
        names = ", ".join(linear_names(model))
        raise UserError(f"target_modules: {error}", fix=f"choose among {names}") from error


def wrap(model: PreTrainedModel, settings: Any) -> Any:
    """`peft.get_peft_model`, without what it says about names in newer versions of transformers.

    Args:
        model: the base model.
        settings: a `peft.PeftConfig`.

    Returns:
        The PEFT model.

    Example:
        >>> wrap(model, LoraConfig())  # doctest: +SKIP
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, settings)
    whole = getattr(settings, "modules_to_save", None)
    if whole:  # to which PEFT has added what was there
        settings.modules_to_save = list(dict.fromkeys(whole))
    return adapted


def whole_modules(model: torch.nn.Module, task_type: str | None, fresh: Sequence[str] = ()) -> list[str] | None:
    """The modules that are trained and saved whole beside an adapter.

    Args:
        model: the base model.
        task_type: PEFT's name of what the model is for.
        fresh: paths of modules that no checkpoint has.

    Returns:
        Paths and names; None for none.

    Example:
        >>> whole_modules(model, "SEQ_CLS", ["bert.pooler"])  # doctest: +SKIP
        ['bert.pooler', 'classifier']
    """
    heads = [name for name in _SAVED_BY_PEFT.get(task_type, ()) if hasattr(model, name)]
    return sorted({*fresh, *heads}) or None


def check_targets(model: torch.nn.Module, target_modules: list[str]) -> None:
    """Check that a model has layers of these names.

    Args:
        model: any model.
        target_modules: paths of layers, or their last parts.

    Raises:
        UserError: no layer has such a name.

    Example:
        >>> check_targets(model, ["q_proj"])  # doctest: +SKIP
    """
    known = {name for name, _ in model.named_modules()}
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise UserError(
                f"target_modules: no layer of the model is called {target!r}",
                fix=f"choose among {', '.join(linear_names(model))}",
            )


def linear_names(model: torch.nn.Module) -> list[str]:
    """Short names of a model's linear layers, plain and 4-bit, without the output head.

    Args:
        model: a causal language model.

    Returns:
        The last part of each layer's path, sorted, such as `q_proj`.

    Example:
        >>> linear_names(model)  # doctest: +SKIP
        ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds = (torch.nn.Linear, Conv1D)
    linears = [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]
    return sorted({name.rsplit(".", 1)[-1] for name in linears})


def dropouts(config: PretrainedConfig, dropout: float | None) -> dict[str, float]:
    """Every chance of dropout in a model's configuration, set to one value."""
    if dropout is None:
        return {}
    values = config.get_text_config().to_dict()
    names = [
        name
        for name, value in values.items()
        if ("dropout" in name or name.endswith("pdrop")) and (value is None or type(value) in (int, float))
    ]
    if not names:
        raise UserError(
            f"dropout: a {config.model_type} has none to set",
            fix="leave dropout out; lora_dropout and trainer: weight_decay are there for every model",
        )
    return dict.fromkeys(names, dropout)


def _attention(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"attn_implementation": name}
