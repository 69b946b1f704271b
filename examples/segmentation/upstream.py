"""Published heads: their names for the weights, and ours."""

from torch import Tensor

from asa_ops import nn as blocks

from .config import NO_BLOCK

_LAYERS = {
    "decode_head.convs.0.conv": "head.before.0",
    "decode_head.convs.0.bn": "head.before.1",
    "decode_head.convs.1.conv": "head.after.0",
    "decode_head.convs.1.bn": "head.after.1",
    "decode_head.conv_cat.conv": "head.join.0",
    "decode_head.conv_cat.bn": "head.join.1",
    "decode_head.conv_seg": "head.classifier.1",
    "auxiliary_head.convs.0.conv": "auxiliary.0.0",
    "auxiliary_head.convs.0.bn": "auxiliary.0.1",
    "auxiliary_head.conv_seg": "auxiliary.2",
}


def from_upstream(state_dict: dict[str, Tensor], block: str = "asa") -> dict[str, Tensor]:
    """Rename a published network's heads ("decode_head.", "auxiliary_head.") to those of :class:`Segmenter`.

    What belongs to neither is left out: the published backbone has another stem than a ``transformers`` ResNet.
    Whatever of the decode head is no convolution around the block is the block, whose class renames it.

    Args:
        state_dict: of the whole network, or of its heads.
        block: what ``asa_ops.nn`` calls the block.

    Raises:
        ValueError: there is no head, a key that none has, or a block where none is expected or the other way round.

    Example:
        >>> model.load_state_dict(from_upstream(published), strict=False)  # doctest: +SKIP
    """
    renamed, of_block = {}, {}
    for key, tensor in state_dict.items():
        module, _, parameter = key.rpartition(".")
        if module in _LAYERS:
            renamed[f"{_LAYERS[module]}.{parameter}"] = tensor
        elif key.startswith("decode_head.") and key.count(".") > 1:
            of_block[key.split(".", 2)[2]] = tensor
        elif key.startswith(("decode_head.", "auxiliary_head.")):
            raise ValueError(f"unknown key {key!r} in a published head")
    if not renamed:
        raise ValueError(f"no published head: expected keys decode_head.*, got {', '.join(list(state_dict)[:3])}, ...")
    if bool(of_block) == (block == NO_BLOCK):
        found = f"{next(iter(of_block))!r}" if of_block else "no block"
        raise ValueError(f"the published head has {found} between its convolutions, expected block {block!r}")
    if of_block:
        of_block = type(blocks.build(block, 64)).from_upstream(of_block)
    return renamed | {f"head.block.{key}": tensor for key, tensor in of_block.items()}
