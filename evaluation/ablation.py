"""The paper's ladder on the rendered world: base, + LoRA, + geometry tokens, + depth in pixels, + depth in latents.

Every arm starts from one base and sees the same samples, noise and times in the same order, for the same number of steps
(train.py depends on --seed and the step alone); several seeds. All are measured on the same scenes, so differences are
paired. Besides: the weight of the latent depth loss on one seed, and the last arm with its geometry tokens set to zero or
taken from another picture, to see whether they are used.

Everything is kept in the output folder and found again: a killed run goes on with the same command.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
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
ALTERED = {"geometry of zeros": torch.zeros_like, "geometry of another picture": lambda s: s.roll(1, 0)}
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
    preset: str = "nano"

    @property
    def every(self) -> int:
        """Steps between the points of the curves."""
        return max(1, self.steps // 4)


# ---- training -------------------------------------------------------------------------------------------------------


def name_of(arm: str, weight: float | None = None) -> str:
    """Folder of an arm, or of the last one with another weight."""
    return arm.strip("+ ").replace(" ", "_") + ("" if weight is None else f"_{weight}")


def run_folder(plan: Plan, arm: str, seed: int, weight: float | None = None) -> Path:
    return plan.output / f"seed{seed}" / name_of(arm, weight)


def train(plan: Plan, folder: Path, seed: int, stage: int, steps: int, *options: str) -> None:
    """One training, from where it stopped if it did; nothing if it is done."""
    done = folder / "done.json"
    if done.is_file():
        return
    command = [
        sys.executable, ROOT / "train.py", "--preset", plan.preset, "--weights", plan.base, "--stage", stage, "--level", plan.train_level,
        "--shards", plan.shards, "--cache", plan.cache, "--seed", seed, "--steps", steps, "--batch", plan.batch, "--output", folder,
        "--save-every", plan.every, "--resume", *options,
    ]  # fmt: skip
    print(f"\n{folder}: stage {stage}, seed {seed}", flush=True)
    if subprocess.run([str(x) for x in command]).returncode:
        raise ValueError(f"The training of {folder} failed, see above; the same command goes on from its last checkpoint.")
    done.write_text("{}")


def trainings(plan: Plan) -> list[tuple[Path, int, int, int, tuple[str, ...]]]:
    """(folder, seed, stage, steps, options) of every training, in order."""
    jobs = []
    for seed in range(plan.seeds):
        stage1 = plan.output / f"seed{seed}" / "stage1"
        jobs.append((stage1, seed, 1, plan.stage1_steps, ()))
        jobs += [(run_folder(plan, arm, seed), seed, 2, plan.steps, ("--checkpoint", str(stage1), "--keep", *options))
                 for arm, options in ARMS.items()]
    for weight in WEIGHTS:  # 0 is the arm without, the preset's own is the arm with depth in latents
        if weight not in (0.0, PRESETS[plan.preset].gss_weight):
            stage1 = plan.output / "seed0" / "stage1"
            options = ("--checkpoint", str(stage1), *ARMS[LATENTS], "--lambda", str(weight))
            jobs.append((run_folder(plan, LATENTS, 0, weight), 0, 2, plan.steps, options))
    return jobs


def estimate(plan: Plan) -> float:
    """Seconds of all trainings that are still to do, from a few steps of the cheapest and the dearest arm."""
    jobs = [job for job in trainings(plan) if not (job[0] / "done.json").is_file()]
    if not jobs:
        return 0.0
    seconds, probe = {}, plan.output / "probe"
    for name, stage, options in (("stage1", 1, ()), (LORA, 2, ARMS[LORA]), (LATENTS, 2, ARMS[LATENTS])):
        train(plan, probe / name_of(name), 0, stage, 6, "--checkpoint", str(probe / "stage1"), *options)
        seconds[name] = log_of(probe / name_of(name))[-1]["seconds"] / 6
    return sum(steps * seconds["stage1" if stage == 1 else LORA if "--no-ism" in options else LATENTS]
               for _, _, stage, steps, options in jobs)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- measuring ------------------------------------------------------------------------------------------------------


def editor_of(plan: Plan, folder: Path | None) -> Editor:
    """The base with what a training wrote into `folder`; None: the base itself."""
    preset = PRESETS[plan.preset]
    return load(preset, plan.base, folder, choose_device(preset, None, None)[0])


def measure(plan: Plan, folder: Path | None, name: str, level: str, split: str, count: int, alter=None) -> dict:
    """{"scenes": metrics of every scene, "relations"} of one trained model (folder None: the base) on one level and split;
    read back if it was measured before."""
    kept = plan.output / "scores" / f"{name}-{level}-{split}-{count}.json"
    if not kept.is_file():
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


def run(plan: Plan) -> None:
    """Trains, measures and writes results.json, ablation.md and ablation.html into the output folder."""
    began = time.time()
    left = estimate(plan)
    print(f"\n{len(trainings(plan))} trainings; those still to do take about {left / 3600:.1f} h here, measured on a few steps. Then "
          f"{len(LADDER) * plan.seeds} models are measured on {plan.scenes} scenes of {len(plan.levels)} levels and 2 splits each.", flush=True)
    for job in trainings(plan):
        train(plan, *job[:4], *job[4])

    scores = {}  # (level, split) -> arm -> (seeds of) found
    for level in plan.levels:
        for split in ("seen", "unseen"):
            scores[level, split] = {
                BASE: [measure(plan, None, BASE, level, split, plan.scenes)],
                **{arm: [measure(plan, run_folder(plan, arm, seed), f"{name_of(arm)}-{seed}", level, split, plan.scenes)
                         for seed in range(plan.seeds)] for arm in ARMS}}
    main = (plan.train_level, "unseen")
    altered = {what: [measure(plan, run_folder(plan, LATENTS, seed), f"{name_of(LATENTS)}-{seed}-{what.split()[-1]}", *main, plan.scenes, alter)
                      for seed in range(plan.seeds)] for what, alter in ALTERED.items()}
    weights = {}
    for weight in WEIGHTS:
        arm = TOKENS if weight == 0 else LATENTS
        other = weight if weight not in (0.0, PRESETS[plan.preset].gss_weight) else None
        name = f"{name_of(arm, other)}-0"
        weights[weight] = measure(plan, run_folder(plan, arm, 0, other), name, *main, plan.scenes)

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
    by_step, by_cost = {}, {}
    start = as_cell(stack([measure(plan, None, BASE, plan.train_level, "seen", plan.curve_scenes)], "success"))
    for arm in ARMS:
        points, costs = [(0, start)], [(0.0, start)]
        for step in sorted({*range(plan.every, plan.steps + 1, plan.every), plan.steps}):
            found, cost = [], []
            for seed in range(plan.seeds):
                folder = run_folder(plan, arm, seed)
                found.append(measure(plan, folder / f"step-{step:06}", f"{name_of(arm)}-{seed}-step{step}", plan.train_level, "seen", plan.curve_scenes))
                log = log_of(folder)
                cost.append(log[-1]["seconds"] / log[-1]["step"] * step * torch.get_num_threads())
            points.append((step, as_cell(stack(found, "success"))))
            costs.append((float(np.mean(cost)), points[-1][1]))
        by_step[arm], by_cost[arm] = ([(x, c["mean"], c["low"], c["high"]) for x, c in line] for line in (points, costs))
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
    core_hours = sum(log_of(folder)[-1]["seconds"] for folder, *_ in trainings(plan)) * torch.get_num_threads() / 3600
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
    parser.add_argument("--preset", choices=tuple(PRESETS), default="nano")


def plan_of(args: argparse.Namespace) -> Plan:
    """ValueError for counts that make no sense."""
    for name in ("seeds", "steps", "stage1_steps", "batch", "shards"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if min(args.scenes, args.curve_scenes) < 2:
        raise ValueError("--scenes and --curve-scenes must be at least 2.")
    levels = tuple(args.levels or dict.fromkeys(("plain", "hard", args.level)))
    if args.level not in levels:
        raise ValueError(f"--levels must hold --level {args.level}, on which the smaller tables are measured.")
    return Plan(args.base, args.output, args.level, levels, args.seeds, args.steps, args.stage1_steps, args.batch, args.scenes,
                args.curve_scenes, args.shards, args.cache, args.preset)
