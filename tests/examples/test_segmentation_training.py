"""The segmentation example's training: every block, resuming, precision, real layouts, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_cases as cases
import torch
from accelerate.state import AcceleratorState

from asa_ops import nn as blocks
from examples.files import FileError
from examples.segmentation import cli, data, evaluate, model, train
from examples.segmentation.checkpoint import Checkpoint, CheckpointError
from examples.segmentation.config import NO_BLOCK, Config, ConfigError

ROOT = Path(__file__).parents[2]
BLOCKS = [NO_BLOCK, *blocks.available()]

pytestmark = pytest.mark.usefixtures("one_thread")


def check_losses(losses: list[float]) -> None:
    assert len(losses) == 30 and np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("block", sorted({*BLOCKS} - {"asa"}))
def test_thirty_steps_with_every_block(block, tmp_path):
    options = {"factors": [4, 4]} if block == "interlaced_sparse" else {}
    check_losses(train.train(cases.tiny(block=block, block_options=options), tmp_path).losses)


def test_thirty_steps_with_adaptive_sparse_attention(trained):
    out, result = trained
    check_losses(result.losses)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps, losses, rates = ([line[x] for line in lines] for x in ("step", "loss", "learning_rate"))
    assert steps == list(range(30)) and losses == result.losses
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


# Resuming.


@pytest.fixture
def forget_precision():
    """Return what makes this process forget its precision, of which it has one; so it does before and after a test."""
    AcceleratorState._reset_state()
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


def interrupted(config: Config, out: Path, at: int, **options) -> None:
    def stop(step, model):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, out, after_step=stop, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumes_to_the_same_bits(optimizer, tmp_path):
    config = cases.tiny(block="asa", steps=6, optimizer=optimizer, threshold_rate=0.5)
    folders = tmp_path / "whole", tmp_path / "parts"
    whole = train.train(config, folders[0])
    interrupted(config, folders[1], at=5, checkpoint_every=2)
    assert Checkpoint.load(folders[1] / "checkpoint.pt").step == 4
    resumed = train.train(config, folders[1], resume=True)
    assert resumed.losses == whole.losses
    np.testing.assert_array_equal(resumed.report.iou, whole.report.iou)
    logs = [(folder / "log.jsonl").read_text() for folder in folders]
    assert logs[0] == logs[1]
    states = (Checkpoint.load(folder / "checkpoint.pt").model for folder in folders)
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_resuming_from_the_command_line(tmp_path, capsys):
    """The checkpoint's settings hold; what contradicts them is an error, and so is a log that does not fit."""
    out = ["--out", str(tmp_path / "run")]
    first = train.main([*cases.in_a_file(cases.tiny(steps=3, block=NO_BLOCK), tmp_path), *out])
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


def test_resuming_keeps_precision_and_parts(tmp_path, forget_precision):
    """They are the checkpoint's where nothing else is asked for, which would change the losses."""
    config, out = cases.tiny(steps=2, block=NO_BLOCK), tmp_path / "run"
    first = train.train(config, out, accumulate=2)
    assert Checkpoint.load(out / "checkpoint.pt").arithmetic == {
        "precision": "no", "processes * accumulate": 2, "pictures per batch norm": 1,
    }  # fmt: skip
    assert train.train(config, out, resume=True).losses == first.losses
    with pytest.raises(CheckpointError, match=r"has processes \* accumulate=2, this run 1"):
        train.train(config, out, resume=True, accumulate=1)
    forget_precision()
    with pytest.raises(CheckpointError, match="has precision='no', this run 'bf16'"):
        train.train(config, out, resume=True, precision="bf16")


def test_bfloat16(tmp_path, forget_precision):
    """Other losses than in float32, by rounding; resuming keeps to it."""
    config = cases.tiny(block="asa", steps=3)
    losses = train.train(config, tmp_path / "bf16", precision="bf16").losses
    interrupted(config, tmp_path / "parts", at=2, precision="bf16", checkpoint_every=1)
    forget_precision()
    assert train.train(config, tmp_path / "parts", resume=True).losses == losses
    forget_precision()
    expected = train.train(config, tmp_path).losses
    assert losses != expected
    np.testing.assert_allclose(losses, expected, rtol=0.05)


def test_a_checkpoint_is_not_lost_by_accident(tmp_path):
    config, written = cases.tiny(steps=1, block=NO_BLOCK), [tmp_path / "checkpoint.pt", tmp_path / "log.jsonl"]
    train.train(config, tmp_path)
    before = [path.read_bytes() for path in written]
    with pytest.raises(CheckpointError, match="holds a checkpoint: expected --resume, --overwrite or another --out"):
        train.train(config, tmp_path)
    assert [path.read_bytes() for path in written] == before
    interrupted(config.replace(steps=3), tmp_path, at=1, overwrite=True)
    assert not written[0].exists()  # its log is gone: it would be of no use
    assert len(written[1].read_text().splitlines()) == 1


# What a run depends on.


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
        given = cases.in_a_file(cases.tiny(block="asa", block_options={"topk": 9}), tmp_path)
        train.main([*given, "--steps", "1", "--overwrite", "--out", str(tmp_path), *arguments])
        return Checkpoint.load(tmp_path / "checkpoint.pt").settings()

    assert config("--set", 'block_options={"norm":"batch"}').options == {"topk": 9, "norm": "batch"}
    both = config("--set", 'block_options={"norm":"batch"}', "--set", "dropout=0.5", "seed=3")
    assert (both.options, both.dropout, both.seed) == ({"topk": 9, "norm": "batch"}, 0.5, 3)
    assert config("--block", "non_local").options == {}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_in_the_published_network(block, tmp_path):
    """From the command line, on a data set whose file has options for another block; one step of a narrow network."""
    root = cases.ade20k(tmp_path, [1, 2, 0])
    narrow = cases.deep().to_dict()
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


@pytest.mark.slow
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
        torch.testing.assert_close(weights, model_of["alone"], rtol=0, atol=0 if name == "ddp" else 1e-5)
    assert result.stdout.count("pixel accuracy") == 2  # one process speaks
    network = Checkpoint.load(tmp_path / "ddp" / "checkpoint.pt").segmenter()
    assert str(evaluate.evaluate(network, data.build(config, None, False), config)) in result.stdout


@pytest.mark.slow
def test_two_processes_share_the_pictures(checkpoint):
    """Of three the first takes two, as its bar says, and one process speaks."""
    expected = evaluate.main([str(checkpoint)])  # by one thread, as there: where classes are near, rounding decides
    result = in_two_processes("-m", "examples.segmentation.evaluate", str(checkpoint))
    assert str(expected) in result.stdout and result.stdout.count("pixel accuracy") == 1
    assert "0/2" in result.stderr and "0/3" not in result.stderr
