"""python -m training: the command line. It parses and prints; all else is elsewhere."""

import contextlib
import dataclasses
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from training import recipes
from training.methods import METHODS
from training.preemption import Preempted, preemptible

if TYPE_CHECKING:  # it imports Keras
    from training.study.studies import Planned

# Paths are shown as they are, [brackets] and :colons: too.
console = Console(markup=False, emoji=False)
app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
prepare_app = typer.Typer(
    help="Bring a data set's original files into a recipe's form."
)
app.add_typer(prepare_app, name="prepare")


def path(text: str | Path) -> Path:
    """What every path is read by: a shell leaves the ~ of --runs=~/runs as it is."""
    # A ~ without such a user stays, where Path.expanduser() raises a RuntimeError.
    return Path(os.path.expanduser(text))


RecipeName = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(recipes.names())}; scenes-labels10 is the recipe with "
        "segmentation labels on 10 % of the train images."
    ),
]
Runs = Annotated[
    Path, typer.Option(parser=path, help="Folder of all runs and prepared data.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        parser=path, help="Folder with the data set's files (nyuv2, voc2008, folder)."
    ),
]
Backbone = Annotated[
    Path | None,
    typer.Option(parser=path, help="A saved Keras model (nyuv2_pretrained, voc2008)."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="AlexNet's weights to start from, an .npz with torchvision's names or "
        "Caffe's (voc2008_alexnet).",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, help="Seed of weights, order and flips, and of which images have labels."
    ),
]
Dtype = Annotated[
    Literal["float32", "mixed_bfloat16"] | None,
    typer.Option(
        help="Instead of the recipe's, which is what is published. mixed_bfloat16 is "
        "faster on CPUs with AVX512_BF16, and slower on others.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Other tasks than the recipe's, as in segmentation,normals,depth, or in "
        "parts:segmentation, of the labels `parts`."
    ),
]
Toy = Annotated[bool, typer.Option("--toy", help="The recipe's toy size: seconds.")]
Replicas = Annotated[
    int | None, typer.Option(min=2, help="Mirror over N logical CPUs, for testing.")
]

COMPARED = ("single_task", "single_task_longer", "cross_stitch")


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    toy: Toy = False,
) -> None:
    """Train cross-stitch networks, and compare them with single-task networks.

    Without a command, this runs the **scenes** demo whole, in a few minutes on two
    cores: it renders rooms, of which a tenth get segmentation labels and all get
    surface normals; trains a network per task, one that shares all but its last
    layers, and a cross-stitch network; and writes a report and a SavedModel.

    What was stopped goes on where it was; what is finished is not run again.
    """
    if context.invoked_subcommand is None:
        from training.study.studies import DEMO

        fit("scenes-labels10", method=list(DEMO), seed=seed, runs=runs, toy=toy)


