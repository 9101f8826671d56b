"""One HTML page of all finished runs: what was run, and what came of it.

The page asks for nothing: its pictures are in it, and the script that sorts its tables.
"""

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib
from matplotlib.figure import Figure

from training.files import Row, read_csv, read_text, write_text
from training.methods import METHODS
from training.recipes import whatever_labels
from training.study import delta_m, figures, paper, recorded
from training.study.recorded import Run
from training.study.results import Cell, Key, baseline, label, metric, statistics
from training.study.tables import notes

Methods = dict[str, list[Run]]  # the finished runs of a recipe
Picture = tuple[str, str]  # caption, data URI

MEASURES = ("step", "answer")  # that `bench` times
# Parts of what a run depends on that all methods of a recipe have alike
_OF_ALL = ("data", "training", "tower", "units", "examples", "tasks", "proposals")


def write_report(runs: Path, target: Path) -> Path:
    """Writes the page, whole or not at all.

    Args:
        runs: Path of all runs, `<runs>/<recipe>/<method>/seed<seed>/`. Pictures of
            test images are shown from `<runs>/<recipe>/gallery/*.png`.
        target: Path of the HTML file.

    Returns:
        `target`.

    Raises:
        ValueError: Where no run is finished.
    """
    folders = sorted(runs.iterdir()) if runs.is_dir() else []
    recipes = {folder: _in_order(recorded.by_method(folder)) for folder in folders}
    recipes = {folder: methods for folder, methods in recipes.items() if methods}
    if not recipes:
        raise ValueError(
            f"There is no finished run in {runs}: `python -m training` makes some"
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"label": label, "title": _title}
    script = read_text(Path(__file__).with_name("report.js"))
    html = environment.get_template("report.html.jinja").render(
        recipes=[_recipe(*of_recipe, target) for of_recipe in recipes.items()],
        script=script,
        delta_m_says=delta_m.SAYS,
        script_hash=_hash(script),
        label_fractions=_label_fractions(recipes),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, html)
    return target


def _recipe(folder: Path, methods: Methods, page: Path) -> dict[str, Any]:
    """What the page says of one recipe, for the template."""
    rows = _rows(methods)
    with_delta_m = [*rows, *delta_m.rows(rows)]
    tables = statistics(with_delta_m, paper.table(folder.name, "methods"))
    deltas = {
        method: cells[-1]
        for table in tables
        for method, cells in table.cells.items()
        if table.metrics[-1] == "delta_m"
    }
    times = _times(folder)
    stopped = recorded.by_method(folder, finished=False).values()
    first = next(iter(methods.values()))[0]
    return {
        "name": folder.name,
        "data": first.json("recipe").get("data", {}),
        "methods": [
            _method(method, of_method, deltas.get(method), times, page)
            for method, of_method in methods.items()
        ],
        "timed": bool(times),
        "cost_titles": [title for title, _ in recorded.COSTS.values()],
        "stopped": [
            f"{label(x.method)}, seed {x.seed}" for runs in stopped for x in runs
        ],
        "tables": tables,
        "other_recipes": _other_recipes(methods),
        "notes": notes(tables),
        "answers": first.json("answers"),
        "gallery": [
            (path.stem.replace("_", " "), _data_uri("image/png", path.read_bytes()))
            for path in sorted(folder.glob("gallery/*.png"))
        ],
        "curves": _curves(methods),
        "alphas": _alphas(methods),
        "alphas_by_epoch": _alphas_by_epoch(methods),
        "splits": _splits(folder.name, methods, rows),
        "classes": _classes(methods),
        "settings": _settings(methods),
    }


def _other_recipes(methods: Methods) -> list[str]:
    """What is not the same in all runs and should be, with a run of each value.

    A method whose options change the recipe is held against its own seeds alone.
    """
    values: dict[tuple[str, str], dict[str, str]] = {}
    for method, runs in methods.items():
        for run in runs:
            for name, value in run.settings.items():
                part = name.partition(".")[0]
                of_all = part in _OF_ALL and "=" not in method
                found = values.setdefault(("" if of_all else method, name), {})
                if part != "made_with":  # versions are told beside the rows
                    found.setdefault(value, f"{label(method)}, seed {run.seed}")
    return [
        f"{name}, {', '.join(f'{value} ({run})' for value, run in found.items())}"
        for (_, name), found in values.items()
        if len(found) > 1
    ]


def _in_order(methods: Methods) -> Methods:
    order = list(METHODS)

    def place(method: str) -> int:
        name = method.partition("@")[0]
        return order.index(name) if name in order else len(order)

    return {method: methods[method] for method in sorted(methods, key=place)}


def _rows(methods: Methods) -> list[Row]:
    return [row for runs in methods.values() for run in runs for row in run.rows]


def _headlines(rows: Iterable[Row]) -> list[Key]:
    """[(task, the metric that stands for it in pictures)]: mIoU, else its first."""
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.task, []).append(row.metric)
    return [
        (task, "miou" if "miou" in known else known[0]) for task, known in names.items()
    ]


