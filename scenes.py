"""The embedded world: rendered scenes, move instructions and their exact truth.

    python scenes.py --show [--level plain --split train --seed 0 --count 6 --size 160 --output scenes.png]

A seed goes in; a reference picture, an instruction, the target picture, depth, instance ids and
masks come out. It stands in for OBJect-3DIT where no data set is at hand. The layout rules follow
CLEVR (relations on the ground plane, by margins); the target place is a fixed function of the
source layout and the relation, so each instruction has exactly one truth.

Ground coordinates are aligned with the camera: a to the right, b away from it, z up, one unit about
the width of an object. Pictures are (H, W, 3) uint8, depth is z-depth along the optical axis.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache

import numpy as np

F = np.float32  # a stray float64 scalar would promote whole pictures

SHAPES = ("cube", "sphere", "cylinder", "cone", "pyramid")
COMPOUNDS = ("mushroom", "house", "table", "tree", "bottle", "snowman", "lamp", "car")
COLOURS = {  # sRGB, 0..1: hues far apart, and neighbours in hue differ in lightness
    "red": (0.84, 0.08, 0.08), "orange": (0.98, 0.46, 0.03), "yellow": (0.97, 0.86, 0.10),
    "green": (0.10, 0.58, 0.16), "cyan": (0.12, 0.80, 0.84), "blue": (0.10, 0.22, 0.82),
    "purple": (0.44, 0.12, 0.62), "pink": (0.98, 0.50, 0.72),
}
CORNERS = {"near left corner": (-1.5, -1.5), "near right corner": (1.5, -1.5),
           "far left corner": (-1.7, 2.2), "far right corner": (1.7, 2.2)}
RELATIONS = ("left", "right", "front", "behind", "between", "next to", "closer", "farther", *CORNERS)
LEVELS = ("plain", "textured", "hard")
SPLITS = {"train": range(0, 10**8), "seen": range(10**8, 2 * 10**8), "unseen": range(2 * 10**8, 3 * 10**8)}
HELD_OUT = frozenset({("red", "cone"), ("yellow", "sphere"), ("green", "cube"), ("blue", "pyramid"),
                      ("purple", "cylinder"), ("cyan", "cube"), ("orange", "sphere"), ("pink", "cone")})
FINISHES = ("rubber", "plastic", "metal", "striped", "checkered")
FLOORS = ("checker", "planks", "tiles", "marble", "cloth")

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
}
OTHER_WORDINGS = {
    "recolour": ("make {x} {colour}", "paint {x} {colour}", "change {x} to {colour}"),
    "remove": ("remove {x}", "take away {x}", "delete {x}"),
    "add": ("add {article} {x} {tail}",),
    "identity": ("keep everything as it is", "change nothing", "leave the picture as it is"),
}


def wordings(relation: str, held_out: bool) -> list[tuple[str, str]]:
    """(verb, tail) patterns of a relation. One verb per tail is kept from training: the held-out
    sentences consist of trained words and trained tails in a pattern that no training shows."""
    return [(verb, tail) for j, tail in enumerate(TAILS[relation]) for i, verb in enumerate(VERBS)
            if ((i - j) % len(VERBS) == 1) == held_out]


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation: how the miniature's tokenizer reads a sentence."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _vocabulary() -> tuple[str, ...]:
    texts = [*VERBS, *SHAPES, *COMPOUNDS, *COLOURS, "the", "a", "an"]
    texts += [tail.format(y="", z="") for tails in TAILS.values() for tail in tails]
    texts += [text.format(x="", colour="", article="", tail="") for group in OTHER_WORDINGS.values() for text in group]
    return tuple(sorted({word for text in texts for word in words_of(text)}))


VOCABULARY = _vocabulary()


def known_words() -> str:
    """What instructions may speak of, for an error message."""
    return (f"objects: {', '.join(SHAPES + COMPOUNDS)}; colours: {', '.join(COLOURS)}; "
            f"relations: {', '.join(RELATIONS)}")


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: float  # footprint radius, world units
    a: float
    b: float
    yaw: float  # radians
    finish: str = "plastic"

    @property
    def name(self) -> str:
        return f"the {self.colour} {self.shape}"


@dataclass(frozen=True)
class Camera:
    height: float
    distance: float  # on the ground, to the origin
    fov: float  # degrees, both sides
    aim: float = 0.3  # height of the point above the origin it looks at


@dataclass(frozen=True)
class Light:
    azimuth: float  # radians from the a axis towards the b axis
    elevation: float
    strength: float
    radius: float = 0.11  # radians: the softness of shadows


@dataclass(frozen=True)
class Floor:
    pattern: str  # "plain" or one of FLOORS
    colour: tuple[float, float, float]  # sRGB
    second: tuple[float, float, float]
    scale: float = 1.0
    yaw: float = 0.0


@dataclass(frozen=True)
class Scene:
    camera: Camera
    light: Light
    floor: Floor
    objects: tuple[Thing, ...]

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Render:
    rgb: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray  # (H, W) float32 z-depth at pixel centres
    ids: np.ndarray  # (H, W) int16, -1 floor, else the object's index


@dataclass
class Edit:
    kind: str  # move, recolour, remove, add, identity
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
    amodal_ref: np.ndarray | None = None  # (H, W) bool, its pixels as if nothing stood before it
    amodal_tgt: np.ndarray | None = None
    wrong: dict[str, np.ndarray] = field(default_factory=dict)  # counter-examples, uint8 pictures
    swapped: np.ndarray | None = None  # target with the depth order of the overlap reversed


# Unit bodies: ball |p| <= 1; dome, its upper half; frustum, radius 1 at z = 0 and `top` at z = 1;
# convex polyhedra n.p <= d over 0 <= z <= 1.
PLANES = {
    "box": ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 0, 1), (0, -1, 0, 1), (0, 0, 1, 1), (0, 0, -1, 0)),
    "pyramid": ((1, 0, 1, 1), (-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, -1, 0)),
    "roof": ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, -1, 0)),
}
CREAM, BROWN, DARK, WHITE = (0.93, 0.88, 0.76), (0.42, 0.26, 0.15), (0.13, 0.13, 0.15), (0.93, 0.93, 0.93)
# Rows: body, top, centre (3), half extents or radii (2) and height, paint (None: the object's colour).
BODIES = {
    "cube": (("box", 0, 0, 0, 0, 0.76, 0.76, 1.52, None),),
    "sphere": (("ball", 0, 0, 0, 0.96, 0.96, 0.96, 0.96, None),),
    "cylinder": (("frustum", 1, 0, 0, 0, 0.8, 0.8, 1.9, None),),
    "cone": (("frustum", 0, 0, 0, 0, 1.0, 1.0, 2.1, None),),
    "pyramid": (("pyramid", 0, 0, 0, 0, 0.86, 0.86, 1.75, None),),
    "mushroom": (("frustum", 0.8, 0, 0, 0, 0.4, 0.4, 0.95, CREAM), ("dome", 0, 0, 0, 0.8, 0.95, 0.95, 0.9, None)),
    "house": (("box", 0, 0, 0, 0, 0.74, 0.6, 0.95, None), ("roof", 0, 0, 0, 0.95, 0.84, 0.74, 0.7, BROWN)),
    "table": (("box", 0, 0, 0, 0.95, 0.84, 0.62, 0.18, None),
              *(("frustum", 1, x, y, 0, 0.11, 0.11, 0.95, BROWN) for x in (-0.66, 0.66) for y in (-0.44, 0.44))),
    "tree": (("frustum", 0.8, 0, 0, 0, 0.2, 0.2, 0.5, BROWN), ("frustum", 0, 0, 0, 0.4, 0.85, 0.85, 1.2, None),
             ("frustum", 0, 0, 0, 1.05, 0.62, 0.62, 1.1, None)),
    "bottle": (("frustum", 1, 0, 0, 0, 0.5, 0.5, 1.15, None), ("frustum", 0.4, 0, 0, 1.15, 0.5, 0.5, 0.4, None),
               ("frustum", 1, 0, 0, 1.55, 0.2, 0.2, 0.3, None), ("frustum", 1, 0, 0, 1.85, 0.23, 0.23, 0.2, WHITE)),
    "snowman": (("ball", 0, 0, 0, 0.66, 0.7, 0.7, 0.7, None), ("ball", 0, 0, 0, 1.6, 0.48, 0.48, 0.48, None),
                ("frustum", 0.9, 0, 0, 1.95, 0.34, 0.34, 0.36, DARK)),
    "lamp": (("frustum", 0.8, 0, 0, 0, 0.5, 0.5, 0.14, DARK), ("frustum", 1, 0, 0, 0.1, 0.09, 0.09, 1.1, DARK),
             ("frustum", 0.55, 0, 0, 1.1, 0.72, 0.72, 0.85, None)),
    "car": (("box", 0, 0, 0, 0.2, 0.95, 0.5, 0.45, None), ("box", 0, -0.1, 0, 0.65, 0.5, 0.42, 0.36, WHITE),
            *(("ball", 0, x, y, 0.25, 0.25, 0.14, 0.25, DARK) for x in (-0.55, 0.55) for y in (-0.48, 0.48))),
}


def linear(srgb) -> tuple:
    return tuple(F(c) ** F(2.2) for c in srgb)


@dataclass
class Part:
    """One convex body in the world: local = (Rz(-yaw) (p - centre)) / scale."""
    owner: int
    body: str
    top: np.float32
    centre: tuple  # world
    scale: tuple
    cos: np.float32
    sin: np.float32
    albedo: tuple  # linear
    finish: str

    def local(self, x, y, z, point: bool = True):
        """World point (or direction) to the unit body's frame."""
        if point:
            x, y, z = x - self.centre[0], y - self.centre[1], z - self.centre[2]
        return ((self.cos * x + self.sin * y) / self.scale[0],
                (self.cos * y - self.sin * x) / self.scale[1], z / self.scale[2])

    def corners(self):
        """World corners of the bounding box: three (8,) arrays."""
        low = -1.0 if self.body == "ball" else 0.0
        x, y, z = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (low, 1)], F).T
        x, y, z = x * self.scale[0], y * self.scale[1], z * self.scale[2]
        return (self.centre[0] + self.cos * x - self.sin * y, self.centre[1] + self.sin * x + self.cos * y,
                self.centre[2] + z)


