"""The block on strips of a map: outputs, gradients and statistics are those of one process."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
from implementations import slow
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from asa_ops.distributed import parallelize, strips
from asa_ops.nn import AdaptiveSparseAttention, NonLocal, ThresholdSchedule, monitor

pytestmark = pytest.mark.xdist_group("processes")
SHAPE = (2, 8, 9, 13)  # two blocks of tokens
HEIGHTS = [(9,), (4, 5), (0, 9), (1, 1, 7), (3, 0, 1, 5), (9, 0, 0, 0)]  # of the strips; their halo is one row
CASES = {
    "plain": {},
    "heads": {"heads": 2, "threshold_activation": "softplus"},
    "no_local_block": {"local": False},
    "topk": {"topk": 6, "window": 5},
    "gaussian": {"mode": "gaussian"},
    "no_gradient": {"threshold_grad": None},
    "reference": {"impl": "reference"},
    "batch_norm": {"norm": "batch"},
    "batch_norm_in_use": {"norm": "batch", "training": False},
    "cumulative_batch_norm": {"norm": "batch", "momentum": None},
    "batch_norm_without_memory": {"norm": "batch", "memory": False},
}


def block_of(training: bool = True, momentum: float | None = 0.1, memory: bool = True, **options):
    torch.manual_seed(1)
    block = AdaptiveSparseAttention(SHAPE[1], **options).double().train(training)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.constant_(block.alpha.bias, 1.0)
    if isinstance(block.norm, nn.BatchNorm2d):
        block.norm.momentum = momentum
        nn.init.uniform_(block.norm.running_var, 0.5, 2)
        if not memory:
            block.norm.running_mean = block.norm.running_var = None
            block.norm.track_running_stats = False
    return block


def strips_of(x: torch.Tensor, heights: tuple[int, ...]) -> list[torch.Tensor]:
    return [x[:, :, a:b] for a, b in pairwise(accumulate(heights, initial=0))]


def x_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    return tuple(torch.randn(SHAPE, generator=random, dtype=torch.float64) for _ in range(2))


def run(block: nn.Module, x: torch.Tensor, weights: torch.Tensor, times: int = 1) -> tuple:
    """Return output, gradients of x and parameters, and buffers."""
    for _ in range(times):
        x = x.detach().requires_grad_()
        block.zero_grad()
        y = block(x)
        (y * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return y.detach(), x.grad, gradients, dict(block.named_buffers())


def of_process(group, rank: int, options: dict, heights: tuple[int, ...], times: int) -> tuple:
    block = block_of(**options)
    names = list(block.state_dict())
    assert parallelize(block, group) is block and list(block.state_dict()) == names
    x, weights = (strips_of(x, heights)[rank] for x in x_and_weights())
    return run(block, x, weights, times)


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def check(answers: list[tuple], expected: tuple) -> None:
    ys, x_grads, gradients, buffers = zip(*answers, strict=True)
    close(torch.cat(ys, 2), expected[0])
    close(torch.cat(x_grads, 2), expected[1])
    close({name: sum(each[name] for each in gradients) for name in expected[2]}, expected[2])
    for each in buffers:
        close(each, expected[3])


@pytest.mark.parametrize("heights", [slow(x, when=len(x) == 1 or 9 in x) for x in HEIGHTS], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_strips_are_those_of_one_process(processes, name, heights):
    options, times = CASES[name], 2 if "norm" in CASES[name] else 1
    x, weights = x_and_weights()
    block = block_of(**options)
    expected = run(block, x, weights, times)
    thresholds = block.tokens(x)["alpha"]
    assert (thresholds > 0).double().mean() > 0.1 and thresholds.std() > 0.1  # they matter
    check(processes.run(len(heights), of_process, options, heights, times), expected)


def watched_of_process(group, rank: int, heights: tuple[int, ...]) -> dict[str, float]:
    block = block_of() if group is None else parallelize(block_of(), group)
    schedule = ThresholdSchedule(block, 0, 2)
    schedule.step()
    with monitor(block, tiles=group is not None) as watched:  # of strips there are no tiles
        block(strips_of(x_and_weights()[0], heights)[rank])
        return watched.statistics()


def test_statistics_of_strips(processes):
    """Each process has those of its rows."""
    heights = (4, 5)
    whole, parts = watched_of_process(None, 0, (9,)), processes.run(2, watched_of_process, heights)
    assert {name: x for name, x in whole.items() if "_" not in name} == pytest.approx(
        {
            name: sum(h * part[name] for h, part in zip(heights, parts, strict=True)) / 9
            for name in ("survivors", "density", "mass")
        }
    )
    assert all(part.keys() == whole.keys() for part in parts)


def one_map_of_process(group, rank: int, heights: tuple[int, ...]) -> torch.Tensor:
    return parallelize(block_of(), group)(strips_of(x_and_weights()[0][:1], heights)[rank]).detach()


@pytest.mark.parametrize("heights", [(4, 5), (1, 0, 8)], ids=str)
def test_one_map_alone(processes, heights):
    """Dimensions of one entry, whose strides say nothing."""
    answers = processes.run(len(heights), one_map_of_process, heights)
    close(torch.cat(answers, 2), block_of()(x_and_weights()[0][:1]).detach())


def halo_of_process(group, rank: int, x: torch.Tensor, heights: tuple[int, ...]) -> tuple:
    x = strips_of(x, heights)[rank].clone().requires_grad_()
    halo = strips.with_halo(x, group, heights)
    (halo * (1 + torch.arange(halo.numel()).view(halo.shape) % 7)).sum().backward()
    return halo.detach(), x.grad


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("heights", HEIGHTS, ids=str)
def test_halo_is_exact(processes, heights, batch):
    x = torch.randint(100, (batch, *SHAPE[1:])).double().requires_grad_()
    answers = processes.run(len(heights), halo_of_process, x.detach(), heights)
    padded = nn.functional.pad(x, (0, 0, 1, 1))
    at, loss = 0, 0
    for (halo, _), height in zip(answers, heights, strict=True):
        expected = padded[:, :, at : at + height + 2]
        if height:
            assert torch.equal(halo, expected)
            loss = loss + (expected * (1 + torch.arange(halo.numel()).view(halo.shape) % 7)).sum()
        at += height
    loss.backward()
    assert torch.equal(torch.cat([grad for _, grad in answers], 2), x.grad)


def stack_of_process(group, rank: int, heights: tuple[int, ...]) -> tuple:
    blocks = nn.Sequential(block_of(), nn.ReLU(), block_of(norm="batch"))
    for i in (0, 2):
        parallelize(blocks[i], group)
    x, weights = (strips_of(x, heights)[rank] for x in x_and_weights())
    return run(blocks, x, weights)


def test_several_blocks(processes):
    blocks = nn.Sequential(block_of(), nn.ReLU(), block_of(norm="batch"))
    check(processes.run(3, stack_of_process, (4, 0, 5)), run(blocks, *x_and_weights()))


def mean_of_process(group, rank: int, heights: tuple[int, ...]) -> dict:
    block = DistributedDataParallel(parallelize(block_of(norm="batch"), group), process_group=group)
    x = strips_of(x_and_weights()[0], heights)[rank]
    loss = (block(x).square().sum() / (SHAPE[0] * SHAPE[1] * SHAPE[3])) * len(heights) / SHAPE[2]
    loss.backward()
    return {name: parameter.grad for name, parameter in block.module.named_parameters()}


@pytest.mark.parametrize("heights", [(4, 5), (3, 0, 1, 5)], ids=str)
def test_under_ddp_with_the_loss_as_documented(processes, heights):
    block = block_of(norm="batch")
    block(x_and_weights()[0]).square().mean().backward()
    for gradients in processes.run(len(heights), mean_of_process, heights):
        close(gradients, {name: parameter.grad for name, parameter in block.named_parameters()})


def dtensor_of_process(group, rank: int) -> tuple:
    mesh = DeviceMesh.from_group(group, "cpu")
    block = parallelize(block_of(), mesh)
    x, weights = (distribute_tensor(x, mesh, [Shard(2)]) for x in x_and_weights())
    x.requires_grad_()
    y = block(x)
    assert y.placements == (Shard(2),) and y.shape == x.shape and y.to_local().shape == x.to_local().shape
    (y * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return y.detach().full_tensor(), x.grad.full_tensor(), gradients


@pytest.mark.parametrize("size", [1, 2, 4])  # 4: strips of 3, 3, 3 and no rows
def test_dtensors(processes, size):
    expected = run(block_of(), *x_and_weights())
    answers = processes.run(size, dtensor_of_process)
    for y, x_grad, _ in answers:
        close((y, x_grad), expected[:2])
    close({name: sum(gradients[name] for _, _, gradients in answers) for name in expected[2]}, expected[2])


def error_of_process(group, rank: int, kind: str) -> tuple[type, str]:
    block, x = parallelize(block_of(), group), x_and_weights()[0][:, :, :3]
    if kind == "placements":
        x = distribute_tensor(x, DeviceMesh.from_group(group, "cpu"), [Shard(3)])
    elif kind == "no rows":
        x = x[:, :, :0]
    elif kind == "rank of x":
        x = x[0]
    elif kind == "published":
        block = AdaptiveSparseAttention(8, published=True)
    elif kind == "dims":
        block = AdaptiveSparseAttention(8, dims=3)
    elif kind == "other":
        block = NonLocal(8)
    elif rank == 1:
        changed = {
            "width": lambda: x[..., :12],
            "channels": lambda: x[:, :4],
            "requires_grad": x.clone().requires_grad_,
        }
        x = changed[kind]() if kind in changed else x
        block.train(kind != "mode")
    try:
        (parallelize(block, group) if kind in ("published", "dims", "other") else block)(x)
    except Exception as error:
        return type(error), str(error)
    return type(None), ""


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("width", ValueError, "same batch and width, got (2, 13) in process 0 and (2, 12) in process 1"),
        ("requires_grad", ValueError, "same requires_grad, got False in process 0 and True in process 1"),
        ("mode", ValueError, "same mode, training or not, got True in process 0 and False in process 1"),
        ("channels", ValueError, "process 1 of 2: x must have C = in_channels = 8 channels"),
        ("rank of x", ValueError, "process 0 of 2: x must have the 4 dimensions [B, C, rows, W]"),
        ("no rows", ValueError, "x must have rows in some process, got none"),
        ("placements", ValueError, "x must have the placements [Shard(2)] on the group's mesh"),
        ("published", ValueError, "published=True is dense on one process"),
        ("dims", ValueError, "block must have dims=2, strips are rows of maps [B, C, H, W], got dims=3"),
        ("other", TypeError, "block must be an AdaptiveSparseAttention, got NonLocal"),
    ],
)
def test_errors_are_those_of_every_process(processes, kind, error, message):
    for found, text in processes.run(2, error_of_process, kind):
        assert found is error and message in text


def test_needs_a_group():
    with pytest.raises(RuntimeError, match="no process group: call"):
        parallelize(AdaptiveSparseAttention(8))


def again_of_process(group, rank: int) -> torch.Tensor:
    block = parallelize(parallelize(block_of(), group))
    assert block.group is dist.group.WORLD
    return block(strips_of(x_and_weights()[0], (5, 4, 0, 0))[rank]).detach()


def test_all_processes_are_the_default(processes):
    close(torch.cat(processes.run(4, again_of_process), 2), block_of()(x_and_weights()[0]).detach())
