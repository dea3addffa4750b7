"""The pictures of the embedded world: a scene goes in; colours, depth and instance ids come out.

Each object is a few convex bodies, affine images of a ball, a frustum, a box, a pyramid or a roof: a ray meets each in one
interval, in closed form, so depth is exact. Ray directions have forward component 1: the parameter of a hit is z-depth.

Ground coordinates are aligned with the camera: a to the right, b away from it, z up, one unit about
the width of an object. Pictures are (H, W, 3) uint8, depth is z-depth along the optical axis.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

F = np.float32  # a stray float64 scalar would promote whole pictures

COLOURS = {  # sRGB, 0..1: hues far apart, and neighbours in hue differ in lightness
    "red": (0.84, 0.08, 0.08), "orange": (0.98, 0.46, 0.03), "yellow": (0.97, 0.86, 0.10),
    "green": (0.10, 0.58, 0.16), "cyan": (0.12, 0.80, 0.84), "blue": (0.10, 0.22, 0.82),
    "purple": (0.44, 0.12, 0.62), "pink": (0.98, 0.50, 0.72),
}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: float  # footprint radius, world units
    a: float
    b: float
    yaw: float  # radians
    finish: str = "plastic"
    z: float = 0.0  # height of its base above the floor

    @property
    def top(self) -> float:
        """Height of its highest point above the floor."""
        return self.z + self.size * max(z + height for _, _, _, _, z, _, _, height, _ in BODIES[self.shape])

    @property
    def name(self) -> str:
        return f"the {self.colour} {self.shape}"


@dataclass(frozen=True)
class Camera:
    height: float
    distance: float  # on the ground, to the origin
    fov: float  # degrees, both sides
    aim: float = 0.3  # height of the point above the origin it looks at
    roll: float = 0.0  # degrees, clockwise as the camera sees it: the picture turns the other way

    @property
    def pose(self) -> tuple[np.ndarray, np.float32, np.float32]:
        """Eye (3,), cosine and sine of the angle by which the camera looks down."""
        angle = math.atan2(self.height - self.aim, self.distance)
        return np.array([0, -self.distance, self.height], F), F(math.cos(angle)), F(math.sin(angle))

    def level(self, u, v, back: bool = False):
        """Image-plane coordinates (u right, v up, both tangents) of a picture to those of a camera without roll, or back."""
        cos, sin = F(math.cos(math.radians(self.roll))), F(math.sin(math.radians(-self.roll if back else self.roll)))
        return cos * u + sin * v, cos * v - sin * u

    def ground(self, u: float, v: float) -> tuple[float, float]:
        """Ground point (a, b) that a camera without roll sees at image-plane coordinates below the horizon."""
        (_, _, height), cos, sin = self.pose
        depth = float(height / (sin - v * cos))
        return u * depth, float(cos + v * sin) * depth - self.distance


@dataclass(frozen=True)
class Light:
    azimuth: float  # radians from the a axis towards the b axis
    elevation: float
    strength: float
    radius: float = 0.11  # radians: the softness of shadows
    pool: float = 0.012  # how fast it falls off from the middle of the stage


@dataclass(frozen=True)
class Floor:
    pattern: str  # a key of FLOORS
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
    wide: bool = False  # places anywhere in the picture, and distances in proportion to the camera's


@dataclass
class Render:
    rgb: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray  # (H, W) float32 z-depth at pixel centres
    ids: np.ndarray  # (H, W) int16, -1 floor, else the object's index


# Unit bodies: planes n.p <= d (rows: n, d), and for ball |p| <= 1, for frustum radius 1 at z = 0 and `top` at z = 1.
PLANES = {
    "ball": (),
    "frustum": ((0, 0, 1, 1), (0, 0, -1, 0)),
    "box": ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 0, 1), (0, -1, 0, 1), (0, 0, 1, 1), (0, 0, -1, 0)),
    "pyramid": ((1, 0, 1, 1), (-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, -1, 0)),
    "roof": ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, -1, 0)),
}
CREAM, BROWN, DARK, WHITE = (0.93, 0.88, 0.76), (0.42, 0.26, 0.15), (0.13, 0.13, 0.15), (0.93, 0.93, 0.93)
STONE = (0.78, 0.77, 0.74)
# Rows: body, top, centre (3), half extents or radii (2) and height, paint (None: the object's colour).
BODIES = {
    "cube": (("box", 0, 0, 0, 0, 0.76, 0.76, 1.52, None),),
    "sphere": (("ball", 0, 0, 0, 0.96, 0.96, 0.96, 0.96, None),),
    "cylinder": (("frustum", 1, 0, 0, 0, 0.8, 0.8, 1.9, None),),
    "cone": (("frustum", 0, 0, 0, 0, 1.0, 1.0, 2.1, None),),
    "pyramid": (("pyramid", 0, 0, 0, 0, 0.86, 0.86, 1.75, None),),
    "mushroom": (("frustum", 0.8, 0, 0, 0, 0.5, 0.5, 1.1, CREAM), ("ball", 0, 0, 0, 1.25, 0.9, 0.9, 0.5, None)),
    "house": (("box", 0, 0, 0, 0, 0.74, 0.6, 0.95, None), ("roof", 0, 0, 0, 0.95, 0.84, 0.74, 0.7, BROWN)),
    "table": (("box", 0, 0, 0, 0.95, 0.84, 0.62, 0.18, None),
              *(("frustum", 1, x, y, 0, 0.11, 0.11, 0.95, BROWN) for x in (-0.66, 0.66) for y in (-0.44, 0.44))),
    "tree": (("frustum", 0.8, 0, 0, 0, 0.2, 0.2, 0.5, BROWN), ("frustum", 0, 0, 0, 0.4, 0.85, 0.85, 1.2, None),
             ("frustum", 0, 0, 0, 1.05, 0.62, 0.62, 1.1, None)),
    "bottle": (("frustum", 1, 0, 0, 0, 0.5, 0.5, 1.15, None), ("frustum", 0.4, 0, 0, 1.15, 0.5, 0.5, 0.4, None),
               ("frustum", 1, 0, 0, 1.55, 0.22, 0.22, 0.5, WHITE)),
    "snowman": (("ball", 0, 0, 0, 0.66, 0.7, 0.7, 0.7, None), ("ball", 0, 0, 0, 1.6, 0.48, 0.48, 0.48, None),
                ("frustum", 0.9, 0, 0, 1.95, 0.34, 0.34, 0.36, DARK)),
    "lamp": (("frustum", 0.15, 0, 0, 0, 0.5, 0.5, 0.3, DARK), ("frustum", 1, 0, 0, 0, 0.09, 0.09, 1.2, DARK),
             ("frustum", 0.55, 0, 0, 1.1, 0.72, 0.72, 0.85, None)),
    "car": (("box", 0, 0, 0, 0.2, 0.95, 0.5, 0.45, None), ("box", 0, -0.1, 0, 0.65, 0.5, 0.42, 0.36, WHITE),
            *(("ball", 0, x, y, 0.25, 0.25, 0.14, 0.25, DARK) for x in (-0.55, 0.55) for y in (-0.48, 0.48))),
    # What things stand on, low to high. Corners stay within 1.1 of the middle, see bounding_sphere.
    "block": (("box", 0, 0, 0, 0, 0.77, 0.77, 0.55, None),),
    "plinth": (("box", 0, 0, 0, 0, 0.72, 0.72, 1.2, None), ("box", 0, 0, 0, 1.2, 0.77, 0.77, 0.14, STONE)),
    "pillar": (("frustum", 1, 0, 0, 0, 0.66, 0.66, 2.1, None), ("frustum", 1, 0, 0, 2.1, 0.8, 0.8, 0.16, STONE)),
}
FINISHES = ("plastic", "rubber", "metal", "striped")
FLOORS = {  # share of the second colour at ground points, 0..1
    "plain": lambda x, y: np.zeros_like(x),
    "checker": lambda x, y: (np.floor(x) + np.floor(y)) % 2,
    "tiles": lambda x, y: ((x % 1 < F(0.06)) | (y % 1 < F(0.06))).astype(F),
    "planks": lambda x, y: (np.floor(F(0.4) * x + F(0.37) * np.floor(2 * y)) + np.floor(2 * y)) * F(0.618) % 1,
    "dots": lambda x, y: ((x % 1 - F(0.5)) ** 2 + (y % 1 - F(0.5)) ** 2 < F(0.06)).astype(F),
}


def linear(srgb) -> np.ndarray:
    return np.array([F(c) ** F(2.2) for c in srgb])


def dot(p, q):
    """Of vectors (3, N): the components lie apart, for sums over an axis of length 3 are slow."""
    return p[0] * q[0] + p[1] * q[1] + p[2] * q[2]


@dataclass
class Part:
    """One convex body in the world: local = (Rz(-yaw) (p - centre)) / scale."""
    owner: int
    body: str
    top: np.float32
    centre: np.ndarray  # (3,) world
    scale: np.ndarray  # (3,)
    cos: np.float32
    sin: np.float32
    albedo: np.ndarray  # (3,) linear
    finish: str

    def local(self, p, point: bool = True):
        """World points (or directions), (3, ...), to the unit body's frame: three arrays."""
        x, y, z = (c - m for c, m in zip(p, self.centre)) if point else p
        return ((self.cos * x + self.sin * y) / self.scale[0], (self.cos * y - self.sin * x) / self.scale[1],
                z / self.scale[2])

    def outline(self, camera: Camera):
        """Image-plane coordinates of the bounding box's corners in the picture: two (8,) arrays."""
        box = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1 if self.body == "ball" else 0, 1)], F)
        (x, y, z), (eye, cos, sin) = (box * self.scale).T, camera.pose
        x, y = self.centre[0] + self.cos * x - self.sin * y, self.centre[1] + self.sin * x + self.cos * y - eye[1]
        z = self.centre[2] + z - eye[2]
        depth = cos * y - sin * z
        return camera.level(x / depth, (sin * y + cos * z) / depth, back=True)


