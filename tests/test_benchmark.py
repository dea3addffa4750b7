"""Benchmarks: constructed edits rank as they should, the judge's failures are counted, runs resume.

    pytest tests/test_benchmark.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_server import FakeServer
from PIL import Image
from test_sample import weights  # noqa: F401, a fixture

import evaluate
import sample as sample_script
from data import SET1, open_image, read_rows, resize, save_png, write_rows
from evaluation import benchmark, chat, metrics, score, viescore
from model.depth import DEPTH_CONFIGS
from scenes import make_pair

ROOT = Path(__file__).parent.parent
PAIRS = [make_pair(5, "plain", "seen", 96, index=i) for i in range(4)]


def effect(pair, picture):
    smooth = metrics.box(metrics.as_float(pair.empty), 3)
    return metrics.dilate((np.abs(metrics.box(metrics.as_float(picture), 3) - smooth) > 0.1).any(-1), 2)


def off(pair, pixels=8):
    """The right object and its shadow, `pixels` from where they belong, towards the middle."""
    move = pixels if np.argwhere(pair.mask_tgt)[:, 1].mean() < 48 else -pixels
    edit, region = pair.empty.copy(), np.roll(effect(pair, pair.tgt), move, 1)
    edit[region] = np.roll(pair.tgt, move, 1)[region]
    return edit


EDITS = {"perfect": lambda p: p.tgt, "off": off, "copied": lambda p: p.ref, "removed": lambda p: p.empty}


def box_of(mask):
    top, left, bottom, right = metrics.bounds(mask)
    return [float(x) for x in (left / 96, top / 96, right / 96, bottom / 96)]


def make(folder, keys=("ref", "tgt", "mask_ref", "mask_tgt", "empty"), group="rendered", pairs=PAIRS, boxes=False):
    """Rows of rendered pairs that know only `keys`; their pictures lie in `folder`."""
    rows = []
    for pair in pairs:
        row = {"id": f"{group}/{pair.seed}", "instruction": pair.instruction, "group": group, "relation": pair.relation}
        for key in keys:
            picture = getattr(pair, key)
            save_png(folder / f"{group}_{pair.seed}_{key}.png", picture if picture.ndim == 3 else 255 * picture[..., None].repeat(3, 2).astype(np.uint8))
            row[key] = f"{group}_{pair.seed}_{key}.png"
        rows.append(row | ({"box_tgt": box_of(pair.mask_tgt)} if boxes else {}))
    return rows


@pytest.fixture
def bench(tmp_path):
    """Three kinds of rows: all known; truth and masks, as OBJect has; a photograph with a mask and a box."""
    folder = tmp_path / "bench"
    rows = (make(folder) + make(folder, ("ref", "tgt", "mask_ref", "mask_tgt"), "object")
            + make(folder, ("ref", "mask_ref"), "complex", boxes=True))
    write_rows(folder / "benchmark.jsonl", rows)
    return folder


def outputs(bench, tmp_path, names=tuple(EDITS)):
    """Folders of constructed edits, as NAME=DIR."""
    for name in names:
        for row in read_rows(bench / "benchmark.jsonl"):
            pair = next(p for p in PAIRS if row["id"].endswith(str(p.seed)))
            save_png(benchmark.output_path(tmp_path / name, row["id"]), EDITS[name](pair))
    return [f"{name}={tmp_path / name}" for name in names]


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()


def refused(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *argv)
    sentence = capsys.readouterr().err
    assert stop.value.code == 2 and sentence.strip().count("\n") == 0
    return sentence


# Exact metrics


def test_constructed_edits_rank_as_they_should(bench, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "score", "--benchmark", bench, "--outputs", *outputs(bench, tmp_path), "--output", tmp_path / "results")
    found = json.loads((tmp_path / "results/results.json").read_text())["methods"]
    assert list(found) == [score.COPY, *EDITS]

    def means(group, name):
        return {method: entry["groups"][group]["metrics"][name]["mean"] for method, entry in found.items()}

    iou = means("rendered", "effect_iou")
    assert iou["perfect"] == 1 > iou["off"] > max(iou["copied"], iou["removed"]) and iou["off"] > 0.2
    assert means("rendered", "placed") == {"perfect": 1, "off": 0, "copied": 0, "removed": 0, score.COPY: 0}
    ghost, arrival = means("rendered", "ghost"), means("rendered", "arrival")
    assert ghost["copied"] == 1 and max(ghost["perfect"], ghost["removed"]) < 0.05 and arrival["perfect"] == 1 > arrival["off"] > arrival["removed"]
    retrieval = means("rendered", "retrieval")
    assert retrieval["perfect"] == 1 and retrieval["copied"] == retrieval["removed"] == 0
    for group in ("rendered", "object"):
        near, whole = means(group, "obj_psnr"), means(group, "psnr")
        assert near["perfect"] == whole["perfect"] == 50 and near["off"] > max(near["copied"], near["removed"]) and near["off"] < 25
    assert set(found["perfect"]["groups"]["object"]["metrics"]) == {"psnr", "ssim", "bg_psnr", "bg_ssim", "obj_psnr", "obj_psnr_shift"}
    background = means("object", "bg_psnr")
    assert background["perfect"] == 50 and background["copied"] > 30 > background["off"]
    template, change, kept = (means("complex", name) for name in ("template", "source_change", "kept_psnr"))
    assert template["perfect"] > 0.8 and template["perfect"] > template["off"] > max(template["copied"], template["removed"])
    assert change["copied"] == 0 and min(change["perfect"], change["removed"]) > 0.8 and kept["copied"] == 50 > kept["perfect"] > 25
    assert not {"psnr", "obj_psnr"} & set(found["perfect"]["groups"]["complex"]["metrics"])
    for method in found:  # doing nothing is always there to compare with
        assert found[score.COPY]["metrics"] == found["copied"]["metrics"]
    printed = capsys.readouterr().out
    assert "| metric | source copy | perfect |" in printed and "| outputs | 12 | 12 |" in printed and "Qwen-Image-Edit | 0.666" in printed and "cannot be compared" in printed

    lines = [json.loads(line) for line in (tmp_path / "results/scores.jsonl").read_text().splitlines()]
    assert len(lines) == 12 * 5 and all(len(line["sha256"]["picture"]) == 64 for line in lines)
    page = (tmp_path / "results/report.html").read_text()
    assert "perfect" in page and "not measured here" in page and "worst" in page.lower()


def test_edits_of_another_size_and_suffix_are_taken(bench, tmp_path):
    file, rows = benchmark.read_benchmark(bench)
    folder = tmp_path / "large"
    folder.mkdir()
    for row, pair in zip(rows, PAIRS):
        Image.fromarray(resize(pair.tgt, 192, 192)).save(folder / f"{row['id'].replace('/', '_')}.WEBP", "WEBP", quality=95)
    records, missing = score.collect(file, rows[:4], {"large": folder})
    assert not missing["large"]
    for record in records:
        if record["method"] == "large":
            assert record["metrics"]["placed"] == 1 and 28 < record["metrics"]["psnr"] < 50


def test_missing_and_damaged_outputs_are_counted_and_said(bench, tmp_path, monkeypatch, capsys):
    folders = outputs(bench, tmp_path, ("perfect", "copied"))
    (tmp_path / f"perfect/rendered_{PAIRS[0].seed}.png").unlink()
    damaged = tmp_path / f"perfect/object_{PAIRS[1].seed}.png"
    damaged.write_bytes(damaged.read_bytes()[:900])
    command(monkeypatch, "score", "--benchmark", bench, "--outputs", *folders, "--output", tmp_path / "results")
    found = json.loads((tmp_path / "results/results.json").read_text())["methods"]["perfect"]
    assert found["n"] == 10 and found["missing"] == sorted([f"rendered/{PAIRS[0].seed}", f"object/{PAIRS[1].seed}"])
    assert found["metrics"]["psnr"]["n"] == 6 and found["metrics"]["psnr"]["mean"] == 50
    printed = capsys.readouterr().out
    assert "perfect: 2 of 12 outputs are MISSING" in printed and "| outputs | 12 | 10 |" in printed and "| missing | 0 | 2 |" in printed


def test_worst_and_best_cases_and_bars_of_the_report(bench, tmp_path):
    """Three rows with perfect, misplaced and missing edits: the cases are told apart, the bars are by relation."""
    file, rows = benchmark.read_benchmark(bench)
    for row, pair, name in zip(rows, PAIRS, ("off", "perfect", "removed", "perfect")):
        save_png(benchmark.output_path(tmp_path / "mixed", row["id"]), EDITS[name](pair))
    records, missing = score.collect(file, rows[:4], {"mixed": tmp_path / "mixed"})
    cases = score.cases(file, rows, records, count=1)
    assert [(case.kind, case.title) for case in cases] == [("worst", f"mixed: {rows[2]['id']}"), ("best", f"mixed: {rows[3]['id']}")]
    assert [list(case.pictures) for case in cases] == [["source", "edit", "truth"]] * 2
    (bars,) = score.bars(score.results(records, missing), "effect_iou")
    relations = sorted({pair.relation for pair in PAIRS})
    assert [label.rsplit(" (", 1)[0] for label in bars.labels] == relations
    for relation, triple in zip(relations, bars.series["mixed"]):
        values = [r["metrics"]["effect_iou"] for r in records if r["method"] == "mixed" and r["relation"] == relation]
        assert triple[0] == pytest.approx(np.mean(values), abs=1e-5)


def test_template_similarity_finds_a_resized_object_and_its_colour():
    rng = np.random.default_rng(0)
    scene = np.full((120, 160, 3), (120, 130, 110), np.uint8) + rng.integers(0, 6, (120, 160, 3), dtype=np.uint8)
    thing = np.full((30, 24, 3), (200, 40, 40), np.uint8)
    thing[8:16, 4:20] = (240, 220, 60)
    source, m0 = scene.copy(), np.zeros((120, 160), bool)
    source[20:50, 10:34], m0[20:50, 10:34] = thing, True
    m1 = np.zeros_like(m0)
    m1[50:95, 90:126] = True  # 1.5 times as large

    def put(picture, dx=0):
        edit = scene.copy()
        edit[50:95, 90 + dx:126 + dx] = resize(picture, 45, 36)
        return metrics.template_similarity(edit, source, m0, m1)

    assert put(thing) > 0.95 and put(thing, 4) > 0.9
    assert put(thing[..., ::-1].copy()) < 0.7  # a blue one
    assert put(thing[::-1].copy()) < put(thing) - 0.05  # upside down
    assert metrics.template_similarity(scene, source, m0, m1) < 0.4
    assert put(thing, -60) < 0.5  # elsewhere
    assert np.isnan(metrics.template_similarity(scene, scene, m0 & False, m1))


def test_a_box_is_a_share_of_width_and_height(tmp_path):
    save_png(tmp_path / "a.png", np.zeros((40, 100, 3), np.uint8))
    row = {"id": "a", "ref": "a.png", "box_tgt": [0.1, 0.25, 0.3, 0.5]}
    assert metrics.bounds(benchmark.read_sample(tmp_path / "benchmark.jsonl", row).mask_tgt) == (10, 10, 20, 30)


def test_regions_at_the_border_of_the_picture_are_measured():
    pair = PAIRS[0]
    m0, m1 = np.zeros((96, 96), bool), np.zeros((96, 96), bool)
    m0[:20, :20], m1[80:, 70:] = True, True
    found = metrics.measure_without_truth(pair.ref, pair.ref, m0, m1)
    assert found["source_change"] == 0 and found["kept_psnr"] == 50 and -1 <= found["template"] <= 1


def test_depth_order():
    moved, near, far, same = (np.zeros((40, 40), bool) for _ in range(4))
    moved[:5], near[10:15], far[20:25], same[30:35] = True, True, True, True

    def depth(a, b, c, d=0.505):
        z = np.zeros((40, 40))
        z[moved], z[near], z[far], z[same], z[39] = a, b, c, d, 1
        return z

    truth = depth(0.5, 0.8, 0.2)
    def order(z):
        return metrics.order_agreement(z, truth, moved, [near, far, same])
    assert order(truth) == order(3 * truth + 7) == 1  # `same` is too near to tell
    assert order(depth(0.9, 0.8, 0.2)) == order(depth(0.1, 0.8, 0.2)) == order(depth(0.79, 0.8, 0.2)) == 0.5
    assert order(depth(0.5, 0.2, 0.8)) == 0
    assert np.isnan(metrics.order_agreement(truth, truth, moved, [same]))


def test_depth_order_takes_the_other_labels_of_the_mask(tmp_path):
    """The stand-in for a depth model sees a picture's brightness as nearness; labels 1 (moved), 2 and 3 are told apart."""
    labels = np.zeros((96, 96, 3), np.uint8)
    picture = np.zeros((96, 96, 3), np.uint8)
    for k, grey in ((1, 120), (2, 200), (3, 40)):
        labels[20 * k:20 * k + 15], picture[20 * k:20 * k + 15] = SET1[k - 1], grey
    picture[0], picture[1] = 255, 0
    for name, value in (("ref", picture), ("tgt", picture), ("mask", labels)):
        save_png(tmp_path / f"{name}.png", value)
    row = {"id": "a", "ref": "ref.png", "tgt": "tgt.png", "instruction": "Move it.", "mask_ref": "mask.png", "mask_tgt": "mask.png", "mask_label": 1}
    write_rows(tmp_path / "benchmark.jsonl", [row])
    sample = benchmark.read_sample(tmp_path / "benchmark.jsonl", row)
    assert len(sample.others) == 2 and sample.mask_tgt.sum() == 15 * 96

    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = DEPTH_CONFIGS["small"]

        def forward(self, images):
            return images.mean(1)

    edit = picture.copy()
    edit[20:35] = 230  # before label 2, where it should be behind
    model = Brightness()
    assert benchmark.measure(picture, sample, model)["depth_order"] == 1
    assert benchmark.measure(edit, sample, model)["depth_order"] == 0.5
    assert "depth_order" not in benchmark.measure(edit, sample)


