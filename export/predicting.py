"""Asks a served model about pictures, and draws or prints each answer."""

import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from export import meanings
from export.client import Client, ServingError, all_tasks, drawing, messages
from export.client.client import pictures_in
from export.meanings import Meanings
from export.printing import console, in_words, print_error, table
from keras_cross_stitch.versions import versions


def predict(
    client: Client,
    images: Iterable[Path],
    asked: Iterable[str],
    model: Path | None,
    output: Path,
) -> bool:
    """Writes or prints each answer; whether all of the images were answered.

    Args:
        client: Of the served model.
        images: Files, or folders of them.
        asked: Tasks.
        model: Optional path of the served folder, which says what the answers mean.
        output: Path of the folder for the drawings.
    """
    names = _names(_files(images))
    output.mkdir(parents=True, exist_ok=True)
    answers = _answers(client, model) if model else {}
    tasks = dict.fromkeys(drawing.drawn_with(task, answers) for task in asked)
    signatures = client.signatures() if len(tasks) > 1 else {}
    answered = True
    for image, drawn_to in names.items():
        try:
            ask = _asking(client, image, tasks, signatures)
            for task in tasks:
                drawn = drawing.answer(ask, task, answers)
                _show(image, task, drawn, output / f"{drawn_to}.{task}.png")
        except (ServingError, OSError, ValueError) as error:
            print_error(f"{image}: {in_words(error)}")
            answered = False
            if isinstance(error, ServingError) and not _of_one_image(error):
                break
    return answered


def _of_one_image(error: ServingError) -> bool:
    """Whether the server may well answer to the next image."""
    codes = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"
    return error.code.name in codes


def _asking(
    client: Client, image: Path, tasks: Collection[str], signatures: Mapping
) -> Callable[..., Mapping[str, np.ndarray]]:
    """A function of a task: its answer, of one request for all where there can be."""
    one = functools.partial(client.predict, images=[image])
    needed = {all_tasks.SIGNATURE, *tasks, *map(all_tasks.of_files, tasks)}
    if not needed <= signatures.keys():
        return one
    outputs = one(all_tasks.SIGNATURE)

    def ask(task: str, rois: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        return all_tasks.of_task(task, outputs, signatures[task].outputs)

    return ask


def _files(images: Iterable[Path]) -> list[Path]:
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


def _answers(client: Client, directory: Path) -> Meanings:
    """What the answers of the version that is served mean."""
    found = versions(directory)
    for state in client.status().model_version_status:
        if state.state == messages.AVAILABLE and state.version in found:
            answers = meanings.of_version(found[state.version])
            return drawing.served(answers, client.signatures())
    raise ValueError(f"{directory} does not hold the version that {client.address} has")


def _show(image: Path, task: str, drawn: drawing.Drawing, path: Path) -> None:
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
        rows = table(f"{image.name}, {task}", "")
        for row in drawn.rows:
            rows.add_row(*row)
        console.print(rows)
