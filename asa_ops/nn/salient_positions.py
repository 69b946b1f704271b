"""The salient positions attention block."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.types import Device

from ..blocks.salient_positions import salient_positions_attention
from ..core import checks
from ..core.layout import LINEAR, to_map, to_tokens
from .common import BATCH_NORM, CONV, Block, Factory, max_pool, rename

_UPSTREAM = {
    "theta": "query",
    "g": "value",
    "g.0": "value",
    "W.0": "proj",
    "W.1": "norm",
    "phi": None,  # never used
    "phi.0": None,
}


class SalientPositionsAttention(Block):
    """The channels attend to each other by how well they agree on the most salient positions.

    ``x + norm(proj(salient_positions_attention(query(x), value(x))))`` with 1x1 convolutions around
    :func:`asa_ops.salient_positions_attention`. Like the published block, it starts with torch's default everywhere, so
    it is not the identity at initialisation. In the code (likyoo, SPANet) query and value are theta and g.

    Args:
        in_channels: C.
        inner_channels: channels of query and value, default max(C // 2, 1).
        topk: how many positions; None: a sixteenth of them (the code's ``adaptive``).
        sub_sample: values are the maxima of 2 x 2 pixels, and the result is enlarged bilinearly; in three dimensions of
            every frame, in one of pairs, linearly.
        heads: attention heads.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says, or has fewer than ``topk`` pixels.

    Example:
        >>> import torch
        >>> from asa_ops.nn import SalientPositionsAttention
        >>> SalientPositionsAttention(64)(torch.randn(2, 64, 24, 32)).shape
        torch.Size([2, 64, 24, 32])
        >>> SalientPositionsAttention(64, dims=1)(torch.randn(2, 64, 100)).shape
        torch.Size([2, 64, 100])
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int | None = None,
        topk: int | None = 8,
        sub_sample: bool = False,
        heads: int = 1,
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        in_channels = checks.as_positive_int("in_channels", in_channels)
        inner_channels = max(in_channels // 2, 1) if inner_channels is None else inner_channels
        inner_channels, heads = checks.as_positive_ints(inner_channels=inner_channels, heads=heads)
        checks.check_divisible("inner_channels", inner_channels, heads)
        topk = None if topk is None else checks.as_positive_int("topk", topk)
        self.dims, self.in_channels, self.topk = checks.as_dims(dims), in_channels, topk
        self.sub_sample, self.heads = sub_sample, heads
        conv = CONV[self.dims]
        self.query = conv(in_channels, inner_channels, 1, **factory)
        self.value = conv(in_channels, inner_channels, 1, **factory)
        self.proj = conv(inner_channels, in_channels, 1, **factory)
        self.norm = BATCH_NORM[self.dims](in_channels, **factory)

    def attend(self, x: Tensor) -> Tensor:
        value = self.value(x)
        if self.sub_sample:
            value = max_pool(value)
        query = to_tokens(self.query(x), self.heads)
        out = salient_positions_attention(query, to_tokens(value, self.heads), topk=self.topk)
        out = self.norm(self.proj(to_map(out, value.shape[2:])))
        if self.sub_sample:
            out = F.interpolate(out, x.shape[2:], mode=LINEAR[self.dims], align_corners=True)
        return x + out

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, topk={self.topk}, sub_sample={self.sub_sample}, heads={self.heads}, dims={self.dims}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (theta, g, W) to this module's; phi is left out.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(SalientPositionsAttention.from_upstream(published))  # doctest: +SKIP
        """
        return rename(state_dict, _UPSTREAM)
