"""Adaptive sparse self-attention over tokens [B, N, C], as vision transformers have it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..asa import asa_attention
from ..asa.types import Grid, Window
from ..core import checks, dispatch
from ..core.dispatch import Impl
from .common import as_leaf
from .training import attend, scheduled


class AdaptiveSparseSelfAttention(nn.Module):
    """Multi-head self-attention whose tokens keep only their adaptive reciprocal neighbours; tokens in, tokens out.

    ``proj(asa_attention(q_norm(q), k_norm(k), v, alpha, beta))`` with q, k, v = ``qkv(x)``. Arguments, names in the
    state dict and the call are those of ``timm.layers.Attention``, so that
    ``timm.create_model(name, attn_layer=AdaptiveSparseSelfAttention)`` takes pretrained weights. For other thresholds
    than the defaults' pass a subclass (docs/integrations.md).

    The thresholds are the parameters ``alpha`` and ``beta``, one number per head, which learn ("straight_through") and
    are cut off at 0. At ``alpha = 0``, the default, this is dense attention exactly, whatever ``beta`` is, and alpha
    gets no gradient from the output: what moves it away from there is a penalty on alpha, or a new value. The cut
    passes gradients on, so that an alpha that fell below 0 can rise again. A state dict without thresholds, of dense
    attention, leaves them as they are.

    Args:
        dim: C.
        num_heads: attention heads, of which C is a multiple.
        qkv_bias: query, key and value have a bias.
        qk_norm: normalise query and key of each head by ``norm_layer``.
        scale_norm: normalise the heads' outputs, before the last layer, by ``norm_layer``.
        proj_bias: the last layer has a bias.
        attn_drop: must be 0: weights of survivors are not dropped. ``proj_drop`` drops instead.
        proj_drop: probability of dropping an element of the output.
        norm_layer: makes a normalisation of the number of channels that it is given.
        alpha: the non-local threshold multiplier of all heads at first, >= 0.
        beta: the local one; None: no local block.
        extra_tokens: how many tokens stand before those of the grid: class and register tokens, which keep everybody
            and are kept by everybody.
        grid: (L,), (H, W) or (T, H, W) of the others, which ``beta`` needs; None: a square.
        window: odd side of the local window, or one for each side of the grid.
        impl: see :func:`asa_ops.asa_attention`.
        device, dtype: of all parameters, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, N, dim], a mask that is no key
            padding mask or is causal, and with ``beta`` a number of tokens that is no ``grid``.

    Example:
        >>> import torch
        >>> from asa_ops.nn import AdaptiveSparseSelfAttention
        >>> layer = AdaptiveSparseSelfAttention(64, num_heads=4, alpha=1.0, extra_tokens=1)
        >>> layer(torch.randn(2, 1 + 14 * 14, 64)).shape
        torch.Size([2, 197, 64])
    """

    asa_thresholds = ("alpha", "beta")  # for what trains and watches them: asa_ops.nn.training
    alpha: Tensor
    beta: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        alpha: float = 0.0,
        beta: float | None = None,
        extra_tokens: int = 0,
        grid: Grid | None = None,
        window: Window = 3,
        impl: Impl = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dim, num_heads = checks.as_positive_ints(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"dim = {dim} must be divisible by num_heads = {num_heads}")
        if norm_layer is None and (qk_norm or scale_norm):
            raise ValueError("qk_norm and scale_norm need a norm_layer, as torch.nn.LayerNorm, got norm_layer=None")
        if checks.as_number("attn_drop", attn_drop):
            raise ValueError(f"attn_drop must be 0, got {attn_drop=}: weights are not dropped, use proj_drop")
        self._initial = {name: None if x is None else start(name, x) for name, x in (("alpha", alpha), ("beta", beta))}
        self.grid = None if grid is None else checks.as_sides(grid, 1, 2, 3)
        dims = 2 if self.grid is None else len(self.grid)
        self.window: Window = checks.as_window(window, dims)
        self.extra_tokens = checks.as_int("extra_tokens", extra_tokens, at_least=0)
        checks.check_choice("impl", impl, dispatch.NAMES)
        self.dim, self.num_heads, self.impl = dim, num_heads, impl

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        head_norm = norm_layer if qk_norm else None
        self.q_norm, self.k_norm = (
            nn.Identity() if head_norm is None else head_norm(dim // num_heads, **factory) for _ in range(2)
        )
        self.norm = norm_layer(dim, **factory) if norm_layer is not None and scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(checks.as_number("proj_drop", proj_drop))
        for name, x in self._initial.items():
            self.register_parameter(name, None if x is None else nn.Parameter(torch.full((num_heads,), x, **factory)))

    def reset_parameters(self) -> None:
        """Initialise again, as the constructor does."""
        for name, x in self._initial.items():
            if x is not None:
                nn.init.constant_(getattr(self, name), x)
        for module in self.children():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens [B, N, dim] to tokens [B, N, dim].

        Args:
            x: the tokens, the extra ones first.
            attn_mask: None, or a key padding mask: [B, N], True = a real token, or one of timm's [B, 1, N, N] with
                equal rows. Padding tokens give the bias of ``proj``.
            is_causal: must be False.
        """
        if isinstance(x, torch.fx.Proxy):
            return as_leaf(self, x, attn_mask, is_causal)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be [B, N, {self.dim}], got {checks.describe(x)}")
        name = type(self).__name__
        if is_causal:
            raise ValueError(f"{name} has no causal attention, got is_causal=True: use timm.layers.Attention here")
        batch, n, _ = x.shape
        query, key, value = (
            self.qkv(x).view(batch, n, 3, self.num_heads, self.dim // self.num_heads).permute(2, 0, 3, 1, 4)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        grid = self.grid
        if grid is None and self.beta is not None:
            side = torch.sym_int(torch.sym_sqrt(torch.sym_max(n - self.extra_tokens, 0)))  # N may be a symbol
            if side * side != n - self.extra_tokens:
                raise ValueError(
                    f"{name} with beta needs grid=(H, W) where the tokens are no square, got N - extra_tokens = "
                    f"{n} - {self.extra_tokens}"
                )
            grid = (side, side)
        out = attend(
            self,
            asa_attention,
            query=query,
            key=key,
            value=value,
            alpha=scheduled(self, threshold(self.alpha, query)),
            beta=None if self.beta is None else threshold(self.beta, query),
            grid=grid,
            window=3 if grid is None else self.window,
            extra_tokens=self.extra_tokens,
            key_padding_mask=padding_mask(attn_mask, query, key, name, "timm.layers.Attention"),
            threshold_grad="straight_through",
            impl=self.impl,
        )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, x in self.named_parameters(recurse=False):  # which dense attention does not have
            state_dict.setdefault(prefix + name, x.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


def start(name: str, x: object) -> float:
    """Return what a threshold is at first, a number >= 0."""
    number = checks.as_number(name, x)
    if not number >= 0:
        raise ValueError(f"{name} must be >= 0, got {number}")
    return number


def threshold(x: Tensor, query: Tensor) -> Tensor:
    """Return the thresholds ``x`` of heads [heads] for a call, [1, heads, 1], cut off at 0.

    The gradient passes the cut, so that what fell below 0 can rise again.
    """
    x = x.to(torch.promote_types(query.dtype, torch.float32))[None, :, None]
    return torch.where(x > 0, x, x - x.detach())


def padding_mask(mask: Tensor | None, query: Tensor, key: Tensor, name: str, instead: str) -> Tensor | None:
    """Return an attention mask as the key padding mask that it is.

    Args:
        mask: None; [B, N_k], True or not 0 at real keys; or what broadcasts to [B, heads, N_q, N_k] and is the same in
            every head and row: bool, True at real keys, or floating point, 0 at these and the dtype's minimum or -inf
            at the others.
        query, key: [B, heads, N, D].
        name: of the layer, for errors.
        instead: what to use for other masks.

    Raises:
        ValueError: it is another mask, or one whose numbers cannot be looked at here (``torch.compile``).
    """
    if mask is None:
        return None
    size = [key.shape[0], key.shape[2]]
    if mask.dim() == 2 and list(mask.shape) == size and not mask.is_floating_point():
        return mask.to(torch.bool)
    expected = f"a key padding mask, [B, N_k] = {size} or a broadcast of one to [B, heads, N_q, N_k]"
    given = f"{name}: the attention mask must be {expected}, got {checks.describe(mask)}"
    full = [query.shape[0], query.shape[1], query.shape[2], key.shape[2]]
    if mask.dim() != 4 or any(n not in (1, wanted) for n, wanted in zip(mask.shape, full, strict=True)):
        raise ValueError(f"{given}: use {instead}")
    if mask.requires_grad:
        raise ValueError(f"{given} that requires a gradient, as a position bias: use {instead}")
    same = all(mask.shape[i] == 1 or mask.stride(i) == 0 for i in (1, 2))
    if not (same and mask.dtype == torch.bool) and torch.compiler.is_compiling():
        raise ValueError(f"{given}, whose numbers torch.compile does not see: pass a bool one of [B, 1, 1, N_k]")
    rows = mask[:, :1, :1]
    if not same and not torch.equal(mask, rows.expand_as(mask)):
        raise ValueError(f"{given} with rows that differ, as of a causal mask or a position bias: use {instead}")
    if mask.is_floating_point():
        dropped = rows <= torch.finfo(mask.dtype).min
        if not (dropped | (rows == 0)).all():
            raise ValueError(f"{given} with numbers other than 0 and the minimum, as of a position bias: use {instead}")
        rows = ~dropped
    return rows.to(torch.bool)[:, 0, 0].expand(size)
