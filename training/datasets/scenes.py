"""Rendered rooms with exact labels, a data set without a download; not a benchmark.

A scene is a room with furniture, drawn by casting one ray per pixel. Every object is
made of boxes, ellipsoids and frustums (cylinders and cones among them), so its class,
its normals, its box and its attributes are known exactly. World coordinates are x, y
on the floor and z up, in metres; camera coordinates are x right, y down, z forward.
"""

import dataclasses
import zlib
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

HEIGHT, WIDTH = 96, 128
FOCAL = 100.0  # in pixels: 65 degrees from left to right
VOID = 255
MIN_VISIBLE_PIXELS = 25  # smaller objects stay in the image, but get no box
OCCLUDED_SHARE = 0.1  # of an object's silhouette hidden by other objects

_columns, _rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
# The ray of each pixel in camera coordinates, scaled to z = 1.
RAYS = np.stack(
    [
        (_columns - (WIDTH - 1) / 2) / FOCAL,
        (_rows - (HEIGHT - 1) / 2) / FOCAL,
        np.ones((HEIGHT, WIDTH)),
    ],
    axis=-1,
)  # (H, W, 3)


class Material(NamedTuple):
    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]
    textures: tuple[str, ...]
    shininess: float = 0.0
    glow: float = 0.0


TEXTURES = ("plain", "striped", "checked", "dotted", "speckled")
MATERIALS = {
    "wood": Material((0.05, 0.1), (0.4, 0.7), (0.35, 0.8), ("plain", "speckled"), 0.1),
    "slats": Material((0.05, 0.1), (0.4, 0.7), (0.35, 0.8), ("striped",)),
    "planks": Material((0.05, 0.1), (0.3, 0.6), (0.4, 0.8), ("striped",), 0.15),
    "tiles": Material((0.0, 1.0), (0.05, 0.25), (0.5, 0.9), ("checked",), 0.3),
    "carpet": Material((0.0, 1.0), (0.1, 0.4), (0.3, 0.8), ("plain", "speckled")),
    "plaster": Material((0.0, 1.0), (0.0, 0.25), (0.75, 0.97), ("plain",)),
    "wallpaper": Material((0.0, 1.0), (0.1, 0.3), (0.7, 0.95), ("striped", "dotted")),
    "cloth": Material((0.0, 1.0), (0.2, 0.8), (0.25, 0.9), TEXTURES),
    "print": Material((0.0, 1.0), (0.3, 0.9), (0.3, 0.9), TEXTURES[1:]),
    "lacquer": Material((0.0, 1.0), (0.0, 0.8), (0.2, 0.95), ("plain",), 0.6),
    "ceramic": Material((0.0, 1.0), (0.2, 0.8), (0.3, 0.95), TEXTURES[:4], 0.8),
    "metal": Material((0.55, 0.65), (0.0, 0.15), (0.15, 0.7), ("plain",), 0.8),
    "cardboard": Material((0.07, 0.1), (0.35, 0.55), (0.55, 0.8), ("plain",)),
    "leaves": Material((0.22, 0.38), (0.5, 0.8), (0.25, 0.6), ("speckled",)),
    "sky": Material((0.52, 0.62), (0.05, 0.4), (0.8, 1.0), ("plain",), 0.5, 1.0),
    "shade": Material((0.08, 0.15), (0.1, 0.4), (0.9, 1.0), ("plain", "striped"), 0, 1),
}


class Part(NamedTuple):
    """A shape stretched to the box x, y, z, given in fractions of its object.

    A frustum goes from radius `bottom` to radius `top`, in fractions of that box.
    """

    shape: str
    x: tuple[float, float] = (0, 1)
    y: tuple[float, float] = (0, 1)
    z: tuple[float, float] = (0, 1)
    accent: bool = False  # in the object's second material
    bottom: float = 1.0
    top: float = 1.0


def _legs(height: float, width: float, shape: str) -> tuple[Part, ...]:
    ends = ((0.02, 0.02 + width), (0.98 - width, 0.98))
    return tuple(Part(shape, x, y, (0, height), True) for x in ends for y in ends)


def _boards(*heights: float) -> tuple[Part, ...]:
    return tuple(Part("box", z=(height, height + 0.03)) for height in heights)


