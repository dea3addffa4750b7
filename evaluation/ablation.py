"""The paper's ladder on the rendered world: base, + LoRA, + geometry tokens, + depth in pixels, + depth in latents.

Every arm starts from one base and sees the same samples, noise and times in the same order, for the same number of steps
(train.py depends on --seed and the step alone); several seeds. All are measured on the same scenes, so differences are
paired. Besides: the weight of the latent depth loss on one seed, and the last arm with its geometry tokens set to zero or
taken from another picture, to see whether they are used.

Everything is kept in the output folder and found again: a killed run goes on with the same command.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluation import metrics, pages, plot
from evaluation.score import cell, markdown
from evaluation.world import MODEL, evaluate
from scenes import LEVELS, make_pair
from spatialdiff import PRESETS, Editor, choose_device, load

ROOT = Path(__file__).parent.parent
BASE, LORA, TOKENS, PIXELS, LATENTS = "base", "+ LoRA", "+ geometry tokens", "+ depth in pixels", "+ depth in latents"
ARMS = {  # arm -> how train.py makes it of the base
    LORA: ("--no-ism",),
    TOKENS: ("--gss", "none"),
    PIXELS: ("--gss", "eds"),
    LATENTS: ("--gss", "lds"),
}
LADDER = (BASE, *ARMS)
WEIGHTS = (0.0, 0.003, 0.01, 0.03, 0.1)  # of the latent depth loss
ALTERED = {"geometry of zeros": torch.zeros_like, "geometry of another picture": lambda s: s.roll(1, 0)}  # at inference
SHOWN = ("success", "effect_iou", "centroid_err", "ghost", "arrival", "bg_psnr", "obj_psnr_shift", "retrieval", "order",
         "depth_rmse", "depth_order", "depth_order_new")
LESS_IS_BETTER = ("centroid_err", "ghost", "depth_rmse")


@dataclass(frozen=True)
class Plan:
    base: Path  # folder of the frozen networks
    output: Path
    train_level: str
    levels: tuple[str, ...]  # to measure on
    seeds: int
    steps: int  # of stage 2
    stage1_steps: int
    batch: int
    scenes: int  # of each level and split
    curve_scenes: int  # of the points before the last
    shards: int
    cache: Path
    jobs: int  # processes side by side, which share the cores
    compile: bool
    preset: str = "nano"

    @property
    def every(self) -> int:
        """Steps between the points of the curves."""
        return max(1, self.steps // 4)

    @property
    def points(self) -> list[int]:
        """Steps at which the curves have a point, the last one included."""
        return sorted({*range(self.every, self.steps + 1, self.every), self.steps})

    @property
    def threads(self) -> int:
        return max(1, os.cpu_count() // self.jobs)


# ---- training -------------------------------------------------------------------------------------------------------


def name_of(arm: str) -> str:
    return arm.strip("+ ").replace(" ", "_")


def weighted(plan: Plan, weight: float) -> str:
    """Name of depth in latents with this weight: 0 is the arm without, the preset's own the arm itself."""
    known = {0.0: name_of(TOKENS), PRESETS[plan.preset].gss_weight: name_of(LATENTS)}
    return known.get(weight, f"{name_of(LATENTS)}_{weight:g}")


def run_folder(plan: Plan, arm: str, seed: int) -> Path:
    return plan.output / f"seed{seed}" / name_of(arm)


def train(plan: Plan, folder: Path, seed: int, stage: int, steps: int, *options: str) -> None:
    """One training, from where it stopped if it did; nothing if it is done."""
    done = folder / "done.json"
    if done.is_file():
        return
    command = [
        sys.executable, ROOT / "train.py", "--preset", plan.preset, "--weights", plan.base, "--stage", stage, "--level", plan.train_level,
        "--shards", plan.shards, "--cache", plan.cache, "--seed", seed, "--steps", steps, "--batch", plan.batch, "--output", folder,
        "--save-every", plan.every, "--resume", *options, *("--compile",) * plan.compile,
    ]  # fmt: skip
    print(f"\n{folder}: stage {stage}, seed {seed}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": str(plan.threads)}
        failed = subprocess.run([str(x) for x in command], env=environment, stdout=output, stderr=output).returncode
    if failed:
        raise ValueError(f"The training of {folder} failed, see {folder}/output.txt; the same command goes on from its last checkpoint.")
    done.write_text("{}")


def train_all(plan: Plan) -> None:
    """Stage 1 of all seeds, then what starts from it."""
    first, rest = ([job for job in trainings(plan) if (job[2] == 1) == early] for early in (True, False))
    for jobs in (first, rest):
        with ThreadPoolExecutor(plan.jobs) as pool:
            list(pool.map(lambda job: train(plan, *job[:4], *job[4]), jobs))


