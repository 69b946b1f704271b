"""The modules against numbers from the authors' code, float64; ``golden_files`` says where these are."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from compare import exact_scores, find_survivors, survivors
from golden_files import FOLDER, MANIFEST, OWN, SYSTEMS, GoldenError, build, check_folder, files, group, load

from asa_ops import asa_attention, criss_cross
from asa_ops.asa import reference

each_file = pytest.mark.parametrize("path", files(FOLDER), ids=lambda path: path.stem)


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"{what} is off by {error:.3g}"


def check(golden: dict, **options) -> None:
    """Compare y, every gradient, what is in between and the batch norm statistics after training with one file."""
    system = golden["meta"]["system"]
    tolerance = 1e-9 if system == "caa" else 1e-10  # its source rounds a constant to float32
    block = build(golden, **options)
    compare_in_between = IN_BETWEEN[system](block, golden, tolerance) if system in IN_BETWEEN else None
    x = golden["x"].requires_grad_()
    y = block(x)
    y.backward(golden["grad_out"])
    close(y, golden["y"], "y", tolerance)
    close(x.grad, golden["grad_x"], "grad_x", tolerance)
    expected = block.from_upstream(group(golden, "grad/"))
    assert set(expected) == {name for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        close(parameter.grad, expected[name], f"gradient of {name}", tolerance)
    for name, buffer in block.from_upstream(group(golden, "buffer_after/")).items():
        close(block.get_buffer(name), buffer, name, tolerance)
    if compare_in_between:
        compare_in_between()


def arguments(block, golden) -> tuple[list[torch.Tensor], dict]:
    """Return ([query, key, value, alpha, beta], options) of the call of asa_attention in a block."""
    options = block.tokens(golden["x"])
    return [options.pop(name) for name in ("query", "key", "value", "alpha", "beta")], options


def asa_in_between(block, golden, tolerance):
    """Return what compares the mask, and the output before its projection, after the call."""
    core = []
    block.proj.register_forward_pre_hook(lambda _, inputs: core.append(inputs[0].flatten(2).mT))

    def compare():
        close(core[0], golden["y_core"], "y_core", tolerance)
        inputs, options = arguments(block, golden)
        s, _ = exact_scores(inputs, options)
        mask = reference.published_mask(s, *inputs[3:], options["grid"], options["window"])
        close(mask[:, 0], golden["mask"], "mask", 0)

    return compare


def ccnet_in_between(block, golden, tolerance):
    """Return what compares the weights of every recurrence after the call."""
    seen = []
    block.key.register_forward_hook(lambda module, inputs, key: seen.append((block.query(inputs[0]), key)))

    def compare():
        for r in range(golden["meta"]["hyper"]["recurrence"]):
            weights = criss_cross.reference.attention(*seen[r])
            close(weights, golden[f"attention_r{r}"], f"attention_r{r}", tolerance)

    return compare


IN_BETWEEN = {"asa": asa_in_between, "ccnet": ccnet_in_between}


def test_the_files_are_those_of_the_manifest():
    check_folder(FOLDER, whole=FOLDER == OWN)


@pytest.mark.skipif(FOLDER != OWN, reason="another folder may hold files of any blocks")
def test_there_are_golden_files_of_every_block():
    assert all(files(OWN, system) for system in SYSTEMS)


@each_file
def test_equals_the_authors_code(path):
    golden = load(path)
    has_kernels = golden["meta"]["system"] == "ccnet"  # those of "asa" are compared below: the published mode is dense
    for options in [{"impl": impl} for impl in ("reference", "blocked", "cpu")] if has_kernels else [{}]:
        check(load(path), **options)


@each_file
def test_the_check_notices_a_small_change(path):
    for key in ("y", "grad_x"):
        golden = load(path)
        golden[key].view(-1)[golden[key].numel() // 2] += 1e-6
        with pytest.raises(AssertionError, match=f"^{key} is off by"):
            check(golden)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_check_notices_a_small_change_of_anything(system):
    path = files(OWN, system)[-1]  # those in training mode are the last
    whole = load(path)
    idle = {f"grad/{name}" for name in whole["meta"]["no_grad_params"]}
    compared = [key for key in whole if key.startswith(("grad/", "buffer_after/", "attention_r")) and key not in idle]
    kinds = {key.split("/")[0]: key for key in [*compared, *(key for key in ("mask", "y_core") if key in whole)]}
    for key in kinds.values():
        golden = load(path)
        golden[key].view(-1)[golden[key].numel() // 2] += 1e-6 if golden[key].is_floating_point() else 1
        with pytest.raises(AssertionError, match="is off by"):
            check(golden)


@pytest.mark.parametrize("path", files(FOLDER, "asa"), ids=lambda path: path.stem)
@pytest.mark.parametrize("impl", ["reference", "blocked", "cpu"])
@torch.no_grad()
def test_plain_semantics_against_the_authors_masks_and_outputs(path, impl):
    """Without the two artefacts: the same survivors where there are no half values, and the same output but for the
    published normaliser, which is too large by 1e-12."""
    golden = load(path)
    inputs, options = arguments(build(golden, published=False), golden)
    kept = survivors(impl, inputs, options)[:, 0]
    whole = golden["mask"] != 0.5  # a half value is the artefact: everywhere else the survivors agree
    assert torch.equal(kept[whole], golden["mask"][whole] == 1)
    if not whole.all():
        return
    s, real = exact_scores(inputs, options)
    found = find_survivors(s, inputs, options, real)
    assert torch.equal(found.non_local[:, 0], golden["mask_reciprocal"] == 1)
    assert torch.equal(found.local[:, 0], golden["mask_local"] == 1)
    out, stats = asa_attention(*inputs, **options, impl=impl, return_stats=True)
    assert torch.equal(stats.survivors[:, 0], (golden["mask"] == 1).sum(-1))
    mass = (stats.lse_kept - stats.lse).exp()  # of the softmax, held by the survivors of a row
    shrunk = out[:, 0] * (mass / (mass + 1e-12))[:, 0, :, None]
    torch.testing.assert_close(shrunk, golden["y_core"], rtol=0, atol=1e-10)


# ---- other folders: any files of any names


def folder_of(tmp_path, **names):
    """Make a folder of copies of our files, and its manifest; ``names`` are new names, without their ends."""
    for new, old in names.items():
        shutil.copy(OWN / f"{old}.npz", tmp_path / f"{new}.npz")
    (tmp_path / MANIFEST).write_text(json.dumps({"set": "copies", "files": [{"file": f"{new}.npz"} for new in names]}))
    return tmp_path


def test_names_mean_nothing(tmp_path):
    """One file of each block under another block's name, the head of one too, and some twice."""
    stems = [files(OWN, system)[-1].stem for system in SYSTEMS]
    assert "caa_p4_head" in stems
    folder = folder_of(tmp_path, **dict(zip([*stems[1:], stems[0]], stems, strict=True)), again=stems[0], head=stems[1])
    check_folder(folder)
    assert len(files(folder)) == len(SYSTEMS) + 2 and len(files(folder, "caa")) == 2
    for path in files(folder):
        check(load(path))


