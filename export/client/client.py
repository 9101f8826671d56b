"""Asks a served model, over gRPC or REST: TF Serving's or the preview server's."""

import pathlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from . import all_tasks, messages, regions
from .arrays import Arrays, as_array, cast_to
from .protocol import ServingError, array_dtype, in_words, info_in_words, shape_of
from .transports import Grpc, Rest, Transport

File = str | pathlib.Path | bytes
Images = np.ndarray | Mapping[str, Any] | Sequence[File] | str | pathlib.Path

# The codes of a request that the server will never answer.
_OF_THE_REQUEST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
)
_SUFFIXES = (".jpg", ".jpeg", ".png")


class Client:
    """A served model.

    Args:
        address: String, `"host:port"` for gRPC, or `"http://host:port"` or
            `"https://host:port"` for REST.
        name: String, the model's name on the server.
        version: Optional integer. Defaults to the server's latest.
        label: Optional string, a version's label. Not together with `version`.
        timeout: Seconds for a call, with all its parts and tries.
        batch: Integer, the examples of one request at most. More are asked in parts,
            and their answers joined: TF Serving refuses more than its
            `max_batch_size`.

    Raises:
        ServingError: From each method, with the server's `code`. Where `predict` asked
            for what the model does not have or take, the message says what it takes
            and what was sent. A server that is `UNAVAILABLE` is asked again until the
            time is up, and once one whose model turns out to have a new version that
            takes or gives something else; nothing else is.
        ValueError: For an address that is none, and from each method of a client that
            is closed.

    Example:

    >>> with Client("127.0.0.1:8500") as client:  # doctest: +SKIP
    ...     answer = client.predict("segmentation", ["room.jpg"])
    ...     answer["segmentation"].shape
    (1, 120, 160, 40)
    """

    def __init__(
        self,
        address: str,
        name: str = "cross_stitch",
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float = 10.0,
        batch: int = 32,
    ) -> None:
        if version is not None and label is not None:
            raise ValueError(
                "Give `version` or `label`, not both. Received: "
                f"version={version}, label={label!r}"
            )
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1. Received: batch={batch}")
        if not address.partition(":")[2]:
            raise ValueError(
                "`address` must be HOST:PORT for gRPC, such as localhost:8500, or "
                f"http://HOST:PORT for REST. Received: {address}"
            )
        self.address = address
        self.timeout = timeout
        self.batch = batch
        spec = messages.ModelSpec(name=name)
        if version is not None:
            spec.version.value = version
        if label is not None:
            spec.version_label = label
        kind = Rest if "://" in address else Grpc
        self._transport: Transport | None = kind(address, spec)
        self._known: dict[str, Any] | None = None  # the signatures, once asked for

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._transport:
            self._transport.close()
        self._transport = None

    def predict(self, task: str, images: Images, *, rois: Any = None) -> Arrays:
        """Asks for the answer of one task.

        Args:
            task: String, a signature: a task, or `serving_default` for all, which with
                files asks the signature `from_jpeg`: one request costs less than each.
            images: Array with a batch axis, or {input name: array}; or JPEG or PNG
                files: a list of paths or bytes, or a folder, in the order of names. For
                files the model must take an `image` and `rois`, or have been exported
                with `--from-jpeg`. Numbers become those that the signature takes where
                that changes none of them, but for the rounding of floats; strings are
                bytes, or text, which is sent as UTF-8.
            rois: For files and a model that takes them, the boxes to ask about: array
                (N, R, 4), left, top, right, bottom in pixels of each picture. Defaults
                to proposals by selective search (some tenths of a second a picture,
                which `timeout` does not count).

        Returns:
            {output name: array}, each with a batch axis; strings are bytes. With files
            and a model that takes `rois`, these are among them, and they and the
            outputs named `boxes` are in pixels of each picture. Otherwise they are as
            the model gives them.
        """
        deadline = time.monotonic() + self.timeout
        files = None
        if not isinstance(images, np.ndarray | Mapping):
            files = [_encoded(file) for file in _files(images)]
        elif rois is not None:
            raise ValueError(
                '`rois` go with files. Give {"image": array, "rois": array}'
            )
        asked_again = False
        while True:
            infos: Mapping[str, Any] = {}
            sent: Mapping[str, np.ndarray] = {}
            signature, given, pictures = task, images, None
            try:
                if files is not None:
                    infos = self._signatures(deadline)
                    before = time.monotonic()
                    signature, given, pictures = _prepared(task, files, infos, rois)
                    deadline += time.monotonic() - before  # a search waits for nobody
                sent = _named(given)
                infos = infos or self._signatures(deadline)
                _check_known(signature, task, infos)
                info = infos[signature]
                if not isinstance(given, Mapping):
                    sent = _renamed(sent, info.inputs)
                if empty := [name for name, x in sent.items() if x.ndim and not len(x)]:
                    raise ServingError(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"'{empty[0]}' must hold at least one example",
                    )
                cast = {
                    name: _cast(array, name, info.inputs.get(name))
                    for name, array in sent.items()
                }
                answer = self._in_parts(signature, cast, info, deadline)
                return pictures.in_their_pixels(answer) if pictures else answer
            except ServingError as error:
                self._known = None  # there may be a new version
                if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED and sent:
                    raise self._too_large(error, sent) from error
                if error.code not in _OF_THE_REQUEST:
                    raise
                try:
                    now = self._signatures(deadline)
                except ServingError:
                    raise error from None  # there is no such model
                same = all(now.get(x) == infos.get(x) for x in (task, signature))
                if same or asked_again:
                    raise _explained(error, signature, sent, now) from error
                asked_again = True

    def signatures(self) -> dict[str, Any]:
        """The model's signatures, {name: SignatureDef}."""
        return self._asked_signatures(time.monotonic() + self.timeout)

    def status(self) -> Any:
        """The states of the model's versions, the latest first.

        A message as TF Serving's `GetModelStatusResponse`.
        """
        deadline = time.monotonic() + self.timeout
        return self._call(lambda transport: transport.status(deadline), deadline)

    def _signatures(self, deadline: float) -> dict[str, Any]:
        """What the signatures take is asked for once, not before every request."""
        if self._known is None:
            self._known = self._asked_signatures(deadline)
        return self._known

    def _asked_signatures(self, deadline: float) -> dict[str, Any]:
        return self._call(lambda transport: transport.signatures(deadline), deadline)

    def _in_parts(
        self, signature: str, arrays: Arrays, info: Any, deadline: float
    ) -> Arrays:
        def ask(part: Arrays) -> Arrays:
            return self._call(
                lambda transport: transport.predict(
                    signature, part, info.outputs, deadline
                ),
                deadline,
            )

        counts = {len(array) if array.ndim else 0 for array in arrays.values()}
        count = max(counts, default=0)
        # What is of one size, or may have no axis, is no batch.
        first_axes = [shape_of(x.tensor_shape)[:1] for x in info.inputs.values()]
        free = all(sizes == [-1] for sizes in first_axes)
        if not free or len(counts) != 1 or count <= self.batch:
            return ask(arrays)
        answers = []
        for start in range(0, count, self.batch):
            part = {k: x[start : start + self.batch] for k, x in arrays.items()}
            answers.append(ask(part))
            size = min(self.batch, count - start)
            for name, array in answers[-1].items():
                if array.shape[:1] != (size,):
                    raise ServingError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"'{name}' has no batch axis, so that the answers to parts of "
                        f"{self.batch} examples cannot be joined: ask at once, by "
                        f"`Client(..., batch={count})`",
                    )
            first, last = (
                {name: array.shape[1:] for name, array in answer.items()}
                for answer in (answers[0], answers[-1])
            )
            if first != last:
                raise ServingError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"The answers to parts of {self.batch} examples cannot be joined: "
                    f"{first} and {last}. Ask about examples of one size; if the model "
                    "has a new version, ask again",
                )
        return {
            name: np.concatenate([answer[name] for answer in answers])
            for name in answers[0]
        }

    def _too_large(
        self, error: ServingError, sent: Mapping[str, np.ndarray]
    ) -> ServingError:
        part = {k: a[: self.batch] if a.ndim else a for k, a in sent.items()}
        return ServingError(
            error.code,
            f"{error.message}. If that is too large, ask in smaller parts, by "
            f"`Client(..., batch=n)`. Sent at a time: {_in_words(part)}",
        )

    def _call(self, question: Callable[[Transport], Any], deadline: float) -> Any:
        """Asks, and asks again, until then, where nobody was there."""
        if self._transport is None:
            raise ValueError(f"This client of {self.address} is closed: make another")
        pause = 0.05
        while True:
            try:
                return question(self._transport)
            except ServingError as error:
                # So that clients do not keep step, and none waits long for a server
                # that is back.
                pause = min(pause * random.uniform(1.5, 2.5), 0.5)
                late = time.monotonic() + pause > deadline
                if error.code != grpc.StatusCode.UNAVAILABLE or late:
                    raise ServingError(
                        error.code, f"{error.message} (from {self.address})"
                    ) from error
            time.sleep(pause)


