"""What each signature of a version takes, gives and runs."""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping

import tensorflow as tf

from export.client.protocol import in_words
from keras_cross_stitch.versions import is_complete, versions

# These hold, hand on or call what computes.
_NO_WORK = {
    "Const",
    "Identity",
    "NoOp",
    "PartitionedCall",
    "Placeholder",
    "ReadVariableOp",
    "StatefulPartitionedCall",
}


@dataclasses.dataclass(frozen=True)
class Signature:
    """A signature, with the whole of the functions that it calls.

    `export_saved_model` writes functions of its own for each signature.
    """

    inputs: dict[str, str]  # {name: "float32 (N, 8, 8, 3)"}
    outputs: dict[str, str]
    ops: collections.Counter[str]  # {kind of op: how many}
    variable_bytes: int


def version_path(directory: pathlib.Path) -> pathlib.Path:
    """The version to look at: `directory` itself, or its highest version."""
    if is_complete(directory):
        return directory
    found = complete_versions(directory)
    if not found:
        raise ValueError(
            "Expected a folder of versions (1, 2, ...) that `python -m export "
            f"savedmodel` wrote, or one version. Received: '{directory}'"
        )
    return found[max(found)]


def complete_versions(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    """{number: path} of the versions in a folder that hold a model, ascending."""
    return {n: path for n, path in versions(directory).items() if is_complete(path)}


def signatures(version: pathlib.Path) -> dict[str, Signature]:
    """{name: `Signature`} of the SavedModel in the folder `version`."""
    try:
        loaded = tf.saved_model.load(str(version))
    except Exception as error:  # TensorFlow raises all kinds on what is no model
        raise ValueError(
            f"'{version}' is no SavedModel that TensorFlow can load: {error}"
        ) from error
    return {
        name: described(function)
        for name, function in sorted(loaded.signatures.items())
    }


def described(function: tf.types.experimental.ConcreteFunction) -> Signature:
    """The `Signature` of a signature's function, in memory."""
    graph = function.graph.as_graph_def()
    called = [node for body in graph.library.function for node in body.node_def]
    _, inputs = function.structured_input_signature
    return Signature(
        _all_in_words(inputs),
        _all_in_words(function.structured_outputs),
        collections.Counter(
            node.op for node in [*graph.node, *called] if node.op not in _NO_WORK
        ),
        sum(math.prod(x.shape) * x.dtype.size for x in function.variables),
    )


def _all_in_words(specs: Mapping[str, tf.TensorSpec]) -> dict[str, str]:
    return {
        name: in_words(spec.dtype.name, None if spec.shape.rank is None else spec.shape)
        for name, spec in sorted(specs.items())
    }
