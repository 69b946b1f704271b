"""The linear attention blocks, of positions and of channels."""

import torch
from torch import Tensor, nn
from torch.types import Device

from ..blocks.linear_attention import channel_linear_attention, linear_attention
from ..core import checks
from ..core.layout import to_map, to_tokens
from .common import CONV, Block, Factory, rename

_UPSTREAM = {"query_conv": "query", "key_conv": "key", "value_conv": "value", "gamma": "gamma"}


class LinearAttention(Block):
    """Linear attention of positions, or of channels.

    "position": ``x + gamma * linear_attention(query(x), key(x), value(x))`` with 1x1 convolutions around
    :func:`asa_ops.linear_attention`. "channel": ``x + gamma * channel_linear_attention(x)``. It is the identity
    at initialisation (gamma = 0). Source: Li, Su, Duan and Zheng, arXiv 2007.14902 (2020).

    Args:
        in_channels: C.
        kind: "position" or "channel".
        reduction: query and key have max(C // reduction, 1) channels ("position" only).
        eps: see :func:`asa_ops.linear_attention`.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says.

    Example:
        >>> import torch
        >>> from asa_ops.nn import LinearAttention
        >>> x = torch.randn(2, 64, 24, 32)
        >>> torch.equal(LinearAttention(64)(x), x)
        True
        >>> LinearAttention(64, dims=1)(torch.randn(2, 64, 100)).shape
        torch.Size([2, 64, 100])
    """

    def __init__(
        self,
        in_channels: int,
        kind: str = "position",
        reduction: int = 8,
        eps: float = 1e-6,
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        in_channels, reduction = checks.as_positive_ints(in_channels=in_channels, reduction=reduction)
        checks.check_choice("kind", kind, ("position", "channel"))
        eps = checks.as_number("eps", eps)
        self.dims, self.in_channels, self.kind, self.eps = checks.as_dims(dims), in_channels, kind, eps
        if kind == "position":
            inner = max(in_channels // reduction, 1)
            conv = CONV[self.dims]
            self.query = conv(in_channels, inner, 1, **factory)
            self.key = conv(in_channels, inner, 1, **factory)
            self.value = conv(in_channels, in_channels, 1, **factory)
        self.gamma = nn.Parameter(torch.zeros(1, **factory))

    def reset_parameters(self) -> None:
        """Initialise again, as published: convolutions by torch's default, gamma 0."""
        super().reset_parameters()
        nn.init.zeros_(self.gamma)

    def attend(self, x: Tensor) -> Tensor:
        if self.kind == "position":
            query, key, value = (to_tokens(conv(x)) for conv in (self.query, self.key, self.value))
            out = linear_attention(query, key, value, eps=self.eps)
        else:
            out = channel_linear_attention(to_tokens(x), eps=self.eps)
        return x + self.gamma * to_map(out, x.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.in_channels}, kind={self.kind!r}, eps={self.eps}, dims={self.dims}"

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (query_conv, key_conv, value_conv, gamma) to this module's.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(LinearAttention.from_upstream(published))  # doctest: +SKIP
        """
        return rename(state_dict, _UPSTREAM)
