"""What the runs of one seed come to: a table, a gallery, alphas and a SavedModel."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from keras_cross_stitch import NDDR, CrossStitch, export_saved_model, plot_alpha
from training import batches, towers
from training.files import read_json, unfinished, write_json
from training.locks import lock
from training.runs import Experiment
from training.study import delta_m, figures, recorded
from training.study.results import (
    ALL_TASKS,
    PUBLISHED,
    OfMetric,
    Values,
    by_seed,
    label,
    metric,
    prediction_interval,
    read_rows,
)
from training.tasks import Task

PICTURES = 5
# What the table may hold, and what is said of it
_LEGEND = {
    "↑": "↑: higher is better",
    "↓": "↓: lower is better",
    "…": "in brackets: where 95 % of all seeds are, by the published ones",
    "Δm": delta_m.SAYS,
}


def compare(
    experiment: Experiment, methods: Sequence[str], seed: int
) -> tuple[str, Path] | None:
    """Writes pictures of finished runs, and a model with units as a SavedModel.

    In `<runs>/<recipe>/`: `gallery/<task>_seed<seed>.png`, with the change from the
    first method to the last; and, of the last method that has units, in
    `comparison/seed<seed>/`: `alpha.png` and `serving/1`.

    Args:
        experiment: The `Experiment`.
        methods: List of methods whose runs are finished.
        seed: Integer.

    Returns:
        The method that has units, and the path of the folder `comparison/seed<seed>`;
        `None` where no method has any.
    """
    folders = [experiment.folder(method, seed) / "model.keras" for method in methods]
    models = [keras.models.load_model(path, compile=False) for path in folders]
    target = experiment.folder("comparison", seed)
    titles = ["image", "truth", *map(label, methods), "change, first to last"]
    gallery = target.parents[1] / "gallery"
    builder: Any = experiment.builder  # not `None`: there is a test split to show
    recipe, tasks = experiment.recipe, experiment.tasks
    count = builder.info.splits[recipe.data.test_split].num_examples
    for together, test in batches.test_passes(builder, recipe, tasks):
        inputs, targets = _spread(test, count)
        answers = [[_answer(model, x) for x in inputs] for model in models]
        for name, task in together.items():
            of_task = [[x[name] for x in of_model] for of_model in answers]
            truth = [x[name] for x in targets]
            columns = _columns(task, inputs, truth, of_task)
            # `strict` is off where there is no change to show.
            figure = figures.gallery(
                dict(zip(titles, columns, strict=False)), _scale(task.describe())
            )
            _save(figure, gallery / f"{name}_seed{seed}.png", dpi=150)
    of_methods = zip(methods, models, folders, strict=True)
    joined = [x for x in of_methods if towers.has(x[1], CrossStitch | NDDR)]
    if not joined:
        return None
    method, model, trained = joined[-1]
    # All methods share the folder: of two processes one waits.
    with lock(target / ".lock", wait=True):
        if towers.has(model, CrossStitch):
            _save(plot_alpha(model), target / "alpha.png", dpi=110)
        else:
            (target / "alpha.png").unlink(missing_ok=True)  # another method's
        _export(model, trained, target / "serving")
    return method, target


def table(
    experiment: Experiment,
    methods: Sequence[str],
    seed: int,
    published: Path = PUBLISHED,
) -> tuple[list[str], list[list[str]]]:
    """The table's header and rows: below each task its metrics, a column per method.

    Behind a value stand the ends of the interval in which it usually is, where values
    of the same recipe are published. Below stand Delta_m and what the methods cost.

    Args:
        experiment: The `Experiment`.
        methods: List of methods whose runs are finished.
        seed: Integer.
        published: Path of the folder of published raw values.
    """
    of_methods = [recorded.Run(experiment.folder(x, seed)) for x in methods]
    of_runs = [row for run in of_methods for row in run.rows]
    values: dict = {}
    for row in (*of_runs, *delta_m.rows(of_runs)):
        values.setdefault((row.task, row.metric), {})[row.method] = row.value
    usual = _usual(experiment, published)
    tasks = list(dict.fromkeys(task for task, _ in values))
    body: list[list[str]] = []
    for (task, name), of in sorted(values.items(), key=lambda x: tasks.index(x[0][0])):
        title = metric(name).title
        if task != ALL_TASKS:
            heading = [task, *("" for _ in methods)]
            if heading not in body:
                body.append(heading)
            title = f"  {title}"
        known = usual.get((task, name))
        body.append([title, *(_shown(name, of, known, x) for x in methods)])
    titles = (title for title, _ in recorded.COSTS.values())
    shown = (recorded.shown_costs(run.costs) for run in of_methods)
    costs = zip(titles, *shown, strict=True)
    body += map(list, costs)
    return ["", *map(label, methods)], body


def legend(body: Iterable[Iterable[str]]) -> str:
    """How to read the table's rows: of what stands in them, and of nothing else."""
    shown = "".join(cell for row in body for cell in row)
    return "; ".join(text for sign, text in _LEGEND.items() if sign in shown)


