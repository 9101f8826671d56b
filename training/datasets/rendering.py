"""How shapes, materials and light become pixels; not what a room holds.

A ray is cast through every pixel into a closed room with solids in it, so the normal,
the depth and the solid behind each pixel are known exactly. World coordinates are x, y
on the floor, from its middle, and z up, in metres; camera coordinates are x right, y
down, z forward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HEIGHT, WIDTH = 96, 128
FOCAL = 100.0  # in pixels: 65 degrees from left to right

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
    """A shape stretched to the box x, y, z, given in fractions of its solid.

    A frustum goes from radius `bottom` to radius `top`, in fractions of that box.
    """

    shape: str
    x: tuple[float, float] = (0, 1)
    y: tuple[float, float] = (0, 1)
    z: tuple[float, float] = (0, 1)
    accent: bool = False  # in the solid's second surface
    bottom: float = 1.0
    top: float = 1.0


class Surface(NamedTuple):
    material: Material
    texture: str
    colors: np.ndarray  # (2, 3): two RGB colours in 0..1 that the texture mixes
    scale: float  # of the texture, in metres


class Solid(NamedTuple):
    """Parts of one body at its place; `origin` is the middle of its lower side."""

    parts: tuple[Part, ...]
    size: np.ndarray  # (3,)
    origin: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3), solid to world, about z
    surfaces: list[Surface]  # main, accent

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest corner in the world."""
        reach = np.abs(self.rotation[:2, :2]) @ self.size[:2] / 2
        above = np.array([*reach, self.size[2]])
        return self.origin - [*reach, 0.0], self.origin + above


