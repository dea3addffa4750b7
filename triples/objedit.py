"""Triples of OBJect-3DIT: renders before and after, coloured masks, metadata; pictures stay where they are.

    python data.py objedit --root DATASET --task translate --split train --out data/train.jsonl --limit 20000 --reverse

The data set (huggingface.co/datasets/allenai/object-edit, ODC-BY, one archive a task) unpacks to

    ROOT/TASK/train/UID/                 1.png 2.png 1_mask.png 2_mask.png metadata.json
    ROOT/TASK/{val,test}/{seen,unseen}/UID/

with TASK translate, rotate or remove; insert is remove with its two pictures exchanged. Masks colour label k with colour k
of Set1 (data.read_labels). Of metadata.json its public loader uses: `object_data`, a list of {uid, category} whose first
entry is the edited object; `end_location_2d` [x, y] (translate), `rotation_angle` in degrees (rotate), `removed_object_uid`
and `removed_object_camera_coords` [x, y] (remove). Whether y grows up or down is not documented: it is decided by vote.
Samples that are damaged, incomplete or show no visible change are skipped and counted by reason.
"""

import json
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import measure_masks, read_labels, read_picture, relative, save_png, write_rows
from triples import sentences

TASKS = ("translate", "rotate", "remove", "insert")
FILES = ("1.png", "2.png", "1_mask.png", "2_mask.png", "metadata.json")
LEAST_AREA, LEAST_MOVE = 0.002, 0.03  # share of the picture's pixels; centroid's way in sides of the picture
VOTERS = 50  # samples that decide the direction of y


class Unusable(ValueError):
    """Why a sample is skipped, in words that are counted."""


def sample_folders(root: Path, task: str, split: str, seen: str | None,
                   seed: int) -> tuple[list[tuple[Path, str]], int]:
    """Samples (folder, "train" | "seen" | "unseen") of a split, sorted, then shuffled by `seed`, so that the first N are
    the same on every machine; and the number of stray files beside them."""
    if split == "train" and seen == "unseen":
        raise ValueError("The train split holds seen objects only, and unseen ones are for testing: choose --split val or "
                         "test for --seen unseen.")
    top = root / ("remove" if task == "insert" else task) / split
    parts = {part: top / part for part in ("seen", "unseen") if seen in (None, part)}
    if split == "train":
        parts = {"train": top}
    for folder in parts.values():
        if not folder.is_dir():
            present = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
            raise FileNotFoundError(f"Expected samples at {folder}, found no such folder. --root must hold {top.parent.name}/, "
                                    f"as its archive unpacks; {root} holds: {', '.join(present) or 'nothing'}.")
    entries = sorted((path.name, part, path) for part, folder in parts.items() for path in folder.iterdir())
    folders = [(path, part) for _, part, path in entries if path.is_dir()]
    order = np.random.default_rng(seed).permutation(len(folders))
    return [folders[i] for i in order], len(entries) - len(folders)


def edited_label(before: np.ndarray, after: np.ndarray) -> int:
    """The label whose pixels change most between two label pictures (H, W). An object that hides or reveals another changes
    as many pixels as the other does, give or take a rim: within 5 % of the most, the label of which the largest share
    changes is taken, the lowest if that is equal."""
    masks = [(before == k, after == k) for k in range(1, 10)]
    change = np.array([(a ^ b).sum() for a, b in masks])
    share = change / [max(1, (a | b).sum()) for a, b in masks]
    near = change >= 0.95 * change.max()
    return int(np.where(near, share, -1).argmax()) + 1


