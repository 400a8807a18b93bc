"""Recycled memory pages: a command starts itself again under the allocator's better setting.

glibc gives every tensor of 32 MiB and more fresh pages from the kernel and returns them when it is freed; filling fresh
pages costs more than many an operation on them. Two variables, read when a process starts, keep freed memory instead.
"""

from __future__ import annotations

import os
import platform
import sys

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
OPT_OUT = "PYFINETUNE_RECYCLE_PAGES"  # 0 leaves the allocator alone
_RESTARTED = "PYFINETUNE_RESTARTED"  # marks the second process, so that there is never a third
# torchrun and its kin start many processes and set these; restarting is theirs to do.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "WORLD_SIZE")


def restart_with_recycled_pages() -> None:
    """Start this very command again with the two variables set, once; return where that is not to be done.

    Nothing happens outside Linux with glibc, where either variable is set already or `PYFINETUNE_RECYCLE_PAGES` is 0,
    under a launcher of several processes, and where the program is not the command line itself (a test, a script).

    Example:
        >>> restart_with_recycled_pages()  # in a script: nothing
    """
    if not should_restart():
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **SETTINGS, _RESTARTED: "1"})
    except OSError:  # the run goes on as it is, only slower
        return


def should_restart() -> bool:
    """Whether `restart_with_recycled_pages` would start the command again.

    Returns:
        False wherever the setting is someone else's choice already, or would not take effect.

    Example:
        >>> should_restart()
        False
    """
    if os.environ.get(OPT_OUT) == "0" or any(name in os.environ for name in (*SETTINGS, _RESTARTED, *_LAUNCHERS)):
        return False
    has_glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    return has_glibc and _is_command_line()


def _is_command_line() -> bool:
    """Whether this process was started as `pyfinetune ...` or `python -m pyfinetune ...`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name in ("pyfinetune.__main__", "pyfinetune.cli")
    script = getattr(main, "__file__", None)
    return script is not None and os.path.basename(script) == "pyfinetune"
