"""The loop of a reward model: TRL's RewardTrainer, with this package's checkpoints, records and held-out loss.

Imported only for such a run, since TRL is an extra.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from pyfinetune.train.heads.encoders import Counted
from pyfinetune.train.loop import RunTrainer

# TRL's own defaults that are not this package's.
DEFAULTS = {"gradient_checkpointing": None, "disable_dropout": False, "max_length": None}


class RunRewardTrainer(RunTrainer, RewardTrainer):
    """TRL's loss over pairs in `RunTrainer`'s loop: loss = -log sigmoid(reward(chosen) - reward(rejected))."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.compute_loss_func = None  # TRL makes the loss

    def _targets_in(self, inputs: dict[str, Any]) -> int:
        return len(inputs["input_ids"]) // 2

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run writes a card of its own."""


def reward_arguments(**values: Any) -> RewardConfig:
    """The Trainer's arguments as TRL wants them.

    Args:
        values: those of `TrainingArguments`.

    Returns:
        TRL's, with its own defaults taken back.
    """
    return RewardConfig(**{**DEFAULTS, **values})


def reward_parts(rows: Any, tokenizer: Any) -> dict[str, Any]:
    """What `loop.build_trainer` is given for a reward model.

    Args:
        rows: what `reading.prepare_rows` returned.
        tokenizer: the model's, with a token to fill rows up with.

    Returns:
        `train_rows`, `eval_rows`, `collator`, `kind` and `callbacks`.
    """
    return {
        "train_rows": Dataset.from_list(rows.train),
        "eval_rows": Dataset.from_list(rows.held_out) if rows.held_out else None,
        "collator": Counted(DataCollatorForPreference(tokenizer.pad_token_id)),
        "kind": RunRewardTrainer,
        "callbacks": [],
    }