def test_a_head_may_lack_the_image_level(tmp_path):
    golden = load(OWN / "caa_p4_head.npz")
    golden["meta"]["hyper"]["use_image_level"] = False
    block = build(type(golden)("head", {key: x for key, x in golden.items() if "image_level" not in key}))
    close(block(golden["x"]), golden["y"][:, :8], "y", 1e-9)


WRONG_FOLDERS = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no files": (lambda folder: [path.unlink() for path in files(folder)], r"no \*.npz in "),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "there is no MANIFEST.json in "),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("files:"), "MANIFEST.json is no JSON: Expecting value"),
    "no list of files": (lambda folder: (folder / MANIFEST).write_text('["a.npz"]'), "MANIFEST.json must be .*, but: "),
    "an entry without a name": (
        lambda folder: (folder / MANIFEST).write_text('{"files": [{"system": "nl"}]}'),
        "MANIFEST.json must be .*, but: 'file'",
    ),
    "a file without entry": (
        lambda folder: shutil.copy(folder / "a.npz", folder / "c.npz"),
        r"MANIFEST.json has no entry for \['c.npz'\]",
    ),
    "an entry without file": (
        lambda folder: (folder / "b.npz").unlink(),
        r"MANIFEST.json has an entry for \['b.npz'\], but there is no such file",
    ),
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_what_is_wrong_with_a_folder_is_told(name, tmp_path):
    folder = folder_of(tmp_path, a="nl_p2_gaussian", b="sanet_p1")
    check_folder(folder)
    change, message = WRONG_FOLDERS[name]
    change(folder)
    right = name in ("no manifest", "an entry without file")  # for somebody's own choice of files
    with pytest.raises(GoldenError, match=message):
        check_folder(folder)
    with contextlib.nullcontext() if right else pytest.raises(GoldenError, match=message):
        check_folder(folder, whole=False)


def without(*names):
    """Return what takes a hyperparameter, an array or a part of the meta from the arrays of a file."""

    def change(arrays):
        meta = json.loads(str(arrays["meta"][0]))
        for name in names:
            for part in (arrays, meta, meta["hyper"]):
                part.pop(name, None)
        return arrays | ({"meta": np.array([json.dumps(meta)])} if "meta" in arrays else {})

    return change


WRONG_FILES = {
    "meta": (without("meta"), "a.npz: there is no 'meta'"),
    "system": (without("system"), "the meta of .*a.npz: there is no 'system'"),
    "hyper": (without("hyper"), "the meta of .*a.npz: there is no 'hyper'"),
    "hyperparameter": (without("sub_sample"), "the hyperparameters of .*a.npz: there is no 'sub_sample'"),
    "array": (without("grad_x"), "a.npz: there is no 'grad_x'"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_what_a_file_lacks_is_told(name, tmp_path):
    path = files(folder_of(tmp_path, a="nl_p2_gaussian"))[0]
    change, message = WRONG_FILES[name]
    with np.load(path) as file:
        arrays = change({key: file[key] for key in file.files})
    np.savez(path, **arrays)
    with pytest.raises(GoldenError, match=message):
        check(load(path))


def test_what_is_no_golden_file_is_told(tmp_path):
    path = files(folder_of(tmp_path, a="nl_p2_gaussian"))[0]
    for content in (path.read_bytes()[:3000], b"", b"PK", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(GoldenError, match=r"a\.npz is no golden file: "):
            load(path)
        assert files(tmp_path, "nl") == [] and files(tmp_path) == [path]
