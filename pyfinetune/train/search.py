"""The search that `hpo:` asks for: optuna proposes values, each trial is a whole run, the best becomes a YAML file.

    RunConfig with hpo: -> search -> hpo.db (all trials), trial-000/ (a run each), best.yaml

A search that was stopped or killed goes on with the same command: finished trials are in the database, and the one that
was under way goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.train import checkpoints
from pyfinetune.train.config import RunConfig, config_digest, parse_config, takes_fractions
from pyfinetune.train.processes import world_size
from pyfinetune.train.run import train
from pyfinetune.train.search_space import Range, with_values


@dataclass
class SearchResult:
    """What came of a search.

    Args:
        output_dir: where everything was saved.
        trials: trials that are over: complete, pruned or failed.
        interrupted: whether it was stopped before its last trial.
        best_loss: held-out loss of the best trial; None before the first is complete.
        best_values: its values of the searched keys.
        best_config: the YAML file that trains with them.
    """

    output_dir: str
    trials: int = 0
    interrupted: bool = False
    best_loss: float | None = None
    best_values: dict[str, Any] = field(default_factory=dict)
    best_config: str | None = None


class Pruning(TrainerCallback):
    """Tells optuna each held-out loss and ends a trial that does worse than the others did by then.

    Args:
        trial: optuna's.
    """

    def __init__(self, trial: Any):
        self.trial = trial
        self.pruned = False
        self._last = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step > self._last and "eval_loss" in (metrics or {}):
            self._last = state.global_step
            self.trial.report(metrics["eval_loss"], state.global_step)
            if state.global_step < state.max_steps and self.trial.should_prune():
                self.pruned = control.should_training_stop = True


def search(config: RunConfig, console: Console | None = None) -> SearchResult:
    """Run the trials that the section `hpo:` asks for, or those of them that are left.

    Args:
        config: a configuration with `hpo`.
        console: where messages and the table go; standard error by default.

    Returns:
        What came of it.

    Raises:
        UserError: optuna is missing, the folder holds another search, or a run's configuration is at fault.
        PyfinetuneError: no trial came to its end.

    Example:
        >>> search(load_config("run.yaml")).best_values  # doctest: +SKIP
        {'trainer.learning_rate': 0.00021, 'lora_r': 16}
    """
    if world_size() > 1:
        raise UserError(
            f"hpo: a search runs in one process, and there are {world_size()}",
            fix="start it without a launcher; train the best.yaml that it writes with one",
        )
    console = console or Console(stderr=True)
    study = _open_study(config)
    _take_up(study)
    while (over := _over(study)) < config.hpo.trials:
        trial = study.ask()
        values = {key: _suggest(trial, key, space) for key, space in config.hpo.search.items()}
        if "folder" not in trial.user_attrs:
            trial.set_user_attr("folder", f"trial-{trial.number:03d}")
        _say(console, f"trial {over + 1} of {config.hpo.trials}: {_words(values)}")
        if not _run_trial(config, study, trial, values, console):
            return _result(config, study, interrupted=True)
        best = _best(study)
        if best is not None:
            _say(console, f"best so far: held-out loss {best.value:.4f} with {_words(_best_values(config, best))}")
    best = _best(study)
    if best is None:
        reason = next((t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs), "all were pruned")
        raise PyfinetuneError(f"hpo: none of {_over(study)} trials came to its end: {reason}")
    console.print(_table(study, config))
    _write_best(config, best)
    return _result(config, study)


def search_lines(result: SearchResult, command: str) -> list[str]:
    """What a person wants to know at the end of a search.

    Args:
        result: what `search` returned.
        command: the command that goes on.

    Returns:
        Lines of text.

    Example:
        >>> search_lines(SearchResult("out", trials=3, interrupted=True), "pyfinetune train run.yaml")
        ['stopped after 3 trials', 'go on with: pyfinetune train run.yaml']
    """
    if result.interrupted:
        return [f"stopped after {result.trials} trials", f"go on with: {command}"]
    return [
        f"{result.trials} trials, best held-out loss {result.best_loss:.4f} with {_words(result.best_values)}",
        f"train with them: pyfinetune train {result.best_config}",
    ]


def _open_study(config: RunConfig) -> Any:
    """The study in the output folder, made where there is none."""
    try:
        import optuna
        from sqlalchemy import URL
    except ModuleNotFoundError as error:
        raise UserError(f"hpo: needs {error.name}", fix="pip install 'pyfinetune[hpo]'") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("hpo: one process searches, and this is one of several", fix="run it without torchrun")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    address = URL.create("sqlite", database=str((out / "hpo.db").resolve())).render_as_string()
    study = optuna.create_study(storage=address, study_name="hpo", load_if_exists=True, direction="minimize")
    # A sampler that starts over with the same seed would propose the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    if config.hpo.pruning:
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    else:
        study.pruner = optuna.pruners.NopPruner()
    now = config_digest(config)
    del now["hpo"]["trials"], now["output_dir"]  # more trials may be asked for, and the folder moved
    before = study.user_attrs.get("config")
    if before is None:
        study.set_user_attr("config", json.dumps(now))
    elif json.loads(before) != now:
        was = json.loads(before)
        key = next(key for key in now if was.get(key) != now[key])
        raise UserError(
            f"output_dir: {out} holds another search: {key} was {was.get(key)!r} there and is {now[key]!r} now",
            fix="set another output_dir, or put the value back",
        )
    return study


def _take_up(study: Any) -> None:
    """Queue what was under way when the search was stopped, to go on in its own folder."""
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if "folder" in trial.user_attrs:
            study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs["folder"]})


def _suggest(trial: Any, key: str, space: Range | list[Any]) -> Any:
    if isinstance(space, list):
        if all(isinstance(value, str | int | float | None) for value in space):
            return trial.suggest_categorical(key, space)
        # A database holds plain values only; the others go by their place in the list.
        return space[trial.suggest_categorical(key, list(range(len(space))))]
    if takes_fractions(key) or any(isinstance(number, float) for number in (space.low, space.high, space.step)):
        return trial.suggest_float(key, space.low, space.high, log=space.log, step=space.step)
    return trial.suggest_int(key, space.low, space.high, log=space.log, step=space.step or 1)


def _run_trial(config: RunConfig, study: Any, trial: Any, values: dict[str, Any], console: Console) -> bool:
    """Run one trial and tell the study; False where the person stopped it."""
    from optuna.trial import TrialState

    folder = Path(config.output_dir) / trial.user_attrs["folder"]
    content = with_values(_plain(config), values)
    content["trainer"] = {"save_total_limit": 1, **content.get("trainer", {})}
    pruning = Pruning(trial)
    try:
        result = train(
            parse_config({**content, "output_dir": str(folder), "report": False, "resume": "auto"}),
            console,
            callbacks=[pruning],
        )
    except UserError:
        raise
    except PyfinetuneError as error:  # a learning rate at which the loss becomes NaN is an answer, too
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.FAIL)
        _say(console, f"trial failed: {error}")
        return True
    if result.interrupted and not pruning.pruned:
        return False
    for _, checkpoint in checkpoints.list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    trial.set_user_attr("seconds", result.seconds)
    if pruning.pruned:
        study.tell(trial, state=TrialState.PRUNED)
        _say(console, f"pruned at step {result.steps}: held-out loss {result.eval_loss:.4f}")
    else:
        study.tell(trial, result.eval_loss)
        _say(console, f"held-out loss {result.eval_loss:.4f}")
    return True


def _over(study: Any) -> int:
    """Trials that are over; one that a kill cut off is not, it was queued again."""
    states = [trial for trial in study.trials if trial.state.is_finished()]
    return sum(trial.state.name != "FAIL" or "reason" in trial.user_attrs for trial in states)


def _best(study: Any) -> Any:
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    return min(complete, key=lambda trial: trial.value, default=None)


def _plain(config: RunConfig) -> dict[str, Any]:
    """What the YAML file said, without the search."""
    content = json.loads(config.model_dump_json(exclude_defaults=True))
    content.pop("hpo")
    return content


def _best_values(config: RunConfig, best: Any) -> dict[str, Any]:
    import optuna

    fixed = optuna.trial.FixedTrial(best.params)
    return {key: _suggest(fixed, key, space) for key, space in config.hpo.search.items()}


def _best_path(config: RunConfig) -> Path:
    return Path(config.output_dir) / "best.yaml"


def _write_best(config: RunConfig, best: Any) -> None:
    """A YAML file that trains with the best trial's values, with report and all."""
    content = with_values(_plain(config), _best_values(config, best))
    content["output_dir"] = str(Path(config.output_dir) / "best")
    comment = f"# Held-out loss {best.value:.4f}, the lowest of {config.hpo.trials} trials.\n"
    text = comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    _best_path(config).write_text(text, encoding="utf-8")


def _result(config: RunConfig, study: Any, interrupted: bool = False) -> SearchResult:
    result = SearchResult(config.output_dir, trials=_over(study), interrupted=interrupted)
    best = _best(study)
    if best is None:
        return result
    path = None if interrupted else str(_best_path(config))
    values = _best_values(config, best)
    return dataclasses.replace(result, best_loss=best.value, best_values=values, best_config=path)


def _table(study: Any, config: RunConfig) -> Table:
    table = Table(title="Trials, the best first")
    for column in ("trial", *config.hpo.search, "held-out loss", "seconds", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    known = [trial for trial in study.trials if trial.state.name != "FAIL" or "reason" in trial.user_attrs]
    for trial in sorted(known, key=lambda trial: (trial.state.name != "COMPLETE", trial.value or 0.0)):
        values = _best_values(config, trial)
        loss = f"{trial.value:.4f}" if trial.state.name == "COMPLETE" else ""
        seconds = f"{trial.user_attrs.get('seconds', 0):.1f}"
        cells = [_word(values[key]) for key in config.hpo.search]
        table.add_row(trial.user_attrs["folder"], *cells, loss, seconds, trial.state.name.lower())
    return table


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in values.items())


def _word(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)
