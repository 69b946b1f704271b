"""What the benchmarks write and read: one JSON file of an environment and cases. No torch.

    {"environment": {name: value}, "ceilings": {name: value}, "cases": [case]}

A case is one call of one op on one input; its methods are ours and the peers beside it (``Case``, ``Method``). Files
are checked when they are read, and every error names the file and the field.
"""

import dataclasses
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # how files are written there and here
import files

MODES = ("fwd", "fwd+bwd", "mem")


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def slug(name: str) -> str:
    """Return a file name for a machine: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass
class Method:
    """What one method did in a case: seconds of every round, or bytes; or why there are none.

    Attributes:
        seconds: of every round, in the order of the rounds, which are those of the other methods too.
        memory: bytes added to the peak, {"fwd": .., "fwd+bwd": ..}; in mode "mem" only.
        flops: what FlopCounterMode counted in one call, by the formula that the operators are registered with.
        error: what a call raised.
        skipped: why it was not tried.
    """

    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    error: str | None = None
    skipped: str | None = None


@dataclass
class Case:
    """One call: op, input, mode, and what every method did.

    Attributes:
        op: "asa", "criss_cross_attention" or a block, "non_local", "non_local,mode=gaussian".
        size: "HxW".
        dim: head dim; channels of a block.
        heads, batch: as they say.
        dtype: "float32".
        inputs: a name of ``bench/inputs.py``.
        alpha: what thresholds were set to, None: the input's own.
        mode: one of MODES.
        sweep: what a row of ``bench/scaling.py`` varies, "" elsewhere.
        sparsity: of "asa", what ``accounting.sparsity`` found.
        ours: the methods that are this library's.
        methods: by name.
    """

    op: str
    size: str
    dim: int
    heads: int
    batch: int
    dtype: str
    inputs: str
    alpha: float | None
    mode: str
    sweep: str
    sparsity: dict[str, float]
    ours: list[str]
    methods: dict[str, Method]

    @property
    def key(self) -> tuple:
        """What tells cases of a file apart."""
        named = self.op, self.size, self.dim, self.heads, self.batch, self.dtype, self.inputs
        return *named, self.alpha, self.mode, self.sweep

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.size.split("x")
        return int(height), int(width)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def label(self) -> str:
        """The case in a few words."""
        heads = f" x {self.heads} heads" if self.heads > 1 else ""
        heads += f" x batch {self.batch}" if self.batch > 1 else ""
        alpha = "" if self.alpha is None else f" alpha={self.alpha:g}"
        return f"{self.op} {self.inputs}{alpha} {self.size}, {self.dim}{heads}, {self.mode}"

    def median(self, method: str) -> float | None:
        """Return a method's median of seconds, None where it has none."""
        seconds = self.methods[method].seconds if method in self.methods else []
        return statistics.median(seconds) if seconds else None

    def ratio(self, ours: str, peer: str) -> list[float] | None:
        """Return the quartiles of the rounds' ratios, ours / peer; None where one of them was not timed."""
        times = [self.methods[name].seconds for name in (ours, peer) if name in self.methods]
        if len(times) < 2 or not all(times):
            return None
        return quartiles([a / b for a, b in zip(*times, strict=False)])  # slow methods have fewer rounds


@dataclass
class Record:
    """A file of results."""

    environment: dict[str, object]
    ceilings: dict[str, float]
    cases: list[Case]

    def add(self, case: Case) -> None:
        """Add a case; one of the same key gives way."""
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
        content = json.loads(files.read(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    fields = _checked(content, Record, str(path))
    if not all(isinstance(x, int | float) for x in fields["ceilings"].values()):
        raise ValueError(f"{path}: ceilings must be numbers, got {fields['ceilings']}")
    return Record(**fields | {"cases": [_case(x, f"{path}: cases[{i}]") for i, x in enumerate(fields["cases"])]})


def _case(content: object, where: str) -> Case:
    fields = _checked(content, Case, where)
    if fields["mode"] not in MODES:
        raise ValueError(f"{where}.mode: expected one of {', '.join(MODES)}, got {fields['mode']!r}")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", fields["size"]):
        raise ValueError(f"{where}.size: expected HxW, got {fields['size']!r}")
    methods = {}
    for name, method in fields["methods"].items():
        told = _checked(method, Method, f"{where}.methods[{name!r}]")
        numbers = [*told["seconds"], *told["memory"].values()]
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and x >= 0 for x in numbers):
            raise ValueError(f"{where}.methods[{name!r}]: seconds and bytes must be numbers >= 0, got {numbers}")
        methods[name] = Method(**told)
    if missing := set(fields["ours"]) - set(methods):
        raise ValueError(f"{where}.ours: {', '.join(sorted(missing))} not among the methods {', '.join(methods)}")
    return Case(**fields | {"methods": methods})


def _checked(content: object, form: type, where: str) -> dict:
    """Return the fields of ``content``, an object with the fields of a dataclass, with their JSON types."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {type(content).__name__}")
    expected = {each.name: each for each in dataclasses.fields(form)}
    if set(content) != set(expected):
        missing, unknown = sorted(set(expected) - set(content)), sorted(set(content) - set(expected))
        raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}")
    for name, each in expected.items():
        allowed = _json_types(each.type)
        value = content[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ValueError(f"{where}.{name}: expected {each.type}, got {value!r:.80}")
    return content


def _json_types(annotation: object) -> tuple[type, ...]:
    """Return what JSON gives for an annotation: float also an int, a container its outermost type."""
    parts = getattr(annotation, "__args__", ()) if "|" in str(annotation) and "[" not in str(annotation) else ()
    types = []
    for part in parts or (annotation,):
        part = getattr(part, "__origin__", part)
        types += [int, float] if part is float else [part]
    return tuple(types)
