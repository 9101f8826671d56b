"""Images: files that others wrote, checked, and how maps of labels are stored."""

from pathlib import Path

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import tensorflow as tf

from training.datasets.files import read_as

ANEW = "Write the file anew."
VOID = 255  # in a map of classes, a pixel without one


def read_image(
    path: Path,
    dtype: type | np.dtype,
    shape: tuple[int, ...],
    remedy: str = ANEW,
) -> np.ndarray:
    """Reads an image as it is stored, and checks that it is what is expected.

    Args:
        path: The file.
        dtype: `uint8`, or `uint16` of a PNG.
        shape: `(H, W)` or `(H, W, 3)`.
        remedy: What to do where it is another one, a sentence.
    """
    encoded, image = _opened(path)
    if image is None or image.dtype != dtype or image.shape != shape:
        received = "no image" if image is None else f"{image.dtype} {image.shape}"
        raise ValueError(
            f"Expected a {np.dtype(dtype)} image of shape {shape} in {path}. "
            f"Received: {received}. {ANEW if image is None else remedy}"
        )
    try:
        # Training decodes with TensorFlow, which refuses files that OpenCV mends.
        decoded = tf.io.decode_image(encoded, dtype=tf.as_dtype(dtype)).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"Expected a whole JPEG or PNG image in {path}. TensorFlow cannot read it: "
            f"{error.message.splitlines()[0]}. {ANEW}"
        ) from error
    if decoded.ndim == 4:  # as TensorFlow has those of which there may be several
        raise ValueError(
            f"Expected a JPEG or PNG image in {path}. Received: one as animations are "
            f"stored, a GIF or WebP. {ANEW}"
        )
    return decoded.reshape(shape) // _scale(encoded)


def stored_as(path: Path) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape, `(H, W)` or `(H, W, channels)`, of an image file."""
    _, image = _opened(path)
    if image is None:
        raise ValueError(f"Expected an image in {path}. Received: no image. {ANEW}")
    return image.dtype, image.shape


def orientation(path: Path) -> int:
    """How EXIF says that an image is turned: 1 for one that is upright."""
    with read_as("an image", path, ANEW), PIL.Image.open(path) as image:
        return image.getexif().get(PIL.ExifTags.Base.Orientation, 1)


def is_jpeg(path: Path) -> bool:
    """Whether the file is one, whatever its name says."""
    return path.read_bytes().startswith(b"\xff\xd8")


def encode_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit normals as uint8; undefined ones as (0, 0, 0), which no unit one gets."""
    defined = normals.any(axis=-1, keepdims=True)
    return np.where(defined, np.round((normals + 1) / 2 * 255), 0).astype(np.uint8)


def _scale(encoded: bytes) -> int:
    """By what decoders multiply grey values of 1, 2 or 4 bits, so that they fill 8.

    The 1 of a PNG of two colours, a mask, is read as 255.
    """
    bits, colours = encoded[24:26]  # of a PNG's header
    narrow = encoded.startswith(b"\x89PNG") and not colours and bits < 8
    return 255 // (2**bits - 1) if narrow else 1


def _opened(path: Path) -> tuple[bytes, np.ndarray | None]:
    with read_as("an image", path, ANEW):
        encoded = path.read_bytes()
        array = np.frombuffer(encoded, np.uint8)
        return encoded, cv2.imdecode(array, cv2.IMREAD_UNCHANGED) if encoded else None
