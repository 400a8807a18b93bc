"""How an export is held against the model that it was made from: logits against float64, and greedy text.

The adapter is merged in float64, where reassociating a sum moves nothing that float32 could hold: the merged model's
logits have to be those of the adapter model to one ulp of float32. What is written is then shown to be those weights,
rounded once, every bit of them, and to compute in float64 what they compute in memory. The logits of the file as it is
used have the bound of every kernel: the norm of their error, against the float64 run of the adapter model, may be twice
that of the adapter model in the same dtype (of the row where that is largest), plus one ulp of the exact norm, plus
what rounding the weights does to the exact logits, which is measured. Of a head with few outputs, whose error is a
matter of chance, the adapter model is run several times, its weights rounded otherwise.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyfinetune.errors import NotProved, UserError
from pyfinetune.hf.originals import dense_copy
from pyfinetune.hf.probe import Widened
from pyfinetune.hf.verify import double_fits
from pyfinetune.parity import Item, judge
from pyfinetune.train.export.rows import ProofRow

_FEW, _DRAWS = 64, 8
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 32, 24
Logits = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Greedy:
    """What a model answers, its most likely token each time.

    Args:
        name: the row whose beginning it continues.
        tokens: the new tokens' ids.
        logits: [new tokens, vocabulary] that they were chosen by.
    """

    name: str
    tokens: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """What the model that is exported computes.

    Args:
        rows: that every model is given.
        own: its logits in its own dtype, as it was trained.
        same: in the dtype of the export.
        truth: in float64; in float32 where a float64 copy of the model does not fit in memory.
        exact: which of them, by name.
        greedy: its text.
        draws: of a head with few outputs, as `same`, each with other roundings of the weights.
    """

    rows: list[ProofRow]
    own: Logits
    same: Logits
    truth: Logits
    exact: str
    greedy: list[Greedy]
    draws: tuple[Logits, ...] = ()


def make_reference(model: Any, rows: list[ProofRow], dtype: torch.dtype) -> Reference:
    """Run the model that is exported in its own dtype, in that of the export, in float32 and in float64.

    Args:
        model: the adapter model, not merged, or a whole model; it stays as it is.
        rows: what `proof_rows` chose.
        dtype: of the export.

    Returns:
        What it computed.

    Raises:
        UserError: a float64 copy does not fit in memory, and an export in float32 is proved by nothing less.

    Example:
        >>> make_reference(model, rows, torch.bfloat16).exact  # doctest: +SKIP
        'float64'
    """
    fits = double_fits(model)
    if not fits and dtype is torch.float32:
        raise UserError(
            "export: no memory for a float64 copy of the model, against which an export in float32 is proved",
            fix="export with --dtype bfloat16, or where there is more memory",
        )
    own = logits_of(model, rows)
    greedy = greedy_of(model, rows)
    dense = cast_weights(dense_copy(model, torch.float32), torch.float32)
    single = None if fits and _dtype_of(model) is dtype else logits_of(dense, rows)
    if _dtype_of(model) is dtype:
        same = own
    else:
        same = single if dtype is torch.float32 else logits_of(cast_weights(copy.deepcopy(dense), dtype), rows)
    few = min(logits.numel() for logits in own.values()) < _FEW
    draws = tuple(logits_of(_drawn(dense, dtype, seed), rows) for seed in range(_DRAWS)) if few else ()
    truth = logits_of(dense.double(), rows, exact=True) if fits else single
    return Reference(rows, own, same, truth, "float64" if fits else "float32", greedy, draws)


def _drawn(model: Any, dtype: torch.dtype, seed: int) -> Any:
    """A copy in a dtype whose weights are rounded otherwise: each within half an ulp of what it is."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    half = torch.finfo(dtype).eps / 2
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            jitter = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.data = (parameter.data.double() * (1 + half * jitter.to(parameter.device))).float()
    return cast_weights(twin, dtype)


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Bring what a model saves to another dtype, in place; ties stay.

    Buffers that are not saved, such as the frequencies of a rotary embedding, are in float32 in a model that was read
    from the disk, and stay so.

    Args:
        model: without 4-bit layers.
        dtype: float32, float16 or bfloat16.

    Returns:
        The model itself.

    Example:
        >>> cast_weights(torch.nn.Linear(2, 2), torch.bfloat16).weight.dtype
        torch.bfloat16
    """
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                saved = name not in module._non_persistent_buffers_set
                module._buffers[name] = buffer.to(dtype if saved else torch.float32)
    return model


def logits_of(model: Any, rows: Sequence[ProofRow], exact: bool = False) -> Logits:
    """A model's logits of each row.

    Args:
        model: any model with a head.
        rows: what it is called with, one by one.
        exact: the model is in float64, and code of its own that asks for float32 gets float64 too.

    Returns:
        Row's name to a tensor on the CPU: [tokens, vocabulary], [classes], [tokens, classes] or [tokens, 2].

    Example:
        >>> logits_of(model, rows)["sums.jsonl, row 3"].shape  # doctest: +SKIP
        torch.Size([12, 400])
    """
    device = next(model.parameters()).device
    found = {}
    for row in rows:
        with torch.no_grad():
            if exact:
                with Widened():
                    out = model(**row.on(device))
            else:
                out = model(**row.on(device))
        start = getattr(out, "start_logits", None)
        logits = torch.stack([start, out.end_logits], dim=-1) if start is not None else out.logits
        found[row.name] = (logits + 0)[0].detach().cpu()
    return found


def exact_run(model: Any, reference: Reference) -> Logits:
    """A model's logits in float64, or in float32 where the reference is.

    Args:
        model: in memory or read back, in any dtype or in 4 bits; it stays as it is.
        reference: what `make_reference` returned.

    Returns:
        Logits by row.

    Example:
        >>> exact_run(merged.bfloat16(), reference)  # doctest: +SKIP
    """
    wide = getattr(torch, reference.exact)
    return logits_of(dense_copy(model, torch.float32).to(wide), reference.rows, exact=wide is torch.float64)


def distances(ours: Logits, truth: Logits) -> dict[str, float]:
    """How far logits are from others.

    Args:
        ours, truth: by row.

    Returns:
        Row's name to the norm of the difference, relative to the norm of `truth`.

    Example:
        >>> distances({"a": torch.ones(2)}, {"a": torch.ones(2)})
        {'a': 0.0}
    """
    return {
        name: (ours[name].double() - want.double()).norm().item() / (want.double().norm().item() or 1.0)
        for name, want in truth.items()
    }


def check_same(what: str, fault: str, ours: Logits, theirs: Logits, allowed: float) -> dict[str, Any]:
    """Hold two exact runs against each other.

    Args:
        what: the model that is looked at, for the message.
        fault: what is wrong where they differ.
        ours: its exact logits.
        theirs: those that they have to be.
        allowed: norm of the difference, relative to that of `theirs`.

    Returns:
        What was compared, for `export.json`.

    Raises:
        NotProved: a row's logits differ by more.

    Example:
        >>> check_same("a", "is wrong", {"row 1": torch.ones(2)}, {"row 1": torch.ones(2)}, 1e-7)["error"]
        0.0
    """
    found = distances(ours, theirs)
    for name, error in found.items():
        if not error <= allowed:
            raise NotProved(
                f"{what} {fault}: {name}: its logits are off by {error:.2e} of their norm, allowed are {allowed:.2e}"
            )
    return {"what": f"exact logits of {what}", "rows": len(found), "error": max(found.values()), "allowed": allowed}


def check_close(
    what: str,
    ours: Logits,
    usual: Logits,
    reference: Reference,
    dtype: torch.dtype,
    extra: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Hold logits against the exact ones.

    Args:
        what: the model that is looked at, for the message.
        ours: its logits.
        usual: the logits of the model that was exported, in the same dtype.
        reference: what `make_reference` returned.
        dtype: of both.
        extra: added to what is allowed, relative to the norm of the exact logits.

    Returns:
        The row that is the farthest off, for `export.json`.

    Raises:
        NotProved: a row's logits are too far off.

    Example:
        >>> check_close("merged", ours, reference.same, reference, torch.float32)  # doctest: +SKIP
    """
    items = judge(ours, usual, reference.truth, dtype)
    # The error of a classifier's two logits is a matter of chance: it is taken of several roundings, and of all rows.
    drawn = [item for draw in reference.draws for item in judge(draw, draw, reference.truth, dtype)]
    allowed = max(item.allowed for item in (*items, *drawn)) + max((extra or {}).values(), default=0.0)
    items = [dataclasses.replace(item, allowed=allowed) for item in items]
    for item in items:
        if not item.ok:
            raise NotProved(
                f"{what} is not the model that was trained: {item.name}: its logits are off by {item.error:.2e} of"
                f" their norm, allowed are {item.allowed:.2e} (the trained model itself in {name_of(dtype)}:"
                f" {item.usual:.2e})"
            )
    worst: Item = max(items, key=lambda item: item.error)
    return {
        "what": f"logits of {what}, against {reference.exact}",
        "rows": len(items),
        "error": worst.error,
        "allowed": worst.allowed,
        "trained_model": worst.usual,
    }