def read_sample(task: str, folder: Path) -> dict:
    """What is measured and known of one sample; Unusable, with the reason, where it cannot be used.

    Returns label, checks (ref is file 1, tgt file 2), opaque ({picture: whether its alpha can be ignored}), object, others
    ({label: category}), location ([x, y] or None), angle (degrees or None), remarks (to be counted).
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise Unusable(f"{name} is missing")
    try:
        metadata = json.loads((folder / "metadata.json").read_bytes())
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise Unusable("metadata.json cannot be read")
    read, name = {}, ""
    try:
        for name in FILES[:2]:
            read[name] = read_picture(folder / name, lambda image: np.array(image.convert("RGBA")))
        for name in FILES[2:4]:
            read[name] = read_labels(folder / name)
    except ValueError as error:
        raise Unusable(f"{name} cannot be read") from error
    one, two, before, after = read.values()
    if one.shape != two.shape or before.shape != after.shape:
        raise Unusable("1 and 2 differ in size")
    if before.shape[0] * one.shape[1] != before.shape[1] * one.shape[0]:
        raise Unusable("masks and pictures differ in aspect")
    if not before.any() and not after.any():
        raise Unusable("no label colour in the masks")

    label, remarks = edited_label(before, after), []
    if label != 1:
        remarks.append("edited label is not 1")
    checks = measure_masks(before == label, after == label) | {"label": label}
    areas = (checks["area_ref"], checks["area_tgt"])
    if (areas[0] if task in ("remove", "insert") else min(areas)) < LEAST_AREA:
        raise Unusable(f"edited object below {LEAST_AREA:.1%} of the pixels")
    if task == "translate" and checks["moved"] < LEAST_MOVE:
        raise Unusable(f"object moves less than {LEAST_MOVE:.0%} of the side")

    objects = metadata.get("object_data")
    objects = [o for o in objects if isinstance(o, dict)] if isinstance(objects, list) else []
    removed = metadata.get("removed_object_uid")
    edited = next((o for o in objects if removed and o.get("uid") == removed), objects[0] if objects else {})
    known = {key: edited[key] for key in ("uid", "category") if isinstance(edited.get(key), str) and edited[key]}
    location = metadata.get({"translate": "end_location_2d", "rotate": ""}.get(task, "removed_object_camera_coords"))
    if not (isinstance(location, list) and [type(v) in (int, float) and 0 <= v <= 1 for v in location] == [True, True]):
        location = None
    angle = metadata.get("rotation_angle") if task == "rotate" else None
    angle = angle if type(angle) in (int, float) and math.isfinite(angle) else None
    wanted = {"uid": known.get("uid"), "category": known.get("category")}
    wanted |= {"an angle": angle} if task == "rotate" else {"a location in 0..1": location}
    remarks += [f"metadata without {key}" for key, value in wanted.items() if value is None]
    # That labels are numbered in the order of object_data is only certain of the first, and only where that is label 1.
    others = {k: o["category"] for k, o in enumerate(objects, 1) if isinstance(o.get("category"), str)} if label == 1 else {}
    shown = set(np.unique(before)) | set(np.unique(after))
    return {"label": label, "checks": checks, "opaque": {n: bool((read[n][..., 3] == 255).all()) for n in FILES[:2]},
            "object": known, "others": {k: v for k, v in others.items() if k in shown and k > 1}, "location": location,
            "angle": angle, "remarks": remarks}


def y_direction(samples: list[dict], key: str) -> tuple[str | None, str]:
    """"up", "down" or None, and the vote in words: is a location's y or 1 - y nearer to the object's centroid? Places within
    0.05 of the middle row do not vote. None: fewer than 5 votes, or less than three in four agree."""
    pairs = np.array([(s["location"][1], s["checks"][key][1]) for s in samples if s["location"] and key in s["checks"]])
    pairs = pairs.reshape(-1, 2)[:VOTERS]
    pairs = pairs[np.abs(pairs[:, 0] - 0.5) > 0.05]
    down, up = np.abs(pairs[:, 0] - pairs[:, 1]), np.abs(1 - pairs[:, 0] - pairs[:, 1])
    votes, n = int((up < down).sum()), len(pairs)
    if n < 5 or max(votes, n - votes) < 0.75 * n:
        return None, (f"y of locations: undecidable, {votes} of {n} votes for up; end_xy is left out. At least 5 votes are "
                      "needed, three in four of them alike.")
    direction = "up" if 2 * votes > n else "down"
    return direction, (f"y of locations grows {direction}: {max(votes, n - votes)} of {n} votes; mean distance to the mask's "
                       f"centroid {min(up.mean(), down.mean()):.3f}, the other way {max(up.mean(), down.mean()):.3f}")


def read_captions(path: Path | None) -> dict:
    """{uid: {category, description}} of objaverse_cat_descriptions_64k.json (the data set's code repository)."""
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"Expected the captions at {path}, found no file; without --captions categories are used.")
    try:
        captions = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, found something else ({error}).") from error
    if not isinstance(captions, dict):
        raise ValueError(f"Expected {{uid: {{category, description}}}} in {path}, found a {type(captions).__name__}.")
    return captions


