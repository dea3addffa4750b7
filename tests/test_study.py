"""The user study: what the page hides, that votes survive, and the tally against counts by hand. pytest tests/test_study.py"""

import base64
import itertools
import json
import re
import time

import numpy as np
import pytest

from browser import LOW_CONTRAST, Browser, contrasts, needs_browser, problems, read
from evaluation.metrics import bootstrap_two_ways
from evaluation.study import CRITERIA, FORMAT, study
from evaluation.tally import kendall_w, tally, tally_table
from scenes import make_pair
from test_pages import decode

METHODS = ["FLUX Kontext", "Qwen <b>Edit</b>", "SpatialDiff"]
NASTY = '</script><script>alert(1)</script>"\'&amp;'


def make_study(path, samples=4, seed=0, instruction=None, size=64, methods=METHODS):
    pairs = [make_pair(0, "plain", "unseen", size, index=i) for i in range(samples)]
    rows = [(f"translate/{i}", instruction or pair.instruction, pair.ref,
             dict(zip(methods, itertools.cycle((pair.ref, pair.empty, pair.tgt))))) for i, pair in enumerate(pairs)]
    return rows, study(path, rows, seed)


def content(page):
    return json.loads(next(s for s in read(page).all("script") if s.attrs.get("id") == "data").children[0])


def opened(page):
    return json.loads(base64.b64decode(content(page)["key"]))


def vote(page, voter, rate, saved="2026-01-01T00:00:00Z"):
    """A vote file as the page exports it; rate(sample id, method) gives three ratings or None."""
    key = opened(page)
    ratings = [[rate(sample["id"], key["methods"][m]) for m in sample["order"]] for sample in key["samples"]]
    ratings = [None if row == [None] * len(row) else [r or [None] * 3 for r in row] for row in ratings]
    return {"format": FORMAT, "study": content(page)["study"], "voter": voter, "saved": saved, "ratings": ratings,
            "key": content(page)["key"]}


