"""Pictures and triples: reading any picture, the one resize rule, triples as JSON lines and where they come from.

    python data.py objedit --root DATASET --task translate --split train --out data/train.jsonl --limit 20000 --reverse
    python data.py pairs --root FOLDER_OR_CSV --out data/mine.jsonl          your own pairs of pictures
    python data.py scenes --out data/scenes.jsonl --count 1000 --size 512    the rendered world, any size
    python data.py instruct data/train.jsonl --out data/train_vlm.jsonl --url http://localhost:8000/v1 --model MODEL
    python data.py check data/train_vlm.jsonl --sheet sheet.png              exit code 1 if there are problems

Training, sampling and evaluation all take their pictures through the functions here, so that reference, target and
output cover exactly the same view. Pictures are uint8 arrays (H, W, 3), RGB.

A file of triples (or a benchmark) is a NAME.jsonl, one JSON object a line, paths relative to the file's folder:

    id                   string, unique in the file
    ref, tgt             picture before and after; a benchmark row without truth has no tgt
    instruction          string; absent or null: not written yet
    mask_ref, mask_tgt   optional, visible pixels of the moved object: a black and white picture (> 127 is the object) or,
                         with `mask_label` (int, from 1), a picture of coloured labels (read_labels)
    empty, depth_tgt     optional, rendered scenes: the scene without the object; exact disparity of tgt, 16 bits,
                         0..65535 from far to near
    object               optional {uid, category, description} of the moved object; objects: {label: words} of the masks
    end_xy               optional [x, y] in 0..1, y down: where the object goes
    split, group, relation    optional strings, for tables
    source, checks       objects: where the row comes from; what was measured or decided on the way
"""

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

# Pictures


