"""What is joined, seen: a column a tower, its stages, and what the units mix.

Reads the names that `stitch` and `split` give, and alpha; changes neither.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from keras_cross_stitch.alpha import TASK_COLORS, in_lines
from keras_cross_stitch.cross_stitch import CrossStitch
from keras_cross_stitch.nddr import NDDR
from keras_cross_stitch.projecting import ProjectedCrossStitch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Stage(NamedTuple):
    """Layers of one owner, a task or "shared", between two units."""

    owner: str
    layers: list[keras.layers.Layer]

    @property
    def names(self) -> str:
        names = [x.name.removeprefix(f"{self.owner}_") for x in self.layers]
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"

    @property
    def is_frozen(self) -> bool:
        weights = [weight for x in self.layers for weight in x.weights]
        return bool(weights) and not any(weight.trainable for weight in weights)

    @property
    def about(self) -> str:
        """How many layers, what shape comes out, whether it is frozen."""
        count = len(self.layers)
        words = [f"{count} layer{'s' if count > 1 else ''}"]
        output = self.layers[-1].output
        if isinstance(output, keras.KerasTensor):
            words.append(" x ".join(str(n or "any") for n in output.shape[1:]))
        return ", ".join([*words, "frozen"] if self.is_frozen else words)


def network_table(model: keras.Model) -> str:
    """Gives as text what `plot_network` draws.

    Args:
        model: Model that `stitch` or `split` has made.

    Returns:
        String, a line for each stage of a tower, and one for each unit and task, with
        what part it takes from which task: `|alpha|`, summed over the channels (of
        `NDDR` all of its weights), of which the parts of a task sum to 1. A unit that
        projects has one more.

    Raises:
        ValueError: For a model that has no dict of tasks.

    Example:

    >>> from keras_cross_stitch import stitch
    >>> def tower(units):
    ...     x = keras.Input((8,), name="x")
    ...     y = keras.layers.Dense(4, name="hidden")(x)
    ...     return keras.Model(x, keras.layers.Dense(units, name="score")(y))
    >>> print(network_table(stitch({"kind": tower(5), "age": tower(1)}, at=["hidden"])))
    kind      hidden (1 layer, 4)
    age       hidden (1 layer, 4)
      unit hidden: age takes 0.90 from age, 0.10 from kind
      unit hidden: kind takes 0.10 from age, 0.90 from kind
    kind      score (1 layer, 5)
    age       score (1 layer, 1)
    """
    tasks, rows = _rows(model)
    width = max(map(len, [*tasks, "shared"])) + 4
    lines = []
    for row in rows:
        if not isinstance(row, list):
            name = row.name.removeprefix("cross_stitch_")
            if isinstance(row, ProjectedCrossStitch):
                lines.append(f"  unit {name}: what is taken is projected, {_size(row)}")
            for task, of_task in zip(row.tasks, _parts(row), strict=True):
                taken = ", ".join(
                    f"{part:.2f} from {source}"
                    for source, part in zip(row.tasks, of_task, strict=True)
                )
                lines.append(f"  unit {name}: {task} takes {taken}")
        else:
            lines += [f"{x.owner:{width}}{x.names} ({x.about})" for x in row]
    return "\n".join(lines)


def plot_network(model: keras.Model) -> "Figure":
    """Draws what is joined: a column a tower, stages as boxes, units as links.

    A stage is what a tower computes between two units. Its box names the first and the
    last layer, the number of layers and the shape that comes out. Below it, the links
    of a unit go from the tower that gives to the tower that takes, in the colour of the
    one that gives. A link is as wide as the part that is taken: `|alpha|`, summed over
    the channels and scaled so that the parts of a task sum to 1. Units that project say
    so. Layers that all tasks share stand in one wide box. Frozen layers are hatched.

    Args:
        model: Model that `stitch` or `split` has made.

    Returns:
        `matplotlib.figure.Figure`; `.savefig("network.png")` writes it to a file.

    Raises:
        ValueError: For a model that has no dict of tasks.
        ImportError: Without matplotlib.

    Example:

    >>> from keras_cross_stitch import alexnet, stitch
    >>> towers = {"kind": alexnet(5, width=0.05), "age": alexnet(1, width=0.05)}
    >>> figure = plot_network(stitch(towers, at=["pool1", "pool5"]))
    >>> len(figure.axes)
    1
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ImportError as error:
        raise ImportError(
            "`plot_network` draws with matplotlib: `pip install matplotlib`"
        ) from error
    tasks, rows = _rows(model)
    colors = {
        task: TASK_COLORS[i % len(TASK_COLORS)] for i, task in enumerate(sorted(tasks))
    }
    column = {task: k for k, task in enumerate(tasks)}
    box, link = 1.0, 0.9  # heights
    height = sum(box if isinstance(row, list) else link for row in rows) + 0.6
    # Not pyplot, which would keep the figure alive.
    figure = Figure((1.3 + 2.5 * len(tasks), 0.8 * height + 0.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.95, len(tasks) - 0.45), ylim=(height, 0))
    axes.axis("off")
    for task, k in column.items():
        axes.text(k, 0.35, task, ha="center", weight="bold", color=colors[task])
    top = 0.6
    for row in rows:
        if not isinstance(row, list):
            name = in_lines(row.name.removeprefix("cross_stitch_"), 14)
            if isinstance(row, ProjectedCrossStitch):
                name += "\nprojected"
            axes.text(-0.93, top + link / 2, name, va="center", fontsize="small")
            parts = _parts(row)
            for i, task in enumerate(row.tasks):
                for j, source in enumerate(row.tasks):
                    # What is another task's comes in beside what is its own.
                    shift = 0.12 * np.sign(column[source] - column[task])
                    axes.plot(
                        [column[source], column[task] + shift],
                        [top - 0.05, top + link + 0.05],
                        color=colors[source],
                        lw=max(0.3, 12 * float(parts[i, j])),
                        alpha=0.75,
                        solid_capstyle="butt",
                        zorder=1,
                    )
            top += link
            continue
        owners = {stage.owner for stage in row}
        for task in [task for task in tasks if not owners & {task, "shared"}]:
            axes.plot(
                [column[task]] * 2,
                [top - 0.05, top + box + 0.05],
                color=colors[task],
                lw=10,
                alpha=0.75,
                zorder=1,
            )
        for stage in row:
            is_shared = stage.owner == "shared"
            left = -0.45 if is_shared else column[stage.owner] - 0.45
            width = len(tasks) - 0.1 if is_shared else 0.9
            axes.add_patch(
                FancyBboxPatch(
                    (left, top + 0.05),
                    width,
                    box - 0.1,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor="#f2f2f2" if is_shared else "white",
                    edgecolor="#555555" if is_shared else colors[stage.owner],
                    hatch="///" if stage.is_frozen else None,
                    linewidth=1.5,
                    zorder=2,
                )
            )
            letters = 26 * (len(tasks) if is_shared else 1)  # that fit into the box
            names = f"shared: {stage.names}" if is_shared else stage.names
            if len(names) > letters:
                names = names.replace(" … ", " …\n")
            axes.text(
                left + width / 2,
                top + box / 2,
                "\n".join(
                    in_lines(x, letters) for x in [*names.split("\n"), stage.about]
                ),
                ha="center",
                va="center",
                fontsize="small",
                linespacing=1.25,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                if stage.is_frozen
                else None,
                zorder=3,
            )
        top += box
    return figure


