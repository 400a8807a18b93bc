"""GGUF files: made by the user's llama.cpp converter, and read back tensor by tensor.

    merged model -> convert (a subprocess) -> read_back -> ReadBack: the decoded tensors under transformers' names

What llama.cpp's converter changes on the way is undone before anything is compared: the names (by gguf's own map), the
rows of q and k, which llama.cpp's rotary embedding wants in another order, Gemma's norms, which it stores plus one, and
GPT-2's transposed matrices.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyfinetune.errors import NotProved, UserError
from pyfinetune.train.export.proof import Logits, Reference, check_close

CONVERTER, VARIABLE = "convert_hf_to_gguf.py", "LLAMA_CPP_CONVERTER"
# Architectures, as GGUF names them, for which llama.cpp's rotary embedding takes neighbouring rows of q and k as pairs.
_PERMUTED = ("llama", "granite", "granitemoe", "smollm3", "arcee", "olmo", "minicpm")
_PLUS_ONE = ("gemma", "gemma2", "gemma3")
_TRANSPOSED = {"gpt2": (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")}
_AS_THEY_ARE = ("qwen2", "qwen3", "phi2", "phi3", "starcoder2", "olmo2", "seed_oss")
_TYPES = ("F32", "F16", "BF16", "Q8_0")
# A key of the file, below the architecture's name -> what the configuration calls it.
_HYPERPARAMETERS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps"),
}
# What a configuration says that does not enter the logits.
_BESIDE_THE_NUMBERS = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "transformers_version",
    "use_cache",
}
_NEEDED = ("block_count", "embedding_length", "attention.head_count")


@dataclass
class ReadBack:
    """A GGUF file that was read back.

    Args:
        tensors: its tensors, decoded to float32, in the order of rows and under the names that transformers has.
        checks: what was compared, for `export.json`.
        words: how many tensors there are of which type.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    words: str = ""


def require() -> Any:
    """The package `gguf`.

    Returns:
        The module.

    Raises:
        UserError: it is not installed.

    Example:
        >>> require().GGUFReader  # doctest: +SKIP
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"--to gguf: needs the package gguf, which reads the file back ({error})",
            fix="pip install 'pyfinetune[gguf]'",
        ) from error
    return gguf


def find_converter(given: str | None) -> Path:
    """Find llama.cpp's converter.

    Args:
        given: its path, or None to look in the environment variable LLAMA_CPP_CONVERTER and on PATH.

    Returns:
        The script.

    Raises:
        UserError: it is not there.

    Example:
        >>> find_converter("llama.cpp/convert_hf_to_gguf.py")  # doctest: +SKIP
    """
    fix = f"clone llama.cpp and give its {CONVERTER} with --converter PATH, or in the variable {VARIABLE}"
    for source, value in (("--converter", given), (VARIABLE, os.environ.get(VARIABLE))):
        if value:
            path = Path(value) / CONVERTER if Path(value).is_dir() else Path(value)
            if not path.is_file():
                raise UserError(f"{source} {value}: no such file", fix=fix)
            return path
    found = shutil.which(CONVERTER)
    if found is None:
        raise UserError(f"--to gguf: {CONVERTER} of llama.cpp is not on PATH", fix=fix)
    return Path(found)


def convert(model: Path, outfile: Path, outtype: str, converter: str | None = None) -> None:
    """Run the converter over a merged model.

    Args:
        model: folder that `save_pretrained` wrote.
        outfile: the GGUF file to be.
        outtype: `f32`, `f16`, `bf16` or `q8_0`.
        converter: as in `find_converter`.

    Raises:
        UserError: the converter failed, or wrote nothing; carries the last lines that it printed.

    Example:
        >>> convert(Path("out-merged"), Path("out.gguf"), "q8_0")  # doctest: +SKIP
    """
    script = find_converter(converter)
    command = [sys.executable, str(script), str(model), "--outfile", str(outfile), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not outfile.is_file():
        said = "\n".join(f"  | {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-15:])
        wrong = f"exited with {done.returncode}" if done.returncode else f"wrote no {outfile.name}"
        raise UserError(
            f"{script}: {wrong}; it said\n{said or '  | nothing'}",
            fix="install what it asks for, or take a llama.cpp that knows this architecture",
        )


def read_back(path: Path, model: Any, tokenizer: Any) -> ReadBack:
    """Read a GGUF file and hold all of it against the model and the tokenizer that it was made from.

    Args:
        path: the file.
        model: the merged model in float32.
        tokenizer: its tokenizer.

    Returns:
        The decoded tensors, and what was compared.

    Raises:
        NotProved: a tensor, the vocabulary or a hyperparameter is missing or wrong; names it.

    Example:
        >>> read_back(Path("out.gguf"), model, tokenizer).words  # doctest: +SKIP
        '9 F16 and 5 F32 tensors'
    """
    gguf = require()
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise NotProved(f"{path.name}: cannot be read back: {type(error).__name__}: {error}") from error
    architecture = _value(reader, "general.architecture")
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise NotProved(f"{path.name}: general.architecture is {architecture!r}, which the package gguf does not know")
    result = ReadBack()
    result.checks.append(_check_hyperparameters(path, reader, architecture, model.config))
    names = gguf.get_tensor_name_map(known[architecture], model.config.get_text_config().num_hidden_layers)
    expected = _expected(model, names, path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    _check_names(path, stored, expected, architecture, model)
    worst = 0.0
    for theirs, ours in expected.items():
        if theirs not in stored:
            continue  # a head that is tied to its embedding
        decoded, off = _compare(gguf, path, stored[theirs], model.state_dict()[ours], ours, architecture, model.config)
        result.tensors[ours], worst = decoded, max(worst, off)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    result.words = " and ".join(f"{count} {name}" for name, count in types.most_common()) + " tensors"
    result.checks.append(
        {"what": f"tensors of {path.name}", "tensors": len(stored), "types": dict(types), "error_in_steps": worst}
    )
    result.checks.append(_check_vocabulary(path, reader, model, tokenizer))
    return result


def with_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A model with other weights, for computing what a file stands for.

    Args:
        model: the merged model; it is changed.
        tensors: name to weight; of tied ones, one is enough.

    Returns:
        The model itself.

    Example:
        >>> with_weights(model, found.tensors)  # doctest: +SKIP
    """
    own = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return model


