"""The embedded world: rendered scenes, move instructions and their exact truth.

    python scenes.py --show [--level plain --split train --seed 0 --count 6 --size 160 --output scenes.png]

A seed goes in; a reference picture, an instruction, the target picture, depth, instance ids and
masks come out. It stands in for OBJect-3DIT where no data set is at hand. The layout rules follow
CLEVR (relations on the ground plane, by margins); the target place is a fixed function of the
source layout and the relation, so each instruction has exactly one truth.

Ground coordinates are aligned with the camera: a to the right, b away from it, z up, one unit about
the width of an object. Pictures are (H, W, 3) uint8, depth is z-depth along the optical axis.

Levels: plain (five shapes, bare floor), textured (thirteen shapes, patterns), hard (4 to 7 objects; moves of seen and unseen
scenes go far in depth or occlude, of training scenes about half do), deep (as plain to look at, as hard to lay out, and a
pixel's place does not tell its depth: pitch, roll, field of view and the size of objects vary, things stand on others, some
relations are about depth; distances to the camera are on the ground, to the point below it).
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import numpy as np

from renderer import (COLOURS, FINISHES, FLOORS, Camera, Floor, Light, Scene, Thing, disparity, parts_of, render,
                      trace_ids)

SHAPES = ("cube", "sphere", "cylinder", "cone", "pyramid")
COMPOUNDS = ("mushroom", "house", "table", "tree", "bottle", "snowman", "lamp", "car")
STANDS = ("block", "plinth", "pillar")  # level deep: what things stand on
TOPS = {"block": 0.77, "plinth": 0.77, "pillar": 0.8, "cube": 0.76, "cylinder": 0.8}  # inner radius / size
CORNERS = {"near left corner": (-1.5, -1.5), "near right corner": (1.5, -1.5),
           "far left corner": (-1.7, 2.2), "far right corner": (1.7, 2.2)}
RELATIONS = ("left", "right", "front", "behind", "between", "next to", "closer", "farther", *CORNERS)
DEEP_RELATIONS = ("on top of", "far side", "near side", "twice as far", "half as far")  # level deep has them as well
LEVELS = ("plain", "textured", "hard", "deep")
SPLITS = {"train": range(0, 10**8), "seen": range(10**8, 2 * 10**8), "unseen": range(2 * 10**8, 3 * 10**8)}
HELD_OUT = frozenset({("red", "cone"), ("yellow", "sphere"), ("green", "cube"), ("blue", "pyramid"),
                      ("purple", "cylinder"), ("cyan", "cube"), ("orange", "sphere"), ("pink", "cone")})

# An instruction is "{verb} the {colour} {shape} {tail}". {y} and {z} are the reference objects.
VERBS = ("move", "put", "place", "slide")
TAILS = {
    "left": ("to the left of {y}", "to the left side of {y}", "left of {y}"),
    "right": ("to the right of {y}", "to the right side of {y}", "right of {y}"),
    "front": ("in front of {y}", "just in front of {y}", "to the front of {y}"),
    "behind": ("behind {y}", "just behind {y}", "to the back of {y}"),
    "between": ("between {y} and {z}", "in between {y} and {z}", "to the middle between {y} and {z}"),
    "next to": ("next to {y}", "beside {y}", "to the side of {y}"),
    "closer": ("closer to the camera", "nearer to the camera", "towards the camera"),
    "farther": ("farther from the camera", "farther away from the camera", "away from the camera"),
    **{corner: (f"to the {corner}", f"into the {corner}", f"to the corner at the {corner[:-7]}") for corner in CORNERS},
    "on top of": ("on top of {y}", "onto {y}", "up on the top of {y}"),
    "far side": ("to the far side of {y}", "straight back beyond {y}", "farther back than {y}"),
    "near side": ("to the near side of {y}", "straight to this side of {y}", "nearer than {y}"),
    "twice as far": ("twice as far from the camera", "to double its distance from the camera", "twice as far away"),
    "half as far": ("half as far from the camera", "to half its distance from the camera", "half as far away"),
}
OTHER_WORDINGS = {
    "recolour": ("make {x} {colour}", "paint {x} {colour}", "change {x} to {colour}"),
    "remove": ("remove {x}", "take away {x}", "delete {x}"),
    "add": ("add {article} {x} {tail}",),
    "identity": ("keep everything as it is", "change nothing", "leave the picture as it is"),
    "scale": ("make {x} {factor} as large", "change {x} to {factor} its size", "scale {x} to {factor} its size"),
    "turn": ("turn {x} to face {way}", "rotate {x} to face {way}", "make {x} face {way}"),
}
FACTORS = {"twice": 2.0, "half": 0.5}
FACINGS = {"right": 0.0, "away from the camera": math.pi / 2, "left": math.pi, "the camera": -math.pi / 2}  # yaw


def relations(level: str) -> tuple[str, ...]:
    return RELATIONS + DEEP_RELATIONS if level == "deep" else RELATIONS


def shapes(level: str) -> tuple[str, ...]:
    return {"plain": SHAPES, "deep": (*SHAPES, "car", *STANDS)}.get(level, SHAPES + COMPOUNDS)


def other_kinds(level: str) -> tuple[str, ...]:
    return tuple(OTHER_WORDINGS)[:None if level == "deep" else 4]


def wordings(relation: str, held_out: bool) -> list[tuple[str, str]]:
    """(verb, tail) patterns of a relation. One verb per tail is kept from training: the held-out
    sentences consist of trained words and trained tails in a pattern that no training shows."""
    return [(verb, tail) for j, tail in enumerate(TAILS[relation]) for i, verb in enumerate(VERBS)
            if ((i - j) % len(VERBS) == 1) == held_out]


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation: how the miniature's tokenizer reads a sentence."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def vocabulary(level: str) -> tuple[str, ...]:
    """Every word that an instruction of the level may contain."""
    patterns = [*VERBS, *(tail for r in relations(level) for tail in TAILS[r]),
                *(text for kind in other_kinds(level) for text in OTHER_WORDINGS[kind])]
    values = [*FACTORS, *FACINGS] if level == "deep" else []
    text = " ".join([*patterns, *values, *shapes(level), *COLOURS, "the", "a", "an"])
    fields = {"x", "y", "z", "colour", "article", "tail", "factor", "way"}
    return tuple(sorted(set(words_of(text)) - fields))


VOCABULARY = vocabulary("hard")  # of all levels but deep, which speaks of fewer objects and more relations


def known_words(words: Iterable[str] = VOCABULARY) -> str:
    """What instructions may speak of, for an error message; of the objects and colours, those in `words`."""
    objects, colours = ([w for w in group if w in words] for group in (SHAPES + COMPOUNDS + STANDS, COLOURS))
    known = relations("deep" if set(vocabulary("deep")) <= set(words) else "plain")
    return f"objects: {', '.join(objects)}; colours: {', '.join(colours)}; relations: {', '.join(known)}"


@dataclass
class Edit:
    kind: str  # move, recolour, remove, add, identity; in deep scenes also scale, turn
    relation: str  # "" where none
    instruction: str
    target: Scene
    moved: int | None = None  # index in the source of the object that the edit is about
    references: tuple[int, ...] = ()


@dataclass
class Pair:
    seed: int
    level: str
    split: str
    instruction: str
    relation: str
    scene: Scene
    target: Scene
    moved: int
    references: tuple[int, ...]
    ref: np.ndarray  # (H, W, 3) uint8
    tgt: np.ndarray
    ref_depth: np.ndarray  # (H, W) float32
    tgt_depth: np.ndarray
    ref_ids: np.ndarray  # (H, W) int16
    tgt_ids: np.ndarray
    mask_ref: np.ndarray  # (H, W) bool, visible pixels of the moved object
    mask_tgt: np.ndarray
    # The following need extras=True.
    empty: np.ndarray | None = None  # the scene without the moved object
    amodal_tgt: np.ndarray | None = None  # (H, W) bool, its pixels at the target as if nothing stood before it
    wrong: dict[str, np.ndarray] = field(default_factory=dict)  # counter-examples, uint8 pictures
    swapped: np.ndarray | None = None  # target with the depth order of the overlap reversed


AREA = ((-1.9, 1.9), (-1.75, 2.4))  # where objects stand, in a and b
OFFSETS = {"left": (-1, 0), "right": (1, 0), "front": (0, -1), "behind": (0, 1), "near side": (0, -1), "far side": (0, 1)}
STEP, SHIFTS = 1.3, {"closer": -1.6, "farther": 1.6}
# Wide scenes: distances to the camera on the ground, and corners in the picture, in halves of its side.
RATIOS = {"closer": 0.7, "farther": 1.4, "half as far": 0.5, "twice as far": 2.0}
WIDE_CORNERS = {"near left corner": (-0.55, -0.6), "near right corner": (0.55, -0.6),
                "far left corner": (-0.6, 0.5), "far right corner": (0.6, 0.5)}
GAP, LEAST_MOVE = 0.1, 0.9  # least distances of footprints after a move, and of its two places
MARGIN = 0.2  # a relation holds by at least this much


def target_place(scene: Scene, relation: str, moved: int, references: tuple[int, ...]) -> tuple[float, float, float]:
    """Place (a, b, z) where the relation puts the object: the one rule that makes one truth per instruction.
    All but "on top of" put it on the floor, also where it or the reference stood on something."""
    thing, near = scene.objects[moved], [scene.objects[i] for i in references]
    camera, half = scene.camera, math.tan(math.radians(scene.camera.fov) / 2)
    if relation in CORNERS:
        u, v = WIDE_CORNERS[relation]
        return (*(camera.ground(u * half, v * half) if scene.wide else CORNERS[relation]), 0.0)
    if relation == "between":
        return (near[0].a + near[1].a) / 2, (near[0].b + near[1].b) / 2, 0.0
    if relation in RATIOS:  # along the line from the camera, and in narrow scenes along b
        ratio = RATIOS[relation]
        if scene.wide:
            return ratio * thing.a, ratio * (thing.b + camera.distance) - camera.distance, 0.0
        return thing.a, thing.b + SHIFTS[relation], 0.0
    if relation == "on top of":
        return near[0].a, near[0].b, near[0].top
    if relation == "next to":  # the side it came from
        relation = "left" if thing.a < near[0].a else "right"
    # What carries the reference must find room as well.
    widest = max(t.size for t in scene.objects if (t.a, t.b) == (near[0].a, near[0].b))
    step, (da, db) = max(STEP, thing.size + widest + 0.12), OFFSETS[relation]
    # To the far or near side of something is straight back or forth; behind or in front of it is in line with it.
    return (thing.a if "side" in relation else near[0].a) + da * step, near[0].b + db * step, 0.0


def in_frame(scene: Scene, index: int) -> bool:
    limit = math.tan(math.radians(scene.camera.fov) / 2) * 0.98
    return all(np.abs(part.outline(scene.camera)).max() <= limit for part in parts_of(scene, (index,)))


def can_carry(support: Thing, thing: Thing) -> bool:
    return thing.size <= 0.85 * TOPS.get(support.shape, 0) * support.size


def carries(objects: tuple[Thing, ...], index: int) -> bool:
    below = objects[index]
    return any((t.a, t.b) == (below.a, below.b) and t.z > below.z for t in objects)


def clear(objects: tuple[Thing, ...], index: int, gap: float = GAP) -> bool:
    """Whether an object's footprint keeps its distance to all others but those that stand above or below it."""
    thing = objects[index]
    return all(math.hypot(t.a - thing.a, t.b - thing.b) >= t.size + thing.size + gap
               for i, t in enumerate(objects) if i != index and ((t.a, t.b) != (thing.a, thing.b) or t.z == thing.z))


