"""Triples as JSON lines: the format, colour labels, the user's own pairs, rendered scenes, and the check.

    pytest tests/test_data.py
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import scenes
from fake_objedit import FINE, PALETTE, blend, draw_labels, majority
from triples.check import sheet
from triples.pairs import pair_rows


def save(path: Path, array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def noise(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def square(top: int, height: int = 24, width: int = 32) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:top + 6, 4:10] = 255
    return mask


def command(monkeypatch, *args) -> int:
    """Exit code of `python data.py ARGS`."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    try:
        data.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


# The format


def test_rows_come_back(tmp_path):
    rows = [{"id": "ä/1", "ref": "x y.png", "end_xy": [0.25, 1], "checks": {"area_ref": 0.1}, "camera": [1, {"a": None}]},
            {"id": "b", "ref": "../b.png", "mask_label": 3, "object": {"uid": "u"}, "instruction": "Schiebe \u201ees\u201c\nweg."}]
    file = tmp_path / "new" / "x.jsonl"
    data.write_rows(file, rows)
    assert data.read_rows(file) == rows
    assert len(file.read_text("utf-8").splitlines()) == 2 and list(file.parent.iterdir()) == [file]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))  # as a Windows editor leaves it
    assert data.read_rows(file) == rows
    file.write_text('{"id": "a", "ref": "a.png", "instruction": null, "tgt": null}')
    assert data.read_rows(file) == [{"id": "a", "ref": "a.png"}]


@pytest.mark.parametrize("line, message", [
    ('{"id": "a", "ref": "a.png"', "x.jsonl:2: expected a JSON object"),
    ("[1]", "x.jsonl:2: expected a JSON object, found list"),
    ('{"ref": "a.png"}', "x.jsonl:2: expected the key 'id'"),
    ('{"id": "b", "tgt": "a.png"}', "x.jsonl:2: expected the key 'ref'"),
    ('{"id": "b", "ref": ""}', "x.jsonl:2: expected the key 'ref'"),
    ('{"id": 7, "ref": "a.png"}', "x.jsonl:2: expected a string as 'id', found 7"),
    ('{"id": "b", "ref": "a.png", "mask_label": "1"}', "x.jsonl:2: expected an integer as 'mask_label'"),
    ('{"id": "b", "ref": "a.png", "mask_label": true}', "x.jsonl:2: expected an integer as 'mask_label'"),
    ('{"id": "b", "ref": "a.png", "checks": []}', "x.jsonl:2: expected an object as 'checks'"),
    ('{"id": "a", "ref": "a.png"}', "x.jsonl:2: the id 'a' is that of line 1"),
    ('{"id": "b", "ref": "a\xff.png"}', "x.jsonl:2: expected a JSON object"),
])
def test_a_wrong_line_is_named(tmp_path, line, message):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"id": "a", "ref": "a.png"}\n' + line.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(message)):
        data.read_rows(file)


