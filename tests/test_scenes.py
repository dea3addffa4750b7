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
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import scenes as S

NAME = re.compile(rf"the ({'|'.join(S.COLOURS)}) ({'|'.join(S.SHAPES + S.COMPOUNDS + S.STANDS)})\b")


def moves(level, split, count, start=0):
    """(instruction, relation, scene, target, moved, references) without a full-size render."""
    for index in range(count):
        p = S.make_pair(start, level, split, size=8, index=index, extras=False)
        yield p.instruction, p.relation, p.scene, p.target, p.moved, p.references


@pytest.fixture(scope="module")
def training():
    """(scene, edits) of the train split at each level."""
    counts = {"plain": (500, 1), "textured": (150, 1), "hard": (60, 1), "deep": (150, 4)}
    return {level: [S.training_edits(seed, level, others=others) for seed in range(n)] for level, (n, others) in counts.items()}


@pytest.fixture(scope="module")
def evaluated():
    """(level, split, move) of the other splits."""
    counts = {"plain": 150, "textured": 60, "hard": 40, "deep": 45}
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
    json.dumps(asdict(one.scene))


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
        text += [told(scene)]
        text += [f"{e.kind} {e.relation} {e.instruction} {e.moved} {e.references} {told(e.target)}" for e in edits]
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
    with pytest.raises(ValueError, match="plain, textured, hard, deep"):
        S.sample_scene(0, level="easy")


def test_held_out_pairs_appear_in_the_unseen_split_only(training, evaluated):
    assert len(S.HELD_OUT) >= 6 and len({c for c, _ in S.HELD_OUT}) >= 6 and {s for _, s in S.HELD_OUT} == set(S.SHAPES)
    shown = [thing for runs in training.values() for scene, edits in runs
             for s in (scene, *(e.target for e in edits)) for thing in s.objects]
    shown += [t for _, split, m in evaluated if split == "seen" for s in m[2:4] for t in s.objects]
    shown += [t for split in ("train", "seen") for level in S.LEVELS for seed in range(150)
              for t in S.sample_scene(seed, level, split).objects]
    assert not {(t.colour, t.shape) for t in shown} & S.HELD_OUT
    assert {t.colour for t in shown} == set(S.COLOURS) and {t.shape for t in shown} == {*S.SHAPES, *S.COMPOUNDS, *S.STANDS}
    moved = Counter()
    for _, split, (_, _, scene, _, m, _) in evaluated:
        if split == "unseen":
            moved[scene.objects[m].colour, scene.objects[m].shape] += 1
    assert set(moved) == set(S.HELD_OUT)


def test_wordings(training, evaluated):
    def pattern(text):
        return NAME.sub("X", text.lower().rstrip("."))

    trained = {level: [e.instruction for _, edits in runs for e in edits] for level, runs in training.items()}
    unseen = {level: [m[0] for at, split, m in evaluated if split == "unseen" and at == level] for level in trained}
    for level, text in trained.items():
        words = set(S.words_of(" ".join(text + [m[0] for at, split, m in evaluated if split == "seen" and at == level])))
        assert set(S.words_of(" ".join(unseen[level]))) <= set(S.vocabulary(level))
        # Nothing in the vocabulary goes untrained: a word that is found in few sentences shows at the next level up.
        assert words <= set(S.vocabulary(level)) and (level not in ("plain", "deep") or words == set(S.vocabulary(level)))
        assert S.vocabulary(level) == tuple(sorted(set(S.vocabulary(level))))
        assert all(re.fullmatch("[a-z]+", w) for w in S.vocabulary(level))
    assert S.vocabulary("textured") == S.vocabulary("hard") == S.VOCABULARY
    assert set(S.vocabulary("plain")) == set(S.VOCABULARY) - set(S.COMPOUNDS)
    assert set(S.vocabulary("plain")) < set(S.vocabulary("deep")) and not set(S.VOCABULARY) & {"twice", "plinth", "top", "rotate"}
    trained, unseen = sum(trained.values(), []), sum(unseen.values(), [])
    assert not {pattern(t) for t in unseen} & {pattern(t) for t in trained}
    for relation in S.relations("deep"):
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
    assert {len(m[2].objects) for level, _, m in evaluated if level == "hard"} == {4, 5, 6, 7}
    assert {len(m[2].objects) for level, _, m in evaluated if level == "deep"} == {3, 4, 5}


