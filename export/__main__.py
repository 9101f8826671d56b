"""python -m export: the command line."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    # Before TensorFlow is imported, whose notices are not ours. Where a CPU lacks
    # AVX-512, TensorFlow leaves oneDNN's convolutions off, which are faster.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    for library in ("absl", "tensorflow"):  # which set the levels of their loggers anew
        logging.getLogger(library).addFilter(
            lambda record: record.levelno >= logging.ERROR
        )

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from export import serving_commands

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Directory = Annotated[
    Path, typer.Argument(help="The served model's folder (its latest version), or one.")
]


@app.callback()
def main():
    """Bring a trained multi-task model to TensorFlow Serving."""


@app.command()
def savedmodel(
    model: Annotated[Path, typer.Argument(help="A multi-task model, .keras.")],
    directory: Annotated[Path, typer.Argument(help="Where TF Serving will look.")],
    from_jpeg: Annotated[
        bool, typer.Option("--from-jpeg", help="Add <task>_from_jpeg signatures.")
    ] = False,
    warmup: Annotated[
        int, typer.Option(help="Requests of each signature that TF Serving replays.")
    ] = 0,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of JPEG or PNG files, or a .npy file, to measure on."
        ),
    ] = None,
    drop_below: Annotated[
        float | None,
        typer.Option(
            help="Leave out what tasks take from each other where that changes the "
            "outputs on --images by no more than this share of their largest value."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, or bfloat16 to compute in.")
    ] = "float32",
):
    """Write DIRECTORY/VERSION, with one signature per task.

    The version is one above the highest that is there. What the answers mean
    (answers.json beside MODEL) goes with it, and predictions for `verify`.
    """
    with _known_errors_in_one_line():
        from export.make.changes import BATCH
        from export.make.savedmodel import export

        written, links, changes = export(
            model,
            directory,
            from_jpeg=from_jpeg,
            warmup=warmup,
            images=images,
            drop_below=drop_below,
            dtype=dtype,
            progress=typer.echo,
        )
    if drop_below is not None:
        _print_links(links, drop_below)
    if changes:
        _print_changes(changes, BATCH)
    console.print(f"Wrote {written}", soft_wrap=True)


@app.command()
def verify(
    directory: Directory,
    engine: Annotated[
        str, typer.Option(help="tensorflow, or openvino.")
    ] = "tensorflow",
):
    """Ask each signature for what it answered when it was exported, and compare.

    This runs without Keras and without the project's code. Ends with exit code 1 where
    an answer differs.
    """
    with _known_errors_in_one_line():
        from export.inspect.verify import verify
        from export.version.signatures import version_path, versions

        version = version_path(directory)
        report = verify(version, engine)
    others = [x for x in versions(version.parent) if str(x) != version.name]
    _print_version(version, others, report)
    for line in report.wrong:
        _print_error(line)
    if report.wrong:
        sys.exit(1)
    console.print(f"The same answers, by {engine}.")


@app.command()
def bench(
    directory: Directory,
    address: Annotated[
        str | None, typer.Option(help="host:port of its server, to ask over gRPC too.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name there; the folder's, if not given."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The .keras file, to time its towers without units too."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Calls of each kind.")] = 30,
):
    """Measure what an answer costs, in turns: each signature at batch 1, 8 and 32."""
    with _known_errors_in_one_line():
        from export.inspect.bench import bench
        from export.version.signatures import version_path

        version = version_path(directory)
        report = bench(
            version,
            address=address,
            name=name or version.absolute().parent.name,
            model=model,
            rounds=rounds,
        )
    _print_times(report)


@contextlib.contextmanager
def _known_errors_in_one_line():
    try:
        yield
    except (ValueError, OSError) as error:
        _print_error(error)
        sys.exit(2)
    except (RuntimeError, ImportError) as error:
        _print_error(error)
        sys.exit(1)


def _print_error(error):
    text = escape(" ".join(str(error).split()))
    Console(stderr=True).print(f"[red]Error:[/red] {text}", soft_wrap=True)


def _print_links(links, bound):
    if not links:
        console.print(f"Nothing can be left out: each link changes more than {bound:g}")
        return
    table = Table("left out at", "task", "takes nothing from", "change, alone")
    for link in links:
        table.add_row(link.unit, link.task, link.source, f"{link.effect:.2g}")
    console.print(table)


def _print_changes(changes, batch):
    table = Table(
        Column("signature", no_wrap=True),
        "ops",
        "MB of weights",
        f"ms, batch {batch}",
        "largest change",
        "answers",
    )
    for name, x in changes.items():
        before, after = x.before, x.after
        table.add_row(
            name,
            f"{before.ops.total()} -> {after.ops.total()}",
            f"{_mb(before.variable_bytes)} -> {_mb(after.variable_bytes)}",
            f"{1000 * x.seconds_before:.1f} -> {1000 * x.seconds_after:.1f}",
            f"{x.largest:.2g}",
            "\n".join(f"{task}: {metric}" for task, metric in x.metrics.items()),
        )
    console.print(table)
    console.print("A change is of an output, in parts of its largest value.")


def _print_version(version, others, report):
    made_by = ", ".join(f"{k} {v}" for k, v in report.about["versions"].items())
    console.print(
        f"{version}: {_mb(report.bytes)} MB, {report.about['dtype']}, made by {made_by}"
        + (
            f"; there are also versions {', '.join(map(str, others))}" if others else ""
        ),
        soft_wrap=True,
    )
    table = Table(
        Column("signature", no_wrap=True),
        "takes, gives",
        "ops",
        "MB of weights",
        "difference",
    )
    for name, signature in report.signatures.items():
        differences = report.differences.get(name, {}).values()
        tensors = [*signature.inputs.items(), *signature.outputs.items()]
        table.add_row(
            name,
            "\n".join(f"{k}: {v}" for k, v in tensors),
            str(signature.ops.total()),
            _mb(signature.variable_bytes),
            f"{max(differences):.1g}" if differences else "not run",
        )
    console.print(table)


def _print_times(report):
    table = Table("batch", "signature", "asked", "p50 ms", "p99 ms", "examples/s")
    for row in report.rows:
        table.add_row(
            str(row.batch),
            row.signature,
            row.way,
            f"{1000 * row.percentile(50):.1f}",
            f"{1000 * row.percentile(99):.1f}",
            f"{row.throughput:.1f}",
        )
    console.print(table)
    for batch, ratio in report.together.items():
        line = f"batch {batch}: all tasks in one request take {ratio:.2f} of one by one"
        if batch in report.stitched:
            line += f"; stitched {report.stitched[batch]:.3f} of unstitched"
        console.print(line)
    for name, signature in report.signatures.items():
        mb = _mb(signature.variable_bytes)
        console.print(f"{name}: {signature.ops.total()} ops, {mb} MB of weights")


def _mb(size):
    return f"{size / 1e6:.2f}"


app.command()(serving_commands.serve)
app.command()(serving_commands.predict)


if __name__ == "__main__":
    app(prog_name="python -m export")
