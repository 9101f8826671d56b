"""Fast R-CNN's towers, the weights they may start from, and a run from end to end."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import alexnet, fcn_alexnet, split, stitch
from training import (
    alexnet_weights,
    callbacks,
    fitting,
    recipes,
    runs,
    towers,
)
from training.preemption import Preempted
from training.runs import open_experiment
from training.study import comparison
from training.study.report import write_report
from training.tasks import Attributes, Detection

pytestmark = pytest.mark.xdist_group("fast_rcnn")

TASKS = {
    "detection": Detection(("cat", "dog")),
    "attributes": Attributes(("a", "b"), (3, 5)),
}


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def on_alexnet():
    return recipes.find("scenes_detection", toy=True)


@pytest.fixture(scope="module")
def on_backbone(backbone, on_alexnet):
    tower = recipes.FastRcnnBackbone(
        backbone,
        frozen_to="block4_output",
        dropout=0.5,
        pixel_range=None,
        pooled=("relu4", "block15_output"),
        pooled_size=2,
        fully_connected=12,
    )
    units = dataclasses.replace(on_alexnet.units, at=("block7_output", "fc6", "fc7"))
    recipe = dataclasses.replace(on_alexnet, tower=tower, units=units, name="backbone")
    return recipes.change(recipe, "data", image_size=(96, 128))


@pytest.fixture(params=["on_alexnet", "on_backbone"])
def recipe(request):
    return request.getfixturevalue(request.param)


def inputs(recipe, rng, count=5):
    corners = np.sort(rng.uniform(0, 96, (2, count, 2, 2)), axis=2)
    return {
        "image": rng.uniform(0, 255, (2, *recipe.data.image_size, 3)),
        "rois": corners.reshape(2, count, 4),
    }


def test_towers_stitch_split_and_are_taken_out_again(recipe, rng):
    of_tasks = towers.build(recipe, TASKS, 0)
    units = recipe.units
    stitched = stitch(of_tasks, at=units.at, per=units.per, same_task=1.0)
    shared = split(of_tasks, at="score")
    apart = stitch(of_tasks, at=())
    given = inputs(recipe, rng)
    expected = {
        name: tower.predict(given, verbose=0) for name, tower in of_tasks.items()
    }
    # One start: all but the last layers are alike, so sharing them changes nothing.
    for model in (stitched, shared, apart):
        for name, x in model.predict(given, verbose=0).items():
            assert x.shape == (2, 5, TASKS[name].outputs)
            np.testing.assert_allclose(x, expected[name], rtol=1e-4, atol=1e-5)
    for name in TASKS:
        alone = towers.take_out(apart, name)
        np.testing.assert_allclose(
            alone.predict(given, verbose=0), expected[name], rtol=1e-5, atol=1e-6
        )
    assert stitched.get_layer(f"cross_stitch_{units.at[-1]}").alpha.shape == (2, 2)


def test_a_roi_is_answered_for_itself_alone(recipe, rng):
    tower = towers.build(recipe, TASKS, 0)["detection"]
    given = inputs(recipe, rng, count=6)
    whole = tower.predict(given, verbose=0)
    some = tower.predict({**given, "rois": given["rois"][:, 2:4]}, verbose=0)

    np.testing.assert_allclose(some, whole[:, 2:4], rtol=1e-4, atol=1e-5)
    assert np.abs(whole[:, 0] - whole[:, 1]).max() > 0


def test_a_frozen_trunk_is_frozen_and_built_once(on_backbone):
    of_tasks = towers.build(on_backbone, TASKS, 0)
    names = [x.name for x in stitch(of_tasks, at=on_backbone.units.at).layers]

    for tower in of_tasks.values():
        trainable = {x.path.split("/")[0] for x in tower.trainable_variables}
        assert not trainable & {"conv4", "block4_output"}
        assert {"conv7", "block7_output", "fc6", "fc7", "score"} <= trainable
    assert "shared_conv4" in names
    assert {"detection_conv7", "attributes_conv7"} <= set(names)


def test_rois_are_pooled_at_the_stride_of_each_map(on_backbone):
    tower = towers.build(on_backbone, TASKS, 0)["detection"]
    pooled = [tower.get_layer(f"{name}_pooled") for name in on_backbone.tower.pooled]

    assert [layer.stride for layer in pooled] == [8, 32]


def test_a_tower_of_regions_decays_and_is_normalised_as_its_recipe_says(on_alexnet):
    recipe = recipes.change(on_alexnet, "tower", weight_decay=0.02)
    tower = towers.build(recipe, TASKS, 0)["detection"]
    kernels = [x.kernel for x in tower.layers if hasattr(x, "kernel")]

    assert len(kernels) == 5 + 3
    # The gradient of this is the decay times the kernel.
    penalty = 0.02 / 2 * sum(np.sum(np.square(kernel)) for kernel in kernels)
    np.testing.assert_allclose(sum(tower.losses), penalty, rtol=1e-5)
    assert {"fc6_norm", "fc7_norm"} <= {layer.name for layer in tower.layers}


def test_a_layer_that_the_backbone_lacks_is_named(on_backbone):
    for part in ({"pooled": ("block99_output",)}, {"frozen_to": "block99_output"}):
        wrong = recipes.change(on_backbone, "tower", **part)
        with pytest.raises(ValueError, match=r"no layer 'block99_output'.* relu7"):
            towers.build(wrong, TASKS, 0)


def test_rois_are_pooled_where_conv5_looks(on_alexnet, rng):
    """The cells of conv5 are centred, by their gradients, where `pool5` says."""
    keras.utils.set_random_seed(0)
    trunk = fcn_alexnet(1, (256, 256, 3), width=0.1, normalization=None)
    conv5 = keras.Model(trunk.input, trunk.get_layer("conv5").output)
    seen = np.zeros(256)
    for _ in range(8):
        image = tf.constant(rng.uniform(0, 255, (1, 256, 256, 3)), "float32")
        with tf.GradientTape() as tape:
            tape.watch(image)
            cell = tf.reduce_sum(conv5(image)[0, 8, 8])
        squares = np.square(tape.gradient(cell, image)[0].numpy()).sum(-1)
        seen += squares.sum(0) + squares.sum(1)
    centre = np.sum(seen * (np.arange(256) + 0.5)) / seen.sum()
    tower = towers.build(on_alexnet, TASKS, 0)["detection"]

    assert centre == pytest.approx(16 * 8 + tower.get_layer("pool5").first, abs=3)


# Weights from elsewhere


def caffe_net(image, weights):
    """Caffe's reference net on BGR minus its mean, in groups, up to conv5."""
    x = image[..., ::-1] - np.array([103.939, 116.779, 123.68])
    x = tf.constant(x, "float32")

    def conv(x, name, groups, stride=1, padding="SAME"):
        kernel, bias = weights[name]
        parts = [
            tf.nn.conv2d(a, b, stride, padding)
            for a, b in zip(
                tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True
            )
        ]
        return tf.nn.relu(tf.concat(parts, -1) + bias)

    x = conv(x, "conv1", 1, 4, "VALID")
    x = tf.nn.local_response_normalization(
        tf.nn.max_pool2d(x, 3, 2, "VALID"), 2, 1.0, 2e-5, 0.75
    )
    x = tf.nn.local_response_normalization(
        tf.nn.max_pool2d(conv(x, "conv2", 2), 3, 2, "VALID"), 2, 1.0, 2e-5, 0.75
    )
    return conv(conv(conv(x, "conv3", 1), "conv4", 2), "conv5", 2).numpy()


