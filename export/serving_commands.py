"""The commands `serve` and `predict` of python -m export."""

import contextlib
import functools
import pathlib
import sys
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

from export.client import Client, drawing
from export.client.protocol import NAME, ServingError, read_answers
from export.preview import server
from export.preview.served_model import ServedModel

Name = Annotated[str, typer.Option(help="The served model's name.")]


def serve(
    directory: Annotated[
        pathlib.Path, typer.Argument(help="Folder with the versions: 1, 2, ...")
    ],
    name: Name = NAME,
    port: Annotated[int, typer.Option(help="gRPC.")] = 8500,
    rest_port: Annotated[int, typer.Option(help="REST, and the page.")] = 8501,
    label: Annotated[
        list[str] | None, typer.Option(help="LABEL=VERSION; repeat for several.")
    ] = None,
):
    """Serve DIRECTORY on 127.0.0.1 as TF Serving would, for development.

    New versions are served as they appear. http://127.0.0.1:8501/ shows the answers to
    a picture.
    """
    with _errors_in_a_line():
        model = ServedModel(name, directory, _labels(label or []))
        listening = server.listen(port, rest_port)
    Console().print(
        f"Preview server, for development only; Ctrl+C ends it.\n"
        f"gRPC  127.0.0.1:{port}, model '{name}'\n"
        f"REST  http://127.0.0.1:{rest_port}/v1/models/{name}\n"
        f"Page  http://127.0.0.1:{rest_port}/",
        highlight=False,
        soft_wrap=True,
    )
    # Until SIGTERM or Ctrl+C; what is under way is answered first.
    with listening:
        server.server(model, port).run(sockets=[listening])


def _labels(pairs):
    labels = {}
    for pair in pairs:
        label, _, version = pair.partition("=")
        if not label or not version.isdecimal():
            raise ValueError(f"--label must be LABEL=VERSION. Received: {pair}")
        labels[label] = int(version)
    return labels


def predict(
    images: Annotated[list[pathlib.Path], typer.Argument(help="JPEG or PNG files.")],
    task: Annotated[list[str], typer.Option(help="Repeat for several.")],
    address: Annotated[
        str, typer.Option(help="HOST:PORT of gRPC, or http://HOST:PORT of REST.")
    ] = "127.0.0.1:8500",
    name: Name = NAME,
    model: Annotated[
        pathlib.Path | None,
        typer.Option(help="The served folder, for class names and colours."),
    ] = None,
    output: Annotated[
        pathlib.Path, typer.Option(help="Folder for the pictures.")
    ] = pathlib.Path("."),
    timeout: Annotated[float, typer.Option(help="Seconds for each answer.")] = 10.0,
):
    """Ask a served model about IMAGES, and draw each answer.

    Writes OUTPUT/IMAGE.TASK.png where the answer is a map or boxes, and prints it where
    it is numbers. The model must take an image and regions, which are searched for, or
    have been exported with --from-jpeg.
    """
    with _errors_in_a_line():
        for image in images:
            if not image.is_file():
                raise ValueError(f"There is no file {image}")
        output.mkdir(parents=True, exist_ok=True)
        with Client(address, name, timeout=timeout) as client:
            answers = _answers(client, model) if model else {}
            for image in images:
                ask = functools.partial(client.predict, images=[image])
                for each in dict.fromkeys(drawing.drawn_with(t, answers) for t in task):
                    _show(image, each, drawing.answer(ask, each, answers), output)


def _answers(client, directory):
    """What the answers of the version that is served mean."""
    for state in client.status().model_version_status:
        path = directory / str(state.version)
        if state.state == ModelVersionStatus.AVAILABLE and path.is_dir():
            return read_answers(path)
    raise ValueError(f"{directory} does not hold the version that {client.address} has")


def _show(image, task, drawn, output):
    if drawn.map is not None or drawn.boxes:
        path = output / f"{image.stem}.{task}.png"
        with Image.open(image) as picture:
            drawing.over(picture.convert("RGB"), drawn).save(path)
        Console().print(f"Wrote {path}", soft_wrap=True)
    if drawn.rows:
        table = Table(f"{image.name}, {task}", "")
        for row in drawn.rows:
            table.add_row(*row)
        Console().print(table)


@contextlib.contextmanager
def _errors_in_a_line():
    try:
        yield
    except (ValueError, OSError, ServingError) as error:
        message = f"[red]Error:[/red] {escape(str(error))}"
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
