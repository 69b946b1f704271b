"""Scripts import what lies beside them: their folder is on the path here, as when they are run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples"))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Thirty steps of the tiny network with adaptive sparse attention, not to be changed: the folder and the result."""
    import segmentation_cases as cases  # here, since what it imports takes seconds

    from examples.segmentation.train import train

    out = tmp_path_factory.mktemp("trained")
    return out, train(cases.tiny(block="asa"), out)


@pytest.fixture
def checkpoint(trained):
    """The path of its checkpoint."""
    return trained[0] / "checkpoint.pt"