@app.command()
def fit(
    recipe: RecipeName,
    data: Data = None,
    backbone: Backbone = None,
    weights: Weights = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METHODS).replace('split', 'split@LAYER')}. Options stand "
            "behind it, as in cross_stitch@same_task=0.5,at=pool1+pool5 or "
            "hard_sharing@gradients=pcgrad. Repeat for several. Without it: "
            f"{', '.join(COMPARED)}."
        ),
    ] = None,
    tasks: Tasks = None,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate",
            help="Hold a tenth of train out, and tell its losses after each epoch.",
        ),
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    runs: Runs = Path("runs"),
    toy: Toy = False,
    replicas: Replicas = None,
) -> None:
    """Train a recipe's methods and compare them.

    Writes `RUNS/RECIPE/METHOD/seedS/` (model.keras, answers.json, metrics.json,
    history.csv, alpha.npz, recipe.json), `RUNS/RECIPE/gallery/` (its change is from the
    first method to the last), `RUNS/RECIPE/comparison/seedS/` (alpha.png, serving/1, a
    SavedModel; of the last method that has units) and `RUNS/report.html`.

    Example: `python -m training fit nyuv2 --data ../shared/data/nyuv2`
    """
    with _errors_in_a_line():
        from training import distribution, fitting
        from training.runs import metrics, open_experiment
        from training.study import comparison
        from training.study.report import write_report
        from training.study.results import baseline

        strategy = distribution.strategy(replicas)
        methods = list(dict.fromkeys(method or COMPARED))
        chosen = _recipe(
            recipe,
            toy,
            methods,
            backbone=backbone,
            weights=weights,
            dtype=dtype,
            tasks=tasks,
            validate=validate,
        )
        experiment = open_experiment(chosen, data, runs)
        fitting.check(experiment, methods)
        for name in methods:
            if metrics(experiment.folder(name, seed)) is not None:
                console.print(f"{name}, seed {seed}: finished already")
        with _progress() as progress:
            for name in methods:
                fitting.fit(
                    experiment, name, seed, strategy=strategy, progress=progress
                )
            chief = distribution.is_chief(strategy)
            if chief:
                line = progress.add_task("pictures, SavedModel, report", total=None)
                exported = comparison.compare(experiment, methods, seed)
                page = write_report(runs, runs / "report.html")
                progress.update(line, total=1, completed=1)
            # A worker that ends before the others counts as lost.
            distribution.from_chief(strategy, True)
        if not chief:
            return
        header, body = comparison.table(experiment, methods, seed)
    _print_table(header, body)
    console.print(comparison.legend(body))
    for name in methods:
        against = baseline(name)
        if against and against not in methods:
            console.print(f"No Δm of {name}: add its baseline, --method {against}")
    if exported:
        console.print("Alphas and SavedModel of {}: {}".format(*exported))
    else:
        console.print(
            "No SavedModel, since no method has units. Of any: python -m export "
            f"savedmodel {experiment.folder(methods[-1], seed)}/model.keras DIR"
        )
    console.print(f"Report, with pictures: {page}")


@app.command()
def study(
    recipe: RecipeName,
    table: Annotated[
        str,
        typer.Argument(
            help="demo, methods, init, alpha-rate, tower-init, alpha, splits, "
            "per-class, label-fraction, weightings, search or all. `search` tries "
            "settings on a part of train."
        ),
    ],
    data: Data = None,
    backbone: Backbone = None,
    weights: Weights = None,
    tasks: Tasks = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="One more than the table has, as in `fit`. Repeat for several."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to N - 1.")] = 1,
    shard: Annotated[
        str, typer.Option(help="k/n: the k-th of n machines that share RUNS.")
    ] = "1/1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what is missing, and how long.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Folder of the tidy CSV files; docs/results is the published ones'.",
            show_default="RUNS/results",
        ),
    ] = None,
    dtype: Dtype = None,
    runs: Runs = Path("runs"),
    toy: Toy = False,
) -> None:
    """Train all runs of one of the paper's tables, and write their raw values.

    Runs that exist are used, and a stopped study goes on. Writes
    `RESULTS/RECIPE/TABLE.csv`: method, seed, task, metric, value, and what made it.

    Example: `python -m training study scenes methods --seeds 3`
    """
    with _errors_in_a_line():
        from training import distribution, fitting
        from training.locks import lock
        from training.runs import Experiment, open_experiment
        from training.study import raw_values, studies

        strategy = distribution.strategy()
        more = method or []
        chosen = _recipe(
            recipe,
            toy,
            more,
            backbone=backbone,
            weights=weights,
            dtype=dtype,
            trains=not dry_run,
            tasks=tasks,
        )
        planned = studies.plan(
            Experiment(chosen, None, runs), table, range(seeds), more
        )
        mine = studies.shard(planned, shard)
        if dry_run:
            _print_missing(mine)
            return
        for one in dict.fromkeys(run.experiment for run in planned):
            one.builder = open_experiment(one.recipe, data, runs).builder
            of_one = (run.method for run in planned if run.experiment is one)
            fitting.check(one, list(dict.fromkeys(of_one)))
        target = results or runs / "results"
        raw_values.check(planned, target)
        writes = distribution.is_chief(strategy)

        def write() -> list[Path]:
            # Other processes may write there, of these runs or of others.
            with lock(target / ".results.lock", wait=True):
                return raw_values.write(planned, target)

        with _progress() as progress:
            for run in mine:
                was_finished = run.finished
                try:
                    fitting.fit(
                        run.experiment,
                        run.method,
                        run.seed,
                        strategy=strategy,
                        progress=progress,
                        wait=True,  # another shard may train it, to start from it
                    )
                except FloatingPointError as error:
                    if table != "search":
                        raise
                    console.print(f"{run.method}, seed {run.seed}: {error}")
                if writes and not was_finished:
                    write()  # after each run, since a study takes hours
        if writes:
            written = write()
            for path in written:
                console.print(f"Wrote {path}")
            for path in raw_values.by_file(planned, target):
                if path not in written:
                    console.print(f"Not written: {path}, of which no run has values")
            if table == "search":
                tried = studies.best_first(planned)
                rows = [(method, f"{value:+.1f}") for method, value in tried]
                _print_table(("tried on a part of train", "Δm, % ↑"), rows)


