"""What results depend on besides their settings: the state of this tree, the processor, torch."""

import platform
import re
import subprocess
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Return the commit (with "-dirty" where files differ from it), the processor and torch's version."""
    return {"commit": commit(), "processor": processor(), "torch": torch.__version__}


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Return the processor's name, with its family and model where Linux tells: names of virtual ones say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", lines, re.M))
    name, family, model = (found.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"
