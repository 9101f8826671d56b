"""The guides run, on less than they say, and what they train learns."""

import socket
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.ipynb"))

# Before the guide's first cell, and after its last.
SHORTEN = """
import keras

fit, losses = keras.Model.fit, []

def short(model, *data, epochs, **kwargs):
    data = keras.tree.map_structure(lambda array: array[:300], data)
    history = fit(model, *data, epochs=min(epochs, 2), **kwargs)
    losses.append(history.history["loss"])
    return history

keras.Model.fit = short
"""
CHECK = """
keras.Model.fit = fit
assert losses
for loss in losses:
    assert loss[-1] < loss[0] < float("inf"), loss
"""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.fixture(scope="module")
def kernel():
    """One for all guides: what they import takes seconds."""
    resources = {"metadata": {"path": str(GUIDES[0].parent)}}  # as Jupyter starts it
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=600, resources=resources
    )
    with client.setup_kernel():
        yield client


@pytest.mark.slow
@pytest.mark.xdist_group("guides")
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_guide_runs_and_learns(guide, kernel):
    notebook = nbformat.read(guide, as_version=4)
    ports = {"8510": free_port(), "8511": free_port()}
    for cell in notebook.cells:
        for port, free in ports.items():
            cell.source = cell.source.replace(port, free)
        cell.source = cell.source.replace("SEEDS = 5", "SEEDS = 1")
    # Nothing of the guide before is left.
    new = nbformat.v4.new_code_cell
    notebook.cells = [new("%reset -f"), new(SHORTEN), *notebook.cells, new(CHECK)]

    kernel.nb = notebook
    for index, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, index)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_guide_has_its_outputs_and_is_small(guide):
    cells = nbformat.read(guide, as_version=4).cells
    outputs = [x for cell in cells for x in cell.get("outputs", [])]

    assert any("image/png" in x.get("data", {}) for x in outputs)
    assert all(x["output_type"] != "error" for x in outputs)
    assert guide.stat().st_size < 500_000
