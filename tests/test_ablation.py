"""The ladder: what is compared differs in one thing only, and the tables say what was measured.

    python -m pytest tests/test_ablation.py            -m slow: all of it on the preset tiny
"""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from browser import problems
from evaluation import ablation as A
from evaluation.plot import Curves, curves_html, curves_svg
from test_train import tiny  # noqa: F401  weights

PLAN = A.Plan(Path("base"), Path("out"), Path("out/results"), ("plain",), ("plain",), 2, 8, 4, 4, 6, 4, 1, Path("cache"), 1, False, "tiny")


def test_arms_differ_in_one_thing():
    for seed in (0, 1):
        jobs = A.trainings(PLAN, seed)
        start, lora, tokens, pixels, latents = jobs
        assert [job.name for job in jobs] == [f"{name}-{seed}" for name in ("stage1", "LoRA", "geometry_tokens", "depth_in_pixels", "depth_in_latents")]
        assert start == A.Training(f"stage1-{seed}", seed, 1, 4)
        assert all((job.seed, job.stage, job.steps) == (seed, 2, 8) for job in (lora, tokens, pixels, latents))
        assert lora.options == ("--keep", "--no-ism") and lora.start is None
        assert [job.options for job in (tokens, pixels, latents)] == [("--keep", "--gss", what) for what in ("none", "eds", "lds")]
        assert all(job.start is start for job in (tokens, pixels, latents))
    others = A.other_weights(PLAN)
    assert [job.options for job in others] == [("--gss", "lds", "--lambda", weight) for weight in ("0.003", "0.03", "0.1")]
    assert {(job.seed, job.stage, job.steps, job.start) for job in others} == {(0, 2, 8, A.trainings(PLAN, 0)[0])}
    assert A.rounds(PLAN) == [A.trainings(PLAN, 0), A.trainings(PLAN, 1), others]


def test_a_training_is_told_all_levels(tmp_path, monkeypatch):
    plan, commands = replace(PLAN, output=tmp_path, trained_on=("deep", "plain")), []
    assert plan.main == ("plain", "unseen", 6) and plan.curve == ("plain", "seen", 4)
    failing = [sys.executable, "-c", "raise SystemExit(1)"]
    popen = A.subprocess.Popen
    monkeypatch.setattr(A.subprocess, "Popen", lambda command, **rest: commands.append(command) or popen(failing, **rest))
    with pytest.raises(ValueError, match="stage1-0 failed"):
        A.train(plan, A.trainings(plan, 0)[0])
    assert " --level deep plain --shards " in " ".join(commands[0])


def test_facts_hold_the_world_of_training():
    plan = replace(PLAN, base=Path(A.__file__).parent.parent / "weights/nano", preset="nano", trained_on=("plain",), levels=())
    assert set(A.facts_of(plan)["worlds"]) == {"plain"}


def test_what_is_measured_needs_no_training_again(tmp_path):
    """Trained is what lacks a score and is not there; of that also its start."""
    plan = replace(PLAN, output=tmp_path, results=tmp_path / "results")
    first, second, others = A.rounds(plan)
    assert A.to_train(plan, second) == second and A.to_train(plan, others) == [first[0], *others]
    for model in A.models(plan, second):
        for where in model.where:
            A.keep(A.score_file(plan, model.name, where), "{}")
    assert A.to_train(plan, second) == [] and A.to_train(plan, first) == first
    A.score_file(plan, "geometry_tokens-1-step2", plan.curve).unlink()
    assert [training.name for training in A.to_train(plan, second)] == ["stage1-1", "geometry_tokens-1"]
    (tmp_path / "stage1-1").mkdir()
    (tmp_path / "stage1-1" / A.DONE).touch()
    assert A.to_train(plan, second)[0].name == "stage1-1"  # its log is not among the results
    A.keep(A.log_file(plan, "stage1-1"), "")
    assert [training.name for training in A.to_train(plan, second)] == ["geometry_tokens-1"]
    A.score_file(plan, A.BASE, plan.main).parent.mkdir(exist_ok=True)
    assert {where: [m.name for m in group] for where, group in A.to_measure(plan, second).items()} == {plan.curve: ["geometry_tokens-1-step2"]}


def test_a_free_core_begins_with_the_next_seed(tmp_path, monkeypatch):
    """Two at once: an arm after its stage 1, a measurement after what it measures, all else as early as it can."""
    plan = replace(PLAN, jobs=2, output=tmp_path, results=tmp_path / "results")
    events, slow = [], {"stage1-0": 0.1, "geometry_tokens-0": 0.2, "depth_in_pixels-0": 0.6}

    def job(name):
        events.append(("begin", name))
        time.sleep(slow.get(name, 0.02))
        events.append(("end", name))

    monkeypatch.setattr(A, "train", lambda plan, training: job(training.name))
    monkeypatch.setattr(A, "measure_all", lambda plan, where, chosen: job((where, *(model.name for model in chosen))))
    jobs = A.jobs_to_do(plan, A.rounds(plan))
    *_, last = A.carry_out(plan, jobs)
    assert len(events) == 2 * len(jobs) and last == set()
    measured = [name for kind, name in events if kind == "begin" and isinstance(name, tuple)]
    assert all(sum(A.BASE in name for name in measured if name[0] == where) == 1 for where in {name[0] for name in measured})
    at = {event: i for i, event in enumerate(events)}
    running = np.cumsum([1 if kind == "begin" else -1 for kind, _ in events])
    assert running.max() == 2
    for key in jobs:
        if isinstance(key, A.Training) and key.start:
            assert at["end", key.start.name] < at["begin", key.name]
    for _, name in at:
        for model in name[1:] if isinstance(name, tuple) else ():
            trained = model.split("-step")[0].split("-geometry_of")[0]
            assert model == A.BASE or at["end", trained] < at["begin", name]
    assert at["begin", "stage1-1"] < at["end", "depth_in_pixels-0"]