# Reading


@pytest.mark.parametrize("change, sentence", [
    ({"id": "rendered_1"}, "name the same output picture"),
    ({"box_tgt": [0.5, 0, 0.4, 1]}, "box_tgt"),
    ({"box_tgt": [10, 20, 40, 50]}, "box_tgt"),
    ({"instruction": None}, "instruction"),
])
def test_faulty_benchmarks_are_refused(tmp_path, change, sentence):
    row = {"id": "rendered/1", "ref": "x.png", "instruction": "Move it."}
    write_rows(tmp_path / "benchmark.jsonl", [row, row | {"id": "b"} | change])
    with pytest.raises(ValueError, match=sentence):
        benchmark.read_benchmark(tmp_path)


def test_pictures_of_a_row_must_have_one_size(tmp_path):
    save_png(tmp_path / "a.png", PAIRS[0].ref)
    save_png(tmp_path / "b.png", PAIRS[0].tgt[:64])
    with pytest.raises(ValueError, match="96 x 64.*one size"):
        benchmark.read_sample(tmp_path / "benchmark.jsonl", {"id": "a", "ref": "a.png", "tgt": "b.png"})


def test_careless_options_end_in_a_sentence(bench, tmp_path, monkeypatch, capsys):
    options = ("score", "--benchmark", bench, "--output", tmp_path / "r", "--outputs")
    assert "NAME=DIR" in refused(monkeypatch, capsys, *options, tmp_path)
    assert "NAME=DIR" in refused(monkeypatch, capsys, *options, f"a={bench}", f"a={bench}")
    assert "folder of outputs" in refused(monkeypatch, capsys, *options, f"a={tmp_path / 'none'}")
    assert "none" in refused(monkeypatch, capsys, "generate", "--benchmark", tmp_path / "none", "--output", tmp_path / "o")
    assert "--url" in refused(monkeypatch, capsys, *options, f"a={bench}", "--dry-run")


