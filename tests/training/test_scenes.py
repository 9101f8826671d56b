"""The rendered rooms: reproducible, varied, and labelled exactly."""

import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from training.datasets import rendering, scenes
from training.datasets.scenes import ATTRIBUTES, CLASSES, OBJECT_CLASSES, VOID

pytestmark = pytest.mark.xdist_group("scenes")

FLOOR, WALL, CEILING = (CLASSES.index(name) for name in ("floor", "wall", "ceiling"))


@pytest.fixture(scope="module")
def rendered():
    return [scenes.render(np.random.default_rng([5, index])) for index in range(80)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return _build_toy(tmp_path_factory.mktemp("first"))


def _build_toy(directory):
    builder = scenes.Scenes(config="toy", data_dir=directory)
    builder.download_and_prepare()
    return builder


def _things(rendered, *names):
    """(scene, mask of its visible pixels, attributes by name) of the named classes."""

    def by_name(attributes):
        return dict(zip(ATTRIBUTES, attributes, strict=True))

    return [
        (scene, scene["instances"] == index, by_name(thing["attributes"]))
        for scene in rendered
        for index, thing in enumerate(scene["objects"])
        if OBJECT_CLASSES[thing["label"]] in names
    ]


def _normals_from_depth(scene):
    """Normals by central differences of the points, and where they should be right:
    where the labelled normals around the pixel are alike and of the same object."""
    points = rendering.RAYS * scene["depth"][..., None].astype(float)
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normals = np.cross(down, across)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    n = scene["normals"]
    around = (n[1:-1, 2:], n[1:-1, :-2], n[2:, 1:-1], n[:-2, 1:-1])
    alike = np.min([(n[1:-1, 1:-1] * other).sum(-1) for other in around], axis=0)
    return normals, alike


def test_equal_seeds_render_equal_scenes():
    first, second = (scenes.render(np.random.default_rng([3, 1])) for _ in range(2))
    other = scenes.render(np.random.default_rng([3, 2]))
    for name in ("image", "segmentation", "normals", "depth", "instances"):
        np.testing.assert_array_equal(first[name], second[name])
        assert (first[name] != other[name]).any()
    np.testing.assert_equal(first["objects"], second["objects"])


def test_rooms_are_those_that_published_runs_have_seen():
    """Another way to draw them needs another version of the data set."""
    rooms = [
        scenes.render(np.random.default_rng([zlib.crc32(b"train"), k])) for k in (0, 1)
    ]
    names = [[OBJECT_CLASSES[x["label"]] for x in room["objects"]] for room in rooms]
    occluded = ATTRIBUTES.index("occluded")

    assert scenes.Scenes.VERSION == "1.1.0"
    assert names == [
        ["cabinet", "table", "chair", "crate", "vase"],
        ["door", "cabinet", "shelf", "window", "picture", "box", "box", "rug", "rug"],
    ]
    assert [x["attributes"][occluded] for x in rooms[1]["objects"]] == [
        *(0, 0, 0, 0, 0, 0, 1, 0, 1)
    ]
    means = [room["image"].mean(axis=(0, 1)) for room in rooms]
    expected = [[185.03, 143.31, 116.27], [144.75, 116.78, 126.34]]
    np.testing.assert_allclose(means, expected, atol=0.1)
    depths = [room["depth"].mean() for room in rooms]
    np.testing.assert_allclose(depths, [2.2830, 3.9449], atol=1e-3)


def test_every_class_occurs_with_a_long_tail(rendered):
    pixels = np.stack([scene["segmentation"] for scene in rendered])
    counts = np.bincount(pixels.ravel(), minlength=256)
    shares = counts[: len(CLASSES)] / pixels.size
    assert counts[len(CLASSES) : VOID].sum() == 0
    assert shares.min() > 0
    assert shares.min() < 0.003
    assert shares.max() > 0.3
    images = [
        (pixels == label).any(axis=(1, 2)).mean() for label in range(len(CLASSES))
    ]
    assert min(images) < 0.3
    assert images[FLOOR] > 0.9
    assert images[WALL] > 0.9


def test_void_and_undefined_pixels_are_few_but_present(rendered):
    for scene in rendered:
        void = scene["segmentation"] == VOID
        undefined = ~scene["normals"].any(axis=-1)
        assert 0 < undefined.mean() < 0.25
        assert void[undefined].all()
    # Clutter has normals, but no class and no box.
    clutter = sum(
        (scene["segmentation"] == VOID) & scene["normals"].any(axis=-1)
        for scene in rendered
    )
    assert clutter.sum() > 0


def test_normals_are_unit_vectors_that_point_to_the_camera(rendered):
    for scene in rendered:
        normals = scene["normals"]
        lengths = np.linalg.norm(normals, axis=-1)
        np.testing.assert_allclose(lengths[normals.any(axis=-1)], 1, atol=1e-6)
        assert (normals * rendering.RAYS).sum(axis=-1).max() < 1e-6


def test_floor_and_ceiling_normals_are_the_worlds_vertical(rendered):
    for scene in rendered:
        up = scene["rotation"] @ [0.0, 0.0, 1.0]
        assert up[1] < -0.5  # y points down in the camera
        for label, normal in ((FLOOR, up), (CEILING, -up)):
            found = scene["normals"][scene["segmentation"] == label]
            np.testing.assert_allclose(
                found, np.broadcast_to(normal, found.shape), atol=1e-6
            )


def test_normals_of_flat_things_agree_with_the_depth(rendered):
    flat = [CLASSES.index(name) for name in ("box", "crate", "rug")]
    compared = 0
    for scene in rendered:
        normals, alike = _normals_from_depth(scene)
        labels = scene["segmentation"][1:-1, 1:-1]
        plane = np.isin(labels, [FLOOR, WALL, CEILING, *flat]) & (alike > 1 - 1e-6)
        compared += plane.sum()
        np.testing.assert_allclose(
            scene["normals"][1:-1, 1:-1][plane], normals[plane], atol=2e-3
        )
    assert compared > 100_000


@pytest.mark.parametrize("name", ["ball", "bin", "vase", "lamp", "plant"])
def test_normals_of_curved_things_agree_with_the_depth(rendered, name):
    angles = []
    for scene, mask, _ in _things(rendered, name):
        normals, alike = _normals_from_depth(scene)
        smooth = mask[1:-1, 1:-1] & (alike > 0.95)
        cosine = (scene["normals"][1:-1, 1:-1] * normals).sum(axis=-1)[smooth]
        angles.extend(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    assert len(angles) > 100
    assert np.median(angles) < 1.5


def test_balls_are_spheres(rendered):
    """On a sphere, point = center + radius x normal; four numbers fit all pixels."""
    fitted = 0
    for scene, mask, _ in _things(rendered, "ball"):
        mask = mask & scene["normals"].any(axis=-1)
        normals = scene["normals"][mask].astype(float)
        points = (rendering.RAYS * scene["depth"][..., None])[mask]
        if len(points) < 30:
            continue
        unknowns = np.concatenate(
            [np.tile(np.eye(3), (len(points), 1)), normals.reshape(-1, 1)], axis=1
        )
        solution = np.linalg.lstsq(unknowns, points.ravel(), rcond=None)[0]
        np.testing.assert_allclose(unknowns @ solution, points.ravel(), atol=1e-4)
        assert 0.1 <= solution[3] <= 0.25
        fitted += 1
    assert fitted > 5


def test_a_part_around_the_camera_is_met_though_its_center_is_behind():
    bar = rendering.Solid(
        parts=(rendering.Part("box"),),
        size=np.array([4.0, 0.2, 0.2]),
        origin=np.zeros(3),
        rotation=np.eye(3),
        surfaces=[],
    )
    eye = np.array([1.0, 0.0, 0.5])  # above the bar, and looking away from its middle
    ray = np.array([[0.8, 0.0, -0.6]])
    hit, distance, normal = rendering._intersect(bar, bar.parts[0], eye, ray)
    np.testing.assert_array_equal(hit, [0])
    np.testing.assert_allclose(distance, [0.5])
    np.testing.assert_allclose(normal, [[0, 0, 1]])


def test_boxes_are_tight_around_the_visible_pixels(rendered):
    for scene in rendered:
        assert scene["instances"].max() == len(scene["objects"]) - 1
        for index, thing in enumerate(scene["objects"]):
            mask = scene["instances"] == index
            assert mask.sum() >= scenes.MIN_VISIBLE_PIXELS
            top, left, bottom, right = np.round(
                thing["bbox"] * ([rendering.HEIGHT, rendering.WIDTH] * 2)
            ).astype(int)
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_objects_and_segmentation_agree(rendered):
    for scene in rendered:
        for index, thing in enumerate(scene["objects"]):
            labels = scene["segmentation"][scene["instances"] == index]
            label = CLASSES.index(OBJECT_CLASSES[thing["label"]])
            assert set(labels) <= {label, VOID}


def test_outlines_are_void(rendered):
    for scene in rendered:
        ids, classes = scene["instances"], scene["segmentation"]
        assert (classes[:-1][ids[:-1] != ids[1:]] == VOID).all()
        assert (classes[:, :-1][ids[:, :-1] != ids[:, 1:]] == VOID).all()


@pytest.mark.parametrize(
    ("name", "true", "false"),
    [
        ("ball", "round", "boxy tall flat large on_wall"),
        ("bin", "round on_floor", "boxy flat large"),
        ("vase", "round shiny", "boxy flat large on_wall speckled"),
        ("crate", "boxy striped on_floor", "round flat large shiny"),
        ("box", "boxy", "round large shiny striped"),
        ("picture", "boxy flat on_wall", "round on_floor shiny"),
        ("window", "boxy flat on_wall shiny", "round on_floor striped dark"),
        ("rug", "boxy flat on_floor", "round tall on_object"),
        ("door", "tall flat large on_floor", "round boxy on_wall"),
        ("lamp", "round tall large on_floor", "boxy flat dark"),
        ("sofa", "boxy large on_floor", "round tall flat shiny"),
    ],
)
def test_attributes_follow_from_the_class(rendered, name, true, false):
    things = _things(rendered, name)
    assert things
    for _, _, attributes in things:
        assert all(attributes[attribute] == 1 for attribute in true.split())
        assert all(attributes[attribute] == 0 for attribute in false.split())


def test_every_attribute_varies_and_some_exclude_each_other(rendered):
    values = np.stack([t["attributes"] for s in rendered for t in s["objects"]])
    assert set(np.unique(values)) == {0, 1}
    shares = dict(zip(ATTRIBUTES, values.mean(axis=0), strict=True))
    assert all(0.02 < share < 0.9 for share in shares.values()), shares

    def sums(*names):
        return values[:, [ATTRIBUTES.index(name) for name in names]].sum(axis=1)

    assert (sums("on_floor", "on_wall", "on_object") == 1).all()
    assert (sums("striped", "checked", "dotted", "speckled") <= 1).all()
    assert (sums("round", "boxy") <= 1).all()


@pytest.mark.parametrize("texture", ["striped", "checked", "dotted", "speckled"])
def test_textures_are_seen_in_the_image(rendered, texture):
    roughness = {True: [], False: []}
    textures = ("striped", "checked", "dotted", "speckled")
    for scene, mask, attributes in _things(rendered, *OBJECT_CLASSES):
        plain = not any(attributes[name] for name in textures)
        if mask.sum() > 200 and (plain or attributes[texture]):
            logs = np.log1p(scene["image"].astype(float).mean(axis=-1))
            steps = np.abs(np.diff(logs, axis=1))[mask[:, 1:] & mask[:, :-1]]
            roughness[plain].append(steps.mean())
    assert np.mean(roughness[False]) > 1.2 * np.mean(roughness[True])


def test_dark_things_are_darker_in_the_image(rendered):
    brightness = {0: [], 1: []}
    for scene, mask, attributes in _things(rendered, *OBJECT_CLASSES):
        brightness[attributes["dark"]].append(scene["image"][mask].mean())
    assert np.mean(brightness[1]) < 0.8 * np.mean(brightness[0])


def test_things_at_the_edge_of_the_image_are_truncated(rendered):
    for _, mask, attributes in _things(rendered, *OBJECT_CLASSES):
        edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        if edge:
            assert attributes["truncated"]
        elif not attributes["occluded"] and mask.sum() > 200:
            # What is hidden of it is too little to be cut off by the image as well.
            assert not attributes["truncated"]


def test_balls_that_are_seen_whole_fill_their_box_like_a_disc(rendered):
    whole, occluded = [], []
    for _, mask, attributes in _things(rendered, "ball"):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        fill = mask.sum() / (np.pi / 4 * height * width)
        roundness = min(height, width) / max(height, width)
        if not attributes["truncated"]:
            (occluded if attributes["occluded"] else whole).append((fill, roundness))
    assert len(whole) > 3
    assert len(occluded) > 0
    assert np.min(whole) > 0.8


def test_encoded_normals_keep_their_direction_and_zero_means_undefined(rendered):
    normals = rendered[0]["normals"]
    encoded = scenes.encode_normals(normals)
    assert encoded.dtype == np.uint8
    defined = normals.any(axis=-1)
    np.testing.assert_array_equal(encoded.any(axis=-1), defined)
    decoded = encoded[defined] / 255 * 2 - 1
    np.testing.assert_allclose(decoded, normals[defined], atol=1 / 255 + 1e-6)


def test_toy_data_set_has_the_promised_features(toy):
    assert toy.info.splits["train"].num_examples == 16
    assert toy.info.splits["test"].num_examples == 8
    assert toy.info.features["segmentation"].names == CLASSES
    assert toy.info.features["objects"]["label"].names == OBJECT_CLASSES
    for example in tfds.as_numpy(toy.as_dataset(split="test")):
        index = int(example["id"].decode().removeprefix("test_"))
        assert example["image"].shape == (96, 128, 3)
        assert example["segmentation"].shape == (96, 128, 1)
        assert example["normals"].shape == (96, 128, 3)
        for name in ("image", "segmentation", "normals"):
            assert example[name].dtype == np.uint8
        count = len(example["objects"]["label"])
        assert example["objects"]["bbox"].shape == (count, 4)
        assert example["objects"]["bbox"].dtype == np.float32
        assert example["objects"]["attributes"].shape == (count, len(ATTRIBUTES))
        assert example["objects"]["attributes"].dtype == np.uint8
        # The seed is the split's checksum and the index, in every process.
        scene = scenes.render(np.random.default_rng([zlib.crc32(b"test"), index]))
        np.testing.assert_array_equal(example["image"], scene["image"])
        np.testing.assert_array_equal(
            example["segmentation"][..., 0], scene["segmentation"]
        )
        np.testing.assert_array_equal(
            example["normals"], scenes.encode_normals(scene["normals"])
        )
        for name in ("bbox", "label", "attributes"):
            expected = np.array([thing[name] for thing in scene["objects"]])
            np.testing.assert_allclose(example["objects"][name], expected, rtol=1e-6)


def test_two_builds_are_equal_and_splits_are_not(toy, tmp_path):
    again = _build_toy(tmp_path)

    def images(builder, split):
        examples = tfds.as_numpy(builder.as_dataset(split=split))
        return {example["id"].decode(): example for example in examples}

    first, second = images(toy, "train"), images(again, "train")
    np.testing.assert_equal(first, second)
    test = images(toy, "test")["test_000000"]["image"]
    assert (test != first["train_000000"]["image"]).any()


def test_the_full_data_set_is_the_default():
    config = scenes.Scenes.BUILDER_CONFIGS[0]
    assert (config.name, config.train, config.test) == ("full", 400, 100)