def _explained(
    error: ServingError,
    signature: str,
    sent: Mapping[str, np.ndarray],
    signatures: Mapping[str, Any],
) -> ServingError:
    """The error with what the signature expects and what it was sent."""
    if signature not in signatures:
        # Names with underscores are TensorFlow's own, such as the initializer's.
        known = sorted(name for name in signatures if not name.startswith("__"))
        return ServingError(
            error.code, f"{error.message}. There are: {', '.join(known)}"
        )
    takes = info_in_words(signatures[signature].inputs)
    return ServingError(
        error.code,
        f"{error.message}. Signature '{signature}' takes {takes}. "
        f"Sent: {_in_words(sent)}",
    )


def pictures_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The JPEG and PNG files of a folder, in the order of their names.

    Raises:
        ValueError: Where there are none.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        # Not what file managers leave: hidden files, and others by their endings.
        if path.suffix.lower() in _SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    )
    if not files:
        raise ValueError(f"There are no JPEG or PNG files in {folder}")
    return files


def _files(images: Any) -> Sequence[File]:
    """A list of files, or those of a folder."""
    if isinstance(images, str | pathlib.Path) and pathlib.Path(images).is_dir():
        return pictures_in(pathlib.Path(images))
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    if not several or not all(
        isinstance(x, str | pathlib.Path | bytes) for x in images
    ):
        raise TypeError(
            "`images` must be an array, {input name: array}, a list of files (paths or "
            f"bytes) or a folder. Received: {type(images).__name__} {images!s:.80}"
        )
    if not images:
        raise ValueError("`images` must hold at least one file. Received: none")
    return images


