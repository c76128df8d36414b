"""The report page: whole without anything from elsewhere, no folders in it, and plots that are right."""

import html.parser
import re

import pytest
from PIL import Image

from refine.evaluation import svg
from refine.evaluation.pictures import Pictures, side_by_side
from refine.evaluation.provenance import command_of, describe_run
from refine.evaluation.report import html_page
from refine.evaluation.run_folder import RunFolder, Snapshot
from refine.evaluation.tables import curve_text, sparkline


def numbers(*values):
    return {"mean": sum(values) / len(values), "std": 0.1, "values": list(values)}


def side(name, fd):
    found = {"path": f"/home/somebody/{name}", "name": name, "sha256": "0" * 64, "sampling": "psi 1"}
    return {**found, "fd_digits": numbers(fd, fd + 0.2, fd - 0.2), "precision": numbers(0.5, 0.6, 0.7), "seconds": 1.0}


def results(**more):
    change = {"interval": [-5.0, -4.0], "method": "paired bootstrap", "verdict": "better"}
    found = {
        "before": side("<a>.pkl", 7.0),
        "after": side("b.pkl", 2.0),
        "difference": {"fd_digits": {**numbers(-5.0, -5.0), **change}, "precision": {**numbers(0.0, 0.0), **change}},
        "metric": "fd_digits",
        "verdict": "better",
        "summary": "It is better.",
        "notes": ["one <note>"],
        "num": 20,
        "seeds": ["0-19", "20-39", "40-59"],
        "detector": {
            "name": "digits", "space": "digits", "sha256": "1" * 64, "feature_dim": 32, "resize": "none",
            "fid_basis": None,
        },
        "reference": {"name": "ref.npz", "sha256": "2" * 64, "num": 50, "form": "statistics"},
        "quantisation": "q", "covariance": "c", "versions": {"torch": "2"}, "seconds": 3.0, "device": "cpu",
    }  # fmt: skip
    return found | more


def pictures():
    grid = Image.new("L", (64, 64))
    panels = {"diversity": {"before: pairs": Image.new("L", (64, 32))}}
    return Pictures({"before": (grid, "before: a"), "after": (grid, "after: b")}, {}, panels, 2, True)


