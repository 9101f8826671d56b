"""Layers for towers over the regions of an image; knows nothing of tasks.

A region (RoI) is a box: left, top, right, bottom in pixels of the image. Boxes without
area fill up where an image has fewer than another; they give no detections.
"""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

_SAMPLES = 2  # in each direction of a cell, as in Mask R-CNN
_DROPPED = -1.0  # in the place of a score: no probability, so no threshold lets it pass


@keras.saving.register_keras_serializable("keras_cross_stitch")
class RoIAlign(layers.Layer):
    """Pools what a map holds of each region to one size, by bilinear sampling.

    Each region is cut into `size` x `size` cells. The value of a cell is the mean of
    four points of the map, and each point is interpolated between its four neighbours.
    This is linear in the map, for rows and columns separately. So it is computed as two
    products of matrices, which are fast, and so is their gradient:

        output[r, i, j] = sum_{y, x} rows[r, i, y] * columns[r, j, x] * map[y, x]

    Args:
        size: Integer, cells of a side.
        stride: Integer, pixels of the image from one position of the map to the next.
        first: Float, the pixel coordinate of the centre of the map's first position,
            in both directions. Defaults to `stride / 2`. Padding on one side only
            ("same" with an even size and a stride of 2) moves this centre.
        **kwargs: Arguments of every Keras layer, such as `name`.

    Input shape:
        List of the map, `(N, H, W, C)`, and the regions, `(N, R, 4)`: left, top, right,
        bottom in pixels of the image.

    Output shape:
        `(N, R, size, size, C)`

    Raises:
        ValueError: For a `size` or `stride` below 1, or for inputs that are not a map
            and regions.

    Example:

    The mean of a map whose value is its column, in its right half:

    >>> columns = keras.ops.broadcast_to(keras.ops.arange(8.0)[:, None], (1, 8, 8, 1))
    >>> regions = [[[64.0, 0.0, 128.0, 128.0]]]
    >>> pooled = RoIAlign(size=1, stride=16)([columns, keras.ops.array(regions)])
    >>> tuple(pooled.shape), float(pooled[0, 0, 0, 0, 0])
    ((1, 1, 1, 1, 1), 5.5)

    Reference:

    - [He et al., 2017](https://arxiv.org/abs/1703.06870), section 3
    """

    def __init__(
        self, size: int, stride: int, first: float | None = None, **kwargs: Any
    ) -> None:
        # Coordinates stay float32: in bfloat16, 201 pixels are 200.
        super().__init__(autocast=False, **kwargs)
        if size < 1 or stride < 1:
            raise ValueError(
                "`size` and `stride` must be positive integers. Received: "
                f"size={size}, stride={stride}"
            )
        self.size = size
        self.stride = stride
        self.first = stride / 2 if first is None else first

    def build(self, input_shape: Any) -> None:
        shapes = [tuple(shape) for shape in input_shape]
        if [len(shape) for shape in shapes] != [4, 3] or shapes[1][-1] != 4:
            raise ValueError(
                f"Layer '{self.name}' must be called with a map (N, H, W, C) and "
                f"regions (N, R, 4). Received: shapes={shapes}"
            )

    def call(self, inputs: Any) -> Any:
        maps, regions = inputs
        batch, height, width, channels = ops.shape(maps)
        count = ops.shape(regions)[1]
        regions = ops.cast(regions, "float32")
        columns = self._weights(regions[..., 0], regions[..., 2], width)
        rows = self._weights(regions[..., 1], regions[..., 3], height)
        rows = ops.reshape(rows, (batch, count * self.size, height))
        x = ops.reshape(maps, (batch, height, width * channels))
        x = ops.matmul(ops.cast(rows, x.dtype), x)  # (N, R * size, W * C)
        x = ops.reshape(x, (batch, count, self.size, width, channels))
        return ops.matmul(ops.cast(columns, x.dtype)[:, :, None], x)

    def _weights(self, start: Any, end: Any, length: Any) -> Any:
        """Of each position in each cell, along one side: (N, R, size, length)."""
        points = self.size * _SAMPLES
        shares = ops.convert_to_tensor((np.arange(points) + 0.5) / points, "float32")
        pixels = start[..., None] + (end - start)[..., None] * shares  # (N, R, points)
        last = ops.cast(length - 1, "float32")
        places = ops.clip((pixels - self.first) / self.stride, 0.0, last)
        distance = ops.abs(places[..., None] - ops.arange(length, dtype="float32"))
        weights = ops.maximum(1.0 - distance, 0.0)  # (N, R, points, length)
        shape = (*ops.shape(start), self.size, _SAMPLES, length)
        return ops.mean(ops.reshape(weights, shape), axis=3)

    def compute_output_shape(self, input_shape: Any) -> Any:
        maps, regions = input_shape
        return (*regions[:2], self.size, self.size, maps[-1])

    def compute_output_spec(self, inputs: Any) -> Any:
        shape = self.compute_output_shape([x.shape for x in inputs])
        return keras.KerasTensor(shape, inputs[0].dtype)

    def get_config(self) -> dict[str, Any]:
        config = {"size": self.size, "stride": self.stride, "first": self.first}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("keras_cross_stitch")
