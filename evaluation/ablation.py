"""The paper's ladder on the rendered world: base, + LoRA, + geometry tokens, + depth in pixels, + depth in latents.

Every arm starts from one base and sees the same samples, noise and times in the same order, for the same number of steps
(train.py depends on --seed and the step alone); several seeds. All are measured on the same scenes, so differences are
paired. Besides: the weight of the latent depth loss on one seed, and the last arm with its geometry tokens set to zero or
taken from another picture, to see whether they are used.

One seed after the other is trained and measured, the other weights last, and the tables are written after each; with
--jobs, a core that is free begins with the next. What the tables need, the scores of every scene and the logs, is kept in
the folder of results, which is small and need not stay beside the trained weights: the same command goes on from it,
trains what has not been measured and writes the tables anew. A killed run loses nothing but the steps after a checkpoint.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data import open_image, save_png, side_by_side
from evaluation import metrics, pages, plot
from evaluation.score import cell, markdown
from evaluation.world import CEILING, MODEL, evaluate
from model.text import unknown_words
from scenes import LEVELS, make_pair, vocabulary
from spatialdiff import PRESETS, choose_device, find_frozen, load, load_tokenizers
from triples.world import World

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
EXCHANGED = "geometry of another picture"  # of the same batch
ALTERED = {"geometry of zeros": torch.zeros_like, EXCHANGED: lambda s: s.roll(1, 0)}  # at inference
SHOWN = ("success", "effect_iou", "centroid_err", "ghost", "arrival", "bg_psnr", "obj_psnr_shift", "retrieval", "order",
         "depth_rmse", "depth_order", "depth_order_new")
LESS_IS_BETTER = ("centroid_err", "ghost", "depth_rmse")
SHEET = 8  # scenes
DONE = "done"  # a file in the folder of a finished training
RUNNING: set[subprocess.Popen] = set()  # trainings


@dataclass(frozen=True)
class Training:
    name: str
    seed: int
    stage: int
    steps: int
    options: tuple[str, ...] = ()
    start: "Training | None" = None  # stage 1, whose Connector it takes


@dataclass(frozen=True)
class Model:
    """What is measured: `training` at its end or after `step` steps, or the base (None)."""

    name: str
    training: Training | None
    where: tuple[tuple[str, str, int], ...]  # level, split, scenes
    step: int | None = None
    altered: str | None = None  # what is done to the geometry tokens


@dataclass(frozen=True)
class Plan:
    base: Path  # folder of the frozen networks
    output: Path  # of the trainings
    results: Path  # scores and logs
    trained_on: tuple[str, ...]  # levels; the last is the one that curves and smaller tables are about
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

    @property
    def level(self) -> str:
        return self.trained_on[-1]

    @property
    def main(self) -> tuple[str, str, int]:
        """Where the smaller tables are measured."""
        return self.level, "unseen", self.scenes

    @property
    def curve(self) -> tuple[str, str, int]:
        return self.level, "seen", self.curve_scenes


# ---- what is trained and measured -----------------------------------------------------------------------------------


def name_of(arm: str) -> str:
    return arm.strip("+ ").replace(" ", "_")


def weighted(plan: Plan, weight: float) -> str:
    """Name of depth in latents with this weight: 0 is the arm without, the preset's own the arm itself."""
    known = {0.0: name_of(TOKENS), PRESETS[plan.preset].gss_weight: name_of(LATENTS)}
    return known.get(weight, f"{name_of(LATENTS)}_{weight:g}")


def trainings(plan: Plan, seed: int) -> list[Training]:
    """Of one seed: stage 1 and the arms."""
    start = Training(f"stage1-{seed}", seed, 1, plan.stage1_steps)
    return [start, *(Training(f"{name_of(arm)}-{seed}", seed, 2, plan.steps, ("--keep", *options), None if arm == LORA else start)
                     for arm, options in ARMS.items())]  # fmt: skip


def other_weights(plan: Plan) -> list[Training]:
    """Depth in latents with the weights that no arm has, on the first seed."""
    start, *arms = trainings(plan, 0)
    names, known = {f"{weighted(plan, weight)}-0": weight for weight in WEIGHTS}, {arm.name for arm in arms}
    return [Training(name, 0, 2, plan.steps, (*ARMS[LATENTS], "--lambda", str(weight)), start)
            for name, weight in names.items() if name not in known]


def rounds(plan: Plan) -> list[list[Training]]:
    """What is trained and measured together, in order: each seed, and then the other weights."""
    return [*(trainings(plan, seed) for seed in range(plan.seeds)), other_weights(plan)]


