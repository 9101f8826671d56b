"""TF Serving's REST API on a served model, as an ASGI application; and the page."""

import base64
import dataclasses
import functools
import io
import logging
import pathlib
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from export.client import all_tasks, drawing, regions
from export.client.protocol import HTTP_STATUS, IMAGES, INVALID, ServingError
from export.preview import rest_format
from export.preview.loaded_version import LoadedVersion, check_images
from export.preview.served_model import ServedModel

PAGE = pathlib.Path(__file__).with_name("page.html")
# A page of another site, whose name is made to mean this machine, is not answered.
HOSTS = ["127.0.0.1", "localhost"]
_ORIGIN = re.compile(rf"https?://({'|'.join(map(re.escape, HOSTS))})(:[0-9]+)?")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_PATH = re.compile(
    r"/v1/models(/(?P<name>[^/:]+))?"
    r"(/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
    r"(?P<method>:predict|:classify|:regress|/metadata)?",
    re.IGNORECASE,
)


def application(
    model: ServedModel, run: Callable[..., Awaitable[Any]], lifespan: Any
) -> Starlette:
    """The Starlette application.

    `run(function, *arguments)` runs a function in a thread; `lifespan` is as
    Starlette's.
    """

    async def api(request: Request) -> Response:
        body = await _body(request, model.limits.body_bytes)
        if request.method == "POST":
            return await run(_predict, model, request, body)
        return _get(model, request)  # at once: status waits for no prediction

    async def draw(request: Request) -> Response:
        body = await _body(request, model.limits.body_bytes)
        return await run(_draw, model, body)

    return Starlette(
        routes=[
            Route("/", lambda request: FileResponse(PAGE)),
            Route("/draw", _answering(draw), methods=["POST"]),
            Route("/{path:path}", _answering(api), methods=_METHODS),
        ],
        lifespan=lifespan,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )


def _answering(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, with every error as TF Serving's JSON."""

    async def answer(request: Request) -> Response:
        try:
            _check_origin(request)
            return await endpoint(request)
        except ServingError as error:
            return _error(error.message, HTTP_STATUS.get(error.code, 500))
        except Exception as error:
            logging.getLogger(__name__).exception("A request was not answered")
            return _error(f"{type(error).__name__}: {error}", 500)

    return answer


def _check_origin(request: Request) -> None:
    """A page of another site may send what it cannot read the answer to."""
    origin = request.headers.get("origin")
    if origin is not None and not _ORIGIN.fullmatch(origin):
        raise ServingError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"This preview answers programs, and pages of {' and '.join(HOSTS)}. "
            f"Received: Origin {origin}",
        )


def _error(message: str, status: int) -> Response:
    # A request may name what is no text, such as "\ud800".
    return _json({"error": message.encode(errors="backslashreplace").decode()}, status)


def _json(content: Any, status: int = 200) -> Response:
    return Response(rest_format.body(content), status, media_type="application/json")


