"""The report and the tables as files: what they say is what the results hold, and nothing runs."""

import base64
import copy
import csv as csv_module
import hashlib
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic_results import METRICS, TASKS, synthetic_results

from cmi_lightning.errors import InputError
from cmi_lightning.paths import safe_name
from cmi_lightning.report.album import Album
from cmi_lightning.report.page import render, write_report
from cmi_lightning.report.plots import (
    Series,
    curves,
    histogram,
    labels,
    log_ticks,
    power,
    reach,
    step_ticks,
    ticks,
)
from cmi_lightning.report.results import (
    VARIANTS,
    Difference,
    Results,
    Search,
    Trial,
    read_results,
    write_results,
)
from cmi_lightning.report.tables import csv, latex, markdown, write_tables
from cmi_lightning.report.verdicts import Verdict, fixed, short, verdicts
from cmi_lightning.statistics import Estimate

VOID = {"meta", "link", "img", "input", "br", "hr"}
SVG = {"path", "rect", "circle"}  # closed in themselves


class Page(HTMLParser):
    """The elements of a page, and that each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # by the innermost open element
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert tag in SVG | VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attrs
            for name, attrs in self.elements
            if name == tag
            and all(attrs.get(k.rstrip("_").replace("_", "-")) == v for k, v in wanted.items())
        ]

    def text(self, tag: str) -> str:
        return "".join(data for name, data in self.texts if name == tag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def made(folder: Path) -> Results:
    return synthetic_results(folder, tasks=2, methods=3, images=40, examples=2)


@pytest.fixture
def results(made: Results) -> Results:
    return copy.deepcopy(made)


def compared(results: Results, method: str) -> dict[str, Difference]:
    """CMI's first differences from a method, by metric."""
    cell = results.cell(next(iter(results.tasks)), method, "cmi")
    assert cell
    return cell.differences["base"]


def part(pattern: str, text: str) -> str:
    """The one group of a pattern that a text has to hold."""
    found = re.search(pattern, text, re.S)
    assert found
    return found[1]


def read_csv(results: Results) -> list[dict[str, str]]:
    return list(csv_module.DictReader(io.StringIO(csv(results))))


def rows(text: str) -> list[list[str]]:
    """The table's rows: the label, then the texts of its cells, without their tags."""
    body, found = part(r'(<table class="results".*?</table>)', text), []
    for row in re.findall(r"<tr class=\"(?!task).*?</tr>", body, re.S):
        cells = re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
        found.append([" ".join(re.sub(r"<.*?>", "", c).split()) for c in cells])
    return found


def ids(text: str) -> set[str | None]:
    """The ids of a page whose elements are all closed."""
    page = Page(text)
    return {attrs.get("id") for _, attrs in page.elements}


def tiles(text: str) -> dict[tuple[Any, ...], dict[str, str | None]]:
    """Figure 1's images, by the number of the task, slot, number of the image and the method."""
    found, task, at = {}, -1, None
    for tag, attrs in Page(text).elements:
        task += attrs.get("class") == "line"
        if attrs.get("class") == "tile" and "data-image" in attrs:
            method = attrs.get("data-method")
            at = task, attrs["data-slot"], int(attrs["data-image"] or 0), method and int(method)
        elif tag == "img" and at:
            found[at], at = attrs, None
    return found


# The page ------------------------------------------------------------------------------------


