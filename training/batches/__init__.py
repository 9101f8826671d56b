"""From a TFDS builder to batches: one file for each kind of example."""

from training.batches import dense, regions
from training.recipes import Data, RegionData

_KINDS = {Data: dense, RegionData: regions}


def pipeline(recipe):
    """The module that loads the recipe's examples and makes its batches."""
    return _KINDS[type(recipe.data)]


def test_passes(builder, recipe, tasks):
    """The passes over the test split: one for all tasks that have the same inputs.

    Returns:
        List of `({task name: task}, batches)`.
    """
    by_inputs = {}
    for name, task in tasks.items():
        by_inputs.setdefault(task.inputs, {})[name] = task
    return [
        (together, pipeline(recipe).test_batches(builder, recipe, together))
        for together in by_inputs.values()
    ]
