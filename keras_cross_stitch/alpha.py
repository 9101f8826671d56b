"""What the units have learned: a table, a callback and the paper's figure.

Reads alpha and never changes it.
"""

import sys
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_cross_stitch.cross_stitch import CrossStitch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for the colour-blind.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def alpha_table(model: keras.Model) -> list[dict[str, Any]]:
    """Summarises the alpha of every cross-stitch unit of a model.

    Args:
        model: Built `keras.Model` with `CrossStitch` layers, also in nested models.

    Returns:
        List of dicts, one for each unit, task and source, in the order of the
        graph: `unit` (the layer's name), `task` (that takes), `source` (task that
        gives), and `mean`, `std`, `min` and `max` of alpha over the channels. With
        `per="layer"`, alpha is one number.

    Raises:
        ValueError: For a model without units, or one that is not built.

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


class AlphaHistory(keras.callbacks.Callback):
    """Adds the mean of every alpha to the logs, at the end of each epoch.

    The keys are `alpha/<unit>/<task>_from_<source>`. The callbacks that come after
    it find them in their logs as they find a metric: `CSVLogger` writes them to its
    file, `TensorBoard` as `epoch_alpha/...`, and `fit` returns them in its history.
    So does the progress bar, unless a `ProgbarLogger` comes before. A `CSVLogger` or
    `TensorBoard` that comes before it never sees them, which is worth a warning.

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

    def on_train_begin(self, logs: Any = None) -> None:
        # A callback knows no other: the list that calls it is one frame up.
        caller = sys._getframe(1).f_locals.get("self")
        if not isinstance(caller, keras.callbacks.CallbackList):
            return
        writers = (keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
        before = caller.callbacks[: caller.callbacks.index(self)]
        for callback in before:
            if isinstance(callback, writers):
                warnings.warn(
                    f"{type(callback).__name__} comes before AlphaHistory and never "
                    "sees alpha: put it after AlphaHistory in `callbacks`.",
                    stacklevel=2,
                )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for row in alpha_table(self.model):
            key = f"alpha/{row['unit']}/{row['task']}_from_{row['source']}"
            logs[key] = row["mean"]


def plot_alpha(model: keras.Model) -> "Figure":
    """Draws every alpha of a model, as the paper's Table 4 does.

    One column per unit, one row per task. Each line is the alpha of one source over
    the channels, sorted: solid for the task itself (alpha_S), dashed for another
    task (alpha_D). With `per="layer"` the lines are flat.

    Args:
        model: Built `keras.Model` with `CrossStitch` layers.

    Returns:
        `matplotlib.figure.Figure`; `.savefig("alpha.png")` writes it to a file.

    Raises:
        ValueError: For a model without units, or one that is not built.
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
    tasks = list(dict.fromkeys(task for _, alphas in units for task, _ in alphas))
    colors = {task: _COLORS[i % len(_COLORS)] for i, task in enumerate(tasks)}
    # Not pyplot, which would keep the figure alive.
    size = (2.4 + 2.0 * len(units), 0.8 + 1.8 * len(tasks))
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(
        len(tasks), len(units), sharex="col", sharey=True, squeeze=False
    )
    for column, (unit, alphas) in zip(grid.T, units, strict=True):
        column[0].set_title(unit.removeprefix("cross_stitch_"))
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
        axes.set_ylabel(rf"$\alpha$ of {task}")
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


def _alphas(model: keras.Model) -> list[tuple[str, dict[tuple[str, str], Any]]]:
    """[(unit, {(task, source): alpha})], alpha of shape (C,), or (1,) per layer."""
    units = _units(model)
    if not units:
        raise ValueError(
            "The model has no CrossStitch layer; `stitch()` makes a model with them. "
            f"Received: model={model}"
        )
    if not all(unit.built for unit in units):
        raise ValueError(
            "The model has no weights yet: call it, or load them. "
            f"Received: model={model}"
        )
    return [(unit.name, _by_task(unit)) for unit in units]


def _by_task(unit: CrossStitch) -> dict[tuple[str, str], Any]:
    alpha = keras.ops.convert_to_numpy(unit.alpha)  # (T, T, C) or (T, T)
    return {
        (task, source): np.atleast_1d(alpha[i, j])
        for i, task in enumerate(unit.tasks)
        for j, source in enumerate(unit.tasks)
    }


def _units(model: keras.Model) -> list[CrossStitch]:
    """The units of the model and its nested models, in the order of the graph."""
    units: list[CrossStitch] = []
    for layer in model.layers:
        if isinstance(layer, CrossStitch):
            units.append(layer)
        elif isinstance(layer, keras.Model):
            units.extend(_units(layer))
    return units
