"""TF Serving's REST API on a served model, as an ASGI application; and the page."""

import asyncio
import base64
import dataclasses
import functools
import io
import json
import pathlib
import re

import grpc
import numpy as np
from google.protobuf import json_format
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from export.client import drawing, regions
from export.client.protocol import HTTP_STATUS, IMAGES, ServingError
from export.preview import rest_format
from export.preview.loaded_version import check_images

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PAGE = pathlib.Path(__file__).with_name("page.html")
_PATH = re.compile(
    r"(?P<name>[^/:]+)(/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
    r"(?P<method>:predict|:classify|:regress|/metadata)?"
)


def application(model, work, lifespan):
    """The Starlette application.

    Args:
        model: `ServedModel`.
        work: Admits a request and runs functions in threads; see `Work`.
        lifespan: As Starlette's.
    """

    def route(path, answer, method):
        async def endpoint(request):
            try:
                with work.admitted():
                    body = await _body(request, model.limits)
                    return await work.run(answer, model, request, body)
            except ServingError as error:
                status = HTTP_STATUS.get(error.code, 500)
                return JSONResponse({"error": error.message}, status)

        return Route(path, endpoint, methods=[method])

    routes = [
        route("/v1/models/{path:path}", _get, "GET"),
        route("/v1/models/{path:path}", _post, "POST"),
        route("/draw", _draw, "POST"),
        Route("/", lambda request: FileResponse(PAGE)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body(request, limits):
    """The body; one that is too large is read, so that the client hears of it."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.body_bytes:
                    body += chunk
    except TimeoutError:
        raise ServingError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"The request did not arrive whole in {limits.seconds} seconds",
        ) from None
    if size > limits.body_bytes:
        raise ServingError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"A body may have {limits.body_bytes} bytes. Received: {size}",
        )
    return bytes(body)


def _target(request):
    """The path as (method, ModelSpec)."""
    match = _PATH.fullmatch(request.path_params["path"])
    if not match:
        raise ServingError(
            INVALID, f"Malformed request: {request.method} {request.url.path}"
        )
    spec = model_pb2.ModelSpec(name=match["name"])
    if match["version"]:
        # The largest int64 is no version either, and does not overflow.
        spec.version.value = min(int(match["version"]), 2**63 - 1)
    if match["label"]:
        spec.version_label = match["label"]
    return match["method"], spec


def _get(model, request, body):
    method, spec = _target(request)
    if method == "/metadata":
        response = model.metadata(spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return JSONResponse(
            {
                "model_spec": _as_json(response.model_spec),
                "metadata": {"signature_def": _as_json(signatures)},
            }
        )
    if method:
        raise ServingError(INVALID, f"Malformed request: GET {request.url.path}")
    return JSONResponse(_as_json(model.status(spec)))


def _as_json(message):
    return json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def _post(model, request, body):
    method, spec = _target(request)
    if method in (":classify", ":regress"):
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, "Use :predict")
    if method != ":predict":
        raise ServingError(INVALID, f"Malformed request: POST {request.url.path}")
    version = model.find(spec)
    body = rest_format.parsed(body)
    signature = body.get("signature_name", "serving_default")
    if not isinstance(signature, str):
        raise ServingError(INVALID, "'signature_name' must be a string")
    arrays = rest_format.arrays(body, version.signature(signature).inputs)
    outputs = version.predict(signature, arrays)
    if "instances" in body:
        answer = {"predictions": rest_format.rows(outputs)}
    else:
        answer = {"outputs": rest_format.columns(outputs)}
    # Starlette's JSONResponse refuses NaN, which TF Serving writes as such.
    return Response(json.dumps(answer), media_type="application/json")


def _draw(model, request, body):
    """Not of TF Serving: every task's answer to one picture, drawn for the page."""
    version = model.find(model_pb2.ModelSpec(name=model.name))
    check_images([body], model.limits.pixels)
    ask = functools.partial(_ask, version, body)
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
    return JSONResponse({"version": version.number, "answers": answers})


def _drawn(version):
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
            "The model takes no pictures: export it with --from-jpeg",
        )
    return dict.fromkeys(drawing.drawn_with(task, version.answers) for task in tasks)


def _ask(version, file, task, rois=None):
    """A task's answer to a JPEG or PNG file."""
    if task + IMAGES in version.signature_defs:
        (only_input,) = version.signature(task + IMAGES).inputs
        return version.predict(
            task + IMAGES, {only_input: np.array([file], dtype=object)}
        )
    pictures = regions.Pictures.read([file], version.signature(task).inputs, rois)
    return pictures.in_their_pixels(version.predict(task, pictures.inputs))


def _data_url(image):
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
