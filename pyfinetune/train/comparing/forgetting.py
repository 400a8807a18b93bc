"""Whether a fine-tuned model has lost what its base could: loss per token on general text, before and after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rich.console import Console

from pyfinetune.train.comparing.answer_cache import AnswerCache, digest
from pyfinetune.train.comparing.config import CompareConfig
from pyfinetune.train.comparing.systems import LoadedModel
from pyfinetune.train.data.formats import to_examples
from pyfinetune.train.data.sources import as_paths
from pyfinetune.train.data.tokenizing import tokenize
from pyfinetune.train.evaluation import metrics
from pyfinetune.train.evaluation.generating import document_losses
from pyfinetune.train.evaluation.metrics import Score
from pyfinetune.train.evaluation.rows import drawn, read_rows
from pyfinetune.train.progress import Counter

_LONGEST = 1024  # tokens of a piece of text


@dataclass(frozen=True)
class Forgetting:
    """Loss per token on general text.

    Args:
        before: of the base model.
        after: of the fine-tuned one; None until it was measured.
        difference: after minus before, over the same texts.
        tokens: that the loss is a mean of.
        losses: sum of losses of each text under the base model.
        targets: tokens of each text.
    """

    before: Score
    after: Score | None = None
    difference: Score | None = None
    tokens: int = 0
    losses: tuple[float, ...] = ()
    targets: tuple[int, ...] = ()

    @property
    def sentence(self) -> str:
        """The finding, for a person."""
        difference = self.difference
        if self.after is None or difference is None:
            return f"loss on general text {self.before}"
        if difference.low > 0:
            words = "general text is less familiar to the tuned model than to its base"
        elif difference.high < 0:
            words = "general text is more familiar to the tuned model than to its base"
        else:
            words = "no forgetting is to be seen on general text"
        return f"{words}: loss per token {self.before} before, {self.after} after; difference {difference}"


def measure_forgetting(
    config: CompareConfig, kind: str, loaded: LoadedModel, earlier: Forgetting | None, console: Console
) -> Forgetting:
    """Measure the loss on general text of one of the two models.

    Args:
        config: of the comparison; `general_file` is set.
        kind: `base`, which comes first, or `tuned`.
        loaded: the model.
        earlier: what was measured of the base model.
        console: where the progress bar goes.

    Returns:
        What is known so far.

    Raises:
        UserError: the file is at fault.

    Example:
        >>> measure_forgetting(config, "base", loaded, None, Console()).before.value  # doctest: +SKIP
        3.21
    """
    rows = read_rows(as_paths(config.general_file))
    texts = drawn(to_examples(rows, task="pretrain"), config.general_rows, config.seed)
    tokenizer = loaded.tokenizer("text")
    positions = loaded.found.positions
    documents = tokenize(texts, tokenizer, min(_LONGEST, positions or _LONGEST)).documents
    cache = AnswerCache(config.folder / "answers" / f"general-{kind}.jsonl")
    keys = [digest(loaded.identity, str(loaded.device), document.input_ids.tolist()) for document in documents]
    missing = [at for at, key in enumerate(keys) if cache.get(key) is None]
    if missing:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with Counter(console, f"general text, {kind}", len(missing)) as counter:

            def keep(batch: list[int], losses: list[float]) -> None:
                found = zip((missing[index] for index in batch), losses, strict=True)
                cache.add({keys[at]: {"row": documents[at].place, "loss": loss} for at, loss in found})
                counter.add(len(batch))

            chosen = [documents[at] for at in missing]
            document_losses(loaded.model, chosen, pad_token_id=pad, batch_size=config.batch_size, on_batch=keep)
    losses = tuple(float(cache.get(key)["loss"]) for key in keys)
    targets = tuple(int(document.learned[1:].sum()) for document in documents)
    options = {"seed": config.seed, "resamples": config.resamples}
    score = metrics.perplexity(losses, targets, **options)["loss"]
    if earlier is None:
        return Forgetting(score, tokens=sum(targets), losses=losses, targets=targets)
    difference = metrics.loss_difference(losses, earlier.losses, targets, **options)
    return dataclasses.replace(earlier, after=score, difference=difference, losses=(), targets=())
