"""A served model of regions, asked with files: by the client, by predict, and drawn."""

import io
import re
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from export.__main__ import app
from export.client import Client, ServingError

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(params=[0, 1], ids=["grpc", "rest"])
def client(region_addresses, request):
    with Client(region_addresses[request.param]) as client:
        yield client


def test_files_are_searched_and_boxes_are_in_pixels_of_each_picture(
    client, shapes, shapes_folder
):
    files = [shapes.jpeg, shapes_folder / "plain.png"]
    found = client.predict("detection", files)
    assert found["num_detections"].tolist() == [2, 0]
    assert not found["boxes"][1].any()
    boxes = dict(zip(found["classes"][0, :2], found["boxes"][0, :2], strict=True))
    for number, expected in enumerate([shapes.red, shapes.green]):
        # Two pixels of the model's image are 8.3 of the picture.
        np.testing.assert_allclose(boxes[number], expected, atol=9)
    assert found["rois"].shape[::2] == (2, 4)

    together = client.predict("serving_default", files)
    np.testing.assert_allclose(together["detection_boxes"], found["boxes"], rtol=1e-5)
    assert together["attributes"].shape == (*found["rois"].shape[:2], 2)


def test_attributes_are_asked_of_given_boxes(client, shapes):
    rois = np.array([[shapes.red, (80, 5, 110, 60), shapes.green]])
    answer = client.predict("attributes", [shapes.jpeg], rois=rois)
    # By the mean of red, green and blue, of which 127 is as dark as colourful.
    means = np.array([270, 270, 200]) / 255
    expected = 1 / (1 + np.exp(10 - 20 * means))
    np.testing.assert_allclose(answer["attributes"][0, :, 0], expected, atol=0.02)
    np.testing.assert_allclose(answer["rois"], rois, rtol=1e-5)


def test_arrays_are_answered_in_pixels_of_the_models_image(client, region_model):
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(2, 48, 64, 3)).astype("float32")
    start = rng.uniform(0, 30, (2, 5, 2))
    rois = np.concatenate([start, start + 15], axis=-1).astype("float32")
    given = {"image": image, "rois": rois}
    answer = client.predict("detection", given)
    expected = region_model.predict(given, verbose=0)["detection"]
    assert answer.keys() == expected.keys()
    np.testing.assert_allclose(answer["boxes"], expected["boxes"], atol=1e-4)


def test_a_file_that_is_no_image_is_told_by_its_number(client, shapes):
    for bad in (b"a text", b"", shapes.jpeg[:500]):
        with pytest.raises(ServingError, match="Image 1 of 2 must be a JPEG") as raised:
            client.predict("detection", [shapes.jpeg, bad])
        assert raised.value.code == INVALID


def test_rois_that_do_not_fit_are_told(client, region_addresses, shapes):
    with pytest.raises(ValueError, match=r"\(1, R, 4\), R at least 1"):
        client.predict("attributes", [shapes.jpeg], rois=np.zeros((1, 5)))
    with pytest.raises(ValueError, match=r'go with files. Give \{"image": array, "ro'):
        client.predict("attributes", np.zeros((1, 48, 64, 3)), rois=np.zeros((1, 2, 4)))
    given = {"image": np.zeros((1, 48, 64, 3)), "rois": np.zeros((1, 2, 5))}
    with pytest.raises(ServingError, match=r"rois: float32 \(N, \?, 4\).* Sent: "):
        client.predict("attributes", given)


def test_an_unknown_task_is_told_which_there_are(client, shapes):
    message = r"no signature 'depth_from_jpeg'. There are: attributes, detection, serv"
    with pytest.raises(ServingError, match=message):
        client.predict("depth", [shapes.jpeg])


def test_rois_are_not_for_a_model_without(grpc_address, served):
    with Client(grpc_address) as client:
        file = served.png(served.pictures()[0])
        with pytest.raises(ValueError, match="'normals' must take `image` and `rois`"):
            client.predict("normals", [file], rois=np.zeros((1, 2, 4)))


def test_predict_draws_objects_once_with_their_attributes(
    region_addresses, region_version, shapes, shapes_folder, tmp_path
):
    pictures = [shapes_folder / name for name in ("shapes.jpg", "plain.png")]
    options = ["--task", "attributes", "--task", "detection", "--output", tmp_path]
    options += ["--address", region_addresses[0], "--model", region_version.parent]
    result = CliRunner().invoke(app, list(map(str, ["predict", *pictures, *options])))
    assert result.exit_code == 0, result.output
    assert result.output.count("nothing found") == result.output.count("Wrote") == 1
    assert "attributes" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.detection.png"]
    with Image.open(tmp_path / "shapes.detection.png") as drawn:
        assert drawn.size == (4 * 120, 4 * 200 + 2 * 20)


def test_a_picture_that_is_too_large_is_not_decoded_for_the_page(region_addresses):
    def post(content):
        return httpx.post(f"{region_addresses[1]}/draw", content=content)

    large = io.BytesIO()
    Image.new("1", (2000, 2000)).save(large, "PNG")
    told = post(large.getvalue()).json()["error"]
    assert "The images of one request may have 1000000 pixels in all" in told
    assert "must be a JPEG or PNG file" in post(b"a text").json()["error"]


def test_the_code_in_docs_runs(region_addresses, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "room.jpg").write_bytes(shapes.jpeg)
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    *_, code = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code.replace("127.0.0.1:8500", region_addresses[0]), {})
    assert capsys.readouterr().out == "(1, 100, 4) (1, 100, 2)\n"
