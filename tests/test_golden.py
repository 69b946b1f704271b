"""The modules against numbers from the authors' code, float64.

``ASA_GOLDEN_DIR`` names another folder of files in the same format (tests/golden/README.md).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import dense

from asa_ops import asa_attention, nn, reciprocal_neighbors
from asa_ops.asa import reference
from asa_ops.nn import AdaptiveSparseAttention
from asa_ops.nn.common import conv_norm_relu

FOLDER = Path(os.environ.get("ASA_GOLDEN_DIR", Path(__file__).with_name("golden")))
FILES = sorted(FOLDER.glob("asa_*.npz"))


def load(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        golden["meta"] = json.loads(str(file["meta"][0]))
    return golden


def group(golden: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def build(golden: dict, **options) -> AdaptiveSparseAttention:
    hyper = golden["meta"]["hyper"]
    rows, columns = hyper["neighbor_size"]
    assert rows == columns
    block = AdaptiveSparseAttention(
        hyper["in_channels"],
        reduction=hyper["reduction"],
        mode=hyper["mode"],
        use_scale=hyper["use_scale"],
        norm=None if hyper["norm_cfg"] is None else "batch",
        window=rows,
        **options,
    ).double()
    block.train(golden["meta"]["mode"] == "train")
    state = group(golden, "param/") | group(golden, "buffer/")
    block.load_state_dict(AdaptiveSparseAttention.from_upstream(state))
    return block


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"{what} is off by {error:.3g}"


def check_block(block: torch.nn.Module, from_upstream, golden: dict, tolerance: float) -> None:
    """Compare y, every gradient and, in training mode, the batch norm statistics of ``block`` with one file."""
    block.double().train(golden["meta"]["mode"] == "train")
    block.load_state_dict(from_upstream(group(golden, "param/") | group(golden, "buffer/")))
    x = golden["x"].requires_grad_()
    y = block(x)
    y.backward(golden["grad_out"])
    close(y, golden["y"], "y", tolerance)
    close(x.grad, golden["grad_x"], "grad_x", tolerance)
    expected = from_upstream(group(golden, "grad/"))
    for name, parameter in block.named_parameters():
        close(parameter.grad, expected[name], f"gradient of {name}", tolerance)
    assert set(expected) == {name for name, _ in block.named_parameters()}
    for name, buffer in from_upstream(group(golden, "buffer_after/")).items():
        close(block.get_buffer(name), buffer, name, tolerance)


def check(golden: dict, tolerance: float = 1e-10) -> None:
    """Compare y, y_core, the mask and every gradient of the published mode with one file."""
    block = build(golden, published=True)
    core = []
    block.proj.register_forward_pre_hook(lambda _, inputs: core.append(inputs[0].flatten(2).mT))
    check_block(block, AdaptiveSparseAttention.from_upstream, golden, tolerance)
    close(core[0], golden["y_core"], "y_core", tolerance)
    tokens = block.tokens(golden["x"])
    mask = reference.published_mask(*scores_and_thresholds(tokens), tokens["grid"], tokens["window"])
    assert torch.equal(mask[:, 0], golden["mask"])


def scores_and_thresholds(tokens: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key = tokens["query"], tokens["key"]
    real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    return reference.scores(query, key, tokens["scale"], real, real), tokens["alpha"], tokens["beta"]


def test_there_are_golden_files():
    assert FILES, f"no asa_*.npz in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_mode_equals_the_authors_code(path):
    check(load(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_check_notices_a_small_change(path):
    golden = load(path)
    golden["y"].view(-1)[golden["y"].numel() // 2] += 1e-6
    with pytest.raises(AssertionError, match="y is off by"):
        check(golden)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("impl", ["reference", "blocked", "cpu"])
@torch.no_grad()
def test_plain_semantics_against_the_authors_masks_and_outputs(path, impl):
    """Without the two artefacts: the same survivors where there are no half values, and the same output but for the
    published normaliser, which is too large by 1e-12."""
    golden = load(path)
    block = build(golden)
    tokens = block.tokens(golden["x"])
    s, alpha, beta = scores_and_thresholds(tokens)
    real = torch.ones(s.shape[0], s.shape[-1], dtype=torch.bool)
    found = reference.find_survivors(s, alpha, beta, tokens["grid"], tokens["window"], None, True, real, real)
    graph = reciprocal_neighbors(**{name: x for name, x in tokens.items() if name != "value"}, impl=impl)
    kept = dense(graph, *tokens["query"].shape[:3], s.shape[-1])[:, 0]
    whole = golden["mask"] != 0.5  # a half value is the artefact: everywhere else the survivors agree
    assert torch.equal(kept[whole], golden["mask"][whole] == 1)
    if not whole.all():
        return
    assert torch.equal(found.non_local[:, 0], golden["mask_reciprocal"] == 1)
    assert torch.equal(found.local[:, 0], golden["mask_local"] == 1)
    out, stats = asa_attention(**tokens, impl=impl, return_stats=True)
    assert torch.equal(stats.survivors[:, 0], (golden["mask"] == 1).sum(-1))
    mass = (stats.lse_kept - stats.lse).exp()  # of the softmax, held by the survivors of a row
    shrunk = out[:, 0] * (mass / (mass + 1e-12))[:, 0, :, None]
    torch.testing.assert_close(shrunk, golden["y_core"], rtol=0, atol=1e-10)


def pick(hyper: dict, *names: str) -> dict:
    return {name: hyper[name] for name in names}


BLOCKS = {  # by the first part of a file's name: the class, and the options that the file's hyperparameters ask for
    "nl": (
        nn.NonLocal,
        lambda h: {
            "norm": None if h["norm_cfg"] is None else "batch",
            "published": True,
            **pick(h, "reduction", "mode", "use_scale", "sub_sample"),
        },
    ),
    "lam": (
        nn.LinearAttention,
        lambda h: {"kind": "position" if "in_places" in h else "channel", "eps": h["eps"]},
    ),
    "ea": (
        nn.EfficientAttention,
        lambda h: {"heads": h["head_count"], "published": True, **pick(h, "key_channels", "value_channels")},
    ),
    "caa": (
        nn.ChannelizedAxialAttention,
        lambda h: {
            "out_channels": h["filters"],
            "key_channels": h["guided_filters"],
            "hidden_layers": h["hidden_layers_count"],
            "hidden_ratio": h["hidden_layer_ratio"],
            "channel_attention": h["use_channel_attention"],
        },
    ),
    "sanet": (
        nn.SqueezeAndAttention,
        lambda h: {
            "out_channels": h["ch_out"],
            "activation": "sigmoid" if h["sigmoid"] else None,
            "pool": h["pool"],
        },
    ),
    "isa": (
        nn.InterlacedSparseAttention,
        lambda h: {
            "factors": h["down_factors"],
            "published": True,
            **pick(h, "key_channels", "value_channels", "out_channels", "dropout"),
        },
    ),
    "spanet": (
        nn.SalientPositionsAttention,
        lambda h: {
            "inner_channels": h["inter_channels"],
            "topk": None if h["adaptive"] else h["k"],
            "sub_sample": h["sub_sample"],
        },
    ),
}
OTHERS = [path for name in BLOCKS for path in sorted(FOLDER.glob(f"{name}_*.npz"))]
HEAD = "caa_p4_head"  # not a block


def check_other(path: Path, golden: dict) -> None:
    name = path.stem.split("_")[0]
    block_class, options_of = BLOCKS[name]
    if path.stem == HEAD:
        block_class = CaaHead
    block = block_class(golden["x"].shape[1], **options_of(golden["meta"]["hyper"]))
    tolerance = 1e-9 if name == "caa" else 1e-10  # its source rounds a constant to float32
    check_block(block, block_class.from_upstream, golden, tolerance)


class CaaHead(torch.nn.Module):
    """The head that channelized axial attention was published in: 3x3 entry, block, 1x1 end, beside the mean image."""

    def __init__(self, channels: int, **options):
        super().__init__()
        inner = options["out_channels"]
        self.entry = conv_norm_relu(channels, inner, kernel=3, eps=1e-3)
        self.block = nn.ChannelizedAxialAttention(inner, **options)
        self.end = conv_norm_relu(inner, inner, eps=1e-3)
        self.image = conv_norm_relu(channels, inner, eps=1e-3)

    def forward(self, x):
        y = self.end(self.block(self.entry(x)))
        return torch.cat([y, self.image(x.mean((2, 3), keepdim=True)).expand_as(y)], 1)

    @staticmethod
    def from_upstream(state_dict: dict) -> dict:
        renamed = {}
        parts = {
            "entry_convbnrelu": "entry",
            "ca_blocks.0": "block",
            "end_convbnrelu": "end",
            "image_level_block.convbnrelu": "image",
        }
        for theirs, ours in parts.items():
            part = group({key: x for key, x in state_dict.items() if key.startswith(theirs)}, f"{theirs}.")
            if ours != "block":  # the block knows how to rename a layer like these: its value
                part = {f"value_convbnrelu.{key}": x for key, x in part.items()}
            new = nn.ChannelizedAxialAttention.from_upstream(part)
            renamed |= {f"{ours}.{key if ours == 'block' else key.removeprefix('value.')}": x for key, x in new.items()}
        return renamed


def test_there_are_golden_files_of_every_block():
    assert {path.stem.split("_")[0] for path in OTHERS} == set(BLOCKS)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_blocks_equal_the_authors_code(path):
    check_other(path, load(path))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_the_check_of_blocks_notices_a_small_change(path):
    golden = load(path)
    golden["grad_x"].view(-1)[golden["y"].numel() // 2] += 1e-6
    with pytest.raises(AssertionError, match="grad_x is off by"):
        check_other(path, golden)
