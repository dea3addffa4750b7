"""The embedded world against independent truth.

    python -m pytest -q tests/test_scenes.py
"""

import hashlib
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import scenes as S

NAME = re.compile(rf"the ({'|'.join(S.COLOURS)}) ({'|'.join(S.SHAPES + S.COMPOUNDS)})\b")


def moves(level, split, count, start=0):
    """(instruction, relation, scene, target, moved, references) without a full-size render."""
    for index in range(count):
        p = S.make_pair(start, level, split, size=8, index=index, extras=False)
        yield p.instruction, p.relation, p.scene, p.target, p.moved, p.references


@pytest.fixture(scope="module")
def training():
    """(scene, edits) of the train split at each level."""
    counts = {"plain": 500, "textured": 150, "hard": 60}
    return {level: [S.training_edits(seed, level) for seed in range(n)] for level, n in counts.items()}


@pytest.fixture(scope="module")
def evaluated():
    """(level, split, move) of the other splits."""
    counts = {"plain": 150, "textured": 60, "hard": 40}
    return [(level, split, move) for split in ("seen", "unseen") for level, n in counts.items()
            for move in moves(level, split, n)]


def test_a_seed_is_a_picture():
    for level in S.LEVELS:
        one, two = (S.make_pair(3, level, "seen", 64) for _ in range(2))
        assert one.instruction == two.instruction and one.scene == two.scene and one.target == two.target
        assert np.abs(one.tgt.astype(int) - two.tgt).max() <= 2
        assert (one.tgt_ids == two.tgt_ids).mean() >= 0.999
        assert S.training_edits(3, level) == S.training_edits(3, level)
        assert S.sample_scene(3, level) == S.sample_scene(3, level) != S.sample_scene(4, level)
    json.dumps(one.scene.as_dict())


# Digests of layouts and sentences of a few seeds, and grey values of 4 x 4 tiles of a reference and a target picture: what
# the shipped miniature learned from. A change here makes its weights and every cached shard another world's.
GOLDEN = {
    "plain": ("be027247a19fcb6e", "bdbebcbdcb9ba0c7b4b7c2c5cacacccb",
        "bdbec1bdcb90bdc8b492a4c5c9cacccb"),
    "textured": ("7984ba531c34082c", "8f95958ea79c93a8ab7194a8a5a3a2a9",
        "8f95958ea79a93a8ab7195a8a5a3a2a9"),
    "hard": ("de7d5674d9ac1c95", "9ca1a19bb59f95b598949ebfbeb9bcbe",
        "9ca1a19bb8ba76b599a19ebfbfb9bcbe"),
}


def told(scene):
    """Everything that a scene of these levels is made of."""
    camera, light, floor = scene.camera, scene.light, scene.floor
    return repr([(t.shape, t.colour, t.size, t.a, t.b, t.yaw, t.finish) for t in scene.objects]
                + [(camera.height, camera.distance, camera.fov, camera.aim), (light.azimuth, light.elevation, light.strength),
                   (floor.pattern, floor.colour, floor.second, floor.scale, floor.yaw)])


def digest(level):
    text = []
    for seed in range(12):
        scene, edits = S.training_edits(seed, level, 2, 2)
        text += [told(scene), *(f"{e.kind} {e.relation} {e.instruction} {e.moved} {e.references} {told(e.target)}" for e in edits)]
        for split in S.SPLITS:
            p = S.make_pair(seed, level, split, 8, extras=False)
            text += [p.instruction, p.relation, told(p.scene), told(p.target), told(S.sample_scene(seed, level, split))]
    return hashlib.sha256("".join(text).encode()).hexdigest()[:16]


def tiles(picture):
    return picture.mean(2).reshape(4, 16, 4, 16).mean((1, 3)).round().astype(np.uint8)


@pytest.mark.parametrize("level", GOLDEN)
def test_the_world_stays_as_it_is(level):
    layouts, ref, tgt = GOLDEN[level]
    assert digest(level) == layouts
    p = S.make_pair(11, level, "seen", 64, extras=False)
    for picture, values in ((p.ref, ref), (p.tgt, tgt)):
        assert np.abs(tiles(picture).ravel().astype(int) - np.frombuffer(bytes.fromhex(values), np.uint8)).max() <= 1


def test_words_of_the_world_stay_as_they_are():
    assert hashlib.sha256(" ".join(S.VOCABULARY).encode()).hexdigest()[:16] == "cb6f8006643f24b4"


