"""What an answer costs: latency and throughput of each signature of a version."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import keras
import numpy as np
import tensorflow as tf

from export import NAME
from export.client import Client, ServingError, all_tasks
from export.make.inputs import load_model
from export.version import recorded
from export.version.recorded import Arrays
from export.version.signatures import Signature, signatures
from export.version.timing import batch_of, interleaved
from keras_cross_stitch import NDDR, CrossStitch, export_saved_model

BATCHES = (1, 8, 32)
_ALL = "serving_default"
_UNSTITCHED = "unstitched"
_UNITS = (CrossStitch, NDDR)  # of which `stitch` puts one at each tap
_SECONDS = 60  # for an answer of a server


@dataclasses.dataclass(frozen=True)
class Row:
    """One signature at one batch size, over one way of asking."""

    signature: str
    way: str  # "in process", "gRPC" or "REST"
    batch: int
    seconds: np.ndarray  # of each call

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def throughput(self) -> float:
        """Examples a second, of one client that waits for each answer."""
        return self.batch / float(self.seconds.mean())


@dataclasses.dataclass(frozen=True)
class Report:
    """Times, ratios of them by batch size, and what each signature runs."""

    rows: list[Row]
    together: dict[int, float]  # all tasks in one request, against one after another
    stitched: dict[int, float]  # with the units, against without; needs the model
    signatures: dict[str, Signature]
    left_out: list[str]  # in words, what was too large for the server


def bench(
    version: pathlib.Path,
    *,
    address: str | None = None,
    name: str = NAME,
    model: pathlib.Path | None = None,
    rounds: int = 30,
    batches: tuple[int, ...] = BATCHES,
) -> Report:
    """Times the signatures that take arrays, all in turns.

    What is too large for the server is left out, and told.

    Args:
        version: Path of a version that `python -m export savedmodel` wrote.
        address: `"host:port"` or `"http://host:port"` of a server of this version, to
            ask over gRPC or REST, too.
        name: The model's name on that server.
        model: The `.keras` file of the version, to time the towers without their
            units too.
        rounds: Number of calls of each kind.
        batches: Batch sizes.
    """
    costs = signatures(version)
    given = {
        signature: inputs
        for signature, inputs, _ in recorded.read(version / recorded.RECORDED)
        if not _are_files(signature, inputs)
    }
    ways: dict[str, Callable[[str, Arrays], Arrays]] = {
        "in process": _in_process(version)
    }
    with contextlib.ExitStack() as stack:
        if address:
            with Client(address, name, timeout=5) as client:
                client.status()  # before minutes of measuring: is it there?
            client = stack.enter_context(Client(address, name, timeout=_SECONDS))
            ways["REST" if "://" in address else "gRPC"] = client.predict
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if model:
            plain = unstitched(load_model(model))
            without = _in_process(export_saved_model(plain, folder))
        rows, left_out = [], []
        for batch in batches:
            calls = {}
            for signature, inputs in given.items():
                repeated = batch_of(inputs, batch)
                for way, ask in ways.items():
                    call = functools.partial(ask, signature, repeated)
                    if why := _too_large(call):
                        left_out.append(f"batch {batch}, {signature}, {way}: {why}")
                    else:
                        calls[signature, way] = call
                if model and signature == _ALL:
                    calls[_UNSTITCHED, "in process"] = functools.partial(
                        without, signature, repeated
                    )
            seconds = interleaved(calls, rounds)
            rows += [
                Row(signature, way, batch, taken)
                for (signature, way), taken in seconds.items()
            ]
    together, stitched = _ratios(rows)
    return Report(rows, together, stitched, costs, left_out)


def _are_files(signature: str, inputs: Arrays) -> bool:
    strings = all(array.dtype == object for array in inputs.values())
    return all_tasks.takes_files(signature) and strings


def _too_large(call: Callable[[], Any]) -> str:
    """Why a server refuses what is too large for it; empty where it answers."""
    try:
        call()
    except ServingError as error:
        if error.code != grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return error.message
    return ""


def unstitched(model: keras.Model) -> keras.Model:
    """The same towers in one model, without the units between them."""
    if not any(isinstance(layer, _UNITS) for layer in model.layers):
        raise ValueError(
            "--model compares with the towers without their units, and is for a model "
            "with CrossStitch or NDDR layers of its own. Its layers: "
            f"{[layer.name for layer in model.layers]}"
        )

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        return args[0] if isinstance(layer, _UNITS) else layer(*args, **kwargs)

    return keras.models.clone_model(
        model, clone_function=lambda layer: layer, call_function=call
    )


def _ratios(rows: Iterable[Row]) -> tuple[dict[int, float], dict[int, float]]:
    together, stitched = {}, {}
    for batch in dict.fromkeys(row.batch for row in rows):
        medians = {
            row.signature: row.percentile(50)
            for row in rows
            if row.batch == batch and row.way == "in process"
        }
        without = medians.pop(_UNSTITCHED, None)
        all_tasks = medians.pop(_ALL)
        together[batch] = all_tasks / sum(medians.values())
        if without:
            stitched[batch] = all_tasks / without
    return together, stitched


def _in_process(version: pathlib.Path) -> Callable[[str, Arrays], Arrays]:
    loaded = tf.saved_model.load(str(version))
    return lambda signature, inputs: recorded.run(loaded.signatures[signature], inputs)
