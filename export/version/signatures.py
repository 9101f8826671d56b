"""What each signature of a SavedModel takes, gives and runs, read from its file."""

import collections
import dataclasses
import math
import pathlib

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

# These hold or hand on what others compute.
_NO_WORK = {"Const", "Identity", "NoOp", "Placeholder", "ReadVariableOp", "VarHandleOp"}


@dataclasses.dataclass(frozen=True)
class Signature:
    """A signature, and what is left of the graph where only it is asked for."""

    inputs: dict[str, str]  # {name: "float32 (N, 8, 8, 3)"}
    outputs: dict[str, str]
    ops: collections.Counter  # {kind of op: how many}
    variable_bytes: int


def version_path(directory) -> pathlib.Path:
    """The version to look at: `directory` itself, or its highest version."""
    directory = pathlib.Path(directory)
    if _is_version(directory):
        return directory
    found = versions(directory)
    if not found:
        raise ValueError(
            "Expected a folder of versions (1, 2, ...) that `python -m export "
            f"savedmodel` wrote, or one version. Received: '{directory}'"
        )
    return directory / str(found[-1])


def versions(directory) -> list[int]:
    """The versions in a served model's folder, in ascending order."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and _is_version(path)
    )


def signatures(version) -> dict[str, Signature]:
    """{name: `Signature`} of the SavedModel in the folder `version`."""
    try:
        file = (pathlib.Path(version) / "saved_model.pb").read_bytes()
        graph = saved_model_pb2.SavedModel.FromString(file).meta_graphs[0]
    except Exception as error:  # protobuf's is no public name
        raise ValueError(f"'{version}' is no SavedModel: {error}") from error
    found = {}
    for name, definition in sorted(graph.signature_def.items()):
        if not name.startswith("__"):  # TensorFlow's own, such as the initializer
            outputs = [info.name for info in definition.outputs.values()]
            nodes = _needed(graph.graph_def, outputs)
            found[name] = Signature(
                _described(definition.inputs),
                _described(definition.outputs),
                collections.Counter(x.op for x in nodes if x.op not in _NO_WORK),
                sum(_bytes(x) for x in nodes if x.op == "VarHandleOp"),
            )
    return found


def _is_version(path):
    return (path / "saved_model.pb").is_file()


def _described(infos):
    found = {}
    for name, info in sorted(infos.items()):
        sizes = ["N" if x.size < 0 else str(x.size) for x in info.tensor_shape.dim]
        found[name] = f"{tf.as_dtype(info.dtype).name} ({', '.join(sizes)})"
    return found


def _bytes(variable):
    shape = (x.size for x in variable.attr["shape"].shape.dim)
    return math.prod(shape) * tf.as_dtype(variable.attr["dtype"].type).size


@dataclasses.dataclass(frozen=True, eq=False)
class _Scope:
    """The graph, or the body of one call of a function."""

    nodes: dict
    arguments: dict = dataclasses.field(default_factory=dict)  # {name: caller's tensor}
    caller: "_Scope | None" = None


def _needed(graph, outputs):
    """The nodes on which `outputs` depend, with those inside the functions called."""
    functions = {x.signature.name: x for x in graph.library.function}
    top = _Scope({node.name: node for node in graph.node})
    bodies: dict = {}  # {(scope, call): the scope inside}
    needed = {}
    seen = set()
    waiting = [(top, tensor) for tensor in outputs]
    while waiting:
        scope, tensor = waiting.pop()
        if (scope, tensor) in seen:
            continue
        seen.add((scope, tensor))
        name, *index = tensor.split(":")  # "node:2"; in a function "node:output:2"
        if scope.caller and name in scope.arguments:
            waiting.append((scope.caller, scope.arguments[name]))
            continue
        node = scope.nodes[name]
        function = functions.get(node.attr["f"].func.name)
        if function is None:
            needed[scope, name] = node
            waiting += [(scope, x) for x in _tensors(node)]
        else:
            body = bodies.setdefault((scope, name), _body(function, node, scope))
            result = function.signature.output_arg[int(index[-1]) if index else 0]
            waiting.append((body, function.ret[result.name]))
    return list(needed.values())


def _body(function, call, scope):
    names = [x.name for x in function.signature.input_arg]
    return _Scope(
        {node.name: node for node in function.node_def},
        dict(zip(names, _tensors(call), strict=True)),
        scope,
    )


def _tensors(node):
    # "^node" only waits for it.
    return [x for x in node.input if not x.startswith("^")]