def test_splits_are_disjoint_seed_ranges():
    ranges = list(S.SPLITS.values())
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:]))
    for split, seeds in S.SPLITS.items():
        for seed, index in ((5, None), (10**8 + 5, None), (2**33, 7)):
            assert S.make_pair(seed, "plain", split, 8, index, extras=False).seed in seeds
        assert S.make_pair(seeds.start + 12, "plain", split, 8, extras=False).seed == seeds.start + 12
    with pytest.raises(ValueError, match="train, seen, unseen"):
        S.sample_scene(0, split="test")
    with pytest.raises(ValueError, match="plain, textured, hard"):
        S.sample_scene(0, level="easy")


def test_held_out_pairs_appear_in_the_unseen_split_only(training, evaluated):
    assert len(S.HELD_OUT) >= 6 and len({c for c, _ in S.HELD_OUT}) >= 6 and {s for _, s in S.HELD_OUT} == set(S.SHAPES)
    shown = [thing for runs in training.values() for scene, edits in runs
             for s in (scene, *(e.target for e in edits)) for thing in s.objects]
    shown += [t for _, split, m in evaluated if split == "seen" for s in m[2:4] for t in s.objects]
    shown += [t for split in ("train", "seen") for level in S.LEVELS for seed in range(150)
              for t in S.sample_scene(seed, level, split).objects]
    assert not {(t.colour, t.shape) for t in shown} & S.HELD_OUT
    assert {t.colour for t in shown} == set(S.COLOURS) and {t.shape for t in shown} == set(S.SHAPES + S.COMPOUNDS)
    moved = Counter()
    for _, split, (_, _, scene, _, m, _) in evaluated:
        if split == "unseen":
            moved[scene.objects[m].colour, scene.objects[m].shape] += 1
    assert set(moved) == set(S.HELD_OUT)


def test_wordings(training, evaluated):
    def pattern(text):
        return NAME.sub("X", text.lower().rstrip("."))

    trained = [e.instruction for runs in training.values() for _, edits in runs for e in edits]
    trained += [m[0] for _, split, m in evaluated if split == "seen"]
    unseen = [m[0] for _, split, m in evaluated if split == "unseen"]
    words = {w for text in trained for w in S.words_of(text)}
    assert {w for text in unseen for w in S.words_of(text)} <= words <= set(S.VOCABULARY)
    assert words == set(S.VOCABULARY)  # nothing in the vocabulary goes untrained
    assert all(re.fullmatch("[a-z]+", w) for w in S.VOCABULARY) and len(set(S.VOCABULARY)) == len(S.VOCABULARY)
    assert not {pattern(t) for t in unseen} & {pattern(t) for t in trained}
    for relation in S.RELATIONS:
        kept, held = S.wordings(relation, False), S.wordings(relation, True)
        assert len(kept) >= 4 and len(held) >= 2 and not set(kept) & set(held)
        assert {v for v, _ in held} <= {v for v, _ in kept} and {t for _, t in held} <= {t for _, t in kept}
    for text in trained + unseen:
        assert text[0].isupper() and text.endswith(".") and "  " not in text


def test_instructions_name_unique_objects(training, evaluated):
    found = [(e.instruction, scene, e.moved, e.references) for runs in training.values() for scene, edits in runs
             for e in edits if e.kind == "move"]
    found += [(m[0], m[2], *m[4:]) for _, _, m in evaluated]
    for text, scene, moved, references in found:
        names = [(t.colour, t.shape) for t in scene.objects]
        assert len(set(names)) == len(names)
        assert NAME.findall(text.lower()) == [names[i] for i in (moved, *references)]
    for scene, _ in training["plain"]:
        assert len({t.colour for t in scene.objects}) == len(scene.objects) and 2 <= len(scene.objects) <= 4
    assert {len(m[2].objects) for level, _, m in evaluated if level == "hard"} <= {4, 5, 6, 7}


def expected_place(relation, source, moved, references):
    """The rule of each relation, written a second time."""
    a, b = source[moved].a, source[moved].b
    corner = {"near left corner": (-1.5, -1.5), "near right corner": (1.5, -1.5),
              "far left corner": (-1.7, 2.2), "far right corner": (1.7, 2.2)}.get(relation)
    if corner:
        return corner
    if relation == "closer":
        return a, b - 1.6
    if relation == "farther":
        return a, b + 1.6
    ra, rb = source[references[0]].a, source[references[0]].b
    return {"left": (ra - 1.3, rb), "right": (ra + 1.3, rb), "front": (ra, rb - 1.3), "behind": (ra, rb + 1.3),
            "next to": (ra - 1.3 if a < ra else ra + 1.3, rb),
            "between": ((ra + source[references[-1]].a) / 2, (rb + source[references[-1]].b) / 2)}[relation]


