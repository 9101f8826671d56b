"""What the runs of one seed come to: a table, a gallery, alphas and a SavedModel."""

import shutil
import textwrap

import keras
import numpy as np

from keras_cross_stitch import CrossStitch, export_saved_model, plot_alpha
from training import runs
from training.batches import dense
from training.study import figures

PICTURES = 5


def compare(experiment, methods, seed):
    """Writes pictures of finished runs, and the last one's model as a SavedModel.

    In `<runs>/<recipe>/`: `gallery/<task>_seed<seed>.png`; and, if the last method has
    units, in `comparison/seed<seed>/`: `alpha.png` and `serving/1`.

    Args:
        experiment: The `Experiment`.
        methods: List of methods whose runs are finished.
        seed: Integer.

    Returns:
        The path of the folder `comparison/seed<seed>`.
    """
    folders = [experiment.folder(method, seed) / "model.keras" for method in methods]
    models = [keras.models.load_model(path, compile=False) for path in folders]
    target = experiment.folder("comparison", seed)
    target.mkdir(parents=True, exist_ok=True)
    images, targets = _spread_over_test(experiment)
    answers = [model.predict(images, verbose=0) for model in models]
    for name, task in experiment.tasks.items():
        columns = _columns(task, images, targets[name], [x[name] for x in answers])
        names = [textwrap.fill(method.replace("_", " "), 14) for method in methods]
        titles = ["image", "truth", *names, "change"]
        path = target.parents[1] / "gallery" / f"{name}_seed{seed}.png"
        path.parent.mkdir(exist_ok=True)
        # `strict` is off for one method alone, which is compared with none.
        figure = figures.gallery(dict(zip(titles, columns, strict=False)))
        figure.savefig(path, dpi=150)
    if any(isinstance(layer, CrossStitch) for layer in models[-1].layers):
        plot_alpha(models[-1]).savefig(target / "alpha.png", dpi=110)
        _export(models[-1], folders[-1], target / "serving")
    return target


def rows(experiment, methods, seed):
    """The table's header and rows: one row per metric, one column per method."""
    of_methods = [runs.metrics(experiment.folder(method, seed)) for method in methods]
    header = ["", *(method.replace("_", " ") for method in methods)]
    body = [
        [f"{task} {metric}".replace("_", " ")]
        + [f"{of_method[task][metric]:.1f}" for of_method in of_methods]
        for task, of_task in of_methods[0].items()
        for metric in of_task
    ]
    return header, body


def _spread_over_test(experiment):
    """Images (N, H, W, 3) and targets {task: (N, ...)}, from all over the split."""
    recipe = experiment.recipe
    test = dense.test_batches(experiment.builder, recipe, experiment.tasks).unbatch()
    count = experiment.builder.info.splits[recipe.data.test_split].num_examples
    wanted = set(np.linspace(0, count - 1, PICTURES, dtype=int).tolist())
    examples = [x for i, x in enumerate(test.as_numpy_iterator()) if i in wanted]
    return keras.tree.map_structure(lambda *xs: np.stack(xs), *examples)


def _columns(task, images, truth, answers):
    """Images, truth, answers, and where the last answer is better than the first."""
    of_truth = [task.draw(x) for x in truth]
    drawn = [[task.draw(x) for x in answer] for answer in answers]
    columns = [images.astype("uint8"), of_truth, *drawn]
    if len(drawn) > 1:
        # Any other colour is a wrong class.
        options = {"saturation": 1} if task.describe()["kind"] == "classes" else {}
        columns.append(
            [
                figures.difference(*three, **options)
                for three in zip(of_truth, drawn[0], drawn[-1], strict=True)
            ]
        )
    return columns


def _export(model, trained, directory):
    exported, outdated = directory / "1", directory / ".outdated"
    if exported.exists() and exported.stat().st_mtime < trained.stat().st_mtime:
        shutil.rmtree(outdated, ignore_errors=True)
        # At once: a version of which half is removed would be served.
        exported.rename(outdated)
    if not exported.exists():
        export_saved_model(model, directory, version=1)
    shutil.rmtree(outdated, ignore_errors=True)