def write(folder, **votes):
    for name, value in votes.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return [folder / f"{name}.json" for name in votes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def page(folder):
    make_study(folder / "study.html")
    return (folder / "study.html").read_text("utf-8")


# The page


def test_markup_and_contrast(page):
    assert problems(page) == [] and not re.search(r"https?:|url\(|@import", page)
    text = [(a, b) for a in ("fg", "muted") for b in ("bg", "card")] + [("on-accent", "accent")]
    assert {k: v for k, v in contrasts(page, text).items() if v < 4.5} == {}
    radios = [node.attrs for node in read(page).all("input")]
    assert len(radios) == len(METHODS) * len(CRITERIA) * 5 and {r["type"] for r in radios} == {"radio"}
    assert len({r["name"] for r in radios}) == len(METHODS) * len(CRITERIA)


def test_methods_are_out_of_sight(page):
    for name in ("FLUX", "Kontext", "Qwen", "SpatialDiff", "translate/"):
        assert name.lower() not in page.lower()
    assert opened(page)["methods"] == METHODS


def test_samples_and_order(page, tmp_path):
    rows, _ = make_study(tmp_path / "x.html", samples=12)
    page = (tmp_path / "x.html").read_text("utf-8")
    key, samples = opened(page), content(page)["samples"]
    assert [s["id"] for s in key["samples"]] == [row[0] for row in rows] and [s["instruction"] for s in samples] == [row[1] for row in rows]
    for row, sample, sealed in zip(rows, samples, key["samples"]):
        assert sorted(sealed["order"]) == [0, 1, 2]
        for url, m in zip(sample["edits"], sealed["order"]):
            distance = {name: np.abs(decode(url)[1].astype(int) - picture).mean() for name, picture in row[3].items()}
            assert min(distance, key=distance.get) == METHODS[m]
    assert len({tuple(s["order"]) for s in key["samples"]}) >= 4, "each sample has its own order"
    again, other = make_study(tmp_path / "y.html", samples=12)[1], make_study(tmp_path / "z.html", samples=12, seed=1)[1]
    assert again == content(page)["study"] != other
    assert (tmp_path / "y.html").read_bytes() == (tmp_path / "x.html").read_bytes()


def test_edits_have_the_size_of_the_source(tmp_path):
    source = np.zeros((40, 60, 3), np.uint8)
    study(tmp_path / "x.html", [("a", "t", source, {"m": np.zeros((64, 64, 3), np.uint8), "n": source})])
    assert {decode(url)[1].shape for url in content((tmp_path / "x.html").read_text())["samples"][0]["edits"]} == {(40, 60, 3)}


def test_hash_covers_pictures_and_text(tmp_path):
    rows, first = make_study(tmp_path / "x.html")
    other = np.array(rows[0][3][METHODS[0]])
    other[10:40, 10:40] = 200
    changed = [(rows[0][0], rows[0][1], rows[0][2], {**rows[0][3], METHODS[0]: other}), *rows[1:]]
    reworded = [(rows[0][0], "Do nothing.", *rows[0][2:]), *rows[1:]]
    assert len({first, *(study(tmp_path / "y.html", r) for r in (changed, reworded, rows[:3]))}) == 4


def test_text_cannot_break_the_page(tmp_path):
    rows, _ = make_study(tmp_path / "x.html", instruction=NASTY)
    study(tmp_path / "x.html", rows, title=NASTY)
    page = (tmp_path / "x.html").read_text("utf-8")
    assert problems(page) == [] and len(list(read(page).all("script"))) == 2
    assert content(page)["samples"][0]["instruction"] == NASTY and next(read(page).all("h1")).text() == NASTY


def test_refused_studies(tmp_path):
    rows, _ = make_study(tmp_path / "x.html", 2)
    (a, t, source, edits), b = rows
    for wrong, message in (([], "at least one sample"), ([rows[0], rows[0]], "translate/0 occurs twice"),
                           ([(a, None, source, edits), b], "translate/0 has no instruction"),
                           ([(a, t, source, {"only": source})], "2 to 8 methods, found 1: only"),
                           ([(a, t, source, {str(i): source for i in range(9)})], "found 9"),
                           ([(a, t, source, {**edits, "more": source}), b], "translate/1 has edits by FLUX Kontext")):
        with pytest.raises(ValueError, match=message):
            study(tmp_path / "y.html", wrong)
    assert not (tmp_path / "y.html").exists()


# The tally


def test_tally_by_hand(page, tmp_path):
    scores = {"v1": {"FLUX Kontext": (1, 5, 2), "Qwen <b>Edit</b>": (3, 5, 3), "SpatialDiff": (5, 4, 5)},
              "v2": {"FLUX Kontext": (2, 3, 1), "Qwen <b>Edit</b>": (2, 5, 4), "SpatialDiff": (4, 4, 5)}}
    files = write(tmp_path, **{v: vote(page, v, lambda _, m, v=v: scores[v][m]) for v in scores})
    result = tally(files)
    assert (result["voters"], result["ratings"], result["methods"], result["duplicates"]) == (2, 2 * 4 * 3 * 3, METHODS, [])
    assert result["samples"] == [f"translate/{i}" for i in range(4)]
    sc, pq = result["criteria"]["H-SC"], result["criteria"]["H-PQ"]
    assert [sc["means"][m]["mean"] for m in METHODS] == [1.5, 2.5, 4.5] and sc["means"]["SpatialDiff"]["count"] == 8
    assert [pq["means"][m]["mean"] for m in METHODS] == [4, 5, 4]
    assert (sc["means"]["SpatialDiff"]["low"], sc["means"]["SpatialDiff"]["high"]) == (4, 5)
    # ranks, 1 = best: v1 3, 2, 1; v2 2.5, 2.5, 1
    assert [sc["ranks"][m] for m in METHODS] == [2.75, 2.25, 1]
    assert sc["wins"]["SpatialDiff"] == {"FLUX Kontext": 1, "Qwen <b>Edit</b>": 1}
    assert sc["wins"]["Qwen <b>Edit</b>"]["FLUX Kontext"] == 0.75 and sc["wins"]["FLUX Kontext"]["Qwen <b>Edit</b>"] == 0.25
    # rank sums 5.5, 4.5, 2 around 4: S = 2.25 + 0.25 + 4 = 6.5; one pair tied: W = 12 * 6.5 / (4 * 24 - 2 * 6)
    assert sc["agreement"] == {"kendall_w": pytest.approx(78 / 84), "samples": 4}
    printed = tally_table(result)
    assert "| SpatialDiff | 4.50 [4.00, 5.00] | 1.00 |" in printed and "75%" in printed and "Kendall's W" in printed


def test_kendall_w():
    assert kendall_w(np.array([[1, 2, 3], [1, 2, 3], [2, 4, 5]])) == 1
    assert kendall_w(np.array([[1, 2], [2, 1]])) == 0
    # Three voters, four methods: ranks 1234, 2134, 1324; sums 4, 6, 8, 12 around 7.5; S = 12.25 + 2.25 + 0.25 + 20.25 = 35;
    # W = 12 * 35 / (9 * (64 - 4)) = 7/9.
    assert kendall_w(np.array([[1, 2, 3, 4], [2, 1, 3, 4], [1, 3, 2, 4]])) == pytest.approx(7 / 9)
    # Ties: ranks 1.5 1.5 3 and 1 2 3; sums 2.5, 3.5, 6 around 4; S = 2.25 + 0.25 + 4 = 6.5; T = 2^3 - 2 = 6;
    # W = 12 * 6.5 / (4 * 24 - 2 * 6) = 78 / 84.
    assert kendall_w(np.array([[2, 2, 5], [1, 2, 3]])) == pytest.approx(78 / 84)
    # All but one tied by three: T = 3 * (27 - 3) = 72 of both voters = 2 * 24.
    assert kendall_w(np.array([[4, 4, 4, 1], [2, 2, 2, 1]])) == pytest.approx(1)
    assert np.isnan(kendall_w(np.array([[3, 3], [1, 1]])))


def test_intervals():
    """Against the formula of a balanced two-way layout with voter and sample effects: variance = s_v^2/V + s_s^2/S + s_e^2/VS.
    Resampling only voters, only samples or single votes would be off by far more than the 10 % allowed."""
    rng = np.random.default_rng(1)
    V, S = 40, 60
    voter, sample, rest = rng.normal(0, 0.6, (V, 1)), rng.normal(0, 0.9, (1, S)), rng.normal(0, 0.3, (V, S))
    mean, low, high, count = bootstrap_two_ways(3 + voter + sample + rest)
    deviation = np.sqrt(voter.var() / V + sample.var() / S + 0.3**2 / (V * S))
    assert count == V * S and low < mean < high
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.1)
    with_gaps = np.where(rng.uniform(size=(V, S)) < 0.5, np.nan, 3.0)
    assert bootstrap_two_ways(with_gaps)[:3] == (3, 3, 3) and bootstrap_two_ways(with_gaps)[3] == np.isfinite(with_gaps).sum()


