"""What the benchmarks write and read: one JSON file of an environment and cases.

    {"environment": {name: value}, "ceilings": {name: value}, "cases": [case], ...}

A case is one call of one op on one input; its methods are ours and the peers beside it. The fields are those of Record,
Case and Method. Files are checked when they are read, and every error names the file and the field.
"""

import dataclasses
import json
import re
import statistics
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from examples import files

from .workloads import Spec

MODES = ("fwd", "fwd+bwd", "mem")


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def slug(name: str) -> str:
    """Return a file name for a machine: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass
class Method:
    """What one method did in a case: seconds of every round, or bytes; or why there are none."""

    seconds: list[float] = field(default_factory=list)  # in the order of the rounds, those of the other methods too
    memory: dict[str, int] = field(default_factory=dict)  # bytes added to the peak, by "fwd" and "fwd+bwd"
    flops: int | None = None  # what FlopCounterMode counted, by the formulas that operators are registered with
    error: str | None = None  # what a call raised
    skipped: str | None = None  # why it was not tried
    graph: list[float] = field(default_factory=list)  # as seconds, of replays in a CUDA graph


@dataclass
class Kernel:
    seconds: float  # of its launches in a call together
    launches: int
    flops: int | None = None


@dataclass(frozen=True)
class Case(Spec):
    """One call: op and input, mode, and what every method did."""

    mode: str  # one of MODES
    sweep: str  # "tokens", "survivors" or "dim" in a sweep, "" elsewhere
    sparsity: dict[str, float]  # of "asa", what accounting.sparsity found
    ours: list[str]  # the methods that are this library's
    methods: dict[str, Method]
    kernels: dict[str, Kernel] = field(default_factory=dict)  # of ours in Triton on a GPU

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if missing := set(self.ours) - set(self.methods):
            raise ValueError(f"ours: {', '.join(sorted(missing))} not among the methods {', '.join(self.methods)}")

    @property
    def spec(self) -> Spec:
        return Spec(*(getattr(self, each.name) for each in dataclasses.fields(Spec)))

    @property
    def key(self) -> tuple:
        """What tells cases of a file apart."""
        return self.spec, self.mode, self.sweep

    @property
    def shape(self) -> str:
        """The head dim, and heads and batch where there are more than one."""
        heads = f" x {self.heads} heads" if self.heads > 1 else ""
        return f"{self.dim}{heads}" + (f" x batch {self.batch}" if self.batch > 1 else "")

    @property
    def label(self) -> str:
        """The case in a few words."""
        alpha = "" if self.alpha is None else f" alpha={self.alpha:g}"
        return f"{self.op} {self.inputs}{alpha} {self.size}, {self.shape}, {self.mode}"

    def times(self, method: str | None, how: str = "seconds") -> list[float]:
        """Return the "seconds" of a method's rounds, as called, or those in a "graph"; none if it was not timed."""
        return getattr(self.methods[method], how) if method in self.methods else []

    def bytes(self, method: str, mode: str) -> int | None:
        """Return what a method added to the peak, "fwd" or "fwd+bwd", None if it was not measured."""
        return self.methods[method].memory.get(mode) if method in self.methods else None

    def median(self, method: str, how: str = "seconds") -> float | None:
        times = self.times(method, how)
        return statistics.median(times) if times else None

    def fastest(self, methods: Iterable[str], how: str = "seconds") -> str | None:
        """Return which of some methods takes the least time, None if none was timed."""
        times = {name: time for name in methods if (time := self.median(name, how))}
        return min(times, key=times.get) if times else None

    def ratio(self, method: str | None, other: str | None, how: str = "seconds") -> list[float] | None:
        """Return the quartiles of the rounds' ratios, method / other; None where one of them was not timed."""
        pairs = zip(self.times(method, how), self.times(other, how), strict=False)  # slow methods have fewer rounds
        return quartiles([a / b for a, b in pairs]) or None


