"""One served model: finds, loads and drops its versions as TF Serving does.

Speaks in TF Serving's messages, but knows neither gRPC nor REST.
"""

import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
)

from export.client.protocol import ServingError
from export.preview.loaded_version import Limits, LoadedVersion
from keras_cross_stitch.versions import is_complete, is_number, versions

State = get_model_status_pb2.ModelVersionStatus


class ServedModel:
    """The latest version in a folder, and those that have a label.

    A new version is loaded before the one before it is dropped.

    Args:
        name: What requests call the model.
        directory: Folder whose subfolders with numbers are the versions.
        labels: {label: version number}.
        limits: `Limits` of a request.
        tell: Function that is told, in a line each, which versions were loaded, could
            not be, and were dropped.

    Raises:
        ValueError: Where the folder holds no version, or its latest cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        directory: pathlib.Path | str,
        labels: Mapping[str, int] | None = None,
        limits: Limits | None = None,
        tell: Callable[[str], Any] | None = None,
    ) -> None:
        if not name or set(name) & set("/:"):
            raise ValueError(
                "A model's name stands in paths, and may be any but those with '/' or "
                f"':'. Received: '{name}'"
            )
        self.name = name
        self.limits = limits or Limits()
        self._directory = pathlib.Path(directory)
        self._labels = labels or {}
        self._tell = tell or (lambda line: None)
        self._told: dict[int, str] = {}
        self._states: dict[int, Any] = {}
        self._broken: dict[int, list] = {}  # files of versions that did not load
        self._lock = threading.Lock()
        self._loaded: dict[int, LoadedVersion] = {}
        self.refresh()
        if max(self._loaded, default=-1) <= max(self._broken, default=-1):
            why = [x.status.error_message for x in reversed(self._states.values())]
            if is_complete(directory):
                above = self._directory.resolve().parent
                why = [f"It is a version itself: give the folder above, '{above}'"]
            raise ValueError(
                f"'{directory}' must hold versions, folders that are named 1, 2, ... "
                f"and hold a SavedModel. {why[0] if why else 'None is there'}"
            )

    def refresh(self) -> None:
        """Loads what is new, and drops what is wanted no more."""
        with self._lock:
            found = versions(self._directory)
            self._tell_of_links()
            if not found:
                return  # away for a moment, perhaps: what is loaded is served on
            newest = max(found)
            wanted = found.keys() & {newest, *self._labels.values()}
            for number in sorted(wanted - self._loaded.keys()):
                self._load(number, found[number])
            if newest not in self._loaded:
                wanted |= {max(self._loaded, default=newest)}  # serves on
            for number in self._loaded.keys() - wanted:
                self._loaded = {n: x for n, x in self._loaded.items() if n != number}
                self._set_state(number, State.END)

    def _load(self, number: int, path: pathlib.Path) -> None:
        # Tried again when its files change: it may have been half copied.
        files = [(file, _changed_at(file)) for file in sorted(path.rglob("*"))]
        if self._broken.get(number) == files:
            return
        self._set_state(number, State.LOADING)
        try:
            loaded = LoadedVersion(path, self.limits)
        except Exception as error:  # whatever is wrong with it, the others serve on
            self._broken[number] = files
            self._set_state(number, State.END, f"could not be loaded: {error}")
            return
        self._broken.pop(number, None)
        self._loaded = {**self._loaded, number: loaded}
        self._set_state(number, State.AVAILABLE)

    def _tell_of_links(self) -> None:
        if not self._directory.is_dir():
            return
        for path in self._directory.iterdir():
            dangling = is_number(path) and path.is_symlink() and not path.exists()
            if dangling and int(path.name) not in self._loaded:
                what = f"is a link to what is not there: {path.readlink()}"
                self._set_state(int(path.name), State.END, what)

    def _set_state(self, number: int, state: int, error: str = "") -> None:
        code = grpc.StatusCode.UNKNOWN if error else grpc.StatusCode.OK
        status = State(version=number, state=state)
        status.status.error_code = code.value[0]
        status.status.error_message = error and f"Version {number} {error}"
        self._states = {**self._states, number: status}
        if state == State.LOADING:
            return
        does = "is loaded" if state == State.AVAILABLE else "is dropped"
        line = status.status.error_message or f"Version {number} {does}"
        if self._told.get(number) != line:  # it is looked at every second
            self._told[number] = line
            self._tell(" ".join(line.split()))

    def find(self, spec: model_pb2.ModelSpec) -> LoadedVersion:
        """The version that a ModelSpec asks for."""
        if not spec.name:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT, "ModelSpec has no name specified."
            )
        self._check_name(spec)
        loaded = self._loaded  # once: a refresh may replace it meanwhile
        number = max(loaded)
        if spec.HasField("version"):
            number = spec.version.value
        elif spec.HasField("version_label"):
            if spec.version_label not in self._labels:
                raise ServingError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"Unrecognized servable version label: {spec.version_label}. Model "
                    f"'{self.name}' has: {sorted(self._labels)}",
                )
            number = self._labels[spec.version_label]
        if number not in loaded:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Version {number} of model '{self.name}' is not served. Served: "
                f"{', '.join(map(str, sorted(loaded)))}",
            )
        return loaded[number]

    def _check_name(self, spec: model_pb2.ModelSpec) -> None:
        if spec.name != self.name:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Model '{spec.name}' not found: this server has '{self.name}'",
            )

    def answered_by(
        self, version: LoadedVersion, signature: str = ""
    ) -> model_pb2.ModelSpec:
        """The ModelSpec of an answer."""
        spec = model_pb2.ModelSpec(name=self.name, signature_name=signature)
        spec.version.value = version.number
        return spec

    def metadata(
        self, spec: model_pb2.ModelSpec
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """The signatures of a version, as GetModelMetadata answers."""
        version = self.find(spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in version.signature_defs.items():
            signatures.signature_def[name].CopyFrom(signature)
        response = get_model_metadata_pb2.GetModelMetadataResponse(
            model_spec=self.answered_by(version)
        )
        response.metadata["signature_def"].Pack(signatures)
        return response

    def status(
        self, spec: model_pb2.ModelSpec
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """The states of all versions, or of one, as GetModelStatus answers.

        A label is not looked at, as TF Serving's does not.
        """
        self._check_name(spec)
        states = self._states
        if spec.HasField("version"):
            number = spec.version.value
            if number not in states:
                raise ServingError(
                    grpc.StatusCode.NOT_FOUND,
                    f"Could not find version {number} of model {self.name}",
                )
            states = {number: states[number]}
        return get_model_status_pb2.GetModelStatusResponse(
            model_version_status=[states[x] for x in sorted(states, reverse=True)]
        )


def _changed_at(file: pathlib.Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # a link to what is not there, or gone meanwhile
        return 0
