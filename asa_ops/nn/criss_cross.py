"""The criss-cross attention block."""

import torch
from torch import Tensor, nn
from torch.types import Device

from ..core import checks, dispatch
from ..core.dispatch import Impl
from ..criss_cross import criss_cross_attention
from .common import CONV, Block, Factory, rename

_UPSTREAM = {"query_conv": "query", "key_conv": "key", "value_conv": "value", "gamma": "gamma"}


class CrissCrossAttention(Block):
    """Recurrent criss-cross attention: every pixel attends to its row and column, twice, and so to the whole map.

    ``recurrence`` times, with the same weights: ``x = x + gamma * criss_cross_attention(query(x), key(x), value(x))``
    with 1x1 convolutions around :func:`asa_ops.criss_cross_attention`. It is the identity at initialisation. Source:
    Huang et al., CCNet, ICCV 2019 and TPAMI 2020 (RCCA; its published head runs the block between two 3x3
    convolutions).

    In three dimensions every position attends to the three lines through it, three times, which again reaches the whole
    map. In one dimension there is one line, and the formula is that of a map with one row: dense attention, once.

    Args:
        in_channels: C, also of the value.
        reduction: query and key have max(C // reduction, 1) channels.
        recurrence: R, how often the block is applied; default ``dims`` times, 2 as published: as often as a position
            needs to reach the whole map.
        impl: see :func:`asa_ops.criss_cross_attention`.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says.

    Example:
        >>> import torch
        >>> from asa_ops.nn import CrissCrossAttention
        >>> block = CrissCrossAttention(64)
        >>> x = torch.randn(2, 64, 24, 32)
        >>> torch.equal(block(x), x)
        True
        >>> video = CrissCrossAttention(64, dims=3)
        >>> video.recurrence, video(torch.randn(1, 64, 4, 12, 16)).shape
        (3, torch.Size([1, 64, 4, 12, 16]))
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 8,
        recurrence: int | None = None,
        impl: Impl = "auto",
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        dims = checks.as_dims(dims)
        recurrence = dims if recurrence is None else recurrence
        in_channels, reduction, recurrence = checks.as_positive_ints(
            in_channels=in_channels, reduction=reduction, recurrence=recurrence
        )
        checks.check_choice("impl", impl, dispatch.NAMES)
        self.dims, self.in_channels, self.inner_channels = dims, in_channels, max(in_channels // reduction, 1)
        self.recurrence, self.impl = recurrence, impl
        self.query = CONV[dims](in_channels, self.inner_channels, 1, **factory)
        self.key = CONV[dims](in_channels, self.inner_channels, 1, **factory)
        self.value = CONV[dims](in_channels, in_channels, 1, **factory)
        self.gamma = nn.Parameter(torch.zeros(1, **factory))

    def reset_parameters(self) -> None:
        """Initialise again, as published: convolutions by torch's default, gamma 0."""
        super().reset_parameters()
        nn.init.zeros_(self.gamma)

    def attend(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            maps = self.query(x), self.key(x), self.value(x)
            if self.dims == 1:  # a map of one row
                out = criss_cross_attention(*(each.unsqueeze(2) for each in maps), impl=self.impl).squeeze(2)
            else:
                out = criss_cross_attention(*maps, impl=self.impl)
            x = x + (self.gamma * out).to(x.dtype)  # under autocast gamma is float32; the map keeps its dtype
        return x

    def extra_repr(self) -> str:
        inner = f"inner_channels={self.inner_channels}"
        return f"{self.in_channels}, {inner}, recurrence={self.recurrence}, impl={self.impl!r}, dims={self.dims}"

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (query_conv, key_conv, value_conv, gamma) to this module's.

        It also takes mmcv's gamma, the number ``gamma.scale``.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(CrissCrossAttention.from_upstream(published))  # doctest: +SKIP
        """
        renamed = rename({key.removesuffix(".scale"): x for key, x in state_dict.items()}, _UPSTREAM)
        return {key: x.reshape(1) if key == "gamma" else x for key, x in renamed.items()}