def _prepared(
    task: str, files: list[bytes], infos: Mapping[str, Any], rois: Any
) -> tuple[str, Any, regions.Pictures | None]:
    """The signature to ask about files, what it is given, and pictures with regions."""
    if task in infos and regions.taken_by(infos[task].inputs):
        pictures = regions.Pictures.read(files, infos[task].inputs, rois)
        return task, pictures.inputs, pictures
    if rois is not None:
        raise ValueError(f"'{task}' must take `image` and `rois` to be given `rois`")
    return all_tasks.of_files(task), np.array(files, dtype=object), None


def _encoded(image: File) -> bytes:
    return image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()


def _named(given: Any) -> dict[str, np.ndarray]:
    given = given if isinstance(given, Mapping) else {"images": given}
    return {name: as_array(values, name) for name, values in given.items()}


def _renamed(sent: dict[str, np.ndarray], inputs: Iterable[str]) -> Arrays:
    """The only array, by the name that the signature has for it."""
    if len(names := [*inputs]) != 1:
        raise ServingError(grpc.StatusCode.INVALID_ARGUMENT, "Give {input name: array}")
    return dict(zip(names, sent.values(), strict=True))


def _check_known(signature: str, task: str, infos: Mapping[str, Any]) -> None:
    if signature not in infos:
        why = f"There is no signature '{signature}'"
        if task in infos:
            why += (
                ", which takes files: export the model with --from-jpeg, or by "
                "`export_saved_model(..., from_jpeg=True)`, or send arrays"
            )
        raise ServingError(grpc.StatusCode.NOT_FOUND, why)


def _in_words(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(
        f"{name}: {in_words(array_dtype(x), x.shape)}" for name, x in arrays.items()
    )


def _cast(array: np.ndarray, name: str, info: Any) -> np.ndarray:
    """As the signature takes it; what it does not know, the server refuses."""
    if info is None:
        return array
    dtype = messages.numpy_dtype(info.dtype)
    try:
        return cast_to(array, dtype, name)
    except ValueError as error:
        raise ServingError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
