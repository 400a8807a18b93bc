"""Saved models as they lie on a disk: what a folder holds, and the model that it stands for, loaded for use.

    folder -> find_saved -> Saved -> load_saved -> the model, with its adapter over its base

A folder is a run's output, a PEFT adapter, or a model (plain, or in bitsandbytes' 4 bits). What a run's `run.json` or
an export's `export.json` says of the base (its dtype, its bits, its digest) is kept to.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.hf.loading import take_quantization
from pyfinetune.train.data.files import hash_files
from pyfinetune.train.heads.kinds import HEADS
from pyfinetune.train.manifest import read_manifest

ADAPTER, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "export.json"
# What PEFT calls a task -> the class that transformers loads its base with.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Args:
        folder: where its weights are.
        base: name or path of the model below the adapter; None where the folder holds a whole model.
        record: `run.json` of the run that it came from, or None.
        in_4bit: whether the base (or the model) is in 4 bits.
        dtype: that the model computes in, by name, or "auto" for its checkpoint's own.
        digest: SHA-256 of the weights in the folder.
    """

    folder: Path
    base: str | None
    record: dict[str, Any] | None
    in_4bit: bool
    dtype: str
    digest: str

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, not a whole model."""
        return self.base is not None


def find_saved(
    path: str | Path, *, adapter: str | None = None, base: str | None = None, in_4bit: bool | None = None
) -> Saved:
    """Find out what a folder holds; no weights are loaded.

    Args:
        path: a run's output folder, an adapter's, or a model's.
        adapter: which of several adapters; "default" is the one beside the others' folders.
        base: name or path of the base model, in place of the one that the adapter names.
        in_4bit: whether the base is quantized to NF4; by default what the run's record says, else no.

    Returns:
        The description.

    Raises:
        UserError: there is no such folder, nothing trained in it, several adapters to choose from, weights that are no
            safetensors, or a base model that is missing or no longer the one that was trained on.

    Example:
        >>> find_saved("runs/first").base  # doctest: +SKIP
        'meta-llama/Llama-3.2-1B'
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{path}: no such folder", fix="give a run's output_dir, or the folder of an adapter or a model"
        )
    record = _record(folder)
    folder = _chosen(folder, adapter)
    exported = _read_json(folder / RECORD) or {}
    if (folder / ADAPTER).is_file():
        weights = _adapter_weights(folder)
        found = base or _found_base(folder, record)
        made_in_4bit = _method(record) == "qlora" or bool(exported.get("base_in_4bit"))
        saved = Saved(
            folder,
            found,
            record,
            made_in_4bit if in_4bit is None else in_4bit,
            _dtype(record, exported),
            hash_files([weights]),
        )
        _check_base(saved, given=base is not None)
        return saved
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file() and weights:
        quantized = bool((_read_json(folder / "config.json") or {}).get("quantization_config"))
        return Saved(folder, None, record, quantized, "auto", hash_files(weights))
    raise _nothing_there(folder, record)


def load_saved(saved: Saved, device: torch.device | str = "cpu") -> Any:
    """Load what a folder holds, as it was when its training ended.

    Args:
        saved: what `find_saved` returned.
        device: where to put it.

    Returns:
        The model in evaluation mode: a PEFT model over its base, or a plain one.

    Raises:
        UserError: the base model or the weights cannot be loaded.

    Example:
        >>> load_saved(find_saved("runs/first")).generate  # doctest: +SKIP
    """
    if not saved.is_adapter:
        return load_base(saved, saved.in_4bit).to(device).eval()
    return with_adapter(load_base(saved, saved.in_4bit), saved.folder, saved.base).to(device).eval()


