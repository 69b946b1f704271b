"""A pytest plugin: run every n-th test only, and write outcomes as they come, so that a killed run leaves some.

``pytest -p bench.shard --shard 3/12 --outcomes FILE``; FILE gets the JSON lines of ``progress``, those of all shares.
Tests that have ended are left out. After an error that a process's GPU does not survive pytest ends with the status
``progress.LOST``, and a test that takes too long ends its process; run again, it goes on behind that test.
"""

import collections
import re
import signal
from pathlib import Path

import pytest

from . import progress

OUTCOMES = ("passed", "failed", "error", "skipped")
HUNG = 3  # tests of a set of kernels that end their processes: the others of that set are not tried
NOT_TRIED = "not tried: others of these kernels ended their processes"


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="k/n: the k-th of n shares of the tests, from 0")
    parser.addoption("--outcomes", type=Path, help="append outcomes to this file, JSON lines")


def pytest_configure(config):
    if config.option.outcomes:
        config.pluginmanager.register(_Recorder(config.option.outcomes))


@pytest.hookimpl(trylast=True)  # after -m and -k, so that shares are of equal length
def pytest_collection_modifyitems(config, items):
    share, shares = (int(part) for part in config.option.shard.split("/"))
    items.sort(key=lambda item: kernels(item.nodeid) == "triton")  # what compiles for long comes last
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % shares != share])
    items[:] = items[share::shares]
    if path := config.option.outcomes:
        progress.append(path, event="selected", items=[item.nodeid for item in items])
        items[:] = _to_do(path, items)


def _to_do(path: Path, items: list) -> list:
    """Return which tests of this share have not ended, after noting those that ended its last process."""
    mine = {item.nodeid for item in items}
    for test in mine.intersection(progress.died(progress.read(path))):
        progress.append(path, event="outcome", item=test, outcome="failed", seconds=0, message=progress.ENDED)
    events = progress.read(path)
    ended, tests = progress.outcomes(events), {item.nodeid: item for item in items}
    hung = collections.Counter(kernels(x["item"]) for x in ended.values() if x["message"] == progress.ENDED)
    found = []
    for test in progress.in_order(tests, events):
        if kernels(test) and hung[kernels(test)] >= HUNG:
            progress.append(path, event="outcome", item=test, outcome="skipped", seconds=0, message=NOT_TRIED)
        else:
            found.append(tests[test])
    return found


def kernels(test: str) -> str | None:
    """Return the kernels that a test names first, None for others."""
    found = re.search(r"\[(hopper|cuda|triton)\b", test)
    return found and found[1]


class _Recorder:
    def __init__(self, path: Path):
        self.path, self.lost = path, ""

    def ended(self, report, outcome: str, seconds: float = 0, message: str = "") -> None:
        progress.append(
            self.path, event="outcome", item=report.nodeid, outcome=outcome, seconds=seconds, message=message
        )

    def pytest_collectreport(self, report):
        if report.failed:
            self.ended(report, "error", message=_first_error(report))

    def pytest_runtest_logstart(self, nodeid):
        progress.append(self.path, event="started", item=nodeid)
        signal.alarm(progress.SECONDS)

    def pytest_runtest_logfinish(self):
        signal.alarm(0)

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown" and self.lost:
            pytest.exit(self.lost, progress.LOST)
        if report.when != "call" and report.passed:
            return
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        message = "" if report.passed else _first_error(report)
        if report.failed and any(words in report.longreprtext for words in progress.FATAL):
            self.lost = message
        self.ended(report, outcome, round(report.duration, 3), message)


def _first_error(report) -> str:
    """Return the line that says what went wrong, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return lines[0][:300] if lines else ""