def ground_point(camera, u, v):
    """Where the ray through a picture's place (halves of the side, right and up) meets the floor, without the camera's roll."""
    eye, directions = rays(2, replace(camera, roll=0.0), [u], [v])
    return (eye + eye[2] / -directions[0, 0, 2] * directions[0, 0])[:2]


def expected_place(relation, scene, moved, references):
    """The rule of each relation, written a second time: (a, b, z)."""
    source, camera = scene.objects, scene.camera
    thing, a, b = source[moved], source[moved].a, source[moved].b
    corner = {"near left corner": (-1.5, -1.5), "near right corner": (1.5, -1.5),
              "far left corner": (-1.7, 2.2), "far right corner": (1.7, 2.2)}.get(relation)
    if corner and scene.wide:
        return (*ground_point(camera, *{"near left corner": (-0.55, -0.6), "near right corner": (0.55, -0.6),
                                        "far left corner": (-0.6, 0.5), "far right corner": (0.6, 0.5)}[relation]), 0)
    if corner:
        return (*corner, 0)
    ratio = {"closer": 0.7, "farther": 1.4, "twice as far": 2, "half as far": 0.5}.get(relation)
    if ratio and scene.wide:
        foot = np.array([0, -camera.distance])
        return (*(foot + ratio * (np.array([a, b]) - foot)), 0)
    if relation == "closer":
        return a, b - 1.6, 0
    if relation == "farther":
        return a, b + 1.6, 0
    one, two = source[references[0]], source[references[-1]]
    if relation == "on top of":
        return one.a, one.b, height_of(one)
    step, carried_by = 1.3, [t for t in source if t.a == one.a and t.b == one.b]
    step = max([step, *(thing.size + t.size + 0.12 for t in carried_by)])
    return {"left": (one.a - step, one.b, 0), "right": (one.a + step, one.b, 0), "front": (one.a, one.b - step, 0),
            "behind": (one.a, one.b + step, 0), "far side": (a, one.b + step, 0), "near side": (a, one.b - step, 0),
            "next to": (one.a - step if a < one.a else one.a + step, one.b, 0),
            "between": ((one.a + two.a) / 2, (one.b + two.b) / 2, 0)}[relation]


HEIGHTS = {"cube": 1.52, "cylinder": 1.9, "table": 1.13, "block": 0.55, "plinth": 1.34, "pillar": 2.26}  # of what has a top


def height_of(thing):
    return thing.z + HEIGHTS[thing.shape] * thing.size


def relation_holds(relation, scene, final, moved, references, margin=0.2):
    source, away = scene.objects, scene.camera.distance
    a, b = final[moved].a, final[moved].b
    refs = [(final[i].a, final[i].b) for i in references]
    if relation in ("closer", "farther", "half as far", "twice as far"):
        before, after = (math.hypot(t.a, t.b + away) for t in (source[moved], final[moved]))
        if "as far" in relation:
            return after / before == pytest.approx(2 if "twice" in relation else 0.5)
        return (before - after if relation == "closer" else after - before) > margin
    if relation == "between":
        (pa, pb), (qa, qb) = refs
        deep = not scene.wide or abs(pb - qb) > abs(pa - qa)
        return deep and all((a - x) * (u - x) + (b - y) * (v - y) > margin * math.hypot(u - x, v - y)
                            for x, y, u, v in ((pa, pb, qa, qb), (qa, qb, pa, pb)))
    if relation == "next to":
        reach = final[moved].size + final[references[0]].size + 1 if scene.wide else 1.5
        return math.hypot(a - refs[0][0], b - refs[0][1]) < reach and not (
            scene.wide and abs(source[moved].a - refs[0][0]) < margin)
    if relation == "on top of":
        return (a, b) == refs[0] and final[moved].z > final[references[0]].z
    if "corner" in relation:
        return (a < -margin if "left" in relation else a > margin) and all(
            t.b - b > margin if "near" in relation else b - t.b > margin
            for i, t in enumerate(final) if i != moved and (t.a < 0) == (a < 0))
    da, db = a - refs[0][0], b - refs[0][1]
    if "side" in relation:  # and it was on the other side
        return a == source[moved].a and all(
            d > margin for d in ((db, refs[0][1] - source[moved].b) if relation == "far side"
                                 else (-db, source[moved].b - refs[0][1])))
    return {"left": -da, "right": da, "front": -db, "behind": db}[relation] > margin


