"""A model to a SavedModel with one signature per task; does not serve it.

TensorFlow is imported inside the functions, so that the library runs on the other
backends without it.
"""

import contextlib
import keyword
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_cross_stitch import versions
from keras_cross_stitch.faster_layers import exchange, put_back
from keras_cross_stitch.opening import check_task_names
from keras_cross_stitch.trial_input import (
    first_accepted_input,
    from_sample,
    layer_named,
)

_TOLERANCE = 1e-5  # relative to the largest output


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    version: int | None = None,
    from_jpeg: bool = False,
    sample: Any = None,
    finish: Callable[[pathlib.Path, dict[str, Any]], Any] | None = None,
    progress: Callable[[str], Any] | None = None,
) -> pathlib.Path:
    """Writes a multi-task model as the next version of a served model.

    Each task is a signature that runs only the layers which that task needs.
    `serving_default` runs all tasks. The model is written under a temporary name,
    loaded back, and compared with the one given. Only then is it renamed to its
    version. So TensorFlow Serving never sees half a model, nor a wrong one.

    Args:
        model: Functional `keras.Model` with a dict of task name to output, such as
            `stitch` returns. A task's output is a tensor or a dict of tensors.
        directory: Local folder of the served model, made if it does not exist;
            `~` is the home folder. Versions are its subfolders.
        version: Positive integer. Defaults to one above the highest that is there.
            Two exports at the same time get a number each.
        from_jpeg: Whether to add signatures that take encoded images:
            `<task>_from_jpeg` per task, and `from_jpeg` of all tasks. The model must
            have one input, `(N, H, W, 3)`.
        sample: A batch of inputs on which to compare the models, in the form in which
            the model is called: an array, or a list or dict of arrays. For a
            `tf.data.Dataset` of `(inputs, labels)` it is `next(iter(dataset))[0]`.
            With `from_jpeg` it is rounded to whole pixel values. Inputs of text need
            a sample. Defaults to random input, the same in every export: whole
            numbers up to 255 for floats; 0 and 1 for integers, and for floats if the
            model refuses larger ones or gives NaN for them.
        finish: Optional function of the version's folder and of the inputs that it
            was compared on, `{name in the signatures: array}`. It is called before
            the version gets its name, and may add files to `assets.extra/`. If it
            raises, the export ends.
        progress: Optional function, such as `print`. It is called with a line of text
            for each signature, as soon as the signature's graph is made.

    Returns:
        `pathlib.Path`, the folder that was written: `<directory>/<version>`.

    Signatures:
        `<task>`: from the model's inputs, by their names (`_` for what is not a
            letter or digit; `arg_` before a name that begins with no letter, or
            that Python has for itself, such as `in`), with any batch size, to the
            task's output under the task's name, or to those of its dict under their
            keys. All inputs are dense tensors and must be given, optional ones too.
        `serving_default`: the same for all tasks; the outputs of a task with a dict
            are named `<task>_<key>`.
        `<task>_from_jpeg`: from `image_bytes` `(N,)`, JPEG or PNG files as strings.
            They are decoded and resized (bilinear, antialiased, whatever the aspect
            ratio) to the model's input, as RGB in [0, 255]. If the model's height or
            width is unknown, they are not resized, and those of one batch must have
            one size. TensorFlow does not read the orientation in a JPEG file's EXIF
            data, so photographs of phones must be turned upright, and saved so,
            before they are sent.
        `from_jpeg`: the same for all tasks; the outputs are `serving_default`'s.

    Raises:
        ValueError: For a model without a dict of outputs, with outputs that would
            have one name, or with a stateful layer; a version that exists; a
            directory that is not local or cannot be written to; images for a model
            that takes none; a layer that cannot be exported or does not accept the
            input to compare on.
        RuntimeError: With another backend than TensorFlow, or when the loaded model
            differs from the one given. Nothing is left in the directory then.

    Example:

    >>> image = keras.Input((8, 8, 3), name="image")
    >>> features = keras.layers.GlobalAveragePooling2D()(image)
    >>> outputs = {
    ...     "kind": keras.layers.Dense(5)(features),
    ...     "age": keras.layers.Dense(1)(features),
    ... }
    >>> model = keras.Model(image, outputs)
    >>> import tempfile, tensorflow as tf
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_saved_model(model, directory)
    ...     sorted(tf.saved_model.load(path).signatures)
    ['age', 'kind', 'serving_default']
    >>> path.name
    '1'

    Reference:

    - [TensorFlow Serving](https://www.tensorflow.org/tfx/serving/serving_basic)
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "A SavedModel is written by TensorFlow (`pip install "
            "'keras_cross_stitch[tensorflow]'`): save the model with "
            "`model.save('model.keras')`, and with KERAS_BACKEND=tensorflow load it, "
            "`keras.saving.load_model('model.keras', compile=False)`, and export it. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    _check_model(model)
    if from_jpeg:
        _check_takes_images(model)
    inputs = None if sample is None else from_sample(sample, model, from_jpeg)
    local = versions.local(directory)
    with versions.unfinished(local, version) as temporary:
        run = _traced(model)
        inputs, outputs = first_accepted_input(run, model, inputs)
        _check_dense(outputs)
        with _by_faster_layers(run, model, inputs, outputs) as run:
            _write(run, model, temporary, from_jpeg, progress or (lambda line: None))
        compared_on = _compare(temporary, inputs, outputs, model, from_jpeg)
        if finish is not None:
            finish(temporary, compared_on)
        return versions.publish(temporary, local, version)


def _check_model(model: keras.Model) -> None:
    # Only functional models have operations, and so a graph to cut by task.
    functional = isinstance(model, keras.Model) and hasattr(model, "operations")
    outputs = model.output if functional else model
    if not isinstance(outputs, dict):
        raise ValueError(
            "`model` must be a functional model with a dict of task name to output: "
            "join towers with `stitch()`, or give `keras.Model(inputs, {task: "
            f"output, ...}})`. Received: outputs={outputs}"
        )
    check_task_names(outputs)
    for task, values in outputs.items():
        named = _named(task, values)
        tensors = all(isinstance(x, keras.KerasTensor) for x in named.values())
        if not tensors or not all(isinstance(name, str) for name in named):
            raise ValueError(
                f"The output of task '{task}' must be a tensor or a dict of name to "
                f"tensor. Received: {values}"
            )
    names = [name for name, _ in _together(outputs)]
    _check_unique("outputs in the signature 'serving_default'", names)
    inputs = [_served_name(x) for x in model.inputs]
    _check_unique("inputs in the signatures", inputs)
    _check_stateless(model)


def _check_unique(what: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(
            f"The names of the model's {what} must differ. Rename a task, a key of its "
            f"dict of outputs or a `keras.Input`. Received: {names}"
        )


def _layers(model: keras.Model) -> Iterator[Any]:
    """All layers, those of nested models in the place of these."""
    for layer in model.layers:
        yield from _layers(layer) if isinstance(layer, keras.Model) else [layer]


def _tables(model: keras.Model) -> Iterator[Any]:
    """The lookup tables that nested models hold themselves."""
    import tensorflow as tf

    kind = tf.saved_model.experimental.TrackableResource
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            held = keras.tree.flatten(list(vars(layer).values()))
            yield from (x for x in held if isinstance(x, kind))
            yield from _tables(layer)


def _check_stateless(model: keras.Model) -> None:
    for layer in _layers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"Layer '{layer.name}' is stateful: it would carry its state from one "
                "client's request to the next. Build the model with `stateful=False`, "
                "and copy the weights with `set_weights`"
            )


def _check_takes_images(model: keras.Model) -> None:
    shapes = [x.shape for x in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise ValueError(
            "`from_jpeg=True` is for models with one input, (N, H, W, 3). Received a "
            f"model with inputs of shape: {shapes}"
        )
    if (dtype := model.inputs[0].dtype) in ("int8", "bool"):
        raise ValueError(
            "`from_jpeg=True` is for models whose input has a type that holds 0 to "
            f"255, such as uint8 or float32. Received: {dtype}"
        )
    for task in model.output:
        if task == "from_jpeg" or task.endswith("_from_jpeg"):
            raise ValueError(
                "With `from_jpeg=True` signatures of images end in 'from_jpeg': give "
                f"the task another name. Received: {task!r}"
            )


def _named(task: str, values: Any) -> dict[str, Any]:
    """A task's outputs in its signature: those of its dict, or one of its name."""
    return values if isinstance(values, dict) else {task: values}


