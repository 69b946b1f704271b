"""A pytest plugin: run every n-th test only, and write outcomes as they come, so that a killed run leaves some.

``pytest -p bench.shard --shard 3/12 --outcomes FILE``; FILE gets JSON lines, which ``gpu.tally`` reads. After an error
that a process's GPU does not survive pytest ends with the status LOST; run again, it goes on behind that test.
"""

import json
import os

import pytest

OUTCOMES = ("passed", "failed", "error", "skipped")
LOST = 77
# What CUDA says when everything after it fails as well.
FATAL = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure")
FATAL += ("illegal instruction", "invalid program counter", "hardware stack error")


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="k/n: the k-th of n shares of the tests, from 0")
    parser.addoption("--outcomes", help="append outcomes to this file, JSON lines")


def pytest_configure(config):
    if config.option.outcomes:
        config.pluginmanager.register(_Recorder(config.option.outcomes))


@pytest.hookimpl(trylast=True)  # after -m and -k, so that shares are of equal length
def pytest_collection_modifyitems(config, items):
    share, shares = (int(part) for part in config.option.shard.split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % shares != share])
    items[:] = items[share::shares]
    if config.option.outcomes and os.path.exists(config.option.outcomes):
        with open(config.option.outcomes) as file:
            begun = {event["test"] for event in map(json.loads, file) if event["event"] == "started"}
        items[:] = [item for item in items if item.nodeid not in begun]


class _Recorder:
    def __init__(self, path: str):
        self.path, self.lost = path, ""

    def write(self, **line) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session):
        self.write(event="selected", tests=[item.nodeid for item in session.items])

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(event="outcome", test=report.nodeid, outcome="error", seconds=0, message=_first_error(report))

    def pytest_runtest_logstart(self, nodeid):
        self.write(event="started", test=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown" and self.lost:
            pytest.exit(self.lost, LOST)
        if report.when != "call" and report.passed:
            return
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        message = "" if report.passed else _first_error(report)
        if report.failed and any(words in report.longreprtext for words in FATAL):
            self.lost = message
        seconds = round(report.duration, 3)
        self.write(event="outcome", test=report.nodeid, outcome=outcome, seconds=seconds, message=message)


def _first_error(report) -> str:
    """Return the line that says what went wrong, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return lines[0][:300] if lines else ""
