"""The segmentation example: network, evaluation, training, resuming, several processes, pictures."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import segmentation_cases as cases
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import ResNetBackbone, ResNetForImageClassification, ViTConfig, ViTModel

from asa_ops import asa_attention
from asa_ops import nn as blocks
from examples.files import FileError
from examples.segmentation import attend, cli, data, evaluate, model, predict, train
from examples.segmentation.checkpoint import Checkpoint, CheckpointError
from examples.segmentation.config import NO_BLOCK, Config, ConfigError
from examples.segmentation.pipeline import normalise
from examples.segmentation.sample import IGNORE, Sample
from examples.segmentation.upstream import from_upstream

ROOT = Path(__file__).parents[2]
COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "attend": attend}


pytestmark = pytest.mark.usefixtures("one_thread")


# The network.


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


def deep(**settings) -> Config:
    """Return settings of a narrow ResNet with all four stages."""
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 2, 2], "layer_type": "bottleneck"}
    return cases.tiny(backbone=backbone, **settings)


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
    strided = randomised(model.build_backbone(deep(output_stride=32)).double())
    dilated = model.build_backbone(deep(output_stride=output_stride)).double().eval()
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    for stride, expected, found in zip((16, 32), strided(image).feature_maps, dilated(image).feature_maps, strict=True):
        step = stride // min(stride, output_stride)
        assert found.shape[-2:] == tuple(-(-length // output_stride) for length in size)
        torch.testing.assert_close(found[..., ::step, ::step], expected)


def test_weights_of_a_local_checkpoint(tmp_path):
    config = deep()
    saved = randomised(ResNetBackbone(model.build_backbone(config).config))
    saved.save_pretrained(tmp_path / "resnet")
    loaded = model.build_backbone(config.replace(pretrained=str(tmp_path / "resnet")))
    state = loaded.state_dict()
    assert all(torch.equal(weight, state.pop(key)) for key, weight in saved.state_dict().items()) and not state
    with pytest.raises(ConfigError, match="pretrained must be the folder of a transformers checkpoint, got 'nowhere'"):
        model.build_backbone(config.replace(pretrained="nowhere"))
    classifier = ResNetForImageClassification(saved.config)
    classifier.save_pretrained(tmp_path / "classifier")
    state = model.build_backbone(config.replace(pretrained=str(tmp_path / "classifier"))).state_dict()
    assert all(torch.equal(weight, state[key]) for key, weight in classifier.resnet.state_dict().items())
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"'.*vit' does not fit the backbone: it lacks embedder\..*, and \d+ more"):
        model.build_backbone(config.replace(pretrained=str(tmp_path / "vit")))
    shallow = config.replace(backbone=config.backbone | {"depths": [1, 2, 1, 2]})
    with pytest.raises(ConfigError, match=r"does not fit the backbone: it has more layers, namely encoder\.stages\.2"):
        model.build_backbone(shallow.replace(pretrained=str(tmp_path / "resnet")))
    more = config.replace(backbone=config.backbone | {"depths": [1, 2, 3, 2]})
    with pytest.raises(ConfigError, match=r"does not fit the backbone: it lacks encoder\.stages\.2\.layers\.2"):
        model.build_backbone(more.replace(pretrained=str(tmp_path / "resnet")))
    weights = tmp_path / "resnet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"pretrained '.*resnet' does not fit the backbone"):
        model.build_backbone(config.replace(pretrained=str(tmp_path / "resnet")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"pretrained '.*empty' does not fit the backbone"):
        model.build_backbone(config.replace(pretrained=str(tmp_path / "empty")))


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


# Evaluation.


class Coded(nn.Module):
    """Class scores that a picture's red channel spells: class r gets r + 1, once every ``stride`` pixels."""

    def __init__(self, classes: int, stride: int = 1):
        super().__init__()
        self.unused, self.classes, self.stride, self.sizes = nn.Parameter(torch.zeros(())), classes, stride, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        red = ((x[:, 0] * 0.229 + 0.485) * 255).round().long()[:, :: self.stride, :: self.stride]
        return nn.functional.one_hot(red, self.classes).permute(0, 3, 1, 2) * (red[:, None] + 1.0)


