"""python -m export: the command line."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

# Before TensorFlow is imported: its notices are not ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for library in ("absl", "tensorflow"):
    logging.getLogger(library).setLevel(logging.ERROR)

import keras
import typer
from rich.console import Console

from keras_cross_stitch import export_saved_model

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
):
    """Write DIRECTORY/VERSION, with one signature per task.

    The version is one above the highest that is there.
    """
    try:
        if not model.is_file():
            raise ValueError(f"There is no file {model}")
        loaded = keras.saving.load_model(model, compile=False)
        written = export_saved_model(
            loaded, directory, from_jpeg=from_jpeg, progress=typer.echo
        )
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {error}", soft_wrap=True)
        sys.exit(2)
    console.print(f"Wrote {written}")


if __name__ == "__main__":
    app(prog_name="python -m export")