def parts_of(scene: Scene, only: Iterable[int] | None = None) -> list[Part]:
    parts = []
    for i in range(len(scene.objects)) if only is None else only:
        thing = scene.objects[i]
        r, cos, sin = thing.size, math.cos(thing.yaw), math.sin(thing.yaw)
        for body, top, x, y, z, sx, sy, sz, paint in BODIES[thing.shape]:
            centre = (F(thing.a + r * (cos * x - sin * y)), F(thing.b + r * (sin * x + cos * y)), F(r * z))
            finish = thing.finish if paint is None else "rubber"
            parts.append(Part(i, body, F(top), centre, (F(r * sx), F(r * sy), F(r * sz)), F(cos), F(sin),
                              linear(paint or COLOURS[thing.colour]), finish))
    return parts


def interval(part: Part, o: tuple, d: tuple):
    """Entry and exit parameters of rays o + t d (local frame, broadcast) with a unit body; entry > exit: a miss."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    far_away, tiny = F(1e9), F(1e-7)
    dz = np.where(np.abs(dz) < tiny, tiny, dz)
    if part.body in PLANES:
        near, far = -far_away, far_away
        for nx, ny, nz, offset in PLANES[part.body]:
            speed, room = F(0), F(offset)
            for n, start, step in ((nx, ox, dx), (ny, oy, dy), (nz, oz, dz)):
                if n:
                    speed, room = speed + F(n) * step, room - F(n) * start
            speed = np.where(np.abs(speed) < tiny, tiny, speed)
            t = room / speed
            near = np.maximum(near, np.where(speed < 0, t, -far_away))
            far = np.minimum(far, np.where(speed > 0, t, far_away))
        return near, far
    if part.body == "frustum":  # x^2 + y^2 <= (1 - k z)^2
        k = F(1) - part.top
        w = F(1) - k * oz
        qa = dx * dx + dy * dy - k * k * dz * dz
        qb = ox * dx + oy * dy + w * k * dz
        qc = ox * ox + oy * oy - w * w
    else:
        qa, qb, qc = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - F(1)
    qa = np.where(np.abs(qa) < tiny, tiny, qa)
    disc = qb * qb - qa * qc
    root = np.sqrt(np.maximum(disc, F(0)))
    t1, t2 = (-qb - root) / qa, (-qb + root) / qa
    miss = (disc < 0) & (qa > 0)
    near, far = np.where(miss, far_away, t1), np.where(miss, -far_away, t2)
    if part.body == "frustum":
        # With qa < 0 the line is inside before one root and behind the other; only the half-line on the
        # cone's own nappe counts, and that is the one towards its base.
        steep = qa < 0
        near = np.where(steep, np.where(dz < 0, t1, -far_away), near)
        far = np.where(steep, np.where(dz < 0, far_away, t2), far)
        bottom, lid = -oz / dz, (F(1) - oz) / dz
        return np.maximum(near, np.minimum(bottom, lid)), np.minimum(far, np.maximum(bottom, lid))
    if part.body == "dome":
        bottom = -oz / dz
        near = np.where(dz > 0, np.maximum(near, bottom), near)
        far = np.where(dz < 0, np.minimum(far, bottom), far)
    return near, far


def normal_at(part: Part, x, y, z):
    """World normals (three arrays) at local surface points: the gradient of the constraint that is active."""
    if part.body in PLANES:
        planes = np.array(PLANES[part.body], F)
        active = np.argmax(planes[:, :1] * x + planes[:, 1:2] * y + planes[:, 2:3] * z - planes[:, 3:], axis=0)
        x, y, z = planes[active, 0], planes[active, 1], planes[active, 2]
    elif part.body == "frustum":
        k = F(1) - part.top
        radius = F(1) - k * z
        side = np.sqrt(x * x + y * y) - radius
        flat = np.maximum(z - F(1), -z) > side
        x, y, z = np.where(flat, F(0), x), np.where(flat, F(0), y), np.where(flat, np.sign(z - F(0.5)), k * radius)
    elif part.body == "dome":
        flat = -z > x * x + y * y + z * z - F(1)
        x, y, z = np.where(flat, F(0), x), np.where(flat, F(0), y), np.where(flat, F(-1), z)
    x, y, z = x / part.scale[0], y / part.scale[1], z / part.scale[2]
    x, y = part.cos * x - part.sin * y, part.sin * x + part.cos * y
    inverse = F(1) / np.maximum(np.sqrt(x * x + y * y + z * z), F(1e-6))
    return x * inverse, y * inverse, z * inverse


FAR = F(60)


def tilt_of(camera: Camera) -> tuple[np.float32, np.float32]:
    """Cosine and sine of the angle by which the camera looks down."""
    angle = math.atan2(camera.height - camera.aim, camera.distance)
    return F(math.cos(angle)), F(math.sin(angle))


def project(camera: Camera, a, b, z):
    """World points to image-plane coordinates (u right, v up, both tangents) and z-depth."""
    cos, sin = tilt_of(camera)
    y, z = b + F(camera.distance), z - F(camera.height)
    depth = cos * y - sin * z
    return a / depth, (sin * y + cos * z) / depth, depth


def first_hits(camera: Camera, parts: list[Part], u, v):
    """Rays (N,) through image-plane points: directions (three arrays, forward component 1, so that the
    parameter is z-depth), z-depth (N,) float32 and the index of the part hit (N,) int16, -1 floor."""
    cos, sin = tilt_of(camera)
    d = (u, cos + v * sin, v * cos - sin)
    eye = (F(0), F(-camera.distance), F(camera.height))
    depth = np.minimum(eye[2] / np.maximum(-d[2], F(1e-3)), FAR)
    hit = np.full(u.shape, -1, np.int16)
    for k, part in enumerate(parts):
        pu, pv, _ = project(camera, *part.corners())
        i = np.flatnonzero((u >= pu.min()) & (u <= pu.max()) & (v >= pv.min()) & (v <= pv.max()))
        if i.size == 0:
            continue
        near, far = interval(part, part.local(*eye), part.local(d[0][i], d[1][i], d[2][i], point=False))
        closer = (near <= far) & (near > 0) & (near < depth[i])
        i = i[closer]
        depth[i], hit[i] = near[closer], k
    return d, depth, hit


@lru_cache(1)
def noise_tile() -> np.ndarray:
    """Periodic fractal noise, (256, 256) in 0..1."""
    rng = np.random.default_rng(7)
    fy, fx = np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None]
    spectrum = np.fft.fft2(rng.standard_normal((256, 256))) / np.maximum(np.hypot(fx, fy), 1 / 256) ** 1.7
    spectrum[0, 0] = 0
    tile = np.fft.ifft2(spectrum).real
    return np.clip(0.5 + tile / (5 * tile.std()), 0, 1).astype(F)


def noise(x, y):
    return noise_tile()[(y * F(32)).astype(np.int32) & 255, (x * F(32)).astype(np.int32) & 255]


def floor_albedo(floor: Floor, x, y) -> np.ndarray:
    """Linear colours (3, N) at ground points."""
    if floor.pattern == "plain":
        share = np.zeros_like(x)
    else:
        cos, sin = F(math.cos(floor.yaw) / floor.scale), F(math.sin(floor.yaw) / floor.scale)
        x, y = cos * x + sin * y, cos * y - sin * x
        if floor.pattern == "checker":
            share = ((np.floor(x) + np.floor(y)) % 2).astype(F)
        elif floor.pattern == "planks":
            row = np.floor(y * F(2))
            along = x * F(0.4) + row * F(0.37)
            tone = (np.floor(along) * F(0.618) + row * F(0.381)) % F(1)
            seam = ((y * F(2)) % F(1) < F(0.05)) | (along % F(1) < F(0.012))
            share = np.where(seam, F(1), F(0.35) * tone + F(0.4) * noise(x * F(0.5), y * F(3)))
        elif floor.pattern == "tiles":
            share = np.where((x % F(1) < F(0.06)) | (y % F(1) < F(0.06)), F(1), F(0.15) * noise(x, y))
        elif floor.pattern == "marble":
            share = np.abs(np.sin(F(3) * x + F(9) * noise(x * F(0.7), y * F(0.7)))) ** F(4)
        elif floor.pattern == "cloth":
            share = F(0.3) * noise(x * F(2), y * F(2)) + F(0.5) * ((x % F(0.5) < F(0.25)) & (y % F(0.5) < F(0.25)))
        else:
            raise ValueError(f"Unknown floor pattern {floor.pattern!r}; expected plain or one of {', '.join(FLOORS)}.")
    first, second = linear(floor.colour), linear(floor.second)
    return np.stack([p + (q - p) * share for p, q in zip(first, second, strict=True)])


def light_directions(light: Light, count: int) -> np.ndarray:
    """Directions towards `count` points of the light's disc, (count, 3): a sunflower, the same for all pixels
    because noise in shadows would be something for the networks to learn."""
    ca, sa = math.cos(light.azimuth), math.sin(light.azimuth)
    ce, se = math.cos(light.elevation), math.sin(light.elevation)
    centre, side, up = np.array([ca * ce, sa * ce, se]), np.array([-sa, ca, 0]), np.array([-ca * se, -sa * se, ce])
    i = np.arange(count)
    radius, angle = light.radius * np.sqrt((i + 0.5) / count), i * 2.399963
    rays = centre + (radius * np.cos(angle))[:, None] * side + (radius * np.sin(angle))[:, None] * up
    return (rays / np.linalg.norm(rays, axis=1, keepdims=True)).astype(F)


def bounding_sphere(thing: Thing) -> tuple:
    """Centre (a, b, z) and radius of a sphere around the object."""
    height = max(z + sz for _, _, _, _, z, _, _, sz, _ in BODIES[thing.shape])
    return F(thing.a), F(thing.b), F(thing.size * height / 2), F(thing.size * math.hypot(1.1, height / 2))


def lit_share(scene: Scene, parts: list[Part], hit, p, facing, count: int):
    """Visible share of the light's disc, (N,) in 0..1, at points p (three arrays)."""
    blocked = np.zeros(facing.shape, F)
    rays = light_directions(scene.light, count)
    middle = light_directions(replace(scene.light, radius=0.0), 1)[0]
    spread = F(math.tan(scene.light.radius))
    for owner in sorted({part.owner for part in parts}):
        ca, cb, cz, radius = bounding_sphere(scene.objects[owner])
        x, y, z = ca - p[0], cb - p[1], cz - p[2]
        along = x * middle[0] + y * middle[1] + z * middle[2]
        across = x * x + y * y + z * z - along * along
        reach = radius + spread * np.maximum(along, F(0))
        near = np.flatnonzero(facing & (along > -radius) & (across < reach * reach))
        if near.size == 0:
            continue
        seen = np.zeros((near.size, count), bool)
        for k, part in enumerate(parts):
            if part.owner != owner:
                continue
            rows = np.flatnonzero(hit[near] != k)  # a convex part does not shade its own lit side
            i = near[rows]
            o = tuple(c[:, None] for c in part.local(p[0][i], p[1][i], p[2][i]))
            enter, leave = interval(part, o, part.local(rays[:, 0], rays[:, 1], rays[:, 2], point=False))
            seen[rows] |= (enter < leave) & (leave > F(1e-3))
        blocked[near] = np.maximum(blocked[near], seen.mean(1, dtype=F))
    return F(1) - blocked


