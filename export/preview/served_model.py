"""One served model: finds, loads and drops its versions as TF Serving does.

Speaks in TF Serving's messages, but knows neither gRPC nor REST.
"""

import pathlib
import threading
from typing import Any

import grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
)

from export.client.protocol import ServingError
from export.preview.loaded_version import Limits, LoadedVersion
from keras_cross_stitch.versions import versions

State = get_model_status_pb2.ModelVersionStatus


class ServedModel:
    """The latest version in a folder: it is loaded before the one before is dropped.

    Args:
        name: What requests call the model.
        directory: Folder whose subfolders with numbers are the versions.
        labels: {label: version number}.
        limits: `Limits` of a request.

    Raises:
        ValueError: Where the folder holds no version, or its latest cannot be loaded.
    """

    def __init__(self, name, directory, labels=None, limits=None):
        self.name = name
        self.limits = limits or Limits()
        self._directory = pathlib.Path(directory)
        self._labels = labels or {}
        self._states: dict[int, Any] = {}
        self._broken: tuple | None = None  # the files of a version that did not load
        self._lock = threading.Lock()
        self._current: Any = None  # a `LoadedVersion`, once there is one
        self.refresh()
        if self._current is None:
            why = [state.status.error_message for state in self._states.values()]
            raise ValueError(
                f"'{directory}' must hold versions, folders that are named 1, 2, ... "
                f"and hold a SavedModel. {why[0] if why else 'None is there'}"
            )

    def refresh(self):
        """Loads the latest version if it is new. A broken one changes nothing."""
        with self._lock:
            path = self._latest()
            current = self._current.number if self._current else None
            if path is None or int(path.name) == current:
                return
            files = (path, *((f, f.stat().st_mtime_ns) for f in path.rglob("*")))
            # Tried again when its files change: it may have been half copied.
            if files != self._broken:
                self._load(path)
                done = self._current and self._current.number == int(path.name)
                self._broken = None if done else files

    def _latest(self):
        # None, too, while the folder is away: what is loaded is served on.
        return next(reversed(versions(self._directory).values()), None)

    def _load(self, path):
        number = int(path.name)
        self._set_state(number, State.LOADING)
        try:
            loaded = LoadedVersion(path, self.limits)
        except Exception as error:  # whatever is wrong with it, the old one serves on
            reason = f"Version {number} could not be loaded: {error}"
            self._set_state(number, State.END, grpc.StatusCode.UNKNOWN, reason)
            return
        before, self._current = self._current, loaded
        self._set_state(number, State.AVAILABLE)
        if before:
            self._set_state(before.number, State.END)

    def _set_state(self, number, state, code=grpc.StatusCode.OK, message=""):
        status = State(version=number, state=state)
        status.status.error_code = code.value[0]
        status.status.error_message = message
        self._states[number] = status

    def find(self, spec):
        """The `LoadedVersion` that a ModelSpec asks for."""
        self._check_name(spec)
        number = self._number(spec)
        version = self._current
        if number not in (None, version.number):
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Version {number} of model '{self.name}' is not served; version "
                f"{version.number} is",
            )
        return version

    def _check_name(self, spec):
        if spec.name != self.name:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Model '{spec.name}' not found: this server has '{self.name}'",
            )

    def _number(self, spec):
        if spec.HasField("version"):
            return spec.version.value
        if not spec.HasField("version_label"):
            return None
        if spec.version_label not in self._labels:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Unrecognized version label '{spec.version_label}' of model "
                f"'{self.name}', which has: {sorted(self._labels)}",
            )
        return self._labels[spec.version_label]

    def answered_by(self, version, signature=""):
        """The ModelSpec of an answer."""
        spec = model_pb2.ModelSpec(name=self.name, signature_name=signature)
        spec.version.value = version.number
        return spec

    def metadata(self, spec):
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

    def status(self, spec):
        """The states of all versions, or of one, as GetModelStatus answers."""
        self._check_name(spec)
        number = self._number(spec)
        states = [
            state
            for version, state in sorted(self._states.items(), reverse=True)
            if number in (None, version)
        ]
        if not states:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Could not find version {number} of model '{self.name}'",
            )
        return get_model_status_pb2.GetModelStatusResponse(model_version_status=states)
