"""Every metric takes the value it should on edits that are constructed from the truth. pytest tests/test_metrics.py"""

from types import SimpleNamespace

import numpy as np
import pytest

from evaluation import metrics as M
from scenes import make_pair


def effect(pair, picture):
    smooth = M.box(M.as_float(pair.empty), 3)
    return (np.abs(M.box(M.as_float(picture), 3) - smooth) > M.EFFECT_THRESHOLD).any(-1)


def paste(pair, source, region, opacity=1.0, onto=None):
    y = M.as_float(pair.tgt if onto is None else onto)
    y[region] = (1 - opacity) * y[region] + opacity * M.as_float(source)[region]
    return y


def shifted(pair, pixels=8):
    """The right object with its shadow, `pixels` away from where it belongs, towards the middle of the picture."""
    centre = np.argwhere(pair.mask_tgt).mean(0)[1]
    move = pixels if centre < pair.tgt.shape[1] / 2 else -pixels
    region = np.roll(M.dilate(effect(pair, pair.tgt), 2), move, axis=1)
    return paste(pair, np.roll(pair.tgt, move, axis=1), region, onto=pair.empty)


def damaged(pair):
    noise = np.random.default_rng(pair.seed).normal(0, 0.01, pair.tgt.shape)
    return np.clip(M.box(M.as_float(pair.tgt), 3) + noise, 0, 1)


CASES = {
    "perfect": lambda p: p.tgt,
    "source copied": lambda p: p.ref,
    "removed": lambda p: p.empty,
    "duplicated": lambda p: paste(p, p.ref, M.dilate(effect(p, p.ref), 2) & ~p.mask_tgt),
    "half ghost": lambda p: paste(p, p.ref, M.dilate(effect(p, p.ref), 2) & ~p.mask_tgt, 0.5),
    "8 px off": shifted,
    "wrong place": lambda p: next(iter(p.wrong.values())),
    "blur and noise": damaged,
    "colour drift": lambda p: np.clip(M.as_float(p.tgt) * (1.07, 1.0, 0.93), 0, 1),
}


@pytest.fixture(scope="module")
def means():
    """case -> metric -> mean over 24 pairs of 128 x 128."""
    pairs = [make_pair(5, "plain", "seen", 128, index=i) for i in range(24)]
    pairs = [pair for pair in pairs if pair.wrong]
    rows = {case: [M.measure(edit(pair), pair) for pair in pairs] for case, edit in CASES.items()}
    ceiling = [row["bg_psnr"] for row in rows["perfect"]]
    for values in rows.values():
        for row, bg_psnr in zip(values, ceiling):
            row["success"] = M.success(row, bg_psnr)
    return {case: {name: M.bootstrap([row[name] for row in values])[0] for name in values[0]} for case, values in rows.items()}


EXPECTED = {  # case -> metric -> (lowest, highest) mean
    "perfect": dict(effect_iou=(1, 1), centroid_err=(0, 0), ghost=(0, 0.03), arrival=(1, 1), bg_psnr=(50, 50), bg_ssim=(1, 1),
                    obj_psnr=(50, 50), obj_psnr_shift=(50, 50), psnr=(50, 50), ssim=(1, 1), retrieval=(1, 1), success=(1, 1)),
    "source copied": dict(effect_iou=(0, 0.1), centroid_err=(0.15, 0.35), ghost=(1, 1), arrival=(0, 0.03), bg_psnr=(48, 50),
                          obj_psnr=(0, 12), obj_psnr_shift=(0, 12), retrieval=(0, 0), psnr=(16, 25), success=(0, 0)),
    "removed": dict(effect_iou=(0, 0), centroid_err=(1, 1), ghost=(0, 0), arrival=(0, 0), bg_psnr=(48, 50),
                    obj_psnr=(0, 12), retrieval=(0, 0), psnr=(19, 28), success=(0, 0)),
    "duplicated": dict(effect_iou=(0.35, 0.65), centroid_err=(0.06, 0.2), ghost=(0.98, 1), arrival=(1, 1), bg_psnr=(50, 50),
                       obj_psnr=(50, 50), success=(0, 0)),
    "half ghost": dict(effect_iou=(0.4, 0.7), ghost=(0.47, 0.53), arrival=(1, 1), bg_psnr=(50, 50), retrieval=(1, 1),
                       success=(0, 0)),
    "8 px off": dict(effect_iou=(0.3, 0.5), centroid_err=(0.03, 0.06), ghost=(0, 0.05), arrival=(0.35, 0.7),
                     obj_psnr=(8, 15), retrieval=(0.3, 0.95), success=(0, 0.1)),
    "wrong place": dict(effect_iou=(0, 0.05), centroid_err=(0.2, 0.4), ghost=(0, 0.12), arrival=(0, 0.05),
                        obj_psnr=(0, 12), retrieval=(0, 0), success=(0, 0)),
    "blur and noise": dict(effect_iou=(0.9, 1), centroid_err=(0, 0.02), ghost=(0, 0.05), arrival=(0.9, 1),
                           bg_psnr=(31, 40), bg_ssim=(0.8, 0.95), obj_psnr=(23, 31), retrieval=(1, 1)),
    "colour drift": dict(effect_iou=(0.85, 1), centroid_err=(0, 0.02), ghost=(0, 0.1), arrival=(0.95, 1),
                         bg_psnr=(25, 31), bg_ssim=(0.98, 1), retrieval=(1, 1), success=(0, 0)),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_constructed_edit(means, case):
    for name, (low, high) in EXPECTED[case].items():
        assert low - 1e-6 <= means[case][name] <= high + 1e-6, name


def test_order_sees_who_stands_in_front():
    pairs = [make_pair(5, "hard", "seen", 128, index=i) for i in range(8)]
    covered = [p for p in pairs if p.swapped is not None and (p.amodal_tgt & (p.swapped != p.tgt).any(-1)).any()]
    assert covered
    for pair in covered:
        assert M.measure(pair.tgt, pair)["order"] == 1
        assert M.measure(pair.swapped, pair)["order"] == 0


def test_success_needs_each_of_its_parts():
    right = {"effect_iou": 0.9, "ghost": 0.0, "bg_psnr": 30.0}
    assert M.success(right, 32.0) == 1
    for change in ({"effect_iou": 0.5}, {"ghost": 0.3}, {"bg_psnr": 25.0}, {"bg_psnr": 28.9}):
        assert M.success(right | change, 32.0) == 0


def test_filters_against_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.random((11, 14, 3)), rng.random((11, 14, 3))
    padded = np.pad(a, ((1, 1), (1, 1), (0, 0)), mode="edge")
    means = [[padded[i:i + 3, j:j + 3].mean((0, 1)) for j in range(14)] for i in range(11)]
    np.testing.assert_allclose(M.box(a, 3), means, atol=1e-12)

    x, y = a[2:9, 4:11].reshape(49, 3), b[2:9, 4:11].reshape(49, 3)  # the window centred on (5, 7)
    expected = np.mean([(2 * p.mean() * q.mean() + 1e-4) * (2 * np.cov(p, q)[0, 1] + 9e-4)
                        / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (p.var(ddof=1) + q.var(ddof=1) + 9e-4))
                        for p, q in zip(x.T, y.T)])
    assert M.ssim_map(a, b)[5, 7] == pytest.approx(expected, abs=1e-12)

    mask = rng.random((11, 14)) < 0.05
    grown = [[mask[max(0, i - 2):i + 3, max(0, j - 2):j + 3].any() for j in range(14)] for i in range(11)]
    np.testing.assert_array_equal(M.dilate(mask, 2), grown)