class Few:
    classes, palette = ("a", "b", "c", "d"), np.zeros((4, 3), np.uint8)

    def __init__(self, *pairs):
        self.samples = [Sample(np.stack([np.array(p, np.uint8)] * 3, -1), np.array(y, np.uint8), "") for p, y in pairs]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_miou_by_hand():
    pairs = (
        ([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, IGNORE, 2]]),
        ([[0, 2], [2, 2]], [[0, 2], [0, 1]]),  # of another size
    )
    # without the ignored pixel: class 0 2 of {2 + 1 predicted, 1 missed}, 1: 2 of {2, 2 missed}, 2: 2 of {4}
    report = evaluate.evaluate(Coded(4), Few(*pairs), cases.tiny())
    np.testing.assert_allclose(report.iou, [2 / 4, 2 / 4, 2 / 4, np.nan])
    assert report.miou == 0.5 and report.accuracy == 6 / 9
    report = evaluate.evaluate(Coded(4), Few(pairs[0]), cases.tiny())
    np.testing.assert_allclose(report.iou, [1 / 2, 2 / 3, 1, np.nan])
    assert report.miou == pytest.approx((1 / 2 + 2 / 3 + 1) / 3) and report.accuracy == 4 / 5
    assert str(report).splitlines()[-3:] == [
        "d                    -",
        "mean             72.22",
        "pixel accuracy   80.00",
    ]


def test_sliding_windows_cover_everything_and_are_averaged():
    starts = [(rows.start, columns.start) for rows, columns in evaluate.windows((7, 10), (4, 4), (3, 3))]
    assert starts == list(itertools.product((0, 3), (0, 3, 6)))
    assert [w[0].start for w in evaluate.windows((8, 4), (4, 4), (3, 4))] == [0, 3, 4]
    assert len(list(evaluate.windows((3, 3), (4, 4), (2, 2)))) == 1

    class MeanOfTheWindow(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3), keepdim=True).expand(1, 2, *x.shape[-2:])

    config = cases.tiny(window=[2, 4], stride=[1, 4])
    x = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 3, 3, 4)  # rows 0, 1, 2: windows of rows 0-1 and 1-2
    found = evaluate.scores_of(MeanOfTheWindow(), x, config)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 1.5]).view(1, 1, 3, 1).expand(1, 2, 3, 4))


def test_a_window_of_the_whole_picture_changes_nothing():
    network = model.Segmenter(cases.tiny(), 5).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    whole = evaluate.probabilities(network, image, cases.tiny())
    torch.testing.assert_close(
        evaluate.probabilities(network, image, cases.tiny(window=[64, 64], stride=[8, 8])), whole
    )
    apart = evaluate.probabilities(network, image, cases.tiny(window=[24, 24], stride=[16, 16]))
    assert apart.shape == whole.shape and not torch.allclose(apart, whole, atol=1e-4)


def test_flips_and_scales_are_averaged():
    image = np.random.default_rng(0).integers(0, 4, (12, 16, 1)).repeat(3, -1).astype(np.uint8)
    config = cases.tiny()
    network = Coded(4, stride=2)  # what lies between is interpolated, so a mirrored picture gives something else
    plain = evaluate.probabilities(network, image, config)
    mirrored = evaluate.probabilities(network, image[:, ::-1].copy(), config).flip(-1)
    assert not torch.allclose(plain, mirrored)
    torch.testing.assert_close(evaluate.probabilities(network, image, config, flip=True), (plain + mirrored) / 2)
    network.sizes.clear()
    scales = (0.5, 1.0, 1.5)
    several = evaluate.probabilities(network, image, config, scales)
    assert network.sizes == [(6, 8), (12, 16), (18, 24)] and several.shape == plain.shape
    torch.testing.assert_close(several, sum(evaluate.probabilities(network, image, config, [s]) for s in scales) / 3)
    torch.testing.assert_close(several.sum(0), torch.ones(12, 16))
    evaluate.probabilities(network, image, config.replace(resize=[32, 24]))
    assert network.sizes[-1] == (24, 32)


# Training.

