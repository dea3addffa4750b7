"""Metrics of a move: exact ones where the truth is known to the pixel, and what can be said without it.

Known per rendered pair: reference x0, target x1, the scene without the moved object xe, the object's visible masks m0 and
m1 in x0 and x1, renders of wrong answers. Measured: an edit y. Pictures are (H, W, 3), uint8 or floats in [0, 1].

The *effect* of the object in a picture z is E(z) = max over channels |box3(z) - box3(xe)| > 0.10: the object and its
shadow, found by the same operator in y and in x1, so that no segmenter is needed.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import scenes
from data import resize

PSNR_CAP = 50.0  # dB: an exact copy
EFFECT_THRESHOLD = 0.10
NAMES = ("effect_iou", "centroid_err", "ghost", "arrival", "bg_psnr", "bg_ssim", "obj_psnr", "obj_psnr_shift",
         "retrieval", "order", "psnr", "ssim")
NAMES_OF_DEPTH = ("depth_rmse", "depth_order", "depth_order_new")
NAMES_WITHOUT_TRUTH = ("kept_psnr", "kept_ssim", "source_change", "template")
SCALES = (0.8, 0.9, 1.0, 1.1, 1.25)  # of the template, relative to what fills the target's box
TEMPLATE_SIDE = 24  # pixels to which the largest template is shrunk: layout and colour decide, not fine texture


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
    r, c, r1, c1 = bounds(mask)
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


def same_size(edit: np.ndarray, picture: np.ndarray) -> None:
    if edit.shape != picture.shape:
        raise ValueError(f"The edit is {edit.shape[1]} x {edit.shape[0]}, its scene {picture.shape[1]} x {picture.shape[0]}; "
                         "an edit must keep the size of its reference.")


def margin(shape: tuple) -> int:
    """Pixels by which regions grow where the object's shadow is not known: 2 at 128 pixels, in proportion above."""
    return max(2, max(shape[:2]) // 64)


def measure(edit: np.ndarray, pair) -> dict[str, float]:
    """Those metrics of NAMES that can be had for one edit.

    pair: a `scenes.Pair` rendered with extras, or anything with its fields ref, tgt, mask_ref, mask_tgt, empty, wrong,
    swapped, amodal_tgt. Without masks (None) only psnr and ssim are measured; without `empty` only the PSNR and SSIM of
    picture, object and background, which is then what lies outside the grown masks, the shadow's change included.

    effect_iou: IoU(E(y), E(x1)).
    centroid_err: distance of the centroids of E(y) and E(x1) / image diagonal.
    ghost: what is left of the object where it stood, 0 clean to 1 unmoved; arrival: the same at the target, 1 is right.
    bg_psnr, bg_ssim: against x1 away from the move. obj_psnr: against x1 inside m1; obj_psnr_shift: best of +-4 px.
    retrieval: 1 if x1 is nearer to y than x0, xe and every wrong answer there is are, around the object's two places.
    order: share of pixels, where the moved object's depth order shows, that are nearer to x1 than to the swapped order;
    nan when nothing overlaps it. psnr, ssim: full picture.
    """
    y, x0, x1 = (as_float(image) for image in (edit, pair.ref, pair.tgt))
    same_size(y, x1)
    m0, m1 = pair.mask_ref, pair.mask_tgt
    similarity = ssim_map(y, x1)
    found = {"psnr": psnr(y, x1), "ssim": float(similarity[3:-3, 3:-3].mean())}
    if m0 is None or m1 is None:
        return found

    found |= {"obj_psnr": psnr(y, x1, m1), "obj_psnr_shift": obj_psnr_shift(y, x1, m1) if m1.any() else float("nan")}
    background = ~dilate(m0 | m1, margin(y.shape))
    if pair.empty is not None:
        xe = as_float(pair.empty)
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
        found |= {
            "effect_iou": float((effect_y & effect_1).sum() / max(1, (effect_y | effect_1).sum())),
            "centroid_err": centroid_error(effect_y, effect_1),
            "ghost": projection(y, xe, x0, m0 & ~dilate(m1, 1)),
            "arrival": projection(y, xe, x1, m1 & ~dilate(m0, 1)),
            "retrieval": float(all(distance < ((y - other)[places] ** 2).sum() for other in others)),
            "order": order,
        }
    return found | {
        "bg_psnr": psnr(y, x1, background),
        "bg_ssim": float(similarity[background].mean()) if background.any() else float("nan"),
    }


def measure_without_truth(edit: np.ndarray, source: np.ndarray, m0: np.ndarray, m1: np.ndarray) -> dict[str, float]:
    """NAMES_WITHOUT_TRUTH for one edit of a photograph, from where the object stands (m0) and should stand (m1), (H, W).

    kept_psnr, kept_ssim: against the *source* outside both regions, grown; source_change: share of m0, less m1, where
    the edit differs from the source by more than the effect threshold, 0 means that the object was not taken away (1
    does not mean that the hole was filled well); template: `template_similarity`.
    """
    y, x0 = as_float(edit), as_float(source)
    same_size(y, x0)
    background = ~dilate(m0 | m1, margin(y.shape))
    left = m0 & ~dilate(m1, 1)
    changed = (np.abs(box(y, 3) - box(x0, 3)) > EFFECT_THRESHOLD).any(-1)
    return {
        "kept_psnr": psnr(y, x0, background),
        "kept_ssim": float(ssim_map(y, x0)[background].mean()) if background.any() else float("nan"),
        "source_change": float(changed[left].mean()) if left.any() else float("nan"),
        "template": template_similarity(edit, source, m0, m1),
    }


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a mask that is not empty; the last two just outside."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], cols[0], rows[-1] + 1, cols[-1] + 1


def template_similarity(edit: np.ndarray, source: np.ndarray, m0: np.ndarray, m1: np.ndarray) -> float:
    """How much the edit's target region looks like the object of the source: normalised cross-correlation, at most 1.

    edit, source: uint8. The object's pixels (m0) are compared, over all channels at once so that colour counts, at every
    place around the box of m1 and at a few sizes that about fill it; the best is given. nan for empty regions or an object
    of one grey.
    """
    if not (m0.any() and m1.any()):
        return float("nan")
    top, left, bottom, right = bounds(m0)
    t, l, b, r = bounds(m1)
    fit = ((b - t) * (r - l) / ((bottom - top) * (right - left))) ** 0.5
    shrink = min(1, TEMPLATE_SIDE / (max(bottom - top, right - left) * fit * SCALES[-1]))
    small = resize(edit, *(max(1, round(side * shrink)) for side in edit.shape[:2]))
    best = float("nan")
    for scale in SCALES:
        h, w = (max(2, round(side * fit * scale * shrink)) for side in (bottom - top, right - left))
        template = resize(source[top:bottom, left:right], h, w) / 255
        weight = resize(255 * m0[top:bottom, left:right, None].repeat(3, 2).astype(np.uint8), h, w) / 255
        spans = []  # of the window, rows then columns, in the shrunk edit: the box and an eighth more on each side
        for low, high, side in ((t, b, h), (l, r, w)):
            half = max((high - low) * shrink * 1.25, side) / 2
            centre = (low + high) / 2 * shrink
            spans.append(np.arange(int(centre - half), int(centre - half) + max(side, round(2 * half)) + 1))
        rows, cols = (np.clip(span, 0, n - 1) for span, n in zip(spans, small.shape))  # beyond the border: repeated
        windows = sliding_window_view(small[np.ix_(rows, cols)] / 255, (h, w), axis=(0, 1))  # (P, Q, 3, h, w)
        k = np.moveaxis(weight, 2, 0) / weight.sum()
        pattern = np.moveaxis(template, 2, 0)
        pattern = pattern - (k * pattern).sum()
        sums = [np.tensordot(x, k * z, 3) for x, z in ((windows, 1), (windows**2, 1), (windows, pattern))]
        spread = np.sqrt(np.maximum(sums[1] - sums[0] ** 2, 1e-6) * (k * pattern**2).sum())
        if spread.max() > 1e-4:
            best = np.fmax(best, (sums[2] / np.maximum(spread, 1e-6)).max())
    return float(best)


def order_agreement(disparity: np.ndarray, truth: np.ndarray, moved: np.ndarray, others: list[np.ndarray]) -> float:
    """Share of the other objects to which the moved one stands, in front or behind, as in the truth.

    disparity (of the edit) and truth: maps (H, W), near is large, each on a scale of its own; moved, others: masks in the
    truth. Medians in the masks are compared, with a margin of 2 % of the map's range: what is nearer by less in the truth
    is left out, in the edit it counts as wrong. nan when nothing is left.
    """
    right = order_sides(truth, moved, others)
    same = order_sides(disparity, moved, others) == right
    return float(same[right != 0].mean()) if right.any() else float("nan")


def order_sides(disparity: np.ndarray, moved: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """For each other object: 1 if the moved one is nearer, -1 if it is farther, 0 if neither can be said."""
    if not moved.any():
        return np.zeros(len(others))
    gap = np.array([np.median(disparity[moved]) - np.median(disparity[other]) if other.any() else 0 for other in others])
    return np.sign(gap) * (np.abs(gap) > 0.02 * np.ptp(disparity))


def measure_depth(disparity: np.ndarray, pair) -> dict[str, float]:
    """NAMES_OF_DEPTH for the depth that a model believes the target of a `scenes.Pair` to have: a map (H, W), near is
    large, on any scale.

    depth_rmse: against the exact disparity of the target in [-1, 1], after the best scale and shift. depth_order: order
    agreement of the moved object with all others in the target; depth_order_new: with those alone whose order the move
    changes, so that knowing the source is of no use. nan where there is none.
    """
    before, after = map(scenes.disparity, (pair.ref_depth, pair.tgt_depth))
    fit = np.stack((disparity.ravel(), np.ones(disparity.size)), 1).astype(np.float64)
    residual = fit @ np.linalg.lstsq(fit, after.ravel(), rcond=None)[0] - after.ravel()
    others = [i for i in range(len(pair.scene.objects)) if i != pair.moved]
    seen = [i for i in others if (pair.ref_ids == i).any() and (pair.tgt_ids == i).any()]
    was = order_sides(before, pair.mask_ref, [pair.ref_ids == i for i in seen])
    now = order_sides(after, pair.mask_tgt, [pair.tgt_ids == i for i in seen])
    new = [pair.tgt_ids == i for i, one, two in zip(seen, was, now) if one * two < 0]
    return {
        "depth_rmse": float(np.sqrt((residual**2).mean())),
        "depth_order": order_agreement(disparity, after, pair.mask_tgt, [pair.tgt_ids == i for i in others]),
        "depth_order_new": order_agreement(disparity, after, pair.mask_tgt, new),
    }


def success(values: dict[str, float], ceiling_bg_psnr: float) -> bool:
    """Whether the edit is right: moved to the place, gone from where it was, and the rest as good as the autoencoder allows.

    effect_iou > 0.5, ghost < 0.3, bg_psnr > 25 dB and within 3 dB of that of autoencoder(target) on the same scene.
    """
    return bool(values["effect_iou"] > 0.5 and not values["ghost"] >= 0.3
                and values["bg_psnr"] > 25 and values["bg_psnr"] >= ceiling_bg_psnr - 3)


def bootstrap(values, resamples: int = 2000, statistic=None) -> tuple[float, float, float]:
    """Mean of a list of numbers and its 95 % percentile bootstrap interval: (mean, low, high); nan entries are left out. Of
    booleans Wilson's interval, since resampling finds none where all are equal.

    With `statistic`, values are rows of K numbers and it turns their means (..., K) into the number wanted: resampling keeps
    a row together.
    """
    values = np.asarray(values)
    if values.dtype == bool and len(values):
        mean, z = values.mean(), 1.96**2 / len(values)
        middle, half = (mean + z / 2) / (1 + z), (z * mean * (1 - mean) + z * z / 4) ** 0.5 / (1 + z)
        return float(mean), max(0.0, float(middle - half)), min(1.0, float(middle + half))
    values = values.astype(np.float64)
    values = values[~np.isnan(values if values.ndim == 1 else values.sum(1))]
    if not len(values):
        return (float("nan"),) * 3
    statistic = statistic or (lambda means: means)
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(statistic(values[draws].mean(1)), (2.5, 97.5))
    return float(statistic(values.mean(0))), float(low), float(high)


def bootstrap_two_ways(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float, int]:
    """Mean of values (V, S), low and high of its 95 % interval, and how many are not nan. Rows and columns are both drawn
    anew with replacement: voters (or training seeds) and samples, since the claim is about other ones of both."""
    given = np.isfinite(values)
    if not given.any():
        return float("nan"), float("nan"), float("nan"), 0
    random = np.random.default_rng(0)
    voters, samples = (random.multinomial(n, np.full(n, 1 / n), resamples).astype(float) for n in values.shape)  # times drawn
    total, count = (((voters @ x) * samples).sum(1) for x in (np.where(given, values, 0), given.astype(float)))
    low, high = np.percentile(total[count > 0] / count[count > 0], (2.5, 97.5))
    return float(values[given].mean()), float(low), float(high), int(given.sum())
