"""Pictures as a model takes them that takes regions too, and the way back.

The model's image is a picture as large as fits, filled up below and right, as
`training` makes it; its regions are boxes, left, top, right, bottom in that image's
pixels. Who asks knows the picture's own pixels alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from .protocol import ServingError, shape_of

IMAGE, ROIS = "image", "rois"


def taken_by(inputs: Iterable[str]) -> bool:
    """Whether the inputs of these names are an image and regions."""
    return set(inputs) == {IMAGE, ROIS}


class Pictures:
    """Pictures with regions for a model.

    Args:
        images: List of arrays `(H, W, 3)`, uint8.
        size: Height and width of the model's image.
        rois: Optional array `(N, R, 4)`, regions of each picture: left, top, right,
            bottom in its pixels. Defaults to proposals by selective search.

    `inputs` is what the model takes, {name: array}.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        size: Sequence[int | None],
        rois: np.ndarray | None = None,
    ) -> None:
        if not images:
            raise ValueError("There must be at least one picture. Received: none")
        height, width = (side or 0 for side in size)
        if height < 1 or width < 1:
            raise ValueError(
                "Pictures are for a model whose image has a fixed size: give arrays. "
                f"The model's is {tuple(size)}"
            )
        resized = [_resized(image, (height, width)) for image in images]
        filled = np.zeros((len(images), height, width, 3), "float32")
        for place, image in zip(filled, resized, strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        self._borders = _borders(images)
        self._scales = _borders(resized) / self._borders
        if rois is None:
            # An enlarged picture shows nothing more.
            searched = [min(x, key=np.size) for x in zip(images, resized, strict=True)]
            rois = _proposals(searched) * (self._borders / _borders(searched))
        regions = _checked(rois, len(images)) * self._scales
        self.inputs = {IMAGE: filled, ROIS: regions.astype("float32")}

    @classmethod
    def read(
        cls,
        files: Sequence[bytes],
        inputs: Mapping[str, Any],
        rois: np.ndarray | None = None,
    ) -> "Pictures":
        """JPEG or PNG files, as bytes, for a signature's inputs, {name: TensorInfo}."""
        _, *size, _ = shape_of(inputs[IMAGE].tensor_shape)
        return cls(_decoded(files), size, rois)

    def in_their_pixels(
        self, outputs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """An answer with its boxes, and the regions, in pixels of each picture."""
        with_regions = {ROIS: self.inputs[ROIS], **outputs}
        return {
            name: self._back(array) if _are_boxes(name) else array
            for name, array in with_regions.items()
        }

    def _back(self, boxes: np.ndarray) -> np.ndarray:
        return np.clip(boxes / self._scales, 0, self._borders).astype("float32")


def _are_boxes(output: str) -> bool:
    """By the name, before which `serving_default` puts the task's."""
    return output in (ROIS, "boxes") or output.endswith("_boxes")


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            "Pictures for a model that takes regions are made by TensorFlow: `pip "
            "install 'keras_cross_stitch[tensorflow,regions]'`, or give arrays"
        ) from error
    return tensorflow


def _decoded(files: Sequence[bytes]) -> list[np.ndarray]:
    tf = _tensorflow()
    images = []
    for number, file in enumerate(files):
        try:
            image = tf.io.decode_image(file, 3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Image {number} of {len(files)} must be a JPEG or PNG file",
            ) from error
        images.append(image.numpy())
    return images


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tf = _tensorflow()
    scale = min(np.divide(size, image.shape[:2]))
    shape = [max(1, round(scale * x)) for x in image.shape[:2]]
    resized = tf.image.resize(image, shape, antialias=True)
    return resized.numpy().round().astype("uint8")


def _borders(images: Sequence[np.ndarray]) -> np.ndarray:
    """Width, height, width, height of each image, (N, 1, 4)."""
    return np.array([[image.shape[1::-1] * 2] for image in images])


def _proposals(images: Sequence[np.ndarray]) -> np.ndarray:
    """Of each image, (N, R, 4); boxes without area fill up where there are fewer."""
    from keras_cross_stitch import selective_search  # imports Keras, which takes long

    found = [selective_search(image) for image in images]
    regions = np.zeros((len(found), max(map(len, found)), 4))
    for row, boxes in zip(regions, found, strict=True):
        row[: len(boxes)] = boxes
    return regions


def _checked(rois: Any, count: int) -> np.ndarray:
    rois = np.asarray(rois)
    if rois.ndim != 3 or rois.shape[::2] != (count, 4) or not rois.size:
        raise ValueError(
            f"`rois` must be boxes of each picture, ({count}, R, 4), R at least 1: "
            "left, top, right, bottom in its pixels. Received: an array of shape "
            f"{rois.shape}"
        )
    return rois
