"""The first code that a newcomer copies runs, and what it trains learns."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def side(diff: str, sign: str) -> str:
    """The code that the diff leaves out with the other sign."""
    lines = [line for line in diff.splitlines() if line[:1] in (" ", sign, "")]
    return "\n".join(line[2:] for line in lines)


@pytest.mark.usefixtures("fit_must_help")
def test_the_readme_goes_from_two_fits_to_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (diff,) = blocks("README.md", "diff")

    before: dict = {}
    exec(side(diff, "-"), before)
    assert before["colour_model"].optimizer.iterations > 0
    assert before["brightness_model"].optimizer.iterations > 0

    after: dict = {}
    exec(side(diff, "+"), after)
    served = tf.saved_model.load(tmp_path / "serving/my_model/1")
    assert set(served.signatures) == {"serving_default", "colour", "brightness"}
    one, other = after["tower"](3), after["tower"](3)
    for weights, truth in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, truth)


@pytest.mark.usefixtures("fit_must_help")
def test_the_first_steps_run_and_train(capsys):
    (block,) = blocks("docs/getting_started.md", "python")
    exec(block, {})

    printed = capsys.readouterr().out
    assert "cross_stitch_pool1" in printed


@pytest.mark.usefixtures("fit_must_help")
def test_the_first_page_of_the_site_runs_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from keras_cross_stitch import LearningRateGroups, export_saved_model, stitch

    def tower(outputs, activation):
        keras.utils.set_random_seed(0)
        x = image = keras.Input((16, 16, 3), name="image")
        for block in ("block3", "block4"):
            x = keras.layers.Conv2D(8, 3, activation="relu", name=block)(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(image, keras.layers.Dense(outputs, activation)(x))

    rng = np.random.default_rng(0)
    images = rng.random((64, 16, 16, 3)) * rng.random((64, 1, 1, 3))
    age = images.mean(axis=(1, 2, 3))
    labels = {"kind": images.mean(axis=(1, 2)).argmax(axis=-1), "age": age}
    names = {
        "keras": keras,
        "stitch": stitch,
        "LearningRateGroups": LearningRateGroups,
        "export_saved_model": export_saved_model,
        "kind_model": tower(3, "softmax"),
        "age_model": tower(1, None),
        "dataset": tf.data.Dataset.from_tensors((images, labels)).repeat(80),
    }
    (block,) = blocks("docs/index.md", "python")
    exec(block, names)

    assert (tmp_path / "serving/my_model/1").is_dir()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (ROOT / target).exists(), target
