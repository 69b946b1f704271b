"""The page of asa_ops.explore shows exactly what reciprocal_neighbors gives."""

import base64
import functools
import html
import itertools
import json
import re
import shutil
import subprocess
import zlib

import browser
import numpy as np
import PIL.Image
import pytest
import torch

from asa_ops import NeighborGraph, explore, reciprocal_neighbors
from asa_ops.explore import __main__ as command
from asa_ops.explore import document, pairs, pictures

PICTURE = torch.randint(0, 256, (9, 13, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def element(page: str, name: str) -> str:
    return re.search(rf'<script[^>]* id="{name}"[^>]*>(.*?)</script>', page, re.DOTALL)[1]


def streams_of(page: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the header of a page and its arrays of bytes."""
    header = json.loads(element(page, "header"))
    data = np.frombuffer(zlib.decompress(base64.b64decode(element(page, "data"))), np.uint8)
    ends = np.cumsum(list(header["streams"].values()))
    assert len(data) == ends[-1]
    return header, dict(zip(header["streams"], np.split(data, ends[:-1]), strict=True))


def numbers(stream: np.ndarray) -> list[int]:
    found, shift, value = [], 0, 0
    for byte in stream.tolist():
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            shift, value = 0, 0
    return found


class Shown:
    """What a page holds, read as asa_ops/explore/document.py describes it: for pairs i, j in turn the bits and the
    weight."""

    def __init__(self, page: str) -> None:
        self.header, found = streams_of(page)
        counts, steps = numbers(found["counts"]), numbers(found["steps"])
        self.n = len(counts)
        assert len(steps) == self.header["pairs"] == sum(counts)
        first = np.repeat(np.arange(self.n), counts)
        starts = np.cumsum(counts) - counts
        total = np.cumsum([0, *steps])  # within a row they add up to the distance from its pixel
        second = first + total[1:] - np.repeat(total[starts], counts)
        ways = []
        for suffix, (i, j) in (("", (first, second)), ("_back", (second, first))):
            bits = [found[name] ^ (found[name + suffix] if suffix else 0) for name in ("alpha", "beta")]
            weight = found["weight"]
            if suffix:
                weight = weight + found["weight_back"] + found["base"][second] - found["base"][first]  # modulo 256
            ways.append((i, j, *bits, weight))
        self.i, self.j, self.alpha, self.beta, self.weight = map(np.concatenate, zip(*ways, strict=True))

    def at(self, alpha: int, beta: int) -> tuple[np.ndarray, np.ndarray]:
        """Return who survives at levels, beta 0 being none, as a matrix, and the weights."""
        kept = self.alpha >> alpha & 1 | (self.beta >> beta - 1 & 1 if beta else 0)
        kept = kept.astype(bool)
        matrix, weights = np.zeros((self.n, self.n), bool), np.zeros((self.n, self.n))
        matrix[self.i[kept], self.j[kept]] = True
        weights[self.i[kept], self.j[kept]] = np.exp(-self.header["step"] * self.weight[kept])
        return matrix, weights / weights.sum(-1, keepdims=True).clip(1e-300)


def matrix_of(graph: NeighborGraph, n: int) -> np.ndarray:
    matrix = np.zeros((n, n), bool)
    matrix[np.repeat(np.arange(n), graph.row_offsets.diff()), graph.col_indices] = True
    return matrix


def tokens(symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if symmetric:
        return pictures.patches(PICTURE, 3, 0.4)
    return torch.randn(2, 1, 1, 9 * 13, 4).unbind()


ALPHAS, BETAS = [0.5, 1.3, 4.0], [0.9, 2.0]
CASES = {
    "patches": (True, ALPHAS, BETAS, 3),
    "query and key differ": (False, ALPHAS, BETAS, (3, 5)),
    "everybody and nobody": (False, [0.0, float("inf")], [0.0, float("inf")], 3),
    "no local block": (False, ALPHAS, [], 3),
    "eight levels": (True, [0.25 * 2**i for i in range(8)], [0.25 * 2**i for i in range(8)], 5),
}
each_case = pytest.mark.parametrize(("symmetric", "alphas", "betas", "window"), CASES.values(), ids=CASES)


@functools.cache
def page_of_case(case: str) -> tuple[str, dict[tuple[int, int], NeighborGraph], torch.Tensor]:
    """Return a page, the graph at each of its levels, beta 0 being none, and the scores."""
    torch.manual_seed(0)
    symmetric, alphas, betas, window = CASES[case]
    query, key = tokens(symmetric)
    page = explore.page(query, key, grid=(9, 13), alpha=alphas, beta=betas, window=window, scale=1.0)
    levels = itertools.product(enumerate(alphas), enumerate([None, *betas]))
    graphs = {
        (a, b): reciprocal_neighbors(query, key, alpha, beta, grid=(9, 13), window=window, scale=1.0)
        for (a, alpha), (b, beta) in levels
    }
    return page, graphs, (query @ key.mT)[0, 0].double()


@pytest.mark.parametrize("case", CASES)
def test_page_holds_the_survivors_of_every_level(case):
    page, graphs, scores = page_of_case(case)
    shown = Shown(page)
    logs = scores.log_softmax(-1)
    logs = logs.clamp(min=logs[shown.i, shown.j].max() - document.FLOOR)
    assert (len(shown.header["alpha"]), len(shown.header["beta"]) + 1) == tuple(x + 1 for x in max(graphs))
    for (a, b), graph in graphs.items():
        kept, weights = shown.at(a, b)
        assert np.array_equal(kept, matrix_of(graph, shown.n))
        expected = logs.masked_fill(~torch.from_numpy(kept), -torch.inf).softmax(-1).nan_to_num().numpy()
        # Each weight is rounded by half a step, and so is their sum.
        np.testing.assert_allclose(weights, expected, rtol=1.01 * shown.header["step"], atol=1e-12)


READ = """
const fs = require("fs");
const page = fs.readFileSync(0, "utf8");
const content = (id) => page.split(`id="${id}">`)[1].split("</script>")[0];
const names = "inflate, decode, survivorsOf, surveyOf";
const decoder = new Function(`${content("decode")}; return { ${names} };`)();
const header = JSON.parse(content("header"));
decoder.inflate(content("data")).then((bytes) => {
  const graph = decoder.decode(header, bytes);
  const found = [];
  for (let alpha = 0; alpha < Math.max(header.alpha.length, 1); alpha++) {
    for (let beta = 0; beta <= header.beta.length; beta++) {
      const level = { alpha, beta };
      const rows = [...Array(header.grid[0] * header.grid[1]).keys()].map((i) =>
        decoder.survivorsOf(header, graph, i, level));
      const survey = decoder.surveyOf(header, graph, level, (i, j) => Number(i !== j), 2);
      found.push({ level, rows, counts: [...survey.counts], distances: [...survey.distances] });
    }
  }
  console.log(JSON.stringify(found));
});
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize("case", CASES)
def test_script_of_the_page_reads_the_survivors_of_every_level(case):
    page, graphs, _ = page_of_case(case)
    run = subprocess.run(["node", "-e", READ], input=page, capture_output=True, text=True, check=True, timeout=60)
    read = json.loads(run.stdout)
    shown = Shown(page)
    assert len(read) == len(graphs)
    for each in read:
        a, b = each["level"]["alpha"], each["level"]["beta"]
        offsets, columns = (x.tolist() for x in graphs[a, b])
        assert [row["pixels"] for row in each["rows"]] == [columns[i:j] for i, j in itertools.pairwise(offsets)]
        assert each["counts"] == np.diff(offsets).tolist()
        itself = sum(i in columns[offsets[i] : offsets[i + 1]] for i in range(shown.n))
        assert each["distances"] == [itself, len(columns) - itself]
        _, weights = shown.at(a, b)
        flat = [weight for row in each["rows"] for weight in row["weights"]]
        rows = np.repeat(np.arange(shown.n), np.diff(offsets))
        np.testing.assert_allclose(flat, weights[rows, columns], rtol=1e-9)


def one_way() -> tuple[NeighborGraph, torch.Tensor]:
    """Return a graph of 3 x 4 pixels that is not symmetric, a row of it empty, and weights."""
    query, key = torch.randn(2, 1, 1, 12, 3)
    graph = reciprocal_neighbors(query, key, 1.0, reciprocal=False)
    offsets = graph.row_offsets.clone()
    empty = slice(int(offsets[5]), int(offsets[6]))
    columns = torch.cat([graph.col_indices[: empty.start], graph.col_indices[empty.stop :]])
    offsets[6:] -= empty.stop - empty.start
    return NeighborGraph(offsets, columns), torch.rand(len(columns)) + 0.01


@pytest.mark.parametrize("weighted", [False, True])
def test_page_of_a_graph(weighted):
    graph, weights = one_way()
    page = explore.page_of_graph(graph, grid=(3, 4), weights=weights if weighted else None, picture=PICTURE)
    shown = Shown(page)
    kept, found = shown.at(0, 0)
    expected = matrix_of(graph, 12)
    assert np.array_equal(kept, expected) and not np.array_equal(expected, expected.T) and not expected[5].any()
    matrix = np.zeros((12, 12))
    matrix[expected] = weights if weighted else 1
    matrix /= matrix.sum(-1, keepdims=True).clip(1e-300)
    np.testing.assert_allclose(found, matrix, rtol=1.01 * shown.header["step"] + 1e-6)
    assert shown.header["alpha"] == shown.header["beta"] == []


def test_page_of_the_smallest_map_and_of_an_empty_graph():
    one = torch.ones(1, 1, 1, 2)
    assert Shown(explore.page(one, one, grid=(1, 1), alpha=[0.5])).at(0, 0)[0].tolist() == [[True]]
    nobody = NeighborGraph(torch.zeros(7, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    assert not Shown(explore.page_of_graph(nobody, grid=(2, 3))).at(0, 0)[0].any()


def test_page_is_one_file_that_asks_for_nothing_and_quotes_its_title():
    title = '</title><script>alert("&")</script>'
    page = explore.page(*tokens(True), grid=(9, 13), title=title, picture=PICTURE)
    assert f"<title>{html.escape(title)}</title>" in page and title not in page
    assert json.loads(element(page, "header"))["title"] == title
    without_data = page.replace(element(page, "data"), "").replace(element(page, "picture-data"), "")
    assert "default-src 'none'" in page and "{{" not in page
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|\ssrc=", without_data)


q = torch.randn(1, 1, 12, 3)
ok = NeighborGraph(torch.arange(13), torch.arange(12))
BAD = {
    "two heads": (lambda: explore.page(q.expand(1, 2, 12, 3), q.expand(1, 2, 12, 3), grid=(3, 4)), r"\[1, 2, 12, 3\]"),
    "a volume": (lambda: explore.page(q, q, grid=(1, 3, 4)), r"grid must be .*\(1, 3, 4\)"),
    "another grid": (lambda: explore.page(q, q, grid=(3, 5)), "12.*15"),
    "nobody": (lambda: explore.page(q[:, :, :0], q[:, :, :0], grid=(0, 4)), "at least one pixel"),
    "not finite": (lambda: explore.page(q / 0, q, grid=(3, 4)), "finite"),
    "no alpha": (lambda: explore.page(q, q, grid=(3, 4), alpha=[]), "alpha must be 1 to 8 .* got 0"),
    "nine": (lambda: explore.page(q, q, grid=(3, 4), beta=range(9)), "beta must be 0 to 8 .* got 9"),
    "negative": (lambda: explore.page(q, q, grid=(3, 4), alpha=[-1]), ">= 0"),
    "nan": (lambda: explore.page(q, q, grid=(3, 4), alpha=[float("nan")]), ">= 0"),
    "grey": (lambda: explore.page(q, q, grid=(3, 4), picture=PICTURE[..., :1]), r"\[9, 13, 1\]"),
    "float picture": (lambda: explore.page(q, q, grid=(3, 4), picture=PICTURE.float()), "uint8"),
    "rows": (lambda: explore.page_of_graph(ok, grid=(3, 3)), "N . 1 = 10 .* got 13"),
    "offsets": (lambda: explore.page_of_graph(ok._replace(col_indices=ok[1][:5]), grid=(3, 4)), "ascend .* 5"),
    "columns": (lambda: explore.page_of_graph(ok._replace(col_indices=ok[1] + 1), grid=(3, 4)), "most N - 1 = 11"),
    "float columns": (lambda: explore.page_of_graph(ok._replace(col_indices=ok[1] / 2), grid=(3, 4)), "integers"),
    "weights": (lambda: explore.page_of_graph(ok, grid=(3, 4), weights=torch.ones(5)), "12 columns, got 5"),
    "no weight": (lambda: explore.page_of_graph(ok, grid=(3, 4), weights=torch.zeros(12)), "> 0 and finite"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_pages_that_cannot_be(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_page_refuses_more_pairs_than_it_can_hold(monkeypatch):
    monkeypatch.setattr(pairs, "MAX_PAIRS", 77)
    with pytest.raises(ValueError, match="78 pairs or more survive, and a page can hold 77"):
        explore.page(q, q, grid=(3, 4), alpha=[0])


# The command.


def saved(path, mode: str = "RGB", size=(40, 26)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 2, size[0] // 2, 4), dtype=np.uint8)
    PIL.Image.fromarray(noise, "RGBA").resize(size).convert(mode).save(path)
    return path


def test_command_writes_what_the_function_gives(tmp_path, monkeypatch, capsys):
    file = saved(tmp_path / "a picture.png")
    monkeypatch.chdir(tmp_path)
    options = ["--size", "20", "--alpha", "4", "2", "--beta", "1", "--window", "5", "--patch", "3", "--width", "0.5"]
    out = command.main([str(file), *options])
    assert out.name == "a picture-explore.html" and out.stat().st_size < 1e6 and "MB" in capsys.readouterr().out
    shown = Shown(out.read_text())
    assert [shown.header[name] for name in ("grid", "alpha", "beta", "window")] == [[13, 20], ["2", "4"], ["1"], [5, 5]]
    query, key = pictures.patches(pictures.shrunk(pictures.read(file), 20), 3, 0.5)
    graph = reciprocal_neighbors(query, key, 2.0, 1.0, grid=(13, 20), window=5, scale=1.0)
    assert np.array_equal(shown.at(0, 1)[0], matrix_of(graph, 260))


def test_command_takes_a_map_that_is_small_enough(tmp_path, monkeypatch):
    """By itself the largest of the sizes at which no more than so many pairs survive."""
    monkeypatch.setattr(command, "SIZES", (20, 16, 12))
    file, sizes = saved(tmp_path / "x.png"), []
    for most in (10**6, 4000, 0):
        monkeypatch.setattr(command, "PAIRS", most)
        page = command.main([str(file), "--alpha", "0.5", "--out", str(tmp_path / "x.html"), "--overwrite"]).read_text()
        sizes.append(Shown(page).header["grid"][1])
    assert sizes[0] == 20 and sizes[-1] == 12 and sizes == sorted(sizes, reverse=True)


def test_pictures_are_read_upright_and_on_white(tmp_path):
    file = tmp_path / "x.jpg"
    image = PIL.Image.new("RGB", (8, 4), "black")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(file, exif=exif)
    assert pictures.read(file).shape == (8, 4, 3)
    PIL.Image.new("RGBA", (8, 4), (9, 9, 9, 0)).save(tmp_path / "x.png")
    assert (pictures.read(tmp_path / "x.png") == 255).all()


def test_picture_of_one_colour_attends_evenly():
    query, key = pictures.patches(torch.full((5, 6, 3), 200, dtype=torch.uint8), 5, 0.2)
    assert (query @ key.mT).abs().max() == 0


def graph_file(folder, suffix: str, **more):
    query = torch.randn(1, 2, 12, 5)
    graph = reciprocal_neighbors(query, query, 1.0)
    content = {**graph._asdict(), "grid": (3, 4), **more}
    file = folder / f"graph{suffix}"
    np.savez(file, **content) if suffix == ".npz" else torch.save(content, file)
    return file, query


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize("which", [0, 1])
def test_command_shows_one_map_of_a_saved_graph(tmp_path, suffix, which):
    file, query = graph_file(tmp_path, suffix, picture=PICTURE)
    out = tmp_path / "x.html"
    command.main([str(file), "--map", str(which), "--out", str(out)])
    of_head = query[:, which : which + 1]
    expected = matrix_of(reciprocal_neighbors(of_head, of_head, 1.0), 12)
    assert np.array_equal(Shown(out.read_text()).at(0, 0)[0], expected)
    assert element(out.read_text(), "picture-data").startswith("data:image/jpeg;base64,")


def refused(file, *options: str) -> str:
    """Return what the command says, as a user sees it, of what it does not do."""
    words = ["asa_ops.explore", str(file), *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", words)
        command.run()
    return str(ended.value)


def test_command_replaces_nothing_by_itself(tmp_path):
    file, out = saved(tmp_path / "x.png", size=(12, 12)), tmp_path / "x.html"
    out.write_text("mine")
    assert "x.html is there: give --out another name, or --overwrite" in refused(file, "--out", str(out))
    assert out.read_text() == "mine"
    command.main([str(file), "--out", str(out), "--overwrite"])
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.html", "x.png"]
    picture = shutil.copy(file, tmp_path / "x.htm")  # a picture for all its name
    assert "x.htm would replace" in refused(picture, "--out", str(picture), "--overwrite")
    (tmp_path / "folder.html").mkdir()
    assert "is there and no file" in refused(file, "--out", str(tmp_path / "folder.html"), "--overwrite")
    assert "no folder" in refused(file, "--out", str(tmp_path / "nowhere" / "x.html"))
    assert "must end in .html" in refused(file, "--out", str(tmp_path / "x.png"))


def test_command_says_what_is_wrong_with_a_file(tmp_path):
    out = ["--out", str(tmp_path / "x.html")]
    (tmp_path / "text.png").write_text("no picture")
    assert "cannot read" in refused(tmp_path / "text.png", *out)
    assert "No such file" in refused(tmp_path / "nothing.png", *out)
    cut = saved(tmp_path / "cut.png").read_bytes()[:200]
    (tmp_path / "cut.png").write_bytes(cut)
    assert "cannot read" in refused(tmp_path / "cut.png", *out)
    PIL.Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert "8 bits a channel, got a picture of mode I;16" in refused(tmp_path / "deep.png", *out)
    for suffix in (".npz", ".pt"):
        (tmp_path / f"text{suffix}").write_text("no graph")
        assert "cannot read" in refused(tmp_path / f"text{suffix}", *out)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "must hold a dict of tensors, got list" in refused(tmp_path / "list.pt", *out)
    torch.save({"grid": (3, 4)}, tmp_path / "part.pt")
    assert "must hold row_offsets, col_indices and grid, got grid" in refused(tmp_path / "part.pt", *out)
    file, _ = graph_file(tmp_path, ".pt")
    assert "--map must be less than the number of maps" in refused(file, "--map", "2", *out)
    file, _ = graph_file(tmp_path, ".pt", grid=(5, 4))
    assert "24 rows, no multiple of the 20 pixels" in refused(file, *out)
    assert not (tmp_path / "x.html").exists()


OPTIONS = ["--size 1", "--size 257", "--patch 4", "--window 0", "--width 0", "--width nan", "--alpha -1", "--map -1"]
OPTIONS += [f"--beta {' '.join(map(str, range(9)))}"]


@pytest.mark.parametrize("options", OPTIONS)
def test_command_refuses_options(tmp_path, options, capsys):
    with pytest.raises(SystemExit):
        command.main([str(saved(tmp_path / "x.png")), *options.split()])
    assert options.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("file", "message"), [("x.png", "pip install pillow"), ("x.npz", "pip install numpy")])
def test_command_says_what_to_install(tmp_path, monkeypatch, file, message):
    for name in ("PIL.Image", "numpy"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert message in refused(tmp_path / file, "--out", str(tmp_path / "x.html"))


# In a browser.


@pytest.fixture
def chromium(tmp_path):
    with browser.Browser(tmp_path / "profile") as opened:
        yield opened


def middle_of(chromium, row: int, column: int) -> tuple[float, float]:
    """Return where on the screen the middle of a pixel of the 9 x 13 picture is."""
    box = chromium.value("document.getElementById('picture').getBoundingClientRect().toJSON()")
    return box["x"] + (column + 0.5) / 13 * box["width"], box["y"] + (row + 0.5) / 9 * box["height"]


@pytest.mark.slow
@pytest.mark.skipif(not browser.found(), reason=f"needs a browser: one of {', '.join(browser.NAMES)}")
def test_page_in_a_browser(tmp_path, chromium):
    query, key = tokens(True)
    file = tmp_path / "page.html"
    file.write_text(explore.page(query, key, grid=(9, 13), alpha=[1, 2, 4], beta=[0.5, 1], scale=1.0, picture=PICTURE))
    chromium.open(file)

    def check(pixel: int, alpha: float, beta: float | None) -> None:
        graph = reciprocal_neighbors(query, key, alpha, beta, grid=(9, 13), scale=1.0)
        offsets, columns = graph
        expected = columns[offsets[pixel] : offsets[pixel + 1]].tolist()
        assert chromium.value("explore.state.pixel") == pixel
        assert chromium.value("explore.state.survivors.pixels") == expected
        said = chromium.value("document.getElementById('says').textContent")
        assert f"Row {pixel // 13}, column {pixel % 13}: attends to {len(expected)} of 117 pixels" in said
        coloured = chromium.value(
            """(() => {
              const canvas = document.getElementById("picture"), side = canvas.width / 13;
              const context = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
              context.drawImage(canvas, 0, 0);
              const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
              return [...Array(117).keys()].filter((i) => {
                const [x, y] = [(i % 13 + 0.5) * side, (Math.floor(i / 13) + 0.5) * side].map(Math.floor);
                const [r, g, b] = data.subarray(4 * (y * canvas.width + x));
                return r !== g || g !== b;
              });
            })()"""
        )
        assert coloured == expected  # the picture beneath is grey

    check(4 * 13 + 6, 2, None)  # the middle
    chromium.hover(*middle_of(chromium, 2, 11))
    check(2 * 13 + 11, 2, None)

    # By keys: the picture, then the box of the plain picture, alpha, beta.
    chromium.key("Tab")
    assert chromium.value("document.activeElement.id") == "picture"
    outline = "getComputedStyle(document.activeElement).outlineWidth"
    assert chromium.value(outline) == "3px"
    chromium.key("ArrowLeft")
    chromium.key("ArrowDown")
    check(3 * 13 + 10, 2, None)
    chromium.key("ArrowLeft", shift=True)
    check(3 * 13 + 2, 2, None)
    chromium.key("Home")
    check(3 * 13, 2, None)
    chromium.key("ArrowLeft")  # there is nothing further left
    check(3 * 13, 2, None)
    chromium.key("End")
    check(3 * 13 + 12, 2, None)
    chromium.key("Tab")
    chromium.key("Tab")
    assert chromium.value("document.activeElement.id") == "alpha" and chromium.value(outline) == "3px"
    chromium.key("ArrowRight")
    check(3 * 13 + 12, 4, None)
    assert chromium.value("document.activeElement.getAttribute('aria-valuetext')") == "alpha 4"
    chromium.key("Tab")
    chromium.key("ArrowRight")
    chromium.key("ArrowRight")
    check(3 * 13 + 12, 4, 1)
    chromium.key("Home")
    check(3 * 13 + 12, 4, None)

    # Everything that takes part has a name; a screen reader hears the text once the pixel rests.
    names = """[...document.querySelectorAll("input, canvas, svg")].map((x) =>
        x.labels?.[0]?.textContent || x.getAttribute("aria-label") || x.getAttribute("aria-labelledby"))"""
    assert all(chromium.value(names))
    said = "new Promise((found) => setTimeout(() => found(document.getElementById('spoken').textContent), 600))"
    assert chromium.value(said) == chromium.value("document.getElementById('says').textContent")

    # On a phone nothing is wider than the screen, and a finger moves the pixel.
    chromium.resize(390, 844, phone=True, dark=True)
    assert chromium.value("document.documentElement.scrollWidth") <= 390
    chromium.touch(*middle_of(chromium, 7, 1))
    check(7 * 13 + 1, 4, None)
    assert chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"

    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith("data:")] == [file.as_uri()]