async def _body(request: Request, limit: int) -> bytes:
    """The body; one that is too large is read, so that the client hears of it."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
    packed = request.headers.get("content-encoding") == "gzip"
    if packed and body and size <= limit:
        unpacking = zlib.decompressobj(wbits=31)
        try:
            body[:] = unpacking.decompress(body, limit + 1)
        except zlib.error as error:
            raise ServingError(INVALID, f"The body is no gzip: {error}") from error
        size = len(body)
        if size <= limit and (unpacking.unused_data or not unpacking.eof):
            raise ServingError(INVALID, "The body is no whole gzip")
    if size > limit:
        raise ServingError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"A body may have {limit} bytes. Received: {size} or more",
        )
    return bytes(body)


def _target(request: Request) -> tuple[str, model_pb2.ModelSpec]:
    """The path as (method, ModelSpec)."""
    # Undecoded, as TF Serving splits it: %2F is part of a name.
    path = request.scope["raw_path"].decode("latin-1").partition("?")[0]
    match = _PATH.fullmatch(path)
    if not path.lower().startswith("/v1/"):
        raise ServingError(grpc.StatusCode.NOT_FOUND, f"There is nothing at {path}")
    if not match:
        raise ServingError(INVALID, f"Malformed request: {request.method} {path}")
    if not match["name"]:
        raise ServingError(INVALID, "Missing model name in request.")
    spec = model_pb2.ModelSpec(name=unquote(match["name"]))
    if match["version"]:
        digits = match["version"].lstrip("0") or "0"
        if len(digits) > 19 or int(digits) >= 2**63:  # Python reads 4300 at most
            raise ServingError(
                INVALID, f"Failed to convert version: {match['version']} to numeric."
            )
        spec.version.value = int(digits)
    if match["label"]:
        spec.version_label = unquote(match["label"])
    return (match["method"] or "").lower(), spec


def _get(model: ServedModel, request: Request) -> Response:
    if request.method == "OPTIONS":
        return _json({})  # and no CORS headers, as TF Serving's without its flag
    method, spec = _target(request)
    if request.method != "GET" or method not in ("", "/metadata"):
        path = request.url.path
        raise ServingError(INVALID, f"Malformed request: {request.method} {path}")
    if not method:
        return _json(_as_dict(model.status(spec)))
    response = model.metadata(spec)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return _json(
        {
            "model_spec": _as_dict(response.model_spec),
            "metadata": {"signature_def": _as_dict(signatures)},
        }
    )


def _as_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def _predict(model: ServedModel, request: Request, content: bytes) -> Response:
    method, spec = _target(request)
    if method in (":classify", ":regress"):
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, "Use :predict")
    if method != ":predict":
        raise ServingError(INVALID, f"Malformed request: POST {request.url.path}")
    version = model.find(spec)
    body = rest_format.parsed(content)
    signature = body.get("signature_name") or "serving_default"
    arrays = rest_format.arrays(body, version.signature(signature).inputs)
    outputs = version.predict(signature, arrays)
    if "instances" in body:
        return _json({"predictions": rest_format.rows(outputs)})
    return _json({"outputs": rest_format.columns(outputs)})


def _draw(model: ServedModel, body: bytes) -> Response:
    """Not of TF Serving: every task's answer to one picture, drawn for the page."""
    version = model.find(model_pb2.ModelSpec(name=model.name))
    check_images([body], model.limits.pixels)
    ask = _asking(version, body)
    answers = []
    for task in _drawn(version):
        drawn = drawing.answer(ask, task, version.answers)
        answers.append(
            {
                "task": task,
                "description": version.answers.get(task, {}).get("description", ""),
                "map": drawn.map is not None and _data_url(drawn.map),
                "boxes": [dataclasses.asdict(box) for box in drawn.boxes],
                "legend": drawn.legend,
                "rows": drawn.rows,
            }
        )
    return _json({"version": version.number, "answers": answers})


def _drawn(version: LoadedVersion) -> Iterable[str]:
    """The tasks that can be asked about a picture, without those drawn with others."""
    known = sorted(version.signature_defs)
    tasks = [name.removesuffix(IMAGES) for name in known if name.endswith(IMAGES)]
    tasks += [
        name
        for name in known
        if regions.taken_by(version.signature_defs[name].inputs)
        and name != "serving_default"
    ]
    if not tasks:
        raise ServingError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "The model takes no pictures: export it with --from-jpeg, or by "
            "`export_saved_model(..., from_jpeg=True)`",
        )
    return dict.fromkeys(drawing.drawn_with(task, version.answers) for task in tasks)


def _asking(version: LoadedVersion, file: bytes) -> Callable[..., dict[str, Any]]:
    """A function of a task, and perhaps rois, that answers to a JPEG or PNG file."""
    image = np.array([file], dtype=object)

    @functools.cache
    def all_at_once() -> dict[str, Any]:
        return version.predict(all_tasks.SIGNATURE, {"image_bytes": image})

    def ask(task: str, rois: np.ndarray | None = None) -> dict[str, Any]:
        if all_tasks.SIGNATURE in version.signature_defs:
            names = version.signature(task).outputs
            return all_tasks.of_task(task, all_at_once(), names)
        if (own := all_tasks.of_files(task)) in version.signature_defs:
            return version.predict(own, {"image_bytes": image})
        pictures = regions.Pictures.read([file], version.signature(task).inputs, rois)
        return pictures.in_their_pixels(version.predict(task, pictures.inputs))

    return ask


def _data_url(image: np.ndarray) -> str:
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
