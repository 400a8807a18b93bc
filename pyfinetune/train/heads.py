"""The head that a model is trained with, and whether it fits the model and the rows.

    RunConfig, format of the rows, config.json -> choose_head -> Head -> encoders, spans, sequences, reward

A causal language model learns every task as text. An encoder has a head for each task, and an encoder-decoder writes
the answer. `auto` takes what the model was made for; a head that is named works wherever transformers has the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pyfinetune.errors import UserError
from pyfinetune.train.config import LORA_METHODS, HeadKind, RunConfig
from pyfinetune.train.formats import Example
from pyfinetune.train.model import read_config

CAUSAL, ENCODER, ENCODER_DECODER = "causal language model", "encoder", "encoder-decoder"
_CHATS = ("messages", "conversations", "prompt_completion", "alpaca", "dolly", "gpt4all")
_TASKS = ("classification", "token_classification", "question_answering", "summarization", "translation")


@dataclass(frozen=True)
class Head:
    """One way to end a model.

    Args:
        kind: its name under `head:`.
        auto_class: the class of transformers that loads it.
        mapping: the names of transformers' models that have it.
        task_type: PEFT's name for it, which decides what is trained and saved whole beside the adapters; None for none.
        formats: the formats of rows that it learns from.
        unit: what its loss is a mean over.
        pipeline: the hub's name for what it does.
        has_perplexity: whether exp(loss) says something.
        has_labels: whether its outputs are classes with names.
        outputs: how many values it gives where they have no names and the number is not the model's.
    """

    kind: str
    auto_class: str
    mapping: str
    task_type: str | None
    formats: tuple[str, ...]
    unit: str
    pipeline: str
    has_perplexity: bool = False
    has_labels: bool = False
    outputs: int | None = None


HEADS = {
    head.kind: head
    for head in (
        Head(
            "causal_lm",
            "AutoModelForCausalLM",
            "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            "CAUSAL_LM",
            (*_CHATS, *_TASKS, "text"),
            "token",
            "text-generation",
            has_perplexity=True,
        ),
        Head(
            "masked_lm",
            "AutoModelForMaskedLM",
            "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
            None,
            ("text",),
            "masked token",
            "fill-mask",
            has_perplexity=True,
        ),
        Head(
            "sequence_classification",
            "AutoModelForSequenceClassification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            "SEQ_CLS",
            ("classification",),
            "row",
            "text-classification",
            has_labels=True,
        ),
        Head(
            "token_classification",
            "AutoModelForTokenClassification",
            "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
            "TOKEN_CLS",
            ("token_classification",),
            "word",
            "token-classification",
            has_labels=True,
        ),
        Head(
            "question_answering",
            "AutoModelForQuestionAnswering",
            "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
            "QUESTION_ANS",
            ("question_answering",),
            "end of a span",
            "question-answering",
            outputs=2,
        ),
        Head(
            "seq2seq_lm",
            "AutoModelForSeq2SeqLM",
            "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
            "SEQ_2_SEQ_LM",
            (*_CHATS, *_TASKS),
            "target token",
            "text2text-generation",
            has_perplexity=True,
        ),
        Head(
            "reward",
            "AutoModelForSequenceClassification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            "SEQ_CLS",
            ("preference",),
            "pair",
            "text-classification",
            outputs=1,
        ),
    )
}
# The task under which rows of a format are named in a configuration.
_TASK_OF = {"text": "pretrain", **dict.fromkeys(_CHATS, "sft")}


def family_of(model_config: Any) -> str:
    """What kind of model a config.json describes.

    Args:
        model_config: what transformers makes of it.

    Returns:
        `CAUSAL`, `ENCODER` or `ENCODER_DECODER`. A type that could be either, such as BERT, is an encoder unless it was
        saved as a causal model.

    Example:
        >>> family_of(AutoConfig.from_pretrained("google/bert_uncased_L-2_H-128_A-2"))  # doctest: +SKIP
        'encoder'
    """
    from transformers.models.auto import modeling_auto

    if getattr(model_config, "is_encoder_decoder", False):
        return ENCODER_DECODER
    if model_config.model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return CAUSAL
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_config.model_type)
    return CAUSAL if causal is not None and causal in (model_config.architectures or ()) else ENCODER


def may_be_unanswered(config: RunConfig) -> bool:
    """Whether a question may have no answer: a head that points at it can point at nothing.

    Args:
        config: the run's configuration.

    Returns:
        True for extractive question answering.

    Example:
        >>> may_be_unanswered(config)  # doctest: +SKIP
        False
    """
    if config.head != "auto":
        return config.head == "question_answering"
    return _auto_kind(_config_of(config), "question_answering") == "question_answering"


def choose_head(config: RunConfig, examples: Sequence[Example]) -> Head:
    """The head that a run trains.

    Args:
        config: the run's configuration.
        examples: the training examples.

    Returns:
        The head named under `head:`, or with `auto` the one that the model was made for and that fits the rows.

    Raises:
        UserError: the model has no such head, the rows do not fit it, or a key is set that it cannot do.

    Example:
        >>> choose_head(config, data.train).kind  # doctest: +SKIP
        'sequence_classification'
    """
    first = examples[0]
    model_config = _config_of(config)
    kind = _auto_kind(model_config, first.format) if config.head == "auto" else config.head
    if kind is None:
        raise UserError(
            f"model_name_or_path: {config.model_name_or_path} is an encoder, which has no head for {first.format} rows"
            f" ({first.place})",
            fix="give a causal language model or an encoder-decoder, or rows of text/label, tokens/tags,"
            " question/context/answers, or raw text",
        )
    head = HEADS[kind]
    for example in examples:
        if example.format not in head.formats:
            raise _unfit(head, example, model_config)
    if model_config is not None:
        _check_model(head, model_config, config)
    if kind != "causal_lm":
        _check_keys(head, config)
    return head


def choose_labels(examples: Sequence[Example], head: Head, known: dict[int, str] | None = None) -> tuple[str, ...]:
    """The names of a head's classes.

    Args:
        examples: the training examples.
        head: a head with labels.
        known: the classes that the model was saved with.

    Returns:
        The names in the order of their numbers: the model's own where they are these, else sorted, whole numbers by
        their size. Of tags both B- and I- are there where one of them is.

    Raises:
        UserError: a row has no label.

    Example:
        >>> choose_labels(examples, HEADS["sequence_classification"])  # doctest: +SKIP
        ('neg', 'pos')
    """
    values: set[Any] = set()
    for example in examples:
        values |= set(labels_of(example, head, raw=True))
    names = {str(value) for value in values}
    if head.kind == "token_classification":
        kinds = {name[2:] for name in names if name[:2] in ("B-", "I-")}
        names |= {f"{prefix}{kind}" for kind in kinds for prefix in ("B-", "I-")}
    if known and set(known.values()) == names and len(known) == len(names):
        return tuple(known[number] for number in sorted(known))
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return tuple(map(str, sorted(values)))
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def labels_of(example: Example, head: Head, raw: bool = False) -> list[Any]:
    """An example's label, or its tags.

    Args:
        example: a row of the head's task.
        head: a head with labels.
        raw: as they stand in the row, instead of as names.

    Returns:
        One of each row, or one of each word.

    Example:
        >>> row = Example("f, row 1", "classification", fields={"text": "a", "label": 1})
        >>> labels_of(row, HEADS["sequence_classification"])
        ['1']
    """
    if head.kind == "token_classification":
        tags = example.fields.get("tags")
        values = list(example.fields["ner_tags"] if tags is None else tags)
    else:
        values = [example.fields["label"]]
    return values if raw else list(map(str, values))


def number_labels(example: Example, head: Head, labels: Sequence[str]) -> list[int]:
    """The numbers of an example's labels.

    Args:
        example: a row of the head's task.
        head: a head with labels.
        labels: what `choose_labels` returned.

    Returns:
        One of each row, or one of each word.

    Raises:
        UserError: a label is in no training row.

    Example:
        >>> row = Example("f, row 1", "classification", fields={"text": "a", "label": "pos"})
        >>> number_labels(row, HEADS["sequence_classification"], ["neg", "pos"])
        [1]
    """
    numbers = {name: number for number, name in enumerate(labels)}
    found = labels_of(example, head)
    for name in found:
        if name not in numbers:
            shown = ", ".join(labels[:12]) + (" ..." if len(labels) > 12 else "")
            raise UserError(
                f"{example.place}: the label {name!r} is in no training row (labels: {shown})",
                fix="correct the label, add training rows that have it, or hold other rows out",
            )
    return [numbers[name] for name in found]


def saved_labels(model_config: Any) -> dict[int, str] | None:
    """The classes that a model was saved with.

    Args:
        model_config: what transformers makes of its config.json.

    Returns:
        Number to name; None where they are but transformers' own LABEL_0, LABEL_1, ...

    Example:
        >>> saved_labels(AutoConfig.from_pretrained("bert-base-cased")) is None  # doctest: +SKIP
        True
    """
    found = getattr(model_config, "id2label", None) or {}
    names = {int(number): str(name) for number, name in found.items()}
    return None if all(name == f"LABEL_{number}" for number, name in names.items()) else names


def _config_of(config: RunConfig) -> Any:
    """The model's config.json; None where it cannot be read, which the step that loads the model will say."""
    try:
        return read_config(config.model_name_or_path)
    except UserError:
        return None