def test_required_keys_and_empty_files(tmp_path):
    file = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="x.jsonl"):
        data.read_rows(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="found an empty file"):
        data.read_rows(file)
    file.write_text('{"id": "a", "ref": "a.png"}')
    with pytest.raises(ValueError, match="expected the key 'tgt'"):
        data.read_rows(file, ("ref", "tgt"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.jsonl"
    data.write_rows(file, [{"id": "old", "ref": "a.png"}])
    with open(file) as reader:  # whoever reads meanwhile has the old rows, all of them
        data.write_rows(file, [{"id": "a", "ref": "a.png"}])
        assert '"old"' in reader.read()
    for bad in (float("nan"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            data.write_rows(file, [{"id": "b", "ref": "b.png"}, {"id": "c", "ref": "c.png", "end_xy": [bad]}])
    assert data.read_rows(file) == [{"id": "a", "ref": "a.png"}] and list(tmp_path.iterdir()) == [file]


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    picture = save(tmp_path / "pictures" / "a.png", noise(0))
    file = tmp_path / "rows" / "deep" / "x.jsonl"
    name = data.relative(file, picture)
    assert name == "../../pictures/a.png"
    file.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data.relative("rows/deep/x.jsonl", "pictures/a.png") == name
    monkeypatch.chdir(file.parent)
    for where in ("x.jsonl", file):
        np.testing.assert_array_equal(data.open_image(data.resolve(where, {"ref": name}, "ref")), noise(0))
    assert data.resolve(file, {"ref": name}, "tgt") is None
    # Downloads of Hugging Face are links to files without a suffix, and the folder of the rows may be a link itself.
    (tmp_path / "blob").write_bytes(picture.read_bytes())
    (tmp_path / "link.png").symlink_to("blob")
    (tmp_path / "short").symlink_to(file.parent)
    assert data.relative(file, tmp_path / "link.png") == "../../link.png"
    linked = data.relative(tmp_path / "short" / "x.jsonl", tmp_path / "link.png")
    assert data.resolve(tmp_path / "short" / "x.jsonl", {"ref": linked}, "ref").is_file()


# Masks


def test_black_and_white_masks(tmp_path):
    file, mask = tmp_path / "x.jsonl", square(5)
    save(tmp_path / "l.png", mask)
    save(tmp_path / "edge.png", [[0, 127, 128, 255]])
    save(tmp_path / "rgba.png", np.dstack([np.full((24, 32, 3), 255), mask]))  # white everywhere, seen inside only
    save(tmp_path / "half.png", np.full((4, 4), 255))
    Image.fromarray(mask > 0).save(tmp_path / "one.png")
    for name in ("l", "rgba", "one"):
        np.testing.assert_array_equal(data.read_mask(file, {"mask_ref": f"{name}.png"}, "mask_ref"), mask > 0)
    assert data.read_mask(file, {"mask_ref": "edge.png"}, "mask_ref").tolist() == [[False, False, True, True]]
    assert data.read_mask(file, {"mask_ref": "l.png"}, "mask_tgt") is None
    doubled = data.read_mask(file, {"mask_tgt": "l.png"}, "mask_tgt", (48, 64))
    assert doubled.dtype == bool
    np.testing.assert_array_equal(doubled, (mask > 0).repeat(2, 0).repeat(2, 1))
    with pytest.raises(FileNotFoundError, match="gone.png"):
        data.read_mask(file, {"mask_ref": "gone.png"}, "mask_ref")


def test_colour_labels_are_exact_on_every_pair_of_neighbours(tmp_path):
    """Antialiased borders between any two labels, and between a label and black, white or nothing."""
    colours = np.array([*PALETTE, (255, 255, 255)], float)
    for a in range(11):
        for b in range(a):
            fine = np.full((12 * FINE, 12 * FINE), a)
            fine[np.add.outer(np.arange(60), 2 * np.arange(60)) < 93] = b  # a slanted border
            blocks = colours[fine].reshape(12, FINE, 12, FINE, 3).mean((1, 3))
            share = (fine == b).reshape(12, FINE, 12, FINE).mean((1, 3))
            truth = np.where(share > 0.5, b, a) % 10  # label 10 is white: background
            found = data.read_labels(save(tmp_path / "x.png", np.rint(blocks)))
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, truth, err_msg=f"{a} beside {b}")


def test_colour_labels_with_alpha_and_small_errors(tmp_path):
    fine = draw_labels(64, [(1, 0.2, 0.2), (2, 0.7, 0.2), (7, 0.2, 0.7), (5, 0.7, 0.7)], FINE)
    truth, picture = majority(fine), blend(fine)
    np.testing.assert_array_equal(data.read_labels(save(tmp_path / "a.png", picture)), truth)
    clear = np.dstack([np.where(truth[..., None] > 0, picture, 228), 255 * (truth > 0)])  # red-ish where nothing is seen
    np.testing.assert_array_equal(data.read_labels(save(tmp_path / "b.png", clear)), truth)
    useless = np.dstack([picture, np.zeros_like(truth)])
    np.testing.assert_array_equal(data.read_labels(save(tmp_path / "c.png", useless)), truth)
    shifted = np.clip(picture + np.random.default_rng(0).integers(-6, 7, picture.shape), 0, 255)
    assert (data.read_labels(save(tmp_path / "d.png", shifted)) != truth).mean() < 0.002
    thin = np.zeros((9, 9), int)
    thin[4, 2:7] = 5  # a line of one pixel, not quite of its colour
    line = np.array(PALETTE)[thin] + 4 * (thin[..., None] == 5) * [-1, 1, 1]
    np.testing.assert_array_equal(data.read_labels(save(tmp_path / "f.png", line)), thin)
    Image.fromarray(picture).quantize(256).save(tmp_path / "e.png")
    assert (data.read_labels(tmp_path / "e.png") != truth).mean() < 0.002


def test_painted_labels_are_read_back(tmp_path):
    labels = np.random.default_rng(0).integers(0, 10, (9, 13)).astype(np.uint8)
    painted = data.paint_labels(labels)
    assert painted[labels == 5].tolist()[0] == list(PALETTE[5])
    np.testing.assert_array_equal(data.read_labels(save(tmp_path / "x.png", painted)), labels)


def test_measured_masks():
    a, b = np.zeros((2, 10, 20), bool)
    a[2:4, 0:10], b[8:10, 10:20] = True, True
    assert data.measure_masks(a, b) == {"area_ref": 0.1, "area_tgt": 0.1, "centroid_ref": [0.25, 0.3],
                                        "centroid_tgt": [0.75, 0.9], "moved": pytest.approx(np.hypot(0.5, 0.6), abs=1e-4)}
    assert data.measure_masks(a, np.zeros_like(a)) == {"area_ref": 0.1, "area_tgt": 0.0, "centroid_ref": [0.25, 0.3]}


# The user's own pairs


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pairs"
    for name, ref, tgt in (("a", "png", "jpg"), ("deep/b", "webp", "png"), ("c.1", "png", "png")):
        save(root / f"{name}_ref.{ref}", noise(1))
        save(root / f"{name}_tgt.{tgt}", noise(2))
    (root / "a.txt").write_text("\ufeffMove the mug\n to the left. \n", encoding="utf-8")
    save(root / "a_mask_ref.png", square(2))
    save(root / "a_mask_tgt.png", square(12))
    return root


def test_folder_of_pairs(folder, tmp_path):
    file = tmp_path / "out" / "x.jsonl"
    rows, remarks = pair_rows(folder, file)
    data.write_rows(file, rows)
    rows = {row["id"]: row for row in data.read_rows(file, ("ref", "tgt"))}
    assert remarks == [] and set(rows) == {"a", "deep/b", "c.1"}
    assert rows["a"]["instruction"] == "Move the mug to the left." and "instruction" not in rows["deep/b"]
    assert rows["a"]["checks"] == {"instruction": "given"} and rows["a"]["source"] == {"kind": "pairs"}
    assert data.resolve(file, rows["a"], "tgt") == file.parent / "../pairs/a_tgt.jpg"
    assert "mask_ref" not in rows["c.1"] and rows["c.1"]["ref"].endswith("c.1_ref.png")
    np.testing.assert_array_equal(data.read_mask(file, rows["a"], "mask_tgt"), square(12) > 0)
    for row in rows.values():
        assert data.open_image(data.resolve(file, row, "ref")).shape == (24, 32, 3)


def test_folder_with_faults(folder, tmp_path):
    (folder / "deep/b_tgt.png").unlink()
    save(folder / "c.1_ref.jpg", noise(3))
    save(folder / "holiday.png", noise(3))
    (folder / "alone.txt").write_text("Move it.")
    (folder / ".DS_Store").write_bytes(b"")
    rows, remarks = pair_rows(folder, tmp_path / "x.jsonl")
    assert [row["id"] for row in rows] == ["a"]
    text = "\n".join(remarks)
    for part in ("deep/b: no tgt", "c.1: two pictures c.1_ref", "holiday.png: not of the form", "alone: no ref, no tgt"):
        assert part in text
    assert len(remarks) == 4


@pytest.mark.parametrize("mark", (",", ";", "\t"))
def test_csv_of_pairs(folder, tmp_path, mark):
    lines = [["Ref", "tgt ", "instruction", "mask_ref", "mask_tgt", "id", "note"],
             ["a_ref.png", "a_tgt.jpg", '"Move it, please; now."', "a_mask_ref.png", "a_mask_tgt.png", "first", "x"],
             ["a_ref.png", "a_tgt.jpg"], [], ["a_ref.png", "deep/b_tgt.png", "Move it."], ["gone.png", "a_tgt.jpg"],
             ["a_ref.png", "", "Move it away."], ["a_ref.png", "a_tgt.jpg", "", "", "", "first"]]
    path = folder / "list.csv"
    path.write_bytes(("\ufeff" + "\r\n".join(mark.join(line) for line in lines)).encode())
    file = tmp_path / "x.jsonl"
    rows, remarks = pair_rows(path, file)
    assert [row["id"] for row in rows] == ["first", "a_ref", "a_ref#5"]
    assert rows[0]["instruction"] == "Move it, please; now." and "instruction" not in rows[1]
    assert data.resolve(file, rows[2], "tgt").samefile(folder / "deep/b_tgt.png")
    np.testing.assert_array_equal(data.read_mask(file, rows[0], "mask_ref"), square(2) > 0)
    text = "\n".join(remarks)
    for part in ("note", "gone.png is missing", "a_ref#7: no tgt", "list.csv:8: the id 'first' is taken"):
        assert part in text
    assert len(remarks) == 4


def test_pairs_that_are_not_there(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="found nothing"):
        pair_rows(tmp_path / "nowhere", tmp_path / "x.jsonl")
    save(tmp_path / "empty/a_ref.png", noise(0))
    with pytest.raises(ValueError, match="none that is whole.\na: no tgt"):
        pair_rows(tmp_path / "empty", tmp_path / "x.jsonl")
    (tmp_path / "x.csv").write_text("source,target\n1,2\n")
    assert command(monkeypatch, "pairs", "--root", tmp_path / "x.csv", "--out", tmp_path / "x.jsonl") == 2
    assert "Expected a header with ref and tgt" in capsys.readouterr().err
    assert command(monkeypatch, "pairs", "--root", tmp_path, "--out", tmp_path / "x.json") == 2
    assert "--out must end in .jsonl" in capsys.readouterr().err


# The rendered world


@pytest.mark.parametrize("level, split, size", [("plain", "train", 40), ("hard", "unseen", 72)])
def test_scenes_are_what_was_rendered(tmp_path, monkeypatch, level, split, size):
    file = tmp_path / "deep" / "s.jsonl"
    args = ["scenes", "--out", file, "--count", 3, "--level", level, "--split", split, "--size", size, "--seed", 5]
    assert command(monkeypatch, *args) == 0
    rows = data.read_rows(file)
    assert len(rows) == 3
    for index, row in enumerate(rows):
        pair = scenes.make_pair(5, level, split, size, index=index)
        for key in ("ref", "tgt", "empty"):
            np.testing.assert_array_equal(data.open_image(data.resolve(file, row, key)), getattr(pair, key))
        for key, ids in (("mask_ref", pair.ref_ids), ("mask_tgt", pair.tgt_ids)):
            np.testing.assert_array_equal(data.read_mask(file, row, key), ids == pair.moved)
            labels = data.read_labels(data.resolve(file, row, key))
            assert labels.shape == (size, size)
            for label in range(1, 10):
                named = [i for i, thing in enumerate(pair.scene.objects) if thing.name == f"the {row['objects'].get(str(label))}"]
                np.testing.assert_array_equal(labels == label, np.isin(ids, named))
        with Image.open(data.resolve(file, row, "depth_tgt")) as image:
            depth = np.asarray(image, np.float64) / 65535 * 2 - 1
        np.testing.assert_allclose(depth, scenes.disparity(pair.tgt_depth), atol=1.6e-5)
        y, x = np.argwhere(pair.mask_tgt).mean(0)
        assert row["end_xy"] == pytest.approx([(x + 0.5) / size, (y + 0.5) / size], abs=1e-4)
        assert (row["instruction"], row["relation"], row["split"]) == (pair.instruction, pair.relation, split)
        moved = pair.scene.objects[pair.moved]
        assert row["object"] == {"category": moved.shape, "description": f"{moved.colour} {moved.shape}"}
        assert [f"the {row['objects'][str(k)]}" for k in row["source"]["references"]] == [
            pair.scene.objects[i].name for i in pair.references]
        assert row["id"] == f"{split}/{pair.seed}" and row["mask_label"] == 1
    assert command(monkeypatch, "check", file) == 0


def test_scenes_that_stop_midway_leave_no_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "s.jsonl"
    data.write_rows(file, [{"id": "old", "ref": "s/000000_ref.png"}])
    (tmp_path / "s").write_text("in the way of the folder of pictures")
    assert command(monkeypatch, "scenes", "--out", file, "--count", 1, "--size", 32) == 2
    assert not file.exists()
    for flags in (["--count", 0], ["--count", 1, "--size", 8], ["--count", 1, "--seed", -1]):
        assert command(monkeypatch, "scenes", "--out", file, *flags) == 2
        assert "must be at least" in capsys.readouterr().err


# The check


@pytest.fixture
def faulty(tmp_path):
    """Rows with one fault each, by the name of the fault, and two good ones."""
    rows = []
    for n, name in enumerate(("good", "small masks", "missing file", "missing mask", "unreadable picture", "sizes differ",
                              "mask of another view", "empty mask", "empty label", "no instruction", "duplicate pair",
                              "odd aspect ratio", "ref equals tgt", "no target")):
        size = (20, 51) if name == "odd aspect ratio" else (24, 32)
        for key, image in (("ref", noise(2 * n, *size)), ("tgt", noise(2 * n + 1, *size)), ("mask_ref", square(2, *size)),
                           ("mask_tgt", square(12, *size))):
            save(tmp_path / f"{n}_{key}.png", image)
        rows.append({"id": name, "instruction": "Move the mug to the left.", "relation": "left" if n % 2 else "right",
                     **{key: f"{n}_{key}.png" for key in ("ref", "tgt", "mask_ref", "mask_tgt")}})
    by = {row["id"]: row for row in rows}
    for key in ("mask_ref", "mask_tgt"):
        save(tmp_path / by["small masks"][key], square(1)[:12, :16])
    (tmp_path / by["missing file"]["tgt"]).unlink()
    (tmp_path / by["missing mask"]["mask_tgt"]).unlink()
    path = tmp_path / by["unreadable picture"]["ref"]
    path.write_bytes(path.read_bytes()[:900])
    save(tmp_path / by["sizes differ"]["tgt"], noise(99, 24, 31))
    save(tmp_path / by["mask of another view"]["mask_ref"], square(2, 32, 24))
    save(tmp_path / by["empty mask"]["mask_tgt"], np.zeros((24, 32)))
    by["empty label"]["mask_label"] = 4  # the masks are black and white
    by["no instruction"]["instruction"] = "  "
    by["duplicate pair"] |= {key: by["good"][key] for key in ("ref", "tgt")}
    save(tmp_path / by["ref equals tgt"]["tgt"], noise(24, 24, 32))
    del by["no target"]["tgt"]
    data.write_rows(tmp_path / "x.jsonl", rows)
    return tmp_path / "x.jsonl"


def test_every_problem_is_found_and_named(faulty, tmp_path, monkeypatch, capsys):
    png = tmp_path / "new" / "sheet.png"
    assert command(monkeypatch, "check", faulty, "--sheet", png) == 1
    text = capsys.readouterr().out
    found = {}
    for kind, block in re.findall(r"^([a-z ]+): \d+\n((?:  .*\n)+)", text, re.M):
        found[kind] = re.findall(r"^  ([^:]+): ", block, re.M)
    assert found == {"missing file": ["missing file", "missing mask"], "unreadable picture": ["unreadable picture"],
                     "sizes differ": ["sizes differ", "mask of another view"], "empty mask": ["empty mask"] + ["empty label"] * 2,
                     "no instruction": ["no instruction"], "duplicate pair": ["duplicate pair"],
                     "odd aspect ratio": ["odd aspect ratio"], "ref equals tgt": ["ref equals tgt"]}
    for part in ("14 rows, 13 with a target, 14 with masks", "right 7, left 7", "32 x 24 12", "51 x 20 1", "12 problems found",
                 "6 to 6 words", "the same two pictures as good", "4_ref.png", "tgt is 31 x 24, ref is 32 x 24"):
        assert part in text, part
    assert data.open_image(png).shape[0] == 14 * 168


def test_a_file_without_problems(faulty, monkeypatch, capsys):
    rows = [row for row in data.read_rows(faulty) if row["id"] in ("good", "small masks", "no target")]
    data.write_rows(faulty, rows)
    assert command(monkeypatch, "check", faulty) == 0
    assert "no problems found" in capsys.readouterr().out


def test_many_problems_of_a_kind_are_counted_and_named_on_demand(faulty, monkeypatch, capsys):
    data.write_rows(faulty, [{"id": f"row {n}", "ref": "0_ref.png"} for n in range(25)])
    assert command(monkeypatch, "check", faulty) == 1
    text = capsys.readouterr().out
    assert "no instruction: 25" in text and "row 9:" in text and "row 10:" not in text and "and 15 more" in text
    command(monkeypatch, "check", faulty, "--all")
    assert "row 24:" in capsys.readouterr().out


def test_what_the_sheet_shows(faulty, monkeypatch):
    rows = {row["id"]: row for row in data.read_rows(faulty)}
    drawn = sheet(faulty, [rows["good"]], height=24)  # pictures at their own size
    ref, tgt = drawn[4:28, 8:40], drawn[4:28, 48:80]
    changed = (ref != noise(0)).any(-1)
    rim = square(2) > 0
    rim[3:7, 5:9] = False  # the outermost pixels of the object
    assert changed[rim].all() and not changed[3:7, 5:9].any() and not changed[:, 12:].any() and not changed[12:].any()
    assert (tgt != noise(1)).any(-1)[12, 4:10].all()
    png = faulty.with_name("sheet.png")
    command(monkeypatch, "check", faulty, "--sheet", png, "--sheet-rows", 2)  # evenly spaced
    kept = list(rows.values())
    np.testing.assert_array_equal(data.open_image(png), sheet(faulty, [kept[0], kept[7]]))
    # Faults do not keep the sheet from being drawn; rows of unequal width are filled up with white.
    assert sheet(faulty, list(rows.values())).shape[2] == 3


def test_wrong_use_exits_with_2(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "check", tmp_path / "none.jsonl") == 2
    assert "Expected a file of JSON lines" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a"}))
    assert command(monkeypatch, "check", tmp_path / "x.jsonl") == 2
    assert command(monkeypatch, "objedit", "--root", tmp_path, "--out", tmp_path / "y.jsonl") == 2
    assert "must hold translate/" in capsys.readouterr().err
