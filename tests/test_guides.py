"""The guides run, in fewer epochs than they say, and what they train learns."""

import json
import re
import socket
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.ipynb"))
EPOCHS = 2


def code_of(guide):
    """The guide's cells of code, without IPython's magic."""
    cells = json.loads(guide.read_text())["cells"]
    code = ["".join(x["source"]) for x in cells if x["cell_type"] == "code"]
    return [re.sub(r"^%.*", "", x, flags=re.M) for x in code]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.fixture
def losses(monkeypatch):
    """The losses of each `fit`, which goes on for a few epochs alone."""
    losses = []
    fit = keras.Model.fit

    def short(*args, epochs, **kwargs):
        history = fit(*args, epochs=min(epochs, EPOCHS), **kwargs)
        losses.append(history.history["loss"])
        return history

    monkeypatch.setattr(keras.Model, "fit", short)
    return losses


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_guide_runs_and_learns(guide, losses, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(ROOT)  # from where one serves
    ports = {"8510": free_port(), "8511": free_port()}
    namespace = {}
    try:
        for cell in code_of(guide):
            for port, free in ports.items():
                cell = cell.replace(port, free)
            exec(cell, namespace)
    finally:
        server = namespace.get("server")
        if server and server.poll() is None:
            server.kill()
            server.communicate()

    assert losses
    for loss in losses:
        assert np.isfinite(loss).all(), loss
        assert loss[-1] < loss[0], loss


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_guide_has_its_outputs_and_is_small(guide):
    cells = json.loads(guide.read_text())["cells"]
    outputs = [x for cell in cells for x in cell.get("outputs", [])]

    assert any("image/png" in x.get("data", {}) for x in outputs)
    assert all(x["output_type"] != "error" for x in outputs)
    assert guide.stat().st_size < 500_000
