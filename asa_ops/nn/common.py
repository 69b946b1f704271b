"""What several blocks share: layers, initialisation, and the renaming of published state dicts."""

from torch import Tensor, nn


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel: int = 1, bias: bool = False, eps: float = 1e-5
) -> nn.Sequential:
    """Return a convolution that keeps the size of the map, batch norm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, eps=eps), nn.ReLU())


def init_non_local(block: nn.Module) -> None:
    """Initialise a non-local block as published: projections N(0, 0.01^2), the last layer 0, the rest torch's default.

    ``block`` has ``value``, ``proj``, ``norm`` (batch norm or the identity) and maybe ``query`` and ``key``.
    """
    for conv in block.children():
        if isinstance(conv, nn.Conv2d):
            conv.reset_parameters()
    for name in ("query", "key", "value"):
        if conv := getattr(block, name, None):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
    last = block.proj
    if isinstance(block.norm, nn.BatchNorm2d):
        block.norm.reset_running_stats()
        last = block.norm
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def rename(state_dict: dict[str, Tensor], modules: dict[str, str | None]) -> dict[str, Tensor]:
    """Return ``state_dict`` with its keys "module.parameter" renamed by ``modules``; None drops an entry.

    Names without a module ("gamma") are looked up as they are.

    Raises:
        ValueError: a key that no published block has.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, parameter = key.rpartition(".")
        name, suffix = (module, f".{parameter}") if module else (key, "")
        if name not in modules:
            expected = sorted(f"{name}.*" for name in modules)
            raise ValueError(
                f"unknown key {key!r} in a published block's state dict, expected {expected}; "
                "of a whole network's, pass the block's entries without their prefix"
            )
        if modules[name] is not None:
            renamed[modules[name] + suffix] = tensor
    return renamed
