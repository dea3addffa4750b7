"""A benchmark: a folder with benchmark.jsonl in the format of data.py, and a folder of output pictures for each method.

Rows hold a source and an instruction; truth, masks and the scene without the moved object where they are known. Outputs
are pictures named by id, so that any method's can be scored. Here: reading, running our model over a benchmark, measuring
what each row allows, and composing a benchmark like the paper's SpatialBench (100 photographs, 50 OBJect test pairs).
"""

import csv
import hashlib
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import (
    PICTURES, open_image, read_labels, read_mask, read_rows, resize, resolve, save_png, working_size, write_rows,
)
from evaluation import metrics
from model.depth import depth_image
from model.text import unknown_words
from scenes import known_words

SUFFIXES = tuple(dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", *Image.registered_extensions())))
COLUMNS = ("placed", *metrics.NAMES, *metrics.NAMES_WITHOUT_TRUTH, "depth_order")


def read_benchmark(path: str | Path) -> tuple[Path, list[dict]]:
    """The benchmark's file (`path`, or benchmark.jsonl in the folder `path`) and its rows. ValueError where two ids would
    share one file name, or a `box_tgt` is no box; other errors as data.read_rows."""
    file = Path(path) / "benchmark.jsonl" if Path(path).is_dir() else Path(path)
    rows, names = read_rows(file, ("id", "ref", "instruction")), {}
    for row in rows:
        other = names.setdefault(output_name(row["id"]).lower(), row["id"])
        if other != row["id"]:
            raise ValueError(f"{file}: the ids {other!r} and {row['id']!r} name the same output picture; rename one.")
        if "box_tgt" in row:
            check_box(f"{file}, {row['id']!r}", row["box_tgt"])
    return file, rows


def check_box(where: str, box) -> None:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"{where}: expected box_tgt as left, top, right, bottom in 0..1, y down, found {box}.")


def output_name(id: str) -> str:
    return id.replace("/", "_")


def output_path(folder: str | Path, id: str) -> Path:
    """The picture of `id` in a folder of outputs: `<id, / replaced by _>` with any suffix that Pillow reads; where there
    is none, the PNG that would be it."""
    candidates = [Path(folder) / (output_name(id) + suffix) for suffix in SUFFIXES]
    candidates += [path.with_name(output_name(id) + suffix.upper()) for path, suffix in zip(candidates, SUFFIXES)]
    return next((path for path in candidates if path.is_file()), candidates[0])


# What a row knows


@dataclass
class Sample:
    """A row's pictures and masks at its source's size, None where the row has none; what metrics.measure expects."""

    ref: np.ndarray  # (H, W, 3) uint8
    tgt: np.ndarray | None = None
    empty: np.ndarray | None = None
    mask_ref: np.ndarray | None = None  # (H, W) bool
    mask_tgt: np.ndarray | None = None  # from mask_tgt or, of a row without truth, box_tgt
    others: list[np.ndarray] = field(default_factory=list)  # masks of the other labelled objects in the target
    depth_tgt: np.ndarray | None = None  # (H, W), near is large
    wrong: dict = field(default_factory=dict)  # rendered pairs have wrong answers, rows have none
    swapped: np.ndarray | None = None
    amodal_tgt: np.ndarray | None = None


def read_sample(file: Path, row: dict) -> Sample:
    """Everything a row offers. ValueError where the pictures of a row differ in size; masks may, and are resized."""
    found = {key: open_image(resolve(file, row, key)) for key in ("ref", "tgt", "empty", "depth_tgt") if row.get(key)}
    height, width = size = found["ref"].shape[:2]
    for key, picture in found.items():
        if picture.shape[:2] != size:
            raise ValueError(f"{file}: {key} of {row['id']!r} is {picture.shape[1]} x {picture.shape[0]}, its ref "
                             f"{width} x {height}; the pictures of a row must have one size.")
    sample = Sample(**found, **{key: read_mask(file, row, key, size) for key in ("mask_ref", "mask_tgt")})
    if sample.depth_tgt is not None:
        sample.depth_tgt = sample.depth_tgt[..., 0].astype(float)
    if sample.mask_tgt is None and sample.tgt is None and "box_tgt" in row:
        left, top, right, bottom = (round(x * side) for x, side in zip(row["box_tgt"], (width, height) * 2))
        sample.mask_tgt = np.zeros(size, bool)
        sample.mask_tgt[top:max(bottom, top + 1), left:max(right, left + 1)] = True
    if row.get("mask_label") and sample.mask_tgt is not None:
        labels = np.array(Image.fromarray(read_labels(resolve(file, row, "mask_tgt"))).resize((width, height), 0))
        sample.others = [labels == label for label in np.unique(labels) if label not in (0, row["mask_label"])]
    return sample


