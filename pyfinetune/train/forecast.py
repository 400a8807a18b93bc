"""What `pyfinetune plan` answers: a run's memory and hours, and which settings fit GPUs of usual sizes.

configuration -> planning.step_plan -> Forecast -> lines of text, or JSON
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.planner import Plan
from pyfinetune.train.config import LORA_METHODS, RunConfig, load_config, parse_config
from pyfinetune.train.model import check_length, choose_device, read_config
from pyfinetune.train.planning import PLANNED, Settings, checkpointing_key, process_base, settings_of, step_plan

GPU_SIZES = (8, 12, 16, 24)  # GB, as they are sold
# What a CUDA context and its libraries take, and the share of the rest that the allocator's holes do: assumptions.
GPU_BASE, GPU_HOLES = 700 << 20, 0.05
# On a CPU the C library keeps some of what is freed.
CPU_HOLES = 0.05
# How much of the rate of a large matrix product a whole step reaches: the range over the training steps of
# bench/results/cpu-epyc-zen4-2-threads.json, with this package's kernels and without.
SHARE_OF_PEAK = {True: (0.62, 0.77), False: (0.14, 0.41)}
# What a CPU process grows by beside tensors: thread stacks, and oneDNN's code for each shape; the second where the
# kernels' probes have made more of it in bfloat16. Fitted: what was left of the growth of a 29M model's process over 64
# tokens, where tensors hardly count (33, 35 and 82 MiB); `python -m pyfinetune.bench.plan_check` holds the sums.
_LIBRARIES = {False: 34 << 20, True: 82 << 20}
_ADAMW_PASSES = 7  # it reads parameter, gradient and two moments, and writes back all but the gradient


@dataclasses.dataclass(frozen=True)
class Fit:
    """What one method may do on a GPU of one size.

    Args:
        gpu: its memory in GB.
        method: `lora`, `qlora` or `full`.
        checkpointing: whether layers are recomputed.
        r: rank of the adapters; None for `full`.
        batch_size: most rows of `max_length` tokens in a batch; 0 where not even one fits.
        longest: most tokens in a batch of a single row; 0 where none fit.
    """

    gpu: float
    method: str
    checkpointing: bool
    r: int | None
    batch_size: int
    longest: int


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A run's memory and time.

    Args:
        settings: what was planned.
        step: the plan of one step.
        base: bytes that the process, or a GPU's context, takes by itself.
        holes: bytes that the allocator may hold beside them.
        layers: of the model.
        libraries: bytes that torch's libraries add in the first steps (code made for the shapes, threads).
        steps: optimizer steps of the run; None where the data was not read.
        tokens: tokens of one step, without padding as far as the data is known.
        seconds: shortest and longest time of one step; None where nothing was measured.
        fits: what GPUs of some sizes take.
    """

    settings: Settings
    step: Plan
    base: int
    holes: int
    layers: int
    libraries: int = 0
    steps: int | None = None
    tokens: int = 0
    seconds: tuple[float, float] | None = None
    fits: tuple[Fit, ...] = ()

    @property
    def total(self) -> int:
        """Bytes at the peak, with the process or context."""
        return self.step.peak + self.base + self.libraries

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        settings = {
            k: str(v) if isinstance(v, torch.dtype) else v for k, v in dataclasses.asdict(self.settings).items()
        }
        return {
            "settings": settings,
            "step": self.step.to_dict(),
            "base": self.base,
            "libraries": self.libraries,
            "holes": self.holes,
            "total": self.total,
            "layers": self.layers,
            "steps": self.steps,
            "tokens_per_step": self.tokens,
            "seconds_per_step": self.seconds,
            "hours": None if self.hours is None else list(self.hours),
            "fits": [dataclasses.asdict(fit) for fit in self.fits],
        }

    @property
    def hours(self) -> tuple[float, float] | None:
        """Shortest and longest time of the run; None where its steps or their time are not known."""
        if self.seconds is None or self.steps is None:
            return None
        return self.seconds[0] * self.steps / 3600, self.seconds[1] * self.steps / 3600

    def __str__(self) -> str:
        lines = [_headline(self.settings, self.layers), *_tables([self._memory_table()])]
        lines += self._time_lines()
        if self.fits:
            lines += [
                "",
                f"What fits, with rows of {self.settings.length:,} tokens (a GPU's own {GPU_BASE >> 20} MiB",
            ]
            lines[-1] += f" and {GPU_HOLES:.0%} for holes are assumed):"
            lines += _tables([_fits_table(self.fits)])
        return "\n".join(lines)

    def _memory_table(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        table.add_column("memory at the peak")
        table.add_column("MiB", justify="right")
        for part, size in self.step.parts.items():
            if size:
                table.add_row(part, f"{size / 2**20:,.1f}")
        table.add_row(
            "process" if self.settings.device == "cpu" else "GPU context (assumed)", f"{self.base / 2**20:,.1f}"
        )
        if self.libraries:
            table.add_row("libraries, from the first step on", f"{self.libraries / 2**20:,.1f}")
        table.add_section()
        table.add_row("total", f"{self.total / 2**20:,.1f}")
        table.add_row("margin for the allocator", f"{self.holes / 2**20:,.1f}")
        table.caption = f"most is held in: {self.step.peak_at}"
        return table

    def _time_lines(self) -> list[str]:
        work = sum(self.step.flops.values()) * self.settings.accumulation / min(self.settings.accumulation, 2)
        lines = [f"work: {work / 1e12:,.2f} TFLOP and {self.tokens:,} tokens a step"]
        if self.seconds is not None:
            low, high = self.seconds
            rates = f"{self.tokens / high:,.0f} to {self.tokens / low:,.0f} tokens/s"
            lines.append(f"time: {low:,.2f} to {high:,.2f} s a step, {rates}")
            share = SHARE_OF_PEAK[self.settings.patch]
            lines.append(
                f"      (a step reaches {share[0]:.0%} to {share[1]:.0%} of the rate of a large product, measured here)"
            )
        if self.hours is not None:
            lines.append(f"run:  {self.steps:,} steps, {self.hours[0]:,.2f} to {self.hours[1]:,.2f} hours")
        return lines


def forecast(
    config: RunConfig,
    *,
    quick: bool = False,
    gpus: Sequence[float] = GPU_SIZES,
    has_data: bool = True,
    documents: int = 1,
) -> Forecast:
    """Predict a run's memory and time, and find what fits GPUs of some sizes.

    Args:
        config: the run's configuration.
        quick: neither read the data nor measure this machine: rows are taken as full, and no time is given.
        gpus: sizes in GB to fit the run into; none for none.
        has_data: whether the configuration's data is there to be read.
        documents: how many documents a packed row holds, where the data does not say.

    Returns:
        The forecast: print it, or read its fields.

    Raises:
        UserError: no such model or data, a size that no GPU has, or settings that contradict each other.

    Example:
        >>> print(forecast(load_config("run.yaml")))  # doctest: +SKIP
    """
    for size in gpus:
        if not 0 < size <= 1024:
            raise UserError(f"gpu: {size} GB is no size of a GPU", fix="give its memory in GB, such as --gpu 12")
    device = choose_device(config.device)
    base = process_base()  # before the planning itself takes memory
    settings, steps, tokens = settings_of(config, device, documents), None, None
    if has_data and not quick:
        settings, steps, tokens = _with_data(config, settings)
    check_length(read_config(settings.model), settings.length, settings.model)
    step = step_plan(settings)
    on_cpu = device.type == "cpu"
    bf16_kernels = settings.patch and torch.bfloat16 in (settings.dtype, settings.autocast)
    return Forecast(
        settings=settings,
        step=step,
        base=base if on_cpu else GPU_BASE,
        libraries=_LIBRARIES[bf16_kernels] if on_cpu else 0,
        holes=round(step.peak * (CPU_HOLES if on_cpu else GPU_HOLES)),
        layers=getattr(read_config(settings.model).get_text_config(), "num_hidden_layers", 0),
        steps=steps,
        tokens=tokens or settings.batch_size * settings.length * settings.accumulation,
        seconds=None if quick else step_seconds(settings, step, device),
        fits=tuple(fits(settings, gpus)),
    )


def memory_lines(config: RunConfig, found: Any = None) -> list[str]:
    """What `pyfinetune check` says about memory, with rows taken as full and nothing measured.

    Args:
        config: the run's configuration.
        found: what the check has found; not looked at.

    Returns:
        A line; where nothing can be predicted it says why, which keeps no run from starting.

    Example:
        >>> memory_lines(load_config("run.yaml"))  # doctest: +SKIP
        ['peak memory: about 2.1 GiB on the cpu, rows taken as full; pyfinetune plan gives its parts and the hours']
    """
    try:
        made = forecast(config, quick=True, gpus=())
    except UserError as error:
        return [f"peak memory: not predicted ({error.message})"]
    size = f"{(made.total + made.holes) / 2**30:,.1f} GiB on the {made.settings.device}"
    return [f"peak memory: about {size}, rows taken as full; pyfinetune plan gives its parts and the hours"]


def _positions(model: str) -> int | None:
    return getattr(read_config(model).get_text_config(), "max_position_embeddings", None)


def _with_data(config: RunConfig, settings: Settings) -> tuple[Settings, int, int]:
    """The settings with rows as long as the data's, the run's steps, and tokens a step."""
    from pyfinetune.train.loop import total_steps, training_arguments
    from pyfinetune.train.reading import prepare_rows, read_data
    from pyfinetune.train.tokenizing import load_tokenizer

    data = read_data(config)
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template, config.eos_token, data.format)
    rows = prepare_rows(data, tokenizer, config).train
    lengths = [sum(map(len, row)) for row in rows]
    arguments = training_arguments(config, train_rows=len(rows), held_out=False)
    steps = total_steps(arguments, len(rows))
    per_step = settings.batch_size * settings.accumulation
    padded = min(-(-max(lengths) // 8) * 8, config.max_length)
    documents = max(1, round(sum(map(len, rows)) / len(rows))) if config.packing else 1
    tokens = round(sum(lengths) / len(lengths) * min(per_step, len(rows)))
    return dataclasses.replace(settings, length=max(2, padded), documents=documents), steps, tokens


def step_seconds(settings: Settings, step: Plan, device: torch.device) -> tuple[float, float]:
    """Shortest and longest time of a step, from its operations and this machine's rates, which take seconds to measure.

    Args:
        settings: what was planned.
        step: its plan.
        device: of this machine.

    Returns:
        Seconds. How much of a large product's rate a step reaches is `SHARE_OF_PEAK`.

    Example:
        >>> step_seconds(settings, step, torch.device("cpu"))  # doctest: +SKIP
        (1.9, 2.2)
    """
    from pyfinetune.bench.ceilings import COPY, GEMM_BF16, GEMM_FP32, measure_ceilings

    rates = measure_ceilings(device, quick=True)
    # Beyond two batches of a step the others are as the second.
    repeated = settings.accumulation / min(settings.accumulation, 2)
    products = sum(
        flops * repeated / (rates[GEMM_FP32 if dtype == "float32" else GEMM_BF16] * 1e9)
        for dtype, flops in step.flops.items()
    )
    update = _ADAMW_PASSES * 4 * step.trainable / (rates[COPY] * 1e9)
    slow, fast = SHARE_OF_PEAK[settings.patch]
    return products / fast + update, products / slow + update


def fits(settings: Settings, gpus: Sequence[float]) -> Iterable[Fit]:
    """What GPUs of some sizes take of a run, by method and with and without checkpointing.

    Args:
        settings: the run; its method, type, device and checkpointing do not matter.
        gpus: sizes in GB.

    Returns:
        A `Fit` for each, the GPUs in order.

    Example:
        >>> list(fits(settings, [24]))  # doctest: +SKIP
    """
    found = []
    for method in PLANNED if gpus else ():
        for checkpointing in (False, True):
            full = method == "full"
            one = dataclasses.replace(
                settings,
                method=method,
                dtype=torch.float32 if full else torch.bfloat16,
                autocast=torch.bfloat16 if full else None,
                device="cuda",
                checkpointing=checkpointing,
                accumulation=1,
                batch_size=1,
            )
            room = _Room(one)
            for gpu in gpus:
                space = (gpu * 2**30 - GPU_BASE) * (1 - GPU_HOLES)
                rank = None if full else settings.r
                found.append(Fit(gpu, method, checkpointing, rank, room.rows(space), room.length(space)))
    return sorted(found, key=lambda fit: fit.gpu)


class _Room:
    """Bytes at each place of a step as a function of rows n and their length l: a + n (b l + c l^2).

    Args:
        settings: with a single row.
    """

    def __init__(self, settings: Settings):
        length = settings.length
        plans = [
            step_plan(dataclasses.replace(settings, **change))
            for change in ({}, {"batch_size": 2}, {"length": 2 * length})
        ]
        self._curves, self._unit, self._most = [], length, _positions(settings.model) or 1 << 40
        for place in plans[0].moments:
            one, two, long = (sum(p.moments.get(place, {}).values()) for p in plans)
            square = max(0.0, (long - two) / 2)  # a mask over all pairs of a row
            self._curves.append((2 * one - two, two - one - square, square))

    def rows(self, space: float) -> int:
        """Most rows of the given length."""
        return max(0, min(int((space - a) // (b + c)) if b + c > 0 else 0 for a, b, c in self._curves))

    def length(self, space: float) -> int:
        """Most tokens of a single row: a multiple of 64, and no more than the model has positions."""
        found = []
        for a, b, c in self._curves:
            left = max(0.0, space - a)
            units = left / b if c < 1e-9 * b else (math.sqrt(b * b + 4 * c * left) - b) / (2 * c)
            found.append(units * self._unit)
        return min(int(min(found)) // 64 * 64, self._most)


def given_config(path: str | None, options: dict[str, Any]) -> RunConfig:
    """The configuration that the command line asks about: a file's, or one made of its options.

    Args:
        path: the YAML file, or None.
        options: keys of `RunConfig` to values, and `batch_size` and `checkpointing`; None for what is not given.

    Returns:
        The configuration; without a file its data and output folder are not there.

    Raises:
        UserError: neither or both are given, a value is wrong, or two of them contradict each other.

    Example:
        >>> given_config(None, {"model_name_or_path": "m", "method": "qlora"}).method
        'qlora'
    """
    given = {key: value for key, value in options.items() if value is not None}
    if path is not None:
        if given:
            raise UserError(
                f"plan: {path} says what to run, and so do {', '.join(sorted(given))}",
                fix="change the file, or leave it out and give --model",
            )
        return load_config(path)
    if "model_name_or_path" not in given:
        raise UserError("plan: there is no model", fix="give a run's YAML file, or --model NAME_OR_FOLDER")
    if given.get("method", "lora") not in LORA_METHODS and "lora_r" in given:
        what = "full fine-tuning" if given["method"] == "full" else given["method"]
        raise UserError(f"--r: {what} has no adapters of low rank", fix="leave --r out, or set --method lora")
    if given.get("batch_size", 1) < 1:
        raise UserError(
            f"--batch-size {given['batch_size']}: needs at least one row", fix="give --batch-size 1 or more"
        )
    names = {"batch_size": "per_device_train_batch_size", "checkpointing": checkpointing_key()}
    trainer = {name: given.pop(key) for key, name in names.items() if key in given}
    return parse_config({"train_file": "-", "output_dir": "-", **given, "trainer": trainer}, source="plan")


def _headline(settings: Settings, layers: int) -> str:
    kind = str(settings.dtype).removeprefix("torch.")
    mixed = "" if settings.autocast is None else f" under {str(settings.autocast).removeprefix('torch.')}"
    words = [f"{settings.model} ({layers} layers)", f"{settings.method}, {kind}{mixed} on {settings.device}"]
    words.append(f"{settings.batch_size} x {settings.length:,} tokens")
    words += [f"{settings.documents} documents a row"] if settings.documents > 1 else []
    words += [f"r {settings.r}"] if settings.method != "full" else []
    words += ["DoRA"] if settings.dora else []
    words.append(f"checkpointing {'on' if settings.checkpointing else 'off'}")
    words.append("with the kernels" if settings.patch else "without the kernels")
    return ", ".join(words)


def _fits_table(found: Sequence[Fit]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for column in ("GPU", "method", "checkpointing", "r", "largest batch", "longest row, batch 1"):
        table.add_column(column, justify="left" if column in ("method", "checkpointing") else "right")
    before = None
    for fit in found:
        if before is not None and fit.gpu != before:
            table.add_section()
        before = fit.gpu
        size = f"{fit.gpu:g} GB"
        rank = "" if fit.r is None else str(fit.r)
        on = "on" if fit.checkpointing else "off"
        table.add_row(
            size, fit.method, on, rank, f"{fit.batch_size:,}" if fit.batch_size else "none", f"{fit.longest:,}"
        )
    return table


def _tables(tables: Iterable[Any]) -> list[str]:
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=120)
    for table in tables:
        console.print(table)
    return [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
