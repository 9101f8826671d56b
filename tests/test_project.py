"""The project's own promises: what the wheel holds, who imports whom, the README."""

import ast
import graphlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import keras_cross_stitch

ROOT = Path(__file__).parents[1]


def imports(path):
    """The top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
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


def rooms(package):
    """{room: the rooms that it imports}; a room is a folder or a single file."""
    found = {path.stem: set() for path in (ROOT / package).iterdir()}
    for path in (ROOT / package).rglob("*.py"):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                source, *parts = node.module.split(".")
                if source == package:
                    named = {alias.name for alias in node.names} & {*found}
                    found[room] |= {parts[0]} if parts else named
        found[room].discard(room)
    del found["__init__"]  # has no room of its own: it names what is in others
    return found


@pytest.mark.parametrize("package", ["keras_cross_stitch", "training", "export"])
def test_the_arrows_between_rooms_run_one_way(package):
    imported = rooms(package)
    assert any(imported.values())
    graphlib.TopologicalSorter(imported).prepare()  # a circle is a CycleError


def test_help_loads_neither_tensorflow_nor_a_server():
    code = (
        "import sys; from export.__main__ import app; from typer.testing import *; "
        "help = [[], *([x.callback.__name__] for x in app.registered_commands)]; "
        "codes = [CliRunner().invoke(app, [*x, '--help']).exit_code for x in help]; "
        "print(*codes, *{'tensorflow', 'keras', 'grpc', 'uvicorn'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0"] * 6


def test_studies_are_asked_for_by_the_command_line_alone():
    """What reads runs is above what makes them."""
    above = {room for room, below in rooms("training").items() if "study" in below}
    assert above == {"__main__"}


def test_only_the_export_needs_tensorflow():
    for path in (ROOT / "keras_cross_stitch").glob("*.py"):
        if path.name not in ("saved_model.py", "trial_input.py", "faster_layers.py"):
            assert "tensorflow" not in set(imports(path)), path


def test_what_the_project_names_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [
        *project["project"]["dependencies"],
        *chain(*project["project"]["optional-dependencies"].values()),
        *chain(*project["dependency-groups"].values()),
    ]
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}

    for requirement in map(Requirement, named):
        name = canonicalize_name(requirement.name)
        if name != "openvino":  # tried with, and not installed by `make install`
            assert requirement.specifier.contains(pinned[name]), requirement


def test_the_library_alone_depends_on_keras_and_numpy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {Requirement(line).name for line in project["dependencies"]}
    assert needed == {"keras", "numpy"}


def test_the_workflows_run_the_library_on_all_that_pyproject_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [
        x.rpartition(" ")[2]
        for x in project["classifiers"]
        if re.search(r"Python :: 3\.\d", x)
    ]
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    matrix = jobs["library"]["strategy"]["matrix"]

    assert matrix["python"] == pythons
    assert set(matrix["backend"]) == {"tensorflow", "jax", "torch"}
    assert set(matrix["backend"]) < set(project["optional-dependencies"])


def test_what_the_workflows_run_is_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            assert set(re.findall(r"^make (\w+)", commands, re.M)) <= set(targets)
            for file in re.findall(r"keras_cross_stitch/\S+\.py", str(job)):
                assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
    ],
)
def test_github_takes_its_files(schema, files):
    command = ["check_jsonschema", "--builtin-schema", schema, *ROOT.glob(files)]
    run = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def test_a_commit_is_linted_by_the_version_that_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (ruff,) = hooks["repos"]
    assert (
        f"\nruff=={ruff['rev'].removeprefix('v')}\n"
        in (ROOT / ".ci/constraints.txt").read_text()
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: what builds in the checkout, another process may be building there too.
    shutil.copytree(ROOT / "keras_cross_stitch", folder / "keras_cross_stitch")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, folder], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.xdist_group("wheel")
@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(wheel):
    files = zipfile.ZipFile(wheel).namelist()

    packages = {name.split("/")[0] for name in files if "dist-info" not in name}
    assert packages == {"keras_cross_stitch"}
    assert "keras_cross_stitch/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)


# Where only the wheel and what it depends on can be imported from.
RUN_EXAMPLES = """
import doctest
import keras_cross_stitch
from keras_cross_stitch import networks
assert keras_cross_stitch.__file__.startswith({folder!r}), keras_cross_stitch.__file__
print(doctest.testmod(networks))
"""


@pytest.mark.xdist_group("wheel")
@pytest.mark.slow
def test_the_installed_wheel_runs_the_examples(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    subprocess.run([*install, "--target", tmp_path, wheel], check=True)

    code = RUN_EXAMPLES.format(folder=str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )

    found = re.search(r"failed=(\d+), attempted=(\d+)", process.stdout)
    assert found, process.stdout
    assert int(found[1]) == 0, process.stdout
    assert int(found[2]) > 5


def test_the_clients_wheel_names_what_the_client_imports():
    folder = ROOT / "export" / "client"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    named = {Requirement(line).name for line in project["dependencies"]}
    imported = set(chain(*map(imports, folder.glob("*.py")))) - sys.stdlib_module_names
    of_others = {"PIL", "tensorflow", "keras_cross_stitch", "export"}  # not for arrays
    packages = {"grpc": "grpcio", "google": "protobuf"}
    assert {packages.get(x, x) for x in imported - of_others} == named


# Where there is neither TensorFlow nor Keras nor a clone; both ways are tried.
ASK = """
import sys
for missing in ("tensorflow", "keras", "export", "tensorflow_serving"):
    sys.modules[missing] = None
