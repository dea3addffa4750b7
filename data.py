"""Pictures: reading any file, the one resize rule, writing PNGs.

Training, sampling and evaluation all take their pictures through the functions here, so that reference, target and
output cover exactly the same view. Pictures are uint8 arrays (H, W, 3), RGB.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

# Pictures


def open_image(path: str | Path) -> np.ndarray:
    """The picture at `path` as uint8 (H, W, 3), RGB, upright.

    EXIF rotation is applied, transparency is put on white, 16-bit values are scaled to 8, of an animation the first
    frame is taken. FileNotFoundError if there is no file; ValueError if it cannot be read to its end.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a picture at {path}, found no file.")
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # grey, 16 bits or floats in [0, 1]: Pillow's own conversion clips
                values = np.asarray(image, np.float64) * (255 if image.mode == "F" else 255 / 65535)
                image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        raise ValueError(f"Expected a picture at {path}, found a file that cannot be read as one ({error}).") from error


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