def trainings(plan: Plan) -> list[tuple[Path, int, int, int, tuple[str, ...]]]:
    """(folder, seed, stage, steps, options) of every training, in order."""
    jobs = []
    for seed in range(plan.seeds):
        stage1 = plan.output / f"seed{seed}" / "stage1"
        jobs.append((stage1, seed, 1, plan.stage1_steps, ()))
        jobs += [(run_folder(plan, arm, seed), seed, 2, plan.steps, ("--checkpoint", str(stage1), "--keep", *options))
                 for arm, options in ARMS.items()]
    for weight in WEIGHTS:
        folder = plan.output / "seed0" / weighted(plan, weight)
        options = ("--checkpoint", str(plan.output / "seed0" / "stage1"), *ARMS[LATENTS], "--lambda", str(weight))
        if folder not in [job[0] for job in jobs]:
            jobs.append((folder, 0, 2, plan.steps, options))
    return jobs


def estimate(plan: Plan) -> float:
    """Seconds of all trainings that are still to do, from a few steps of each kind; these also make the encodings, so that
    trainings side by side find them."""
    jobs = [job for job in trainings(plan) if not (job[0] / "done.json").is_file()]
    if not jobs:
        return 0.0
    seconds, probe = {}, plan.output / "probe"
    eager = replace(plan, compile=False)  # six steps would measure the compiler
    for name, stage, options in (("stage1", 1, ()), *((arm, 2, options) for arm, options in ARMS.items())):
        train(eager, probe / name_of(name), 0, stage, 6, "--checkpoint", str(probe / "stage1"), *options)
        seconds[options] = log_of(probe / name_of(name))[-1]["seconds"] / 6
    kind = lambda options: next(known for known in seconds if known and set(known) <= set(options))
    return sum(steps * seconds[() if stage == 1 else kind(options)] for _, _, stage, steps, options in jobs) / plan.jobs


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- measuring ------------------------------------------------------------------------------------------------------


def editor_of(plan: Plan, folder: Path | None) -> Editor:
    """The base with what a training wrote into `folder`; None: the base itself."""
    preset = PRESETS[plan.preset]
    return load(preset, plan.base, folder, choose_device(preset, None, None)[0])


def models(plan: Plan) -> dict[str, tuple[Path | None, Callable | None]]:
    """Everything that is measured: name -> its folder (None: the base) and what is done to the geometry tokens."""
    found = {BASE: (None, None)}
    for seed in range(plan.seeds):
        for arm in ARMS:
            folder = run_folder(plan, arm, seed)
            found[f"{name_of(arm)}-{seed}"] = folder, None
            found |= {f"{name_of(arm)}-{seed}-step{step}": (folder / f"step-{step:06}", None) for step in plan.points}
        found |= {f"{name_of(LATENTS)}-{seed}-{what}": (folder, alter) for what, alter in ALTERED.items()}  # of the last arm
    return found | {f"{weighted(plan, weight)}-0": (plan.output / "seed0" / weighted(plan, weight), None) for weight in WEIGHTS}


def measure(plan: Plan, name: str, level: str, split: str, count: int) -> dict:
    """{"scenes": metrics of every scene, "relations"} of one of `models` on one level and split; read back if it was
    measured before."""
    kept = plan.output / "scores" / f"{name.replace(' ', '_')}-{level}-{split}-{count}.json"
    if not kept.is_file():
        folder, alter = models(plan)[name]
        editor = editor_of(plan, folder)
        sampling = {} if alter is None else {"alter_geometry": alter}
        values, relations, _, _ = evaluate(editor, level, split, count, 0, editor.preset.side, 32, 0, baselines=False, **sampling)
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(".tmp")
        fresh.write_text(json.dumps({"scenes": values[MODEL], "relations": relations}))
        fresh.rename(kept)
    return json.loads(kept.read_text())


def column(found: dict, metric: str) -> np.ndarray:
    """(N,): nan where the metric does not apply."""
    return np.array([scene.get(metric, np.nan) for scene in found["scenes"]], float)


def as_cell(values: np.ndarray) -> dict | None:
    mean, low, high, _ = metrics.bootstrap_two_ways(values)
    return None if np.isnan(mean) else {"mean": mean, "low": low, "high": high}


# ---- all of it ------------------------------------------------------------------------------------------------------


def measure_group(group: tuple[Plan, str, str, int, list[str]]) -> None:
    plan, level, split, count, names = group
    torch.set_num_threads(plan.threads)
    for name in names:
        measure(plan, name, level, split, count)