@app.command()
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            parser=path, help="A finished run's folder, RUNS/RECIPE/METHOD/seedS."
        ),
    ],
    data: Annotated[
        Path, typer.Option(parser=path, help="NYUv2's folder, 640x480 or 320x240.")
    ],
    full_resolution: Annotated[
        bool,
        typer.Option(
            "--full-resolution", help="At the size of the labels, in NYUv2's frame."
        ),
    ] = False,
) -> None:
    """Score a run of NYUv2, and of it only, as papers do.

    `fit` scores at its targets' size, of all data sets.

    Logits are resized to the labels, and judged within the official frame. Labels of
    640x480 are in the folder that `prepare nyuv2 --full-size` writes; with smaller ones
    the frame is scaled, and what is printed says so.
    """
    with _errors_in_a_line():
        if not full_resolution:
            raise ValueError(
                "What a run scored at its targets' size stands in its metrics.json. "
                "Of a run of NYUv2, give --full-resolution for the other protocol"
            )
        from training.full_resolution import evaluate
        from training.runs import of_run
        from training.study.results import metric

        protocol, metrics = evaluate(of_run(run), run, data)
    rows = [
        (f"{task}: {metric(name).title}", f"{value:.{metric(name).digits}f}")
        for task, of_task in metrics.items()
        for name, value in of_task.items()
    ]
    _print_table(("", "full resolution"), rows)
    console.print(f"{protocol}. Wrote {run / 'full_resolution.json'}")


