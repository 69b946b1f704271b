"""DistributedDataParallel: every parameter gets a gradient, so that no reduction waits for one. And FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asa_ops.nn import AdaptiveSparseAttention, ThresholdSchedule, monitor, parameter_groups


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"threshold_grad": None}, {"published": True}, {"impl": "reference"}], ids=str)
@pytest.mark.filterwarnings("error")
def test_trains_under_ddp(one_process, options):
    block = AdaptiveSparseAttention(8, **options)
    torch.nn.init.normal_(block.proj.weight)
    block = DistributedDataParallel(block)  # find_unused_parameters=False
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x = torch.randn(2, 8, 5, 4)
    losses = []
    for _ in range(3):  # a second step fails if a parameter of the first had no gradient
        optimizer.zero_grad()
        loss = (block(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in block.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_schedule_groups_and_monitor_of_a_distributed_block(one_process, wrap):
    block, x = AdaptiveSparseAttention(8), torch.randn(2, 8, 5, 4)
    torch.nn.init.normal_(block.proj.weight)
    torch.nn.init.constant_(block.alpha.bias, 1.0)
    schedule = ThresholdSchedule(block, 1, 2)
    wrapped = wrap(block)
    groups = parameter_groups(wrapped, 0.01)
    assert [len(group["params"]) for group in groups] == [8, 4]
    optimizer, densities = torch.optim.SGD(groups), []
    with monitor(wrapped) as watched:
        for _ in range(3):
            wrapped(x).square().mean().backward()
            optimizer.step()
            schedule.step()
            statistics = watched.statistics()
            densities += [value for name, value in statistics.items() if name.endswith("density")]
    assert densities[:2] == [1, 1] and 0 < densities[2] < 1