def _auto_kind(model_config: Any, data_format: str) -> str | None:
    if data_format == "preference":
        return "reward"
    family = CAUSAL if model_config is None else family_of(model_config)
    if family == ENCODER_DECODER:
        return "seq2seq_lm"
    if family == ENCODER:
        fitting = (head for head in HEADS.values() if head.kind not in ("causal_lm", "seq2seq_lm"))
        return next((head.kind for head in fitting if data_format in head.formats), None)
    # A decoder that was saved with a head of its own goes on with it.
    saved = " ".join(getattr(model_config, "architectures", None) or ())
    endings = {
        "ForSequenceClassification": "sequence_classification",
        "ForTokenClassification": "token_classification",
        "ForQuestionAnswering": "question_answering",
    }
    for ending, kind in endings.items():
        if ending in saved and data_format in HEADS[kind].formats:
            return kind
    return "causal_lm"


def _unfit(head: Head, example: Example, model_config: Any) -> UserError:
    if example.format == "text" and head.kind == "seq2seq_lm":
        fix = "give rows with a source and a target; raw text is for head: causal_lm or masked_lm"
    else:
        fitting = _auto_kind(model_config, example.format)
        fix = f"set head: {fitting}" if fitting and example.format in HEADS[fitting].formats else ""
        names = sorted({_TASK_OF.get(name, name) for name in head.formats})
        fix += f"{', or ' if fix else ''}give rows of the task {' or '.join(names)}"
        if head.kind == "masked_lm" and example.format == "classification":
            fix = "set task: pretrain, which reads only the column text, or head: sequence_classification"
    return UserError(f"head: {head.kind} does not fit {example.place}, which is {example.format}", fix=fix)