def measure(edit: np.ndarray, sample: Sample, depth_model=None) -> dict[str, float]:
    """What can be measured of one edit, brought to the source's size first: with truth metrics.measure and, with `empty`,
    `placed`; with neither, but both regions, metrics.measure_without_truth.

    placed: 1 if effect_iou > 0.5, ghost < 0.3 and bg_psnr > 25, which is `success` without its comparison to the
    autoencoder (other methods have others). depth_order: metrics.order_agreement by a depth model, against the exact depth
    or, without it, the model's depth of the truth.
    """
    edit = resize(edit, *sample.ref.shape[:2])
    regions = sample.mask_ref is not None and sample.mask_tgt is not None
    if sample.tgt is None:
        return metrics.measure_without_truth(edit, sample.ref, sample.mask_ref, sample.mask_tgt) if regions else {}
    found = metrics.measure(edit, sample)
    if "effect_iou" in found:
        found["placed"] = metrics.success(found, ceiling_bg_psnr=-np.inf)
    if depth_model is not None and sample.others and sample.mask_tgt is not None:
        def disparity(picture):
            device = next(depth_model.parameters()).device
            return depth_image(depth_model, torch.from_numpy(picture)[None].to(device))[0].cpu().numpy()
        truth = disparity(sample.tgt) if sample.depth_tgt is None else sample.depth_tgt
        found["depth_order"] = metrics.order_agreement(disparity(edit), truth, sample.mask_tgt, sample.others)
    return found


# Our model over a benchmark


