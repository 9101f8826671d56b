"""A model to a SavedModel with one signature per task; does not serve it.

The only module that needs TensorFlow; it is imported inside the functions, so that
the library runs on the other backends without it.
"""

import contextlib
import pathlib
import tempfile

import keras
import numpy as np

from keras_cross_stitch.networks import check_task_names

_SIDE = 64  # pixels, to compare models of unknown height and width
_TOLERANCE = 1e-5  # relative to the largest output


def export_saved_model(model, directory, *, version=None, from_jpeg=False, finish=None):
    """Writes a multi-task model as the next version of a served model.

    Each task is a signature that runs only the layers which that task needs;
    `serving_default` runs all tasks. The model is written under a temporary name,
    loaded back, compared with `predict` on random input, and only then renamed to
    its version: TensorFlow Serving never sees half a model, nor a wrong one.

    Args:
        model: Functional `keras.Model` with a dict of task name to output, such as
            `stitch` returns. A task's output is a tensor or a dict of tensors.
        directory: Local folder of the served model, made if it does not exist.
            Versions are its subfolders.
        version: Positive integer. Defaults to one above the highest that is there.
        from_jpeg: Whether to add a signature `<task>_from_jpeg` per task that takes
            encoded images. The model must have one input, `(N, H, W, 3)`.
        finish: Optional function of the version's folder and of the inputs that it
            was compared on, `{name in the signatures: array}`. Called before the
            version gets its name: to add to `assets.extra/` what is served with the
            model. What it raises ends the export.

    Returns:
        `pathlib.Path`, the folder written: `<directory>/<version>`.

    Signatures:
        `<task>`: from the model's inputs, by their names, with any batch size, to
            the task's output under the task's name, or to those of its dict under
            their keys.
        `serving_default`: the same for all tasks; the outputs of a task with a dict
            are named `<task>_<key>`.
        `<task>_from_jpeg`: from `image_bytes` `(N,)`, JPEG or PNG files as strings.
            They are decoded and resized (bilinear, antialiased, whatever the aspect
            ratio) to the model's input, as RGB in [0, 255]. Where the model's height
            or width is unknown, they stay as they are, and those of one batch must
            be of one size.

    Raises:
        ValueError: For a model without a dict of outputs, a version that exists, a
            directory that cannot be written to, or images for a model that takes
            none.
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
            "A SavedModel is written by TensorFlow: save the model with "
            "`model.save('model.keras')`, and load and export it with "
            "KERAS_BACKEND=tensorflow. Received: backend="
            f"{keras.backend.backend()!r}"
        )
    _check_model(model)
    if from_jpeg:
        _check_takes_images(model)
    with _published(pathlib.Path(directory), version) as (temporary, path):
        _write(model, temporary, from_jpeg)
        inputs = _compare(model, temporary, from_jpeg)
        if finish is not None:
            finish(temporary, inputs)
    return path


def _check_model(model):
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
        tensors = values.values() if isinstance(values, dict) else [values]
        if not all(isinstance(x, keras.KerasTensor) for x in tensors):
            raise ValueError(
                f"The output of task '{task}' must be a tensor or a dict of tensors. "
                f"Received: {values}"
            )


def _check_takes_images(model):
    shapes = [x.shape for x in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise ValueError(
            "`from_jpeg=True` is for models with one input, (N, H, W, 3). Received a "
            f"model with inputs of shape: {shapes}"
        )


@contextlib.contextmanager
def _published(directory, version):
    """Gives a path to write to and the version's, which it becomes in the end."""
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path = _version_path(directory, version)
            # TensorFlow Serving passes over names that are not numbers.
            folder = tempfile.TemporaryDirectory(prefix=".export-", dir=directory)
        except OSError as error:
            raise ValueError(
                "`directory` must be a folder that can be written to. Received: "
                f"directory='{directory}' ({error.strerror})"
            ) from error
        with folder:
            # One deeper, since only its owner may enter a temporary directory.
            temporary = pathlib.Path(folder.name) / path.name
            yield temporary, path
            temporary.rename(path)
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _version_path(directory, version):
    versions = {int(path.name) for path in directory.iterdir() if path.name.isdecimal()}
    if version is None:
        version = max(versions, default=0) + 1
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"`version` must be a positive integer. Received: version={version!r}"
        )
    if version in versions:
        raise ValueError(
            f"'{directory}' already has version {version}: remove it, or leave out "
            f"`version` for the next one, {max(versions) + 1}"
        )
    return directory / str(version)