def relation_holds(relation, source, final, moved, references, margin=0.2):
    a, b = final[moved].a, final[moved].b
    refs = [(final[i].a, final[i].b) for i in references]
    if relation in ("closer", "farther"):
        return (source[moved].b - b if relation == "closer" else b - source[moved].b) > margin
    if relation == "between":
        (pa, pb), (qa, qb) = refs
        return all((a - x) * (u - x) + (b - y) * (v - y) > margin * math.hypot(u - x, v - y)
                   for x, y, u, v in ((pa, pb, qa, qb), (qa, qb, pa, pb)))
    if relation == "next to":
        return math.hypot(a - refs[0][0], b - refs[0][1]) < 1.5
    if "corner" in relation:
        return (a < -margin if "left" in relation else a > margin) and all(
            t.b - b > margin if "near" in relation else b - t.b > margin
            for i, t in enumerate(final) if i != moved and (t.a < 0) == (a < 0))
    da, db = a - refs[0][0], b - refs[0][1]
    return {"left": -da, "right": da, "front": -db, "behind": db}[relation] > margin


def test_target_is_the_rule_and_the_relation_holds(training, evaluated):
    found = [(e.relation, scene, e.target, e.moved, e.references) for runs in training.values() for scene, edits in runs
             for e in edits if e.kind == "move"] + [m[1:] for _, _, m in evaluated]
    for relation, scene, target, moved, references in found:
        before, after = scene.objects, target.objects
        place = expected_place(relation, before, moved, references)
        assert (after[moved].a, after[moved].b) == pytest.approx(place, abs=1e-9)
        assert relation_holds(relation, before, after, moved, references), relation
        assert math.hypot(place[0] - before[moved].a, place[1] - before[moved].b) >= 0.9
        assert (scene.camera, scene.light, scene.floor) == (target.camera, target.light, target.floor)
        for i, thing in enumerate(after):
            if i != moved:
                assert thing == before[i]
                assert math.hypot(thing.a - place[0], thing.b - place[1]) >= thing.size + after[moved].size + 0.1
    count = Counter(relation for relation, *_ in found)
    assert set(count) == set(S.RELATIONS)
    assert max(count.values()) < 2 * min(count.values())


def test_edits_of_training(training):
    kinds = Counter()
    for scene, edits in training["plain"]:
        assert [e.kind for e in edits[:2]] == ["move", "move"] and edits[0].relation != edits[1].relation
        for e in edits[2:]:
            kinds[e.kind] += 1
            before, after = scene.objects, e.target.objects
            if e.kind == "remove":
                assert after == before[:e.moved] + before[e.moved + 1:]
            elif e.kind == "recolour":
                assert [i for i in range(len(before)) if before[i] != after[i]] == [e.moved]
                assert after[e.moved].colour in e.instruction.lower() and before[e.moved].name in e.instruction.lower()
            elif e.kind == "add":
                assert after[:-1] == before and f"{after[-1].colour} {after[-1].shape}" in e.instruction
                assert re.search(r" (an [aeiou]|a [^aeiou])", e.instruction)
            else:
                assert e.kind == "identity" and after == before
            assert len({t.colour for t in after}) == len(after)
    assert set(kinds) == {"remove", "recolour", "add", "identity"}
    assert [e.kind for e in S.training_edits(1, moves=3, others=0)[1]] == ["move"] * 3


@pytest.mark.parametrize("level", S.LEVELS)
def test_masks_frame_and_sizes(level):
    for index in range(12):
        p = S.make_pair(9, level, "unseen", 97, index)  # an odd side
        assert p.ref.shape == p.tgt.shape == p.empty.shape == (97, 97, 3) and p.ref.dtype == np.uint8
        assert p.ref_depth.dtype == np.float32 and p.ref_ids.dtype == np.int16
        for ids, mask, amodal in ((p.ref_ids, p.mask_ref, p.amodal_ref), (p.tgt_ids, p.mask_tgt, p.amodal_tgt)):
            assert (mask == (ids == p.moved)).all() and not (mask & ~amodal).any()
            assert mask.mean() > 0.003
            border = np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
            assert (border == -1).all()
        assert np.isfinite(p.ref_depth).all() and p.ref_depth.min() > 1
        for picture in p.wrong.values():
            assert (np.abs(picture.astype(int) - p.tgt).max(2) > 25).sum() > 20
        if p.swapped is not None:
            changed = (p.swapped != p.tgt).any(2)
            assert not (changed & ~p.amodal_tgt).any()
        fast = S.make_pair(9, level, "unseen", 97, index, extras=False)
        assert fast.empty is None and (fast.tgt == p.tgt).all()