# The judge on a failing server


def test_failing_server_leaves_every_sample_scored_or_counted(tmp_path):
    pairs = [make_pair(7, "plain", "seen", 48, index=i) for i in range(24)]
    rows = make(tmp_path, pairs=pairs)
    for row, pair in zip(rows, pairs):
        for name in ("perfect", "removed"):
            save_png(benchmark.output_path(tmp_path / name, row["id"]), EDITS[name](pair))
    records, _ = score.collect(tmp_path / "benchmark.jsonl", rows, {name: tmp_path / name for name in ("perfect", "removed")})
    with FakeServer(failures=0.3, hang=0.6, retry_after=0.02, seed=1) as server:
        client = chat.Chat(chat.Endpoint(server.url, "judge", timeout=0.3, retries=2, backoff=0.02), tmp_path / "calls.jsonl")
        score.judge(records, client, threads=8, attempts=2, images_first=False)
        drawn = server.stats()["drawn"]
    assert len(drawn) == 10, "every kind of failure happened"
    found = score.results(records, {"perfect": {}, "removed": {}})
    for method, entry in found.items():
        assert entry["judge"]["n"] + entry["judge"]["failed"] == 24
    failed = [record for record in records if viescore.scores(record["judge"]) is None]
    assert all(record["judge"]["sc"]["problem"] or record["judge"]["pq"]["problem"] for record in failed) and len(failed) < 30
    assert found["perfect"]["judge"]["O"]["mean"] > 0.6 > 0.3 > found[score.COPY]["judge"]["O"]["mean"]
    assert found[score.COPY]["judge"]["PQ"]["mean"] > 0.6  # did not edit, looks fine


