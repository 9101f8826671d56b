import types

import keras
import numpy as np
import pytest

from keras_cross_stitch import split, stitch
from training import backbones, recipes, towers


@pytest.fixture(scope="module")
def pretrained(backbone):
    recipe = recipes.find("nyuv2_pretrained", toy=True)
    recipe = recipes.change(recipe, "training", dtype="float32")
    recipe = recipes.change(recipe, "data", image_size=(96, 160), target_size=(48, 80))
    return recipes.change(recipe, "tower", backbone=backbone, frozen_to="block4_output")


def of_equal_shape(towers_of_tasks):
    one, other = (tower.get_weights() for tower in towers_of_tasks.values())
    return [(a, b) for a, b in zip(one, other, strict=True) if a.shape == b.shape]


def test_towers_start_from_one_initialisation(alexnet, tasks):
    together = of_equal_shape(towers.build(alexnet, tasks, 3))
    fresh = recipes.change(alexnet, "tower", common_start=False)
    apart = of_equal_shape(towers.build(fresh, tasks, 3))
    another_seed = of_equal_shape(towers.build(alexnet, tasks, 4))

    assert len(together) > 20
    assert all(np.array_equal(a, b) for a, b in together)
    assert not all(np.array_equal(a, b) for a, b in apart)
    assert not all(
        np.array_equal(a, c)
        for (a, _), (c, _) in zip(together, another_seed, strict=True)
    )


@pytest.mark.parametrize("kind", ["alexnet", "pretrained"])
def test_a_tower_taken_out_is_the_one_that_was_joined(request, kind, tasks):
    recipe = request.getfixturevalue(kind)
    of_tasks = towers.build(recipe, tasks, 0)
    rng = np.random.default_rng(0)
    for tower in of_tasks.values():
        for weight in tower.trainable_variables:
            weight.assign(rng.uniform(0, 0.1, weight.shape))
    joined = stitch(of_tasks, at=())
    image = rng.uniform(0, 255, (1, *recipe.data.image_size, 3))

    assert any("shared_conv" in x.name for x in joined.layers) == (kind != "alexnet")
    for name, tower in of_tasks.items():
        taken = towers.take_out(joined, name)
        assert [x.name for x in taken.layers] == [x.name for x in tower.layers]
        assert len(taken.trainable_variables) == len(tower.trainable_variables)
        np.testing.assert_array_equal(
            taken.predict(image, verbose=0), tower.predict(image, verbose=0)
        )


def test_a_backbone_gets_the_pixels_that_it_expects(pretrained, tasks, tmp_path):
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Conv2D(4, 1, 32, name="conv")(image)
    saved = keras.Model(image, keras.layers.ReLU(name="relu7")(x))
    saved.save(tmp_path / "bare.keras")
    tower = {"backbone": tmp_path / "bare.keras", "frozen_to": "conv"}
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 96, 160, 3))

    def features(pixel_range):
        recipe = recipes.change(pretrained, "tower", **tower, pixel_range=pixel_range)
        built = towers.build(recipe, tasks, 0)["normals"]
        return keras.Model(built.input, built.get_layer("relu7").output)(pixels)

    for low, high in ((-1.0, 1.0), (0.0, 255.0), (0.0, 1.0)):
        expected = saved(low + (high - low) * pixels / 255)
        np.testing.assert_allclose(
            features((low, high)), expected, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match=r"bare\.keras has no layer that rescales"):
        features(None)


def test_a_saved_backbone_starts_all_towers_and_keeps_its_frozen_half(
    pretrained, tasks, backbone
):
    saved = keras.models.load_model(backbone)
    of_tasks = towers.build(pretrained, tasks, 0)
    for name, tower in of_tasks.items():
        assert tower.output.shape == (None, 48, 80, tasks[name].outputs)
        for layer in saved.layers:
            copied = tower.get_layer(layer.name).get_weights()
            for a, b in zip(layer.get_weights(), copied, strict=True):
                np.testing.assert_array_equal(a, b)
    model = stitch(of_tasks, at=["relu7"])
    before = {x.path: x.numpy() for x in model.variables}
    model.compile("sgd", {name: task.loss() for name, task in tasks.items()})
    image = np.random.default_rng(0).uniform(0, 255, (2, 96, 160, 3))
    normals = np.zeros((2, 48, 80, 3))
    normals[..., 2] = -1
    model.fit(
        image,
        {"segmentation": np.ones((2, 48, 80)), "normals": normals},
        epochs=2,  # the score starts at zero, and so does what is below it
        verbose=0,
    )
    moved = {
        x.path.split("/")[0]
        for x in model.variables
        if np.any(x.numpy() != before[x.path])
    }

    assert not [path for path in moved if "4" in path and "seed" not in path]
    assert {"segmentation_conv7", "normals_block7_output"} <= moved


def test_the_dtype_of_the_recipe_is_that_of_the_towers(pretrained, alexnet, tasks):
    for recipe in (pretrained, alexnet):
        half = recipes.change(recipe, "training", dtype="mixed_bfloat16")
        tower = towers.build(half, tasks, 0)["normals"]
        layer = next(x for x in tower.layers if isinstance(x, keras.layers.Conv2D))
        assert layer.compute_dtype == "bfloat16"
        assert layer.kernel.dtype == "float32"
        assert tower.output.dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


def test_a_backbone_is_identified_by_what_it_is_not_where(pretrained, tmp_path):
    moved = tmp_path / "moved.keras"
    moved.write_bytes(pretrained.tower.backbone.read_bytes())
    there = recipes.change(pretrained, "tower", backbone=moved)
    same = towers.identity(there.tower)

    assert same == towers.identity(pretrained.tower)
    moved.write_bytes(moved.read_bytes() + b"x")
    assert same != towers.identity(there.tower)


