"""AlexNet's weights from elsewhere, converted to the towers' layers.

An `.npz` of plain arrays, in one of two layouts: torchvision's ("features.0.weight",
...), or that of Caffe's reference net ("conv1.weight", "conv1.bias", ..., BGR,
convolutions in two groups). Caffe's is offered as an `.npy` that holds a pickle, which
may run any code when it is read: it is refused, with the lines that convert it.
"""

import os

import keras
import numpy as np

from training.datasets.files import read_as

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
PARTS = ("weight", "bias")
_TORCHVISION = dict(
    zip(
        LAYERS,
        (*(f"features.{k}" for k in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4"),
        strict=True,
    )
)
_CAFFE_MEAN = np.array([123.68, 116.779, 103.939])  # RGB, in [0, 255]
_TORCHVISION_MEAN = 255 * np.array([0.485, 0.456, 0.406])
_TORCHVISION_STD = 255 * np.array([0.229, 0.224, 0.225])
_CONVERT = (
    "A state dict of torchvision's is written as one by "
    "`np.savez('alexnet.npz', **{k: v.numpy() for k, v in state.items()})`. An .npy "
    "with Caffe's layers is a pickle, and may run any code that its author put there. "
    "If you trust them, convert it: `w = np.load('alexnet.npy', allow_pickle=True, "
    "encoding='latin1').item()`, then `np.savez('alexnet.npz', **{f'{k}.{part}': x "
    "for k, v in w.items() for part, x in zip(('weight', 'bias'), v)})`"
)


def load(model: keras.Model, path: str | os.PathLike) -> None:
    """Sets conv1 to fc7 of an AlexNet tower to the weights of a file.

    A layer of the tower that is wider than the file's, as conv1 and conv2 are than
    torchvision's, keeps its own start in the filters that are left, and what reads
    those begins at zero: so the tower computes what the file's net does, and learns on.

    Args:
        model: The tower, of width 1, whose conv1 to fc7 take RGB in [-1, 1].
        path: Path of the `.npz`.

    Raises:
        ValueError: If the file has another layout, or other shapes.
    """
    for name, (kernel, bias) in read(path).items():
        layer = model.get_layer(name)
        own_kernel, own_bias = layer.get_weights()
        fits = len(kernel.shape) == len(own_kernel.shape) and all(
            a <= b for a, b in zip(kernel.shape, own_kernel.shape, strict=True)
        )
        if not fits or kernel.shape[:-2] != own_kernel.shape[:-2]:
            raise ValueError(
                f"Expected weights for {name} of shape {own_kernel.shape} in {path}. "
                f"Received: {kernel.shape}. The weights are those of an AlexNet of "
                "width 1"
            )
        inputs, outputs = kernel.shape[-2:]
        own_kernel[..., inputs:, :outputs] = 0
        own_kernel[..., :inputs, :outputs] = kernel
        own_bias[:outputs] = bias
        layer.set_weights([own_kernel, own_bias])


def read(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The weights of a file as {layer: (kernel, bias)}, as Keras lays them out.

    They take RGB in [-1, 1], as `keras_cross_stitch.alexnet` scales it.
    """
    with read_as("AlexNet's weights, an .npz of arrays,", path, _CONVERT):
        with open(path, "rb") as file:
            arrays = dict(np.load(file, allow_pickle=False))
        for names, converted in (
            (LAYERS, _from_caffe),
            (_TORCHVISION.values(), _from_torchvision),
        ):
            if {f"{x}.{part}" for x in names for part in PARTS} <= arrays.keys():
                return converted(arrays)
        raise ValueError(f"It holds: {', '.join(arrays) or 'no array'}")


def _from_caffe(
    arrays: dict[str, np.ndarray],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    kernels = {name: arrays[f"{name}.weight"] for name in LAYERS}
    biases = {name: arrays[f"{name}.bias"] for name in LAYERS}
    for name in ("conv2", "conv4", "conv5"):
        kernels[name] = _ungrouped(kernels[name])
    kernels["conv1"], biases["conv1"] = _rescaled(
        kernels["conv1"][..., ::-1, :], biases["conv1"], _CAFFE_MEAN, np.ones(3)
    )
    return {name: (kernels[name], biases[name]) for name in LAYERS}


def _from_torchvision(
    arrays: dict[str, np.ndarray],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    weights = {}
    for name, theirs in _TORCHVISION.items():
        kernel, bias = arrays[f"{theirs}.weight"], arrays[f"{theirs}.bias"]
        if name == "fc6":  # (units, C * 6 * 6) to (6 * 6 * C, units)
            by_cell = kernel.reshape(len(kernel), -1, 6, 6).transpose(2, 3, 1, 0)
            kernel = by_cell.reshape(-1, len(kernel))
        else:  # (out, in, [H, W]) to ([H, W], in, out)
            kernel = np.moveaxis(kernel, (1, 0), (-2, -1))
        weights[name] = (kernel, bias)
    weights["conv1"] = _rescaled(*weights["conv1"], _TORCHVISION_MEAN, _TORCHVISION_STD)
    return weights


def _ungrouped(kernel: np.ndarray) -> np.ndarray:
    """A convolution in two groups as one: each half of the filters reads its half."""
    _, _, inputs, outputs = kernel.shape
    whole = np.zeros((*kernel.shape[:2], 2 * inputs, outputs), kernel.dtype)
    whole[:, :, :inputs, : outputs // 2] = kernel[..., : outputs // 2]
    whole[:, :, inputs:, outputs // 2 :] = kernel[..., outputs // 2 :]
    return whole


def _rescaled(
    kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """From a kernel on `(pixel - mean) / std` to one on `pixel / 127.5 - 1`."""
    kernel = kernel / std[:, None]
    bias = bias + np.einsum("hwio,i->o", kernel, 127.5 - mean)
    return 127.5 * kernel, bias
