"""Measure edits on the embedded world, where the truth is exact, beside the baselines that give the numbers meaning.

    python evaluate.py --level plain --split unseen --scenes 300 --output results

Rows: the model; autoencoder(target), the ceiling; the source copied; autoencoder(source); the model with every
instruction exchanged for the next scene's (if text is used, this row is clearly worse). One seed per scene, no best of
several. The output folder receives results.json, one object per row, and sheet_<split>.png.
"""

import argparse
import json
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import save_png, side_by_side
from evaluation import metrics
from scenes import LEVELS, RELATIONS, make_pair
from spatialdiff import PRESETS, choose_device, choose_preset, default_folders, load

MODEL, CEILING, COPY, AE_SOURCE, SHUFFLED = ROWS = (
    "model", "autoencoder(target)", "source copy", "autoencoder(source)", "shuffled instructions")
COLUMNS = ("success", *metrics.NAMES)


def scene_stream(level: str, split: str, scenes: int, seed: int, size: int):
    """Yields (pair, donor) for every scene; the donor, the scene before (of the first: the last), lends its instruction."""
    donor = make_pair(seed, level, split, size, index=scenes - 1, extras=False)
    for index in range(scenes):
        pair = make_pair(seed, level, split, size, index=index)
        yield pair, donor
        donor = pair


def names_absent_object(donor, pair) -> bool:
    """Whether the donor's instruction names an object that is not in the pair's scene."""
    named = {donor.scene.objects[i].name for i in (donor.moved, *donor.references)}
    return not named <= {thing.name for thing in pair.scene.objects}