OPTIONS = {"interlaced_sparse": {"factors": [4, 4]}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Thirty steps of the tiny network with adaptive sparse attention: the folder and what came out."""
    out = tmp_path_factory.mktemp("trained")
    return out, train.train(cases.tiny(block="asa"), out)


def fell(losses: list[float]) -> bool:
    return np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("block", sorted({NO_BLOCK, *blocks.available()} - {"asa"}))
def test_thirty_steps_with_every_block(block, tmp_path):
    result = train.train(cases.tiny(block=block, block_options=OPTIONS.get(block, {})), tmp_path)
    assert len(result.losses) == 30 and fell(result.losses)


def test_thirty_steps_with_adaptive_sparse_attention(trained):
    out, result = trained
    assert len(result.losses) == 30 and fell(result.losses)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))
    assert [line["loss"] for line in lines] == result.losses
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0.003 and rates == sorted(rates, reverse=True)
    assert rates[15] == pytest.approx(0.0029 * 0.5**0.9 + 1e-4)


def test_thresholds_learn_unless_told_not_to(tmp_path):
    """Two trainings that differ in nothing else: the gradient moves the thresholds' convolution further than decay."""

    def moved(rate=1.0, **options):
        config = cases.tiny(block="asa", block_options=options, steps=12, threshold_rate=rate)
        train.train(config, tmp_path, overwrite=True)
        torch.manual_seed(config.seed)
        before = model.Segmenter(config, 5).head.block.alpha.weight
        return (Checkpoint.load(tmp_path / "checkpoint.pt").segmenter().head.block.alpha.weight - before).abs().max()

    decay = 1 - (1 - 0.003 * 5e-4) ** 12
    assert moved(threshold_grad=None) <= decay
    assert moved() > 100 * decay
    assert moved(rate=0) == 0
    assert moved(rate=0.1) < 0.2 * moved()


class Interrupted(Exception):
    pass


def interrupted(config: Config, out: Path, at: int, **options) -> None:
    def stop(step, model):
        if step == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train.train(config, out, after_step=stop, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumes_to_the_same_bits(optimizer, tmp_path):
    config = cases.tiny(block="asa", steps=6, optimizer=optimizer, threshold_rate=0.5)
    whole = train.train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", at=5, checkpoint_every=2)
    assert Checkpoint.load(tmp_path / "parts" / "checkpoint.pt").step == 4
    resumed = train.train(config, tmp_path / "parts", resume=True)
    assert resumed.losses == whole.losses
    np.testing.assert_array_equal(resumed.report.iou, whole.report.iou)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    states = [Checkpoint.load(tmp_path / name / "checkpoint.pt").model for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_resuming_from_the_command_line(tmp_path, capsys):
    """The checkpoint's settings hold; what contradicts them is an error, and so is a log that does not fit."""
    (tmp_path / "config.json").write_text(json.dumps(cases.tiny(steps=3, block=NO_BLOCK).to_dict()))
    out = ["--out", str(tmp_path / "run")]
    first = train.main(["--config", str(tmp_path / "config.json"), *out])
    assert "block none, 3 steps, checkpoint" in capsys.readouterr().out
    assert train.main([*out, "--resume"]).losses == first.losses
    for arguments, message in (
        (["--steps", "4"], "the checkpoint has steps=3, this run 4"),
        (["--set", "channels=8"], "the checkpoint has channels=16, this run 8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train.main([*out, "--resume", *arguments])
    log = tmp_path / "run" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(CheckpointError, match=r"log\.jsonl has 2 steps, its checkpoint 3"):
        train.main([*out, "--resume"])
    log.unlink()
    with pytest.raises(FileError, match=r"log\.jsonl: No such file or directory"):
        train.main([*out, "--resume"])


def test_resuming_keeps_precision_and_parts(tmp_path):
    """They are the checkpoint's where nothing else is asked for, which would change the losses."""
    config, out = cases.tiny(steps=2, block=NO_BLOCK), tmp_path / "run"
    first = train.train(config, out, accumulate=2)
    assert Checkpoint.load(out / "checkpoint.pt").arithmetic == {
        "precision": "no", "processes * accumulate": 2, "pictures per batch norm": 1,
    }  # fmt: skip
    assert train.train(config, out, resume=True).losses == first.losses
    with pytest.raises(CheckpointError, match=r"has processes \* accumulate=2, this run 1"):
        train.train(config, out, resume=True, accumulate=1)
    AcceleratorState._reset_state()  # a process has one precision; this one has had another
    try:
        with pytest.raises(CheckpointError, match="the checkpoint has precision='no', this run 'bf16'"):
            train.train(config, out, resume=True, precision="bf16")
    finally:
        AcceleratorState._reset_state()


def test_a_checkpoint_is_not_lost_by_accident(tmp_path):
    config = cases.tiny(steps=1, block=NO_BLOCK)
    train.train(config, tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")]
    with pytest.raises(CheckpointError, match="holds a checkpoint: expected --resume, --overwrite or another --out"):
        train.train(config, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")] == before
    interrupted(config.replace(steps=3), tmp_path, at=1, overwrite=True)
    assert not (tmp_path / "checkpoint.pt").exists()  # its log is gone: it would be of no use
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("device", "pictures"), [("cpu", 2), ("cuda", 4)])
def test_processes_are_passes_on_cpus_only(device, pictures):
    """Batch norm is synchronised among processes on GPUs."""
    accelerator = SimpleNamespace(num_processes=2, device=torch.device(device), mixed_precision="no")
    told = train.arithmetic_of(cases.tiny(batch_size=8), accelerator, accumulate=2)
    assert told == {"precision": "no", "processes * accumulate": 4, "pictures per batch norm": pictures}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_ends_training_with_one_line(workers, tmp_path):
    root = cases.ade20k(tmp_path, [1, 151])
    config = cases.tiny(data="ade20k", data_options={}, crop=(12, 16), steps=1, block=NO_BLOCK)
    with pytest.raises(SystemExit, match=r"^error: \S*\.png holds the label 151, expected 0 to 150$"):
        cli.main_of(lambda: train.train(config, tmp_path / "run", root, workers=workers))


def test_options_of_the_block_are_added_to_the_files(tmp_path):
    def config(*arguments):
        (tmp_path / "config.json").write_text(json.dumps(cases.tiny(block="asa", block_options={"topk": 9}).to_dict()))
        given = ["--config", str(tmp_path / "config.json"), "--steps", "1", "--overwrite", "--out", str(tmp_path)]
        train.main([*given, *arguments])
        return Checkpoint.load(tmp_path / "checkpoint.pt").settings()

    assert config("--set", 'block_options={"norm":"batch"}').options == {"topk": 9, "norm": "batch"}
    both = config("--set", 'block_options={"norm":"batch"}', "--set", "dropout=0.5", "seed=3")
    assert (both.options, both.dropout, both.seed) == ({"topk": 9, "norm": "batch"}, 0.5, 3)
    assert config("--block", "non_local").options == {}


@pytest.mark.parametrize("block", [NO_BLOCK, *blocks.available()])
def test_every_block_in_the_published_network(block, tmp_path):
    """From the command line, on a data set whose file has options for another block; one step of a narrow network."""
    root = cases.ade20k(tmp_path, [1, 2, 0])
    narrow = deep().to_dict()
    settings = {name: narrow[name] for name in ("backbone", "channels", "auxiliary_channels")}
    settings |= {"crop": [64, 72], "resize": [128, 64], "batch_size": 2, "steps": 1}
    command = ["--data", "ade20k", "--root", str(root), "--out", str(tmp_path / "run"), "--block", block]
    result = train.main([*command, "--set", *(f"{name}={json.dumps(value)}" for name, value in settings.items())])
    config = Checkpoint.load(tmp_path / "run" / "checkpoint.pt").settings()
    assert len(result.losses) == 1 and config.block == block and config.output_stride == 8
    assert config.options == ({"norm": "batch"} if block in ("asa", "non_local") else {})


def test_accumulation_changes_rounding_and_batch_norm_only(tmp_path):
    """Without batch norm's statistics in between, one pass or two are the same step."""
    config = cases.tiny(steps=1, block=NO_BLOCK, dropout=0.0)
    one, two = (train.train(config, tmp_path / str(n), accumulate=n).losses[0] for n in (1, 2))
    assert one != two and two == pytest.approx(one, rel=0.05)


def test_bfloat16(trained, tmp_path):
    """Other losses than in float32, by rounding; resuming keeps to it."""
    config = cases.tiny(block="asa", steps=3)
    AcceleratorState._reset_state()  # a process has one precision; this one has had another
    try:
        losses = train.train(config, tmp_path / "bf16", precision="bf16").losses
        interrupted(config, tmp_path / "parts", at=2, precision="bf16", checkpoint_every=1)
        AcceleratorState._reset_state()
        assert train.train(config, tmp_path / "parts", resume=True).losses == losses
    finally:
        AcceleratorState._reset_state()
    expected = train.train(config, tmp_path).losses
    assert losses != expected
    np.testing.assert_allclose(losses, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--set", "steps"], "--set takes NAME=VALUE, got 'steps'"),
        (["--set", "crop=64"], "crop must be two integers >= 1, got crop=64"),
        (["--steps", "0"], "steps must be an integer >= 1, got steps=0"),
        (["--block", "sparse"], "block must be one of none, asa"),
        (
            ["--accumulate", "3", "--steps", "1"],
            "multiple of processes * accumulate = 1 * 3, got 8",
        ),
        (["--shard", "--steps", "1"], "--shard needs several processes: start them with torchrun"),
        (["--data", "cityscapes"], "cityscapes needs --root"),
        (["--data", "ade20k", "--root", "nowhere"], "folder nowhere is missing"),
        (["--resume"], "there is no checkpoint"),
        (["--set", "learning_rate=1e30", "--steps", "3"], "lower learning_rate"),
    ],
)
def test_trainings_that_cannot_be(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main_of(lambda: train.main([*arguments, "--out", str(tmp_path)]))
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_training_on_the_layout_of_a_real_data_set(tmp_path):
    """From folder to checkpoint, evaluation of it included."""
    root = cases.cityscapes(tmp_path / "city", [7, 11, 0])
    config = cases.tiny(
        data="cityscapes", data_options={}, crop=(12, 16), ratio=(1.0, 2.0), steps=2, window=(8, 8), stride=(4, 4),
        block=NO_BLOCK,
    )  # fmt: skip
    report = train.train(config, tmp_path / "run", root).report
    assert len(report.classes) == 19 and 0 <= report.miou <= 1
    again = evaluate.main([str(tmp_path / "run" / "checkpoint.pt"), "--root", str(root)])
    np.testing.assert_array_equal(again.iou, report.iou)
    with pytest.raises(ConfigError, match=r"crop \[30, 50\] is larger than .*leftImg8bit\.png, at most \[24, 40\]"):
        train.train(config.replace(crop=(30, 50)), tmp_path / "large", root)


# Several processes.


def in_two_processes(*command: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_two_processes(tmp_path):
    """Two processes under DDP, and sharded, give the losses of one that takes its batch in two parts.

    On a CPU every process normalises its own part, dropout is seeded by part, and a sum of two numbers does not depend
    on their order: DDP gives the same bits. FSDP2 may round gradients elsewhere. Running statistics are the first
    process's, of its part alone, so a report is compared with that of its checkpoint.
    """
    # one process slides windows over more pictures than the other, and over larger ones
    settings = {"steps": 4, "block": "asa", "threshold_rate": 0.5, "window": [32, 32], "stride": [32, 32]}
    result = in_two_processes(str(ROOT / "tests" / "segmentation_ranks.py"), str(tmp_path), json.dumps(settings))
    config, iou = cases.tiny(**settings), []

    def look(step, network):
        if step == 2:
            iou.extend(cases.iou_in_the_midst(network, config))

    expected = train.train(config, tmp_path / "alone", accumulate=2, after_step=look)
    np.testing.assert_allclose(json.loads((tmp_path / "iou.json").read_text()), iou, atol=0.002)
    model_of = {}
    for name in ("alone", "ddp", "fsdp", "resumed"):
        losses = [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        np.testing.assert_allclose(losses, expected.losses, rtol=0 if name == "ddp" else 1e-5, err_msg=name)
        checkpoint = Checkpoint.load(tmp_path / name / "checkpoint.pt")
        assert checkpoint.step == 4
        model_of[name] = dict(checkpoint.segmenter().named_parameters())
    for name, weights in model_of.items():
        for key, weight in weights.items():
            distance = (weight - model_of["alone"][key]).abs().max()
            assert distance <= (0 if name == "ddp" else 1e-5), (name, key, distance)
    assert result.stdout.count("pixel accuracy") == 2  # one process speaks
    network = Checkpoint.load(tmp_path / "ddp" / "checkpoint.pt").segmenter()
    assert str(evaluate.evaluate(network, data.build(config, None, False), config)) in result.stdout


@pytest.mark.slow
def test_two_processes_share_the_pictures(trained):
    """Of three the first takes two, as its bar says, and one process speaks."""
    path = str(trained[0] / "checkpoint.pt")
    expected = evaluate.main([path])  # by one thread, as there: where two classes are nearly equal, rounding decides
    result = in_two_processes("-m", "examples.segmentation.evaluate", path)
    assert str(expected) in result.stdout and result.stdout.count("pixel accuracy") == 1
    assert "0/2" in result.stderr and "0/3" not in result.stderr


# Checkpoints.


def saved(trained, path: Path, **changes) -> Path:
    dataclasses.replace(Checkpoint.load(trained[0] / "checkpoint.pt"), **changes).save(path)
    return path


class Foreign:
    pass


def test_checkpoints_that_cannot_be_read(trained, tmp_path):
    good, bad = trained[0] / "checkpoint.pt", tmp_path / "bad.pt"
    cases_of = {
        "there is no checkpoint": lambda: None,
        "is broken or no checkpoint": lambda: bad.write_bytes(good.read_bytes()[:-1000]),
        "is broken or no checkpoint:": lambda: bad.write_text("not weights"),
        "bad.pt' is broken or no checkpoint: it ends too early": lambda: bad.write_bytes(b""),
        "is broken or no checkpoint: Weights only": lambda: torch.save(Foreign(), bad),
        "is not from this example: expected kind": lambda: torch.save({"state_dict": {}}, bad),
        "is not from this example": lambda: torch.save([1], bad),
        "has other entries than a checkpoint, namely step": lambda: torch.save(
            {k: v for k, v in torch.load(good, weights_only=True).items() if k != "step"}, bad
        ),
    }
    for message, write in cases_of.items():
        write()
        with pytest.raises(CheckpointError) as error:
            Checkpoint.load(bad)
        assert message in str(error.value) and "bad.pt" in str(error.value)


def test_checkpoints_that_do_not_fit(trained, tmp_path):
    checkpoint = Checkpoint.load(trained[0] / "checkpoint.pt")
    fewer = saved(trained, tmp_path / "fewer.pt", classes=checkpoint.classes[:-1])
    with pytest.raises(CheckpointError, match=r"has 4 classes \(.*, checks\), the data 5 \(.*, rings\)"):
        evaluate.main([str(fewer)])
    with pytest.raises(CheckpointError, match=r"do not fit its config: size mismatch for head\.classifier"):
        Checkpoint.load(fewer).segmenter()
    other = saved(trained, tmp_path / "other.pt", config=checkpoint.config | {"channels": 8})
    with pytest.raises(CheckpointError, match=r"do not fit its config: size mismatch for head\.before.*, and \d+ more"):
        predict.main([str(other), "--shape", "0", "--out", str(tmp_path)])
    none = saved(trained, tmp_path / "none.pt", config=None)
    with pytest.raises(CheckpointError, match="config does not fit: settings must be an object"):
        Checkpoint.load(none).settings()
    newer = saved(trained, tmp_path / "newer.pt", config=checkpoint.config | {"sharpness": 8})
    with pytest.raises(CheckpointError, match="config does not fit: unknown setting 'sharpness'"):
        Checkpoint.load(newer).settings()


# Pictures, tables, published heads.


def test_evaluate_gives_the_figures_of_training(trained, capsys):
    out, result = trained
    report = evaluate.main([str(out / "checkpoint.pt")])
    np.testing.assert_array_equal(report.iou, result.report.iou)
    text = capsys.readouterr().out
    assert "block asa, 30 steps, 3 pictures" in text and f"{100 * report.iou[0]:.2f}" in text
    others = (["--scales", "1", "1.5", "--flip"], ["--window", "32", "32", "--stride", "16", "32"])
    for arguments in others:
        assert not np.array_equal(evaluate.main([str(out / "checkpoint.pt"), *arguments]).iou, report.iou)


def test_predict_writes_overlays(trained, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "street.jpg"
    cases.write(picture, np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    out = tmp_path / "out"
    shapes = ["--shape", "2", "0", "--shape", "1"]
    drawn, draw = [], predict.draw
    monkeypatch.setattr(predict, "draw", lambda *arguments: drawn.append(arguments[2]) or draw(*arguments))
    predict.main([str(trained[0] / "checkpoint.pt"), str(picture), *shapes, "--out", str(out)])
    assert [x.shape for x in drawn] == [(70, 90), *[(64, 64)] * 3] and max(x.max() for x in drawn) < 5
    names = ("street.png", "shape2.png", "shape0.png", "shape1.png")
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert all(np.asarray(PIL.Image.open(out / name)).std() > 1 for name in names)
    image, palette = np.full((1, 2, 3), 100, np.uint8), np.array([(0, 0, 0), (200, 100, 0)], np.uint8)
    np.testing.assert_array_equal(predict.overlay(image, np.array([[0, 1]]), palette), [[(40,) * 3, (160, 100, 40)]])


def test_attend_shows_what_the_block_does(trained, tmp_path):
    """The weights of the last map give the block's output, and the numbers of survivors are the library's."""
    checkpoint = Checkpoint.load(trained[0] / "checkpoint.pt")
    network = checkpoint.segmenter()
    block = network.head.block
    with torch.no_grad():
        block.alpha.weight.zero_()
        block.alpha.bias.fill_(1.0)  # about as many weigh more than the mean as less
    image = data.build(checkpoint.settings(), None, training=False)[0].image
    x = attend.block_input(network, normalise(image)[None])
    tokens = block.tokens(x)
    _, stats = asa_attention(**tokens | {"beta": None}, return_stats=True)
    keep_some = stats.survivors[0, 0].nonzero().flatten().tolist()
    positions = [divmod(i, 16) for i in (keep_some[0], keep_some[-1])]
    for (row, column), maps in zip(positions, attend.weight_maps(block, x, positions), strict=True):
        dense, adaptive, reciprocal, local = maps
        counts = [np.count_nonzero(w) for w in (dense, adaptive, reciprocal, local)]
        assert counts[0] == 256 > counts[1] >= counts[2] > 0 and counts[2] <= counts[3] <= counts[2] + 9
        assert (adaptive[reciprocal > 0] > 0).all() and (local[reciprocal > 0] > 0).all()
        for weights in (dense, adaptive, reciprocal, local):
            assert weights.sum() == pytest.approx(1, abs=1e-5)
        value = tokens["value"][0, 0]
        out = block.proj((torch.from_numpy(local).flatten() @ value)[None, :, None, None])[0, :, 0, 0]
        torch.testing.assert_close(x[0, :, row, column] + out, block(x)[0, :, row, column])
    path = tmp_path / "attend.png"
    command = [str(trained[0] / "checkpoint.pt"), "--shape", "1", "--out", str(path)]
    maps = attend.main([*command, "--pixel", "8,60", "--pixel", "63,0"])
    assert list(maps) == [(8, 60), (63, 0)] and all(w.shape == (16, 16) for of in maps.values() for w in of)
    assert np.asarray(PIL.Image.open(path)).std() > 1


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evaluate", ["--scales", "0"], "--scales must be > 0 and finite, got 0"),
        ("evaluate", ["--scales", "1", "nan"], "--scales must be > 0 and finite, got nan"),
        ("evaluate", ["--root", "."], "leave --root out"),
        ("evaluate", ["--window", "32", "32"], "stride must be given if and only if window is"),
        ("predict", [], "no picture: expected files, or --shape NUMBER"),
        ("predict", ["--shape", "3"], "--shape must be from 0 to 2, got 3"),
        ("predict", [__file__], "as a picture"),
        ("predict", ["--shape", "0", "--out", __file__], f"{__file__} is no folder"),
        ("attend", ["--pixel", "0,0"], "expected one picture: a file or --shape NUMBER"),
        ("attend", ["--shape", "0"], "no window to click in here: give --pixel ROW,COLUMN"),
        ("attend", ["--shape", "0", "--pixel", "64,0"], "pixel 64,0 lies outside the picture of 64 x 64"),
        ("attend", ["--shape", "0", "--pixel", "5"], "--pixel"),
        ("attend", ["--shape", "0", "--pixel", "5,5", "--out", "no/such.png"], "there is no folder 'no'"),
        ("attend", ["--shape", "0", "--pixel", "5,5", "--out", "such.txt"], "--out must end in .png, .jpg, .pdf"),
    ],
)
def test_commands_that_cannot_be(command, arguments, message, trained, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main_of(lambda: COMMANDS[command].main([str(trained[0] / "checkpoint.pt"), *arguments]))
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_attend_needs_the_right_block(trained, tmp_path):
    config = Checkpoint.load(trained[0] / "checkpoint.pt").config | {"block": "none"}
    path = saved(trained, tmp_path / "none.pt", config=config)
    with pytest.raises(ConfigError, match="attend shows block 'asa', the checkpoint has 'none'"):
        attend.main([str(path), "--shape", "0", "--pixel", "0,0"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        COMMANDS[command].main(["--help"])
    assert end.value.code == 0 and "python -m examples.segmentation" in capsys.readouterr().out


@pytest.mark.slow  # loads everything once more
def test_runs_as_documented():
    command = [sys.executable, "-m", "examples.segmentation.train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0 and "--block" in result.stdout


PUBLISHED = {
    "asa": {
        "query": "theta.conv", "key": "phi.conv", "value": "g.conv", "proj": "conv_out.conv", "norm": "conv_out.bn",
        "alpha": "se.0", "beta": "se2.0",
    },
    "none": {},
}  # fmt: skip
HEADS = {
    "head.before": "decode_head.convs.0", "head.after": "decode_head.convs.1", "head.join": "decode_head.conv_cat",
    "auxiliary.0": "auxiliary_head.convs.0",
}  # fmt: skip


def published(network: model.Segmenter, block: str) -> dict[str, torch.Tensor]:
    """Return a network's weights under the names that a published checkpoint has for them."""
    names = {}
    for ours, theirs in HEADS.items():
        names |= {f"{ours}.0": f"{theirs}.conv", f"{ours}.1": f"{theirs}.bn"}
    names |= {"head.classifier.1": "decode_head.conv_seg", "auxiliary.2": "auxiliary_head.conv_seg"}
    names |= {f"head.block.{ours}": f"decode_head.asa_block.{theirs}" for ours, theirs in PUBLISHED[block].items()}
    state = {"backbone.stem.0.weight": torch.zeros(1)}
    for key, tensor in network.state_dict().items():
        if not key.startswith("backbone."):
            module, _, parameter = key.rpartition(".")
            state[f"{names[module]}.{parameter}"] = tensor
    return state


@pytest.mark.parametrize("block", PUBLISHED)
def test_published_heads_load(block):
    config = cases.tiny(block=block, block_options={"norm": "batch"} if block == "asa" else {})
    source, target = (randomised(model.Segmenter(config, 5)) for _ in range(2))
    renamed = from_upstream(published(source, block), block)
    missing, unexpected = target.load_state_dict(renamed, strict=False)
    assert not unexpected and all(key.startswith("backbone.") for key in missing)
    features = torch.randn(2, 16, 6, 7)
    torch.testing.assert_close(target.head(features), source.head(features), rtol=0, atol=0)
    torch.testing.assert_close(target.auxiliary(features), source.auxiliary(features), rtol=0, atol=0)


def test_states_that_hold_no_published_head():
    with pytest.raises(ValueError, match=r"no published head: expected keys decode_head\.\*, got a, b"):
        from_upstream({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown key 'auxiliary_head\.extra\.weight'"):
        from_upstream({"auxiliary_head.extra.weight": torch.zeros(1)})
    state = published(model.Segmenter(cases.tiny(block="asa"), 5), "asa")
    with pytest.raises(ValueError, match=r"has 'theta\.conv\.weight' between its convolutions, expected block 'none'"):
        from_upstream(state, "none")
    with pytest.raises(ValueError, match="has no block between its convolutions, expected block 'asa'"):
        from_upstream({key: tensor for key, tensor in state.items() if "asa_block" not in key})
    with pytest.raises(ValueError, match=r"unknown key 'decode_head\.gamma' in a published head"):
        from_upstream(state | {"decode_head.gamma": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown key 'zeta\.weight'"):
        from_upstream(state | {"decode_head.asa_block.zeta.weight": torch.zeros(1)})
