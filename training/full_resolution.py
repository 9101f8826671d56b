"""NYUv2 scored as papers do: at the size of the labels, within the official frame."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import tensorflow as tf

from training import fitting
from training.datasets import nyuv2
from training.datasets.images import read_image, stored_as
from training.files import write_json
from training.runs import Experiment

# Of 480x640, where depth and labels are known: rows 45 to 470, columns 41 to 600.
FRAME = ((45, 471), (41, 601))


def evaluate(
    experiment: Experiment, run: Path, folder: Path
) -> tuple[str, dict[str, dict[str, float]]]:
    """Scores a run's logits, resized to the labels of a NYUv2 folder (bilinear).

    Where the folder has labels of 480x640, this is the protocol of papers; where it has
    smaller ones, it is that at their size. Writes `full_resolution.json` to the run.

    Args:
        experiment: The run's `Experiment`, on prepared data.
        run: The run's folder.
        folder: A NYUv2 folder, of 320x240 or of 640x480.

    Returns:
        Which of these it is, a sentence, and `{task: {metric: value}}`.
    """
    recipe, tasks = experiment.recipe, experiment.tasks
    if recipe.data.dataset != "nyuv2":
        raise ValueError(
            f"Full resolution is a protocol of NYUv2 only, and '{recipe.name}' has the "
            f"data set '{recipe.data.dataset}'. What its run scored stands in "
            f"{run / 'metrics.json'}"
        )
    if recipe.data.test_split != "test":
        raise ValueError(
            "Expected a run that is judged on the test images. Received: "
            f"{run}, of '{recipe.name}', which is judged on {recipe.data.test_split}"
        )
    ids = nyuv2.check_folder(folder)["test"]
    _, (height, width, *_) = stored_as(folder / "labels40" / f"{ids[0]}.png")
    if height % nyuv2.HEIGHT or height * nyuv2.WIDTH != width * nyuv2.HEIGHT:
        raise ValueError(
            f"Expected labels of 640x480 or 320x240 in {folder}. Received: "
            f"{width}x{height}. `python -m training prepare nyuv2` writes them"
        )
    builder: Any = experiment.builder  # prepared; the toy size has a part of the images
    ids = ids[: builder.info.splits[recipe.data.test_split].num_examples]
    frame = [
        (math.ceil(first * height / 480), math.floor(end * height / 480))
        for first, end in FRAME
    ]
    model = _resized(
        keras.models.load_model(run / "model.keras", compile=False),
        tasks,
        frame,
        height,
    )
    examples = _examples(folder, ids, (height, width), experiment, frame)
    scores = fitting.evaluate(model, tasks, examples)
    metrics = fitting.rounded(scores, tasks)
    (top, bottom), (left, right) = frame
    what = "the official frame, as papers have it. Normals are derived from depth here"
    if height < 480:
        what = "the official frame, scaled, since the labels are no larger"
    protocol = (
        f"{len(ids)} images at {height}x{width}, from logits resized (bilinear), "
        f"within rows {top} to {bottom - 1} and columns {left} to {right - 1}: {what}"
    )
    write_json(run / "full_resolution.json", {"protocol": protocol, "metrics": metrics})
    return protocol, metrics


def _resized(
    model: keras.Model, tasks: Any, frame: list[tuple[int, int]], height: int
) -> keras.Model:
    """The model with answers at another size, from its logits, and of a frame alone."""
    width = height * nyuv2.WIDTH // nyuv2.HEIGHT
    (top, bottom), (left, right) = frame
    names = {layer.name for layer in model.layers}
    answers = {}
    for name, task in tasks.items():
        if f"{name}_logits" not in names:
            raise ValueError(
                "Several networks' answers are averaged here, and there are no logits "
                "to resize: score one of these networks"
            )
        x = model.get_layer(f"{name}_logits").output
        x = keras.layers.Resizing(height, width, dtype="float32")(x)
        surplus = ((top, height - bottom), (left, width - right))
        x = keras.layers.Cropping2D(surplus, dtype="float32")(x)
        answers[name] = task.answer(x, name, model.input)
    return keras.Model(model.input, answers)


def _examples(
    folder: Path,
    ids: list[str],
    shape: tuple[int, int],
    experiment: Experiment,
    frame: list[tuple[int, int]],
) -> Iterator[tuple[np.ndarray, dict[str, tf.Tensor]]]:
    """(image, {task: target}) of each image, in batches of one."""
    height, width = experiment.recipe.data.image_size
    (top, bottom), (left, right) = frame
    tasks: dict[str, Any] = dict(experiment.tasks)  # dense ones
    for image_id in ids:
        path = folder / "rgb" / f"{image_id}.jpg"
        image = read_image(path, np.uint8, (*shape, 3))
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        maps = nyuv2.read_maps(folder, image_id, shape)
        targets = {
            name: task.target(maps)[None, top:bottom, left:right]
            for name, task in tasks.items()
        }
        yield image[None].astype("float32"), targets
