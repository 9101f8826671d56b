"""Sixteen clients at once, while versions come and go."""

import concurrent.futures
import itertools
import os
import shutil
import threading
import time
import types

import numpy as np
import pytest
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus as State

from export.client import Client

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

CLIENTS = 16
SECONDS = float(os.environ.get("KCS_LOAD_SECONDS", "4"))


def matches(answer, expected):
    return [v for v, e in expected.items() if np.allclose(answer, e, atol=1e-5)]


def ask_until(end, address, number, images, expected):
    """The versions that answered, in order; both tasks in turn, at most 2000 times."""
    versions = []
    with Client(address) as client:
        for turn in itertools.islice(itertools.count(number), 2000):
            if end.is_set():
                break
            task = ("segmentation", "normals")[turn % 2]
            i = turn % len(images)
            answer = client.predict(task, images[i : i + 1])[task][0]
            by_version = {v: outputs[task][i] for v, outputs in expected.items()}
            (version,) = matches(answer, by_version)
            versions.append(version)
    return versions


def no_second_try(seconds):
    raise AssertionError("a request failed, and the client would have tried again")


def state_of(client, version):
    states = {x.version: x.state for x in client.status().model_version_status}
    return states.get(version)


def test_a_new_version_under_load_fails_no_request(
    served, grpc_address, rest_address, wait_for, monkeypatch
):
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=no_second_try)
    monkeypatch.setattr("export.client.client.time", clock)
    images = served.pictures(7)
    old = served.latest
    path = served.export()
    new = int(path.name)
    expected = {version: served.predict(images, version) for version in (old, new)}
    addresses = [grpc_address, grpc_address, grpc_address, rest_address]
    end = threading.Event()
    with (
        Client(grpc_address) as watching,
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
    ):
        asking = [
            pool.submit(ask_until, end, addresses[i % 4], i, images, expected)
            for i in range(CLIENTS)
        ]
        try:
            time.sleep(SECONDS / 2)
            served.move_in(path)
            wait_for(lambda: state_of(watching, new) == State.AVAILABLE)
            time.sleep(SECONDS / 2)
        finally:
            end.set()
        answered_by = [future.result() for future in asking]

    for versions in answered_by:
        assert {old, new} == set(versions)
        assert versions == sorted(versions)  # never back to the old one


def test_a_broken_version_changes_nothing_and_the_status_says_why(
    served, grpc_address, rest_address, wait_for
):
    images = served.pictures()
    expected = served.predict(images)["normals"]
    broken = served.publish_broken()
    with Client(grpc_address) as client, Client(rest_address) as rest:

        def ended():
            answer = client.predict("normals", images)["normals"]
            np.testing.assert_allclose(answer, expected, atol=1e-5)
            return state_of(rest, broken) == State.END

        wait_for(ended)
        status = {x.version: x.status for x in rest.status().model_version_status}
        reason = status[broken].error_message
        assert f"Version {broken} could not be loaded: " in reason
        assert state_of(rest, served.latest) == State.AVAILABLE
        answer = client.predict("normals", images)["normals"]
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    shutil.rmtree(served.directory / str(broken))
