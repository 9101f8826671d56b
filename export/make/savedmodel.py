"""From a .keras file to a version for TF Serving, with all that travels with it."""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from export import meanings
from export.client import regions
from export.client.protocol import JSON_DTYPES, array_dtype
from export.make import dropping, inputs, precision
from export.make.changes import Change, changes
from export.version import recorded
from keras_cross_stitch import export_saved_model

# Of a recorded output's largest value: what rounding may change on another machine.
_TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-4}


def export(
    path: pathlib.Path,
    directory: pathlib.Path,
    *,
    from_jpeg: bool = False,
    warmup: int = 0,
    images: pathlib.Path | None = None,
    drop_below: float | None = None,
    dtype: str = "float32",
    progress: Callable[[str], Any] | None = None,
) -> tuple[pathlib.Path, list[dropping.Link], dict[str, Change]]:
    """Exports the model in the file `path` as the next version in `directory`.

    Args:
        path: A `.keras` file. `answers.json` beside it goes with the version.
        directory: Of the served model.
        from_jpeg: Whether to add signatures `<task>_from_jpeg`.
        warmup: Number of requests that TF Serving replays, for every signature.
        images: Folder or file as `inputs.load_images` takes it, to measure and to
            warm up with.
            Defaults to random ones, which text has none of.
        drop_below: The most that outputs may change for links left out; see
            `dropping.negligible_links`. Needs `images`.
        dtype: `"float32"`, or `"bfloat16"` to compute in.
        progress: Function that is told of each signature; see `export_saved_model`.

    Returns:
        `(version, links left out, changes)`; the changes by signature, against the
        model as it is in the file, where the version differs from that.
    """
    if drop_below is not None and images is None:
        raise ValueError(
            "--drop-below measures what may be dropped on --images: give a folder of "
            "images such as the model will be asked about, or a .npy or .npz file"
        )
    if dtype not in _TOLERANCES:
        raise ValueError(
            f"--dtype must be one of {list(_TOLERANCES)}. Received: {dtype}"
        )
    answers = meanings.beside(path)
    meant = meanings.read(answers)
    model = inputs.load_model(path)
    if from_jpeg and regions.taken_by(x.name for x in model.inputs):
        raise ValueError(
            "--from-jpeg is not for a model that takes regions, for which a file must "
            "be searched first. `export.client.Client`, `python -m export predict` and "
            "the page do so: they take files without it"
        )
    text = [x.name for x in model.inputs if x.dtype == "string"]
    if text and images is None:
        names = [x.name for x in model.inputs]
        what = "FILE.npy, an array of strings"
        if len(names) > 1:
            what = f"FILE.npz, with an array for each of {names}"
        raise ValueError(
            f"The model takes text, '{text[0]}', of which no random one says anything. "
            f"Give some with --images {what}"
        )
    _check_warmup(warmup, len(model.output), from_jpeg)
    examples = inputs.load_images(images, model) if images else None
    sample = None
    if examples is not None:
        few = [array[: recorded.EXAMPLES] for array in examples]
        sample = keras.tree.pack_sequence_as(model.input, few)
    links: list[dropping.Link] = []
    if drop_below is not None:
        given = keras.tree.pack_sequence_as(model.input, examples)
        links = dropping.negligible_links(model, drop_below, given)
    changed = links or dtype != "float32"
    report: dict[str, Change] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = export_saved_model(model, folder, sample=sample) if changed else None
        if dtype != "float32":
            model = precision.lower(model, dtype)
        if links:
            model = dropping.leave_out(model, links)

        # Before it gets its number: where this fails, nothing is served.
        def finish(version: pathlib.Path, compared_on: dict[str, Any]) -> None:
            given = _by_name(examples, compared_on)
            _add(version, given, warmup, dtype, answers)
            if before:
                report.update(changes(before, version, given, meant))

        version = export_saved_model(
            model,
            directory,
            from_jpeg=from_jpeg,
            sample=sample,
            progress=progress,
            finish=finish,
        )
    if progress and (without := _without_json(version)):
        progress(
            "Note: TF Serving answers these over gRPC, not over REST, or give them as "
            f"float32: {', '.join(without)}"
        )
    return version, links, report


def _check_warmup(warmup: int, tasks: int, from_jpeg: bool) -> None:
    records = warmup * (1 + tasks) * (2 if from_jpeg else 1)
    if not 0 <= records <= recorded.MOST_WARMUP_RECORDS:
        raise ValueError(
            f"--warmup must be at least 0, and TF Serving takes "
            f"{recorded.MOST_WARMUP_RECORDS} requests for all signatures together. "
            f"Received: --warmup {warmup}, which makes {records}"
        )


def _add(
    version: pathlib.Path,
    given: recorded.Arrays,
    warmup: int,
    dtype: str,
    answers: pathlib.Path,
) -> None:
    """Adds what travels with a version."""
    extra = version / "assets.extra"
    extra.mkdir()
    if answers.is_file():
        shutil.copyfile(answers, extra / answers.name)
    about = {
        "dtype": dtype,
        "tolerance": _TOLERANCES[dtype],
        # Not of their distributions, which may be keras-nightly or tensorflow-cpu.
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
    }
    (extra / "export.json").write_text(json.dumps(about, indent=2))
    recorded.record(version, given, warmup)


def _without_json(version: pathlib.Path) -> list[str]:
    """The outputs of types that TF Serving does not write to JSON."""
    recordings = recorded.read(version / recorded.RECORDED)
    types = {
        (name, array_dtype(array))
        for _, _, outputs in recordings
        for name, array in outputs.items()
    }
    return [f"{name} ({x})" for name, x in sorted(types) if x not in JSON_DTYPES]


def _by_name(
    examples: list[np.ndarray] | None, compared_on: Mapping[str, Any]
) -> recorded.Arrays:
    """The examples given, if any, by the names that the signatures have for them.

    Both are in the order of the model's inputs.
    """
    if examples is None:
        return {name: np.asarray(array) for name, array in compared_on.items()}
    return dict(zip(compared_on, examples, strict=True))
