"""A small made-up OBJect-3DIT tree with every irregularity that is documented, or found in data of this kind.

    python tests/fake_objedit.py ROOT

Discs and boxes on a floor, in the files, layout and metadata that triples/objedit.py describes. Nothing of the real data
set is in it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Written out again, so that a wrong palette in data.py cannot agree with itself.
PALETTE = [(0, 0, 0), (228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (255, 127, 0), (255, 255, 51),
           (166, 86, 40), (247, 129, 191), (153, 153, 153)]
CATEGORIES = ["mug", "chair", "lamp", "boat", "shoe"]
FINE = 5  # subsamples a side: odd, so that no rim pixel is half one colour and half another


def draw_labels(side: int, things: list[tuple[int, float, float]], fine: int = 1) -> np.ndarray:
    """Labels (side * fine, side * fine) of things (label, x, y in 0..1); odd labels are discs, even ones boxes."""
    n, r = side * fine, 0.11 * side * fine
    image = Image.new("L", (n, n))
    draw = ImageDraw.Draw(image)
    for label, x, y in things:
        (draw.ellipse if label % 2 else draw.rectangle)([x * n - r, y * n - r, x * n + r, y * n + r], fill=label)
    return np.asarray(image)


def picture(labels: np.ndarray, rng) -> np.ndarray:
    """A textured floor with the labels' objects, (H, W, 3) uint8; none of the colours is the palette's."""
    floor = rng.integers(170, 200, (*labels.shape, 3))
    paint = np.array([(0, 0, 0), *((20 * k, 250 - 25 * k, (90 * k) % 256) for k in range(1, 10))])
    return np.where(labels[..., None] > 0, paint[labels], floor).astype(np.uint8)


def blend(fine: np.ndarray) -> np.ndarray:
    """Subsampled labels to an antialiased colour mask, as a renderer or a resize leaves it."""
    colours = np.array(PALETTE, float)[fine]
    n = len(fine) // FINE
    return np.rint(colours.reshape(n, FINE, n, FINE, 3).mean((1, 3))).astype(np.uint8)


def majority(fine: np.ndarray) -> np.ndarray:
    """The label that most of each pixel's subsamples show."""
    n = len(fine) // FINE
    blocks = fine.reshape(n, FINE, n, FINE).swapaxes(1, 2).reshape(n, n, -1)
    return np.stack([(blocks == k).sum(-1) for k in range(10)], -1).argmax(-1).astype(np.uint8)


def make_sample(folder: Path, task: str = "translate", seed: int = 0, odd: str = "", y_up: bool = False, side: int = 64) -> dict:
    """Writes one sample and returns its truth: labels before and after, place (x, y down) after, metadata.

    `odd` names an irregularity: see ODD and DAMAGED below.
    """
    rng = np.random.default_rng(seed)
    cells = [(x, y) for x in (0.16, 0.5, 0.84) for y in (0.16, 0.5, 0.84)]
    places = [cells[i] for i in rng.permutation(9)]
    label = 3 if odd == "label 3" else 1
    others = [(k, *places[k]) for k in (1, 2, 3, 8) if k != label and k < 9][: int(rng.integers(1, 4))]
    (x0, y0), (x1, y1) = places[4], places[5]
    if odd == "still":
        x1, y1 = x0 + 1 / side, y0
    before, after = [*others, (label, x0, y0)], [*others, (label, x1, y1)]
    if task == "remove":
        x1, y1, after = x0, y0, others
    if task == "rotate":
        after = [*others, (label, x0 + 1 / side, y0)]
    folder.mkdir(parents=True)
    fine = [draw_labels(side, things, FINE) for things in (before, after)]
    labels = [majority(f) for f in fine]
    if odd == "invisible":
        labels[1] = np.where(labels[1] == label, 0, labels[1])
        labels[1][:2, :2] = label  # 4 of 64 x 64 pixels
        fine[1] = labels[1].repeat(FINE, 0).repeat(FINE, 1)
    pictures = [picture(x, rng) for x in labels]
    masks = [blend(f) for f in fine]

    metadata = {"object_data": [{"uid": f"uid{seed}", "category": CATEGORIES[seed % 5], "scale": 1.5}] + [
        {"uid": f"uid{seed}_{k}", "category": f"thing {k}"} for k, _, _ in others]}
    place = [x1, 1 - y1 if y_up else y1]
    if task == "translate":
        metadata |= {"end_location_2d": place, "translation_category": metadata["object_data"][0]["category"]}
    elif task == "rotate":
        metadata |= {"rotation_angle": float(rng.integers(20, 340)), "rotation_category": metadata["object_data"][0]["category"]}
    else:
        metadata |= {"removed_object_uid": f"uid{seed}", "removed_object_camera_coords": place}

    # Odd, but of use.
    if odd == "unknown keys":
        metadata |= {"camera": {"matrix": [[1, 0], [0, 1]]}, "version": None}
    elif odd == "no object_data":
        del metadata["object_data"]
    elif odd == "no category":
        del metadata["object_data"][0]["category"]
    elif odd == "no location":
        metadata.pop("end_location_2d", None)
    elif odd == "location outside":
        metadata["end_location_2d"] = [1.7, -0.2]
    elif odd == "big masks":
        masks = [m.repeat(2, 0).repeat(2, 1) for m in masks]
        labels = [x.repeat(2, 0).repeat(2, 1) for x in labels]
    elif odd == "clear masks":  # nothing where the alpha is 0, whatever the colour there says
        masks = [np.dstack([np.where(x[..., None] > 0, m, 77), (x > 0) * 255]).astype(np.uint8) for m, x in zip(masks, labels)]
    elif odd == "opaque":
        pictures = [np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]) for p in pictures]
    elif odd == "alpha":
        pictures = [np.dstack([p, np.where(x > 0, 255, 90).astype(np.uint8)]) for p, x in zip(pictures, labels)]
    # Not of use.
    elif odd == "other size":
        pictures[1] = pictures[1][:-8, :-8]
    elif odd == "other aspect":
        masks = [m[:-8] for m in masks]
    elif odd == "black masks":
        masks = [np.zeros_like(m) for m in masks]

    for name, array in zip(("1.png", "2.png", "1_mask.png", "2_mask.png"), pictures + masks):
        Image.fromarray(array).save(folder / name)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    verb, _, name = odd.partition(" ")
    if verb == "without":
        (folder / name).unlink()
    elif verb == "truncated":
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    elif odd == "broken json":
        (folder / "metadata.json").write_text('{"object_data": [{"uid": "a",')
    elif odd == "json list":
        (folder / "metadata.json").write_text("[1, 2]")
    elif odd == "empty file":
        (folder / "2_mask.png").write_bytes(b"")
    return {"labels": labels, "label": label, "place": (x1, y1), "metadata": metadata, "pictures": pictures}