def shade(scene: Scene, parts: list[Part], d, depth, hit, light_samples: int) -> np.ndarray:
    """Display-linear colours (3, N) in 0..1 of ray hits."""
    x, y, z = depth * d[0], depth * d[1] - F(scene.camera.distance), depth * d[2] + F(scene.camera.height)
    nx, ny, nz = np.zeros_like(x), np.zeros_like(x), np.ones_like(x)
    albedo = floor_albedo(scene.floor, x, y)
    gloss, metal = np.zeros_like(x), np.zeros(x.shape, bool)
    for k, part in enumerate(parts):
        i = np.flatnonzero(hit == k)
        if i.size == 0:
            continue
        q = part.local(x[i], y[i], z[i])
        nx[i], ny[i], nz[i] = normal_at(part, *q)
        tone = F(1)
        if part.finish in ("striped", "checkered"):
            sx, sy, sz = (F(5) * c * s for c, s in zip(q, part.scale, strict=True))
            odd = np.floor(sz) if part.finish == "striped" else np.floor(sx) + np.floor(sy) + np.floor(sz + F(0.01))
            tone = F(1) - F(0.62) * (odd % 2).astype(F)
        for c in range(3):
            albedo[c, i] = part.albedo[c] * tone
        gloss[i] = F(0.0 if part.finish == "rubber" else 1.0)
        metal[i] = part.finish == "metal"

    length = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    vx, vy, vz = -d[0] / length, -d[1] / length, -d[2] / length
    lx, ly, lz = light_directions(replace(scene.light, radius=0.0), 1)[0]
    toward = nx * lx + ny * ly + nz * lz
    key = np.maximum(toward, F(0)) * lit_share(scene, parts, hit, (x, y, z), toward > 0, light_samples)

    # Ambient light: sky from above, light off the floor from below, less of it beside other objects (sphere
    # occlusion) and close to the ground.
    open_sky = np.ones_like(x)
    owner = np.array([part.owner for part in parts] + [-1], np.int16)[hit]
    for index in sorted({part.owner for part in parts}):
        ca, cb, cz, _ = bounding_sphere(scene.objects[index])
        wx, wy, wz = ca - x, cb - y, cz - z
        square = np.maximum(wx * wx + wy * wy + wz * wz, F(1e-2))
        radius = F(0.9 * scene.objects[index].size)
        cover = np.maximum(wx * nx + wy * ny + wz * nz, F(0)) * (radius * radius) / (square * np.sqrt(square))
        open_sky *= F(1) - np.where(owner == index, F(0), np.minimum(F(1.15) * cover, F(0.8)))
    ground = owner < 0
    open_sky *= np.where(ground, F(1), F(0.62) + F(0.38) * np.minimum(z * F(1.8), F(1)))
    up = F(0.5) + F(0.5) * nz
    fill = np.maximum(F(-0.35) * nx * np.sign(lx) - F(0.75) * ny + F(0.56) * nz, F(0))

    # Highlight (Blinn) and Fresnel reflection of a bright sky.
    facing = np.maximum(nx * vx + ny * vy + nz * vz, F(1e-3))
    hx, hy, hz = vx + lx, vy + ly, vz + lz
    half = np.maximum((nx * hx + ny * hy + nz * hz) / np.sqrt(hx * hx + hy * hy + hz * hz), F(0))
    half2 = half * half
    half8 = half2 * half2 * half2 * half2
    highlight = half8 * half8 * half8 * half8 * half8 * gloss * (key > 0)
    grazing = F(1) - facing
    grazing2 = grazing * grazing
    mirror = (F(0.03) + F(0.5) * grazing2 * grazing2 * grazing) * gloss * open_sky
    upward = F(2) * facing * nz - vz  # z of the reflected view direction
    sky = F(0.35) + F(0.65) * np.clip(upward * F(1.5) + F(0.3), F(0), F(1))

    strength = F(scene.light.strength)
    # A pool of light on the floor, as in a studio: falls off slowly from the middle of the stage.
    pool = F(1) / (F(1) + F(0.012) * (x * x + (y - F(0.3)) ** 2))
    bounce = linear(scene.floor.colour)
    colour = np.empty_like(albedo)
    for c, (sun, above) in enumerate(((1.0, 0.92), (0.965, 0.97), (0.91, 1.06))):
        ambient = (F(above * 0.62) * up + F(0.75) * bounce[c] * (F(1) - up)) * open_sky
        lights = F(sun) * F(1.55) * strength * key + ambient + F(0.22) * fill
        surface = albedo[c] * lights * pool
        if metal.any():
            reflected = np.where(upward > 0, sky * F(1.5), bounce[c] * F(0.8)) * (F(0.55) + F(0.45) * open_sky)
            surface = np.where(metal, albedo[c] * (reflected + F(0.35) * lights), surface)
        colour[c] = surface + mirror * sky * F(0.9) + F(0.55) * strength * highlight
    # Filmic curve (Narkowicz's fit of ACES).
    colour *= F(0.62)
    mapped = colour * (F(2.51) * colour + F(0.03)) / (colour * (F(2.43) * colour + F(0.59)) + F(0.14))
    return np.clip(mapped, F(0), F(1))


