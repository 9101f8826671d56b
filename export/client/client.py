"""Asks a served model, over gRPC or REST: TF Serving's or the preview server's."""

import functools
import pathlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2, model_pb2

from export import NAME
from export.client import regions
from export.client.protocol import IMAGES, ServingError, in_words, info_in_words
from export.client.transports import Arrays, Grpc, Rest, Transport

Images = np.ndarray | Mapping[str, np.ndarray] | Sequence[str | pathlib.Path | bytes]

# The codes of a request that the server will never answer.
_OF_THE_REQUEST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
)


class Client:
    """A served model.

    Args:
        address: String, `"host:port"` for gRPC or `"http://host:port"` for REST.
        name: String, the model's name on the server.
        version: Optional integer. Defaults to the server's latest.
        label: Optional string, a version's label. Not together with `version`.
        timeout: Seconds for a question to the server, all tries included. (Before the
            first `predict`, the client asks what the signatures take.)

    Raises:
        ServingError: From each method, with the server's `code` and a message that
            says what the signature takes. A server that is `UNAVAILABLE` is asked
            again until the time is up; nothing else is.

    Example:

    >>> with Client("127.0.0.1:8500") as client:  # doctest: +SKIP
    ...     answer = client.predict("segmentation", ["room.jpg"])
    ...     answer["segmentation"].shape
    (1, 120, 160, 40)
    """

    def __init__(
        self,
        address: str,
        name: str = NAME,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        if version is not None and label is not None:
            raise ValueError(
                "Give `version` or `label`, not both. Received: "
                f"version={version}, label={label!r}"
            )
        self.address = address
        self.timeout = timeout
        spec = model_pb2.ModelSpec(name=name)
        if version is not None:
            spec.version.value = version
        if label is not None:
            spec.version_label = label
        rest = address.startswith(("http://", "https://"))
        self._transport: Transport = (Rest if rest else Grpc)(address, spec)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def predict(
        self, task: str, images: Images, *, rois: np.ndarray | None = None
    ) -> Arrays:
        """Asks for the answer of one task.

        Args:
            task: String, a signature: a task, or `serving_default` for all.
            images: Array with a batch axis, or {input name: array}; or a list of JPEG
                or PNG files (paths or bytes). For files the model must take an `image`
                and `rois`, or have been exported with `--from-jpeg`.
            rois: For files and a model that takes them, the boxes to ask about: array
                (N, R, 4), left, top, right, bottom in pixels of each picture. Defaults
                to proposals by selective search (some tenths of a second a picture,
                which `timeout` does not count).

        Returns:
            {output name: array}, each with a batch axis. With files and a model that
            takes `rois`, these are among them, and they and the outputs named `boxes`
            are in pixels of each picture. Otherwise they are as the model gives them.
        """
        if isinstance(images, str | bytes | pathlib.Path):
            raise TypeError(
                f"`images` must be a list of files. Received: {images!r:.80}"
            )
        signature, given, pictures = self._question(task, images, rois)
        arrays: Arrays = {}
        try:
            arrays = self._inputs(signature, given)
            outputs = self._signatures[signature].outputs
            answer = self._call(
                functools.partial(self._transport.predict, signature, arrays, outputs)
            )
        except ServingError as error:
            if error.code not in _OF_THE_REQUEST:
                raise
            self.__dict__.pop("_signatures", None)  # there may be a new version
            raise self._explained(error, signature, arrays or given) from error
        return pictures.in_their_pixels(answer) if pictures else answer

    def signatures(self) -> dict[str, Any]:
        """The model's signatures, {name: SignatureDef}."""
        return self._call(self._transport.signatures)

    def status(self) -> get_model_status_pb2.GetModelStatusResponse:
        """The states of the model's versions, the latest first."""
        return self._call(self._transport.status)

    # What a signature takes is asked for once, not before every request.
    @functools.cached_property
    def _signatures(self) -> dict[str, Any]:
        return self.signatures()

    def _question(
        self, task: str, images: Images, rois: np.ndarray | None
    ) -> tuple[str, np.ndarray | Mapping[str, np.ndarray], regions.Pictures | None]:
        """The signature, what it is asked, and the `Pictures` where it takes rois."""
        if isinstance(images, np.ndarray | Mapping):
            if rois is not None:
                raise ValueError(
                    '`rois` go with files. Give {"image": array, "rois": array}'
                )
            return task, images, None
        files = [_encoded(image) for image in images]
        known = self._signatures
        if task in known and regions.taken_by(known[task].inputs):
            pictures = regions.Pictures.read(files, known[task].inputs, rois)
            return task, pictures.inputs, pictures
        if rois is not None:
            raise ValueError(
                f"'{task}' must take `image` and `rois` to be given `rois`"
            )
        signature = task if task.endswith(IMAGES) else task + IMAGES
        return signature, np.array(files, dtype=object), None

    def _inputs(
        self, signature: str, images: np.ndarray | Mapping[str, np.ndarray]
    ) -> Arrays:
        """The arrays by name and in the dtype that the signature takes."""
        if signature not in self._signatures:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND, f"There is no signature '{signature}'"
            )
        infos = self._signatures[signature].inputs
        if isinstance(images, np.ndarray):
            if len(infos) != 1:
                raise ServingError(
                    grpc.StatusCode.INVALID_ARGUMENT, "Give {input name: array}"
                )
            images = {next(iter(infos)): images}
        return {
            name: _cast(array, infos[name]) if name in infos else array
            for name, array in images.items()
        }

    def _explained(
        self,
        error: ServingError,
        signature: str,
        sent: np.ndarray | Mapping[str, np.ndarray],
    ) -> ServingError:
        """The error with what the signature expects and what it was sent."""
        try:
            signatures = self._signatures
        except ServingError:
            return error  # there is no such model
        if signature not in signatures:
            # Names with underscores are TensorFlow's own, such as the initializer's.
            known = sorted(name for name in signatures if not name.startswith("__"))
            return ServingError(
                error.code, f"{error.message}. There are: {', '.join(known)}"
            )
        takes = info_in_words(signatures[signature].inputs)
        sent = sent if isinstance(sent, Mapping) else {"images": sent}
        described = (f"{k}: {in_words(_dtype(a), a.shape)}" for k, a in sent.items())
        return ServingError(
            error.code,
            f"{error.message}. Signature '{signature}' takes {takes}. "
            f"Sent: {', '.join(described)}",
        )

    def _call(self, function: Callable[[float], Any]) -> Any:
        """Calls with the time that is left, and again where nobody was there."""
        deadline = time.monotonic() + self.timeout
        pause = 0.05
        while True:
            try:
                return function(max(deadline - time.monotonic(), 0.001))
            except ServingError as error:
                pause *= random.uniform(1.5, 2.5)  # so that clients do not keep step
                late = time.monotonic() + pause > deadline
                if error.code != grpc.StatusCode.UNAVAILABLE or late:
                    raise ServingError(
                        error.code, f"{error.message} (from {self.address})"
                    ) from error
            time.sleep(pause)


def _encoded(image: str | pathlib.Path | bytes) -> bytes:
    return image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()


def _dtype(array: np.ndarray) -> str:
    return "string" if array.dtype == object else array.dtype.name


def _cast(array: np.ndarray, info: Any) -> np.ndarray:
    """Pixels of uint8 or float64 as float32. What a cast would make another kind of
    number stays as it is, and the server refuses it."""
    dtype = tf.as_dtype(info.dtype).as_numpy_dtype
    if np.can_cast(array.dtype, dtype, "same_kind"):
        return array.astype(dtype)
    return array