_WIDE_BASE = Part("frustum", z=(0, 0.03), accent=True)
_POLE = Part("frustum", (0.45, 0.55), (0.45, 0.55), (0.03, 0.7), accent=True)


class Kind(NamedTuple):
    name: str
    mean_count: float  # in a room, before those without a free place are dropped
    places: tuple[str, ...]
    smallest: tuple[float, float, float]  # width, depth, height in metres
    largest: tuple[float, float, float]
    materials: tuple[str, ...]
    accents: tuple[str, ...]
    parts: tuple[Part, ...]


# Large things first: what comes later takes the free places. A kind may have several
# rows. Crates and boxes share a shape, as do pictures and windows, bins and vases;
# cabinets, tables, shelves and doors share materials, as do rugs, sofas and chairs.
# fmt: off
KINDS = (
    Kind("door", 0.7, ("at_wall",), (0.8, 0.08, 2.0), (1.0, 0.1, 2.15),
         ("wood", "lacquer"), ("metal",), (
             Part("box", y=(0.5, 1)), Part("box", (0.08, 0.92), (0.3, 1), (0, 0.96)),
             Part("ellipsoid", (0.78, 0.86), (0, 0.5), (0.46, 0.5), True))),
    Kind("cabinet", 1.0, ("at_wall",), (0.6, 0.4, 0.7), (1.6, 0.6, 2.0),
         ("wood", "lacquer"), ("wood", "lacquer"), (
             Part("box", y=(0.04, 1)),
             Part("box", (0.02, 0.49), (0, 0.04), (0.04, 0.96), True),
             Part("box", (0.51, 0.98), (0, 0.04), (0.04, 0.96), True))),
    Kind("sofa", 0.6, ("at_wall", "floor"), (1.4, 0.8, 0.7), (2.2, 1.0, 0.95),
         ("cloth",), ("cloth",), (
             Part("box", z=(0, 0.3)), Part("box", y=(0.75, 1), z=(0.3, 1)),
             Part("box", (0, 0.12), z=(0.3, 0.7)),
             Part("box", (0.88, 1), z=(0.3, 0.7)),
             Part("box", (0.13, 0.495), (0.02, 0.75), (0.3, 0.5), True),
             Part("box", (0.505, 0.87), (0.02, 0.75), (0.3, 0.5), True))),
    Kind("shelf", 0.5, ("at_wall",), (0.6, 0.25, 1.2), (1.2, 0.4, 2.1),
         ("wood", "lacquer"), ("print",), (
             Part("box", y=(0.95, 1)), Part("box", (0, 0.05)), Part("box", (0.95, 1)),
             *_boards(0.02, 0.25, 0.5, 0.73, 0.97),
             Part("box", (0.1, 0.6), (0.2, 0.95), (0.28, 0.42), True),
             Part("box", (0.4, 0.9), (0.2, 0.95), (0.53, 0.66), True))),
    Kind("table", 0.7, ("floor", "floor", "at_wall"), (0.9, 0.6, 0.5), (1.6, 0.9, 0.8),
         ("wood", "lacquer"), ("wood", "metal"), (
             Part("box", z=(0.92, 1)), *_legs(0.92, 0.06, "box"))),
    Kind("table", 0.4, ("floor",), (0.6, 0.6, 0.5), (1.1, 1.1, 0.8),
         ("wood", "lacquer"), ("metal",), (
             Part("frustum", z=(0.93, 1)), _POLE, _WIDE_BASE,
             Part("frustum", (0.45, 0.55), (0.45, 0.55), (0.7, 0.93), True))),
    Kind("chair", 1.7, ("floor",), (0.4, 0.4, 0.8), (0.55, 0.55, 1.0),
         ("cloth", "wood"), ("wood", "metal"), (
             Part("box", z=(0.42, 0.5)), Part("box", (0.02, 0.98), (0.9, 1), (0.5, 1)),
             *_legs(0.42, 0.09, "frustum"))),
    Kind("window", 0.7, ("on_wall",), (0.7, 0.06, 0.8), (1.6, 0.08, 1.3),
         ("sky",), ("lacquer", "wood"), (
             Part("box", y=(0.4, 1), accent=True),
             Part("box", (0.06, 0.48), (0.3, 0.4), (0.06, 0.94)),
             Part("box", (0.52, 0.94), (0.3, 0.4), (0.06, 0.94)))),
    Kind("picture", 1.3, ("on_wall",), (0.3, 0.03, 0.3), (1.2, 0.05, 0.9),
         ("print",), ("wood", "metal"), (
             Part("box", y=(0.4, 1), accent=True),
             Part("box", (0.06, 0.94), (0.2, 0.4), (0.06, 0.94)))),
    Kind("lamp", 0.5, ("floor",), (0.35, 0.35, 1.3), (0.5, 0.5, 1.8),
         ("shade",), ("metal", "wood"), (
             Part("frustum", z=(0.7, 1), bottom=1, top=0.6), _POLE, _WIDE_BASE)),
    Kind("plant", 0.5, ("floor", "floor", "top"), (0.35, 0.35, 0.5), (0.7, 0.7, 1.5),
         ("leaves",), ("ceramic",), (
             Part("frustum", (0.2, 0.8), (0.2, 0.8), (0, 0.3), True, bottom=0.7),
             Part("ellipsoid", (0, 0.7), (0.1, 0.8), (0.25, 0.8)),
             Part("ellipsoid", (0.3, 1), (0.2, 0.9), (0.35, 0.9)),
             Part("ellipsoid", (0.2, 0.75), (0.3, 1), (0.5, 1)))),
    Kind("crate", 0.5, ("floor", "at_wall"), (0.3, 0.3, 0.25), (0.7, 0.6, 0.6),
         ("slats",), ("slats",), (Part("box"),)),
    Kind("box", 1.2, ("floor", "at_wall", "top"), (0.2, 0.2, 0.15), (0.6, 0.5, 0.5),
         ("cardboard", "wood"), ("cardboard",), (Part("box"),)),
    Kind("bin", 0.5, ("floor", "at_wall"), (0.25, 0.25, 0.35), (0.4, 0.4, 0.6),
         ("metal", "lacquer"), ("metal",), (Part("frustum", bottom=0.75),)),
    Kind("ball", 0.6, ("floor", "floor", "top"), (0.2, 0.2, 0.2), (0.5, 0.5, 0.5),
         ("lacquer", "print"), ("print",), (Part("ellipsoid"),)),
    Kind("vase", 0.6, ("top", "floor"), (0.14, 0.14, 0.25), (0.25, 0.25, 0.5),
         ("ceramic",), ("ceramic",), (
             Part("frustum", z=(0, 0.6), bottom=0.6),
             Part("frustum", z=(0.6, 1), bottom=1, top=0.45))),
    Kind("rug", 0.6, ("floor",), (1.2, 0.8, 0.015), (2.4, 1.6, 0.015),
         ("cloth", "print"), ("cloth",), (Part("box"),)),
    # Clutter has no class, as much in a real room: it is void.
    Kind("clutter", 0.4, ("floor", "top"), (0.15, 0.15, 0.2), (0.35, 0.35, 0.6),
         ("cloth", "lacquer"), ("cloth",), (Part("frustum", top=0.0),)),
    Kind("clutter", 0.4, ("floor", "top"), (0.2, 0.2, 0.1), (0.4, 0.3, 0.3),
         ("cloth", "metal"), ("cloth", "metal"), (
             Part("box", z=(0, 0.5)), Part("ellipsoid", z=(0.4, 1), accent=True))),
)
# fmt: on
ROOM_MATERIALS = {
    "floor": ("planks", "tiles", "carpet", "wood"),
    "wall": ("plaster", "plaster", "wallpaper", "wood"),
    "ceiling": ("plaster",),
}
OBJECT_CLASSES = list(dict.fromkeys(k.name for k in KINDS if k.name != "clutter"))
CLASSES = [*ROOM_MATERIALS, *OBJECT_CLASSES]
ATTRIBUTES = [
    *("round", "boxy", "tall", "flat", "large"),
    *("striped", "checked", "dotted", "speckled", "shiny", "dark"),
    *("on_floor", "on_wall", "on_object", "occluded", "truncated"),
]