def test_target_is_the_rule_and_the_relation_holds(training, evaluated):
    found = [(level, e.relation, scene, e.target, e.moved, e.references) for level, runs in training.items()
             for scene, edits in runs for e in edits if e.kind == "move"] + [(at, *m[1:]) for at, _, m in evaluated]
    for level, relation, scene, target, moved, references in found:
        before, after = scene.objects, target.objects
        place = expected_place(relation, scene, moved, references)
        assert (after[moved].a, after[moved].b, after[moved].z) == pytest.approx(place, abs=1e-5 if level == "deep" else 1e-9)
        assert relation_holds(relation, scene, after, moved, references), relation
        assert math.hypot(place[0] - before[moved].a, place[1] - before[moved].b) >= 0.9
        assert replace(target, objects=()) == replace(scene, objects=()) and scene.wide == (level == "deep")
        for i, thing in enumerate(after):
            if i != moved:
                assert thing == before[i]
                apart = math.hypot(thing.a - place[0], thing.b - place[1]) >= thing.size + after[moved].size + 0.1
                assert apart or (thing.a, thing.b) == (after[moved].a, after[moved].b)
        assert after[moved] == replace(before[moved], a=after[moved].a, b=after[moved].b, z=after[moved].z)
    count = Counter((level == "deep", relation) for level, relation, *_ in found)
    for deep in (False, True):
        named = {relation: n for (at, relation), n in count.items() if at == deep}
        assert set(named) == set(S.relations("deep" if deep else "plain"))
        assert max(named.values()) < (4 if deep else 2) * min(named.values())


def test_deep_things_stand_on_something(training, evaluated):
    """On the floor, or with the whole foot on a flat top; nothing else shares the ground, before and after every edit."""
    feet = {"sphere": 0, "cone": 1, "cylinder": 0.8, "cube": 0.76 * 2**0.5, "pyramid": 0.86 * 2**0.5, "car": math.hypot(0.8, 0.62),
            "block": 1.09, "plinth": 1.02, "pillar": 0.66}
    tops = {"cube": 0.76, "cylinder": 0.8, "block": 0.77, "plinth": 0.77, "pillar": 0.8}
    layouts = [s for scene, edits in training["deep"] for s in (scene, *(e.target for e in edits))]
    layouts += [s for level, _, m in evaluated if level == "deep" for s in m[2:4]]
    raised, heights = 0, set()
    for scene in layouts:
        for i, thing in enumerate(scene.objects):
            below = [t for t in scene.objects if (t.a, t.b) == (thing.a, thing.b) and t.z < thing.z]
            if thing.z:
                support = max(below, key=lambda t: t.z)
                assert thing.z == pytest.approx(height_of(support), abs=1e-9)
                assert feet[thing.shape] * thing.size <= 1.04 * tops[support.shape] * support.size
                raised += 1
                heights.add(support.shape)
            else:
                assert not below
            for t in scene.objects[:i]:
                apart = math.hypot(t.a - thing.a, t.b - thing.b)
                assert apart >= t.size + thing.size or (apart == 0 and t.z != thing.z)
    assert raised > len(layouts) / 2 and heights == set(tops)


