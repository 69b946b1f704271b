"""The adaptive sparse attention block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..asa import asa_attention
from ..asa.reference import asa_attention as reference_attention
from ..asa.types import ThresholdGrad, Window
from ..core import checks, dispatch
from ..core.dispatch import Impl
from ..core.layout import to_map, to_tokens
from .common import CONV, NORMAL_CONV, Block, Factory, last_layers, rename
from .training import attend, scheduled

_UPSTREAM = {
    "theta.conv": "query",
    "phi.conv": "key",
    "g.conv": "value",
    "conv_out.conv": "proj",
    "conv_out.bn": "norm",
    "se.0": "alpha",
    "se2.0": "beta",
}


class AdaptiveSparseAttention(Block):
    """Non-local block whose positions keep only their adaptive reciprocal neighbours, and a local window.

    ``x + norm(proj(asa_attention(query(x), key(x), value(x), alpha(x), beta(x))))``: 1x1 convolutions around
    :func:`asa_ops.asa_attention`, and two 3x3 convolutions to one channel each that predict the thresholds of every
    pixel. In one dimension and in three these have kernels of 3 along each. Initialised as published: projections
    N(0, 0.01^2), thresholds by torch's default, and the last layer 0, so that it is the identity. In the paper (Sun,
    Zhang and Zhang, J. Electronic Imaging 33(3), 033038, 2024) query, key, value are theta, phi, g, the threshold
    convolutions Net 1 and Net 2, the two kinds of survivors NLSCB and LSCB.

    Args:
        in_channels: C.
        reduction: the attention runs on max(C // reduction, 1) channels ("embedded_gaussian"; the value always).
        mode: "embedded_gaussian", or "gaussian": query = key = x, unscaled, no projection.
        use_scale: scale scores by D**-0.5 with D the channels of one head ("embedded_gaussian" only).
        window: odd side of the local window, or one for each side of the map.
        local: also keep what exceeds ``beta`` in the window (LSCB); False: the non-local block (NLSCB) alone, without
            ``beta`` and its convolution.
        topk: neighbours must also be among the ``topk`` largest scores of their row.
        heads: attention heads; the thresholds are shared by all.
        norm: None, or "batch": batch norm after the output projection.
        threshold_activation: "relu" (as published) or "softplus", which never clips a threshold to 0.
        threshold_grad: "straight_through": the thresholds learn; None: they get zero gradients.
        threshold_band: half width, in logits, of the straight-through window.
        impl: see :func:`asa_ops.asa_attention`.
        published: match the authors' code to the last digit: their two numerical artefacts
            (:func:`asa_ops.asa.reference.asa_attention`), thresholds without gradient. Dense, O(N^2) memory; their code
            has ``dims=2``.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says.

    Example:
        >>> import torch
        >>> from asa_ops.nn import AdaptiveSparseAttention
        >>> block = AdaptiveSparseAttention(64)
        >>> x = torch.randn(2, 64, 24, 32)
        >>> torch.equal(block(x), x)
        True
        >>> video = AdaptiveSparseAttention(64, window=(5, 3, 3), dims=3)
        >>> video(torch.randn(1, 64, 4, 12, 16)).shape
        torch.Size([1, 64, 4, 12, 16])
    """

    asa_thresholds = ("alpha", "beta")  # for what trains and watches them: asa_ops.nn.training

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        mode: str = "embedded_gaussian",
        use_scale: bool = True,
        window: Window = 3,
        local: bool = True,
        topk: int | None = None,
        heads: int = 1,
        norm: str | None = None,
        threshold_activation: str = "relu",
        threshold_grad: ThresholdGrad = "straight_through",
        threshold_band: float = 2.0,
        impl: Impl = "auto",
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
        topk = None if topk is None else checks.as_positive_int("topk", topk)
        dims = checks.as_dims(dims)
        windows = checks.as_window(window, dims)
        checks.check_choice("impl", impl, dispatch.NAMES)
        checks.check_choice("mode", mode, ("embedded_gaussian", "gaussian"))
        checks.check_choice("norm", norm, (None, "batch"))
        checks.check_choice("threshold_activation", threshold_activation, ("relu", "softplus"))
        checks.check_choice("threshold_grad", threshold_grad, (None, "straight_through"))
        threshold_band = checks.as_positive_number("threshold_band", threshold_band)
        inner = max(in_channels // reduction, 1)
        checks.check_divisible("in_channels // reduction", inner, heads)
        if mode == "gaussian":
            checks.check_divisible("in gaussian mode in_channels", in_channels, heads)
        if published and topk is not None:
            raise ValueError(f"published=True has no topk, got topk={topk}")
        if published and not local:
            raise ValueError("published=True has both blocks, got local=False")
        if published and impl not in ("auto", "reference"):
            raise ValueError(f"published=True runs the reference, got impl={impl!r}")
        if published and dims != 2:
            raise ValueError(
                f"AdaptiveSparseAttention with published=True is the authors' code, of dims=2, got dims={dims}"
            )
        self.dims, self.in_channels, self.inner_channels, self.heads = dims, in_channels, inner, heads
        self.mode, self.use_scale, self.topk = mode, use_scale, topk
        self.window: Window = windows if isinstance(window, tuple | list) else windows[0]
        self.threshold_activation = threshold_activation
        self.threshold_grad, self.threshold_band = threshold_grad, threshold_band
        self.impl, self.published = impl, published

        if mode == "embedded_gaussian":
            self.query = NORMAL_CONV[dims](in_channels, inner, 1, **factory)
            self.key = NORMAL_CONV[dims](in_channels, inner, 1, **factory)
        self.value = NORMAL_CONV[dims](in_channels, inner, 1, **factory)
        self.proj, self.norm = last_layers(inner, in_channels, norm, dims, **factory)
        self.alpha = CONV[dims](in_channels, 1, 3, padding=1, **factory)
        self.beta = CONV[dims](in_channels, 1, 3, padding=1, **factory) if local else None

    def tokens(self, x: Tensor) -> dict[str, Any]:
        """Return the arguments of :func:`asa_ops.asa_attention` for the feature map ``x``.

        Without ``value`` they suit :func:`asa_ops.reciprocal_neighbors`.
        """
        return self._tokens(x, self.alpha(x), None if self.beta is None else self.beta(x))

    def _tokens(self, x: Tensor, alpha: Tensor, beta: Tensor | None) -> dict[str, Any]:
        """Return the same, given what the convolutions of the thresholds return."""
        if self.mode == "gaussian":
            query = key = to_tokens(x, self.heads)
            scale = 1.0
        else:
            query, key = to_tokens(self.query(x), self.heads), to_tokens(self.key(x), self.heads)
            scale = checks.as_scale(None if self.use_scale else 1.0, query)
        activate = nn.functional.relu if self.threshold_activation == "relu" else nn.functional.softplus
        return {
            "query": query,
            "key": key,
            "value": to_tokens(self.value(x), self.heads),
            "alpha": scheduled(self, activate(alpha).flatten(2)),
            "beta": None if beta is None else activate(beta).flatten(2),
            "grid": checks.as_sides(x.shape[2:], self.dims),
            "window": self.window,
            "topk": self.topk,
            "scale": scale,
        }

    def attend(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        if self.published:
            out = attend(self, reference_attention, **tokens, published=True)
        else:
            out = attend(
                self,
                asa_attention,
                **tokens,
                threshold_grad=self.threshold_grad,
                threshold_band=self.threshold_band,
                impl=self.impl,
            )
        return x + self.norm(self.proj(to_map(out, tokens["grid"])))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, mode={self.mode!r}, use_scale={self.use_scale}, window={self.window}, "
            f"local={self.beta is not None}, topk={self.topk}, heads={self.heads}, "
            f"threshold_activation={self.threshold_activation!r}, threshold_grad={self.threshold_grad!r}, "
            f"threshold_band={self.threshold_band}, impl={self.impl!r}, published={self.published}, "
            f"dims={self.dims}"
        )

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a published checkpoint's block (theta, phi, g, conv_out, se, se2) to this module's.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(AdaptiveSparseAttention.from_upstream(published))  # doctest: +SKIP
        """
        return rename(state_dict, _UPSTREAM)
