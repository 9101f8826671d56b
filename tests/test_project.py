"""The project's own promises: what the wheel holds, who imports whom, the README."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_cross_stitch

ROOT = Path(__file__).parents[1]


def imports(path):
    """The top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("keras_cross_stitch", {"training", "export"}),
        ("training", {"export"}),
        ("export", {"training"}),
    ],
)
def test_dependencies_point_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        assert not forbidden & set(imports(path)), path


def test_only_the_export_needs_tensorflow():
    for path in (ROOT / "keras_cross_stitch").glob("*.py"):
        if path.name != "saved_model.py":
            assert "tensorflow" not in set(imports(path)), path


def test_the_wheel_holds_the_library_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()

    packages = {name.split("/")[0] for name in files if "dist-info" not in name}
    assert packages == {"keras_cross_stitch"}
    assert "keras_cross_stitch/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_every_public_name_is_documented():
    for name in keras_cross_stitch.__all__:
        documentation = getattr(keras_cross_stitch, name).__doc__
        assert "Example:" in documentation, name
        assert f"`{name}`" in (ROOT / "README.md").read_text(), name


def test_the_readme_starts_with_code_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(2, 240, 320, 3))
    targets = {
        "segmentation": rng.integers(0, 40, (2, 240, 320)),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
    }
    image = rng.uniform(0, 255, (2, 240, 320, 3))
    dataset = tf.data.Dataset.from_tensors((image, targets))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    fit = keras.Model.fit
    # Quiet, and without the advice on shuffling.
    monkeypatch.setattr(
        keras.Model, "fit", lambda *args: fit(*args, shuffle=False, verbose=0)
    )
    exec(code.group(1), {"dataset": dataset})

    served = tf.saved_model.load(tmp_path / "serving/my_model/1")
    assert set(served.signatures) == {"serving_default", "segmentation", "normals"}
