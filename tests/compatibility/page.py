"""docs/compatibility.md, written from the rows that are there."""

import csv
import re
from pathlib import Path

import keras

from tests.compatibility.models import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
MODELS = DOCS / "results" / "compatibility.csv"
PAIRS = DOCS / "results" / "compatibility_pairs.csv"


def rows(path):
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_page():
    models, pairs = rows(MODELS), rows(PAIRS)
    lines = [
        "# Compatibility",
        "",
        f"Keras {keras.__version__}, random weights, smallest sizes. A pair of towers "
        "works if all of this holds: with alpha = identity the joined model gives what "
        "the towers give (1e-5); so does a saved and loaded `.keras` file; the export "
        "gives what the model gives; a training step is finite.",
        "",
        "Raw rows are in [`results/compatibility.csv`](results/compatibility.csv) and "
        "[`results/compatibility_pairs.csv`](results/compatibility_pairs.csv), made by "
        "`make compatibility`.",
        *(models_that_were_not_made_for_each_other(pairs) if pairs else []),
        "",
        "## Two towers of one model",
        "",
        f"{_works(models)} of {len(models)} work, as one flat model or with the "
        "backbone nested (called as a layer). Units stand at two layers; the first "
        "third of a tower is frozen, and stays so; exports are loaded without Keras.",
        "",
        "| model | layers | flat | nested |",
        "| --- | ---: | --- | --- |",
    ]
    by_model: dict[str, dict] = {}
    for row in models:
        by_model.setdefault(row["model"], {})[row["way"]] = row
    for name, ways in sorted(by_model.items(), key=lambda item: item[0].lower()):
        results = [
            ways[x]["result"] if x in ways else "not tried" for x in ("flat", "nested")
        ]
        layers = ways.get("flat", {}).get("layers", "")
        lines.append(f"| {name} | {layers} | {' | '.join(results)} |")
    (DOCS / "compatibility.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def models_that_were_not_made_for_each_other(pairs):
    found = {(row["first"], row["second"]): row for row in pairs}
    lines = [
        "",
        "## Models that were not made for each other",
        "",
        "Ordered pairs out of eight families of `keras.applications`, and of models "
        f"that read words: {_works(pairs)} of {len(pairs)} work. They are joined by "
        "`stitch(towers, common_taps(towers, project=True), project=True)`; the number "
        "is that of the taps, a row is the first tower.",
        "",
        f"| | {' | '.join(map(_in_two_lines, FAMILIES))} |",
        f"| --- |{' ---: |' * len(FAMILIES)}",
    ]
    for first in FAMILIES:
        cells = [_cell(found.pop((first, second), None)) for second in FAMILIES]
        lines.append(f"| {first} | {' | '.join(cells)} |")
    if found:
        lines += ["", "| first | second | taps |", "| --- | --- | ---: |"]
    for (first, second), row in found.items():
        lines.append(f"| {first} | {second} | {_cell(row)} |")
    for row in pairs:
        if row["result"] != "works":
            lines += ["", f"{row['first']} and {row['second']}: {row['result']}"]
    return lines


def _in_two_lines(family):
    return re.sub("(Net|tion|NeXt)(?=.)", r"\1<br>", family)


def _cell(row):
    if row is None:
        return ""
    return row["taps"] if row["result"] == "works" else "fails"


def _works(rows):
    return sum(row["result"] == "works" for row in rows)