def test_nothing_begins_after_a_training_has_failed(tmp_path, monkeypatch):
    plan, begun = replace(PLAN, output=tmp_path, results=tmp_path / "results"), []

    def fail(plan, training):
        begun.append(training.name)
        raise ValueError("The training failed.")

    monkeypatch.setattr(A, "train", fail)
    with pytest.raises(ValueError, match="The training failed"):
        list(A.carry_out(plan, A.jobs_to_do(plan, A.rounds(plan))))
    assert begun == ["stage1-0"]


def found(success, **metrics):
    """Of one seed."""
    return {"metrics": {"success": list(success)} | {k: list(v) for k, v in metrics.items()}, "relations": list("aabb")}


@pytest.mark.parametrize("measuring", ("", "A.train = lambda *_, **__: A.multiprocessing.get_context('spawn').Pool(1).apply(exec, ((A.ROOT / 'train.py').read_text(),))\n"))
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_trainings_and_measurements_too(number, measuring, tmp_path):
    beats = tmp_path / "beats"
    (tmp_path / "train.py").write_text(f"import time\nfor _ in range(600):\n    open({str(beats)!r}, 'a').write('.')\n    time.sleep(0.1)\n")
    here = Path(__file__).parent.parent
    plan = replace(PLAN, base=here / "weights/nano", output=tmp_path, results=tmp_path / "results", preset="nano")
    code = f"from pathlib import *\nfrom evaluation import ablation as A\nA.ROOT = Path({str(tmp_path)!r})\n{measuring}A.run(A.{plan!r})"
    command = subprocess.Popen([sys.executable, "-c", code], cwd=here)
    while not beats.is_file():
        assert command.poll() is None
        time.sleep(0.1)
    command.send_signal(number)
    assert command.wait(10) == 128 + number
    time.sleep(0.3)
    count = beats.stat().st_size
    time.sleep(1)
    assert beats.stat().st_size == count


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
    parsed = ElementTree.fromstring(curves_svg([Curves("<A>", "", "", {"b & c": [(0, 0, 0, 0), (1, 2, 1, 3)]}), Curves("B", "", "", {"d": [(0, 1, 1, 1)]})]))
    kinds = [element.tag.rsplit("}")[-1] for element in parsed.iter()]
    words = [element.text for element in parsed.iter() if element.text]
    assert kinds.count("circle") == 3 and kinds.count("g") == 2 and {"<A>", "B", "b & c"} <= set(words)
    with pytest.raises(ValueError, match="no points"):
        curves_html(Curves("x", "", "", {}), 0)


@pytest.mark.parametrize("options, words", [
    (["--seeds", "0"], "--seeds must be"), (["--level", "plain", "hard", "--levels", "plain"], "must hold hard"), (["--scenes", "1"], "at least 2"),
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
    assert first.count("1 seed; mean") == 2 and first.count("2 seeds; mean") == 4  # after each seed and the other weights
    assert first.count("weight of the latent depth loss") == 1
    assert "13 trainings" in first and first.count("out/depth_in_pixels-1: stage 2, seed 1") == 1
    results = tmp_path / "out/results"
    text = (results / "ablation.md").read_text()
    assert all(arm in text for arm in A.LADDER) and "geometry of zeros" in text and "| 0.003 |" in text
    assert not problems((results / "ablation.html").read_text())
    kept = {path: path.read_bytes() for path in results.glob("*/*")}
    lost = tmp_path / "out/depth_in_latents-1"
    (lost / A.DONE).unlink()
    next(path for path in kept if path.name == "depth_in_latents-1-plain-seen-4.json").unlink()
    again = run()
    assert "1 seed; mean" not in again  # nothing new of the first seed: no tables of it alone
    assert again.count(": stage 2") == 4 + 1 and "0.0 h" in again  # four trials; from its last checkpoint: nothing is left to train
    shutil.move(results, tmp_path / "kept")  # results alone, without what was trained: the tables come out again
    shutil.rmtree(tmp_path / "out")
    command += ["--results", tmp_path / "kept"]
    tables = run()
    assert ": stage" not in tables and tables.count("seeds; mean") == 2  # written once
    assert (tmp_path / "kept/ablation.md").read_text().split("this run")[0] == text.split("this run")[0]
    assert {results / path.relative_to(tmp_path / "kept"): path.read_bytes() for path in (tmp_path / "kept").glob("*/*")} == kept
    command[command.index("--steps") + 1] = 9
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2 and "another ladder: it differs in steps." in done.stderr