def parts_of(scene: Scene, only: Iterable[int] | None = None) -> list[Part]:
    parts = []
    for i in range(len(scene.objects)) if only is None else only:
        thing = scene.objects[i]
        r, cos, sin = thing.size, math.cos(thing.yaw), math.sin(thing.yaw)
        for body, top, x, y, z, *scale, paint in BODIES[thing.shape]:
            centre = np.array([thing.a + r * (cos * x - sin * y), thing.b + r * (sin * x + cos * y), thing.z + r * z], F)
            finish = thing.finish if paint is None else "rubber"
            parts.append(Part(i, body, F(top), centre, np.array([r * s for s in scale], F), F(cos), F(sin),
                              linear(paint or COLOURS[thing.colour]), finish))
    return parts


def owners(parts: list[Part], hit) -> np.ndarray:
    """Part indices to object indices, int16; -1 stays."""
    return np.array([part.owner for part in parts] + [-1], np.int16)[hit]


def interval(part: Part, o, d):
    """Entry and exit parameters of rays o + t d (local frame, broadcast) with a unit body; entry > exit: a miss."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    far_away, tiny = F(1e9), F(1e-7)
    dz = np.where(np.abs(dz) < tiny, tiny, dz)
    near, far = -far_away, far_away
    for nx, ny, nz, offset in PLANES[part.body]:
        speed, room = nx * dx + ny * dy + nz * dz, offset - nx * ox - ny * oy - nz * oz
        speed = np.where(np.abs(speed) < tiny, tiny, speed)
        near = np.maximum(near, np.where(speed < 0, room / speed, -far_away))
        far = np.minimum(far, np.where(speed > 0, room / speed, far_away))
    if part.body not in ("ball", "frustum"):
        return near, far
    qa, qb, qc = dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy
    if part.body == "ball":
        qa, qb, qc = qa + dz * dz, qb + oz * dz, qc + oz * oz - F(1)
    else:  # x^2 + y^2 <= w^2, w = 1 - k z
        k = F(1) - part.top
        w = F(1) - k * oz
        qa, qb, qc = qa - k * k * dz * dz, qb + w * k * dz, qc - w * w
    qa = np.where(np.abs(qa) < tiny, tiny, qa)
    disc = qb * qb - qa * qc
    root = np.sqrt(np.maximum(disc, F(0)))
    t1, t2 = (-qb - root) / qa, (-qb + root) / qa
    # With qa < 0 the line is inside before one root and behind the other; only the half-line on the
    # cone's own nappe counts, and that is the one towards its base.
    miss, steep, down = (disc < 0) & (qa > 0), qa < 0, dz < 0
    enter = np.where(miss, far_away, np.where(steep & ~down, -far_away, t1))
    leave = np.where(miss, -far_away, np.where(steep & down, far_away, t2))
    return np.maximum(near, enter), np.minimum(far, leave)


def normal_at(part: Part, x, y, z) -> np.ndarray:
    """World normals (3, N) at local surface points: the gradient of the constraint that is active."""
    if part.body == "frustum":
        k = F(1) - part.top
        radius = F(1) - k * z
        flat = np.maximum(z - F(1), -z) > np.sqrt(x * x + y * y) - radius
        x, y, z = np.where(flat, F(0), x), np.where(flat, F(0), y), np.where(flat, np.sign(z - F(0.5)), k * radius)
    elif part.body != "ball":
        planes = np.array(PLANES[part.body], F)
        nx, ny, nz, offset = planes.T[..., None]
        x, y, z = planes[np.argmax(nx * x + ny * y + nz * z - offset, axis=0), :3].T
    x, y, z = x / part.scale[0], y / part.scale[1], z / part.scale[2]
    normal = np.stack([part.cos * x - part.sin * y, part.sin * x + part.cos * y, z])
    return normal * (F(1) / np.maximum(np.sqrt(dot(normal, normal)), F(1e-6)))


def first_hits(camera: Camera, parts: list[Part], size: int, x, y):
    """Rays through pixel coordinates (N,): directions (3, N) with forward component 1, so that the parameter
    is z-depth; z-depth (N,) float32; the index of the part hit (N,) int16, -1 floor."""
    scale, (eye, cos, sin) = F(2 * math.tan(math.radians(camera.fov) / 2) / size), camera.pose
    u, v = (x - F(size / 2)) * scale, (F(size / 2) - y) * scale
    right, up = camera.level(u, v)
    d = np.stack([right, cos + up * sin, up * cos - sin])
    depth = np.minimum(eye[2] / np.maximum(-d[2], F(1e-3)), F(60))
    hit = np.full(u.shape, -1, np.int16)
    for k, part in enumerate(parts):
        pu, pv = part.outline(camera)
        i = np.flatnonzero((u >= pu.min()) & (u <= pu.max()) & (v >= pv.min()) & (v <= pv.max()))
        near, far = interval(part, part.local(eye), part.local(d[:, i], point=False))
        closer = (near <= far) & (near > 0) & (near < depth[i])
        i = i[closer]
        depth[i], hit[i] = near[closer], k
    return d, depth, hit


def floor_albedo(floor: Floor, x, y) -> np.ndarray:
    """Linear colours (3, N) at ground points."""
    cos, sin = F(math.cos(floor.yaw) / floor.scale), F(math.sin(floor.yaw) / floor.scale)
    share = FLOORS[floor.pattern](cos * x + sin * y, cos * y - sin * x)
    first, second = linear(floor.colour)[:, None], linear(floor.second)[:, None]
    return first + (second - first) * share


def light_rays(light: Light, count: int = 12) -> np.ndarray:
    """Directions towards the middle of the light's disc and towards `count` points of it, (3, 1 + count): a sunflower,
    the same for all pixels because noise in shadows would be something for the networks to learn."""
    ca, sa = math.cos(light.azimuth), math.sin(light.azimuth)
    ce, se = math.cos(light.elevation), math.sin(light.elevation)
    centre, side, up = np.array([ca * ce, sa * ce, se]), np.array([-sa, ca, 0]), np.array([-ca * se, -sa * se, ce])
    i = np.arange(count)
    radius, angle = light.radius * np.sqrt((i + 0.5) / count), i * 2.399963
    disc = centre + (radius * np.cos(angle))[:, None] * side + (radius * np.sin(angle))[:, None] * up
    rays = np.concatenate([centre[None], disc])
    return (rays / np.linalg.norm(rays, axis=1, keepdims=True)).astype(F).T


def bounding_sphere(thing: Thing):
    """Centre (3, 1) and radius of a sphere around the object."""
    height = max(z + sz for _, _, _, _, z, _, _, sz, _ in BODIES[thing.shape])
    middle = thing.z + thing.size * height / 2
    return np.array([[thing.a], [thing.b], [middle]], F), F(thing.size * math.hypot(1.1, height / 2))


def lit_share(scene: Scene, parts: list[Part], rays, hit, p, facing):
    """Visible share of the light's disc, (N,) in 0..1, at points p (3, N)."""
    blocked = np.zeros(facing.shape, F)
    for k, part in enumerate(parts):
        # Only where the object's bounding sphere reaches into the cone of rays; no convex part shades its own lit side.
        centre, radius = bounding_sphere(scene.objects[part.owner])
        to = centre - p
        along = dot(to, rays[:, 0])
        across = dot(to, to) - along * along
        reach = radius + F(math.tan(scene.light.radius)) * np.maximum(along, F(0))
        i = np.flatnonzero(facing & (hit != k) & (along > -radius) & (across < reach * reach))
        o = [c[:, None] for c in part.local(p[:, i])]
        enter, leave = interval(part, o, part.local(rays[:, 1:], point=False))
        blocked[i] = np.maximum(blocked[i], ((enter < leave) & (leave > F(1e-3))).mean(1, dtype=F))
    return F(1) - blocked


