"""python -m export: the command line. It parses; all else is elsewhere.

The commands import what they need themselves: TensorFlow takes seconds.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Collection, Iterable, Iterator
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

from export import NAME
from export.printing import (
    console,
    in_words,
    print_changes,
    print_error,
    print_links,
    print_times,
    print_version,
    print_warning,
)


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
            help="What to measure on: a folder of JPEG or PNG files, a .npy file, or a "
            ".npz file with an array for each input.",
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
            print_warning(
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
        print_links(links)
    if changes:
        print_changes(changes, BATCH)
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
    print_version(version, others, report)
    for line in report.wrong:
        print_error(line)
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
    print_times(report)


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
        from export import predicting
        from export.client import Client

        with Client(address, name, timeout=timeout) as client:
            answered = predicting.predict(client, images, task, model, output)
    if not answered:
        sys.exit(1)


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
        print_error(error)
        sys.exit(2)
    except (RuntimeError, ImportError) as error:
        print_error(in_words(error))
        sys.exit(1)
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if not tensorflow or not isinstance(error, tensorflow.errors.OpError):
            raise
        print_error(error.message)  # such as of a disk that is full
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    app(prog_name="python -m export")
