"""The run's YAML file as a checked object: every key known, every value of the right kind, every mistake with its mend.

YAML text -> `load_config` -> `RunConfig`, which the later steps (`data`, `tokenizing`, `model`, `loop`, `run`) read as
plain values. Keys carry Hugging Face's names; the section `trainer:` is handed to `TrainingArguments` untouched.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from pyfinetune.errors import UserError
from pyfinetune.train.checked_yaml import nearest, read_yaml, value_error
from pyfinetune.train.search_space import HpoSection, Range, with_values
from pyfinetune.train.sources import CleanKind, Files, Replay, Source, WeightedSource

Method = Literal["lora", "rslora", "dora", "qlora", "full", "prompt_tuning", "prefix_tuning", "ia3", "adaption_prompt"]
LORA_METHODS = ("lora", "rslora", "dora", "qlora")
# These put virtual tokens before the first one of a row.
VIRTUAL_TOKEN_METHODS = ("prompt_tuning", "prefix_tuning")
VIRTUAL_TOKENS, ADAPTER_LEN = 20, 10  # where the configuration does not say; the second as LLaMA-Adapter's paper has it
HeadKind = Literal[
    "auto",
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "seq2seq_lm",
    "reward",
]

# Values that have a key of their own, so that one run has one answer to "where does it write, and from which seed".
_OWNED_BY_CONFIG = {
    "output_dir": "output_dir",
    "seed": "seed",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
    "resume_from_checkpoint": "resume",
    "use_cpu": "device: cpu",
}

# Keys that one group of methods reads.
_KEYS_OF_METHODS = {
    ("use_dora", "use_rslora"): LORA_METHODS,
    ("num_virtual_tokens", "prompt_tuning_init_text"): VIRTUAL_TOKEN_METHODS,
    ("adapter_len", "adapter_layers"): ("adaption_prompt",),
}
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")

# A search compares trials by their held-out loss; these decide what that is, or where it is found.
_NOT_SEARCHED = {
    *("output_dir", "train_file", "validation_file", "dataset_name", "dataset_config_name", "test_size", "columns"),
    *("sample_by", "task", "chat_template", "eos_token", "completion_only_loss", "max_length", "seed", "resume"),
    *("dataset_train_split", "dataset_test_split", "sources", "stopping_strategy", "replay", "test_file"),
    *("validation_size", "group_column", "clean", "hpo"),
    *("report", "report_examples", "device", "patch", "trainer", "eval_steps", "save_steps"),
    *("head", "mlm_probability", "doc_stride", "source_prefix", "eval_generate_rows"),
}


class RunConfig(Source):
    """One fine-tuning run, as its YAML file describes it.

    Example:
        >>> RunConfig(model_name_or_path="my-model", train_file="rows.jsonl", output_dir="out").method
        'lora'
    """

    model_name_or_path: str
    output_dir: str

    sources: list[WeightedSource] | None = Field(default=None, min_length=1)
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    replay: Replay | None = None
    test_file: Files | None = None
    test_size: float | int | None = Field(default=None, gt=0)
    validation_size: float | int | None = Field(default=None, gt=0)
    group_column: str | None = None
    clean: list[CleanKind] = Field(default_factory=list)

    head: HeadKind = "auto"
    mlm_probability: float = Field(default=0.15, gt=0, lt=1)
    doc_stride: int = Field(default=128, ge=0)
    source_prefix: str = ""
    eval_generate_rows: int = Field(default=200, ge=0)

    method: Method = "lora"
    max_length: int = Field(default=1024, ge=2)
    packing: bool = False
    completion_only_loss: bool | None = None
    chat_template: str = "auto"
    eos_token: str | None = None

    lora_r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_dora: bool = False
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"

    num_virtual_tokens: int | None = Field(default=None, ge=1)
    prompt_tuning_init_text: str | None = Field(default=None, min_length=1)
    adapter_len: int | None = Field(default=None, ge=1)
    adapter_layers: int | None = Field(default=None, ge=1)

    dropout: float | None = Field(default=None, ge=0, lt=1)
    freeze: Literal["half", "gradual"] | None = None
    freeze_every: int | None = Field(default=None, ge=1)
    layerwise_lr_decay: float | None = Field(default=None, gt=0, le=1)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attn_implementation: str | None = None
    patch: bool = True

    seed: int = Field(default=42, ge=0)
    resume: str = "auto"
    eval_steps: int | None = Field(default=None, ge=1)
    save_steps: int | None = Field(default=None, ge=1)
    early_stopping_patience: int | None = Field(default=None, ge=1)
    global_batch_size: int | None = Field(default=None, ge=1)
    trainer: dict[str, Any] = Field(default_factory=dict)

    report: bool = True
    report_examples: int = Field(default=3, ge=0, le=20)
    hpo: HpoSection | None = None

    @field_validator("clean", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        if value == "all":
            return list(get_args(CleanKind))
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> RunConfig:
        if self.sources is None:
            super()._one_origin()
            return self
        if self.train_file is not None or self.dataset_name is not None:
            raise ValueError("give exactly one of train_file, dataset_name and sources")
        for key in ("validation_file", "dataset_config_name", "dataset_test_split", "columns"):
            if getattr(self, key):
                raise ValueError(f"{key} stands inside each of the sources, not beside them")
        return self

    @model_validator(mode="after")
    def _method_agrees(self) -> RunConfig:
        for keys, methods in _KEYS_OF_METHODS.items():
            for key in keys:
                if getattr(self, key) not in (None, False) and self.method not in methods:
                    raise ValueError(f"{key} is for method: {' and '.join(methods)}, and method is {self.method}")
        if self.freeze == "half" and self.method != "full":
            raise ValueError(f"freeze: half is for method: full; {self.method} has frozen the model already")
        if self.method in VIRTUAL_TOKEN_METHODS:
            if self.packing:
                raise ValueError(
                    f"packing: true does not go with method: {self.method}, whose virtual tokens only the first"
                    " document of a row would see; set packing: false"
                )
            for key in ("freeze", "layerwise_lr_decay"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} parts a model by its layers, and method: {self.method} trains none of them"
                    )
        if self.method == "prefix_tuning" and any(self.trainer.get(key) for key in _CHECKPOINTING):
            raise ValueError(
                "method: prefix_tuning keeps its prefix in the cache, which a layer that is recomputed does not have;"
                " leave gradient checkpointing out, or set method: prompt_tuning"
            )
        return self

    @model_validator(mode="after")
    def _keys_agree(self) -> RunConfig:
        given = any(s.validation_file is not None or s.dataset_test_split is not None for s in self.origins)
        if given and self.test_size is not None:
            raise ValueError("give validation_file or test_size, not both: each decides what is held out")
        if given and self.validation_size is not None:
            raise ValueError("give validation_file or validation_size, not both: each decides what is held out")
        if self.test_file is not None and self.test_size is not None:
            raise ValueError("give test_file or test_size, not both: each decides what the test rows are")
        for key in ("test_size", "validation_size"):
            size = getattr(self, key)
            if isinstance(size, float) and size >= 1:
                raise ValueError(f"{key} is {size}; a fraction lies between 0 and 1, a row count has no point")
        split = self.test_size is not None or self.validation_size is not None
        if self.group_column is not None and not split:
            raise ValueError("group_column says how rows are parted; add test_size (for example 0.1)")
        if self.freeze_every is not None and self.freeze is None:
            raise ValueError("freeze_every belongs to freeze, which is not set")
        if self.global_batch_size is not None and "gradient_accumulation_steps" in self.trainer:
            raise ValueError(
                "give global_batch_size or trainer: gradient_accumulation_steps, not both: one follows from the other"
            )
        for key in ("early_stopping_patience", "eval_steps", "hpo"):
            if getattr(self, key) is not None and not (given or split):
                raise ValueError(f"{key} needs held-out rows; add validation_file or test_size (for example 0.1)")
        return self

    @property
    def dora(self) -> bool:
        """Whether adapters learn a weight's direction and magnitude apart."""
        return self.use_dora or self.method == "dora"

    @property
    def rslora(self) -> bool:
        """Whether adapters are scaled by lora_alpha / sqrt(lora_r)."""
        return self.use_rslora or self.method == "rslora"

    @property
    def virtual_tokens(self) -> int:
        """How many tokens the method puts before each row; 0 for most."""
        return (self.num_virtual_tokens or VIRTUAL_TOKENS) if self.method in VIRTUAL_TOKEN_METHODS else 0

    @property
    def origins(self) -> list[Source]:
        """The sources of a run: those under `sources:`, or the one that stands at the top."""
        return list(self.sources) if self.sources is not None else [self]


