"""Started by torchrun: trains one run under DDP and sharded, and writes its losses; see test_segmentation_training.py.

The sharded one that is resumed is evaluated in the midst of training too, on a picture for each process.
"""

import json
import sys
from pathlib import Path

import segmentation_cases as cases
from torch import distributed as dist

from examples.ranks import leave
from examples.segmentation.train import main, train

out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
command = [*cases.in_a_file(cases.tiny(**settings), out), "--checkpoint-every", "2"]
main([*command, "--out", str(out / "ddp")])
main([*command, "--out", str(out / "fsdp"), "--shard"])


def interrupt(step, model):
    if step == 2:
        iou = cases.iou_in_the_midst(model, cases.tiny(**settings))
        if dist.get_rank() == 0:
            (out / "iou.json").write_text(json.dumps(iou))
    if step == 3:
        raise KeyboardInterrupt


try:
    train(cases.tiny(**settings), out / "resumed", shard=True, checkpoint_every=2, after_step=interrupt)
except KeyboardInterrupt:
    train(cases.tiny(**settings), out / "resumed", shard=True, resume=True)
leave()
