"""The section `hpo:` of a run's YAML file: which keys are searched, over which values, in how many trials.

hpo:
  trials: 20
  search:
    trainer.learning_rate: {low: 1e-5, high: 1e-3, log: true}
    lora_r: [8, 16, 32]
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Number = int | float


class Range(BaseModel):
    """Numbers from `low` to `high`, both included.

    Example:
        >>> Range(low=1e-5, high=1e-3, log=True).log
        True
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Number
    high: Number
    log: bool = False
    step: Number | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _makes_sense(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) has to be less than high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low to be above 0, and it is {self.low}")
        if self.log and self.step is not None:
            raise ValueError("give log or step, not both")
        return self


# The tag decides by which of the two kinds a value is judged, so that the message is of the kind that was meant.
Space = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "range"),
]
UNION_TAGS = ("range", "list", "int", "float")


class HpoSection(BaseModel):
    """A search over the values of some keys, for the lowest held-out loss.

    Example:
        >>> HpoSection(trials=4, search={"lora_r": [8, 16]}).pruning
        False
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int = Field(default=20, ge=1)
    pruning: bool = False
    search: dict[str, Space] = Field(min_length=1)

    @model_validator(mode="after")
    def _lists_have_values(self) -> HpoSection:
        for key, values in self.search.items():
            if values == []:
                raise ValueError(f"{key} has no value to choose from")
        return self


def with_values(content: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with some keys set, `trainer.NAME` being one of the section `trainer:`.

    Args:
        content: key to value, as in the YAML file.
        values: searched key to its value.

    Returns:
        A new dictionary; the one given is left as it is.

    Example:
        >>> with_values({"seed": 1}, {"lora_r": 8, "trainer.learning_rate": 0.1})
        {'seed': 1, 'lora_r': 8, 'trainer': {'learning_rate': 0.1}}
    """
    changed = dict(content)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section == "trainer":
            changed["trainer"] = {**changed.get("trainer", {}), name: value}
        else:
            changed[key] = value
    return changed