def placed(scene: Scene, moved: int, place: tuple[float, float, float]) -> Scene | None:
    """The scene with one object at another place, or None where that is too near, blocked or out of the picture."""
    (a, b, z), ((a0, a1), (b0, b1)), thing = place, AREA, scene.objects[moved]
    inside = a0 - 0.2 <= a <= a1 + 0.2 and b0 - 0.2 <= b <= b1 + 0.8
    if scene.wide:  # where it stands before the camera; the picture's frame is the limit
        inside = b + scene.camera.distance >= 1.5
    if not inside or math.hypot(a - thing.a, b - thing.b) < LEAST_MOVE or carries(scene.objects, moved):
        return None
    if z and not any((t.a, t.b, t.top) == place and can_carry(t, thing) for t in scene.objects):
        return None
    objects = (*scene.objects[:moved], replace(thing, a=a, b=b, z=z), *scene.objects[moved + 1:])
    target = replace(scene, objects=objects)
    return target if clear(objects, moved) and in_frame(target, moved) else None


def one_truth(scene: Scene, relation: str, moved: int, references: tuple[int, ...]) -> bool:
    """Wide scenes: "between" is in depth; what goes to the far side was on the near one; what is in line with the
    reference, or stands on it, has no side to be next to it."""
    thing, near = scene.objects[moved], [scene.objects[i] for i in references]
    if relation == "between":
        return abs(near[0].b - near[1].b) > abs(near[0].a - near[1].a)
    if relation in ("far side", "near side"):
        return (near[0].b - thing.b) * OFFSETS[relation][1] > MARGIN
    return relation != "next to" or abs(thing.a - near[0].a) > MARGIN


