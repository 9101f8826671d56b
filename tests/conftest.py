"""What tests of several packages share."""

import os
import shutil
import sys

# As the programs do, before TensorFlow is imported: a test computes with the same
# convolutions as the processes that it starts.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import pytest

# It imports PyTorch, and --doctest-modules imports all that it finds.
collect_ignore = ["speed_pytorch.py"]


@pytest.fixture(autouse=True)
def seeds():
    """`fitting.fit` makes its process deterministic, which asks for seeds.

    What the next test computes is as in a process of its own again: with
    determinism there is no XLA, and some ops are slow.
    """
    keras.utils.set_random_seed(0)
    yield
    if config := sys.modules.get("tensorflow.python.framework.config"):
        config.disable_op_determinism()


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, where the machine has one."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


class EveryLossFalls(keras.callbacks.Callback):
    """Fails where training does harm: a loss that stays, a weight that runs away."""

    def on_train_begin(self, logs=None):
        self.means = []  # Keras logs the mean since the epoch's start

    def on_train_batch_end(self, batch, logs=None):
        self.means.append({k: v for k, v in logs.items() if k.endswith("loss")})

    def on_train_end(self, logs=None):
        steps = np.arange(1, len(self.means) + 1)
        for name in self.means[0]:
            sums = steps * [means[name] for means in self.means]
            losses = np.diff(sums, prepend=0)
            first, last = losses[:2].mean(), losses[-2:].mean()
            assert np.isfinite(losses).all(), (name, losses)
            assert last < first - 0.05 * abs(first), (name, losses)
        for variable in self.model.trainable_variables:
            assert np.abs(variable).max() < 20, variable.path


@pytest.fixture
def fit_must_help(monkeypatch):
    """What is fitted is fitted quietly, and watched."""
    fit = keras.Model.fit
    # Without the advice on shuffling what is in order already.
    watched = {"shuffle": False, "verbose": 0, "callbacks": [EveryLossFalls()]}
    monkeypatch.setattr(
        keras.Model, "fit", lambda *args, **more: fit(*args, **more, **watched)
    )
