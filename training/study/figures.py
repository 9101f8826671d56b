"""Pictures of results: from arrays to a matplotlib `Figure`; reads and writes no file.

Sized so that text stays legible in a README's column. Colours are Okabe and Ito's,
which stay apart for the colour-blind; lines also differ in markers or dashes.
"""

import collections
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy.stats import spearmanr

from keras_cross_stitch import CrossStitch, plot_alpha
from training.files import Row
from training.metric import Metric
from training.study import results
from training.study.results import Key

WIDTH = 8.3  # inches, a README's column at 100 dots per inch

# RGB colours, the values of the first and the last, and the unit
Scale = tuple[Sequence[Sequence[int]], tuple[float, float], str]

_OKABE_ITO = matplotlib.color_sequences["okabe_ito"]
_COLOURS = [_OKABE_ITO[i] for i in (5, 6, 3, 7, 1, 2, 0)]  # all but yellow
_GAIN, _LOSS = _OKABE_ITO[5], _OKABE_ITO[6]  # blue, vermilion
_MARKERS = "os^Dvp*"
_DASHES = ("-", "--", "-.", ":")
_STYLE = matplotlib.rc_context(
    {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


@_STYLE
def gallery(
    columns: Mapping[str, Sequence[np.ndarray]], scale: Scale | None = None
) -> Figure:
    """Pictures in a grid: one row per image, one column per title.

    Args:
        columns: Dict of title to a list of RGB images, uint8, `(H, W, 3)`: the image,
            the truth, each model's answer, `difference` maps.
        scale: What the colours stand for, as a bar below: their list (RGB, uint8), the
            values of the first and the last, and the unit.
    """
    rows = len(next(iter(columns.values())))
    height, width = np.shape(next(iter(columns.values()))[0])[:2]
    side = max(WIDTH / len(columns), 1.0)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    titles = [textwrap.fill(title, int(12 * side)) for title in columns]
    above = 0.2 * max(title.count("\n") for title in titles) + 0.5
    size = (side * len(columns), side * rows * height / width + above)
    figure = Figure(size, layout=layout)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for axes, title, images in zip(grid.T, titles, columns.values(), strict=True):
        axes[0].set_title(title)
        for cell, image in zip(axes, images, strict=True):
            cell.imshow(image, interpolation="nearest")
            cell.set_anchor("N")  # below the titles, however high these are
            cell.set_axis_off()
    if scale:
        colours, (low, high), unit = scale
        colormap = LinearSegmentedColormap.from_list("scale", np.divide(colours, 255))
        mappable = ScalarMappable(Normalize(low, high), colormap)
        bar = figure.colorbar(
            mappable, ax=grid, location="bottom", shrink=0.4, aspect=30
        )
        bar.set_label(unit)
    return figure


def difference(
    truth: np.ndarray, before: np.ndarray, after: np.ndarray, saturation: float = 64
) -> np.ndarray:
    """Where one drawn answer is nearer to the drawn truth than another is.

    Args:
        truth: RGB image, uint8, `(H, W, 3)`; black is undefined, and drawn grey.
        before: RGB image of the answer to compare with.
        after: RGB image of the other answer.
        saturation: The distance in colour that counts as wholly wrong; 1 for drawn
            classes, where any other colour is.

    Returns:
        RGB image: blue where `after` is nearer, vermilion where `before` is, white
        where neither is.
    """
    before, after = (
        np.linalg.norm(np.asarray(x, float) - truth, axis=-1).clip(0, saturation)
        for x in (before, after)
    )
    gain = ((before - after) / saturation)[..., None]  # (H, W, 1), -1 to 1
    colour = np.where(gain > 0, _GAIN, _LOSS)
    image = 1 + np.abs(gain) * (colour - 1)
    image[~np.any(truth, axis=-1)] = 0.7
    return (255 * image).round().astype("uint8")


@_STYLE
def learning_curves(
    losses: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    starts: Mapping[str, int] | None = None,
    validation: Mapping[str, Sequence[Mapping[str, Sequence[float]]]] | None = None,
) -> Figure:
    """Loss over epochs: a panel per task, a line per run.

    Args:
        losses: Dict of method to a list, one entry per seed, of dicts of task to
            losses by epoch.
        starts: Dict of method to the epochs that its towers had been trained before.
        validation: The same of what is held out, where something is: pale.
    """
    tasks = list(dict.fromkeys(t for runs in losses.values() for x in runs for t in x))
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        axes.set(title=task, xlabel="epoch", ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for i, (method, runs) in enumerate(losses.items()):
            for seed, by_task in enumerate(runs):
                values = by_task.get(task, ())
                epochs = (starts or {}).get(method, 0) + 1 + np.arange(len(values))
                name = results.label(method) if seed == 0 else None
                style = _curve(i, values, label=name, ls=_DASHES[i % 4])
                axes.plot(epochs, values, **style)
                if of_part := (validation or {}).get(method):
                    name = f"{name}, held out" if name else None
                    style = {**style, "label": name, "alpha": 0.5, "lw": 3}
                    axes.plot(epochs, of_part[seed].get(task, ()), **style)
    _legend(figure, panels)
    return figure


def alpha(units: Mapping[str, np.ndarray], tasks: Sequence[str]) -> Figure:
    """Every alpha of every unit, as `keras_cross_stitch.plot_alpha` draws a model's.

    Args:
        units: Dict of unit to alpha, `(T, T, C)` or `(T, T)`, as `alpha.npz` has it.
        tasks: List of the T tasks, in alpha's order.
    """
    outputs = []
    inputs = []
    for name, values in units.items():
        channels = values.shape[2] if values.ndim == 3 else 1
        maps = {task: keras.Input((channels,)) for task in tasks}
        unit = CrossStitch(per="channel" if values.ndim == 3 else "layer", name=name)
        outputs.append(unit(maps))
        unit.set_weights([values])
        inputs.append(maps)
    return plot_alpha(keras.Model(inputs, outputs))


@_STYLE
def alphas_by_epoch(history: Mapping[tuple[str, ...], Sequence[float]]) -> Figure:
    """Each unit's mean alphas over epochs: a panel per task, a line per unit.

    Args:
        history: Dict of (unit, task, source) to mean alphas by epoch. A task's own are
            solid, what it takes from others is dashed; of one epoch, filled and empty
            points.
    """
    tasks = list(dict.fromkeys(task for _, task, _ in history))
    units = list(dict.fromkeys(unit for unit, _, _ in history))
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        axes.set(title=task, xlabel="epoch", ylabel="mean alpha")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for (unit, of, source), values in history.items():
            if of == task:
                own = source == task
                name = unit.removeprefix("cross_stitch_") if own else None
                look = {
                    "ls": "-" if own else "--",
                    "fillstyle": "full" if own else "none",
                }
                style = _curve(units.index(unit), values, label=name, **look)
                axes.plot(1 + np.arange(len(values)), values, **style)
    _legend(figure, panels)
    return figure


@_STYLE
def splits(
    rows: Iterable[Row],
    metrics: Sequence[Key],
    of_paper: Mapping[Key, Mapping[str, float]] | None = None,
) -> Figure:
    """The gain of a split at each layer over the baseline, as the paper's figure 2b.

    Args:
        rows: List of `Row`, of `split@<layer>` and of their baseline.
        metrics: List of (task, metric), a panel each.
        of_paper: Dict of (task, metric) to the paper's {layer: gain}.
    """
    values = results.by_seed(rows)
    figure, panels = _panels(len(metrics))
    for axes, (task, name) in zip(panels, metrics, strict=True):
        of_metric = values[task, name]
        methods = [x for x in of_metric if x.startswith("split@") and "=" not in x]
        baseline = of_metric.get(results.baseline("split@") or "", {})
        layers = [method.partition("@")[2] for method in methods]
        known = results.metric(name)
        axes.axhline(0, color="black", lw=1)
        pairs = [(of_metric[x], baseline) for x in methods]
        _gains(axes, layers, pairs, known, **_line(0, label="ours, 95 % interval"))
        published = (of_paper or {}).get((task, name), {})
        if published:
            points = [published.get(layer, np.nan) for layer in layers]
            axes.plot(layers, points, **_line(1, label="paper", ls="--"))
        axes.set(
            title=f"{task}: {known.label}",
            xlabel="first layer that is not shared",
        )
    _legend(figure, panels)
    return figure


@_STYLE
def per_class(
    title: str,
    classes: Sequence[str],
    gains: np.ndarray,
    counts: np.ndarray,
    deviations: np.ndarray | None = None,
) -> Figure:
    """The change of each class over its frequency, as the paper's figure 6.

    Args:
        title: String, which score and which methods.
        classes: List of names.
        gains: Array `(classes,)`, change of the score in points.
        counts: Array `(classes,)`, pixels or objects, of train as the paper has it.
        deviations: Array `(classes,)`, standard deviation of the change over seeds.
    """
    order = np.argsort(-np.asarray(counts, float), kind="stable")
    gains, counts = np.asarray(gains)[order], np.asarray(counts)[order]
    names = np.asarray(classes)[order]
    place = np.arange(len(names))
    figure = Figure((WIDTH, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.5))
    above.bar(place, 100 * counts / counts.sum(), color="0.6")
    above.set(yscale="log", ylabel="frequency, %")
    above.yaxis.set_major_formatter("{x:g}")
    error = None if deviations is None else np.asarray(deviations)[order]
    below.bar(
        place,
        gains,
        yerr=error,
        color=[_GAIN if gain > 0 else _LOSS for gain in gains],
        error_kw={"lw": 1, "ecolor": "0.3"},
    )
    below.axhline(0, color="black", lw=1)
    below.set(ylabel="change, points", xlim=(-0.7, len(names) - 0.3))
    below.set_xticks(place, names, rotation=90)
    below.grid(axis="x", visible=False)
    above.set_title(f"{title}\n{_rank_correlation(gains, counts)}", loc="left")
    return figure


@_STYLE
def label_fraction(
    by_share: Mapping[float, Sequence[Row]], panels: Sequence[Key]
) -> Figure:
    """The gain over the baseline by the share of images with labels.

    A panel for each metric, a line for each method.

    Args:
        by_share: Dict of share (0.1 for a tenth) to a list of `Row`. A
            method with one share alone is left out, and so is one without a baseline.
        panels: List of (task, metric): first the task that lacks labels, then what
            the others gain or pay.
    """
    values = {share: results.by_seed(rows) for share, rows in by_share.items()}
    shares = sorted(values)
    times = collections.Counter(
        method for rows in by_share.values() for method in {x.method for x in rows}
    )
    methods = sorted(x for x in times if times[x] > 1 and results.baseline(x))
    figure, axis = _panels(len(panels))
    for axes, (task, name) in zip(axis, panels, strict=True):
        known = results.metric(name)
        axes.axhline(0, color="black", lw=1)
        for i, method in enumerate(methods):
            of_metric = [values[share].get((task, name), {}) for share in shares]
            against = results.baseline(method) or ""
            pairs = [(x.get(method, {}), x.get(against, {})) for x in of_metric]
            aside = 1.04 ** (i - len(methods) / 2)  # so that no bar hides another
            style = _line(i, label=results.label(method))
            _gains(axes, 100 * aside * np.array(shares), pairs, known, **style)
        axes.set(title=f"{task}: {known.label}", xscale="log")
        axes.set_xlabel(f"images with labels of {panels[0][0]}, %")
        axes.set_xticks([100 * x for x in shares], [f"{100 * x:g}" for x in shares])
        axes.minorticks_off()
    figure.suptitle("mean and 95 % interval, up is better", fontsize=9)
    _legend(figure, axis)
    return figure


def _gains(
    axes: Axes,
    places: Sequence[Any],
    pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]],
    known: Metric,
    **style: Any,
) -> None:
    """The gain of each (values, baseline's values), by seed, with its interval."""
    gains = np.array([_gain(*pair, known.higher_is_better) for pair in pairs])  # (n, 3)
    bars = np.abs(gains[:, 1:] - gains[:, :1]).T
    axes.errorbar(places, gains[:, 0], bars, capsize=3, **style)
    # A ratio's difference has no unit.
    unit = [known.unit.replace("%", "points")] if known.unit else []
    axes.set_ylabel(", ".join(["gain over the baseline", *unit]))


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """A figure with so many axes side by side."""
    figure = Figure((WIDTH, 3.6), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _line(i: int, **more: Any) -> dict[str, Any]:
    """The i-th line's own colour and marker."""
    color, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
    return {"color": color, "marker": marker, "ls": "-", "lw": 1.5, "ms": 5, **more}


def _curve(i: int, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """A line without markers, but for one value, of which there is no line."""
    style = _line(i, **more)
    return style if len(values) == 1 else {**style, "marker": None}


def _legend(figure: Figure, panels: np.ndarray) -> None:
    """One legend below all panels."""
    handles, labels = panels[0].get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = min(4, max(1, int(11 * WIDTH / (longest + 6))))  # that fit
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _gain(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    higher_is_better: bool | None,
) -> tuple[float, float, float]:
    """Mean paired gain, up is better, and the ends of its interval where it has one."""
    known = results.paired_difference(values, baseline)
    if known is None:
        only = [
            values[seed] - baseline[seed] for seed in values.keys() & baseline.keys()
        ]
        mean = low = high = only[0] if only else np.nan
    else:
        mean, low, high, *_ = known
    return (mean, low, high) if higher_is_better else (-mean, -high, -low)


def _rank_correlation(gains: np.ndarray, counts: np.ndarray) -> str:
    """Spearman's, as a sentence; undefined where all classes gain alike."""
    if len(set(gains)) < 2 or len(set(counts)) < 2:
        return "rank correlation undefined: all classes alike"
    rho, p = spearmanr(gains, counts)
    return f"rank correlation of change and frequency {rho:+.2f} (p = {p:.2g})"