def shade(scene: Scene, parts: list[Part], d, depth, hit) -> np.ndarray:
    """Display-linear colours (3, N) in 0..1 of ray hits."""
    p = depth * d + scene.camera.pose[0][:, None]
    normal = np.zeros_like(p)
    normal[2] = 1
    albedo = floor_albedo(scene.floor, p[0], p[1])
    gloss, metal = np.zeros_like(depth), np.zeros(depth.shape, bool)
    for k, part in enumerate(parts):
        i = np.flatnonzero(hit == k)
        x, y, z = part.local(p[:, i])
        normal[:, i] = normal_at(part, x, y, z)
        dark = np.floor(F(5) * z * part.scale[2]) % F(2) if part.finish == "striped" else F(0)
        albedo[:, i] = part.albedo[:, None] * (F(1) - F(0.62) * dark)
        gloss[i], metal[i] = part.finish != "rubber", part.finish == "metal"

    view = -d / np.sqrt(dot(d, d))
    rays = light_rays(scene.light)
    sun = rays[:, 0]
    toward = dot(normal, sun)
    key = np.maximum(toward, F(0)) * lit_share(scene, parts, rays, hit, p, toward > 0)

    # Ambient light: sky from above, light off the floor from below, less of it beside other objects (sphere
    # occlusion) and close to the ground.
    open_sky, owner = np.ones_like(depth), owners(parts, hit)
    for index in sorted({part.owner for part in parts}):
        to = bounding_sphere(scene.objects[index])[0] - p
        square = np.maximum(dot(to, to), F(1e-2))
        radius = F(0.9 * scene.objects[index].size)
        cover = np.maximum(dot(to, normal), F(0)) * (radius * radius) / (square * np.sqrt(square))
        open_sky *= F(1) - np.where(owner == index, F(0), np.minimum(F(1.15) * cover, F(0.8)))
    open_sky *= np.where(owner < 0, F(1), F(0.62) + F(0.38) * np.minimum(p[2] * F(1.8), F(1)))
    up = F(0.5) + F(0.5) * normal[2]
    fill = np.maximum(F(-0.35) * normal[0] * np.sign(sun[0]) - F(0.75) * normal[1] + F(0.56) * normal[2], F(0))

    # Highlight (Blinn) and Fresnel reflection of a bright sky.
    facing = np.maximum(dot(normal, view), F(1e-3))
    halfway = view + sun[:, None]
    half = np.maximum(dot(normal, halfway) / np.sqrt(dot(halfway, halfway)), F(0))
    half2 = half * half
    half8 = half2 * half2 * half2 * half2
    highlight = half8 * half8 * half8 * half8 * half8 * gloss * (key > 0)
    grazing = F(1) - facing
    grazing2 = grazing * grazing
    mirror = (F(0.03) + F(0.5) * grazing2 * grazing2 * grazing) * gloss * open_sky
    upward = F(2) * facing * normal[2] - view[2]  # z of the reflected view direction
    sky = F(0.35) + F(0.65) * np.clip(upward * F(1.5) + F(0.3), F(0), F(1))

    strength, warm = F(scene.light.strength), np.array([[1.0], [0.965], [0.91]], F)
    blue, bounce = (np.array([[0.92], [0.97], [1.06]]) * 0.62).astype(F), linear(scene.floor.colour)[:, None]
    # A pool of light on the floor, as in a studio: falls off slowly from the middle of the stage.
    pool = F(1) / (F(1) + F(scene.light.pool) * (p[0] * p[0] + (p[1] - F(0.3)) ** 2))
    ambient = (blue * up + F(0.75) * bounce * (F(1) - up)) * open_sky
    lights = warm * F(1.55) * strength * key + ambient + F(0.22) * fill
    polished = F(0.35) * lights + F(1.8) * np.clip(upward, F(0.1), F(1)) * open_sky  # metal reflects the sky
    surface = np.where(metal, albedo * polished, albedo * lights * pool)
    colour = surface + mirror * sky * F(0.9) + F(0.55) * strength * highlight
    # Filmic curve (Narkowicz's fit of ACES).
    colour *= F(0.62)
    mapped = colour * (F(2.51) * colour + F(0.03)) / (colour * (F(2.43) * colour + F(0.59)) + F(0.14))
    return np.clip(mapped, F(0), F(1))