def test_hard_scenes_occlude_or_go_deep():
    occluded = 0
    for index in range(20):
        p = S.make_pair(4, "hard", "seen", 128, index)
        assert 4 <= len(p.scene.objects) <= 7
        overlap = (p.amodal_tgt | p.amodal_ref).any() and (
            (S.trace_ids(p.scene, 128, [i for i in range(len(p.scene.objects)) if i != p.moved]) >= 0)
            & (p.amodal_tgt | p.amodal_ref)).any()
        depth = abs(p.target.objects[p.moved].b - p.scene.objects[p.moved].b)
        assert overlap or depth > 2.5
        occluded += bool(overlap)
    assert occluded >= 8


CAMERA = S.Camera(height=5.6, distance=6.9, fov=35.0)
LIGHT = S.Light(azimuth=2.6, elevation=0.95, strength=1.0)
FLOOR = S.Floor("plain", (0.7, 0.7, 0.7), (0.7, 0.7, 0.7))


def rays(size):
    """Eye (3,) and directions (H, W, 3) with forward component 1, float64, from the camera's definition."""
    eye = np.array([0, -CAMERA.distance, CAMERA.height])
    forward = np.array([0, 0, CAMERA.aim]) - eye
    forward /= np.linalg.norm(forward)
    right = np.array([1.0, 0, 0])
    up = np.cross(right, forward)
    at = ((np.arange(size) + 0.5) / size - 0.5) * 2 * math.tan(math.radians(CAMERA.fov / 2))
    return eye, forward + at[None, :, None] * right - at[:, None, None] * up


def inside(shape, r, p):
    """Whether points (..., 3), relative to the base's middle and turned with the object, are inside."""
    x, y, z = np.moveaxis(p, -1, 0)
    if shape == "cube":
        return (abs(x) <= 0.76 * r) & (abs(y) <= 0.76 * r) & (z >= 0) & (z <= 1.52 * r)
    if shape == "sphere":
        return x**2 + y**2 + (z - 0.96 * r) ** 2 <= (0.96 * r) ** 2
    if shape == "cylinder":
        return (np.hypot(x, y) <= 0.8 * r) & (z >= 0) & (z <= 1.9 * r)
    if shape == "cone":
        return (np.hypot(x, y) <= r * (1 - z / (2.1 * r))) & (z >= 0)
    return (np.maximum(abs(x), abs(y)) <= 0.86 * r * (1 - z / (1.75 * r))) & (z >= 0)


@pytest.mark.parametrize("shape", S.SHAPES)
def test_depth_agrees_with_ray_marching(shape):
    size, thing = 96, S.Thing(shape, "red", 0.55, 0.4, -0.3, 0.7)
    got = S.render(S.Scene(CAMERA, LIGHT, FLOOR, (thing,)), size)
    eye, directions = rays(size)
    plane = eye[2] / -directions[..., 2]
    ground = got.ids == -1
    assert np.allclose(got.depth[ground], plane[ground], rtol=1e-5)
    turn = np.array([[math.cos(0.7), math.sin(0.7), 0], [-math.sin(0.7), math.cos(0.7), 0], [0, 0, 1]])

    def hit(t, direction):
        return inside(shape, thing.size, (eye + t[:, None] * direction - (thing.a, thing.b, 0)) @ turn.T)

    for row, column in np.argwhere(got.ids == 0)[::17]:
        t = np.linspace(6, plane[row, column], 6000)
        within = hit(t, directions[row, column])
        assert within.any()
        k = int(np.argmax(within))
        low, high = t[k - 1], t[k]
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if hit(np.array([middle]), directions[row, column])[0] else (middle, high)
        assert abs(got.depth[row, column] - high) < 2e-4
    # The silhouette: pixels whose ray marches through the body are the object's pixels.
    for row in (30, 45, 50, 55):
        for column in range(40, 75, 3):
            t = np.linspace(6, plane[row, column], 6000)
            thick = hit(t, directions[row, column]).sum()
            if thick == 0 or thick > 10:
                assert (got.ids[row, column] == 0) == (thick > 0)


def test_depth_of_a_sphere_in_closed_form():
    r, thing = 0.96 * 0.5, S.Thing("sphere", "blue", 0.5, -0.6, 0.5, 0.0)
    got = S.render(S.Scene(CAMERA, LIGHT, FLOOR, (thing,)), 113)
    eye, d = rays(113)
    o = eye - (thing.a, thing.b, r)
    a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum() - r * r
    disc = b * b - a * c
    assert ((got.ids == 0) == (disc > 0))[np.abs(disc) > 1e-3].all()
    mask = disc > 1e-2
    assert np.abs(got.depth[mask] - ((-b - np.sqrt(np.maximum(disc, 0))) / a)[mask]).max() < 1e-4


