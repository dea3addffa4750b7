"""Every kind of input picture, and the resize rule.

    pytest tests/test_images.py
"""

import numpy as np
import pytest
from PIL import Image

from data import open_image, resize, save_png, side_by_side, working_size

RED, WHITE = (255, 0, 0), (255, 255, 255)


def corner(size=(6, 4), color=RED):
    """White picture, 2 x 2 pixels of `color` in its upper left corner."""
    image = Image.new("RGB", size, WHITE)
    image.paste(color, (0, 0, 2, 2))
    return image


def check(path, expected, tolerance=0):
    image = open_image(path)
    assert image.dtype == np.uint8 and image.shape == np.asarray(expected).shape
    assert np.abs(image.astype(int) - np.asarray(expected).astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    # orientation k: how the stored picture must be turned; so we store the inverse turn of the upright one
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose values
    upright = corner()
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    check(tmp_path / "x.png", upright)


def test_alpha_on_white(tmp_path):
    rgba = corner().convert("RGBA")
    rgba.putpixel((0, 0), (255, 0, 0, 0))  # invisible
    rgba.putpixel((1, 0), (255, 0, 0, 127))  # half
    expected = np.array(corner())
    expected[0, 0], expected[0, 1] = WHITE, (255, 128, 128)
    rgba.save(tmp_path / "x.png")
    check(tmp_path / "x.png", expected)
    grey = Image.new("LA", (3, 2), (0, 255))
    grey.putpixel((0, 0), (0, 0))
    grey.save(tmp_path / "y.png")
    expected = np.zeros((2, 3, 3))
    expected[0, 0] = 255
    check(tmp_path / "y.png", expected)


def test_palette(tmp_path):
    palette = corner().convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "x.png")
    check(tmp_path / "x.png", corner())
    palette.save(tmp_path / "y.png", transparency=palette.getpixel((0, 0)))
    check(tmp_path / "y.png", Image.new("RGB", (6, 4), WHITE))


def test_grey_bilevel_and_cmyk(tmp_path):
    levels = np.array([[0, 100, 255]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    check(tmp_path / "grey.png", levels[..., None].repeat(3, -1))
    Image.fromarray(levels > 50).save(tmp_path / "bilevel.png")
    check(tmp_path / "bilevel.png", 255 * (levels > 50)[..., None].repeat(3, -1))
    corner().convert("CMYK").save(tmp_path / "cmyk.tif")
    check(tmp_path / "cmyk.tif", corner())
    corner((16, 16), (0, 0, 0)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert open_image(tmp_path / "cmyk.jpg")[12:].min() > 240  # white stays white


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit(tmp_path, name):
    levels = np.array([[0, 128, 25700, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / name)
    check(tmp_path / name, np.array([[0, 0, 100, 255]])[..., None].repeat(3, -1))


def test_32_bit(tmp_path):
    Image.fromarray(np.array([[0, 25700, 65535]], np.int32)).save(tmp_path / "i.tif")
    check(tmp_path / "i.tif", np.array([[0, 100, 255]])[..., None].repeat(3, -1))
    Image.fromarray(np.array([[0, 0.4, 1.0]], np.float32)).save(tmp_path / "f.tif")
    check(tmp_path / "f.tif", np.array([[0, 102, 255]])[..., None].repeat(3, -1))


def test_one_pixel_and_animation(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "x.png")
    check(tmp_path / "x.png", [[RED]])
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, WHITE)]
    for name in ("x.gif", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        check(tmp_path / name, frames[0], tolerance=1)


def test_errors_are_sentences(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file"):
        open_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "cut.png", "empty.jpg"):
        with pytest.raises(ValueError, match=f"{name}, found a file that cannot be read"):
            open_image(tmp_path / name)


def test_working_size():
    assert working_size(512, 512, 512**2) == (512, 512)
    assert working_size(1080, 1920, 512**2) == (384, 688)  # 384.0 x 682.7
    assert working_size(1920, 1080, 512**2) == (688, 384)
    assert working_size(333, 100, 128**2, square=True) == (128, 128)
    for height, width in ((1, 1), (1, 5000), (5000, 1), (37, 91)):
        h, w = working_size(height, width, 512**2)
        assert h % 16 == 0 and w % 16 == 0 and min(h, w) >= 16 and 0.9 < h * w / 512**2 < 1.1


def blob(height, width, row, column, radius):
    """Grey picture with a dark soft blob at the given centre; pixel i covers [i, i + 1]."""
    r, c = np.arange(height)[:, None] + 0.5 - row, np.arange(width) + 0.5 - column
    shade = 200 - 150 * np.exp(-(r**2 + c**2) / (2 * radius**2))
    return np.rint(shade)[..., None].repeat(3, -1).astype(np.uint8)


def centroid(image):
    darkness = np.clip(198.0 - image[..., 0], 0, None)
    rows, columns = np.indices(darkness.shape) + 0.5
    return np.array([(darkness * rows).sum(), (darkness * columns).sum()]) / darkness.sum()


@pytest.mark.parametrize("size", [(300, 451), (97, 64), (1000, 700)])
@pytest.mark.parametrize("square, area", [(True, 128**2), (False, 512**2)])
def test_resize_there_and_back_shifts_nothing(size, square, area):
    height, width = size
    image = blob(height, width, 0.31 * height, 0.73 * width, 0.08 * min(size))
    h, w = working_size(height, width, area, square)
    small = resize(image, h, w)
    back = resize(small, height, width)
    assert back.shape == image.shape
    scale = np.array([h / height, w / width])
    assert np.abs(centroid(small) - scale * centroid(image)).max() < 0.05  # pixels
    assert np.abs(centroid(back) - centroid(image)).max() < 0.05 * max(1, *(1 / scale))


def test_png_text(tmp_path):
    image = side_by_side([np.array(corner())] * 3, gap=1)
    assert image.shape == (4, 20, 3)
    text = {"prompt": "déplace 苹果 “red”\nto the left", "seed": "3"}
    save_png(tmp_path / "new" / "x.png", image, text)
    with Image.open(tmp_path / "new" / "x.png") as saved:
        assert saved.text == text
        assert np.array_equal(np.array(saved), image)