def image_plane(camera: Camera, size: int, x, y):
    """Pixel coordinates (0..size, y down) to image-plane coordinates."""
    scale = F(2 * math.tan(math.radians(camera.fov) / 2) / size)
    return (x - F(size / 2)) * scale, (F(size / 2) - y) * scale


def trace_ids(scene: Scene, size: int, only: Iterable[int] | None = None) -> np.ndarray:
    """Instance ids only, (size, size) int16: what render() would give, without shading."""
    parts = parts_of(scene, only)
    row, column = np.divmod(np.arange(size * size), size)
    u, v = image_plane(scene.camera, size, column.astype(F) + F(0.5), row.astype(F) + F(0.5))
    _, _, hit = first_hits(scene.camera, parts, u, v)
    return np.array([p.owner for p in parts] + [-1], np.int16)[hit].reshape(size, size)


def render(scene: Scene, size: int, *, only: Iterable[int] | None = None, light_samples: int = 12,
           antialias: bool = True) -> Render:
    """The picture of a scene, side `size`. `only` lists the objects that exist (default all)."""
    if size < 8:
        raise ValueError(f"A picture needs a side of at least 8 pixels, not {size}.")
    parts = parts_of(scene, only)
    row, column = np.divmod(np.arange(size * size), size)
    row, column = row.astype(F) + F(0.5), column.astype(F) + F(0.5)
    u, v = image_plane(scene.camera, size, column, row)
    d, depth, hit = first_hits(scene.camera, parts, u, v)
    colour = shade(scene, parts, d, depth, hit, light_samples)
    if antialias:
        # Four more samples on a rotated grid, only where the part or the brightness jumps.
        image, kind = np.sqrt(colour.max(0) + colour.mean(0)).reshape(size, size), hit.reshape(size, size)
        edge = np.zeros((size, size), bool)
        across = (np.abs(np.diff(image, axis=1)) > F(0.06)) | (np.diff(kind, axis=1) != 0)
        down = (np.abs(np.diff(image, axis=0)) > F(0.06)) | (np.diff(kind, axis=0) != 0)
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        i = np.flatnonzero(edge)
        if i.size:
            shift = np.array([(-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125)], F)
            u, v = image_plane(scene.camera, size, (column[i] + shift[:, :1]).ravel(), (row[i] + shift[:, 1:]).ravel())
            d4, depth4, hit4 = first_hits(scene.camera, parts, u, v)
            fine = shade(scene, parts, d4, depth4, hit4, light_samples)
            colour[:, i] = fine.reshape(3, 4, i.size).mean(1)
    rgb = np.ascontiguousarray((colour ** F(1 / 2.2) * F(255) + F(0.5)).astype(np.uint8).T)
    ids = np.array([p.owner for p in parts] + [-1], np.int16)[hit]
    return Render(rgb.reshape(size, size, 3), depth.reshape(size, size), ids.reshape(size, size))