def opaque_picture(folder: Path, name: str, out: Path) -> Path:
    """A copy without alpha, beside the JSON-lines file: the data set's alpha is to be dropped, but whoever reads a picture
    would blend it with white."""
    path = out.parent / f"{out.stem}_opaque" / f"{folder.name}_{name}"
    save_png(path, read_picture(folder / name, lambda image: np.array(image.convert("RGBA"))[..., :3]))
    return path


def make_row(args: Namespace, folder: Path, part: str, sample: dict, swap: bool, y_is: str | None,
             captions: dict) -> dict:
    """The row of a sample, or with `swap` of the way back."""
    names = {"ref": "12"[swap], "tgt": "12"[not swap]}
    checks = dict(sample["checks"])
    if swap:
        exchange = {"ref": "tgt", "tgt": "ref"}
        checks = {key[:-3] + exchange.get(key[-3:], key[-3:]): value for key, value in checks.items()}
    row = {"id": f"{args.task}/{folder.name}" + "~" * (swap and args.task != "insert")}
    for key, n in names.items():
        whole = sample["opaque"][f"{n}.png"]
        row[key] = relative(args.out, folder / f"{n}.png" if whole else opaque_picture(folder, f"{n}.png", args.out))
    row |= {f"mask_{key}": relative(args.out, folder / f"{n}_mask.png") for key, n in names.items() if checks[f"area_{key}"]}
    row["mask_label"] = sample["label"]

    thing, caption = dict(sample["object"]), captions.get(sample["object"].get("uid"))
    if isinstance(caption, dict):
        told = {key: caption.get(key) for key in ("category", "description")}
        thing |= {key: text for key, text in told.items() if isinstance(text, str) and text.strip()}
    words = thing.get("description") or thing.get("category")
    labels = {sample["label"]: words} if words else {}
    row |= {"object": thing, "objects": {str(k): name for k, name in sorted((labels | sample["others"]).items())}}

    if args.task == "translate" and swap:
        row["end_xy"] = checks["centroid_tgt"]  # the metadata tell the way there only
    elif args.task in ("translate", "insert") and sample["location"] and y_is:
        x, y = sample["location"]
        row["end_xy"] = [x, 1 - y if y_is == "up" else y]
    source = {"kind": "objedit", "task": args.task, "split": args.split, "uid": folder.name}
    if sample["angle"] is not None:
        source["rotation_angle"] = -sample["angle"] if swap else sample["angle"]
    return row | {"split": part, "source": source, "checks": checks}


def template(file: Path, row: dict) -> str | None:
    """A sentence without a model: of a movement by its masks, of other edits by metadata; None if they do not suffice."""
    name = row["object"].get("description") or row["object"].get("category") or "object"
    task, angle = row["source"]["task"], row["source"].get("rotation_angle")
    if task == "rotate":
        turn = (angle + 180) % 360 - 180 if angle is not None else 0
        way = "counter-clockwise" if turn > 0 else "clockwise"
        return f"Rotate the {name} {abs(turn):.0f} degrees {way}." if round(turn) else None
    if task in ("remove", "insert"):
        return f"{'Remove' if task == 'remove' else 'Add'} the {name}."
    try:
        return sentences.template(sentences.facts(file, row))
    except ValueError:
        return None


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, required=True, help="folder that holds translate/, rotate/, remove/")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to write; pictures stay where they are")
    parser.add_argument("--task", choices=TASKS, default="translate", help="insert is remove with its pictures exchanged")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--seen", choices=("seen", "unseen"), help="objects of val and test; default: both")
    parser.add_argument("--limit", type=int, help="samples to take (the paper: 20000); default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which samples are taken")
    parser.add_argument("--reverse", action="store_true", help="also each pair the other way round (translate, rotate)")
    parser.add_argument("--captions", type=Path, help="objaverse_cat_descriptions_64k.json; default: categories only")
    parser.add_argument("--instructions", choices=("template", "none"), default="none",
                        help="template: simple sentences; none: to be written by `python data.py instruct`")