def test_samples_that_fail_are_said(bench, tmp_path, monkeypatch, capsys):
    with FakeServer(failures=1, kinds=("empty",)) as server:
        command(monkeypatch, "score", "--benchmark", bench, "--outputs", *outputs(bench, tmp_path, ("perfect",)), "--output", tmp_path / "r",
                "--url", server.url, "--model", "judge", "--threads", "8")
    entry = json.loads((tmp_path / "r/results.json").read_text())["methods"]["perfect"]
    assert (entry["judge"]["n"], entry["judge"]["failed"], entry["judge"]["O"]) == (0, 12, None)
    assert "perfect: the judge FAILED on 12 of 12" in capsys.readouterr().out


def test_kill_and_resume_repeats_no_answered_call(bench, tmp_path, monkeypatch, capsys):
    folders, threads = outputs(bench, tmp_path, ("perfect", "off")), 2
    with FakeServer(delay=0.2) as server:  # 24 different calls: equal ones are asked once
        options = ["score", "--benchmark", bench, "--outputs", *folders, "--output", tmp_path / "r", "--url", server.url, "--model", "judge",
                   "--threads", threads]
        process = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *map(str, options)], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        start = time.time()
        while server.stats()["answered"] < 8 and time.time() - start < 60:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        before = server.stats()
        assert 8 <= before["answered"] < 24 and not (tmp_path / "r/results.json").exists()
        command(monkeypatch, *options)
        after = server.stats()
        wanted = len(after["bodies"])
        assert wanted == 24
        assert after["answered"] - wanted <= threads, "only calls in flight at the kill are asked twice"
        command(monkeypatch, *options, "--dry-run")
        assert " 0 calls not yet answered" in capsys.readouterr().out
        command(monkeypatch, *options)
        assert server.stats()["requests"] == after["requests"], "a third run asks nothing"
    records = [json.loads(line) for line in (tmp_path / "r/scores.jsonl").read_text().splitlines()]
    assert len(records) == 36 and all(viescore.scores(record["judge"]) and record["judge"]["sc"]["answers"] for record in records)


