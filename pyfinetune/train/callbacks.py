"""What a run shows and records while it goes: the progress bar, `metrics.jsonl`, and stopping on Ctrl-C.

Each is a `TrainerCallback`. `RunMetrics` adds tokens/s and peak memory to every record and writes it down; `Progress`
draws it; `Interruption` turns Ctrl-C and SIGTERM into a checkpoint at the end of the step.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from pyfinetune.errors import PyfinetuneError


def peak_memory_gb(device: torch.device) -> float:
    """The most memory the run has held so far.

    Args:
        device: the run's device.

    Returns:
        GiB: of the GPU's memory as torch allocated it, or of the process's resident memory on a CPU.

    Example:
        >>> peak_memory_gb(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class RunMetrics(TrainerCallback):
    """Completes every record with tokens/s and peak memory, appends it to `metrics.jsonl`, and refuses a loss of NaN.

    Args:
        path: the file, one JSON object a line: step, epoch, loss, learning_rate, tokens_per_second, peak_memory_gb, or
            eval_loss and its kin.
    """

    def __init__(self, path: Path):
        self.path = path
        self.trainer: Any = None
        self.peak_memory_gb = 0.0
        self._seconds = 0.0
        self._clock = self._step_end = time.perf_counter()
        self._tokens = self._tokens_before = 0

    @property
    def session_rate(self) -> float:
        """Tokens per second over all records of this session; 0.0 before the first."""
        return (self._tokens - self._tokens_before) / self._seconds if self._seconds else 0.0

    def keep_until(self, step: int) -> None:
        """Drop the records after a step's checkpoint, which a resumed run makes again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the run was killed while writing it
                continue
            if "train_runtime" in record:  # the end of an earlier session
                break
            if record.get("step", 0) <= step:
                kept.append(line + "\n")
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one more record.

        Args:
            record: JSON values.
        """
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._start_clock()
        self._tokens_before = self._tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_end = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out_pause()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out_pause()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = {} if logs is None else logs
        if "loss" in logs:
            elapsed = max(time.perf_counter() - self._clock, 1e-9)
            self._seconds += elapsed
            logs["tokens_per_second"] = round((self.trainer.tokens_seen - self._tokens) / elapsed, 1)
            self._start_clock()
        self.peak_memory_gb = peak_memory_gb(args.device)
        logs["peak_memory_gb"] = round(self.peak_memory_gb, 3)
        if state.is_world_process_zero:
            self.append({"step": state.global_step, **logs})
        if not math.isfinite(logs.get("loss", 0.0)):
            raise PyfinetuneError(
                f"the loss became {logs['loss']} at step {state.global_step}. Lower trainer: learning_rate"
                f" (now {args.learning_rate}), and delete the checkpoints from just before that step"
            )

    def _start_clock(self) -> None:
        self._clock = time.perf_counter()
        self._tokens = self.trainer.tokens_seen

    def _leave_out_pause(self) -> None:
        """Time since the step's end went into an evaluation or a checkpoint, not into training."""
        now = time.perf_counter()
        self._clock += now - max(self._step_end, self._clock)
        self._step_end = now


class ProgressBar(TrainerCallback):
    """A bar with loss, tokens/s and peak memory on a terminal; a line a record elsewhere.

    Args:
        console: where to draw; standard error by default, so that `--json` has standard output to itself.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._facts = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, facts="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._facts = (
                f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s  {logs['peak_memory_gb']:.2f} GB"
            )
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", highlight=False)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts)
        elif "loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}: {self._facts}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down, also when the run ended in an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Interruption(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    Args:
        console: where to say so; standard error by default.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anyone_asked(args):
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the signals back, also when the run ended in an error."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        self.console.print("stopping after this step, with a checkpoint (Ctrl-C again stops at once)", highlight=False)

    def _anyone_asked(self, args: Any) -> bool:
        """Whether any process was asked to stop: all leave at the same step, or the others would wait for ever."""
        if args.world_size > 1:
            flag = torch.tensor(self.signal or 0, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.signal = int(flag) or None
        return self.signal is not None
