"""Selective search: where the objects of an image might be, kept with the data.

Any data set with an `image` has proposals, and with `objects` a recall.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from keras_cross_stitch import selective_search
from training.files import kept_with, unfinished

MOST = 1000  # of an image


def prepare(builder: tfds.core.DatasetBuilder, splits: Iterable[str]) -> None:
    """Searches the images of each split, once, and prints the recall that results.

    One process at a time, see `prepared.locked`.
    """
    for split in splits:
        path = _path(builder, split)
        if path.exists():
            continue
        images = (example["image"] for example in _stored(builder, split, "image"))
        # Threads are enough for all cores: OpenCV releases the GIL.
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            found = executor.map(search, images)
            total = builder.info.splits[split].num_examples
            boxes = list(track(found, f"Proposals, {split}", total=total))
        with unfinished(path) as temporary:
            np.save(temporary, pad(boxes))
        Console().print(
            f"Proposals of {builder.name}, {split}: {np.mean([*map(len, boxes)]):.0f} "
            f"an image, recall at IoU 0.5: {recall(builder, split):.3f}"
        )


def load(builder: tfds.core.DatasetBuilder, split: str, most: int = MOST) -> np.ndarray:
    """The proposals of a split's images in order, (N, P, 4): see `search`, `pad`."""
    return np.load(_path(builder, split))[:, :most]


def digest(builder: tfds.core.DatasetBuilder, splits: Iterable[str]) -> str:
    """What identifies the proposals of these splits."""
    total = hashlib.sha256()
    for split in splits:
        total.update(_path(builder, split).read_bytes())
    return total.hexdigest()


def search(image: np.ndarray, most: int = MOST) -> np.ndarray:
    """Proposals for an image, the largest first.

    Args:
        image: Array (H, W, 3), uint8, RGB.
        most: Integer, how many boxes at most.

    Returns:
        Array (P, 4), float32: top, left, bottom, right, as shares of the image.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = selective_search(image, most).T
    shares = [top / height, left / width, bottom / height, right / width]
    return np.stack(shares, axis=1).astype("float32")


def pad(boxes: list[np.ndarray]) -> np.ndarray:
    """List of boxes (P, 4) as one array (N, P, 4); boxes without area fill it up."""
    padded = np.zeros((len(boxes), max(map(len, boxes), default=0), 4), "float32")
    for row, of_image in zip(padded, boxes, strict=True):
        row[: len(of_image)] = of_image
    return padded


def recall(builder: tfds.core.DatasetBuilder, split: str, most: int = MOST) -> float:
    """The share of a split's objects that some proposal overlaps at IoU 0.5."""
    examples = _stored(builder, split, "objects")
    best = [
        _overlap(example["objects"]["bbox"], boxes)
        for example, boxes in zip(examples, load(builder, split, most), strict=True)
    ]
    return float(np.mean(np.concatenate(best) >= 0.5))


def _overlap(objects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The IoU of each object with its best proposal."""
    overlaps = keras.utils.bounding_boxes.compute_iou(objects, boxes, "yxyx")
    return keras.ops.convert_to_numpy(overlaps).max(axis=1, initial=0)


def _stored(
    builder: tfds.core.DatasetBuilder, split: str, feature: str
) -> Iterable[dict[str, Any]]:
    """The examples of a split with only that feature, one by one."""
    decoders = tfds.decode.PartialDecoding({feature: True})
    return tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))


def _path(builder: tfds.core.DatasetBuilder, split: str) -> Path:
    return kept_with(builder.data_path, "proposals", split)
