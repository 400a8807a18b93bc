"""`patch`: swap the kernels into a Hugging Face model, say what was swapped and what was left, and take it back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterable

import torch
from torch import nn

from pyfinetune.errors import BackendUnavailable, InvalidInput
from pyfinetune.hf.changes import Change
from pyfinetune.hf.probe import Candidate, Proof
from pyfinetune.hf.report import LEFT, SWAPPED, Report, Row

# Kind of block -> the package whose modules it knows. A model that has such modules has imported that package already;
# one that has none must not. Blocks come after what they contain.
KINDS = {
    "lora_linear": "peft",
    "rms_norm": "transformers",
    "gated_mlp": "transformers",
    "attention_block": "transformers",
    "attention": "transformers",
    "causal_lm_loss": "transformers",
}


def candidates_in(model: nn.Module, kinds: Collection[str]) -> list[Candidate]:
    """Every module of these kinds, with what would be swapped in or why nothing is; nothing is proved yet."""
    known = [kind for kind, package in KINDS.items() if kind in kinds and package in sys.modules]
    modules = [importlib.import_module(f"pyfinetune.hf.{kind}") for kind in known]
    return [candidate for module in modules for candidate in module.candidates(model)]


def _proved(candidate: Candidate, proofs: dict[tuple, tuple[Proof, str]]) -> tuple[Proof, str]:
    if candidate.signature not in proofs:
        try:
            proofs[candidate.signature] = candidate.prove()
        except BackendUnavailable:
            raise  # the caller forced a backend, and it never falls back silently
        except Exception as error:  # whatever it is, the module stays as it is and the report says so
            reason = f"the probe failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            proofs[candidate.signature] = Proof(None, reason), ""
    return proofs[candidate.signature]


def _judged(candidates: Iterable[Candidate]) -> tuple[list[Row], list[Change]]:
    """A row for each candidate, and the changes of those that the kernels may take over."""
    proofs: dict[tuple, tuple[Proof, str]] = {}
    rows, changes = [], []
    for item in candidates:
        if item.reason is not None:
            rows.append(Row(item.kind, item.name, LEFT, None, item.reason, None))
            continue
        proof, backend = _proved(item, proofs)
        if proof.reason is not None:
            rows.append(Row(item.kind, item.name, LEFT, None, proof.reason, proof.error))
        else:
            rows.append(Row(item.kind, item.name, SWAPPED, backend, None, proof.error))
            changes.append(item.change)
    return rows, changes


def patch(model: nn.Module, kinds: Collection[str] | None = None) -> Report:
    """Swap the kernels into a model, in place.

    What is swapped, by kind: PEFT's LoRA layers over `nn.Linear`, `pf.Linear4bit` and bitsandbytes' `Linear4bit`
    ("lora_linear"), RMS norms ("rms_norm"), gated feed-forward blocks ("gated_mlp"), rotary attention blocks
    ("attention_block"), the attention itself ("attention") and the loss of a model that is called with labels
    ("causal_lm_loss"). Blocks are found by how they are built, not by name, and each distinct one is first proved on
    random numbers: where outputs or gradients are not as close to the exact ones as the original's, it is left alone.
    Parameters, keys, hooks, saving, merging and switching of adapters stay what they were, and whatever a kernel does
    not cover at run time runs on the original's own forward. Patch after `get_peft_model` and before wrapping the
    model in FSDP or DDP.

    Args:
        model: a Hugging Face model, with or without PEFT adapters, on its device and in its dtype.
        kinds: which kinds to swap; all when None.

    Returns:
        A report: print it, read `.rows`, or call `.undo()`.

    Raises:
        InvalidInput: not a module, or a kind that does not exist.
        BackendUnavailable: a backend is forced that cannot run here; nothing was swapped.

    Example:
        >>> report = pf.patch(model)
        >>> print(report)
        >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"patch: model is {type(model).__name__}, needs an nn.Module")
    chosen = KINDS if kinds is None else kinds
    unknown = sorted(set(chosen) - set(KINDS))
    if unknown:
        raise InvalidInput(f"patch: {', '.join(unknown)} is no kind of block; choose from {', '.join(KINDS)}")
    # Tensors that are made in inference mode have no gradients, and the probes need some.
    with torch.inference_mode(False):
        rows, changes = _judged(candidates_in(model, chosen))
    report = Report(rows, changes)
    try:
        for change in changes:
            change.apply()
    except Exception:
        report.undo()
        raise
    return report
