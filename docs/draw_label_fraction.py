"""Draws docs/label_fraction.svg from the raw values of docs/results."""

import hashlib
from pathlib import Path

import matplotlib

from training.study import figures, results

FOLDER = Path(__file__).parent
RECIPE = "nyuv2_pretrained"
PANELS = [("segmentation", "miou"), ("normals", "mean_angle")]


def known() -> dict[float, list[results.Row]]:
    """The rows by the share of the train images that has labels."""
    paths = {1.0: FOLDER / "results" / RECIPE / "demo.csv"}
    for percent in range(1, 100):
        path = FOLDER / "results" / f"{RECIPE}-labels{percent}" / "demo.csv"
        if path.exists():
            paths[percent / 100] = path
    rows = {
        share: [row for row, _ in results.read_rows(path)]
        for share, path in sorted(paths.items())
    }
    # One seed says nothing.
    return {x: known for x, known in rows.items() if len({y.seed for y in known}) >= 3}


def digest() -> str:
    """What the drawing is made of."""
    return hashlib.sha256(repr(known()).encode()).hexdigest()[:12]


def draw(path: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": path.name})
    figure = figures.label_fraction(known(), PANELS)
    figure.savefig(path, metadata={"Date": None, "Source": digest()})


if __name__ == "__main__":
    draw(FOLDER / "label_fraction.svg")
