"""The instruction writer: its checks against exact scenes, its runs against a failing server. pytest tests/test_instruct.py"""

import argparse
import functools
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import SET1, read_rows, resolve, write_rows
from evaluation import chat
from evaluation.chat import ChatRefused, Endpoint
from scenes import make_pair
from tests.fake_server import FakeServer
from triples import instruct
from triples.sentences import SWAPPED, Facts, Place, check_instruction, facts, template

ROOT = Path(__file__).parent.parent


def place(x: float, bottom: float, size: float = 0.2, area: float | None = None) -> Place:
    return Place(x, bottom - size / 2, bottom, size * size if area is None else area,
                 (x - size / 2, bottom - size, x + size / 2, bottom))


LEFT, RIGHT, NEAR, FAR = place(0.2, 0.6), place(0.8, 0.6), place(0.5, 0.9), place(0.5, 0.4)
MUG = ("blue mug", "mug")


def moved(start: Place, end: Place, **others) -> Facts:
    return Facts(MUG, start, end, {name.replace("_", " "): [p] for name, p in others.items()})


# Checks


@pytest.mark.parametrize("text, reason", [
    ("Move the blue mug to the right.", None),
    ("move the mugs to the right", None),
    ("Shift the cup to the right.", "not named"),
    ("Move the blue mug to the right. Then stop.", "more than one sentence"),
    ("Move the blue mug\nto the right", "more than one sentence"),
    ("Move mug right", "3 words"),
    ("Move the mug to the right" + " side" * 25, "31 words"),
    ("The blue mug moves to the right.", "begin"),
    ("Removed the blue mug to the right.", "begin"),
    ("Move the blue mug to the right in the second image.", "image, second"),
    ("Move the blue mug 40 pixels to the right.", "40, pixels"),
    ("Move the blue mug to the coordinates on the right.", "coordinates"),
    ("Move the blue mug right, as after.", "after"),
    ("Move the blue mug somewhere.", "where to"),
    ("Move the blue mug to the left.", SWAPPED),
])
def test_wording(text, reason):
    reasons = check_instruction(text, moved(LEFT, RIGHT))
    assert len(reasons) == (reason is not None) and (reason or "") in "".join(reasons)
    without_masks = check_instruction(text, Facts(MUG))
    assert without_masks == ([] if reason == SWAPPED else reasons)


def test_the_whole_answer():
    known = moved(LEFT, RIGHT)
    answer = {"object": "the blue mug", "relation": "right", "reference": [], "instruction": "Slide the blue mug to the right."}
    assert not check_instruction(answer, known)
    for change, reason in (({"object": "the teapot"}, "not named"), ({"object": "the red mug"}, "another colour"),
                           ({"instruction": "Slide the pot to the right."}, "not named"), ({"instruction": None}, "JSON object")):
        assert reason in "".join(check_instruction(answer | change, known)), change
    assert "JSON object" in check_instruction([1, 2], known)[0]
    # A word that is banned elsewhere may belong to the object's own name.
    kit = Facts(("first aid kit",), LEFT, RIGHT)
    assert not check_instruction("Move the first aid kit to the right.", kit)
    # "left shoe" is the object, not a direction.
    assert not check_instruction({"object": "the left shoe", "instruction": "Move the left shoe to the right."},
                                 Facts(("shoe",), LEFT, RIGHT))


