"""What the runs of one seed come to: a table, two pictures and a SavedModel."""

import shutil

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_cross_stitch import CrossStitch, export_saved_model, plot_alpha
from training import batches, runs

PICTURES = 5


def compare(experiment, methods, seed):
    """Writes the comparison of finished runs beside them.

    In `<runs>/<recipe>/comparison/seed<seed>/`: `metrics.csv` (tidy: method, seed,
    task, metric, value), `metrics.md`, `predictions.png`, and, of the last method
    if it has units, `alpha.png` and `serving/1`, the SavedModel.

    Args:
        experiment: The `Experiment`.
        methods: List of methods whose runs are finished.
        seed: Integer.

    Returns:
        The path of the folder.
    """
    target = experiment.folder("comparison", seed)
    target.mkdir(parents=True, exist_ok=True)
    folders = {method: experiment.folder(method, seed) for method in methods}
    metrics = {method: runs.metrics(path) for method, path in folders.items()}
    tidy = [
        row
        for method, of_run in metrics.items()
        for row in runs.rows(method, seed, of_run)
    ]
    runs.write_csv(target / "metrics.csv", runs.TIDY, tidy)
    runs.write(target / "metrics.md", markdown(metrics))

    models = {
        method: keras.models.load_model(path / "model.keras", compile=False)
        for method, path in folders.items()
    }
    builder, recipe, tasks = experiment.builder, experiment.recipe, experiment.tasks
    passes = batches.test_passes(builder, recipe, tasks)
    count = builder.info.splits[recipe.data.test_split].num_examples
    figure = predictions(models, passes, count)
    figure.savefig(target / "predictions.png", dpi=110)
    last = methods[-1]
    if any(isinstance(layer, CrossStitch) for layer in models[last].layers):
        plot_alpha(models[last]).savefig(target / "alpha.png", dpi=110)
        trained = (folders[last] / "model.keras").stat().st_mtime
        exported = target / "serving" / "1"
        if exported.exists() and exported.stat().st_mtime < trained:
            shutil.rmtree(exported)
        if not exported.exists():
            export_saved_model(models[last], target / "serving", version=1)
    return target


def rows(metrics):
    """The table's header and rows: one row per metric, one column per method."""
    first = next(iter(metrics.values()))
    header = ["", *(method.replace("_", " ") for method in metrics)]
    body = [
        [f"{task} {metric}".replace("_", " ")]
        + [f"{by_task[task][metric]:.1f}" for by_task in metrics.values()]
        for task in first
        for metric in first[task]
    ]
    return header, body


def markdown(metrics):
    """The table in Markdown."""
    header, body = rows(metrics)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))


def predictions(models, passes, count):
    """Image, truth and each model's answer, for test images spread over the split.

    Args:
        models: Dict of method to model, inputs to {task: answer}.
        passes: The passes over the test split, as `batches.test_passes` gives them.
        count: Integer, how many examples each holds.

    Returns:
        A matplotlib `Figure`: one row per image.
    """
    columns = {}
    for tasks, test in passes:
        examples = _spread(test, count)
        images = [_image(inputs) for inputs, _ in examples]
        columns["image"] = [image.astype("uint8") for image in images]
        answers = {
            method: [_answer(model, inputs) for inputs, _ in examples]
            for method, model in models.items()
        }
        for name, task in tasks.items():
            columns[f"{name}\ntruth"] = [
                task.draw(targets[name], inputs) for inputs, targets in examples
            ]
            for method, of_method in answers.items():
                columns[f"{name}\n{method.replace('_', '-')}"] = [
                    task.draw(answer[name], inputs)
                    for answer, (inputs, _) in zip(of_method, examples, strict=True)
                ]
    height, width = images[0].shape[:2]
    figure = Figure(
        (2.0 * len(columns), 2.0 * len(images) * height / width + 0.4),
        layout="constrained",
    )
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for of_column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        of_column[0].set_title(title, fontsize=10)
        for ax, picture in zip(of_column, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_axis_off()
    return figure


def _spread(test, count):
    """Some examples of the batches, as arrays: (inputs, {task: target})."""
    wanted = set(np.linspace(0, count - 1, PICTURES, dtype=int).tolist())
    examples = test.unbatch().as_numpy_iterator()
    return [example for index, example in enumerate(examples) if index in wanted]


def _image(inputs):
    return inputs["image"] if isinstance(inputs, dict) else inputs


def _answer(model, inputs):
    one = keras.tree.map_structure(lambda x: x[None], inputs)
    return keras.tree.map_structure(lambda x: x[0], model.predict_on_batch(one))
