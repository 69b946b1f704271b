"""Training layers with thresholds: their learning rate, a start from dense attention, and what they keep.

These functions know a layer by its attribute ``asa_thresholds``: names of those of its parameters, or of modules in it,
from which alpha and beta come. Such a layer passes its alpha through :func:`scheduled`, and calls
:func:`asa_ops.asa_attention` through :func:`attend`. Then it can be scheduled, by a buffer ``asa_factor``, and
monitored: ``asa_monitored`` asks it to keep its last call as ``asa_call``.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..asa import AsaStats, asa_attention
from ..core import checks
from ..core.contracts import outside_autocast

_TILE = 64
_TILE_SIDES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}  # of the tokens of a tile on their grid, as GPU kernels cut them
_QUANTILES = (0.05, 0.5, 0.95)
_SAMPLE = 2**16  # thresholds that a quantile looks at, at most


class _Call(NamedTuple):
    """What a layer keeps of its last call, for :class:`monitor`."""

    stats: AsaStats
    keys: Tensor  # how many real ones there are: a number, or [B, 1, 1]
    thresholds: dict[str, Tensor]  # "alpha" and "beta", where there are such
    active_tiles: Tensor | None


def attend(layer: Any, function: Callable[..., Any], **arguments: Any) -> Tensor:
    """Return ``function(**arguments)``, a call of ``layer``, which keeps the statistics if it is monitored.

    Args:
        layer: a module with ``asa_thresholds``.
        function: :func:`asa_ops.asa_attention`, or one with its arguments.
        arguments: those, by name.
    """
    tiles = getattr(layer, "asa_monitored", None)  # True or False; None: nobody asks
    if tiles is None or torch._C._are_functorch_transforms_active():  # whose tensors live no longer than a transform
        return function(**arguments)
    out, stats = function(**arguments, return_stats=True)
    query, key, mask = arguments["query"], arguments["key"], arguments.get("key_padding_mask")
    n = math.prod(arguments["grid"]) + arguments.get("extra_tokens", 0) if arguments.get("grid") else key.shape[2]
    given = {name: arguments.get(name) for name in ("alpha", "beta")}
    layer.asa_call = _Call(
        stats,
        query.new_full((), n, dtype=torch.float32) if mask is None else mask.sum(-1)[:, None, None],
        {name: torch.as_tensor(x).detach() for name, x in given.items() if x is not None},
        _active_tiles(**arguments) if tiles and key.shape[2] == n else None,  # not of a strip of a map
    )
    return out


def scheduled(layer: nn.Module, alpha: Tensor) -> Tensor:
    """Return ``alpha`` of ``layer``, or what a :class:`ThresholdSchedule` makes of it."""
    factor = getattr(layer, "asa_factor", None)
    return alpha if factor is None else torch.where(factor == 0, 0.0, alpha * factor)  # inf, too, begins as 0


@torch.no_grad()
def _active_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Any = None,
    beta: Any = None,
    grid: Any = None,
    extra_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return the share of tiles of pairs with a survivor, of the first image and head.

    Values that say which tile a key is in give, for each row, the weight of every tile: more than 0 where one survives
    (and is not lost beside the row's largest, more than e^100 times as heavy). No kernel has to list the pairs.
    """
    n_q, n_k = query.shape[2], key.shape[2]
    index = torch.zeros(n_k, dtype=torch.int64, device=key.device)
    if grid is not None:
        below = n_k - extra_tokens
        token = torch.arange(below, device=key.device)
        index = index[extra_tokens:]
        for side, of_tile in zip(grid, _TILE_SIDES[len(grid)], strict=True):
            below = below // side
            index = index * (-(-side // of_tile)) + token // below % side // of_tile
        index = torch.nn.functional.pad(index, (extra_tokens, 0), value=-1)  # these come first
    columns = index.argsort(stable=True).argsort() // _TILE
    rows = columns if grid is not None else torch.arange(n_q, device=key.device) // _TILE
    in_columns, in_rows = (
        (tile[:, None] == torch.arange(-(-n // _TILE), device=key.device)).float()
        for tile, n in ((columns, n_k), (rows, n_q))
    )
    same = {name: options[name] for name in ("window", "topk", "reciprocal", "scale") if name in options}
    with outside_autocast(query.device.type):
        weights = asa_attention(  # of a row, summed up in each tile of keys
            query[:1, :1].float(),
            key[:1, :1].float(),
            in_columns[None, None].expand(min(key.shape[0], 1), -1, -1, -1),
            *(x[(None,) * (3 - x.dim())][:1, :1].float() if isinstance(x, Tensor) else x for x in (alpha, beta)),
            grid=grid,
            extra_tokens=extra_tokens,
            key_padding_mask=None if key_padding_mask is None else key_padding_mask[:1],
            **same,
        )
    return (in_rows.mT @ (weights > 0).float() > 0).float().mean()


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with thresholds of ``model``, by name; of a wrapper that shows its module's, the module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {checks.describe(model)}")
    modules = model.named_modules()
    return {name: x for name, x in modules if inspect.getattr_static(x, "asa_thresholds", None) is not None}


def _some_layers(model: nn.Module) -> dict[str, Any]:
    layers = _layers(model)
    if not layers:
        name = type(model).__name__
        raise ValueError(f"model must have a layer with thresholds, as nn.AdaptiveSparseAttention; {name} has none")
    return layers


def parameter_groups(model: nn.Module, lr: float, threshold_rate: float = 0.1) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer of torch, in which thresholds have a learning rate of their own.

    The group "thresholds" has the parameters that thresholds come from, wherever in ``model`` (of
    :class:`AdaptiveSparseAttention` the convolutions ``alpha`` and ``beta``), the group "base" all others. Each is
    there once, also one that several modules share; one that requires no gradient is left out, and so is an empty
    group. Schedulers of torch scale the rates of both.

    Args:
        model: any module.
        lr: learning rate of "base".
        threshold_rate: that of "thresholds" over ``lr``; 0: they stay as they are.

    Returns:
        Dictionaries with ``params``, ``lr`` and ``name``.

    Raises:
        TypeError: ``model`` is no module, a rate is no number.
        ValueError: a rate that is negative or not finite, no parameter that requires a gradient.

    Example:
        >>> import torch
        >>> from asa_ops import nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), nn.AdaptiveSparseAttention(16))
        >>> groups = nn.parameter_groups(model, lr=0.01, threshold_rate=0.1)
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        >>> [(group["name"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [('base', 0.01, 10), ('thresholds', 0.001, 4)]
    """
    layers = _layers(model).values()
    lr, threshold_rate = checks.as_number("lr", lr), checks.as_number("threshold_rate", threshold_rate)
    for rate_name, rate in (("lr", lr), ("threshold_rate", threshold_rate)):
        if not 0 <= rate < math.inf:
            raise ValueError(f"{rate_name} must be >= 0 and finite, got {rate}")
    thresholds = {x for layer in layers for name in layer.asa_thresholds for x in _parameters(getattr(layer, name))}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr, "name": "base"},
        {"params": [], "lr": lr * threshold_rate, "name": "thresholds"},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter in thresholds]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"model must have a parameter that requires a gradient; {type(model).__name__} has none")
    return groups


def _parameters(x: object) -> Iterator[nn.Parameter]:
    """Yield the parameters of what ``asa_thresholds`` names: a module, a parameter or None."""
    if isinstance(x, nn.Module):
        yield from x.parameters()
    elif isinstance(x, nn.Parameter):
        yield x


class ThresholdSchedule:
    """Start with dense attention and tighten: alpha is multiplied by a factor that grows from 0 to 1.

    The factor is 0 up to step ``start``, which is dense attention exactly (alpha = 0 keeps every position), then grows
    linearly, and is 1 from step ``stop`` on: the plain module, bit for bit. Call ``step()`` after each step of the
    optimizer, as of torch's learning-rate schedulers, and save ``state_dict()`` with theirs. Beta is as it is; it
    decides nothing where all are kept. ``topk`` too, so that a layer with one begins with its ``topk`` neighbours.

    The factor is a buffer of each layer, ``asa_factor``, which is not in the model's state dict: a compiled model is
    not compiled again for each of its values, DDP sends it with the other buffers, and copies of a model have their own
    (``torch.optim.swa_utils.AveragedModel`` keeps its copy up to date). Where alpha is 0 its gradient is 0.

    Args:
        model: has layers with thresholds, such as :class:`AdaptiveSparseAttention`, on their device.
        start: the step after which the factor grows.
        stop: the step from which on the thresholds are as learned, at least ``start``.

    Raises:
        TypeError: ``model`` is no module, ``start`` or ``stop`` no integer.
        ValueError: a ``model`` without such a layer, or on the meta device, and steps that do not fit.

    Example:
        >>> import torch
        >>> from asa_ops import nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), nn.AdaptiveSparseAttention(16))
        >>> schedule = nn.ThresholdSchedule(model, start=1, stop=5)
        >>> for _ in range(3):  # forward, backward and optimizer.step() before
        ...     schedule.step()
        >>> schedule.last_step, schedule.factor
        (3, 0.5)
        >>> schedule.load_state_dict(schedule.state_dict())
    """

    def __init__(self, model: nn.Module, start: int, stop: int):
        layers = _some_layers(model).values()
        self.start, self.stop = checks.as_int("start", start, at_least=0), checks.as_int("stop", stop, at_least=1)
        if self.start > self.stop:
            raise ValueError(f"start must be at most stop, got start={self.start} and stop={self.stop}")
        devices = [next((x.device for x in layer.parameters()), torch.device("cpu")) for layer in layers]
        if any(device.type == "meta" for device in devices):
            raise ValueError("model must not be on the meta device: initialise it first (to_empty, reset_parameters)")
        self.last_step = 0
        self._layers = list(layers)
        for layer, device in zip(layers, devices, strict=True):
            layer.register_buffer("asa_factor", torch.full((), self.factor, device=device), persistent=False)

    @property
    def factor(self) -> float:
        """What alpha is multiplied by at present."""
        if self.last_step >= self.stop:
            return 1.0
        return max(self.last_step - self.start, 0) / max(self.stop - self.start, 1)

    def step(self) -> None:
        """Count a step, and set the factor."""
        self.last_step += 1
        self._write()

    def state_dict(self) -> dict[str, int]:
        """Return what :meth:`load_state_dict` takes."""
        return {name: getattr(self, name) for name in ("start", "stop", "last_step")}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where a schedule was saved.

        Raises:
            KeyError: an entry is missing.
        """
        self.start, self.stop, self.last_step = (state_dict[name] for name in ("start", "stop", "last_step"))
        self._write()

    def remove(self) -> None:
        """Leave plain modules: no layer has a factor any more."""
        for layer in self._layers:
            layer._buffers.pop("asa_factor", None)  # another schedule may have taken it away
        self._layers = []

    def _write(self) -> None:
        for layer in self._layers:
            layer.asa_factor.fill_(self.factor)


class monitor:
    """Watch what thresholds do: a context, or a handle with ``remove()``, whose :meth:`statistics` are plain floats.

    While it lasts each layer with thresholds keeps, of its last call, references to what the kernels return anyway
    (three numbers for each row and head) and to its alpha and beta. Outputs and gradients stay the same, bit for bit.

    Under ``torch.compile`` it works without a graph break; a model that is compiled already is compiled once more. With
    ``DistributedDataParallel`` the statistics are those of this process's part of the batch. Nothing is noted under
    transforms of ``torch.func``, nor in the replicas of ``torch.nn.DataParallel``. A model has one monitor: another
    takes over.

    Args:
        model: has layers with thresholds, such as :class:`AdaptiveSparseAttention`.
        tiles: note active tiles too, by one more call for the first image and head in every forward: of B images and
            ``heads`` heads, about 1 / (B * heads) of the attention's time.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a ``model`` without such a layer.

    Example:
        >>> import torch
        >>> from asa_ops import nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), nn.AdaptiveSparseAttention(16))
        >>> with nn.monitor(model) as watched:
        ...     y = model(torch.randn(2, 3, 12, 16))  # and backward, optimizer.step()
        ...     statistics = watched.statistics()  # for any logger
        >>> [name for name in statistics if "alpha" not in name and "beta" not in name]
        ['1/survivors', '1/density', '1/mass']
    """

    def __init__(self, model: nn.Module, tiles: bool = False):
        self._layers = _some_layers(model)
        for layer in self._layers.values():
            layer.asa_monitored, layer.asa_call = bool(tiles), None

    def statistics(self) -> dict[str, float]:
        """Return the statistics of each layer's last call since this was asked before, by "layer/statistic".

        ``survivors``: of a row, their mean number; ``density``: their share of all keys; ``mass``: the share of the
        softmax that they hold; ``active_tiles``: if asked for, the share of the tiles of 64 x 64 pairs in which one
        survives, 64 neighbours on the grid forming the side of one (8 x 8 pixels). ``alpha_mean``, ``alpha_min``,
        ``alpha_max``, ``alpha_q05``, ``alpha_q50``, ``alpha_q95``, the quantiles of at most 65,536 of them, and
        the same of beta: the multipliers as they were used. Padding counts among thresholds only. A layer that was not
        called, or with an empty batch, has no entry.

        This copies from the device once, which is where it waits: ask every so many steps, not more often than you log.
        """
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            call, layer.asa_call = getattr(layer, "asa_call", None), None
            if call is not None and call.stats.lse.numel():
                found |= {f"{name}/{key}".lstrip("/"): x for key, x in _summary(call)}
        if not found:
            return {}
        device = next(iter(found.values())).device
        numbers = torch.stack([x.to(device, torch.float32) for x in found.values()]).tolist()
        return dict(zip(found, numbers, strict=True))

    def remove(self) -> None:
        """Stop watching, and let go of what is kept."""
        for layer in self._layers.values():
            for name in ("asa_monitored", "asa_call"):
                vars(layer).pop(name, None)
        self._layers = {}

    def __enter__(self) -> "monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _summary(call: _Call) -> Iterator[tuple[str, Tensor]]:
    """Yield the statistics of a call, numbers on its device."""
    lse, lse_kept, survivors = call.stats
    real = lse != -torch.inf
    count = real.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(real, x.float(), 0).sum() / count

    yield "survivors", mean(survivors)
    yield "density", mean(survivors / call.keys)
    yield "mass", mean((lse_kept - lse).exp())
    if call.active_tiles is not None:
        yield "active_tiles", call.active_tiles
    for name, x in call.thresholds.items():
        x = x.float().flatten()
        yield from ((f"{name}_mean", x.mean()), (f"{name}_min", x.min()), (f"{name}_max", x.max()))
        x = x[:: -(-len(x) // _SAMPLE)].sort().values
        yield from ((f"{name}_q{round(100 * q):02}", x[round(q * (len(x) - 1))]) for q in _QUANTILES)