def test_shadow_lies_where_the_light_is_blocked():
    """Floor pixels are darker than without the object, strongly so, exactly where a ray to the light meets it."""
    thing = S.Thing("sphere", "green", 0.55, 0.0, 0.0, 0.0)
    scene = S.Scene(CAMERA, LIGHT, FLOOR, (thing,))
    full, bare = (S.render(scene, 128, only=only, antialias=False) for only in (None, ()))
    eye, d = rays(128)
    p = eye + (eye[2] / -d[..., 2])[..., None] * d
    light = np.array([math.cos(2.6) * math.cos(0.95), math.sin(2.6) * math.cos(0.95), math.sin(0.95)])
    to = np.array([0, 0, 0.96 * 0.55]) - p
    along = to @ light
    distance = np.sqrt((to * to).sum(-1) - along**2)
    drop = (bare.rgb.astype(int) - full.rgb).mean(-1)
    ground = (full.ids == -1) & (bare.ids == -1)
    assert drop[ground & (distance < 0.35)].min() > 45
    assert drop[ground & (distance > 0.8)].max() < 35  # the contact shadow alone
    assert np.abs(drop[ground & (np.hypot(p[..., 0], p[..., 1]) > 3)]).max() <= 2


def test_empty_differs_near_the_object_and_its_shadow_only():
    for index in range(10):
        p = S.make_pair(21, "plain", "seen", 128, index)
        thing, difference = p.scene.objects[p.moved], np.abs(p.ref.astype(int) - p.empty).max(2)
        assert difference[p.mask_ref].mean() > 30
        u = ((np.arange(128) + 0.5) / 64 - 1) * math.tan(math.radians(p.scene.camera.fov / 2))
        camera = p.scene.camera
        angle = math.atan2(camera.height - camera.aim, camera.distance)
        a = u[None] * p.ref_depth
        b = (math.cos(angle) - u[:, None] * math.sin(angle)) * p.ref_depth - camera.distance
        away = np.hypot(a - thing.a, b - thing.b)
        # Antialiased rims mix in what lies behind: leave one pixel around every object out.
        solid = np.pad(p.ref_ids, 1, mode="edge")
        rim = np.zeros((128, 128), bool)
        for dy in range(3):
            for dx in range(3):
                rim |= solid[dy:dy + 128, dx:dx + 128] == p.moved
        assert difference[~rim & (away > 2.4)].max(initial=0) <= 8
        assert difference[~rim & (away > 3.5)].max(initial=0) <= 3


def test_antialiasing_leaves_depth_and_flat_places_alone():
    scene = S.sample_scene(5)
    plain, smooth = S.render(scene, 128, antialias=False), S.render(scene, 128)
    assert (plain.depth == smooth.depth).all() and (plain.ids == smooth.ids).all()
    changed = (plain.rgb != smooth.rgb).any(2).mean()
    assert 0.005 < changed < 0.3
    assert (S.trace_ids(scene, 128) == smooth.ids).all()
    # Four samples per edge pixel come close to the truth: a render at four times the side, averaged.
    fine = S.render(scene, 512, antialias=False).rgb.reshape(128, 4, 128, 4, 3).astype(float)
    truth = ((fine ** 2.2).mean((1, 3))) ** (1 / 2.2)
    error = [np.abs(r.rgb - truth).mean() for r in (plain, smooth)]
    assert error[1] < 0.6 * error[0]


def test_disparity():
    depth = np.array([[2, 4], [8, 4]], np.float32)
    assert S.disparity(depth) == pytest.approx(np.array([[1, -1 / 3], [-1, -1 / 3]]), abs=1e-6)
    assert (S.disparity(np.full((3, 5), 7, np.float32)) == 0).all()
    assert S.disparity(depth).dtype == np.float32


def test_known_words_lists_everything():
    text = S.known_words()
    assert all(word in text for word in (*S.SHAPES, *S.COMPOUNDS, *S.COLOURS, *S.RELATIONS))


def test_show_writes_a_sheet(tmp_path):
    script, sheet = Path(S.__file__), tmp_path / "sheet.png"
    done = subprocess.run([sys.executable, script, "--show", "--level", "hard", "--split", "unseen", "--count", "2",
                           "--size", "64", "--output", sheet], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sheet) and sheet.stat().st_size > 1000
    failed = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert failed.returncode == 2 and "--show" in failed.stderr and "Traceback" not in failed.stderr
