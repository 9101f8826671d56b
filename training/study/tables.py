"""Markdown tables of the raw values, and the files that they stand in.

The table of `docs/results/<recipe>/<study>.csv` stands in a Markdown file between
`<!-- table: RECIPE/STUDY -->` and `<!-- /table -->`. With ` brief` behind `STUDY` it is
one table for all tasks, of the first metric of each.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from training.files import read_csv, read_text, write_text
from training.study import delta_m, paper
from training.study.results import (
    PUBLISHED,
    Cell,
    Table,
    baseline,
    label,
    metric,
    read_rows,
    statistics,
)

_TABLE = re.compile(
    r"(<!-- table: (\S+)/(\S+)( brief)? -->\n).*?(?=<!-- /table -->)", re.DOTALL
)
_MARK = re.compile(r"<!-- */?table\b.*?-->")
_MOST_COLUMNS = 8  # that fit on a page; a table of more is turned on its side
_ONE_SEED = "One seed: a difference may be chance."


def update_tables(path: Path, results: Path = PUBLISHED) -> bool:
    """Writes the tables of a Markdown file anew, from their raw values.

    Args:
        path: Path of the Markdown file.
        results: Path of the folder of `<recipe>/<study>.csv`.

    Returns:
        Whether the file has changed.

    Raises:
        ValueError: For a mark that is not closed, or that has no raw values.
    """
    before = read_text(path)
    try:
        after = filled(before, results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if after != before:
        write_text(path, after)
    return after != before


def filled(text: str, results: Path = PUBLISHED) -> str:
    """The Markdown text with each marked table as its raw values give it."""
    marks = _MARK.findall(text)
    pairs = list(zip(marks[::2], marks[1::2], strict=False))
    for mark, end in pairs:
        if not _TABLE.match(f"{mark}\n{end}"):
            raise ValueError(
                "Expected '<!-- table: RECIPE/STUDY -->', and '<!-- /table -->' after "
                f"the table. Received: '{mark}', then '{end}'"
            )
    if len(marks) % 2:
        raise ValueError(f"Expected '<!-- /table -->' after '{marks[-1]}'")
    return _TABLE.sub(lambda x: x[1] + _of(x[2], x[3], x[4] is not None, results), text)


def _of(recipe: str, study: str, is_brief: bool, results: Path) -> str:
    path = results / recipe / f"{study}.csv"
    if not path.exists():
        raise ValueError(
            f"There are no raw values {path} for the table {recipe}/{study}. `python "
            f"-m training study RECIPE {study}`, with the recipe and options by which "
            f"runs are in RUNS/{recipe}, writes them to RUNS/results: then give that "
            "folder, as in --results runs/results"
        )
    rows = [row for row, _ in read_rows(path)]
    if is_brief:
        return brief(statistics(rows), _multiply_adds(path.with_name("sizes.csv")))
    return markdown(statistics(rows, paper.table(recipe, study)))


def brief(
    tables: Sequence[Table], multiply_adds: Mapping[str, float] | None = None
) -> str:
    """The first metric of each task and Delta_m, of all tasks in one Markdown table.

    Args:
        tables: List of `Table`, see `results.statistics`.
        multiply_adds: Dict of method to those of its model: a column more.
    """
    costs = _costs(multiply_adds or {})
    several = any(cell.seeds > 1 for table in tables for cell in _cells(table))
    more = ["cost ↓"] if costs else []
    titles = [f"{table.task}: {metric(table.metrics[0]).title}" for table in tables]
    lines = [["", "seeds", *titles, metric("delta_m").title, *more]]
    methods = dict.fromkeys(x for table in tables for x in table.cells)
    for method in methods:
        rows = [(table.metrics, table.cells.get(method)) for table in tables]
        seeds = next(t.seeds(method) for t in tables if method in t.cells)
        # A value among differences would be taken for one.
        compared = several and baseline(method) in methods
        shown = (
            cell.change
            if cell and (cell.difference or cell.is_change or not compared)
            else ""
            for cell in _brief_row(rows)
        )
        cost = [costs.get(method, "") for _ in more]
        lines.append([label(method), seeds, *shown, *cost])
    for one, other in dict.fromkeys(x for table in tables for x in table.rivals):
        rows = [(table.metrics, table.rivals.get((one, other))) for table in tables]
        lines.append([*_rival_line(one, other, _brief_row(rows)), *("" for _ in more)])
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    notes = [
        "The baseline: mean and standard deviation over the seeds. The others: their "
        "mean difference to it, with its 95 % t-interval. †: certain at 5 % over all "
        "metrics together (Holm)."
        if several
        else _ONE_SEED,
        f"{delta_m.SAYS}.",
    ]
    if costs:
        notes.append(
            "Cost: the multiply-adds of an answer for all tasks, as a multiple of the "
            "baseline's (those of the units are few, and not counted)."
        )
    text = "".join(_line(line) for line in lines)
    return "\n".join(["", text, " ".join(notes), ""])


def _multiply_adds(sizes: Path) -> dict[str, float]:
    """{method: multiply-adds of its model}, empty where there is no such file."""
    return {
        line["method"]: float(line["multiply_adds"])
        for line in read_csv(sizes, missing_ok=True)
    }


def _costs(multiply_adds: Mapping[str, float]) -> dict[str, str]:
    """{method: multiply-adds as a multiple of its baseline's}."""
    return {
        method: f"{value / multiply_adds[of]:.2f}"
        for method, value in multiply_adds.items()
        if (of := baseline(method) or method) in multiply_adds
    }


def _brief_row(
    rows: Sequence[tuple[list[str], list[Cell | None] | None]],
) -> list[Cell | None]:
    """The first metric's cell of each task's row, and Delta_m's, which all share."""
    of_all = (
        dict(zip(metrics, row, strict=True)).get("delta_m")
        for metrics, row in rows
        if row
    )
    return [*(row[0] if row else None for _, row in rows), next(of_all, None)]


def markdown(tables: Sequence[Table]) -> str:
    """The tables in Markdown, with a line on how to read them.

    Args:
        tables: List of `Table`, see `results.statistics`.
    """
    return "\n".join(["", *map(_table, tables), " ".join(notes(tables)), ""])


def _table(table: Table) -> str:
    lines = [[table.task, "seeds", *(metric(name).title for name in table.metrics)]]
    for method, cells in table.cells.items():
        lines.append([label(method), table.seeds(method), *map(_cell, cells)])
        if method in table.paper:
            lines.append(_paper_line(method, table.paper[method]))
    for (one, other), cells in table.rivals.items():
        lines.append(_rival_line(one, other, cells))
    for method, values in table.paper.items():
        if method not in table.cells:
            lines.append(_paper_line(method, values))
    if len(lines[0]) > _MOST_COLUMNS + 2:
        lines = [list(line) for line in zip(*lines, strict=True)]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "".join(_line(line) for line in lines)


def _line(cells: Iterable[str]) -> str:
    """A row in Markdown; a class may have a `|` in its name."""
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    value = f"**{cell.value}**" if cell.best else cell.value
    return f"{value}<br>{cell.gain}" if cell.gain else value


def _rival_line(one: str, other: str, cells: Iterable[Cell | None]) -> list[str]:
    cells = list(cells)
    seeds = max((cell.seeds for cell in cells if cell), default=0)
    shown = (cell.change if cell else "" for cell in cells)
    return [f"{label(one)} minus {label(other)}", str(seeds), *shown]


def _paper_line(method: str, values: Iterable[float | None]) -> list[str]:
    shown = ("" if value is None else f"*{value}*" for value in values)
    return [f"*paper: {label(method)}*", "", *shown]


def _cells(table: Table) -> list[Cell]:
    rows = (*table.cells.values(), *table.rivals.values())
    return [cell for row in rows for cell in row if cell]


def notes(tables: Sequence[Table]) -> list[str]:
    """How to read the tables, as sentences: what the numbers are, and of how many."""
    compared = dict.fromkeys(
        (method.partition("@")[0], of)
        for table in tables
        for method, of in table.baselines.items()
    )
    cells = [cell for table in tables for cell in _cells(table)]
    sentences = []
    if any(cell.seeds > 1 for cell in cells):
        sentences.append("Mean and standard deviation over the seeds.")
    else:
        sentences.append(_ONE_SEED)
    if compared:
        pairs = (f"{label(x)} against {label(y)}" for x, y in compared)
        count = len({id(cell) for cell in cells if cell.difference})
        sentences.append(
            "Below it the mean difference to the baseline over the same seeds, with "
            f"its 95 % t-interval ({'; '.join(pairs)}). †: certain at 5 % over all "
            f"{count} differences together (Holm); of so many intervals some exclude "
            "zero by chance. Bold: the best method in that metric, which is certainly "
            "better than its baseline, and differs from each other method."
        )
    if any("delta_m" in table.metrics for table in tables):
        sentences.append(f"{delta_m.SAYS}.")
    if any(table.paper for table in tables):
        sentences.append(
            "In italics what the paper reports (AlexNet from ImageNet's weights, "
            "another protocol), for orientation."
        )
    return sentences
