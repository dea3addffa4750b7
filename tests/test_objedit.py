"""Triples of OBJect-3DIT, from a small made-up tree with every known irregularity.

    pytest tests/test_objedit.py
"""

import json
import re
import shutil
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_image, read_labels, read_mask, read_rows, resolve
from fake_objedit import DAMAGED, ODD, captions, make_sample, make_tree
from triples import objedit

PLAIN = 12


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Folder and truth of a tree whose y grows down."""
    root = tmp_path_factory.mktemp("objedit")
    return root, make_tree(root, plain=PLAIN)


def run(root, out, *flags):
    """Rows, as the command line writes them."""
    parser = ArgumentParser()
    objedit.add_arguments(parser)
    objedit.main(parser.parse_args(["--root", str(root), "--out", str(out), *flags]))
    return read_rows(out)


def uid(row):
    return row["id"].split("/")[1].rstrip("~")


def figures(text):
    """{line: number} of the printed table."""
    return {line: int(n) for n, line in re.findall(r"^ *(\d+) +(.+?)$", text, re.M)}


def test_what_is_taken_and_why_not(tree, tmp_path, capsys):
    root, truth = tree
    rows = run(root, tmp_path / "x.jsonl")
    train = {name.split("/")[1]: t for name, t in truth.items() if name.startswith("translate/")}
    assert Counter(train[uid(row)]["odd"] for row in rows) == Counter({"": PLAIN} | dict.fromkeys(ODD, 1))
    found = figures(capsys.readouterr().out)
    expected = Counter(DAMAGED.values())
    expected["1.png is missing"] += 1  # the empty folder
    assert {reason: found[reason] for reason in expected} == expected
    total = PLAIN + len(ODD) + len(DAMAGED) + 1
    assert found[f"samples looked at, of {total}; 2 stray files beside them"] == total
    assert found["taken, of these"] == len(rows) == PLAIN + len(ODD)
    assert found["skipped, of these"] == sum(expected.values())
    remarks = {"metadata without uid": 1, "metadata without category": 2, "metadata without a location in 0..1": 2,
               "edited label is not 1": 1, "an alpha channel, dropped in a copy": 1, "of train objects": len(rows)}
    assert {remark: found[remark] for remark in remarks} == remarks


def test_rows_agree_with_the_truth(tree, tmp_path):
    root, truth = tree
    file = tmp_path / "deep" / "folder" / "x.jsonl"
    for row in run(root, file):
        t = truth[f"translate/{uid(row)}"]
        assert row["mask_label"] == t["label"] == row["checks"]["label"]
        assert row["source"] == {"kind": "objedit", "task": "translate", "split": "train", "uid": uid(row)}
        for key, picture, labels in zip(("ref", "tgt"), t["pictures"], t["labels"]):
            # The exact labels, although rims are antialiased, and the exact pictures, without their alpha.
            np.testing.assert_array_equal(read_labels(resolve(file, row, f"mask_{key}")), labels)
            mask = labels == t["label"]
            np.testing.assert_array_equal(read_mask(file, row, f"mask_{key}"), mask)
            np.testing.assert_array_equal(open_image(resolve(file, row, key)), picture[..., :3])
            assert row["checks"][f"area_{key}"] == pytest.approx(mask.mean(), abs=1e-5)
            y, x = np.argwhere(mask).mean(0)
            assert row["checks"][f"centroid_{key}"] == pytest.approx([(x + 0.5) / len(mask), (y + 0.5) / len(mask)], abs=1e-4)
        a, b = row["checks"]["centroid_ref"], row["checks"]["centroid_tgt"]
        assert row["checks"]["moved"] == pytest.approx(np.hypot(a[0] - b[0], a[1] - b[1]), abs=1e-3)
        if t["odd"] in ("no location", "location outside"):
            assert "end_xy" not in row
        else:
            assert row["end_xy"] == pytest.approx(t["place"])
        if t["odd"] == "no object_data":
            assert row["object"] == {}
        else:
            assert row["object"].items() <= t["metadata"]["object_data"][0].items() and set(row["object"]) <= {"uid", "category"}
        seen = {str(k) for labels in t["labels"] for k in np.unique(labels) if k}
        assert set(row["objects"]) <= seen


def test_other_objects_are_named_by_order_only_where_label_1_is_the_edited_one(tree, tmp_path):
    root, truth = tree
    rows = {truth[f"translate/{uid(row)}"]["odd"]: row for row in run(root, tmp_path / "x.jsonl")}
    assert set(rows["label 3"]["objects"]) == {"3"}
    assert rows["unknown keys"]["objects"]["1"] == rows["unknown keys"]["object"]["category"]
    assert rows["unknown keys"]["objects"]["2"] == "thing 2"


def test_transparent_pictures_are_copied_without_alpha_and_only_they(tree, tmp_path):
    root, truth = tree
    rows = run(root, tmp_path / "x.jsonl")
    outside = [row for row in rows if row["ref"].startswith("x_opaque/")]
    assert [truth[f"translate/{uid(row)}"]["odd"] for row in outside] == ["alpha"]
    assert len(list((tmp_path / "x_opaque").iterdir())) == 2


@pytest.mark.parametrize("y_up", (False, True))
def test_direction_of_y(tmp_path, capsys, y_up):
    truth = make_tree(tmp_path / "root", y_up, plain=PLAIN)
    rows = run(tmp_path / "root", tmp_path / "x.jsonl")
    assert f"y of locations grows {'up' if y_up else 'down'}" in capsys.readouterr().out
    rows = [row for row in rows if "end_xy" in row]
    assert len(rows) == PLAIN + len(ODD) - 2
    for row in rows:
        assert row["end_xy"] == pytest.approx(truth[f"translate/{uid(row)}"]["place"])
    # A small limit is decided by the other samples.
    row, = (r for r in run(tmp_path / "root", tmp_path / "y.jsonl", "--limit", "1"))
    assert "end_xy" in row or truth[f"translate/{uid(row)}"]["odd"] in ("no location", "location outside")


def test_direction_of_y_is_not_guessed(tmp_path, capsys):
    for seed in range(4):
        make_sample(tmp_path / "few/translate/train" / str(seed), seed=seed)
    for seed in range(24):  # half of them up, half of them down
        make_sample(tmp_path / "torn/translate/train" / str(seed), seed=seed, y_up=seed % 2 == 0)
    for root in ("few", "torn"):
        rows = run(tmp_path / root, tmp_path / "x.jsonl")
        assert rows and not any("end_xy" in row for row in rows)
        assert "undecidable" in capsys.readouterr().out


def test_limit_is_reproducible_and_its_order_depends_on_the_seed(tree, tmp_path, monkeypatch):
    root, _ = tree
    everything = [row["id"] for row in run(root, tmp_path / "x.jsonl", "--seed", "3")]
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listed(path))))  # another file system's order
    first = [row["id"] for row in run(moved, tmp_path / "y.jsonl", "--seed", "3", "--limit", "7")]
    monkeypatch.undo()
    other = [row["id"] for row in run(root, tmp_path / "z.jsonl", "--seed", "4", "--limit", "7")]
    assert first == everything[:7] and len(set(first)) == 7
    assert other != first and everything != sorted(everything)


def test_reverse(tree, tmp_path):
    root, _ = tree
    file = tmp_path / "x.jsonl"
    rows = {row["id"]: row for row in run(root, file, "--reverse", "--limit", "6")}
    assert len(rows) == 12
    for name, row in rows.items():
        if name.endswith("~"):
            there = rows[name[:-1]]
            assert (row["ref"], row["tgt"], row["mask_ref"], row["mask_tgt"]) == (
                there["tgt"], there["ref"], there["mask_tgt"], there["mask_ref"])
            assert row["checks"]["centroid_tgt"] == there["checks"]["centroid_ref"] == row["end_xy"]
            assert row["checks"]["centroid_ref"] == there["checks"]["centroid_tgt"]
            assert row["checks"]["area_ref"] == there["checks"]["area_tgt"] and "label" in row["checks"]
            assert row["object"] == there["object"]
    for task in ("remove", "insert"):
        with pytest.raises(ValueError, match="--reverse"):
            run(root, file, "--task", task, "--reverse")


def test_seen_and_unseen(tree, tmp_path):
    root, truth = tree
    file = tmp_path / "x.jsonl"
    for seen in ("seen", "unseen"):
        rows = run(root, file, "--split", "test", "--seen", seen)
        assert len(rows) == 3 and {row["split"] for row in rows} == {seen}
        assert all(f"/test/{seen}/" in row["ref"] for row in rows)
    assert Counter(row["split"] for row in run(root, file, "--split", "val")) == {"seen": 3, "unseen": 3}
    with pytest.raises(ValueError, match="train split holds seen objects only"):
        run(root, file, "--seen", "unseen")
    assert {row["split"] for row in run(root, file, "--seen", "seen", "--limit", "2")} == {"train"}


def test_a_name_that_is_seen_and_unseen_is_taken_once(tmp_path, capsys):
    for part, seed in (("seen", 1), ("unseen", 2)):
        make_sample(tmp_path / "translate/val" / part / "same", seed=seed)
    assert len(run(tmp_path, tmp_path / "x.jsonl", "--split", "val")) == 1
    assert figures(capsys.readouterr().out)["name of a sample taken already"] == 1


def test_other_tasks(tree, tmp_path):
    root, truth = tree
    for row in run(root, tmp_path / "x.jsonl", "--task", "rotate", "--reverse"):
        angle = truth[f"rotate/{uid(row)}"]["metadata"]["rotation_angle"]
        assert row["source"]["rotation_angle"] == (-angle if row["id"].endswith("~") else angle)
        assert "end_xy" not in row
    removed = {uid(row): row for row in run(root, tmp_path / "y.jsonl", "--task", "remove")}
    inserted = {uid(row): row for row in run(root, tmp_path / "z.jsonl", "--task", "insert")}
    assert len(removed) == 3 and removed.keys() == inserted.keys()
    for name, row in removed.items():
        back = inserted[name]
        assert (row["ref"], row["tgt"]) == (back["tgt"], back["ref"]) and row["ref"].endswith("1.png")
        assert "mask_tgt" not in row and "mask_ref" not in back and row["mask_ref"] == back["mask_tgt"]
        assert back["id"] == f"insert/{name}" and "end_xy" not in row
        assert row["checks"]["area_tgt"] == back["checks"]["area_ref"] == 0 < row["checks"]["area_ref"]


def test_place_of_an_inserted_object(tmp_path):
    truth = {str(seed): make_sample(tmp_path / "remove/train" / str(seed), "remove", seed, y_up=True) for seed in range(12)}
    for row in run(tmp_path, tmp_path / "x.jsonl", "--task", "insert"):
        assert row["end_xy"] == pytest.approx(truth[uid(row)]["place"])


def test_captions(tree, tmp_path, capsys):
    root, truth = tree
    path = captions(tmp_path, truth)
    known = json.loads(path.read_text())
    rows = run(root, tmp_path / "x.jsonl", "--captions", str(path))
    missing = 0
    for row in rows:
        if row["object"].get("uid") in known:
            assert row["object"]["description"] == f"a small {row['object']['uid']}"
            assert row["objects"][str(row["mask_label"])] == row["object"]["description"]
            assert row["object"].get("category") != ""  # that of the metadata stays
        else:
            missing += 1
            assert "description" not in row["object"]
    assert 0 < missing < len(rows) and figures(capsys.readouterr().out)["uid without caption"] == missing
    with pytest.raises(FileNotFoundError, match="captions"):
        run(root, tmp_path / "x.jsonl", "--captions", str(tmp_path / "none.json"))
    path.write_text("[]")
    with pytest.raises(ValueError, match="Expected {uid: .* found a list"):
        run(root, tmp_path / "x.jsonl", "--captions", str(path))


def test_template_sentences(tree, tmp_path):
    root, truth = tree
    assert not any("instruction" in row for row in run(root, tmp_path / "x.jsonl"))
    file, told = tmp_path / "y.jsonl", 0
    for row in run(root, file, "--instructions", "template", "--reverse"):
        if "instruction" not in row:
            continue
        told += 1
        assert row["checks"]["instruction"] == "template"
        assert row["object"].get("category", "object") in row["instruction"]
        dx = row["checks"]["centroid_tgt"][0] - row["checks"]["centroid_ref"][0]
        for word, sign in (("to the left and", -1), ("to the left.", -1), ("to the right and", 1), ("to the right.", 1)):
            assert word not in row["instruction"] or sign * dx > 0
    assert told >= PLAIN
    rows = run(root, file, "--task", "rotate", "--instructions", "template", "--reverse")
    for row, back in zip(rows[::2], rows[1::2]):
        angle = truth[f"rotate/{uid(row)}"]["metadata"]["rotation_angle"]
        degrees = round(min(angle, 360 - angle))
        way, other = ("counter-clockwise", "clockwise") if angle < 180 else ("clockwise", "counter-clockwise")
        assert row["instruction"] == f"Rotate the {row['object']['category']} {degrees} degrees {way}."
        assert back["instruction"] == f"Rotate the {row['object']['category']} {degrees} degrees {other}."
    for task, verb in (("remove", "Remove"), ("insert", "Add")):
        for row in run(root, file, "--task", task, "--instructions", "template"):
            assert row["instruction"] == f"{verb} the {row['object']['category']}."


def test_errors_name_what_is_there(tmp_path):
    (tmp_path / "only/rotate").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="must hold translate/, .* holds: rotate"):
        run(tmp_path / "only", tmp_path / "x.jsonl")
    for seed, odd in enumerate(("broken json", "still", "still")):
        make_sample(tmp_path / "bad/translate/train" / str(seed), seed=seed, odd=odd)
    with pytest.raises(ValueError, match="None of 3 samples .* object moves less than 3% of the side 2, metadata.json"):
        run(tmp_path / "bad", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_an_object_hidden_by_the_moved_one_is_not_taken_for_it():
    before, after = np.zeros((2, 40, 40), np.uint8)
    before[0:30, 0:40] = 2  # a large thing behind
    after[:] = before
    before[2:10, 0:8], after[2:10, 20:28] = 1, 1  # moves in front of it: the same pixels of both change,
    after[29, :2] = 0  # and rims differ a little
    assert objedit.edited_label(before, after) == 1
    before[before == 1], after[after == 1] = 4, 4
    assert objedit.edited_label(before, after) == 4


@pytest.mark.parametrize("task, metadata, missing", [
    ("rotate", '{"object_data": [{"uid": "u", "category": "mug"}], "rotation_angle": NaN}', ["an angle"]),
    ("rotate", '{"object_data": [{"uid": "u", "category": "mug"}], "rotation_angle": "90"}', ["an angle"]),
    ("rotate", '{"object_data": "mug", "rotation_angle": 90}', ["uid", "category"]),
    ("translate", '{"object_data": [3, {"uid": 7, "category": ""}], "end_location_2d": [0.5, "0.5"]}',
     ["uid", "category", "a location in 0..1"]),
    ("translate", '{"object_data": [{"uid": "u", "category": "mug"}], "end_location_2d": {"x": 0.5}}', ["a location in 0..1"]),
    ("translate", '{"object_data": [{"uid": "u", "category": "mug"}], "end_location_2d": [0.5]}', ["a location in 0..1"]),
])
def test_values_of_the_wrong_kind_count_as_missing(tmp_path, capsys, task, metadata, missing):
    make_sample(tmp_path / task / "train/a", task, seed=5)
    (tmp_path / task / "train/a/metadata.json").write_text(metadata)
    row, = run(tmp_path, tmp_path / "x.jsonl", "--task", task, "--instructions", "template")
    found = figures(capsys.readouterr().out)
    assert [key.removeprefix("metadata without ") for key in found if key.startswith("metadata without")] == missing
    assert "end_xy" not in row and set(row["object"]) == {"uid", "category"} - set(missing)


def test_the_removed_object_is_found_by_its_uid(tmp_path):
    truth = make_sample(tmp_path / "remove/train/a", "remove", seed=5)
    metadata = truth["metadata"] | {"object_data": truth["metadata"]["object_data"][::-1]}
    (tmp_path / "remove/train/a/metadata.json").write_text(json.dumps(metadata))
    row, = run(tmp_path, tmp_path / "x.jsonl", "--task", "remove")
    assert row["object"]["uid"] == metadata["removed_object_uid"]


def test_small_masks_and_large_pictures(tmp_path):
    make_sample(tmp_path / "translate/train/a", seed=5)
    for name in ("1.png", "2.png"):
        path = tmp_path / "translate/train/a" / name
        Image.open(path).resize((128, 128)).save(path)
    row, = run(tmp_path, tmp_path / "x.jsonl")
    assert read_mask(tmp_path / "x.jsonl", row, "mask_ref", (128, 128)).mean() == pytest.approx(row["checks"]["area_ref"], abs=1e-4)