def test_weights_are_identified_by_what_they_are(tmp_path):
    path = tmp_path / "alexnet.npz"
    path.write_bytes(b"weights")
    recipe = recipes.change(recipes.find("voc2008_alexnet"), "tower", weights=path)
    before = towers.identity(recipe.tower)
    path.write_bytes(b"others")

    assert before.keys() == {"weights"}
    assert towers.identity(recipe.tower) != before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frozen_to": "block9_output"}, "has no layer 'block9_output'.* conv4"),
        ({"backbone": "nowhere.keras"}, "There is no backbone .*nowhere.* --backbone"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused(
    pretrained, tasks, tmp_path, values, message
):
    if "backbone" in values:
        values = {"backbone": tmp_path / values["backbone"]}
    with pytest.raises(ValueError, match=message):
        towers.build(recipes.change(pretrained, "tower", **values), tasks, 0)


def test_a_backbone_of_another_stride_is_refused(pretrained, tasks, tmp_path):
    image = keras.Input((None, None, 3))
    conv = keras.layers.Conv2D(4, 3, 16, padding="same", name="block4_output")(image)
    keras.Model(image, conv).save(tmp_path / "stride16.keras")
    other = recipes.change(
        pretrained,
        "tower",
        backbone=tmp_path / "stride16.keras",
        pixel_range=(0.0, 255.0),
    )

    with pytest.raises(ValueError, match=r"32 pixels\. Received: 6x10 cells"):
        towers.build(other, tasks, 0)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """One of `keras.applications`: it adds tensors, and fills images up."""
    model = keras.applications.MobileNetV3Small(
        include_top=False, weights=None, alpha=0.25, minimalistic=True
    )
    path = tmp_path_factory.mktemp("models") / "mobilenet.keras"
    model.save(path)
    return path


def test_a_recipe_keeps_the_names_that_its_backbone_has(pretrained):
    assert backbones.with_its_names(pretrained) is pretrained


def test_layers_of_another_backbone_are_found_by_stride(mobilenet, tasks):
    recipe = recipes.find("nyuv2_pretrained", toy=True)
    recipe = recipes.change(recipe, "data", image_size=(80, 112), target_size=(40, 56))
    recipe = recipes.change(recipe, "tower", backbone=mobilenet)
    found = backbones.with_its_names(recipe)
    built = towers.build(found, tasks, 0)

    one = built["segmentation"]
    of_stride = {"filled": (96, 128), found.tower.frozen_to: (12, 16)}
    of_stride |= dict(zip(found.units.at, [(6, 8), (3, 4)], strict=True))
    for name, size in of_stride.items():
        assert one.get_layer(name).output.shape[1:3] == size
    assert one.output.shape[1:3] == (40, 56)
    names = [layer.name for layer in one.layers]
    places = [names.index(x) for x in (found.tower.frozen_to, *found.units.at, "score")]
    assert places == sorted(places)
    for layer in one.layers[: places[0] + 1]:
        assert not layer.trainable_weights, layer.name
    assert all(x.trainable for x in one.layers[places[0] + 1 :])
    images = np.random.default_rng(0).uniform(0, 255, (1, 80, 112, 3))
    stitched = stitch(built, at=found.units.at, same_task=1.0)(images)
    np.testing.assert_allclose(stitched["segmentation"], one(images), atol=1e-5)
    assert found.best_split in found.splits
    for at in found.splits:
        split(built, at=at)


def test_what_is_filled_up_moves_nothing(tasks, tmp_path):
    """A bright square is answered where it is, below and right of what is dark."""
    image = keras.Input((None, None, 3))
    mean = keras.layers.Conv2D(1, 32, 32, kernel_initializer="ones", name="conv")(image)
    keras.Model(image, mean).save(tmp_path / "mean.keras")
    recipe = recipes.find("nyuv2_pretrained", toy=True)
    recipe = recipes.change(recipe, "data", image_size=(80, 112), target_size=(40, 56))
    tower = {"backbone": tmp_path / "mean.keras", "frozen_to": "conv"}
    recipe = recipes.change(recipe, "tower", **tower, pixel_range=(0.0, 255.0))
    built = towers.build(recipe, tasks, 0)["normals"]
    score = built.get_layer("score")
    score.set_weights([np.ones_like(x) for x in score.get_weights()])
    square = np.zeros((1, 80, 112, 3))
    square[:, 32:64, 32:64] = 9.0

    answer = built.predict(square, verbose=0)[0, ..., 0] - 1
    for axis in (0, 1):
        profile = answer.sum(axis=1 - axis)
        centre = profile @ (np.arange(len(profile)) + 0.5) / profile.sum()
        assert centre == pytest.approx(48 / 2, abs=0.1)


def test_regions_are_pooled_from_what_is_found(mobilenet):
    recipe = recipes.find("voc2008", toy=True)
    recipe = recipes.change(recipe, "tower", backbone=mobilenet)
    found = backbones.with_its_names(recipe)
    assert found.units.at == (*found.tower.pooled, "fc6", "fc7")
    task = types.SimpleNamespace(outputs=3)
    built = towers.build(found, {"detection": task, "attributes": task}, 0)
    assert built["detection"].output.shape == (None, None, 3)


def test_a_backbone_without_such_strides_is_refused(pretrained, tmp_path):
    image = keras.Input((None, None, 3))
    conv = keras.layers.Conv2D(4, 3, 32, padding="same", name="conv")(image)
    keras.Model(image, conv).save(tmp_path / "stride32.keras")
    path = tmp_path / "stride32.keras"
    recipe = recipes.change(pretrained, "tower", backbone=path)
    with pytest.raises(ValueError, match=r"stride32.*lacks .*'block4_output'.*\{32: "):
        backbones.with_its_names(recipe)
