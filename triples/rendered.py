"""Triples of the rendered world, at any size: pictures, colour labels, exact depth, the scene without the object.

    python data.py scenes --out data/scenes.jsonl --count 1000 --level plain --size 512 --split train

One move a scene (scenes.make_pair). Pictures go to data/scenes/, the rows are written last, when all pictures are there.
"""

import multiprocessing
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

import scenes
from data import measure_masks, paint_labels, relative, save_png, write_rows


def render_scene(task: tuple[Path, str, str, int, int, int]) -> dict:
    """Renders one move, writes its pictures beside the JSON-lines file and returns its row."""
    out, level, split, size, seed, index = task
    pair = scenes.make_pair(seed, level, split, size, index=index, extras=False)
    order = [pair.moved, *(i for i in range(len(pair.scene.objects)) if i != pair.moved)]  # label k is order[k - 1]
    label = np.zeros(len(order) + 1, np.uint8)
    label[np.add(order, 1)] = range(1, len(order) + 1)
    things = [pair.scene.objects[i] for i in order]
    depth = np.rint((scenes.disparity(pair.tgt_depth).astype(np.float64) + 1) * (65535 / 2)).astype(np.uint16)
    pictures = {"ref": pair.ref, "tgt": pair.tgt, "depth_tgt": depth,
                "mask_ref": paint_labels(label[pair.ref_ids + 1]), "mask_tgt": paint_labels(label[pair.tgt_ids + 1]),
                "empty": scenes.render(pair.scene, size, only=order[1:]).rgb}
    paths = {key: out.parent / out.stem / f"{index:06}_{key}.png" for key in pictures}
    for key, picture in pictures.items():
        save_png(paths[key], picture)
    checks = measure_masks(pair.mask_ref, pair.mask_tgt)
    return {"id": f"{split}/{pair.seed}", **{key: relative(out, path) for key, path in paths.items()}, "mask_label": 1,
            "instruction": pair.instruction, "relation": pair.relation, "split": split, "end_xy": checks["centroid_tgt"],
            "object": {"category": things[0].shape, "description": things[0].name.removeprefix("the ")},
            "objects": {str(k): thing.name.removeprefix("the ") for k, thing in enumerate(things, 1)},
            "source": {"kind": "scenes", "level": level, "seed": pair.seed, "size": size,
                       "references": [order.index(i) + 1 for i in pair.references]},
            "checks": checks | {"instruction": "rendered"}}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to write, pictures in a folder of its name")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--level", choices=scenes.LEVELS, default="plain")
    parser.add_argument("--split", choices=tuple(scenes.SPLITS), default="train")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0, help="which scenes; seeds less than 100 apart share none")


def main(args: Namespace) -> None:
    if args.count < 1 or args.size < 16 or args.seed < 0:
        raise ValueError("--count must be at least 1, --size 16 and --seed 0, "
                         f"not {args.count}, {args.size} and {args.seed}.")
    args.out.unlink(missing_ok=True)  # the pictures of an older file are overwritten
    tasks, rows = [(args.out, args.level, args.split, args.size, args.seed, index) for index in range(args.count)], []
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, args.count // 8 + 1)) as pool:
        for row in pool.imap(render_scene, tasks, 4):
            rows.append(row)
            print(f"\rrendering: {len(rows)} of {args.count} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    write_rows(args.out, rows)
    print(f"{args.out}: {args.count} {args.level} scenes of split {args.split}, {args.size} x {args.size}")