ODD = ("unknown keys", "no object_data", "no category", "no location", "location outside", "big masks", "clear masks",
       "opaque", "alpha", "label 3")
DAMAGED = {  # irregularity: the reason it is skipped for
    **{f"without {name}": f"{name} is missing" for name in ("1.png", "2.png", "1_mask.png", "2_mask.png", "metadata.json")},
    "truncated 1.png": "1.png cannot be read", "truncated 2.png": "2.png cannot be read",
    "truncated 1_mask.png": "1_mask.png cannot be read", "empty file": "2_mask.png cannot be read",
    "broken json": "metadata.json cannot be read", "json list": "metadata.json cannot be read",
    "other size": "1 and 2 differ in size", "other aspect": "masks and pictures differ in aspect",
    "black masks": "no label colour in the masks", "invisible": "edited object below 0.2% of the pixels",
    "still": "object moves less than 3% of the side",
}


def make_tree(root: Path, y_up: bool = False, plain: int = 12) -> dict[str, dict]:
    """All tasks and splits. In translate/train: `plain` good samples, one of each in ODD, one of each in DAMAGED, stray
    files, an empty folder. The other parts have three good samples each. Returns {"TASK/UID": truth}."""
    truth, seed = {}, 0
    for task in ("translate", "rotate", "remove"):
        for part in ("train", "val/seen", "val/unseen", "test/seen", "test/unseen"):
            oddities = [""] * 3
            if (task, part) == ("translate", "train"):
                oddities = [""] * plain + list(ODD) + list(DAMAGED)
            for odd in oddities:
                seed += 1
                uid = f"{seed * 7919 % 10007:05}"  # the order of names is not that of the list
                truth[f"{task}/{uid}"] = make_sample(root / task / part / uid, task, seed, odd, y_up) | {"odd": odd}
    train = root / "translate" / "train"
    (train / ".DS_Store").write_bytes(b"\0")
    (train / "files.txt").write_text("1.png 2.png")
    (train / "empty").mkdir()
    return truth


def captions(root: Path, truth: dict[str, dict]) -> Path:
    """A captions file that describes every second object and leaves its category empty."""
    path = root / "objaverse_cat_descriptions_64k.json"
    objects = [data[0] for t in truth.values() if (data := t["metadata"].get("object_data"))]
    path.write_text(json.dumps({o["uid"]: {"category": "", "description": f"a small {o['uid']}"} for o in objects[::2]}))
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python tests/fake_objedit.py ROOT")
    print(len(make_tree(Path(sys.argv[1]))), "samples, some of them damaged on purpose")