def _check_model(head: Head, model_config: Any, config: RunConfig) -> None:
    from transformers.models.auto import modeling_auto

    kind, family = model_config.model_type, family_of(model_config)
    has_it = kind in getattr(modeling_auto, head.mapping)
    misused = head.kind == "causal_lm" and family != CAUSAL
    # `auto` on a type that transformers has no causal class of is left to the loading, which names the reason.
    if misused or (not has_it and (head.kind != "causal_lm" or config.head != "auto")):
        having = [k for k in get_args(HeadKind) if k in HEADS and kind in getattr(modeling_auto, HEADS[k].mapping)]
        having = [k for k in having if not (k == "causal_lm" and family != CAUSAL)]
        raise UserError(
            f"head: {config.model_name_or_path} ({kind}, {_article(family)}) has no head {head.kind}",
            fix=f"leave head out, or choose among {', '.join(having)}" if having else "give another model",
        )


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _check_keys(head: Head, config: RunConfig) -> None:
    wrong = {
        "packing": (config.packing, "rows of such a model would see each other"),
        "eos_token": (config.eos_token is not None and head.kind != "reward", "its tokenizer ends texts by itself"),
        "completion_only_loss": (config.completion_only_loss is not None, "it has no completions to tell from prompts"),
    }
    if config.method not in (*LORA_METHODS, "full", "ia3"):
        raise UserError(
            f"method: {config.method} is for causal language models; this run has head: {head.kind}",
            fix="set method: lora, ia3 or full",
        )
    for key, (is_set, why) in wrong.items():
        if is_set:
            raise UserError(
                f"{key}: is for causal language models; this run has head: {head.kind}, and {why}",
                fix=f"leave {key} out",
            )