def test_unfinished_votes_count_where_they_can(page, tmp_path):
    def half(sample, method):
        return [5, None, None] if sample == "translate/1" and method == "SpatialDiff" else None
    files = write(tmp_path, a=vote(page, "a", half), b=vote(page, "b", lambda s, m: [4, 4, 4] if s == "translate/1" else None))
    result = tally(files)
    sc = result["criteria"]["H-SC"]
    assert sc["means"]["SpatialDiff"]["mean"] == 4.5 and sc["means"]["FLUX Kontext"]["mean"] == 4 and result["ratings"] == 10
    assert sc["agreement"]["samples"] == 0 and sc["ranks"]["SpatialDiff"] == 2 and sc["wins"]["SpatialDiff"]["FLUX Kontext"] == 0.5
    assert "nan" in tally_table(result)
    with pytest.raises(ValueError, match="c.json; nothing to tally"):
        tally(write(tmp_path, c=vote(page, "c", lambda s, m: None)))


def test_the_latest_file_of_a_voter_counts(page, tmp_path):
    old = vote(page, "same", lambda s, m: [1, 1, 1], "2026-03-01T10:00:00.000Z")
    new = vote(page, "same", lambda s, m: [5, 5, 5], "2026-03-02T09:00:00.000Z")
    for order in (("new", "old"), ("old", "new")):
        files = write(tmp_path, **{name: {"new": new, "old": old}[name] for name in order})
        result = tally([*files, *write(tmp_path, other=vote(page, "other", lambda s, m: [3, 3, 3]))])
        assert result["voters"] == 2 and result["duplicates"] == [str(tmp_path / "old.json")]
        assert result["criteria"]["H-O"]["means"]["SpatialDiff"]["mean"] == 4
        assert "old.json" in tally_table(result)


