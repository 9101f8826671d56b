"""What the units have learned: a table, a callback and the paper's figure.

Reads alpha and never changes it.
"""

import re
import textwrap
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_cross_stitch.cross_stitch import CrossStitch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for the colour-blind.
TASK_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def alpha_table(model: keras.Model) -> list[dict[str, Any]]:
    """Summarises the alpha of every cross-stitch unit of a model.

    Args:
        model: Built `keras.Model` with `CrossStitch` layers, also in nested models.

    Returns:
        List of dicts, one for each unit, task and source, in the order of the
        graph. The keys are `unit` (the layer's name, or its path `model/unit` if
        nested models have units of one name), `task` (that takes), `source` (the task
        that gives), and `mean`, `std`, `min` and `max` of alpha over the
        channels. With `per="layer"`, alpha is one number. The list is empty for a
        model without units.

    Raises:
        ValueError: For a model that is not built.

    Example:

    >>> a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    >>> mixed = CrossStitch(same_task=0.75, name="stitch")({"a": a, "b": b})
    >>> for row in alpha_table(keras.Model([a, b], mixed)):
    ...     print(row["unit"], row["task"], row["source"], row["mean"])
    stitch a a 0.75
    stitch a b 0.25
    stitch b a 0.25
    stitch b b 0.75
    """
    return [
        {
            "unit": unit,
            "task": task,
            "source": source,
            "mean": float(alpha.mean()),
            "std": float(alpha.std()),
            "min": float(alpha.min()),
            "max": float(alpha.max()),
        }
        for unit, alphas in _alphas(model)
        for (task, source), alpha in alphas.items()
    ]


class AlphaHistory(keras.callbacks.ProgbarLogger):
    """Adds the mean of every alpha to the logs, at the end of each epoch.

    The keys are `alpha/<unit>/<task>_from_<source>`. `fit` returns them in its
    history. Only callbacks that come *after* this one in the list find them in their
    logs. So put it before `CSVLogger`, which then writes them to its file, and before
    `TensorBoard`, which shows them as `epoch_alpha/...`. A model without units adds
    nothing.

    This callback shows the progress bar instead of Keras's, so that the line does not
    grow by T * T numbers for each unit. There `alpha/<unit>` is the unit's mean over
    what tasks take from other tasks.

    Example:

    >>> x = {"a": np.ones((2, 8)), "b": np.ones((2, 8))}
    >>> a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    >>> inputs = {"a": a, "b": b}
    >>> model = keras.Model(inputs, CrossStitch(name="stitch")(inputs))
    >>> model.compile("sgd", {"a": "mse", "b": "mse"})
    >>> callbacks = [AlphaHistory()]  # then CSVLogger, TensorBoard ...
    >>> history = model.fit(x, x, callbacks=callbacks, verbose=0).history
    >>> [key for key in history if key.startswith("alpha/stitch/a_from")]
    ['alpha/stitch/a_from_a', 'alpha/stitch/a_from_b']
    """

    def __init__(self) -> None:
        super().__init__()
        # The metrics of a batch need not wait for the bar, as they do not for Keras's.
        self.async_safe = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        rows = alpha_table(self.model)
        logs = {} if logs is None else logs
        between: dict[str, list[float]] = {}
        for row in rows:
            if row["task"] != row["source"]:
                between.setdefault(f"alpha/{row['unit']}", []).append(row["mean"])
        shown = {unit: float(np.mean(means)) for unit, means in between.items()}
        super().on_epoch_end(epoch, {**logs, **shown})
        for row in rows:
            key = f"alpha/{row['unit']}/{row['task']}_from_{row['source']}"
            logs[key] = row["mean"]