def check_equal(what: str, ours: Logits, theirs: Logits) -> dict[str, Any]:
    """Hold logits against logits, bit by bit.

    Args:
        what: the model that is looked at, for the message.
        ours, theirs: logits by row.

    Returns:
        What was compared, for `export.json`.

    Raises:
        NotProved: a row's logits differ.

    Example:
        >>> check_equal("the adapter", ours, reference.own)  # doctest: +SKIP
    """
    for name, want in theirs.items():
        if not torch.equal(ours[name], want):
            away = (ours[name].double() - want.double()).abs().max().item()
            raise NotProved(
                f"{what} is not the model that was trained: {name}: its logits differ by up to {away:.2e}, and have to"
                " be equal"
            )
    return {"what": f"logits of {what}, bit by bit", "rows": len(theirs), "error": 0.0, "allowed": 0.0}


def greedy_of(model: Any, rows: Sequence[ProofRow]) -> list[Greedy]:
    """A model's greedy continuations of the beginnings of a few rows.

    Args:
        model: any model; one that cannot generate gives none.
        rows: what `proof_rows` chose.

    Returns:
        At most three texts of at most 24 tokens.

    Example:
        >>> greedy_of(model, rows)[0].tokens  # doctest: +SKIP
    """
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (hasattr(inner, "can_generate") and inner.can_generate()):
        return []
    known = getattr(inner, "generation_config", None)
    end = getattr(known, "eos_token_id", None)
    pad = end[0] if isinstance(end, list) else end
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        decoder_start_token_id=getattr(inner.config, "decoder_start_token_id", None),
    )
    device = next(model.parameters()).device
    found = []
    for row in rows[:_PROMPTS]:
        ids = row.inputs["input_ids"]
        ids = ids[:, : min(_PROMPT_TOKENS, max(1, ids.shape[1] // 2))].to(device)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")  # of prompt tuning
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        logits = torch.stack([step[0] for step in out.logits]).float().cpu()
        found.append(Greedy(row.name, out.sequences[0, -len(logits) :].tolist(), logits))
    return found


def check_greedy(what: str, ours: list[Greedy], reference: Reference, found: Logits) -> dict[str, Any]:
    """Hold greedy text against that of the model that was trained.

    Args:
        what: the model that is looked at, for the message.
        ours: its texts.
        reference: what `make_reference` returned.
        found: its logits of the rows, which have been proved.

    Returns:
        How many texts are equal, for `export.json`.

    Raises:
        NotProved: a text parts from the trained model's where that was sure of its token: by more than the two models'
            errors, measured on the rows, can turn.

    Example:
        >>> check_greedy("merged", greedy_of(merged, rows), reference, logits)  # doctest: +SKIP
    """
    away = max(
        ((logits[name].double() - truth.double()).abs().max().item())
        for logits in (found, reference.own)
        for name, truth in reference.truth.items()
    )
    equal = 0
    for mine, theirs in zip(ours, reference.greedy, strict=True):
        if mine.tokens == theirs.tokens:
            equal += 1
            continue
        pairs = list(zip(mine.tokens, theirs.tokens, strict=False))
        step = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        if step < len(pairs):
            a, b = pairs[step]
            margin = (theirs.logits[step, b] - theirs.logits[step, a]).item()
            # Each of the two tokens' logits may be off by `away` in either model.
            if not margin <= 4 * away:
                raise NotProved(
                    f"{what} is not the model that was trained: {theirs.name}: its greedy text parts at token"
                    f" {step + 1}, where the trained model is sure by {margin:.2e}, and the errors are {away:.2e}"
                )
    return {"what": f"greedy text of {what}", "texts": len(ours), "equal": equal}


def _dtype_of(model: Any) -> torch.dtype:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.dtype


def name_of(dtype: torch.dtype) -> str:
    """A type's name.

    Example:
        >>> name_of(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