@pytest.mark.parametrize("tail, holds, fails", [
    ("to the right", (LEFT, RIGHT), (RIGHT, LEFT)),
    ("to the right", (place(0.5, 0.6), place(0.54, 0.6)), (place(0.5, 0.6), place(0.52, 0.6))),  # 3 % of the width
    ("to the left", (RIGHT, LEFT), (LEFT, LEFT)),
    ("leftwards", (RIGHT, LEFT), (LEFT, RIGHT)),
    ("to the left side of the view", (RIGHT, LEFT), (LEFT, RIGHT)),
    ("closer to the camera", (FAR, NEAR), (NEAR, FAR)),
    ("closer to the viewer", (FAR, place(0.5, 0.4, 0.22)), (FAR, place(0.5, 0.4, 0.205))),  # growth over 10 %
    ("forward", (FAR, NEAR), (FAR, FAR)),
    ("towards the camera", (FAR, NEAR), (NEAR, FAR)),
    ("to the foreground", (FAR, NEAR), (NEAR, FAR)),
    ("farther away from the camera", (NEAR, FAR), (FAR, NEAR)),
    ("further back", (NEAR, FAR), (FAR, NEAR)),
    ("into the background", (NEAR, FAR), (FAR, NEAR)),
    ("in front of the wall", (FAR, NEAR), (NEAR, FAR)),
    ("behind the curtain", (NEAR, FAR), (FAR, NEAR)),
    ("further to the left", (place(0.8, 0.4), place(0.2, 0.9)), (place(0.2, 0.4), place(0.8, 0.9))),  # says nothing of depth
    ("to the left and closer to the camera", (place(0.8, 0.4), place(0.2, 0.9)), (place(0.8, 0.9), place(0.2, 0.4))),
    ("to the near left corner", (RIGHT, place(0.2, 0.9)), (RIGHT, place(0.4, 0.9))),
    ("to the near left corner", (RIGHT, place(0.2, 0.9)), (RIGHT, place(0.2, 0.4))),
    ("into the far right corner", (NEAR, place(0.8, 0.4)), (NEAR, place(0.8, 0.9))),
    ("to the corner at the far right", (NEAR, place(0.8, 0.4)), (NEAR, place(0.6, 0.4))),
    ("to the right corner", (LEFT, RIGHT), (LEFT, NEAR)),
])
def test_directions_by_the_way(tail, holds, fails):
    assert not check_instruction(f"Move the blue mug {tail}.", moved(*holds))
    assert check_instruction(f"Move the blue mug {tail}.", moved(*fails))


BALL, BOX = place(0.4, 0.6), place(0.8, 0.8)


@pytest.mark.parametrize("tail, end, holds", [
    # The way was to the right (from 0.1), which would say nothing about the side of the ball.
    ("to the left of the red ball", place(0.3, 0.6), True), ("to the left of the red ball", place(0.5, 0.6), False),
    ("to the right side of the red ball", place(0.5, 0.6), True), ("to the right of the red ball", place(0.3, 0.6), False),
    ("in front of the red ball", place(0.4, 0.7), True), ("in front of the red ball", place(0.4, 0.5), False),
    ("right in front of the red ball", place(0.2, 0.7), True),
    ("behind the wooden box", place(0.8, 0.7), True), ("behind the wooden box", place(0.8, 0.9), False),
    ("between the red ball and the wooden box", place(0.6, 0.7), True), ("between the ball and the box", place(0.3, 0.7), False),
    ("between the red ball and the wooden box", place(0.6, 0.2), False), ("between one and the other", place(0.3, 0.7), False),
    ("between one and the other", place(0.5, 0.2), True), ("next to the red ball", place(0.55, 0.6), True),
    ("closer to the wooden box", place(0.5, 0.7), True), ("away from the wooden box", place(0.5, 0.7), False),
    ("farther away from the red ball", place(0.9, 0.6), True), ("next to the wooden box", place(0.05, 0.5), False),
    ("to the left of the green ball", place(0.3, 0.6), False),  # no such ball: the way counts, which was to the right
])
def test_directions_by_other_objects(tail, end, holds):
    known = moved(place(0.1, 0.55), end, red_ball=BALL, wooden_box=BOX)
    assert bool(check_instruction(f"Put the blue mug {tail}.", known)) != holds