def evaluate(model, level: str, split: str, scenes: int, seed: int, size: int, batch: int, sheet: int, **sampling):
    """Edits `scenes` scenes of a split and measures every row.

    model: offers edit(images (B, H, W, 3) uint8, instructions, seeds=..., **sampling) and vae_roundtrip(images), both
    giving (B, H, W, 3) uint8. seed: which scenes; different seeds share none. Memory does not grow with `scenes`
    except by the numbers. Returns {row: [metrics of each scene]}, the scenes' relations, the share of exchanged
    instructions that name an absent object, and (pair, edit, metrics) of the first `sheet` scenes.
    """
    values, relations, shown, absent = {row: [] for row in ROWS}, [], [], 0
    stream, start = scene_stream(level, split, scenes, seed, size), time.time()
    while chunk := list(islice(stream, batch)):
        pairs = [pair for pair, _ in chunk]
        source, target = (np.stack([getattr(pair, name) for pair in pairs]) for name in ("ref", "tgt"))
        seeds = [pair.seed for pair in pairs]
        edits = {
            MODEL: model.edit(source, [pair.instruction for pair in pairs], seeds=seeds, **sampling),
            CEILING: model.vae_roundtrip(target),
            COPY: source,
            AE_SOURCE: model.vae_roundtrip(source),
            SHUFFLED: model.edit(source, [donor.instruction for _, donor in chunk], seeds=seeds, **sampling),
        }
        for i, (pair, donor) in enumerate(chunk):
            measured = {row: metrics.measure(edits[row][i], pair) for row in ROWS}
            for row in ROWS:
                right = metrics.success(measured[row], measured[CEILING]["bg_psnr"])
                values[row].append({"success": right, **measured[row]})
            if len(shown) < sheet:
                shown.append((pair, edits[MODEL][i], values[MODEL][-1]))
            relations.append(pair.relation)
            absent += names_absent_object(donor, pair)
        done, right = len(relations), np.mean([v["success"] for v in values[MODEL]])
        left = (time.time() - start) / done * (scenes - done)
        print(f"\r{split}: {done}/{scenes} scenes, success {right:.3f}, {left / 60:.1f} min left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return values, relations, absent / scenes, shown


def summarise(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Metric -> mean, low and high of its 95 % bootstrap interval; a metric that applies to no scene is left out."""
    found = {name: metrics.bootstrap([v[name] for v in values]) for name in COLUMNS}
    return {name: {key: round(x, 5) for key, x in zip(("mean", "low", "high"), triple)}
            for name, triple in found.items() if not np.isnan(triple[0])}


def table(header: list[str], lines: list[tuple[str, list[dict | None]]]) -> str:
    """A Markdown table of mean [low, high]."""
    def cell(c):
        digits = 1 if c and c["high"] > 2 else 3
        return f"{c['mean']:.{digits}f} [{c['low']:.{digits}f}, {c['high']:.{digits}f}]" if c else ""
    rows = [header, ["---"] * len(header)] + [[name, *map(cell, cells)] for name, cells in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def contact_sheet(shown: list, columns: int = 2) -> np.ndarray:
    """Reference | edit | truth with the instruction below each, as one picture (H, W, 3) uint8."""
    tiles = []
    for pair, edit, value in shown:
        strip = Image.fromarray(side_by_side([pair.ref, edit, pair.tgt]))
        tile = Image.new("RGB", (strip.width + 16, strip.height + 40), "white")
        tile.paste(strip, (8, 2))
        text = f"{pair.instruction} [{'right' if value['success'] else 'wrong'}, IoU {value['effect_iou']:.2f}]"
        lines = "\n".join(textwrap.wrap(text, strip.width // 6))
        ImageDraw.Draw(tile).text((8, strip.height + 4), lines, fill="black", font=ImageFont.load_default(11))
        tiles.append(np.asarray(tile))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    scenes = parser.add_argument_group("scenes")
    scenes.add_argument("--level", choices=LEVELS, default="plain")
    scenes.add_argument("--split", choices=("seen", "unseen", "both"), default="both")
    scenes.add_argument("--scenes", type=int, default=300, help="per split")
    scenes.add_argument("--seed", type=int, default=0, help="which scenes; different seeds share none")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=tuple(PRESETS), help="default: that of --weights; nano without")
    model.add_argument("--weights", type=Path, help="folder of the networks; default: weights/nano")
    model.add_argument("--checkpoint", type=Path, help="folder of Connector, spatial head and LoRA; default: its stage2")
    model.add_argument("--no-ism", action="store_true", help="without spatial tokens")
    model.add_argument("--steps", type=int, help="Euler steps; default: the preset's")
    model.add_argument("--guidance", type=float, help="default: the preset's")
    model.add_argument("--device", help="default: cuda if there is one, else cpu")
    model.add_argument("--dtype", help="bfloat16 or float32; default: bfloat16, of the small presets on a CPU float32")
    run = parser.add_argument_group("run")
    run.add_argument("--batch", type=int, default=32, help="scenes edited at once; changes speed and memory, not results")
    run.add_argument("--sheet", type=int, default=20, help="edits on the contact sheet")
    run.add_argument("--output", type=Path, help="folder for results.json and the sheet; default: print only")
    args = parser.parse_args()
    try:
        run_evaluation(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run_evaluation(args: argparse.Namespace) -> None:
    if args.scenes < 2:
        raise ValueError(f"At least 2 scenes are needed to exchange instructions, not {args.scenes}; raise --scenes.")
    if min(args.batch, args.sheet) < 1 or (args.steps is not None and args.steps < 1):
        raise ValueError("--batch, --sheet and --steps must be at least 1.")
    preset = choose_preset(args.preset, args.weights)
    weights, checkpoint = default_folders(preset, args.weights, args.checkpoint)
    sampling = {"steps": args.steps or preset.steps,
                "guidance": preset.guidance_sample if args.guidance is None else args.guidance}
    device, dtype, reason = choose_device(preset, args.device, args.dtype)
    model = load(preset, weights, checkpoint, device, dtype, not args.no_ism)
    print(f"{preset.name} of {checkpoint} on {device} ({reason}), {str(dtype)[6:]}, {sampling['steps']} steps, "
          f"guidance {sampling['guidance']}, {'without' if model.vggt is None else 'with'} spatial tokens")
    results = []
    for split in ("seen", "unseen") if args.split == "both" else (args.split,):
        values, relations, absent, shown = evaluate(
            model, args.level, split, args.scenes, args.seed, preset.side, args.batch, args.sheet, **sampling)
        rows = {row: summarise(values[row]) for row in ROWS}
        by_relation = {row: {relation: {"scenes": relations.count(relation)}
                             | summarise([v for v, r in zip(values[row], relations) if r == relation])
                             for relation in RELATIONS if relation in relations} for row in ROWS}
        print(f"\n{args.level}, {split}: {args.scenes} scenes of seed {args.seed}; mean [95 % bootstrap interval]\n")
        names = [name for name in COLUMNS if any(name in row for row in rows.values())]
        print(table(["metric", *ROWS], [(name, [rows[row].get(name) for row in ROWS]) for name in names]))
        print(f"\n{absent:.0%} of the exchanged instructions name an object that is not in the scene.\n")
        kept = ("success", "effect_iou", "centroid_err", "ghost")
        print(table(["model, by relation", *kept],
                    [(f"{relation} ({v['scenes']})", [v.get(k) for k in kept]) for relation, v in by_relation[MODEL].items()]))
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()} | sampling
        results += [{"row": row, "split": split, "metrics": rows[row], "relations": by_relation[row], "settings": settings}
                    for row in ROWS]
        if args.output:
            save_png(args.output / f"sheet_{split}.png", contact_sheet(shown))
            (args.output / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