def plot_alpha(model: keras.Model) -> "Figure":
    """Draws every alpha of a model, as the paper's Table 4 does.

    There is one column per unit and one row per task. Each line is the alpha of one
    source over the channels, sorted. It is solid for the task itself (alpha_S) and
    dashed for another task (alpha_D). With `per="layer"` the lines are flat.

    Args:
        model: Built `keras.Model` with `CrossStitch` layers.

    Returns:
        `matplotlib.figure.Figure`; `.savefig("alpha.png")` writes it to a file.

    Raises:
        ValueError: For a model without units, or for one that is not built.
        ImportError: Without matplotlib.

    Example:

    >>> a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    >>> model = keras.Model([a, b], CrossStitch()({"a": a, "b": b}))
    >>> figure = plot_alpha(model)
    >>> len(figure.axes)
    2

    Reference:

    - [Misra et al., 2016](https://arxiv.org/abs/1604.03539), Table 4
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError(
            "`plot_alpha` draws with matplotlib: `pip install matplotlib`"
        ) from error
    units = _alphas(model)
    if not units:
        raise ValueError(
            "The model has no CrossStitch layer; `stitch()` makes a model with them. "
            f"Received: model={model}"
        )
    tasks = list(dict.fromkeys(task for _, alphas in units for task, _ in alphas))
    colors = {task: TASK_COLORS[i % len(TASK_COLORS)] for i, task in enumerate(tasks)}
    longest = max(10, *map(len, tasks))  # 10 letters are "same task,"
    legend_width = 1.6 + 0.08 * longest
    size = (0.6 + 2.0 * len(units) + legend_width, 1.0 + 1.8 * len(tasks))
    # Not pyplot, which would keep the figure alive.
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(
        len(tasks), len(units), sharex="col", sharey=True, squeeze=False
    )
    for column, (unit, alphas) in zip(grid.T, units, strict=True):
        name = unit.removeprefix("cross_stitch_")
        column[0].set_title(in_lines(name, 18), fontsize="medium")
        column[-1].set_xlabel("channel, sorted")
        for (task, source), alpha in alphas.items():
            axes = column[tasks.index(task)]
            style = {"color": colors[source], "ls": "-" if task == source else "--"}
            if alpha.size > 1:
                axes.plot(np.sort(alpha), **style)
            else:
                axes.axhline(alpha.item(), **style)
                axes.set(xticks=[], xlabel="")
    for axes, task in zip(grid[:, 0], tasks, strict=True):
        separator = "\n" if len(task) > 14 else " "
        axes.set_ylabel(rf"$\alpha$ of{separator}" + in_lines(task, 22))
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    low, high = grid[0, 0].get_ylim()
    grid[0, 0].set_ylim(min(low, -0.5), max(high, 1.5))  # the paper's, or wider
    legend = [
        Line2D([], [], color=colors[task], label=f"from {task}") for task in tasks
    ]
    legend += [
        Line2D([], [], color="gray", ls="-", label=r"same task, $\alpha_S$"),
        Line2D([], [], color="gray", ls="--", label=r"other task, $\alpha_D$"),
    ]
    figure.legend(handles=legend, loc="outside right upper", frameon=False)
    return figure


def in_lines(name: str, width: int) -> str:
    """A name that is broken behind underscores where it is longer than `width`."""
    parts = re.sub(r"(?<=_)(?=.)", " ", name)
    lines = textwrap.wrap(parts, width, break_on_hyphens=False)
    return "\n".join(line.replace("_ ", "_") for line in lines)


def _alphas(model: keras.Model) -> list[tuple[str, dict[tuple[str, str], Any]]]:
    """[(unit, {(task, source): alpha})], alpha of shape (C,), or (1,) per layer."""
    units = _units(model)
    if not all(unit.built for unit in units.values()):
        raise ValueError(
            "The model has no weights yet: call it, or load them. "
            f"Received: model={model}"
        )
    names = [unit.name for unit in units.values()]
    return [
        (path if names.count(unit.name) > 1 else unit.name, _by_task(unit))
        for path, unit in units.items()
    ]


def _by_task(unit: CrossStitch) -> dict[tuple[str, str], Any]:
    alpha = keras.ops.convert_to_numpy(unit.alpha)  # (T, T, C) or (T, T)
    return {
        (task, source): np.atleast_1d(alpha[i, j])
        for i, task in enumerate(unit.tasks)
        for j, source in enumerate(unit.tasks)
    }


def _units(model: keras.Model, within: str = "") -> dict[str, CrossStitch]:
    """{path: unit} of the model and its nested models, in the order of the graph."""
    units: dict[str, CrossStitch] = {}
    for layer in model.layers:
        path = within + layer.name
        if isinstance(layer, CrossStitch):
            units[path] = layer
        elif isinstance(layer, keras.Model):
            units |= _units(layer, f"{path}/")
    return units