def _size(unit: ProjectedCrossStitch) -> str:
    layers = list(unit.projections.values())
    return f"{len(layers)} layers of {sum(x.count_params() for x in layers):,} weights"


def _parts(unit: CrossStitch | NDDR) -> Any:
    """What part of each task's map is taken from which: (T, T), rows sum to 1."""
    tasks = len(unit.tasks)
    if isinstance(unit, NDDR):
        kernels = [unit.kernels[task] for task in unit.tasks]
        values = [keras.ops.convert_to_numpy(x).reshape(tasks, -1) for x in kernels]
        alpha = np.abs(np.stack(values))  # (T, T, C * C)
    else:
        alpha = np.abs(keras.ops.convert_to_numpy(unit.alpha))
    amounts = alpha.reshape(*alpha.shape[:2], -1).sum(axis=-1)
    return amounts / np.maximum(amounts.sum(axis=1, keepdims=True), 1e-12)


def _rows(model: keras.Model) -> tuple[list[str], list[Any]]:
    """The tasks, and from input to output: units, and lists of the stages beside."""
    if not isinstance(model.output, dict):
        raise ValueError(
            "The model must be one that `stitch` or `split` has made, with a dict of "
            f"task to output. Received: model={model}"
        )
    tasks = list(model.output)
    rows: list[Any] = []
    open_row: dict[str, list] = {}

    def close() -> None:
        nonlocal open_row
        shared = open_row.pop("shared", None)
        if shared:
            rows.append([Stage("shared", shared)])
        if open_row:
            rows.append(
                [Stage(task, open_row[task]) for task in tasks if task in open_row]
            )
        open_row = {}

    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue  # its name may begin as a task's layers' do
        if isinstance(layer, CrossStitch | NDDR):
            if not set(layer.tasks) <= set(tasks):
                raise ValueError(
                    "The model must be one that `stitch` has made, with units of its "
                    f"tasks {tasks}. Received: '{layer.name}' of {list(layer.tasks)}"
                )
            close()
            rows.append(layer)
            continue
        # The longest, where one task's name begins another's.
        owners = [x for x in [*tasks, "shared"] if layer.name.startswith(f"{x}_")]
        if owners:
            open_row.setdefault(max(owners, key=len), []).append(layer)
    close()
    if not rows:
        raise ValueError(
            "The model must be one that `stitch` or `split` has made, with layers "
            f"named after its tasks {tasks}. Received: model={model}"
        )
    return tasks, rows