def trace_ids(scene: Scene, size: int, only: Iterable[int] | None = None) -> np.ndarray:
    """Instance ids only, (size, size) int16: what render() would give, without shading."""
    parts = parts_of(scene, only)
    y, x = np.indices((size, size), F).reshape(2, -1) + F(0.5)
    _, _, hit = first_hits(scene.camera, parts, size, x, y)
    return owners(parts, hit).reshape(size, size)


def render(scene: Scene, size: int, *, only: Iterable[int] | None = None, antialias: bool = True) -> Render:
    """The picture of a scene, side `size`. `only` lists the objects that exist (default all)."""
    if size < 8:
        raise ValueError(f"A picture needs a side of at least 8 pixels, not {size}.")
    parts = parts_of(scene, only)
    y, x = np.indices((size, size), F).reshape(2, -1) + F(0.5)
    d, depth, hit = first_hits(scene.camera, parts, size, x, y)
    colour = shade(scene, parts, d, depth, hit)
    if antialias:
        # Four more samples on a rotated grid, only where the part or the brightness jumps.
        image, kind = np.sqrt(colour.max(0) + colour.mean(0)).reshape(size, size), hit.reshape(size, size)
        edge = np.zeros((size, size), bool)
        for one, next_one in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
            jump = (np.abs(image[next_one] - image[one]) > F(0.06)) | (kind[next_one] != kind[one])
            edge[one] |= jump
            edge[next_one] |= jump
        i = np.flatnonzero(edge)
        shift = np.array([(-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125)], F)
        x, y = (x[i] + shift[:, :1]).ravel(), (y[i] + shift[:, 1:]).ravel()
        fine = shade(scene, parts, *first_hits(scene.camera, parts, size, x, y))
        colour[:, i] = fine.reshape(3, 4, i.size).mean(1)
    rgb = np.ascontiguousarray((colour ** F(1 / 2.2) * F(255) + F(0.5)).astype(np.uint8).T)
    return Render(rgb.reshape(size, size, 3), depth.reshape(size, size), owners(parts, hit).reshape(size, size))


def disparity(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W) to disparity 1/z scaled per picture to -1..1, near = +1; zeros if it is flat.
    The rule of Depth Anything targets: min-max, no inversion."""
    d = F(1) / depth.astype(F)
    low, high = d.min(), d.max()
    if high - low < 1e-6:
        return np.zeros_like(d)
    return F(2) * (d - low) / (high - low) - F(1)