def load_with_transformers(path: Path, model: Any) -> tuple[Any, str]:
    """Load a GGUF file by transformers, where it reads from it the model that was written.

    Args:
        path: the file.
        model: the merged model.

    Returns:
        The model in float32 and an empty text, or None and the reason.

    Example:
        >>> load_with_transformers(Path("out.gguf"), merged)[1]  # doctest: +SKIP
        ''
    """
    try:
        loaded = type(model).from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # a dozen unrelated types say that it does not know the architecture
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    theirs, ours = loaded.config.to_dict(), model.config.to_dict()
    for key in sorted(ours.keys() - _BESIDE_THE_NUMBERS):
        if ours[key] != theirs.get(key) and not _close(ours[key], theirs.get(key)):
            return None, f"it takes {key} to be {theirs.get(key)!r}, which is {ours[key]!r}"
    return loaded, ""


def _close(ours: Any, theirs: Any) -> bool:
    """Numbers are in float32 in the file."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(v == theirs[k] or _close(v, theirs[k]) for k, v in ours.items())
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, theirs))
    return numbers and bool(np.isclose(float(ours), float(theirs), rtol=1e-6, atol=0))


def check_loaded(theirs: Logits, ours: Logits, merged: Logits, reference: Reference) -> dict[str, Any]:
    """Hold the logits of the file as transformers loads it against those of the tensors as they were read back.

    Args:
        theirs: as transformers has it.
        ours: of the merged model with the file's weights.
        merged: of the merged model itself.
        reference: what `make_reference` returned.

    Returns:
        What was compared, for `export.json`.

    Raises:
        NotProved: they differ by more than float32 does.

    Example:
        >>> check_loaded(theirs, ours, logits, reference)  # doctest: +SKIP
    """
    # Both are float32 runs of the same weights, and each may be as far from the exact one as the merged model is.
    shifted = copy.copy(reference)
    object.__setattr__(shifted, "truth", {name: value.double() for name, value in ours.items()})
    usual = {
        name: ours[name].double() + (merged[name].double() - reference.truth[name].double()) for name in reference.truth
    }
    found = check_close("the GGUF file, loaded by transformers,", theirs, usual, shifted, torch.float32)
    return found | {"what": "logits of the GGUF file, loaded by transformers, against its decoded tensors"}


def _value(reader: Any, key: str) -> Any:
    """Content of a key; None where the file has none."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _setting(config: Any, names: tuple[str, ...]) -> Any:
    text = config.get_text_config()
    return next((getattr(text, name) for name in names if getattr(text, name, None) is not None), None)