class View(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8
    normals: np.ndarray  # (H, W, 3) in the camera
    depth: np.ndarray  # (H, W) in metres along z
    ids: np.ndarray  # (H, W): 0 floor, 1 wall, 2 ceiling, 3 + index of the solid
    silhouettes: np.ndarray  # (solids, H, W): where a solid is, if only behind others


def paint(
    rng: np.random.Generator, materials: tuple[str, ...], extent: float
) -> Surface:
    """A random surface of one of the materials, for a thing `extent` metres large."""
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


def photograph(
    rng: np.random.Generator,
    room: np.ndarray,
    sides: Sequence[Surface],
    solids: Sequence[Solid],
    eye: np.ndarray,
    rotation: np.ndarray,
) -> View:
    """Lights a room at random and takes a picture of it.

    Args:
        rng: The source of the lamps, the exposure and the noise.
        room: The room's width, depth and height.
        sides: The surfaces of the floor, the walls and the ceiling.
        solids: What is in the room.
        eye: Where the camera is in the world.
        rotation: (3, 3), whose rows are the camera's axes in the world.
    """
    surfaces = [*sides, *(surface for solid in solids for surface in solid.surfaces)]
    lengths = np.linalg.norm(RAYS, axis=-1)
    rays = (RAYS / lengths[..., None] @ rotation).reshape(-1, 3)
    hits = _trace(room, solids, eye, rays)
    color = _shade(rng, room, solids, surfaces, hits, rays)
    return View(
        image=_develop(rng, color.reshape(HEIGHT, WIDTH, 3)),
        normals=(hits.normals @ rotation.T).reshape(HEIGHT, WIDTH, 3),
        depth=hits.distances.reshape(HEIGHT, WIDTH) / lengths,
        ids=hits.ids.reshape(HEIGHT, WIDTH),
        silhouettes=hits.silhouettes.reshape(len(solids), HEIGHT, WIDTH),
    )


# Casting rays


class Hits(NamedTuple):
    distances: np.ndarray  # (N,)
    normals: np.ndarray  # (N, 3) in the world
    points: np.ndarray  # (N, 3) in the world
    ids: np.ndarray  # (N,): 0 floor, 1 wall, 2 ceiling, 3 + index of the solid
    surfaces: np.ndarray  # (N,): 0 floor, 1 wall, 2 ceiling, 3 + 2 * index + accent
    silhouettes: np.ndarray  # (solids, N): whether the ray meets the solid at all


def _trace(
    room: np.ndarray, solids: Sequence[Solid], eye: np.ndarray, rays: np.ndarray
) -> Hits:
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
    silhouettes = np.zeros((len(solids), len(rays)), bool)
    for index, solid in enumerate(solids):
        for part in solid.parts:
            hit, distance, normal = _intersect(solid, part, eye, rays)
            silhouettes[index, hit] = True
            nearer = distance < distances[hit]
            hit = hit[nearer]
            distances[hit] = distance[nearer]
            normals[hit] = normal[nearer]
            ids[hit] = 3 + index
            surfaces[hit] = 3 + 2 * index + part.accent
    points = eye + distances[:, None] * rays
    return Hits(distances, normals, points, ids, surfaces, silhouettes)


def _intersect(
    solid: Solid, part: Part, eye: np.ndarray, rays: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rays meet the part, how far away, and the part's normals there."""
    spans = np.array([part.x, part.y, part.z])  # (3, 2) in fractions of the solid
    half = (spans[:, 1] - spans[:, 0]) * solid.size / 2
    middle = (spans.mean(axis=1) - [0.5, 0.5, 0.0]) * solid.size
    center = solid.origin + solid.rotation @ middle - eye
    # Only rays that meet the ball around the part are worth the exact computation.
    # These are all rays if the eye is in that ball.
    apart = center @ center - half @ half
    near = np.flatnonzero(rays @ center > (np.sqrt(apart) if apart > 0 else -np.inf))
    # The part becomes the cube from -1 to 1, or the shape inside it.
    to_cube = solid.rotation / half
    with np.errstate(divide="ignore", invalid="ignore"):  # rays that miss
        distance, normal = _SHAPES[part.shape](
            -center @ to_cube, rays[near] @ to_cube, part
        )
    hit = np.isfinite(distance)
    normal = normal[hit] @ to_cube.T
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return near[hit], distance[hit], normal


def _hit_box(
    origin: np.ndarray, rays: np.ndarray, part: Part
) -> tuple[np.ndarray, np.ndarray]:
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


def _hit_ellipsoid(
    origin: np.ndarray, rays: np.ndarray, part: Part
) -> tuple[np.ndarray, np.ndarray]:
    del part
    distance, _ = _roots(_dot(rays, rays), rays @ origin, origin @ origin - 1)
    reached = np.where(distance > 0, distance, 0)
    normal = origin + reached[:, None] * rays
    return np.where(distance > 0, distance, np.inf), normal


def _hit_frustum(
    origin: np.ndarray, rays: np.ndarray, part: Part
) -> tuple[np.ndarray, np.ndarray]:
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


def _roots(
    a: np.ndarray, b: np.ndarray, c: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Both t with a t^2 + 2 b t + c = 0; NaN where there is none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nc,nc->n", a, b)


_SHAPES = {"box": _hit_box, "ellipsoid": _hit_ellipsoid, "frustum": _hit_frustum}


# Light and colour


def _shade(
    rng: np.random.Generator,
    room: np.ndarray,
    solids: Sequence[Solid],
    surfaces: Sequence[Surface],
    hits: Hits,
    rays: np.ndarray,
) -> np.ndarray:
    """The light that each ray brings back: Lambert, some shine, shadows."""
    albedo = _albedo(solids, surfaces, hits, rays)
    shininess = np.array([s.material.shininess for s in surfaces])[hits.surfaces]
    glow = np.array([s.material.glow for s in surfaces])[hits.surfaces]
    # Soft light from everywhere, less from below and near where room sides meet.
    gaps = room / 2 - np.abs(hits.points - [0, 0, room[2] / 2])
    corner = 1 - 0.35 * np.exp(-np.sort(gaps)[:, 1] / 0.25)
    ambient = rng.uniform(0.3, 0.6) * (1 + 0.3 * hits.normals[:, 2]) * corner
    color = albedo * (ambient + 1.5 * glow)[:, None]
    for _ in range(rng.integers(1, 4)):
        lamp = rng.uniform(-0.4, 0.4, 3) * room
        lamp[2] = room[2] - rng.uniform(0.1, 0.3)  # just below the ceiling
        tint = 1 + rng.uniform(0, 0.3) * np.array([0.5, 0.0, -0.7])
        beams = hits.points - lamp
        distances = np.linalg.norm(beams, axis=1)
        beams /= distances[:, None]
        cosine = -_dot(hits.normals, beams)
        lit = np.flatnonzero(cosine > 0)
        lit = lit[~_in_shadow(solids, lamp, beams[lit], distances[lit])]
        strength = rng.uniform(1.5, 3.5) / (1 + distances[lit] ** 2)
        halfway = -beams[lit] - rays[lit]
        halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
        shine = 1.5 * np.clip(_dot(hits.normals[lit], halfway), 0, 1) ** 40
        light = albedo[lit] * cosine[lit, None] + (shininess[lit] * shine)[:, None]
        color[lit] += light * strength[:, None] * tint
    return color


def _in_shadow(
    solids: Sequence[Solid], lamp: np.ndarray, beams: np.ndarray, distances: np.ndarray
) -> np.ndarray:
    shadow = np.zeros(len(beams), bool)
    for solid in solids:
        for part in solid.parts:
            hit, distance, _ = _intersect(solid, part, lamp, beams)
            shadow[hit[distance < distances[hit] - 0.003]] = True
    return shadow


def _albedo(
    solids: Sequence[Solid], surfaces: Sequence[Surface], hits: Hits, rays: np.ndarray
) -> np.ndarray:
    """The colour of each point's surface, its texture laid along the nearest axes."""
    origins = np.stack([np.zeros(3)] * 3 + [solid.origin for solid in solids])
    turns = np.stack([np.eye(3)] * 3 + [solid.rotation for solid in solids])[hits.ids]
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


def _develop(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """What a camera makes of the light: exposure, a little blur, gamma and noise."""
    color = color * rng.uniform(0.25, 0.4) / color.mean()
    padded = np.pad(color, ((1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = (padded[:-2] + 6 * padded[1:-1] + padded[2:]) / 8
    blurred = (blurred[:, :-2] + 6 * blurred[:, 1:-1] + blurred[:, 2:]) / 8
    image = np.clip(blurred, 0, 1) ** (1 / 2.2)
    noise = rng.normal(scale=rng.uniform(0.005, 0.02), size=image.shape)
    return np.round(np.clip(image + noise, 0, 1) * 255).astype(np.uint8)