def normal(rng, *shape):
    return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype("float32")


CAFFE = {
    "conv1": (11, 11, 3, 96),
    "conv2": (5, 5, 48, 256),
    "conv3": (3, 3, 256, 384),
    "conv4": (3, 3, 192, 384),
    "conv5": (3, 3, 192, 256),
    "fc6": (9216, 4),  # what is not compared is small
    "fc7": (4, 4),
}


def convert(path, folder):
    """Runs the lines that the error names."""
    with pytest.raises(ValueError, match="is a pickle") as refused:
        alexnet_weights.read(path)
    lines = str(refused.value).partition("convert it: ")[2].split("`")[1::2]
    with contextlib.chdir(folder):
        exec("\n".join(lines), {"np": np})


def test_caffes_weights_compute_what_they_did(rng, tmp_path):
    weights = {
        name: [normal(rng, *shape), rng.normal(0, 1, shape[-1:]).astype("float32")]
        for name, shape in CAFFE.items()
    }
    np.save(tmp_path / "alexnet.npy", weights)
    convert(tmp_path / "alexnet.npy", tmp_path)
    read = alexnet_weights.read(tmp_path / "alexnet.npz")
    net = alexnet(2, (99, 99, 3), normalization="local_response")
    for name in list(CAFFE)[:5]:
        net.get_layer(name).set_weights(read[name])
    image = rng.uniform(0, 255, (1, 99, 99, 3))
    conv5 = keras.Model(net.input, net.get_layer("conv5").output)

    expected = caffe_net(image, weights)
    assert expected.max() > 1
    np.testing.assert_allclose(
        conv5.predict(image, verbose=0), expected, rtol=1e-3, atol=1e-3
    )
    for name in ("fc6", "fc7"):
        for ours, theirs in zip(read[name], weights[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_torchvisions_weights_are_laid_out_anew(rng, tmp_path):
    state = {
        "features.0.weight": normal(rng, 64, 3, 11, 11),
        "features.3.weight": normal(rng, 192, 64, 5, 5),
        "features.6.weight": normal(rng, 384, 192, 3, 3),
        "features.8.weight": normal(rng, 256, 384, 3, 3),
        "features.10.weight": normal(rng, 256, 256, 3, 3),
        "classifier.1.weight": normal(rng, 5, 256 * 36),
        "classifier.4.weight": normal(rng, 6, 5),
    }
    state |= {
        name.replace("weight", "bias"): rng.normal(size=len(x)).astype("float32")
        for name, x in state.items()
    }
    np.savez(tmp_path / "alexnet.npz", **state)
    read = alexnet_weights.read(tmp_path / "alexnet.npz")

    # A convolution of the normalised image, at one place, channels first.
    patch = rng.uniform(0, 255, (11, 11, 3))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    there = ((patch / 255 - mean) / std).transpose(2, 0, 1)
    expected = np.tensordot(state["features.0.weight"], there, 3)
    kernel, bias = read["conv1"]
    here = np.tensordot(patch / 127.5 - 1, kernel, 3) + bias
    np.testing.assert_allclose(
        here, expected + state["features.0.bias"], rtol=1e-4, atol=1e-5
    )
    for name, theirs in (("conv2", "features.3"), ("conv5", "features.10")):
        np.testing.assert_array_equal(
            read[name][0], state[f"{theirs}.weight"].transpose(2, 3, 1, 0)
        )
    cells = rng.normal(size=(256, 6, 6))  # torchvision flattens channels first
    np.testing.assert_allclose(
        cells.transpose(1, 2, 0).ravel() @ read["fc6"][0],
        state["classifier.1.weight"] @ cells.ravel(),
        rtol=1e-4,
        atol=1e-4,
    )
    np.testing.assert_array_equal(
        read["fc7"][0], state["classifier.4.weight"].transpose()
    )
    for name, theirs in (("conv2", "features.3"), ("fc7", "classifier.4")):
        np.testing.assert_array_equal(read[name][1], state[f"{theirs}.bias"])


def test_a_wider_layer_keeps_its_start_and_does_not_disturb(rng, monkeypatch):
    """As conv1 and conv2 are wider than torchvision's."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, activation="relu", name="conv1")(image)
    model = keras.Model(image, keras.layers.Conv2D(5, 3, name="conv2")(x))
    own = model.get_layer("conv1").get_weights()[0]
    narrow = {
        "conv1": (normal(rng, 3, 3, 3, 4), normal(rng, 4)),
        "conv2": (normal(rng, 3, 3, 4, 5), normal(rng, 5)),
    }
    monkeypatch.setattr(alexnet_weights, "read", lambda path: narrow)
    alexnet_weights.load(model, None)
    given = rng.normal(size=(1, 8, 8, 3)).astype("float32")
    x = tf.nn.conv2d(given, narrow["conv1"][0], 1, "VALID") + narrow["conv1"][1]
    x = tf.nn.conv2d(tf.nn.relu(x), narrow["conv2"][0], 1, "VALID")

    np.testing.assert_allclose(
        model.predict(given, verbose=0), x + narrow["conv2"][1], rtol=1e-4, atol=1e-5
    )
    kernel = model.get_layer("conv1").get_weights()[0]
    np.testing.assert_array_equal(kernel[..., 4:], own[..., 4:])
    wrong = {"conv2": (normal(rng, 3, 3, 7, 5), normal(rng, 5))}
    monkeypatch.setattr(alexnet_weights, "read", lambda path: wrong)
    with pytest.raises(ValueError, match=r"for conv2 of shape \(3, 3, 6, 5\).*width 1"):
        alexnet_weights.load(model, "file.npy")


def test_a_file_of_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights.*none\.npz\. There is no.*savez"):
        alexnet_weights.read(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", stem=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz\. .*It holds: stem\. "):
        alexnet_weights.read(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"AlexNet's weights.* in .*array\.npy"):
        alexnet_weights.read(tmp_path / "array.npy")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda whole: b"", "The file is empty"),
        (lambda whole: b"garbage" * 99, "pickle"),
        (lambda whole: whole[:-50], "BadZipFile"),
        (lambda whole: whole.replace(b"\0" * 64, b"\1" * 64, 1), "BadZipFile"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, spoil, found):
    path = tmp_path / "alexnet.npz"
    np.savez(path, **{"conv1.weight": np.zeros(99)})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"alexnet\.npz\. .*{found}"):
        alexnet_weights.read(path)


class Ran:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["alexnet.npy", "alexnet.npz"])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save = np.save if name.endswith("npy") else np.savez
    save(name, np.array([Ran()], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"If you trust them, convert it: `w = np"):
        alexnet_weights.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# A run from end to end


@pytest.fixture(scope="module")
def experiment(on_backbone, finished):
    recipe = recipes.change(on_backbone, "single_task", epochs=1)
    recipe = recipes.change(recipe, "data", sampled=8)
    return open_experiment(recipe, None, finished.runs)


def test_a_run_is_trained_judged_compared_and_served(experiment, train):
    metrics = train(experiment, "cross_stitch")
    folder = experiment.folder("cross_stitch", 0)
    answers = json.loads((folder / "answers.json").read_text())

    assert list(metrics["detection"]) == ["mean_ap", "mean_ap_voc2008"]
    assert list(metrics["attributes"]) == [
        "mean_ap",
        "mean_ap_rarest_10",
        "mean_ap_rarest_20",
    ]
    assert metrics["attributes"]["mean_ap"] > 10
    assert metrics == runs.metrics(folder)
    assert answers["detection"]["names"][0] == "door"
    assert "round" in answers["attributes"]["names"]
    by_class = (folder / "per_class.csv").read_text()
    assert "attributes,round,objects," in by_class
    names = experiment.builder.attribute_names
    doors = round_ones = 0
    for example in experiment.builder.as_dataset("train").as_numpy_iterator():
        doors += (example["objects"]["label"] == 0).sum()
        round_ones += example["objects"]["attributes"][:, names.index("round")].sum()
    assert f"attributes,round,labels,{float(round_ones)}\n" in by_class
    assert f"detection,door,labels,{float(doors)}\n" in by_class
    alpha = np.load(folder / "alpha.npz")
    assert {x.shape for x in alpha.values()} == {(2, 2)}
    assert "cross_stitch_fc7" in alpha

    _, target = comparison.compare(experiment, ["cross_stitch"], 0)
    for name in metrics:
        path = experiment.runs / f"backbone/gallery/{name}_seed0.png"
        assert matplotlib.image.imread(path).std() > 0.1
    page = write_report(experiment.runs, experiment.runs.parent / "report.html")
    assert "backbone" in page.read_text()
    loaded = tf.saved_model.load(str(target / "serving/1"))
    assert set(loaded.signatures) == {"detection", "attributes", "serving_default"}
    given = inputs(experiment.recipe, np.random.default_rng(1), count=3)
    given = {name: tf.constant(x, "float32") for name, x in given.items()}
    found = loaded.signatures["detection"](**given)
    assert {name: x.shape[1:] for name, x in found.items()} == {
        "boxes": (100, 4),
        "classes": (100,),
        "scores": (100,),
        "num_detections": (),
    }
    told = loaded.signatures["attributes"](**given)["attributes"]
    assert told.shape == (2, 3, 16)


def test_a_stopped_run_ends_as_one_that_never_stopped(
    experiment, train, monkeypatch, tmp_path
):
    """By SIGTERM in its second step, which is not lost."""
    train(experiment, "single_task")
    (tmp_path / "datasets").symlink_to(experiment.runs / "datasets")
    again = dataclasses.replace(experiment, runs=tmp_path)
    begun = []

    def on_train_batch_begin(self, batch, logs=None):
        begun.append(batch)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(
            callbacks.ShowProgress, "on_train_batch_begin", on_train_batch_begin
        )
        with pytest.raises(Preempted):
            train(again, "single_task")
    assert not (again.folder("single_task", 0) / "model.keras").exists()
    train(again, "single_task")

    expected, resumed = (
        keras.models.load_model(
            x.folder("single_task", 0) / "model.keras", compile=False
        ).get_weights()
        for x in (experiment, again)
    )
    for one, other in zip(expected, resumed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_depends_on_its_proposals(experiment, tmp_path):
    before = experiment.depends_on("single_task", 0)
    name = experiment.recipe.data.dataset
    shutil.copytree(experiment.runs / "datasets" / name, tmp_path / "datasets" / name)
    for name in ("train", "test"):
        (path,) = (tmp_path / "datasets").rglob(f"proposals-{name}.npy")
        boxes = np.load(path)
        np.save(path, boxes / 2)
        changed = open_experiment(experiment.recipe, None, tmp_path)
        assert changed.depends_on("single_task", 0) != before
        np.save(path, boxes)
    same = open_experiment(experiment.recipe, None, tmp_path)
    assert same.depends_on("single_task", 0) == before


def test_an_ensemble_of_one_net_twice_answers_as_it_does(experiment, train, rng):
    train(experiment, "single_task")
    path = experiment.folder("single_task", 0) / "model.keras"
    both = fitting._averaged([path, path], experiment.tasks)
    one = keras.models.load_model(path, compile=False)
    given = inputs(experiment.recipe, rng)
    answer, expected = (x.predict(given, verbose=0) for x in (both, one))

    for name in ("boxes", "scores"):
        np.testing.assert_allclose(
            answer["detection"][name], expected["detection"][name], atol=1e-3
        )
    np.testing.assert_allclose(answer["attributes"], expected["attributes"], atol=1e-6)