def test_bad_files_are_refused_by_name(page, folder, tmp_path):
    good = vote(page, "a", lambda s, m: [3, 3, 3])
    make_study(tmp_path / "other.html", seed=9)
    foreign = vote((tmp_path / "other.html").read_text("utf-8"), "b", lambda s, m: [3, 3, 3])
    ok = write(tmp_path, good=good)

    def changed(**changes):
        return {**good, **changes}

    def rated(value, row=0):
        ratings = json.loads(json.dumps(good["ratings"]))
        ratings[1][row][2] = value
        return changed(ratings=ratings)

    cases = {"torn": (json.dumps(good)[:-40], "torn.json is not a whole vote file"), "empty": ("", "empty.json"),
             "list": ([1], "its format"), "format": (changed(format="x"), "its format"),
             "key": (changed(key=foreign["key"]), "key does not belong"), "short": (changed(ratings=good["ratings"][:2]), "2 samples of 4"),
             "missing": ({k: v for k, v in good.items() if k != "ratings"}, "'ratings' is missing"), "voter": (changed(voter=None), "voter"),
             "six": (rated(6), "translate/1 is rated 6"), "zero": (rated(0), "rated 0"), "text": (rated("5"), "rated '5'"),
             "true": (rated(True), "rated True"), "float": (rated(4.5), "rated 4.5"),
             "few": (changed(ratings=[row[:2] for row in good["ratings"]]), "has not 3 edits"),
             "pair": (changed(ratings=[[r[:2] for r in row] for row in good["ratings"]]), "has not 3 edits"),
             "number": (changed(ratings=[3] * 4), "number.json"), "foreign": (foreign, "foreign.json belongs to study")}
    for name, (value, message) in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            tally([*ok, *write(tmp_path, **{name: value})])
        assert f"{name}.json" in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.json"):
        tally([tmp_path / "none.json"])
    with pytest.raises(ValueError, match="found none"):
        tally([])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.json"):
        tally([tmp_path / "binary.json"])


# In a browser


@pytest.fixture
def browser(tmp_path):
    browsers = []

    def start():
        browsers.append(Browser(tmp_path))
        return browsers[-1]
    yield start
    browsers[-1].close()


def exported(browser):
    return json.loads(browser.js("$('votes').value"))