def with_adapter(model: Any, folder: str | Path, base: str) -> Any:
    """Put a saved adapter on its base.

    Args:
        model: the base, in 4 bits or not.
        folder: the adapter's.
        base: the base's name, for the message.

    Returns:
        The PEFT model, which knows 4-bit layers.

    Raises:
        UserError: the adapter does not fit the base.

    Example:
        >>> with_adapter(pf.load_4bit("path/to/model"), "runs/first", "path/to/model")  # doctest: +SKIP
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    known = pf.lora_config(config) if isinstance(config, LoraConfig) else config
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT asks for a property by a name that newer versions of transformers call deprecated.
            deprecated = ".is_gradient_checkpointing. is deprecated"
            warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # an export unties them
            return PeftModel.from_pretrained(model, str(folder), config=known)
    except (RuntimeError, ValueError, KeyError, OSError, UserWarning) as error:
        raise UserError(
            f"{folder}: this adapter does not fit {base}: {' '.join(str(error).split())[:300]}",
            fix="give the adapter's own base model back its place, or train the adapter anew",
        ) from error


def load_base(saved: Saved, in_4bit: bool) -> Any:
    """Load the model below an adapter, or the whole model where there is none.

    Args:
        saved: what `find_saved` returned.
        in_4bit: quantize the linear layers to NF4 while they are read; a 4-bit checkpoint is 4-bit either way.

    Returns:
        The model, its vocabulary as large as the one that the adapter was trained with.

    Raises:
        UserError: it cannot be loaded.

    Example:
        >>> load_base(find_saved("runs/first"), in_4bit=False)  # doctest: +SKIP
    """
    import transformers

    name = saved.base or str(saved.folder)
    options: dict[str, Any] = {} if saved.dtype == "auto" else {"dtype": getattr(torch, saved.dtype)}
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        quantized = take_quantization(config) is not None
        kind = getattr(transformers, model_class(saved, config))
        if saved.is_adapter:
            config = _with_head(config, saved)
        if quantized:
            # What the checkpoint says of its layers is in its own configuration.
            changed = {"num_labels": config.num_labels} if _labels(saved) else {}
            model = pf.load_4bit(name, model_class=kind, **changed, **options)
        else:
            if in_4bit:
                options["quantization_config"] = pf.Config4bit(skip=("lm_head", *_trained_whole(kind, config, saved)))
            model = _quietly(kind, name, {**options, "config": config})
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        if isinstance(error, InvalidInput):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{name}: cannot be loaded: {reason}",
            fix="give the base model's folder or name on the hub with --base"
            if saved.is_adapter
            else "give the folder that save_pretrained wrote",
        ) from error
    if saved.is_adapter:
        _fit_vocabulary(model, saved)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    return model.eval()


def load_tokenizer_of(saved: Saved) -> Any:
    """The tokenizer beside the weights, else the base model's.

    Args:
        saved: what `find_saved` returned.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is none.

    Example:
        >>> load_tokenizer_of(find_saved("runs/first")).chat_template  # doctest: +SKIP
    """
    from transformers import AutoTokenizer

    beside = any((saved.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    name = str(saved.folder) if beside or saved.base is None else saved.base
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{name}: no tokenizer can be loaded: {' '.join(str(error).split())[:200]}",
            fix=f"save the tokenizer into {saved.folder}: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        ) from error


def model_class(saved: Saved, config: Any) -> str:
    """Name of the class of transformers that loads a saved model.

    Args:
        saved: what `find_saved` returned.
        config: configuration of the base, or of the whole model.

    Returns:
        By the run's head, else by the adapter's task, else by the architecture that the configuration names.

    Example:
        >>> model_class(saved, config)  # doctest: +SKIP
        'AutoModelForCausalLM'
    """
    head = ((saved.record or {}).get("head") or {}).get("kind")
    if saved.is_adapter and head in HEADS:
        return HEADS[head].auto_class
    if saved.is_adapter:
        task = (_read_json(saved.folder / ADAPTER) or {}).get("task_type")
        if task in _CLASSES:
            return _CLASSES[task]
    architectures = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
    return architectures[0]


def _quietly(kind: Any, name: str, options: dict[str, Any]) -> Any:
    """A base without its head reports a head of random numbers, which the adapter's own replaces."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(name, use_safetensors=True, ignore_mismatched_sizes=True, **options)
    finally:
        logging.set_verbosity(before)


def _record(folder: Path) -> dict[str, Any] | None:
    """`run.json` of a run's folder; a checkpoint's is in the folder above."""
    above = [folder.resolve().parent] if _CHECKPOINT.fullmatch(folder.resolve().name) else []
    for place in (folder, *above):
        record = read_manifest(place / "run.json")
        if isinstance(record, dict) and isinstance(record.get("config"), dict):
            return record
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}", fix="save the adapter or the model anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object", fix="save the adapter or the model anew")
    return content


def _chosen(folder: Path, adapter: str | None) -> Path:
    """The folder of the one adapter, where PEFT has saved several side by side."""
    others = sorted(path.parent for path in folder.glob(f"*/{ADAPTER}"))
    # Checkpoints, exports and other runs may be in a run's folder too.
    apart = {path for path in others if any((path / name).is_file() for name in (RECORD, "run.json", "checksums.json"))}
    apart |= {path for path in others if _CHECKPOINT.fullmatch(path.name) or path.name.startswith(".")}
    named = {path.name: path for path in others if path not in apart}
    if (folder / ADAPTER).is_file():
        named = {"default": folder, **named}
    if adapter is not None:
        if adapter not in named:
            raise UserError(
                f"--adapter {adapter}: {folder} has no adapter of this name",
                fix=f"choose among {', '.join(named)}" if named else "leave --adapter out",
            )
        return named[adapter]
    if len(named) > 1:
        raise UserError(
            f"{folder}: holds {len(named)} adapters: {', '.join(named)}", fix="choose one with --adapter NAME"
        )
    return next(iter(named.values()), folder)


def _adapter_weights(folder: Path) -> Path:
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "adapter_model.bin is a pickle, which is not read" if pickled else f"no {WEIGHTS}"
        raise UserError(f"{folder}: {reason}", fix="save the adapter with save_pretrained, which writes safetensors")
    return weights


def _found_base(folder: Path, record: dict[str, Any] | None) -> str:
    name = (_read_json(folder / ADAPTER) or {}).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder / ADAPTER}: names no base model", fix="give it with --base NAME")
    places = [Path(name), folder / name]
    if record is not None:
        places.append(Path(record.get("working_directory", "")) / name)
    return next((str(place) for place in places if place.is_dir()), str(name))


