"""Exact metrics of a move on rendered pairs, where the truth is known to the pixel. numpy only.

Known per pair: reference x0, target x1, the scene without the moved object xe, the object's visible masks m0 and m1 in
x0 and x1, renders of wrong answers. Measured: an edit y. Pictures are (H, W, 3), uint8 or floats in [0, 1].

The *effect* of the object in a picture z is E(z) = max over channels |box3(z) - box3(xe)| > 0.10: the object and its
shadow, found by the same operator in y and in x1, so that no segmenter is needed.
"""

import numpy as np

PSNR_CAP = 50.0  # dB: an exact copy
EFFECT_THRESHOLD = 0.10
NAMES = ("effect_iou", "centroid_err", "ghost", "arrival", "bg_psnr", "bg_ssim", "obj_psnr", "obj_psnr_shift",
         "retrieval", "order", "psnr", "ssim")


def as_float(image: np.ndarray) -> np.ndarray:
    return image / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)


def box(x: np.ndarray, size: int) -> np.ndarray:
    """Mean over size x size windows (size odd) along the first two axes, the border repeated."""
    for axis in (0, 1):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (size // 2 + 1, size // 2)
        total = np.cumsum(np.pad(x, pad, mode="edge"), axis=axis, dtype=np.float64)
        n = x.shape[axis]
        x = (total.take(range(size, size + n), axis) - total.take(range(n), axis)) / size
    return x


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Mask (H, W) grown by `radius` pixels in every direction, diagonals included."""
    size = 2 * radius + 1
    return box(mask, size) * size**2 > 0.5


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of floats in [0, 1], inside mask (H, W); at most 50, nan for an empty mask."""
    squares = np.square(a - b)
    squares = squares if mask is None else squares[mask]
    if squares.size == 0:
        return float("nan")
    return float(min(PSNR_CAP, -10 * np.log10(max(squares.mean(), 1e-12))))


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (H, W) of floats in [0, 1]: Wang et al. 2004 with a uniform 7 x 7 window, mean of channels.

    Constants and the unbiased covariance are those of skimage.metrics.structural_similarity.
    """
    c1, c2, unbiased = 0.01**2, 0.03**2, 49 / 48
    ma, mb = box(a, 7), box(b, 7)
    var_a, var_b = (unbiased * (box(x * x, 7) - m * m) for x, m in ((a, ma), (b, mb)))
    cov = unbiased * (box(a * b, 7) - ma * mb)
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (var_a + var_b + c2))).mean(-1)


def obj_psnr_shift(y: np.ndarray, x1: np.ndarray, mask: np.ndarray, reach: int = 4) -> float:
    """The best PSNR inside mask over all shifts of y by up to `reach` pixels: identity, forgiving a small misplacement."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    r, c, r1, c1 = rows[0], cols[0], rows[-1] + 1, cols[-1] + 1
    padded = np.pad(y, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shifts = range(2 * reach + 1)
    return max(psnr(padded[r + i:r1 + i, c + j:c1 + j], x1[r:r1, c:c1], mask[r:r1, c:c1]) for i in shifts for j in shifts)


def projection(y: np.ndarray, start: np.ndarray, end: np.ndarray, region: np.ndarray) -> float:
    """How far y lies on the way from start (0) to end (1) inside region, clipped; nan where they do not differ."""
    way = (end - start)[region]
    if not (way**2).sum():
        return float("nan")
    return float(np.clip(((y - start)[region] * way).sum() / (way**2).sum(), 0, 1))


def centroid_error(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the centroids of two masks / image diagonal; 1 when a has fewer than 8 pixels (object lost)."""
    if a.sum() < 8 or not b.any():
        return 1.0
    distance = np.subtract(*(np.argwhere(mask).mean(0) for mask in (a, b)))
    return float(np.linalg.norm(distance) / np.linalg.norm(a.shape))


def measure(edit: np.ndarray, pair) -> dict[str, float]:
    """Every metric of NAMES for one edit of a `scenes.Pair` (rendered with extras).

    effect_iou: IoU(E(y), E(x1)).
    centroid_err: distance of the centroids of E(y) and E(x1) / image diagonal.
    ghost: what is left of the object where it stood, 0 clean to 1 unmoved; arrival: the same at the target, 1 is right.
    bg_psnr, bg_ssim: against x1 away from the move. obj_psnr: against x1 inside m1; obj_psnr_shift: best of +-4 px.
    retrieval: 1 if x1 is nearer to y than x0, xe and every wrong answer are, around the object's two places.
    order: share of pixels, where the moved object's depth order shows, that are nearer to x1 than to the swapped order;
    nan when nothing overlaps it. psnr, ssim: full picture.
    """
    y, x0, x1, xe = (as_float(image) for image in (edit, pair.ref, pair.tgt, pair.empty))
    if y.shape != x1.shape:
        raise ValueError(f"The edit is {y.shape[1]} x {y.shape[0]}, its scene {x1.shape[1]} x {x1.shape[0]}; "
                         "an edit must keep the size of its reference.")
    m0, m1 = pair.mask_ref, pair.mask_tgt
    smooth = box(xe, 3)
    effect_y, effect_0, effect_1 = ((np.abs(box(z, 3) - smooth) > EFFECT_THRESHOLD).any(-1) for z in (y, x0, x1))
    background = ~dilate(effect_0 | effect_1 | m0 | m1, 2)

    places = dilate(m0 | m1, 2)
    others = (x0, xe, *(as_float(image) for image in pair.wrong.values()))
    distance = ((y - x1)[places] ** 2).sum()
    order = float("nan")
    if pair.swapped is not None:
        swapped = as_float(pair.swapped)
        shows = pair.amodal_tgt & (swapped != x1).any(-1)
        if shows.any():
            order = float((((y - x1) ** 2).sum(-1) < ((y - swapped) ** 2).sum(-1))[shows].mean())

    similarity = ssim_map(y, x1)
    return {
        "effect_iou": float((effect_y & effect_1).sum() / max(1, (effect_y | effect_1).sum())),
        "centroid_err": centroid_error(effect_y, effect_1),
        "ghost": projection(y, xe, x0, m0 & ~dilate(m1, 1)),
        "arrival": projection(y, xe, x1, m1 & ~dilate(m0, 1)),
        "bg_psnr": psnr(y, x1, background),
        "bg_ssim": float(similarity[background].mean()) if background.any() else float("nan"),
        "obj_psnr": psnr(y, x1, m1),
        "obj_psnr_shift": obj_psnr_shift(y, x1, m1),
        "retrieval": float(all(distance < ((y - other)[places] ** 2).sum() for other in others)),
        "order": order,
        "psnr": psnr(y, x1),
        "ssim": float(similarity[3:-3, 3:-3].mean()),
    }


def success(values: dict[str, float], ceiling_bg_psnr: float) -> float:
    """1 for a right edit: moved to the place, gone from where it was, and the rest as good as the autoencoder allows.

    effect_iou > 0.5, ghost < 0.3, bg_psnr > 25 dB and within 3 dB of that of autoencoder(target) on the same scene.
    """
    return float(values["effect_iou"] > 0.5 and not values["ghost"] >= 0.3
                 and values["bg_psnr"] > 25 and values["bg_psnr"] >= ceiling_bg_psnr - 3)


def bootstrap(values, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of a list of numbers and its 95 % percentile bootstrap interval: (mean, low, high); nan entries are left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return (float("nan"),) * 3
    draws = np.random.default_rng(0).integers(values.size, size=(resamples, values.size))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)
