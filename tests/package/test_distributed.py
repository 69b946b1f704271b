"""DistributedDataParallel: every parameter gets a gradient, so that no reduction waits for one."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from asa_ops.nn import AdaptiveSparseAttention


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