def test_on_top_of_what_itself_is_raised():
    things = (S.Thing("block", "red", 0.95, 0.5, 0.0, 0.3), S.Thing("cube", "blue", 0.6, 0.5, 0.0, 0.1, z=0.55 * 0.95),
              S.Thing("cone", "green", 0.36, -1.2, 0.0, 0.0), S.Thing("cone", "pink", 0.5, -1.2, 1.5, 0.0))
    scene = S.Scene(WIDE, LIGHT, FLOOR, things, wide=True)
    rng = np.random.default_rng(0)
    edit = S.find_move(rng, scene, "on top of", (2,))
    assert edit.references == (1,)  # the block carries something already
    assert edit.target.objects[2] == replace(things[2], a=0.5, b=0.0, z=pytest.approx(0.55 * 0.95 + 1.52 * 0.6))
    assert S.find_move(rng, scene, "on top of", (3,)) is None  # too big
    assert S.find_move(rng, scene, "right", (0,)) is None  # what carries something stays
    assert S.find_move(rng, edit.target, "left", (1,)) is None and S.find_move(rng, edit.target, "closer", (2,))


@pytest.mark.parametrize("level", ("plain", "deep"))
def test_edits_of_training(training, level):
    kinds = Counter()
    for scene, edits in training[level]:
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
            elif e.kind in ("scale", "turn"):
                thing, text, ids = before[e.moved], e.instruction, S.trace_ids(e.target, 64)
                border = np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
                assert e.moved not in border and (ids == e.moved).sum() > 12
                assert thing.name in text and [i for i in range(len(before)) if before[i] != after[i]] == [e.moved]
                if e.kind == "scale":
                    factor = {(True, False): 2, (False, True): 0.5}["twice" in text, "half" in text]
                    assert after[e.moved] == replace(thing, size=thing.size * factor)
                    assert not any((t.a, t.b) == (thing.a, thing.b) and t.z > thing.z for t in before)
                else:
                    a, b = math.cos(after[e.moved].yaw), math.sin(after[e.moved].yaw)
                    way = text[text.index("face ") + 5:-1]
                    expected = {"left": (-1, 0), "right": (1, 0), "the camera": (0, -1), "away from the camera": (0, 1)}[way]
                    assert (a, b) == pytest.approx(expected, abs=1e-9) and thing.shape == "car"
                    assert after[e.moved] == replace(thing, yaw=after[e.moved].yaw)
                    assert abs(after[e.moved].yaw - thing.yaw) % (2 * math.pi) == pytest.approx(math.pi, abs=math.pi - 0.7)
            else:
                assert e.kind == "identity" and after == before
            assert level == "deep" or len({t.colour for t in after}) == len(after)
            assert len({t.name for t in after}) == len(after)
    assert set(kinds) == {"remove", "recolour", "add", "identity"} | ({"scale", "turn"} if level == "deep" else set())
    assert level == "deep" or [e.kind for e in S.training_edits(1, moves=3, others=0)[1]] == ["move"] * 3


@pytest.mark.parametrize("level", S.LEVELS)
def test_masks_frame_and_sizes(level):
    answered = 0
    for index in range(12):
        p = S.make_pair(9, level, "unseen", 97, index)  # an odd side
        assert p.ref.shape == p.tgt.shape == p.empty.shape == (97, 97, 3) and p.ref.dtype == np.uint8
        assert p.ref_depth.dtype == np.float32 and p.ref_ids.dtype == np.int16
        assert not (p.mask_tgt & ~p.amodal_tgt).any()
        for ids, mask in ((p.ref_ids, p.mask_ref), (p.tgt_ids, p.mask_tgt)):
            assert (mask == (ids == p.moved)).all()
            assert mask.mean() > 0.003
            border = np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
            assert (border == -1).all()
            assert len(np.unique(ids)) > 2
        assert np.isfinite(p.ref_depth).all() and p.ref_depth.min() > 1
        # The floor fills the picture: no horizon, and no floor so far away that its depth is cut off.
        eye, d = rays(97, p.scene.camera)
        assert np.allclose(p.ref_depth[p.ref_ids < 0], (eye[2] / -d[..., 2])[p.ref_ids < 0], rtol=1e-4)
        assert p.ref_depth.max() < 60
        answered += bool(p.wrong)
        for picture in p.wrong.values():
            assert (np.abs(picture.astype(int) - p.tgt).max(2) > 25).sum() > 20
        if p.swapped is not None:
            changed = (p.swapped != p.tgt).any(2)
            assert not (changed & ~p.amodal_tgt).any()
        fast = S.make_pair(9, level, "unseen", 97, index, extras=False)
        assert fast.empty is None and (fast.tgt == p.tgt).all()
    assert answered >= 9  # most sentences have a wrong answer that fits the picture