def _method(
    method: str,
    runs: Sequence[Run],
    delta: Cell | None,
    times: Mapping[tuple[str, str], str],
    page: Path,
) -> dict[str, Any]:
    known = METHODS.get(method.partition("@")[0])
    return {
        "name": method,
        "says": known.says if known else "",  # of a method of before
        "baseline": baseline(method),
        "runs": [(run.seed, _link(run.folder, page)) for run in runs],
        "recipe": _link(runs[0].folder / "recipe.json", page),
        "commits": list(
            dict.fromkeys(run.made_by.get("commit", "unknown") for run in runs)
        ),
        "epochs": len(runs[0].csv("history")),
        "delta": delta,
        "costs": recorded.shown_costs(runs[0].costs),
        "times": [times.get((method, measure), "") for measure in MEASURES],
    }


def _title(name: str) -> str:
    """A metric's, whose arrow stays on a line with its unit."""
    return "\u00a0".join(metric(name).title.rsplit(" ", 1))


def _link(path: Path, page: Path) -> str:
    """From the page to a run's file or folder."""
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


def _times(folder: Path) -> dict[tuple[str, str], str]:
    """{(method, measure): as a multiple of the single-task baseline's}, of `bench`."""
    lines = read_csv(folder / "times.csv", missing_ok=True)
    return {(x["method"], x["measure"]): x["of_single_task"] for x in lines}


def _settings(methods: Methods) -> list[tuple[str, list[int], dict[str, str]]]:
    """[(method and its seeds, {setting: value})], once where seeds have the same."""
    grouped: dict[tuple, list[int]] = {}
    for method, runs in methods.items():
        for run in runs:
            grouped.setdefault((method, *run.settings.items()), []).append(run.seed)
    return [
        (method, seeds, dict(settings))
        for (method, *settings), seeds in grouped.items()
    ]


def _curves(methods: Methods) -> list[Picture]:
    losses = {
        method: [run.losses for run in runs]
        for method, runs in methods.items()
        if runs[0].losses
    }
    if not losses:
        return []
    validation = {
        method: [run.validation_losses for run in runs]
        for method, runs in methods.items()
        if runs[0].validation_losses
    }
    before = recorded.epochs_before(methods)
    figure = figures.learning_curves(losses, before, validation)
    caption = "Training loss by epoch, a line per run"
    weighed = [label(method) for method, runs in methods.items() if runs[0].weighed]
    if weighed:
        caption += f". Weighed, so not to be held against others: {'; '.join(weighed)}"
    return [_picture(caption, figure)]


def _alphas(methods: Methods) -> list[Picture]:
    pictures = []
    for method, runs in methods.items():
        units = runs[0].alphas
        if units:
            figure = figures.alpha(units, sorted(runs[0].json("answers")))
            caption = f"Alpha of {label(method)}, seed {runs[0].seed}"
            pictures.append(_picture(caption, figure))
    return pictures


def _alphas_by_epoch(methods: Methods) -> list[Picture]:
    pictures = []
    for method, runs in methods.items():
        history = runs[0].alphas_by_epoch
        if history:
            caption = f"Mean alpha of {label(method)} by epoch, seed {runs[0].seed}"
            pictures.append(_picture(caption, figures.alphas_by_epoch(history)))
    return pictures


def _splits(recipe: str, methods: Methods, rows: Sequence[Row]) -> list[Picture]:
    if (
        sum(x.startswith("split@") for x in methods) < 2
        or baseline("split") not in methods
    ):
        return []
    published = paper.splits(recipe)
    of_paper = {task: name for task, name in published}
    panels = [(task, of_paper.get(task, name)) for task, name in _headlines(rows)]
    figure = figures.splits(rows, panels, published)
    return [_picture("Gain of a split at each layer over its baseline", figure)]


def _classes(methods: Methods) -> list[Picture]:
    """The change of each class by the methods of cross-stitch."""
    pictures = []
    for method in ("cross_stitch", "cross_stitch_from_start"):
        against = baseline(method) or ""
        changes = recorded.class_changes(
            methods.get(method, []), methods.get(against, [])
        )
        for (task, name), (classes, gains, counts) in changes.items():
            title = (
                f"{metric(name).label} of {task}: {label(method)} minus "
                f"{label(against)}, seeds: {len(gains)}"
            )
            spread = gains.std(axis=0, ddof=1) if len(gains) > 1 else None
            figure = figures.per_class(
                title, classes, gains.mean(axis=0), counts, spread
            )
            pictures.append(_picture(title, figure))
    return pictures


def _label_fractions(recipes: Mapping[Path, Methods]) -> list[Picture]:
    """A picture for each recipe that was run with several label fractions."""
    groups: dict[str, dict[float, list]] = {}
    lacking = {}
    for folder, methods in recipes.items():
        known = recorded.label_fraction([runs[0] for runs in methods.values()])
        if known and not folder.name.endswith("-search"):  # on a part of train
            name = whatever_labels(folder.name)
            groups.setdefault(name, {})[known[1]] = _rows(methods)
            lacking[name] = known[0]
    pictures = []
    for name, by_share in groups.items():
        if len(by_share) > 1:
            headlines = _headlines(next(iter(by_share.values())))
            headlines.sort(key=lambda headline: headline[0] != lacking[name])
            figure = figures.label_fraction(by_share, headlines)
            pictures.append(_picture(f"{name}: labels of {lacking[name]}", figure))
    return pictures


def _picture(caption: str, figure: Figure) -> Picture:
    """(caption, data URI)."""
    file = io.BytesIO()
    # Equal runs make equal pages: by default the ids in a picture are drawn by chance.
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return caption, _data_uri("image/svg+xml", file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _hash(script: str) -> str:
    """What a browser's content security policy knows the script by."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
