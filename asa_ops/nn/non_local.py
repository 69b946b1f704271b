"""The non-local block."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.non_local import non_local_attention
from ..core import checks
from ..core.layout import to_map, to_tokens
from .common import Block, NormalConv2d, last_layers, rename

_UPSTREAM = {
    "theta.conv": "query",
    "phi.conv": "key",
    "phi.0.conv": "key",
    "g.conv": "value",
    "g.0.conv": "value",
    "concat_project.conv": "pair",
    "conv_out.conv": "proj",
    "conv_out.bn": "norm",
}
_MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")


class NonLocal(Block):
    """Non-local block: every position attends to every position.

    ``x + norm(proj(non_local_attention(query(x), key(x), value(x))))`` with 1x1 convolutions around
    :func:`asa_ops.non_local_attention`. Initialised as published: projections N(0, 0.01^2), the last layer 0, so that
    it is the identity. In the paper (Wang, Girshick, Gupta and He, CVPR 2018) query, key, value are theta, phi, g.

    Args:
        in_channels: C.
        reduction: the attention runs on max(C // reduction, 1) channels ("gaussian": the value only).
        mode: "embedded_gaussian", "dot_product", "concatenation", or "gaussian": query = key = x, unscaled, no
            projection.
        use_scale: scale scores by D**-0.5 with D the channels of one head ("embedded_gaussian" only).
        sub_sample: keys and values are the maxima of 2 x 2 pixels.
        heads: attention heads.
        norm: None, or "batch": batch norm after the output projection.
        published: sub-sample as the authors' code does: it leaves out the last row or column of an odd size.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or with
            ``sub_sample`` and ``published`` has H or W = 1.

    Example:
        >>> import torch
        >>> from asa_ops.nn import NonLocal
        >>> x = torch.randn(2, 64, 24, 32)
        >>> torch.equal(NonLocal(64)(x), x)
        True
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        mode: str = "embedded_gaussian",
        use_scale: bool = True,
        sub_sample: bool = False,
        heads: int = 1,
        norm: str | None = None,
        published: bool = False,
    ):
        super().__init__()
        in_channels, reduction, heads = checks.as_positive_ints(
            in_channels=in_channels, reduction=reduction, heads=heads
        )
        checks.check_choice("mode", mode, _MODES)
        checks.check_choice("norm", norm, (None, "batch"))
        inner = max(in_channels // reduction, 1)
        checks.check_divisible("in_channels // reduction", inner, heads)
        if mode == "gaussian":
            checks.check_divisible("in gaussian mode in_channels", in_channels, heads)
        self.in_channels, self.inner_channels, self.heads = in_channels, inner, heads
        self.mode, self.use_scale, self.sub_sample, self.published = mode, use_scale, sub_sample, published

        if mode != "gaussian":
            self.query = NormalConv2d(in_channels, inner, 1)
            self.key = NormalConv2d(in_channels, inner, 1)
        self.value = NormalConv2d(in_channels, inner, 1)
        if mode == "concatenation":
            self.pair = nn.Conv2d(2 * inner // heads, 1, 1, bias=False)
        self.proj, self.norm = last_layers(inner, in_channels, norm)

    def attend(self, x: Tensor) -> Tensor:
        if self.sub_sample and self.published and 1 in x.shape[-2:]:
            raise ValueError(
                f"sub_sample needs H, W >= 2 with published=True, got {checks.describe(x)}; published=False takes any"
            )
        query, key = (x, x) if self.mode == "gaussian" else (self.query(x), self.key(x))
        maps = query, self._pool(key), self._pool(self.value(x))
        query, key, value = (to_tokens(each, self.heads) for each in maps)
        if self.mode == "concatenation":
            out = non_local_attention(query, key, value, mode=self.mode, weight=self.pair.weight.view(2, -1))
        elif self.mode == "dot_product":
            out = non_local_attention(query, key, value, mode=self.mode)
        else:
            scaled = self.use_scale and self.mode == "embedded_gaussian"
            out = non_local_attention(query, key, value, scale=None if scaled else 1.0)
        return x + self.norm(self.proj(to_map(out, x.shape[-2:])))

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, ceil_mode=not self.published) if self.sub_sample else x

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, mode={self.mode!r}, use_scale={self.use_scale}, sub_sample={self.sub_sample}, "
            f"heads={self.heads}, published={self.published}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (theta, phi, g, concat_project, conv_out) to this module's.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(NonLocal.from_upstream(published))  # doctest: +SKIP
        """
        return rename(state_dict, _UPSTREAM)