def noise_seed(seed: int, id: str) -> int:
    """The noise of one row: the same whatever other rows there are, and in whatever order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:6], "big")


def generate(editor, file: Path, rows: list[dict], folder: Path, seed: int, steps: int, guidance: float,
             overwrite: bool = False) -> int:
    """Edits every row with a spatialdiff.Editor, as sample.py edits one picture, into a folder of outputs.

    Each picture carries its settings as PNG text. One that is there already is kept if its settings are these, so that a
    stopped run goes on; ValueError if they are others, unless `overwrite`. Returns the number of pictures made.
    """
    preset = editor.preset
    if unknown := {word: row["id"] for row in rows for word in unknown_words(editor.tokenizers[0], row["instruction"])}:
        raise ValueError(f"The preset {preset.name} does not know the words {', '.join(unknown)} (first in "
                         f"{next(iter(unknown.values()))!r}). It knows {known_words(editor.tokenizers[0].get_vocab())}.")
    parts = [p for p in ("connector", "spatial_head", "lora", "t5", "clip", "vae", "mmdit", "vggt") if p in editor.sources]
    digest = hashlib.sha256("".join(editor.sources[part].digest() for part in parts).encode()).hexdigest()  # as sample.py's
    settings = {"steps": str(steps), "guidance": str(guidance), "preset": preset.name,
                "spatial_tokens": "no" if editor.vggt is None else "yes", "weights_sha256": digest}
    todo = []
    for row in rows:
        path = output_path(folder, row["id"])
        text = {"prompt": row["instruction"], "seed": str(noise_seed(seed, row["id"])), **settings}
        if path.is_file() and not overwrite:
            with Image.open(path) as image:
                theirs = getattr(image, "text", {})
            if differ := [key for key in text if theirs.get(key) != text[key]]:
                raise ValueError(f"{path} was made with another {', '.join(differ)}. Give another --output, or --overwrite "
                                 "to replace such pictures.")
        else:
            todo.append((row, path, text))
    start = time.time()
    for done, (row, path, text) in enumerate(todo, 1):
        picture = open_image(resolve(file, row, "ref"))
        height, width = picture.shape[:2]
        small = resize(picture, *working_size(height, width, preset.side**2, square=not preset.keep_aspect))
        edit = editor.edit(small[None], [row["instruction"]], [int(text["seed"])], steps, guidance)[0]
        path = Path(folder) / f"{output_name(row['id'])}.png"
        save_png(f"{path}.tmp", resize(edit, height, width), text)
        os.replace(f"{path}.tmp", path)
        left = (time.time() - start) / done * (len(todo) - done)
        print(f"\redited {done}/{len(todo)}, {left / 60:.1f} min left ", end="\n" * (done == len(todo)), file=sys.stderr,
              flush=True)
    return len(todo)


# Composition


def read_photographs(path: Path) -> list[dict]:
    """Photographs with instructions, as rows with absolute paths.

    path: a CSV file with the columns image, instruction and optionally mask_ref, mask_tgt, box_tgt ("0.1 0.2 0.5 0.6"),
    paths relative to it; or a folder with such a file named instructions.csv, or with a text file beside each photograph
    (x.jpg, x.txt). Photographs without an instruction are left out. ValueError for a table without these columns.
    """
    table = path / "instructions.csv" if path.is_dir() else path
    rows = []
    if table.is_file():
        with open(table, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not {"image", "instruction"} <= set(reader.fieldnames or ()):
                raise ValueError(f"Expected the columns image and instruction in {table}, found {reader.fieldnames}.")
            for line in reader:
                row = {key: str((table.parent / line[name]).resolve())
                       for key, name in (("ref", "image"), ("mask_ref", "mask_ref"), ("mask_tgt", "mask_tgt")) if line.get(name)}
                if line.get("box_tgt"):
                    words = line["box_tgt"].replace(",", " ").split()
                    row["box_tgt"] = [float(x) if re.fullmatch(r"\d*\.?\d+", x) else x for x in words]
                    check_box(f"{table}, {line['image']}", row["box_tgt"])
                rows.append(row | {"instruction": (line["instruction"] or "").strip()})
    elif path.is_dir():
        for picture in sorted(path.iterdir()):
            text = picture.with_suffix(".txt")
            if picture.suffix.lower() in SUFFIXES and text.is_file():
                rows.append({"ref": str(picture.resolve()), "instruction": text.read_text(encoding="utf-8-sig").strip()})
    else:
        raise FileNotFoundError(f"Expected photographs in {path}, a folder or a CSV file, found neither.")
    return [row for row in rows if row.get("ref") and row["instruction"]]


def compose(photos: Path | None, objedit: Path | None, folder: Path, photo_count: int = 100, pair_count: int = 50,
            seed: int = 0) -> list[dict]:
    """A benchmark of photographs and OBJect test pairs in one folder that can be moved, as rows of the groups "complex" and
    "object"; the counts are the paper's. ValueError, before anything is written, where there are fewer, a picture is
    damaged, or `folder` holds a benchmark already.

    Drawn at random by `seed` from those with an instruction; of a pair and its reverse, only the pair is taken.
    """
    if (folder / "benchmark.jsonl").exists():
        raise ValueError(f"{folder} holds a benchmark already; give another --out.")
    photographs = read_photographs(photos) if photos and photo_count else []
    pairs = [row | {key: str(resolve(objedit, row, key).resolve()) for key in PICTURES if row.get(key)}
             for row in (read_rows(objedit, ("id", "ref", "tgt")) if objedit and pair_count else ())
             if row.get("instruction") and not row["id"].endswith("~")]
    chosen = []
    for group, count, rows, what, place in (
            ("complex", photo_count, photographs, "photographs with an instruction", photos or "--photos"),
            ("object", pair_count, pairs, "test pairs with an instruction", objedit or "--objedit")):
        if len(rows) < count:
            raise ValueError(f"Expected {count} {what} in {place}, found {len(rows)}. Add more, or give --{group} {len(rows)}.")
        rows = sorted(rows, key=lambda row: row.get("id", row["ref"]))
        for n, row in enumerate(random.Random(seed).sample(rows, count)):
            source = row.get("source", {"kind": "photograph"}) | {"id": row.get("id", Path(row["ref"]).name)}
            chosen.append(row | {"id": f"{group}/{n:03}", "group": group, "source": source})
    if not chosen:
        raise ValueError("A benchmark needs rows; --complex and --object are both 0.")
    for row in chosen:
        for key in PICTURES:
            if row.get(key):
                open_image(row[key])
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for row in chosen:
        for key in PICTURES:
            if row.get(key):
                name = f"pictures/{output_name(row['id'])}_{key}{Path(row[key]).suffix.lower()}"
                shutil.copyfile(row[key], folder / name)
                row[key] = name
    write_rows(folder / "benchmark.jsonl", chosen)
    return chosen