def _shown(
    name: str, of_metric: Mapping[str, float], usual: OfMetric | None, method: str
) -> str:
    if method not in of_metric:
        return ""
    digits = metric(name).digits
    sign = "+" if name == "delta_m" else ""
    value = f"{of_metric[method]:{sign}.{digits}f}"
    interval = prediction_interval((usual or {}).get(method, {}).values())
    if interval is None:
        return value
    low, high = interval
    # Without a space, so that a narrow terminal breaks the line before the bracket.
    return f"{value} ({low:.{digits}f}…{high:.{digits}f})"


def _usual(experiment: Experiment, published: Path) -> Values:
    """{(task, metric): {method: {seed: value}}} that are published of this recipe."""
    rows = {  # the studies of whole methods, which may have trained one run each
        row[:4]: row
        for study in ("demo", "methods")
        if (path := published / experiment.recipe.name / f"{study}.csv").exists()
        for row, by in read_rows(path)
        if by.recipe == experiment.digest
    }
    return by_seed(rows.values())


def _save(figure: Figure, path: Path, *, dpi: int) -> None:
    with unfinished(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _spread(test: tf.data.Dataset, count: int) -> Iterable[tuple]:
    """Inputs and targets of some examples, from all over the split: two lists."""
    wanted = set(np.linspace(0, count - 1, PICTURES, dtype=int).tolist())
    examples = test.unbatch().as_numpy_iterator()
    return zip(*(x for i, x in enumerate(examples) if i in wanted), strict=True)


def _answer(model: keras.Model, inputs: Any) -> Any:
    """The model's answer to one example."""
    one = keras.tree.map_structure(lambda x: x[None], inputs)
    return keras.tree.map_structure(lambda x: x[0], model.predict_on_batch(one))


def _scale(described: Mapping[str, Any]) -> figures.Scale | None:
    """What the colours of a task's map of numbers stand for; `None` of other tasks."""
    if "range" not in described:
        return None
    return described["colours"], described["range"], described["units"]


def _columns(
    task: Task,
    inputs: Sequence[Any],
    truth: Sequence[Any],
    answers: Sequence[Sequence[Any]],
) -> list[list[np.ndarray]]:
    """Images, truth, answers, and where the last answer is better than the first."""

    def draw(targets_or_answers: Sequence[Any]) -> list[np.ndarray]:
        pairs = zip(targets_or_answers, inputs, strict=True)
        return [task.draw(x, of_example) for x, of_example in pairs]

    images = [x["image"] if isinstance(x, dict) else x for x in inputs]
    of_truth, drawn = draw(truth), [draw(answer) for answer in answers]
    columns = [[x.astype("uint8") for x in images], of_truth, *drawn]
    # Only of maps, pixel by pixel, can be said which one is nearer.
    if len(drawn) > 1 and task.inputs == "image":
        # Any other colour is a wrong class.
        options: dict[str, Any] = (
            {"saturation": 1} if task.describe()["kind"] == "classes" else {}
        )
        columns.append(
            [
                figures.difference(*three, **options)
                for three in zip(of_truth, drawn[0], drawn[-1], strict=True)
            ]
        )
    return columns


def _export(model: keras.Model, trained: Path, directory: Path) -> None:
    exported, outdated = directory / "1", directory / ".outdated"
    if exported.exists() and not _is_of(exported, trained):
        shutil.rmtree(outdated, ignore_errors=True)
        # At once: a version of which half is removed would be served.
        exported.rename(outdated)
    if not exported.exists():
        images = len(keras.tree.flatten(model.input)) == 1  # and no regions of them
        export_saved_model(
            model,
            directory,
            version=1,
            from_jpeg=images,
            finish=lambda version, inputs: _describe(version, trained),
        )
    shutil.rmtree(outdated, ignore_errors=True)


def _describe(version: Path, trained: Path) -> None:
    """Beside the graph, what it was made of, and how the preview's page draws it."""
    extra = version / "assets.extra"
    extra.mkdir()
    shutil.copyfile(trained.with_name("answers.json"), extra / "answers.json")
    write_json(extra / "made_of.json", _made_of(trained))


def _is_of(version: Path, trained: Path) -> bool:
    """Whether the SavedModel was made of that file; all methods share its folder."""
    said = version / "assets.extra" / "made_of.json"
    return said.exists() and read_json(said) == _made_of(trained)


def _made_of(trained: Path) -> dict[str, str]:
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    return {"method": trained.parents[1].name, "model.keras": f"sha256 {digest}"}