class Surface(NamedTuple):
    material: Material
    texture: str
    colors: np.ndarray  # (2, 3): two RGB colours in 0..1 that the texture mixes
    scale: float  # of the texture, in metres


@dataclasses.dataclass
class Object:
    """A kind of thing at its place; `origin` is the middle of its lower side."""

    kind: Kind
    place: str
    size: np.ndarray  # (3,)
    origin: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3), object to world, about z
    surfaces: list[Surface]  # main, accent

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest corner of the object in the world."""
        reach = np.abs(self.rotation[:2, :2]) @ self.size[:2] / 2
        above = np.array([*reach, self.size[2]])
        return self.origin - [*reach, 0.0], self.origin + above


def render(rng: np.random.Generator) -> dict:
    """Renders one random room.

    Args:
        rng: The source of everything random; equal states give equal scenes.

    Returns:
        A dict with `image` (H, W, 3) uint8; `segmentation` (H, W) uint8, 255 = void;
        `normals` (H, W, 3) float32, unit vectors in camera coordinates that point to
        the camera, zero where undefined; `depth` (H, W) float32 in metres along z;
        `rotation` (3, 3), whose rows are the camera's axes in the world; `objects`, a
        list of dicts with `bbox` (ymin, xmin, ymax, xmax in 0..1), `label` and
        `attributes`; and `instances` (H, W) int32, an index into `objects` or -1.
    """
    room = rng.uniform([3.5, 3.5, 2.4], [6.0, 6.0, 3.0])
    eye, rotation = _aim_camera(rng, room)
    objects = _furnish(rng, room, eye)
    surfaces = [_surface(rng, materials, 2.5) for materials in ROOM_MATERIALS.values()]
    surfaces += [surface for thing in objects for surface in thing.surfaces]
    lengths = np.linalg.norm(RAYS, axis=-1)
    rays = (RAYS / lengths[..., None] @ rotation).reshape(-1, 3)
    hits = _trace(room, objects, eye, rays)
    color = _shade(rng, room, objects, surfaces, hits, rays)

    ids = hits.ids.reshape(HEIGHT, WIDTH)  # 0 floor, 1 wall, 2 ceiling, 3 + object
    classes = [
        VOID if thing.kind.name == "clutter" else CLASSES.index(thing.kind.name)
        for thing in objects
    ]
    # As in VOC, nobody labels the outlines: their pixels show two things at once.
    outline = np.zeros((HEIGHT, WIDTH), bool)
    outline[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    outline[:-1] |= ids[:-1] != ids[1:]
    segmentation = np.array([0, 1, 2, *classes], np.uint8)[ids]
    normals = (hits.normals @ rotation.T).reshape(HEIGHT, WIDTH, 3)
    found, instances = _find_objects(objects, ids, hits.silhouettes)
    return {
        "image": _develop(rng, color.reshape(HEIGHT, WIDTH, 3)),
        "segmentation": np.where(outline, np.uint8(VOID), segmentation),
        "normals": np.where(outline[..., None], 0, normals).astype(np.float32),
        "depth": (hits.distances.reshape(ids.shape) / lengths).astype(np.float32),
        "rotation": rotation,
        "objects": found,
        "instances": instances,
    }


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit normals as uint8; undefined ones as (0, 0, 0), which no unit one gets."""
    defined = normals.any(axis=-1, keepdims=True)
    return np.where(defined, np.round((normals + 1) / 2 * 255), 0).astype(np.uint8)


