"""What a step of the GPU suite did, in a file of JSON lines written as it comes, so that a later call goes on.

    {"event": "state", "state": STATE}                the first line: what results are of, others begin anew
    {"event": "selected", "items": [ITEM, ...]}       what is to be done
    {"event": "started", "item": ITEM}
    {"event": "cut", "item": ITEM}                    it was started, and the limit ended the call
    {"event": "outcome", "item": ITEM, "outcome": "passed", "seconds": 0.1, "message": "", ...}
    {"event": "step", "status": "passed", "seconds": 9.9, "note": ""}       how a call of the step ended

An item is a test or a row of a table. What is done with a GPU may hang, end the process or lose it the device: an item
has so many seconds, and a process that ended in one leaves the others to the next process (``AGAIN``).
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from examples import files

LOST = 77  # the exit status of a process that lost its device
# What CUDA says when everything after it fails as well.
FATAL = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure")
FATAL += ("illegal instruction", "invalid program counter", "hardware stack error")
ENDED = "ended its process: a crash, or it hung"  # the message of such an item
SECONDS = 45  # that an item may take: more than what compiles for long
# A command again while it loses the device or dies, as often as that may help.
AGAIN = f"""
tries=0
while tries=$((tries + 1)); "$@"; status=$?
  [ $tries -lt 30 ] && {{ [ $status = {LOST} ] || [ $status -ge 128 ]; }}
do :; done
exit $status
"""


def again(command: list[str]) -> list[str]:
    """Return a command that runs another one until it does not die."""
    return ["sh", "-c", AGAIN, "sh", *command]


def append(path: Path, **event: object) -> None:
    """Write a line with one call, so that those of processes that share the file do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, json.dumps(event).encode() + b"\n")
    finally:
        os.close(file)


def read(path: Path) -> list[dict]:
    """Return the events; of a line that was cut short none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def outcomes(events: list[dict]) -> dict[str, dict]:
    """Return the outcome of every item that ended; an error after it counts."""
    found: dict[str, dict] = {}
    for event in events:
        if event["event"] == "outcome" and found.get(event["item"], {}).get("outcome", "passed") in (
            "passed",
            "skipped",
        ):
            found[event["item"]] = event
    return found


def left(events: list[dict]) -> list[str]:
    """Return what was selected and has not ended."""
    selected = dict.fromkeys(item for event in events if event["event"] == "selected" for item in event["items"])
    ended = outcomes(events)
    return [item for item in selected if item not in ended]


def died(events: list[dict]) -> list[str]:
    """Return what was started and has not ended, of events that no running process writes to."""
    ended = outcomes(events)
    return [x["item"] for x in events if x["event"] == "started" and x["item"] not in ended]


def in_order(items: Iterable[str], events: list[dict]) -> list[str]:
    """Return what has not ended, last what an earlier call was cut in."""
    ended, cut = outcomes(events), {x["item"] for x in events if x["event"] == "cut"}
    return sorted((item for item in items if item not in ended), key=cut.__contains__)


def begin(path: Path, state: str) -> list[dict]:
    """Prepare the file for a call of the step and return its events: none of another state.

    What a limit ended is to be done again, after all others: it may hang.
    """
    header = {"event": "state", "state": state}
    events = read(path)
    if events[:1] != [header]:
        events = [header]
    unfinished = died(events)
    events = [x | {"event": "cut"} if x["event"] == "started" and x["item"] in unfinished else x for x in events]
    files.write(path, "".join(json.dumps(event) + "\n" for event in events))
    return events


def describe(error: BaseException) -> str:
    """Return an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def work(path: Path, items: dict[str, Callable[[], object]], seconds: int = SECONDS) -> None:
    """Do what has not ended: every item in at most so many seconds, or the process dies. One process at a time."""
    events = read(path)
    for item in died(events):
        append(path, event="outcome", item=item, outcome="failed", seconds=0, message=ENDED)
    append(path, event="selected", items=list(items))
    for item in in_order(items, read(path)):
        append(path, event="started", item=item)
        signal.alarm(seconds)
        started, outcome = time.monotonic(), {"outcome": "passed", "message": ""}
        try:
            outcome["result"] = items[item]()
        except Exception as error:  # whatever it raises is the finding
            outcome |= {"outcome": "failed", "message": describe(error)}
        signal.alarm(0)
        print(f"{item}: {outcome['outcome']} {outcome['message']}", flush=True)
        append(path, event="outcome", item=item, seconds=round(time.monotonic() - started, 3), **outcome)
        if any(words in json.dumps(outcome) for words in FATAL):
            sys.exit(LOST)
