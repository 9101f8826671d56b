"""Folders of runs as training leaves them, made up in a moment."""

import csv
import json

import numpy as np
import pytest
from matplotlib.image import imsave

BETTER = {"single_task": 0.0, "single_task_longer": 0.2, "cross_stitch": 0.7}
CLASSES = ["wall", "floor", "<b>lamp</b> & 'shade'", "bag", "rug"]
LAYERS = ("conv2", "conv4", "fc6", "score")


def answers():
    rng = np.random.default_rng(0)
    return {
        "segmentation": {
            "kind": "classes",
            "names": CLASSES,
            "colours": rng.integers(0, 256, (len(CLASSES), 3)).tolist(),
            "units": "probability",
            "description": "The probability of each class at each pixel",
        },
        "normals": {
            "kind": "normals",
            "names": [],
            "colours": [],
            "units": "",
            "description": "Unit normals: x right, y down, z away from the camera",
        },
    }


def write_run(folder, gain=0.0, *, seed=0, epochs=4, units=(), labels=1.0):
    """A finished run: every metric is better by `gain`, and by the seed's luck."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *folder.parent.name.encode()])
    luck = 0.3 * seed + rng.normal(0, 0.05)
    high, low = 40 + gain + luck, 30 - gain - luck
    metrics = {
        "segmentation": {"pixel_accuracy": high, "miou": high / 2},
        "normals": {"mean_angle": low, "median_angle": low - 5, "within_11_25": high},
    }
    recipe = {
        "method": folder.parent.name.partition("@")[0],
        "data": {
            "dataset": "rooms <&>",
            "config": "full",
            "train_split": "train",
            "test_split": "test",
            "label_fraction": ["segmentation", labels],
        },
        "schedule": {"epochs": epochs, "learning_rate": 0.05},
        "seed": seed,
    }
    for name, value in (
        ("metrics", metrics),
        ("recipe", recipe),
        ("answers", answers()),
        ("made_by", {"commit": "0123abc", "versions": "", "processor": ""}),
        ("costs", {"parameters": 1_250_000, "multiply_adds": 3_400_000_000}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))
    with open(folder / "per_class.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "class", "metric", "value"))
        for i, name in enumerate(CLASSES):
            writer.writerow(("segmentation", name, "iou", 20 + i * gain + luck))
            writer.writerow(("segmentation", name, "pixels", 10 ** (5 - i)))
            writer.writerow(("segmentation", name, "labels", 10 ** (1 + i)))
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        pairs = ("normals_from_normals", "normals_from_segmentation")
        alphas = [f"alpha/{unit}/{pair}" for unit, _ in units for pair in pairs]
        writer.writerow(
            ("epoch", "loss", "normals_loss", "segmentation_loss", *alphas, "seconds")
        )
        for epoch in range(epochs):
            one, two = rng.uniform(0, 0.1, 2) + 2 * 0.8**epoch
            means = [0.9 - 0.1 * epoch, 0.1 + 0.1 * epoch] * len(units)
            writer.writerow((epoch, one + two, one, two, *means, 60))
    alphas = {
        unit: rng.normal([[0.9, 0.1], [0.1, 0.9]], 0.1, (size, 2, 2)).T.astype("f4")
        for unit, size in units
    }
    if alphas:
        np.savez(folder / "alpha.npz", **alphas)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Three recipes: methods and splits with three seeds, and two label fractions."""
    root = tmp_path_factory.mktemp("runs")
    units = [("cross_stitch_pool1", 12), ("cross_stitch_fc7", 64)]
    for seed in range(3):
        for method, gain in BETTER.items():
            write_run(
                root / "nyuv2" / method / f"seed{seed}",
                gain,
                seed=seed,
                epochs=6 if method == "single_task" else 3,
                units=units if method == "cross_stitch" else (),
            )
        splits = {"single_task_as_long": 0.1} | {
            f"split@{layer}": 0.1 * i for i, layer in enumerate(LAYERS)
        }
        for method, gain in splits.items():
            write_run(root / "nyuv2" / method / f"seed{seed}", gain, seed=seed)
    for share in (10, 50):
        folder = root / f"scenes-labels{share}"
        for method, gain in {
            "single_task_as_long": 0,
            "cross_stitch_from_start": 1,
        }.items():
            write_run(folder / method / "seed0", gain, labels=share / 100)
    stopped = root / "nyuv2" / "cross_stitch" / "seed3"
    stopped.mkdir()
    (stopped / "recipe.json").write_text("{}")
    (root / "datasets" / "scenes").mkdir(parents=True)
    (root / "nyuv2" / "gallery").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 640, 3), dtype=np.uint8)
    imsave(root / "nyuv2" / "gallery" / "segmentation_<1>.png", pixels)
    return root