from keras_cross_stitch_client import Client, ServingError
for address in ("127.0.0.1:1", "http://127.0.0.1:1"):
    with Client(address, timeout=0.2) as client:
        try:
            client.predict("normals", [b"a picture"])
        except ServingError as error:
            print(error.code.name)
"""


@pytest.mark.slow
def test_the_clients_wheel_asks_without_tensorflow(tmp_path):
    shutil.copytree(ROOT / "export" / "client", tmp_path / "client")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    target = tmp_path / "installed"
    subprocess.run([*install, "--target", target, tmp_path / "client"], check=True)
    (about,) = target.glob("keras_cross_stitch_client-*.dist-info")

    process = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        check=True,
        capture_output=True,
        text=True,
    )

    assert set(process.stdout.split()) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert len(process.stdout.split()) == 2
    assert about.name == (
        f"keras_cross_stitch_client-{keras_cross_stitch.__version__}.dist-info"
    )


def test_every_public_name_is_documented():
    for name in keras_cross_stitch.__all__:
        documentation = getattr(keras_cross_stitch, name).__doc__
        assert "Example:" in documentation, name
        assert f"`{name}`" in (ROOT / "docs/api.md").read_text(), name


@pytest.mark.xdist_group("wheel")
def test_the_wheel_and_the_package_have_one_version(wheel):
    assert wheel.name.startswith(
        f"keras_cross_stitch-{keras_cross_stitch.__version__}-"
    )


def test_changes_and_citation_are_of_this_version():
    version = keras_cross_stitch.__version__
    (newest, *_) = re.findall(
        r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert newest == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


# What the python blocks of docs/using.md need, by words that stand in one of
# them alone. They run in order, in one namespace.


def models_trained_apart():
    def tower(size, outputs):
        image = x = keras.Input((size, size, 3), name="image")
        for k, filters in enumerate((4, 8)):
            x = keras.layers.Conv2D(filters, 3, 2, padding="same", name=f"c{k}")(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(image, keras.layers.Dense(outputs)(x))

    tower(64, 5).save("kind.keras")
    tower(48, 1).save("age.keras")
    names = ["common_taps", "stitch", "LearningRateGroups"]
    of_library = {name: getattr(keras_cross_stitch, name) for name in names}
    return {"keras": keras, **of_library}


def towers_with_layers_of_other_names():
    def tower(tap):
        image = keras.Input((8, 8, 3), name="image")
        x = keras.layers.Conv2D(4, 3, padding="same", name=tap)(image)
        return keras.Model(image, keras.layers.Conv2D(1, 1, name="out")(x))

    return {
        "unet": tower("down2"),
        "mobilenet": tower("block_3_project_BN"),
    }


def a_subclassed_model():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.score = keras.layers.Dense(2)

        def call(self, x):
            return self.score(x)

    return {"towers": {"kind": Mine()}}


def backbone():
    return {
        "backbone": keras.applications.MobileNetV2(
            weights=None,
            include_top=False,
            input_shape=(96, 96, 3),
            alpha=0.35,
            name="mobilenetv2",
        )
    }


def labels_of_some_tasks():
    """Two data sets of one image each, and a model of both tasks."""
    keras.utils.set_random_seed(0)  # whatever the blocks above have drawn
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 1, (16, 16, 3)).astype("float32")
    inputs = keras.Input((16, 16, 3), name="image")
    outputs = {
        "depth": keras.layers.Conv2D(1, 1)(inputs),
        "segmentation": keras.layers.Conv2D(3, 1)(inputs),
    }
    depth = image[..., :1] + 2.0
    classes = image.argmax(axis=-1).astype("int32")
    return {
        "tf": tf,
        "MaskedLoss": keras_cross_stitch.MaskedLoss,
        "MaskedMetric": keras_cross_stitch.MaskedMetric,
        "model": keras.Model(inputs, outputs),
        "depths": tf.data.Dataset.from_tensors((image, depth)),
        "segmentations": tf.data.Dataset.from_tensors((image, classes)),
    }


def a_table():
    """Eight images, and a table in which each task lacks some labels."""
    images = np.random.default_rng(0).uniform(0, 1, (8, 4)).astype("float32")
    rows = [
        f"{k}.jpg,{'' if k == 2 else 30 + k},{'' if k == 5 else k % 2}"
        for k in range(8)
    ]
    Path("labels.csv").write_text("\n".join(["file,age,kind", *rows]), encoding="utf-8")
    x = keras.Input((4,), name="image")
    outputs = {
        "age": keras.layers.Dense(1)(x),
        "kind": keras.layers.Dense(2, activation="softmax")(x),
    }
    return {"pd": pd, "images": images, "model": keras.Model(x, outputs)}


def weigh_losses():
    return {"weigh_losses": keras_cross_stitch.weigh_losses}


def numbers_for_every_label():
    """The labels of the table, filled up."""
    kind = np.arange(8) % 2
    age = (30.0 + np.arange(8))[:, None]
    return {"np": np, "labels": {"kind": kind, "age": age}}


def towers_with_a_frozen_layer():
    def tower(units, activation):
        keras.utils.set_random_seed(0)
        x = keras.Input((4,), name="image")
        y = keras.layers.Dense(8, activation="relu", trainable=False, name="stem")(x)
        y = keras.layers.Dense(8, activation="relu", name="hidden")(y)
        return keras.Model(x, keras.layers.Dense(units, activation)(y))

    return {
        "LearningRateGroups": keras_cross_stitch.LearningRateGroups,
        "kind": tower(2, "softmax"),
        "age": tower(1, None),
        "losses": {"kind": "sparse_categorical_crossentropy", "age": "mae"},
    }


def maps():
    maps = np.random.default_rng(0).uniform(size=(4, 6, 6, 1)).astype("float32")
    return {"maps": maps, "map_labels": {"depth": maps + 1, "edges": maps > 0.5}}


def nothing_more():
    return {}


NEEDS = {
    'load_model("kind.keras")': models_trained_apart,
    "at=[{": towers_with_layers_of_other_names,
    "projections=10": nothing_more,
    'towers["kind"].call': a_subclassed_model,
    "backbone.layers[:54]": backbone,
    "sample_from_datasets": labels_of_some_tasks,
    "read_csv": a_table,
    "weigh_losses(model": weigh_losses,
    "sample_weight=": numbers_for_every_label,
    'save("stitched.keras")': nothing_more,
    "share_frozen=False": towers_with_a_frozen_layer,
    "def augmented": nothing_more,
    "def flipped": maps,
    "train_on_batch": nothing_more,
    "GradientTape": nothing_more,
    "keras_hub": nothing_more,
}


def run_blocks_of_using(numbers, namespace):
    text = (ROOT / "docs/using.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == len(NEEDS)
    for block in blocks[numbers]:
        if "keras_hub" in block and not importlib.util.find_spec("keras_hub"):
            continue  # not among what the tests install; see tests/compatibility
        needs = [NEEDS[words] for words in NEEDS if words in block]
        assert len(needs) == 1, f"say in NEEDS what this block needs:\n{block}"
        namespace.update(needs[0]())
        exec(block, namespace)


@pytest.mark.slow
@pytest.mark.usefixtures("fit_must_help")
def test_the_python_blocks_of_using_run_and_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    run_blocks_of_using(slice(1), namespace)
    alone, image = namespace["towers"], np.full((2, 64, 64, 3), 200.0)
    for task, answer in namespace["model"](image).items():
        np.testing.assert_allclose(answer, alone[task](image), rtol=1e-4)
    run_blocks_of_using(slice(1, 6), namespace)


@pytest.mark.slow
def test_the_shorter_python_blocks_of_using_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = keras.Model.fit
    monkeypatch.setattr(
        keras.Model, "fit", lambda *args, **more: fit(*args, **more, verbose=0)
    )
    names = ["MaskedLoss", "MaskedMetric", "stitch"]
    namespace = {name: getattr(keras_cross_stitch, name) for name in names}
    run_blocks_of_using(slice(6, None), {"keras": keras, "tf": tf, **namespace})
    printed = capsys.readouterr().out
    assert "['shared_turned']" in printed
    assert "(4, 6, 6, 1) ['depth', 'edges']" in printed
    assert "['age_loss', 'kind_loss', 'loss']" in printed


@pytest.mark.slow
def test_importing_sets_nothing_for_other_processes():
    """The programs do, before TensorFlow is imported; a test that imports must not."""
    code = (
        "import importlib, os, pkgutil\n"
        "import tensorflow, tensorflow_datasets, cv2, sklearn.cluster\n"
        "before = dict(os.environ)\n"
        "for name in ('keras_cross_stitch', 'training', 'export'):\n"
        "    package = importlib.import_module(name)\n"
        "    for x in pkgutil.walk_packages(package.__path__, f'{name}.'):\n"
        "        importlib.import_module(x.name)\n"
        "assert not any(k.startswith('TF_ENABLE') for k in os.environ), os.environ\n"
        "print({k for k in os.environ if os.environ[k] != before.get(k)})\n"
    )
    environment = {k: x for k, x in os.environ.items() if not k.startswith("TF_")}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )

    assert process.stdout == "set()\n"
