"""The report page: what it says, that data cannot break it, and its use in a browser. pytest tests/test_pages.py"""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from browser import LOW_CONTRAST, Browser, contrasts, needs_browser, problems, read
from evaluation.pages import Bars, Case, Table, data_url, report
from evaluation.plot import round_up
from scenes import make_pair

NASTY = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&amp;</title></table>"""


def decode(url):
    head, content = url.split(",")
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def make_report(path, name="SpatialDiff", instruction=None, cases=4, extra=""):
    pairs = [make_pair(0, "plain", "unseen", 64, index=i) for i in range(cases)]
    report(path, f"Evaluation {name}", {"judge": name, "samples": "150"},
           [Table("VIEScore, 150 samples", ["method", "SC", "O", name], [[name, ".803", "0.843 [0.8, 0.9]", "fine"],
                                                                        ["copy", "—", "-0.1", "1 of 2"]], "copy: a baseline.")],
           [Bars("Success by relation", "share", ["left", name], {name: [(0.5, 0.25, 0.75), None], "copy": [(0.1, 0.0, 0.2)] * 2}),
            Bars("Background", "dB", ["left"], {"model": [(30.0, 20.0, 40.0)]})],
           [Case(f"{i + 1}. {pair.relation}{extra}", instruction or pair.instruction,
                 {f"Source{extra}": pair.ref, "Edit": pair.tgt, "Truth": pair.empty}, {f"SC{extra}": "0.9"}, ("worst", "best", "")[i % 3])
            for i, pair in enumerate(pairs)], ["Two failed.", name])
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def page(folder):
    return make_report(folder / "deep" / "report.html")


def test_markup(page):
    assert problems(page) == []
    assert not [url for url in ("http:", "https:", "url(", "@import") if url in page]


def test_the_rules_of_this_test_find_faults(page):
    for old, new in (('alt="Source', 'data-alt="Source'), (">Close</button>", "></button>"), ("<h3>", "<h5>"), ('scope="col"', ""),
                     ('tabindex="0"', 'tabindex="2"'), ('lang="en"', ""), ("<caption", "<p"), (' aria-hidden="true" width', " width"),
                     ('id="bars-0"', 'id="bars-1"'), ("data:image/jpeg", "http://a/x.png")):
        assert old in page and problems(page.replace(old, new)), old


def test_contrast(page):
    text = [(a, b) for a in ("fg", "muted") for b in ("bg", "card")] + [("on-accent", "accent"), ("accent", "bg")]
    assert {k: round(v, 2) for k, v in contrasts(page, text).items() if v < 4.5} == {}
    shapes = [(f"s{i}", "bg") for i in range(6)] + [("edge", "bg"), ("edge", "card")]
    assert {k: round(v, 2) for k, v in contrasts(page, shapes).items() if v < 3} == {}


def test_contrast_formula():  # WCAG's own examples: black on white 21, #777777 on white just below 4.5
    made = ":root{--a:#000000;--b:#ffffff;--c:#777777} prefers-color-scheme:dark :root{--a:#ffffff;--b:#000000;--c:#777777}"
    found = contrasts(made, [("a", "b"), ("c", "b")])
    assert found["light", "a", "b"] == found["dark", "a", "b"] == pytest.approx(21)
    assert found["light", "c", "b"] == pytest.approx(4.48, abs=0.005)


def test_tables(page):
    table = next(read(page).all("table"))
    assert [th.text() for th in table.all("th") if th.attrs["scope"] == "col"] == ["method", "SC", "O", "SpatialDiff"]
    rows = list(next(table.all("tbody")).all("tr"))
    assert [[cell.text() for cell in row.all("th", "td")] for row in rows] == [
        ["SpatialDiff", ".803", "0.843 [0.8, 0.9]", "fine"], ["copy", "—", "-0.1", "1 of 2"]]
    assert [["n" == cell.attrs.get("class") for cell in row.all("td")] for row in rows] == [[True, True, False]] * 2
    assert "copy: a baseline." in page and ".n{text-align:right" in page and "tabular-nums" in page


def test_bars(page):
    first, second = list(read(page).all("table"))[1:]
    numbers = [cell.text() for cell in first.all("td") if cell.attrs.get("class") == "n"]
    assert [" ".join(n.split()) for n in numbers] == ["0.500 [0.250, 0.750]", "0.100 [0.000, 0.200]", "not measured",
                                                      "0.100 [0.000, 0.200]", "share"]
    drawn = [svg for svg in first.all("svg")]
    bar = next(drawn[0].all("rect")).attrs
    end = round_up(0.75)  # of the axis, which starts at 0
    assert float(bar["x"][:-1]) == 0 and float(bar["width"][:-1]) == pytest.approx(50 / end)
    whisker = [line.attrs for line in drawn[0].all("line") if line.attrs["class"] == "whisker"]
    assert [float(whisker[0][x][:-1]) for x in ("x1", "x2")] == pytest.approx([25 / end, 75 / end])
    assert not list(drawn[2].all("rect")), "a missing value is no bar"
    single = [th.text() for th in second.all("th") if th.attrs["scope"] == "row"]
    assert single == ["left"] and "30.0" in next(second.all("tbody")).text()


def test_bars_below_zero(tmp_path):
    values = [(-2, -4, 0), (math.nan,) * 3, (0.0, math.nan, 1)]
    report(tmp_path / "x.html", "t", {}, [], [Bars("b", "", ["a", "b", "c"], {"s": values})], [], [])
    drawn = list(read((tmp_path / "x.html").read_text()).all("svg"))
    bar = next(drawn[0].all("rect")).attrs
    left, right = -round_up(4), round_up(1)
    assert float(bar["x"][:-1]) == pytest.approx(100 * (-2 - left) / (right - left), abs=0.01)
    assert float(bar["width"][:-1]) == pytest.approx(100 * 2 / (right - left), abs=0.01)
    assert not list(drawn[1].all("rect")) and "nan" not in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("x, end", [(0, 0), (0.05, 0.05), (0.83, 1), (1, 1), (1.2, 2), (2.1, 2.5), (41, 50), (0.3, 0.5), (7, 10)])
def test_round_up(x, end):
    assert round_up(x) == pytest.approx(end)


def test_cases(page):
    root = read(page)
    sections = {next(s.all("h2")).text(): s for s in root.all("section")}
    assert list(sections) == ["Results", "Means and intervals", "Notes", "Worst cases", "Best cases", "Cases"]
    assert [len(list(sections[k].all("figure"))) for k in ("Worst cases", "Best cases", "Cases")] == [2, 1, 1]
    pair = make_pair(0, "plain", "unseen", 64, index=1)
    figure = next(sections["Best cases"].all("figure"))
    assert [img.attrs["alt"] for img in figure.all("img")] == [f"{c}, 2. {pair.relation}" for c in ("Source", "Edit", "Truth")]
    assert pair.instruction in figure.text() and "0.9" in figure.text()
    for img, truth in zip(figure.all("img"), (pair.ref, pair.tgt, pair.empty)):
        assert np.abs(decode(img.attrs["src"])[1].astype(int) - truth).mean() < 3  # JPEG's loss; other pictures: over 3
        assert np.abs(pair.ref.astype(int) - pair.tgt).mean() > 3


def test_escapes_everything(tmp_path):
    page = make_report(tmp_path / "x.html", NASTY, NASTY, extra=NASTY)
    assert problems(page) == []
    root = read(page)
    assert len(list(root.all("script"))) == 1 and next(root.all("title")).text() == f"Evaluation {NASTY}"
    assert next(next(root.all("figure")).all("p")).text() == NASTY
    assert next(next(root.all("figure")).all("img")).attrs["data-caption"] == "Source" + NASTY
    assert not [node for node in root.all() if "onerror" in node.attrs]
    report(tmp_path / "y.html", "half a pair \ud83d", {}, [], [], [], [])
    assert "half a pair" in (tmp_path / "y.html").read_text("utf-8")


def test_pictures_are_capped_and_small():
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(1000, 400, 3)).astype(np.uint8)
    head, picture = decode(data_url(noise))
    assert picture.shape == (512, 205, 3) and head == "data:image/jpeg;base64"
    flat = np.full((100, 300, 3), (10, 200, 30), np.uint8)
    head, picture = decode(data_url(flat))
    assert head == "data:image/png;base64" and np.array_equal(picture, flat)
    assert decode(data_url(np.zeros((1, 2000, 3), np.uint8)))[1].shape == (1, 512, 3)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            data_url(wrong)


def test_errors_name_what_is_wrong(tmp_path):
    path = tmp_path / "x.html"
    with pytest.raises(ValueError, match='"T" has 2 columns'):
        report(path, "t", {}, [Table("T", ["a", "b"], [["1"]])], [], [], [])
    with pytest.raises(ValueError, match='"B": 1 labels, but series s has 2'):
        report(path, "t", {}, [], [Bars("B", "", ["a"], {"s": [None, None]})], [], [])
    with pytest.raises(ValueError, match='"C" has no picture'):
        report(path, "t", {}, [], [], [Case("C", "", {})], [])
    assert list(tmp_path.iterdir()) == []


def test_empty_parts_leave_no_headings(tmp_path):
    report(tmp_path / "x.html", "t", {}, [], [], [], [])
    page = (tmp_path / "x.html").read_text()
    assert problems(page) == [] and "<h2" not in page and "<dialog" not in page and list(tmp_path.iterdir()) == [tmp_path / "x.html"]


# In a browser


@pytest.fixture(scope="module")
def browser(folder):
    browser = Browser(folder)
    yield browser
    browser.close()


@needs_browser
def test_enlarge_flip_and_focus(browser, folder, page):
    browser.screen(1280, 900)
    browser.open((folder / "deep" / "report.html").as_uri())
    state = "[view.open, $('view-caption').textContent, $('view-title').textContent]"
    titles = [figure.text().split(" Enlarge")[0] for figure in read(page).all("h3")]
    second, third = titles[1], titles[2]
    browser.js("openers[1].focus()")
    browser.key("Enter")
    assert browser.js(state) == [True, "Edit, picture 2 of 3", second]
    assert browser.js("$('view-image').src === openers[1].querySelectorAll('img')[1].src && $('view-image').alt.startsWith('Edit')")
    browser.key(" ")
    assert browser.js(state)[1] == "Source, picture 1 of 3"
    browser.key(" ")
    assert browser.js(state)[1] == "Edit, picture 2 of 3"
    browser.key("ArrowRight")
    assert browser.js(state)[1] == "Truth, picture 3 of 3"
    browser.key(" ")
    browser.key(" ")
    assert browser.js(state)[1] == "Truth, picture 3 of 3", "a flip returns to the picture it left"
    browser.key("ArrowRight")
    assert browser.js(state)[1] == "Source, picture 1 of 3"
    browser.key("ArrowLeft")
    assert browser.js(state)[1] == "Truth, picture 3 of 3"
    browser.key("ArrowDown")
    assert browser.js(state) == [True, "Edit, picture 2 of 3", third]
    visited = set()
    for shift in (False, True):
        for _ in range(9):
            browser.key("Tab", shift)
            visited.add(browser.js("(e => view.contains(e) && (e.id || e.textContent))(document.activeElement)"))
    assert visited == {"close", "flip", "before", "after", "Source", "Edit", "Truth"}, "the focus stays inside, and reaches all"
    browser.js("$('choices').children[0].focus()")
    browser.key("Enter")
    assert browser.js("[$('view-caption').textContent, document.activeElement.textContent, document.activeElement.ariaPressed]") == [
        "Source, picture 1 of 3", "Source", "true"]
    browser.key("Escape")
    browser.wait("!view.open && document.activeElement === openers[2]")
    browser.click("figure.case button")
    assert browser.js(state)[0]
    browser.click("#flip")
    assert browser.js(state)[1] == "Source, picture 1 of 3"
    browser.click("#close")
    assert not browser.js("view.open") and browser.errors() == []


@needs_browser
@pytest.mark.parametrize("dark", (False, True))
@pytest.mark.parametrize("width", (360, 1280))
def test_layout_and_contrast(browser, folder, page, width, dark):
    browser.screen(width, 740, phone=width == 360, dark=dark)
    browser.open((folder / "deep" / "report.html").as_uri())
    fits = browser.js("document.scrollingElement.scrollWidth <= document.documentElement.clientWidth")
    assert fits, "only tables scroll sideways, in their own box"
    found = browser.js(LOW_CONTRAST)
    assert found["seen"] > 40 and found["low"] == []
    browser.click("figure.case button")
    assert browser.js("view.scrollWidth <= view.clientWidth && view.getBoundingClientRect().right <= innerWidth")
    assert browser.js(LOW_CONTRAST)["low"] == []
    sides = browser.js("[...document.querySelectorAll('button')].flatMap(b => [b.offsetHeight, b.offsetWidth]).filter(x => x)")
    assert len(sides) > 14 and min(sides) >= 44, "tap targets of 44 px"
    assert {url.split("/")[-1] for url in browser.requests()} <= {"report.html", "nasty.html"}, "nothing is loaded"


@needs_browser
def test_data_runs_no_script(browser, folder):
    make_report(folder / "nasty.html", NASTY, NASTY, extra=NASTY)
    browser.open((folder / "nasty.html").as_uri())
    browser.click("figure.case button")
    assert browser.js("$('view-text').textContent") == NASTY
    assert not [e for e in browser.events if e["method"] == "Page.javascriptDialogOpening"] and browser.errors() == []
