"""What stitching costs, and how that compares: `make speed` writes docs/speed.md.

All cases run in turn, round after round, so that a machine whose speed changes is
unfair to none; the medians are what is told. Where PyTorch is installed, or
`make speed PYTORCH=python` names a Python that has it, it is the peer
(tests/speed_pytorch.py); the limits are measured on the same machine. Not a test, and
not run by CI.
"""

import csv
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import tensorflow as tf

from keras_cross_stitch import CrossStitch, alexnet, stitch

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "speed.csv"
PEER = Path(__file__).with_name("speed_pytorch.py")
THREADS = 2
BATCH = 16
TAPS = ["pool1", "pool2", "pool5", "fc6", "fc7"]
# Of AlexNets of half the width.
SITES = [(27, 27, 48), (13, 13, 128), (6, 6, 128), (2048,), (2048,)]
# {policy: {pass: the most that it may take of PyTorch's best}}. Nobody trains weights
# that are in bfloat16 themselves.
AIMS = {
    "float32": {"inference": 0.95, "step": 0.90},
    "mixed_bfloat16": {"inference": 0.95, "step": 0.90},
    "bfloat16": {"inference": 0.95},
}
TITLES = {
    "float32": "float32",
    "mixed_bfloat16": "bfloat16",
    "bfloat16": "weights in bfloat16",
}
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
        # With the maps, or TensorFlow leaves out the forward pass.
        return mixed, tape.gradient(mixed, [x, alphas], output_gradients=x)

    name = f"unit, T={tasks}, ours"
    return {f"{name}, forward": forward, f"{name}, forward and backward": both}


def two_alexnets(stitched):
    towers = {task: alexnet(20, width=0.5) for task in ("a", "b")}
    return stitch(towers, at=TAPS if stitched else [])


def networks(dtype, stitched):
    """{case: function} of a training step and of inference of two AlexNets."""
    keras.config.set_dtype_policy(dtype)
    model = two_alexnets(stitched)
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.001, momentum=0.9), dict.fromkeys("ab", loss))
    image = tf.constant(RNG.uniform(0, 255, (BATCH, 227, 227, 3)), "float32")
    labels = dict.fromkeys("ab", tf.constant(RNG.integers(0, 20, BATCH)))
    name = f"two AlexNets, {dtype}, {'stitched' if stitched else 'apart'}"
    runs = {
        "step": lambda: model.train_on_batch(image, labels),
        "inference": lambda: model.predict_on_batch(image),
    }
    return {f"{name}, {run}": runs[run] for run in AIMS[dtype]}


def limits():
    """{case: function}: what no implementation is faster than."""
    x = [a for site in maps(2) for a in site]
    copies = [np.empty_like(a) for a in x]

    def copy():
        # In one thread: two take longer to start than they save.
        for source, target in zip(x, copies, strict=True):
            np.copyto(target, source)

    def product(dtype):
        a = tf.cast(RNG.normal(size=(2048, 2048)), dtype)
        return tf.function(lambda: a @ a)

    return {
        "limit, the maps of T=2 copied once": copy,
        "limit, a matrix product of 2048, float32": product("float32"),
        "limit, a matrix product of 2048, bfloat16": product("bfloat16"),
    }


def timed(run):
    """Milliseconds. On a CPU TensorFlow returns when all is computed."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def pytorch(python):
    """The versions, and {case: function that gives its milliseconds}."""
    peer = subprocess.Popen(
        [python, PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    version, weights, names = json.loads(peer.stdout.readline())
    ours = count(two_alexnets(stitched=True))
    if weights != ours:
        raise SystemExit(f"PyTorch's network has {weights} weights, ours {ours}.")

    def ask(name):
        print(name, file=peer.stdin, flush=True)
        return float(peer.stdout.readline())

    return version, {name: partial(ask, name) for name in names}


def count(model):
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def gflop():
    """Of the convolutions and products of two AlexNets, by pass."""
    tower = alexnet(20, width=0.5)
    layers = [
        2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
        for layer in tower.layers
        if hasattr(layer, "kernel")
    ]
    forward = 2 * BATCH * sum(layers) / 1e9
    # Backward twice as many, but nobody asks for the gradient of the image.
    return {
        "step": 3 * forward - 2 * BATCH * layers[0] / 1e9,
        "inference": forward,
    }


def step_table(ms):
    """Two AlexNets: apart, stitched, PyTorch's, and the matrix rate."""
    columns = {}
    work = gflop()
    for dtype, aims in AIMS.items():
        limit = f"limit, a matrix product of 2048, {dtype.removeprefix('mixed_')}"
        rate = 2 * 2048**3 / 1e6 / ms[limit]
        for run, aim in aims.items():
            name = f"two AlexNets, {dtype}"
            apart, ours = (ms[f"{name}, {x}, {run}"] for x in ("apart", "stitched"))
            columns[f"{run}, {TITLES[dtype]}"] = {
                "apart, ms": f"{apart:.1f}",
                "stitched, ms": f"{ours:.1f}",
                "stitched / apart": f"{ours / apart:.3f}",
                **against_pytorch(ms, name, run, ours),
                "aim: at most": f"{aim:.2f}",
                "work, GFLOP": f"{work[run]:.1f}",
                "matrix rate, GFLOP/s": f"{rate:.0f}",
                "share of the matrix rate": f"{1000 * work[run] / ours / rate:.0%}",
            }
    return table("two AlexNets", columns)