# Making up a room


def _aim_camera(rng, room):
    half = room / 2
    eye = rng.uniform([-0.7 * half[0], 0.2, 1.0], [0.7 * half[0], 1.0, 1.9])
    eye[1] -= half[1]
    target = rng.uniform([-0.6, 0.0, 0.2], [0.6, 0.8, 1.3]) * [half[0], half[1], 1.0]
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    roll = rng.normal(scale=0.04)
    right, down = (
        np.cos(roll) * right + np.sin(roll) * down,
        np.cos(roll) * down - np.sin(roll) * right,
    )
    return eye, np.stack([right, down, forward])


def _surface(rng, materials, extent):
    material = MATERIALS[materials[rng.integers(len(materials))]]
    hue, saturation, value = (rng.uniform(*limits) for limits in material[:3])
    # The usual formula from hue, saturation and value to red, green and blue.
    wheel = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    color = value * (1 - saturation * (1 - np.clip(wheel, 0, 1)))
    other = color * (1.7 if value < 0.5 else rng.uniform(0.45, 0.7))
    return Surface(
        material,
        texture=material.textures[rng.integers(len(material.textures))],
        colors=np.stack([color, other]),
        scale=max(0.03, extent * rng.uniform(0.07, 0.14)),
    )


def _furnish(rng, room, eye):
    objects: list[Object] = []
    for kind in KINDS:
        for _ in range(rng.poisson(kind.mean_count)):
            size = rng.uniform(kind.smallest, kind.largest)
            if kind.name == "ball":
                size[:] = size[0]
            surfaces = [
                _surface(rng, kind.materials, size.max()),
                _surface(rng, kind.accents, size.max()),
            ]
            place = kind.places[rng.integers(len(kind.places))]
            for _ in range(8):
                placed = _propose(rng, room, objects, place, size)
                if placed is None:
                    continue
                origin, rotation = placed
                thing = Object(kind, place, size, origin, rotation, surfaces)
                if _is_free(thing, room, eye, objects):
                    objects.append(thing)
                    break
    return objects


