"""The squeeze-and-attention block."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.types import Device

from ..blocks.squeeze_and_attention import check_upsample, squeeze_and_attention
from ..core import checks
from .common import Block, Factory, conv_norm_relu, rename

_UPSTREAM = {
    f"{name}.conv.{i}": f"{ours}.{j}"
    for name, ours in (("conv", "residual"), ("conv_atten", "attention"))
    for i, j in ((0, "0.0"), (1, "0.1"), (3, "1.0"), (4, "1.1"))
}


class SqueezeAndAttention(Block):
    """Convolutions on a pooled map gate convolutions on the map, and are added to them.

    ``squeeze_and_attention(residual(x), attention(pool(x)))``, two 3x3 convolutions (in one dimension and in three,
    kernels of 3 along each) with batch norm and ReLU in each branch around :func:`asa_ops.squeeze_and_attention`. No
    residual connection; torch's default initialisation. Source: Zhong et al., CVPR 2020; the authors' code is not
    known.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, default ``in_channels``.
        pool: side of the windows of pixels whose mean the attention branch sees; the last ones of a row or column may
            be smaller. Or one for each side of the map: with ``dims=3``, (1, 2, 2) pools every frame.
        activation: "sigmoid", or None.
        upsample: "nearest" or "bilinear"; "linear" with ``dims=1``, "trilinear" with ``dims=3``.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says.

    Example:
        >>> import torch
        >>> from asa_ops.nn import SqueezeAndAttention
        >>> SqueezeAndAttention(16)(torch.randn(2, 16, 25, 32)).shape
        torch.Size([2, 16, 25, 32])
        >>> SqueezeAndAttention(16, pool=(1, 2, 2), dims=3)(torch.randn(1, 16, 4, 12, 16)).shape
        torch.Size([1, 16, 4, 12, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        pool: int | Sequence[int] = 2,
        activation: str | None = "sigmoid",
        upsample: str = "nearest",
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        out_channels = in_channels if out_channels is None else out_channels
        in_channels, out_channels = checks.as_positive_ints(in_channels=in_channels, out_channels=out_channels)
        dims = checks.as_dims(dims)
        pools = checks.as_each_side("pool", pool, dims)
        checks.check_choice("activation", activation, ("sigmoid", None))
        check_upsample(upsample, dims)
        self.dims, self.in_channels, self.activation, self.upsample = dims, in_channels, activation, upsample
        self.pool: int | tuple[int, ...] = pools if isinstance(pool, tuple | list) else pools[0]
        self.residual, self.attention = (
            nn.Sequential(
                conv_norm_relu(in_channels, out_channels, kernel=3, bias=True, dims=dims, **factory),
                conv_norm_relu(out_channels, out_channels, kernel=3, bias=True, dims=dims, **factory),
            )
            for _ in range(2)
        )

    def attend(self, x: Tensor) -> Tensor:
        residual, attention = self.residual(x), self.attention(self._squeeze(x))
        return squeeze_and_attention(
            residual, attention, pool=self.pool, activation=self.activation, upsample=self.upsample
        )

    def _squeeze(self, x: Tensor) -> Tensor:
        """Return the means of the windows."""
        if self.dims < 3:
            mean_pool = F.avg_pool1d if self.dims == 1 else F.avg_pool2d
            return mean_pool(x, self.pool, ceil_mode=True, count_include_pad=False)
        # avg_pool3d takes no map smaller than a window, nor bfloat16 on a CPU: frames first, then the pixels of each.
        frames, *window = checks.as_each_side("pool", self.pool, 3)
        x = F.avg_pool2d(x.flatten(3), (frames, 1), ceil_mode=True, count_include_pad=False).unflatten(3, x.shape[3:])
        means = F.avg_pool2d(x.flatten(1, 2), window, ceil_mode=True, count_include_pad=False)
        return means.unflatten(1, x.shape[1:3])

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, pool={self.pool}, activation={self.activation!r}, upsample={self.upsample!r}, "
            f"dims={self.dims}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a third-party checkpoint's block (conv, conv_atten) to this module's.

        Raises:
            ValueError: a key that no such block has.

        Example:
            >>> block.load_state_dict(SqueezeAndAttention.from_upstream(published))  # doctest: +SKIP
        """
        return rename(state_dict, _UPSTREAM)
