"""Sixteen clients at once, while versions come and go."""

import concurrent.futures
import itertools
import os
import shutil
import threading
import time

import numpy as np

from export.client import Client

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


def test_a_new_version_under_load_fails_no_request(served, grpc_address, rest_address):
    images = served.pictures(7)
    old = served.latest
    path = served.export()
    new = int(path.name)
    expected = {version: served.predict(images, version) for version in (old, new)}
    addresses = [grpc_address, grpc_address, grpc_address, rest_address]
    end = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        asking = [
            pool.submit(ask_until, end, addresses[i % 4], i, images, expected)
            for i in range(CLIENTS)
        ]
        time.sleep(SECONDS / 4)
        served.move_in(path)
        time.sleep(SECONDS * 3 / 4)
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
        states = {}

        def tried():
            states.update({x.version: x for x in rest.status().model_version_status})
            answer = client.predict("normals", images)["normals"]
            np.testing.assert_allclose(answer, expected, atol=1e-5)
            return (
                broken in states
                and states[broken].State.Name(states[broken].state) == "END"
            )

        wait_for(tried)
        reason = states[broken].status.error_message
        assert f"Version {broken} could not be loaded: " in reason
        assert (
            states[served.latest].State.Name(states[served.latest].state) == "AVAILABLE"
        )
    shutil.rmtree(served.directory / str(broken))
