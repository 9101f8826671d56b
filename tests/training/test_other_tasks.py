"""Other tasks than a recipe's own, three of them too."""

import dataclasses

import numpy as np
import pytest

from keras_cross_stitch import stitch
from training import batches, recipes, runs, towers

THREE = ["segmentation", "normals", "depth"]


def test_tasks_are_named_and_stand_in_the_recipes_name():
    own = recipes.find("scenes", toy=True)
    three = recipes.with_tasks(own, THREE)

    assert three.data.tasks == tuple(THREE)
    assert three.name == "scenes-toy-segmentation+normals+depth"
    assert recipes.with_tasks(own, THREE[:2]) == own
    pair = recipes.with_tasks(own, ["normals", "depth"])
    assert pair.data.label_fraction == ("normals", 1.0)


@pytest.mark.parametrize(
    ("name", "tasks", "message"),
    [
        ("scenes", "segmentation,height", r"of segmentation, normals, depth, which"),
        ("scenes", "segmentation", "Expected two or more.*Received: segmentation$"),
        ("scenes", "depth,depth", "Received: depth,depth"),
        ("scenes", "depth,detection", "Received: depth,detection"),
        ("scenes_detection", "detection,depth", "tasks of detection, attributes"),
        ("scenes-labels10", "normals,depth", "labels of segmentation in part: name"),
    ],
)
def test_tasks_that_a_recipe_cannot_have_are_refused(name, tasks, message):
    with pytest.raises(ValueError, match=message):
        recipes.with_tasks(recipes.find(name), tasks.split(","))


def test_other_tasks_need_as_many_weights():
    scenes = recipes.find("scenes")
    weighed = recipes.change(scenes, "training", learning_rate_multipliers=(1.0, 2.0))
    message = r"learning_rate_multipliers .* each of depth, segmentation, normals"
    with pytest.raises(ValueError, match=message):
        recipes.with_tasks(weighed, ["depth", "segmentation", "normals"])


def test_a_task_without_labels_is_refused(finished, monkeypatch):
    features = {x: None for x in ("image", "segmentation", "normals")}
    builder = finished.builder
    monkeypatch.setattr(type(builder.info), "features", features)
    recipe = recipes.with_tasks(finished.recipe, ["normals", "depth"])
    monkeypatch.setattr(runs.prepared, "prepare", lambda *args: builder)
    with pytest.raises(
        ValueError, match=r"'scenes' has no labels of depth\. Each .*image"
    ):
        runs.open_experiment(recipe, None, finished.runs)


def test_three_tasks_are_loaded_augmented_and_stitched(finished):
    recipe = recipes.with_tasks(finished.recipe, THREE)
    recipe = recipes.change(recipe, "data", smallest_crop=0.5)
    experiment = dataclasses.replace(finished, recipe=recipe)
    tasks = experiment.tasks
    pipeline = batches.pipeline(recipe)
    stored, augmented = (
        pipeline.train_batches(
            experiment.train_examples, of, tasks, seed=0, steps=range(1)
        )
        for of in (recipes.change(recipe, "data", smallest_crop=1.0), recipe)
    )
    (_, whole), (images, targets) = next(iter(stored)), next(iter(augmented))
    model = stitch(towers.build(recipe, tasks, 0), at=recipe.units.at)
    logits = model.predict_on_batch(images)

    assert list(targets) == THREE
    for name, task in tasks.items():
        assert logits[name].shape[:3] == targets[name].shape[:3]
        assert logits[name].shape[3] == task.outputs
    # A part of an image, enlarged, is nearer.
    nearer = targets["depth"].numpy() / whole["depth"].numpy().max()
    assert np.nanmax(nearer) < 1
    assert model.get_layer(f"cross_stitch_{recipe.units.at[0]}").alpha.shape[:2] == (
        3,
        3,
    )
