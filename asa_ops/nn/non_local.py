"""The non-local block."""

from typing import Literal

import torch
from torch import Tensor
from torch.types import Device

from ..blocks.non_local import non_local_attention
from ..core import checks
from ..core.layout import to_map, to_tokens
from .common import CONV, NORMAL_CONV, Block, Factory, last_layers, max_pool, rename

_UPSTREAM = {
    # mmcv, and with it mmaction2
    "theta.conv": "query",
    "phi.conv": "key",
    "phi.0.conv": "key",
    "g.conv": "value",
    "g.0.conv": "value",
    "concat_project.conv": "pair",
    "conv_out.conv": "proj",
    "conv_out.bn": "norm",
    # AlexHex7, Non-local_pytorch
    "theta": "query",
    "phi": "key",
    "phi.0": "key",
    "g": "value",
    "g.0": "value",
    "concat_project.0": "pair",
    "W": "proj",
    "W.0": "proj",
    "W.1": "norm",
    # SlowFast, whose norm was called bn, and PyTorchVideo
    "conv_theta": "query",
    "conv_phi": "key",
    "conv_g": "value",
    "conv_out": "proj",
    "norm": "norm",
    "bn": "norm",
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
        sub_sample: keys and values are the maxima of 2 x 2 pixels, of every frame of a video, of pairs in a sequence.
            "input": maxima of the map, before it is projected, as in the paper's own code, SlowFast and PyTorchVideo;
            True: of what is projected, as in mmcv and Non-local_pytorch.
        heads: attention heads.
        norm: None, or "batch": batch norm after the output projection.
        published: sub-sample as the authors' code does: it leaves out the last row or column of an odd size.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says, or with ``sub_sample`` and ``published`` has H or W (or L) = 1.

    Example:
        >>> import torch
        >>> from asa_ops.nn import NonLocal
        >>> x = torch.randn(2, 64, 24, 32)
        >>> torch.equal(NonLocal(64)(x), x)
        True
        >>> NonLocal(64, sub_sample=True, dims=3)(torch.randn(1, 64, 4, 12, 16)).shape
        torch.Size([1, 64, 4, 12, 16])
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        mode: str = "embedded_gaussian",
        use_scale: bool = True,
        sub_sample: bool | Literal["input"] = False,
        heads: int = 1,
        norm: str | None = None,
        published: bool = False,
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        in_channels, reduction, heads = checks.as_positive_ints(
            in_channels=in_channels, reduction=reduction, heads=heads
        )
        checks.check_choice("mode", mode, _MODES)
        checks.check_choice("norm", norm, (None, "batch"))
        if not (isinstance(sub_sample, bool) or (isinstance(sub_sample, str) and sub_sample == "input")):
            raise ValueError(f"sub_sample must be False, True or 'input', got {checks.describe(sub_sample)}")
        dims = checks.as_dims(dims)
        inner = max(in_channels // reduction, 1)
        checks.check_divisible("in_channels // reduction", inner, heads)
        if mode == "gaussian":
            checks.check_divisible("in gaussian mode in_channels", in_channels, heads)
        self.dims, self.in_channels, self.inner_channels, self.heads = dims, in_channels, inner, heads
        self.mode, self.use_scale, self.sub_sample, self.published = mode, use_scale, sub_sample, published

        if mode != "gaussian":
            self.query = NORMAL_CONV[dims](in_channels, inner, 1, **factory)
            self.key = NORMAL_CONV[dims](in_channels, inner, 1, **factory)
        self.value = NORMAL_CONV[dims](in_channels, inner, 1, **factory)
        if mode == "concatenation":
            self.pair = CONV[dims](2 * inner // heads, 1, 1, bias=False, **factory)
        self.proj, self.norm = last_layers(inner, in_channels, norm, dims, **factory)

    def attend(self, x: Tensor) -> Tensor:
        if self.sub_sample and self.published and 1 in x.shape[2:][-2:]:
            pooled = "L" if self.dims == 1 else "H, W"
            raise ValueError(
                f"sub_sample needs {pooled} >= 2 with published=True, got {checks.describe(x)}; "
                "published=False takes any"
            )
        seen = self._pool(x) if self.sub_sample == "input" else x
        query, key = (x, seen) if self.mode == "gaussian" else (self.query(x), self.key(seen))
        if self.sub_sample == "input":
            maps = query, key, self.value(seen)
        else:
            maps = query, self._pool(key), self._pool(self.value(seen))
        query, key, value = (to_tokens(each, self.heads) for each in maps)
        if self.mode == "concatenation":
            out = non_local_attention(query, key, value, mode=self.mode, weight=self.pair.weight.view(2, -1))
        elif self.mode == "dot_product":
            out = non_local_attention(query, key, value, mode=self.mode)
        else:
            scaled = self.use_scale and self.mode == "embedded_gaussian"
            out = non_local_attention(query, key, value, scale=None if scaled else 1.0)
        return x + self.norm(self.proj(to_map(out, x.shape[2:])))

    def _pool(self, x: Tensor) -> Tensor:
        return max_pool(x, ceil_mode=not self.published) if self.sub_sample else x

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, mode={self.mode!r}, use_scale={self.use_scale}, sub_sample={self.sub_sample!r}, "
            f"heads={self.heads}, published={self.published}, dims={self.dims}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (theta, phi, g, concat_project, conv_out) to this module's.

        Those of mmcv and mmaction2, Non-local_pytorch (W for conv_out), SlowFast and PyTorchVideo (conv_theta). Weights
        [C', C, 1, 1, 1] of video networks want ``dims=3``; those of SlowFast and PyTorchVideo, if they pool,
        ``sub_sample="input"``; those without a scale ``use_scale=False``. A bias before a batch norm, which our
        projection does not have, is taken into the norm's mean.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(NonLocal.from_upstream(published))  # doctest: +SKIP
        """
        renamed = rename(state_dict, _UPSTREAM)
        if "pair.weight" in renamed and "value.weight" in renamed:  # theirs is of a matrix of pairs whatever the maps
            pair, dims = renamed["pair.weight"], renamed["value.weight"].dim() - 2
            renamed["pair.weight"] = pair.reshape(*pair.shape[:2], *[1] * dims)
        if "norm.running_mean" in renamed and (bias := renamed.pop("proj.bias", None)) is not None:
            renamed["norm.running_mean"] = renamed["norm.running_mean"] - bias
        return renamed