def _signatures(outputs):
    """The model's outputs as {signature: {name: value}}, serving_default first."""
    by_task = {
        task: values if isinstance(values, dict) else {task: values}
        for task, values in outputs.items()
    }
    together = {
        f"{task}_{key}" if isinstance(outputs[task], dict) else task: value
        for task, values in by_task.items()
        for key, value in values.items()
    }
    return {"serving_default": together, **by_task}


def _write(model, path, from_jpeg):
    import tensorflow as tf

    def spec(x):
        return tf.TensorSpec((None, *x.shape[1:]), x.dtype, name=x.name)

    archive = keras.export.ExportArchive()
    inputs = keras.tree.map_structure(spec, model.input)
    for signature, outputs in _signatures(model.output).items():
        part = keras.Model(model.input, outputs)
        run = archive.add_endpoint(signature, part.__call__, [inputs])
        if from_jpeg and signature != "serving_default":
            archive.add_endpoint(
                f"{signature}_from_jpeg",
                _from_jpeg(run, model),
                [tf.TensorSpec((None,), "string", name="image_bytes")],
            )
    archive.write_out(str(path), verbose=False)


def _from_jpeg(run, model):
    import tensorflow as tf

    size = model.inputs[0].shape[1:3]

    def decode(image_bytes):
        image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
        if None not in size:
            image = tf.image.resize(image, size, antialias=True)
        return tf.cast(image, model.inputs[0].dtype)

    def run_from_jpeg(image_bytes):
        spec = tf.TensorSpec((*size, 3), model.inputs[0].dtype)
        images = tf.map_fn(decode, image_bytes, fn_output_signature=spec)
        return run(keras.tree.pack_sequence_as(model.input, [images]))

    return run_from_jpeg


def _compare(model, path, from_jpeg):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    inputs = keras.tree.map_structure(_random, model.input)
    arrays = keras.tree.flatten(inputs)
    by_name = {x.name: array for x, array in zip(model.inputs, arrays, strict=True)}
    # Without XLA, which rounds otherwise than the loaded graph does.
    reference = keras.Model(model.input, model.output)
    reference.jit_compile = False
    outputs = reference.predict(inputs, verbose=0)
    for signature, expected in _signatures(outputs).items():
        _check_equal(signature, loaded.signatures[signature](**by_name), expected)
        if from_jpeg and signature != "serving_default":
            # PNG is lossless, and the size is the model's: the same pixels arrive.
            files = [tf.io.encode_png(image.astype("uint8")) for image in arrays[0]]
            signature = f"{signature}_from_jpeg"
            served = loaded.signatures[signature](image_bytes=tf.stack(files))
            _check_equal(signature, served, expected)
    return by_name


def _random(x):
    shape = [size or (2 if axis == 0 else _SIDE) for axis, size in enumerate(x.shape)]
    # Whole numbers, as pixels are; indices and masks only have 0 and 1 for sure.
    high = 256 if x.dtype.startswith(("float", "bfloat")) else 2
    return np.random.default_rng().integers(high, size=shape).astype(x.dtype)


def _check_equal(signature, served, expected):
    for name, value in expected.items():
        value = value.astype("float64")
        difference = np.abs(served[name].numpy().astype("float64") - value).max()
        scale = np.abs(value).max()
        # Written so that a NaN is a failure.
        if not difference <= _TOLERANCE * scale:
            raise RuntimeError(
                f"Signature '{signature}' of the exported model gives another "
                f"'{name}' than `model.predict`: they differ by {difference:.2g} "
                f"where the largest value is {scale:.2g}. Nothing was written. Look "
                "for a layer that is random when it predicts, and for NaN weights"
            )
