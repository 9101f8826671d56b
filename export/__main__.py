"""python -m export: the command line. It parses and prints; all else is elsewhere.

The commands import what they need themselves: TensorFlow takes seconds.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from rich.table import Column, Table
from rich.text import Text

from export import NAME

if TYPE_CHECKING:
    import numpy as np

    from export.client import Client, ServingError
    from export.client.drawing import Drawing
    from export.inspect.bench import Report as Times
    from export.inspect.verify import Report as Differences
    from export.make.changes import Change
    from export.make.dropping import Link
    from export.meanings import Meanings

# Names of files and classes are shown as they are, [brackets] and :colons: too.
console = Console(markup=False, emoji=False)


def path(text: str | Path) -> Path:
    """What every path is read by: a shell leaves the ~ of --output=~/there as it is."""
    # A ~ without such a user stays, where Path.expanduser() raises a RuntimeError.
    return Path(os.path.expanduser(text))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Directory = Annotated[
    Path,
    typer.Argument(
        parser=path, help="The served model's folder (its latest version), or one."
    ),
]
Name = Annotated[str, typer.Option(help="The model's name on the server.")]


@app.callback()
def main() -> None:
    """Bring a trained multi-task model to TensorFlow Serving."""


@app.command()
def savedmodel(
    model: Annotated[
        Path, typer.Argument(parser=path, help="A multi-task model, .keras.")
    ],
    directory: Annotated[
        Path, typer.Argument(parser=path, help="Where TF Serving will look.")
    ],
    from_jpeg: Annotated[
        bool, typer.Option("--from-jpeg", help="Add signatures that take files.")
    ] = False,
    warmup: Annotated[
        int, typer.Option(help="Requests of each signature that TF Serving replays.")
    ] = 0,
    images: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Folder of JPEG or PNG files, or a .npy file, to measure on.",
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
) -> None:
    """Write DIRECTORY/VERSION, with one signature per task.

    The version is one above the highest that is there. What the answers mean
    (answers.json beside MODEL) goes with it, and predictions for `verify`.
    """
    with _errors_in_a_line():
        _import_tensorflow()
        from export.make import precision
        from export.make.changes import BATCH
        from export.make.savedmodel import export

        if dtype == "bfloat16" and not precision.computed_here():
            _print_warning(
                "this machine's processor has no AVX512_BF16 or AMX: on it bfloat16 is "
                "slower than float32"
            )
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
    if links:
        _print_links(links)
    if changes:
        _print_changes(changes, BATCH)
    console.print(f"Wrote {written}", soft_wrap=True)


@app.command()
def verify(
    directory: Directory,
    engine: Annotated[
        str, typer.Option(help="tensorflow, or openvino.")
    ] = "tensorflow",
) -> None:
    """Ask each signature for what it answered when it was exported, and compare.

    This runs without Keras and without the project's code. Ends with exit code 1 where
    an answer differs.
    """
    with _errors_in_a_line():
        _import_tensorflow()
        from export.inspect.verify import verify
        from export.version.signatures import complete_versions, version_path

        version = version_path(directory)
        report = verify(version, engine)
    found = complete_versions(version.parent)
    others = [number for number, x in found.items() if x.name != version.name]
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
        str | None,
        typer.Option(
            help="Of its server, to ask that too: HOST:PORT of gRPC, or "
            "http://HOST:PORT of REST."
        ),
    ] = None,
    name: Name = NAME,
    model: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="The .keras file, to time its towers without units too."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Calls of each kind.")] = 30,
) -> None:
    """Measure what an answer costs, in turns, at batch 1, 8 and 32.

    Asks each signature that takes arrays. What is too large for the server is left out,
    and told.
    """
    with _errors_in_a_line():
        _import_tensorflow()
        from export.inspect.bench import bench
        from export.version.signatures import version_path

        version = version_path(directory)
        report = bench(
            version,
            address=address,
            name=name,
            model=model,
            rounds=rounds,
        )
    _print_times(report)


@app.command()
def serve(
    directory: Annotated[
        Path, typer.Argument(parser=path, help="Folder with the versions: 1, 2, ...")
    ],
    name: Name = NAME,
    port: Annotated[int, typer.Option(help="gRPC.")] = 8500,
    rest_port: Annotated[int, typer.Option(help="REST, and the page.")] = 8501,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="LABEL=VERSION, which is served beside the latest; repeat for several."
        ),
    ] = None,
) -> None:
    """Serve DIRECTORY on 127.0.0.1 as TF Serving would, for development.

    New versions are served as they appear. http://127.0.0.1:8501/ shows the answers to
    a picture.
    """
    with _errors_in_a_line():
        _import_tensorflow()
        from export.preview import server
        from export.preview.served_model import ServedModel
        from keras_cross_stitch.versions import versions

        labels = _labels(label or [], versions(directory))
        tell = functools.partial(console.print, highlight=False, soft_wrap=True)
        # Before the model is loaded, which may take minutes.
        port, listening = server.listen(port, rest_port)
    with listening:
        with _errors_in_a_line():
            model = ServedModel(name, directory, labels, tell=tell)
            preview = server.server(model, port)
        rest_port = listening.getsockname()[1]
        tell(
            f"Preview server, for development only; Ctrl+C ends it.\n"
            f"gRPC  127.0.0.1:{port}, model '{name}'\n"
            f"REST  http://127.0.0.1:{rest_port}/v1/models/{name}\n"
            f"Page  http://127.0.0.1:{rest_port}/"
        )
        # Until SIGTERM or Ctrl+C; what is under way is answered first.
        preview.run(sockets=[listening])


def _labels(pairs: Iterable[str], found: Collection[int]) -> dict[str, int]:
    labels = {}
    for pair in pairs:
        label, _, version = pair.partition("=")
        if not label or not version.isdecimal():
            raise ValueError(f"--label must be LABEL=VERSION. Received: {pair}")
        if found and int(version) not in found:  # a folder without any is told so
            raise ValueError(
                "--label must name a version that is there. There are: "
                f"{', '.join(map(str, found))}. Received: {pair}"
            )
        labels[label] = int(version)
    return labels


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(parser=path, help="JPEG or PNG files, or folders of them."),
    ],
    task: Annotated[list[str], typer.Option(help="Repeat for several.")],
    address: Annotated[
        str, typer.Option(help="HOST:PORT of gRPC, or http://HOST:PORT of REST.")
    ] = "127.0.0.1:8500",
    name: Name = NAME,
    model: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="The served folder, for class names and colours. Without it, maps are "
            "printed as numbers.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(parser=path, help="Folder for the pictures.")
    ] = Path("."),
    timeout: Annotated[float, typer.Option(help="Seconds for each answer.")] = 10.0,
) -> None:
    """Ask a served model about IMAGES, and draw each answer.

    Writes OUTPUT/IMAGE.TASK.png where the answer is boxes or, with --model, a map, and
    prints it where it is numbers. Images of one name are told apart by their folders
    and endings, as OUTPUT/FOLDER/IMAGE.jpg.TASK.png. The model must take an image and
    regions, which are searched for, or have been exported with --from-jpeg. Ends with
    exit code 1 where one of the images was not answered.
    """
    with _errors_in_a_line():
        _import_tensorflow()
        from export.client import Client, ServingError, drawing

        names = _names(_files(images))
        output.mkdir(parents=True, exist_ok=True)
        with Client(address, name, timeout=timeout) as client:
            answers = _answers(client, model) if model else {}
            tasks = dict.fromkeys(drawing.drawn_with(t, answers) for t in task)
            signatures = client.signatures() if len(tasks) > 1 else {}
            failed = False
            for image, drawn_to in names.items():
                try:
                    ask = _asking(client, image, tasks, signatures)
                    for each in tasks:
                        drawn = drawing.answer(ask, each, answers)
                        _show(image, each, drawn, output / f"{drawn_to}.{each}.png")
                except (ServingError, OSError, ValueError) as error:
                    _print_error(f"{image}: {_in_words(error)}")
                    failed = True
                    if isinstance(error, ServingError) and not _of_one_image(error):
                        break
    if failed:
        sys.exit(1)


def _of_one_image(error: "ServingError") -> bool:
    """Whether the server may well answer to the next image."""
    return error.code.name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")


def _asking(
    client: "Client", image: Path, tasks: Collection[str], signatures: Mapping
) -> Callable[..., Mapping[str, "np.ndarray"]]:
    """A function of a task: its answer, of one request for all where there can be."""
    from export.client import all_tasks
    from export.client.protocol import IMAGES

    one = functools.partial(client.predict, images=[image])
    needed = {all_tasks.SIGNATURE, *tasks, *(task + IMAGES for task in tasks)}
    if not needed <= signatures.keys():
        return one
    outputs = one(all_tasks.SIGNATURE)

    def ask(task: str, rois: "np.ndarray | None" = None) -> Mapping[str, "np.ndarray"]:
        return all_tasks.of_task(task, outputs, signatures[task].outputs)

    return ask


def _files(images: Iterable[Path]) -> list[Path]:
    from export.client.client import pictures_in

    files: dict[Path, Path] = {}  # by what they are, since one may be given twice
    for image in images:
        if not image.exists():
            raise ValueError(f"There is no file {image}")
        for file in pictures_in(image) if image.is_dir() else [image]:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """What each file's drawings are called: no two alike, on any file system."""
    if len({file.stem.casefold() for file in files}) == len(files):
        return {file: file.stem for file in files}
    paths = {file: file.resolve() for file in files}
    above = os.path.commonpath([path.parent for path in paths.values()])
    return {file: path.relative_to(above).as_posix() for file, path in paths.items()}


