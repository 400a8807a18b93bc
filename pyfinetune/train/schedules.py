"""Which weights learn, and when: half fine-tuning, gradual unfreezing, and learning rates that fall with depth.

A model's blocks are found by structure (`depths`). The two freezing schedules are `TrainerCallback`s: they switch
`requires_grad` between optimizer steps, so that a frozen weight gets no gradient, no update and no weight decay, and
its optimizer state waits. What is frozen follows from the step and the seed alone, so a run that is resumed goes on as
if it had not stopped. The Trainer makes its optimizer from what requires a gradient, so everything starts trainable.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Depths:
    """How deep each parameter of a model sits.

    Args:
        of: parameter name -> 0 for embeddings, 1 ... `blocks` for the blocks, `blocks` + 1 for what follows them.
        blocks: number of blocks.
    """

    of: dict[str, int]
    blocks: int


def depths(model: nn.Module) -> Depths:
    """Find the blocks of a model: the elements of its lists of modules of one class.

    A list inside a block, such as experts, belongs to the block. An encoder's blocks come before a decoder's.

    Args:
        model: any model of stacked blocks, plain or with adapters.

    Returns:
        The depth of each parameter; a shared one counts where it is met first.

    Raises:
        UserError: the model has no stack of blocks.

    Example:
        >>> depths(model).blocks  # doctest: +SKIP
        30
    """
    stacks: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(stack + ".") for stack in stacks):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(block) for block in module}) == 1:
            stacks.append(name)
    blocks: dict[str, int] = {}
    block_of: dict[str, int | None] = {}
    for name, _ in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(stack + ".")), None)
        if stack is None:
            block_of[name] = None
        else:
            block = f"{stack}.{name[len(stack) + 1 :].partition('.')[0]}"
            block_of[name] = blocks.setdefault(block, len(blocks) + 1)
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no list of blocks to tell depths by",
            fix="leave out layerwise_lr_decay, freeze and freeze_every",
        )
    # What stands before the last block is an embedding, or a norm of an encoder; after it come norms and heads.
    last = max(index for index, block in enumerate(block_of.values()) if block is not None)
    outside = {name: 0 if index < last else len(blocks) + 1 for index, name in enumerate(block_of)}
    return Depths({name: block or outside[name] for name, block in block_of.items()}, len(blocks))


def layerwise_groups(model: nn.Module, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Split an optimizer's groups by depth: lr_d = lr * decay^(top - d), the deepest (top) at the full rate.

    Args:
        model: the model whose parameters the groups hold.
        groups: the optimizer's parameter groups, each with its `lr`.
        decay: over 0 and up to 1; what one block's rate is of the next one's.

    Returns:
        New groups, shallow first, each with `lr` and `depth`; every parameter is in just one of them.

    Raises:
        UserError: `decay` is out of range, or the model has no stack of blocks.

    Example:
        >>> layerwise_groups(model, optimizer.param_groups, 0.9)[0]["depth"]  # doctest: +SKIP
        0

    Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018), section 3.2.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layerwise_lr_decay is {decay}; needs a number over 0 and up to 1", fix="try 0.9")
    depth_of = depths(model).of
    by_id = {id(parameter): depth_of[name] for name, parameter in model.named_parameters()}
    top = max((by_id[id(parameter)] for group in groups for parameter in group["params"]), default=0)
    split = []
    for group in groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        for depth in sorted({by_id[id(parameter)] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if by_id[id(parameter)] == depth]
            split.append({**settings, "params": members, "lr": group["lr"] * decay ** (top - depth), "depth": depth})
    return sorted(split, key=lambda group: group["depth"])


class FreezingSchedule(TrainerCallback, ExportableState):
    """Chooses before each optimizer step which of the trainable parameters learn.

    A schedule of your own overrides `trainable(round)`; a round lasts `every` steps.

    Args:
        every: optimizer steps in a round.

    Raises:
        UserError: `every` is under 1.
    """

    def __init__(self, every: int):
        if every < 1:
            raise UserError(f"every is {every}; a round needs 1 step at least", fix="count it in optimizer steps")
        self.every = every
        self.round = -1  # the round that the model is set for
        self.parameters: dict[str, nn.Parameter] = {}
        self.depths = Depths({}, 0)

    def trainable(self, round: int) -> set[str]:
        """Names of the parameters that learn in a round.

        Args:
            round: counted from 0.

        Returns:
            A part of `self.parameters`' names.
        """
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take note of everything that the optimizer was made for, and of the blocks it is in."""
        self.round = -1
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.depths = depths(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Switch at the first step of a round, and when a run goes on in the middle of one."""
        round = state.global_step // self.every
        if round == self.round:
            return
        chosen = self.trainable(round)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None
        self.round = round

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave everything trainable, as it was."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.round = -1

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint: the settings, and the round for a reader."""
        return {"args": {"every": self.every}, "attributes": {}}


class HalfFineTuning(FreezingSchedule):
    """Half of the parameters are frozen in each round, and the half is drawn anew for the next.

    The draw is made within each block and kind of weight (matrices of attention, other matrices, vectors), so that
    every block keeps learning; of an odd number, blocks take turns at the larger part. Embeddings and head learn
    throughout.

    Args:
        every: optimizer steps in a round.
        seed: of the draws; a round's draw depends on nothing else.

    Example:
        >>> Trainer(model, callbacks=[HalfFineTuning(every=100, seed=0)])  # doctest: +SKIP

    Source: Hui et al., "HFT: Half Fine-Tuning for Large Language Models" (2024).
    """

    def __init__(self, every: int, seed: int = 0):
        super().__init__(every)
        self.seed = seed

    def trainable(self, round: int) -> set[str]:
        """Names of the half that learns in a round, with embeddings and head."""
        draw = random.Random(f"{self.seed} {round}")
        kinds: dict[tuple[int, str], list[str]] = {}
        chosen = set()
        for name, parameter in self.parameters.items():
            depth = self.depths.of[name]
            if 1 <= depth <= self.depths.blocks:
                kinds.setdefault((depth, _kind(name, parameter)), []).append(name)
            else:
                chosen.add(name)
        for turn, names in enumerate(kinds.values()):
            count = (len(names) + (turn + round) % 2) // 2
            chosen.update(draw.sample(names, count))
        return chosen

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint."""
        return {"args": {"every": self.every, "seed": self.seed}, "attributes": {}}


class GradualUnfreezing(FreezingSchedule):
    """The deepest part learns first, and in each round one block more joins it, down to the embeddings.

    First comes what follows the blocks, such as a classifier's head; together with the last block where that is but a
    norm.

    Args:
        every: optimizer steps in a round.

    Example:
        >>> Trainer(model, callbacks=[GradualUnfreezing(every=100)])  # doctest: +SKIP

    Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018), section 3.3.
    """

    def trainable(self, round: int) -> set[str]:
        """Names of what learns in a round: the `round` + 1 deepest parts."""
        parts: dict[int, list[str]] = {}
        for name in self.parameters:
            parts.setdefault(self.depths.of[name], []).append(name)
        order = sorted(parts, reverse=True)
        if len(order) > 1 and all(self.parameters[name].dim() < 2 for name in parts[order[0]]):
            round += 1
        return {name for depth in order[: round + 1] for name in parts[depth]}


def schedules_of(config: RunConfig, model: nn.Module, steps: int) -> list[FreezingSchedule]:
    """The schedules that a run's configuration asks for.

    Args:
        config: the run's configuration; without `freeze_every`, half of the model is drawn ten times a run, and gradual
            unfreezing reaches the embeddings halfway.
        model: the model as it will be trained.
        steps: optimizer steps of the run.

    Returns:
        None or one.

    Raises:
        UserError: the model has no stack of blocks.

    Example:
        >>> schedules_of(config, model, 1000)[0].every  # doctest: +SKIP
        100
    """
    if config.freeze is None:
        return []
    found = depths(model)
    rounds = 10 if config.freeze == "half" else 2 * (found.blocks + 2)
    every = config.freeze_every or max(1, steps // rounds)
    return [HalfFineTuning(every, config.seed) if config.freeze == "half" else GradualUnfreezing(every)]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() < 2:
        return "vectors"
    return "attention" if "attn" in name or "attention" in name else "matrices"