class Detections(layers.Layer):
    """The objects that Fast R-CNN finds: boxes moved, and duplicates suppressed.

    Each region is moved by the deltas of each class, all multiplied by `variance`: x
    and y by shares of the region's width and height, width and height by powers of e.
    It is cut at the image's border. In each class, boxes that overlap a likelier box
    are dropped. Of the boxes of all classes, the likeliest stay.

    Args:
        image_size: Tuple `(H, W)`, pixels.
        variance: Tuple of 4 floats, by which the deltas are multiplied.
        iou_threshold: Float, above which two boxes are duplicates.
        score_threshold: Float, below which a box is no detection.
        max_detections: Integer, the most objects of an image, without duplicates.
        **kwargs: Arguments of every Keras layer, such as `name`.

    Input shape:
        List of probabilities `(N, R, 1 + classes)`, the first being the background's;
        deltas `(N, R, 4 * classes)`: x, y, width, height of a class, then of the next;
        and regions `(N, R, 4)`: left, top, right, bottom in pixels.

    Output shape:
        Dict of `boxes` `(N, max_detections, 4)`, left, top, right, bottom in pixels;
        `classes` `(N, max_detections)`, int32, 0 being the first after the background;
        `scores` `(N, max_detections)`, falling; and `num_detections` `(N,)`, int32.
        After the first `num_detections`, boxes and scores are 0, and classes -1.

    Raises:
        ValueError: For inputs whose shapes do not fit each other.

    Example:

    Two regions on one object, and one without area:

    >>> regions = [[[10.0, 10.0, 50.0, 50.0], [12.0, 10.0, 52.0, 50.0], [0.0] * 4]]
    >>> probabilities = [[[0.1, 0.9], [0.2, 0.8], [0.0, 1.0]]]
    >>> inputs = [probabilities, keras.ops.zeros((1, 3, 4)), regions]
    >>> found = Detections((64, 64))([keras.ops.array(x) for x in inputs])
    >>> found = {name: keras.ops.convert_to_numpy(x) for name, x in found.items()}
    >>> found["num_detections"].tolist(), found["boxes"][0, 0].tolist()
    ([1], [10.0, 10.0, 50.0, 50.0])

    Reference:

    - [Girshick, 2015](https://arxiv.org/abs/1504.08083), sections 2.2 and 4
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        variance: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        iou_threshold: float = 0.3,
        score_threshold: float = 0.01,
        max_detections: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.image_size = tuple(image_size)
        self.variance = tuple(variance)
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        self.max_detections = max_detections

    def build(self, input_shape: Any) -> None:
        probabilities, deltas, regions = shapes = [tuple(x) for x in input_shape]
        ranks = [len(shape) for shape in shapes]
        if (
            ranks != [3, 3, 3]
            or regions[-1] != 4
            or deltas[-1] != 4 * (probabilities[-1] - 1)
        ):
            raise ValueError(
                f"Layer '{self.name}' must be called with probabilities (N, R, 1 + "
                "classes), deltas (N, R, 4 * classes) and regions (N, R, 4). Received: "
                f"shapes={shapes}"
            )

    def call(self, inputs: Any) -> dict[str, Any]:
        probabilities, deltas, regions = (ops.cast(x, "float32") for x in inputs)
        boxes, scores = self._candidates(probabilities, deltas, regions)
        boxes, classes, scores = _likeliest(
            boxes, scores, self.iou_threshold, self.max_detections
        )
        found = (scores >= self.score_threshold) & (scores != _DROPPED)
        return {
            "boxes": ops.where(found[..., None], boxes, 0.0),
            "classes": ops.where(found, classes, -1),
            "scores": ops.where(found, scores, 0.0),
            "num_detections": ops.sum(ops.cast(found, "int32"), axis=1),
        }

    def _candidates(self, probabilities: Any, deltas: Any, regions: Any) -> Any:
        """The boxes of each class: (N, classes, R, 4), and (N, classes, R)."""
        classes = probabilities.shape[-1] - 1
        batch, count, _ = ops.shape(regions)
        area = (regions[..., 2] - regions[..., 0]) * (regions[..., 3] - regions[..., 1])
        there = (area > 0) & (regions[..., 2] > regions[..., 0])
        scores = ops.where(there[..., None], probabilities[..., 1:], _DROPPED)
        # One NaN would take all boxes of the image with it.
        scores = ops.where(ops.isnan(scores), _DROPPED, scores)
        # e to the fifth of 20 is enlarging 55 times: it does not overflow.
        deltas = ops.reshape(ops.clip(deltas, -20, 20), (batch, count, classes, 4))
        boxes = keras.utils.bounding_boxes.decode_deltas_to_boxes(
            regions[:, :, None],
            deltas,
            anchor_format="xyxy",
            box_format="xyxy",
            encoded_format="center_xywh",
            variance=self.variance,
        )
        height, width = self.image_size
        border = ops.convert_to_tensor([width, height, width, height], "float32")
        boxes = ops.minimum(ops.maximum(boxes, 0.0), border)
        return ops.transpose(boxes, (0, 2, 1, 3)), ops.transpose(scores, (0, 2, 1))

    def compute_output_spec(self, inputs: Any) -> Any:
        shape = (inputs[0].shape[0], self.max_detections)
        return {
            "boxes": keras.KerasTensor((*shape, 4), "float32"),
            "classes": keras.KerasTensor(shape, "int32"),
            "scores": keras.KerasTensor(shape, "float32"),
            "num_detections": keras.KerasTensor(shape[:1], "int32"),
        }

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "image_size": self.image_size,
            "variance": self.variance,
            "iou_threshold": self.iou_threshold,
            "score_threshold": self.score_threshold,
            "max_detections": self.max_detections,
        }


def _likeliest(boxes: Any, scores: Any, iou_threshold: float, most: int) -> Any:
    """The likeliest boxes of all classes that no likelier one of their class overlaps.

    One after the other, until there are as many as asked for: the likeliest is taken,
    and with it all of its class that overlap it are dropped.

    Returns:
        Boxes (N, most, 4), classes (N, most) and scores (N, most), `_DROPPED` where
        nothing is left.
    """
    # One more, so that an image without regions has a likeliest, too.
    boxes = ops.pad(boxes, ((0, 0), (0, 0), (0, 1), (0, 0)))
    scores = ops.pad(scores, ((0, 0), (0, 0), (0, 1)), constant_values=_DROPPED)
    batch, classes, count, _ = ops.shape(boxes)
    places = ops.reshape(ops.arange(classes * count), (classes, count))

    def take(k: Any, state: Any) -> Any:
        scores, taken = state
        flat = ops.reshape(scores, (batch, classes * count))
        best = ops.argmax(flat, axis=1)[:, None, None]
        score = ops.max(flat, axis=1)
        of_class = best // count  # (N, 1, 1)
        of_its_class = ops.take_along_axis(boxes, of_class[..., None], axis=1)[:, 0]
        box = ops.take_along_axis(of_its_class, best % count, axis=1)  # (N, 1, 4)
        overlaps = keras.utils.bounding_boxes.compute_iou(box, of_its_class, "xyxy")
        duplicate = (overlaps > iou_threshold) & (places // count == of_class)
        gone = duplicate | (places == best)  # (N, classes, R)
        values = [ops.cast(of_class[:, 0, 0], "float32"), score]
        row = ops.concatenate([box[:, 0], ops.stack(values, axis=-1)], axis=-1)
        at_k = ops.arange(most)[:, None] == k
        return (
            ops.where(gone, _DROPPED, scores),
            ops.where(at_k, row[:, None], taken),
        )

    taken = ops.zeros((batch, most, 6))  # a box, its class, its score
    _, taken = ops.fori_loop(0, most, take, (scores, taken))
    return taken[..., :4], ops.cast(taken[..., 4], "int32"), taken[..., 5]
