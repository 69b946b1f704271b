"""What results depend on besides their settings: the state of this tree, the processor, torch."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Return the commit, the processor and torch's version."""
    return {"commit": commit(), "processor": processor(), "torch": torch.__version__}


def output_of(*command: str) -> str | None:
    """Return what a command prints, None where it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """Return the commit of this tree; ASA_OPS_COMMIT names it where the tree is a copy without a repository."""
    found = output_of("git", "describe", "--always", "--dirty", "--abbrev=12")
    return os.environ.get("ASA_OPS_COMMIT") or found or "unknown"


def processor() -> str:
    """Return the processor's name, with its family and model where Linux tells: names of virtual ones say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", lines, re.M))
    name, family, model = (found.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"