def test_page_is_whole_and_needs_nothing_else(results, folder):
    write_report(results, folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert not any(name.startswith("on") or name == "style" for name in attrs)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not list(folder.glob(".*"))  # no temporary file is left
    names = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(names) == len(set(names))
    for link in page.all("a"):
        assert link["href"].removeprefix("#") in names


def test_policy_allows_the_one_script_and_the_one_style(results, folder):
    text = render(results, folder)
    policy = Page(text).all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("script", "style"):
        (inline,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_every_section_is_there(results, folder):
    text = render(results, folder)
    page = Page(text)
    assert "Shown are the first images that every cell has;" in plain(text)
    assert "first by id" not in plain(text)
    wanted = {"says", "table", "figure", "compare", "histograms", "extremes", "curves"}
    assert ids(text) >= wanted | {"posterior", "run"}
    assert len(page.all("input", type="range")) == 2
    assert len(page.all("figure", class_="chart")) == 2 * 4
    assert len(page.all("figure", class_="bars")) == 2 * 3 * 3
    assert all(image.get("alt") is not None for image in page.all("img"))
    assert all(drawing.get("aria-label") for drawing in page.all("svg", role="img"))


def test_table_holds_the_results(results, folder):
    found = {(label, i): cells for i, (label, *cells) in enumerate(rows(render(results, folder)))}
    labels = [label for label, _ in found]
    assert labels.count("measurement A⁺y") == 2
    assert len(found) == 2 * (1 + 3 * 3)
    cells = iter(results.cells)
    for (label, _), texts in found.items():
        if label == "measurement A⁺y":
            continue
        cell = next(cells)
        assert label == cell.label
        for text, metric in zip(texts, results.metrics, strict=False):
            entry, digits = cell.metrics[metric.key], metric.digits
            expected = f"{entry.mean:.{digits}f}"
            if entry.se is not None:
                expected += f" ± {entry.se:.{digits}f}"
            assert text == expected or text.startswith(f"{expected} ")
        assert texts[-2] == f"{cell.passes:.0f}"
        assert texts[-1] == f"{cell.seconds:g}"


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize(
    ("difference", "significant", "gain", "symbol"),
    [(0.5, True, 1, "▲▼"), (0.5, False, 1, "△▽"), (-0.5, True, -1, "▲▼"), (-0.5, False, -1, "△▽")],
)
def test_colour_and_symbol_follow_the_sign_and_significance(
    results, folder, better, difference, significant, gain, symbol
):
    first, *others = results.metrics
    results = replace(results, metrics=(replace(first, better=better), *others))
    metrics = compared(results, "none")
    found = {"difference": difference, "low": -1.0, "high": 1.0, "significant": significant}
    metrics["psnr"] = replace(metrics["psnr"], **found)
    good = (gain > 0) == (better == "higher")
    name = ("better" if good else "worse") + ("" if significant else "-unsure")
    sign = symbol[0] if good else symbol[1]
    cell = part(r'<tr class="cmi">.*?(<td.*?</td>)', render(results, folder))
    assert f'data-base="{name}"' in cell
    assert f">{sign}<" in cell
    said = {True: "significantly ", False: ""}[significant] + ("better" if good else "worse")
    assert f">{said}" in cell
    tex = next(line for line in latex(results).splitlines() if line.startswith("CMI"))
    assert tex.split("&")[1].strip().startswith(f"\\cellcolor{{cmi-{name}}}")
    line = next(line for line in markdown(results).splitlines() if "| CMI" in line)
    assert f"({sign} {fixed(difference, 3, True)} [−1.000, 1.000])" in line.split("|")[3]


def test_summary_counts_the_verdicts(results, folder):
    counts = {"better": 0, "worse": 0, "undecided": 0}
    every = dict(counts)
    for cell in (cell for cell in results.cells if cell.variant == "cmi"):
        for metric in METRICS:
            entry = cell.differences["base"][metric.key]
            up = (entry.difference > 0) == (metric.better == "higher")
            outcome = ("better" if up else "worse") if entry.significant else "undecided"
            every[outcome] += 1
            counts[outcome] += metric.key == "psnr"
    text = " ".join(render(results, folder).split())
    assert (
        "Over 5 metrics and 6 cells, CMI is significantly better than the same method without it "
        f"in {every['better']} of 30 comparisons, worse in {every['worse']}, and "
        f"{every['undecided']} are undecided."
    ) in text
    first = text[text.index("<article>") :]
    first = re.sub(r"<.*?>", "", first[: first.index("against equal passes")])
    assert f"{counts['better']} better" in first
    assert f"{counts['undecided']} undecided" in first
    assert f"{counts['worse']} worse" in first
    assert "CMI takes 3.09 times the network passes and 3.49 times the seconds" in text


def test_what_comes_from_files_is_escaped(results, folder):
    evil = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
    examples = {task: (evil, *ids[1:]) for task, ids in results.examples.items()}
    for cell in results.cells:
        picture = folder / cell.folder / "restored" / f"{safe_name(evil, '.png')}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes((folder / results.cells[0].folder / "truth/00000.png").read_bytes())
        for differences in cell.differences.values():
            differences["psnr"].values[evil] = 99.0  # the best image of all
    results = replace(
        results,
        **dict.fromkeys(("title", "config", "command", "created"), evil),
        notes=(*results.notes, evil),
        environment={evil: evil},
        protocol={evil: evil},
        tasks=dict.fromkeys(results.tasks, evil),
        methods=(*results.methods, evil),
        metrics=tuple(replace(metric, label=evil, unit=evil) for metric in results.metrics),
        cells=tuple(
            replace(c, label=evil, options={evil: 1.0}, curves=c.curves | {evil: {1: 1.0, 2: 2.0}})
            for c in results.cells
        ),
        examples=examples,
        study={"inpaint_box": {evil: Search({"1": Trial(1.0, None, 2)}, 1.0, 1.0, False)}},
    )
    text = render(results, folder)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img", src="x")
    extremes = part(r'(<section id="extremes">.*?</section>)', text)
    assert Page(extremes).all("img", alt=f"truth, {evil}")
    assert page.text("h1") == evil
    assert page.all("figure", class_="tile", data_id=evil)
    assert "<script>" not in markdown(results)


def test_images_are_embedded_once_in_the_figure(results, folder):
    found = tiles(render(results, folder))
    assert len(found) == 2 * 2 * (2 + 3 * 3)
    shown = found[1, "cmi", 1, 1]
    cell, example = results.cell("inpaint_box", "DPS", "cmi"), results.examples["inpaint_box"][1]
    content = (folder / cell.folder / "restored" / f"{example}.png").read_bytes()
    assert shown["src"] == f"data:image/png;base64,{base64.b64encode(content).decode()}"
    assert (shown["width"], shown["height"]) == ("32", "32")
    assert len({(at[0], image["src"]) for at, image in found.items()}) == len(found)


@pytest.mark.parametrize("path", ["missing", "../secret", "text", "notes.txt", "", "\0"])
def test_images_that_cannot_be_read_are_left_out(results, folder, path):
    (folder / "notes.txt").write_text("no folder")
    picture = (folder / results.cells[0].folder / "truth/00000.png").read_bytes()
    for name in ("00000.png", "00001.png"):
        for kind in ("truth", "restored"):
            for place, content in (
                (folder.parent / "secret", picture + b"leak"),
                (folder / "text", b"no image"),
            ):
                (place / kind).mkdir(parents=True, exist_ok=True)
                (place / kind / name).write_bytes(content)
    lost = {("none", "base"), ("DPS", "base")}  # the first has the truths
    cells = [replace(c, folder=path) if (c.method, c.variant) in lost else c for c in results.cells]
    results = replace(results, cells=tuple(cells))
    text = render(results, folder)
    found = tiles(text)
    assert "src" not in found[0, "truth", 0, None]
    there = [v for v in ("base", "cmi", "equal") if "src" in found[0, v, 0, 1]]
    assert there == ["cmi", "equal"]
    secret = base64.b64encode(picture + b"leak").decode()
    assert secret not in text


def altered(results: Results, **changes: Any) -> Results:
    """The results with something of all their cells changed."""
    return replace(results, cells=tuple(replace(cell, **changes) for cell in results.cells))


OF_CELLS = {"posterior": {"draws": None}, "comparisons": {"differences": {}}}
PARTS = ("posterior", "examples", "comparisons", "measured", "notes", "cells")
PARTS += ("protocol", "study", "config", "command", "commit", "created", "title", "images")


@pytest.mark.parametrize("part", PARTS)
def test_parts_may_be_empty(results, folder, part):
    if part in OF_CELLS:
        results = altered(results, **OF_CELLS[part])
    else:
        empty = None if part == "commit" else type(getattr(results, part))()
        results = replace(results, **{part: empty})
    lacking = {part: {part}, "examples": {"figure"}, "comparisons": {"histograms", "extremes"}}
    lacking |= {"cells": {"extremes", "figure", "histograms", "curves", "posterior"}}
    sections = {"posterior", "extremes", "figure", "histograms", "curves", "study"}
    assert ids(render(results, folder)) & sections == sections - lacking[part]
    for table in (markdown, csv, latex):
        table(results)


def test_nothing_at_all(results):
    empty = {name: type(value)() for name, value in vars(results).items() if value is not None}
    nothing = Results(**{"commit": None} | empty)
    page = Page(render(nothing, Path("nowhere")))
    assert "No cell has been run yet." in page.text("p")
    assert markdown(nothing).startswith("# ")
    assert csv(nothing).count("\n") == 1
    assert latex(nothing).count(r"\begin{tabular}") == 1


def with_draws(results: Results, **changes: Any) -> Results:
    """The results with something of all their draws changed."""
    cells = [replace(c, draws=c.draws and replace(c.draws, **changes)) for c in results.cells]
    return replace(results, cells=tuple(cells))


def test_absent_numbers(results, folder):
    for cell in results.cells:
        cell.metrics.update(psnr=Estimate(None), ssim=Estimate(None))
        del cell.metrics["kernel"]
    draws = {"coverage": dict.fromkeys(("50", "90"), Estimate(None))}
    draws |= {"spread_skill": Estimate(None), "residual": Estimate(None), "folder": "nowhere"}
    results = with_draws(altered(results, curves={}, passes=None, seconds=None), **draws)
    text = render(results, folder)
    assert "curves" not in ids(text)
    assert "nan" not in re.sub(r"data:image.*?\"", "", text)
    for label, *cells in rows(text):
        if not label.startswith("measurement"):
            assert [cell.split(" ")[0] for cell in cells[:2]] == ["–", "–"]
            assert cells[-2:] == ["–", "–"]
    assert "Per image, CMI takes" not in text
    for table in (markdown, latex):
        assert "nan" not in table(results)
        assert "None" not in table(results)


def test_results_are_read_as_they_were_written(results, tmp_path):
    path = tmp_path / "results.json"
    write_results(results, path)
    assert read_results(path) == results


@pytest.mark.parametrize("change", ["schema", "absent", "unknown", "inner", "list"])
def test_results_of_another_version_are_refused(results, tmp_path, change):
    path = tmp_path / "results.json"
    write_results(results, path)
    content = json.loads(path.read_text())
    if change == "schema":
        content["schema"] += 1
    elif change == "absent":
        del content["notes"]
    elif change == "unknown":
        content["more"] = 1
    elif change == "inner":
        del content["cells"][0]["passes"]
    path.write_text(json.dumps([] if change == "list" else content))
    with pytest.raises(InputError, match=r"another version.*report_only"):
        read_results(path)


def test_cells_that_were_not_run_are_absent(results, folder):
    results = replace(
        results,
        cells=tuple(c for c in results.cells if (c.method, c.variant) != ("DPS", "cmi")),
    )
    found = [label for label, *_ in rows(render(results, folder))]
    assert "CMI+DPS" not in found
    assert found.count("DPS") == 2
    assert "CMI+DPS" not in markdown(results)


def test_failures_and_fewer_images_are_told(results, folder):
    first, second, *others = results.cells
    results = replace(results, cells=(first, replace(second, failed=3, images=37), *others))
    assert any(
        "37 images" in row[0] and "3 failed" in row[0] for row in rows(render(results, folder))
    )


# The tables ----------------------------------------------------------------------------------


def test_csv_holds_every_number_in_full(results):
    read = read_csv(results)
    cells = {(r["task"], r["method"], r["variant"], r["metric"]): r for r in read}
    assert len(cells) == len(read) == 2 * (2 + 3 * 3 * 5)
    for cell in results.cells:
        for key, entry in cell.metrics.items():
            row = cells[cell.task, cell.method, cell.variant, key]
            assert float(row["mean"]) == entry.mean
            assert row["se"] == ("" if entry.se is None else repr(entry.se))
            assert float(row["passes"]) == cell.passes
        for against, differences in cell.differences.items():
            for key, entry in differences.items():
                row = cells[cell.task, cell.method, cell.variant, key]
                for name in ("difference", "low", "high", "p"):
                    assert float(row[f"{name}_{against}"]) == getattr(entry, name)
                assert row[f"significant_{against}"] == str(entry.significant).lower()


def test_csv_starts_no_formula(results):
    results = replace(results, cells=(replace(results.cells[0], label="=1+1"), *results.cells[1:]))
    assert "'=1+1" in {row["label"] for row in read_csv(results)}


def named(results: Results, label: str) -> Results:
    """The results with another name for the first task."""
    return replace(results, tasks=results.tasks | {next(iter(results.tasks)): label})


def test_markdown_is_one_table(results):
    results = named(results, "a | b\n<b>*c*</b>")
    lines = markdown(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 * (1 + 3 * 3)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert r"a \| b \<b\>\*c\*\</b\>" in table[2]


def test_latex_is_well_formed(results):
    results = named(results, r"50 % of a_b & c^d ~ {x} \input{y} $z$ #1")
    lines = latex(results).splitlines()
    body = [line for line in lines if not line.startswith("%")]
    text = "\n".join(body)
    assert r"50 \% of a\_b \& c\textasciicircum{}d \textasciitilde{} \{x\} " in text
    assert r"\textbackslash{}input\{y\} \$z\$ \#1" in text
    assert r"CMI+\ensuremath{\Pi}GDM" in text
    assert text.isascii() or set(re.findall(r"[^\x00-\x7f]", text)) <= {"é"}
    for line in body:
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == 6
        plain = re.sub(r"\\[{}$]", "", line)
        assert plain.count("{") == plain.count("}")
        assert plain.count("$") % 2 == 0
    for name in re.findall(r"cellcolor\{(.*?)\}", text):
        assert f"\\definecolor{{{name}}}" in text


def test_tables_are_written(results, tmp_path):
    results = replace(results, title="half a character \udc80")
    write_tables(results, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"table.md", "table.csv", "table.tex"}
    assert (tmp_path / "table.csv").read_bytes() == csv(results).encode()
    write_report(results, tmp_path)


# Verdicts and numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "better", "significant", "outcome", "symbol"),
    [
        (1.0, "higher", True, "better", "▲"),
        (1.0, "lower", True, "worse", "▼"),
        (1.0, "lower", False, "undecided", "▽"),
        (0.0, "lower", False, "undecided", "="),
    ],
)
def test_verdicts(results, difference, better, significant, outcome, symbol):
    paired = Difference(difference, -1.0, 2.0, 0.1, 3, significant, None, {})
    verdict = Verdict(replace(METRICS[0], better=better), results.cells[1], paired)
    assert (verdict.outcome, verdict.symbol) == (outcome, symbol)
    assert verdict.change == fixed(difference, 3, sign=True)
    assert verdict.interval == "[−1.000, 2.000]"


def test_numbers_as_text():
    assert fixed(-1.25, 2) == "−1.25"
    assert fixed(1.25, 1, sign=True) in ("+1.2", "+1.3")
    assert fixed(-0.0004, 3, sign=True) == "0.000"
    assert fixed(float("inf"), 2) == fixed(None, 2) == "–"
    assert [short(v) for v in (200.0, 618.4, 0.61, 0.012345, 12345.6, 0, None)] == [
        "200", "618", "0.61", "0.0123", "12346", "0", "–",
    ]  # fmt: skip


def test_order_is_the_results(results):
    reverse = {"tasks": dict(reversed(results.tasks.items())), "methods": results.methods[::-1]}
    found = rows(render(replace(results, **reverse), Path("nowhere")))
    labels = ["ΠGDM", "CMI+ΠGDM", "ΠGDM, equal passes", "DPS", "CMI+DPS"]
    assert [label for label, *_ in found[1:6]] == labels
    assert found[1][1].startswith(
        f"{results.cell(list(TASKS)[1], 'ΠGDM', 'base').metrics['psnr'].mean:.2f}"
    )


# Drawings ------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3.0, 47.0, 5) == pytest.approx([0, 10, 20, 30, 40])
    assert step_ticks(1, 100) == [1, 50, 100]
    assert step_ticks(1, 4) == [1, 2, 3, 4]
    assert log_ticks(0.0, 3.0) == pytest.approx([1, 10, 100, 1000])
    assert log_ticks(0.0, 1.0) == pytest.approx([1, 2, 5, 10])
    assert labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert labels([-2.0, 0.0, 2.0]) == ["−2", "0", "2"]
    assert [power(v) for v in (1e-4, 0.01, 1.0, 1000.0, 2e5)] == [
        "10⁻⁴", "0.01", "1", "1000", "2·10⁵",
    ]  # fmt: skip


@pytest.mark.parametrize("top", [10.0, 1000.0])
def test_curves_lie_where_their_axis_says(top):
    values = {float(n): top ** (n / 10) for n in range(11)}
    chart = curves("t", "u", [Series(values, "m0 solid", "n")], (0.0, 10.0))
    assert chart
    assert ("logarithmic" in chart.unit) == (top > 30)
    points = [tuple(map(float, p.split())) for p in chart.marks[0].path[1:].split("L")]
    assert len(points) == 11
    read = {t.label: t.at for t in chart.y_ticks}
    pick = {10.0: ("5", 5.0), 1000.0: ("10", 10.0)}[top]
    place = math.log(pick[1], top) * 10  # the step at which the curve has this value
    before, after = points[math.floor(place)], points[math.ceil(place)]
    assert min(before[1], after[1]) - 0.2 <= read[pick[0]] <= max(before[1], after[1]) + 0.2
    assert [p[0] for p in points] == pytest.approx(
        [chart.x.start + n / 10 * (chart.x.end - chart.x.start) for n in range(11)], abs=0.06
    )
    assert all(chart.y.end <= y <= chart.y.start for _, y in points)


def test_single_points_and_constants_can_be_drawn():
    for values in ({5.0: 0.0}, {1.0: 2.0, 2.0: 2.0}, {1.0: -1.0, 2.0: 0.0}):
        chart = curves("t", "u", [Series(values, "m0 solid", "n")], (1.0, 5.0))
        assert chart
        assert "nan" not in chart.marks[-1].path
        assert chart.y_ticks
    assert curves("t", "u", [Series({}, "m0 solid", "n")], (1.0, 5.0)) is None


def test_histogram_counts_every_value():
    values = [-9.0, -0.5, -0.4, 0.1, 0.2, 0.3, 0.9, 9.0]
    drawn = histogram(values, 1.0, sign=-1)
    assert drawn.beyond == 2
    *bars, mean = drawn.marks
    box = [tuple(map(float, re.findall(r"[\d.]+", bar.path)[:3])) for bar in bars]  # x, floor, top
    heights = [floor - top for _, floor, top in box]
    assert sum(heights) / min(heights) == pytest.approx(len(values), rel=0.02)
    left = [k for k, (x, _, _) in enumerate(box) if x < drawn.width / 2 - 1]
    assert {bars[k].style for k in left} == {"better"}  # of a metric whose lower values are better
    assert sum(heights[k] for k in left) / min(heights) == pytest.approx(3, rel=0.05)
    at = float(mean.path[1:].split()[0])
    assert at == pytest.approx((sum(values) / len(values) + 1) / 2 * drawn.width, abs=0.1)
    assert reach([0.0, 0.0]) == 0.0
    assert reach([*[0.09] * 99, 7.0]) == pytest.approx(0.1)


# Step sizes, errors, pairs, large images -----------------------------------------------------


def plain(text: str) -> str:
    """The page's text without its tags, style and scripts."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def searched(text: str) -> list[list[str]]:
    """The rows of the tables of step sizes, as the texts of their cells."""
    body = part(r'<details id="study">(.*?)</details>', text)
    return [
        [plain(cell) for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.S)]
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)
        if "<td" in row
    ]


def test_step_sizes_are_told(results, folder):
    for searches in results.study.values():
        for search in searches.values():
            for value, trial in search.trials.items():
                error = None if trial.mean is None else 0.65
                search.trials[value] = replace(trial, standard_error=error)
    text = render(results, folder)
    found = searched(text)
    assert len(found) == 2 * 4
    assert found[:4] == [
        [
            *("DPS", "0.5 18.00 ± 0.65", "1 18.32 ± 0.65", "2 18.42 ± 0.65"),
            *("4 (chosen) 18.59 ± 0.65", "4", "4", "at the edge of the values tried"),
        ],
        [
            *("ΠGDM", "0.25 13.74 ± 0.65", "0.5 16.53 ± 0.65", "1 (chosen) 17.62 ± 0.65"),
            *("2 broke an image", "1", "1", "broke an image at 2"),
        ],
        [
            *("CMI alone", "0 9.72 ± 0.65", "0.01 9.73 ± 0.65", "0.03 (chosen) 9.86 ± 0.65"),
            *("0.1 9.66 ± 0.65", "0.03", "0.03", ""),
        ],
        [
            *("CMI+DPS", "0 18.59 ± 0.65", "0.01 18.51 ± 0.65", "0.03 (chosen) 18.52 ± 0.65"),
            *("0.1 18.50 ± 0.65", "0", "0.03", "zero was better"),
        ],
    ]
    said = plain(text)
    assert "The values were searched on other images than those shown (12 of them)." in said
    assert "Under each value stands its PSNR, mean ± standard error" in said


def test_zero_is_remarkable_of_cmi_alone(results, folder):
    searches = results.study["inpaint_random"]
    searches["DPS"] = replace(searches["DPS"], winner=0.0)
    searches["CMI+none"] = replace(searches["CMI+none"], winner=None, chosen=None)
    found = searched(render(results, folder))
    assert found[0][-3:] == ["0", "4", "at the edge of the values tried"]
    assert found[2][-3:] == ["–", "–", ""]


def test_step_sizes_are_in_order_and_may_be_fewer(results, folder):
    searches = results.study["inpaint_random"]
    tried = dict(reversed(searches["DPS"].trials.items()))
    searches["DPS"] = replace(searches["DPS"], trials=tried)
    searches["ΠGDM"] = replace(searches["ΠGDM"], trials={"1e-05": Trial(3.0, None, 11)})
    results.study["inpaint_box"] = {}
    results = replace(results, objective="lpips")
    text = render(results, folder)
    Page(text)  # its elements are closed
    found = searched(text)
    assert [cell.split()[0] for cell in found[0][1:5]] == ["0.5", "1", "2", "4"]
    assert found[1] == ["ΠGDM", "1e-05 3.00", "", "1", "1", ""]
    assert "of them)" not in plain(text)  # not all were tried on as many
    assert "stands its lpips, mean ± standard error" in plain(text)


def test_a_search_of_nothing_is_not_told(results, folder):
    text = render(replace(results, study={"inpaint_random": {}}), folder)
    assert "study" not in ids(text)
    assert "The values were searched" not in plain(text)


def test_posterior_has_standard_errors(results, folder):
    pattern = r'id="posterior".*?<tbody>(.*?)</tbody>'
    line = "DPS random inpainting, 90 % 41.0 ± 1.3 % 80.0 ± 2.1 % 0.800 ± 0.051 1.020 ± 0.004"
    assert plain(part(pattern, render(results, folder))).startswith(line)
    coverage = {"50": Estimate(0.41), "90": Estimate(0.8)}
    bare = {"coverage": coverage, "spread_skill": Estimate(0.8), "residual": Estimate(1.02)}
    body = part(pattern, render(with_draws(results, **bare), folder))
    assert plain(body).count("random inpainting, 90 % 41 % 80 % 0.80 1.02 16 × 16") == 2


def test_summary_says_what_is_corrected_and_whose_step_sizes(results, folder):
    text = plain(render(results, folder))
    said = (
        "The counts pool the metrics; each metric and each kind of comparison has Holm’s "
        "correction for itself."
    )
    assert f"are undecided. {said} Against the method given as many network passes as CMI" in text
    assert "takes, with the step sizes found for the shorter run, it is significantly" in text
    assert text.count(said) == 1
    text = plain(render(replace(results, metrics=results.metrics[:1]), folder))
    assert "pool the metrics" not in text
    assert "Each kind of comparison has Holm’s correction for itself." in text


def test_number_of_pairs_is_told_where_images_are_missing(results, folder):
    assert "n = " not in plain(render(results, folder))
    assert "n is given" not in plain(render(results, folder))
    assert ", n = " not in markdown(results)
    metrics = compared(results, "DPS")
    values = dict(list(metrics["ssim"].values.items())[:37])
    entry = replace(metrics["ssim"], values=values, pairs=37)
    metrics |= {"ssim": entry, "frechet": replace(metrics["frechet"], pairs=37)}
    text = render(results, folder)
    at = next(row for row in rows(text) if row[0] == "CMI+DPS")
    verdict = Verdict(METRICS[1], results.cell("inpaint_random", "DPS", "cmi"), entry)
    assert f"{verdict.change}, n = 37 {verdict.interval}" in at[2]
    assert [k for k, text in enumerate(at) if "n = 37" in text] == [2, 4]
    assert "n is given where the difference is over fewer images" in plain(text)
    histograms = part(r'<section id="histograms">(.*?)</section>', text)
    assert plain(histograms).count("n = 37") == 1
    line = next(line for line in markdown(results).splitlines() if "| CMI+DPS" in line)
    assert f"({verdict.symbol} {verdict.change} {verdict.interval}, n = 37)" in line.split("|")[4]
    read = [row for row in read_csv(results) if row["label"] == "CMI+DPS"]
    pairs = {(row["task"], row["metric"]): row["pairs_base"] for row in read}
    assert pairs["inpaint_random", "ssim"] == "37"
    assert pairs["inpaint_random", "psnr"] == pairs["inpaint_box", "ssim"] == "40"
    assert pairs["inpaint_random", "frechet"] == "37"
    assert pairs["inpaint_box", "frechet"] == "40"


@pytest.mark.parametrize(("size", "shown"), [(96, 2), (97, 1)])
def test_of_large_images_one_best_and_one_worst_are_embedded(results, tmp_path, size, shown):
    for variant in ("base", "cmi"):
        kept = tmp_path / results.cell("inpaint_box", "DPS", variant).folder / "restored"
        kept.mkdir(parents=True)
        for i, name in enumerate(("a", "b", "broken")):
            Image.new("L", (size, size // 2), 40 * i).save(kept / f"{name}.png")
        (kept / "broken.png").write_bytes(b"")
    values = results.cell("inpaint_box", "DPS", "cmi").differences["base"]["psnr"].values
    values.clear()
    values.update(broken=3.0, a=2.0, b=1.0)
    text = render(replace(results, examples={}), tmp_path)
    for name, there in (("best", ["a", "b"][:shown]), ("worst", ["b", "a"][:shown])):
        side = part(rf'data-side="{name}">(.*?)</div>\n      </div>', text)
        assert re.findall(r"<small>(\w+)</small>", side) == there


def test_maps_beyond_the_examples_have_a_truth_of_their_own(results, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "copy")
    cell = next(cell for cell in results.cells if cell.draws)
    results.examples[cell.task] = results.examples[cell.task][:1]
    shown = Album(results, folder).maps(cell)
    assert [m["truth"] is not None for m in shown] == [True, False, False][: len(shown)]
    stem = shown[1]["id"]
    truth = folder / cell.draws.folder / "truth" / f"{stem}.png"
    truth.parent.mkdir(parents=True)
    truth.write_bytes((folder / cell.draws.folder / "restored" / f"{stem}.png").read_bytes())
    shown = Album(results, folder).maps(cell)
    assert shown[1]["truth"] == shown[1]["mean"]


def test_rows_of_descent_have_verdicts_of_their_own(tmp_path):
    made = synthetic_results(tmp_path, 1, 2, 30, 1, variants=VARIANTS)
    text = render(made, tmp_path)
    page = Page(text)
    labels = [label for label, *_ in rows(text)]
    assert labels[1:5] == ["none", "CMI alone", "descent+none", "none, equal passes"]
    cell = made.cells[6]
    verdict = Verdict(METRICS[0], cell, cell.differences["base"]["psnr"])
    row = rows(text)[labels.index("descent+DPS")]
    assert f"{verdict.symbol}{verdict.words}: {verdict.change} {verdict.interval}" in row[1]
    said = plain(text)
    counts = [v.outcome for m in METRICS for v in verdicts(made, m, "base", "descent")]
    assert (
        "descent is significantly better than the same method without it in "
        f"{counts.count('better')} of 10 comparisons, worse in {counts.count('worse')}"
    ) in said
    assert "the step sizes found for the shorter run, descent is significantly better" in said
    assert said.count("descent against its base") == said.count("descent against equal passes") == 5
    assert len(page.all("figure", class_="bars")) == 3 * 2 * 2
    assert page.all("path", class_="curve m1 dashdot")
    line = next(line for line in markdown(made).splitlines() if "| descent+DPS" in line)
    assert f"({verdict.symbol} {verdict.change} {verdict.interval})" in line
    tex = next(line for line in latex(made).splitlines() if line.startswith("descent+DPS"))
    assert ("cellcolor" in tex.split("&")[1]) == (verdict.name != "none")
    assert {row["variant"] for row in read_csv(made)} == {"measured", *VARIANTS}
    assert "descent" not in plain(render(synthetic_results(tmp_path, 1, 2, 30, 1), tmp_path))