def unit_table(ms):
    """The units: ours, PyTorch's, and the maps read and written."""
    columns = {}
    copy = ms["limit, the maps of T=2 copied once"]
    for tasks in (2, 4):
        # Backward reads the maps and their gradients, and writes gradients.
        for run, copies in (("forward", 1), ("forward and backward", 2.5)):
            name = f"unit, T={tasks}"
            ours = ms[f"{name}, ours, {run}"]
            limit = copies * copy * tasks / 2
            columns[f"T={tasks}, {run}"] = {
                "ours, ms": f"{ours:.2f}",
                **against_pytorch(ms, name, run, ours),
                "maps read and written once, ms": f"{limit:.2f}",
                "ours / that": f"{ours / limit:.1f}",
            }
    return table("units at five taps", columns)


def against_pytorch(ms, name, run, ours):
    """The best of PyTorch's, if it was there."""
    start, end = f"{name}, PyTorch, ", f", {run}"
    peers = {
        case.removeprefix(start).removesuffix(end): time
        for case, time in ms.items()
        if case.startswith(start) and case.endswith(end)
    }
    if not peers:
        return {}
    best = min(peers, key=peers.get)
    return {
        "PyTorch's best, ms": f"{peers[best]:.{1 if ours > 20 else 2}f}",
        "which is": best,
        "ours / PyTorch's": f"{ours / peers[best]:.2f}",
    }


def table(title, columns):
    """Markdown of {column: {row: cell}}."""
    lines = [[title, *columns], ["---", *["---:"] * len(columns)]]
    for row in next(iter(columns.values())):
        lines.append([row, *(column[row] for column in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(torch_version):
    cpu = dict(re.findall(r"(.+?)\s*: (.+)", Path("/proc/cpuinfo").read_text()))
    flags = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & {*cpu["flags"].split()}
    versions = f"Keras {keras.version()}, TensorFlow {tf.__version__}"
    if torch_version:
        versions += f", PyTorch {torch_version}"
    return (
        f"{cpu['model name'].strip()} (family {cpu['cpu family']}, model "
        f"{cpu['model']}; {', '.join(sorted(flags))}), {os.cpu_count()} cores, "
        f"{THREADS} threads; {versions}.\n"
    )


def main(python=None, rounds=25):
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)
    cases = {**units(2), **units(4), **limits()}
    for dtype in AIMS:
        cases |= networks(dtype, False) | networks(dtype, True)
    cases = {name: partial(timed, run) for name, run in cases.items()}
    torch_version = None
    if python or importlib.util.find_spec("torch"):
        torch_version, peers = pytorch(python or sys.executable)
        cases |= peers
    times = {name: [] for name in cases}
    for round_ in range(-2, rounds):  # the first two trace, compile and warm up
        for name, run in cases.items():
            run()  # brings its data and threads back, as the step before it would
            ms = run()
            if round_ >= 0:
                times[name].append(ms)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("case", "median_ms", "fastest_ms"))
        for name, ms in times.items():
            writer.writerow((name, f"{statistics.median(ms):.2f}", f"{min(ms):.2f}"))
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    page = DOCS / "speed.md"
    before, mark, rest = page.read_text().partition("<!-- speed -->\n")
    after = rest[rest.index("<!-- /speed -->") :]
    parts = (machine(torch_version), step_table(medians), unit_table(medians), after)
    page.write_text(before + mark + "\n" + "\n".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
