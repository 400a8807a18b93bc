"""Several processes of one run: which one speaks, how rows are shared, and what a step's batch is.

`torchrun` and `accelerate launch` start the same command many times and tell each of them who it is by environment
variables. Every process reads, trains and evaluates; the first one speaks and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.config import VIRTUAL_TOKEN_METHODS, RunConfig

_PER_DEVICE = 8  # rows of a batch where the configuration does not say: transformers' default


def world_size() -> int:
    """How many processes share the run.

    Returns:
        1 without a launcher.

    Example:
        >>> world_size()
        1
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that speaks.

    Returns:
        True without a launcher.

    Example:
        >>> is_first()
        True
    """
    return os.environ.get("RANK", "0") == "0"


def shards_weights(config: RunConfig) -> bool:
    """Whether the run's weights are spread over its processes (FSDP), by its own words or by those of the launcher.

    Args:
        config: the run's configuration.

    Returns:
        True for `trainer: fsdp` and for `accelerate launch --use_fsdp`.

    Example:
        >>> shards_weights(config)  # doctest: +SKIP
        False
    """
    return bool(config.trainer.get("fsdp")) or _flag("ACCELERATE_USE_FSDP")


def check_sharding(config: RunConfig) -> None:
    """Check that a run whose weights are spread over its processes can be one.

    Args:
        config: the run's configuration.

    Raises:
        UserError: there is no launcher, or the method or schedule needs whole weights.

    Example:
        >>> check_sharding(config)  # doctest: +SKIP
    """
    if not shards_weights(config):
        return
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            "trainer: fsdp spreads a model over processes, and this is one alone",
            fix="start it with: torchrun --nproc-per-node 2 -m pyfinetune train run.yaml",
        )
    if config.method in VIRTUAL_TOKEN_METHODS:
        raise UserError(
            f"method: {config.method} cannot run under FSDP: PEFT reads its virtual tokens as one tensor",
            fix="leave FSDP out (each process then holds the model), or set method: lora",
        )
    if config.freeze is not None:
        raise UserError(
            f"freeze: {config.freeze} cannot run under FSDP, which fixes what learns when it spreads the weights",
            fix="leave FSDP out, or freeze",
        )


def share_on_cpu(trainer: Any) -> None:
    """Spread the weights on the CPU as on GPUs; accelerate takes FSDP for a matter of GPUs and silently leaves it out.

    Args:
        trainer: a `transformers.Trainer` whose accelerator has just been made.

    Raises:
        UserError: the older FSDP is asked for.

    Example:
        >>> share_on_cpu(trainer)  # doctest: +SKIP
    """
    asked = bool(trainer.args.fsdp) or _flag("ACCELERATE_USE_FSDP")
    state = trainer.accelerator.state
    if asked and not trainer.is_fsdp_enabled and trainer.args.world_size > 1 and trainer.args.device.type == "cpu":
        from accelerate import DistributedType, FullyShardedDataParallelPlugin

        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(trainer.args.fsdp_plugin_args or {}))
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise UserError(
            f"fsdp: version {state.fsdp_plugin.fsdp_version} is not supported",
            fix="set trainer: fsdp_config: {version: 2}, or accelerate launch --fsdp_version 2",
        )


@contextlib.contextmanager
def first_process_first(device: torch.device) -> Iterator[None]:
    """Let the first process of a machine do something before the others, which find what it cached.

    Args:
        device: of the run; on it depends how the processes talk to each other.

    Example:
        >>> with first_process_first(torch.device("cpu")):
        ...     rows = [1, 2]
    """
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=device.type == "cpu").local_main_process_first():
        yield


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step.

    Args:
        per_device: rows that a process takes at a time.
        accumulation: how often it does before a step.
        processes: how many there are.
    """

    per_device: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, values: dict[str, int]) -> Batch:
        """Read what `to_dict` made."""
        return cls(values["per_device"], values["accumulation"], values["processes"])

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        return self.per_device * self.accumulation * self.processes

    def to_dict(self) -> dict[str, int]:
        """JSON values, for `run.json`."""
        return {"rows": self.rows, **vars(self)}

    def __str__(self) -> str:
        return f"{self.rows} rows ({self.per_device} x accumulation {self.accumulation} x {self.processes} processes)"


def batch_of(config: RunConfig) -> Batch:
    """The batch of a run in as many processes as there are now.

    Args:
        config: the run's configuration. With `global_batch_size` the accumulation follows from the number of processes,
            so that the same file takes the same steps in any number of them.

    Returns:
        The batch.

    Raises:
        UserError: the global batch cannot be shared among the processes.

    Example:
        >>> batch_of(config).rows  # doctest: +SKIP
        8
    """
    section, processes, total = config.trainer, world_size(), config.global_batch_size
    given = section.get("per_device_train_batch_size")
    if total is None:
        return Batch(given or _PER_DEVICE, section.get("gradient_accumulation_steps") or 1, processes)
    share = total // processes
    per_device = given or max((n for n in range(1, _PER_DEVICE + 1) if share % n == 0), default=1)
    if total % processes or share % per_device or not share:
        fitting = [str(n) for n in range(1, total + 1) if total % (n * (given or 1)) == 0]
        rows = f" of {given} rows at a time" if given else ""
        raise UserError(
            f"global_batch_size: {total} rows cannot be shared among {processes} processes{rows}",
            fix=f"start {', '.join(fitting) or 'other'} processes, or set a multiple of {processes * (given or 1)}",
        )
    return Batch(per_device, share // per_device, processes)


class FilledUp(torch.utils.data.Sampler):
    """A sampler's indices, and after them the index of an empty row until every process has as many rows.

    Without it the processes begin over with the first rows, which then count twice: in a step, and in a held-out loss.

    Args:
        sampler: yields indices of rows.
        multiple: rows of a batch over all processes.
        filler: index of a row without tokens.
    """

    def __init__(self, sampler: Any, multiple: int, filler: int):
        self.sampler, self.multiple, self.filler = sampler, multiple, filler

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from [self.filler] * (len(self) - len(self.sampler))

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, from which the order of rows follows."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def fill_up(loader: Any, rows: int, processes: int) -> Any:
    """Let a data loader of several processes give each of them whole batches without a row twice.

    Args:
        loader: what accelerate prepared.
        rows: of the data set; the row at this index is empty.
        processes: how many there are.

    Returns:
        The loader.

    Example:
        >>> fill_up(loader, 100, 2)  # doctest: +SKIP
    """
    batches = getattr(loader.batch_sampler, "batch_sampler", None)  # those of all processes; ours is every n-th
    if processes > 1 and isinstance(batches, torch.utils.data.BatchSampler) and not batches.drop_last:
        loader.set_sampler(FilledUp(batches.sampler, batches.batch_size * processes, rows))
    return loader


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