def measure_all(plan: Plan) -> None:
    """Each process measures all models on the same scenes, which are rendered once."""
    trained = [BASE, *(f"{name_of(arm)}-{seed}" for seed in range(plan.seeds) for arm in ARMS)]
    rest = [name for name in models(plan) if name not in trained and "-step" not in name]
    groups = [(plan, level, split, plan.scenes, trained + rest * ((level, split) == (plan.train_level, "unseen")))
              for level in (plan.train_level, *plan.levels) for split in ("unseen", "seen")]
    groups.insert(2, (plan, plan.train_level, "seen", plan.curve_scenes, [BASE, *(name for name in models(plan) if "-step" in name)]))
    with multiprocessing.get_context("spawn").Pool(plan.jobs) as pool:
        for _ in pool.imap_unordered(measure_group, dict((group[1:4], group) for group in groups).values(), chunksize=1):
            pass


def run(plan: Plan) -> None:
    """Trains, measures and writes ablation.md and ablation.html into the output folder."""
    began = time.time()
    left = estimate(plan)
    print(f"\n{len(trainings(plan))} trainings; those still to do take about {left / 3600:.1f} h here, measured on a few steps. Then "
          f"{len(LADDER) * plan.seeds} models are measured on {plan.scenes} scenes of {len(plan.levels)} levels and 2 splits each.", flush=True)
    train_all(plan)
    measure_all(plan)

    of_arm = lambda arm, *where: [measure(plan, f"{name_of(arm)}-{seed}", *where, plan.scenes) for seed in range(plan.seeds)]
    scores = {  # (level, split) -> arm -> (seeds of) found
        where: {BASE: [measure(plan, BASE, *where, plan.scenes)], **{arm: of_arm(arm, *where) for arm in ARMS}}
        for where in ((level, split) for level in plan.levels for split in ("seen", "unseen"))}
    main = (plan.train_level, "unseen")
    altered = {what: [measure(plan, f"{name_of(LATENTS)}-{seed}-{what}", *main, plan.scenes) for seed in range(plan.seeds)] for what in ALTERED}
    weights = {weight: measure(plan, f"{weighted(plan, weight)}-0", *main, plan.scenes) for weight in WEIGHTS}

    found, whole, where = scores[main], scores[main][LATENTS], ", ".join(main)
    tables = [made for (level, split), arms in scores.items() for made in ladder_tables(arms, f"{level}, {split}", plan)]
    tables += [
        relation_table(found, where),
        table(f"{where}: {LATENTS.strip('+ ')} with other geometry at inference", {"as trained": whole} | altered | {
            f"{what}, difference": (whole, seeds) for what, seeds in altered.items()}),
        table(f"{where}: weight of the latent depth loss, seed 0", {f"{weight:g}": [one] for weight, one in weights.items()}),
    ]
    write(plan, tables, curves(plan), time.time() - began)


def stack(found: list[dict], metric: str) -> np.ndarray:
    """(seeds, scenes)."""
    return np.stack([column(one, metric) for one in found])


def table(caption: str, columns: dict[str, list[dict] | tuple], note: str = "") -> pages.Table:
    """Metrics as rows. A column: one found a seed; or two such lists, whose paired difference (second minus first) is meant."""
    rows = []
    for metric in SHOWN:
        values = [stack(c[1], metric) - stack(c[0], metric) if isinstance(c, tuple) else stack(c, metric) for c in columns.values()]
        rows.append([metric, *(cell(as_cell(x)) for x in values)])
    rows = [row for row in rows if any(row[1:])]
    return pages.Table(caption, ["metric", *columns], rows, note=note)


def ladder_tables(found: dict[str, list[dict]], where: str, plan: Plan) -> list[pages.Table]:
    steps = {f"{two} over {one.strip('+ ')}": (found[one], found[two]) for one, two in zip(LADDER, LADDER[1:])}
    note = f"An interval that holds 0 shows no difference. Less is better of {', '.join(LESS_IS_BETTER)}."
    return [table(f"{where}: {plan.scenes} scenes, {plan.seeds} seeds; mean [95 % interval over seeds and scenes]", found),
            table(f"{where}: each step of the ladder, paired by scene and seed; difference [95 % interval]", steps, note)]


def relation_table(found: dict[str, list[dict]], where: str) -> pages.Table:
    relations = found[BASE][0]["relations"]
    rows = []
    for relation in dict.fromkeys(relations):
        chosen = [r == relation for r in relations]
        rows.append([f"{relation} ({sum(chosen)})", *(cell(as_cell(stack(seeds, "success")[:, chosen])) for seeds in found.values())])
    return pages.Table(f"{where}: success by relation (scenes)", ["relation", *found], rows)