@app.command()
def report(
    runs: Annotated[
        Path, typer.Argument(parser=path, help="Folder of all runs.")
    ] = Path("runs"),
    page: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="The file to write.", show_default="RUNS/report.html"
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page of all finished runs."""
    with _errors_in_a_line():
        from training.study.report import write_report

        console.print(f"Wrote {write_report(runs, page or runs / 'report.html')}")


@app.command()
def tables(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=path,
            help="Markdown files, such as one of yours. Without: README.md and "
            "docs/*.md.",
        ),
    ] = None,
    results: Annotated[
        Path, typer.Option(parser=path, help="Folder of the tidy CSV files.")
    ] = Path("docs/results"),
) -> None:
    """Write the tables of Markdown files anew, from the raw values of the studies.

    A table stands between `<!-- table: RECIPE/STUDY -->` and `<!-- /table -->`, or
    after `<!-- table: RECIPE/STUDY brief -->`: one for all tasks. Your studies write
    raw values to `RUNS/results`.

    Example: `python -m training tables notes.md --results runs/results`
    """
    with _errors_in_a_line():
        from training.study.tables import update_tables

        for path in paths or [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
            changed = update_tables(path, results)
            console.print(f"{'Wrote' if changed else 'Unchanged:'} {path}")


@app.command()
def bench(
    recipe: RecipeName = "scenes",
    data: Data = None,
    backbone: Backbone = None,
    weights: Weights = None,
    tasks: Tasks = None,
    runs: Runs = Path("runs"),
    toy: Toy = False,
    steps: Annotated[int, typer.Option(min=3, help="Measured steps of each.")] = 30,
    method: Annotated[
        list[str] | None,
        typer.Option(help="As `fit` has it, repeated: a step and an answer of each."),
    ] = None,
) -> None:
    """Measure what stitching costs, and that the pipeline keeps up.

    With --method, a train step and an answer of each method instead, as multiples of
    the single-task networks'; kept in RUNS/RECIPE/times.csv, for the report.

    Train step of the stitched towers against the same towers unstitched, in float32
    and in mixed_bfloat16, and the input pipeline alone against pipeline and step;
    interleaved, medians.
    """
    with _errors_in_a_line():
        from training import benchmark
        from training.files import write_csv
        from training.runs import open_experiment

        experiment = open_experiment(
            _recipe(
                recipe,
                toy,
                method or (),
                backbone=backbone,
                weights=weights,
                tasks=tasks,
            ),
            data,
            runs,
        )
        if method:
            timed = benchmark.of_methods(experiment, method, steps)
            path = runs / experiment.recipe.name / "times.csv"
            write_csv(path, benchmark.COLUMNS, timed)
            _print_table(benchmark.COLUMNS, timed)
        else:
            rows = benchmark.measure(experiment, steps)
            _print_table(("", "ms, median", "ratio"), rows)


@app.command()
def traffic(
    recipe: RecipeName = "scenes",
    method: Annotated[str, typer.Option(help="As `fit` has it.")] = "cross_stitch",
    devices: Annotated[
        list[int] | None, typer.Option(min=2, help="Without: 2, 8, 64, 512.")
    ] = None,
    data: Data = None,
    backbone: Backbone = None,
    runs: Runs = Path("runs"),
    toy: Toy = False,
) -> None:
    """Say how many bytes each device sends, and receives, in a training step."""
    with _errors_in_a_line():
        from training import distribution, methods, towers
        from training.runs import open_experiment

        chosen = _recipe(recipe, toy, [method], backbone=backbone)
        tasks = open_experiment(chosen, data, runs).tasks
        plan = methods.plan(method, chosen)
        model = plan.join(towers.build(plan.recipe, tasks, 0))
    rows = [
        (str(count), f"{distribution.traffic(model, count) / 1e6:.2f}")
        for count in devices or (2, 8, 64, 512)
    ]
    _print_table(("devices", "MB a step, each way"), rows)


@prepare_app.command("nyuv2")
def prepare_nyuv2(
    directory: Annotated[
        Path, typer.Argument(parser=path, help="Folder to write, new or empty.")
    ],
    mat: Annotated[Path, typer.Option(parser=path, help="nyu_depth_v2_labeled.mat")],
    splits: Annotated[Path, typer.Option(parser=path, help="splits.mat")],
    mapping: Annotated[Path, typer.Option(parser=path, help="classMapping40.mat")],
    full_size: Annotated[
        bool,
        typer.Option("--full-size", help="At 640x480, for `evaluate` alone."),
    ] = False,
) -> None:
    """Convert the official NYU Depth v2 release to the folder that `fit` reads."""
    with _errors_in_a_line():
        from training.datasets.nyuv2 import prepare_from_mat

        prepare_from_mat(mat, splits, mapping, directory, full_size)
    then = "evaluate RUN --full-resolution" if full_size else "fit nyuv2"
    console.print(f"Now: python -m training {then} --data {directory}")


@prepare_app.command("voc2008")
def prepare_voc2008(
    directory: Annotated[
        Path, typer.Argument(parser=path, help="Folder to write, new or empty.")
    ],
    devkit: Annotated[Path, typer.Option(parser=path, help="VOCdevkit/VOC2008")],
    apascal: Annotated[
        Path, typer.Option(parser=path, help="aPascal's attribute_data")
    ],
) -> None:
    """Convert VOC 2008 and aPascal's attributes to the folder that `fit` reads."""
    with _errors_in_a_line():
        from training.datasets.voc2008 import prepare_from_devkit

        prepare_from_devkit(devkit, apascal, directory)
    console.print(f"Now: python -m training fit voc2008 --data {directory}")


def _recipe(
    name: str,
    toy: bool,
    spelled: Iterable[str] = (),
    *,
    backbone: Path | None = None,
    weights: Path | None = None,
    dtype: str | None = None,
    trains: bool = True,
    tasks: str | None = None,
    validate: bool = False,
) -> recipes.Recipe:
    """The recipe, checked with its methods before any data are prepared, and shown."""
    from training import methods

    of_tasks = None if tasks is None else [x.strip() for x in tasks.split(",")]
    recipe = recipes.find(name, toy, of_tasks)
    if validate:
        recipe = recipes.with_validation(recipe)
    if backbone is not None:
        if not isinstance(recipe.tower, recipes.SavedBackbone):
            raise ValueError(f"The recipe '{name}' has no backbone: leave --backbone")
        recipe = recipes.change(recipe, "tower", backbone=backbone)
        if backbone.is_file():
            from training.backbones import with_its_names

            recipe = with_its_names(recipe)
    if weights is not None:
        if not isinstance(recipe.tower, recipes.FastRcnnAlexNet):
            raise ValueError(f"The recipe '{name}' takes no weights: leave --weights")
        recipe = recipes.change(recipe, "tower", weights=weights)
    if dtype is not None:
        recipe = recipes.change(recipe, "training", dtype=dtype)
    if trains:
        from training import alexnet_weights, towers

        if isinstance(recipe.tower, recipes.FastRcnnAlexNet) and recipe.tower.weights:
            alexnet_weights.read(recipe.tower.weights)
        towers.identity(recipe.tower)
    for method in spelled:
        methods.plan(method, recipe)
    _print_recipe(recipe)
    return recipe


def _print_recipe(recipe: recipes.Recipe) -> None:
    for field in dataclasses.fields(recipe):
        console.print(f"{field.name}: {getattr(recipe, field.name)}", highlight=False)


def _print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(*(Column(title, overflow="fold") for title in header))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_missing(planned: "Sequence[Planned]") -> None:
    from training.study import studies

    missing = studies.missing(planned)
    seconds = [studies.duration(run) for run in missing]
    rows = [
        (run.experiment.recipe.name, run.method, str(run.seed), _about(duration))
        for run, duration in zip(missing, seconds, strict=True)
    ]
    _print_table(("recipe", "method", "seed", "time"), rows)
    total = (
        "unknown, since nothing of this recipe has run here"
        if None in seconds
        else _about(sum(x for x in seconds if x is not None))
    )
    console.print(f"Missing: {len(missing)} runs, time: {total}")


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"about {seconds / 60:.0f} minutes"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(),
        console=console,
    )


