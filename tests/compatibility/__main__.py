"""Which ready-made models can be stitched: `make compatibility` writes the page.

Every model, and every pair of models, runs in a process of its own and adds a row as it
ends; rows that are there are not made again. `python -m tests.compatibility models` or
`pairs` does one of both. Not a test, and not run by CI.
"""

import csv
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from tests.compatibility import checks
from tests.compatibility.models import BACKBONES, FAMILIES, TEXTS, applications
from tests.compatibility.page import MODELS, PAIRS, rows, write_page

MINUTES = 30  # of a processor, for one row, however busy the machine is


def models():
    names = ["LSTM", "Bidirectional LSTM", *BACKBONES, *applications()]
    columns = ["model", "way", "input", "layers", "taps", "seconds", "result"]
    todo = itertools.product(names, ("nested", "flat"))
    add_rows(MODELS, columns, todo, checks.one_model)


def pairs():
    columns = ["first", "second", "taps", "seconds", "result"]
    # The quickest first.
    families = sorted(
        itertools.product(FAMILIES, repeat=2),
        key=lambda pair: sum(map(FAMILIES.index, pair)),
    )
    texts = [pair for one in TEXTS for pair in (one, one[::-1])]
    add_rows(PAIRS, columns, [*texts, *families], checks.pair)


def add_rows(path, columns, todo, check):
    """Adds the rows of `todo` that are missing: two names, of which `check` is called.

    What it returns stands in the columns between those names and the seconds.
    """
    if not path.exists():
        append(path, columns)
    there = {tuple(row[key] for key in columns[:2]) for row in rows(path)}
    nothing = [""] * (len(columns) - 4)
    # A fork has imported Keras already, and does nothing with it before.
    fork = multiprocessing.get_context("fork")
    for names in todo:
        if names in there:
            continue
        process = fork.Process(target=add_row, args=(path, names, check, nothing))
        process.start()
        process.join()
        if process.exitcode:
            too_long = process.exitcode == -signal.SIGXCPU
            ended = f"ended with exit code {process.exitcode}"
            why = f"takes over {MINUTES} minutes of a processor" if too_long else ended
            append(path, [*names, *nothing, "", f"It {why}"])
        print(*rows(path)[-1].values(), flush=True)
        write_page()


def add_row(path, names, check, nothing):
    resource.setrlimit(resource.RLIMIT_CPU, (60 * MINUTES, resource.RLIM_INFINITY))
    keras.utils.set_random_seed(0)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    try:
        found, result = check(*names), "works"
    except Exception as error:
        found, result = nothing, " ".join(str(error).split()).split(". ")[0][:200]
    append(path, [*names, *found, round(time.monotonic() - start), result])


def append(path, row):
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


if __name__ == "__main__":
    for part in sys.argv[1:] or ["models", "pairs"]:
        {"models": models, "pairs": pairs}[part]()