@dataclass
class Tally:
    selected: int
    passed: int
    failed: int
    error: int
    skipped: int
    failures: list[dict]
    unfinished: list[str]  # the tests that never ended
    skips: list[str]  # why tests were skipped
    slowest: list[dict]


@dataclass
class Profile:
    """The kernels of a call with its backward, by torch's profiler; those of PyTorch together."""

    label: str  # of the case
    method: str
    kernels: dict[str, Kernel]


@dataclass
class Step:
    step: str  # of the GPU suite
    status: str  # "passed", "failed", "timed out" or "skipped"
    seconds: float
    note: str


@dataclass
class Record:
    environment: dict[str, object]  # the machine, versions, the commit
    ceilings: dict[str, float]  # what the machine does at most
    cases: list[Case]  # in the order in which they were measured
    notes: list[str] = field(default_factory=list)  # how it was measured, what is missing
    first_call: dict[str, float] = field(default_factory=dict)  # seconds of the first calls in a fresh process
    steps: list[Step] = field(default_factory=list)  # of the GPU suite
    tests: dict[str, Tally] = field(default_factory=dict)  # by its step
    left: dict[str, str] = field(default_factory=dict)  # by step, what is left to a further call
    # Of the whole op against float64, by "kernels dtype D", D as kernels pad it: how many "cases", "passed", "skipped".
    correct: dict[str, dict[str, int]] = field(default_factory=dict)
    profiles: list[Profile] = field(default_factory=list)

    def add(self, case: Case) -> None:
        self.cases = [each for each in self.cases if each.key != case.key] + [case]

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        flat = re.sub(r"\[\s+([-\d.,e\s+]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        files.write(path, flat + "\n")


def read(path: Path) -> Record:
    """Read and check a file.

    Raises:
        ValueError: it is no JSON or not of this form; the message names the file and the field.
        OSError: it cannot be read.
    """
    try:
        return _load(Record, json.loads(files.read(path)), "")
    except ValueError as error:
        what = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}: {what}{error}") from error


def of(form: type, content: object) -> object:
    """Return an object of this module from what ``dataclasses.asdict`` made of it."""
    return _load(form, content, form.__name__)


def _load(form: object, content: object, where: str) -> object:
    """Return a value of JSON as what an annotation says: dataclasses, containers, numbers that are not negative."""
    of = typing.get_args(form)
    if isinstance(form, types.UnionType):  # with None
        return None if content is None else _load(of[0], content, where)
    outer = {float: (int, float)}.get(form) or typing.get_origin(form) or form
    if dataclasses.is_dataclass(form):
        return _load_fields(form, content, where)
    if not isinstance(content, outer) or (isinstance(content, bool) and form is not object):
        raise ValueError(f"{where}: expected {form if of else form.__name__}, got {content!r:.80}")
    if form in (int, float) and not 0 <= content < float("inf"):
        raise ValueError(f"{where}: expected a number >= 0, got {content}")
    if outer is dict and of:
        return {name: _load(of[1], x, f"{where}[{name!r}]") for name, x in content.items()}
    return [_load(of[0], x, f"{where}[{i}]") for i, x in enumerate(content)] if outer is list else content


def _load_fields(form: type, content: object, where: str) -> object:
    if not isinstance(content, dict):
        raise ValueError(f"{where or 'all of it'}: expected an object, got {content!r:.80}")
    hints = typing.get_type_hints(form)
    needed = {x.name for x in dataclasses.fields(form) if x.default is x.default_factory is dataclasses.MISSING}
    missing, unknown = sorted(needed - set(content)), sorted(set(content) - set(hints))
    if missing or unknown:
        raise ValueError(f"{where or 'all of it'}: missing fields {missing}, unknown fields {unknown}")
    dot = where and f"{where}."
    fields = {name: _load(hints[name], x, f"{dot}{name}") for name, x in content.items()}
    try:
        return form(**fields)
    except ValueError as error:
        raise ValueError(f"{dot}{error}") from error
