"""Measure edits: of the embedded world, where the truth is exact; or of any method on a benchmark of pictures.

    python evaluate.py --level plain --split unseen --scenes 300 --output results
    python evaluate.py compose  --photos PHOTOS --objedit test.jsonl --out BENCH
    python evaluate.py generate --benchmark BENCH --output OUT/ours
    python evaluate.py score    --benchmark BENCH --outputs ours=OUT/ours kontext=OUT/kontext --output results [--url URL --model M]
    python evaluate.py sanity   --benchmark BENCH --url URL --model M
    python evaluate.py study    --benchmark BENCH --outputs ours=OUT/ours kontext=OUT/kontext --output study.html
    python evaluate.py study    --tally votes/*.json
    python evaluate.py ablation --base runs/base --output runs/ablation        trains and measures the paper's ladder in miniature

Without a command: rows are the model; autoencoder(target), the ceiling; the source copied; autoencoder(source); the model
with every instruction exchanged for another scene's (if text is used, this row is clearly worse). One seed per scene, no
best of several. The output folder receives results.json, one object per row, sheet_<split>.png and report.html.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np

import scenes
from data import open_image, resolve, save_png
from evaluation import ablation, benchmark, chat, pages, score, viescore
from evaluation.score import markdown
from evaluation.study import study
from evaluation.tally import tally, tally_table
from evaluation.world import CEILING, COLUMNS, COPY, MODEL, ROWS, contact_sheet, evaluate, summarise
from model.text import unknown_words
from spatialdiff import PRESETS, choose_device, choose_preset, default_folders, find_learned, load, load_depth


def main() -> None:
    args = parse()
    try:
        {"generate": run_generate, "score": run_score, "compose": run_compose, "sanity": run_sanity, "study": run_study,
         "ablation": lambda args: ablation.run(ablation.plan_of(args)), None: run_evaluation}[args.command](args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("scenes")
    group.add_argument("--level", choices=scenes.LEVELS, default="plain")
    group.add_argument("--split", choices=("seen", "unseen", "both"), default="both")
    group.add_argument("--scenes", type=int, default=300, help="per split")
    group.add_argument("--seed", type=int, default=0, help="which scenes; seeds less than 100 apart share none")
    add_model_arguments(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--alter", choices=tuple(ablation.ALTERED), help="what the Connector is given instead of the picture's own "
                     "geometry: does the model use it?")
    run.add_argument("--batch", type=int, default=32, help="scenes edited at once; changes speed and memory, not results")
    run.add_argument("--sheet", type=int, default=20, help="edits on the contact sheet")
    run.add_argument("--output", type=Path, help="folder for results.json, sheet and report; default: print only")

    commands = parser.add_subparsers(dest="command", metavar="compose | generate | score | sanity | study | ablation")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, description=about)
        if name != "compose":
            sub.add_argument("--benchmark", type=Path, required=name != "study",
                             help="folder with benchmark.jsonl, or a JSON-lines file")
        if name != "score":
            sub.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
        return sub

    sub = command("compose", "Make a benchmark of photographs with instructions and OBJect test pairs, as the paper's is made.")
    sub.add_argument("--photos", type=Path, help="folder with instructions.csv or x.txt beside x.jpg; or a CSV file: image, "
                     "instruction, optionally mask_ref, mask_tgt, box_tgt")
    sub.add_argument("--objedit", type=Path, help="JSON lines of OBJect test pairs, from python data.py objedit --split test")
    sub.add_argument("--out", type=Path, required=True, help="folder to make")
    sub.add_argument("--complex", type=int, default=100, help="photographs (paper: 100)")
    sub.add_argument("--object", type=int, default=50, help="OBJect pairs (paper: 50)")

    sub = command("generate", "Edit every picture of a benchmark; a stopped run goes on where it was.")
    sub.add_argument("--output", type=Path, required=True, help="folder of outputs")
    sub.add_argument("--overwrite", action="store_true", help="make pictures again that are there already")
    add_model_arguments(sub)

    sub = command("score", "Score folders of outputs, and the source copied: exact metrics; a judge where --url is given.")
    sub.add_argument("--outputs", nargs="+", required=True, metavar="NAME=DIR", help="one picture an id, <id, / as _>.png")
    sub.add_argument("--output", type=Path, required=True, help="folder for scores.jsonl, results.json, report.html")
    sub.add_argument("--depth-weights", type=Path, help="folder with Depth Anything V2: adds depth_order")
    add_judge_arguments(sub)

    sub = command("sanity", "Does a judge tell right from wrong? Exit status 1 if not.")
    sub.add_argument("--count", type=int, default=8, help="samples with truth and masks, four pictures each")
    add_judge_arguments(sub)

    ablation.add_arguments(commands.add_parser("ablation", description=ablation.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))

    sub = command("study", "A page on which people rank methods blindly; --tally adds up their votes.")
    sub.add_argument("--outputs", nargs="+", metavar="NAME=DIR")
    sub.add_argument("--output", type=Path, help="HTML file to write")
    sub.add_argument("--count", type=int, default=20, help="pictures (paper: 20)")
    sub.add_argument("--title", default="Which edit is best?")
    sub.add_argument("--tally", type=Path, nargs="+", metavar="VOTES", help="JSON files that the page exported")
    args = parser.parse_args()
    if args.command and sys.argv[1] != args.command:
        parser.error(f"options of {args.command} go behind it; those before it are of an evaluation without a command.")
    return args


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=tuple(PRESETS), help="default: that of --weights; nano without")
    model.add_argument("--weights", type=Path, help="folder of the networks; default: weights/nano")
    model.add_argument("--checkpoint", type=Path, help="folder of Connector, spatial head and LoRA; default: its stage2")
    model.add_argument("--no-ism", action="store_true", help="without spatial tokens")
    model.add_argument("--steps", type=int, help="Euler steps; default: the preset's")
    model.add_argument("--guidance", type=float, help="default: the preset's")
    model.add_argument("--device", help="default: cuda if there is one, else cpu")
    model.add_argument("--dtype", help="bfloat16 or float32; default: bfloat16, of the small presets on a CPU float32")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    chat.add_arguments(parser, max_tokens=2000)
    parser.add_argument("--attempts", type=int, default=3, help="for an answer that can be read; then the sample counts as failed")
    parser.add_argument("--images-first", action="store_true", help="pictures before the text, as VIEScore's Qwen route")


def load_editor(args: argparse.Namespace):
    """The model that the flags describe, and its sampling settings; prints what it is."""
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {args.steps}.")
    preset = choose_preset(args.preset, args.weights)
    weights, checkpoint = default_folders(preset, args.weights, args.checkpoint)
    sampling = {"steps": args.steps or preset.steps,
                "guidance": preset.guidance_sample if args.guidance is None else args.guidance}
    device, dtype, reason = choose_device(preset, args.device, args.dtype)
    find_learned(preset, checkpoint, asked=args.checkpoint is not None)  # an empty --checkpoint is refused, not plain Kontext
    model = load(preset, weights, checkpoint, device, dtype, not args.no_ism)
    about = (f"{preset.name} of {checkpoint} on {device} ({reason}), {str(dtype)[6:]}, {sampling['steps']} steps, "
             f"guidance {sampling['guidance']}, {'without' if model.vggt is None else 'with'} spatial tokens")
    print(about)
    return model, preset, sampling, about


def run_evaluation(args: argparse.Namespace) -> None:
    if args.scenes < 2:
        raise ValueError(f"At least 2 scenes are needed to exchange instructions, not {args.scenes}; raise --scenes.")
    if min(args.batch, args.sheet) < 1:
        raise ValueError("--batch and --sheet must be at least 1.")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    model, preset, sampling, about = load_editor(args)
    if args.alter and model.vggt is None:
        raise ValueError("--alter is for a model with spatial tokens.")
    if args.alter == ablation.EXCHANGED and 1 in (args.batch, args.scenes % args.batch):
        raise ValueError(f"Geometry is exchanged within a batch; {args.scenes} scenes in batches of {args.batch} leave one alone.")
    altered = {"alter_geometry": ablation.ALTERED[args.alter]} if args.alter else {}
    unknown = unknown_words(model.tokenizers[0], " ".join(scenes.vocabulary(args.level)))
    if unknown:
        print(f"The model does not know {len(unknown)} words of level {args.level}: {', '.join(unknown)}.")
    results, tables, bars, cases = [], [], [], []
    for split in ("seen", "unseen") if args.split == "both" else (args.split,):
        values, relations, absent, shown = evaluate(
            model, args.level, split, args.scenes, args.seed, preset.side, args.batch, args.sheet, **sampling, **altered)
        rows = {row: summarise(values[row]) for row in ROWS}
        by_relation = {row: {relation: {"scenes": relations.count(relation)}
                             | summarise([v for v, r in zip(values[row], relations) if r == relation])
                             for relation in scenes.relations(args.level) if relation in relations} for row in ROWS}
        caption = f"{args.level}, {split}: {args.scenes} scenes of seed {args.seed}; mean [95 % interval]"
        print(f"\n{caption}\n")
        names = [name for name in COLUMNS if any(name in row for row in rows.values())]
        table = pages.Table(caption, ["metric", *ROWS], [[name, *(score.cell(rows[row].get(name)) for row in ROWS)] for name in names])
        print(markdown(table.header, table.rows))
        print(f"\n{absent:.0%} of the exchanged instructions name an object that is not in the scene.\n")
        kept = ("success", "effect_iou", "centroid_err", "ghost")
        print(markdown(["model, by relation", *kept],
                       [[f"{relation} ({v['scenes']})", *map(v.get, kept)] for relation, v in by_relation[MODEL].items()]))
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "command"} | sampling
        results += [{"row": row, "split": split, "metrics": rows[row], "relations": by_relation[row], "settings": settings}
                    for row in ROWS]
        tables.append(table)
        bars.append(pages.Bars(f"effect IoU by relation, {split}", "effect_iou", list(by_relation[MODEL]), {
            row: [tuple(v["effect_iou"].values()) for v in by_relation[row].values()] for row in (MODEL, CEILING, COPY)}))
        ranked = sorted(shown, key=lambda item: item[2]["effect_iou"])
        half = min(4, len(ranked) // 2)
        cases += [pages.Case(f"{split}, scene {pair.seed}", pair.instruction, {"source": pair.ref, "edit": edit, "truth": pair.tgt},
                             {name: f"{value[name]:.3g}" for name in COLUMNS if not np.isnan(value.get(name, np.nan))}, kind)
                  for kind, part in (("worst", ranked[:half]), ("best", ranked[::-1][:half])) for pair, edit, value in part]
        if args.output:
            save_png(args.output / f"sheet_{split}.png", contact_sheet(shown))
            (args.output / "results.json").write_text(json.dumps(results, indent=1))
    if args.output:
        pages.report(args.output / "report.html", "Rendered world", {
            "model": about, "scenes": ", ".join(filter(None, (args.level, f"seed {args.seed}", args.alter)))}, tables, bars, cases, [
            f"Worst and best of the first {args.sheet} scenes of each split."])


def run_generate(args: argparse.Namespace) -> None:
    file, rows = benchmark.read_benchmark(args.benchmark)
    editor, _, sampling, _ = load_editor(args)
    made = benchmark.generate(editor, file, rows, args.output, args.seed, sampling["steps"], sampling["guidance"], args.overwrite)
    print(f"{args.output}: {made} pictures made, {len(rows) - made} were there")


def run_compose(args: argparse.Namespace) -> None:
    rows = benchmark.compose(args.photos, args.objedit, args.out, args.complex, args.object, args.seed)
    counts = (f"{sum(row['group'] == group for row in rows)} {group}" for group in ("complex", "object"))
    print(f"{args.out / 'benchmark.jsonl'}: {', '.join(counts)}")


def output_folders(items: list[str]) -> dict[str, Path]:
    """NAME=DIR -> {name: folder}; ValueError for another form, a name twice, FileNotFoundError for no folder."""
    found = {}
    for item in items or ():
        name, equals, folder = item.partition("=")
        if not (name and equals and folder) or name in found or name == score.COPY:
            raise ValueError(f"Expected --outputs as NAME=DIR, each name once and none of them {score.COPY!r}, found {item!r}.")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"Expected a folder of outputs at {folder}, found none.")
        found[name] = Path(folder)
    return found


def run_score(args: argparse.Namespace) -> None:
    file, rows = benchmark.read_benchmark(args.benchmark)
    outputs = output_folders(args.outputs)
    client = chat.Chat(chat.endpoint_of(args), args.cache or args.output / "calls.jsonl") if args.url else None
    if args.dry_run and client is None:
        raise ValueError("--dry-run counts the judge's calls; give --url and --model.")
    depth_model = load_depth(args.depth_weights, choose_device(PRESETS["kontext"], None, None)[0]) if args.depth_weights else None
    records, missing = score.collect(file, rows, outputs, depth_model, measured=not args.dry_run)
    if args.dry_run:
        calls = score.unanswered(records, client, args.images_first)
        print(f"{2 * len(records)} ratings of {len(records)} pictures, {calls} calls not yet answered")
        return
    facts = {"benchmark": f"{file}, {len(rows)} rows", "judge": "none: exact metrics only"}
    if client:
        score.judge(records, client, args.threads, args.attempts, args.images_first)
        facts["judge"] = f"{client.endpoint.model}, prompts {viescore.SC_VERSION} and {viescore.PQ_VERSION}"
        facts["calls"] = ", ".join(f"{name} {round(count)}" for name, count in client.counts.items())
    notes = score.warnings(records, missing, len(rows)) + [
        "Every figure is a mean over the samples whose rows allow it. placed: effect_iou > 0.5, ghost < 0.3, bg_psnr > 25; "
        "retrieval: the truth is nearer than the source and the empty scene. A high PQ with a low SC means that nothing was edited."]
    if not any("depth_order" in record["metrics"] for record in records):
        notes.append("depth_order was not measured: " + (
            "no row tells the other objects apart by labels." if depth_model else "no --depth-weights."))
    found = score.write(args.output, file, rows, records, missing, facts, notes)
    for part in (*score.tables(found), *score.paper_tables()):
        print(f"\n{part.caption}\n\n{markdown(part.header, part.rows)}" + f"\n\n{part.note}" * bool(part.note))
    print("", *(f"- {note}" for note in notes), f"\n{args.output / 'report.html'}", sep="\n")


def run_sanity(args: argparse.Namespace) -> None:
    file, rows = benchmark.read_benchmark(args.benchmark)
    rows = [row for row in rows if row.get("tgt") and row.get("mask_ref")]
    if not rows or args.count < 1:
        raise ValueError(f"Expected rows with tgt and mask_ref in {file}, found {len(rows)}, and --count of at least 1. "
                         "A composed benchmark has such rows in its group object.")
    rows = random.Random(args.seed).sample(rows, min(args.count, len(rows)))
    client = chat.Chat(chat.endpoint_of(args), args.cache or file.with_name("calls.jsonl"))
    if args.dry_run:
        print(f"{2 * len(rows) * len(viescore.SANITY)} calls, less those that the cache answers")
        return
    lines, passed = score.sanity(file, rows, client, args.threads, args.attempts, args.images_first)
    print(markdown(["case", "measure", "mean", "must be", "failed", "verdict"], lines))
    print(f"\n{client.endpoint.model} on {len(rows)} samples: " + ("the judge can be used" if passed else "do NOT use this judge"))
    sys.exit(0 if passed else 1)


def run_study(args: argparse.Namespace) -> None:
    if args.tally:
        print(tally_table(tally(args.tally)))
        return
    if not (args.benchmark and args.outputs and args.output):
        raise ValueError("A study needs --benchmark, --outputs and --output; or --tally with files of votes.")
    file, rows = benchmark.read_benchmark(args.benchmark)
    outputs = output_folders(args.outputs)
    whole = [row for row in rows if all(benchmark.output_path(folder, row["id"]).is_file() for folder in outputs.values())]
    if len(whole) < args.count:
        raise ValueError(f"Expected {args.count} rows with an output of every method, found {len(whole)}; lower --count.")
    chosen = []
    for row in random.Random(args.seed).sample(whole, args.count):
        source = open_image(resolve(file, row, "ref"))
        edits = {name: open_image(benchmark.output_path(folder, row["id"])) for name, folder in outputs.items()}
        chosen.append((row["id"], row["instruction"], source, edits))
    study(args.output, chosen, args.seed, args.title)
    print(f"{args.output}: {args.count} pictures, {len(outputs)} methods")


if __name__ == "__main__":
    main()