def load_config(path: str | Path) -> RunConfig:
    """Read and check a run's YAML file.

    Args:
        path: the YAML file.

    Returns:
        The checked configuration.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value wrong; names the file and the mend.

    Example:
        >>> load_config("run.yaml").output_dir  # doctest: +SKIP
        'out'
    """
    return parse_config(read_yaml(path), source=str(path))


def parse_config(content: dict[str, Any], source: str = "config") -> RunConfig:
    """Check a run's keys and values.

    Args:
        content: key to value, as read from YAML or written in Python.
        source: the name that errors carry, usually the file's path.

    Returns:
        The checked configuration.

    Raises:
        UserError: a key is unknown or missing, or a value is wrong.

    Example:
        >>> parse_config({"model_name_or_path": "m", "train_file": "a.json", "output_dir": "o"}).max_length
        1024
    """
    for key in content:
        if key not in RunConfig.model_fields:
            raise _unknown_key(str(key), source)
    method = content.get("method", "lora")
    if method not in get_args(Method):
        raise UserError(
            f"{source}: method: {method!r} is not available",
            fix=f"set method to one of {', '.join(get_args(Method))}",
        )
    if content.get("trainer", {}) is None:  # an empty `trainer:` line
        content = {**content, "trainer": {}}
    try:
        config = RunConfig(**content)
    except ValidationError as error:
        raise value_error(error, content, source, _section) from None
    check_trainer_section(config.trainer, source)
    if config.hpo is not None:
        _check_search(config, content, source)
    return config