def disparity(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W) to disparity 1/z scaled per picture to -1..1, near = +1; zeros if it is flat.
    The rule of Depth Anything targets: min-max, no inversion."""
    d = F(1) / depth.astype(F)
    low, high = d.min(), d.max()
    if high - low < 1e-6:
        return np.zeros_like(d)
    return F(2) * (d - low) / (high - low) - F(1)


AREA = ((-1.9, 1.9), (-1.75, 2.4))  # where objects stand, in a and b
STEP = 1.3  # distance of centres for left, right, front, behind, next to
SHIFT = 1.6  # closer and farther
GAP = 0.1  # least distance between footprints after a move
LEAST_MOVE = 0.9
MARGIN = 0.2  # a relation holds by at least this much


def target_place(relation: str, objects: tuple[Thing, ...], moved: int,
                 references: tuple[int, ...]) -> tuple[float, float]:
    """Ground place (a, b) where the relation puts the object: the one rule that makes one truth per instruction."""
    thing, near = objects[moved], [objects[i] for i in references]
    if relation in CORNERS:
        return CORNERS[relation]
    if relation in ("closer", "farther"):
        return thing.a, thing.b + (SHIFT if relation == "farther" else -SHIFT)
    if relation == "between":
        return (near[0].a + near[1].a) / 2, (near[0].b + near[1].b) / 2
    side = -1 if thing.a < near[0].a else 1  # next to: the side it came from
    da, db = {"left": (-1, 0), "right": (1, 0), "front": (0, -1), "behind": (0, 1), "next to": (side, 0)}[relation]
    return near[0].a + STEP * da, near[0].b + STEP * db


def holds(relation: str, source: tuple[Thing, ...], final: tuple[Thing, ...], moved: int,
          references: tuple[int, ...]) -> bool:
    """Whether the relation is true of the final layout, by MARGIN."""
    thing, near = final[moved], [final[i] for i in references]
    if relation in CORNERS:
        # On the corner's side of the middle, and nobody on that side is nearer to (farther from) the camera.
        right, far = (1 if c > 0 else -1 for c in CORNERS[relation])
        return right * thing.a > MARGIN and all(far * (thing.b - t.b) > MARGIN for i, t in enumerate(final)
                                                if i != moved and right * t.a > 0)
    if relation == "closer":
        return thing.b < source[moved].b - MARGIN
    if relation == "farther":
        return thing.b > source[moved].b + MARGIN
    if relation == "between":
        (p, q), length = near, math.hypot(near[1].a - near[0].a, near[1].b - near[0].b)
        along = ((thing.a - p.a) * (q.a - p.a) + (thing.b - p.b) * (q.b - p.b)) / length
        return MARGIN < along < length - MARGIN
    da, db = thing.a - near[0].a, thing.b - near[0].b
    if relation == "next to":
        return abs(da) > abs(db) + MARGIN and math.hypot(da, db) < STEP + MARGIN
    value, other = {"left": (-da, db), "right": (da, db), "front": (-db, da), "behind": (db, da)}[relation]
    return value > abs(other) + MARGIN


def in_frame(scene: Scene, index: int) -> bool:
    limit = math.tan(math.radians(scene.camera.fov) / 2) * 0.98
    for part in parts_of(scene, (index,)):
        u, v, _ = project(scene.camera, *part.corners())
        if max(abs(u).max(), abs(v).max()) > limit:
            return False
    return True


def clear(objects: tuple[Thing, ...], index: int, gap: float = GAP) -> bool:
    thing = objects[index]
    return all(math.hypot(t.a - thing.a, t.b - thing.b) >= t.size + thing.size + gap
               for i, t in enumerate(objects) if i != index)


def placed(scene: Scene, moved: int, place: tuple[float, float]) -> Scene | None:
    """The scene with one object at another place, or None where that is blocked or out of the picture."""
    (a, b), ((a0, a1), (b0, b1)) = place, AREA
    if not (a0 - 0.2 <= a <= a1 + 0.2 and b0 - 0.2 <= b <= b1 + 0.8):
        return None
    objects = list(scene.objects)
    objects[moved] = replace(objects[moved], a=a, b=b)
    target = replace(scene, objects=tuple(objects))
    return target if clear(target.objects, moved) and in_frame(target, moved) else None


def candidates(rng, scene: Scene, relation: str, moved: Iterable[int]):
    """(moved, references) of a relation in random order."""
    n = len(scene.objects)
    found = []
    for m in moved:
        others = [i for i in range(n) if i != m]
        if relation in CORNERS or relation in ("closer", "farther"):
            found.append((m, ()))
        elif relation == "between":
            found += [(m, (i, j)) for i in others for j in others if i != j]
        else:
            found += [(m, (i,)) for i in others]
    return [found[i] for i in rng.permutation(len(found))]


def find_move(rng, scene: Scene, relation: str, moved: Iterable[int]) -> tuple[int, tuple[int, ...], Scene] | None:
    for m, references in candidates(rng, scene, relation, moved):
        place = target_place(relation, scene.objects, m, references)
        if math.hypot(place[0] - scene.objects[m].a, place[1] - scene.objects[m].b) < LEAST_MOVE:
            continue
        target = placed(scene, m, place)
        if target and holds(relation, scene.objects, target.objects, m, references):
            return m, references, target
    return None


def well_seen(scene: Scene, level: str, important: Iterable[int] = ()) -> bool:
    """Each object (in hard scenes: each important one) shows enough pixels."""
    counts = np.bincount(trace_ids(scene, 64).ravel() + 1, minlength=len(scene.objects) + 1)[1:]
    which = list(important) if level == "hard" else range(len(scene.objects))
    return all(counts[i] >= (0.0055 if level == "plain" else 0.004) * 64 * 64 for i in which)


def overlaps(scene: Scene, index: int) -> int:
    """Pixels (of 64 x 64) where an object and the others lie before one another."""
    alone = trace_ids(scene, 64, (index,)) == index
    return int((alone & (trace_ids(scene, 64, [i for i in range(len(scene.objects)) if i != index]) >= 0)).sum())


def uniform(rng, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def draw_scene(rng, level: str, pair: tuple[str, str] | None = None, least: int = 2) -> Scene:
    """One random scene; `pair` is the (colour, shape) of object 0 before shuffling."""
    plain = level == "plain"
    if plain:
        camera = Camera(uniform(rng, 5.2, 6.3), uniform(rng, 6.6, 7.4), uniform(rng, 34, 36.5))
        light = Light(uniform(rng, 1.95, 4.1), uniform(rng, 0.85, 1.1), uniform(rng, 0.9, 1.1))
        tone, tint = uniform(rng, 0.58, 0.76), rng.uniform(-0.025, 0.025, 3)
        colour = tuple(round(float(tone + t), 3) for t in tint)
        floor = Floor("plain", colour, colour)
    else:
        camera = Camera(uniform(rng, 4.6, 6.6), uniform(rng, 7.0, 7.8), uniform(rng, 35, 38))
        light = Light(uniform(rng, 0, 2 * math.pi), uniform(rng, 0.75, 1.15), uniform(rng, 0.85, 1.15),
                      uniform(rng, 0.06, 0.16))
        tone, tint = uniform(rng, 0.5, 0.8), rng.uniform(-0.09, 0.09, 3)
        colour = tuple(round(float(np.clip(tone + t, 0, 1)), 3) for t in tint)
        second = tuple(round(c * uniform(rng, 0.55, 0.8), 3) for c in colour)
        pattern = str(rng.choice(("plain",) + FLOORS))
        floor = Floor(pattern, colour, second, uniform(rng, 0.7, 1.2), uniform(rng, 0, math.pi))
    most = {"plain": 4, "textured": 5, "hard": 7}[level]
    least = max(least, 4 if level == "hard" else 2)
    count = int(rng.integers(least, most + 1))
    shapes = SHAPES if plain else SHAPES + COMPOUNDS
    for _ in range(1000):
        names, objects = ([pair] if pair else []), []
        while len(names) < count:
            name = (str(rng.choice(tuple(COLOURS))), str(rng.choice(shapes)))
            repeated = name[0] in [n[0] for n in names] if plain else name in names
            if name not in HELD_OUT and not repeated:
                names.append(name)
        names = [names[i] for i in rng.permutation(count)]
        for colour, shape in names:
            for _ in range(30):
                # In plain scenes a corner of cubes and pyramids faces the camera: two sides show, in two tones.
                yaw = uniform(rng, 0.4, 1.17) if plain else uniform(rng, 0, 2 * math.pi)
                size, a, b = uniform(rng, 0.48, 0.58), uniform(rng, *AREA[0]), uniform(rng, *AREA[1])
                thing = Thing(shape, colour, size, a, b, yaw, "plastic" if plain else str(rng.choice(FINISHES)))
                if clear((*objects, thing), len(objects), 0.22 if level != "hard" else 0.12):
                    objects.append(thing)
                    break
        scene = Scene(camera, light, floor, tuple(objects))
        if len(objects) == count and all(in_frame(scene, i) for i in range(count)):
            return scene
    raise ValueError(f"No layout of {count} objects fits in 1000 draws; AREA or the camera's range is wrong.")


def _rng(seed: int, level: str, split: str, purpose: int):
    if level not in LEVELS:
        raise ValueError(f"Unknown level {level!r}; expected one of {', '.join(LEVELS)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    # Splits start at multiples of their length: a seed of the range stays, any other is mapped into it.
    seed = SPLITS[split].start + seed % len(SPLITS[split])
    return seed, np.random.default_rng([seed, LEVELS.index(level), purpose])


def sample_scene(seed: int, level: str = "plain", split: str = "train") -> Scene:
    _, rng = _rng(seed, level, split, 0)
    pair = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))] if split == "unseen" else None
    while True:
        scene = draw_scene(rng, level, pair)
        if well_seen(scene, level):
            return scene


def move_instruction(rng, relation: str, objects: tuple[Thing, ...], moved: int, references: tuple[int, ...],
                     held_out: bool = False) -> str:
    patterns = wordings(relation, held_out)
    verb, tail = patterns[rng.integers(len(patterns))]
    names = dict(zip("yz", (objects[i].name for i in references)))
    return sentence(f"{verb} {objects[moved].name} {tail.format(**names)}")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def other_edit(rng, scene: Scene, level: str) -> Edit | None:
    """A generic edit of the scene (recolour, remove, add, identity), or None where it is not feasible."""
    kind = ("recolour", "remove", "add", "identity")[rng.choice(4, p=(0.35, 0.3, 0.27, 0.08))]
    patterns = OTHER_WORDINGS[kind]
    pattern = patterns[rng.integers(len(patterns))]
    index = int(rng.integers(len(scene.objects)))
    thing, taken = scene.objects[index], [(t.colour, t.shape) for t in scene.objects]
    if kind == "identity":
        return Edit(kind, "", sentence(pattern), scene)
    if kind != "add" and not well_seen(scene, level, (index,)):
        return None
    if kind == "remove":
        target = replace(scene, objects=scene.objects[:index] + scene.objects[index + 1:])
        return Edit(kind, "", sentence(pattern.format(x=thing.name)), target, index)
    used = {t.colour for t in scene.objects} if level == "plain" else set()
    free = [c for c in COLOURS if c not in used]
    colour = free[rng.integers(len(free))]
    if kind == "recolour":
        if (colour, thing.shape) in HELD_OUT or (colour, thing.shape) in taken or colour == thing.colour:
            return None
        changed = tuple(replace(t, colour=colour) if i == index else t for i, t in enumerate(scene.objects))
        text = pattern.format(x=thing.name, colour=colour)
        return Edit(kind, "", sentence(text), replace(scene, objects=changed), index)
    shapes = SHAPES if level == "plain" else SHAPES + COMPOUNDS
    shape = shapes[rng.integers(len(shapes))]
    if (colour, shape) in HELD_OUT or (colour, shape) in taken:
        return None
    # Size and yaw of an added object are fixed: the sentence does not tell them, and there is one truth.
    grown = replace(scene, objects=(*scene.objects, Thing(shape, colour, 0.53, 0.0, 9.0, 0.6)))
    relation = ("left", "right", "front", "behind", *CORNERS)[rng.integers(8)]
    found = find_move(rng, grown, relation, (len(scene.objects),))
    if found is None or not well_seen(found[2], level, (len(scene.objects),)):
        return None
    _, references, target = found
    tail = TAILS[relation][rng.integers(3)].format(y=scene.objects[references[0]].name if references else "")
    text = pattern.format(article="an" if colour[0] in "aeiou" else "a", x=f"{colour} {shape}", tail=tail)
    return Edit(kind, relation, sentence(text), target, None, references)


def training_edits(seed: int, level: str = "plain", moves: int = 2, others: int = 1) -> tuple[Scene, list[Edit]]:
    """One scene of the train split with `moves` moves of different relations and `others` generic edits."""
    if not 0 <= moves <= 6:
        raise ValueError(f"Between 0 and 6 moves of one scene can be asked for, not {moves}.")
    _, rng = _rng(seed, level, "train", 1)
    # The relations are drawn before the scene, so that rare ones are not crowded out by easy ones.
    relations = [RELATIONS[i] for i in rng.permutation(len(RELATIONS))[:moves]]
    while True:
        scene = draw_scene(rng, level, None, 3 if "between" in relations else 2)
        edits, used = [], set()
        for relation in relations:
            fresh = [i for i in range(len(scene.objects)) if i not in used] or range(len(scene.objects))
            found = find_move(rng, scene, relation, fresh) or find_move(rng, scene, relation, used)
            if found is None:
                break
            m, references, target = found
            used.add(m)
            text = move_instruction(rng, relation, scene.objects, m, references)
            edits.append(Edit("move", relation, text, target, m, references))
        if len(edits) < moves or not well_seen(scene, level, [e.moved for e in edits]):
            continue
        if not all(well_seen(e.target, level, (e.moved, *e.references)) for e in edits):
            continue
        while len(edits) < moves + others:
            edit = other_edit(rng, scene, level)
            if edit is not None:
                edits.append(edit)
        return scene, edits


OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front", "closer": "farther",
            "farther": "closer", "near left corner": "near right corner", "near right corner": "near left corner",
            "far left corner": "far right corner", "far right corner": "far left corner"}


def counter_examples(scene: Scene, target: Scene, relation: str, moved: int,
                     references: tuple[int, ...]) -> dict[str, Scene]:
    """Wrong answers to an instruction, where they fit the picture: the mirrored place, the same relation
    to another object, another relation to the same object."""
    places: dict[str, list[tuple[float, float]]] = {"mirrored": [], "wrong reference": [], "wrong relation": []}
    true, objects = target.objects[moved], scene.objects
    if relation in OPPOSITE:
        places["mirrored"].append(target_place(OPPOSITE[relation], objects, moved, references))
    elif relation == "next to":
        places["mirrored"].append((2 * objects[references[0]].a - true.a, true.b))
    if len(references) == 1:
        places["wrong reference"] += [target_place(relation, objects, moved, (i,)) for i in range(len(objects))
                                      if i not in (moved, *references)]
        places["wrong relation"] += [target_place(r, objects, moved, references)
                                     for r in ("front", "behind", "left", "right")
                                     if r not in (relation, OPPOSITE.get(relation))]
    places["wrong relation"] += [target_place(r, objects, moved, ()) for r in ("closer", "farther", *CORNERS)
                                 if r not in (relation, OPPOSITE.get(relation))]
    found = {}
    for name, options in places.items():
        for place in options:
            # Both a wrong place and not the source: a picture that no reader would call right.
            if min(math.hypot(place[0] - t.a, place[1] - t.b) for t in (true, objects[moved])) < LEAST_MOVE:
                continue
            wrong = placed(scene, moved, place)
            if wrong:
                found[name] = wrong
                break
    return found


def draw_move(rng, level: str, split: str) -> tuple[Scene, Scene, str, int, tuple[int, ...]]:
    """Source, target, relation, moved object and references of one instruction, redrawn until feasible."""
    pair = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))] if split == "unseen" else None
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    while True:
        scene = draw_scene(rng, level, pair, 3 if relation == "between" else 2)
        movable = [i for i, t in enumerate(scene.objects) if pair is None or (t.colour, t.shape) == pair]
        found = find_move(rng, scene, relation, movable)
        if found is None:
            continue
        moved, references, target = found
        if not all(well_seen(s, level, (moved, *references)) for s in (scene, target)):
            continue
        if level == "hard":  # something must lie before something, or the move must go deep
            deep = abs(target.objects[moved].b - scene.objects[moved].b) > 2.5
            if not deep and max(overlaps(scene, moved), overlaps(target, moved)) < 6:
                continue
        return scene, target, relation, moved, references


def make_pair(seed: int, level: str = "plain", split: str = "seen", size: int = 128, index: int | None = None,
              extras: bool = True) -> Pair:
    """One instruction with its pictures. A seed inside the split's range is the scene's own; with `index`,
    (seed, index) name the scene, so that any seed gives a run of different scenes."""
    if index is not None:
        seed = seed * 1_000_003 + index
    seed, rng = _rng(seed, level, split, 2)
    scene, target, relation, moved, references = draw_move(rng, level, split)
    instruction = move_instruction(rng, relation, scene.objects, moved, references, held_out=split == "unseen")
    ref, tgt = render(scene, size), render(target, size)
    pair = Pair(seed, level, split, instruction, relation, scene, target, moved, references, ref.rgb, tgt.rgb,
                ref.depth, tgt.depth, ref.ids, tgt.ids, ref.ids == moved, tgt.ids == moved)
    if not extras:
        return pair
    others = [i for i in range(len(scene.objects)) if i != moved]
    empty = render(scene, size, only=others)
    pair.empty = empty.rgb
    pair.amodal_ref = trace_ids(scene, size, (moved,)) == moved
    pair.amodal_tgt = trace_ids(target, size, (moved,)) == moved
    wrong = counter_examples(scene, target, relation, moved, references)
    pair.wrong = {name: render(s, size).rgb for name, s in wrong.items()}
    overlap = pair.amodal_tgt & (empty.ids >= 0)
    if overlap.any():
        # In the overlap the other object's surface changes places with the moved one's.
        alone = render(target, size, only=(moved,)).rgb
        pair.swapped = np.where((overlap & pair.mask_tgt)[..., None], pair.empty, pair.tgt)
        pair.swapped[overlap & ~pair.mask_tgt] = alone[overlap & ~pair.mask_tgt]
    return pair


def show(level: str, split: str, seed: int, count: int, size: int, output: str) -> None:
    from PIL import Image, ImageDraw  # only the sheet needs it

    head, gap, columns = 18, 4, ("reference", "target", "empty", "depth of target", "masks")
    sheet = Image.new("RGB", (len(columns) * (size + gap), count * (size + head + gap) + head), "white")
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        draw.text((c * (size + gap) + 2, 3), name, fill="black")
    for i in range(count):
        pair = make_pair(seed, level, split, size, index=i)
        grey = np.repeat(((disparity(pair.tgt_depth) + 1) * 127.5).astype(np.uint8)[..., None], 3, 2)
        masks = pair.empty // 2 + 60
        masks[pair.mask_ref], masks[pair.mask_tgt] = (220, 60, 40), (40, 180, 80)
        top = head + i * (size + head + gap)
        for c, picture in enumerate((pair.ref, pair.tgt, pair.empty, grey, masks)):
            sheet.paste(Image.fromarray(picture), (c * (size + gap), top))
        draw.text((2, top + size + 2), f"{pair.instruction}  [{pair.relation}, seed {pair.seed}]", fill="black")
    sheet.save(output)
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Scenes of the embedded world.")
    parser.add_argument("--show", action="store_true", help="write a sheet of pairs")
    parser.add_argument("--level", choices=LEVELS, default="plain")
    parser.add_argument("--split", choices=tuple(SPLITS), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--output", default="scenes.png")
    args = parser.parse_args()
    try:
        if not args.show:
            raise ValueError("Nothing to do: give --show to draw a sheet of pairs.")
        if args.count < 1:
            raise ValueError(f"--count must be at least 1, not {args.count}.")
        show(args.level, args.split, args.seed, args.count, args.size, args.output)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