def _propose(rng, room, objects, place, size):
    """A random origin and rotation for a thing of this size, or None."""
    half = room / 2
    if place == "top":
        supports = [o for o in objects if o.kind.name in ("table", "cabinet", "crate")]
        if not supports:
            return None
        below = supports[rng.integers(len(supports))]
        slack = 0.7 * below.size - size
        if slack[:2].min() < 0:
            return None
        offset = below.rotation @ [*(rng.uniform(-0.5, 0.5, 2) * slack[:2]), 0.0]
        origin = below.origin + offset + [0.0, 0.0, below.size[2]]
        return origin, _turn(rng.uniform(0, 2 * np.pi))
    if place == "floor":
        origin = np.array([*(rng.uniform(-1, 1, 2) * half[:2]), 0.0])
        return origin, _turn(rng.uniform(0, 2 * np.pi))
    # An object's back, its y axis, faces the wall: behind, to the left or right.
    side = rng.integers(3)
    rotation = _turn((0.0, np.pi / 2, -np.pi / 2)[side])
    away = (half[1] if side == 0 else half[0]) - size[1] / 2
    along = (half[0] if side == 0 else half[1]) - size[0] / 2
    origin = rotation @ [rng.uniform(-1, 1) * along, away, 0.0]
    if place == "on_wall":
        origin[2] = rng.uniform(0.8, max(0.85, room[2] - size[2] - 0.2))
    return origin, rotation


