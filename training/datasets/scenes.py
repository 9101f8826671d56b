"""Rendered rooms with exact labels, a data set without a download; not a benchmark.

A scene is a room with furniture. Every object is made of boxes, ellipsoids and frustums
(cylinders and cones among them), so its class, its normals, its box and its attributes
are known exactly. `rendering` draws it, and says what the coordinates are.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from training.datasets.images import VOID, encode_normals
from training.datasets.rendering import (
    HEIGHT,
    WIDTH,
    Part,
    Solid,
    View,
    paint,
    photograph,
)

MIN_VISIBLE_PIXELS = 25  # smaller objects stay in the image, but get no box
OCCLUDED_SHARE = 0.1  # of an object's silhouette hidden by other objects


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


class Object(NamedTuple):
    """A thing of a kind, and how it came to stand or hang where it is."""

    kind: Kind
    place: str
    solid: Solid


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
    sides = [paint(rng, materials, 2.5) for materials in ROOM_MATERIALS.values()]
    solids = [thing.solid for thing in objects]
    view = photograph(rng, room, sides, solids, eye, rotation)

    classes = [
        VOID if thing.kind.name == "clutter" else CLASSES.index(thing.kind.name)
        for thing in objects
    ]
    segmentation = np.array([0, 1, 2, *classes], np.uint8)[view.ids]
    # As in VOC, nobody labels the outlines: their pixels show two things at once.
    outline = np.zeros((HEIGHT, WIDTH), bool)
    outline[:, :-1] |= view.ids[:, :-1] != view.ids[:, 1:]
    outline[:-1] |= view.ids[:-1] != view.ids[1:]
    found, instances = _find_objects(objects, view)
    return {
        "image": view.image,
        "segmentation": np.where(outline, np.uint8(VOID), segmentation),
        "normals": np.where(outline[..., None], 0, view.normals).astype(np.float32),
        "depth": view.depth.astype(np.float32),
        "rotation": rotation,
        "objects": found,
        "instances": instances,
    }


# Making up a room


def _aim_camera(
    rng: np.random.Generator, room: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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


def _furnish(
    rng: np.random.Generator, room: np.ndarray, eye: np.ndarray
) -> list[Object]:
    objects: list[Object] = []
    for kind in KINDS:
        for _ in range(rng.poisson(kind.mean_count)):
            size = rng.uniform(kind.smallest, kind.largest)
            if kind.name == "ball":
                size[:] = size[0]
            surfaces = [
                paint(rng, kind.materials, size.max()),
                paint(rng, kind.accents, size.max()),
            ]
            place = kind.places[rng.integers(len(kind.places))]
            for _ in range(8):
                placed = _propose(rng, room, objects, place, size)
                if placed is None:
                    continue
                solid = Solid(kind.parts, size, *placed, surfaces)
                if _is_free(solid, room, eye, objects):
                    objects.append(Object(kind, place, solid))
                    break
    return objects


def _propose(
    rng: np.random.Generator,
    room: np.ndarray,
    objects: list,
    place: str,
    size: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """A random origin and rotation for a thing of this size, or None."""
    half = room / 2
    if place == "top":
        supports = [o for o in objects if o.kind.name in ("table", "cabinet", "crate")]
        if not supports:
            return None
        below = supports[rng.integers(len(supports))].solid
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


def _turn(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _is_free(
    solid: Solid, room: np.ndarray, eye: np.ndarray, objects: list[Object]
) -> bool:
    low, high = solid.bounds()
    slack = 0.02  # lets things touch, and stand on rugs
    if (np.abs([low, high])[:, :2] > room[:2] / 2 + 1e-6).any():
        return False
    if (np.abs((low + high) / 2 - eye) < (high - low) / 2 + 0.35)[:2].all():
        return False
    others = [other.solid.bounds() for other in objects]
    return not any(
        ((low + slack < their_high) & (high - slack > their_low)).all()
        for their_low, their_high in others
    )


# What there is to find


def _find_objects(objects: list[Object], view: View) -> tuple[list[dict], np.ndarray]:
    found: list[dict] = []
    instances = np.full(view.ids.shape, -1, np.int32)
    for index, thing in enumerate(objects):
        visible = view.ids == 3 + index
        if thing.kind.name == "clutter" or visible.sum() < MIN_VISIBLE_PIXELS:
            continue
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        box = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
        instances[visible] = len(found)
        found.append(
            {
                "bbox": np.array(box) / [HEIGHT, WIDTH, HEIGHT, WIDTH],
                "label": OBJECT_CLASSES.index(thing.kind.name),
                "attributes": _attributes(thing, visible, view.silhouettes[index]),
            }
        )
    return found, instances


def _attributes(
    thing: Object, visible: np.ndarray, silhouette: np.ndarray
) -> np.ndarray:
    boxes = [part.shape == "box" for part in thing.solid.parts]
    main = thing.solid.surfaces[0]
    size = thing.solid.size
    thinnest, middle, longest = np.sort(size)
    edges = (silhouette[0], silhouette[-1], silhouette[:, 0], silhouette[:, -1])
    true = {
        "round": not any(boxes),
        "boxy": all(boxes),
        "tall": size[2] > 1.5 * size[:2].max(),
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
    """Rendered rooms for segmentation, normals, depth, detection and attributes.

    Depth is in millimetres along the camera's axis, to the nearest one.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.1.0": "`depth` is new."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        ScenesConfig(name="full", description="Large enough to learn from."),
        ScenesConfig(name="toy", description="For tests.", train=16, test=8),
    ]
    attribute_names = ATTRIBUTES

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
            "depth": tfds.features.Image(**label_map, dtype=np.uint16),
            "objects": tfds.features.Sequence(thing),
            "id": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing to download
        return {
            split: self._generate_examples(split, getattr(self.builder_config, split))
            for split in ("train", "test")
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple]:
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
                    "depth": np.round(1000 * scene["depth"]).astype(np.uint16)[
                        ..., None
                    ],
                    "objects": [
                        {**thing, "bbox": tfds.features.BBox(*thing["bbox"])}
                        for thing in scene["objects"]
                    ],
                    "id": name,
                },
            )


BUILDER = Scenes