def find_move(rng, scene: Scene, relation: str, movable: Iterable[int]) -> Edit | None:
    """A feasible move of one of the `movable` objects, the first in random order; its instruction is still to come."""
    n, needed = len(scene.objects), TAILS[relation][0].count("{")
    options = [(m, near) for m in movable for near in permutations([i for i in range(n) if i != m], needed)]
    for m, near in (options[i] for i in rng.permutation(len(options))):
        place = a, b, _ = target_place(scene, relation, m, near)
        if scene.wide and not one_truth(scene, relation, m, near):
            continue
        target = placed(scene, m, place)
        # By construction every relation holds by MARGIN, only others may stand as deep in the corner, or deeper.
        rivals = [t for i, t in enumerate(scene.objects) if i != m and a * t.a > 0] if relation in CORNERS else ()
        if target and all((b - t.b if "far" in relation else t.b - b) > MARGIN for t in rivals):
            return Edit("move", relation, "", target, m, near)
    return None


def well_seen(scene: Scene, level: str, important: Iterable[int] = ()) -> bool:
    """Each object (in hard and deep scenes: each important one) shows enough pixels."""
    counts = np.bincount(trace_ids(scene, 64).ravel() + 1, minlength=len(scene.objects) + 1)[1:]
    which = list(important) if level in ("hard", "deep") else range(len(scene.objects))
    return all(counts[i] >= (0.0055 if level == "plain" else 0.004) * 64 * 64 for i in which)