@needs_browser
def test_votes_by_keyboard_survive_and_reach_the_tally(browser, folder, page, tmp_path):
    chrome, url = browser(), (folder / "study.html").as_uri()
    chrome.screen(1280, 900)
    chrome.open(url)
    assert chrome.js("$('warning').hidden && document.activeElement === document.body")
    chrome.js("scales[0].querySelector('input').focus()")
    marks = "512434251"  # A 5 1 2, B 4 3 4, C 2 5 1
    for sample in range(3):
        for mark in marks:
            chrome.key(mark)
        assert chrome.js("document.activeElement.id") == "next"
        if sample == 0:
            assert chrome.js("[...document.querySelectorAll('.order')].map(e => e.textContent)") == ["A > B > C", "C > B > A", "B > A > C"]
            assert chrome.js("$('done').textContent") == "1 of 4 samples finished"
        chrome.key("Enter")
        assert chrome.js("$('where').textContent") == f"Sample {sample + 2} of 4"
    chrome.key("b")  # to the edit B
    chrome.key("3")
    assert chrome.js("scales.indexOf(document.activeElement.closest('.scale'))") == 4
    chrome.key("ArrowRight")  # arrows choose inside a scale
    before = exported(chrome)
    seen = chrome.js("STUDY.samples.map((_, s) => letters[s])")
    order = chrome.js("samples")
    chrome.open("about:blank")
    chrome.close()

    chrome = browser()  # the browser was closed: votes, orders and place are still there
    chrome.screen(1280, 900)
    chrome.open(url)
    assert exported(chrome) == before and chrome.js("[samples, STUDY.samples.map((_, s) => letters[s])]") == [order, seen]
    assert chrome.js("[$('where').textContent, $('done').textContent]") == ["Sample 4 of 4", "3 of 4 samples finished"]
    assert chrome.js("scales.map(s => +(s.querySelector('input:checked') || {value: 0}).value)") == [0, 0, 0, 3, 2, 0, 0, 0, 0]
    chrome.js("scales[0].querySelector('input').focus()")
    chrome.key("Backspace")
    assert chrome.js("$('where').textContent") == "Sample 3 of 4"
    assert chrome.js("scales.map(s => +s.querySelector('input:checked').value).join('')") == marks

    saved = tmp_path / "down"
    saved.mkdir()
    chrome.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
    chrome.click("#download")
    chrome.wait("$('status').textContent.startsWith('Downloaded')")
    deadline = time.time() + 20
    while not list(saved.glob("votes_*.json")) and time.time() < deadline:
        time.sleep(0.05)
    file, = saved.glob("votes_*.json")
    assert json.loads(file.read_text()) == before
    chrome.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    chrome.click("#copy")
    chrome.wait("$('status').textContent === 'Copied.'")
    assert json.loads(chrome.js("navigator.clipboard.readText()")) == before

    # What was typed under letters arrives at the methods whose pictures were on show under these letters.
    given = {method: [] for method in METHODS}
    for place, sample in enumerate(order):
        for letter, marks_of in enumerate(("512", "434", "251") if place < 3 else ("", "32", "")):
            given[METHODS[opened(page)["samples"][sample]["order"][seen[sample][letter]]]].append(marks_of)
    result = tally([file])
    for c, name in enumerate(CRITERIA):
        for method, found in result["criteria"][name]["means"].items():
            marks_given = [int(m[c]) for m in given[method] if len(m) > c]
            assert found["count"] == len(marks_given) and found["mean"] == pytest.approx(np.mean(marks_given))
    assert chrome.errors() == [] and all(u.startswith(("file:", "about:")) for u in chrome.requests())


@needs_browser
def test_letters_show_the_pictures_they_stand_for(browser, folder, page):
    chrome = browser()
    chrome.open((folder / "study.html").as_uri())
    for place in range(4):
        sample = chrome.js("now()")
        shown = chrome.js("cards.map(c => c.querySelector('img').src)")
        edits = content(page)["samples"][sample]["edits"]
        assert shown == [edits[slot] for slot in chrome.js("letters[now()]")] and sorted(shown) == sorted(edits)
        assert chrome.js("$('source').src") == content(page)["samples"][sample]["before"]
        assert chrome.js("$('instruction').textContent") == content(page)["samples"][sample]["instruction"]
        chrome.click(".edit .peek")
        assert chrome.js("[cards[0].querySelector('img').src === $('source').src, cards[0].querySelector('img').alt]") == [
            True, "Picture before the edit"]
        if place < 3:
            chrome.click("#next")
    html = chrome.js("document.documentElement.outerHTML")
    assert problems(re.sub(r"(<[^>]*) checked=\"\"", r"\1", html)) == []
    assert not [m for m in ("FLUX", "Qwen", "SpatialDiff") if m in html]