def test_hard_scenes_occlude_or_go_deep():
    occluded = 0
    for index in range(20):
        p = S.make_pair(4, "hard", "seen", 128, index)
        assert 4 <= len(p.scene.objects) <= 7
        amodal = p.amodal_tgt | (S.trace_ids(p.scene, 128, (p.moved,)) == p.moved)
        others = [i for i in range(len(p.scene.objects)) if i != p.moved]
        overlap = ((S.trace_ids(p.scene, 128, others) >= 0) & amodal).any()
        depth = abs(p.target.objects[p.moved].b - p.scene.objects[p.moved].b)
        assert overlap or depth > 2.5
        occluded += bool(overlap)
    assert occluded >= 8


CAMERA = S.Camera(height=5.6, distance=6.9, fov=35.0)
LIGHT = S.Light(azimuth=2.6, elevation=0.95, strength=1.0)
FLOOR = S.Floor("plain", (0.7, 0.7, 0.7), (0.7, 0.7, 0.7))


def rays(size, camera=CAMERA, u=None, v=None):
    """Eye (3,) and directions (H, W, 3) with forward component 1, float64, from the camera's definition; through the
    pixels of a picture, or through places u, v in halves of its side."""
    eye = np.array([0, -camera.distance, camera.height])
    forward = np.array([0, 0, camera.aim]) - eye
    forward /= np.linalg.norm(forward)
    right, roll = np.array([1.0, 0, 0]), math.radians(camera.roll)
    up = np.cross(right, forward)
    # A camera turned clockwise: its right side goes down.
    right, up = math.cos(roll) * right - math.sin(roll) * up, math.cos(roll) * up + math.sin(roll) * right
    at = ((np.arange(size) + 0.5) / size - 0.5) * 2
    u, v = (at if u is None else np.array(u)), (-at if v is None else np.array(v))
    half = math.tan(math.radians(camera.fov / 2))
    return eye, forward + half * (u[None, :, None] * right + v[:, None, None] * up)


def inside(shape, r, p):
    """Whether points (..., 3), relative to the base's middle and turned with the object, are inside."""
    x, y, z = np.moveaxis(p, -1, 0)
    if shape == "cube":
        return (abs(x) <= 0.76 * r) & (abs(y) <= 0.76 * r) & (z >= 0) & (z <= 1.52 * r)
    if shape == "block":
        return (np.maximum(abs(x), abs(y)) <= 0.77 * r) & (z >= 0) & (z <= 0.55 * r)
    if shape in ("plinth", "pillar"):
        step, height, narrow, wide = (1.2, 1.34, 0.72, 0.77) if shape == "plinth" else (2.1, 2.26, 0.66, 0.8)
        across = np.maximum(abs(x), abs(y)) if shape == "plinth" else np.hypot(x, y)
        return (across <= np.where(z <= step * r, narrow, wide) * r) & (z >= 0) & (z <= height * r)
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


STACKED = (S.Thing("pillar", "red", 0.6, -1.0, 0.6, 0.3), S.Thing("cone", "green", 0.35, -1.0, 0.6, 0.3, z=2.26 * 0.6),
           S.Thing("plinth", "blue", 0.8, 0.9, -0.4, 1.0), S.Thing("cube", "pink", 0.5, 0.9, -0.4, 0.2, z=1.34 * 0.8),
           S.Thing("pyramid", "cyan", 0.3, 0.9, -0.4, 0.2, z=1.34 * 0.8 + 1.52 * 0.5),
           S.Thing("block", "red", 0.8, -0.6, -1.3, 0.5), S.Thing("sphere", "pink", 0.4, -0.6, -1.3, 0.0, z=0.55 * 0.8))
