"""What the command line prints: lines and tables."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:  # these import TensorFlow
    from export.inspect.bench import Report as Times
    from export.inspect.verify import Report as Differences
    from export.make.changes import Change
    from export.make.dropping import Link

# Names of files and classes are shown as they are, [brackets] and :colons: too.
console = Console(markup=False, emoji=False)


def in_words(error: Exception) -> str:
    """The error; where a server may not be there, with what starts one."""
    if getattr(getattr(error, "code", None), "name", "") != "UNAVAILABLE":
        return str(error)
    return (
        f"{error}. Where no server runs, `python -m export serve FOLDER` starts one, "
        "with gRPC at 127.0.0.1:8500 and REST at http://127.0.0.1:8501"
    )


def print_error(error: object) -> None:
    _print_line("Error", "red", " ".join(str(error).split()))


def print_warning(text: str) -> None:
    _print_line("Warning", "yellow", text)


def _print_line(word: str, colour: str, text: str) -> None:
    line = Text.assemble((f"{word}:", colour), " ", text)
    Console(stderr=True).print(line, soft_wrap=True)


def table(*headers: str) -> Table:
    """A table whose names are folded where they do not fit, and not cut off."""
    return Table(*(Column(header, overflow="fold") for header in headers))


def print_links(links: "Iterable[Link]") -> None:
    rows = table("left out at", "task", "takes nothing from", "change, alone")
    for link in links:
        rows.add_row(link.unit, link.task, link.source, f"{link.effect:.2g}")
    console.print(rows)


def print_changes(changes: "Mapping[str, Change]", batch: int) -> None:
    rows = table(
        "signature",
        "ops",
        "MB of\nweights",
        f"ms,\nbatch {batch}",
        "largest\nchange",
        "answers",
    )
    for name, x in changes.items():
        before, after = x.before, x.after
        rows.add_row(
            name,
            f"{before.ops.total()} ->\n{after.ops.total()}",
            f"{_mb(before.variable_bytes)} ->\n{_mb(after.variable_bytes)}",
            f"{1000 * x.seconds_before:.1f} ->\n{1000 * x.seconds_after:.1f}",
            f"{x.largest:.2g}",
            "\n".join(f"{task}: {metric}" for task, metric in x.metrics.items()),
        )
    console.print(rows)
    console.print(
        "A change is of an output, in parts of its largest value; of whole numbers and "
        "text it is the share that changes."
    )


def print_version(version: Path, others: Iterable[int], report: "Differences") -> None:
    made_by = ", ".join(f"{k} {v}" for k, v in report.about["versions"].items())
    console.print(
        f"{version}: {_mb(report.bytes)} MB, {report.about['dtype']}, made by {made_by}"
        + (
            f"; there are also versions {', '.join(map(str, others))}" if others else ""
        ),
        soft_wrap=True,
    )
    rows = table("signature", "takes, gives", "ops", "MB of weights", "difference")
    for name, signature in report.signatures.items():
        differences = report.differences.get(name, {}).values()
        tensors = [*signature.inputs.items(), *signature.outputs.items()]
        rows.add_row(
            name,
            "\n".join(f"{k}: {v}" for k, v in tensors),
            str(signature.ops.total()),
            _mb(signature.variable_bytes),
            f"{max(differences):.1g}" if differences else "not run",
        )
    console.print(rows)


def print_times(report: "Times") -> None:
    rows = table("batch", "signature", "asked", "p50 ms", "p99 ms", "examples/s")
    for row in report.rows:
        rows.add_row(
            str(row.batch),
            row.signature,
            row.way,
            f"{1000 * row.percentile(50):.1f}",
            f"{1000 * row.percentile(99):.1f}",
            f"{row.throughput:.1f}",
        )
    console.print(rows)
    for batch, ratio in report.together.items():
        line = f"batch {batch}: all tasks in one request take {ratio:.2f} of one by one"
        if batch in report.stitched:
            line += f"; stitched {report.stitched[batch]:.3f} of unstitched"
        console.print(line)
    for line in report.left_out:
        print_warning(f"left out, for it is too large: {line}")
    for name, signature in report.signatures.items():
        mb = _mb(signature.variable_bytes)
        console.print(f"{name}: {signature.ops.total()} ops, {mb} MB of weights")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