def _check_hyperparameters(path: Path, reader: Any, architecture: str, config: Any) -> dict[str, Any]:
    """Numbers that llama.cpp takes from the file: with one of them wrong, right tensors compute nonsense."""
    wanted = {key: _setting(config, names) for key, names in _HYPERPARAMETERS.items()}
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    wanted["rope.freq_base"] = rope.get("rope_theta") if isinstance(rope, dict) else None
    compared = 0
    for key, want in wanted.items():
        have = _value(reader, f"{architecture}.{key}")
        if have is None and key in _NEEDED:
            raise NotProved(f"{path.name}: {architecture}.{key} is missing")
        if have is None or want is None or isinstance(have, list):
            continue
        compared += 1
        if not np.isclose(float(have), float(want), rtol=1e-6, atol=0):
            raise NotProved(f"{path.name}: {architecture}.{key} is {have}, and the model has {want}")
    return {"what": f"hyperparameters of {path.name}", "keys": compared, "error": 0.0, "allowed": 0.0}


def _expected(model: Any, names: Any, path: Path) -> dict[str, str]:
    """GGUF's name of each tensor of a model, to transformers' name."""
    found: dict[str, str] = {}
    for ours in model.state_dict():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise NotProved(f"{path.name}: the package gguf knows no name for {ours}")
        if theirs in found:
            raise NotProved(f"{path.name}: {ours} and {found[theirs]} are both called {theirs}")
        found[theirs] = ours
    return found


def _check_names(path: Path, stored: Mapping, expected: Mapping, architecture: str, model: Any) -> None:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    missing = [name for name in expected if name not in stored and not (tied and name == "output.weight")]
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise NotProved(f"{path.name}: {missing[0]} ({expected[missing[0]]}) is missing{more}")
    for name in stored.keys() - expected.keys():
        if name != "rope_freqs.weight":
            raise NotProved(f"{path.name}: {name} is there, and the model has no such tensor")
        _check_frequencies(path, stored[name], model)


def _check_frequencies(path: Path, tensor: Any, model: Any) -> None:
    """Llama 3's scaled rotary frequencies: the file holds by how much each is divided."""
    rotary = next((module for module in model.modules() if hasattr(module, "inv_freq")), None)
    theta = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    have = torch.from_numpy(np.array(tensor.data, dtype=np.float64)).reshape(-1)
    if rotary is None or len(have) != len(rotary.inv_freq):
        raise NotProved(f"{path.name}: rope_freqs.weight has {len(have)} values, and the model's rotary embedding not")
    plain = theta ** -(torch.arange(len(have), dtype=torch.float64) / len(have))
    want = plain / rotary.inv_freq.double().cpu()
    if not torch.allclose(have, want, rtol=1e-5, atol=0):
        at = int((have - want).abs().argmax())
        raise NotProved(f"{path.name}: rope_freqs.weight is {have[at]:.6g} at {at}, and the model's {want[at]:.6g}")