# Ranges of camera height, distance and field of view, light azimuth, elevation and strength, brightness of the floor.
PLAIN = ((5.2, 6.3), (6.6, 7.4), (34, 36.5), (1.95, 4.1), (0.85, 1.1), (0.9, 1.1), (0.58, 0.76))
VARIED = ((4.6, 6.6), (7.0, 7.8), (35, 38), (0, 2 * math.pi), (0.75, 1.15), (0.85, 1.15), (0.5, 0.8))
COUNTS = {"plain": (2, 4), "textured": (2, 5), "hard": (4, 7), "deep": (3, 5)}  # objects


def draw_scene(rng, level: str, pair: tuple[str, str] | None = None, least: int = 2) -> Scene:
    """One random scene of at least `least` objects; `pair` is the (colour, shape) of one of them."""
    plain = level == "plain"
    height, distance, fov, azimuth, elevation, strength, tone = (rng.uniform(*r) for r in (PLAIN if plain else VARIED))
    tint = 0.025 if plain else 0.09
    colour = tuple(round(float(c), 3) for c in tone + rng.uniform(-tint, tint, 3))
    floor = Floor("plain", colour, colour)
    if level not in ("plain", "deep"):
        darker = rng.uniform(0.5, 0.8)
        second = tuple(round(darker * c, 3) for c in colour)
        floor = Floor(str(rng.choice(list(FLOORS))), colour, second, rng.uniform(0.7, 1.2), rng.uniform(0, math.pi))
    camera, light = Camera(height, distance, fov), Light(azimuth, elevation, strength)
    fewest, most = COUNTS[level]
    count = int(rng.integers(max(least, fewest), most + 1))
    if level == "deep":
        return draw_deep(rng, replace(light, pool=0.003), floor, count, pair)
    for _ in range(1000):
        names, objects = [pair] if pair else [], []
        while len(names) < count:
            name = str(rng.choice(list(COLOURS))), str(rng.choice(shapes(level)))
            repeated = name[0] in [colour for colour, _ in names] if plain else name in names
            if name not in HELD_OUT and not repeated:
                names.append(name)
        for i in rng.permutation(count):
            for _ in range(30):
                # In plain scenes a corner of cubes and pyramids faces the camera: two sides show, in two tones.
                yaw = rng.uniform(0.4, 1.17) if plain else rng.uniform(0, 2 * math.pi)
                size, a, b = rng.uniform(0.48, 0.58), rng.uniform(*AREA[0]), rng.uniform(*AREA[1])
                finish = "plastic" if plain else str(rng.choice(FINISHES))
                thing = Thing(names[i][1], names[i][0], size, a, b, yaw, finish)
                if clear((*objects, thing), len(objects), 0.12 if level == "hard" else 0.22):
                    objects.append(thing)
                    break
        scene = Scene(camera, light, floor, tuple(objects))
        if len(objects) == count and all(in_frame(scene, i) for i in range(count)):
            return scene
    raise ValueError(f"No layout of {count} objects fits in 1000 draws; AREA or the camera's range is wrong.")


