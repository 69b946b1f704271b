"""Files of results: written and read, checked, and the pages that are made of them."""

import dataclasses
import json
import math

import pytest
from bench_cases import stored

from bench import check, goals, record, report
from examples import files


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "results.json"
    results = stored()
    results.write(path)
    assert record.read(path) == results
    again = dataclasses.replace(results.cases[0], ours=["sdpa flash"])
    results.add(again)
    assert results.cases[-1] is again and len(results.cases) == len(stored().cases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("ceilings"), "all of it: missing fields ['ceilings'], unknown fields []"),
        (lambda x: x["cases"][0].update(speed=1), "cases[0]: missing fields [], unknown fields ['speed']"),
        (lambda x: x["cases"][1].update(mode="bwd"), "cases[1].mode: expected one of fwd, fwd+bwd, mem, got 'bwd'"),
        (lambda x: x["cases"][0].update(size="64x"), "cases[0].size: expected HxW, as 64x64, or L or TxHxW, got '64x'"),
        (lambda x: x["cases"][0].update(dim="64"), "cases[0].dim: expected int, got '64'"),
        (lambda x: x["cases"][0].update(dim=True), "cases[0].dim: expected int, got True"),
        (lambda x: x["cases"][0].update(ours=["asa"]), "cases[0].ours: asa not among the methods asa cpu, "),
        (
            lambda x: x["cases"][0]["methods"]["asa cpu"].update(seconds=[0.1, -1.0]),
            "cases[0].methods['asa cpu'].seconds[1]: expected a number >= 0, got -1.0",
        ),
        (lambda x: x["cases"][0]["methods"].update(natten=3), "methods['natten']: expected an object, got 3"),
        (lambda x: x.update(cases=3), "cases: expected list[bench.record.Case], got 3"),
    ],
)
def test_files_of_another_form_are_refused(change, message, tmp_path):
    path = tmp_path / "results.json"
    stored().write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        record.read(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        record.read(path)


def test_results_are_not_replaced_by_their_page(tmp_path):
    """Whatever they are named; as the page's own file of results they stay what they are."""
    for name in ("a-machine.md", "a-machine-tokens.png"):
        stored().write(path := tmp_path / name)
        before = path.read_bytes()
        with pytest.raises(files.FileError, match=rf"{name} would replace .*{name}, which is read"):
            report.main([str(path), "--folder", str(tmp_path)])
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
        path.unlink()
    stored().write(path := tmp_path / "a-machine.json")
    report.main([str(path), "--folder", str(tmp_path)])
    assert path.read_bytes() == before


def test_a_page_is_made_of_a_stored_file(tmp_path, capsys):
    path = tmp_path / "results.json"
    stored().write(path)
    report.main([str(path), "--folder", str(tmp_path / "page")])
    text = (tmp_path / "page" / "a-machine.md").read_text()
    assert record.read(tmp_path / "page" / "a-machine.json") == stored()
    assert (tmp_path / "page" / "a-machine-tokens.png").stat().st_size > 10_000 and "(a-machine-tokens.png)" in text
    assert "| labels | 64x64 | 64 | fwd | 1.0 | 0.50 (0.50-0.53) |" in text
    assert "slower in 2 of them: near-dense (1 of 1); labels (1 of " in text
    assert "- tokens, fwd: 0.50 to 2.00 of dense; ASA wins above 2048." in text
    assert "| tokens | seconds, fwd | asa cpu | 2.00 | 16384 to 65536 |" in text
    assert "- natten was skipped: not installed" in text and "- eager failed: RuntimeError: no" in text
    assert "| criss_cross | 64x64x64 | fwd | 1000.0 | 2000.0 | 0.50 (0.50-0.50) |" in text
    # 1.08 units of 2 * 4096^2 * 64 at 100 GFLOP/s
    assert "| labels | 64x64 | 64 | fwd | asa cpu | 1.08 | 2319 | 23.2 | 2319 % |" in text
    assert "A Machine" in text and "slower in 2" in capsys.readouterr().out
    cases = stored().cases
    assert report.headline([]) == "ASA was not timed beside dense attention."
    assert report.headline(cases[:1]).endswith("over 1 cases, and less than it in all of them.")
    assert report.headline(cases[1:2]).endswith("over 1 cases, and more than it in all of them.")
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "other.json")])


def test_exponents_are_fitted():
    xs = [100.0, 200.0, 400.0]
    assert report.fit(xs, [3 * x**2 for x in xs]) == (pytest.approx(2), pytest.approx(0, abs=1e-6))
    slope, error = report.fit(xs, [1.0, 4.0, 15.0])
    assert slope == pytest.approx(math.log2(15) / 2) and error > 0
    expected = [(pytest.approx(200), "wins above"), (pytest.approx(800), "wins below")]
    assert report.crossing([(100, 2), (400, 0.5), (1600, 2)]) == expected


def test_tables_are_markdown():
    assert report.table(["a", "bc"], []) == ""
    assert report.table(["a", "bc"], [["x | y", 1]]) == "| a | bc |\n| --- | --- |\n| x / y | 1 |"
    assert report.table(["a", "b"], [["long", 1]], even=True) == "| a    | b   |\n| ---- | --- |\n| long | 1   |"


def test_every_committed_page_says_what_its_file_says():
    pages = sorted(report.FOLDER.glob("*.md"))
    assert any(check.subset(record.read(page.with_suffix(".json"))) for page in pages)
    for page in pages:
        pictures = [f"{page.stem}-{sweep}.png" for sweep in report.SWEEPS]
        pictures = [name for name in pictures if (page.parent / name).exists()]
        results = record.read(page.with_suffix(".json"))
        summary = page.stem.endswith("-summary")
        assert page.read_text() == (goals.render(results) if summary else report.render(results, pictures))


def test_goals_on_a_cpu_are_judged_by_the_worst_case():
    case = stored().cases[0]  # labels, 64x64, fwd: half of dense attention's time

    def ours(ratio: float, **other) -> record.Case:
        methods = case.methods | {"asa cpu": record.Method([2e-3 * ratio])}
        return dataclasses.replace(case, methods=methods | {"sdpa flash": record.Method([2e-3])}, **other)

    good, bad = ours(0.4), ours(0.6, inputs="photo")
    other = [ours(9.0, inputs="iid"), ours(9.0, size="32x32"), ours(9.0, dtype="bfloat16", dim=128)]
    row = "| structured inputs, N = 4,096, D = 64 |"
    assert f"{row} <= 0.50 | 0.40 (0.40-0.40) | met |" in report.goals_table([good, *other], "AVX-512")
    assert f"{row} <= 0.50 | 0.60 (0.60-0.60) | MISSED |" in report.goals_table([good, bad, *other], "AVX-512")
    assert f"{row} <= 0.65 | 0.60 (0.60-0.60) | met |" in report.goals_table([good, bad], "AVX2")
    both = report.goals_table([dataclasses.replace(bad, mode="fwd+bwd")], "AVX-512")
    assert f"{row} <= 0.50 | - |  | <= 0.20 | 0.60 (0.60-0.60) | MISSED |" in both and both.count("\n") == 2
    assert not report.goals_table(other, "AVX-512") and not report.goals_table([bad], None)
