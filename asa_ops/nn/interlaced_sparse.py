"""The interlaced sparse attention block."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.types import Device

from ..blocks.interlaced_sparse import interlaced_sparse_attention
from ..core import checks
from ..core.layout import crop, pad, padding_to_multiples, to_map, to_tokens
from .common import CONV, Block, Factory, conv_norm_relu, rename

_DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}  # of whole channels


class InterlacedSparseAttention(Block):
    """Attention among distant positions, then among neighbouring ones, concatenated with the input and projected.

    ``proj([x, short(long(x))])``: long and short are 1x1 convolutions around
    :func:`asa_ops.interlaced_sparse_attention`, two with batch norm and ReLU each for query and key, one for the value,
    one with batch norm and ReLU on the result; proj is a 1x1 convolution with batch norm and ReLU. No residual
    connection; torch's default initialisation. Source: Huang et al., arXiv 1907.12273 (2019).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, default ``in_channels``.
        key_channels: channels of query and key, default max(in_channels // 2, 1).
        value_channels: channels of the value, default ``in_channels``.
        factors: (dh, dw), at most the map unless ``published``, one integer for each side of the map, default 8 each;
            or several such tuples: long and short of each are concatenated, and x goes through a convolution of its own
            first.
        heads: attention heads.
        dropout: probability of dropping a channel of the output.
        published: pad the map with zeros that take part in attention and batch statistics, as the authors' code does.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says, or smaller than the factors.

    Example:
        >>> import torch
        >>> from asa_ops.nn import InterlacedSparseAttention
        >>> InterlacedSparseAttention(16)(torch.randn(2, 16, 25, 32)).shape
        torch.Size([2, 16, 25, 32])
        >>> InterlacedSparseAttention(16, factors=(2, 4, 4), dims=3)(torch.randn(1, 16, 4, 12, 16)).shape
        torch.Size([1, 16, 4, 12, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        key_channels: int | None = None,
        value_channels: int | None = None,
        factors: Sequence[int] | Sequence[Sequence[int]] | None = None,
        heads: int = 1,
        dropout: float = 0.0,
        published: bool = False,
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        in_channels = checks.as_positive_int("in_channels", in_channels)
        out_channels = in_channels if out_channels is None else out_channels
        key_channels = max(in_channels // 2, 1) if key_channels is None else key_channels
        value_channels = in_channels if value_channels is None else value_channels
        out_channels, key_channels, value_channels, heads = checks.as_positive_ints(
            out_channels=out_channels, key_channels=key_channels, value_channels=value_channels, heads=heads
        )
        checks.check_divisible("key_channels", key_channels, heads)
        checks.check_divisible("value_channels", value_channels, heads)
        dims = checks.as_dims(dims)
        factors = (8,) * dims if factors is None else factors
        several = isinstance(factors, tuple | list) and factors and isinstance(factors[0], tuple | list)
        every = [checks.as_tuple("factors", each, dims) for each in (factors if several else [factors])]
        self.dims, self.in_channels, self.factors, self.heads = dims, in_channels, every, heads
        self.published = published
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    span: _Attention(channels, key_channels, value_channels, out_channels, heads, dims, factory)
                    for span, channels in (("long", in_channels), ("short", out_channels))
                }
            )
            for _ in every
        )
        own = in_channels if len(every) == 1 else len(every) * out_channels
        self.up = nn.Identity() if len(every) == 1 else conv_norm_relu(in_channels, own, dims=dims, **factory)
        self.proj = conv_norm_relu(own + len(every) * out_channels, out_channels, dims=dims, **factory)
        self.dropout = _DROPOUT[dims](checks.as_number("dropout", dropout))

    def attend(self, x: Tensor) -> Tensor:
        if not self.published:  # there padding makes any map large enough
            for factors in self.factors:
                checks.as_factors(factors, x.shape[2:])
        contexts = [self._context(x, stage, f) for stage, f in zip(self.stages, self.factors, strict=True)]
        return self.dropout(self.proj(torch.cat([self.up(x), *contexts], 1)))

    def _context(self, x: Tensor, stage: nn.Module, factors: tuple[int, ...]) -> Tensor:
        grid = x.shape[2:]
        around = padding_to_multiples(grid, factors) if self.published else [(0, 0)] * self.dims
        if self.published:
            x = pad(x, around)
        for span, attention in cast(nn.ModuleDict, stage).items():
            x = attention(x, factors, span)
        return crop(x, around, grid)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, factors={self.factors}, heads={self.heads}, published={self.published}, "
            f"dims={self.dims}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (stages, up_conv, conv_bn) to this module's.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(InterlacedSparseAttention.from_upstream(published))  # doctest: +SKIP
        """
        modules = {"up_conv.0": "up.0", "up_conv.1.0": "up.1", "conv_bn.0": "proj.0", "conv_bn.1.0": "proj.1"}
        stages = {key.split(".")[1] for key in state_dict if key.startswith("stages.")}
        for stage in stages:
            for span in ("long", "short"):
                theirs, ours = f"stages.{stage}.{span}_range_sa", f"stages.{stage}.{span}"
                modules[f"{theirs}.f_value"] = f"{ours}.value"
                for name, layers in (("f_query", "query"), ("f_key", "key"), ("W", "proj")):
                    for i, j in (("0", "0.0"), ("1.0", "0.1"), ("2", "1.0"), ("3.0", "1.1")):
                        modules[f"{theirs}.{name}.{i}"] = f"{ours}.{layers}.{j}"
        return rename(state_dict, modules)


class _Attention(nn.Module):
    """1x1 convolutions around the attention of one span."""

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        heads: int,
        dims: int,
        factory: Factory,
    ):
        super().__init__()
        self.heads = heads
        self.query, self.key = (
            nn.Sequential(
                conv_norm_relu(in_channels, key_channels, dims=dims, **factory),
                conv_norm_relu(key_channels, key_channels, dims=dims, **factory),
            )
            for _ in range(2)
        )
        self.value = CONV[dims](in_channels, value_channels, 1, bias=False, **factory)
        self.proj = nn.Sequential(conv_norm_relu(value_channels, out_channels, dims=dims, **factory))

    def forward(self, x: Tensor, factors: tuple[int, ...], span: str) -> Tensor:
        """Map [B, in_channels, H, W], or the like, to [B, out_channels, H, W]."""
        query, key, value = (to_tokens(conv(x), self.heads) for conv in (self.query, self.key, self.value))
        grid = checks.as_sides(x.shape[2:], 1, 2, 3)
        out = interlaced_sparse_attention(query, key, value, grid=grid, factors=factors, span=span)
        return self.proj(to_map(out, grid))