def _compare(
    gguf: Any, path: Path, tensor: Any, want: torch.Tensor, ours: str, architecture: str, config: Any
) -> tuple[torch.Tensor, float]:
    """The decoded tensor in transformers' order, once every value of it is within what its type allows.

    The second value is the largest difference, in steps of the quantizer; 0 for floats, which have to be exact.
    """
    kind = tensor.tensor_type.name
    where = f"{path.name}: {tensor.name} ({ours})"
    if kind not in _TYPES:
        raise NotProved(f"{where} is {kind}, and only {', '.join(_TYPES)} can be proved")
    have = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    laid = _laid_out(want.detach().cpu().float(), ours, architecture, config)
    if have.shape != laid.shape and have.squeeze().shape == laid.squeeze().shape:
        have = have.reshape(laid.shape)
    if have.shape != laid.shape:
        raise NotProved(f"{where} is {list(have.shape)}, and the model's {list(laid.shape)}")
    if kind == "Q8_0":
        # A block of 32 has 127 steps up to its largest value; the step itself is stored in float16.
        step = laid.reshape(-1, 32).abs().amax(dim=1, keepdim=True).expand(-1, 32).reshape(laid.shape) / 127
        step = step.double()
        allowed = step * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25
        wrong = ~((have.double() - laid.double()).abs() <= allowed)
        off = ((have.double() - laid.double()).abs() / step.clamp(min=1e-30)).max().item() if have.numel() else 0.0
    else:
        rounded = {"F32": laid, "F16": laid.half().float(), "BF16": laid.bfloat16().float()}[kind]
        wrong, off = have != rounded, 0.0
    if wrong.any():
        away = (have.double() - laid.double()).abs().max().item()
        unknown = architecture not in (*_PERMUTED, *_PLUS_ONE, *_TRANSPOSED, *_AS_THEY_ARE)
        hint = f"; how llama.cpp lays out {architecture} is not known here" if unknown else ""
        raise NotProved(
            f"{where} is not the merged weight: {int(wrong.sum()):,} of {wrong.numel():,} values differ by more than"
            f" {kind} rounds, by up to {away:.2e}{hint}"
        )
    return _laid_back(have, ours, architecture, config), off


def _heads(ours: str, architecture: str, config: Any) -> int | None:
    """Heads of a q or k whose rows are in another order."""
    if architecture not in _PERMUTED or not ours.endswith((".weight", ".bias")):
        return None
    text = config.get_text_config()
    layer = ours.rsplit(".", 2)[-2]
    if layer == "q_proj":
        return text.num_attention_heads
    return (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) if layer == "k_proj" else None


def _laid_out(value: torch.Tensor, ours: str, architecture: str, config: Any) -> torch.Tensor:
    """A tensor of transformers' as llama.cpp has it."""
    heads = _heads(ours, architecture, config)
    if heads:
        # Rows i and i + half of a head rotate together; llama.cpp has them side by side.
        return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if architecture in _PLUS_ONE and ours.endswith("norm.weight"):
        return value + 1
    if ours.endswith(_TRANSPOSED.get(architecture, ())):
        return value.T
    return value


def _laid_back(value: torch.Tensor, ours: str, architecture: str, config: Any) -> torch.Tensor:
    """A tensor of llama.cpp's as transformers has it."""
    heads = _heads(ours, architecture, config)
    if heads:
        return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if architecture in _PLUS_ONE and ours.endswith("norm.weight"):
        return value - 1
    if ours.endswith(_TRANSPOSED.get(architecture, ())):
        return value.T
    return value


def _check_vocabulary(path: Path, reader: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    tokens = _value(reader, "tokenizer.ggml.tokens")
    if not tokens:
        raise NotProved(f"{path.name}: tokenizer.ggml.tokens is missing: the file has no vocabulary")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokens) != rows:
        raise NotProved(f"{path.name}: has {len(tokens):,} tokens for {rows:,} embeddings")
    added = tokenizer.added_tokens_decoder
    for number, want in enumerate(tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), rows)))):
        if tokens[number] == want or want is None:
            continue
        if number in added and tokens[number] == tokenizer.decode([number]):
            continue  # the converter writes user-defined tokens as they read
        raise NotProved(f"{path.name}: token {number} is {tokens[number]!r}, and the tokenizer's {want!r}")
    for name in ("bos", "eos"):
        want, have = getattr(tokenizer, f"{name}_token_id"), _value(reader, f"tokenizer.ggml.{name}_token_id")
        if want is not None and have != want:
            raise NotProved(f"{path.name}: tokenizer.ggml.{name}_token_id is {have}, and the tokenizer's is {want}")
    template = _value(reader, "tokenizer.chat_template")
    if tokenizer.chat_template and template != tokenizer.chat_template:
        reason = "is missing" if template is None else "is not the tokenizer's"
        raise NotProved(f"{path.name}: tokenizer.chat_template {reason}")
    return {"what": f"vocabulary of {path.name}", "tokens": len(tokens), "chat_template": template is not None}
