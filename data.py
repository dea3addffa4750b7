"""Pictures and triples: reading any picture, the one resize rule, triples as JSON lines and where they come from.

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

import json
import math
import os
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
    return Path(os.path.relpath(Path(path).resolve(), Path(file).resolve().parent)).as_posix()


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

    Rims may be antialiased. A blend of two colours is often nearest to a third one (orange on black to brown), so a pixel
    that is not within 20 levels (Euclidean) of a colour takes the nearest of those that are seen pure at most two pixels
    away, black and white (both background) among them; 0 if there are none. Pixels less than half opaque are background.
    """
    pixels = read_picture(path, lambda image: np.array(image.convert("RGBA")))
    solid = pixels[..., 3] >= 128
    rgb = pixels[..., :3].astype(np.int32)
    if solid.any():  # else the alpha channel says nothing
        rgb[~solid] = 0
    colours = np.concatenate([[(0, 0, 0), (255, 255, 255)], SET1]).astype(np.int32)
    distance = np.stack([((rgb - colour) ** 2).sum(-1) for colour in colours])  # (11, H, W), squared
    nearest = distance.argmin(0)
    pure = distance.min(0) <= 20**2
    if not pure.all():
        (H, W), y, x = pure.shape, *np.nonzero(~pure)
        padded = np.pad(np.where(pure, nearest, -1), 2, constant_values=-1)
        around = np.stack([padded[y + i, x + j] for i in range(5) for j in range(5)])  # (25, pixels)
        seen = (around[:, None] == np.arange(len(colours))[:, None]).any(0)  # (11, pixels)
        blends = np.where(seen, distance[:, y, x], np.iinfo(np.int32).max)
        nearest[y, x] = np.where(seen.any(0), blends.argmin(0), 0)
    return np.maximum(nearest - 1, 0).astype(np.uint8)  # black 0, white 1 -> 0
