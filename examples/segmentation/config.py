"""The settings of a run: one small JSON file per data set in `configs`, checked here, carried by every checkpoint."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from asa_ops import nn as blocks

from .. import files

FOLDER = Path(__file__).parent / "configs"
NAMES = ("shapes", "cityscapes", "ade20k", "voc2012")
NO_BLOCK = "none"  # the baseline: the same head with nothing between its convolutions


class ConfigError(ValueError):
    """A setting that does not exist or does not fit."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What defines a run. Sizes are [height, width] in pixels.

    Attributes:
        data: one of ``NAMES``.
        data_options: arguments of the data set besides its folder.
        resize: pictures are scaled to fit into [long side, short side], as published; None: left as they are.
        ratio: in training the scale is multiplied by a number drawn from [low, high].
        crop: what a training picture is cut or padded to.
        distort: random brightness, contrast, saturation and hue in training.
        backbone: arguments of ``transformers.ResNetConfig``.
        pretrained: folder of a local ``transformers`` ResNet checkpoint to start from; None: from scratch.
        output_stride: strides beyond it become dilation.
        channels: of the attention head.
        auxiliary_channels: of the auxiliary head on the last but one stage.
        auxiliary_weight: of its loss.
        dropout: before both classifiers.
        block: one of ``asa_ops.nn.available()``, or "none".
        block_options: its arguments, before those of ``options_by_block``.
        options_by_block: arguments of several blocks by name, as published, so that another ``block`` has its own.
        steps: optimizer steps.
        batch_size: pictures per step, of all processes together.
        optimizer: "sgd" with momentum 0.9, as published, or "adamw".
        learning_rate: at the first step; it falls to ``min_learning_rate`` as (1 - step / steps) ** 0.9.
        min_learning_rate: at the last.
        threshold_rate: of the convolutions that predict thresholds, their learning rate over that of the rest.
        weight_decay: of the optimizer.
        window: evaluation by sliding a window of this size; None: whole pictures.
        stride: of the window.
        seed: of everything random.
    """

    data: str
    data_options: dict = field(default_factory=dict)
    resize: tuple[int, int] | None = None
    ratio: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int]
    distort: bool = True
    backbone: dict
    pretrained: str | None = None
    output_stride: int = 8
    channels: int
    auxiliary_channels: int
    auxiliary_weight: float = 0.4
    dropout: float = 0.1
    block: str = "asa"
    block_options: dict = field(default_factory=dict)
    options_by_block: dict = field(default_factory=dict)
    steps: int
    batch_size: int
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    min_learning_rate: float = 1e-4
    threshold_rate: float = 1.0
    weight_decay: float = 5e-4
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("resize", "ratio", "crop", "window", "stride"):  # JSON has lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        self._check("data", self.data in NAMES, f"one of {', '.join(NAMES)}")
        self._check("optimizer", self.optimizer in ("sgd", "adamw"), '"sgd" or "adamw"')
        known = (NO_BLOCK, *blocks.available())
        self._check("block", self.block in known, f"one of {', '.join(known)}")
        for name in ("data_options", "backbone", "block_options"):
            self._check(name, isinstance(getattr(self, name), dict), "an object of options")
        options = self.options_by_block
        fits = isinstance(options, dict) and all(k in known and isinstance(v, dict) for k, v in options.items())
        self._check("options_by_block", fits, "an object of blocks, each with an object of options")
        for name in ("output_stride", "channels", "auxiliary_channels", "steps", "batch_size"):
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "an integer >= 1")
        for name in ("crop", "resize", "window", "stride"):
            value = getattr(self, name)
            sizes = isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, int) and x >= 1 for x in value)
            self._check(name, sizes or (value is None and name != "crop"), "two integers >= 1")
        low, high = self.ratio if isinstance(self.ratio, tuple) and len(self.ratio) == 2 else (0, 0)
        self._check("ratio", 0 < low <= high, "[low, high] with 0 < low <= high")
        self._check("stride", (self.stride is None) == (self.window is None), "given if and only if window is")
        if self.window is not None:
            fits = all(s <= w for s, w in zip(self.stride, self.window, strict=True))
            self._check("stride", fits, f"at most window = {list(self.window)}")
        for name in ("learning_rate", "min_learning_rate", "threshold_rate", "weight_decay", "auxiliary_weight"):
            value = getattr(self, name)
            self._check(name, isinstance(value, int | float) and 0 <= value < float("inf"), "a number >= 0")
        self._check("dropout", isinstance(self.dropout, int | float) and 0 <= self.dropout < 1, "in [0, 1)")
        self._check("seed", isinstance(self.seed, int) and self.seed >= 0, "an integer >= 0")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {expected}, got {name}={getattr(self, name)!r}")

    @property
    def options(self) -> dict:
        """The arguments of ``block``."""
        return self.options_by_block.get(self.block, {}) | self.block_options

    def replace(self, **settings) -> "Config":
        """Return a copy with other settings."""
        return self.of(dataclasses.asdict(self) | settings)

    def to_dict(self) -> dict:
        """Return numbers, strings, lists and dicts only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def of(cls, settings: dict) -> "Config":
        """Return the settings of a dict; those with a default may be left out."""
        if not isinstance(settings, dict):
            raise ConfigError(f"settings must be an object of names and values, got {settings!r:.60}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(settings.keys() - fields.keys()):
            raise ConfigError(f"unknown setting {unknown[0]!r}, expected one of {', '.join(fields)}")
        required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(required - settings.keys()):
            raise ConfigError(f"setting {missing[0]!r} is missing")
        return cls(**settings)

    @classmethod
    def load(cls, name: str | Path) -> "Config":
        """Read a JSON file, or one of ``NAMES`` from `configs`.

        Raises:
            FileError: there is no such file, or it is no text.
            ConfigError: it is no JSON, or a setting does not fit.
        """
        path = FOLDER / f"{name}.json" if name in NAMES else Path(name)
        try:
            return cls.of(json.loads(files.read(path)))
        except ValueError as error:  # broken JSON, or a setting
            raise ConfigError(f"{path}: {error}") from error