def draw_deep(rng, light: Light, floor: Floor, count: int, pair: tuple[str, str] | None) -> Scene:
    """A scene in which a pixel's place does not tell its depth: the camera's height, distance, pitch, roll and field of
    view, the size of objects and the height on which they stand vary; in half of the scenes the far ones are the big ones."""
    for _ in range(1000):
        fov, roll, aim = rng.uniform(28, 55), rng.uniform(-8, 8), rng.uniform(0, 0.8)
        half = math.tan(math.radians(fov) / 2)
        low = math.atan(1.5 * half)  # the horizon stays well above the picture
        pitch = low + (0.9 - low) * rng.uniform() ** 2
        away = rng.uniform(2.6, 3.6) / half
        camera = Camera(aim + away * math.sin(pitch), away * math.cos(pitch), fov, aim, roll)
        scene, far_is_big = Scene(camera, light, floor, (), wide=True), rng.uniform() < 0.5
        names = [pair] if pair else []
        for stand in [True] * int(rng.integers(1, 3)) + [False] * 99:
            name = str(rng.choice(list(COLOURS))), str(rng.choice(STANDS if stand else (*SHAPES, "car")))
            if len(names) < count and name not in HELD_OUT and name not in names:
                names.append(name)
        for colour, shape in sorted(names, key=lambda name: name[1] not in STANDS):
            for _ in range(30):
                v, stand = rng.uniform(-0.85, 0.7), shape in STANDS
                a, b = camera.ground(rng.uniform(-0.85, 0.85) * half, v * half)
                if scene.objects and rng.uniform() < 0.5:  # before or behind another, in the line of sight
                    other = scene.objects[rng.integers(len(scene.objects))]
                    a = other.a / (other.b + camera.distance) * (b + camera.distance) + rng.uniform(-0.4, 0.4)
                share = min(max((v + 0.85) / 1.55 + rng.uniform(-0.2, 0.2), 0), 1) if far_is_big else rng.uniform()
                size = 0.65 + 0.3 * share if stand else 0.34 * 2.5 ** share
                thing = Thing(shape, colour, size, a, b, rng.uniform(0, 2 * math.pi))
                below = [t for i, t in enumerate(scene.objects) if can_carry(t, thing) and not carries(scene.objects, i)]
                if below and not stand and rng.uniform() < 0.75:
                    support = below[rng.integers(len(below))]
                    thing = replace(thing, a=support.a, b=support.b, z=support.top)
                    if support.colour == colour:
                        continue
                grown = replace(scene, objects=(*scene.objects, thing))
                if clear(grown.objects, len(scene.objects)) and in_frame(grown, len(scene.objects)):
                    scene = grown
                    break
        if len(scene.objects) == count:
            return scene
    raise ValueError(f"No layout of {count} objects fits in 1000 draws; the ranges of camera and sizes are wrong.")


