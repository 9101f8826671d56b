"""python -m training: the command line."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

# Before TensorFlow is imported, which the commands do: its notices are not ours, and
# where a CPU lacks AVX-512 it leaves oneDNN's convolutions off, which are faster.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
for library in ("absl", "tensorflow"):
    logging.getLogger(library).setLevel(logging.ERROR)

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console()
app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
prepare_app = typer.Typer(
    help="Bring a data set's original files into a recipe's form."
)
app.add_typer(prepare_app, name="prepare")

Runs = Annotated[Path, typer.Option(help="Folder of all runs and prepared data.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with the data set's files (nyuv2).")
]
Seed = Annotated[int, typer.Option(help="Seed of weights, order and flips.")]
Toy = Annotated[bool, typer.Option("--toy", help="The recipe's toy size: seconds.")]
Replicas = Annotated[
    int | None, typer.Option(min=2, help="Mirror over N logical CPUs, for testing.")
]


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    toy: Toy = False,
):
    """Train cross-stitch networks, and compare them with one-task networks.

    Without a command, this runs the **scenes** demo whole, in a few minutes on two
    cores: it renders rooms, trains a segmentation and a surface normals network,
    trains them on (the control), stitches them and trains that on, and writes a
    table, pictures and a SavedModel.

    What was stopped goes on where it was; what is finished is not run again.
    """
    if context.invoked_subcommand is None:
        fit("scenes", seed=seed, runs=runs, toy=toy)


@app.command()
def fit(
    recipe: Annotated[str, typer.Argument(help="scenes or nyuv2.")],
    data: Data = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="one_task, one_task_longer (the control) or cross_stitch; repeat "
            "for several. Without it: all."
        ),
    ] = None,
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    toy: Toy = False,
    replicas: Replicas = None,
):
    """Train a recipe's methods and compare them.

    Writes `RUNS/RECIPE/METHOD/seedS/` (model.keras, metrics.json, history.csv,
    alpha.npz, recipe.json) and `RUNS/RECIPE/comparison/seedS/` (metrics.csv,
    metrics.md, predictions.png, alpha.png, serving/1).

    Example: `python -m training fit nyuv2 --data ../shared/data/nyuv2`
    """
    with _errors_in_a_line():
        from training import comparison, fitting

        strategy = fitting.strategy(replicas)
        settings, tasks, builder = _open(recipe, data, runs, toy)
        methods = list(method or fitting.METHODS)
        fitting.check(settings, methods, tasks)
    if "one_task" not in methods:
        methods.insert(0, "one_task")  # what the others start from

    metrics = {}
    with _progress() as progress:
        for name in sorted(methods, key=fitting.METHODS.index):
            metrics[name] = fitting.fit(
                settings,
                name,
                seed,
                tasks=tasks,
                builder=builder,
                runs=runs,
                strategy=strategy,
                progress=progress,
            )
        line = progress.add_task("table, pictures, SavedModel", total=None)
        target = comparison.compare(
            settings, list(metrics), seed, tasks=tasks, builder=builder, runs=runs
        )
        progress.update(line, total=1, completed=1)
    header, rows = comparison.rows(metrics)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "segmentation and within: %, higher is better; angles: degrees, lower is"
    )
    console.print(f"Pictures and SavedModel: {target}")


@app.command()
def bench(
    recipe: Annotated[str, typer.Argument(help="scenes or nyuv2.")] = "scenes",
    data: Data = None,
    runs: Runs = Path("runs"),
    toy: Toy = False,
    steps: Annotated[int, typer.Option(min=3, help="Measured steps of each.")] = 30,
):
    """Measure what stitching costs, and that the pipeline keeps up.

    Train step of the stitched towers against the same towers unstitched, and the
    input pipeline alone against pipeline and step; interleaved, medians.
    """
    with _errors_in_a_line():
        from training import benchmark

        settings, tasks, builder = _open(recipe, data, runs, toy)
    table = Table("", "ms, median", "ratio")
    for row in benchmark.measure(settings, tasks, builder, steps):
        table.add_row(*row)
    console.print(table)


@prepare_app.command()
def nyuv2(
    directory: Annotated[Path, typer.Argument(help="New folder to write.")],
    mat: Annotated[Path, typer.Option(help="nyu_depth_v2_labeled.mat")],
    splits: Annotated[Path, typer.Option(help="splits.mat")],
    mapping: Annotated[Path, typer.Option(help="classMapping40.mat")],
):
    """Convert the official NYU Depth v2 release to the folder that `fit` reads."""
    with _errors_in_a_line():
        from training.datasets.nyuv2 import prepare_from_mat

        prepare_from_mat(mat, splits, mapping, directory)
    console.print(f"Now: python -m training fit nyuv2 --data {directory}")


def _open(recipe, data, runs, toy):
    """The recipe, its tasks and its prepared data."""
    from training import recipe as recipes
    from training.datasets import pipeline
    from training.tasks import TASKS

    settings = recipes.find(recipe, toy)
    console.print(settings)
    builder = pipeline.prepare(settings, data, runs)
    return settings, {name: TASKS[name].of(builder) for name in settings.tasks}, builder


def _progress():
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def _errors_in_a_line():
    """Bad input ends the program with one line; it is found before any training."""
    try:
        yield
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {error}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    app(prog_name="python -m training")
