"""A model with a head of its own: loaded, its head sized and named, and what no checkpoint has told apart.

Name or folder, labels -> `load_with_head` -> `model.add_adapters` -> `widen_trainable` -> `pf.patch` -> the trainer
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import pyfinetune as pf
from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.linear4bit import Linear4bit
from pyfinetune.train.model import (
    choose_device,
    choose_dtype,
    dropouts,
    load_skeleton,
    name_head,
    plain_config,
    refusals,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers calls the modules at the end of a model, which stay dense under 4-bit weights.
_HEADS = {"classifier", "score", "qa_outputs", "pre_classifier", "pooler"}
_MOST_FRESH = 0.5  # share of a model's weights that a checkpoint may leave to chance: heads are small


def load_with_head(
    name_or_path: str,
    auto_class: str,
    *,
    labels: Sequence[str] = (),
    outputs: int | None = None,
    pad_token_id: int | None = None,
    method: str = "lora",
    dtype: str = "auto",
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    dropout: float | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model with a head of its own, quantized to NF4 but for the head for `qlora`.

    Args:
        name_or_path: a model's name on the hub or its folder.
        auto_class: the class of transformers that loads it.
        labels: names of the head's classes; they are saved with the model.
        outputs: how many values the head gives where they have no names.
        pad_token_id: what rows are filled up with, which a head at the end of a row has to know.
        method: `lora`, `qlora` or `full`.
        dtype: `auto` or a type's name; `auto` is float32, and with frozen weights on a GPU as of `choose_dtype`.
        device: where the run will be; None takes a GPU where there is one.
        attn_implementation: a name as `transformers` knows it; None lets it choose.
        dropout: chance that training drops a value wherever the model has dropout; None leaves the model's own.

    Returns:
        The model on `device`, and the paths of its modules that the checkpoint has not, such as a new classifier.

    Raises:
        UserError: as `load_model`; transformers fills the class with none of the checkpoint's weights; or a module that
            `qlora` quantizes is new.

    Example:
        >>> load_with_head("path/to/bert", "AutoModelForSequenceClassification", labels=["neg", "pos"])[1]
        ... # doctest: +SKIP
        ['bert.pooler', 'classifier']
    """
    import transformers

    device = device or choose_device("auto")
    with refusals(name_or_path):
        config = plain_config(name_or_path)
        other_size = name_head(config, labels, outputs, pad_token_id)
        for name, value in dropouts(config, dropout).items():
            setattr(config.get_text_config(), name, value)
        # On a CPU nothing is gained by a head in half precision, which small updates would not move.
        kept = config.dtype if device.type == "cuda" else torch.float32
        chosen = choose_dtype(dtype, method, kept, device)
        options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        if method == "qlora":
            skeleton = load_skeleton(name_or_path, auto_class=auto_class, labels=labels, outputs=outputs)
            names = {name.rpartition(".")[2] for name, _ in skeleton.named_modules()}
            options["quantization_config"] = pf.Config4bit(skip=("lm_head", *sorted(names & _HEADS)))
        options |= {"config": config, "dtype": chosen, "ignore_mismatched_sizes": other_size}
        made = getattr(transformers, auto_class)
        try:
            model, info = made.from_pretrained(name_or_path, use_safetensors=True, output_loading_info=True, **options)
        except InvalidInput as error:  # 4-bit layers for which the checkpoint has nothing
            raise _empty(name_or_path, auto_class, str(error)) from error
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    share = _share(model, missing)
    if share > _MOST_FRESH:
        raise _empty(name_or_path, auto_class, f"{share:.0%} of {type(model).__name__} would be random")
    fresh = fresh_modules(model, missing)
    for name in fresh:
        if any(isinstance(module, Linear4bit) for module in model.get_submodule(name).modules()):
            raise UserError(
                f"method: qlora: {name} is not in {name_or_path}, so it has to be trained, and 4 bits cannot be",
                fix="set method: lora or full",
            )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.to(device), fresh


def fresh_modules(model: torch.nn.Module, missing: Iterable[str]) -> list[str]:
    """The modules all of whose parameters a checkpoint has not.

    Args:
        model: any model.
        missing: names of the parameters that were made anew.

    Returns:
        Paths of the outermost such modules, sorted.

    Example:
        >>> fresh_modules(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), ["1.weight", "1.bias"])
        ['1']
    """
    missing = {name for name, _ in model.named_parameters()} & set(missing)
    known = {name for name, _ in model.named_parameters()} - missing
    found = set()
    for name in missing:
        parts = name.split(".")[:-1]
        whole = [n for n in range(1, len(parts) + 1) if not any(k.startswith(".".join(parts[:n]) + ".") for k in known)]
        if whole:
            found.add(".".join(parts[: whole[0]]))
    return sorted(found)


def _share(model: torch.nn.Module, names: set[str]) -> float:
    """The share of a model's parameters that have these names."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if name in names) / max(1, sum(sizes.values()))


def _empty(name_or_path: str, auto_class: str, reason: str) -> UserError:
    return UserError(
        f"model_name_or_path: {auto_class} of transformers does not find its weights in {name_or_path!r}: {reason}",
        fix="give a model that was saved with this head, or leave head out",
    )


def widen_trainable(model: torch.nn.Module) -> None:
    """Hold what is trained in float32, since a small update of a half-precision weight is rounded away.

    Args:
        model: with adapters, perhaps with a head that is trained whole; it then runs under autocast.

    Example:
        >>> widen_trainable(model)  # doctest: +SKIP
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
