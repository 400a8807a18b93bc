"""What an export costs where it cannot be equal: loss, perplexity, and how often the most likely token stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyfinetune.errors import NotProved
from pyfinetune.train.export.proof import Greedy, Logits, Reference

_SHARE, _WITHOUT_BASE = 2.0, 0.1


def token_losses(logits: Logits, reference: Reference) -> torch.Tensor:
    """Loss of each learned token; of a model that is no language model, of the class that the trained one prefers.

    Args:
        logits: by row.
        reference: what `make_reference` returned.

    Returns:
        float64 [tokens].

    Example:
        >>> token_losses(reference.own, reference).mean().exp()  # doctest: +SKIP
    """
    found = []
    for row in reference.rows:
        values = logits[row.name].double()
        if row.labels is None:
            target = reference.own[row.name].double().argmax(dim=-1).reshape(-1)
            values = values.reshape(target.numel(), -1)
        elif "decoder_input_ids" in row.inputs:
            target = row.labels[0]
        else:
            values, target = values[:-1], row.labels[0, 1:]
        kept = target != -100
        found.append(torch.nn.functional.cross_entropy(values[kept], target[kept], reduction="none"))
    return torch.cat(found)


def judge_quantized(
    own: torch.Tensor, ours: torch.Tensor, base: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, Any]:
    """Decide whether re-quantized weights are still the model that was trained, by its loss.

    added = mean(ours - own) may be twice what quantizing the base alone adds, measured on the same tokens, and three
    standard errors of that mean, within which it is a matter of chance. Without a base that can be had in full, a loss
    that is a tenth worse is refused.

    Args:
        own: [tokens] losses of the model that was trained.
        ours: of the export.
        base: of the base model, dense and in 4 bits; None where there is none.

    Returns:
        The numbers, for `export.json`.

    Raises:
        NotProved: the loss has become worse than that.

    Example:
        >>> judge_quantized(torch.ones(9), 1.01 * torch.ones(9), None)["added_loss"]
        0.01
    """
    added = (ours - own).mean().item()
    by_base = None if base is None else (base[1] - base[0]).mean().item()
    chance = 3 * (ours - own).std(unbiased=False).item() / math.sqrt(len(own))
    allowed = chance + (_WITHOUT_BASE * own.mean().item() if by_base is None else _SHARE * max(by_base, 0.0))
    numbers = {
        "what": "loss of the re-quantized model",
        "tokens": len(own),
        "loss": own.mean().item(),
        "loss_of_export": ours.mean().item(),
        "perplexity": own.mean().exp().item(),
        "perplexity_of_export": ours.mean().exp().item(),
        "added_loss": round(added, 12),
        "added_by_quantizing_the_base": by_base,
        "allowed": allowed,
    }
    if not added <= allowed:
        measure = (
            f"a tenth of the loss, {allowed:.4f}, is allowed"
            if by_base is None
            else f"twice what quantizing the base adds ({by_base:.4f}) and chance make {allowed:.4f}"
        )
        raise NotProved(
            f"re-quantizing costs too much: the loss rises by {added:.4f} a token ({own.mean():.4f} to"
            f" {ours.mean():.4f}), and {measure}; export merged instead"
        )
    return numbers


def agreement(ours: Logits, reference: Reference, greedy: Sequence[Greedy] = ()) -> dict[str, Any]:
    """How far another model's logits are from the trained one's, where they cannot be equal.

    Args:
        ours: by row.
        reference: what `make_reference` returned.
        greedy: its greedy texts.

    Returns:
        Share of positions with the same most likely token, the largest difference of a logit, and how many greedy texts
        are equal, and tokens of them up to where they part.

    Example:
        >>> agreement(reference.own, reference)["same_most_likely"]  # doctest: +SKIP
        1.0
    """
    same, away = [], 0.0
    for name, own in reference.own.items():
        same.append((ours[name].double().argmax(dim=-1) == own.double().argmax(dim=-1)).double().reshape(-1))
        away = max(away, (ours[name].double() - own.double()).abs().max().item())
    joined = torch.cat(same)
    pairs = list(zip(greedy, reference.greedy, strict=False))
    parted = [[a == b for a, b in zip(mine.tokens, theirs.tokens, strict=False)] for mine, theirs in pairs]
    return {
        "what": "agreement with the trained model",
        "greedy_texts": len(pairs),
        "greedy_texts_equal": sum(mine.tokens == theirs.tokens for mine, theirs in pairs),
        "greedy_tokens": sum(map(len, parted)),
        "greedy_tokens_equal": sum([*same, False].index(False) for same in parted),
        "positions": len(joined),
        "same_most_likely": joined.mean().item(),
        "largest_difference": away,
    }
