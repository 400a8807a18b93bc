"""`load_4bit`: a model's name or folder to a model of `Linear4bit` layers, whatever the checkpoint holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.hf.quantizer import Config4bit, from_bitsandbytes

try:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise PyfinetuneError(
        f"load_4bit needs transformers 5.5 or newer ({error}): pip install 'pyfinetune[hf]'"
    ) from error

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Where the files come from: the configuration's and the model's alike.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# For the model alone, although a configuration would take them.
_MODEL = ("attn_implementation", "dtype", "torch_dtype", "quantization_config")


def load_4bit(path_or_name: str | Path, *, model_class: Any = None, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a model with its linear layers in 4 bits, from a plain or a bitsandbytes checkpoint.

    The weights of a plain checkpoint are quantized as they are read, one dense weight at a time; those of a 4-bit
    bitsandbytes checkpoint, and of one that this library saved, are taken as they are, bit for bit. bitsandbytes is
    not needed. Weights come from safetensors files only, and no code from a model's folder is run.

    Args:
        path_or_name: a model's folder, or its name on the hub.
        model_class: what to load with; by default `transformers.AutoModelForCausalLM`.
        from_pretrained_kwargs: go to `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, and
            `quantization_config=pf.Config4bit(...)` for other settings of a plain checkpoint. Without `device_map` the
            model is on the CPU until it is moved.

    Returns:
        The model, in evaluation mode. `save_pretrained` writes a bitsandbytes checkpoint.

    Raises:
        UserError: there is no such model, it has no safetensors weights, it needs code of its own, or it is quantized
            in another way.
        InvalidInput: a weight that is NaN, broken or missing in part, or no layer to quantize.

    Example:
        >>> model = pf.load_4bit("path/to/model", dtype=torch.bfloat16)
    """
    where, kwargs = f"load_4bit: {str(path_or_name)!r}", dict(from_pretrained_kwargs)
    model_class = AutoModelForCausalLM if model_class is None else model_class
    _check_request(where, path_or_name, kwargs)
    try:
        config, kwargs = _configuration(path_or_name, kwargs)
        saved = take_quantization(config)
        given = kwargs.pop("quantization_config", None)
        chosen = (given or Config4bit()) if saved is None else _prequantized(where, saved, given)
        return model_class.from_pretrained(path_or_name, config=config, quantization_config=chosen, **kwargs)
    except PyfinetuneError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{where} cannot be loaded: {reason}",
            fix="give a model's name on the hub, or its folder with config.json and .safetensors files",
        ) from error


def _check_request(where: str, path: str | Path, kwargs: dict[str, Any]) -> None:
    if Path(path).is_dir() and not (Path(path) / kwargs.get("subfolder", "") / "config.json").is_file():
        raise UserError(f"{where} is a folder without config.json", fix="give the folder that save_pretrained wrote")
    text = str(path)
    if not Path(path).exists() and (text.startswith(("/", ".", "~")) or text.count("/") > 1):
        raise UserError(f"{where}: there is no such folder", fix="give the folder that save_pretrained wrote")
    if kwargs.get("trust_remote_code"):
        raise UserError(f"{where}: trust_remote_code is not supported", fix="use a model that transformers knows")
    if kwargs.get("use_safetensors") is False or kwargs.get("gguf_file"):
        raise UserError(f"{where}: weights are read from .safetensors files only", fix="convert them to safetensors")
    given = kwargs.get("quantization_config")
    if given is not None and not isinstance(given, Config4bit):
        raise UserError(
            f"{where}: quantization_config is {type(given).__name__}, needs a pf.Config4bit",
            fix="pass quantization_config=pf.Config4bit(...), or leave it out",
        )


def _configuration(path: str | Path, kwargs: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The model's configuration, and what remains for its `from_pretrained`: transformers' own split of keywords."""
    kept = {key: kwargs[key] for key in (*_HUB, *_MODEL) if key in kwargs}
    if kwargs.get("config") is not None:
        config, rest = copy.deepcopy(kwargs["config"]), {key: kwargs[key] for key in kwargs if key != "config"}
    else:
        options = {key: value for key, value in kwargs.items() if key not in (*_MODEL, "config")}
        config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
    return config, {**rest, **kept, "use_safetensors": True}


def take_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Take what a model's configuration says about quantization out of it.

    transformers would look for a quantizer of that name, and for bitsandbytes.

    Args:
        config: a configuration as it was loaded; it is changed.

    Returns:
        The fields, or None where the checkpoint is plain.

    Example:
        >>> take_quantization(AutoConfig.from_pretrained("path/to/model"))
    """
    found = None
    for part in (config, config.get_text_config(decoder=True)):
        saved = getattr(part, "quantization_config", None)
        if saved is not None:
            found = found or (dict(saved) if isinstance(saved, dict) else saved.to_dict())
        if "quantization_config" in vars(part):
            del part.quantization_config
    return found


def _prequantized(where: str, saved: dict[str, Any], given: Config4bit | None) -> Config4bit:
    """The loading configuration for a checkpoint that is quantized already."""
    method = str(getattr(saved.get("quant_method"), "value", saved.get("quant_method")))
    fix = "give the model it was made from: load_4bit quantizes it while loading"
    if method != "bitsandbytes":
        raise UserError(f"{where} is quantized with {method}, and only bitsandbytes' 4 bits are read", fix=fix)
    if saved.get("load_in_8bit") or saved.get("_load_in_8bit"):
        raise UserError(f"{where} is an 8-bit bitsandbytes checkpoint, and only its 4 bits are read", fix=fix)
    if given is not None:
        raise UserError(
            f"{where} is 4-bit already, and quantization_config asks to quantize it",
            fix="leave quantization_config out; the checkpoint says how it was quantized",
        )
    return from_bitsandbytes(saved)