def _import_tensorflow() -> None:
    """Without the notices that its C++ parts write, whatever the log level is."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """Every known error ends the program with one line and exit code 2.

    SIGTERM ends it with one line and `Preempted.EXIT_CODE`, Ctrl+C with one and 130.
    """
    again = "Run the same command again, and it goes on"
    try:
        with preemptible():
            _import_tensorflow()
            yield
    except (ValueError, OSError, FloatingPointError) as error:
        text = " ".join(str(error).split())
        _print_error(Text.assemble(("Error:", "red"), " ", text))
        sys.exit(2)
    except Preempted as preempted:
        _print_error(Text(f"{preempted}. {again}"))
        sys.exit(Preempted.EXIT_CODE)
    except KeyboardInterrupt:
        text = f"Stopped. {again} after the last epoch that was finished"
        _print_error(Text(text))
        sys.exit(130)  # as shells have it


def _print_error(line: Text) -> None:
    Console(stderr=True).print(line, soft_wrap=True)


if __name__ == "__main__":
    # Before a command imports TensorFlow, whose notices are not ours. Where a CPU lacks
    # AVX-512, TensorFlow leaves oneDNN's convolutions off, which are faster.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    for library in ("absl", "tensorflow"):  # which set the levels of their loggers anew
        logging.getLogger(library).addFilter(
            lambda record: record.levelno >= logging.ERROR
        )
    # Not every terminal can show an arrow or a degree sign: then a question mark.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="python -m training")