def test_which_of_several_objects():
    """Two boxes are none in particular, so the way counts; of mugs, only the first named is the moved one."""
    start, end = place(0.1, 0.6), place(0.3, 0.6)
    two = Facts(MUG, start, end, {"box": [place(0.5, 0.6), place(0.2, 0.9)]})
    assert check_instruction("Move the blue mug to the left of the box.", two)
    red = Facts(("mug",), start, end, {"red mug": [place(0.5, 0.6)]})
    assert not check_instruction("Move the mug to the left of the red mug.", red)
    lamps = Facts(MUG, start, end, {"tall lamp": [place(0.5, 0.6)], "small lamp": [place(0.2, 0.6)]})
    assert not check_instruction("Move the blue mug to the left of the tall lamp.", lamps)
    assert check_instruction("Move the blue mug to the left of the small lamp.", lamps)


def test_swapped_only_if_all_is_reversed():
    start, end = place(0.2, 0.9), place(0.8, 0.4)  # right and away
    reasons = [check_instruction(f"Move the blue mug {tail}.", moved(start, end)) for tail in (
        "to the left and closer to the camera", "to the left and farther from the camera", "to the right and away from the camera")]
    assert reasons[0] == [SWAPPED] and len(reasons[1]) == 1 and "'left" in reasons[1][0] and not reasons[2]
    beside = moved(place(0.3, 0.6), place(0.6, 0.6), red_ball=place(0.45, 0.6))  # before and after
    assert SWAPPED not in (found := check_instruction("Move the blue mug left, next to the red ball.", beside)) and found


def world(index: int, level: str = "plain") -> tuple:
    pair = make_pair(3, level, "train", 96, index=index, extras=False)
    others = {}
    for i, thing in enumerate(pair.scene.objects):
        if i != pair.moved and (pair.tgt_ids == i).mean() > 0.002:
            others.setdefault(thing.name[4:], []).append(Place.of(pair.tgt_ids == i))
    thing = pair.scene.objects[pair.moved]
    return pair, Facts((thing.name[4:], thing.shape), Place.of(pair.mask_ref), Place.of(pair.mask_tgt), others)


def test_true_sentences_of_the_rendered_world_pass_and_opposite_ones_do_not():
    opposite = {"left": "right", "right": "left", "front": "behind", "behind": "front", "closer": "farther", "farther": "closer"}
    tails = {"left": "to the left of", "right": "to the right of", "front": "in front of", "behind": "behind",
             "closer": "closer to the camera", "farther": "farther from the camera"}
    passed, caught, total, turned = 0, 0, 90, 0
    for index in range(total):
        pair, known = world(index)
        passed += not check_instruction(pair.instruction, known)
        if pair.relation in opposite:
            near = "".join(f" {pair.scene.objects[i].name}" for i in pair.references)
            turned += 1
            caught += bool(check_instruction(f"Move the {known.names[0]} {tails[opposite[pair.relation]]}{near}.", known))
    assert passed >= 0.97 * total
    assert turned > 20 and caught == turned


def test_template():
    passed = 0
    for index in range(60):
        _, known = world(index, "textured")
        try:
            sentence = template(known)
        except ValueError:
            continue
        passed += 1
        assert not check_instruction(sentence, known), sentence
        if " of the " not in sentence:  # said by the way that it went
            assert check_instruction(sentence, Facts(known.names, known.end, known.start, known.others)), sentence
    assert passed > 50
    assert template(moved(RIGHT, LEFT)) == "Move the blue mug to the left."
    assert template(moved(FAR, NEAR)) == "Move the blue mug closer to the camera."
    assert template(moved(place(0.8, 0.9), place(0.2, 0.4))) == "Move the blue mug to the left and farther away from the camera."
    assert template(moved(LEFT, RIGHT, red_ball=place(0.65, 0.6))) == "Move the blue mug to the right of the red ball."
    assert template(moved(LEFT, RIGHT, mug=place(0.65, 0.6))) == "Move the blue mug to the right."  # which mug?
    assert template(Facts(("a kind of very long description that nobody would ever want to read", "mug"), LEFT, RIGHT)) == "Move the mug to the right."
    assert template(Facts(("left over 3d mug image",), LEFT, RIGHT)).startswith("Move the object to")
    for known in (moved(LEFT, LEFT), Facts(MUG)):
        with pytest.raises(ValueError):
            template(known)