def models(plan: Plan, trained: list[Training]) -> list[Model]:
    """What is measured of these trainings, and the base."""
    everywhere = tuple((level, split, plan.scenes) for level in plan.levels for split in ("seen", "unseen"))
    found = [Model(BASE, None, (*everywhere, plan.curve))]
    for training in trained:
        name = training.name
        if "--keep" in training.options:
            found.append(Model(name, training, everywhere))
            found += [Model(f"{name}-step{step}", training, (plan.curve,), step) for step in plan.points]
        elif training.stage == 2:
            found.append(Model(name, training, (plan.main,)))
        if name == f"{name_of(LATENTS)}-{training.seed}":
            found += [Model(f"{name}-{what.replace(' ', '_')}", training, (plan.main,), altered=what) for what in ALTERED]
    return found


def score_file(plan: Plan, name: str, where: tuple[str, str, int]) -> Path:
    level, split, count = where
    return plan.results / "scores" / f"{name}-{level}-{split}-{count}.json"


def to_measure(plan: Plan, trained: list[Training]) -> dict[tuple[str, str, int], list[Model]]:
    """By where: what has no scores there yet."""
    found: dict[tuple, list[Model]] = {}
    for model in models(plan, trained):
        for where in model.where:
            if not score_file(plan, model.name, where).is_file():
                found.setdefault(where, []).append(model)
    return found


def to_train(plan: Plan, wanted: list[Training]) -> list[Training]:
    """What the measurements still to do need and is not there, in order."""
    needed = {model.training for group in to_measure(plan, wanted).values() for model in group} - {None}
    there = lambda training: (plan.output / training.name / DONE).is_file() and log_file(plan, training.name).is_file()
    undone = {training for training in needed if not there(training)}
    undone |= {training.start for training in undone if training.start and not there(training.start)}
    starts = [training.start for training in wanted if training.start]
    return [training for training in dict.fromkeys((*starts, *wanted)) if training in undone]


# ---- training -------------------------------------------------------------------------------------------------------


def train(plan: Plan, training: Training, probe: int = 0) -> None:
    """One training, from where it stopped if it did. probe: steps of a trial in a folder of its own, its log's last line
    tells the seconds."""
    folder = plan.output / ("probe" if probe else "") / training.name
    command = [
        sys.executable, ROOT / "train.py", "--preset", plan.preset, "--weights", plan.base, "--stage", training.stage, "--level", *plan.trained_on,
        "--shards", plan.shards, "--cache", plan.cache, "--seed", training.seed, "--steps", probe or training.steps, "--batch", plan.batch,
        "--output", folder, "--save-every", plan.every, "--resume", *training.options,
    ]  # fmt: skip
    if training.start:
        command += ["--checkpoint", folder.parent / training.start.name]
    if plan.compile and not probe:  # a probe would measure the compiler
        command.append("--compile")
    print(f"{folder}: stage {training.stage}, seed {training.seed}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": str(plan.threads)}
        process = subprocess.Popen([str(x) for x in command], env=environment, stdout=output, stderr=output)
    RUNNING.add(process)
    failed = process.wait()
    RUNNING.remove(process)
    if failed:
        raise ValueError(f"The training of {folder} failed, see {folder}/output.txt; the same command goes on from its last checkpoint.")
    if not probe:
        log = [line | {"core_seconds": line["seconds"] * plan.threads} for line in log_of(folder / "log.jsonl")]
        keep(log_file(plan, training.name), "".join(json.dumps(line) + "\n" for line in log))
        (folder / DONE).touch()


def estimate(plan: Plan, todo: list[Training]) -> float:
    """Seconds of the trainings still to do, from a few steps of each kind; these also make the encodings, so that
    trainings side by side find them."""
    seconds = {}
    for training in trainings(plan, 0) if todo else ():
        train(plan, training, probe=6)
        seconds[training.name] = log_of(plan.output / "probe" / training.name / "log.jsonl")[-1]["seconds"] / 6
    kind = lambda training: seconds.get(f"{training.name.rsplit('-', 1)[0]}-0", seconds[f"{name_of(LATENTS)}-0"])
    return sum(training.steps * kind(training) for training in todo) / plan.jobs


def log_file(plan: Plan, name: str) -> Path:
    return plan.results / "logs" / f"{name}.jsonl"