def _begin(seed: int, level: str, split: str, purpose: int):
    """The seed in the split's range, its generator, and the held-out (colour, shape) that an unseen scene shows."""
    if level not in LEVELS:
        raise ValueError(f"Unknown level {level!r}; expected one of {', '.join(LEVELS)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    # Splits start at multiples of their length: a seed of the range stays, any other is mapped into it.
    seed = SPLITS[split].start + seed % len(SPLITS[split])
    rng = np.random.default_rng([seed, LEVELS.index(level), purpose])
    return seed, rng, sorted(HELD_OUT)[rng.integers(len(HELD_OUT))] if split == "unseen" else None


def sample_scene(seed: int, level: str = "plain", split: str = "train") -> Scene:
    _, rng, pair = _begin(seed, level, split, 0)
    while True:
        scene = draw_scene(rng, level, pair)
        if well_seen(scene, level):
            return scene


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def move_instruction(rng, scene: Scene, edit: Edit, held_out: bool = False) -> str:
    patterns = wordings(edit.relation, held_out)
    verb, tail = patterns[rng.integers(len(patterns))]
    names = dict(zip("yz", (scene.objects[i].name for i in edit.references)))
    return sentence(f"{verb} {scene.objects[edit.moved].name} {tail.format(**names)}")


def other_edit(rng, scene: Scene, level: str) -> Edit | None:
    """A generic edit of the scene (see Edit.kind), or None where it is not feasible."""
    kinds, shares = other_kinds(level), (0.35, 0.3, 0.27, 0.08) if level != "deep" else (0.2, 0.2, 0.2, 0.05, 0.2, 0.15)
    kind = kinds[rng.choice(len(kinds), p=shares)]
    pattern = OTHER_WORDINGS[kind][rng.integers(len(OTHER_WORDINGS[kind]))]
    objects, index = scene.objects, int(rng.integers(len(scene.objects)))
    if kind == "identity":
        return Edit(kind, "", sentence(pattern), scene)
    if kind == "turn":  # only a car has a front
        index = next((i for i, t in enumerate(objects) if t.shape == "car"), None)
        if index is None:
            return None
    thing, before, after = objects[index], objects[:index], objects[index + 1:]
    if kind != "add" and not well_seen(scene, level, (index,)):
        return None
    if kind in ("remove", "scale") and carries(objects, index):
        return None
    if kind == "scale":
        factor = list(FACTORS)[rng.integers(len(FACTORS))]
        scaled = replace(thing, size=thing.size * FACTORS[factor])
        target = replace(scene, objects=(*before, scaled, *after))
        below = [t for t in objects if (t.a, t.b, t.top) == (thing.a, thing.b, thing.z)]
        fits = 0.25 < scaled.size < 1.2 and all(can_carry(t, scaled) for t in below)
        if not (fits and clear(target.objects, index) and in_frame(target, index) and well_seen(target, level, (index,))):
            return None
        return Edit(kind, "", sentence(pattern.format(x=thing.name, factor=factor)), target, index)
    if kind == "turn":
        way = list(FACINGS)[rng.integers(len(FACINGS))]
        target = replace(scene, objects=(*before, replace(thing, yaw=FACINGS[way]), *after))
        if math.cos(FACINGS[way] - thing.yaw) > 0.7:  # it does so already
            return None
        if not in_frame(target, index) or not well_seen(target, level, (index,)):
            return None
        return Edit(kind, "", sentence(pattern.format(x=thing.name, way=way)), target, index)
    if kind == "remove":
        return Edit(kind, "", sentence(pattern.format(x=thing.name)), replace(scene, objects=before + after), index)
    colours = [c for c in COLOURS if level != "plain" or c not in [t.colour for t in objects]]
    colour = colours[rng.integers(len(colours))]
    known = shapes(level)
    shape = thing.shape if kind == "recolour" else known[rng.integers(len(known))]
    if (colour, shape) in HELD_OUT or (colour, shape) in [(t.colour, t.shape) for t in objects]:
        return None
    if kind == "recolour":
        target = replace(scene, objects=(*before, replace(thing, colour=colour), *after))
        return Edit(kind, "", sentence(pattern.format(x=thing.name, colour=colour)), target, index)
    # Size and yaw of an added object are fixed: the sentence does not tell them, and there is one truth.
    grown = replace(scene, objects=(*objects, Thing(shape, colour, 0.53, 0.0, 9.0, 0.6)))
    simple = ("left", "right", "front", "behind", *CORNERS, *(("on top of",) if level == "deep" else ()))
    relation = simple[rng.integers(len(simple))]
    edit = find_move(rng, grown, relation, (len(objects),))
    if edit is None or not well_seen(edit.target, level, (len(objects),)):
        return None
    tail = TAILS[relation][rng.integers(3)].format(y="".join(objects[i].name for i in edit.references))
    text = pattern.format(article="an" if colour[0] in "aeiou" else "a", x=f"{colour} {shape}", tail=tail)
    return Edit(kind, relation, sentence(text), edit.target, None, edit.references)


def training_edits(seed: int, level: str = "plain", moves: int = 2, others: int = 1) -> tuple[Scene, list[Edit]]:
    """One scene of the train split with `moves` moves of different relations and `others` generic edits."""
    if not 0 <= moves <= 6:
        raise ValueError(f"Between 0 and 6 moves of one scene can be asked for, not {moves}.")
    _, rng, _ = _begin(seed, level, "train", 1)
    # The relations are drawn before the scene, so that rare ones are not crowded out by easy ones.
    known = relations(level)
    chosen = [known[i] for i in rng.permutation(len(known))[:moves]]
    while True:
        scene = draw_scene(rng, level, None, 3 if "between" in chosen else 2)
        edits, used = [], set()
        for relation in chosen:
            fresh = [i for i in range(len(scene.objects)) if i not in used] or range(len(scene.objects))
            edit = find_move(rng, scene, relation, fresh) or find_move(rng, scene, relation, used)
            if edit is None:
                break
            used.add(edit.moved)
            edit.instruction = move_instruction(rng, scene, edit)
            edits.append(edit)
        if (len(edits) < moves or not well_seen(scene, level, [e.moved for e in edits])
                or not all(well_seen(e.target, level, (e.moved, *e.references)) for e in edits)):
            continue
        while len(edits) < moves + others:
            edit = other_edit(rng, scene, level)
            if edit is not None:
                edits.append(edit)
        return scene, edits


OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front", "closer": "farther",
            "farther": "closer", "far side": "near side", "near side": "far side", "half as far": "twice as far",
            "twice as far": "half as far", "near left corner": "near right corner", "near right corner": "near left corner",
            "far left corner": "far right corner", "far right corner": "far left corner"}


