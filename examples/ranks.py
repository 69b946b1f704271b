"""What commands share that torchrun starts as several processes, and a user as one."""

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist


def start() -> torch.device:
    """Join the processes that torchrun started, or be the only one; return the device to compute on.

    That is a GPU if there is one for every process of this machine.
    """
    local, on_this_machine = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.device_count() >= on_this_machine else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    return device


def leave() -> NoReturn:
    """End one of several processes that has done its work.

    Threads of gloo outlive the group, which caches of DTensor hold, and one that drops a tensor while Python is torn
    down aborts the process. So Python is not torn down.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