def read_picture(path: str | Path, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """`convert` of the picture at `path`, upright (EXIF), of an animation the first frame. FileNotFoundError if there is
    no file; ValueError if it cannot be read to its end."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a picture at {path}, found no file.")
    try:
        with Image.open(path) as image:
            image.load()
            return convert(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        raise ValueError(f"Expected a picture at {path}, found a file that cannot be read as one ({error}).") from error


def open_image(path: str | Path, background: str = "white") -> np.ndarray:
    """The picture at `path` as uint8 (H, W, 3), RGB, upright.

    EXIF rotation is applied, transparency is put on `background`, 16-bit values are scaled to 8, of an animation the
    first frame is taken. FileNotFoundError if there is no file; ValueError if it cannot be read to its end.
    """
    def convert(image: Image.Image) -> np.ndarray:
        if image.mode.startswith(("I", "F")):  # grey, 16 bits or floats in [0, 1]: Pillow's own conversion clips
            values = np.asarray(image, np.float64) * (255 if image.mode == "F" else 255 / 65535)
            image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return np.array(image.convert("RGB"))
    return read_picture(path, convert)


def working_size(height: int, width: int, area: int, square: bool = False) -> tuple[int, int]:
    """Height and width, multiples of 16, at which a picture is edited: about `area` pixels at the picture's aspect, or
    a square of that area whatever the aspect (the miniature, which was trained on squares)."""
    aspect = 1.0 if square else min(max(width / height, 256 / area), area / 256)  # no side below 16
    return tuple(16 * max(1, round(math.sqrt(a) / 16)) for a in (area / aspect, area * aspect))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole picture at another size: one Lanczos resize, no crop, no padding, corners on corners."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def side_by_side(images: list[np.ndarray], gap: int = 8) -> np.ndarray:
    """One picture of several of equal height, from left to right on white."""
    space = np.full((len(images[0]), gap, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (space, image)][1:], 1)


def save_png(path: str | Path, image: np.ndarray, text: dict[str, str] | None = None) -> None:
    """Write a PNG that carries `text` as text chunks; missing folders are made."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format="PNG", pnginfo=chunks)


# Triples as JSON lines

PICTURES = ("ref", "tgt", "mask_ref", "mask_tgt", "empty", "depth_tgt")  # the keys that hold paths
KINDS = {"id": str, **dict.fromkeys(PICTURES, str), "instruction": str, "mask_label": int, "object": dict, "objects": dict,
         "end_xy": list, "split": str, "group": str, "relation": str, "source": dict, "checks": dict}
JSON_NAMES = {str: "a string", int: "an integer", dict: "an object", list: "a list"}
# Colours of the labels 1 to 9 in OBJect-3DIT's masks: "Set1" of ColorBrewer.
SET1 = np.array([(228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (255, 127, 0), (255, 255, 51), (166, 86, 40),
                 (247, 129, 191), (153, 153, 153)], np.uint8)


def read_rows(path: str | Path, required: tuple[str, ...] = ("id", "ref")) -> list[dict]:
    """The rows of a JSON-lines file, in order. Keys that are null count as absent, unknown ones are kept.

    FileNotFoundError if there is no file; ValueError naming file and line for a line that is no JSON object, a missing
    or empty `required` key, a value of the wrong kind or a repeated id; ValueError if there are no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of JSON lines at {path}, found none.")
    rows, lines = [], {}  # id -> line
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{n}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object, found a line that cannot be read ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}.")
        row = {key: value for key, value in row.items() if value is not None}
        for key, value in row.items():
            if not isinstance(value, KINDS.get(key, object)) or isinstance(value, bool) and key in KINDS:
                raise ValueError(f"{where}: expected {JSON_NAMES[KINDS[key]]} as {key!r}, found {value!r}.")
        if missing := [key for key in ("id", *required) if not row.get(key)]:
            raise ValueError(f"{where}: expected the key {missing[0]!r}, found only: {', '.join(row)}.")
        if row["id"] in lines:
            raise ValueError(f"{where}: the id {row['id']!r} is that of line {lines[row['id']]} already; ids must differ.")
        lines[row["id"]] = n
        rows.append(row)
    if not rows:
        raise ValueError(f"Expected rows in {path}, found an empty file.")
    return rows


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """Writes all rows or nothing: under a temporary name first. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resolve(file: str | Path, row: dict, key: str) -> Path | None:
    """Where the picture `key` of a row lies; None if the row has none. `file` is the JSON-lines file."""
    return Path(file).parent / row[key] if row.get(key) else None


def relative(file: str | Path, path: str | Path) -> str:
    """`path` as a row of the JSON-lines file `file` names it."""
    return Path(os.path.relpath(os.path.abspath(path), Path(file).parent.resolve())).as_posix()


def read_mask(file: str | Path, row: dict, key: str, size: tuple[int, int] | None = None) -> np.ndarray | None:
    """`mask_ref` or `mask_tgt` of a row as bool (H, W), None if it has none. `size` (height, width) resizes to nearest
    pixels: masks may come at another size than their pictures. Transparent pixels are not the object."""
    path = resolve(file, row, key)
    if path is None:
        return None
    label = row.get("mask_label")
    mask = read_labels(path) == label if label else open_image(path, "black").max(-1) > 127
    if size is None or mask.shape == tuple(size):
        return mask
    return np.array(Image.fromarray(mask.view(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)).astype(bool)


def read_labels(path: str | Path) -> np.ndarray:
    """A picture of coloured labels as uint8 (H, W): k where it shows colour k of SET1, 0 elsewhere.

    Rims may be antialiased, and a blend of two colours is often close to a third one (red on green to brown). So only pixels
    of exactly a colour, or in a 2 x 2 block of one (within 20 levels, Euclidean), count as they are. Any other takes the
    nearest of such colours at most two pixels away, or if there are fewer than two, of all that are found there within 20
    levels; 0 if there are none. Black and white are background, as are pixels less than half opaque.
    """
    pixels = read_picture(path, lambda image: np.array(image.convert("RGBA")))
    opaque, rgb = pixels[..., 3] >= 128, pixels[..., :3].astype(np.int32)
    if opaque.any():  # else the alpha channel says nothing
        rgb[~opaque] = 0
    colours = np.concatenate([[(0, 0, 0), (255, 255, 255)], SET1]).astype(np.int32)
    distance = np.stack([((rgb - colour) ** 2).sum(-1) for colour in colours])  # (11, H, W), squared
    nearest, least = distance.argmin(0), distance.min(0)
    pure = np.where(least <= 20**2, nearest, -1)
    corner = pure[1:, 1:]
    block = (corner >= 0) & (corner == pure[:-1, 1:]) & (corner == pure[1:, :-1]) & (corner == pure[:-1, :-1])
    block = np.pad(block, 1)
    solid = np.where((least == 0) | block[1:, 1:] | block[1:, :-1] | block[:-1, 1:] | block[:-1, :-1], pure, -1)
    y, x = np.nonzero(solid < 0)
    padded = np.pad([solid, pure], ((0, 0), (2, 2), (2, 2)), constant_values=-1)
    around = np.stack([padded[:, y + i, x + j] for i in range(5) for j in range(5)], 1)  # (2, 25, pixels)
    of_solid, of_pure = (around[:, :, None] == np.arange(len(colours))[:, None]).any(1)  # each (11, pixels)
    allowed = np.where(of_solid.sum(0) >= 2, of_solid, of_pure)
    choice = np.where(allowed, distance[:, y, x], np.iinfo(np.int32).max).argmin(0)
    nearest[y, x] = np.where(allowed.any(0), choice, 0)
    return np.maximum(nearest - 1, 0).astype(np.uint8)  # black 0, white 1 -> 0


def paint_labels(labels: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) of labels (H, W), 0 to 9: what read_labels reads."""
    return np.concatenate([np.zeros((1, 3), np.uint8), SET1])[labels]


def measure_masks(mask_ref: np.ndarray, mask_tgt: np.ndarray) -> dict:
    """What a row's `checks` say of two masks (H, W): the share of the picture each takes, its centroid [x, y] in 0..1
    (none if it is empty), and how far the centroid moves, in sides of the picture."""
    found = {}
    for name, mask in (("ref", mask_ref), ("tgt", mask_tgt)):
        found[f"area_{name}"] = round(float(mask.mean()), 5)
        if mask.any():
            y, x = ((i.mean() + 0.5) / n for i, n in zip(np.nonzero(mask), mask.shape))
            found[f"centroid_{name}"] = [round(float(x), 4), round(float(y), 4)]
    if mask_ref.any() and mask_tgt.any():
        found["moved"] = round(math.dist(found["centroid_ref"], found["centroid_tgt"]), 4)
    return found


# Source: the user's own pairs


def pair_rows(root: Path, out: Path) -> tuple[list[dict], list[str]]:
    """Rows of the pairs at `root`, and a sentence for each thing that was left out or not understood.

    A CSV file (comma, semicolon or tab) has a header with ref, tgt and, if you like, instruction, mask_ref, mask_tgt, id;
    its paths are relative to its folder. A folder has, at any depth, NAME_ref.* and NAME_tgt.* (any kind of picture) and,
    if you like, NAME.txt (the instruction), NAME_mask_ref.png and NAME_mask_tgt.png. Masks are black and white.
    """
    if not root.exists():
        raise FileNotFoundError(f"Expected a folder or a CSV file of pairs at {root}, found nothing.")
    found, remarks = {}, []  # id -> {key: path or instruction}
    if root.is_dir():
        pictures, ambiguous = Image.registered_extensions(), set()
        for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")):
            match = re.fullmatch(r"(.+?)_(mask_ref|mask_tgt|ref|tgt)", path.stem)
            if path.suffix.lower() == ".txt":
                name, key, value = path.stem, "instruction", " ".join(path.read_text("utf-8-sig", "replace").split())
            elif match and path.suffix.lower() in pictures:
                (name, key), value = match.groups(), path
            else:
                remarks.append(f"{path.relative_to(root)}: not of the form NAME_ref.*, NAME_tgt.*, NAME.txt or NAME_mask_*.*.")
                continue
            name = (path.parent / name).relative_to(root).as_posix()
            if key in found.setdefault(name, {}):
                ambiguous.add(name)
                remarks.append(f"{name}: two pictures {name}_{key}.*; the pair is left out.")
            found[name][key] = value
        for name in ambiguous:
            del found[name]
    else:
        text = root.read_text("utf-8-sig", "replace")
        header = text.split("\n")[0]
        lines = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count))
        columns = [column.strip().lower() for column in next(lines, [])]
        if not {"ref", "tgt"} <= set(columns):
            raise ValueError(f"Expected a header with ref and tgt in {root}, found: {header.strip() or 'nothing'}.")
        if other := set(columns) - {"id", "instruction", *PICTURES[:4]}:
            remarks.append(f"Columns that mean nothing here: {', '.join(sorted(other))}.")
        for cells in lines:
            cells = {column: cell.strip() for column, cell in zip(columns, cells) if cell.strip()}
            if not cells:
                continue
            name = cells.get("id") or Path(cells.get("ref", "")).with_suffix("").as_posix()
            if name in found and "id" not in cells:
                name += f"#{lines.line_num}"  # several edits of one picture
            if name in found:
                remarks.append(f"{root.name}:{lines.line_num}: the id {name!r} is taken; the pair is left out.")
                continue
            found[name] = {key: root.parent / cell if key in PICTURES else cell
                           for key, cell in cells.items() if key in ("instruction", *PICTURES[:4])}
    rows = []
    for name, cells in found.items():
        absent = [key for key in ("ref", "tgt") if key not in cells]
        gone = [f"{value} is missing" for value in cells.values() if isinstance(value, Path) and not value.is_file()]
        if absent or gone:
            remarks.append(f"{name}: {', '.join([f'no {key}' for key in absent] + gone)}; the pair is left out.")
            continue
        paths = {key: relative(out, value) for key, value in cells.items() if isinstance(value, Path)}
        row = {"id": name, **paths, "source": {"kind": "pairs"}}
        if cells.get("instruction"):
            row |= {"instruction": cells["instruction"], "checks": {"instruction": "given"}}
        rows.append(row)
    if not rows:
        raise ValueError("\n".join([f"Expected pairs of pictures in {root}, found none that is whole.", *remarks]))
    return rows, remarks


# Source: the rendered world


def render_scene(task: tuple[Path, str, str, int, int, int]) -> dict:
    """Renders one move, writes its pictures beside the JSON-lines file and returns its row."""
    import scenes

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


def scene_rows(out: Path, count: int, level: str, split: str, size: int, seed: int) -> list[dict]:
    """`count` moves of the rendered world, pictures in the folder `out` without its suffix, one process per core. An older
    file `out` is removed first, for its pictures are overwritten."""
    if count < 1 or size < 16 or seed < 0:
        raise ValueError(f"--count must be at least 1, --size 16 and --seed 0, not {count}, {size} and {seed}.")
    out.unlink(missing_ok=True)
    tasks, rows, cores = [(out, level, split, size, seed, index) for index in range(count)], [], os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(min(cores, count // 8 + 1)) as pool:
        for row in pool.imap(render_scene, tasks, 4):
            rows.append(row)
            print(f"\rrendering: {len(rows)} of {count} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


# Check


def examine(file: Path, row: dict) -> tuple[list[tuple[str, str]], tuple[int, int] | None, str | None]:
    """Problems of one row as (kind, sentence), the reference's (height, width), a hash of what both pictures show."""
    problems, pictures = [], {}
    for key in (key for key in PICTURES if row.get(key)):
        try:
            if key.startswith("mask"):
                pictures[key] = read_mask(file, row, key)
            else:
                pictures[key] = open_image(resolve(file, row, key))
        except FileNotFoundError:
            problems.append(("missing file", f"{key}: {resolve(file, row, key)}"))
        except ValueError as error:
            problems.append(("unreadable picture", f"{key}: {error}"))
    ref, tgt = pictures.get("ref"), pictures.get("tgt")
    for key, picture in pictures.items():
        (H, W), (h, w) = (ref if ref is not None else picture).shape[:2], picture.shape[:2]
        # A mask may be smaller or larger than its picture, but it must show the same view.
        if abs(h * W - w * H) > max(h, w, H, W) if key.startswith("mask") else (h, w) != (H, W):
            problems.append(("sizes differ", f"{key} is {w} x {h}, ref is {W} x {H}"))
        if key.startswith("mask") and not picture.any():
            label = f" with label {row['mask_label']}" if "mask_label" in row else ""
            problems.append(("empty mask", f"{key}: no pixel{label} in {row[key]}"))
    if not row.get("instruction", "").strip():
        problems.append(("no instruction", "none is written yet"))
    if ref is not None and max(ref.shape[:2]) > 2.5 * min(ref.shape[:2]):
        problems.append(("odd aspect ratio", f"{ref.shape[1]} x {ref.shape[0]}; one side is over 2.5 times the other"))
    digest = None
    if ref is not None and tgt is not None:
        if np.array_equal(ref, tgt):
            problems.append(("ref equals tgt", "both pictures show the same"))
        digest = hashlib.sha256(b"".join(str(x.shape).encode() + x.tobytes() for x in (ref, tgt))).hexdigest()
    return problems, None if ref is None else ref.shape[:2], digest


def check(file: Path, rows: list[dict], most: int = 10) -> int:
    """Prints what a file of triples holds and every kind of problem, at most `most` rows of a kind by name (0: all of them).
    Returns the number of problems."""
    problems, sizes, first = {}, Counter(), {}  # kind -> sentences; (h, w) -> rows; content -> id
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for row, (found, size, digest) in zip(rows, threads.map(lambda row: examine(file, row), rows)):
            if digest and first.setdefault(digest, row["id"]) != row["id"]:
                found.append(("duplicate pair", f"the same two pictures as {first[digest]}"))
            for kind, sentence in found:
                problems.setdefault(kind, []).append(f"{row['id']}: {sentence}")
            sizes.update([size] * (size is not None))
    print(f"{file}: {len(rows)} rows, {sum('tgt' in row for row in rows)} with a target, "
          f"{sum('mask_ref' in row or 'mask_tgt' in row for row in rows)} with masks")
    origin = lambda row: " ".join(str(row["source"][key]) for key in ("kind", "task", "level") if key in row.get("source", {}))
    facts = {"source": Counter(map(origin, rows)),
             **{key: Counter(row.get(key, "") for row in rows) for key in ("split", "relation", "group")},
             "written by": Counter(str(row.get("checks", {}).get("instruction", "")) for row in rows),
             "size": Counter({f"{w} x {h}": n for (h, w), n in sizes.items()})}
    for name, counts in facts.items():
        if set(counts) - {""}:
            print(f"{name:13}" + ", ".join(f"{value or 'none'} {n}" for value, n in counts.most_common(12))
                  + f" and {len(counts) - 12} more" * (len(counts) > 12))
    words = sorted(len(row["instruction"].split()) for row in rows if row.get("instruction", "").strip())
    if words:
        print(f"{'instruction':13}{words[0]} to {words[-1]} words, median {words[len(words) // 2]}; "
              f"{len({row['instruction'] for row in rows if row.get('instruction')})} different ones")
    for kind, sentences in problems.items():
        print(f"\n{kind}: {len(sentences)}")
        shown = sentences[:most or None]
        print("\n".join(f"  {sentence}" for sentence in shown))
        if len(shown) < len(sentences):
            print(f"  and {len(sentences) - len(shown)} more; --all names them")
    total = sum(map(len, problems.values()))
    print(f"\n{total or 'no'} problem{'s' * (total != 1)} found")
    return total


def sheet(file: Path, rows: list[dict], height: int = 160) -> np.ndarray:
    """Contact sheet (H, W, 3): ref | tgt | id and instruction for each row, masks outlined, unreadable pictures grey."""
    lines = []
    for row in rows:
        panels = []
        for key, mask_key in (("ref", "mask_ref"), ("tgt", "mask_tgt")):
            try:
                picture = open_image(resolve(file, row, key)) if row.get(key) else np.full((1, 1, 3), 255, np.uint8)
                aspect = min(2, picture.shape[1] / picture.shape[0])
                picture = resize(picture, height, max(1, round(height * aspect)))
                mask = read_mask(file, row, mask_key, picture.shape[:2])
            except (ValueError, OSError):
                picture, mask = np.full((height, height, 3), 128, np.uint8), None
            if mask is not None:
                near = np.pad(mask, 1)
                inner = near[2:, 1:-1] & near[:-2, 1:-1] & near[1:-1, 2:] & near[1:-1, :-2]
                outer = near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
                picture = picture.copy()
                picture[outer & ~mask], picture[mask & ~inner] = (255, 255, 255), (255, 0, 120)
            panels.append(picture)
        text = Image.new("RGB", (2 * height, height), "white")
        words = "\n".join(textwrap.wrap(row.get("instruction") or "(no instruction)", 40))
        ImageDraw.Draw(text).text((4, 4), f"{row['id'][-44:]}\n\n{words}", fill="black", font=ImageFont.load_default(14))
        lines.append(np.pad(side_by_side([*panels, np.asarray(text)]), ((4, 4), (8, 8), (0, 0)), constant_values=255))
    width = max(line.shape[1] for line in lines)
    return np.concatenate([np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines])


def main() -> None:
    import scenes
    from triples import instruct, objedit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("objedit", help="triples of OBJect-3DIT")
    objedit.add_arguments(command)
    command = commands.add_parser("pairs", help="triples of your own pairs", description=pair_rows.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--root", type=Path, required=True, help="folder or CSV file")
    command.add_argument("--out", type=Path, required=True, help="JSON-lines file to write")
    command = commands.add_parser("scenes", help="triples of the rendered world")
    command.add_argument("--out", type=Path, required=True, help="JSON-lines file to write, pictures in a folder of its name")
    command.add_argument("--count", type=int, required=True)
    command.add_argument("--level", choices=scenes.LEVELS, default="plain")
    command.add_argument("--split", choices=tuple(scenes.SPLITS), default="train")
    command.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
    command.add_argument("--seed", type=int, default=0, help="which scenes; different seeds share none")
    instruct.add_arguments(commands.add_parser("instruct", help="instructions written by a vision-language model"))
    command = commands.add_parser("check", help="count, look for problems, draw a contact sheet")
    command.add_argument("file", type=Path)
    command.add_argument("--sheet", type=Path, help="PNG to write: rows of the whole file, evenly spaced")
    command.add_argument("--sheet-rows", type=int, default=24)
    command.add_argument("--all", action="store_true", help="name every row that has a problem, not ten of a kind")
    args = parser.parse_args()
    try:
        if hasattr(args, "out") and args.out.suffix != ".jsonl":
            raise ValueError(f"--out must end in .jsonl, not {args.out}.")
        if args.command == "objedit":
            objedit.main(args)
        elif args.command == "instruct":
            instruct.main(args)
        elif args.command == "pairs":
            rows, remarks = pair_rows(args.root, args.out)
            write_rows(args.out, rows)
            print("\n".join([*remarks, f"{args.out}: {len(rows)} pairs, {sum('instruction' in row for row in rows)} with an "
                             f"instruction, {sum('mask_ref' in row for row in rows)} with masks"]))
        elif args.command == "scenes":
            write_rows(args.out, scene_rows(args.out, args.count, args.level, args.split, args.size, args.seed))
            print(f"{args.out}: {args.count} {args.level} scenes of split {args.split}, {args.size} x {args.size}")
        else:
            rows = read_rows(args.file)
            count = check(args.file, rows, 0 if args.all else 10)
            if args.sheet:
                step = max(1, len(rows) / max(1, args.sheet_rows))
                save_png(args.sheet, sheet(args.file, [rows[int(i * step)] for i in range(min(len(rows), args.sheet_rows))]))
                print(f"{args.sheet}: {min(len(rows), args.sheet_rows)} of {len(rows)} rows")
            sys.exit(1 if count else 0)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    from data import main  # the same module that triples/ imports, not a second copy
    main()