def counter_examples(scene: Scene, edit: Edit) -> dict[str, Scene]:
    """Answers that are not the truth, where they fit the picture: the mirrored place (which the words alone may allow, as
    "next to" does), the same relation to another object, another relation to the same object."""
    objects, moved, near = scene.objects, edit.moved, edit.references
    mirrored = OPPOSITE.get(edit.relation)
    options = [("wrong relation", r, ()) for r in ("closer", "farther", *CORNERS) if r != mirrored]
    if len(near) == 1:
        options = [("wrong reference", edit.relation, (i,)) for i in range(len(objects)) if i not in (moved, *near)] + [
            ("wrong relation", r, near) for r in ("front", "behind", "left", "right") if r != mirrored] + options
    if edit.relation == "next to":
        mirrored = "left" if edit.target.objects[moved].a > objects[near[0]].a else "right"
    if mirrored:
        options = [("mirrored", mirrored, near), *options]
    found = {}
    for name, relation, references in options:
        place = target_place(scene, relation, moved, references)
        # Far enough from the truth and from the source to be told from both.
        wrong = placed(scene, moved, place) if placed(edit.target, moved, place) else None
        if wrong and name not in found:
            found[name] = wrong
    return found


def draw_move(rng, level: str, pair: tuple[str, str] | None) -> tuple[Scene, Edit]:
    """The scene and the move of one instruction, redrawn until feasible."""
    known = relations(level)
    relation = known[rng.integers(len(known))]
    hidden = level == "deep" and rng.uniform() < 0.35  # it lies before or behind others at its target
    while True:
        scene = draw_scene(rng, level, pair, 3 if relation == "between" else 2)
        movable = [i for i, t in enumerate(scene.objects) if pair is None or (t.colour, t.shape) == pair]
        edit = find_move(rng, scene, relation, movable)
        if edit is None or not all(well_seen(s, level, (edit.moved, *edit.references)) for s in (scene, edit.target)):
            continue
        # A hard or deep move goes far in depth, or the object lies before or behind others at its source or target.
        far = abs(edit.target.objects[edit.moved].b - scene.objects[edit.moved].b) > 2.5
        others = [i for i in range(len(scene.objects)) if i != edit.moved]
        overlap = [((trace_ids(s, 64, (edit.moved,)) >= 0) & (trace_ids(s, 64, others) >= 0)).sum() >= 6
                   for s in (scene, edit.target)] if level in ("hard", "deep") else []
        if hidden and not overlap[1]:
            continue
        if level not in ("hard", "deep") or far or any(overlap):
            return scene, edit