def _method(record: dict[str, Any] | None) -> str | None:
    return None if record is None else record["config"].get("method")


def _dtype(record: dict[str, Any] | None, exported: dict[str, Any]) -> str:
    found = (record or {}).get("model", {}).get("dtype") or exported.get("dtype") or "auto"
    return found if found in ("float32", "float16", "bfloat16") else "auto"


def _check_base(saved: Saved, given: bool) -> None:
    """Refuse a base that is not there, or is not the one that the adapter was trained on."""
    base = Path(saved.base)
    looks_local = saved.base.startswith(("/", ".", "~")) or saved.base.count("/") > 1
    if not base.is_dir():
        if looks_local:
            raise UserError(
                f"{saved.folder}: its base model {saved.base} is not there",
                fix="give the model's place with --base PATH",
            )
        return
    trained_on = (saved.record or {}).get("model", {}).get("sha256")
    if trained_on is not None and trained_on != hash_files(sorted(base.glob("*.safetensors"))):
        raise UserError(
            f"{saved.folder}: the weights of its base model {saved.base} are not those that it was trained on"
            " (their SHA-256 differs from the one in run.json)",
            fix="put the model back" + ("" if given else ", or give its place with --base PATH"),
        )


def _nothing_there(folder: Path, record: dict[str, Any] | None) -> UserError:
    if record is not None and (folder / "run.json").is_file():
        steps = sorted(
            (int(path.name[11:]), path) for path in folder.glob("checkpoint-*") if _CHECKPOINT.match(path.name)
        )
        last = f", or give its last checkpoint: {steps[-1][1]}" if steps else ""
        return UserError(
            f"{folder}: this run is {record.get('status', 'not complete')}, and saved no model yet",
            fix=f"finish it with the same `pyfinetune train` command{last}",
        )
    if any(folder.glob("*.gguf")):
        return UserError(f"{folder}: holds a GGUF file", fix="run it with llama.cpp: llama-cli -m FILE")
    return UserError(
        f"{folder}: holds neither an adapter ({ADAPTER}) nor a model (config.json with .safetensors files)",
        fix="give a run's output_dir, or the folder that save_pretrained wrote",
    )


def _shapes(saved: Saved) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the adapter."""
    from safetensors import safe_open

    with safe_open(str(saved.folder / WEIGHTS), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _labels(saved: Saved) -> int | None:
    """How many classes the head has that was trained with the adapter."""
    if not saved.is_adapter:
        return None
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    return next(
        (shape[0] for name, shape in _shapes(saved).items() if name.endswith(heads) and "lora" not in name), None
    )


def head_config(saved: Saved) -> Path | None:
    """The configuration that a run has saved beside an adapter: of a head, with the names of its classes.

    Args:
        saved: what `find_saved` returned.

    Returns:
        The file, or None.

    Example:
        >>> head_config(find_saved("runs/sentiment"))  # doctest: +SKIP
        PosixPath('runs/sentiment/config.json')
    """
    places = [saved.folder]
    if saved.record is not None and _CHECKPOINT.fullmatch(saved.folder.name):
        places.append(saved.folder.parent)
    return next((place / "config.json" for place in places if (place / "config.json").is_file()), None)


def _with_head(config: Any, saved: Saved) -> Any:
    """The base's configuration with the head that was trained: as it was saved, or as large as its weights are."""
    from transformers import AutoConfig

    path = head_config(saved)
    if path is not None:
        config = AutoConfig.from_pretrained(str(path.parent))
        take_quantization(config)
        return config
    count = _labels(saved)
    if count is not None and count != config.num_labels:
        config.num_labels = count
    return config


def _trained_whole(kind: Any, config: Any, saved: Saved) -> list[str]:
    """Names of modules that were trained beside the adapter, so that they were never in 4 bits."""
    wanted = set((_read_json(saved.folder / ADAPTER) or {}).get("modules_to_save") or ())
    if not wanted:
        return []
    with torch.device("meta"):
        make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        skeleton = make(config)
    return sorted(wanted & {name.rpartition(".")[2] for name, _ in skeleton.named_modules()} - {"lm_head"})


def _fit_vocabulary(model: Any, saved: Saved) -> None:
    """Make the base's vocabulary as large as that of the embeddings which were trained with the adapter."""
    embedding = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    shapes = _shapes(saved)
    rows = {shape[0] for name, shape in shapes.items() if name.endswith(tuple(f"{own}.weight" for own in names))}
    rows |= {shape[1] for name, shape in shapes.items() if name.endswith(tuple(f"{n}.lora_embedding_A" for n in names))}
    if rows and embedding is not None and max(rows) != embedding.weight.shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)


def with_folder(saved: Saved, folder: Path) -> Saved:
    """The same base under the weights of another folder.

    Args:
        saved: what `find_saved` returned.
        folder: an adapter's.

    Returns:
        The description, with that folder's digest.

    Example:
        >>> load_saved(with_folder(saved, Path("export")))  # doctest: +SKIP
    """
    return replace(saved, folder=folder, digest=hash_files([_adapter_weights(folder)]))
