"""What tests of several packages share."""

import os
import shutil

# As the programs do, before TensorFlow is imported: a test computes with the same
# convolutions as the processes that it starts.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import pytest

# It imports PyTorch, and --doctest-modules imports all that it finds.
collect_ignore = ["speed_pytorch.py"]


@pytest.fixture(autouse=True)
def seeds():
    """`fitting.fit` makes all that follows deterministic, which asks for seeds."""
    keras.utils.set_random_seed(0)


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