def test_places():
    mask = np.zeros((10, 20), bool)
    mask[4:8, 10:15] = True
    assert Place.of(mask) == Place(12.5 / 20, 0.6, 0.8, 0.1, (0.5, 0.4, 0.75, 0.8))
    assert Place.of(np.zeros((3, 3), bool)) is None and Place.of(None) is None


# Runs


def make_rows(folder: Path, count: int, side: int = 48) -> Path:
    """Rows of a red box that moves left, right, closer or farther past a green ball, with masks of colour labels."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        ways = ((-1, 0), (1, 0), (0, 1), (0, -1))[i % 4]
        start = np.array([24, 26]) - 8 * np.array(ways) + rng.integers(-2, 3, 2)
        end = start + 16 * np.array(ways)
        names = {}
        for key, (x, y) in (("ref", start), ("tgt", end)):
            picture, labels = np.full((side, side, 3), 190, np.uint8), np.zeros((side, side, 3), np.uint8)
            picture[1:5, 40 - i % 8:44], labels[1:5, 40 - i % 8:44] = (20, 160, 40), SET1[2]
            picture[y - 4:y + 4, x - 4:x + 4], labels[y - 4:y + 4, x - 4:x + 4] = (200, 30, 30), SET1[0]
            picture[-1, -1] = i % 250  # every row asks something else
            for name, array in ((key, picture), (f"mask_{key}", labels)):
                names[name] = f"{i}/{name}.png"
                (folder / str(i)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / names[name])
        rows.append({"id": f"box/{i}", **names, "mask_label": 1, "object": {"category": "box", "description": "A red box."},
                     "objects": {"1": "box", "3": "the green ball"}, "checks": {"area_ref": 0.03}})
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def call(*argv) -> None:
    parser = argparse.ArgumentParser()
    instruct.add_arguments(parser)
    instruct.main(parser.parse_args(list(map(str, argv))))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat, "Endpoint", functools.partial(Endpoint, backoff=0.005))


def test_facts_of_a_row(tmp_path):
    file = make_rows(tmp_path, 1)
    labels = np.array(Image.open(tmp_path / "0/mask_tgt.png"))
    labels[47, 0] = SET1[1]  # a speck
    Image.fromarray(labels).save(tmp_path / "0/mask_tgt.png")
    row = read_rows(file)[0]
    known = facts(file, row | {"objects": row["objects"] | {"2": "a cup"}})
    assert known.names == ("red box", "box") and set(known.others) == {"green ball"}
    start, end = known.start, known.end
    assert start.area == end.area == 64 / 48**2 and start.x - end.x == pytest.approx(16 / 48) and start.bottom == end.bottom
    assert known.others["green ball"][0].box == (40 / 48, 1 / 48, 44 / 48, 5 / 48)
    bare = {k: v for k, v in read_rows(file)[0].items() if "mask" not in k}
    assert facts(file, bare) == Facts(("red box", "box"))
    white = np.zeros((48, 48), np.uint8)
    white[10:20, 30:40] = 255
    Image.fromarray(white).save(tmp_path / "white.png")
    plain = facts(file, bare | {"mask_ref": "white.png", "mask_tgt": "white.png"})
    assert plain.start == plain.end == Place.of(white > 0) and not plain.others


def test_all_rows_end_counted_though_calls_fail(tmp_path, capsys):
    file, out = make_rows(tmp_path / "in", 48), tmp_path / "out" / "deep" / "rows.jsonl"
    rows = read_rows(file)
    for row in rows[40:44]:
        del row["mask_ref"], row["mask_tgt"], row["mask_label"]
    for row in rows[44:]:
        row["instruction"] = "Leave this as it is."
    write_rows(file, rows)
    with FakeServer(failures=0.3, seed=1, hang=0.5, retry_after=0.01, blunders=0.3) as server:
        arguments = (file, "--out", out, "--url", server.url, "--model", "m", "--timeout", 0.3, "--threads", 8)
        call(*arguments)
        first = server.stats()
        printed = capsys.readouterr().out
        call(*arguments)
        assert server.stats()["requests"] == first["requests"]  # all of it is in the cache
    assert sum(first["drawn"].values()) - first["drawn"]["plain"] > 10
    written = read_rows(out)
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    outcomes = Counter(row["checks"].get("instruction") for row in written)
    assert outcomes[None] == 4 and outcomes["failed"] == 0 and outcomes["vlm"] > 15 and outcomes["vlm-retry"] > 5
    assert f"accepted at first {outcomes['vlm']}, after a retry {outcomes['vlm-retry']}, from the masks {outcomes['template']}, " \
           f"none {outcomes['none']}, failed 0" in printed
    assert "4 keep their instruction" in printed
    swapped = sum(row["checks"].get("instruction_swapped", False) for row in written)
    assert swapped > 0 and f"swapped and regenerated {swapped}" in printed
    for row in written[:44]:
        if row["checks"]["instruction"] == "none":  # possible only without masks
            assert "mask_ref" not in row and "instruction" not in row
            continue
        assert not check_instruction(row["instruction"], facts(out, row))
        assert (row["checks"]["instruction_model"], row["checks"]["instruction_prompt"]) == ("m", instruct.VERSION)
        assert row["checks"]["area_ref"] == 0.03
        assert resolve(out, row, "tgt").samefile(tmp_path / "in" / row["id"][4:] / "tgt.png")
    assert all(row["instruction"] == "Leave this as it is." for row in written[44:])
    assert not list(out.parent.glob("*.partial"))


def test_retry_tells_the_reason_and_the_template_comes_last(tmp_path, capsys):
    file, out = make_rows(tmp_path, 4), tmp_path / "out.jsonl"
    with FakeServer(blunders=1) as server:
        call(file, "--out", out, "--url", server.url, "--model", "m", "--threads", 1)
        texts = [fields["messages"][0]["content"][-1]["text"] for _, _, fields in server.last]
    assert {row["checks"]["instruction"] for row in read_rows(out)} == {"vlm-retry"}
    for row, first, second in zip(read_rows(out), texts[::2], texts[1::2]):
        assert second.startswith(first) and row["checks"]["instruction_rejected"][0] in second[len(first):]
        assert "The moved object is: red box." in first
    # One row is cut twice, one answers in lists; the third has no masks to make a sentence of.
    rows = read_rows(file)
    del rows[2]["mask_ref"], rows[2]["mask_tgt"], rows[2]["mask_label"]
    write_rows(file, rows)
    with FakeServer(script=["cut", "cut", "list", "list", "empty", "empty", "empty", "fenced"], blunders=0) as server:
        call(file, "--out", out, "--url", server.url, "--model", "n", "--threads", 1)
    written = read_rows(out)
    assert [row["checks"]["instruction"] for row in written] == ["template", "template", "none", "vlm-retry"]
    assert [row["checks"]["instruction_rejected"][0][:18] for row in written] == [
        "its JSON is cut of", "it is no JSON obje", "the answer is empt", "the answer is empt"]
    assert written[0]["instruction"] == template(facts(out, written[0])) and "instruction" not in written[2]
    assert "from the masks 2, none 1, failed 0; swapped and regenerated 0" in capsys.readouterr().out


def test_what_was_swapped_is_noted_though_the_retry_fails_otherwise(tmp_path):
    file = make_rows(tmp_path, 1)  # it moves left
    answers = ['{"object": "the red box", "instruction": "Move the red box to the right."}', "never mind"]
    asked = []
    sentence, outcome, note = instruct.instruct(file, read_rows(file)[0], lambda parts, n: asked.append(parts) or answers[n], 512)
    assert (outcome, note["swapped"], len(note["rejected"])) == ("template", True, 2) and sentence.endswith("left.")
    assert SWAPPED in asked[1][-1] and answers[0] in asked[1][-1]
    assert [part if isinstance(part, str) else part.shape for part in asked[0][:4]] == ["BEFORE:", (48, 48, 3), "AFTER:", (48, 48, 3)]


def test_failed_calls_leave_the_row_for_the_next_run(tmp_path, capsys):
    file, out = make_rows(tmp_path, 3), tmp_path / "out.jsonl"
    with FakeServer(script=["500"] * 6, blunders=0) as server:
        arguments = (file, "--out", out, "--url", server.url, "--model", "m", "--threads", 1)
        call(*arguments)
        assert "failed 1" in (printed := capsys.readouterr().out) and "1 rows have no instruction" in printed
        assert [row["checks"]["instruction"] for row in read_rows(out)] == ["failed", "vlm", "vlm"]
        call(out, *arguments[1:])  # in place
        assert [row["checks"]["instruction"] for row in read_rows(out)] == ["vlm"] * 3 and server.stats()["requests"] == 9
        assert "instruction_error" not in read_rows(out)[0]["checks"]
        call(out, *arguments[1:])
        assert server.stats()["requests"] == 9
        call(out, *arguments[1:], "--rewrite", "--model", "other")
        assert server.stats()["requests"] == 12


def test_a_refusal_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    file, out = make_rows(tmp_path, 6), tmp_path / "out.jsonl"
    with FakeServer(key="right") as server:
        with pytest.raises(ChatRefused, match="401"):
            call(file, "--out", out, "--url", server.url, "--threads", 2)
        assert server.stats()["requests"] <= 2
    assert not out.exists()
    printed = capsys.readouterr()
    assert "sk-wrong" not in printed.out + printed.err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(chat, "run", interrupted)
    file, out = make_rows(tmp_path, 1), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as end:
        call(file, "--out", out, "--url", "http://localhost:9/v1")
    assert end.value.code == 130 and "out.calls.jsonl" in capsys.readouterr().err and not out.exists()


def test_dry_run_sends_nothing(tmp_path, capsys):
    file, out = make_rows(tmp_path, 6, side=64), tmp_path / "out.jsonl"
    with FakeServer(blunders=0) as server:
        call(file, "--out", out, "--dry-run")
        assert not list(tmp_path.glob("out*")) and server.stats()["requests"] == 0
        printed = capsys.readouterr().out
        assert "6 requests to send" in printed and "0 are answered" in printed
        assert "48 visual tokens" in printed  # 2 pictures of 2 x 2 in each of 6 requests
        assert "The moved object is: red box." in printed
        call(file, "--out", out, "--dry-run", "--side", 32)
        assert "12 visual tokens" in capsys.readouterr().out
        rows = read_rows(file)
        write_rows(tmp_path / "some.jsonl", rows[:4])
        call(tmp_path / "some.jsonl", "--out", tmp_path / "some_out.jsonl", "--url", server.url, "--cache", tmp_path / "c.jsonl")
        call(file, "--out", out, "--cache", tmp_path / "c.jsonl", "--dry-run")
        assert "2 requests to send" in (printed := capsys.readouterr().out) and "4 are answered already" in printed
        assert server.stats()["requests"] == 4 and not out.exists()


def test_a_killed_run_resumes(tmp_path):
    file, out, cache = make_rows(tmp_path, 60), tmp_path / "out.jsonl", tmp_path / "out.calls.jsonl"
    with FakeServer(failures=0.3, delay=0.05, hang=0.8, retry_after=0.02) as server:
        script = (f"from tests.test_instruct import *; chat.Endpoint = functools.partial(Endpoint, backoff=0.005)\n"
                  f"call({str(file)!r}, '--out', {str(out)!r}, '--url', {server.url!r}, '--timeout', 0.5, '--threads', 8)")
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(600):
            if server.stats()["answered"] >= 25:
                break
            time.sleep(0.05)
        process.kill()
        process.communicate()
        time.sleep(0.3)
        in_flight = server.stats()["answered"] - cache.read_bytes().count(b"\n")
        assert not out.exists() and 0 <= in_flight <= 8
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and server.stats()["answered_more_than_once"] <= in_flight
    assert len(read_rows(out)) == 60 and "failed 0" in printed