def read_samples(folders: list[tuple[Path, str]], task: str) -> Iterator[tuple[Path, str, dict | str]]:
    """(folder, part, what read_sample returns or why the sample is skipped), in order, read ahead by threads."""
    def read(entry: tuple[Path, str]) -> tuple[Path, str, dict | str]:
        try:
            return *entry, read_sample(task, entry[0])
        except Unusable as reason:
            return *entry, str(reason)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for i in range(0, len(folders), 64):
            yield from threads.map(read, folders[i:i + 64])


def main(args: Namespace) -> None:
    if args.reverse and args.task in ("remove", "insert"):
        raise ValueError(f"--reverse is for movements; the way back of {args.task} is --task "
                         f"{'insert' if args.task == 'remove' else 'remove'}.")
    if args.seed < 0 or args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1 and --seed at least 0, not {args.limit} and {args.seed}.")
    captions = read_captions(args.captions)
    folders, stray = sample_folders(args.root, args.task, args.split, args.seen, args.seed)
    limit, votes = args.limit or len(folders), args.task in ("translate", "insert")
    taken, names, voters, skipped, looked = [], set(), [], Counter(), 0
    for folder, part, sample in read_samples(folders, args.task):
        if isinstance(sample, dict) and len(voters) < VOTERS:
            voters.append(sample)
        if len(taken) < limit:
            looked += 1
            if isinstance(sample, str):
                skipped[sample] += 1
            elif folder.name in names:
                skipped["name of a sample taken already"] += 1  # among the unseen and the seen ones
            else:
                names.add(folder.name)
                taken.append((folder, part, sample))
            print(f"\rreading: {looked} samples, {len(taken)} taken ", end="", file=sys.stderr, flush=True)
        elif not votes or len(voters) == VOTERS:  # a small --limit still gets its voters
            break
    print(file=sys.stderr)
    if not taken:
        raise ValueError(f"None of {looked} samples of {args.root} can be used: "
                         + (", ".join(f"{reason} {n}" for reason, n in skipped.most_common()) or "there are none") + ".")

    where = "centroid_tgt" if args.task == "translate" else "centroid_ref"  # the masks' order: insert is not yet exchanged
    direction, vote = y_direction(voters, where) if votes else (None, "")
    rows = [make_row(args, folder, part, sample, swap, direction, captions) for folder, part, sample in taken
            for swap in ((False, True) if args.reverse else (args.task == "insert",))]
    for row in rows if args.instructions == "template" else ():
        if sentence := template(args.out, row):
            row["instruction"] = sentence
            row["checks"]["instruction"] = "template"
    write_rows(args.out, rows)

    remarks = Counter(remark for _, _, sample in taken for remark in sample["remarks"])
    remarks["an alpha channel, dropped in a copy"] = sum(not all(sample["opaque"].values()) for _, _, sample in taken)
    remarks["uid without caption"] = sum(s["object"].get("uid") not in captions for _, _, s in taken) if captions else 0
    for part in ("train", "seen", "unseen"):
        remarks[f"of {part} objects"] = sum(p == part for _, p, _ in taken)
    print(f"{args.out}: {len(rows)} rows of {args.task}, {args.split}, "
          f"{sum('instruction' in row for row in rows)} of them with an instruction")
    print(f"{looked:8} samples looked at, of {len(folders)}" + f"; {stray} stray files beside them" * (stray > 0))
    for title, total, counts in (("taken, of these", len(taken), remarks),
                                 ("skipped, of these", looked - len(taken), skipped)):
        print(f"{total:8} {title}", *(f"{n:10}   {text}" for text, n in counts.most_common() if n), sep="\n")
    if vote:
        print(vote)
    if remarks["edited label is not 1"]:
        print("Warning: label 1 should be the edited object; where another label changes most, that one is taken for it.")
