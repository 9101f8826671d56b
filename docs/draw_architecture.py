"""Draws docs/architecture.svg: two towers, and the units between them."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

TASKS = {"segmentation": ("#0072b2", 1.0), "normals": ("#d55e00", -1.0)}
STAGES = ["conv1\npool1", "conv2\npool2", "conv3-5\npool5", "fc6", "fc7"]
INK, PAPER = "#222222", "#ffffff"
FIRST, STEP, WIDTH, HEIGHT = 1.7, 2.1, 1.05, 0.8  # of the stages' boxes


def box(axes, x, y, text, colour, width=WIDTH, height=HEIGHT):
    """A box around its middle, (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor="none")
    )
    axes.text(x, y, text, ha="center", va="center", color=PAPER, fontsize=10)


def line(axes, start, end, colour, weight):
    axes.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "-|>,head_width=0.25,head_length=0.4",
            "color": colour,
            "linewidth": weight,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def draw(path: Path) -> None:
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": path.name})
    figure = plt.figure(figsize=(11, 3.3), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.7, 14.9), ylim=(-2.1, 2.45))
    axes.set_axis_off()
    last = FIRST + STEP * (len(STAGES) - 1)

    box(axes, 0, 0, "image", INK, 0.9, 1.1)
    for task, (colour, y) in TASKS.items():
        line(axes, (0.45, 0.3 * y), (FIRST - WIDTH / 2, y), INK, 1.2)
        for index, stage in enumerate(STAGES):
            box(axes, FIRST + STEP * index, y, stage, colour)
        box(axes, last + STEP, y, "head", colour)
        end = last + STEP + WIDTH / 2
        line(axes, (end, y), (end + 0.4, y), INK, 1.2)
        axes.text(end + 0.47, y, task, va="center", color=colour, fontsize=11)

    for index in range(len(STAGES)):
        left = FIRST + STEP * index + WIDTH / 2
        right = left + STEP - WIDTH
        for colour, y in TASKS.values():
            line(axes, (left, y), (right, y), colour, 2.6)
            line(axes, (left, 0.85 * y), (right, -0.85 * y), colour, 1.0)

    middle = FIRST + STEP / 2
    axes.text(middle, 2.15, "a cross-stitch unit", ha="center", fontsize=10, color=INK)
    axes.plot([middle, middle], [1.98, 1.15], color=INK, linewidth=0.8)
    axes.text(
        (FIRST + last) / 2 + 1.2,
        -1.85,
        "thick: how much a task keeps of its own map (starts at 0.9)      "
        "thin: how much it takes of the other's (starts at 0.1)      "
        "both learned, per channel",
        ha="center",
        va="center",
        fontsize=8.5,
        color=INK,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.svg"))