def log_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.rename(path)


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(plan: Plan, model: Model, where: tuple[str, str, int], ceiling: list[dict] | None) -> list[dict]:
    """Edits the scenes and keeps what was measured: {"metrics": {name: [of each scene, None where it does not apply]},
    "relations"}; on a sheet, the first edits. Returns the ceiling's metrics, for the next model."""
    folder = None
    if model.training:
        folder = plan.output / model.training.name / (f"step-{model.step:06}" if model.step else "")
    preset = PRESETS[plan.preset]
    editor = load(preset, plan.base, folder, choose_device(preset, None, None)[0])
    sampling = {"alter_geometry": ALTERED[model.altered]} if model.altered else {}
    level, split, count = where
    values, relations, _, shown = evaluate(editor, level, split, count, 0, preset.side, 32, SHEET, baselines=False, ceiling=ceiling, **sampling)
    rounded = lambda value: value if value is None or not np.isfinite(value) else float(f"{value:.4g}")
    columns = {metric: [rounded(scene.get(metric)) for scene in values[MODEL]] for metric in SHOWN}
    if where == plan.main and model.name in (BASE, *(f"{name_of(arm)}-0" for arm in ARMS)):
        save_png(sheet_file(plan, model.name), side_by_side([edit for _, edit, _ in shown], 0))
    keep(score_file(plan, model.name, where), json.dumps({"metrics": columns, "relations": relations}, separators=(",", ":")))
    return values[CEILING]


def measure_all(plan: Plan, where: tuple[str, str, int], chosen: list[Model]) -> None:
    """On the same scenes, which are rendered once; in a process of its own, as the trainings are."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(measure_here, (plan, where, chosen))


def measure_here(plan: Plan, where: tuple[str, str, int], chosen: list[Model]) -> None:
    torch.set_num_threads(plan.threads)
    ceiling = None
    for model in chosen:
        ceiling = measure(plan, model, where, ceiling)


def column(found: dict, metric: str) -> np.ndarray:
    """(N,): nan where the metric does not apply."""
    return np.array(found["metrics"].get(metric, [None] * len(found["relations"])), float)


def as_cell(values: np.ndarray) -> dict | None:
    mean, low, high, _ = metrics.bootstrap_two_ways(values)
    return None if np.isnan(mean) else {"mean": mean, "low": low, "high": high}


# ---- all of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    round: int
    needs: frozenset  # keys of the jobs that must have ended
    function: Callable
    arguments: tuple


def jobs_to_do(plan: Plan, planned: list[list[Training]]) -> dict:
    """In the order in which they begin. Keys: a training; (round, where) of a measurement."""
    jobs: dict = {}
    for n, wanted in enumerate(planned):
        for training in to_train(plan, wanted):
            if training not in jobs:
                jobs[training] = Job(n, frozenset({training.start} & jobs.keys()), train, (plan, training))
        for where, chosen in sorted(to_measure(plan, wanted).items(), key=lambda group: -len(group[1]) * group[0][2]):
            chosen = [model for model in chosen if model.training or n == 0]  # the base once
            if chosen:
                needs = {model.training for model in chosen} & jobs.keys()
                jobs[n, where] = Job(n, frozenset(needs), measure_all, (plan, where, chosen))
    return jobs


def carry_out(plan: Plan, jobs: dict) -> Iterator[set]:
    """`plan.jobs` at once, each as soon as it can; yields the keys of what is left after one has ended."""
    left, running, undone = dict(jobs), {}, set(jobs)
    with ThreadPoolExecutor(plan.jobs) as pool:
        while undone:
            ready = [key for key, job in left.items() if not job.needs & undone]
            for key in ready[:plan.jobs - len(running)]:
                job = left.pop(key)
                running[pool.submit(job.function, *job.arguments)] = key
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                ended.result()
                undone.remove(running.pop(ended))
            yield undone


def facts_of(plan: Plan) -> dict:
    """What results depend on besides the code, for those of another plan not to be taken for this one's. ValueError if the
    base cannot read the instructions of a level."""
    tokenizers = load_tokenizers(PRESETS[plan.preset], plan.base)
    unknown = {level: unknown_words(tokenizers[0], " ".join(vocabulary(level))) for level in (*plan.trained_on, *plan.levels)}
    if any(unknown.values()):
        raise ValueError("The base does not know these words: " + "; ".join(f"{level}: {', '.join(words)}" for level, words in unknown.items() if words)
                         + ". Train it on these levels (train.py --stage base --level ...), or measure on others (--levels).")
    worlds = {level: World(level, PRESETS[plan.preset].side).fingerprint() for level in dict.fromkeys((*plan.trained_on, *plan.levels))}
    sources = find_frozen(PRESETS[plan.preset], plan.base, ("mmdit", "vae", "t5", "clip", "vggt"))
    return {"base": {part: source.digest()[:16] for part, source in sources.items()}, "worlds": worlds, "preset": plan.preset,
            "training level": " ".join(plan.trained_on), "steps": plan.steps, "steps of stage 1": plan.stage1_steps, "batch": plan.batch,
            "files of scenes": plan.shards}


def stop(number: int, _) -> None:
    """On Ctrl-C and SIGTERM: trainings and measurements end too, lest two write into one folder when the command is given again."""
    for process in (*RUNNING, *multiprocessing.active_children()):
        process.terminate()
    os._exit(128 + number)


def run(plan: Plan) -> None:
    """Trains, measures, and after each round writes ablation.md, ablation.html and curves.svg into the folder of results."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    facts, kept = facts_of(plan), plan.results / "plan.json"
    if kept.is_file() and (then := json.loads(kept.read_text())) != facts:
        differing = ", ".join(key for key in facts if then.get(key) != facts[key])
        raise ValueError(f"{plan.results} holds results of another ladder: it differs in {differing}. Give the same options, or other folders.")
    keep(kept, json.dumps(facts, indent=1) + "\n")
    began, planned = time.time(), rounds(plan)
    jobs = jobs_to_do(plan, planned)
    todo = [key for key in jobs if isinstance(key, Training)]
    left = estimate(plan, todo)
    print(f"\n{len(todo)} trainings are to do and take about {left / 3600:.1f} h here, measured on a few steps. After each seed's, its models are "
          f"measured on {plan.scenes} scenes of {len(plan.levels)} levels and 2 splits each.", flush=True)
    unwritten = sorted({job.round for job in jobs.values()} | {len(planned) - 1})  # rounds with something new, and the last
    for undone in chain([set(jobs)], carry_out(plan, jobs)):
        first = min((jobs[key].round for key in undone), default=len(planned))
        while unwritten and unwritten[0] < first:
            done = unwritten.pop(0) + 1
            write(replace(plan, seeds=min(done, plan.seeds)), planned[:done], time.time() - began)