def curves(plan: Plan) -> list[plot.Curves]:
    """Success on seen scenes of the training's level against steps, and against core-seconds of stage 2."""
    where = (plan.train_level, "seen", plan.curve_scenes)
    by_step, by_cost, start = {}, {}, as_cell(stack([measure(plan, BASE, *where)], "success"))
    for arm in ARMS:
        points = {0: start} | {step: as_cell(stack([measure(plan, f"{name_of(arm)}-{seed}-step{step}", *where) for seed in range(plan.seeds)], "success"))
                               for step in plan.points}
        last = [log_of(run_folder(plan, arm, seed))[-1] for seed in range(plan.seeds)]
        cost = float(np.mean([log["seconds"] / log["step"] for log in last])) * plan.threads  # core-seconds a step
        by_step[arm] = [(step, c["mean"], c["low"], c["high"]) for step, c in points.items()]
        by_cost[arm] = [(step * cost, *values) for step, *values in by_step[arm]]
    caption = f"Success on {plan.curve_scenes} seen scenes, {plan.train_level}"
    return [plot.Curves(f"{caption}, against steps of stage 2", "steps", "success", by_step),
            plot.Curves(f"{caption}, against core-seconds of stage 2", "core-seconds", "success", by_cost)]


def sheet(plan: Plan, count: int = 8) -> list[pages.Case]:
    """The first unseen scenes, edited by every arm of seed 0."""
    pairs = [make_pair(0, plan.train_level, "unseen", PRESETS[plan.preset].side, index=i, extras=False) for i in range(count)]
    pictures = [{"source": pair.ref} for pair in pairs]
    for arm in LADDER:
        editor = editor_of(plan, None if arm == BASE else run_folder(plan, arm, 0))
        edits = editor.edit(np.stack([pair.ref for pair in pairs]), [pair.instruction for pair in pairs], [pair.seed for pair in pairs])
        for found, edit in zip(pictures, edits):
            found[arm] = edit
    return [pages.Case(f"scene {pair.seed}", pair.instruction, found | {"truth": pair.tgt}) for pair, found in zip(pairs, pictures)]


def write(plan: Plan, tables: list[pages.Table], drawn: list[plot.Curves], seconds: float) -> None:
    core_hours = sum(log_of(folder)[-1]["seconds"] for folder, *_ in trainings(plan)) * plan.threads / 3600
    facts = {"base": str(plan.base), "training": f"{plan.train_level}, stage 1 {plan.stage1_steps} steps, stage 2 {plan.steps} steps of {plan.batch}",
             "seeds": str(plan.seeds), "core-hours of training": f"{core_hours:.2f}", "this run": f"{seconds / 60:.0f} min"}
    text = "\n\n".join(f"**{table.caption}**\n\n{markdown(table.header, table.rows)}" + f"\n\n{table.note}" * bool(table.note) for table in tables)
    (plan.output / "ablation.md").write_text(text + "\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n")
    pages.report(plan.output / "ablation.html", "The ladder in miniature", facts, tables, [], sheet(plan), [], drawn)
    print(f"\n{text}\n\n{plan.output / 'ablation.html'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of the networks to start from: an --output of train.py --stage base")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[-1], help="of the training, the curves and the smaller tables")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, help="to measure on (default: plain, hard and --level)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of stage 2")
    parser.add_argument("--stage1-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=300, help="of each level and split")
    parser.add_argument("--curve-scenes", type=int, default=100)
    parser.add_argument("--shards", type=int, default=32, help="files of training scenes")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings and measurements side by side, sharing the cores (default 1)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer in training (needs a C++ compiler)")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="nano")


def plan_of(args: argparse.Namespace) -> Plan:
    """ValueError for counts that make no sense."""
    for name in ("seeds", "steps", "stage1_steps", "batch", "shards", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if min(args.scenes, args.curve_scenes) < 2:
        raise ValueError("--scenes and --curve-scenes must be at least 2.")
    levels = tuple(args.levels or dict.fromkeys(("plain", "hard", args.level)))
    if args.level not in levels:
        raise ValueError(f"--levels must hold --level {args.level}, on which the smaller tables are measured.")
    return Plan(args.base, args.output, args.level, levels, args.seeds, args.steps, args.stage1_steps, args.batch, args.scenes,
                args.curve_scenes, args.shards, args.cache, args.jobs, args.compile, args.preset)