@needs_browser
def test_every_voter_has_an_order(browser, folder):
    chrome, url, seen = browser(), (folder / "study.html").as_uri(), {}
    for name in ("", "#ann", "#bob", "#cem", "#dan", ""):  # a new name in the address is a new voter
        chrome.open(url + name)
        chrome.wait(f"document.readyState === 'complete' && KEY === 'study:' + STUDY.study + '{name}'")
        voter, samples, letters = chrome.js("[state.voter, samples, letters]")
        assert sorted(samples) == [0, 1, 2, 3] and all(sorted(x) == [0, 1, 2] for x in letters)
        assert seen.setdefault(name, (voter, samples, letters)) == (voter, samples, letters), "kept"
    voters, samples, letters = zip(*seen.values())
    assert len(set(voters)) == 5 and len({str(x) for x in samples}) > 1 and len({str(x) for x in letters}) > 1


@needs_browser
def test_a_second_tab_is_followed(browser, folder):
    chrome = browser()
    chrome.open((folder / "study.html").as_uri())
    ratings = [[[1, 2, 3]] * 3] * 4
    chrome.js(f"""localStorage.setItem(KEY, JSON.stringify({{...state, ratings: {json.dumps(ratings)}}}));
                  dispatchEvent(new StorageEvent('storage', {{key: KEY, newValue: localStorage.getItem(KEY)}}))""")
    assert exported(chrome)["ratings"] == ratings and chrome.js("$('done').textContent") == "4 of 4 samples finished"
    chrome.click(".scale label:nth-child(5)")
    assert sorted(sum(exported(chrome)["ratings"][chrome.js("now()")], [])) == [1, 1, 2, 2, 2, 3, 3, 3, 5]


@needs_browser
def test_phone(browser, folder):
    chrome = browser()
    for dark in (False, True):
        chrome.screen(360, 740, phone=True, dark=dark)
        chrome.open((folder / "study.html").as_uri())
        assert chrome.js("document.scrollingElement.scrollWidth") == 360
        assert chrome.js("[...document.querySelectorAll('.scale label, button, summary')].filter(e => e.offsetHeight"
                         " && (e.offsetHeight < 44 || e.offsetWidth < 44)).map(e => e.outerHTML)") == []
        found = chrome.js(LOW_CONTRAST)
        assert found["seen"] > 60 and found["low"] == []
    for i in range(9):
        chrome.tap(f".edit:nth-of-type({i // 3 + 2}) .scale:nth-of-type({i % 3 + 1}) label:nth-child({1 + i % 5})")
    chrome.wait("$('done').textContent === '1 of 4 samples finished'")
    assert chrome.js("scales.map(s => +s.querySelector('input:checked').value)") == [1 + i % 5 for i in range(9)]
    chrome.tap("#next")
    assert chrome.js("$('where').textContent") == "Sample 2 of 4"


@needs_browser
def test_a_browser_without_storage_warns(browser, folder):
    chrome = browser()
    chrome.call("Page.addScriptToEvaluateOnNewDocument",
                source="Object.defineProperty(window, 'localStorage', {get() { throw new Error('forbidden'); }})")
    chrome.open((folder / "study.html").as_uri())
    assert not chrome.js("$('warning').hidden")
    chrome.click(".scale label:nth-child(4)")
    assert exported(chrome)["ratings"][chrome.js("now()")] is not None and chrome.errors() == []
