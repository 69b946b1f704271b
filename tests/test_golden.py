"""The module against numbers from the authors' code, float64.

``ASA_GOLDEN_DIR`` names another folder of files in the same format (tests/golden/README.md).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import dense

from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa import reference
from asa_ops.nn import AdaptiveSparseAttention

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


def check(golden: dict, tolerance: float = 1e-10) -> None:
    """Compare y, y_core, the mask and every gradient of the published mode with one file."""

    def close(actual, expected, what):
        error = (actual - expected).abs().max().item()
        assert error <= tolerance, f"{what} is off by {error:.3g}"

    block = build(golden, published=True)
    core = []
    block.proj.register_forward_pre_hook(lambda _, inputs: core.append(inputs[0].flatten(2).mT))
    x = golden["x"].requires_grad_()
    y = block(x)
    y.backward(golden["grad_out"])
    close(y, golden["y"], "y")
    close(core[0], golden["y_core"], "y_core")
    close(x.grad, golden["grad_x"], "grad_x")
    expected = AdaptiveSparseAttention.from_upstream(group(golden, "grad/"))
    for name, parameter in block.named_parameters():
        close(parameter.grad, expected[name], f"gradient of {name}")
    assert set(expected) == {name for name, _ in block.named_parameters()}
    for name, buffer in AdaptiveSparseAttention.from_upstream(group(golden, "buffer_after/")).items():
        close(block.get_buffer(name), buffer, name)
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
