"""The efficient attention block."""

import torch
from torch import Tensor
from torch.types import Device

from ..blocks.efficient_attention import efficient_attention
from ..core import checks
from ..core.layout import to_map, to_tokens
from .common import CONV, Block, Factory, rename

_UPSTREAM = {"queries": "query", "keys": "key", "values": "value", "reprojection": "proj"}


class EfficientAttention(Block):
    """Efficient attention, a softmax over positions on the key and one over channels on the query.

    ``x + proj(efficient_attention(query(x), key(x), value(x)))`` with 1x1 convolutions around
    :func:`asa_ops.efficient_attention`. Like the published block, it starts with torch's default everywhere, so it is
    not the identity at initialisation. Source: Shen, Zhang, Zhao, Yi and Li, WACV 2021.

    Args:
        in_channels: C.
        key_channels: channels of query and key in all heads, default ``in_channels``.
        heads: attention heads; must divide ``key_channels`` and ``value_channels``.
        value_channels: channels of the value in all heads, default ``in_channels``.
        published: leave the last key_channels % heads channels of query and key unused, as the authors' code does.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says.

    Example:
        >>> import torch
        >>> from asa_ops.nn import EfficientAttention
        >>> EfficientAttention(64, heads=4)(torch.randn(2, 64, 24, 32)).shape
        torch.Size([2, 64, 24, 32])
        >>> EfficientAttention(64, dims=1)(torch.randn(2, 64, 100)).shape
        torch.Size([2, 64, 100])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int | None = None,
        heads: int = 1,
        value_channels: int | None = None,
        published: bool = False,
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        key_channels = in_channels if key_channels is None else key_channels
        value_channels = in_channels if value_channels is None else value_channels
        in_channels, key_channels, value_channels, heads = checks.as_positive_ints(
            in_channels=in_channels, key_channels=key_channels, value_channels=value_channels, heads=heads
        )
        checks.check_divisible("value_channels", value_channels, heads)
        if published:
            checks.check_at_most("heads", heads, key_channels, "key_channels")
        else:
            checks.check_divisible("key_channels", key_channels, heads)
        self.in_channels, self.key_channels, self.value_channels = in_channels, key_channels, value_channels
        self.heads, self.published, self.dims = heads, published, checks.as_dims(dims)
        conv = CONV[self.dims]
        self.query = conv(in_channels, key_channels, 1, **factory)
        self.key = conv(in_channels, key_channels, 1, **factory)
        self.value = conv(in_channels, value_channels, 1, **factory)
        self.proj = conv(value_channels, in_channels, 1, **factory)

    def attend(self, x: Tensor) -> Tensor:
        used = self.key_channels - self.key_channels % self.heads
        maps = self.query(x)[:, :used], self.key(x)[:, :used], self.value(x)
        out = efficient_attention(*(to_tokens(each, self.heads) for each in maps))
        return x + self.proj(to_map(out, x.shape[2:]))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, key_channels={self.key_channels}, heads={self.heads}, "
            f"value_channels={self.value_channels}, published={self.published}, dims={self.dims}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (queries, keys, values, reprojection) to this module's.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(EfficientAttention.from_upstream(published))  # doctest: +SKIP
        """
        return rename(state_dict, _UPSTREAM)