def _together(outputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """[(name in `serving_default`, value)] of all tasks, in their order."""
    return [
        (f"{task}_{key}" if isinstance(values, dict) else task, value)
        for task, values in outputs.items()
        for key, value in _named(task, values).items()
    ]


def _signatures(outputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The model's outputs as {signature: {name: value}}, serving_default first."""
    by_task = {task: _named(task, values) for task, values in outputs.items()}
    return {"serving_default": dict(_together(outputs)), **by_task}


def _served_name(x: Any) -> str:
    # What TensorFlow makes of an input's name, or should: it refuses some.
    name = re.sub(r"\W", "_", x.name, flags=re.ASCII)
    # Signatures are functions of Python, which has no arguments of some names.
    is_argument = name[0].isalpha() and not keyword.iskeyword(name) and name != "self"
    return name if is_argument else f"arg_{name}"


def _specs(model: keras.Model) -> Any:
    import tensorflow as tf

    def spec(x: Any) -> Any:
        return tf.TensorSpec((None, *x.shape[1:]), x.dtype, name=_served_name(x))

    return keras.tree.map_structure(spec, model.input)


def _traced(part: keras.Model) -> Callable:
    """`part`, of the model or the model itself, as a function of tensors.

    Traced once, here: Keras and TensorFlow would do it twice when they write.
    """
    import tensorflow as tf

    run = tf.function(lambda inputs: part(inputs, training=False), autograph=False)
    with layer_named("cannot be exported by Keras"):
        concrete = run.get_concrete_function(_specs(part))
    return lambda inputs: concrete(inputs)


@contextlib.contextmanager
def _by_faster_layers(
    run: Callable, model: keras.Model, inputs: Any, outputs: Mapping[str, Any]
) -> Iterator[Callable]:
    """Gives `run` by faster layers, which the model has meanwhile.

    `run` itself where its outputs would differ by more than half of what the export
    allows: the rest is for what TensorFlow rounds in another place when it loads.
    """
    # In a smaller dtype they round in other places.
    changed = exchange(x for x in _layers(model) if x.compute_dtype == "float32")
    try:
        if changed:
            faster = _traced(model)
            pairs = zip(
                *map(keras.tree.flatten, (faster(inputs), outputs)), strict=True
            )
            if any(_difference(x, y, _TOLERANCE / 2) for x, y in pairs):
                put_back(changed)
            else:
                run = faster
        yield run
    finally:
        put_back(changed)


def _check_dense(outputs: Mapping[str, Any]) -> None:
    import tensorflow as tf

    for task, values in outputs.items():
        for value in keras.tree.flatten(values):
            if not isinstance(value, tf.Tensor):
                raise ValueError(
                    f"The output of task '{task}' must be dense to be served (see "
                    "`sparse=` and `ragged=` of the layer that gives it). Received: "
                    f"{type(value).__name__}"
                )


def _write(
    run: Callable,
    model: keras.Model,
    path: pathlib.Path,
    from_jpeg: bool,
    progress: Callable[[str], Any],
) -> None:
    import tensorflow as tf

    archive = keras.export.ExportArchive()
    # Not the model, which would be traced again, nor what only has variables, which
    # would be written twice.
    for layer in filter(_may_hold_tables, _layers(model)):
        archive.track(layer)
    for table in _tables(model):
        archive.track(table)
    specs = _specs(model)

    def add(
        signature: str, function: Callable, inputs: Any, outputs: Mapping[str, Any]
    ) -> None:
        archive.add_endpoint(signature, function, [inputs])
        names = [
            ", ".join(x.name for x in keras.tree.flatten(inputs)),
            ", ".join(outputs),
        ]
        progress(f"{signature}: {names[0]} -> {names[1]}")

    def together(inputs: Any) -> dict[str, Any]:
        return _signatures(run(inputs))["serving_default"]

    image_bytes = tf.TensorSpec((None,), "string", name="image_bytes")
    parts = _signatures(model.output)
    of_all = parts.pop("serving_default")
    add("serving_default", together, specs, of_all)
    if from_jpeg:
        name = _from_jpeg_name("serving_default")
        add(name, _from_jpeg(together, model), image_bytes, of_all)
    for task, outputs in parts.items():
        part = _traced(keras.Model(model.input, outputs))
        add(task, part, specs, outputs)
        if from_jpeg:
            function = _from_jpeg(part, model)
            add(_from_jpeg_name(task), function, image_bytes, outputs)
    # The gradients of custom gradients are not served, and take minutes to trace.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    archive.write_out(str(path), options=options, verbose=False)


def _may_hold_tables(layer: Any) -> bool:
    import tensorflow as tf

    holders = (keras.layers.Layer, tf.saved_model.experimental.TrackableResource)
    held = keras.tree.flatten(list(vars(layer).values()))
    return any(isinstance(x, holders) for x in held)


def _from_jpeg_name(signature: str) -> str:
    return "from_jpeg" if signature == "serving_default" else f"{signature}_from_jpeg"


def _from_jpeg(run: Callable, model: keras.Model) -> Callable:
    import tensorflow as tf

    size = model.inputs[0].shape[1:3]

    def decode(image_bytes: Any) -> Any:
        image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
        if None not in size:
            image = tf.image.resize(image, size, antialias=True)
            if "int" in model.inputs[0].dtype:
                image = tf.round(image)  # a cast would cut off, half a grey too dark
        return tf.cast(image, model.inputs[0].dtype)

    def run_from_jpeg(image_bytes: Any) -> Any:
        spec = tf.TensorSpec((*size, 3), model.inputs[0].dtype)
        images = tf.map_fn(decode, image_bytes, fn_output_signature=spec)
        return run(keras.tree.pack_sequence_as(model.input, [images]))

    return run_from_jpeg


def _compare(
    path: pathlib.Path,
    inputs: Any,
    outputs: Mapping[str, Any],
    model: keras.Model,
    from_jpeg: bool,
) -> dict[str, Any]:
    """Raises where they differ; returns the inputs by their names in signatures."""
    import tensorflow as tf

    with _quiet():
        loaded = tf.saved_model.load(str(path))
    tensors = keras.tree.flatten(inputs)
    names = [_served_name(x) for x in model.inputs]
    by_name = dict(zip(names, tensors, strict=True))
    for signature, expected in _signatures(outputs).items():
        _check_equal(signature, loaded.signatures[signature](**by_name), expected)
        if from_jpeg:
            # PNG is lossless, and the size is the model's: the same pixels arrive.
            files = [tf.io.encode_png(image) for image in tf.cast(tensors[0], "uint8")]
            signature = _from_jpeg_name(signature)
            served = loaded.signatures[signature](image_bytes=tf.stack(files))
            _check_equal(signature, served, expected)
    return by_name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # TensorFlow warns of each custom gradient that was not written.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_equal(
    signature: str, served: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    for name, value in expected.items():
        difference = _difference(served[name], value)
        if difference:
            raise RuntimeError(
                f"Signature '{signature}' of the exported model gives another "
                f"'{name}' than the model: {difference}. Nothing was written. Look for "
                "a layer that is random or keeps a state when it predicts, and for NaN "
                "weights; or give inputs that the model was made for as `sample=` "
                "(`--images`)"
            )


def _difference(served: Any, expected: Any, tolerance: float = _TOLERANCE) -> str:
    """How two tensors differ, in words; empty where they do not."""
    is_float = expected.dtype.is_floating
    served, expected = served.numpy(), expected.numpy()
    if served.shape != expected.shape:
        return f"its shape is {served.shape} where {expected.shape} is expected"
    if not is_float:
        count = np.count_nonzero(served != expected)
        return f"{count} of {expected.size} values differ" if count else ""
    served, expected = served.astype("float64"), expected.astype("float64")
    unequal = served != expected  # equal infinities have no difference; NaN has
    difference = np.abs(served[unequal] - expected[unequal]).max(initial=0)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    # Written so that a NaN is a failure.
    if not difference <= tolerance * scale:
        return f"they differ by {difference:.2g} where the largest is {scale:.2g}"
    return ""
