"""The restart under the allocator's better setting: once, with the very same command, and never unasked."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from pyfinetune.train import pages

NAMES = (*pages.SETTINGS, pages.OPT_OUT, "PYFINETUNE_RESTARTED", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "WORLD_SIZE")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is on Linux")


@pytest.fixture
def as_command(monkeypatch):
    """This process looks like a fresh `pyfinetune ...` on Linux with glibc."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=None, __file__="/usr/bin/pyfinetune"))


def test_a_command_restarts(as_command):
    assert pages.should_restart()


def test_the_module_restarts_too(as_command, monkeypatch):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="pyfinetune.cli"), __file__="/x/cli.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert pages.should_restart()


@pytest.mark.parametrize("name", NAMES)
def test_whoever_chose_already_is_respected(as_command, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert not pages.should_restart()


def test_the_opt_out_is_0_only(as_command, monkeypatch):
    monkeypatch.setenv(pages.OPT_OUT, "1")
    assert pages.should_restart()


@pytest.mark.parametrize("script", ["/usr/bin/pytest", "/home/me/train.py", "/home/me/pyfinetune.py"])
def test_another_program_is_not_restarted(as_command, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=None, __file__=script))
    assert not pages.should_restart()


def test_an_interactive_session_is_not_restarted(as_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace())
    assert not pages.should_restart()


def test_another_allocator_is_left_alone(as_command, monkeypatch):
    monkeypatch.setattr(pages.platform, "libc_ver", lambda: ("", ""))
    assert not pages.should_restart()


def test_this_test_run_is_not_restarted(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("restarted"))
    pages.restart_with_recycled_pages()


def test_the_same_command_is_started(as_command, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "pyfinetune", "train", "a b.yaml"])
    pages.restart_with_recycled_pages()
    ((program, arguments, environment),) = started
    assert program == sys.executable
    assert arguments == ["python", "-X", "utf8", "pyfinetune", "train", "a b.yaml"]
    assert environment.items() >= {*pages.SETTINGS.items(), ("PYFINETUNE_RESTARTED", "1")}
    assert environment.keys() >= os.environ.keys()


def test_a_restart_that_is_refused_does_no_harm(as_command, monkeypatch):
    def refused(*args):
        raise PermissionError

    monkeypatch.setattr(os, "execve", refused)
    pages.restart_with_recycled_pages()


def test_a_real_process_restarts_once_and_keeps_its_arguments(tmp_path):
    script = tmp_path / "pyfinetune"
    script.write_text(
        "import os, sys\n"
        "from pyfinetune.train.pages import restart_with_recycled_pages\n"
        "print(os.getpid(), 'starts')\n"
        "restart_with_recycled_pages()\n"
        "print(os.getpid(), os.environ['MALLOC_MMAP_THRESHOLD_'], os.environ['MALLOC_TRIM_THRESHOLD_'], sys.argv[1:])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, str(script), "train", "a b.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    first, second, end = done.stdout.splitlines()
    assert first == second  # one process, started twice
    assert end == f"{first.split()[0]} 8589934592 17179869184 ['train', 'a b.yaml']"
