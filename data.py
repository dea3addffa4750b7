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
    box_tgt              optional [left, top, right, bottom] in 0..1, y down: where the object should go, for photographs
    end_xy               optional [x, y] in 0..1, y down: where the object goes
    split, group, relation    optional strings, for tables
    source, checks       objects: where the row comes from; what was measured or decided on the way
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
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
KINDS = {"id": str, **dict.fromkeys(PICTURES, str), "instruction": str, "mask_label": int, "box_tgt": list, "object": dict,
         "objects": dict, "end_xy": list, "split": str, "group": str, "relation": str, "source": dict, "checks": dict}
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
            found = "it empty" if missing[0] in row else f"only: {', '.join(row)}"
            raise ValueError(f"{where}: expected the key {missing[0]!r}, found {found}.")
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


def main() -> None:
    from triples import check, instruct, objedit, pairs, rendered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {"objedit": objedit, "pairs": pairs, "scenes": rendered, "instruct": instruct, "check": check}
    for name, module in modules.items():
        title, _, rest = module.__doc__.partition("\n\n")
        module.add_arguments(commands.add_parser(name, help=title, description=f"{title}\n\n{rest}",
                                                 formatter_class=argparse.RawDescriptionHelpFormatter))
    args = parser.parse_args()
    try:
        if hasattr(args, "out") and args.out.suffix != ".jsonl":
            raise ValueError(f"--out must end in .jsonl, not {args.out}.")
        sys.exit(modules[args.command].main(args))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    from data import main  # the same module that triples/ imports, not a second copy
    main()