WIDE = S.Camera(height=4.1, distance=5.2, fov=50.0, aim=0.5, roll=7.5)


@pytest.mark.parametrize("roll", (7.5, -6.0))
def test_stacks_and_roll_agree_with_ray_marching(roll):
    size, camera = 80, replace(WIDE, roll=roll)
    got = S.render(S.Scene(camera, LIGHT, FLOOR, STACKED, wide=True), size)
    eye, directions = rays(size, camera)
    assert set(np.unique(got.ids)) == {-1, *range(len(STACKED))}
    checked = Counter()
    for row, column in np.random.default_rng(1).integers(8, size - 8, (260, 2)):
        d = directions[row, column]
        t = np.linspace(2, eye[2] / -d[2], 5000)
        first, owner, grazed = t[-1], -1, False
        for i, thing in enumerate(STACKED):
            turn = np.array([[math.cos(thing.yaw), math.sin(thing.yaw), 0], [-math.sin(thing.yaw), math.cos(thing.yaw), 0],
                             [0, 0, 1]])
            within = inside(thing.shape, thing.size, (eye + t[:, None] * d - (thing.a, thing.b, thing.z)) @ turn.T)
            grazed |= 0 < within.sum() < 12
            if within.any() and t[np.argmax(within)] < first:
                first, owner = t[np.argmax(within)], i
        if not grazed:
            checked[owner] += 1
            assert got.ids[row, column] == owner
            assert got.depth[row, column] == pytest.approx(first, abs=3e-3)
    assert set(checked) == {-1, *range(len(STACKED))}


@pytest.mark.parametrize("support, size", ((1.1, 0.35), (0.5, 0.6)))
def test_shadows_of_a_stack_lie_on_its_support_and_on_the_floor(support, size):
    """Light on the support's top (a wide one) and on the floor (beside a narrow one) falls, strongly so, where a ray to the
    light meets the sphere that stands on it, and hardly elsewhere."""
    base, radius = 0.55 * support, 0.96 * size
    things = S.Thing("block", "blue", support, 0.0, 0.0, 0.3, "rubber"), S.Thing("sphere", "green", size, 0.0, 0.0, 0.0, z=base)
    scene = S.Scene(WIDE, S.Light(azimuth=2.6, elevation=0.6, strength=1.0), FLOOR, things, wide=True)
    full, bare = (S.render(scene, 160, only=only, antialias=False) for only in (None, (0,)))
    eye, d = rays(160, WIDE)
    p = eye + full.depth[..., None] * d
    light = np.array([math.cos(2.6) * math.cos(0.6), math.sin(2.6) * math.cos(0.6), math.sin(0.6)])
    to = np.array([0, 0, base + radius]) - p
    along = to @ light
    distance = np.sqrt(np.maximum((to * to).sum(-1) - along**2, 0))
    before, after = (((r.rgb / 255) ** 2.2).sum(-1) for r in (bare, full))
    on_top = (full.ids == 0) & (abs(p[..., 2] - base) < 1e-3)
    surface = on_top if support > 1 else (full.ids == -1) & (bare.ids == -1)
    lit = before > 0.8 * np.median(before[surface])  # the support's own shadow has nothing to lose
    shaded, beside = (surface & lit & near for near in ((distance < 0.6 * radius) & (along > 0), distance > 1.7 * radius))
    share = after / before
    assert shaded.sum() >= 40 and beside.sum() >= 40
    assert share[shaded].max() < 0.7 and share[beside].min() > 0.75
    if support > 1:  # the contact shadow, where the light itself is not blocked
        close = on_top & (distance > 1.3 * radius) & (np.hypot(p[..., 0], p[..., 1]) < 1.2 * radius)
        assert close.sum() > 10 and share[close].max() < 0.97


