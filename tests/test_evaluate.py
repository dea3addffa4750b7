"""The evaluation script on an editor that knows the truth. pytest tests/test_evaluate.py"""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluation import world
from evaluation.ablation import EXCHANGED
from evaluation.world import AE_SOURCE, CEILING, COPY, MODEL, ROWS, SHUFFLED
from model.text import build_word_tokenizer
from scenes import disparity, vocabulary


class Oracle:
    """Knows the scenes by their pictures; obeys exactly the sentence that belongs to one, else leaves it as it is."""

    def __init__(self, level, split, scenes, seed, size):
        self.pairs = {pair.ref.tobytes(): pair for pair, _ in world.scene_stream(level, split, scenes, seed, size)}
        self.seeds = []
        self.sampling = []
        self.knows_depth, self.vggt, self.tokenizers = True, None, (build_word_tokenizer(vocabulary("plain")),) * 2

    def edit(self, images, instructions, seeds, **sampling):
        assert images.dtype == np.uint8 and len(images) == len(instructions) == len(seeds)
        self.seeds += seeds
        self.sampling.append(sampling)
        pairs = [self.pairs[image.tobytes()] for image in images]
        return np.stack([p.tgt if p.instruction == text else p.ref for p, text in zip(pairs, instructions)])

    def edit_and_depth(self, images, instructions, seeds, **sampling):
        if not self.knows_depth:  # without spatial tokens
            return self.edit(images, instructions, seeds, **sampling), None
        depths = [disparity(self.pairs[image.tobytes()].tgt_depth) for image in images]
        grey = [np.repeat(np.rint(127.5 * d + 127.5).astype(np.uint8)[..., None], 3, -1) for d in depths]
        return self.edit(images, instructions, seeds, **sampling), np.stack(grey)

    def vae_roundtrip(self, images):
        return np.clip(images.astype(int) + (np.indices(images.shape).sum(0) % 2 * 4 - 2), 0, 255).astype(np.uint8)


SCENES = ("plain", "unseen", 5, 3, 64)


def mean(rows, row, name):
    return np.mean([v[name] for v in rows[row]])


def test_depth_is_reported_beside_the_source_s():
    values, *_ = world.evaluate(Oracle(*SCENES), *SCENES, batch=2, sheet=0)
    assert all(v["depth_rmse"] < 0.01 and v["depth_order"] == 1 for v in values[MODEL] if not np.isnan(v["depth_order"]))
    assert mean(values, COPY, "depth_rmse") > 0.05
    assert not any("depth_rmse" in v for row in (CEILING, SHUFFLED) for v in values[row])


def test_rows_of_an_oracle():
    values, relations, absent, shown = world.evaluate(Oracle(*SCENES), *SCENES, batch=2, sheet=3)
    assert [len(values[row]) for row in ROWS] == [5] * 5 and len(relations) == 5 and len(shown) == 3
    for row, right in ((MODEL, 1), (CEILING, 1), (COPY, 0), (AE_SOURCE, 0), (SHUFFLED, 0)):
        assert mean(values, row, "success") == right, row
    assert mean(values, MODEL, "psnr") == 50 and 35 < mean(values, CEILING, "psnr") < 45
    assert 0 <= absent <= 1
    sheet = world.contact_sheet(shown)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 2 * (3 * 64 + 2 * 8 + 16)


def test_batch_size_changes_nothing():
    runs = []
    for batch in (2, 5):
        oracle = Oracle(*SCENES)
        values, *_ = world.evaluate(oracle, *SCENES, batch=batch, sheet=0)
        runs.append((values, sorted(oracle.seeds)))
    np.testing.assert_equal(*runs)


def test_a_known_ceiling_is_not_made_again():
    every, *_ = world.evaluate(Oracle(*SCENES), *SCENES, batch=2, sheet=0, baselines=False)
    oracle = Oracle(*SCENES)
    oracle.vae_roundtrip = None
    again, *_ = world.evaluate(oracle, *SCENES, batch=2, sheet=0, baselines=False, ceiling=every[CEILING])
    np.testing.assert_equal(again, every)
    bright = [{**scene, "bg_psnr": scene["bg_psnr"] + 100 * (i == 3)} for i, scene in enumerate(every[CEILING])]
    strict, *_ = world.evaluate(oracle, *SCENES, batch=2, sheet=0, baselines=False, ceiling=bright)
    assert [scene["success"] for scene in strict[MODEL]] == [1, 1, 1, 0, 1]


def test_instructions_are_exchanged_and_seeds_share_no_scene():
    stream = list(world.scene_stream(*SCENES))
    assert all(donor.seed != pair.seed for pair, donor in stream)
    assert sorted(donor.seed for _, donor in stream) == sorted(pair.seed for pair, _ in stream)
    other = world.scene_stream("plain", "unseen", 5, 4, 64)
    assert not {pair.seed for pair, _ in stream} & {pair.seed for pair, _ in other}


@pytest.mark.parametrize("knows_depth", [True, False])
def test_command(knows_depth, tmp_path, monkeypatch, capsys):
    oracle = Oracle("plain", "seen", 2, 7, 128)
    oracle.knows_depth = knows_depth
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: oracle)
    monkeypatch.setattr(sys, "argv", f"evaluate.py --split seen --scenes 2 --seed 7 --output {tmp_path}".split())
    evaluate.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["row"] for r in results] == list(ROWS)
    assert results[0]["metrics"]["success"] == {"mean": 1, "low": 0.34237, "high": 1}
    assert sum(r["scenes"] for r in results[0]["relations"].values()) == 2
    assert Image.open(tmp_path / "sheet_seen.png").size[0] == 2 * (3 * 128 + 2 * 8 + 16)
    assert "| success | 1.000 [0.342, 1.000] |" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert ("depth_rmse" in page) == knows_depth and ("depth_rmse" in results[0]["metrics"]) == knows_depth
    assert all(row in page for row in ROWS) and page.count("data:image/") >= 2 * 3  # two scenes: the worst and the best


def test_geometry_is_altered_in_every_edit(tmp_path, monkeypatch):
    oracle = Oracle("plain", "seen", 2, 7, 128)
    oracle.vggt = True
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: oracle)
    options = ["--split", "seen", "--scenes", "2", "--seed", "7", "--output", str(tmp_path), "--alter", EXCHANGED]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options])
    evaluate.main()
    assert len(oracle.sampling) == 2  # as told, and with instructions exchanged
    assert [used["alter_geometry"](torch.arange(3)).tolist() for used in oracle.sampling] == [[2, 0, 1]] * 2
    assert json.loads((tmp_path / "results.json").read_text())[0]["settings"]["alter"] == EXCHANGED
    assert EXCHANGED in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("options, vggt, reason", [
    ("--scenes 4", None, "for a model with spatial tokens"), ("--scenes 5 --batch 4", True, "leave one alone"),
    ("--scenes 4 --batch 1", True, "leave one alone")])
def test_geometry_that_cannot_be_altered(options, vggt, reason, monkeypatch, capsys):
    oracle = Oracle("plain", "seen", 2, 7, 128)
    oracle.vggt = vggt
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: oracle)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options.split(), "--alter", EXCHANGED])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_an_empty_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"evaluate.py --scenes 2 --checkpoint {tmp_path}".split())
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and "connector.safetensors" in capsys.readouterr().err


def test_options_before_a_command_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "evaluate.py --steps 7 generate --benchmark b --output o".split())
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "options of generate go behind it" in capsys.readouterr().err


def test_too_few_scenes_end_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "argv", "evaluate.py --scenes 1".split())
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    assert "At least 2 scenes" in capsys.readouterr().err
