"""`pyfinetune run`: an unchanged script, its model patched when its trainer starts."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from pyfinetune.errors import UserError
from pyfinetune.hf.patch import patch


class PatchAtStart(TrainerCallback):
    """Patches the model that a trainer is about to train, and says what it did on standard error."""

    started = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Patch; the optimizer is made already, and keeps its parameters."""
        type(self).started += 1
        report = patch(model)
        if state.is_world_process_zero:
            print(f"pyfinetune: {report}", file=sys.stderr, flush=True)


def run_script(script: str, arguments: Sequence[str] = (), as_module: bool = False) -> None:
    """Run a Python script as `python` would, with every Trainer's model patched when its training starts.

    The script's arguments, exit code, exceptions and signals are its own. Trainers that derive from
    `transformers.Trainer` are seen, TRL's among them; a loop of the script's own is not.

    Args:
        script: a file, or with `as_module` the name of a module.
        arguments: what the script finds in `sys.argv[1:]`.
        as_module: as `python -m`.

    Raises:
        UserError: there is no such file.
    """
    if not as_module and not os.path.isfile(script):
        raise UserError(f"run: {script}: no such file", fix="pyfinetune run SCRIPT.py, or: pyfinetune run -m MODULE")
    # What every Trainer begins with: a list that is there to be added to, so that nothing has to be replaced.
    DEFAULT_CALLBACKS.append(PatchAtStart)
    before = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.getcwd() if as_module else os.path.dirname(os.path.abspath(script)))
    try:
        if as_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
        DEFAULT_CALLBACKS.remove(PatchAtStart)
    if not PatchAtStart.started:
        print("pyfinetune: the script has started no transformers Trainer, so nothing was patched", file=sys.stderr)