def ladder(plan: Plan, with_weights: bool) -> list[pages.Table]:
    read = lambda name, where: json.loads(score_file(plan, name, where).read_text())
    of_arm = lambda arm, where, what="": [read(f"{name_of(arm)}-{seed}{what}", where) for seed in range(plan.seeds)]
    tables = []
    for level in plan.levels:
        for split in ("seen", "unseen"):
            where = level, split, plan.scenes
            found = {BASE: [read(BASE, where)], **{arm: of_arm(arm, where) for arm in ARMS}}
            tables += ladder_tables(found, f"{level}, {split}", plan)
            if where == plan.main:
                relations = relation_table(found, f"{level}, {split}")
    whole, name = of_arm(LATENTS, plan.main), f"{plan.level}, unseen"
    altered = {what: of_arm(LATENTS, plan.main, f"-{what.replace(' ', '_')}") for what in ALTERED}
    tables += [relations, table(f"{name}: {LATENTS.strip('+ ')} with other geometry at inference", {"as trained": whole} | altered | {
        f"{what}, difference": (whole, seeds) for what, seeds in altered.items()})]
    if with_weights:
        weights = {f"{weight:g}": [read(f"{weighted(plan, weight)}-0", plan.main)] for weight in WEIGHTS}
        tables.append(table(f"{name}: weight of the latent depth loss, seed 0", weights))
    return tables


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
    note = ("An interval that holds 0 leaves the sign open; with few seeds it speaks of other scenes rather than of other seeds. "
            f"Less is better of {', '.join(LESS_IS_BETTER)}.")
    return [table(f"{where}: {plan.scenes} scenes, {plan.seeds} seed{'s' * (plan.seeds > 1)}; mean [95 % interval over seeds and scenes]", found),
            table(f"{where}: each step of the ladder, paired by scene and seed; difference [95 % interval]", steps, note)]


def relation_table(found: dict[str, list[dict]], where: str) -> pages.Table:
    relations = found[BASE][0]["relations"]
    rows = []
    for relation in dict.fromkeys(relations):
        chosen = [r == relation for r in relations]
        rows.append([f"{relation} ({sum(chosen)})", *(cell(as_cell(stack(seeds, "success")[:, chosen])) for seeds in found.values())])
    return pages.Table(f"{where}: success by relation (scenes)", ["relation", *found], rows)


