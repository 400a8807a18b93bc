"""The YAML file of `pyfinetune compare` as a checked object: what is compared, on which rows, at which price.

run: runs/first                     # the fine-tuned model, its base and its rows
prompts: {plain: "{question}", strict: "{question}\\nAnswer with one word."}
few_shot: 4
retrieved: 4
models:
  - {name: larger, model_name_or_path: Qwen/Qwen2.5-7B-Instruct, prompts: [strict], price: {input: 0.2, output: 0.6}}
general_file: articles.txt          # is what it could before forgotten?
slices: [topic]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pyfinetune.errors import UserError
from pyfinetune.train.checked_yaml import nearest, read_yaml, value_error
from pyfinetune.train.data.sources import Files, Task

QUESTION = "{question}"
_NAMED_LABELS = "{question}\n\nAnswer with one of these and nothing else: {labels}."


class Price(BaseModel):
    """What answers cost: by the million tokens, or by the hour of the machine, in any one currency.

    Example:
        >>> Price(input=0.15, output=0.6).input
        0.15
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float | None = Field(default=None, ge=0)
    output: float | None = Field(default=None, ge=0)
    hour: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_way(self) -> Price:
        by_token = self.input is not None or self.output is not None
        if by_token == (self.hour is not None):
            raise ValueError("give input and output (per million tokens), or hour (of the machine)")
        if by_token and (self.input is None or self.output is None):
            raise ValueError("give both input and output, each per million tokens")
        return self

    def of(self, tokens_in: float, tokens_out: float, seconds: float) -> float:
        """The cost of an answer.

        Args:
            tokens_in, tokens_out: tokens read and written.
            seconds: that the machine was busy with it.

        Returns:
            In the price's currency.

        Example:
            >>> Price(hour=3.6).of(100, 10, seconds=2.0)
            0.002
        """
        if self.hour is not None:
            return self.hour * seconds / 3600
        return (self.input * tokens_in + self.output * tokens_out) / 1e6


class OtherModel(BaseModel):
    """A further model: a run, an adapter or a model, prompted or not.

    Example:
        >>> OtherModel(model_name_or_path="Qwen/Qwen2.5-7B-Instruct", prompts=["plain"]).few_shot
        0
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name_or_path: str
    name: str | None = None
    prompts: list[str] = Field(default_factory=list)
    few_shot: int = Field(default=0, ge=0)
    retrieved: int = Field(default=0, ge=0)
    chat_template: str = "auto"
    price: Price | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        return self.name or Path(self.model_name_or_path).name


class CompareConfig(BaseModel):
    """One comparison, as its YAML file describes it.

    Example:
        >>> CompareConfig(run="runs/first").few_shot
        4
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    run: str
    output_dir: str | None = None
    test_file: Files | None = None
    rows: int | None = Field(default=500, ge=1)
    task: Task = "auto"

    prompts: dict[str, str] | None = Field(default=None, min_length=1)
    few_shot: int = Field(default=4, ge=0)
    retrieved: int = Field(default=4, ge=0)
    models: list[OtherModel] = Field(default_factory=list)

    metric: str | None = None
    classify_by: Literal["likelihood", "generation"] = "likelihood"
    worth: float = Field(default=0.0, ge=0)
    slices: list[str] = Field(default_factory=list)
    general_file: Files | None = None
    general_rows: int = Field(default=200, ge=1)
    price: Price | None = None

    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    latency_rows: int = Field(default=20, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(default=42, ge=0)
    resamples: int = Field(default=1000, ge=100)

    @field_validator("slices", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_agree(self) -> CompareConfig:
        labels = [model.label for model in self.models]
        for label in labels:
            if label in ("base", "tuned") or labels.count(label) > 1:
                raise ValueError(f"models: the name {label!r} is taken; give each model a name of its own")
        return self

    @property
    def folder(self) -> Path:
        """Where answers and report go: `output_dir`, or the folder `compare` of the run."""
        return Path(self.output_dir) if self.output_dir is not None else Path(self.run) / "compare"

    def prompts_for(self, task: str) -> dict[str, str]:
        """The prompt versions of the base model.

        Args:
            task: of the rows.

        Returns:
            Name to template; without `prompts:` the question as it is trained on, and, for a classification, one that
            names the labels too.

        Example:
            >>> list(CompareConfig(run="r").prompts_for("classification"))
            ['plain', 'labels named']
        """
        if self.prompts is not None:
            return dict(self.prompts)
        return {"plain": QUESTION} | ({"labels named": _NAMED_LABELS} if task == "classification" else {})


def load_compare(path: str | Path) -> CompareConfig:
    """Read and check the configuration of a comparison.

    Args:
        path: a YAML file; or the output folder of a run, which is compared with its base model as the defaults have it.

    Returns:
        The checked configuration.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value wrong; names the file and the mend.

    Example:
        >>> load_compare("compare.yaml").run  # doctest: +SKIP
        'runs/first'
    """
    if Path(path).is_dir():
        return parse_compare({"run": str(path)}, source=str(path))
    return parse_compare(read_yaml(path, "pyfinetune compare compare.yaml"), source=str(path))


def parse_compare(content: dict[str, Any], source: str = "compare") -> CompareConfig:
    """Check the keys and values of a comparison.

    Args:
        content: key to value, as read from YAML or written in Python.
        source: the name that errors carry.

    Returns:
        The checked configuration.

    Raises:
        UserError: a key is unknown or missing, or a value is wrong.

    Example:
        >>> parse_compare({"run": "runs/first", "few_shot": 8}).few_shot
        8
    """
    known = CompareConfig.model_fields
    for key in content:
        if key not in known:
            hint = nearest(str(key), known) or f"the known keys are {', '.join(sorted(known))}"
            raise UserError(f"{source}: unknown key '{key}'", fix=hint)
    try:
        return CompareConfig(**content)
    except ValidationError as error:
        raise value_error(error, content, source, _section) from None


def _section(place: list[Any]) -> Any:
    """The model that a key below a section belongs to."""
    return Price if "price" in place[:-1] else OtherModel
