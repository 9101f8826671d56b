"""What a command is given, checked: a model's file, and images to try it on."""

import pathlib
import textwrap
from collections.abc import Iterable, Mapping

import keras
import numpy as np
import tensorflow as tf

from export.client import regions
from export.client.arrays import as_array, cast_to
from export.client.client import pictures_in


def load_model(path: pathlib.Path) -> keras.Model:
    """The multi-task model in a `.keras` file."""
    expected = (
        f"Expected a multi-task model, saved by `model.save('{path.stem}.keras')`"
    )
    if not path.is_file():
        raise ValueError(f"{expected}. There is no file {path}")
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises all kinds on what is no model
        # Before its reason, Keras says the config of a whole model.
        reason = str(error).rpartition("Exception encountered:")[2]
        why = textwrap.shorten(reason, 300) or type(error).__name__
        if "Could not locate" in why:
            expected = (
                "Expected a model of Keras's classes and ours. With a class of your "
                "own, call `export_saved_model` in the program that defines it"
            )
        raise ValueError(f"{expected}. Received: {path} ({why})") from error
    if not isinstance(getattr(model, "output", None), dict):
        raise ValueError(
            f"{expected}, with a dict of task name to output, such as `stitch()` "
            f"makes. Received: {path}, with outputs {getattr(model, 'output', None)}"
        )
    return model


def load_images(path: pathlib.Path, model: keras.Model) -> list[np.ndarray]:
    """A folder of JPEG and PNG files, or a file of arrays, as the model takes it.

    Regions, for a model that takes an image and them, are searched for in a folder's
    files.

    Returns:
        An array for each of the model's inputs, in their order.
    """
    specs = {x.name: x for x in model.inputs}
    if path.is_dir() and (len(specs) == 1 or regions.taken_by(specs)):
        read = _read_folder(path, specs)
        given = {name: _pixels(array, specs[name]) for name, array in read.items()}
    elif path.suffix == ".npy" and path.is_file() and len(specs) == 1:
        given = {name: _read_array(path) for name in specs}
    elif path.suffix == ".npz" and path.is_file():
        given = _read_arrays(path, specs)
    else:
        raise ValueError(
            "--images must be a folder of JPEG or PNG files, for models with one input "
            "or with `image` and `rois`; a .npy file, for one input; or a .npz file "
            f"with an array for each of {list(specs)}. Received: {path}"
        )
    for name, spec in specs.items():
        _check_shape(given[name], spec, path)
    lengths = [len(given[name]) for name in specs]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"--images: the arrays must have one length. Received: {path}, of lengths "
            f"{lengths}"
        )
    return [_as_taken(given[name], spec, path) for name, spec in specs.items()]


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        # np.load would take an .npz too, whatever its name is.
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            "--images must be an array of numbers or text, as `numpy.save` writes it. "
            f"Received: {path} ({error})"
        ) from error


def _read_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            given = dict(arrays)
    except Exception as error:  # NumPy raises all kinds on what is none
        raise ValueError(
            "--images must be arrays of numbers or text, as `numpy.savez` writes them. "
            f"Received: {path} ({error})"
        ) from error
    if given.keys() != set(names):
        raise ValueError(
            f"--images must hold an array for each of {list(names)}. Received: {path}, "
            f"with {list(given)}"
        )
    return given


def _read_folder(
    path: pathlib.Path, specs: Mapping[str, keras.KerasTensor]
) -> dict[str, np.ndarray]:
    """{input name: array}."""
    files = pictures_in(path)
    if regions.taken_by(specs):
        images = [_read_image(file) for file in files]
        return regions.Pictures(images, specs[regions.IMAGE].shape[1:3]).inputs
    ((name, spec),) = specs.items()
    if len(spec.shape) != 4 or spec.shape[-1] != 3:
        raise ValueError(
            "--images: a folder is for models that take (N, H, W, 3): give a .npy "
            f"file. The model takes {spec.shape}"
        )
    images = [_read_image(file, spec.shape[1:3]) for file in files]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"--images: a model of any size needs images of one size. Received: {sizes}"
        )
    return {name: np.stack(images)}


def _read_image(
    file: pathlib.Path, size: tuple[int | None, ...] = (None, None)
) -> np.ndarray:
    """Decoded and, to a size, resized as the signatures `<task>_from_jpeg` do."""
    try:
        image = tf.io.decode_image(file.read_bytes(), 3, expand_animations=False)
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(f"--images: {file} is no JPEG or PNG image") from error
    if None not in size:
        image = tf.image.resize(image, size, antialias=True)
    return image.numpy()


def _pixels(array: np.ndarray, spec: keras.KerasTensor) -> np.ndarray:
    """In the model's dtype, to the nearest whole number where it takes these."""
    return (np.round(array) if "int" in spec.dtype else array).astype(spec.dtype)


def _check_shape(
    array: np.ndarray, spec: keras.KerasTensor, path: pathlib.Path
) -> None:
    fits = array.ndim == len(spec.shape) and all(
        size in (None, given)
        for size, given in zip(spec.shape[1:], array.shape[1:], strict=True)
    )
    if not fits or not len(array):
        raise ValueError(
            f"--images: the model takes '{spec.name}' of shape {spec.shape}. Received: "
            f"{path}, of shape {array.shape}"
        )


def _as_taken(
    array: np.ndarray, spec: keras.KerasTensor, path: pathlib.Path
) -> np.ndarray:
    """In the model's dtype, where that changes no value; text as bytes."""
    dtype = np.dtype(object if spec.dtype == "string" else spec.dtype)
    try:
        taken = cast_to(as_array(array, spec.name), dtype, spec.name)
    except ValueError as error:
        raise ValueError(f"--images: {error}. Received: {path}") from error
    if taken.dtype != dtype:
        raise ValueError(
            f"--images: the model takes {spec.dtype} as '{spec.name}'. Received: "
            f"{path}, of {array.dtype}"
        )
    return taken
