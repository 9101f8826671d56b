"""From a TFDS builder to batches: one file for each kind of example."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from training.batches import dense, regions
from training.recipes import Data, Recipe, RegionData
from training.tasks import Task

_KINDS = {Data: dense, RegionData: regions}


def pipeline(recipe: Recipe) -> ModuleType:
    """The module that loads the recipe's examples and makes its batches."""
    return _KINDS[type(recipe.data)]


def test_passes(
    builder: tfds.core.DatasetBuilder, recipe: Recipe, tasks: Mapping[str, Task]
) -> list[tuple[dict[str, Any], tf.data.Dataset]]:
    """The passes over the test split: one for all tasks that have the same inputs.

    Returns:
        List of `({task name: task}, batches)`.
    """
    by_inputs: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        by_inputs.setdefault(task.inputs, {})[name] = task
    return [
        (together, pipeline(recipe).test_batches(builder, recipe, together))
        for together in by_inputs.values()
    ]
