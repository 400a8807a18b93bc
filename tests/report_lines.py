"""A pytest plugin that writes each result to a file when it is known: what there is survives a timeout and a crash.

`pyfinetune.bench.gpu_check` loads it with `-p report_lines`. PYFINETUNE_TEST_LINES names the file, a JSON object a
line; tests that are in it already are left out, so that the same command goes on where it was cut off. With
PYFINETUNE_TEST_LIMIT=n only the first n tests of each file run. A failed CUDA context fails every test after it:
the process ends then, with 99, and is to be started again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

BROKEN = 99
_STICKY = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")
_LINES = Path(os.environ["PYFINETUNE_TEST_LINES"])
_LIMIT = int(os.environ.get("PYFINETUNE_TEST_LIMIT", "0"))


def write(**line) -> None:
    with _LINES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config, items):
    known = _LINES.read_text(encoding="utf-8").splitlines() if _LINES.exists() else []
    done = {json.loads(line)["test"] for line in known}
    kept, of_file = [], Counter()
    for item in items:
        of_file[item.path] += 1
        if item.nodeid not in done and (not _LIMIT or of_file[item.path] <= _LIMIT):
            kept.append(item)
    items[:] = kept


def pytest_runtest_logstart(nodeid, location):
    write(test=nodeid, outcome="started")


def pytest_runtest_logreport(report):
    message = "" if report.passed else report.longreprtext
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        message = report.longrepr[2]
    if report.when == "call" or not report.passed:
        outcome = "failed" if report.failed else report.outcome
        write(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 3), message=message[-2000:])
    if report.failed and any(fault in message for fault in _STICKY):
        os._exit(BROKEN)


def pytest_collectreport(report):
    if report.failed:
        write(test=report.nodeid, outcome="failed", seconds=0.0, message=report.longreprtext[-2000:])