def test_group_means_give_every_group_the_same_weight():
    def record(group, sc):
        both = {key: {"scores": [x, 10], "one_number": False} for key, x in (("sc", sc), ("pq", 9))}
        return {"method": "m", "group": group, "relation": "", "metrics": {}, "judge": both}

    found = score.results([record("a", 2), record("a", 2), record("a", 2), record("b", 8)], {"m": {}})["m"]
    assert found["judge"]["SC"]["mean"] == pytest.approx(0.35) and found["judge"]["group_means"]["SC"] == pytest.approx(0.5)
    assert found["groups"]["b"]["judge"]["SC"]["mean"] == pytest.approx(0.8)


def test_sanity_command(bench, tmp_path, monkeypatch, capsys):
    with FakeServer() as server:
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, "sanity", "--benchmark", bench, "--url", server.url, "--model", "judge", "--count", "3")
        assert stop.value.code == 0 and 0 < (asked := server.stats()["requests"]) <= 24
        with pytest.raises(SystemExit):  # no call is paid for twice
            command(monkeypatch, "sanity", "--benchmark", bench, "--url", server.url, "--model", "judge", "--count", "3")
        assert server.stats()["requests"] == asked
    assert "the judge can be used" in capsys.readouterr().out
    with FakeServer(failures=1, kinds=("empty",)) as server, pytest.raises(SystemExit) as stop:
        command(monkeypatch, "sanity", "--benchmark", bench, "--url", server.url, "--model", "judge", "--count", "1",
                "--cache", tmp_path / "calls.jsonl")
    assert stop.value.code == 1 and "do NOT use" in capsys.readouterr().out