def _turn(angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _is_free(thing, room, eye, objects):
    low, high = thing.bounds()
    slack = 0.02  # lets things touch, and stand on rugs
    if (np.abs([low, high])[:, :2] > room[:2] / 2 + 1e-6).any():
        return False
    if (np.abs((low + high) / 2 - eye) < (high - low) / 2 + 0.35)[:2].all():
        return False
    others = [other.bounds() for other in objects]
    return not any(
        ((low + slack < their_high) & (high - slack > their_low)).all()
        for their_low, their_high in others
    )


# Casting rays


class Hits(NamedTuple):
    distances: np.ndarray  # (N,)
    normals: np.ndarray  # (N, 3) in the world
    points: np.ndarray  # (N, 3) in the world
    ids: np.ndarray  # (N,): 0 floor, 1 wall, 2 ceiling, 3 + index of the object
    surfaces: np.ndarray  # (N,): 0 floor, 1 wall, 2 ceiling, 3 + 2 * index + accent
    silhouettes: np.ndarray  # (objects, N): whether the ray meets the object at all


def _trace(room, objects, eye, rays):
    # The room is a box seen from inside: a ray meets the nearest of its far sides.
    away = np.where(rays < 0, -1.0, 1.0)
    sides = (away * room / 2 - (eye - [0, 0, room[2] / 2])) / rays
    axes = sides.argmin(axis=1)
    pixels = np.arange(len(rays))
    distances = sides[pixels, axes]
    normals = np.zeros_like(rays)
    normals[pixels, axes] = -away[pixels, axes]
    ids = np.where(axes < 2, 1, np.where(rays[:, 2] < 0, 0, 2))
    surfaces = ids.copy()
    silhouettes = np.zeros((len(objects), len(rays)), bool)
    for index, thing in enumerate(objects):
        for part in thing.kind.parts:
            hit, distance, normal = _intersect(thing, part, eye, rays)
            silhouettes[index, hit] = True
            nearer = distance < distances[hit]
            hit = hit[nearer]
            distances[hit] = distance[nearer]
            normals[hit] = normal[nearer]
            ids[hit] = 3 + index
            surfaces[hit] = 3 + 2 * index + part.accent
    points = eye + distances[:, None] * rays
    return Hits(distances, normals, points, ids, surfaces, silhouettes)


def _intersect(thing, part, eye, rays):
    """Which rays meet the part, how far away, and the part's normals there."""
    spans = np.array([part.x, part.y, part.z])  # (3, 2) in fractions of the object
    half = (spans[:, 1] - spans[:, 0]) * thing.size / 2
    middle = (spans.mean(axis=1) - [0.5, 0.5, 0.0]) * thing.size
    center = thing.origin + thing.rotation @ middle - eye
    # Only rays that meet the ball around the part are worth the exact computation.
    # These are all rays if the eye is in that ball.
    apart = center @ center - half @ half
    near = np.flatnonzero(rays @ center > (np.sqrt(apart) if apart > 0 else -np.inf))
    # The part becomes the cube from -1 to 1, or the shape inside it.
    to_cube = thing.rotation / half
    with np.errstate(divide="ignore", invalid="ignore"):  # rays that miss
        distance, normal = _SHAPES[part.shape](
            -center @ to_cube, rays[near] @ to_cube, part
        )
    hit = np.isfinite(distance)
    normal = normal[hit] @ to_cube.T
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return near[hit], distance[hit], normal


def _hit_box(origin, rays, part):
    del part
    away = np.where(rays < 0, -1.0, 1.0)
    entry = (-away - origin) / rays
    axis = entry.argmax(axis=1)
    index = np.arange(len(rays))
    distance = entry[index, axis]
    leave = ((away - origin) / rays).min(axis=1)
    normal = np.zeros_like(rays)
    normal[index, axis] = -away[index, axis]
    return np.where((distance > 0) & (distance < leave), distance, np.inf), normal


def _hit_ellipsoid(origin, rays, part):
    del part
    distance, _ = _roots(_dot(rays, rays), rays @ origin, origin @ origin - 1)
    reached = np.where(distance > 0, distance, 0)
    normal = origin + reached[:, None] * rays
    return np.where(distance > 0, distance, np.inf), normal


def _hit_frustum(origin, rays, part):
    # Inside, x^2 + y^2 < (mean + slope z)^2.
    mean, slope = (part.top + part.bottom) / 2, (part.top - part.bottom) / 2
    radius = mean + slope * origin[2]
    x, y, z = rays.T
    sides = _roots(
        x**2 + y**2 - (slope * z) ** 2,
        x * origin[0] + y * origin[1] - radius * slope * z,
        origin[0] ** 2 + origin[1] ** 2 - radius**2,
    )
    distances = np.stack([*sides, (-1 - origin[2]) / z, (1 - origin[2]) / z])  # (4, N)
    distances[~(distances > 0)] = np.inf
    reached = np.where(np.isfinite(distances), distances, 0)
    x, y, z = (o + reached * ray for o, ray in zip(origin, rays.T, strict=True))
    distances[:2][np.abs(z[:2]) > 1] = np.inf
    distances[2][(x**2 + y**2)[2] > part.bottom**2] = np.inf
    distances[3][(x**2 + y**2)[3] > part.top**2] = np.inf
    first = distances.argmin(axis=0)
    index = np.arange(len(rays))
    side = np.stack([x, y, -slope * (mean + slope * z)], axis=-1)[first, index]
    cap = np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])[first // 3]
    return distances[first, index], np.where(first[:, None] < 2, side, cap)


def _roots(a, b, c):
    """Both t with a t^2 + 2 b t + c = 0; NaN where there is none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _dot(a, b):
    return np.einsum("nc,nc->n", a, b)


_SHAPES = {"box": _hit_box, "ellipsoid": _hit_ellipsoid, "frustum": _hit_frustum}


# Light and colour


def _shade(rng, room, objects, surfaces, hits, rays):
    """The light that each ray brings back: Lambert, some shine, shadows."""
    albedo = _albedo(objects, surfaces, hits, rays)
    shininess = np.array([s.material.shininess for s in surfaces])[hits.surfaces]
    glow = np.array([s.material.glow for s in surfaces])[hits.surfaces]
    # Soft light from everywhere, less from below and near where room sides meet.
    gaps = room / 2 - np.abs(hits.points - [0, 0, room[2] / 2])
    corner = 1 - 0.35 * np.exp(-np.sort(gaps)[:, 1] / 0.25)
    ambient = rng.uniform(0.3, 0.6) * (1 + 0.3 * hits.normals[:, 2]) * corner
    color = albedo * (ambient + 1.5 * glow)[:, None]
    for _ in range(rng.integers(1, 4)):
        lamp = rng.uniform(-0.4, 0.4, 3) * room
        lamp[2] = room[2] - rng.uniform(0.1, 0.3)  # above all furniture
        tint = 1 + rng.uniform(0, 0.3) * np.array([0.5, 0.0, -0.7])
        beams = hits.points - lamp
        distances = np.linalg.norm(beams, axis=1)
        beams /= distances[:, None]
        cosine = -_dot(hits.normals, beams)
        lit = np.flatnonzero(cosine > 0)
        lit = lit[~_in_shadow(objects, lamp, beams[lit], distances[lit])]
        strength = rng.uniform(1.5, 3.5) / (1 + distances[lit] ** 2)
        halfway = -beams[lit] - rays[lit]
        halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
        shine = 1.5 * np.clip(_dot(hits.normals[lit], halfway), 0, 1) ** 40
        light = albedo[lit] * cosine[lit, None] + (shininess[lit] * shine)[:, None]
        color[lit] += light * strength[:, None] * tint
    return color


def _in_shadow(objects, lamp, beams, distances):
    shadow = np.zeros(len(beams), bool)
    for thing in objects:
        for part in thing.kind.parts:
            hit, distance, _ = _intersect(thing, part, lamp, beams)
            shadow[hit[distance < distances[hit] - 0.003]] = True
    return shadow


def _albedo(objects, surfaces, hits, rays):
    """The colour of each point's surface, its texture laid along the nearest axes."""
    origins = np.stack([np.zeros(3)] * 3 + [thing.origin for thing in objects])
    turns = np.stack([np.eye(3)] * 3 + [thing.rotation for thing in objects])[hits.ids]
    points = np.einsum("nji,nj->ni", turns, hits.points - origins[hits.ids])
    facing = np.abs(np.einsum("nji,nj->ni", turns, hits.normals)).argmax(axis=1)
    across = np.where(facing == 0, points[:, 1], points[:, 0])
    up = np.where(facing == 2, points[:, 1], points[:, 2])
    scale = np.array([s.scale for s in surfaces])[hits.surfaces]
    u, v = across / scale, up / scale
    texture = np.array([TEXTURES.index(s.texture) for s in surfaces])[hits.surfaces]
    grain = np.floor(5 * u).astype(int) * 73856093 ^ np.floor(2 * v).astype(int) * 19349
    mix = np.select(
        [texture == index for index in range(1, len(TEXTURES))],
        [
            np.floor(u) % 2,
            (np.floor(u) + np.floor(v)) % 2,
            (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1,
            grain // 7 % 101 / 101,
        ],
        default=0.0,
    )
    # A texture finer than the pixels fades to its mean rather than to moire.
    slant = np.clip(-_dot(hits.normals, rays), 0.05, 1)
    pixel = hits.distances / FOCAL / scale / slant
    contrast = np.where(texture > 0, np.clip(1.5 - pixel, 0, 1), 1)
    mix = np.where(texture > 0, 0.5 + contrast * (mix - 0.5), 0)[:, None]
    colors = np.stack([s.colors for s in surfaces])[hits.surfaces]  # (N, 2, 3)
    return ((1 - mix) * colors[:, 0] + mix * colors[:, 1]) ** 2.2


def _develop(rng, color):
    """What a camera makes of the light: exposure, a little blur, gamma and noise."""
    color = color * rng.uniform(0.25, 0.4) / color.mean()
    padded = np.pad(color, ((1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = (padded[:-2] + 6 * padded[1:-1] + padded[2:]) / 8
    blurred = (blurred[:, :-2] + 6 * blurred[:, 1:-1] + blurred[:, 2:]) / 8
    image = np.clip(blurred, 0, 1) ** (1 / 2.2)
    noise = rng.normal(scale=rng.uniform(0.005, 0.02), size=image.shape)
    return np.round(np.clip(image + noise, 0, 1) * 255).astype(np.uint8)


# What there is to find


def _find_objects(objects, ids, silhouettes):
    found: list[dict] = []
    instances = np.full(ids.shape, -1, np.int32)
    for index, thing in enumerate(objects):
        visible = ids == 3 + index
        if thing.kind.name == "clutter" or visible.sum() < MIN_VISIBLE_PIXELS:
            continue
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        box = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
        instances[visible] = len(found)
        found.append(
            {
                "bbox": np.array(box) / [HEIGHT, WIDTH, HEIGHT, WIDTH],
                "label": OBJECT_CLASSES.index(thing.kind.name),
                "attributes": _attributes(
                    thing, visible, silhouettes[index].reshape(ids.shape)
                ),
            }
        )
    return found, instances


def _attributes(thing, visible, silhouette):
    boxes = [part.shape == "box" for part in thing.kind.parts]
    main = thing.surfaces[0]
    thinnest, middle, longest = np.sort(thing.size)
    edges = (silhouette[0], silhouette[-1], silhouette[:, 0], silhouette[:, -1])
    true = {
        "round": not any(boxes),
        "boxy": all(boxes),
        "tall": thing.size[2] > 1.5 * thing.size[:2].max(),
        "flat": thinnest < 0.2 * middle,
        "large": longest > 1.2,
        main.texture: True,
        "shiny": main.material.shininess > 0.4,
        "dark": main.colors.mean() < 0.35,
        "on_floor": thing.place in ("floor", "at_wall"),
        "on_wall": thing.place == "on_wall",
        "on_object": thing.place == "top",
        "occluded": visible.sum() < (1 - OCCLUDED_SHARE) * silhouette.sum(),
        "truncated": any(edge.any() for edge in edges),
    }
    return np.array([true.get(name, False) for name in ATTRIBUTES], np.uint8)


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
    """How many scenes each split has."""

    train: int = 400
    test: int = 100


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Rendered rooms for segmentation, normals, detection and attributes."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        ScenesConfig(name="full", description="Large enough to learn from."),
        ScenesConfig(name="toy", description="For tests.", train=16, test=8),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        image = {"shape": (HEIGHT, WIDTH, 3), "encoding_format": "png"}
        label_map = {"shape": (HEIGHT, WIDTH, 1), "encoding_format": "png"}
        thing = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=OBJECT_CLASSES),
            "attributes": tfds.features.Tensor(
                shape=(len(ATTRIBUTES),), dtype=np.uint8
            ),
        }
        features = {
            "image": tfds.features.Image(**image),
            "segmentation": tfds.features.LabeledImage(labels=CLASSES, **label_map),
            "normals": tfds.features.Image(**image),
            "objects": tfds.features.Sequence(thing),
            "id": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {
            split: self._generate_examples(split, getattr(self.builder_config, split))
            for split in ("train", "test")
        }

    def _generate_examples(self, split, count):
        for index in range(count):
            seed = [zlib.crc32(split.encode()), index]
            scene = render(np.random.default_rng(seed))
            name = f"{split}_{index:06d}"
            yield (
                name,
                {
                    "image": scene["image"],
                    "segmentation": scene["segmentation"][..., None],
                    "normals": encode_normals(scene["normals"]),
                    "objects": [
                        {**thing, "bbox": tfds.features.BBox(*thing["bbox"])}
                        for thing in scene["objects"]
                    ],
                    "id": name,
                },
            )