def make_pair(seed: int, level: str = "plain", split: str = "seen", size: int = 128, index: int | None = None,
              extras: bool = True) -> Pair:
    """One instruction with its pictures. A seed inside the split's range is the scene's own; with `index`,
    (seed, index) name the scene, so that any seed gives a run of different scenes."""
    if index is not None:
        seed = seed * 1_000_003 + index
    seed, rng, pair = _begin(seed, level, split, 2)
    scene, edit = draw_move(rng, level, pair)
    edit.instruction, moved = move_instruction(rng, scene, edit, held_out=split == "unseen"), edit.moved
    ref, tgt = render(scene, size), render(edit.target, size)
    pair = Pair(seed, level, split, edit.instruction, edit.relation, scene, edit.target, moved, edit.references,
                ref.rgb, tgt.rgb, ref.depth, tgt.depth, ref.ids, tgt.ids, ref.ids == moved, tgt.ids == moved)
    if not extras:
        return pair
    empty = render(scene, size, only=[i for i in range(len(scene.objects)) if i != moved])
    pair.empty = empty.rgb
    pair.amodal_tgt = trace_ids(edit.target, size, (moved,)) == moved
    pair.wrong = {name: render(wrong, size).rgb for name, wrong in counter_examples(scene, edit).items()}
    overlap = pair.amodal_tgt & (empty.ids >= 0)
    if overlap.any():
        # In the overlap the other object's surface changes places with the moved one's.
        alone = render(edit.target, size, only=(moved,)).rgb
        other = np.where(pair.mask_tgt[..., None], pair.empty, alone)
        pair.swapped = np.where(overlap[..., None], other, pair.tgt)
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(description="Scenes of the embedded world.")
    parser.add_argument("--show", action="store_true",
                        help="write a sheet of pairs: reference, target, empty, depth of the target, masks")
    parser.add_argument("--level", choices=LEVELS, default="plain")
    parser.add_argument("--split", choices=tuple(SPLITS), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=6, help="pairs on the sheet")
    parser.add_argument("--size", type=int, default=160, help="side of a picture in pixels")
    parser.add_argument("--output", type=Path, default=Path("scenes.png"))
    args = parser.parse_args()
    if not args.show:
        parser.error("Nothing to do: give --show to draw a sheet of pairs.")
    if args.count < 1 or args.size < 16:
        parser.error(f"--count must be at least 1 and --size at least 16, not {args.count} and {args.size}.")
    if args.output.suffix.lower() not in (".png", ".jpg") or not args.output.parent.is_dir():
        parser.error(f"--output must name a .png or .jpg file in a folder that exists, not {args.output}.")
    from PIL import Image, ImageDraw  # only the sheet needs it

    rows = []
    for i in range(args.count):
        pair = make_pair(args.seed, args.level, args.split, args.size, index=i)
        grey = np.repeat(((disparity(pair.tgt_depth) + 1) * 127.5).astype(np.uint8)[..., None], 3, 2)
        masks = pair.empty // 2 + 60
        masks[pair.mask_ref], masks[pair.mask_tgt] = (220, 60, 40), (40, 180, 80)
        pictures = np.hstack([pair.ref, pair.tgt, pair.empty, grey, masks])
        row = Image.fromarray(np.pad(pictures, ((0, 18), (0, 0), (0, 0)), constant_values=255))
        text = f"{pair.instruction}  [{pair.relation}, seed {pair.seed}]"
        ImageDraw.Draw(row).text((2, args.size + 2), text, fill="black")
        rows.append(np.asarray(row))
    try:
        Image.fromarray(np.vstack(rows)).save(args.output)
    except OSError as error:
        parser.error(f"{args.output} cannot be written: {error.strerror}.")
    print(args.output)


if __name__ == "__main__":
    main()
