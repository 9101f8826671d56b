"""Saves models with their answers, for every later version to load.

`python tests/golden/make.py` writes `tests/golden/<version>/`, once for each version
that saves something new. A folder that is there stays: it is what users have.
"""

import shutil
from pathlib import Path

import keras
import numpy as np

import keras_cross_stitch
from keras_cross_stitch import (
    Detections,
    DynamicWeightAverage,
    LearningRateGroups,
    MaskedLoss,
    MaskedMetric,
    RoIAlign,
    export_saved_model,
    stitch,
    weigh_losses,
)
from keras_cross_stitch.towers import BilinearUpsampling, LocalResponseNormalization

FOLDER = Path(__file__).parent / keras_cross_stitch.__version__
layers = keras.layers


def tower(head):
    image = keras.Input((12, 10, 3), name="image")
    x = layers.Rescaling(1 / 255)(image)
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv1")(x)
    x = LocalResponseNormalization()(x)
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="conv2")(x)
    x = layers.BatchNormalization(name="norm")(x)
    return keras.Model(image, head(x))


def kind(x):
    return layers.Dense(3, name="score")(layers.GlobalAveragePooling2D()(x))


def depth(x):
    return BilinearUpsampling(2)(layers.Conv2D(1, 1, name="score")(x))


def images(count):
    return np.random.default_rng(0).integers(256, size=(count, 12, 10, 3)).astype("f")


def labels(count):
    """Half of the depths are missing, and every third kind."""
    rng = np.random.default_rng(1)
    kinds = np.where(np.arange(count) % 3, rng.integers(0, 3, count), -1)
    depths = rng.uniform(1, 9, (count, 12, 10, 1)).astype("float32")
    depths[:, ::2] = np.nan
    return {"kind": kinds, "depth": depths}


def trained(by=None, **unit):
    """Three steps later, so that the optimizer has a state."""
    keras.utils.set_random_seed(0)
    towers = {"kind": tower(kind), "depth": tower(depth)}
    model = stitch(towers, at=["conv1", "norm"], **unit)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = {"kind": MaskedLoss(crossentropy, missing=-1), "depth": MaskedLoss("mse")}
    if by:
        model, loss = weigh_losses(model, loss, by=by)
    model.compile(
        LearningRateGroups(keras.optimizers.SGD(0.01, momentum=0.9), alpha=10),
        loss=loss,
        metrics={"depth": [MaskedMetric("mae", name="error")]},
    )
    train(model)
    return model


def train(model):
    """Dynamic averages are set by a callback, which other models do without."""
    averaged = any("dynamic" in layer.name for layer in model.layers)
    return model.fit(
        images(12),
        labels(12),
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=[DynamicWeightAverage()] if averaged else [],
    )


def of_regions():
    keras.utils.set_random_seed(0)
    image = keras.Input((24, 32, 3), name="image")
    rois = keras.Input((None, 4), name="rois")
    pooled = layers.Flatten()(RoIAlign(size=2, stride=1)([image, rois])[:, 0])
    features = layers.Reshape((-1, 12))(RoIAlign(size=2, stride=1)([image, rois]))
    scores = layers.Dense(3, "softmax", name="scores")(features / 255)
    deltas = layers.Dense(8, name="deltas")(features / 255)
    found = Detections((24, 32), max_detections=5)([scores, deltas, rois])
    outputs = {"detection": found, "first": layers.Dense(2, name="first")(pooled)}
    return keras.Model({"image": image, "rois": rois}, outputs)


def boxes():
    corners = np.random.default_rng(2).uniform(0, 24, (2, 7, 2, 2))
    return np.sort(corners, axis=2).reshape(2, 7, 4).astype("float32")


def main():
    FOLDER.mkdir(exist_ok=False)
    try:
        models = {
            "per_channel": trained(),
            "per_layer": trained(per="layer", same_task=0.7),
            "uncertainty": trained(by="uncertainty"),
            "dynamic_average": trained(by="dynamic_average"),
        }
        answers = {"image": images(2)}
        for name, model in models.items():
            model.save(FOLDER / f"{name}.keras")
            answers[f"{name}/loss"] = model.evaluate(images(12), labels(12), verbose=0)[
                0
            ]
            for task, x in model.predict(answers["image"], verbose=0).items():
                answers[f"{name}/{task}"] = x
        model = of_regions()
        model.save(FOLDER / "regions.keras")
        given = {"image": np.resize(images(9), (2, 24, 32, 3)), "rois": boxes()}
        answers |= {f"regions_given/{name}": x for name, x in given.items()}
        for name, x in named(model.predict(given, verbose=0)).items():
            answers[f"regions/{name}"] = x
        export_saved_model(models["per_channel"], FOLDER / "served", from_jpeg=True)
        np.savez_compressed(FOLDER / "answers.npz", **answers)
    except BaseException:
        shutil.rmtree(FOLDER)
        raise


def named(answer):
    """A dict of a model's outputs, and of their dicts, as one dict."""
    found = answer["detection"]
    return {**{f"detection/{k}": x for k, x in found.items()}, "first": answer["first"]}


if __name__ == "__main__":
    main()
