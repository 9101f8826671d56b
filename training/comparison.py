"""What the runs of one seed come to: a table, a gallery, alphas and a SavedModel."""

import shutil
import textwrap

import keras
import numpy as np

from keras_cross_stitch import CrossStitch, export_saved_model, plot_alpha
from training import batches, runs
from training.study import figures
from training.study.results import label, metric

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
    names = [textwrap.fill(label(method), 14) for method in methods]
    titles = ["image", "truth", *names, "change"]
    gallery = target.parents[1] / "gallery"
    gallery.mkdir(exist_ok=True)
    builder, recipe, tasks = experiment.builder, experiment.recipe, experiment.tasks
    count = builder.info.splits[recipe.data.test_split].num_examples
    for together, test in batches.test_passes(builder, recipe, tasks):
        inputs, targets = _spread(test, count)
        answers = [[_answer(model, x) for x in inputs] for model in models]
        for name, task in together.items():
            of_task = [[x[name] for x in of_model] for of_model in answers]
            truth = [x[name] for x in targets]
            columns = _columns(task, inputs, truth, of_task)
            # `strict` is off where there is no change to show.
            figure = figures.gallery(dict(zip(titles, columns, strict=False)))
            figure.savefig(gallery / f"{name}_seed{seed}.png", dpi=150)
    if any(isinstance(layer, CrossStitch) for layer in models[-1].layers):
        plot_alpha(models[-1]).savefig(target / "alpha.png", dpi=110)
        _export(models[-1], folders[-1], target / "serving")
    return target


def rows(experiment, methods, seed):
    """The table's header and rows: one row per metric, one column per method."""
    of_methods = [runs.metrics(experiment.folder(method, seed)) for method in methods]
    header = ["", *map(label, methods)]
    body = [
        [f"{task}: {metric(name).title}"]
        + [f"{of_method[task][name]:.1f}" for of_method in of_methods]
        for task, of_task in of_methods[0].items()
        for name in of_task
    ]
    return header, body


def _spread(test, count):
    """Inputs and targets of some examples, from all over the split: two lists."""
    wanted = set(np.linspace(0, count - 1, PICTURES, dtype=int).tolist())
    examples = test.unbatch().as_numpy_iterator()
    return zip(*(x for i, x in enumerate(examples) if i in wanted), strict=True)


def _answer(model, inputs):
    """The model's answer to one example."""
    one = keras.tree.map_structure(lambda x: x[None], inputs)
    return keras.tree.map_structure(lambda x: x[0], model.predict_on_batch(one))


def _columns(task, inputs, truth, answers):
    """Images, truth, answers, and where the last answer is better than the first."""

    def draw(targets_or_answers):
        pairs = zip(targets_or_answers, inputs, strict=True)
        return [task.draw(x, of_example) for x, of_example in pairs]

    images = [x["image"] if isinstance(x, dict) else x for x in inputs]
    of_truth, drawn = draw(truth), [draw(answer) for answer in answers]
    columns = [[x.astype("uint8") for x in images], of_truth, *drawn]
    # Only of maps, pixel by pixel, can be said which one is nearer.
    if len(drawn) > 1 and task.inputs == "image":
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
