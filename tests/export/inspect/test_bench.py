import keras
import numpy as np
import pytest

from export.client import ServingError
from export.inspect import bench
from export.preview.loaded_version import Limits
from export.preview.served_model import ServedModel
from export.version import timing
from export.version.signatures import signatures
from keras_cross_stitch import NDDR, stitch
from tests.export.conftest import running, tower

pytestmark = pytest.mark.xdist_group("export")

TASKS = {"kind", "age", "normals"}


def test_calls_take_turns():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = timing.interleaved(calls, 3)
    assert "".join(called) == "aabb" + "ababab"
    assert {name: x.shape for name, x in seconds.items()} == {"a": (3,), "b": (3,)}


def test_a_batch_repeats_or_leaves_out_examples():
    x = np.arange(6).reshape(3, 2)
    repeated = timing.batch_of({"x": x}, 4)["x"]
    np.testing.assert_array_equal(repeated, [[0, 1], [2, 3], [4, 5], [0, 1]])
    np.testing.assert_array_equal(timing.batch_of({"x": x}, 1)["x"], [[0, 1]])


def test_every_signature_is_timed_at_every_batch_size(version):
    report = bench.bench(version, rounds=2, batches=(1, 3))
    asked = {(row.signature, row.way, row.batch) for row in report.rows}
    assert asked == {
        (signature, "in process", batch)
        for signature in TASKS | {"serving_default"}
        for batch in (1, 3)
    }
    assert list(report.together) == [1, 3]
    assert report.stitched == {}
    assert report.signatures == signatures(version)


def test_ratios_are_of_medians(version, model_file, monkeypatch):
    medians = {
        "serving_default": 3.0,
        "unstitched": 2.0,
        "kind": 1,
        "age": 2,
        "normals": 3,
    }

    def fixed(calls, rounds):
        return {key: np.array([0, medians[key[0]], 100]) for key in calls}

    monkeypatch.setattr(bench, "interleaved", fixed)
    report = bench.bench(version, model=model_file, batches=(2,))
    assert report.together == {2: 3 / (1 + 2 + 3)}
    assert report.stitched == {2: 3 / 2}
    (row,) = (row for row in report.rows if row.signature == "normals")
    assert row.throughput == pytest.approx(2 / (103 / 3))
    assert row.percentile(50) == 3


def test_unstitched_towers_are_the_same_without_units(model, images):
    plain = bench.unstitched(model)
    assert not [x for x in plain.layers if x.name.startswith("cross_stitch")]
    part = keras.Model(plain.input, plain.output["age"])
    assert not [x for x in part.layers if x.name.startswith(("kind", "normals"))]
    x = images / 255
    for name in ("conv1", "conv2"):
        x = model.get_layer(f"age_{name}")(x)
    expected = model.get_layer("age_score")(keras.ops.mean(x, axis=(1, 2)))
    np.testing.assert_allclose(
        plain.predict(images, verbose=0)["age"], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"unit": NDDR}, {"project": True}])
def test_units_of_each_kind_are_left_out(options, images):
    towers = {"kind": tower(5), "age": tower(1)}
    plain = bench.unstitched(stitch(towers, at=["conv1", "conv2"], **options))
    answers = plain.predict(images, verbose=0)
    for task, alone in towers.items():
        expected = alone.predict(images, verbose=0)
        np.testing.assert_allclose(answers[task], expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_units_is_an_error():
    plain = stitch({"kind": tower(5), "age": tower(1)}, at=[])
    with pytest.raises(ValueError, match=r"CrossStitch or NDDR .* Its layers: \['im"):
        bench.unstitched(plain)


@pytest.mark.parametrize("way", ["gRPC", "REST"])
def test_a_server_is_asked_beside_the_process(version, way):
    with running(ServedModel("rooms", version.parent)) as (grpc_port, rest_port):
        scheme, port = ("", grpc_port) if way == "gRPC" else ("http://", rest_port)
        address = f"{scheme}127.0.0.1:{port}"
        report = bench.bench(
            version, address=address, name="rooms", rounds=2, batches=(3,)
        )
        with pytest.raises(ServingError, match=rf"'other' not found.*from {address}"):
            bench.bench(version, address=address, name="other", rounds=2)
    ways = {(row.signature, row.way) for row in report.rows}
    signatures = TASKS | {"serving_default"}
    assert ways == {(x, each) for x in signatures for each in ("in process", way)}


def test_what_is_too_large_for_the_server_is_left_out_and_told(version):
    limits = Limits(body_bytes=20_000)
    with running(ServedModel("rooms", version.parent, {}, limits)) as (_, port):
        address = f"http://127.0.0.1:{port}"
        report = bench.bench(
            version, address=address, name="rooms", rounds=2, batches=(2, 40)
        )
    asked = {(row.signature, row.way, row.batch) for row in report.rows}
    signatures = TASKS | {"serving_default"}
    ways = {("in process", 2), ("in process", 40), ("REST", 2)}
    assert asked == {(each, *way) for each in signatures for way in ways}
    told = [line.partition(": ") for line in report.left_out]
    assert {what for what, _, _ in told} == {
        f"batch 40, {each}, REST" for each in signatures
    }
    assert all("A body may have 20000 bytes" in why for _, _, why in told)