class Checked(html.parser.HTMLParser):
    """Every tag is closed in its place, and what is loaded is in the page."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "input", "line", "circle", "rect", "polygon", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page):
    parser = Checked()
    parser.feed(page)
    assert parser.open == [] and all(value.startswith("data:image/png;base64,") for value in parser.loaded)
    return parser


def curve():
    points = ((0.32, 3.0, False), (0.64, 2.0, True))
    rows = [{"kimg": kimg, "name": f"{kimg}", "judged": judged, **side("x", fd)} for kimg, fd, judged in points]
    return [{key: row[key] for key in ("kimg", "name", "judged", "fd_digits", "precision")} for row in rows]


def test_the_page_holds_everything_itself_and_names_no_folder():
    options = {"gan": "g.pkl", "kimg": 6.4}
    run = {"folder": "00000-x", "kimg": 6.4, "options": options, "command": "python refine.py --gan=<g>.pkl"}
    page = html_page(results(run=run, curve=curve()), pictures())
    tags = checked(page).tags
    assert "/home" not in page and "http:" not in page and "https:" not in page and "url(" not in page
    assert "default-src 'none'" in page and "&lt;a&gt;.pkl" in page and "<a>" not in page and "one &lt;note&gt;" in page
    assert '<span class="option">--gan</span>=&lt;g&gt;.pkl' in page  # no line ends within an option
    assert "image-rendering: pixelated" in page and 'class="pictures pixels"' in page
    assert "prefers-color-scheme: dark" in page and "max-width: 720px" in page
    assert 'type="range"' in page and "data-blink" in page
    assert tags.count("svg") == 2 * 2 + 2  # a plot and a change for each metric; the distance and the shares of the run
    assert "<polyline" in page and "{" not in re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)


def test_large_images_are_not_shown_as_pixels():
    large = Pictures(pictures().grids, {}, {}, 2, False)
    assert 'class="pictures pixels"' not in html_page(results(), large)


def test_dots_are_where_the_numbers_are():
    plot = svg.dots("x", [svg.Dot("a", "before", 1.0, 0.0, 2.0), svg.Dot("b", "after", 2.0, 1.5, 2.5)], zero=True)
    means = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', plot)]
    ticks = {
        float(text): float(x)
        for x, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(.+?)<', plot)
    }
    assert means == pytest.approx([ticks[1.0], ticks[2.0]], abs=0.2) and 0.0 in ticks
    checked(plot)


@pytest.mark.parametrize("values", [(0.0, 0.0), (3.0, 3.0), (-1.0, 1.0), (1e-9, 2e-9), (0.0, 5e7)])
def test_every_range_has_an_axis(values):
    low, high = values
    checked(svg.dots("x", [svg.Dot("a", "before", low, low, high, values)], zero=True))
    checked(svg.lines("x", [svg.Line("a", "line0", [(0.0, low, 0.0), (1.0, high, 0.1)], low)], [0.0], "kimg"))
    checked(svg.bars("x", values, values, 0.0, "class"))


def test_the_curve_as_text():
    text = curve_text(results(curve=curve()))
    first, header, before, *rows = text.splitlines()
    assert first == "fd_digits of the run: █▄▃" and header.split() == ["kimg", "fd_digits", "precision"]
    assert before.split()[:2] == ["before", "7.000"] and [row.split()[0] for row in rows] == ["0.32", "0.64"]
    assert "judged" not in rows[0] and rows[1].endswith("judged")
    assert sparkline([0, 0]) == "▁▁" and sparkline([-1, 1]) == "▁█" and sparkline([5]) == "█"


def test_a_picture_with_rows_below():
    grid, row = Image.new("L", (64, 64)), Image.new("L", (64, 32), 255)
    rows = {"teacher": (row, "teacher"), "real": (row, "real")}
    assert side_by_side(Pictures({"a": (grid, "a"), "b": (grid, "b")}, rows)).size == (1328, 640 + 320 + 2 * 52)
    assert side_by_side(Pictures({"a": (grid, "a"), "b": (grid, "b")}, {})).size == (1328, 640 + 52)


def test_the_command_is_what_differs_from_the_preset():
    options = {"gan": "g.pkl", "teacher": "t.pkl", "preset": "demo", "kimg": 6.4, "batch": 64, "betas": [0.0, 0.999]}
    options |= {"metrics": ["fd2k-digits"], "seed": 1, "sigma": {"name": "karras", "rho": 5.0}, "of_the_future": 1}
    assert command_of(options) == (
        "python refine.py --gan=g.pkl --teacher=t.pkl --preset=demo --batch=64 --sigma=karras:5.0 --seed=1"
    )


def test_options_of_a_run_without_folders(tmp_path):
    folder = tmp_path / "00003-x"
    folder.mkdir()
    (folder / "training_options.json").write_text(
        '{"gan": "/home/me/g.pkl", "teacher": "C:\\\\me\\\\t.pkl", "ref": "teacher", "outdir": "/home/me/runs", '
        '"metrics": ["fd2k-/home/me/detector.pt"], "run_dir": "/home/me", "kimg": 3}'
    )
    snapshot = folder / "network-snapshot-000003.pkl"
    snapshot.write_bytes(b"\x80\x02}.")
    run = RunFolder(folder, (), Snapshot(3.0, snapshot), has_best=False)
    described = describe_run(run, snapshot)
    assert described["folder"] == "00003-x" and "/me" not in str(described) and "\\" not in str(described)
    assert "--gan=g.pkl --teacher=t.pkl" in described["command"] and "--kimg=3" in described["command"]
    for text in ("not JSON", "[1]", "[" * 100_000, '{"gan": 1}'):
        (folder / "training_options.json").write_text(text)
        assert describe_run(run, snapshot) is None
