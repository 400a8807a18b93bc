"""Where a run's rows come from: the keys of a source, of one among several, and of an older one that is replayed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Task = Literal[
    "auto",
    "sft",
    "pretrain",
    "classification",
    "token_classification",
    "question_answering",
    "summarization",
    "translation",
    "preference",
]
# What `clean:` can drop; without it these rows are errors (the first three) or are reported.
CleanKind = Literal["missing", "empty", "roles", "mojibake", "duplicate", "near_duplicate", "leak"]
# A path, several, or a name to a path: line-aligned columns, or, for classification, a file for each label.
Files = str | list[str] | dict[str, str]


class Source(BaseModel):
    """Where rows come from: files, or a dataset's name, with what their columns mean.

    Example:
        >>> Source(train_file=["a.jsonl", "b.jsonl"]).train_files
        ['a.jsonl', 'b.jsonl']
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    train_file: Files | None = None
    validation_file: Files | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    sample_by: Literal["auto", "line", "paragraph", "document"] = "auto"
    task: Task = "auto"

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("give exactly one of train_file (a path) and dataset_name (a dataset's name or folder)")
        for key in ("dataset_config_name", "dataset_test_split"):
            if getattr(self, key) is not None and self.dataset_name is None:
                raise ValueError(f"{key} belongs to dataset_name, which is not set")
        if self.validation_file is not None and self.dataset_test_split is not None:
            raise ValueError("give validation_file or dataset_test_split, not both: each decides what is held out")
        return self

    @property
    def train_files(self) -> list[str]:
        """Paths of the training files, in order."""
        return as_paths(self.train_file)

    @property
    def validation_files(self) -> list[str]:
        """Paths of the held-out files, in order; empty when something else or nothing is held out."""
        return as_paths(self.validation_file)

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.dataset_name or ", ".join(self.train_files)


class WeightedSource(Source):
    """One of several sources, with its part in the mixture.

    Example:
        >>> WeightedSource(train_file="a.jsonl", weight=2).weight
        2.0
    """

    weight: float | None = Field(default=None, gt=0)


class Replay(Source):
    """An older source, of which a share is mixed in so that it is not forgotten.

    Example:
        >>> Replay(train_file="old.jsonl", share=0.1).share
        0.1
    """

    share: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _trained_only(self) -> Replay:
        if self.validation_file is not None or self.dataset_test_split is not None:
            raise ValueError("replay is trained on only; hold rows out of the other sources")
        return self


def as_paths(files: Files | None) -> list[str]:
    """The paths of a key that takes one, several or named files.

    Args:
        files: the key's value.

    Returns:
        The paths, in order.

    Example:
        >>> as_paths({"de": "a.de", "en": "a.en"})
        ['a.de', 'a.en']
    """
    if files is None:
        return []
    if isinstance(files, dict):
        return list(files.values())
    return [files] if isinstance(files, str) else list(files)
