"""The segmentation example's network: what is published of it, dilation, local weights, loss, published heads."""

import shutil

import pytest
import segmentation_cases as cases
import torch
from torch import nn
from transformers import ResNetBackbone, ResNetForImageClassification, ViTConfig, ViTModel

from examples.segmentation import model
from examples.segmentation.config import NO_BLOCK, Config, ConfigError
from examples.segmentation.sample import IGNORE
from examples.segmentation.upstream import from_upstream


@pytest.mark.parametrize(("name", "classes"), [("cityscapes", 19), ("ade20k", 150), ("voc2012", 21)])
def test_published_network_has_output_stride_8(name, classes):
    config = Config.load(name)
    with torch.device("meta"):
        network = model.Segmenter(config, classes)
        image = torch.empty(2, 3, *config.crop)
    height, width = (length // 8 for length in config.crop)
    auxiliary, last = network.backbone(image).feature_maps
    assert auxiliary.shape == (2, 1024, height, width) and last.shape == (2, 2048, height, width)
    assert all(scores.shape == (2, classes, height, width) for scores in network(image))
    assert network.eval()(image).shape == (2, classes, height, width)
    with torch.device("meta"):
        resnet101 = model.build_backbone(config.replace(output_stride=32))
    assert sum(isinstance(m, nn.Conv2d) for m in resnet101.modules()) == 1 + 3 * (3 + 4 + 23 + 3) + 4
    assert sum(p.numel() for p in resnet101.parameters()) == 44_549_160 - (2048 + 1) * 1000  # without its classifier


def randomised(network: nn.Module) -> nn.Module:
    """Give batch norm statistics and weights that make a difference."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


@pytest.mark.parametrize("size", [(64, 96), (97, 65)])
@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_dilation_leaves_the_weights_valid(output_stride, size):
    """At every position that the undilated network has, the dilated one gives the same features."""
    strided = randomised(model.build_backbone(cases.deep(output_stride=32)).double())
    dilated = model.build_backbone(cases.deep(output_stride=output_stride)).double().eval()
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    for stride, expected, found in zip((16, 32), strided(image).feature_maps, dilated(image).feature_maps, strict=True):
        step = stride // min(stride, output_stride)
        assert found.shape[-2:] == tuple(-(-length // output_stride) for length in size)
        torch.testing.assert_close(found[..., ::step, ::step], expected)


def test_weights_of_a_local_checkpoint(tmp_path):
    config = cases.deep()
    saved = randomised(ResNetBackbone(model.build_backbone(config).config))
    classifier = ResNetForImageClassification(saved.config)
    for name, network, resnet in (("resnet", saved, saved), ("classifier", classifier, classifier.resnet)):
        network.save_pretrained(tmp_path / name)
        loaded = model.build_backbone(config.replace(pretrained=str(tmp_path / name)))
        torch.testing.assert_close(loaded.state_dict(), resnet.state_dict(), rtol=0, atol=0)


def test_local_checkpoints_that_do_not_fit(tmp_path):
    model.build_backbone(cases.deep()).save_pretrained(tmp_path / "resnet")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "resnet", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    unfit = "does not fit the backbone"
    for name, depths, message in (
        ("nowhere", [1, 2, 2, 2], "pretrained must be the folder of a transformers checkpoint, got '.*nowhere'"),
        ("vit", [1, 2, 2, 2], rf"'.*vit' {unfit}: it lacks embedder\..*, and \d+ more"),
        ("resnet", [1, 2, 1, 2], rf"{unfit}: it has more layers, namely encoder\.stages\.2"),
        ("resnet", [1, 2, 3, 2], rf"{unfit}: it lacks encoder\.stages\.2\.layers\.2"),
        ("broken", [1, 2, 2, 2], rf"pretrained '.*broken' {unfit}"),
        ("empty", [1, 2, 2, 2], rf"pretrained '.*empty' {unfit}"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.build_backbone(cases.deep(depths, pretrained=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_stride": 6}, r"output_stride must be one of \[4, 8\] for this backbone, got 6"),
        ({"output_stride": 64}, r"output_stride must be one of \[4, 8\]"),
        ({"backbone": {"depths": [1], "hidden_sizes": [8]}}, "depths and hidden_sizes of two stages or more, got"),
        ({"backbone": {"depths": [1, 1], "hidden_sizes": [8]}}, "depths and hidden_sizes of two stages or more, got"),
        ({"backbone": cases.TINY["backbone"] | {"layer_type": "x"}}, "backbone .* does not fit: .*layer_type"),
        ({"backbone": cases.TINY["backbone"] | {"layer": "x"}}, "transformers.ResNetConfig has not: 'layer'"),
        ({"block": "asa", "block_options": {"sparse": True}}, "block 'asa' with block_options {'sparse': True}"),
        ({"block": "interlaced_sparse", "block_options": {"factors": 0}}, "block 'interlaced_sparse'"),
    ],
)
def test_networks_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        model.Segmenter(cases.tiny(**settings), 5)


def test_loss_is_the_mean_over_all_pixels():
    """Of both heads, upsampled; ignored pixels count as 0, and a crop of nothing else gives 0."""
    scores = torch.tensor([[[[2.0]], [[0.0]]]])
    label = torch.tensor([[[0, 1, IGNORE, IGNORE]]])
    of = -scores[0, :, 0, 0].log_softmax(0)
    expected = (of[0] + of[1]) / 4 * 1.5
    torch.testing.assert_close(model.loss_of((scores, scores), label, 0.5), expected)
    assert model.loss_of((scores, scores), torch.full_like(label, IGNORE), 0.5) == 0


# Published heads.

HEADS = {
    "head.before": "decode_head.convs.0", "head.after": "decode_head.convs.1", "head.join": "decode_head.conv_cat",
    "auxiliary.0": "auxiliary_head.convs.0",
}  # fmt: skip
BLOCK = {
    "query": "theta.conv", "key": "phi.conv", "value": "g.conv", "proj": "conv_out.conv", "norm": "conv_out.bn",
    "alpha": "se.0", "beta": "se2.0",
}  # fmt: skip
PUBLISHED = {
    **{f"{ours}.{i}": f"{theirs}.{x}" for ours, theirs in HEADS.items() for i, x in enumerate(("conv", "bn"))},
    **{f"head.block.{ours}": f"decode_head.asa_block.{theirs}" for ours, theirs in BLOCK.items()},
    "head.classifier.1": "decode_head.conv_seg",
    "auxiliary.2": "auxiliary_head.conv_seg",
}


def published(network: model.Segmenter) -> dict[str, torch.Tensor]:
    """Return a network's weights under the names that a published checkpoint has for them."""
    state = {"backbone.stem.0.weight": torch.zeros(1)}
    for key, tensor in network.state_dict().items():
        if not key.startswith("backbone."):
            module, _, parameter = key.rpartition(".")
            state[f"{PUBLISHED[module]}.{parameter}"] = tensor
    return state


@pytest.mark.parametrize(("block", "options"), [("asa", {"norm": "batch"}), (NO_BLOCK, {})])
def test_published_heads_load(block, options):
    config = cases.tiny(block=block, block_options=options)
    source, target = (randomised(model.Segmenter(config, 5)) for _ in range(2))
    missing, unexpected = target.load_state_dict(from_upstream(published(source), block), strict=False)
    assert not unexpected and all(key.startswith("backbone.") for key in missing)
    features = torch.randn(2, 16, 6, 7)
    for ours, theirs in ((target.head, source.head), (target.auxiliary, source.auxiliary)):
        torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=0)


def test_states_that_hold_no_published_head():
    zero = torch.zeros(1)
    state = published(model.Segmenter(cases.tiny(block="asa"), 5))
    without = {key: tensor for key, tensor in state.items() if "asa_block" not in key}
    for states, block, message in (
        ({"a": zero, "b": zero}, "asa", r"no published head: expected keys decode_head\.\*, got a, b"),
        ({"auxiliary_head.extra.weight": zero}, "asa", r"unknown key 'auxiliary_head\.extra\.weight'"),
        (state, "none", r"has 'theta\.conv\.weight' between its convolutions, expected block 'none'"),
        (without, "asa", "has no block between its convolutions, expected block 'asa'"),
        (state | {"decode_head.gamma": zero}, "asa", r"unknown key 'decode_head\.gamma' in a published head"),
        (state | {"decode_head.asa_block.zeta.weight": zero}, "asa", r"unknown key 'zeta\.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_upstream(states, block)