def test_study_command(bench, tmp_path, monkeypatch, capsys):
    folders = outputs(bench, tmp_path, ("perfect", "off"))
    options = ("study", "--benchmark", bench, "--outputs", *folders, "--output", tmp_path / "study.html")
    command(monkeypatch, *options, "--count", "3")
    assert (tmp_path / "study.html").stat().st_size > 10_000
    assert "found 12" in refused(monkeypatch, capsys, *options, "--count", "13")
    assert "--tally" in refused(monkeypatch, capsys, "study")


# Composition


@pytest.fixture
def sources(tmp_path):
    """Four photographs in a table, three with a text file, and six test pairs with two reversed ones."""
    photos, texts, objedit = tmp_path / "photos", tmp_path / "texts", tmp_path / "objedit"
    for i in range(4):
        save_png(photos / f"in/{i}.png", PAIRS[i].ref)
        save_png(texts / f"{i}.png", PAIRS[i].ref)
        if i:
            (texts / f"{i}.txt").write_text(f"Move thing {i}.\n")
    save_png(photos / "m.png", 255 * PAIRS[1].mask_ref[..., None].repeat(3, 2).astype(np.uint8))
    (photos / "instructions.csv").write_text("image,instruction,mask_ref,box_tgt\nin/0.png,Move the a.,,\nin/1.png,\"Move b, slowly.\",m.png,0.1 0.2 0.5 0.6\n"
                                             "in/2.png,,,\nin/3.png,Move d.,,\n")
    rows = make(objedit, ("ref", "tgt", "mask_ref", "mask_tgt"), "translate")
    write_rows(objedit / "test.jsonl", rows + [row | {"id": row["id"] + "~"} for row in rows[:2]] + [
        {key: value for key, value in rows[0].items() if key != "instruction"} | {"id": "translate/untold"}])
    return photos, texts, objedit / "test.jsonl"


def test_compose(sources, tmp_path, monkeypatch, capsys):
    photos, _, objedit = sources
    options = ("compose", "--photos", photos, "--objedit", objedit, "--out", tmp_path / "b", "--complex", 3, "--object", 4)
    command(monkeypatch, *options)
    assert "3 complex, 4 object" in capsys.readouterr().out
    assert "already" in refused(monkeypatch, capsys, *options)
    shutil.rmtree(photos), shutil.rmtree(objedit.parent)
    (tmp_path / "b").rename(tmp_path / "moved")  # it needs neither its sources nor its place
    file, rows = benchmark.read_benchmark(tmp_path / "moved")
    assert [row["group"] for row in rows] == ["complex"] * 3 + ["object"] * 4
    assert sorted(row["instruction"] for row in rows[:3]) == ["Move b, slowly.", "Move d.", "Move the a."]
    for row in rows:
        sample = benchmark.read_sample(file, row)
        pair = next(p for p in PAIRS if (p.ref == sample.ref).all())
        if row["group"] == "object":
            assert (sample.tgt == pair.tgt).all() and (sample.mask_tgt == pair.mask_tgt).all() and row["source"]["id"] == f"translate/{pair.seed}"
        elif row["instruction"].startswith("Move b"):
            assert (sample.mask_ref == pair.mask_ref).all() and sample.mask_tgt[20:57, 10:48].all() and not sample.mask_tgt[:18].any()


def test_compose_draws_by_seed(sources, tmp_path):
    photos, texts, objedit = sources
    drawn = [[row["source"]["id"] for row in benchmark.compose(texts, objedit, tmp_path / f"{i}", 2, 2, seed)]
             for i, seed in enumerate((0, 0, 1, 2, 3))]
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn))) > 1