def test_psnr():
    a = np.zeros((4, 6, 3))
    assert M.psnr(a, a + 0.1) == pytest.approx(20)
    assert M.psnr(a, a) == 50
    assert np.isnan(M.psnr(a, a, np.zeros((4, 6), bool)))


def test_shifts_up_to_four_pixels_are_forgiven():
    pair = make_pair(5, "plain", "seen", 128, index=0)
    x1 = M.as_float(pair.tgt)
    moved = np.roll(x1, (3, -4), axis=(0, 1))
    assert M.obj_psnr_shift(moved, x1, pair.mask_tgt) == 50
    assert M.psnr(moved, x1, pair.mask_tgt) < 25
    assert M.obj_psnr_shift(np.roll(x1, 6, axis=1), x1, pair.mask_tgt) < 35


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        mean, low, high = M.bootstrap(list(rng.random(60) < 0.7) + [float("nan")], resamples=400)
        assert low <= mean <= high
        inside += low <= 0.7 <= high
    assert 180 <= inside <= 198  # 95 % of 200, percentile intervals of 60 coins being a little short
    assert np.isnan(M.bootstrap([float("nan")])).all()


def test_interval_of_equal_ones():
    assert M.bootstrap([True] * 300) == pytest.approx((1.0, 0.98736, 1.0), abs=1e-5)  # Wilson
    assert M.bootstrap([False] * 24) == pytest.approx((0.0, 0.0, 0.13798), abs=1e-5)


def test_another_size_is_refused():
    pair = make_pair(5, "plain", "seen", 64, index=0)
    with pytest.raises(ValueError, match="keep the size"):
        M.measure(pair.tgt[:48], pair)


def test_depth_order_counts_what_the_move_changes():
    """Three objects side by side; the moved one starts nearest and ends between the others in depth."""
    ids = np.repeat([[0, 1, 2, -1]], 4, 0).repeat(4, 1)  # (4, 16)
    depths = [np.choose(ids + 1, [9.0, d, 4.0, 6.0]) for d in (2.0, 5.0)]
    thing = SimpleNamespace(objects=(None,) * 3)
    pair = SimpleNamespace(scene=thing, moved=0, ref_depth=depths[0], tgt_depth=depths[1], ref_ids=ids, tgt_ids=ids,
                           mask_ref=ids == 0, mask_tgt=ids == 0)
    truth, source = (1 / d for d in depths[::-1])
    found = M.measure_depth(3 - 7 * truth, pair)  # scale and shift do not matter to the error; the sign does to the order
    assert found["depth_rmse"] < 1e-6 and found["depth_order"] == 0
    assert M.measure_depth(truth, pair) == pytest.approx({"depth_rmse": 0, "depth_order": 1, "depth_order_new": 1}, abs=1e-6)
    found = M.measure_depth(source, pair)  # nearer than both: right of the one behind it, wrong of the one that it passed
    assert found["depth_order"] == 0.5 and found["depth_order_new"] == 0 and found["depth_rmse"] > 0.05
    still = SimpleNamespace(**{**vars(pair), "tgt_depth": depths[0]})
    assert np.isnan(M.measure_depth(source, still)["depth_order_new"])