def curves(plan: Plan) -> list[plot.Curves]:
    """Success on seen scenes of the plan's level against steps, and against core-seconds of stage 2; the training loss."""
    success = lambda names: as_cell(stack([json.loads(score_file(plan, name, plan.curve).read_text()) for name in names], "success"))
    by_step, by_cost, by_loss = {}, {}, {}
    for arm in ARMS:
        names = [f"{name_of(arm)}-{seed}" for seed in range(plan.seeds)]
        points = {0: success([BASE])} | {step: success([f"{name}-step{step}" for name in names]) for step in plan.points}
        logs = [log_of(log_file(plan, name)) for name in names]
        cost = float(np.mean([log[-1]["core_seconds"] / log[-1]["step"] for log in logs]))
        by_step[arm] = [(step, c["mean"], c["low"], c["high"]) for step, c in points.items()]
        by_cost[arm] = [(step * cost, *values) for step, *values in by_step[arm]]
        flows = np.array([[line["flow"] for line in log] for log in logs])
        by_loss[arm] = [(line["step"], flow.mean(), flow.min(), flow.max()) for line, flow in zip(logs[0], flows.T)]
    caption = f"Success on {plan.curve_scenes} seen scenes, {plan.level}"
    return [plot.Curves(f"{caption}, against steps of stage 2", "steps", "success", by_step),
            plot.Curves(f"{caption}, against core-seconds of stage 2", "core-seconds", "success", by_cost),
            plot.Curves("Flow loss in training, mean and range over seeds", "steps", "loss", by_loss)]


def sheet_file(plan: Plan, name: str) -> Path:
    return plan.results / "sheet" / f"{name}.png"


def sheet(plan: Plan) -> list[pages.Case]:
    """The first unseen scenes, edited by every arm of seed 0."""
    strips = {arm: open_image(sheet_file(plan, BASE if arm == BASE else f"{name_of(arm)}-0")) for arm in LADDER}
    cases, side = [], PRESETS[plan.preset].side
    for i in range(min(SHEET, plan.scenes)):
        pair = make_pair(0, plan.level, "unseen", side, index=i, extras=False)
        edits = {arm: strip[:, i * side:(i + 1) * side] for arm, strip in strips.items()}
        cases.append(pages.Case(f"scene {pair.seed}", pair.instruction, {"source": pair.ref} | edits | {"truth": pair.tgt}))
    return cases


def write(plan: Plan, done: list[list[Training]], seconds: float) -> None:
    """Tables and curves of these rounds; the plan has the seeds among them."""
    tables, drawn = ladder(plan, len(done) > plan.seeds), curves(plan)
    core_hours = sum(log_of(log_file(plan, training.name))[-1]["core_seconds"] for trained in done for training in trained) / 3600
    facts = {"base": str(plan.base), "levels of training": " ".join(plan.trained_on),
             "training": f"stage 1 {plan.stage1_steps} steps, stage 2 {plan.steps} steps of {plan.batch}", "seeds": str(plan.seeds),
             "core-hours of training": f"{core_hours:.2f}", "this run": f"{seconds / 60:.0f} min"}
    text = "\n\n".join(f"**{table.caption}**\n\n{markdown(table.header, table.rows)}" + f"\n\n{table.note}" * bool(table.note) for table in tables)
    keep(plan.results / "ablation.md", text + "\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n")
    keep(plan.results / "curves.svg", plot.curves_svg(drawn))
    pages.report(plan.results / "ablation.html", "The ladder in miniature", facts, tables, [], sheet(plan), [], drawn)
    print(f"\n{text}\n\n{plan.results / 'ablation.html'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of the networks to start from: an --output of train.py --stage base")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="of the trainings")
    parser.add_argument("--results", type=Path, help="logs, scores of every scene, tables (default: results in --output)")
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=LEVELS[-1:], help="of the training, one or several; curves and smaller tables "
                        "are about the last")
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
    levels = tuple(args.levels or dict.fromkeys(("plain", "hard", *args.level)))
    if args.level[-1] not in levels:
        raise ValueError(f"--levels must hold {args.level[-1]}, on which the smaller tables are measured.")
    return Plan(args.base, args.output, args.results or args.output / "results", tuple(args.level), levels, args.seeds, args.steps,
                args.stage1_steps, args.batch, args.scenes, args.curve_scenes, args.shards, args.cache, args.jobs, args.compile, args.preset)
