"""What stitching costs, and how that compares: `make speed` writes speed.csv.

All cases run in turn, round after round, so that a machine whose speed changes is
unfair to none; the medians are what is told, in docs/speed.md. Where PyTorch is
installed, it is the peer; the limits are measured on the same machine. Not a test, and
not run by CI.
"""

import csv
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import tensorflow as tf

from keras_cross_stitch import CrossStitch, alexnet, stitch

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "speed.csv"
BATCH = 16
TAPS = ["pool1", "pool2", "pool5", "fc6", "fc7"]
# Of AlexNets of half the width.
SITES = [(27, 27, 48), (13, 13, 128), (6, 6, 128), (2048,), (2048,)]
RNG = np.random.default_rng(0)


def maps(tasks):
    """For each site the maps of all tasks."""
    return [
        [RNG.normal(size=(BATCH, *site)).astype("float32") for _ in range(tasks)]
        for site in SITES
    ]


def units(tasks):
    """{case: function} of the units at all sites, forward and with gradients."""
    x = [[tf.constant(a) for a in site] for site in maps(tasks)]
    layers = [CrossStitch() for _ in SITES]
    for layer, site in zip(layers, x, strict=True):
        layer(site)

    @tf.function
    def forward():
        return [layer(site) for layer, site in zip(layers, x, strict=True)]

    @tf.function
    def both():
        with tf.GradientTape() as tape:
            tape.watch(x)
            mixed = forward()
        alphas = [layer.alpha.value for layer in layers]
        return tape.gradient(mixed, [x, alphas], output_gradients=x)

    name = f"unit, T={tasks}"
    return {f"{name}, forward": forward, f"{name}, forward and backward": both}


def networks(dtype, stitched):
    """{case: function} of a training step and of inference of two AlexNets."""
    keras.config.set_dtype_policy(dtype)
    towers = {task: alexnet(20, width=0.5) for task in ("a", "b")}
    model = stitch(towers, at=TAPS if stitched else [])
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.001, momentum=0.9), dict.fromkeys("ab", loss))
    image = tf.constant(RNG.uniform(0, 255, (BATCH, 227, 227, 3)), "float32")
    labels = dict.fromkeys("ab", tf.constant(RNG.integers(0, 20, BATCH)))
    name = f"two AlexNets, {dtype}, {'stitched' if stitched else 'apart'}"
    return {
        f"{name}, step": lambda: model.train_on_batch(image, labels),
        f"{name}, inference": lambda: model.predict_on_batch(image),
    }


def limits():
    """{case: function}: what no implementation is faster than."""
    x = [a for site in maps(2) for a in site]
    copies = [np.empty_like(a) for a in x]
    a = tf.constant(RNG.normal(size=(1024, 1024)), "float32")

    def copy():
        for source, target in zip(x, copies, strict=True):
            np.copyto(target, source)

    return {
        "limit: the maps of T=2 copied once": copy,
        "limit: 2.1 GFLOP of a matrix product": tf.function(lambda: a @ a),
    }


def pytorch():
    """{case: function} of the unit in PyTorch, eager.

    `torch.compile` (PyTorch 2.14) crashes a process that has TensorFlow 2.21 in it.
    """
    import torch

    weights = torch.full((2, 2), 0.1) + 0.8 * torch.eye(2)
    x = [[torch.tensor(a, requires_grad=True) for a in site] for site in maps(2)]
    alphas = [
        weights[..., None].repeat(1, 1, site[-1]).requires_grad_() for site in SITES
    ]

    def forward():
        return [
            [alpha[i, 0] * a + alpha[i, 1] * b for i in range(2)]
            for alpha, (a, b) in zip(alphas, x, strict=True)
        ]

    def both():
        mixed = [a for site in forward() for a in site]
        inputs = [a for site in x for a in site]
        upstream = [a.detach() for a in inputs]
        return torch.autograd.grad(mixed, [*inputs, *alphas], upstream)

    name = "unit, T=2, PyTorch eager"
    return {f"{name}, forward": forward, f"{name}, forward and backward": both}


def finished(result):
    """Waits for what TensorFlow may still be computing."""
    for x in keras.tree.flatten(result):
        if isinstance(x, tf.Tensor):
            x.numpy()


def main(rounds=20):
    cases = {**units(2), **units(4), **limits()}
    for dtype in ("float32", "mixed_bfloat16"):
        cases |= networks(dtype, False) | networks(dtype, True)
    if importlib.util.find_spec("torch"):
        cases |= pytorch()
    times = {name: [] for name in cases}
    for round_ in range(-2, rounds):  # the first two trace and warm up
        for name, run in cases.items():
            start = time.perf_counter()
            finished(run())
            if round_ >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    rows = [
        (name, f"{statistics.median(ms):.2f}", f"{min(ms):.2f}")
        for name, ms in times.items()
    ]
    header = ("case", "median_ms", "fastest_ms")
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    lines = [" | ".join(row) for row in [("case", "median, ms", "fastest, ms"), *rows]]
    lines.insert(1, "--- | ---: | ---:")
    table = "".join(f"| {line} |\n" for line in lines)
    page = DOCS / "speed.md"
    before, mark, rest = page.read_text().partition("<!-- speed -->\n")
    after = rest[rest.index("<!-- /speed -->") :]
    page.write_text(f"{before}{mark}\n{table}\n{after}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