def foot_and_depth(level, count):
    """Rows (x, y of the lowest visible pixel, log of z-depth of the foot's middle) of the objects that show well."""
    rows = []
    for seed in range(count):
        scene = S.sample_scene(seed, level)
        ids, camera = S.trace_ids(scene, 64), scene.camera
        eye, forward = rays(2, camera, [0], [0])
        for i, thing in enumerate(scene.objects):
            y, x = np.nonzero(ids == i)
            if len(y) > 20:
                depth = (np.array([thing.a, thing.b, thing.z]) - eye) @ forward[0, 0]
                rows.append((x[y == y.max()].mean() / 64, y.max() / 64, math.log(depth)))
    return np.array(rows)


def test_a_pixels_place_does_not_tell_depth_in_deep_scenes():
    """Share of the variance of log depth that a quadratic in the foot's pixel explains, on scenes it was not fitted to."""
    explained = {}
    for level in ("plain", "deep"):
        x, y, z = foot_and_depth(level, 200).T
        basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)
        half = len(z) // 2
        rest = z[half:] - basis[half:] @ np.linalg.lstsq(basis[:half], z[:half], rcond=None)[0]
        explained[level] = 1 - rest.var() / z[half:].var()
    assert explained["plain"] > 0.85 and explained["deep"] < 0.5


def test_brightness_of_the_floor_does_not_tell_depth_in_deep_scenes():
    plain = [scene for scene in (S.sample_scene(seed, "deep") for seed in range(30)) if scene.floor.pattern == "plain"]
    floors = [S.render(scene, 24, only=(), antialias=False).rgb.mean(2) for scene in plain]
    assert len(floors) >= 4 and min(f.min() / f.max() for f in floors) > 0.5


def test_deep_moves_change_size_and_hide():
    resized, hidden, raised, sizes, far_and_big = 0, 0, 0, [], []
    for index in range(60):
        p = S.make_pair(4, "deep", "seen", 64, index, extras=False)
        amodal = [S.trace_ids(s, 64, (p.moved,)) >= 0 for s in (p.scene, p.target)]
        others = S.trace_ids(p.target, 64, [i for i in range(len(p.scene.objects)) if i != p.moved]) >= 0
        ratio = amodal[1].sum() / amodal[0].sum()
        resized += max(ratio, 1 / ratio) > 1.25
        hidden += (amodal[1] & others).sum() >= 6
        raised += p.scene.objects[p.moved].z > 0 or p.target.objects[p.moved].z > 0
        things = [t for t in p.scene.objects if t.shape not in S.STANDS and not t.z]
        sizes += [t.size for t in things]
        far_and_big += [(one.b - two.b) * (one.size - two.size) > 0 for one in things for two in things if one is not two]
        for thing in p.scene.objects:
            below = [t for t in p.scene.objects if (t.a, t.b) == (thing.a, thing.b) and t is not thing]
            assert thing.colour not in [t.colour for t in below]  # an outline shows
        camera = p.scene.camera
        assert 28 <= camera.fov <= 55 and -8 <= camera.roll <= 8
    assert resized >= 40 and hidden >= 20 and raised >= 15
    assert np.mean(far_and_big) > 0.62  # far things are big more often than small
    assert max(sizes) / min(sizes) > 2.2 and max(sizes) / min(sizes) <= 2.5


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
    text, deep = S.known_words(), S.known_words(S.vocabulary("deep"))
    assert all(word in text for word in (*S.SHAPES, *S.COMPOUNDS, *S.COLOURS, *S.RELATIONS))
    assert all(word in deep for word in (*S.shapes("deep"), *S.COLOURS, *S.relations("deep")))
    assert not any(word in text for word in ("plinth", "twice as far", "on top of"))


def test_show_writes_a_sheet(tmp_path):
    script, sheet = Path(S.__file__), tmp_path / "sheet.png"
    done = subprocess.run([sys.executable, script, "--show", "--level", "deep", "--split", "unseen", "--count", "2",
                           "--size", "64", "--output", sheet], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sheet) and sheet.stat().st_size > 1000
    failed = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert failed.returncode == 2 and "--show" in failed.stderr and "Traceback" not in failed.stderr