def _answers(client: "Client", directory: Path) -> "Meanings":
    """What the answers of the version that is served mean."""
    from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

    from export import meanings
    from export.client import drawing
    from keras_cross_stitch.versions import versions

    found = versions(directory)
    for state in client.status().model_version_status:
        if state.state == ModelVersionStatus.AVAILABLE and state.version in found:
            answers = meanings.of_version(found[state.version])
            return drawing.served(answers, client.signatures())
    raise ValueError(f"{directory} does not hold the version that {client.address} has")


def _show(image: Path, task: str, drawn: "Drawing", path: Path) -> None:
    from PIL import Image

    from export.client import drawing

    if drawn.map is not None or drawn.boxes:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        try:
            with Image.open(image) as picture:
                drawing.over(picture, drawn).save(unfinished, "PNG")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        console.print(f"Wrote {path}", soft_wrap=True)
    if drawn.rows:
        table = _table(f"{image.name}, {task}", "")
        for row in drawn.rows:
            table.add_row(*row)
        console.print(table)


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
    """Ends the program with one line: code 2 for what was asked, 1 for what failed.

    SIGTERM ends it as an exception does, so that nothing half done is left behind.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except (ValueError, OSError) as error:
        _print_error(error)
        sys.exit(2)
    except (RuntimeError, ImportError) as error:
        _print_error(_in_words(error))
        sys.exit(1)
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if not tensorflow or not isinstance(error, tensorflow.errors.OpError):
            raise
        _print_error(error.message)  # such as of a disk that is full
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_words(error: Exception) -> str:
    """The error; where a server may not be there, with what starts one."""
    if getattr(getattr(error, "code", None), "name", "") != "UNAVAILABLE":
        return str(error)
    return (
        f"{error}. Where no server runs, `python -m export serve FOLDER` starts one, "
        "with gRPC at 127.0.0.1:8500 and REST at http://127.0.0.1:8501"
    )


def _print_error(error: object) -> None:
    _print_line("Error", "red", " ".join(str(error).split()))


def _print_warning(text: str) -> None:
    _print_line("Warning", "yellow", text)


def _print_line(word: str, colour: str, text: str) -> None:
    line = Text.assemble((f"{word}:", colour), " ", text)
    Console(stderr=True).print(line, soft_wrap=True)


def _table(*headers: str) -> Table:
    """A table whose names are folded where they do not fit, and not cut off."""
    return Table(*(Column(header, overflow="fold") for header in headers))


def _print_links(links: "Iterable[Link]") -> None:
    table = _table("left out at", "task", "takes nothing from", "change, alone")
    for link in links:
        table.add_row(link.unit, link.task, link.source, f"{link.effect:.2g}")
    console.print(table)


def _print_changes(changes: "Mapping[str, Change]", batch: int) -> None:
    table = _table(
        "signature",
        "ops",
        "MB of\nweights",
        f"ms,\nbatch {batch}",
        "largest\nchange",
        "answers",
    )
    for name, x in changes.items():
        before, after = x.before, x.after
        table.add_row(
            name,
            f"{before.ops.total()} ->\n{after.ops.total()}",
            f"{_mb(before.variable_bytes)} ->\n{_mb(after.variable_bytes)}",
            f"{1000 * x.seconds_before:.1f} ->\n{1000 * x.seconds_after:.1f}",
            f"{x.largest:.2g}",
            "\n".join(f"{task}: {metric}" for task, metric in x.metrics.items()),
        )
    console.print(table)
    console.print("A change is of an output, in parts of its largest value.")


def _print_version(version: Path, others: Iterable[int], report: "Differences") -> None:
    made_by = ", ".join(f"{k} {v}" for k, v in report.about["versions"].items())
    console.print(
        f"{version}: {_mb(report.bytes)} MB, {report.about['dtype']}, made by {made_by}"
        + (
            f"; there are also versions {', '.join(map(str, others))}" if others else ""
        ),
        soft_wrap=True,
    )
    table = _table("signature", "takes, gives", "ops", "MB of weights", "difference")
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


def _print_times(report: "Times") -> None:
    table = _table("batch", "signature", "asked", "p50 ms", "p99 ms", "examples/s")
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
    for line in report.left_out:
        _print_warning(f"left out, for it is too large: {line}")
    for name, signature in report.signatures.items():
        mb = _mb(signature.variable_bytes)
        console.print(f"{name}: {signature.ops.total()} ops, {mb} MB of weights")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


if __name__ == "__main__":
    app(prog_name="python -m export")
