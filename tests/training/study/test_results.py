import itertools
import os

import numpy as np
import pytest
from scipy.stats import ttest_rel

from training.runs import Row, write_csv
from training.study.results import (
    paired_difference,
    read_csv,
    statistics,
)


def rows_of(values, metric="miou", task="segmentation"):
    """Rows of {method: values by seed}."""
    return [
        Row(method, seed, task, metric, value)
        for method, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def cells(values, metric="miou"):
    """{method: the cell}."""
    (table,) = statistics(rows_of(values, metric))
    return {method: cell for method, (cell,) in table.cells.items()}


@pytest.mark.parametrize("seeds", [2, 3, 5, 11])
def test_the_paired_difference_is_that_of_the_paired_t_test(seeds):
    ours, theirs = np.random.default_rng(seeds).normal(20, 1, (2, seeds))
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)

    known = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))

    assert known.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (known.low, known.high) == pytest.approx((expected.low, expected.high))
    assert known.seeds == seeds


def test_an_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, and t(2, 0.975) = 4.302653.
    known = paired_difference({0: 11, 1: 22, 2: 33}, {0: 10, 1: 20, 2: 30})

    half = 4.302653 / np.sqrt(3)
    assert known == pytest.approx((2, 2 - half, 2 + half, 3))


def test_only_seeds_of_both_are_paired():
    ours = {0: 5.0, 1: 6.0, 7: 8.0, 9: 100.0}
    theirs = {9: 99.0, 0: 1.0, 2: -50.0, 7: 7.0}

    known = paired_difference(ours, theirs)

    assert known.seeds == 3
    assert known.mean == pytest.approx((4 + 1 + 1) / 3)
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 0.0, 2: 0.0}) is None


def test_mean_and_deviation_are_those_of_the_sample():
    values = np.random.default_rng(0).normal(20, 1, 5)

    cell = cells({"single_task": values})["single_task"]

    assert cell.mean == pytest.approx(values.sum() / 5)
    squares = ((values - values.mean()) ** 2).sum()
    assert cell.deviation == pytest.approx((squares / 4) ** 0.5)
    assert cell.seeds == 5


def test_one_seed_has_neither_deviation_nor_interval_nor_mark():
    cell = cells({"single_task_longer": [20.0], "cross_stitch": [29.0]})["cross_stitch"]

    assert (cell.deviation, cell.difference, cell.best) == (None, None, False)
    assert (cell.value, cell.gain) == ("29.0", "")


@pytest.mark.parametrize(
    ("metric", "ours", "marked"),
    [
        ("miou", [21.0, 22.1, 23.0], True),
        ("miou", [19.0, 20.1, 21.0], False),  # worse
        ("miou", [21.0, 22.0, 22.0], False),  # perhaps by chance
        ("mean_angle", [19.0, 20.1, 21.0], True),
        ("mean_angle", [21.0, 22.1, 23.0], False),
        ("pixels", [21.0, 22.1, 23.0], False),  # neither is better
    ],
)
def test_the_best_is_marked_where_its_interval_excludes_zero(metric, ours, marked):
    known = cells({"single_task_longer": [20, 21, 22], "cross_stitch": ours}, metric)

    assert known["cross_stitch"].best is marked
    assert not known["single_task_longer"].best


def test_a_method_that_another_one_beats_is_not_marked():
    values = {
        "single_task_longer": [20, 21, 22],
        "cross_stitch": [21, 22.1, 23],
        "cross_stitch@same_task=0.5": [22, 23.1, 24],
    }

    marked = [method for method, cell in cells(values).items() if cell.best]

    assert marked == ["cross_stitch@same_task=0.5"]


def test_a_method_with_the_best_mean_and_worse_pairs_is_not_marked():
    (table,) = statistics(
        [
            *rows_of({"single_task_longer": [20, 21, 22]}),
            *rows_of({"cross_stitch": [19, 20.1, 21, 100]}),  # a seed of its own
        ]
    )

    (cell,) = table.cells["cross_stitch"]
    assert cell.mean > 21
    assert cell.difference.high < 0
    assert not cell.best


@pytest.mark.parametrize(
    ("method", "baseline"),
    [
        ("ensemble", "single_task"),
        ("hard_sharing", "single_task_as_long"),
        ("split@conv4", "single_task_as_long"),
        ("cross_stitch@alpha_multiplier=10", "single_task_longer"),
        ("cross_stitch_from_start", "single_task_as_long"),
    ],
)
def test_each_method_is_compared_with_its_own_baseline(method, baseline):
    names = ("single_task", "single_task_longer", "single_task_as_long")
    values = {name: [i, i + 1.0] for i, name in enumerate(names)}

    known = cells(values | {method: [10.0, 11.1]})[method]

    assert known.difference.mean == pytest.approx(10.05 - names.index(baseline))


def test_raw_values_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    written = [
        Row(method, seed, task, "miou", float(rng.normal()))
        for method, seed, task in itertools.product(("a@b=1,c=2", "d"), (0, 9), "xy")
    ]
    write_csv(tmp_path / "new" / "methods.csv", Row._fields, written)

    assert read_csv(tmp_path / "new" / "methods.csv") == written
    first, second = (tmp_path / "new" / "methods.csv").read_text().split("\n")[:2]
    assert first == "method,seed,task,metric,value"
    assert second.startswith('"a@b=1,c=2",0,x,miou,')


def test_a_write_that_is_stopped_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "methods.csv"
    write_csv(path, Row._fields, rows_of({"single_task": [1.0]}))
    before = path.read_text()

    def stop(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_csv(path, Row._fields, rows_of({"single_task": [2.0]}))

    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,seed\na,1\n", "Expected the columns method,seed,task,metric,value"),
        ("method,seed,task,metric,value\na,0,b,c,d\n", r"line 2: could not convert"),
        ("method,seed,task,metric,value\na,0,b\n", "line 2"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "methods.csv").write_text(text)

    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "methods.csv")


def test_a_value_that_stands_twice_is_refused():
    with pytest.raises(
        ValueError, match="single_task, seed 0, has segmentation miou tw"
    ):
        statistics(2 * rows_of({"single_task": [1.0]}))


def test_a_metric_of_unknown_direction_is_refused():
    with pytest.raises(
        ValueError, match="whether a higher 'loss' is better: add it to"
    ):
        statistics(rows_of({"single_task": [1.0]}, metric="loss"))
