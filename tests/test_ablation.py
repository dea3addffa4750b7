"""The ladder: what is compared differs in one thing only, and the tables say what was measured.

    python -m pytest tests/test_ablation.py            -m slow: all of it on the preset tiny
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from browser import problems
from evaluation import ablation as A
from evaluation.plot import Curves, curves_html
from test_train import tiny  # noqa: F401  weights

PLAN = A.Plan(Path("base"), Path("out"), "plain", ("plain",), 2, 8, 4, 4, 6, 4, 1, Path("cache"), 1, False, "tiny")


def test_arms_differ_in_one_thing():
    jobs = A.trainings(PLAN)
    for seed in (0, 1):
        arms = {folder.name: options for folder, s, stage, steps, options in jobs if (s, stage, steps) == (seed, 2, 8)}
        assert {"LoRA", "geometry_tokens", "depth_in_pixels", "depth_in_latents"} <= set(arms)
        common = ("--checkpoint", f"out/seed{seed}/stage1", "--keep")
        assert arms["LoRA"] == (*common, "--no-ism") and arms["geometry_tokens"] == (*common, "--gss", "none")
        assert arms["depth_in_pixels"] == (*common, "--gss", "eds") and arms["depth_in_latents"] == (*common, "--gss", "lds")
        first = next(i for i, job in enumerate(jobs) if job[1] == seed)
        assert jobs[first] == (Path(f"out/seed{seed}/stage1"), seed, 1, 4, ())
    swept = {folder.name: options for folder, seed, _, _, options in jobs if "--lambda" in options}
    assert sorted(o[o.index("--lambda") + 1] for o in swept.values()) == ["0.003", "0.03", "0.1"] and len({j[0] for j in jobs}) == len(jobs)


def found(success, **metrics):
    """Of one seed."""
    return {"scenes": [{"success": s} | {k: v[i] for k, v in metrics.items()} for i, s in enumerate(success)], "relations": list("aabb")}


def test_tables_pair_scenes_and_seeds():
    base, random = np.array([0.1, 0.9, 0.4, 0.2]), np.random.default_rng(0)
    arms = {A.BASE: [found(base)], **{arm: [found(base + 0.25 + n, ghost=random.random(4)) for n in (0, 1)] for arm in A.ARMS}}
    whole, steps = A.ladder_tables(arms, "plain, seen", PLAN)
    assert whole.header == ["metric", *A.LADDER] and whole.rows[0][1].startswith("0.400 ") and whole.rows[0][2].startswith("1.150 ")
    assert steps.rows[0] == ["success", "0.750 [0.250, 1.250]", *["0.000 [0.000, 0.000]"] * 3]  # 0.25 and 1.25 more than the base
    assert [row[0] for row in whole.rows] == ["success", "ghost"] and steps.rows[1][1] == ""  # the base has no ghost
    by_relation = A.relation_table(arms, "plain, seen")
    assert [row[0] for row in by_relation.rows] == ["a (2)", "b (2)"]
    assert by_relation.rows[0][1].startswith("0.500 ") and by_relation.rows[1][1].startswith("0.300 ")


def test_curves_say_their_numbers():
    drawn = curves_html(Curves("<Success>", "steps", "share", {"a": [(0, 0.2, 0.1, 0.3), (100, 0.9, 0.8, 0.95)], "b & c": [(50, 0.5, 0.5, 0.5)]}), 0)
    assert "&lt;Success&gt;" in drawn and "b &amp; c" in drawn and "<Success>" not in drawn
    assert "0.900 [0.800, 0.950]" in drawn and drawn.count("<circle") == 3 and drawn.count("<polyline") == 2
    xs = [float(part.split('"')[0]) for part in drawn.split('cx="')[1:]]
    ys = [float(part.split('"')[0]) for part in drawn.split('cy="')[1:]]
    assert xs[0] < xs[2] < xs[1] and ys[1] < ys[2] < ys[0]  # to the right and, as SVG counts, upwards
    with pytest.raises(ValueError, match="no points"):
        curves_html(Curves("x", "", "", {}), 0)


@pytest.mark.parametrize("options, words", [
    (["--seeds", "0"], "--seeds must be"), (["--level", "hard", "--levels", "plain"], "must hold --level hard"), (["--scenes", "1"], "at least 2"),
])  # fmt: skip
def test_careless_options(options, words, tmp_path):
    command = [sys.executable, "evaluate.py", "ablation", "--base", str(tmp_path), "--output", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_ladder_and_what_is_done_again(tiny, tmp_path):  # noqa: F811
    command = [sys.executable, "evaluate.py", "ablation", "--base", tiny / "weights", "--preset", "tiny", "--level", "plain", "--levels", "plain",
               "--seeds", 2, "--steps", 8, "--stage1-steps", 4, "--batch", 4, "--scenes", 4, "--curve-scenes", 3, "--shards", 1, "--jobs", 2,
               "--cache", tmp_path / "cache", "--output", tmp_path / "out"]  # fmt: skip

    def run():
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run()
    assert "13 trainings" in first and first.count(": stage 2, seed 1") == 4
    text = (tmp_path / "out/ablation.md").read_text()
    assert all(arm in text for arm in A.LADDER) and "geometry of zeros" in text and "| 0.003 |" in text
    assert not problems((tmp_path / "out/ablation.html").read_text())
    kept = {path: path.read_bytes() for path in (tmp_path / "out/scores").iterdir()}
    lost = tmp_path / "out/seed1/depth_in_latents"
    (lost / "done.json").unlink()
    next(path for path in kept if path.name == "depth_in_latents-1-plain-seen-4.json").unlink()
    again = run()
    assert again.count(": stage 2") == 1 and "0.0 h" in again  # from its last checkpoint: nothing is left to train
    assert (tmp_path / "out/ablation.md").read_text().split("this run")[0] == text.split("this run")[0]
    assert {path: path.read_bytes() for path in (tmp_path / "out/scores").iterdir()} == kept
    assert json.loads((lost / "done.json").read_text()) == {}