def check_trainer_section(section: dict[str, Any], source: str = "config") -> None:
    """Check that every name in `trainer:` is one of `transformers.TrainingArguments` and has no key of its own.

    Args:
        section: the section's names and values.
        source: the name that errors carry.

    Raises:
        UserError: a name is unknown, or is set through a top-level key.

    Example:
        >>> check_trainer_section({"learning_rate": 2e-4})
    """
    known = _training_arguments()
    for name, value in section.items():
        if name in _OWNED_BY_CONFIG:
            raise UserError(
                f"{source}: trainer: {name} has a key of its own", fix=f"use the top-level key {_OWNED_BY_CONFIG[name]}"
            )
        if name not in known:
            if name in RunConfig.model_fields:
                fix = f"move {name} out of the section trainer:, to the left margin"
            else:
                fix = nearest(name, known) or "see transformers.TrainingArguments for the names"
            raise UserError(f"{source}: trainer: {name} is not a training argument of transformers", fix=fix)
        default = known[name]
        # transformers itself would take the text and fail later, in the middle of an optimizer.
        if type(default) in (bool, int, float) and not isinstance(value, (bool, int, float)):
            kind = "a truth value" if isinstance(default, bool) else "a number"
            raise UserError(
                f"{source}: trainer: {name}: {value!r} is not {kind}",
                fix=f"write a value such as {default}",
            )


def takes_fractions(key: str) -> bool:
    """Whether the values of a key are fractions, as a learning rate's are, or whole numbers, as a rank is.

    Args:
        key: a key, or `trainer.NAME` for one of transformers' training arguments.

    Returns:
        True for fractions.

    Example:
        >>> takes_fractions("lora_r"), takes_fractions("lora_alpha")
        (False, True)
    """
    section, _, name = key.rpartition(".")
    if section == "trainer":
        return isinstance(_training_arguments()[name], float)
    kind = RunConfig.model_fields[key].annotation
    return float in (kind, *get_args(kind))


def config_digest(config: RunConfig) -> dict[str, Any]:
    """Plain JSON values of a configuration, for `run.json` and for comparing two runs.

    Args:
        config: a checked configuration.

    Returns:
        Key to JSON value, every key present.

    Example:
        >>> config_digest(RunConfig(model_name_or_path="m", train_file="a", output_dir="o"))["seed"]
        42
    """
    return json.loads(config.model_dump_json())


def _check_search(config: RunConfig, content: dict[str, Any], source: str) -> None:
    """Check that each searched key may be searched, and that the run takes each of its values."""
    plain = {key: value for key, value in content.items() if key != "hpo"}
    for key, space in config.hpo.search.items():
        if key in _NOT_SEARCHED or key.startswith("hpo"):
            raise UserError(
                f"{source}: hpo: search: {key} cannot be searched: trials would not be comparable",
                fix="search keys of the training, such as trainer.learning_rate or lora_r",
            )
        if (key.startswith("trainer.") and key.partition(".")[2] in config.trainer) or key in content:
            raise UserError(f"{source}: {key} is set and searched", fix="keep one of the two")
        for value in (space.low, space.high) if isinstance(space, Range) else space:
            parse_config(with_values(plain, {key: value}), source=f"{source}: hpo: search: {key}: {value!r}")


def _training_argument_names() -> set[str]:
    return set(_training_arguments())


def _training_arguments() -> dict[str, Any]:
    """Names of `TrainingArguments` with their default values."""
    from transformers import TrainingArguments

    return {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.init}


def _unknown_key(key: str, source: str) -> UserError:
    if key in _training_argument_names():
        fix = f"put it in the section trainer: (two spaces, then {key}: ...)"
    else:
        fix = nearest(key, RunConfig.model_fields) or f"the known keys are {', '.join(sorted(RunConfig.model_fields))}"
    return UserError(f"{source}: unknown key '{key}'", fix=fix)


def _section(place: list[Any]) -> Any:
    """The model that a key below a section belongs to."""
    if place[0] == "hpo":
        return Range if len(place) > 2 else HpoSection
    return Replay if place[0] == "replay" else WeightedSource