def test_compose_says_what_is_short(sources, tmp_path):
    photos, texts, objedit = sources
    for options, sentence in (((photos, objedit, 4, 4), "Expected 4 photographs.*found 3.*--complex 3"),
                              ((texts, objedit, 100, 4), "found 3"), ((photos, objedit, 3, 5), "Expected 5 test pairs.*found 4.*--object 4"),
                              ((None, objedit, 3, 4), "--photos, found 0"), ((photos / "none", objedit, 3, 4), "found neither")):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            benchmark.compose(*options[:2], tmp_path / "b", *options[2:])
    save_png(photos / "in/3.png", PAIRS[0].ref)
    (photos / "in/3.png").write_bytes((photos / "in/3.png").read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        benchmark.compose(photos, objedit, tmp_path / "b", 3, 4)
    (photos / "instructions.csv").write_text("image,instruction,box_tgt\nin/1.png,Move it.,0.1 x 0.4 0.9\n")
    with pytest.raises(ValueError, match="in/1.png: expected box_tgt"):
        benchmark.compose(photos, objedit, tmp_path / "b", 1, 4)
    with pytest.raises(ValueError, match="both 0"):
        benchmark.compose(photos, objedit, tmp_path / "b", 0, 0)
    assert not (tmp_path / "b").exists()
    assert len(benchmark.compose(None, objedit, tmp_path / "b", 0, 4)) == 4


# Generation


@pytest.fixture
def small(tmp_path):
    """Two rows, neither square nor of the preset's size."""
    folder = tmp_path / "small"
    for i, size in enumerate(((50, 70), (64, 40))):
        save_png(folder / f"{i}.png", resize(PAIRS[i].ref, *size))
    rows = [{"id": f"x/{i}", "ref": f"{i}.png", "instruction": "Move the red cube to the left of the blue sphere."} for i in range(2)]
    write_rows(folder / "benchmark.jsonl", rows)
    return folder


def run_generate(monkeypatch, weights, small, out, *options):
    command(monkeypatch, "generate", "--benchmark", small, "--output", out, "--preset", "tiny", "--weights", weights, "--device", "cpu",
            "--steps", "2", *options)


def test_generate_equals_sample(weights, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    run_generate(monkeypatch, weights, small, tmp_path / "out", "--seed", "3")
    assert "2 pictures made, 0 were there" in capsys.readouterr().out
    seeds = set()
    for i, row in enumerate(read_rows(small / "benchmark.jsonl")):
        path = benchmark.output_path(tmp_path / "out", row["id"])
        assert path == tmp_path / f"out/x_{i}.png"
        with Image.open(path) as image:
            text = image.text
        monkeypatch.setattr(sys, "argv", ["sample.py", "--preset", "tiny", "--weights", str(weights), "--device", "cpu", "--image", str(small / row["ref"]),
                                          "--prompt", row["instruction"], "--seed", text["seed"], "--steps", "2", "--output", str(tmp_path / "edit.png")])
        sample_script.main()
        with Image.open(tmp_path / "edit.png") as image:
            assert image.text == text
        np.testing.assert_array_equal(open_image(path), open_image(tmp_path / "edit.png"))
        seeds.add(text["seed"])
    assert len(seeds) == 2


def test_generate_goes_on_where_it_stopped(weights, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    run_generate(monkeypatch, weights, small, out)
    whole = [(out / f"x_{i}.png").read_bytes() for i in range(2)]
    (out / "x_0.png").unlink()
    stamp = (out / "x_1.png").stat().st_mtime_ns
    run_generate(monkeypatch, weights, small, out)
    assert "1 pictures made, 1 were there" in capsys.readouterr().out
    assert [(out / f"x_{i}.png").read_bytes() for i in range(2)] == whole and (out / "x_1.png").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in out.iterdir()) == ["x_0.png", "x_1.png"]
    with pytest.raises(SystemExit):
        run_generate(monkeypatch, weights, small, out, "--seed", "9")
    assert "another seed" in capsys.readouterr().err
    run_generate(monkeypatch, weights, small, out, "--seed", "9", "--overwrite")
    assert (out / "x_1.png").read_bytes() != whole[1]


def test_words_that_the_preset_does_not_know_are_named_before_any_edit(weights, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    rows = read_rows(small / "benchmark.jsonl")
    write_rows(small / "benchmark.jsonl", [rows[0], rows[1] | {"instruction": "Move the zebra."}])
    with pytest.raises(SystemExit):
        run_generate(monkeypatch, weights, small, tmp_path / "out")
    assert "zebra" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_empty_checkpoint_is_no_plain_kontext(weights, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run_generate(monkeypatch, weights, small, tmp_path / "out", "--checkpoint", str(tmp_path / "empty"))
    assert "connector.safetensors" in capsys.readouterr().err
