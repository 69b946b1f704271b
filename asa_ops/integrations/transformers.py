"""Adaptive sparse attention for models of Hugging Face's transformers (>= 5), as ``attn_implementation="asa"``.

Every model that asks transformers' ``AttentionInterface`` for its attention can run it: ViT, DeiT, DINOv2, DINOv3,
CLIP, YOLOS, DETR, SegFormer and others. These values of its configuration, of which none must be there, say how::

    asa_alpha         the non-local threshold multiplier >= 0, of all layers and heads; 0, the default: dense attention
    asa_beta          the local one; None, the default: no local block
    asa_window        odd side of the local window, or one for each side of the grid; 3
    asa_grid          (H, W) of the patches, which asa_beta needs; image_size / patch_size where that fits
    asa_extra_tokens  how many tokens stand before the patches, keep everybody and are kept by everybody; those for
                      class, registers and distillation in the models of EXTRA_TOKENS, 0 in others

:func:`add_thresholds` replaces ``asa_alpha`` by parameters that learn.

In cross attention (of layers with "Cross" in their class's name, or of more or fewer keys than queries, as after
SegFormer's sequence reduction) a key has no row in which it could choose: a query keeps every key above its threshold
(``reciprocal=False``), and has neither local block nor extra tokens.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from ..asa import asa_attention
from ..core import checks
from ..nn.asa_self_attention import padding_mask, start, threshold
from ..nn.training import attend, scheduled

__all__ = ["add_thresholds", "from_pretrained", "register"]

# Class tokens and the like, by the type of the configuration; registers, where there are some, follow them.
EXTRA_TOKENS = {
    "clip_vision_model": 1,
    "deit": 2,  # the other one is for distillation
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "vit": 1,
    "vit_mae": 1,
    "vit_msn": 1,
    "yolos": 1,
}
_ALPHA = "asa_alpha"
# Arguments of a layer for its attention that change the weights.
_OTHERS = ("cu_seq_lens_q", "position_bias", "s_aux", "sliding_window", "softcap")
_INSTEAD = 'attn_implementation="sdpa" or "eager"'


def register() -> None:
    """Add "asa" to the attention implementations of transformers.

    A model whose class does not ask the ``AttentionInterface`` (Swin V2, PVT, Hiera, Mask2Former and others) accepts
    the name, and runs its own dense attention: :func:`add_thresholds` raises for such a one.

    In a layer of the model are errors, which name it and what to use instead: ``attention_probs_dropout_prob`` or
    the like > 0 in training, causal attention, position biases, and all masks that are no key padding masks.

    Example:
        >>> import torch, transformers
        >>> from asa_ops.integrations.transformers import register
        >>> register()
        >>> size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        >>> config = transformers.ViTConfig(**size, image_size=32, patch_size=4, asa_alpha=1.0)
        >>> model = transformers.AutoModel.from_config(config, attn_implementation="asa")
        >>> model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape
        torch.Size([1, 65, 32])
    """
    AttentionInterface.register("asa", _attention)
    AttentionMaskInterface.register("asa", _mask)  # without it, transformers drops all masks


def add_thresholds(model: nn.Module, alpha: float = 0.0) -> list[str]:
    """Give every layer of ``model`` that can run "asa" a parameter ``asa_alpha`` [heads]: thresholds that learn.

    They are cut off at 0. At 0 attention is dense exactly, so that a pretrained model begins as it was trained, and
    alpha gets no gradient from the output: what moves it away from there is a penalty on alpha, as in
    ``examples/sparsify.py``, or a new value. The cut passes gradients on, so that an alpha that fell below 0 can rise
    again. The parameters are in the model's state dict and in what ``save_pretrained`` writes; :func:`from_pretrained`
    reads them.

    Args:
        model: of transformers; ``model.set_attn_implementation("asa")`` switches one that is there already.
        alpha: the multipliers at first, >= 0. A layer that has thresholds keeps them.

    Returns:
        The names of these layers in ``model``.

    Raises:
        ValueError: alpha is negative, or the model has no such layer.

    Example:
        >>> import transformers
        >>> from asa_ops.integrations.transformers import add_thresholds, register
        >>> register()
        >>> size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        >>> model = transformers.ViTModel(transformers.ViTConfig(**size))
        >>> model.set_attn_implementation("asa")
        >>> add_thresholds(model)
        ['layers.0.attention', 'layers.1.attention']
    """
    alpha = start("alpha", alpha)
    layers = {name: module for name, module in model.named_modules() if _can_run(module)}
    if not layers:
        raise ValueError(
            "model must have a layer that asks transformers.AttentionInterface for its attention; "
            f"{type(model).__name__} has none, and runs its own, dense"
        )
    for module in layers.values():
        _add(module, alpha)
    return list(layers)


def from_pretrained(auto_class: Any, name: str, alpha: float = 0.0, **options: Any) -> Any:
    """Return ``auto_class.from_pretrained(name)`` with "asa", its thresholds as parameters.

    These are read from a checkpoint that ``save_pretrained`` wrote after :func:`add_thresholds`. Without this function
    transformers reports them as unexpected, and drops them.

    Args:
        auto_class: ``transformers.AutoModel`` or the like, or the class of a model.
        name: a folder, or a name on the hub.
        alpha: as in :func:`add_thresholds`, where the checkpoint has no thresholds: of a dense model.
        options: others of ``from_pretrained``.

    Raises:
        ValueError: as :func:`add_thresholds`.

    Example:
        >>> import tempfile, transformers
        >>> from asa_ops.integrations.transformers import add_thresholds, from_pretrained
        >>> size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        >>> model = transformers.ViTModel(transformers.ViTConfig(**size))
        >>> layers = add_thresholds(model, alpha=1.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = from_pretrained(transformers.AutoModel, folder)
        >>> again.layers[1].attention.asa_alpha.tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    register()
    alpha = start("alpha", alpha)

    def add(_: nn.Module, __: str, module: nn.Module | None) -> None:
        if module is not None and _can_run(module):
            _add(module, alpha)

    # from_pretrained makes the model and reads its weights in one go: thresholds are added to layers as they are made.
    hook = register_module_module_registration_hook(add)
    try:
        model, info = auto_class.from_pretrained(name, attn_implementation="asa", output_loading_info=True, **options)
    finally:
        hook.remove()
    with torch.no_grad():
        for missing in info["missing_keys"]:  # which transformers does not know how to initialise
            if missing.rpartition(".")[2] == _ALPHA:
                model.get_parameter(missing).fill_(alpha)
    add_thresholds(model, alpha)
    return model


def _can_run(module: nn.Module) -> bool:
    """Return whether the layer asks the interface for its attention."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _add(module: nn.Module, alpha: float) -> None:
    if not hasattr(module, _ALPHA):
        like = next(module.parameters())
        heads = torch.full((_heads(module),), alpha, device=like.device, dtype=like.dtype)
        module.register_parameter(_ALPHA, nn.Parameter(heads))
        module.asa_thresholds = (_ALPHA,)  # type: ignore[assignment]  # for asa_ops.nn.training


def _heads(module: nn.Module) -> int:
    for name in ("num_attention_heads", "num_heads"):
        if isinstance(heads := getattr(module, name, None), int):
            return heads
    head_dim: Any = getattr(module, "head_dim", None)
    projection: Any = getattr(module, "o_proj", None)
    if head_dim is None or projection is None:
        raise ValueError(f"{_name(module)} must have num_attention_heads, or o_proj and head_dim; it has neither")
    return int(projection.in_features // head_dim)


def _name(module: nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__} (layer {index})"


def _mask(kv_length: int, mask_function: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """Return a padding mask as [B, 1, 1, N_k]; others as transformers makes them, which :func:`_attention` refuses."""
    if mask_function is not bidirectional_mask_function or (
        attention_mask is not None and attention_mask.shape[-1] != kv_length
    ):
        options |= {"kv_length": kv_length, "mask_function": mask_function, "attention_mask": attention_mask}
        return sdpa_mask(**options)
    return None if attention_mask is None else attention_mask[:, None, None]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Run the attention of a layer: what transformers calls. Returns [B, N_q, heads, D]."""
    name = _name(module)
    if dropout:
        raise ValueError(
            f"{name}: weights of survivors are not dropped, got {dropout=}: set attention_probs_dropout_prob, "
            "attention_dropout or what the configuration calls it to 0"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # as for "sdpa"
    if causal and attention_mask is None and query.shape[2] > 1:
        raise ValueError(f"{name}: causal attention has no reciprocal neighbours: use {_INSTEAD}")
    for option in _OTHERS:
        if options.get(option) is not None:
            raise ValueError(f"{name}: asa has no {option}: use {_INSTEAD}")
    real = padding_mask(attention_mask, query, key, name, _INSTEAD)

    config = getattr(module, "config", None)
    learned: Tensor | None = getattr(module, _ALPHA, None)
    alpha = getattr(config, _ALPHA, 0.0) if learned is None else scheduled(module, threshold(learned, query))
    n = query.shape[2]
    given: dict[str, Any] = {"reciprocal": False}
    if n == key.shape[2] and "Cross" not in type(module).__name__:
        extra_tokens = _extra_tokens(config)
        given = {"extra_tokens": extra_tokens}
        if (beta := getattr(config, "asa_beta", None)) is not None:
            given |= {"beta": beta, "grid": _grid(name, config, n - extra_tokens)}
            given |= {"window": getattr(config, "asa_window", 3)}
    elif real is not None and n == key.shape[2]:
        # As many queries as keys would be taken for the same tokens, some of them padding.
        key, value, real = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), F.pad(real, (0, 1))
    out = attend(
        module,
        asa_attention,
        query=query,
        key=key,
        value=value,
        alpha=alpha,
        key_padding_mask=real,
        scale=scaling,
        threshold_grad=None if learned is None else "straight_through",
        **given,
    )
    return out.transpose(1, 2).contiguous(), None


def _extra_tokens(config: Any) -> int:
    found = getattr(config, "asa_extra_tokens", None)
    if found is not None:
        return checks.as_int("asa_extra_tokens", found, at_least=0)
    classes = EXTRA_TOKENS.get(getattr(config, "model_type", ""), 0)
    return classes + getattr(config, "num_register_tokens", 0) if classes else 0


def _grid(name: str, config: Any, n: int) -> Sequence[int]:
    """Return the grid of ``n`` patches."""
    found = getattr(config, "asa_grid", None)
    if found is not None:
        return tuple(found)  # a list, if it was read from a file
    sizes = (getattr(config, size, None) for size in ("image_size", "patch_size"))
    image, patch = ((size, size) if isinstance(size, int) else size for size in sizes)
    if image and patch:
        sides = tuple(side // of_patch for side, of_patch in zip(image, patch, strict=True))
        if sides[0] * sides[1] == n:
            return sides
    raise ValueError(f"{name}: asa_beta needs asa_grid=(H, W) in the configuration, of {n} patches; nothing else tells")
